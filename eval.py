"""Evaluate a checkpoint: AP for the detectors (Table 1), rank-k for RICE (Table 2), pictures of both.

    python eval.py --ckpt runs/tiny/md.pt                      the checkpoint knows its stage, data and configuration
    python eval.py --ckpt runs/tiny/rice.pt --json rice.json
    python eval.py --ckpt runs/rand?/rice.pt runs/s?/rice.pt --markdown        a row per configuration, mean over seeds, differences
    torchrun --nproc_per_node 8 eval.py --ckpt runs/paper/md.pt --data LPR4M

Data flow:  checkpoint -> model -> one box a frame for every frame of the split -> AP
                                -> one embedding a clip and a shop image -> similarity -> rank-k in each live's gallery

Letters: Q clips (queries), M shop images, G true boxes, F frames, T frames of a clip, D embedding.
Boxes are xyxy in the annotation's pixels: those of the picture on disk, unless its side file tells an original size.
"""
import argparse
import glob
import hashlib
import json
import math
import os
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torchvision.ops import box_convert
from tqdm import tqdm

import data
import detect
import rice
from data import BadInput

# ------------------------------------------------------------------ metrics, pure functions of arrays


def average_precision(truth, detections):
    """COCO's box AP: 10 IoU thresholds, 101 recall points, 100 detections an image and category, mean over categories.

    truth: dict of arrays image [G], category [G], box_xyxy [G,4]; detections: the same and score [D]. Equal scores keep
    the order of images. Give every row the same category for the class-agnostic figure. A detection matches the free
    true box of highest IoU. Categories without a true box do not count.
    -> AP, AP50, AP75, APsmall, APmedium, APlarge (-1 where the size has no true box), AR1, AR10, AR100, ARsmall,
    ARmedium, ARlarge, per_category {category: AP}. No detections give 0; no true boxes at all raise ValueError.
    """
    t_image, t_category = np.asarray(truth["image"]), np.asarray(truth["category"])
    t_box = np.asarray(truth["box_xyxy"], np.float64).reshape(-1, 4)
    if not len(t_image):
        raise ValueError("average_precision: no true box, so there is nothing to find")
    names, t_category = np.unique(t_category, return_inverse=True)
    d_category = np.asarray(detections["category"])
    known = np.isin(d_category, names)
    d_category = np.searchsorted(names, d_category[known])
    d_image, score = np.asarray(detections["image"])[known], np.asarray(detections["score"], np.float64)[known]
    d_box = np.asarray(detections["box_xyxy"], np.float64).reshape(-1, 4)[known]

    # Boxes meet only within one image and category: sort both sides by that key, detections by score within it.
    images = np.unique(np.concatenate([t_image, d_image]))
    t_key = np.searchsorted(images, t_image) * len(names) + t_category
    d_key = np.searchsorted(images, d_image) * len(names) + d_category
    t_order, d_order = np.argsort(t_key, kind="stable"), np.lexsort((-score, d_key))
    t_key, t_box, t_category = t_key[t_order], t_box[t_order], t_category[t_order]
    d_key, d_box, d_category, score = d_key[d_order], d_box[d_order], d_category[d_order], score[d_order]
    rank = np.arange(len(d_key)) - np.searchsorted(d_key, d_key)
    d_key, d_box, d_category, score, rank = (x[rank < 100] for x in (d_key, d_box, d_category, score, rank))
    first = np.searchsorted(t_key, d_key)
    count = np.searchsorted(t_key, d_key, side="right") - first
    pair_d = np.repeat(np.arange(len(d_key)), count)
    pair_t = np.arange(len(pair_d)) - np.repeat(np.cumsum(count) - count, count) + first[pair_d]
    t_area, d_area = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (t_box, d_box))
    low, high = np.maximum(d_box[pair_d, :2], t_box[pair_t, :2]), np.minimum(d_box[pair_d, 2:], t_box[pair_t, 2:])
    inner = (high - low).clip(0).prod(1)
    iou = inner / (d_area[pair_d] + t_area[pair_t] - inner)
    by_rank = np.argsort(rank[pair_d], kind="stable")
    pair_d, pair_t, iou = pair_d[by_rank], pair_t[by_rank], iou[by_rank]
    rounds = np.searchsorted(rank[pair_d], np.arange(rank.max(initial=-1) + 2))

    thresholds, recalls = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
    result, per_category = {}, {}
    for area, low, high in (("", 0, 1e10), ("small", 0, 32 ** 2), ("medium", 32 ** 2, 96 ** 2), ("large", 96 ** 2, 1e10)):
        ignored = (t_area < low) | (t_area > high)
        hit, skip = _greedy(pair_d, pair_t, iou, rounds, ignored, thresholds, len(d_key))
        skip |= ~hit & ((d_area < low) | (d_area > high))
        curves, reached = [], {1: [], 10: [], 100: []}
        for c, name in enumerate(names):
            total = int((~ignored & (t_category == c)).sum())
            if total == 0:
                continue
            mine = np.flatnonzero(d_category == c)
            mine = mine[np.argsort(-score[mine], kind="stable")]
            found = hit[:, mine] & ~skip[:, mine]
            true, false = found.cumsum(1), (~hit[:, mine] & ~skip[:, mine]).cumsum(1)
            recall = true / total
            precision = true / np.maximum(true + false, 1)
            precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
            curve = np.zeros((10, 101))
            for t in range(10):
                at = np.searchsorted(recall[t], recalls)
                curve[t, at < len(mine)] = precision[t, at[at < len(mine)]]
            curves.append(curve)
            for most, values in reached.items():
                values.append((found & (rank[mine] < most)).sum(1) / total)
            if not area:
                per_category[name.item()] = float(curve.mean())
        mean = np.array(curves)
        result[f"AP{area}"] = float(mean.mean()) if curves else -1.0
        if area:
            result[f"AR{area}"] = float(np.mean(reached[100])) if curves else -1.0
        else:
            result |= {"AP50": float(mean[:, 0].mean()), "AP75": float(mean[:, 5].mean())}
            result |= {f"AR{most}": float(np.mean(values)) for most, values in reached.items()}
    return result | {"per_category": per_category}


def _greedy(pair_d, pair_t, iou, rounds, ignored, thresholds, count):
    """Match best detections first, all images at once: round r gives every image's r-th detection its best free box.

    A box that does not count is taken only when none that counts is left. -> matched [10,D], matched to an ignored one.
    """
    hit, skip = np.zeros((10, count), bool), np.zeros((10, count), bool)
    taken = np.zeros((10, len(ignored)), bool)
    for low, high in zip(rounds, rounds[1:]):
        d, t, overlap = pair_d[low:high], pair_t[low:high], iou[low:high]
        starts = np.flatnonzero(np.r_[True, d[1:] != d[:-1]]) if len(d) else []
        if not len(starts):
            continue
        value = np.where(~taken[:, t] & (overlap >= thresholds[:, None]), overlap + 2 * ~ignored[t], -1)   # [10,pairs]
        best = np.maximum.reduceat(value, starts, axis=1)                                                  # [10,dets]
        lengths = np.diff(np.r_[starts, len(d)])
        at_best = np.where(value == np.repeat(best, lengths, axis=1), np.arange(len(d)), -1)
        chosen = np.maximum.reduceat(at_best, starts, axis=1)                                              # [10,dets]
        level, place = np.nonzero(best > 0)
        box = t[chosen[level, place]]
        taken[level, box] = True
        hit[level, d[starts[place]]] = True
        skip[level, d[starts[place]]] = ignored[box]
    return hit, skip


def rank_k(similarity, positive, gallery=None, ks=(1, 5, 10)):
    """Share of queries with a true image among the first k of their gallery: {k: fraction}.

    similarity [Q,M], positive [Q,M] bool, gallery [Q,M] bool (which images a query is compared with; None: all).
    Every query counts in the denominator; see first_true.
    """
    rank = first_true(similarity, positive, gallery)
    return {k: float((rank < k).mean()) if len(rank) else 0.0 for k in ks}


def first_true(similarity, positive, gallery=None):
    """How many images stand before the first true one in each query's ranking: [Q]. Arguments as in rank_k.

    Ties count against us. A query without a true image in its gallery, or whose scores are not finite (no prediction),
    never finds one: its place is beyond every k.
    """
    similarity, positive = np.asarray(similarity), np.asarray(positive, bool)
    gallery = np.ones_like(positive) if gallery is None else np.asarray(gallery, bool)
    known = np.isfinite(similarity)
    best = np.where(positive & gallery & known, similarity, -np.inf).max(1, initial=-np.inf)
    ahead = (gallery & ~positive & ~(similarity < best[:, None])).sum(1)
    return np.where(np.isfinite(best), ahead, np.iinfo(np.int64).max)


# ------------------------------------------------------------------ checkpoints and processes


def build(config, classes, vocab):
    """The model of a stage from its configuration (a plain dict): SD, MD or RICE."""
    if config["stage"] == "rice":
        vit = {name: config[name] for name in ("width", "layers", "patch", "size")}
        return rice.RICE(vit | {"heads": config["vit_heads"], "dim": config["embedding"]}, vocab,
                         config["n_neg"], config["negatives"], tuple(config["losses"].split(",")))
    names = ("queries", "dim", "heads", "encoder_layers", "decoder_layers", "ffn", "backbone", "dense")
    sd = detect.SD(classes, **{name: config[name] for name in names})
    return sd if config["stage"] == "sd" else detect.MD(sd, config["keep"])


def read_checkpoint(path):
    """What train.py saved, as plain tensors and dicts; BadInput when the file is missing or something else."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such checkpoint; train it with `python train.py --stage {Path(path).stem}`")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"config", "model", "step", "categories"} - checkpoint.keys()
    except Exception as error:             # torch.load raises whatever the broken bytes lead it to
        raise BadInput(f"{path}: not a checkpoint of train.py ({type(error).__name__})") from None
    if missing:
        raise BadInput(f"{path}: not a checkpoint of train.py (no {', '.join(sorted(missing))})")
    import train                           # the other look upstairs: which configurations there can be
    wrong = train.unsound(checkpoint)
    if wrong:
        raise BadInput(f"{path}: not a checkpoint of train.py ({wrong})")
    return checkpoint


def restore(checkpoint, device):
    """The model of a checkpoint, in evaluation mode."""
    tokenizer = data.Tokenizer(bytes(checkpoint["tokenizer"].tolist())) if "tokenizer" in checkpoint else None
    model = build(checkpoint["config"], len(checkpoint["categories"]), tokenizer and tokenizer.vocab)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise BadInput(f"the checkpoint's weights do not fit its configuration: {str(error).splitlines()[-1].strip()}") from None
    return model.to(device).eval(), tokenizer


def fingerprint(checkpoint):
    """A short text that changes with any weight of the model."""
    mark = hashlib.sha256()
    for value in checkpoint["model"].values():
        mark.update(value.numpy().tobytes())
    return mark.hexdigest()[:16]


def pick_device():
    """cuda (by local rank), else mps, else cpu."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def start_processes():
    """Join torchrun's group when there is one: nccl with CUDA, gloo otherwise. -> rank, number of processes."""
    if "RANK" in os.environ and not dist.is_initialized():
        pick_device()
        store, rank, world = next(dist.rendezvous("env://"))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=fresh_part(store, rank, world),
                                rank=rank, world_size=world)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def fresh_part(store, rank, world):
    """The part of torchrun's store that belongs to this start of the job.

    After --max-restarts has started the processes again, the store still holds the addresses of those that are gone, and who
    reads one waits for the dead. So the first process names a part and hands the name to whoever lives: it answers every
    question in the store, the dead ones' too, until all the others have taken their answer.
    """
    mine = uuid.uuid4().hex
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


def gather_rows(rows, *keys):
    """Arrays of every process, joined and ordered by `keys` (the sample's numbers): the same on any number of processes."""
    parts = [part for part in everyones(rows) if part]             # a process may have had no sample at all
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort([joined[key] for key in reversed(keys)])
    return {name: value[order] for name, value in joined.items()}


def watch(batches, text):
    """A progress bar on the first process."""
    return tqdm(batches, desc=text, unit="", leave=False, disable=not is_first())


# ------------------------------------------------------------------ detecting


@torch.no_grad()
def predict(model, config, categories, lives, device, every_frame=True):
    """One box for every frame of a split, by SD, and when `model` is MD by MD and by its two controls.

    -> arrays over frames, by clip and place in it: clip [F], position [F], and [F,6] = x1 y1 x2 y2 in the annotation's
    pixels, score (-1: the frame cannot be read, there is no box), class: "sd", "md", "md1" (MD, each frame as its own clip)
    and "vote" (SD, and a clip's frames vote on the category, which needs no training). every_frame=False takes only
    `frames` of each clip, at even intervals, and leaves the controls out: what RICE needs to train.
    """
    dataset = data.DetectionSet(lives, categories, config["frames"], config["shortest"], config["longest"], False,
                                every_frame=every_frame)
    # A ResNet lets padding leak across a picture's edge, so what a clip is padded with must not depend on its neighbours in
    # a batch, that is on the number of processes: it goes alone. With the small backbone padding changes nothing.
    if not len(dataset):
        raise BadInput(f"{lives.root}: the clips of the {lives.split} split have no frames")
    pixels = config["frames"] * config["shortest"][1] * config["longest"]
    together = max(1, 10 ** 6 // pixels) if config["backbone"] == "small" else 1
    shard = data.ShardSampler(range(len(dataset)), together, *start_processes())
    batches = DataLoader(dataset, batch_sampler=shard, num_workers=config["workers"], collate_fn=data.collate_detection)
    rows, many = {}, config["stage"] == "md"
    for batch in watch(batches, f"detect {lives.split}"):
        valid, padding = batch["valid"].to(device), batch["padding"].to(device)
        frames = data.to_float(batch["frames"].to(device), data.IMAGENET, padding)
        padding = padding & valid[..., None, None]
        if many:
            *single, memory = model.single(frames, padding)
            answers = {"sd": single[1:], "md": tuple(x[-1] for x in model.temporal(*single, memory, valid))}
            if every_frame:
                every = torch.ones(valid.numel(), 1, dtype=torch.bool, device=device)
                alone = model.temporal(*(x.flatten(0, 1)[:, None] for x in single), memory, every)
                answers["md1"] = tuple(x[-1].unflatten(0, valid.shape).squeeze(2) for x in alone)
                answers["vote"] = vote(single[1], valid), single[2]
        else:
            logits, boxes = model(frames.flatten(0, 1), padding.flatten(0, 1))
            answers = {"sd": tuple(x[-1].unflatten(0, valid.shape) for x in (logits, boxes))}
        real = batch["position"] >= 0
        new = {"clip": batch["clip"][:, None].expand(real.shape)[real], "position": batch["position"][real]}
        for name, (logits, boxes) in answers.items():
            box, score, category = (x.cpu()[real] for x in detect.pick(logits, boxes))
            if not torch.isfinite(torch.cat([box, score[:, None]], 1)[batch["valid"][real]]).all():
                raise BadInput(f"the detector's boxes of {lives.root} are not finite numbers: its weights are spoilt; train it anew")
            xyxy = box_convert(box, "cxcywh", "xyxy").clamp(0, 1) * batch["size"][real].repeat(1, 2)
            # A frame that cannot be read has no box; its true boxes stay in the denominator.
            score = score.where(batch["valid"][real], -1)
            new[name] = torch.cat([xyxy, score[:, None], category[:, None]], 1)
        for name, value in new.items():
            rows.setdefault(name, []).append(value.numpy())
    rows = {name: np.concatenate(value) for name, value in rows.items()}
    return gather_rows(rows, "clip", "position")


def vote(logits, valid):
    """SD's logits [B,T,N,K] with what the clip's other frames say about the category added; valid [B,T].

    A frame's evidence for a class is the log of its best score for it, normalised over classes; each frame hears the mean
    of the others. What MD gains beyond this control is more than a vote on the category.
    """
    best = logits.sigmoid().amax(2)                                                              # [B,T,K]
    evidence = (best / best.sum(-1, keepdim=True)).log() * valid[..., None]                      # [B,T,K]
    others = (valid.sum(1, keepdim=True) - 1).clamp(min=1)[..., None]                            # [B,1,1]
    heard = (evidence.sum(1, keepdim=True) - evidence) / others                                  # [B,T,K]
    return logits + VOTE * heard[:, :, None]                                                     # [B,T,N,K]


def predicted_boxes(checkpoint, lives, folder, device, every_frame=True):
    """`predict` with a detector's checkpoint, kept in one file and used again while detector and data are the same."""
    notes = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted((lives.root / "annotations").glob("[!.]*"))]
    sizes = [checkpoint["config"][name] for name in ("frames", "shortest", "longest")]
    frames = hashlib.sha256(lives.lengths.tobytes()).hexdigest()
    decides = f"{fingerprint(checkpoint)} {lives.root.resolve()} {notes} {sizes} {frames} {every_frame} {VOTE}"
    mark = hashlib.sha256(decides.encode()).hexdigest()[:12]
    path = Path(folder) / f"boxes-{lives.split}-{mark}.npz"
    there = [path.exists()]
    if dist.is_initialized():
        dist.broadcast_object_list(there)             # one process may look before another has written
    if there[0]:
        try:
            with np.load(path) as saved:
                rows = dict(saved)
            if len({len(rows["clip"]), *map(len, rows.values())}) == 1 and rows["clip"].max() < len(lives):
                return rows
        except Exception:                             # whatever torn bytes lead to
            pass
        raise BadInput(f"{path}: not the boxes that were kept there; remove it, and they are made again")
    model, _ = restore(checkpoint, device)
    rows = predict(model, checkpoint["config"], checkpoint["categories"], lives, device, every_frame)
    if is_first():
        with data.whole(path, f".{os.getpid()}") as part, open(part, "wb") as file:        # another run may be writing the same
            np.savez(file, **rows)
    return rows


def seen_through(rows, name, clips):
    """Rows of `predict` as PairSet wants them: {"start" [clips+1], "position" [F], "box" [F,6]}."""
    return {"start": np.searchsorted(rows["clip"], np.arange(clips + 1)), "position": rows["position"], "box": rows[name]}


# ------------------------------------------------------------------ Table 1

PAPER_1 = {"SD": (36.6, 46.6, 39.6, 27.5, 44.8, 69.0, 23.6, 45.8, 65.4, 20.7, 21.1, 39.8),
           "MD": (37.0, 47.1, 40.2, 27.7, 45.1, 72.7, 24.8, 47.5, 65.7, 25.1, 21.2, 40.3)}
COLUMNS_1 = ("AP", "AP50", "AP75", *(f"{value} {name}" for name, values in data.SPLITS.items() for value in values))
LABELS = {"sd": "SD", "vote": "SD, vote", "md1": "MD, T = 1", "md": "MD"}
VOTE = 2.0            # weight of the vote; on validation lives 0.5, 1, 2, 4, 8 gave AP 40.4, 41.7, 42.4, 42.5, 41.4 (one SD)


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
    """The true boxes of the frames in `rows`: frame [G] (its place in rows), category [G] (-1: not told), box [G,4]; kinds [F]."""
    numbers = {raw: k for k, raw in enumerate(categories)}
    frame_of = {(int(c), int(t)): f for f, (c, t) in enumerate(zip(rows["clip"], rows["position"]))}
    frame, category, box, kinds = [], [], [], np.full(len(rows["clip"]), "", object)
    for c in np.unique(rows["clip"]):
        clip = lives.clip(int(c))
        for t, boxes in enumerate(clip.boxes or []):
            f = frame_of[int(c), t]
            kinds[f] = clip.kinds[t] if clip.kinds else ""
            for *xyxy, raw in boxes:
                frame.append(f)
                box.append(xyxy)
                # A category that training never showed is a class of its own, which no detection can hit.
                category.append(-1 if raw < 0 else numbers.get(int(raw), len(numbers) + int(raw)))
    return np.array(frame, int), np.array(category, int), np.array(box, np.float64).reshape(-1, 4), kinds


def score_detections(rows, lives, categories):
    """Table 1 of each method in `rows`, in percent: {method: {"class-agnostic": {column: AP}, "per category": {column: AP},
    "hit": share of boxes found, "category": share named right, "kinds": {kind of frame: ...}}}, what was counted, and per
    method what `ap50` needs: clip [F], score [F], hit [F] (IoU 0.5 or more), and true [Q], the boxes of each clip."""
    frame, category, box, kinds = truth_of(rows, lives, categories)
    if not len(frame):
        raise BadInput(f"{lives.root}: the {lives.split} split has no true boxes, and a detector is judged by boxes")
    clip_ids = np.array([lives.video_ids[c] for c in rows["clip"]], object)
    parts = {"all": np.ones(len(clip_ids), bool)}
    parts |= {f"{value} {name}": np.array([v in ids for v in clip_ids], bool) for (name, value), ids in lives.members.items()}
    results, samples = {}, {}
    for method in (m for m in LABELS if m in rows):
        found, seen = rows[method], rows[method][:, 4] >= 0
        guess, right = found[:, 5].astype(int), found[frame, 5].astype(int) == category
        views = {"class-agnostic": (np.zeros_like(category), np.zeros_like(guess))}
        if (category >= 0).all():                                  # else the test boxes do not tell their category
            views["per category"] = category, guess
        result = results[method] = {"class-agnostic": dict.fromkeys(COLUMNS_1), "per category": dict.fromkeys(COLUMNS_1)}
        for view, (true, guessed) in views.items():
            for name, part in parts.items():
                mine = part[frame]
                if not mine.any():
                    continue
                ap = average_precision({"image": frame[mine], "category": true[mine], "box_xyxy": box[mine]},
                                       {"image": np.flatnonzero(part & seen), "category": guessed[part & seen],
                                        "box_xyxy": found[part & seen, :4], "score": found[part & seen, 4]})
                columns = {column: column for column in ("AP", "AP50", "AP75")} if name == "all" else {name: "AP50"}
                result[view] |= {column: 100 * ap[statistic] for column, statistic in columns.items()}
        hit, shown = np.zeros(len(found), bool), np.zeros(len(found), bool)
        np.logical_or.at(hit, frame, (_overlaps(found[frame, :4], box) >= 0.5) & seen[frame])
        shown[frame] = True
        samples[method] = {"clip": rows["clip"][seen], "score": found[seen, 4], "hit": hit[seen],
                           "true": np.bincount(rows["clip"][frame], minlength=len(lives))}
        result["hit"] = 100 * float(hit[shown].mean())
        result["category"] = 100 * float(right.mean()) if "per category" in views else None
        result["kinds"] = {}
        for kind in (k for k in (*data.SHOWN, "absent") if (kinds == k).any()):
            here = kinds == kind
            result["kinds"][kind] = {"frames": int(here.sum()), "score": 100 * float(found[here, 4].mean()),
                                     "hit": 100 * float(hit[here].mean()) if shown[here].any() else None}
    return results, {"clips": len(lives), "frames": len(clip_ids), "boxes": len(frame), "missing": int((~seen).sum())}, samples


def _overlaps(a, b):
    """IoU row by row: a [G,4], b [G,4] -> [G]."""
    inner = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0).prod(1)
    return inner / np.maximum((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner, 1e-9)


def show_table_1(results, counts, markdown=False):
    print(f"\nTable 1, one box a frame ({counts['clips']} clips, {counts['frames']} frames, {counts['boxes']} boxes, "
          f"missing={counts['missing']}); AP50 from the fourth column on\n")
    rows = [(f"{LABELS[m]}, {view}", *r[view].values()) for view in ("class-agnostic", "per category")
            for m, r in results.items() if r[view]["AP"] is not None]
    print(table(("", *COLUMNS_1), rows + [(f"paper's {name}", *values) for name, values in PAPER_1.items()], markdown))
    if results["sd"]["per category"]["AP"] is None:
        print("The true boxes do not tell their category: class-agnostic AP only.")
    kinds = results["sd"]["kinds"]
    rows = [(LABELS[m], r["hit"], *(r["kinds"][k]["hit"] for k in kinds), r["category"]) for m, r in results.items()]
    rows += [(f"{LABELS[m]}, mean score", None, *(r["kinds"][k]["score"] for k in kinds), None) for m, r in results.items() if kinds]
    print(f"\nFrames whose box has IoU 0.5 or more{', by kind of frame' if kinds else ''} (%)\n")
    print(table(("", "all", *kinds, "right category"), rows, markdown))


# ------------------------------------------------------------------ Table 2

PAPER_2 = {"SD": (30.6, 62.6, 73.5), "MD": (31.3, 63.2, 74.3)}
SCORES = {"icl": "ICL", "pmd": "PMD", "fused": "ICL + PMD"}
SOURCES = {"true": "true boxes", "md": "MD boxes", "sd": "SD boxes", "none": "whole frames"}


def embed(encode, dataset, numbers, config, device, text=None):
    """What `encode` gives for the samples `numbers` of a PairSet or ImageSet: a list of tensors, in that order.

    text: the name of a progress bar, when there is to be one.
    """
    batches = DataLoader(dataset, batch_sampler=data.ShardSampler(numbers, 64), num_workers=config["workers"])
    rows = [encode({name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()})
            for batch in (watch(batches, text) if text else batches)]
    return [torch.cat(column) for column in zip(*rows)]


def image_encoder(model):
    """What `embed` asks for shop images: a batch of an ImageSet -> embedding, tokens, whether it could be read."""
    def encode(batch):
        seen = torch.tensor([not bad for bad in batch["bad"]], device=batch["image"].device)
        return *model.encode_images(data.to_float(batch["image"], data.CLIP), batch["title"])[:2], seen
    return encode


def rerank(model, similarity, images, clips, padding, top):
    """ICL similarity [Q,M] -> the PMD's score of the first `top` images of each clip [Q,M]; the others are -inf.

    images [M,1+P+1,W] and clips [Q,R,W] are tokens, padding [Q,R].
    """
    scores = torch.full_like(similarity, -math.inf)
    best = similarity.argsort(dim=1, descending=True, stable=True)[:, :top]
    for q, chosen in enumerate(best):
        pairs = torch.zeros(len(chosen), 1, dtype=torch.long, device=similarity.device)
        scores[q, chosen] = model.pmd(images[chosen], clips[q:q + 1], padding[q:q + 1], pairs)[0][:, 0]
    return scores


@torch.no_grad()
def rank_live(model, tokenizer, config, lives, live, clips, sources, device):
    """One live: its clips (numbers) against its own gallery, for every source of boxes.

    -> {"live", "clips", "ids" of the gallery, "positive" [Q,M], "score": {source: {"icl": [Q,M], "pmd": ..., "fused": ...}},
    "place": {source: {"icl": [Q], ...}}, how many images stand before the first true one}
    """
    ids = list(dict.fromkeys(lives.galleries.get(live, [])))
    true = [set(lives.positives.get(lives.video_ids[q], [])) for q in clips]
    row = {"live": live, "clips": clips, "ids": ids, "score": {},
           "positive": np.array([[i in images for i in ids] for images in true], bool).reshape(len(clips), len(ids))}
    names = ("icl", "pmd", "fused") if hasattr(model, "pmd") else ("icl",)
    if not ids:
        never = np.full(len(clips), np.iinfo(np.int64).max)
        unread = {"unread images": 0, "unread clips": int((lives.lengths[clips] == 0).sum())}
        return row | unread | {"place": {source: dict.fromkeys(names, never) for source in sources}}

    def encode_clips(b):
        frames = data.to_float(b["frames"], data.CLIP)
        return *model.encode_clips(frames, b["keep"], b["valid"], b["asr"])[:3], b["valid"].any(1)

    shop = data.ImageSet(lives, tokenizer, config["size"], ids, config.get("text", "both"))
    image, image_tokens, readable = embed(image_encoder(model), shop, range(len(ids)), config, device)  # [M,D], [M,1+P+1,W], [M]
    row |= {"unread images": int((~readable).sum()), "unread clips": 0}
    for source, boxes in sources.items():
        view = "frame" if boxes is None else config["view"]
        pairs = data.PairSet(lives, tokenizer, config["frames"], config["size"], model.visual.grid, view, boxes, False,
                             text=config.get("text", "both"))
        clip, tokens, padding, seen = embed(encode_clips, pairs, clips, config, device)          # [Q,D], [Q,R,W], [Q,R], [Q]
        scores = {"icl": model.scale() * clip @ image.T}                                         # [Q,M]
        if hasattr(model, "pmd"):
            scores["pmd"] = rerank(model, scores["icl"], image_tokens, tokens, padding, config["rerank"])
            scores["fused"] = scores["icl"] + scores["pmd"]
        row["unread clips"] = int((~seen).sum())
        # A clip without a frame that can be read, an image that cannot: no prediction. They stay in the denominator, as misses.
        row["score"][source] = {name: s.masked_fill(~readable, -math.inf).masked_fill(~seen[:, None], math.nan).cpu().numpy()
                                for name, s in scores.items()}
    row["place"] = {source: {name: first_true(s, row["positive"]) for name, s in scores.items()}
                    for source, scores in row["score"].items()}
    return row


def score_ranking(checkpoint, lives, folder, device, model=None, every_source=True):
    """Table 2: R1, R5, R10 in each live's gallery, for every source of boxes there is: by ICL, by the PMD, by both.

    Live by live, so that memory holds one gallery; each process takes its share of the lives. every_source=False: only
    the boxes that the model was trained with. model: that of the checkpoint, when it is built already.
    -> results {source: {"icl": {"R1": percent, ...}, "pmd": ..., "fused": ...}}, counts, what the picture shows, and the
    place [Q] of each clip's first true image by each score, for the boxes that the model was trained with.
    """
    config, tokenizer = checkpoint["config"], data.Tokenizer(bytes(checkpoint["tokenizer"].tolist()))
    model = restore(checkpoint, device)[0] if model is None else model
    if not lives.galleries or not lives.positives:
        raise BadInput(f"{lives.root}: the {lives.split} split needs {lives.split}_liveid_to_gallery_*.json and "
                       f"{lives.split}_videoid_to_gtimage_*.json to rank shop images")
    sources = {"none": None}
    if config["view"] != "frame":
        found = predicted_boxes(checkpoint["detector"], lives, folder, device) if "detector" in checkpoint else {}
        sources = {"true": data.true_boxes(lives)} if lives.truth else {}
        sources |= {name: seen_through(found, name, len(lives)) for name in ("md", "sd") if name in found} | {"none": None}
    main = config["boxes"] if config["boxes"] in sources else "none"
    sources = sources if every_source else {main: sources[main]}
    members, (rank, world) = {}, start_processes()
    for q, video_id in enumerate(lives.video_ids):
        members.setdefault(data.live_of(video_id), []).append(q)
    mine = [rank_live(model, tokenizer, config, lives, live, clips, sources, device)
            for live, clips in watch(list(members.items())[rank::world], "rank lives")]
    place = {live: n for n, live in enumerate(members)}
    rows = sorted((row for part in everyones(mine) for row in part), key=lambda row: place[row["live"]])
    order = np.argsort(np.concatenate([row["clips"] for row in rows]), kind="stable")

    def joined(column):
        """A value for each clip of each live -> for each clip of the split, in its order."""
        return np.concatenate([column(row) for row in rows])[order]

    def share(rank):
        return {f"R{k}": 100 * float((rank < k).mean()) for k in (1, 5, 10)}

    names = ("icl", "pmd", "fused") if hasattr(model, "pmd") else ("icl",)
    places = {source: {name: joined(lambda row: row["place"][source][name]) for name in names} for source in sources}
    true, images = joined(lambda row: row["positive"].sum(1)), joined(lambda row: np.full(len(row["clips"]), len(row["ids"])))
    luck = {f"R{k}": 100 * float(np.mean([chance(int(m), int(p), k) for m, p in zip(images, true)])) for k in (1, 5, 10)}
    counts = {"clips": len(lives), "lives": len(rows), "chance": luck, "missing": sum(row["unread clips"] for row in rows),
              "missing images": sum(row["unread images"] for row in rows),
              "gallery": float(images.mean()), "several true images": int((true > 1).sum()), "source": main, "each live": {}, "cases": {}}
    for row in rows:
        hits = share(row["place"][main]["icl"]).values()
        counts["each live"][row["live"]] = [len(row["clips"]), len(row["ids"]), *hits, 100 * chance(len(row["ids"]), 1, 1)]
    for case, members in lives.cases.items():
        inside = np.array([video_id in members for video_id in lives.video_ids], bool)
        if inside.any():
            counts["cases"][case] = {"clips": int(inside.sum()), **{name: share(places[main][name][inside])["R1"] for name in names}}
    results = {source: {name: share(rank) for name, rank in ranks.items()} for source, ranks in places.items()}
    return results, counts, {"rows": rows, "source": main, "boxes": sources[main], "score": names[-1]}, places[main]


def chance(images, true, k):
    """Probability that a random order of a gallery has one of its `true` images among the first k."""
    return 1 - math.comb(images - true, k) / math.comb(images, k) if true and k < images else float(true > 0)


def show_table_2(results, counts, config, markdown=False):
    print(f"\nTable 2, rank-k within each live's own gallery ({counts['clips']} clips, {counts['lives']} lives, "
          f"{counts['gallery']:.1f} images a gallery, missing={counts['missing']}, missing images={counts['missing images']})\n")
    names = SCORES | {"pmd": f"PMD on the first {config['rerank']}"}
    rows = [(f"{SOURCES[source]}, {names[score]}", *values.values()) for source, r in results.items() for score, values in r.items()]
    rows += [("chance", *counts["chance"].values())] + [(f"paper's RICE, {name} boxes", *values) for name, values in PAPER_2.items()]
    print(table(("", "R1", "R5", "R10"), rows, markdown))
    if counts["cases"]:
        print(f"\nR1 of the clips that only words, or only details, can tell ({SOURCES[counts['source']]})\n")
        rows = [(case, str(value["clips"]), *(value[name] for name in names if name in value)) for case, value in counts["cases"].items()]
        print(table(("", "clips", *list(names.values())[:len(rows[0]) - 2]), rows, markdown))
    print(f"\nEach live's clips against its own gallery ({SOURCES[counts['source']]}, ICL)\n")
    rows = [(live, str(n), str(m), *row) for live, (n, m, *row) in list(counts["each live"].items())[:12]]
    print(table(("", "clips", "images", "R1", "R5", "R10", "chance R1"), rows, markdown))
    more = len(counts["each live"]) - len(rows)
    print(f"... and {more} more lives (all of them with --json)" if more else "")


# ------------------------------------------------------------------ several checkpoints: rows, seeds, intervals

# What a paper's row has, by the field it varies (Tables 2 and 3; the losses stand in the main paper).
PAPER_ROWS = {("boxes", "sd"): (30.6, 62.6, 73.5), ("boxes", "md"): (31.3, 63.2, 74.3), ("negatives", "rand"): (27.6, 57.3, 69.7),
              ("negatives", "hard"): (29.4, 62.0, 73.7), ("losses", "icl"): (31.5,), ("losses", "icl,pmd"): (33.1,),
              ("losses", "icl,pmd,pfr"): (33.8,)}
WEIGHTLESS = {"workers", "save_every", "log_every", "eval_every", "out", "detectors", "init"}      # fields that change no weight
SAME = WEIGHTLESS | {"seed", "preset", "data"}                                # one row, however they differ


def compare(runs, markdown=False):
    """Print one row per configuration, mean and standard deviation over its seeds, then the differences between rows.

    runs: what `evaluate` returned, all for the same clips. Rows stand in the order given; each is compared with the one
    above it (Table 1: MD with SD and its controls), with 95 % intervals by paired bootstrap: clips, or whole lives, are
    drawn anew, and seeds too. -> {"rows": [...], "differences": [...]} of plain values.
    """
    if len({json.dumps(samples["live"]) for _, _, samples in runs}) > 1:
        raise BadInput("--ckpt: these checkpoints were not evaluated on the same clips; name one data folder with --data")
    rows, detectors = rows_of(runs), runs[0][0]["stage"] != "rice"
    names = list(rows[0]["columns"][0])
    print(f"\nTable {1 if detectors else 2} ({len(runs)} checkpoints, {len(runs[0][2]['live'])} clips; mean ± standard deviation over seeds)\n")
    best = np.array([row["mean"] for row in rows])
    bold = [(r, c + 2) for c in range(len(names)) for r in np.flatnonzero(best[:, c] == best[:, c].max()) if len(rows) > 1]
    paper = [(f"paper's {name}", "", *values) for name, values in PAPER_1.items()] if detectors else []
    print(table(("", "seeds", *names), [(row["name"], str(len(row["seeds"])), *zip(row["mean"], row["std"])) for row in rows]
                + [(*row, *[None] * (2 + len(names) - len(row))) for row in paper], markdown, bold))
    pairs = pairs_of(rows, detectors)
    differences = []
    for one, other in watch(pairs, "bootstrap"):
        statistic = ap50 if detectors else r1
        differences.append({"name": f"{one['name']} - {other['name']}", "mean": (one["mean"] - other["mean"]).tolist(),
                            "clips": interval(one["samples"], other["samples"], statistic, False),
                            "lives": interval(one["samples"], other["samples"], statistic, True),
                            "paper": paper_difference(one, other, detectors, len(names))})
    if differences:
        headline = "AP50" if detectors else "R1"
        print(f"\nDifferences; {headline}: 95 % interval over clips and seeds, over lives and seeds\n")
        lines = []
        for d in differences:
            lines.append((d["name"], *d["mean"], *(f"{low:+.1f} .. {high:+.1f}" for low, high in (d["clips"], d["lives"]))))
            if d["paper"]:
                lines.append(("    the paper's", *d["paper"], "", ""))
        print(table(("", *names, f"{headline}, clips", f"{headline}, lives"), lines, markdown))
    plain = [{"name": row["name"], "seeds": row["seeds"], "mean": dict(zip(names, map(float, row["mean"]))),
              "std": dict(zip(names, (None if v is None else float(v) for v in row["std"])))} for row in rows]
    return {"rows": plain, "differences": [d | {"mean": dict(zip(names, d["mean"]))} for d in differences]}


def rows_of(runs):
    """One row per configuration and method: its name (the fields in which configurations differ), numbers and samples by seed."""
    stages = {result["stage"] for result, *_ in runs}
    if "rice" in stages and len(stages) > 1:
        raise BadInput("--ckpt: detectors and RICE have different tables; evaluate them one after the other")
    differing = [name for name in runs[0][0]["config"] if name not in SAME and any(
        len({json.dumps(result["config"].get(name)) for result, *_ in runs if result["stage"] == stage}) > 1 for stage in stages)]
    groups, rows = {}, []
    for result, _, samples in runs:
        key = (result["stage"], *(json.dumps(result["config"].get(name)) for name in differing))
        groups.setdefault(key, []).append((result, samples))
    for key, members in groups.items():
        config = members[0][0]["config"]
        for method in members[0][1]["methods"]:
            label = (SCORES if config["stage"] == "rice" else LABELS)[method]
            row = {"name": ", ".join([*(f"{name}={config.get(name)}" for name in differing), label]), "method": method, "group": key,
                   "varied": [(name, config.get(name)) for name in differing],
                   "seeds": [result["config"]["seed"] for result, _ in members],
                   "columns": [columns_of(result, method) for result, _ in members],
                   "samples": [samples["methods"][method] | {"live": samples["live"]} for _, samples in members]}
            names = list(rows[0]["columns"][0] if rows else row["columns"][0])
            values = np.array([[np.nan if c.get(name) is None else c[name] for name in names] for c in row["columns"]], float)
            rows.append(row | {"mean": values.mean(0), "std": values.std(0, ddof=1) if len(values) > 1 else [None] * len(names)})
    return rows


def columns_of(result, method):
    """One method's numbers of one evaluated checkpoint, under the columns of its table."""
    if result["stage"] != "rice":
        return result["results"][method]["class-agnostic"] | {"category AP": result["results"][method]["per category"]["AP"]}
    cases = {f"R1 {case}": value[method] for case, value in result["counts"]["cases"].items()}
    return result["results"][result["counts"]["source"]][method] | cases


def pairs_of(rows, detectors):
    """Which rows are compared: MD with SD and with its controls; RICE by the same score with the row above, and fused with ICL."""
    pairs = []
    for n, row in enumerate(rows):
        mates = [r for r in rows if r["group"] == row["group"] and r is not row]
        if detectors and row["method"] == "md":
            pairs += [(row, mate) for mate in mates]
        if not detectors:
            above = [r for r in rows[:n] if r["method"] == row["method"]]
            pairs += [(row, above[-1])] if above else []
            pairs += [(row, mate) for mate in mates if (row["method"], mate["method"]) == ("fused", "icl")]
    return pairs


def paper_difference(one, other, detectors, width):
    """The paper's difference between two rows, where it has both; None otherwise."""
    if detectors:
        values = [PAPER_1.get(LABELS[row["method"]]) for row in (one, other)]
    else:
        changed = [(a, b) for a, b in zip(one["varied"], other["varied"]) if a != b]
        values = [PAPER_ROWS.get(side) for side in changed[0]] if len(changed) == 1 else [None]
    if not all(values) or one["method"] != other["method"] and not detectors:
        return None
    known = [a - b for a, b in zip(*values)]
    return known + [None] * (width - len(known))


def interval(one, other, statistic, by_live, draws=1000):
    """95 % interval of mean(one) - mean(other) over their seeds: paired bootstrap over clips, or over whole lives.

    one, other: the samples of each seed. Both sides see the same clips drawn; each side draws its seeds.
    """
    rng = np.random.default_rng(0)
    lives = np.unique(one[0]["live"], return_inverse=True)[1] if by_live else np.arange(len(one[0]["live"]))
    units = int(lives.max()) + 1
    weights = rng.multinomial(units, np.full(units, 1 / units), draws)[:, lives]                           # [R,Q]
    means = []
    for side in (one, other):
        values = np.stack([statistic(sample, weights) for sample in side])                                 # [seeds,R]
        means.append(np.take_along_axis(values, rng.integers(len(side), size=values.shape), 0).mean(0))    # [R]
    return np.percentile(means[0] - means[1], [2.5, 97.5]).tolist()


def r1(sample, weights):
    """R1 in percent when clip q counts weights[:,q] times: weights [R,Q] -> [R]."""
    return 100 * weights @ (sample["place"] < 1) / weights.sum(1)


def ap50(sample, weights):
    """Class-agnostic AP50 of one box a frame, in percent, when clip q counts weights[:,q] times: weights [R,Q] -> [R]."""
    order = np.argsort(-sample["score"], kind="stable")
    w, hit = weights[:, sample["clip"][order]], sample["hit"][order]                                       # [R,F], [F]
    true = np.cumsum(w * hit, 1)
    precision = true / np.maximum(np.cumsum(w, 1), 1)
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    recall = true / np.maximum(weights @ sample["true"], 1)[:, None]
    at = np.stack([np.searchsorted(row, np.linspace(0, 1, 101)) for row in recall])                        # [R,101]
    return 100 * np.where(at < len(order), np.take_along_axis(precision, at.clip(max=len(order) - 1), 1), 0).mean(1)


# ------------------------------------------------------------------ near-duplicates


@torch.no_grad()
def duplicates(path, folder, threshold, block=2048):
    """Groups of shop images whose feature cosine exceeds the threshold (supplement, section 5 (3)).

    Compared blockwise: memory is the features and one block of cosines. Prints the groups and writes folder/duplicates.txt:
    image to drop <tab> image it repeats; nothing is deleted. -> groups, lists of image ids
    """
    checkpoint, device = read_checkpoint(path), pick_device()
    if checkpoint["config"]["stage"] != "rice" or not -1 <= threshold <= 1:
        raise BadInput(f"--ckpt {path} --threshold {threshold}: expected a checkpoint of --stage rice and a cosine")
    config, (model, tokenizer) = checkpoint["config"], restore(checkpoint, device)
    lives = data.Lives.pictures(folder)
    ids = sorted({data._safe_id(name[:-4], f"{folder}/images") for _, _, names in os.walk(lives.root / "images") for name in names
                  if name.endswith((".jpg", ".png"))})
    if not ids:
        raise BadInput(f"{folder}/images: no .jpg and no .png")
    shop = data.ImageSet(lives, tokenizer, config["size"], ids, "none")
    encode = image_encoder(model)
    feature, seen = embed(lambda batch: encode(batch)[::2], shop, range(len(ids)), config, device, "features")   # [M,D], [M]
    feature = feature.masked_fill(~seen[:, None], 0)
    first = list(range(len(ids)))                                  # each image's group, named by its first image

    def root(i):
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    for start in watch(range(0, len(ids), block), "compare"):
        for low in range(start, len(ids), block):
            cosine = feature[start:start + block] @ feature[low:low + block].T                   # [block,block]
            for i, j in (cosine > threshold).nonzero().tolist():
                a, b = sorted((root(start + i), root(low + j)))
                first[b] = a
    groups = {}
    for i in range(len(ids)):
        groups.setdefault(root(i), []).append(ids[i])
    groups = [group for group in groups.values() if len(group) > 1]
    for group in groups[:20]:
        print("  ".join(group[:8]) + (f"  ... {len(group)} in all" if len(group) > 8 else ""))
    listed = "".join(f"{again}\t{group[0]}\n" for group in groups for again in group[1:])
    with data.whole(lives.root / "duplicates.txt") as part:
        Path(part).write_text(listed, encoding="utf-8")
    print(f"{len(ids)} images, {len(groups)} groups (20 shown at most), {sum(map(len, groups)) - len(groups)} to drop: {folder}/duplicates.txt")
    return groups


# ------------------------------------------------------------------ pictures

COLOURS = {"sd": (230, 120, 20), "md": (20, 110, 230)}


def font(size):
    try:
        return ImageFont.load_default(size)
    except (OSError, ImportError):                  # Pillow without FreeType
        return ImageFont.load_default()


def _dashed(draw, box, colour, dash=6):
    x1, y1, x2, y2 = box
    for a, b in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))):
        length = max(1, math.hypot(b[0] - a[0], b[1] - a[1]))
        for start in np.arange(0, length, 2 * dash):
            stretch = (start / length, min(1, (start + dash) / length))
            draw.line([p + (q - p) * s for s in stretch for p, q in zip(a, b)], fill=colour, width=2)


def open_picture(lives, folder, name):
    """A picture and the size (w, h) that its boxes are given in; grey where it cannot be read."""
    try:
        pixels, size = lives.frame(name) if folder == "frames" else (lives.read(folder, name), None)
    except BadInput:
        return Image.new("RGB", (96, 96), (150, 150, 150)), (96, 96)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()), size


def detection_picture(rows, lives, names, path, clips=4, height=210):
    """Strips of a few clips' frames with SD's box (orange), MD's (blue) and the true one (dashed white), saved to `path`."""
    strips = []
    for c in np.unique(rows["clip"])[:: max(1, len(np.unique(rows["clip"])) // clips)][:clips]:
        clip, strip = lives.clip(int(c)), []
        for f in np.flatnonzero(rows["clip"] == c)[:8]:
            t = int(rows["position"][f])
            frame, size = open_picture(lives, "frames", clip.frame_ids[t])
            scale = height / size[1]
            frame = frame.resize((min(8 * height, max(1, round(size[0] * scale))), height))       # however long and thin it is
            draw = ImageDraw.Draw(frame)
            for x1, y1, x2, y2, _ in clip.boxes[t] if clip.boxes else []:
                _dashed(draw, [v * scale for v in (x1, y1, x2, y2)], (255, 255, 255))
            for method, colour in COLOURS.items():
                if method in rows:
                    x1, y1, x2, y2, score, category = rows[method][f]
                    draw.rectangle([v * scale for v in (x1, y1, x2, y2)], outline=colour, width=2)
                    text = f"{method.upper()} {names[int(category)]} {score:.2f}"
                    draw.text((3, height - 15 * (2 - list(COLOURS).index(method))), text, colour, font(12), stroke_width=1, stroke_fill=(255, 255, 255))
            if clip.kinds:
                draw.text((3, 2), clip.kinds[t], (255, 255, 255), font(12), stroke_width=1, stroke_fill=(0, 0, 0))
            strip.append(frame)
        strips.append(_join(strip, 0))
    with data.whole(path) as part:
        _join(strips or [Image.new("RGB", (height, height), "white")], 1).save(part, "PNG")
    return path


def _join(pictures, axis, gap=4):
    size = [max(p.size[d] for p in pictures) for d in (0, 1)]
    size[axis] = sum(p.size[axis] + gap for p in pictures) - gap
    sheet, at = Image.new("RGB", size, (255, 255, 255)), [0, 0]
    for picture in pictures:
        sheet.paste(picture, tuple(at))
        at[axis] += picture.size[axis] + gap
    return sheet


def _wrapped(text, width, kind):
    """Text cut into lines that fit `width` pixels."""
    lines = [""]
    for word in text[:400].split():                 # more would not be seen
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if kind.getlength(longer) <= width or not lines[-1] else [lines[-1], word]
    return "\n".join(lines)


def ranking_picture(shown, lives, path, clips=5, side=132):
    """A few clips (three frames with their boxes, the ASR below), and the first five shop images of each with their titles.

    Right images have a green border, wrong ones a red one (like Figures 1 and 2 of the supplement). Saved to `path`.
    """
    kind, rows = font(11), []

    def cell(picture, text, border, width=1):
        sheet = Image.new("RGB", (side * width + 4 * (width - 1), side + 44), (255, 255, 255))
        sheet.paste(picture, (0, 0))
        draw = ImageDraw.Draw(sheet)
        if border:
            draw.rectangle([0, 0, side - 1, side - 1], outline=border, width=4)
        draw.multiline_text((2, side + 2), _wrapped(text, sheet.width - 4, kind), (60, 60, 60), kind, spacing=2)
        return sheet

    asked = [(row, place, q) for row in shown["rows"] if row["ids"] for place, q in enumerate(row["clips"])]
    for at in np.linspace(0, len(asked) - 1, min(clips, len(asked))).astype(int):
        row, place, q = asked[at]
        clip, boxes, frames = lives.clip(q), shown["boxes"], []
        positions = boxes["position"][boxes["start"][q]:boxes["start"][q + 1]] if boxes else np.arange(len(clip.frame_ids))
        for j in data.even_frames(len(positions), 3):
            frame, size = open_picture(lives, "frames", clip.frame_ids[int(positions[j])])
            frame = frame.resize(size) if boxes and frame.size != size else frame
            if boxes:
                x1, y1, x2, y2 = boxes["box"][boxes["start"][q] + j, :4]
                ImageDraw.Draw(frame).rectangle([x1, y1, x2, y2], outline=COLOURS["md"], width=max(1, min(frame.size) // 96))
            frames.append(frame.resize((side, side)))
        cells = [cell(_join(frames, 0), f"“{clip.asr}”" if clip.asr else "", None, 3)] if frames else []
        for m in np.argsort(-row["score"][shown["source"]][shown["score"]][place], kind="stable")[:5]:
            picture = open_picture(lives, "images", row["ids"][m])[0].resize((side, side))
            cells.append(cell(picture, lives.titles.get(row["ids"][m], ""), (40, 160, 60) if row["positive"][place, m] else (205, 50, 45)))
        rows.append(_join(cells, 0))
    with data.whole(path) as part:
        _join(rows or [Image.new("RGB", (side, side), "white")], 1).save(part, "PNG")
    return path


# ------------------------------------------------------------------ the command


def evaluate(path, data_dir=None, split="test", out=None, workers=None, top=None, every_source=True):
    """Evaluate one checkpoint.

    -> every number as a dict of plain values, a function that draws the picture beside the checkpoint (or in `out`), to be
    called when the numbers are safe, and what `compare` draws anew: {"live" [Q], "methods": {name: per clip or frame}}.
    """
    start_processes()
    device, checkpoint = pick_device(), read_checkpoint(path)
    config = checkpoint["config"]
    for settings in (config, checkpoint.get("detector", {}).get("config", {})):
        settings["workers"] = config["workers"] if workers is None else workers
    config["rerank"] = config["rerank"] if top is None else top
    if config["workers"] < 0 or config["rerank"] < 1:
        raise BadInput("--workers is 0 or more, --rerank 1 or more")
    out = Path(out or Path(path).parent)
    data.output_folder(out)
    # With --overfit a model is judged by the very clips that it was trained on.
    overfit = config.get("overfit", 0)
    lives = data.Lives(data_dir or config["data"], "train" if overfit else split)
    lives = lives.few(overfit) if overfit else lives
    if config["stage"] == "rice":
        boxes = Path(config.get("detectors", out))                   # models that share a detector find its boxes there
        boxes = boxes if boxes.is_dir() else out
        results, counts, shown, places = score_ranking(checkpoint, lives, boxes, device, every_source=every_source)
        draw = lambda: ranking_picture(shown, lives, out / "ranking.png")
        methods = {name: {"place": place} for name, place in places.items()}
    else:
        rows = predicted_boxes(checkpoint, lives, out, device)
        results, counts, methods = score_detections(rows, lives, checkpoint["categories"])
        draw = lambda: detection_picture(rows, lives, list(checkpoint["categories"].values()), out / "detections.png")
    result = {"stage": config["stage"], "data": str(lives.root), "split": lives.split, "counts": counts, "results": results,
              "step": checkpoint["step"], "seed": config["seed"], "config": config, "fingerprint": fingerprint(checkpoint)}
    return result, draw, {"live": [data.live_of(v) for v in lives.video_ids], "methods": methods}


@torch.no_grad()
def validate(model, checkpoint, folder, device):
    """The one number by which training is watched, on the val lives: {"AP50": class-agnostic} or {"R1": by ICL}, percent."""
    config, lives = checkpoint["config"], data.Lives(checkpoint["config"]["data"], "val")
    model.eval()
    if config["stage"] == "rice":
        results, counts, *_ = score_ranking(checkpoint, lives, folder, device, model, every_source=False)
        value = {"R1": results[counts["source"]]["icl"]["R1"]}
    else:
        rows = predict(model, config, checkpoint["categories"], lives, device, every_frame=False)
        value = {"AP50": score_detections(rows, lives, checkpoint["categories"])[0][config["stage"]]["class-agnostic"]["AP50"]}
    model.train()
    return value


def show(result, markdown=False):
    """Print the table of what `evaluate` returned."""
    if result["stage"] == "rice":
        show_table_2(result["results"], result["counts"], result["config"], markdown)
    else:
        show_table_1(result["results"], result["counts"], markdown)


def write_json(path, value):
    """Written whole or not at all."""
    with data.whole(path) as part, open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)


def main(argv=None):
    parser = data.Parser(description="Evaluate a checkpoint of train.py: Table 1 for a detector, Table 2 for RICE.")
    parser.add_argument("--ckpt", required=True, nargs="+", metavar="FILE", help="checkpoint, e.g. runs/tiny/md.pt; it knows its stage "
                        "and configuration. Several (or a pattern): one row per configuration, mean and deviation over seeds")
    parser.add_argument("--data", help="data folder in the LPR4M layout (default: the one it was trained on)")
    parser.add_argument("--split", default="test", choices=["test", "val"], help="which lives (default: test)")
    parser.add_argument("--out", help="folder for the picture and the cached boxes (default: the checkpoint's)")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--json", help="write every number to this file too")
    parser.add_argument("--rerank", type=int, help="how many first images the PMD scores (default: as configured, 20)")
    parser.add_argument("--workers", type=int, help="processes that load pictures (default: as in training)")
    options = parser.parse_args(argv)

    def command():
        if options.json and (not Path(options.json).parent.is_dir() or Path(options.json).is_dir()):
            raise BadInput(f"--json {options.json}: expected a file in a folder that exists")
        paths = list(dict.fromkeys(path for given in options.ckpt for path in sorted(glob.glob(given)) or [given]))
        settings = options.data, options.split, options.out, options.workers, options.rerank
        runs = [evaluate(path, *settings, every_source=len(paths) == 1) for path in watch(paths, "checkpoints")]
        if not is_first():
            return
        result, draw, _ = runs[0]
        if len(paths) > 1:
            result = compare(runs, options.markdown) | {"runs": [run[0] for run in runs]}
        else:
            show(result, options.markdown)
        if options.json:
            write_json(options.json, result)
        if len(paths) == 1:
            print(f"\npicture: {draw()}")
    try:
        data.guarded(command)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
