"""Evaluate a checkpoint: AP for the detectors (Table 1), rank-k for RICE (Table 2), pictures of both.

    python eval.py --ckpt runs/tiny/md.pt                      the checkpoint knows its stage, data and configuration
    python eval.py --ckpt runs/tiny/rice.pt --json rice.json
    python eval.py --ckpt runs/rand?/rice.pt runs/s?/rice.pt   a row per configuration, mean over seeds, differences
    python eval.py --ckpt runs/tiny/rice.pt --pictures looks   hardest misses, hits, attention, training curves
    python eval.py --ckpt runs/tiny/rice.pt --live live.mp4 --shop images      which product is on sale when
    torchrun --nproc_per_node 8 eval.py --ckpt runs/paper/md.pt --data LPR4M

Data flow:  checkpoint -> model: frames [B,T,3,H,W] -> their boxes [F,6], one each -> hits [L,F] -> AP
                        or model: clips [B,T,3,S,S], a live's shop images [M,3,S,S] -> embeddings [Q,D], [M,D]
                                  -> similarity [Q,M] -> place of the first true image [Q] -> rank-k

Letters: Q clips (queries), M shop images, G true boxes or pairs of boxes, F frames (or what was found in them, one
each), L IoU levels, D length of an embedding, B batch, T frames of a clip, N boxes of a frame, K classes, P patches of
a picture, H W pixels, S side of a square view, R tokens of a clip, W their width; n and q are some of them. Boxes are
xyxy in the annotation's pixels: those of the picture on disk, unless its side file tells an original size.
"""
import contextlib
import ctypes
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.functional import logsigmoid
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

import data
import detect
import rice
from data import BadInput

# ------------------------------------------------------------------ metrics, pure functions of arrays

AREAS = {"all": (0, 1e10), "small": (0, 32 ** 2), "medium": (32 ** 2, 96 ** 2), "large": (96 ** 2, 1e10)}


def average_precision(truth, detections):
    """COCO's box AP: 10 IoU thresholds, 101 recall points, 100 detections an image and category, mean over categories.

    truth: dict of arrays image [G], category [G], box_xyxy [G,4]; detections: the same and score, a row each. Equal
    scores keep the order of images. One category in all rows gives the class-agnostic figure. A category without a true
    box does not count. -> AP, AP50, AP75, APsmall, APmedium, APlarge (-1 where the size has no true box), AR1, AR10,
    AR100, ARsmall, ARmedium, ARlarge, per_category {category: AP}; ValueError when there is no true box at all."""
    truth, detections = ({name: np.asarray(value) for name, value in side.items()} for side in (truth, detections))
    if not len(truth["image"]):
        raise ValueError("average_precision: no true box, so there is nothing to find")
    measured = {}
    for category in np.unique(truth["category"]):
        true, found = ({name: value[side["category"] == category] for name, value in side.items()}
                       for side in (truth, detections))
        measured[category.item()] = _curves(true, found)
    result = {"per_category": {category: float(sizes["all"][0].mean()) for category, sizes in measured.items()}}
    for area in AREAS:
        curves, name = [sizes[area] for sizes in measured.values() if area in sizes], area.removeprefix("all")
        result[f"AP{name}"] = float(np.mean([precision for precision, _ in curves])) if curves else -1.0
        result[f"AR{name or 100}"] = float(np.mean([recall[2] for _, recall in curves])) if curves else -1.0
    for name, kind, n in (("AP50", 0, 0), ("AP75", 0, 5), ("AR1", 1, 0), ("AR10", 1, 1)):
        result[name] = float(np.mean([sizes["all"][kind][n] for sizes in measured.values()]))
    return result


def _curves(true, found):
    """One category: {size of box: (precision at 101 recalls [10,101], recall by 1, 10, 100 boxes an image [3,10])}."""
    t_order, d_order = np.argsort(true["image"], kind="stable"), np.lexsort((-found["score"], found["image"]))
    t_image, d_image = true["image"][t_order], found["image"][d_order]
    rank = np.arange(len(d_image)) - np.searchsorted(d_image, d_image)         # place in its image, the surest first
    d_order, d_image, rank = (x[rank < 100] for x in (d_order, d_image, rank))
    t_box, d_box = (side["box_xyxy"][order].reshape(-1, 4).astype(np.float64)
                    for side, order in ((true, t_order), (found, d_order)))
    # Every detection with every true box of its image.
    first = np.searchsorted(t_image, d_image)
    count = np.searchsorted(t_image, d_image, side="right") - first
    pair_d = np.repeat(np.arange(len(d_image)), count)
    pair_t = np.arange(len(pair_d)) - np.repeat(np.cumsum(count) - count, count) + first[pair_d]
    iou = overlaps(d_box[pair_d], t_box[pair_t])
    t_area, d_area = ((box[:, 2:] - box[:, :2]).prod(1) for box in (t_box, d_box))
    best_first = np.argsort(-found["score"][d_order], kind="stable")
    result = {}
    for area, (low, high) in AREAS.items():
        ignored = (t_area < low) | (t_area > high)
        if ignored.all():
            continue
        hit, skip = _greedy(pair_d, pair_t, iou, rank, ignored)
        skip |= ~hit & ((d_area < low) | (d_area > high))
        right, shown = (hit & ~skip)[:, best_first], ~skip[:, best_first]
        recall = [(right & (rank[best_first] < most)).sum(1) / (~ignored).sum() for most in (1, 10, 100)]
        result[area] = precision_at_recalls(right.cumsum(1), shown.cumsum(1), (~ignored).sum()), recall
    return result


def _greedy(pair_d, pair_t, iou, rank, ignored):
    """Match best detections first: round r gives every image's r-th detection its best free box, an ignored one only
    when no other is left, of equal ones the last (as pycocotools). -> matched [10,F], to an ignored box [10,F]."""
    order = np.lexsort((-pair_t, -iou, ignored[pair_t], pair_d, rank[pair_d]))
    pair_d, pair_t, iou = pair_d[order], pair_t[order], iou[order]
    rounds = np.searchsorted(rank[pair_d], np.arange(rank.max(initial=-1) + 2))
    hit, skip = np.zeros((10, len(rank)), bool), np.zeros((10, len(rank)), bool)
    for level, threshold in enumerate(np.linspace(0.5, 0.95, 10)):
        free = np.ones(len(ignored), bool)
        for low, high in zip(rounds, rounds[1:]):
            able = low + np.flatnonzero(free[pair_t[low:high]] & (iou[low:high] >= threshold))
            winner, at = np.unique(pair_d[able], return_index=True)
            box = pair_t[able[at]]
            free[box], hit[level, winner], skip[level, winner] = False, True, ignored[box]
    return hit, skip


def precision_at_recalls(right, shown, total):
    """right, shown [L,F]: how many of the first boxes are right and count at all; total: how many true boxes there are
    -> the precision at 101 recalls, made to fall [L,101]."""
    precision = np.maximum.accumulate((right / np.maximum(shown, 1))[:, ::-1], 1)[:, ::-1]
    return np.stack([np.append(row, 0)[np.searchsorted(recall, np.linspace(0, 1, 101))]
                     for row, recall in zip(precision, right / total)])


def overlaps(a, b):
    """IoU row by row: a [G,4], b [G,4] -> [G]."""
    inner = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0).prod(1)
    return inner / np.maximum((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner, 1e-9)


def rank_k(similarity, positive, gallery=None, ks=(1, 5, 10)):
    """Share of queries with a true image among the first k of their gallery, of all queries: {k: fraction}. similarity
    [Q,M], positive [Q,M] bool, gallery [Q,M] bool (which images a query is compared with; None: all)."""
    rank = first_true(similarity, positive, gallery)
    return {k: float((rank < k).mean()) if len(rank) else 0.0 for k in ks}


def first_true(similarity, positive, gallery=None):
    """How many images stand before the first true one in each query's ranking: [Q]. Arguments as in rank_k. Ties count
    against us; without a true image in the gallery, or a finite score (no prediction), the place is beyond every k."""
    similarity, positive = np.asarray(similarity), np.asarray(positive, bool)
    gallery = np.ones_like(positive) if gallery is None else np.asarray(gallery, bool)
    best = np.where(positive & gallery & np.isfinite(similarity), similarity, -np.inf).max(1, initial=-np.inf)
    ahead = (gallery & ~positive & ~(similarity < best[:, None])).sum(1)
    return np.where(np.isfinite(best), ahead, np.iinfo(np.int64).max)


@torch.no_grad()
def nearest(queries, images, k, block=1024, wide=32768, group=32):
    """The k images of the greatest product with each query, exactly: queries [Q,D], images [M,D] -> scores and places,
    both [Q,min(k,M)]. Memory is one block of products. The k greatest of a row lie in the k groups of columns with the
    greatest maxima, and maxima of groups are found much faster than the order of all columns."""
    found, k = [], min(k, len(images))
    wide = max(group, len(images) // max(1, math.ceil(len(images) / wide)) // group * group)  # hardly a rest is left
    for q in queries.split(block):
        best, place = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.long, device=q.device)
        for start in range(0, len(images), wide):
            score = (images[start:start + wide] @ q.T).T              # [q,wide]; the other way round is slower on a CPU
            column = torch.arange(score.shape[1], device=q.device).expand(len(q), -1)            # [q,wide]
            if score.shape[1] == wide and k < wide // group:
                greatest = score.T.unflatten(0, (-1, group)).amax(1).T                           # [q,wide/group]
                chosen = greatest.topk(k, sorted=False).indices[..., None].expand(-1, -1, group)  # [q,k,group]
                score, column = (x.unflatten(1, (-1, group)).gather(1, chosen).flatten(1)
                                 for x in (score, column))                                       # [q,k*group]
            best, at = torch.cat([best, score], 1).topk(min(k, best.shape[1] + score.shape[1]))  # [q,k]
            place = torch.cat([place, column + start], 1).gather(1, at)                          # [q,k]
        found.append((best, place))
    return tuple(torch.cat(column) for column in zip(*found))


# ------------------------------------------------------------------ checkpoints and processes

# Fields of a configuration that a run which goes on may change: none of them changes its weights from there on.
WEIGHTLESS = {"workers", "save_every", "log_every", "eval_every", "out", "detectors", "init"}

STAGES = ("sd", "md", "rice")
# The fields that shape SD; MD takes them from the SD that it is built on.
OF_SD = ("queries", "dim", "heads", "encoder_layers", "decoder_layers", "ffn", "backbone", "dense", "looks")
# What fields can be that evaluation reads too; the others' rules stand in train.py.
CHOICES = {"boxes": ("md", "sd", "true", "none"), "view": ("box", "mask", "frame"), "negatives": ("hard", "rand"),
           "text": ("both", "asr", "title", "none"), "losses": ("icl", "icl,pmd", "icl,pmd,pfr"),
           "backbone": ("small", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")}


def whole_number(value, low=1, high=2 ** 31):
    """Whether a value is a whole number from low to below high."""
    return type(value) is int and low <= value < high


def whole_numbers(value):
    """Whether a value is a list of whole numbers from 1, neither long nor large."""
    return type(value) is list and 0 < len(value) < 1000 and all(whole_number(n, high=10 ** 6) for n in value)


# What is read of a configuration, a flag's or a checkpoint's, and whether it can be that.
NEEDED = {name: values.__contains__ for name, values in (CHOICES | {"stage": STAGES}).items()}
NEEDED |= dict.fromkeys(("data", "detectors"), lambda value: type(value) is str)
NEEDED |= dict.fromkeys(("dense", "looks"), lambda value: type(value) in (int, float) and 0 <= value < 2 ** 31)
NEEDED |= {"keep": whole_numbers,
           "shortest": lambda value: whole_numbers(value) and len(value) == 3 and value[0] <= value[1]}
NEEDED |= {name: functools.partial(whole_number, low=low, high=high) for names, low, high in (
    ("steps frames longest dim heads ffn queries width vit_heads embedding n_neg rerank", 1, 2 ** 31),
    ("seed patch overfit", 0, 2 ** 31), ("layers encoder_layers", 1, 1000), ("decoder_layers", 2, 1000),
    ("workers", 0, 1000), ("size", 2, 2 ** 31)) for name in names.split()}


def build(config, classes, vocab):
    """The model of a stage from its configuration (a plain dict): SD, MD or RICE."""
    if config["stage"] == "rice":
        vit = {name: config[name] for name in ("width", "layers", "patch", "size")}
        return rice.RICE(vit | {"heads": config["vit_heads"], "dim": config["embedding"]}, vocab,
                         config["n_neg"], config["negatives"], tuple(config["losses"].split(",")),
                         masked=config["view"] == "mask")
    sd = detect.SD(classes, **{name: config[name] for name in OF_SD})
    return sd if config["stage"] == "sd" else detect.MD(sd, config["keep"])


def shapes_of(config, classes, vocab):
    """{name: (shape, type)} of the weights that `build` makes, without memory for them and without a random draw;
    ValueError when sizes do not go together, RuntimeError when they are too large."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return {name: (value.shape, value.dtype) for name, value in build(config, classes, vocab).state_dict().items()}


def read_checkpoint(path):
    """What train.py saved, as plain tensors and dicts; BadInput when the file is missing or something else."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such checkpoint; train it with `python train.py --stage {Path(path).stem}`")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"config", "model", "step", "categories"} - checkpoint.keys()
        wrong = f"no {', '.join(sorted(missing))}" if missing else unsound(checkpoint)
    except Exception as error:             # torch.load raises whatever the broken bytes lead it to
        wrong = type(error).__name__
    if wrong:
        raise BadInput(f"{path}: not a checkpoint of train.py ({wrong})")
    return checkpoint


def unsound(checkpoint):
    """What is wrong with a checkpoint's parts, "" when nothing is: what is read of its configuration is of its kind,
    and weights are finite, of the names and shapes that it asks for. RICE's detector is held against the same rules."""
    try:
        config, weights, detector = checkpoint["config"], checkpoint["model"], checkpoint.get("detector")
        json.dumps([config, checkpoint.get("versions")], ensure_ascii=False).encode()      # as every result holds them
        wrong = [f"{name} {ascii(config[name])[:40]}" if name in config else f"no {name}"
                 for name, fits in NEEDED.items() if not fits(config.get(name))]
        wrong += [f"{name} {ascii(value)[:40]}" for name, value in config.items() if not str(value).isprintable()]
        if wrong or (config["view"] == "frame") != (config["boxes"] == "none"):
            return f"its configuration has {', '.join(wrong) or 'boxes and a view that contradict each other'}"
        rice_too, categories = config["stage"] == "rice", checkpoint["categories"]
        if not all(type(raw) is int and type(name) is str for raw, name in categories.items()):
            return "categories: expected {number: name}"
        if not categories and not rice_too:
            return "categories: expected one or more"
        if not whole_number(checkpoint.get("step", 0), 0) or checkpoint.get("step", 0) > config["steps"]:
            return f"step: expected 0 to {config['steps']}"
        if not isinstance(checkpoint.get("best", 0.0), (int, float)):
            return "best: expected a number"
        vocab = data.Tokenizer(checkpoint["tokenizer"]).vocab if rice_too else None
        asked = shapes_of(config, len(categories), vocab)
        found = {name: (value.shape, value.dtype) for name, value in weights.items()}
        wrong = [name for name in asked.keys() | found.keys() if asked.get(name) != found.get(name)]
        wrong = wrong or [name for name, value in weights.items() if not np.isfinite(value.numpy()).all()]
        if wrong:
            return f"weights that do not fit its configuration or are not finite: {min(wrong)}, {len(wrong)} in all"
        if detector is not None and (not rice_too or detector["config"]["stage"] not in ("sd", "md")):
            return "detector: expected one of stage sd or md, in a checkpoint of stage rice"
        return unsound(detector) if detector is not None else ""
    except Exception as error:                                                   # parts of another kind raise anything
        return f"{type(error).__name__}: {ascii(str(error))[:200]}"


def restore(checkpoint, device):
    """The model of a checkpoint, in evaluation mode."""
    vocab = data.Tokenizer(checkpoint["tokenizer"]).vocab if "tokenizer" in checkpoint else None
    model = build(checkpoint["config"], len(checkpoint["categories"]), vocab)
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


def fingerprint(checkpoint):
    """A short text that changes with any weight of the model."""
    mark = hashlib.sha256()
    for value in checkpoint["model"].values():
        mark.update(value.numpy().tobytes())
    return mark.hexdigest()[:16]


def keep_memory():
    """Let this process keep the memory that it frees, where the allocator is glibc's: given back to the system and
    taken anew, each 4 KiB of it cost a page fault, on a CPU in all up to a tenth of a training step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):                          # another allocator or system
        allocator = ctypes.CDLL(None)
        allocator.mallopt(-1, 2 ** 31 - 1)                                                   # M_TRIM_THRESHOLD, bytes
        allocator.mallopt(-4, 0)                                                             # M_MMAP_MAX, pieces


def pick_device():
    """cuda (by local rank), else mps, else cpu."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def start_processes():
    """Join torchrun's group when there is one: gloo, and nccl for what lies on CUDA devices. -> rank, processes."""
    if "RANK" in os.environ and not dist.is_initialized():
        pick_device()
        store, rank, world = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                store=fresh_part(store, rank, world), rank=rank, world_size=world)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def fresh_part(store, rank, world):
    """The part of torchrun's store that belongs to this start of the job. After a restart the store still holds the
    addresses of the dead, and who reads one waits for them: so the first process names a part, and answers every
    question in the store, the dead ones' too, until all others have the name."""
    mine = os.urandom(16).hex()
    if rank:
        store.set(f"question {rank}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.add(name, 1)
    else:
        name = mine
        while store.add(name, 0) < world - 1:
            for other in range(1, world):
                store.set(f"answer to {store.get(f'question {other}').decode()}", name)
            time.sleep(0.05)
    return dist.PrefixStore(name, store)


def is_first():
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def everyones(value):
    """[value] of every process, in order of rank; of this one alone when it is alone."""
    parts = [value]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, value)
    return parts


def watch(batches, text):
    """A progress bar on the first process."""
    return tqdm(batches, desc=text, unit="", leave=False, delay=1, disable=not is_first())


# ------------------------------------------------------------------ detecting

VOTE = 2.0            # weight of the vote; on val lives 0.5, 1, 2, 4, 8 gave AP 40.4, 41.7, 42.4, 42.5, 41.4 (one SD)


@torch.no_grad()
def predict(model, config, categories, lives, device, every_frame=True, controls=False):
    """One box for every frame of a split: by SD, when `model` is MD by MD too, and with `controls` by its two controls
    -> arrays over frames: clip [F], position in it [F], and for each method [F,6] = x1 y1 x2 y2 in the annotation's
    pixels, score (-1: the frame cannot be read, there is no box), class. every_frame=False takes only `frames` of each
    clip, at even intervals: what RICE needs to train."""
    dataset = data.DetectionSet(lives, categories, config["frames"], config["shortest"], config["longest"], False,
                                every_frame=every_frame)
    if not len(dataset):
        raise BadInput(f"{lives.root}: the clips of the {lives.split} split have no frames")
    # A ResNet lets padding leak across a picture's edge, so what a clip is padded with must not depend on its
    # neighbours in a batch, that is on the number of processes: it goes alone. The small backbone does not mind.
    pixels = config["frames"] * config["shortest"][1] * config["longest"]
    together = max(1, 10 ** 6 // pixels) if config["backbone"] == "small" else 1
    shard = data.shard_batches(range(len(dataset)), together, *start_processes())
    batches = data.load(dataset, shard, config["workers"], device, data.collate_detection)
    rows = {}
    for batch in watch(batches, f"detect {lives.split}"):
        valid, padding = batch["valid"].to(device), batch["padding"].to(device)
        frames = data.to_float(batch["frames"].to(device), data.IMAGENET, padding)
        real = batch["position"] >= 0
        new = {"clip": batch["clip"][:, None].expand(real.shape)[real], "position": batch["position"][real]}
        for name, answer in answers_of(model, frames, padding, valid, controls).items():
            box, score, category = (x.cpu()[real] for x in detect.pick(*answer))
            if not torch.isfinite(torch.cat([box, score[:, None]], 1)[batch["valid"][real]]).all():
                raise BadInput(f"the detector's boxes of {lives.root} are not finite numbers: its weights are spoilt; "
                               "train it anew")
            xyxy = box_convert(box, "cxcywh", "xyxy").clamp(0, 1) * batch["size"][real].repeat(1, 2)
            # A frame that cannot be read has no box; its true boxes stay in the denominator.
            score = score.where(batch["valid"][real], -1)
            new[name] = torch.cat([xyxy, score[:, None], category[:, None]], 1)
        for name, value in new.items():           # one buffer that grows: small arrays, kept, would tear the heap apart
            rows.setdefault(name, bytearray()).extend(value.numpy().tobytes())
    # In the order of the split on any number of processes, of which some may have had no clip.
    types = {"clip": np.int64, "position": np.int64}
    rows = {name: np.frombuffer(value, types.get(name, (np.float32, 6))) for name, value in rows.items()}
    parts = [part for part in everyones(rows) if part]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((rows["position"], rows["clip"]))
    return {name: value[order] for name, value in rows.items()}


def answers_of(model, frames, padding, valid, controls):
    """{method: (logits [B,T,N,K], boxes [B,T,N,4])} of a batch: "sd", "md", and two controls. "md1" is MD as trained,
    not anew, with each frame as its own clip: what it gains by more layers and training. "vote" is SD whose clip votes
    on the category, without training: what time gains without comparing products."""
    if not isinstance(model, detect.MD):
        logits, boxes = model(frames.flatten(0, 1), padding.flatten(0, 1))
        return {"sd": tuple(x[-1].unflatten(0, valid.shape) for x in (logits, boxes))}
    *found, scene = model.single(frames, padding)
    answers = {"sd": found[1:], "md": [x[-1] for x in model.temporal(*found, scene, valid)]}
    if controls:
        alone = torch.ones(valid.numel(), 1, dtype=torch.bool, device=valid.device)              # [B*T,1]
        each = model.temporal(*(x.flatten(0, 1)[:, None] for x in found), scene, alone)
        answers["md1"] = [x[-1].unflatten(0, valid.shape).squeeze(2) for x in each]
        answers["vote"] = vote(found[1], valid), found[2]
    return answers


def vote(logits, valid):
    """SD's logits [B,T,N,K] with what the clip's other frames say about the category added; valid [B,T]. A frame's
    evidence for a class is the log of its best score, normalised over classes; each hears the mean of the others."""
    evidence = logsigmoid(logits).amax(2).log_softmax(-1) * valid[..., None]                     # [B,T,K]
    others = (valid.sum(1, keepdim=True) - 1).clamp(min=1)[..., None]                            # [B,1,1]
    heard = (evidence.sum(1, keepdim=True) - evidence) / others                                  # [B,T,K]
    return logits + VOTE * heard[:, :, None]                                                     # [B,T,N,K]


def predicted_boxes(checkpoint, lives, folder, device, every_frame=True):
    """`predict` with a detector's checkpoint, kept in one file and used again while detector and data are the same."""
    files = sorted((lives.root / "annotations").glob("[!.]*"))
    notes = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    sizes = [checkpoint["config"][name] for name in ("frames", "shortest", "longest")]
    frames = hashlib.sha256(lives.lengths.tobytes()).hexdigest()
    decides = f"{fingerprint(checkpoint)} {lives.root.resolve()} {notes} {sizes} {frames} {every_frame} {VOTE}"
    path = Path(folder) / f"boxes-{lives.split}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}.npz"
    if everyones(path.exists())[0]:                 # one process may look before another has written
        with contextlib.suppress(Exception), np.load(path) as saved:            # torn bytes raise whatever they lead to
            rows = dict(saved)
            if len(set(map(len, rows.values()))) == 1 and rows["clip"].max() < len(lives):
                return rows
        raise BadInput(f"{path}: not the boxes that were kept there; remove it, and they are made again")
    model = restore(checkpoint, device)
    rows = predict(model, checkpoint["config"], checkpoint["categories"], lives, device, every_frame,
                   controls=every_frame)
    if is_first():
        with data.whole(path, f".{os.getpid()}") as part, open(part, "wb") as file:    # another run may write the same
            np.savez(file, **rows)
    return rows


def seen_through(rows, name, clips):
    """Rows of `predict` as PairSet wants them: {"start" [clips+1], "position" [F], "box" [F,6]}."""
    start = np.searchsorted(rows["clip"], np.arange(clips + 1))
    return {"start": start, "position": rows["position"], "box": rows[name]}


# ------------------------------------------------------------------ Table 1

PAPER_1 = {"SD": (36.6, 46.6, 39.6, 27.5, 44.8, 69.0, 23.6, 45.8, 65.4, 20.7, 21.1, 39.8),
           "MD": (37.0, 47.1, 40.2, 27.7, 45.1, 72.7, 24.8, 47.5, 65.7, 25.1, 21.2, 40.3)}
COLUMNS_1 = ("AP", "AP50", "AP75", *(f"{value} {name}" for name, values in data.SPLITS.items() for value in values))
LABELS = {"sd": "SD", "vote": "SD, vote", "md1": "MD, T = 1", "md": "MD"}


def table(header, rows, markdown=False, bold=()):
    """Lines of a table whose columns line up; numbers with one decimal, a dash where there is none; (mean, deviation)
    pairs as "mean ±deviation". bold: places (row, column) of rows that stand out, by ** in Markdown, else by *."""
    def text(cell):
        if isinstance(cell, tuple):
            return text(cell[0]) + (f" ±{cell[1]:.1f}" if cell[1] is not None else "")
        return cell if isinstance(cell, str) else "-" if cell is None or math.isnan(cell) else f"{cell:.1f}"
    cells = [[text(cell) for cell in row] for row in (header, *rows)]
    for r, c in bold:
        cells[r + 1][c] = f"**{cells[r + 1][c]}**" if markdown else f"*{cells[r + 1][c]}"
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    if markdown:
        lines.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join("  ".join(line) for line in lines)


def truth_of(rows, lives, categories):
    """The true boxes of the frames in `rows`, which stand clip by clip, for average_precision (image: place in rows;
    category -1: not told), and how each frame was staged [F] ("": not told)."""
    numbers = {raw: k for k, raw in enumerate(categories)}
    true, kinds = [], np.full(len(rows["clip"]), "", object)
    for c, frames in itertools.groupby(range(len(rows["clip"])), lambda f: int(rows["clip"][f])):
        clip = lives.clip(c)
        for f in frames if clip.boxes else ():
            t = int(rows["position"][f])
            kinds[f] = clip.kinds[t] if clip.kinds else ""
            # A category that training never showed is a class of its own, which no detection can hit.
            true += [(f, -1 if raw < 0 else numbers.get(int(raw), len(numbers) + int(raw)), xyxy)
                     for *xyxy, raw in clip.boxes[t]]
    if not true:
        raise BadInput(f"{lives.root}: the {lives.split} split has no true boxes, and a detector is judged by boxes")
    return dict(zip(("image", "category", "box_xyxy"), map(np.array, zip(*true)))), kinds


def score_detections(rows, lives, categories):
    """Table 1 of each method in `rows`, in percent: {method: {"class-agnostic": {column: AP}, "per category": ...,
    "hit": share of frames with a true box, "category": share of boxes named right, "kinds": {kind of frame: ...}}},
    what was counted, and per method what `ap50` needs: clip [F], score [F], hit [F] (IoU 0.5 or more), true [Q], how
    many true boxes each clip has."""
    truth, kinds = truth_of(rows, lives, categories)
    frame, told = truth["image"], (truth["category"] >= 0).all()
    video_ids = [lives.video_ids[c] for c in rows["clip"]]
    parts = {"all": np.ones(len(video_ids), bool)}
    parts |= {f"{value} {name}": np.array([video_id in ids for video_id in video_ids])
              for (name, value), ids in lives.members.items()}
    staged = {kind: kinds == kind for kind in (*data.SHOWN, "absent") if (kinds == kind).any()}
    shown, seen = np.isin(np.arange(len(video_ids)), frame), rows["sd"][:, 4] >= 0
    results, samples = {}, {}
    for method in (m for m in LABELS if m in rows):
        box, score, guess = rows[method][:, :4].astype(np.float64), rows[method][:, 4], rows[method][:, 5].astype(int)
        found = {"image": np.flatnonzero(seen), "category": guess[seen], "box_xyxy": box[seen], "score": score[seen]}
        alike = (side | {"category": np.zeros_like(side["category"])} for side in (truth, found))
        hit = np.isin(np.arange(len(box)), frame[overlaps(box[frame], truth["box_xyxy"]) >= 0.5]) & seen
        samples[method] = {"clip": rows["clip"][seen], "score": score[seen], "hit": hit[seen],
                           "true": np.bincount(rows["clip"][frame], minlength=len(lives))}
        results[method] = {"class-agnostic": row_of_table_1(*alike, parts),
                           "per category": row_of_table_1(truth, found, parts) if told else dict.fromkeys(COLUMNS_1),
                           "hit": 100 * float(hit[shown].mean()),
                           "category": 100 * float(((guess[frame] == truth["category"]) & seen[frame]).mean())
                           if told else None,
                           "kinds": {kind: {"frames": int(here.sum()), "score": 100 * float(score[here].mean()),
                                            "hit": 100 * float(hit[here].mean()) if shown[here].any() else None}
                                     for kind, here in staged.items()}}
    counts = {"clips": len(lives), "frames": len(video_ids), "boxes": len(frame), "missing": int((~seen).sum())}
    return results, counts, samples


def row_of_table_1(truth, found, parts):
    """Columns of Table 1 in percent; parts: {"all" or a column's name: which frames are in it [F]}."""
    row = dict.fromkeys(COLUMNS_1)
    for name, part in parts.items():
        true, here = ({key: value[part[side["image"]]] for key, value in side.items()} for side in (truth, found))
        if len(true["image"]):
            ap = average_precision(true, here)
            row |= {c: 100 * ap[c] for c in ("AP", "AP50", "AP75")} if name == "all" else {name: 100 * ap["AP50"]}
    return row


def show_table_1(result, markdown=False):
    """Print Table 1, and how often a box is right by the kind of frame."""
    results, counts = result["results"], result["counts"]
    print(f"\nTable 1, one box a frame ({counts['clips']} clips, {counts['frames']} frames, {counts['boxes']} boxes, "
          f"missing={counts['missing']}); AP50 from the fourth column on\n")
    rows = [(f"{LABELS[m]}, {view}", *r[view].values()) for view in ("class-agnostic", "per category")
            for m, r in results.items() if r[view]["AP"] is not None]
    print(table(("", *COLUMNS_1), rows + [(f"paper's {m}", *values) for m, values in PAPER_1.items()], markdown))
    if results["sd"]["per category"]["AP"] is None:
        print("The true boxes do not tell their category: class-agnostic AP only.")
    kinds = results["sd"]["kinds"]
    rows = [(LABELS[m], r["hit"], *(r["kinds"][k]["hit"] for k in kinds), r["category"]) for m, r in results.items()]
    rows += [(f"{LABELS[m]}, mean score", None, *(r["kinds"][k]["score"] for k in kinds), None)
             for m, r in results.items() if kinds]
    print(f"\nFrames whose box has IoU 0.5 or more{', by kind of frame' if kinds else ''} (%)\n")
    print(table(("", "all", *kinds, "right category"), rows, markdown))


# ------------------------------------------------------------------ Table 2

# The paper's rows by the field that they vary (Tables 2 and 3; the losses stand in the main paper).
PAPER_2 = {("boxes", "sd"): (30.6, 62.6, 73.5), ("boxes", "md"): (31.3, 63.2, 74.3),
           ("negatives", "rand"): (27.6, 57.3, 69.7), ("negatives", "hard"): (29.4, 62.0, 73.7),
           ("losses", "icl"): (31.5,), ("losses", "icl,pmd"): (33.1,), ("losses", "icl,pmd,pfr"): (33.8,)}
SCORES = {"icl": "ICL", "pmd": "PMD", "fused": "ICL + PMD"}
SOURCES = {"true": "true boxes", "md": "MD boxes", "sd": "SD boxes", "none": "whole frames"}


class Embedder:
    """A trained RICE, and what it needs to see clips and shop images."""

    def __init__(self, checkpoint, device, model=None):
        self.config, self.device = checkpoint["config"], device
        self.tokenizer = data.Tokenizer(checkpoint["tokenizer"])
        self.model = model or restore(checkpoint, device)
        self.scores = ("icl", "pmd", "fused") if hasattr(self.model, "pmd") else ("icl",)

    def shop(self, read, titles, ids):
        """Shop images as a data set; read: id -> uint8 [3,H,W] or BadInput, titles: {id: text}."""
        return data.ImageSet(read, titles, self.tokenizer, self.config["size"], ids, self.config["text"])

    def clips(self, lives, boxes):
        """A split as a data set, seen through boxes (see seen_through) or, when they are None, as whole frames."""
        return data.PairSet(lives, self.tokenizer, self.config["frames"], self.config["size"], self.model.visual.grid,
                            "frame" if boxes is None else self.config["view"], boxes, False, text=self.config["text"])

    @torch.no_grad()
    def embed(self, dataset, numbers, tokens=True, progress=None):
        """Samples `numbers` of what `shop` or `clips` gave -> embedding [n,D], tokens [n,R,W] (of images [n,1+P+1,W];
        not with tokens=False), of clips their padding [n,R] too, and whether anything could be read [n]."""
        workers = self.config["workers"] * (len(numbers) > 64)           # one batch is not worth another process
        batches = data.load(dataset, data.shard_batches(numbers, 64), workers, self.device)
        rows = []
        for batch in watch(batches, progress) if progress else batches:
            batch = {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in batch.items()}
            if isinstance(dataset, data.PairSet):
                frames = data.to_float(batch["frames"], data.CLIP)
                row = self.model.encode_clips(frames, batch["keep"], batch["valid"], batch["asr"])[:3 if tokens else 1]
                seen = batch["valid"].any(1)
            else:
                pixels = data.to_float(batch["image"], data.CLIP)
                row = self.model.encode_images(pixels, batch["title"])[:2 if tokens else 1]
                seen = torch.tensor([not bad for bad in batch["bad"]], device=self.device)
            if not row[0].isfinite().all():
                raise BadInput("embeddings are not finite numbers: the weights of RICE are spoilt; train it anew")
            rows.append((*row, seen))
        return [torch.cat(column) for column in zip(*rows)]

    @torch.no_grad()
    def rerank(self, similarity, images, clips, padding, top, together=8):
        """ICL similarity [Q,M] -> the PMD's score of the first `top` images of each clip [Q,M]; the others are -inf.
        images [M,1+P+1,W] and clips [Q,R,W] are tokens, padding [Q,R]; `together` clips are scored at a time."""
        scores = torch.full_like(similarity, -math.inf)
        best = similarity.argsort(dim=1, descending=True, stable=True)[:, :top]                      # [Q,top]
        for q in torch.arange(len(best), device=best.device).split(together):
            pairs = torch.arange(len(q), device=q.device).repeat_interleave(best.shape[1])[:, None]  # [q*top,1]
            score = self.model.pmd(images[best[q].flatten()], clips[q], padding[q], pairs)[0]        # [q*top,1]
            scores[q] = scores[q].scatter(1, best[q], score.view(len(q), -1))
        return scores


@torch.no_grad()
def rank_live(embedder, lives, live, clips, sources):
    """One live: its clips (numbers) against its own gallery, for every source of boxes -> {"live", "clips", "ids" of
    the gallery, "positive" [Q,M], "score": {source: {"icl": [Q,M], "pmd": ..., "fused": ...}}, "place": {source:
    {"icl": [Q], ...}}, how many images stand before the first true one, and what is unread}"""
    ids = list(dict.fromkeys(lives.galleries.get(live, [])))
    true = [set(lives.positives.get(lives.video_ids[q], [])) for q in clips]
    positive = np.array([[i in images for i in ids] for images in true], bool).reshape(len(clips), len(ids))
    readable, seen = torch.ones(len(ids), dtype=torch.bool), torch.from_numpy(lives.lengths[clips] > 0)
    score = {source: dict.fromkeys(embedder.scores, np.zeros(positive.shape)) for source in sources}
    if ids:
        shop = embedder.shop(lives.image, lives.titles, ids)
        image, image_tokens, readable = embedder.embed(shop, range(len(ids)))                # [M,D], [M,1+P+1,W], [M]
    for source, boxes in sources.items() if ids else ():
        pairs = embedder.clips(lives, boxes)
        clip, tokens, padding, seen = embedder.embed(pairs, clips)                          # [Q,D], [Q,R,W], [Q,R], [Q]
        scores = {"icl": embedder.model.scale() * clip @ image.T}                                # [Q,M]
        if "pmd" in embedder.scores:
            scores["pmd"] = embedder.rerank(scores["icl"], image_tokens, tokens, padding, embedder.config["rerank"])
            scores["fused"] = scores["icl"] + scores["pmd"]
        # A clip without a frame that can be read, an image that cannot: no prediction. They stay in the denominator.
        score[source] = {name: s.masked_fill(~readable, -math.inf).masked_fill(~seen[:, None], math.nan).cpu().numpy()
                         for name, s in scores.items()}
    place = {source: {name: first_true(s, positive) for name, s in scores.items()} for source, scores in score.items()}
    return {"live": live, "clips": clips, "ids": ids, "positive": positive, "score": score, "place": place,
            "unread images": int((~readable).sum()), "unread clips": int((~seen).sum())}


def box_sources(checkpoint, lives, folder, device, every_source):
    """{"true", "md", "sd": boxes} that RICE is judged through, or {"none": None}, whole frames; and its own source."""
    config, sources = checkpoint["config"], {"none": None}
    if config["view"] != "frame":
        found = predicted_boxes(checkpoint["detector"], lives, folder, device) if "detector" in checkpoint else {}
        sources = {"true": data.true_boxes(lives)} if lives.truth else {}
        sources |= {name: seen_through(found, name, len(lives)) for name in ("md", "sd") if name in found}
    main = config["boxes"]                                         # "none" where whole frames are the view (unsound)
    if main not in sources:
        raise BadInput(f"{lives.root}: RICE was trained on {SOURCES[main]}, which neither this data nor a detector in "
                       "its checkpoint gives")
    return sources if every_source else {main: sources[main]}, main


def score_ranking(checkpoint, lives, folder, device, model=None, every_source=True):
    """Table 2: R1, R5, R10 in each live's gallery, for every source of boxes there is: by ICL, by the PMD, by both.
    Live by live, so that memory holds the tokens of one gallery. every_source=False: only the boxes that the model was
    trained with. model: that of the checkpoint, when it is built already. -> results {source: {"icl": {"R1": percent,
    ...}, "pmd": ..., "fused": ...}}, counts, what the picture shows, and through the boxes of the training the place
    [Q] of each clip's first true image by each score."""
    if not lives.galleries or not lives.positives:
        raise BadInput(f"{lives.root}: the {lives.split} split needs {lives.split}_liveid_to_gallery_*.json and "
                       f"{lives.split}_videoid_to_gtimage_*.json to rank shop images")
    embedder = Embedder(checkpoint, device, model)
    sources, main = box_sources(checkpoint, lives, folder, device, every_source)
    members, (rank, world) = {}, start_processes()
    for q, video_id in enumerate(lives.video_ids):
        members.setdefault(data.live_of(video_id), []).append(q)
    mine = [rank_live(embedder, lives, *member, sources)
            for member in watch(list(members.items())[rank::world], "rank lives")]
    rows = {row["live"]: row for part in everyones(mine) for row in part}
    rows = [rows[live] for live in members]
    order = np.argsort(np.concatenate([row["clips"] for row in rows]), kind="stable")       # to the order of the split
    places = {source: {name: np.concatenate([row["place"][source][name] for row in rows])[order]
                       for name in embedder.scores} for source in sources}
    results = {source: {name: shares(place) for name, place in ranked.items()} for source, ranked in places.items()}
    shown = {"rows": rows, "source": main, "boxes": sources[main], "embedder": embedder}
    return results, count_ranking(lives, rows, main, places[main], order), shown, places[main]


def count_ranking(lives, rows, main, places, order):
    """What Table 2 was counted over, what chance would give, and its parts: by live, and by case of rendered data."""
    true = np.concatenate([row["positive"].sum(1) for row in rows])[order]
    images = np.concatenate([np.full(len(row["clips"]), len(row["ids"])) for row in rows])[order]
    luck = {k: [chance(int(m), int(p), k) for m, p in zip(images, true)] for k in (1, 5, 10)}
    counts = {"clips": len(lives), "lives": len(rows),
              "chance": {f"R{k}": 100 * float(np.mean(each)) for k, each in luck.items()},
              "missing": sum(row["unread clips"] for row in rows),
              "missing images": sum(row["unread images"] for row in rows), "gallery": float(images.mean()),
              "several true images": int((true > 1).sum()), "source": main, "each live": {}, "cases": {}}
    for row in rows:
        n, m, hits = len(row["clips"]), len(row["ids"]), shares(row["place"][main]["icl"])
        counts["each live"][row["live"]] = [n, m, *hits.values(), 100 * chance(m, 1, 1)]
    for case, members in lives.cases.items():
        inside = np.array([video_id in members for video_id in lives.video_ids], bool)
        if inside.any():
            hits = {name: shares(place[inside])["R1"] for name, place in places.items()}
            counts["cases"][case] = {"clips": int(inside.sum()), **hits}
    return counts


def shares(place):
    """Places of the first true image [Q] -> {"R1": percent, "R5": ..., "R10": ...}."""
    return {f"R{k}": 100 * float((place < k).mean()) for k in (1, 5, 10)}


def chance(images, true, k):
    """Probability that a random order of a gallery has one of its `true` images among the first k."""
    return 1 - math.comb(images - true, k) / math.comb(images, k) if true and k < images else float(true > 0)


def show_table_2(result, markdown=False):
    """Print Table 2, R1 of the cases, and the first lives."""
    results, counts = result["results"], result["counts"]
    print(f"\nTable 2, rank-k within each live's own gallery ({counts['clips']} clips, {counts['lives']} lives, "
          f"{counts['gallery']:.1f} images a gallery, missing={counts['missing']}, "
          f"missing images={counts['missing images']})\n")
    names = SCORES | {"pmd": f"PMD on the first {result['config']['rerank']}"}
    rows = [(f"{SOURCES[source]}, {names[score]}", *values.values())
            for source, scores in results.items() for score, values in scores.items()]
    rows += [("chance", *counts["chance"].values()),
             *((f"paper's RICE, {name.upper()} boxes", *PAPER_2["boxes", name]) for name in ("sd", "md"))]
    print(table(("", "R1", "R5", "R10"), rows, markdown))
    if counts["cases"]:
        print(f"\nR1 of the clips that only words, or only details, can tell ({SOURCES[counts['source']]})\n")
        scores = [name for name in names if name in results[counts["source"]]]
        rows = [(case, str(hits["clips"]), *(hits[name] for name in scores)) for case, hits in counts["cases"].items()]
        print(table(("", "clips", *(names[name] for name in scores)), rows, markdown))
    print(f"\nEach live's clips against its own gallery ({SOURCES[counts['source']]}, ICL)\n")
    rows = [(live, str(n), str(m), *row) for live, (n, m, *row) in list(counts["each live"].items())[:12]]
    print(table(("", "clips", "images", "R1", "R5", "R10", "chance R1"), rows, markdown))
    more = len(counts["each live"]) - len(rows)
    print(f"... and {more} more lives (all of them with --json)" if more else "")


# ------------------------------------------------------------------ several checkpoints: rows, seeds, intervals

SAME = WEIGHTLESS | {"seed", "preset", "data"}                                # one row, however they differ


def compare(runs, markdown=False):
    """Print one row per configuration, mean and standard deviation over its seeds, then the differences between rows.
    runs: what `evaluate` returned, all for the same clips. Rows stand in the order given; each is compared with the one
    above it (Table 1: MD with SD and its controls). -> {"rows": [...], "differences": [...]} of plain values."""
    if len({json.dumps(samples["live"]) for _, _, samples in runs}) > 1:
        raise BadInput("--ckpt: not evaluated on the same clips; name one data folder with --data")
    rows, detectors = rows_of(runs), runs[0][0]["stage"] != "rice"
    names = list(rows[0]["mean"])
    best = np.array([list(row["mean"].values()) for row in rows])
    bold = [(r, c + 2) for r, c in zip(*np.nonzero(best == best.max(0))) if len(rows) > 1]
    paper = [(f"paper's {name}", "", *values, None) for name, values in PAPER_1.items()] if detectors else []
    print(f"\nTable {1 if detectors else 2} ({len(runs)} checkpoints, {len(runs[0][2]['live'])} clips; "
          "mean ± standard deviation over seeds)\n")
    lines = [(row["name"], str(len(row["seeds"])), *zip(row["mean"].values(), row["std"].values())) for row in rows]
    print(table(("", "seeds", *names), lines + paper, markdown, bold))
    statistic, headline = (ap50, "AP50") if detectors else (r1, "R1")
    differences, lines = [], []
    for one, other in watch(pairs_of(rows, detectors), "bootstrap"):
        clips, lives = (interval(one["samples"], other["samples"], statistic, by_live) for by_live in (False, True))
        name, paper = f"{one['name']} - {other['name']}", paper_difference(one, other, names)
        mean = {column: one["mean"][column] - other["mean"][column] for column in names}
        differences.append({"name": name, "mean": mean, "clips": clips, "lives": lives, "paper": paper})
        lines.append((name, *mean.values(), *(f"{low:+.1f} .. {high:+.1f}" for low, high in (clips, lives))))
        lines += [("    the paper's", *paper, "", "")] if paper else []
    if differences:
        print(f"\nDifferences; {headline}: 95 % interval over clips and seeds, over lives and seeds\n")
        print(table(("", *names, f"{headline}, clips", f"{headline}, lives"), lines, markdown))
    plain = [{name: row[name] for name in ("name", "seeds", "mean", "std")} for row in rows]
    return {"rows": plain, "differences": differences}


def rows_of(runs):
    """One row per configuration and method: its name (the fields that differ), numbers, and samples of each seed."""
    stages = {result["stage"] for result, *_ in runs}
    if "rice" in stages and len(stages) > 1:
        raise BadInput("--ckpt: detectors and RICE have different tables; evaluate them one after the other")
    differing = [name for name in runs[0][0]["config"] if name not in SAME and any(
        len({json.dumps(result["config"].get(name)) for result, *_ in runs if result["stage"] == stage}) > 1
        for stage in stages)]
    groups, rows = {}, []
    for result, _, samples in runs:
        key = (result["stage"], *(json.dumps(result["config"].get(name)) for name in differing))
        groups.setdefault(key, []).append((result, samples))
    for key, members in groups.items():
        for method in members[0][1]["methods"]:
            columns = [columns_of(result, method) for result, _ in members]
            numbers = np.array([list(column.values()) for column in columns], float)
            std = numbers.std(0, ddof=1).tolist() if len(members) > 1 else [None] * len(columns[0])
            varied = [(name, str(members[0][0]["config"].get(name))) for name in differing]
            rows.append({"name": ", ".join([*map("=".join, varied), (SCORES | LABELS)[method]]), "method": method,
                         "group": key, "varied": varied, "seeds": [result["config"]["seed"] for result, _ in members],
                         "mean": dict(zip(columns[0], numbers.mean(0).tolist())), "std": dict(zip(columns[0], std)),
                         "samples": [samples["methods"][method] | {"live": samples["live"]} for _, samples in members]})
    return rows


def columns_of(result, method):
    """One method's numbers of one evaluated checkpoint, under the columns of its table."""
    if result["stage"] != "rice":
        row = result["results"][method]
        return row["class-agnostic"] | {"category AP": row["per category"]["AP"]}
    cases = {f"R1 {case}": value[method] for case, value in result["counts"]["cases"].items()}
    return result["results"][result["counts"]["source"]][method] | cases


def pairs_of(rows, detectors):
    """Which rows are compared: MD with SD and its controls; RICE by a score with the row above, and fused with ICL."""
    pairs = []
    for n, row in enumerate(rows):
        mates = [r for r in rows if r["group"] == row["group"] and r is not row]
        above = [r for r in rows[:n] if r["method"] == row["method"]]
        pairs += [(row, above[-1])] if above and not detectors else []
        pairs += [(row, r) for r in mates if (row["method"], r["method"]) == ("fused", "icl") or row["method"] == "md"]
    return pairs


def paper_difference(one, other, names):
    """The paper's difference between two rows, None under columns that it does not have; None when it has neither."""
    values = [PAPER_1.get(LABELS.get(row["method"])) for row in (one, other)]
    changed = [pair for pair in zip(one["varied"], other["varied"]) if pair[0] != pair[1]]
    if one["method"] == other["method"] and len(changed) == 1:
        values = [PAPER_2.get(side) for side in changed[0]]
    known = [a - b for a, b in zip(*values)] if all(values) else []
    return known + [None] * (len(names) - len(known)) if known else None


def interval(one, other, statistic, by_live, draws=1000):
    """95 % interval of mean(one) - mean(other), the samples of each seed: paired bootstrap over clips, or whole lives.
    Both sides see the same clips drawn; each side draws its seeds."""
    rng = np.random.default_rng(0)
    lives = np.unique(one[0]["live"], return_inverse=True)[1] if by_live else np.arange(len(one[0]["live"]))
    units = int(lives.max()) + 1
    weights = rng.multinomial(units, np.full(units, 1 / units), draws)[:, lives]                           # [draws,Q]
    means = []
    for side in (one, other):
        values = np.stack([statistic(sample, weights) for sample in side])                            # [seeds,draws]
        means.append(np.take_along_axis(values, rng.integers(len(side), size=values.shape), 0).mean(0))   # [draws]
    return np.percentile(means[0] - means[1], [2.5, 97.5]).tolist()


def r1(sample, weights):
    """R1 in percent when clip q counts weights[:,q] times: weights [draws,Q] -> [draws]."""
    return 100 * weights @ (sample["place"] < 1) / weights.sum(1)


def ap50(sample, weights):
    """Class-agnostic AP50 in percent when clip q counts weights[:,q] times: weights [draws,Q] -> [draws]."""
    order = np.argsort(-sample["score"], kind="stable")
    counted = weights[:, sample["clip"][order]]                                                            # [draws,F]
    total = np.maximum(weights @ sample["true"], 1)[:, None]                                               # [draws,1]
    right = (counted * sample["hit"][order]).cumsum(1)                                                     # [draws,F]
    return 100 * precision_at_recalls(right, counted.cumsum(1), total).mean(1)


# ------------------------------------------------------------------ one checkpoint


def evaluate(path, data_dir=None, split="test", out=None, workers=None, top=None, every_source=True):
    """Evaluate one checkpoint -> every number as a dict of plain values, what `draw_examples` draws from, and what
    `compare` bootstraps: {"live" [Q], "methods": {name: per clip or frame}}."""
    start_processes()
    device, checkpoint = pick_device(), read_checkpoint(path)
    config = checkpoint["config"]
    for settings in (config, checkpoint.get("detector", {}).get("config", {})):
        settings["workers"] = config["workers"] if workers is None else workers
    config["rerank"] = config["rerank"] if top is None else top
    if config["workers"] < 0 or config["rerank"] < 1:
        raise BadInput("--workers is 0 or more, --rerank 1 or more")
    out = data.output_folder(out or Path(path).parent)
    overfit = config["overfit"]                                  # judged by the very clips that it was trained on
    lives = data.Lives(data_dir or config["data"], "train" if overfit else split)
    lives = lives.few(overfit) if overfit else lives
    if config["stage"] == "rice":
        shared = Path(config["detectors"])                           # models that share a detector find its boxes there
        results, counts, shown, places = score_ranking(checkpoint, lives, shared if shared.is_dir() else out, device,
                                                       every_source=every_source)
        look = ranking_look(shown, lives, places)
        methods = {name: {"place": place} for name, place in places.items()}
    else:
        rows = predicted_boxes(checkpoint, lives, out, device)
        results, counts, methods = score_detections(rows, lives, checkpoint["categories"])
        look = detection_look(rows, lives, list(checkpoint["categories"].values()), methods)
    result = {"stage": config["stage"], "data": str(lives.root), "split": lives.split, "counts": counts,
              "results": results, "step": checkpoint["step"], "seed": config["seed"], "config": config,
              "fingerprint": fingerprint(checkpoint), "versions": checkpoint.get("versions")}
    return result, look, {"live": [data.live_of(v) for v in lives.video_ids], "methods": methods}


@torch.no_grad()
def validate(model, checkpoint, folder, device):
    """The one number by which training is watched, on the val lives; see headline."""
    config, lives = checkpoint["config"], data.Lives(checkpoint["config"]["data"], "val")
    model.eval()
    if config["stage"] == "rice":
        results, counts, *_ = score_ranking(checkpoint, lives, folder, device, model, every_source=False)
    else:
        rows = predict(model, config, checkpoint["categories"], lives, device, every_frame=False)
        results, counts, _ = score_detections(rows, lives, checkpoint["categories"])
    model.train()
    return headline({"stage": config["stage"], "results": results, "counts": counts})


def headline(result):
    """The one number that tells how good a model is: {"AP50": class-agnostic} or {"R1": by ICL}, percent."""
    if result["stage"] == "rice":
        return {"R1": result["results"][result["counts"]["source"]]["icl"]["R1"]}
    return {"AP50": result["results"][result["stage"]]["class-agnostic"]["AP50"]}


def show(result, markdown=False):
    """Print the table of what `evaluate` returned."""
    (show_table_2 if result["stage"] == "rice" else show_table_1)(result, markdown)


def write_json(path, value):
    """Written whole or not at all."""
    data.write_texts(Path(path).parent, {Path(path).name: json.dumps(value, indent=1)})


# ------------------------------------------------------------------ near-duplicates


@torch.no_grad()
def duplicates(path, folder, threshold, block=2048):
    """Groups of shop images whose feature cosine exceeds the threshold (supplement, section 5 (3)): prints them, writes
    folder/duplicates.txt: image to drop <tab> image it repeats; nothing is deleted. -> groups, lists of image ids"""
    checkpoint, device = read_checkpoint(path), pick_device()
    if checkpoint["config"]["stage"] != "rice" or not -1 <= threshold <= 1:
        raise BadInput(f"--ckpt {path} --threshold {threshold}: expected a checkpoint of --stage rice and a cosine")
    lives, embedder = data.Lives.pictures(folder), Embedder(checkpoint, device)
    ids = sorted({data.safe_id(name[:-4], f"{folder}/images") for _, _, names in os.walk(lives.root / "images")
                  for name in names if name.endswith((".jpg", ".png"))})
    if not ids:
        raise BadInput(f"{folder}/images: no .jpg and no .png")
    shop = embedder.shop(lives.image, {}, ids)
    feature, seen = embedder.embed(shop, range(len(ids)), False, "features")                     # [M,D], [M]
    feature, first = feature.masked_fill(~seen[:, None], 0), np.arange(len(ids))      # a group is named by its first
    for start in watch(range(0, len(ids), block), "compare"):
        for low in range(start, len(ids), block):
            cosine = feature[start:start + block] @ feature[low:low + block].T                   # [block,block]
            for i, j in (cosine.clamp(max=1) > threshold).nonzero().tolist():
                one, other = sorted((first[start + i], first[low + j]))
                if one != other:
                    first[first == other] = one
    groups = {}
    for name, group in zip(ids, first.tolist()):
        groups.setdefault(group, []).append(name)
    groups = [group for group in groups.values() if len(group) > 1]
    for group in groups[:20]:
        print("  ".join(group[:8]) + (f"  ... {len(group)} in all" if len(group) > 8 else ""))
    again = [f"{name}\t{group[0]}\n" for group in groups for name in group[1:]]
    data.write_texts(lives.root, {"duplicates.txt": "".join(again)})
    print(f"{len(ids)} images, {len(groups)} groups (20 shown at most), {len(again)} to drop: {folder}/duplicates.txt")
    return groups


# ------------------------------------------------------------------ pictures: what they are made of

COLOURS = {"sd": (222, 112, 10), "md": (20, 100, 220)}
BORDERS = {True: (40, 160, 60), False: (205, 50, 45), None: (150, 150, 150)}         # right, wrong, nobody knows
SIDE = 144                                                                           # pixels of a picture on a sheet
INK = (50, 50, 50)
GREY = Image.new("RGB", (96, 96), (190, 190, 190))                                   # for what cannot be read
# Pillow's own font knows ASCII; for other signs the first that is installed, by its name on Debian, macOS or Windows.
FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-zenhei.ttc", "wqy-microhei.ttc", "PingFang.ttc",
         "DroidSansFallbackFull.ttf", "Hiragino Sans GB.ttc", "msyh.ttc", "simsun.ttc", "DejaVuSans.ttf", "Arial.ttf")


@functools.lru_cache
def font(plain=True):
    """Pillow's own font, or one of FONTS; without one strange signs become boxes."""
    for name in () if plain else FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, 12)
    return ImageFont.load_default(12)


def write(draw, at, text, width, lines=1, fill=INK):
    """Text from `at` on, wrapped to `width` pixels and cut after `lines` lines of 15 pixels."""
    rest = " ".join(str(text)[:1000].split())
    letters = font(rest.isascii())
    for n in range(lines):
        fits = next((k for k in range(1, len(rest)) if letters.getlength(rest[:k + 1]) > width), len(rest))
        last, space = n + 1 == lines and fits < len(rest), rest.rfind(" ", 1, fits + 1)
        cut = space if fits < len(rest) and space > 0 and not last else fits
        line = rest[:max(1, cut - 2)] + "..." if last else rest[:cut]
        draw.text((at[0], at[1] + 15 * n), line, fill, letters)
        rest = rest[cut:].lstrip()


def caption(text, width, lines=1, fill=INK):
    """A text as a picture of its own, to be joined to another."""
    picture = Image.new("RGB", (width, 15 * lines + 2), "white")
    write(ImageDraw.Draw(picture), (2, 1), text, width - 4, lines, fill)
    return picture


def fit(picture, size, boxes=()):
    """A picture centred in (w, h) pixels, with boxes [(xyxy in its pixels, colour)]; true ones: None, dashed white."""
    scale = min(size[0] / picture.width, size[1] / picture.height)
    small = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BILINEAR)
    for xyxy, colour in boxes:
        x1, y1, x2, y2 = (float(v) * scale for v in xyxy)
        outline = Image.new("L", small.size)
        ImageDraw.Draw(outline).rectangle([min(x1, x2), min(y1, y2), x2, y2], outline=255, width=2)
        dashes = np.indices(outline.size[::-1]).sum(0) // 6 % 2 if colour is None else 1
        small.paste(colour or "white", mask=Image.fromarray(np.uint8(np.asarray(outline) * dashes)))
    return ImageOps.pad(small, size, color="white")


def join(pictures, axis, gap=6):
    """Pictures side by side (axis 0) or under each other (axis 1), on white."""
    size = [max(p.size[d] for p in pictures) for d in (0, 1)]
    size[axis] = sum(p.size[axis] + gap for p in pictures) - gap
    sheet, at = Image.new("RGB", size, "white"), [0, 0]
    for picture in pictures:
        sheet.paste(picture, tuple(at))
        at[axis] += picture.size[axis] + gap
    return sheet


def picture_of(read, name):
    """What read(name) gives (uint8 [3,H,W]; of a frame also the size that its boxes are in), grey when unreadable."""
    with contextlib.suppress(BadInput):
        pixels = read(name)
        return to_pil_image(pixels[0]).resize(pixels[1]) if isinstance(pixels, tuple) else to_pil_image(pixels)
    return GREY


def save_picture(picture, path):
    with data.whole(path) as part:
        picture.save(part, "PNG")
    return path


def pages(rows, folder, name, each=6):
    """Rows, as they come, on sheets folder/NAME-1.png, ...; None among them is left out. -> their paths"""
    paths, rows = [], filter(None, rows)
    while sheet := list(itertools.islice(rows, each)):
        paths.append(save_picture(join(sheet, 1, 14), Path(folder) / f"{name}-{len(paths) + 1}.png"))
    return paths


# ------------------------------------------------------------------ pictures of a test set


def detection_look(rows, lives, names, samples):
    """How the pictures see an evaluated detector: how to draw clip c (None when it has no frame; SD's box orange, MD's
    blue, the true one dashed white), and how many true boxes it missed there [Q]."""
    sample = samples["md" if "md" in samples else "sd"]

    def draw(c, height=210, most=8):
        clip, strip, here = lives.clip(c), [], np.flatnonzero(rows["clip"] == c)
        for f in here[data.even_frames(len(here), most)]:
            t = int(rows["position"][f])
            found = {method: rows[method][f] for method in COLOURS if method in rows and rows[method][f, 4] >= 0}
            boxes = [(box[:4], None) for box in (clip.boxes[t] if clip.boxes else [])]
            boxes += [(box[:4], COLOURS[method]) for method, box in found.items()]
            picture = picture_of(lives.frame, clip.frame_ids[t])
            width = min(4 * height, max(120, round(picture.width * height / picture.height)))   # however long and thin
            texts = [caption(f"{method.upper()} {names[int(box[5])]} {box[4]:.2f}", width, fill=COLOURS[method])
                     for method, box in found.items()]
            kind = caption(clip.kinds[t] if clip.kinds else "", width)
            strip.append(join([kind, fit(picture, (width, height), boxes), *texts], 1, 0))
        return join(strip, 0, 4) if strip else None

    missed = sample["true"] - np.bincount(sample["clip"], sample["hit"], len(lives))
    return {"name": "detections", "hard": missed, "row": draw}


def ranking_look(shown, lives, places):
    """The same for RICE: clip q and its first images, the place of the first true one [Q], and where it looks."""
    where = {q: (row, n) for row in shown["rows"] if row["ids"] for n, q in enumerate(row["clips"])}
    embedder, score = shown["embedder"], shown["embedder"].scores[-1]

    def ranked(q):
        row, n = where[q]
        scores = row["score"][shown["source"]][score][n]
        return scores, np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable"), row["ids"], row["positive"][n]

    def draw(q):
        if q not in where:
            return None
        scores, order, ids, true = ranked(q)
        answers = [(m, f"{scores[m]:.1f} " if np.isfinite(scores[m]) else "") for m in order[:5]]
        if not true[order[:5]].any():
            answers += [(m, f"place {n}: ") for n, m in enumerate(order, 1) if true[m]][:1]
        answers = [(picture_of(lives.image, ids[m]), text + lives.titles.get(ids[m], ""), BORDERS[bool(true[m])])
                   for m, text in answers]
        return ranking_row(clip_strip(lives, q, shown["boxes"]), lives.clip(q).asr, answers)

    @torch.no_grad()
    def attention(q):
        _, order, ids, _ = ranked(q)
        shop, clips = embedder.shop(lives.image, lives.titles, [ids[order[0]]]), embedder.clips(lives, shown["boxes"])
        (_, image_tokens, _), (_, tokens, padding, seen) = embedder.embed(shop, [0]), embedder.embed(clips, [q])
        if not seen.any():
            return None
        encoded = image_tokens, tokens, padding
        sheet = attention_sheet(embedder.model, clips[(0, q)]["frames"], shop[(0, 0)]["image"], encoded)
        text = "red square, a patch of the shop image ranked first; orange, where in the clip it is rebuilt from"
        return join([caption(f"{lives.video_ids[q]}: {text}", sheet.width, 1 if sheet.width > 800 else 4), sheet], 1, 2)

    look = {"name": "ranking", "hard": places[score], "row": draw}
    return look | ({"attention": attention} if hasattr(embedder.model, "pfr_head") else {})


def clip_strip(lives, q, boxes, frames=3):
    """A few frames of clip q with the boxes that RICE saw it through."""
    clip, pictures = lives.clip(q), []
    rows = data.boxed_rows(boxes, q) if boxes else []
    positions = [int(boxes["position"][r]) for r in rows] or list(range(len(clip.frame_ids)))
    for j in data.even_frames(len(positions), frames):
        drawn = [(boxes["box"][r, :4], COLOURS["md"]) for r in rows[j:j + 1] if boxes["box"][r, 4] >= 0]
        pictures.append(fit(picture_of(lives.frame, clip.frame_ids[positions[j]]), (SIDE, SIDE), drawn))
    return join(pictures or [GREY.resize((SIDE, SIDE))], 0, 4)


def ranking_row(strip, said, answers):
    """A clip's strip with what was said below it, and its first shop images: answers [(picture, text, border)]."""
    wide = ImageOps.pad(strip, (3 * SIDE + 8, SIDE), color="white", centering=(0, 0))      # one frame or three
    cells = [join([wide, caption(f'"{said}"' if said else "", wide.width, 3)], 1, 3)]
    for picture, text, border in answers:
        framed = ImageOps.expand(fit(picture, (SIDE - 8, SIDE - 8)), 4, border)
        cells.append(join([framed, caption(text, SIDE, 3)], 1, 3))
    return join(cells, 0)


def attention_sheet(model, frames, image, encoded, patches=4):
    """From where in a clip PFR rebuilds the patches of most detail of a shop image, as heat. frames uint8 [T,3,S,S] and
    image uint8 [3,S,S] as RICE saw them; encoded: the image's tokens [1,1+P+1,W], the clip's [1,R,W], padding [1,R]."""
    T, grid = len(frames), model.visual.grid
    _, maps = model.pmd(*encoded, torch.zeros(1, 1, dtype=torch.long, device=encoded[0].device))
    maps, padding = model.patch_maps(maps, encoded[2], T)                                    # [1,heads,P,T*P], [1,T*P]
    weight = rice.pfr_weights(maps, model.pfr_head, padding)[0].view(-1, T, grid, grid)          # [P,T,grid,grid]
    size, rows = image.shape[1] // grid, []
    detail = image.float().unfold(1, size, size).unfold(2, size, size).std((3, 4)).mean(0).flatten()       # [P]
    for p in detail.topk(min(patches, len(detail))).indices.sort().values.tolist():
        heat = (weight[p] - weight[p].min()) / (weight[p].max() - weight[p].min()).clamp(min=1e-9)   # [T,grid,grid]
        shop = to_pil_image(image).resize((SIDE, SIDE))
        edges = [round(v * SIDE / grid) for v in (p % grid, p // grid, p % grid + 1, p // grid + 1)]
        ImageDraw.Draw(shop).rectangle(edges, outline=(230, 30, 30), width=3)
        cells = [shop]
        for t in (~padding[0].view(T, -1)).any(1).nonzero()[:, 0].tolist():                      # frames that are there
            dark = to_pil_image(frames[t]).convert("L").point(lambda light: 0.75 * light).convert("RGB")
            cells.append(dark.resize((SIDE, SIDE)))
            mask = to_pil_image((200 * heat[t]).byte().cpu()).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            cells[-1].paste((255, 60, 0), mask=mask)
        rows.append(join(cells, 0, 4))
    return join(rows, 1, 4)


def draw_examples(look, folder, count=5):
    """A few clips, evenly spread, on one sheet: folder/detections.png or folder/ranking.png. -> its path"""
    chosen = np.linspace(0, len(look["hard"]) - 1, min(count, len(look["hard"]))).astype(int)
    rows = list(filter(None, map(look["row"], chosen.tolist()))) or [GREY]
    return save_picture(join(rows, 1, 14), Path(folder) / f"{look['name']}.png")


def draw_misses_and_hits(look, folder, count):
    """The `count` hardest misses and `count` hits, evenly spread, and attention for the first hits. -> paths"""
    data.output_folder(folder)
    misses = [c for c in np.argsort(-look["hard"], kind="stable")[:count].tolist() if look["hard"][c] > 0]
    hits = np.flatnonzero(look["hard"] == 0)
    hits, paths = hits[data.even_frames(len(hits), count)].tolist(), []
    for name, clips in (("misses", misses), ("hits", hits)):
        paths += pages(map(look["row"], watch(clips, f"draw {name}")), folder, f"{look['name']}-{name}")
    if "attention" in look:
        paths += pages(map(look["attention"], watch(hits[:count // 4 + 1], "draw attention")), folder, "attention", 1)
    return paths


def draw_comparison(looks, names, folder, count):
    """Two models' rows under each other, for the clips in which they differ most, to each one's gain in turn."""
    data.output_folder(folder)
    gain = looks[1]["hard"].clip(max=1000) - looks[0]["hard"].clip(max=1000)
    by_turns = np.stack([np.argsort(-gain, kind="stable"), np.argsort(gain, kind="stable")], 1).flatten().tolist()
    chosen = list(dict.fromkeys(by_turns))[:count]
    pairs = ([look["row"](c) for look in looks] for c in watch(chosen, "draw both"))
    sheets = (join([join([caption(name, row.width), row], 1, 2) for name, row in zip(names, pair)], 1)
              for pair in pairs if all(pair))
    return pages(sheets, folder, f"{looks[0]['name']}-compared", 3)


def draw_curves(log, path, result=None):
    """A run's JSON log as a picture: each term of the loss, and AP50 or R1 of the val lives, over steps. `result` is
    what `evaluate` gave at the end, a dot; the paper's figure, a grey line. -> path, or None where there is no log."""
    lines = []
    for text in Path(log).read_bytes().splitlines() if Path(log).exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):   # a line that a dying process tore
            line = json.loads(text)
            lines += [line] if line["step"] >= 0 else []
    if not lines:
        return None
    final = headline(result) if result else {}
    paper = {"AP50": PAPER_1["SD" if Path(log).stem == "sd" else "MD"][1], "R1": PAPER_2["boxes", "md"][0]}
    names = dict.fromkeys(name for line in [*lines, final] for name, value in line.items()
                          if name not in ("step", "lr", "norm", "scale") and isinstance(value, (int, float)))
    cells = [_panel(name, [(line["step"], line[name]) for line in lines if name in line], lines[-1]["step"],
                    paper.get(name), final.get(name)) for name in names]
    return save_picture(join([join(cells[n:n + 4], 0, 18) for n in range(0, len(cells), 4)], 1, 18), path)


def _panel(name, points, last, paper, final):
    """One curve: points [(step, value)], the paper's value and the final one where there are such."""
    panel, (left, top, right, bottom) = Image.new("RGB", (300, 210), "white"), (46, 26, 288, 184)
    draw, values, label = ImageDraw.Draw(panel), [value for _, value in points], name
    low, high = (min(values), max(values)) if paper is None else (0, 100)

    def place(step, value):
        height = (value - low) / ((high - low) or 1)
        return left + (right - left) * step / max(1, last), bottom - (bottom - top) * height

    draw.rectangle([left, top, right, bottom], outline=(200, 200, 200))
    dots = [(*place(*point), 3, COLOURS["md"]) for point in points if paper is not None]
    if points:
        draw.line([place(*point) for point in points], COLOURS["md"], 2)
        label += f" {'' if paper is None else 'val '}{values[-1]:.3g}"
    if paper is not None:
        draw.line([place(0, paper), place(last, paper)], (150, 150, 150))
        draw.text((left + 6, place(0, paper)[1] - 16), f"paper (LPR4M) {paper}", (120, 120, 120), font())
    if final is not None:
        dots.append((*place(last, final), 5, COLOURS["sd"]))
        label += f"  test {final:.1f}"
    for x, y, size, colour in dots:
        draw.ellipse([x - size, y - size, x + size, y + size], colour)
    for x, y, anchor, text in (
            (left, 5, "la", label), (left - 4, top, "ra", f"{high:.3g}"), (left - 4, bottom, "rd", f"{low:.3g}"),
            (left, bottom + 5, "la", "0"), (right, bottom + 5, "ra", f"step {last}")):
        draw.text((x, y), text, INK, font(), anchor)
    return panel


# ------------------------------------------------------------------ recognising a live


class Recording:
    """A window of a recording as a split of one clip: detectors and RICE see it as they see any other. pictures: uint8
    [3,H,W] each, None where a frame cannot be read; asr: what was said meanwhile."""
    split = "test"

    def __init__(self, root, pictures, asr):
        self.root, self.pictures, self.asr, self.lengths = root, pictures, asr, np.array([len(pictures)])

    def __len__(self):
        return 1

    def clip(self, _):
        return data.Clip("", list(range(len(self.pictures))), None, [], "", self.asr)

    def frame(self, t):
        if self.pictures[t] is None:
            raise BadInput(f"{self.root}: a frame cannot be read")
        return self.pictures[t], self.pictures[t].shape[:0:-1]


def frames_of(source, every, fps, start):
    """One frame every `every` seconds of a recording, from second `start` on: uint8 [3,H,W], None where it is broken.
    source: a folder of pictures, `fps` of them a second, or a video, from which ffmpeg pipes these frames alone."""
    if Path(source).is_dir():
        names = data.picture_files(source)
        for at in np.arange(start * fps, len(names) - 0.5, every * fps).round().astype(int):
            try:
                yield data.read_picture(names[at])
            except BadInput:
                yield None
        return
    command = ["ffmpeg", "-v", "error", "-nostdin", "-ss", str(start), "-i", f"file:{source}",
               "-vf", f"fps=1/{every}:round=up", "-f", "image2pipe", "-c:v", "ppm", "-"]
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as ffmpeg:
        try:
            while ffmpeg.stdout.readline() == b"P6\n":
                width, height = map(int, ffmpeg.stdout.readline().split())
                ffmpeg.stdout.readline()                                           # 255
                pixels = np.frombuffer(ffmpeg.stdout.read(width * height * 3), np.uint8)
                if len(pixels) < width * height * 3:
                    break
                yield torch.from_numpy(pixels.reshape(height, width, 3).copy()).permute(2, 0, 1)
            if ffmpeg.wait():
                said.seek(0)
                reason = said.read().decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
                raise BadInput(f"{source}: ffmpeg cannot read it: {reason[-1][-200:]}")
        finally:
            ffmpeg.kill()


def seconds_of(source, fps):
    """Length of a recording in seconds; BadInput when it is none, or a video and ffmpeg is not there."""
    if Path(source).is_dir():
        return len(data.picture_files(source)) / fps
    if not Path(source).is_file():
        raise BadInput(f"--live {source}: no such file or folder; expected a video or a folder of frames (.jpg, .png)")
    if not shutil.which("ffmpeg"):
        raise BadInput(f"--live {source}: a video needs the program ffmpeg on the PATH (a folder of frames does not)")
    said = subprocess.run(["ffmpeg", "-nostdin", "-i", f"file:{source}"], capture_output=True).stderr
    found = re.search(rb"Duration: (\d+):(\d+):([\d.]+)", said)
    if not found:
        raise BadInput(f"--live {source}: ffmpeg finds no video in it")
    hours, minutes, seconds = map(float, found.groups())
    return 3600 * hours + 60 * minutes + seconds


def read_tabbed(path, first, kind=str):
    """[(key, text)] of a file of rows `first<TAB>text`, keys as `kind`; BadInput with file and row. No path: none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n") if path else []
    except UnicodeDecodeError:
        raise BadInput(f"{path}: expected UTF-8 text") from None
    rows = []
    for n, line in enumerate(lines, 1):
        key, tab, text = line.partition("\t")
        if line.strip() and not tab:
            raise BadInput(f"{path}:{n}: expected {first}<TAB>text")
        try:
            rows += [(kind(key.strip()), text.strip())] if line.strip() else []
        except ValueError:
            raise BadInput(f"{path}:{n}: {key[:40]!r} is no number of {first}") from None
    return rows


def finite(text):
    """A number that is neither infinite nor NaN; ValueError when it is no such number."""
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def read_below(folder, name):
    """Picture `name` below a folder, uint8 [3,H,W]; has a name of its own for loader processes that are not forked."""
    return data.read_picture(Path(folder) / name)


def open_shop(folder, titles, embedder, key):
    """The pictures of a folder that can be read, as an ImageSet, and their embeddings [M,D], which are kept beside the
    folder under the model's fingerprint `key`: only what is new or changed since is embedded again. titles: {name, with
    or without ending: text}."""
    root, files = Path(folder).resolve(), data.picture_files(folder)
    names = [path.relative_to(folder).as_posix() for path in files]
    titles = {name: titles.get(name, titles.get(name.rpartition(".")[0], "")) for name in names}
    marks = [f"{name} {path.stat().st_size} {path.stat().st_mtime_ns} {zlib.crc32(titles[name].encode())}"
             for path, name in zip(files, names)]
    kept, known = root.parent / f".{root.name}-{key[:12]}.npz", {}
    with contextlib.suppress(Exception), np.load(kept) as saved:     # none, or a torn one, which raises anything
        if saved["feature"].shape[1:] == (2 * embedder.config["embedding"],) and saved["feature"].dtype == np.float32:
            known = {mark: row for mark, *row in zip(saved["marks"].tolist(), saved["feature"], saved["seen"])}
    shop = embedder.shop(functools.partial(read_below, folder), titles, names)
    new = [n for n, mark in enumerate(marks) if mark not in known]
    if new:
        feature, seen = embedder.embed(shop, new, False, "embed the shop")                       # [new,D], [new]
        known |= {marks[n]: row for n, *row in zip(new, feature.cpu().numpy(), seen.tolist())}
    feature, seen = (np.array(column) for column in zip(*(known[mark] for mark in marks)))       # [M,D], [M]
    if new:
        # A folder that is not ours to write to is embedded anew each time.
        with contextlib.suppress(OSError), data.whole(kept, f".{os.getpid()}") as part, open(part, "wb") as file:
            np.savez(file, marks=marks, feature=feature, seen=seen)
    if not seen.any():
        raise BadInput(f"{folder}: none of its {len(files)} pictures can be read")
    shop.ids = np.array(names)[seen].tolist()
    return shop, torch.from_numpy(feature[seen]).to(embedder.device)


def finder_of(path, checkpoint, detector, device):
    """The detector that a RICE sees a live through: model, configuration, categories; None: it sees whole frames."""
    if checkpoint["config"]["view"] == "frame":
        return None
    found = read_checkpoint(detector) if detector else checkpoint.get("detector")
    if not found:
        raise BadInput(f"{path} holds no detector: name one with --detector runs/tiny/md.pt")
    if found["config"]["stage"] == "rice":
        raise BadInput(f"--detector {detector}: expected a checkpoint of --stage sd or md")
    return restore(found, device), found["config"] | {"workers": 0}, found["categories"]


@torch.no_grad()
def answer_clip(recording, embedder, finder, shop, feature, most, rerank):
    """One window of a recording -> its boxes as PairSet wants them, and its first `most` images [(name, score)]: by
    ICL, or with `rerank` the first of so many by ICL, by both scores."""
    boxes = finder and seen_through(predict(*finder, recording, embedder.device), finder[1]["stage"], 1)
    clips = embedder.clips(recording, boxes)
    clip, tokens, padding, seen = embedder.embed(clips, [0])                                # [1,D], [1,R,W], [1,R], [1]
    if not seen.any():
        return boxes, []
    scores, (first,) = nearest(embedder.model.scale() * clip, feature, rerank or most)           # [1,n], [n]
    if rerank:
        image_tokens = embedder.embed(shop, first.tolist())[1]                                   # [n,1+P+1,W]
        scores = scores + embedder.rerank(scores, image_tokens, tokens, padding, len(first))     # [1,n]
    order = scores[0].argsort(descending=True, stable=True)[:most]
    return boxes, [(shop.ids[int(first[n])], round(float(scores[0, n]), 4)) for n in order]


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def recognise(path, options):
    """Which product of a shop is on sale when (supplement, section 5 (4)): a recording cut into clips of `window`
    frames, one every `every` seconds, each ranked against the shop's pictures. options: the flags of `main`. Writes
    OUT/answers.jsonl, a line a clip as soon as it is known: {"start", "end" seconds, "boxes" a frame (x1 y1 x2 y2 score
    in pixels, or null), "asr", "top": [[image, score]], "margin" between the first two}, a strip of each clip in
    OUT/clips/, and OUT/answers-*.png. A run that was stopped goes on after its last line. Memory holds one clip."""
    checkpoint, device, source = read_checkpoint(path), pick_device(), options.live
    key, rerank = fingerprint(checkpoint), options.rerank or 0
    check_live_flags(path, checkpoint["config"], options)
    checkpoint["config"] |= {} if options.workers is None else {"workers": options.workers}
    length, said = seconds_of(source, options.fps), read_tabbed(options.asr, "seconds", finite)
    embedder, finder = Embedder(checkpoint, device), finder_of(path, checkpoint, options.detector, device)
    shop, feature = open_shop(options.shop, dict(read_tabbed(options.titles, "image")), embedder, key)
    out = data.output_folder(options.out or "runs/live")
    settings = {name: getattr(options, name) for name in ("every", "window", "top", "fps", "asr", "titles", "detector")}
    settings |= {"live": str(Path(source).resolve()), "shop": str(Path(options.shop).resolve()), "checkpoint": key}
    answers = answers_before(out, settings | {"rerank": rerank})
    start = answers[-1]["end"] if answers else 0.0
    with open(out / "answers.jsonl", "a", encoding="utf-8") as file, \
            tqdm(total=round(length), initial=round(start), unit="s", desc=f"recognise {Path(source).name}") as bar:
        for recording, start, end in windows_of(options, said, start):
            boxes, best = answer_clip(recording, embedder, finder, shop, feature, max(options.top, 2), rerank)
            margin = round(best[0][1] - best[1][1], 4) if len(best) > 1 else None
            answers.append({"start": start, "end": end, "boxes": boxes_by_frame(boxes, len(recording.pictures)),
                            "asr": recording.asr, "top": best[:options.top], "margin": margin})
            clip_strip(recording, 0, boxes).save(out / "clips" / f"{start:.3f}.jpg", quality=90)
            file.write(json.dumps(answers[-1], ensure_ascii=False) + "\n")
            file.flush()
            bar.set_postfix_str(f"{clock(start)} {best[0][0] if best else 'nothing readable'}", refresh=False)
            bar.update(min(round(end), bar.total) - bar.n)
    if not answers:
        raise BadInput(f"--live {source}: no frame in it")
    print(f"\n{len(answers)} clips of {options.window} frames, {len(shop.ids)} shop images; clips in a row with the "
          "same answer are one line\n")
    show_answers(answers, out, shop)


def check_live_flags(path, config, options):
    """BadInput when a flag of a live is out of range, or asks for what the checkpoint's `config` cannot do."""
    if config["stage"] != "rice":
        raise BadInput(f"--ckpt {path}: a live is recognised by a checkpoint of --stage rice, not {config['stage']}")
    for name in ("every", "fps", "window", "top"):
        if not 0 < getattr(options, name) < math.inf:
            raise BadInput(f"--{name}: expected a number above 0")
    if (options.rerank or 0) < 0 or (options.workers or 0) < 0:
        raise BadInput("--rerank and --workers: expected 0 or more")
    if options.rerank and "pmd" not in config["losses"].split(","):
        raise BadInput(f"--rerank: {path} has no PMD (--losses {config['losses']})")


def windows_of(options, said, start):
    """Clip after clip of a recording from second `start` on: yields a Recording, its start and its end."""
    stream = frames_of(options.live, options.every, options.fps, start)
    while pictures := list(itertools.islice(stream, options.window)):
        end = start + len(pictures) * options.every
        words = " ".join(text for second, text in sorted(said) if start <= second < end)
        yield Recording(options.live, pictures, words), start, end
        start = end


def boxes_by_frame(boxes, frames):
    """What `predict` gave for each of `frames` frames -> x1 y1 x2 y2 score, or None where there is no box."""
    return [[*(round(v, 2) for v in xyxy), round(score, 4)] if score >= 0 else None
            for *xyxy, score, _ in boxes["box"].tolist()] if boxes else [None] * frames


def answers_before(out, settings):
    """The whole lines that a stopped run left in `out`, made ready; BadInput when it asked for something else."""
    data.output_folder(out / "clips")
    about, log, lines, answers, other = out / "settings.json", out / "answers.jsonl", [], [], []
    if log.exists():
        try:
            before = json.loads(about.read_text(encoding="utf-8"))
            other = [f"{name}: {before.get(name)} there, {value} here" for name, value in settings.items()
                     if before.get(name) != value]
            lines = [line for line in log.read_bytes().splitlines(True) if line.endswith(b"\n")]
            answers = [json.loads(line) for line in lines]
            if not all(isinstance(answer["end"], float) for answer in answers):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{log}: not what an earlier run wrote; remove it, or give another --out") from None
    if other:
        raise BadInput(f"{log} answers another question ({'; '.join(other)}); give another --out, or remove it")
    write_json(about, settings)
    with data.whole(log) as part:
        Path(part).write_bytes(b"".join(lines))
    return answers


def show_answers(answers, out, shop):
    """Clips in a row with the same first image are one line of the table; the surest of them is a row of the sheets."""
    lines, rows = [], []
    groups = itertools.groupby(answers, lambda clip: clip["top"][0][0] if clip["top"] else "(nothing readable)")
    for name, clips in ((name, list(clips)) for name, clips in groups):
        start, end = clock(clips[0]["start"]), clock(clips[-1]["end"])
        scores = [clip["top"][0][1] for clip in clips if clip["top"]]
        margins = [clip["margin"] for clip in clips if clip["margin"] is not None]
        means = (sum(values) / len(values) if values else None for values in (scores, margins))
        lines.append((name, start, end, str(len(clips)), *means, shop.titles.get(name, "")[:40]))
        rows.append((max(clips, key=lambda clip: clip["margin"] or 0), f"{start} - {end}"))
    print(table(("product", "from", "to", "clips", "score", "margin", "title"), lines))

    def drawn(clip, when):
        images = [(picture_of(shop.read, name), f"{score:.1f} {shop.titles.get(name) or name}", BORDERS[None])
                  for name, score in clip["top"]]
        with Image.open(out / "clips" / f"{clip['start']:.3f}.jpg") as strip:
            row = ranking_row(strip.convert("RGB"), clip["asr"], images)
        return join([caption(when, row.width), row], 1, 2)

    paths = pages(itertools.starmap(drawn, watch(rows, "draw answers")), out, "answers")
    print(f"\nanswers: {out / 'answers.jsonl'}\npictures: {', '.join(map(str, paths))}")


# ------------------------------------------------------------------ the command


def flags():
    """The flags of the command."""
    parser = data.Parser(description="Evaluate a checkpoint of train.py: Table 1 for a detector, Table 2 for RICE.")
    add = parser.add_argument
    add("--ckpt", required=True, nargs="+", metavar="FILE", help="checkpoint, e.g. runs/tiny/md.pt; it knows its stage "
        "and configuration. Several (or a pattern): one row per configuration, mean and deviation over seeds")
    add("--data", help="data folder in the LPR4M layout (default: the one it was trained on)")
    add("--split", default="test", choices=["test", "val"], help="which lives (default: test)")
    add("--out", help="folder for pictures and a detector's boxes (default: the checkpoint's; with --live: runs/live)")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--json", help="write every number to this file too")
    add("--rerank", type=int, help="how many first images the PMD scores (default: as configured; with --live: 0)")
    add("--workers", type=int, help="processes that load pictures (default: as in training)")
    add = parser.add_argument_group("pictures of a test set").add_argument
    add("--pictures", metavar="DIR", help="draw the hardest misses, hits, and for RICE what it attends to")
    add("--n", type=int, default=20, help="how many clips of each (default: 20)")
    add("--compare", metavar="FILE", help="with --pictures: a second checkpoint, drawn under the first")
    add = parser.add_argument_group("recognise a live (a checkpoint of --stage rice)").add_argument
    add("--live", metavar="PATH", help="a folder of frames, or a video (needs the program ffmpeg)")
    add("--shop", metavar="DIR", help="the folder of shop images it is ranked against")
    add("--every", type=float, default=10, help="seconds between the frames that are looked at (default: 10)")
    add("--window", type=int, default=10, help="frames of a clip (default: 10)")
    add("--top", type=int, default=5, help="images an answer names (default: 5)")
    add("--fps", type=float, default=1, help="frames a second of a folder of frames (default: 1)")
    add("--asr", metavar="FILE", help="what was said, rows of seconds<TAB>text")
    add("--titles", metavar="FILE", help="titles of the shop images, rows of image<TAB>title")
    add("--detector", metavar="FILE", help="another detector than the one RICE was trained with")
    return parser


def tables_and_pictures(paths, options):
    """Evaluate checkpoints, print their table, and draw what the flags ask for."""
    if options.n < 1 or options.compare and (not options.pictures or len(paths) > 1):
        raise BadInput("--n is 1 or more; --compare needs --pictures and one --ckpt")
    settings = options.data, options.split, options.out, options.workers, options.rerank
    shown = paths + [options.compare] * bool(options.compare)
    runs = [evaluate(path, *settings, every_source=len(paths) == 1) for path in watch(shown, "checkpoints")]
    if not is_first():
        return
    result, look, _ = runs[0]
    if len(paths) > 1:
        result, drawn = compare(runs, options.markdown) | {"runs": [run[0] for run in runs]}, []
    else:
        show(result, options.markdown)
    if options.json:
        write_json(options.json, result)
    if options.compare:
        if len({(r["stage"], r["data"], r["split"]) for r, *_ in runs}) > 1:
            raise BadInput(f"--compare {options.compare}: expected the same stage on the same data as {paths[0]}")
        drawn = draw_comparison([look, runs[1][1]], shown, options.pictures, options.n)
    elif options.pictures:
        drawn = draw_misses_and_hits(look, options.pictures, options.n)
        curves = Path(options.pictures) / "curves.png"
        drawn.append(draw_curves(Path(paths[0]).with_suffix(".jsonl"), curves, runs[0][0]))
    elif len(paths) == 1:
        drawn = [draw_examples(look, options.out or Path(paths[0]).parent)]
    print(*(f"\npicture: {path}" for path in drawn if path), sep="")


def main(argv=None):
    options = flags().parse_args(argv)

    def command():
        keep_memory()
        if options.json and (not Path(options.json).parent.is_dir() or Path(options.json).is_dir()):
            raise BadInput(f"--json {options.json}: expected a file in a folder that exists")
        paths = list(dict.fromkeys(path for given in options.ckpt for path in sorted(glob.glob(given)) or [given]))
        if not options.live:
            tables_and_pictures(paths, options)
        elif options.shop and len(paths) == 1 and start_processes()[1] == 1:
            recognise(paths[0], options)
        else:
            raise BadInput("--live needs --shop, one --ckpt and one process")

    try:
        data.guarded(command)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
