"""Evaluate checkpoints: AP of detectors (Table 1), rank-k of RICE (Table 2), pictures, a live.

    python eval.py --ckpt runs/tiny/rice.pt --json rice.json
    python eval.py --ckpt runs/s?/rice.pt                  a row per configuration, mean over seeds
    python eval.py --ckpt runs/tiny/rice.pt --live live.mp4 --shop photos     which product, when

Letters, the same in all files: Q clips that query, G images of a gallery, V IoU thresholds, B
batch, T frames of a clip, N queries of a detector, K classes, D channels of an embedding, C of a
token, P patches, R tokens of a clip. Boxes are xyxy in the pixels of the annotation unless a name
says cxcywh.
"""
import contextlib
import datetime
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import textwrap
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes

import data
import detect
import rice
from data import BadInput, progress_bar, require

STAGES = ("sd", "md", "rice")

# ---- AP and rank-k


def select_rows(columns, rows):
    """Some rows of true boxes or of detections, {name: [n,...]}."""
    return {name: np.asarray(value)[rows] for name, value in columns.items()}


def box_iou_rows(a, b):
    """IoU of boxes [n,4] and [n,4], row by row -> [n]."""
    a, b = a.astype(float), b.astype(float)
    overlap = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(0).prod(1)
    areas = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    return overlap / np.maximum(areas - overlap, 1e-9)


def image_and_category(columns, categories):
    """One number for both; categories are -1 .. categories - 1."""
    return columns["image"] * (categories + 1) + columns["category"] + 1


def rank_by_score(detections):
    """The place of each detection by score in its image and category, from 0."""
    image, category = detections["image"], detections["category"]
    order = np.lexsort((-detections["score"], category, image))
    key = image_and_category(detections, category.max(initial=-1) + 1)[order]
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order)) - np.searchsorted(key, key)
    return rank


def pairs_in_one_image(detections, truth):
    """All pairs of a detection and a true box of the same image and category -> the row of the
    detection and of the true box of each pair, by detection."""
    categories = 1 + max(truth["category"].max(), detections["category"].max(initial=-1))
    truth_key = image_and_category(truth, categories)
    detection_key = image_and_category(detections, categories)
    by_key = np.argsort(truth_key, kind="stable")
    first = np.searchsorted(truth_key, detection_key, sorter=by_key)
    count = np.searchsorted(truth_key, detection_key, "right", by_key) - first
    pair_detection = np.repeat(np.arange(len(detection_key)), count)
    start = np.repeat(np.cumsum(count) - count, count)         # a detection's first pair
    within = np.arange(len(pair_detection)) - start            # 0, 1, ... for each detection
    return pair_detection, by_key[first[pair_detection] + within]


def coco_match(truth, detections):
    """Which detections find a true box at IoU 0.5, 0.55 .. 0.95 -> tp [V,detections].

    COCO's rule: in each image and category the detection of the highest score takes the free true
    box of the greatest IoU (of equal ones the last), then the second, and so on. All images take
    this turn together, so that Python's loop is as long as the longest list of an image.
    """
    pair_detection, pair_truth = pairs_in_one_image(detections, truth)
    iou = box_iou_rows(detections["box_xyxy"][pair_detection], truth["box_xyxy"][pair_truth])

    # Round 0 has the pairs of the best detection of every image and category, round 1 those of the
    # second best, ...; within a detection the pairs stand in the order in which it wants them.
    rank = rank_by_score(detections)
    order = np.lexsort((-pair_truth, -iou, pair_detection, rank[pair_detection]))
    pair_detection, pair_truth, iou = pair_detection[order], pair_truth[order], iou[order]
    ranks = np.arange(rank.max(initial=-1) + 2)
    round_start = np.searchsorted(rank[pair_detection], ranks)

    tp = np.zeros((10, len(rank)), bool)
    for v, threshold in enumerate(np.linspace(0.5, 0.95, 10)):
        free = np.ones(len(truth["image"]), bool)
        for low, high in zip(round_start, round_start[1:]):
            candidate = free[pair_truth[low:high]] & (iou[low:high] >= threshold)
            candidate = low + np.flatnonzero(candidate)
            # Of each detection np.unique gives the first pair: its best box that is still free.
            matched, best = np.unique(pair_detection[candidate], return_index=True)
            free[pair_truth[candidate[best]]] = False
            tp[v, matched] = True
    return tp


def mean_precision(truth, detections, tp):
    """AP, AP50, AP75 and AP per category from the matching tp [V,detections]. The caller may pass a
    part of the rows of a matching: one matching serves every column of Table 1."""
    order = np.lexsort((detections["image"], -detections["score"]))  # equal scores: by image
    category = detections["category"][order]
    per_category = {}
    for c, total in zip(*np.unique(truth["category"], return_counts=True)):
        hits = tp[:, order[category == c]].cumsum(1)
        precision = hits / np.arange(1, hits.shape[1] + 1)
        # Interpolated: never lower than at a higher recall, and 0 at recalls that are not reached.
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))
        at = [np.searchsorted(recall, np.linspace(0, 1, 101)) for recall in hits / total]
        per_category[c.item()] = np.take_along_axis(precision, np.array(at), 1).mean(1)
    mean = np.mean(list(per_category.values()), 0)                   # [V]
    return {"AP": float(mean.mean()), "AP50": float(mean[0]), "AP75": float(mean[5]),
            "per_category": {c: float(values.mean()) for c, values in per_category.items()}}


def average_precision(truth, detections):
    """COCO's box AP, equal to pycocotools. truth: {"image" [n], "category" [n], "box_xyxy" [n,4]};
    detections: the same and "score" -> {"AP", "AP50", "AP75", "per_category"} in 0..1."""
    if not len(truth["image"]):
        raise ValueError("average_precision: no true box")
    truth, detections = select_rows(truth, slice(None)), select_rows(detections, slice(None))
    detections = select_rows(detections, rank_by_score(detections) < 100)  # COCO counts no more
    return mean_precision(truth, detections, coco_match(truth, detections))


def rank_of_first_positive(similarity, positive, gallery=None):
    """How many images rank before the first true one: similarity, positive, gallery [Q,G] -> [Q].
    An image of the same score, or of score NaN, ranks before it. Without a true image of finite
    score in the gallery: the largest integer."""
    similarity, positive = np.asarray(similarity), np.asarray(positive, bool)
    gallery = np.ones_like(positive) if gallery is None else np.asarray(gallery, bool)
    true = positive & gallery & np.isfinite(similarity)
    best = np.where(true, similarity, -np.inf).max(1, initial=-np.inf)
    not_behind = ~(similarity < best[:, None])                        # True for NaN as well
    ahead = (gallery & ~positive & not_behind).sum(1)
    return np.where(np.isfinite(best), ahead, np.iinfo(np.int64).max)


def rank_k(similarity, positive, gallery=None, ks=(1, 5, 10)):
    """{k: share of the queries with a true image among the first k of their gallery}. similarity,
    positive, gallery [Q,G]; None: the gallery is all images."""
    rank = rank_of_first_positive(similarity, positive, gallery)
    return {k: float((rank < k).mean()) if len(rank) else 0.0 for k in ks}


# ---- models and processes


def build_model(config, classes, vocab=None):
    """The model of a stage from its configuration (train.Config, or the same as a namespace)."""
    if config.stage == "rice":
        vit = {"width": config.vit_width, "layers": config.vit_layers, "heads": config.vit_heads,
               "patch": config.vit_patch, "size": config.image_size, "dim": config.embedding}
        return rice.RICE(vit, vocab, config.text_length, config.n_neg, config.negatives,
                         config.losses.split(","), config.pfr_weight)
    sd = detect.SD(classes, config.queries, config.dim, config.heads, config.encoder_layers,
                   config.decoder_layers, config.ffn, config.backbone)
    return sd if config.stage == "sd" else detect.MD(sd, config.ttm_topk)


def with_namespaces(checkpoint):
    """A copy of a checkpoint, its configuration and its detector's as namespaces."""
    copy = checkpoint | {"config": Namespace(**checkpoint["config"])}
    if "detector" in checkpoint:
        copy["detector"] = with_namespaces(checkpoint["detector"])
    return copy


def load_checkpoint(path):
    """What train.py saved, configurations as namespaces; BadInput when it is something else."""
    require(Path(path).is_file(), f"{path}: no such checkpoint; train.py makes it")
    try:
        return with_namespaces(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:             # torch.load raises whatever the bytes lead to
        raise BadInput(f"{path}: not a checkpoint of train.py ({type(error).__name__})") from None


def load_model(checkpoint, device):
    """The model of a checkpoint, in evaluation mode."""
    config, vocab = checkpoint["config"], None
    if config.stage == "rice":
        vocab = data.Tokenizer(checkpoint["tokenizer"], config.text_length).vocab
    model = build_model(config, len(checkpoint["categories"]), vocab)
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


def fingerprint(checkpoint):
    """A short text that changes with any weight."""
    digest = hashlib.sha256()
    for value in checkpoint["model"].values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def pick_device():
    """cuda (by local rank), else mps, else cpu."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def start_processes():
    """Join the group of torchrun, if there is one -> rank, number of processes."""
    if "RANK" in os.environ and not dist.is_initialized():
        pick_device()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main_process():
    return start_processes()[0] == 0


def all_gather_object(value):
    """[value] of every process in order of rank."""
    values = [value] * start_processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def barrier():
    all_gather_object(None)


def check_split(split, stage):
    """BadInput when a split lacks what a stage is judged by."""
    where = f"{split.root}/annotations/{split.name}_"
    if stage == "rice":
        served = any(split.galleries.get(data.live_of(video_id)) for video_id in split.video_ids)
        require(served and any(split.positives.values()),
                f"{where}liveid_to_gallery_*.json with images for its lives and {where}"
                "videoid_to_gtimage_*.json are needed to rank them")
    else:
        require(any(map(len, split.gt_boxes.values())),
                f"{where}frameid2gtbox_*.json: no true boxes to judge by")


def print_notes(split):
    if is_main_process() and split.notes:
        print(*split.notes, sep="\n")


# ---- predicting boxes

METHODS = {"sd": "SD", "md_t1": "MD, T = 1", "md": "MD"}


def run_methods(model, frames, padding_mask, valid, with_t1):
    """{method: (logits [B,T,N,K], boxes_cxcywh [B,T,N,4])} of a batch: "sd", and of MD also "md"
    and, with_t1, "md_t1", the same MD that sees each frame as a clip of its own. What MD gains
    over that comes from the other frames; the rest from more layers and more training."""
    if isinstance(model, detect.SD):
        logits, boxes = model(frames.flatten(0, 1), padding_mask.flatten(0, 1))
        return {"sd": (logits[-1].unflatten(0, valid.shape), boxes[-1].unflatten(0, valid.shape))}
    queries, logits, boxes, *memory = model.run_sd(frames, padding_mask)
    answers = {"sd": (logits, boxes)}
    if with_t1:
        alone = [x.flatten(0, 1)[:, None] for x in (queries, logits, boxes)]      # [B*T,1,N,...]
        each_frame = torch.ones(valid.numel(), 1, dtype=torch.bool, device=valid.device)
        all_logits, all_boxes = model.run_ttm(*alone, *memory, each_frame)
        answers["md_t1"] = [last.unflatten(0, valid.shape)[:, :, 0]      # [B,T,k,...]
                            for last in (all_logits[-1], all_boxes[-1])]
    all_logits, all_boxes = model.run_ttm(queries, logits, boxes, *memory, valid)
    answers["md"] = all_logits[-1], all_boxes[-1]
    return answers


@torch.no_grad()
def boxes_of_batch(model, batch, device, bf16=False, with_t1=False):
    """Rows of a batch: clip, frame, and for each method x1 y1 x2 y2 score class. A frame that
    cannot be read has the score -1; its true boxes still count."""
    valid, padding_mask = batch["valid"].to(device), batch["padding_mask"].to(device)
    frames = data.normalize(batch["frames"].to(device), data.IMAGENET, padding_mask)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        answers = run_methods(model, frames, padding_mask, valid, with_t1)
    there = batch["frame_index"] >= 0
    fields = [("clip", "i4"), ("frame", "i4"), *((method, "f4", 6) for method in answers)]
    rows = np.zeros(int(there.sum()), fields)
    rows["clip"] = batch["clip"][:, None].expand(there.shape)[there]
    rows["frame"] = batch["frame_index"][there]
    for method, (logits, boxes) in answers.items():
        box, score, category = detect.select_top1(logits.float(), boxes.float())
        box = box_convert(box, "cxcywh", "xyxy").clamp(0, 1).cpu() * batch["size"].repeat(1, 1, 2)
        score = score.cpu().where(batch["valid"], -1)
        answer = torch.cat([box, score[..., None], category.cpu()[..., None]], -1)
        rows[method] = answer[there]
    return rows


def stamp_of_files(root, split_name):
    """A short text that changes with a split's annotation files and the entries of frames/."""
    names = ("training_", "skip.txt") if split_name == "train" else (f"{split_name}_",)
    root = Path(root)
    sources = [path for path in root.glob("annotations/*") if path.name.startswith(names)]
    sources.append(root / "frames")
    if sources[-1].is_dir():                       # glob would hold all entries in memory
        sources += [Path(entry) for entry in os.scandir(sources[-1]) if entry.is_dir()]
    changes = sorted((path.name, path.stat().st_mtime_ns) for path in sources if path.exists())
    return hashlib.sha256(repr((str(root.resolve()), changes)).encode()).hexdigest()[:16]


def predict_boxes(checkpoint, split, folder, device, every_frame=True, model=None):
    """A box for each frame of a split -> rows of boxes_of_batch in order of clip and frame, memory-
    mapped from FOLDER/boxes-*.npy, which serves again while the detector, the annotation files
    and the entries of frames/ stay the same. every_frame=False: `frames` even ones of each clip."""
    config = checkpoint["config"]
    files = stamp_of_files(split.root, split.name)
    lengths = hashlib.sha256(split.lengths.tobytes()).digest()
    key = (fingerprint(checkpoint), split.name, every_frame, files, lengths, config.short_side,
           config.long_side)
    key = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    if not os.access(folder, os.W_OK):
        folder = all_gather_object(tempfile.mkdtemp() if is_main_process() else None)[0]
        if is_main_process():
            print(f"{folder}: predicted boxes are written here, the run folder is read-only")
    path = Path(folder) / f"boxes-{split.name}-{key}.npy"
    if not all_gather_object(path.exists())[0]:
        model = model or load_model(checkpoint, device)
        parts = path.with_suffix("")
        _predict_parts(model, checkpoint, split, parts, device, every_frame)
        if is_main_process():
            _join_parts(parts, path)
        barrier()
    return np.load(path, mmap_mode="r")


def _predict_parts(model, checkpoint, split, folder, device, every_frame):
    """Predict this process's share of the parts, and wait for the others. A part is the rows of
    some clips, saved as FOLDER/<first clip>.npy; a part that a stopped run wrote is kept."""
    config = checkpoint["config"]
    rank, world = start_processes()
    dataset = data.FrameDataset(split, checkpoint["categories"], config.frames, config.short_side,
                                config.long_side, every_frame=every_frame)
    require(len(dataset), f"{split.root}: the clips of the {split.name} split have no frames")
    folder.mkdir(exist_ok=True)
    size = max(4, len(split) // 256)                                    # clips of a part
    names = [folder / f"{clip:09d}.npy" for clip in range(0, len(split), size)]
    mine = [name for name in names[rank::world] if not name.exists()]

    def batches_of(name):
        first = int(name.stem)
        items = range(*dataset.cumulative_items[[first, min(first + size, len(split))]])
        return data.evaluation_batches(items, max(1, 32 // config.frames))

    # A batch never depends on the number of processes: padding may change a box a little.
    batches = itertools.chain.from_iterable(map(batches_of, mine))
    loader = data.make_loader(dataset, batches, config.workers, device, data.collate_detection)
    batches = iter(loader)
    bf16 = config.precision == "bf16"
    for name in progress_bar(mine, f"detect {split.name}", is_main_process(), unit="part"):
        rows = [boxes_of_batch(model, next(batches), device, bf16, every_frame)
                for _ in batches_of(name)]
        with data.atomic_write(name) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate(rows) if rows else np.zeros(0))
    # Others may need hours more, too long for a collective. The joined file replaces the parts.
    while not (folder.with_suffix(".npy").exists() or all(map(Path.exists, names))):
        time.sleep(0.2)


def _join_parts(folder, path):
    parts = [np.load(name, mmap_mode="r") for name in sorted(folder.glob("*.npy"))]
    ends = np.cumsum(list(map(len, parts)))
    with data.atomic_write(path) as temporary:
        kind, shape = max(parts, key=len).dtype, (int(ends[-1]),)
        rows = np.lib.format.open_memmap(temporary, "w+", kind, shape)
        for part, end in zip(parts, ends):
            if len(part):                           # a clip may have no frames
                rows[end - len(part):end] = part[np.lexsort((part["frame"], part["clip"]))]
        rows.flush()
    shutil.rmtree(folder)


def boxes_by_clip(rows, method, clips):
    """Rows of predict_boxes as data.Boxes."""
    start = np.searchsorted(rows["clip"], np.arange(clips + 1))
    return data.Boxes(start, rows["frame"], rows[method])


# ---- Table 1

COLUMNS_1 = ["AP", "AP50", "AP75"]
for subset, values in data.SUBSETS.items():
    COLUMNS_1 += [f"{value} {subset}" for value in values]
PAPER_1 = [
    ("paper's SD (LPR4M)", 36.6, 46.6, 39.6, 27.5, 44.8, 69.0, 23.6, 45.8, 65.4, 20.7, 21.1, 39.8),
    ("paper's MD (LPR4M)", 37.0, 47.1, 40.2, 27.7, 45.1, 72.7, 24.8, 47.5, 65.7, 25.1, 21.2, 40.3)]


def table(header, rows, markdown=False):
    """Lines of a table: numbers with one decimal, (mean, deviation) as mean ± deviation, None and
    what a row lacks as a dash."""
    def text(cell):
        if isinstance(cell, tuple):
            return f"{cell[0]:.1f} ± {cell[1]:.1f}"
        return cell if isinstance(cell, str) else "-" if cell is None else f"{cell:.1f}"
    rows = [row + (None,) * (len(header) - len(row)) for row in rows]
    cells = [list(map(text, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    if not markdown:
        return "\n".join(map("  ".join, lines))
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ground_truth(rows, split, categories):
    """The true boxes of the frames in `rows`, for average_precision; image: number of the row. A
    category that training does not know is a class of its own, -1: not told."""
    class_of = {category: k for k, category in enumerate(categories)}
    images, classes, boxes = [], [], []
    last = -1                                   # the clip that is parsed now
    for row, (c, t) in enumerate(zip(rows["clip"].tolist(), rows["frame"].tolist())):
        if c != last:
            clip = split.clip(c)
            last = c
        for *box, category in clip.boxes[t].tolist() if clip.boxes else ():
            unknown = -1 if category < 0 else len(class_of) + int(category)
            classes.append(class_of.get(category, unknown))
            images.append(row)
            boxes.append(box)
    return {"image": np.array(images), "category": np.array(classes), "box_xyxy": np.array(boxes)}


def table_1(rows, split, categories):
    """Table 1 in percent -> {method: {"class-agnostic": {column: AP}, "per category": {...}}} of
    each method in `rows`, and counts."""
    truth = ground_truth(rows, split, categories)
    parts = {name: np.array([video_id in ids for video_id in split.video_ids])[rows["clip"]]
             for name, ids in split.subsets.items()}
    readable = np.flatnonzero(rows["sd"][:, 4] >= 0)
    results = {}
    for method in rows.dtype.names[2:]:                       # after clip and frame
        box = rows[method][readable]
        found = {"image": readable, "category": box[:, 5].astype(int), "box_xyxy": box[:, :4],
                 "score": box[:, 4]}
        one_class = (truth | {"category": 0 * truth["category"]},
                     found | {"category": 0 * found["category"]})
        results[method] = {"class-agnostic": table_1_row(*one_class, parts)}
        if (truth["category"] >= 0).all():
            results[method]["per category"] = table_1_row(truth, found, parts)
    unknown = int((truth["category"] >= len(categories)).sum())
    return results, {"clips": len(split), "frames": len(rows), "boxes": len(truth["image"]),
                     "missing": len(rows) - len(readable), "boxes of unknown categories": unknown}


def table_1_row(truth, detections, parts):
    """{column: AP in percent} from one matching; parts: {column: which frames are in it}."""
    tp = coco_match(truth, detections)
    ap = mean_precision(truth, detections, tp)
    columns = {"AP": 100 * ap["AP"], "AP50": 100 * ap["AP50"], "AP75": 100 * ap["AP75"]}
    for name, part in parts.items():
        t, d = part[truth["image"]], part[detections["image"]]
        columns[name] = None
        if t.any():
            ap = mean_precision(select_rows(truth, t), select_rows(detections, d), tp[:, d])
            columns[name] = 100 * ap["AP50"]
    return columns


# ---- Table 2

PAPER_2 = [("paper's RICE, SD boxes (LPR4M)", 30.6, 62.6, 73.5),
           ("paper's RICE, MD boxes (LPR4M)", 31.3, 63.2, 74.3)]
SOURCES = {"true": "true boxes", "md": "MD boxes", "sd": "SD boxes", "none": "whole frames"}
REMARKS = {
    "boxes of unknown categories": "{} true boxes have a category that training did not know; they "
                                   "cannot be found in the rows per category.",
    "no gallery": "{} clips have no gallery and count as misses.",
    "no true image": "{} clips have no true image in the gallery of their live and count as "
                     "misses; `python data.py check` names them.",
    "untitled": "In {} lives some images have no title. Titles are not used there: a title alone "
                "could give the true image away."}
SCORES = {"icl": "ICL", "pmd": "PMD", "fused": "ICL + PMD"}


def read_photo(photos, name):
    """A photo of {name: path}."""
    return data.read_picture(photos[name])


class Embedder:
    """A trained RICE with all it needs to embed clips and shop images."""

    def __init__(self, checkpoint, device, model=None):
        self.config, self.device = checkpoint["config"], device
        self.tokenizer = data.Tokenizer(checkpoint["tokenizer"], self.config.text_length)
        self.model = model or load_model(checkpoint, device)
        self.has_pmd = "pmd" in self.config.losses

    @torch.no_grad()
    def embed(self, dataset, items, encode):
        """Run `encode` on all batches of a data set -> each of its outputs, concatenated."""
        workers = self.config.workers if len(items) > 64 else 0
        rows = []
        batches = data.evaluation_batches(items, 64)
        for batch in data.make_loader(dataset, batches, workers, self.device):
            rows.append(encode({name: value.to(self.device) for name, value in batch.items()}))
        return [torch.cat(column) for column in zip(*rows)]

    def embed_images(self, read, titles, ids, tokens=True):
        """Shop images (arguments of data.GalleryDataset) -> embedding [G,D], tokens [G,1+P+1,C]
        (tokens=False: [G,0,C], for they take memory), valid [G]."""
        def encode(batch):
            pixels = data.normalize(batch["image"], data.CLIP)
            image, image_tokens, _ = self.model.encode_images(pixels, batch["title"])
            return image, image_tokens if tokens else image_tokens[:, :0], batch["valid"]
        titles = titles if self.config.text in ("title", "both") else {}
        dataset = data.GalleryDataset(read, titles, self.tokenizer, self.config.image_size, ids,
                                      self.config.crop)
        return self.embed(dataset, range(len(ids)), encode)

    def embed_photos(self, photos, titles, tokens=True):
        """Photos {name: path} -> names, embedding, tokens of those that can be read. Prints the
        others; BadInput when none can be read."""
        read = functools.partial(read_photo, photos)      # a lambda cannot go to a spawned process
        image, image_tokens, readable = self.embed_images(read, titles, list(photos), tokens)
        names = []
        for name, good in zip(photos, readable.tolist()):
            if good:
                names.append(name)
            else:
                print(f"{photos[name]}: left out, it is not a whole picture")
        require(names, f"none of the {len(photos)} photos is a whole picture")
        return names, image[readable], image_tokens[readable]

    def embed_clips(self, split, clips, boxes):
        """Clips of a split, seen through data.Boxes or (None) as whole frames -> embedding [Q,D],
        tokens [Q,R,C], padding_mask [Q,R], valid [Q]."""
        def encode(batch):
            pixels = data.normalize(batch["frames"], data.CLIP)
            clip, tokens, _, mask = self.model.encode_clips(pixels, batch["valid"], batch["asr"])
            return clip, tokens, mask, batch["valid"].any(1)
        dataset = data.ClipDataset(split, self.tokenizer, self.config.frames,
                                   self.config.image_size, boxes, text=self.config.text,
                                   crop=self.config.crop)
        return self.embed(dataset, clips, encode)

    @torch.no_grad()
    def similarity(self, clip, image, clip_tokens, image_tokens, padding_mask):
        """{"icl": [Q,G], "pmd": [Q,G], "fused": [Q,G]}, "icl" alone without the PMD. It scores the
        first `rerank` images of each clip by ICL; the others have -inf."""
        icl = self.model.scale() * clip @ image.T
        if not self.has_pmd:
            return {"icl": icl}
        pmd = torch.full_like(icl, -math.inf)
        best = icl.argsort(dim=1, descending=True, stable=True)[:, :self.config.rerank]
        for q in torch.arange(len(best), device=best.device).split(8):
            pairs = torch.arange(len(q), device=q.device).repeat_interleave(best.shape[1])
            score, _ = self.model.pmd(image_tokens[best[q].flatten()], clip_tokens[q],
                                      padding_mask[q], pairs[:, None])
            pmd[q] = pmd[q].scatter(1, best[q], score.view(len(q), -1))
        return {"icl": icl, "pmd": pmd, "fused": icl + pmd}


def rank_live(embedder, split, live, clips, sources):
    """The clips of a live against its gallery -> {"clips", "ids" of the gallery, "positive" [Q,G],
    "similarity": {source: {score: [Q,G]}}, and counts}."""
    ids = list(dict.fromkeys(split.galleries[live]))
    titles = split.titles if set(ids) <= split.titles.keys() else {}
    untitled = not titles and bool(split.titles)
    image, image_tokens, readable = embedder.embed_images(split.image, titles, ids)
    positive = np.array([np.isin(ids, split.positives.get(split.video_ids[q], [])) for q in clips])
    ranked = {"clips": clips, "ids": ids, "positive": positive, "similarity": {}, "missing": 0,
              "missing images": int((~readable).sum()), "untitled": untitled}
    for source, boxes in sources.items():
        clip, tokens, padding_mask, valid = embedder.embed_clips(split, clips, boxes)
        scores = embedder.similarity(clip, image, tokens, image_tokens, padding_mask)
        # What cannot be read never helps: such an image is ahead of the true one, and such a
        # clip or true image has no prediction.
        blind = ~valid.cpu().numpy()[:, None] | (positive & ~readable.cpu().numpy())
        for name, score in scores.items():
            score = score.masked_fill(~readable, math.inf).cpu().numpy()
            scores[name] = np.where(blind, np.nan, score)
        ranked["similarity"][source] = scores
        ranked["missing"] = max(ranked["missing"], int((~valid).sum()))
    return ranked


def box_sources(checkpoint, split, folder, device):
    """What RICE can be evaluated through -> {"true", "md", "sd": data.Boxes}, or {"none": None}."""
    if checkpoint["config"].box_source == "none":
        return {"none": None}
    sources = {"true": data.true_boxes(split)} if split.gt_boxes else {}
    if "detector" in checkpoint:
        rows = predict_boxes(checkpoint["detector"], split, folder, device)
        for method in ("md", "sd"):
            if method in rows.dtype.names:
                sources[method] = boxes_by_clip(rows, method, len(split))
    require(checkpoint["config"].box_source in sources,
            f"{split.root}: has no true boxes, which this RICE was trained on")
    return sources


def table_2(checkpoint, split, folder, device, model=None, own_source=False):
    """Table 2 in percent through each source of boxes (own_source: that of the training alone) ->
    {source: {score: {"R1": ...}}}, counts, and {live: what rank_live gave}."""
    clips_of = {}
    for q, video_id in enumerate(split.video_ids):
        clips_of.setdefault(data.live_of(video_id), []).append(q)
    served = [live for live in clips_of if split.galleries.get(live)]
    embedder = Embedder(checkpoint, device, model)
    own = checkpoint["config"].box_source
    sources = box_sources(checkpoint, split, folder, device)
    if own_source:
        sources = {own: sources[own]}
    rank, world = start_processes()
    ranked, results = {}, {}
    for live in progress_bar(served[rank::world], "rank lives", is_main_process()):
        ranked[live] = rank_live(embedder, split, live, clips_of[live], sources)
    for part in all_gather_object(ranked):
        ranked |= part
    scores = list(SCORES) if embedder.has_pmd else ["icl"]
    for source, score in itertools.product(sources, scores):
        results.setdefault(source, {})[score] = table_2_row(ranked, split, source, score)
    counts = {"clips": len(split), "lives": len(clips_of), "source": own} | count_all(ranked)
    counts["no gallery"] = len(split) - counts.pop("ranked")
    return results, counts, ranked


def table_2_row(ranked, split, source, score):
    """{column: rank-k in percent}; a clip whose live has no gallery is a miss."""
    rank = np.full(len(split), np.iinfo(np.int64).max)
    for live in ranked.values():
        similarity = live["similarity"][source][score]
        rank[live["clips"]] = rank_of_first_positive(similarity, live["positive"])
    columns = {f"R{k}": 100 * float((rank < k).mean()) for k in (1, 5, 10)}
    for case, ids in split.cases.items():
        part = rank[np.isin(split.video_ids, list(ids))]
        columns[f"R1 {case}"] = 100 * float((part < 1).mean()) if len(part) else None
    return columns


def count_all(ranked):
    """Clips that were ranked, what was missing in all lives, the mean size of a gallery, and R1 in
    percent by chance, for one true image a clip and the mean live."""
    sizes, added_up = [], ("missing", "missing images", "untitled")
    counts = dict.fromkeys(("ranked", "no true image", *added_up), 0)
    for live in ranked.values():
        sizes.append(len(live["ids"]))
        counts["ranked"] += len(live["clips"])
        counts["no true image"] += int((~live["positive"].any(1)).sum())
        for name in added_up:
            counts[name] += live[name]
    chance = 100 * float(np.mean(1 / np.array(sizes)))
    return counts | {"gallery": float(np.mean(sizes)), "chance": chance}


def show(result, markdown=False):
    """Print Table 1 or 2 beside the paper's rows, and remarks on what was missing."""
    print(show_table_2(result, markdown) if result["stage"] == "rice" else
          show_table_1(result, markdown))
    for name, text in REMARKS.items():
        if result["counts"].get(name):
            print(text.format(result["counts"][name]))


def show_table_1(result, markdown):
    """Title and lines of Table 1."""
    rows = []
    for method, kinds in result["results"].items():
        for kind, columns in kinds.items():
            rows.append((f"{METHODS[method]}, {kind}", *columns.values()))
    title = ("Table 1, one box a frame, seed {seed} ({clips} clips, {frames} frames, {boxes} "
             "boxes, missing={missing}); AP50 from the fourth column on")
    title = title.format(**result["counts"], seed=result["config"]["seed"])
    return f"\n{title}\n\n{table(('', *COLUMNS_1), rows + PAPER_1, markdown)}"


def show_table_2(result, markdown):
    """Title and lines of Table 2."""
    names = SCORES | {"pmd": f"PMD on the first {result['config']['rerank']}"}
    columns, rows = [], []
    for source, scores in result["results"].items():
        for score, values in scores.items():
            columns = list(values)
            rows.append((f"{SOURCES[source]}, {names[score]}", *values.values()))
    rows += [("chance of R1", result["counts"]["chance"]), *PAPER_2]
    title = ("Table 2, rank-k in the gallery of each live, seed {seed} ({clips} clips, {lives} "
             "lives, {gallery:.1f} images a gallery, missing={missing}, missing images="
             "{missing images})")
    title = title.format(**result["counts"], seed=result["config"]["seed"])
    return f"\n{title}\n\n{table(('', *columns), rows, markdown)}"


# ---- one checkpoint, several


@dataclass
class Predictions:
    """What a checkpoint said of the clips of a split. Pictures are drawn from it, and scripts in
    tests/ judge it in other ways."""
    stage: str
    split: data.LPRSplit
    categories: dict            # {category id: name} of the training
    boxes: np.ndarray = None    # rows of predict_boxes; None for RICE
    rankings: dict = None       # {live: what rank_live gave}; None for a detector
    source: str = None          # the boxes that RICE was trained on


def evaluate(path, data_dir=None, split_name="test", out=None, workers=None, rerank=None):
    """Evaluate a checkpoint -> every number as plain values, and Predictions."""
    start_processes()
    device = pick_device()
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    folder = Path(out or Path(path).parent)
    if workers is not None:
        config.workers = workers
        if "detector" in checkpoint:
            checkpoint["detector"]["config"].workers = workers
    config.rerank = rerank or config.rerank
    folder.mkdir(parents=True, exist_ok=True)
    split = data.LPRSplit(data_dir or config.data, "train" if config.overfit else split_name)
    if config.overfit:                    # evaluated on the clips that it was trained on
        split.subset(config.overfit)
    print_notes(split)
    check_split(split, config.stage)
    predicted = Predictions(config.stage, split, checkpoint["categories"])
    if config.stage == "rice":
        results, counts, predicted.rankings = table_2(checkpoint, split, folder, device)
        predicted.source = counts["source"]
    else:
        predicted.boxes = predict_boxes(checkpoint, split, folder, device)
        results, counts = table_1(predicted.boxes, split, checkpoint["categories"])
    result = {"stage": config.stage, "data": str(split.root), "split": split.name,
              "step": checkpoint["step"], "counts": counts, "results": results,
              "config": vars(config), "versions": checkpoint["versions"],
              "files": stamp_of_files(split.root, split.name),
              "left out of training": checkpoint["left_out"]}
    return result, predicted


def validation_metric(model, checkpoint, folder, device):
    """{"R1": by ICL} or {"AP50": class-agnostic} in percent on the val lives."""
    checkpoint = with_namespaces(checkpoint)
    config = checkpoint["config"]
    split = data.LPRSplit(config.data, "val")
    if config.stage == "rice":
        results, _, _ = table_2(checkpoint, split, folder, device, model, own_source=True)
        return {"R1": results[config.box_source]["icl"]["R1"]}
    rows = predict_boxes(checkpoint, split, folder, device, False, model)
    results, _ = table_1(rows, split, checkpoint["categories"])
    barrier()                                # all processes have read them
    if is_main_process():
        Path(rows.filename).unlink()         # they are of this step alone
    return {"AP50": results[config.stage]["class-agnostic"]["AP50"]}


# Checkpoints that differ in nothing but these are seeds of one configuration.
NO_CONFIGURATION = ("seed", "out", "data", "detector_dir", "workers", "save_every", "log_every",
                    "eval_every")


def named_rows(result, every_source):
    """[(name, {column: value}), ...]: the methods of a detector, or the scores of RICE through each
    source of boxes, or through that of the training alone."""
    if result["stage"] != "rice":
        return [(METHODS[m], kinds["class-agnostic"]) for m, kinds in result["results"].items()]
    rows = []
    for source, scores in result["results"].items():
        if every_source or source == result["counts"]["source"]:
            for score, columns in scores.items():
                rows.append((f"{SOURCES[source]}, {SCORES[score]}", columns))
    return rows


def show_seeds(results, markdown=False):
    """Rows of each configuration: mean and deviation over its seeds."""
    differing = []
    for name in results[0]["config"]:
        values = [result["config"].get(name) for result in results]
        if name not in NO_CONFIGURATION and any(value != values[0] for value in values):
            differing.append(name)
    groups = {}                                  # {name of a row: [its values by each seed]}
    for result in results:
        fields = [f"{name}={result['config'].get(name)}" for name in differing]
        for name, columns in named_rows(result, every_source=not differing):
            groups.setdefault(" ".join([*fields, name]), []).append(columns.values())
    header = "", "seeds", *columns
    rows = []
    for name, seeds in groups.items():
        rows.append((name, str(len(seeds))))
        for values in zip(*seeds):
            cell = None if None in values else float(np.mean(values))
            if len(seeds) > 1 and cell is not None:
                cell = cell, float(np.std(values, ddof=1))
            rows[-1] += (cell,)
    print(f"\n{results[0]['stage']}: {len(results)} checkpoints, mean ± standard deviation over "
          "seeds\n")
    print(table(header, rows, markdown))


# ---- near-duplicates


def duplicates(checkpoint, folder, threshold, out="runs"):
    """Groups of the pictures below a folder, [[name, ...], ...], whose cosine by RICE exceeds the
    threshold (supplement, 5): printed, and written to OUT/duplicates.txt as picture<TAB>picture
    that it repeats."""
    require(checkpoint["config"].stage == "rice", "--duplicates: expected a --ckpt of --stage rice")
    embedder = Embedder(checkpoint, pick_device())
    names, feature, _ = embedder.embed_photos(photos_of(folder), {}, tokens=False)
    first = np.arange(len(names))                # the first picture of each one's group
    for start in progress_bar(range(0, len(names), 1024), "compare"):
        alike = feature[start:start + 1024] @ feature.T > threshold                  # [1024,G]
        for i, j in alike.nonzero().tolist():
            one, other = sorted((first[start + i], first[j]))
            first[first == other] = one
    groups = {}
    for name, group in zip(names, first.tolist()):
        groups.setdefault(group, []).append(name)
    groups = [group for group in groups.values() if len(group) > 1]
    lines = [f"{name}\t{group[0]}\n" for group in groups for name in group[1:]]
    file = Path(out) / "duplicates.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(file, "".join(lines))
    for group in groups[:20]:
        print("  ".join(group[:8]))
    print(f"{folder}: {len(names)} images, {len(groups)} groups, {len(lines)} to drop: {file}")
    return groups


# ---- pictures

COLOURS = {"sd": "orange", "md": "dodgerblue", "true": "white"}
SIDE = 184                  # pixels of a picture on a sheet
# Pillow's own font has ASCII alone. The first two have Europe's letters, the others Chinese.
FONTS = ("DejaVuSans.ttf", "arial.ttf",
         "wqy-zenhei.ttc", "msyh.ttc", "PingFang.ttc", "NotoSansCJK-Regular.ttc")


def tile(read, text="", border="white"):
    """What read() gives, uint8 [3,H,W], or grey, with a border and a caption."""
    try:
        picture = to_pil_image(read())
    except BadInput:
        picture = Image.new("RGB", (96, 96), "gray")
    picture = ImageOps.pad(picture, (SIDE, SIDE), color="white")
    cell = Image.new("RGB", (SIDE + 8, SIDE + 68), "white")
    font = ImageFont.load_default(15)
    cell.paste(ImageOps.expand(picture, 4, border))
    for name in () if text.isascii() else FONTS:               # the last that is there counts
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, 15)
    is_wide = any(letter > "\u2e80" for letter in text)          # Chinese, Japanese, Korean
    lines = textwrap.wrap(text, 12 if is_wide else 22, max_lines=3)
    ImageDraw.Draw(cell).multiline_text((4, SIDE + 8), "\n".join(lines), "black", font)
    return cell


def save_sheet(rows, path):
    """Rows of pictures of one size as one PNG -> its path."""
    longest = max(rows, key=len)
    width, height = longest[0].size
    sheet = Image.new("RGB", (width * len(longest), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            sheet.paste(cell, (x * width, y * height))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def detection_row(predicted, c):
    """Frames of clip c with the boxes of SD (orange), MD (blue) and the true ones (white)."""
    clip = predicted.split.clip(c)
    rows = predicted.boxes[predicted.boxes["clip"] == c]
    last = rows.dtype.names[-1]                  # MD, or SD where there is no MD
    names = list(predicted.categories.values())
    cells = []
    for row in rows[data.even_frames(len(rows), 8)]:
        *_, score, k = row[last]
        cells.append(tile(lambda: frame_with_boxes(predicted.split, clip, row),
                          f"{names[int(k)]} {score:.2f}"))
    return cells


def frame_with_boxes(split, clip, row):
    """The frame of a row of predict_boxes, 288 pixels high or wide, with its boxes and the true
    ones: uint8 [3,H,W]."""
    t = row["frame"]
    image, size = split.frame(clip.frame_ids[t])
    image = resize(image, [288])
    stretch = np.tile(np.array(image.shape[:0:-1]) / size, 2)
    boxes = [(method, row[method]) for method in ("sd", "md") if method in row.dtype.names]
    boxes += [("true", box) for box in (clip.boxes[t] if clip.boxes else ())]
    for name, box in boxes:
        box = torch.tensor(box[None, :4] * stretch)
        image = draw_bounding_boxes(image, box, colors=COLOURS[name], width=4)
    return image


def ranking_row(split, clip, text, shop, read):
    """Three frames of a clip, and shop images [(id, caption, colour of the border), ...]."""
    cells = []
    for t in data.even_frames(len(clip.frame_ids), 3):
        cells.append(tile(lambda: split.frame(clip.frame_ids[t])[0], "" if cells else text))
    return cells + [tile(lambda: read(name), *more) for name, *more in shop]


def first_images(predicted, c):
    """The first five shop images of clip c as ranking_row takes them, with their places; true ones
    are green, others red. When none is true, the first true one takes the fifth's cell. []
    without a gallery."""
    live = predicted.rankings.get(data.live_of(predicted.split.video_ids[c]))
    if not live:
        return []
    q = live["clips"].index(c)
    score = last_score(live, predicted.source)[q]
    true = live["positive"][q]
    order = np.argsort(-score, kind="stable")                           # nan comes last
    places = list(range(min(5, len(order))))
    if true.any() and not true[order[places]].any():
        places[-1] = int(true[order].argmax())
    shop = []
    for place in places:
        g = order[place]
        image_id = live["ids"][g]
        text = f"{place + 1}: {score[g]:.1f} {predicted.split.titles.get(image_id, '')}"
        shop.append((image_id, text, "green" if true[g] else "red"))
    return shop


def last_score(live, source):
    """[Q,G] of what rank_live gave: ICL + PMD, or ICL of a model without the PMD."""
    return list(live["similarity"][source].values())[-1]


def draw_clips(predicted, clips, path):
    """A sheet with a row for each clip -> its path."""
    rows = []
    for c in map(int, clips):
        if predicted.stage == "rice":
            clip = predicted.split.clip(c)
            shop = first_images(predicted, c)
            rows.append(ranking_row(predicted.split, clip, clip.asr, shop, predicted.split.image))
        else:
            rows.append(detection_row(predicted, c))
    return save_sheet(rows, path)


def draw_examples(predicted, folder):
    """Five clips, evenly spread -> the path of the sheet."""
    name = "ranking" if predicted.stage == "rice" else "detections"
    return draw_clips(predicted, data.even_frames(len(predicted.split), 5), f"{folder}/{name}.png")


def errors_of(predicted):
    """How wrong a model is on each clip [Q]: rank of the first true image, or true boxes missed."""
    if predicted.stage == "rice":
        wrong = np.full(len(predicted.split), 1000)                 # without a gallery
        for live in predicted.rankings.values():
            rank = rank_of_first_positive(last_score(live, predicted.source), live["positive"])
            wrong[live["clips"]] = rank.clip(max=1000)
        return wrong
    rows = predicted.boxes
    wrong = np.zeros(len(predicted.split), int)
    truth = ground_truth(rows, predicted.split, predicted.categories)
    box = rows[rows.dtype.names[-1]][truth["image"], :4]
    missed = box_iou_rows(box, truth["box_xyxy"]) < 0.5
    np.add.at(wrong, rows["clip"][truth["image"]], missed)
    return wrong


def draw_curves(log, path):
    """The log of a run as curves over steps -> path, None when there is no log."""
    if not Path(log).exists():
        return None
    lines = [json.loads(line) for line in open(log)]
    panels = []
    for name in sorted(set().union(*lines) - {"step", "lr"}):
        points = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = np.array(points, float).T
        low, high = values.min(), values.max()
        x = 50 + 240 * steps / steps.max()
        y = 170 - 140 * (values - low) / max(high - low, 1e-9)
        panels.append(Image.new("RGB", (300, 200), "white"))
        draw = ImageDraw.Draw(panels[-1])
        draw.rectangle([50, 30, 290, 170], outline="lightgray")
        draw.line(np.stack([x, y], 1).ravel().tolist(), "dodgerblue", 2)
        unit = " in percent" if name in ("AP50", "R1") else ""
        draw.text((50, 10), f"{name}{unit}: {values[-1]:.3g} at the end", "black")
        for tick in (0, 0.5, 1):
            y_text, x_text = f"{low + tick * (high - low):.3g}", f"{tick * steps.max():.0f}"
            draw.text((46, 170 - 140 * tick), y_text, "black", anchor="rm")
            draw.text((50 + 240 * tick, 176), x_text, "black", anchor="ma")
        draw.text((110, 176), "steps", "gray", anchor="ma")
    return save_sheet([panels[n:n + 4] for n in range(0, len(panels), 4)], path)


# ---- recognising a live


class Window:
    """A few frames of a recording as a split of one clip. It has what FrameDataset and ClipDataset
    ask of an LPRSplit: root, lengths, len, clip and frame."""
    root = "the recording"

    def __init__(self, frames, asr):
        self.frames = frames
        self.asr = asr
        self.lengths = np.array([len(frames)])

    def __len__(self):
        return 1

    def clip(self, _):
        frame_ids = list(range(len(self.frames)))
        return data.Clip("live", frame_ids, boxes=None, image_ids=[], title="", asr=self.asr)

    def frame(self, t):
        require(self.frames[t] is not None, f"{self.root}: a frame that cannot be read")
        _, height, width = self.frames[t].shape
        return self.frames[t], (width, height)


def by_number(paths):
    """Paths in order, numbers in their names in order of value."""
    return sorted(paths, key=lambda path: re.sub(r"\d+", lambda n: n[0].zfill(20), path.as_posix()))


def picture_paths(folder):
    """The pictures below a folder, numbers in names in order of value. Prints what is left out."""
    require(Path(folder).is_dir(), f"{folder}: no such file or folder")
    good = []
    left_out = data.Tally()
    for path in filter(Path.is_file, Path(folder).rglob("*")):
        try:
            data.check_picture(path)
            good.append(path)
        except BadInput as error:
            left_out.add(str(error).removeprefix(f"{path}: "), path.name)
    for reason, count in left_out.items():
        print(f"{folder}: {count} of {len(good) + left_out.total()} files left out, first "
              f"{left_out.first[reason]}: {reason}")
    require(good, f"{folder}: no picture that can be read (JPEG, PNG or WebP)")
    return by_number(good)


def photos_of(folder):
    """{name: path} of the pictures below a folder; the name is the path from there."""
    return {path.relative_to(folder).as_posix(): path for path in picture_paths(folder)}


def tab_rows(path, key, kind):
    """[(key, text)] of a file of rows key<TAB>text; key: a regular expression, kind: its name."""
    rows = []
    for number, line in enumerate(data.read_text(path).split("\n") if path else [], 1):
        row = re.fullmatch(rf"\s*({key})\s*\t(.*)", line)
        require(row or not line.strip(), f"{path}: row {number}: expected {kind}, a tab, the text")
        if row:
            rows.append((row[1], row[2].strip()))
    return rows


def live_frames(source, every):
    """A frame every `every` seconds of a video, or of a folder with a picture a second (None: it
    cannot be read)."""
    if Path(source).is_file():
        yield from data.video_frames(source, every)
        return
    good = picture_paths(source)
    named = [path for path in Path(source).rglob("*") if path.suffix in data.ENDINGS]
    paths = by_number({*good, *named})          # one that cannot be read takes a second as well
    for n in np.arange(0, len(paths), every).astype(int):
        try:
            yield data.read_picture(paths[n])
        except BadInput as error:
            print(error)
            yield None


class LiveRanker:
    """A trained RICE and the detector in its checkpoint, which rank the photos of a shop {name:
    path} for a Window."""

    def __init__(self, checkpoint, photos, titles):
        checkpoint["config"].workers = 0    # a window is too little work for loader processes
        self.embedder = Embedder(checkpoint, pick_device())
        self.detector = checkpoint.get("detector")
        if self.detector:
            self.model = load_model(self.detector, self.embedder.device)
        self.names, self.image, self.image_tokens = self.embedder.embed_photos(photos, titles)

    def detect(self, window):
        """A box a frame as data.Boxes, None for a RICE that sees whole frames."""
        if self.detector is None:
            return None
        config = self.detector["config"]
        dataset = data.FrameDataset(window, self.detector["categories"], len(window.frames),
                                    config.short_side, config.long_side)
        batch = data.collate_detection([dataset[0, 0]])
        rows = boxes_of_batch(self.model, batch, self.embedder.device)
        return boxes_by_clip(rows, rows.dtype.names[-1], 1)

    def rank(self, window, boxes):
        """[(photo, score), ...] of those that the PMD has scored, the best first; [] when no frame
        can be read."""
        clip, tokens, padding_mask, valid = self.embedder.embed_clips(window, [0], boxes)
        if not valid.item():
            return []
        scores = self.embedder.similarity(clip, self.image, tokens, self.image_tokens, padding_mask)
        pairs = zip(self.names, list(scores.values())[-1][0].tolist())
        return sorted((p for p in pairs if p[1] > -math.inf), key=lambda pair: -pair[1])


def read_shop(args):
    """The photos of --shop {name: path}, and {name: title} by --titles, "" where there is none."""
    photos = photos_of(args.shop)
    told = dict(tab_rows(args.titles, ".*?", "a photo"))
    titles = {name: told.get(name, told.get(Path(name).stem, "")) for name in photos}
    if args.titles:
        count = sum(map(bool, titles.values()))
        print(f"{args.titles}: {count} of {len(photos)} photos have a title")
    return photos, titles


def answers_of(ranker, args, said):
    """Each window of --live with its answer: {"start", "end" in seconds, "asr", "boxes" [x1, y1,
    x2, y2, score] of its frames, "top": [(photo, score), ...]}."""
    stream = live_frames(args.live, args.every)
    start = 0.0
    while frames := list(itertools.islice(stream, args.window)):
        end = start + len(frames) * args.every
        texts = [text for second, text in said if start <= float(second) < end]
        window = Window(frames, " ".join(texts))
        boxes = ranker.detect(window)
        top = ranker.rank(window, boxes)[:args.top]
        answer = {"start": start, "end": end, "asr": window.asr, "boxes": None, "top": top}
        if boxes:
            answer["boxes"] = boxes.box[:, :5].astype(float).round(2).tolist()
        yield window, answer
        start = end


def recognise(path, args):
    """Which product of a shop is on sale when (supplement, 5, 4): each window is ranked against the
    photos. Prints a line a window, writes OUT/answers.jsonl and OUT/answers.png."""
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    out = Path(args.out or "runs/live")
    require(min(args.every, args.window, args.top) > 0,
            "--every, --window, --top: expected more than 0")
    require(config.stage == "rice" and config.box_source != "true" and args.shop,
            "--live needs --shop FOLDER and a --ckpt of --stage rice; not one trained with "
            "--box-source true, for a live has no true boxes")
    said = tab_rows(args.asr, r"\d+\.?\d*", "seconds")
    photos, titles = read_shop(args)
    ranker = LiveRanker(checkpoint, photos, titles)
    print(f"an answer is of {args.window} frames, {args.every * args.window:g} seconds (--every, "
          "--window), with its score: the higher, the surer")
    answers = answers_of(ranker, args, said)
    first = next(answers, None)                 # before the file is opened
    require(first, f"--live {args.live}: no frame in it")
    out.mkdir(parents=True, exist_ok=True)
    sheet = {}                                  # {product: its row, at its first answer}
    with open(out / "answers.jsonl", "w", encoding="utf-8") as file:
        for window, answer in itertools.chain([first], answers):
            print(json.dumps(answer, ensure_ascii=False), file=file, flush=True)
            start, end, top = answer["start"], answer["end"], answer["top"]
            clock = [str(datetime.timedelta(seconds=int(second))) for second in (start, end)]
            best, score = top[0] if top else ("no frame can be read", math.nan)
            print(f"{' - '.join(clock)}  {score:6.2f}  {best}  {titles.get(best, '')}", flush=True)
            if best not in sheet:
                shop = [(name, f"{value:.1f} {titles[name] or name}", "gray")
                        for name, value in top]
                sheet[best] = ranking_row(window, window.clip(0), f"{clock[0]} {window.asr}", shop,
                                          functools.partial(read_photo, photos))
    if said:
        heard = sum(float(second) < end for second, _ in said)
        print(f"{args.asr}: {heard} of {len(said)} rows were said in this live")
    save_sheet(list(sheet.values()), out / "answers.png")
    print(f"answers: {out}/answers.jsonl, picture: {out}/answers.png")


# ---- the command


def finished_checkpoints(folder):
    """The finished checkpoints of a run folder, "" for the newest below runs/."""
    finished = []
    if not folder:
        newest = max(Path("runs").glob("*/*.pt"), key=os.path.getmtime, default=Path("runs/none"))
        folder = newest.parent
    for stage in STAGES:
        path = Path(folder) / f"{stage}.pt"
        checkpoint = load_checkpoint(path) if path.exists() else None
        if checkpoint and checkpoint["step"] == checkpoint["config"].steps:
            finished.append(str(path))
    require(finished, f"--ckpt: no finished checkpoint in {folder}/; `python train.py` makes one")
    return finished


def run(args):
    paths = []
    for given in args.ckpt or [""]:
        if not given or Path(given).is_dir():
            paths += finished_checkpoints(given)
        else:
            paths += sorted(glob.glob(given)) or [given]
    if args.live:
        return recognise(paths[-1], args)
    require(args.rerank is None or args.rerank >= 10,
            f"--rerank {args.rerank}: expected 10 or more, for R10")
    if args.duplicates is not None:
        checkpoint = load_checkpoint(paths[-1])
        folder = args.shop or f"{args.data or checkpoint['config'].data}/images"
        return duplicates(checkpoint, folder, args.duplicates, args.out or "runs")
    settings = args.data, args.split, args.out, args.workers, args.rerank
    results, predictions = zip(*[evaluate(path, *settings) for path in paths])
    other = evaluate(args.compare, *settings)[1] if args.compare else None
    require(not other or (other.stage == "rice") == (predictions[-1].stage == "rice"),
            f"--compare {args.compare}: expected the stage of {paths[-1]}")
    if not is_main_process():
        return
    for stage in STAGES:
        of_stage = [result for result in results if result["stage"] == stage]
        if len(of_stage) > 1:
            show_seeds(of_stage, args.markdown)
        elif of_stage:
            show(of_stage[0], args.markdown)
    if args.json:
        several = list(results) if len(results) > 1 else results[0]
        data.write_text(args.json, json.dumps(several, indent=1))
    if args.pictures:
        draw_worst(predictions[-1], other, Path(paths[-1]).with_suffix(".jsonl"), args)


def draw_worst(predicted, other, log, args):
    """The clips that a model gets most wrong, with --compare those where the other model is worse,
    and the curves of its training."""
    start = f"{args.pictures}/{predicted.stage}"
    wrong = errors_of(predicted)
    if other:
        wrong = errors_of(other) - wrong
    worst = np.argsort(-wrong, kind="stable")[:args.n]
    drawn = [draw_clips(predicted, worst, f"{start}-worst.png")]
    if other:
        drawn.append(draw_clips(other, worst, f"{start}-compared.png"))
    print("pictures:", *drawn, draw_curves(log, f"{start}-curves.png") or "")


def main(argv=None):
    parser = data.Parser(usage="eval.py [--FLAG VALUE ...]", description=(
        "Evaluate checkpoints of train.py: Table 1 for a detector, Table 2 for RICE."))
    add = parser.add_argument_group("tables").add_argument
    add("--ckpt", nargs="*", default=[], metavar="X", help="checkpoints or run folders; means over "
        "seeds [newest run]")
    add("--data", metavar="DIR", help="data folder in the LPR4M layout [that of the training]")
    add("--split", default="test", choices=["test", "val"], help="which lives [test]")
    add("--out", metavar="DIR", help="folder of boxes and answers [the run's; runs/live]")
    add("--markdown", action="store_true", help="print tables as Markdown")
    add("--json", metavar="FILE", help="write every number to this file")
    add("--rerank", type=int, metavar="N", help="first images that the PMD scores [as trained]")
    add("--workers", type=int, metavar="N", help="loader processes [as trained]")
    add = parser.add_argument_group("pictures").add_argument
    add("--pictures", metavar="DIR", help="draw the clips it gets most wrong, and training curves")
    add("--n", type=int, default=20, metavar="N", help="clips on a sheet [20]")
    add("--compare", metavar="FILE", help="draw where this checkpoint is worse instead")
    add = parser.add_argument_group("a list of images that repeat each other").add_argument
    add("--duplicates", type=float, metavar="C", help="a higher cosine than this, such as 0.9, in "
        "--shop or --data")
    add = parser.add_argument_group("a live, instead of tables").add_argument
    add("--live", metavar="PATH", help="a video, or a folder with a frame a second")
    add("--shop", metavar="DIR", help="a folder of photos that it is ranked against")
    add("--titles", metavar="FILE", help="their titles, rows of photo<TAB>title")
    add("--asr", metavar="FILE", help="what is said, rows of seconds<TAB>text")
    add("--every", type=float, default=10, metavar="S", help="seconds between frames [10]")
    add("--window", type=int, default=10, metavar="N", help="frames of an answer [10]")
    add("--top", type=int, default=5, metavar="N", help="photos named in an answer [5]")
    args = parser.parse_args(argv)
    try:
        data.run_command(run, args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
