"""Evaluate a checkpoint: AP for the detectors (Table 1), rank-k for RICE (Table 2), pictures of both.

    python eval.py --ckpt runs/tiny/md.pt                      the checkpoint knows its stage, data and configuration
    python eval.py --ckpt runs/tiny/rice.pt --json rice.json
    torchrun --nproc_per_node 8 eval.py --ckpt runs/paper/md.pt --data LPR4M

Data flow:  checkpoint -> model -> one box a frame for every frame of the split -> AP
                                -> one embedding a clip and a shop image -> similarity -> rank-k in each live's gallery

Letters: Q clips (queries), M shop images, G true boxes, F frames, T frames of a clip, D embedding.
Boxes are xyxy in pixels of the picture on disk.
"""
import argparse
import hashlib
import json
import math
import os
import sys
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
    """Share of queries with a true image among the first k of their gallery.

    similarity [Q,M], positive [Q,M] bool, gallery [Q,M] bool (which images a query is compared with; None: all).
    Ties count against us. A query without a true image in its gallery, or whose scores are not finite (no prediction), is a
    miss; every query counts in the denominator. -> {k: fraction}
    """
    similarity, positive = np.asarray(similarity), np.asarray(positive, bool)
    gallery = np.ones_like(positive) if gallery is None else np.asarray(gallery, bool)
    known = np.isfinite(similarity)
    best = np.where(positive & gallery & known, similarity, -np.inf).max(1, initial=-np.inf)
    ahead = (gallery & ~positive & ~(similarity < best[:, None])).sum(1)
    rank = np.where(np.isfinite(best), ahead, np.iinfo(np.int64).max)
    return {k: float((rank < k).mean()) if len(rank) else 0.0 for k in ks}


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
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


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
    """One box for every frame of a split, by SD, and when `model` is MD by MD and by MD with each frame as its own clip.

    -> arrays over frames, by clip and place in it: clip [F], position [F], and "sd", "md", "md1" [F,6] = x1 y1 x2 y2 in
    pixels of the picture on disk, score, class. every_frame=False takes only `frames` of each clip, at even intervals,
    and leaves the control "md1" out: what RICE needs to train.
    """
    dataset = data.DetectionSet(lives, categories, config["frames"], config["shortest"], config["longest"], False, every_frame=every_frame)
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
        else:
            logits, boxes = model(frames.flatten(0, 1), padding.flatten(0, 1))
            answers = {"sd": tuple(x[-1].unflatten(0, valid.shape) for x in (logits, boxes))}
        real = batch["valid"]
        new = {"clip": batch["clip"][:, None].expand(real.shape)[real], "position": batch["position"][real]}
        for name, (logits, boxes) in answers.items():
            box, score, category = (x.cpu()[real] for x in detect.pick(logits, boxes))
            xyxy = box_convert(box, "cxcywh", "xyxy").clamp(0, 1) * batch["size"][real].repeat(1, 2)
            new[name] = torch.cat([xyxy, score[:, None], category[:, None]], 1)
        for name, value in new.items():
            rows.setdefault(name, []).append(value.numpy())
    rows = {name: np.concatenate(value) for name, value in rows.items()}
    return gather_rows(rows, "clip", "position")


def predicted_boxes(checkpoint, lives, folder, device):
    """`predict` with a detector's checkpoint, kept in one file and used again while detector and data are the same."""
    notes = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted((lives.root / "annotations").iterdir())]
    sizes = [checkpoint["config"][name] for name in ("frames", "shortest", "longest")]
    mark = hashlib.sha256(f"{fingerprint(checkpoint)} {lives.root.resolve()} {notes} {sizes}".encode()).hexdigest()[:12]
    path = Path(folder) / f"boxes-{lives.split}-{mark}.npz"
    there = [path.exists()]
    if dist.is_initialized():
        dist.broadcast_object_list(there)             # one process may look before another has written
    if there[0]:
        with np.load(path) as saved:
            return dict(saved)
    model, _ = restore(checkpoint, device)
    rows = predict(model, checkpoint["config"], checkpoint["categories"], lives, device, every_frame=lives.split != "train")
    if is_first():
        with open(f"{path}.part", "wb") as file:
            np.savez(file, **rows)
        os.replace(f"{path}.part", path)
    return rows


def seen_through(rows, name, clips):
    """Rows of `predict` as PairSet wants them: {"start" [clips+1], "position" [F], "box" [F,6]}."""
    return {"start": np.searchsorted(rows["clip"], np.arange(clips + 1)), "position": rows["position"], "box": rows[name]}


# ------------------------------------------------------------------ Table 1

PAPER_1 = {"SD": (36.6, 46.6, 39.6, 27.5, 44.8, 69.0, 23.6, 45.8, 65.4, 20.7, 21.1, 39.8),
           "MD": (37.0, 47.1, 40.2, 27.7, 45.1, 72.7, 24.8, 47.5, 65.7, 25.1, 21.2, 40.3)}
COLUMNS_1 = ("AP", "AP50", "AP75", *(f"{value} {name}" for name, values in data.SPLITS.items() for value in values))
LABELS = {"sd": "SD", "md1": "MD, T = 1", "md": "MD"}


def table(header, rows):
    """Lines of a table whose columns line up; numbers with one decimal, a dash where there is none."""
    def text(cell):
        return cell if isinstance(cell, str) else "-" if cell is None or math.isnan(cell) else f"{cell:.1f}"
    cells = [[text(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)


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
    "hit": share of boxes found, "category": share named right, "kinds": {kind of frame: ...}}}, and what was counted."""
    frame, category, box, kinds = truth_of(rows, lives, categories)
    if not len(frame):
        raise BadInput(f"{lives.root}: the {lives.split} split has no true boxes, and a detector is judged by boxes")
    clip_ids = np.array([lives.video_ids[c] for c in rows["clip"]], object)
    parts = {"all": np.ones(len(clip_ids), bool)}
    parts |= {f"{value} {name}": np.array([v in ids for v in clip_ids], bool) for (name, value), ids in lives.members.items()}
    results = {}
    for method in (m for m in LABELS if m in rows):
        found = rows[method]
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
                                       {"image": np.flatnonzero(part), "category": guessed[part],
                                        "box_xyxy": found[part, :4], "score": found[part, 4]})
                columns = {column: column for column in ("AP", "AP50", "AP75")} if name == "all" else {name: "AP50"}
                result[view] |= {column: 100 * ap[statistic] for column, statistic in columns.items()}
        hit, shown = np.zeros(len(found), bool), np.zeros(len(found), bool)
        np.logical_or.at(hit, frame, _overlaps(found[frame, :4], box) >= 0.5)
        shown[frame] = True
        result["hit"] = 100 * float(hit[shown].mean())
        result["category"] = 100 * float(right.mean()) if "per category" in views else None
        result["kinds"] = {}
        for kind in (k for k in (*data.KINDS, "absent") if (kinds == k).any()):
            here = kinds == kind
            result["kinds"][kind] = {"frames": int(here.sum()), "score": 100 * float(found[here, 4].mean()),
                                     "hit": 100 * float(hit[here].mean()) if shown[here].any() else None}
    return results, {"clips": len(lives), "frames": len(clip_ids), "boxes": len(frame)}


def _overlaps(a, b):
    """IoU row by row: a [G,4], b [G,4] -> [G]."""
    inner = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0).prod(1)
    return inner / np.maximum((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner, 1e-9)


def show_table_1(results, counts):
    print(f"\nTable 1, one box a frame ({counts['clips']} clips, {counts['frames']} frames, {counts['boxes']} boxes); "
          "AP50 from the fourth column on")
    rows = [(f"{LABELS[m]}, {view}", *r[view].values()) for view in ("class-agnostic", "per category")
            for m, r in results.items() if r[view]["AP"] is not None]
    print(table(("", *COLUMNS_1), rows + [(f"paper's {name}", *values) for name, values in PAPER_1.items()]))
    kinds = results["sd"]["kinds"]
    rows = [(LABELS[m], r["hit"], *(r["kinds"][k]["hit"] for k in kinds), r["category"]) for m, r in results.items()]
    rows += [(f"{LABELS[m]}, mean score", None, *(r["kinds"][k]["score"] for k in kinds), None) for m, r in results.items() if kinds]
    print(f"\nFrames whose box has IoU 0.5 or more{', by kind of frame' if kinds else ''} (%)")
    print(table(("", "all", *kinds, "right category"), rows))


# ------------------------------------------------------------------ Table 2

PAPER_2 = {"SD": (30.6, 62.6, 73.5), "MD": (31.3, 63.2, 74.3)}
SOURCES = {"true": "true boxes", "md": "MD boxes", "sd": "SD boxes", "none": "whole frames"}


def embed(encode, dataset, numbers, config, device):
    """What `encode` gives for the samples `numbers` of a PairSet or ImageSet: a list of tensors, in that order."""
    batches = DataLoader(dataset, batch_sampler=data.ShardSampler(numbers, 64), num_workers=config["workers"])
    rows = [encode({name: value.to(device) for name, value in batch.items()}) for batch in batches]
    return [torch.cat(column) for column in zip(*rows)]


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

    -> {"live", "clips", "ids" of the gallery, "positive" [Q,M], "score": {source: {"icl": [Q,M], "pmd": ..., "fused": ...}}}
    """
    ids = list(dict.fromkeys(lives.galleries.get(live, [])))
    true = [set(lives.positives.get(lives.video_ids[q], [])) for q in clips]
    row = {"live": live, "clips": clips, "ids": ids, "score": {},
           "positive": np.array([[i in images for i in ids] for images in true], bool).reshape(len(clips), len(ids))}
    if not ids:
        return row

    def encode_images(b):
        return model.encode_images(data.to_float(b["image"], data.CLIP), b["title"])

    def encode_clips(b):
        frames = data.to_float(b["frames"], data.CLIP)
        return *model.encode_clips(frames, b["keep"], b["valid"], b["asr"]), b["valid"].any(1)

    shop = data.ImageSet(lives, tokenizer, config["size"], ids)
    image, image_tokens = embed(encode_images, shop, range(len(ids)), config, device)            # [M,D], [M,1+P+1,W]
    for source, boxes in sources.items():
        view = "frame" if boxes is None else config["view"]
        pairs = data.PairSet(lives, tokenizer, config["frames"], config["size"], model.visual.grid, view, boxes, False)
        clip, tokens, padding, seen = embed(encode_clips, pairs, clips, config, device)          # [Q,D], [Q,R,W], [Q,R], [Q]
        scores = {"icl": model.scale() * clip @ image.T}                                         # [Q,M]
        if hasattr(model, "pmd"):
            scores["pmd"] = rerank(model, scores["icl"], image_tokens, tokens, padding, config["rerank"])
            scores["fused"] = scores["icl"] + scores["pmd"]
        # A clip without frames has no prediction: it stays in the denominator, as a miss.
        row["score"][source] = {name: s.masked_fill(~seen[:, None], math.nan).cpu().numpy() for name, s in scores.items()}
    return row


def score_ranking(checkpoint, lives, folder, device):
    """Table 2: R1, R5, R10 in each live's gallery, for every source of boxes there is: by ICL, by the PMD, by both.

    Live by live, so that memory holds one gallery; each process takes its share of the lives.
    -> results {source: {"icl": {"R1": percent, ...}, "pmd": ..., "fused": ...}}, counts, and what the picture shows.
    """
    config, (model, tokenizer) = checkpoint["config"], restore(checkpoint, device)
    if not lives.galleries or not lives.positives:
        raise BadInput(f"{lives.root}: the {lives.split} split needs {lives.split}_liveid_to_gallery_*.json and "
                       f"{lives.split}_videoid_to_gtimage_*.json to rank shop images")
    sources = {"none": None}
    if config["view"] != "frame":
        found = predicted_boxes(checkpoint["detector"], lives, folder, device) if "detector" in checkpoint else {}
        sources = {"true": data.true_boxes(lives)} if lives.truth else {}
        sources |= {name: seen_through(found, name, len(lives)) for name in ("md", "sd") if name in found} | {"none": None}
    members, (rank, world) = {}, start_processes()
    for q, video_id in enumerate(lives.video_ids):
        members.setdefault(data.live_of(video_id), []).append(q)
    mine = [rank_live(model, tokenizer, config, lives, live, clips, sources, device)
            for live, clips in watch(list(members.items())[rank::world], "rank lives")]
    place = {live: n for n, live in enumerate(members)}
    rows = sorted((row for part in everyones(mine) for row in part), key=lambda row: place[row["live"]])

    def share(parts):
        """A share of each live's clips -> the share of all clips, in percent."""
        return {f"R{k}": 100 * sum(len(row["clips"]) * part[k] for row, part in zip(rows, parts)) / len(lives) for k in (1, 5, 10)}

    def found_in(row, source, name):
        return rank_k(row["score"][source][name], row["positive"]) if row["ids"] else {1: 0.0, 5: 0.0, 10: 0.0}

    names = ("icl", "pmd", "fused") if hasattr(model, "pmd") else ("icl",)
    results = {source: {name: share([found_in(row, source, name) for row in rows]) for name in names} for source in sources}
    main = config["boxes"] if config["boxes"] in sources else "none"
    chances = [{k: float(np.mean([chance(len(row["ids"]), int(p), k) for p in row["positive"].sum(1)])) for k in (1, 5, 10)} for row in rows]
    counts = {"clips": len(lives), "lives": len(rows), "missing": int((lives.lengths == 0).sum()), "chance": share(chances),
              "gallery": sum(len(row["clips"]) * len(row["ids"]) for row in rows) / len(lives),
              "several true images": int(sum((row["positive"].sum(1) > 1).sum() for row in rows)), "source": main, "each live": {}}
    for row, luck in zip(rows, chances):
        hits = [100 * value for value in found_in(row, main, "icl").values()]
        counts["each live"][row["live"]] = [len(row["clips"]), len(row["ids"]), *hits, 100 * luck[1]]
    return results, counts, {"rows": rows, "source": main, "boxes": sources[main], "score": names[-1]}


def chance(images, true, k):
    """Probability that a random order of a gallery has one of its `true` images among the first k."""
    return 1 - math.comb(images - true, k) / math.comb(images, k) if true and k < images else float(true > 0)


def show_table_2(results, counts, config):
    print(f"\nTable 2, rank-k within each live's own gallery ({counts['clips']} clips, {counts['lives']} lives, "
          f"{counts['gallery']:.1f} images a gallery, missing={counts['missing']})")
    names = {"icl": "ICL", "pmd": f"PMD on the first {config['rerank']}", "fused": "ICL + PMD"}
    rows = [(f"{SOURCES[source]}, {names[score]}", *values.values()) for source, r in results.items() for score, values in r.items()]
    rows += [("chance", *counts["chance"].values())] + [(f"paper's RICE, {name} boxes", *values) for name, values in PAPER_2.items()]
    print(table(("", "R1", "R5", "R10"), rows))
    print(f"\nEach live's clips against its own gallery ({SOURCES[counts['source']]}, ICL)")
    rows = list(counts["each live"].items())
    print(table(("", "clips", "images", "R1", "R5", "R10", "chance R1"), [(live, str(n), str(m), *row) for live, (n, m, *row) in rows[:12]]))
    print("" if len(rows) <= 12 else f"... and {len(rows) - 12} more lives (all of them with --json)")


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
    return Image.fromarray(lives.read(folder, name).permute(1, 2, 0).numpy())


def detection_picture(rows, lives, names, path, clips=4, height=210):
    """Strips of a few clips' frames with SD's box (orange), MD's (blue) and the true one (dashed white), saved to `path`."""
    strips = []
    for c in np.unique(rows["clip"])[:: max(1, len(np.unique(rows["clip"])) // clips)][:clips]:
        clip, strip = lives.clip(int(c)), []
        for f in np.flatnonzero(rows["clip"] == c)[:8]:
            t = int(rows["position"][f])
            frame = open_picture(lives, "frames", clip.frame_ids[t])
            scale = height / frame.height
            frame = frame.resize((round(frame.width * scale), height))
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
    _join(strips or [Image.new("RGB", (height, height), "white")], 1).save(path)
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
    for word in text.split():
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
            frame = open_picture(lives, "frames", clip.frame_ids[int(positions[j])])
            if boxes:
                x1, y1, x2, y2 = boxes["box"][boxes["start"][q] + j, :4]
                ImageDraw.Draw(frame).rectangle([x1, y1, x2, y2], outline=COLOURS["md"], width=max(1, min(frame.size) // 96))
            frames.append(frame.resize((side, side)))
        cells = [cell(_join(frames, 0), f"“{clip.asr}”" if clip.asr else "", None, 3)] if frames else []
        for m in np.argsort(-row["score"][shown["source"]][shown["score"]][place], kind="stable")[:5]:
            picture = open_picture(lives, "images", row["ids"][m]).resize((side, side))
            cells.append(cell(picture, lives.titles.get(row["ids"][m], ""), (40, 160, 60) if row["positive"][place, m] else (205, 50, 45)))
        rows.append(_join(cells, 0))
    _join(rows or [Image.new("RGB", (side, side), "white")], 1).save(path)
    return path


# ------------------------------------------------------------------ the command


def evaluate(path, data_dir=None, split="test", out=None, workers=None, top=None):
    """Evaluate one checkpoint and print its table.

    -> every number as a dict of plain values, and a function that draws the picture beside the checkpoint (or in `out`):
    to be called when the numbers are safe.
    """
    start_processes()
    device, checkpoint = pick_device(), read_checkpoint(path)
    config = checkpoint["config"]
    for settings in (config, checkpoint.get("detector", {}).get("config", {})):
        settings["workers"] = config["workers"] if workers is None else workers
    config["rerank"] = config["rerank"] if top is None else top
    if config["workers"] < 0 or config["rerank"] < 1:
        raise BadInput("--workers is 0 or more, --rerank 1 or more")
    lives, out = data.Lives(data_dir or config["data"], split), Path(out or Path(path).parent)
    out.mkdir(parents=True, exist_ok=True)
    if config["stage"] == "rice":
        results, counts, shown = score_ranking(checkpoint, lives, out, device)
        draw = lambda: ranking_picture(shown, lives, out / "ranking.png")
    else:
        rows = predicted_boxes(checkpoint, lives, out, device)
        results, counts = score_detections(rows, lives, checkpoint["categories"])
        draw = lambda: detection_picture(rows, lives, list(checkpoint["categories"].values()), out / "detections.png")
    result = {"stage": config["stage"], "data": str(lives.root), "split": split, "counts": counts, "results": results,
              "step": checkpoint["step"], "seed": config["seed"], "config": config, "fingerprint": fingerprint(checkpoint)}
    if is_first():
        show(result)
    return result, lambda: print(f"\npicture: {draw()}")


def show(result):
    """Print the table of what `evaluate` returned."""
    if result["stage"] == "rice":
        show_table_2(result["results"], result["counts"], result["config"])
    else:
        show_table_1(result["results"], result["counts"])


def write_json(path, value):
    """Written whole or not at all."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    os.replace(f"{path}.part", path)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint of train.py: Table 1 for a detector, Table 2 for RICE.")
    parser.add_argument("--ckpt", required=True, help="checkpoint, e.g. runs/tiny/md.pt; it knows its stage and configuration")
    parser.add_argument("--data", help="data folder in the LPR4M layout (default: the one it was trained on)")
    parser.add_argument("--split", default="test", choices=["test", "val"], help="which lives (default: test)")
    parser.add_argument("--out", help="folder for the picture and the cached boxes (default: the checkpoint's)")
    parser.add_argument("--json", help="write every number to this file too")
    parser.add_argument("--rerank", type=int, help="how many first images the PMD scores (default: as configured, 20)")
    parser.add_argument("--workers", type=int, help="processes that load pictures (default: as in training)")
    options = parser.parse_args(argv)

    def command():
        result, draw = evaluate(options.ckpt, options.data, options.split, options.out, options.workers, options.rerank)
        if is_first():
            if options.json:
                write_json(options.json, result)
            draw()
    try:
        data.guarded(command)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
