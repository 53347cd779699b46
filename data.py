"""Livestreams: the LPR4M layout on disk, samples and batches, and a renderer that writes the same layout.

    python data.py render runs/livestreams                the quickstart's data (half a minute on two cores)
    python data.py render DIR --seed 1 --lives 200 --categories 34 --size 160
    python data.py check DIR                              what is in a folder and what is wrong with it, by file and row
    python data.py link DOWNLOAD DIR                      img2dataset's output -> frames/ and images/
    python data.py movingfashion SOURCE DIR               MovingFashion -> this layout (needs the program ffmpeg)
    python data.py dedup DIR --ckpt runs/tiny/rice.pt     near-duplicate shop images

    DIR/annotations/training_videoinfo_*.txt       a clip a row, 11 columns by tab: video_id, frame_id list, box list,
                                          image_id, title, category id, category name, ASR, scale, duration, number
    DIR/annotations/SPLIT_videoid_asr_*.txt        video_id, ASR                                SPLIT is test or val
    DIR/annotations/SPLIT_image_title_*.txt        image_id, title
    DIR/annotations/SPLIT_videoid_to_gtimage_*.json    {video_id: [image_id, ...]}
    DIR/annotations/SPLIT_frameid2gtbox_*.json         {frame_id: [[x1, y1, x2, y2(, category)], ...]} pixels
    DIR/annotations/SPLIT_liveid_to_gallery_*.json     {live_id: [image_id, ...]}
    DIR/annotations/SPLIT_{scale,duration,number}_{value}.txt    the video ids of a split of Table 1, one a row
    DIR/annotations/SPLIT_frameid2kind_*.json          {frame_id: kind}, only in rendered data
    DIR/annotations/SPLIT_case_{two-in-view,near-identical}.txt    video ids, only in rendered data
    DIR/frames/FRAME_ID.jpg    DIR/images/IMAGE_ID.jpg     (or .png; or one level down, in FRAME_ID[:2]/)
    DIR/frames/FRAME_ID.json   img2dataset's side file: original_width, original_height of a frame stored smaller

    video_id = live_id-start_ms-end_ms,  frame_id = video_id-index.  A live id may hold hyphens itself.

Data flow:  rows of text -> Lives -> Clip: ids, boxes [M,5] of each frame, texts
    -> DetectionSet: T x [3,h,w], T x [M,4] -> collate_detection: frames [B,T,3,H,W], boxes_cxcywh [B,T,M,4] -> SD, MD
    -> PairSet: frames [T,3,S,S], image [3,S,S], asr, title [N] -> stacked, [B,...]                          -> RICE
    Batches come in an order that is a function of (seed, step) alone (step_batches), made by processes (load).

Items:  asked for by (epoch, i), augmented as a function of (seed, epoch, i) alone; a dict of `clip`, the clip's number
        in the split (not in ImageSet's), `bad`, what could not be read ("": nothing), and what the set's docstring
        lists. A training item of which anything cannot be read is empty; in evaluation only the frame is missing.

Letters: B batch, T frames, M boxes of a frame, F boxes of a split, h w pixels of a picture, H W of a batch, S side of a
square view, P patches, N tokens of a text. Another dataset is one more converter that writes this layout, as
`movingfashion` does.
"""
import argparse
import ast
import colorsys
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# torchvision's JPEG decoder is the fastest at hand (540 x 960 to 480: 3.3 ms of one core with the resize, Pillow's
# draft mode 8.6; to 224: 3.5 and 3.7); since 0.29 every call announces its successor, another package.
warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision are deprecated")
# Warnings of ast.literal_eval and torch.load name no file; the BadInput that follows them does.
warnings.filterwarnings("ignore", message="invalid escape sequence", category=SyntaxWarning)
warnings.filterwarnings("ignore", message="Detected pickle protocol")

SPLITS = {"scale": ("small", "medium", "large"), "duration": ("short", "medium", "long"),
          "number": ("abundant", "medium", "few")}
CASES = ("two in view", "near-identical")     # clips that only words, clips that only details can tell (rendered data)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                               # what DAB-DETR's weights expect
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)      # what CLIP's weights expect
LARGEST = 100_000_000                         # pixels of a picture; a file that claims more would take all memory
Image.MAX_IMAGE_PIXELS = None                 # Pillow's own limit, which warns first


class BadInput(Exception):
    """Something a user gave is wrong; its text is the one line the user sees (exit status 2)."""


def guarded(command, *arguments):
    """Run a command; what a user can mend ends in one line on stderr and status 2, Ctrl-C in one line and 130."""
    try:
        return command(*arguments)
    except (BadInput, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()                                          # or the line would stand behind a bar
        # An error of a loader process comes wrapped in that process's traceback: its own message is the last line.
        lines = f"{type(error).__name__}\n{error}".strip().splitlines()
        named = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else lines[-1]
        print(f"error: {named.removeprefix('data.BadInput: ')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; what was saved is whole, and train.py and eval.py --live go on from it", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def whole(path, mine=""):
    """A name to write to that becomes `path` at the end; `mine` tells apart processes that may write the same file."""
    part = f"{path}{mine}.part"
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def output_folder(path):
    """The folder that a command writes to, made when it is not there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BadInput(f"{path}: is a file, or below one; expected a folder to write to") from None
    return Path(path)


class Parser(argparse.ArgumentParser):
    """Complains in one line, as everything here does; its help has no blank lines, to fit a screen."""

    def format_help(self):
        return re.sub(r"\n\n+(?=\S)", "\n", super().format_help())

    def error(self, message):
        print(f"error: {message}; `python {self.prog} --help` lists what there is", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------ reading the layout


@dataclass
class Clip:
    """One clip; boxes[t] is [n, 5] = x1 y1 x2 y2 in pixels and the raw category id (-1: not known), n >= 0."""
    video_id: str
    frame_ids: list
    boxes: list | None          # None: nobody annotated the clip
    image_ids: list
    title: str
    asr: str
    kinds: list | None = None   # how each frame was staged, in rendered test data
    category: int = -1
    splits: tuple = ()          # a training row's scale, visible duration and number of products
    dropped: int = 0            # boxes without area, which are left out


def live_of(video_id):
    """The live of a clip; ids are split from the right, for a live id may hold hyphens itself."""
    return video_id.rsplit("-", 2)[0]


def _literal(text, where):
    """A list written as JSON or as a Python literal; never evaluated as code."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = read(text)
            if isinstance(value, list):
                return value
    raise BadInput(f"{where}: expected a list such as [\"a\", \"b\"], found {text[:40]!r}")


def _object(pairs):
    """A JSON object in which no key stands twice, for the last one would win unseen."""
    value = dict(pairs)
    if len(value) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{ascii(key)[:60]} stands twice")
    return value


def safe_id(name, where):
    """An id becomes a file name, so it must not lead out of its folder."""
    if not isinstance(name, str) or not name.isprintable() or not name or name[0] == "." or "/" in name or "\\" in name:
        raise BadInput(f"{where}: {ascii(name)[:60]} is not an id (a text without '/' and leading '.')")
    return name


def _boxes(entry, category, where):
    """What is given for one frame, a flat box or a list of them, each of 4 numbers or 5 (the last its category), zeros
    or nothing: no box -> its boxes [n,5], and how many without area were left out."""
    rows = entry if isinstance(entry, list) else [entry]
    rows = rows if all(isinstance(row, list) for row in rows) else [rows]
    boxes, dropped = [], 0
    for row in filter(None, rows):
        if len(row) not in (4, 5) or not all(type(v) in (int, float) and abs(v) < 2 ** 53 for v in row):
            raise BadInput(f"{where}: expected x1, y1, x2, y2 and perhaps a category, found {str(row)[:60]}")
        if row[2] > row[0] and row[3] > row[1]:
            boxes.append([*row[:4], row[4] if len(row) == 5 else category])
        else:
            dropped += any(row[:4])
    return np.asarray(boxes, np.float64).reshape(-1, 5), dropped


ROW = np.dtype([("offset", "i8"), ("product", "i8"), ("live", "i8"), ("row", "i4"), ("length", "i4"),
                ("annotated", "?")])            # 33 bytes a clip in memory; nothing grows with the number of frames
ROW_BYTES = struct.Struct("=qqqii?")


def _number(name):
    """A number from 0 that stands for an id, -1 for none; two ids share one once in 2 ** 63."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1 if name else -1


def _numbers(columns):
    """The numbers that stand for the image and the live of a training row's columns (bytes)."""
    return _number(columns[3].strip()), _number(columns[0].rsplit(b"-", 2)[0])


def _index(path, complain=None):
    """One pass over a training file -> [rows] of ROW, and {category id: name}; kept in a file beside it, where the
    folder can be written to, until the training file's size or time changes. complain: see Lives."""
    stamp = [path.stat().st_size, path.stat().st_mtime_ns]
    kept = path.with_name(f".{path.name}.index.npz")
    with contextlib.suppress(Exception), np.load(kept) as saved:      # none, or torn: raises whatever its bytes lead to
        if not complain and saved["stamp"].tolist() == stamp and saved["rows"].dtype == ROW:
            return saved["rows"], {int(raw): str(name) for raw, name in zip(saved["ids"], saved["names"])}
    packed, categories, offset = bytearray(), {}, 0
    bar = tqdm(total=stamp[0], unit="B", unit_scale=True, desc=f"index {path.name}", delay=2, leave=False)
    with bar, open(path, "rb") as file:
        for row, line in enumerate(file, 1):
            columns, start = line.rstrip(b"\r\n").split(b"\t"), offset
            offset += len(line)
            bar.update(len(line))
            raw = columns[5].strip() if len(columns) == 11 else b""
            if len(columns) != 11 or raw and not (raw.isdigit() and len(raw) < 16):
                wrong = f"{path}:{row}: " + (f"category id: expected a whole number, found {columns[5][:40]!r}" if raw
                                             else f"expected 11 columns by tab, found {len(columns)}")
                if not complain:
                    raise BadInput(wrong)
                complain(wrong)
                continue
            length = columns[1].count(b",") + (columns[1].strip(b" []") != b"")
            # A box list of [] was never annotated: no detector may learn from it that nothing is there, as it does from
            # the [] or zeros of one frame. Over 8 bytes it has entries, so a long column is not copied to be asked.
            annotated = len(columns[2]) > 8 or columns[2].translate(None, b" ") not in (b"", b"[]")
            packed += ROW_BYTES.pack(start, *_numbers(columns), row, length, annotated)
            if raw and int(raw) not in categories:
                categories[int(raw)] = columns[6].decode(errors="replace")
    rows = np.frombuffer(packed, ROW)
    if not complain:                                                  # the folder may not be ours to write to
        with contextlib.suppress(OSError), whole(kept, f".{os.getpid()}") as part, open(part, "wb") as file:
            np.savez(file, stamp=stamp, rows=rows, ids=list(categories), names=list(categories.values()))
    return rows, categories


class Lives:
    """One split ("train", "val" or "test") of a data folder in the LPR4M layout; `clip(i)` parses clip i on demand.

    lengths [clips]: frames of each; frame_counts [clips]: the annotated ones. Of training rows also product and live
    [clips], image ids (-1: none) and live ids as numbers, and categories {raw id: name} in order of id; a detector's
    class k is the k-th. A test clip is any that has an ASR row, a true image or a true box; none is left out.
    complain(text): told file:row of every bad training row, which is passed over; without it the first raises BadInput.
    """

    def __init__(self, root, split, complain=None):
        self.root, self.split, self.chosen = Path(root), split, None
        if not (self.root / "annotations").is_dir():
            raise BadInput(f"{self.root}: no annotations/ folder; make one with `python data.py render {self.root}`")
        self._index_training(complain) if split == "train" else self._read_test()
        if not len(self):
            raise BadInput(f"{self.root}/annotations: no clips in the {split} split")

    @classmethod
    def pictures(cls, root):
        """A folder of which only the pictures are wanted, whatever its annotations."""
        lives = cls.__new__(cls)
        lives.root = Path(root)
        return lives

    def __len__(self):
        return len(self.lengths)

    def _index_training(self, complain):
        self.files = sorted((self.root / "annotations").glob("training_videoinfo_*.txt"))
        if not self.files:
            raise BadInput(f"{self.root}/annotations: no training_videoinfo_*.txt; expected at least one part")
        tables, categories = zip(*(_index(path, complain) for path in self.files))
        self.ends = np.cumsum([len(rows) for rows in tables])
        self.table = np.concatenate(tables) if len(tables) > 1 else tables[0]
        self.lengths, self.product, self.live = (self.table[name] for name in ("length", "product", "live"))
        self.frame_counts = self.lengths * self.table["annotated"]
        self.categories = dict(sorted((raw, name) for part in categories for raw, name in part.items()))

    def _file(self, name):
        """The one file of this split whose name fits, and its text; (None, "") when there is none."""
        paths = sorted((self.root / "annotations").glob(f"{self.split}_{name}"))
        if len(paths) > 1:
            raise BadInput(f"{paths[0]} and {paths[1].name}: which one? keep one file named {self.split}_{name}")
        try:
            return (paths[0], paths[0].read_text(encoding="utf-8")) if paths else (None, "")
        except UnicodeDecodeError:
            raise BadInput(f"{paths[0]}: expected UTF-8 text") from None

    def _table(self, name):
        """{id: text} of a file of rows by tab; the text may be missing."""
        path, text = self._file(name)
        entries = {}
        for row, line in enumerate(text.split("\n"), 1):
            key, value = (part.strip() for part in line.partition("\t")[::2])
            if line.strip() and entries.setdefault(safe_id(key, f"{path}:{row}: id"), value) != value:
                raise BadInput(f"{path}:{row}: {key[:60]} stands above with another text")
        return entries

    def _mapping(self, name, ids=False):
        """{id: value} of a JSON file; with ids=True every value has to be a list of image ids."""
        path, text = self._file(name)
        try:
            value = json.loads(text or "{}", object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: not JSON: {error}") from None
        if not isinstance(value, dict):
            raise BadInput(f"{path}: expected an object {{id: ...}}, found {type(value).__name__}")
        for key, images in value.items():
            safe_id(key, f"{path}: key")
            if ids and not isinstance(images, list):
                raise BadInput(f"{path}: {key}: expected a list of image ids, found {str(images)[:40]!r}")
            for image_id in images if ids else ():
                safe_id(image_id, f"{path}: {key}")
        return value

    def _read_test(self):
        self.asr, self.titles = self._table("videoid_asr_*.txt"), self._table("image_title_*.txt")
        self.positives = self._mapping("videoid_to_gtimage_*.json", ids=True)
        self.galleries = self._mapping("liveid_to_gallery_*.json", ids=True)
        self.truth, self.kinds = self._mapping("frameid2gtbox_*.json"), self._mapping("frameid2kind_*.json")
        self.members = {(name, value): set(self._table(f"{name}_{value}.txt"))
                        for name, values in SPLITS.items() for value in values}
        self.cases = {case: set(self._table(f"case_{case.replace(' ', '-')}.txt")) for case in CASES}
        for frame_id, kind in self.kinds.items():                                       # a kind is drawn and printed
            safe_id(kind, f"{self.root}/annotations: {self.split}_frameid2kind: {frame_id}")
        self.frames = {video_id: [] for video_id in [*self.asr, *self.positives]}
        source = self.truth
        if not source:                                          # data without boxes: the folder says which frames exist
            names = (name for _, _, names in os.walk(self.root / "frames") for name in names)
            source = [name[:-4] for name in names if name.endswith((".jpg", ".png"))]
        for frame_id in source:
            video_id, _, index = safe_id(frame_id, f"{self.root}: frame id").rpartition("-")
            if not index.isdecimal() or len(index) > 18:
                raise BadInput(f"{self.root}: frame id {frame_id[:60]!r}: expected video_id-index, "
                               "index a whole number")
            if self.truth or video_id in self.frames:           # frames of the training clips lie in the same folder
                self.frames.setdefault(video_id, []).append(frame_id)
        for frame_ids in self.frames.values():
            frame_ids.sort(key=lambda frame_id: int(frame_id.rpartition("-")[2]))
        self.video_ids = [safe_id(video_id, f"{self.root}: video id") for video_id in self.frames]
        self.lengths = np.array([len(frame_ids) for frame_ids in self.frames.values()], np.int64)
        self.frame_counts = self.lengths * bool(self.truth)

    def few(self, count):
        """This training split cut to its first `count` clips of different products, to be trained on and judged by."""
        usable = np.flatnonzero(self.frame_counts) if self.frame_counts.any() else np.arange(len(self))
        product = np.where(self.product[usable] >= 0, self.product[usable], -2 - usable)   # none: one of its own
        rows = usable[np.sort(np.unique(product, return_index=True)[1])[:count]]
        self.chosen = clips = [self.clip(i) for i in rows]
        for name in ("lengths", "frame_counts", "product", "live"):
            setattr(self, name, getattr(self, name)[rows])
        self.video_ids, self.truth = [clip.video_id for clip in clips], bool(self.frame_counts.any())
        self.asr, self.titles = {c.video_id: c.asr for c in clips}, {i: c.title for c in clips for i in c.image_ids}
        self.positives, self.members, self.cases = {c.video_id: c.image_ids for c in clips}, {}, {}
        self.galleries = {live_of(video_id): list(self.titles) for video_id in self.video_ids}
        return self

    def clip(self, i):
        """Clip i, parsed from its row (train) or put together from the test files."""
        if self.chosen:
            return self.chosen[i]
        if self.split == "train":
            return self._training_clip(i)
        video_id = self.video_ids[i]
        frame_ids, images = self.frames[video_id], self.positives.get(video_id, [])
        given = [_boxes(self.truth[f], -1, f"{self.root}: true boxes of {f}") for f in frame_ids if self.truth]
        boxes, dropped = [kept for kept, _ in given] if self.truth else None, sum(dropped for _, dropped in given)
        kinds = [str(self.kinds.get(f, "")) for f in frame_ids] if self.kinds else None
        return Clip(video_id, frame_ids, boxes, images, self.titles.get(images[0], "") if images else "",
                    self.asr.get(video_id, ""), kinds, dropped=dropped)

    def _training_clip(self, i):
        where = self.where(i)
        with open(where.rpartition(":")[0], "rb") as file:
            file.seek(max(0, self.table["offset"][i]))
            line = file.readline().rstrip(b"\r\n")
        if line.count(b"\t") != 10 or _numbers(line.split(b"\t")) != (self.product[i], self.live[i]):
            raise BadInput(f"{where}: not the row that was indexed; remove {self.root}/annotations/.*.index.npz, "
                           "and it is made again")
        try:
            video_id, frames, given, image_id, title, category, _, asr, *splits = line.decode("utf-8").split("\t")
        except UnicodeDecodeError:
            raise BadInput(f"{where}: expected UTF-8 text") from None
        safe_id(video_id, f"{where}: video_id")
        frame_ids = [safe_id(f, f"{where}: frame_id list") for f in _literal(frames, f"{where}: frame_id list")]
        if len(frame_ids) != self.lengths[i]:
            raise BadInput(f"{where}: frame_id list: {len(frame_ids)} ids, but commas for {self.lengths[i]}")
        images = [safe_id(image_id, f"{where}: image_id")] if image_id.strip() else []
        clip = Clip(video_id, frame_ids, None, images, title.strip(), asr.strip(), None,
                    int(category) if category.strip() else -1, tuple(value.strip() for value in splits))
        if self.frame_counts[i]:
            given = _literal(given or "[]", f"{where}: box list")
            if len(given) != len(frame_ids):
                raise BadInput(f"{where}: {len(frame_ids)} frames but {len(given)} entries in the box list")
            boxes = [_boxes(entry, clip.category, f"{where}: box list, frame {t}") for t, entry in enumerate(given)]
            clip.boxes, clip.dropped = [kept for kept, _ in boxes], sum(dropped for _, dropped in boxes)
        return clip

    def where(self, i):
        """file:row of training clip i."""
        return f"{self.files[np.searchsorted(self.ends, i, side='right')]}:{self.table['row'][i]}"

    def clip_or_none(self, i):
        """Clip i of a training split, None where its row is broken; who trains on it skips it and counts it."""
        with contextlib.suppress(BadInput):
            return self.clip(i)

    def image(self, name):
        """Shop image `name`, uint8 [3,H,W] upright; BadInput when missing, broken or too large."""
        return read_picture(self._path("images", name))

    def frame(self, name):
        """Frame `name` uint8 [3,H,W], and the (width, height) its boxes are given in: of its side file or its own."""
        path = self._path("frames", name)
        image, side = read_picture(path), f"{path[:-4]}.json"
        if not os.path.lexists(side):
            return image, (image.shape[2], image.shape[1])
        size = 0, 0
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError, OverflowError, OSError):
            about = json.loads(Path(inside(side, self.root / "frames")).read_text(encoding="utf-8"))
            size = int(about["original_width"]), int(about["original_height"])
        if min(size) < 1 or size[0] * size[1] > LARGEST:
            raise BadInput(f"{side}: expected an object with original_width and original_height, in pixels")
        return image, size

    def _path(self, folder, name):
        base = self.root / folder
        for path in (f"{base}/{shard}{name}.{ending}" for shard in ("", f"{name[:2]}/") for ending in ("jpg", "png")):
            if os.path.isfile(path):
                return inside(path, base)
        raise BadInput(f"{base}/{name[:200]}.jpg: missing (nor .png, nor under {name[:2]}/)")


def inside(path, folder):
    """`path` itself; BadInput when it, or a link on its way, leads out of the folder, which may be a link."""
    if "\0" in str(path) or not os.path.realpath(path).startswith(os.path.join(_real(folder), "")):
        raise BadInput(f"{path}: a path or a link that leads out of the folder {folder}".replace("\0", "?"))
    return path


_real = functools.cache(os.path.realpath)           # of a folder that thousands of pictures lie in


def read_picture(path):
    """A JPEG or PNG as uint8 [3,H,W], turned as its EXIF says; BadInput when it is neither, torn, or over LARGEST."""
    wrong = "not a readable JPEG or PNG"
    with contextlib.suppress(Exception):                 # a decoder raises whatever the bytes lead it to
        with open(path, "rb") as file:
            width, height = Image.open(file, formats=("JPEG", "PNG")).size      # reads no pixels yet
            if width * height <= LARGEST:
                file.seek(0)
                content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
                image = decode_image(content, ImageReadMode.RGB, True)
                return image if image.dtype == torch.uint8 else TF.to_dtype(image, torch.uint8, scale=True)   # 16 bit
        wrong = f"{width} x {height} pixels, more than {LARGEST:,}"
    raise BadInput(f"{path}: {wrong}")


def picture_files(folder):
    """Paths of the pictures in a folder and below, numbers in names in order of value; BadInput when there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; expected one of .jpg and .png pictures")
    files = [inside(Path(where) / name, folder) for where, _, names in os.walk(folder) for name in names
             if name.lower().endswith((".jpg", ".jpeg", ".png")) and not name.startswith(".")]
    if not files:
        raise BadInput(f"{folder}: no .jpg and no .png in it")
    return sorted(files, key=lambda path: [(int(part), "") if part.isdecimal() else (-1, part)
                                           for part in re.split(r"(\d+)", path.relative_to(folder).as_posix())])


def even_frames(count, frames):
    """At most `frames` positions in a clip of `count` frames, at even intervals (supplement, section 2.2)."""
    return [int((i + 0.5) * count / frames) for i in range(frames)] if count > frames else list(range(count))


# ------------------------------------------------------------------ text


def train_tokenizer(texts, vocab=2000):
    """A sentencepiece model of the training texts, its bytes as a checkpoint holds them: uint8 [n]; no text: [0]."""
    texts = [t[:2000] for t in texts if t.strip()]    # a text that repeats itself takes the square of its length
    if not texts:
        return torch.zeros(0, dtype=torch.uint8)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab, hard_vocab_limit=False, pad_id=3,
            max_sentence_length=2 ** 20, input_sentence_size=500_000, num_threads=1, minloglevel=2)
    except RuntimeError as error:
        raise BadInput(f"the training texts do not make a vocabulary: {str(error).splitlines()[-1]}") from None
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


class Tokenizer:
    """Text -> token ids [N]: a start token, the text's pieces, padding (0). Empty text is the start token alone.
    model: what train_tokenizer gave; BadInput when it is something else."""

    def __init__(self, model, length=24):
        self.length = length
        try:
            proto = model.numpy().tobytes()
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=proto) if proto else None
        except RuntimeError:
            raise BadInput("the vocabulary is not a sentencepiece model") from None
        self.vocab = 2 + (self.pieces.get_piece_size() if self.pieces else 0)

    def __call__(self, text):
        ids = self.pieces.encode(text)[: self.length - 1] if self.pieces else []
        return torch.tensor([1] + [i + 2 for i in ids] + [0] * (self.length - 1 - len(ids)))


# ------------------------------------------------------------------ samples: what a detector sees


class DetectionSet(Dataset):
    """Frames with their boxes, `frames` at a time: 1 to train SD (an item a frame), else more (in training an item a
    clip, the same frames at even intervals in every epoch).

    frames T x uint8 [3,h,w] (in evaluation None for one that cannot be read), boxes_cxcywh T x [M,4] in 0..1 and labels
    T x [M] (empty in evaluation), size T x (w, h) of the picture that boxes are given in, position T x int, a frame's
    place in the clip. categories: the raw ids in order of class. shortest: (lowest, highest, step) of the shortest
    side, drawn in training (supplement, section 2.2), the highest in evaluation; longest: limit of the longest side,
    in pixels. In evaluation a clip of more than `frames` frames makes several items that interleave, so each spans the
    clip, or one without every_frame. augment=False: training pictures as in evaluation."""

    def __init__(self, lives, categories, frames, shortest, longest, train, seed=0, every_frame=True, augment=True):
        self.lives, self.categories, self.frames = lives, {c: k for k, c in enumerate(categories)}, frames
        self.shortest, self.longest, self.train, self.seed = shortest, longest, train, seed
        self.augment = train and augment
        counts, every = (lives.frame_counts, frames == 1) if train else (lives.lengths, every_frame)
        self.parts = -(-counts // frames) if every else np.minimum(counts, 1)                   # items of each clip
        self.ends = np.cumsum(self.parts)
        if train and not len(self):
            raise BadInput(f"{lives.root}: no training clip has boxes, so no detector can be trained on it; "
                           "RICE can, on whole frames: --stage rice --view frame")

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def _find(self, i):
        """Item i -> its clip's number, the clip, and the places of its frames in the clip."""
        c = int(np.searchsorted(self.ends, i, side="right"))
        clip, part, parts = self.lives.clip(c), i - int(self.ends[c] - self.parts[c]), int(self.parts[c])
        count = len(clip.frame_ids)
        return c, clip, list(range(part, count, parts)) if parts > 1 else even_frames(count, self.frames)

    def __getitem__(self, key):
        try:
            return self._item(*key)
        except BadInput as error:
            if self.lives.split != "train":
                raise
            return {"frames": [], "clip": int(np.searchsorted(self.ends, key[1], side="right")), "bad": str(error)}

    def _item(self, epoch, i):
        c, clip, positions = self._find(i)
        rng = np.random.default_rng((self.seed, epoch, i)) if self.augment else None
        low, high, step = self.shortest
        side = low + step * int(rng.integers((high - low) // step + 1)) if self.augment else high
        flip = self.augment and rng.random() < 0.5
        item = {"frames": [], "boxes_cxcywh": [], "labels": [], "size": [], "clip": c, "position": positions, "bad": ""}
        for t in positions:
            try:
                image, size = self.lives.frame(clip.frame_ids[t])                     # [3,h,w]
                scale = min(side / min(image.shape[1:]), self.longest / max(image.shape[1:]))
                image = TF.resize(image, [max(1, round(n * scale)) for n in image.shape[1:]], antialias=True)
            except BadInput as error:
                if self.train:
                    raise
                image, size, item["bad"] = None, (1, 1), str(error)
            boxes, labels = self._targets(clip.boxes[t] if self.train else (), size)
            if flip:
                image = image.flip(2)
                boxes[:, 0] = 1 - boxes[:, 0]
            for name, value in (("frames", image), ("boxes_cxcywh", boxes), ("labels", labels), ("size", size)):
                item[name].append(value)
        return item

    def _targets(self, rows, size):
        """Pixel boxes [M,5] -> cxcywh in 0..1 [M,4] clipped to the picture, classes [M]; what lies outside goes."""
        if not len(rows):
            return torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
        xyxy = (rows[:, :4] / (*size, *size)).clip(0, 1).astype(np.float32)
        kept = (xyxy[:, 2:] > xyxy[:, :2]).all(1)
        unknown = [int(c) for c in rows[:, 4] if c not in self.categories]
        if unknown:
            raise BadInput(f"{self.lives.root}: a training box has the category {unknown[0]} (-1: none given), "
                           f"expected one of column 6: {list(self.categories)[:40]}")
        labels = np.array([self.categories[int(c)] for c in rows[:, 4]], np.int64)
        return box_convert(torch.from_numpy(xyxy[kept]), "xyxy", "cxcywh"), torch.from_numpy(labels[kept])


def collate_detection(items, multiple=16):
    """Items -> frames uint8 [B,T,3,H,W], padding [B,T,H,W] (True: padded, its pixels mean nothing), valid [B,T] (False:
    no such frame, or it cannot be read), boxes_cxcywh [B,T,M,4], labels [B,T,M] (-1: no box), size [B,T,2] (w, h), clip
    [B], position [B,T] (-1: no such frame), bad: list [B]; H and W are a multiple of `multiple`."""
    B = len(items)
    T = max([1] + [len(item["frames"]) for item in items])
    M = max([1] + [len(labels) for item in items for labels in item.get("labels", ())])
    there = [image for item in items for image in item["frames"] if image is not None]
    H, W = (multiple * math.ceil(max([1] + [image.shape[d] for image in there]) / multiple) for d in (1, 2))
    # Channels last in memory, as the JPEG decoder leaves a picture and as convolutions like it: no copy turns it. What
    # is padded is left unwritten, for to_float makes it 0.
    frames = torch.empty(B, T, H, W, 3, dtype=torch.uint8).movedim(-1, 2)
    batch = {"frames": frames, "padding": torch.ones(B, T, H, W, dtype=torch.bool),
             "valid": torch.zeros(B, T, dtype=torch.bool), "boxes_cxcywh": torch.zeros(B, T, M, 4),
             "labels": torch.full((B, T, M), -1), "size": torch.ones(B, T, 2),
             "clip": torch.tensor([item["clip"] for item in items]), "position": torch.full((B, T), -1),
             "bad": [item["bad"] for item in items]}
    for b, item in enumerate(items):
        for t, image in enumerate(item["frames"]):
            batch["position"][b, t] = item["position"][t]
            if image is None:
                continue
            (_, h, w), n = image.shape, len(item["labels"][t])
            batch["frames"][b, t, :, :h, :w] = image
            batch["padding"][b, t, :h, :w] = False
            batch["valid"][b, t] = True
            batch["boxes_cxcywh"][b, t, :n] = item["boxes_cxcywh"][t]
            batch["labels"][b, t, :n] = item["labels"][t]
            batch["size"][b, t] = torch.tensor(item["size"][t])
    return batch


@functools.cache
def _on(device, statistics):
    """Mean and deviation [3,1,1] on a device, sent there once: a copy in every step would wait for the device."""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in statistics]


def to_float(pixels, statistics, padding=None):
    """uint8 pictures [...,3,H,W] -> normalised float; padded pixels are 0, as DETR has them."""
    mean, std = _on(pixels.device, statistics)
    pixels = (pixels.float() / 255 - mean) / std
    return pixels if padding is None else pixels.masked_fill(padding.unsqueeze(-3), 0)


# ------------------------------------------------------------------ samples: what RICE sees


def true_boxes(lives):
    """The first true box of each frame that has one, in the form of predicted ones (see eval.seen_through)."""
    start, rows = [0], []
    for c in range(len(lives)):
        clip = lives.clip(c) if lives.split != "train" else lives.clip_or_none(c)
        given = clip.boxes if clip and clip.boxes else []
        rows += [(t, *boxes[0, :4], 1.0, boxes[0, 4]) for t, boxes in enumerate(given) if len(boxes)]
        start.append(len(rows))
    table = np.array(rows).reshape(-1, 7)
    return {"start": np.array(start), "position": table[:, 0].astype(int), "box": table[:, 1:].astype(np.float32)}


SURE = 0.7      # on val lives 0, 0.6, 0.7, 0.8, 0.9 gave R1 by ICL of 72.4, 74.0, 74.1, 73.6, 72.8 (five seeds)


def boxed_rows(boxes, c, every=False):
    """Rows of `boxes` (see PairSet) through which clip c is seen. Without `every`, as in evaluation, a frame whose box
    scores less than SURE times the clip's best is left out: most often that box is another product's."""
    rows = np.arange(boxes["start"][c], boxes["start"][c + 1])
    score = boxes["box"][rows, 4]
    return rows if every else rows[score >= SURE * score.max(initial=0)]


def square_view(image, box_xyxy, side, margin=1.15):
    """The square around a pixel box (a little larger than it), resized: uint8 [3,H,W] -> [3,S,S]; outside is black."""
    x1, y1, x2, y2 = (float(v) for v in box_xyxy)
    half = max(4.0, max(x2 - x1, y2 - y1) * margin) / 2
    left, top, size = round((x1 + x2) / 2 - half), round((y1 + y2) / 2 - half), round(2 * half)
    return TF.resize(TF.crop(image, top, left, size, size), (side, side), antialias=True)


class PairSet(Dataset):
    """Clips with their shop image and texts, as RICE sees them.

    frames uint8 [T,3,S,S], valid [T] (False where a short clip is filled up), keep [T,P] bool, asr [N], title [N]; in
    training image uint8 [3,S,S], product (the image's id as a number, -1 in an empty item). boxes: {"start" [clips+1],
    "position" [F], "box" [F,6]} = the boxes (x1 y1 x2 y2 in pixels, score, class) of clip c at rows
    start[c]:start[c+1]; None shows whole frames. view: "frame" the whole frame, "mask" also which patches the box
    touches, "box" the square around the box. text: what is read, "asr", "title", "both" or "none". Training draws
    `frames` of the frames that have a box in `boxes` (a detector's: --frames even ones of a clip; of all where none
    has), evaluation takes the surer ones at even intervals. augment=False: nothing is drawn at random."""

    def __init__(self, lives, tokenizer, frames, size, grid, view, boxes, train, seed=0, text="both", augment=True):
        if boxes is None and view != "frame":
            raise BadInput(f"--view {view} needs boxes; without a detector use --view frame")
        self.lives, self.tokenizer, self.frames, self.size, self.grid = lives, tokenizer, frames, size, grid
        self.view, self.boxes, self.train, self.seed, self.text = view, boxes, train, seed, text
        self.augment = train and augment
        self.clips = np.flatnonzero((lives.product >= 0) & (lives.lengths > 0)) if train else np.arange(len(lives))
        if train and not len(self.clips):
            raise BadInput(f"{lives.root}: no training clip has frames and names a shop image, so RICE cannot be "
                           "trained on it")

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        try:
            return self._item(*key)
        except BadInput as error:
            if self.lives.split != "train":
                raise
            return self._empty(int(self.clips[key[1]])) | {"bad": str(error)}

    def _empty(self, c):
        """An item without a frame and without text."""
        shape, said = (3, self.size, self.size), self.tokenizer("")
        item = {"frames": torch.zeros(self.frames, *shape, dtype=torch.uint8),
                "keep": torch.ones(self.frames, self.grid ** 2, dtype=torch.bool),
                "valid": torch.zeros(self.frames, dtype=torch.bool), "clip": c, "bad": "", "asr": said, "title": said}
        return item | {"image": torch.zeros(shape, dtype=torch.uint8), "product": -1} if self.train else item

    def _item(self, epoch, i):
        c = int(self.clips[i])
        clip, item, t = self.lives.clip(c), self._empty(c), 0
        rng = np.random.default_rng((self.seed, epoch, i))
        rows = boxed_rows(self.boxes, c, every=self.train) if self.boxes else []
        positions = [int(self.boxes["position"][r]) for r in rows] or list(range(len(clip.frame_ids)))
        if self.augment and len(positions) > self.frames:
            chosen = sorted(rng.choice(len(positions), self.frames, replace=False))
        else:
            chosen = even_frames(len(positions), self.frames)
        for j in chosen:
            try:
                image, size = self.lives.frame(clip.frame_ids[positions[j]])
            except BadInput as error:
                if self.train:
                    raise
                item["bad"] = str(error)
                continue
            edges = np.tile(image.shape[:0:-1], 2)                                    # w, h, w, h of the picture
            box = edges * (0, 0, 1, 1)
            if len(rows):                       # from the boxes' pixels to the picture's; what sticks out of it goes
                box = (self.boxes["box"][rows[j], :4] * (edges / np.tile(size, 2))).clip(0, edges)
            view, kept = self._view(image, box, rng)
            item["frames"][t], mirrored = self._augment(view, rng)
            item["keep"][t] = kept.view(self.grid, self.grid).flip(1).flatten() if mirrored else kept
            t += 1
        item["valid"][:t] = True
        item |= {name: self.tokenizer(getattr(clip, name)) for name in ("asr", "title") if self.text in (name, "both")}
        if self.train:
            shop = TF.resize(self.lives.image(clip.image_ids[0]), (self.size, self.size), antialias=True)
            item |= {"image": self._augment(shop, rng)[0], "product": int(self.lives.product[c])}
        return item

    def _view(self, image, box, rng):
        """One frame through its box: uint8 [3,S,S] and which of the P patches the box touches [P]."""
        if self.view == "box":
            shift = rng.uniform(-0.06, 0.06, 2) * (box[2:] - box[:2]) if self.augment else (0, 0)
            return square_view(image, box + np.tile(shift, 2), self.size), torch.ones(self.grid ** 2, dtype=torch.bool)
        height, width = image.shape[1:]
        edges = torch.arange(self.grid + 1) / self.grid
        touch_x = (edges[:-1] < box[2] / width) & (edges[1:] > box[0] / width)                     # [grid]
        touch_y = (edges[:-1] < box[3] / height) & (edges[1:] > box[1] / height)                   # [grid]
        kept = (touch_y[:, None] & touch_x[None, :]).flatten()                                     # [P]
        view = TF.resize(image, (self.size, self.size), antialias=True)
        return view, kept if self.view == "mask" and kept.any() else torch.ones_like(kept)

    def _augment(self, view, rng):
        """Half of the pictures mirrored, all in a slightly other light -> uint8 [3,S,S], and whether it is mirrored."""
        if not self.augment:
            return view, False
        mirrored = rng.random() < 0.5
        light = torch.from_numpy(rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, (3, 1, 1))).float()
        return ((view.flip(2) if mirrored else view) * light).clamp(0, 255).to(torch.uint8), mirrored


class ImageSet(Dataset):
    """Shop images `ids`: image uint8 [3,S,S], black where it cannot be read; title [N]. read: id -> uint8 [3,H,W] or
    BadInput. titles: id -> text. text: what is read, as in PairSet."""

    def __init__(self, read, titles, tokenizer, size, ids, text="both"):
        self.read, self.titles, self.tokenizer, self.size, self.ids = read, titles, tokenizer, size, ids
        self.text = text

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, key):
        image_id, bad = self.ids[key[1]], ""
        try:
            image = TF.resize(self.read(image_id), (self.size, self.size), antialias=True)
        except BadInput as error:
            image, bad = torch.zeros(3, self.size, self.size, dtype=torch.uint8), str(error)
        title = self.titles.get(image_id, "") if self.text in ("title", "both") else ""
        return {"image": image, "title": self.tokenizer(title), "bad": bad}


# ------------------------------------------------------------------ order


def live_by_live(live_ids, per_live):
    """Order of one epoch for RICE: groups of `per_live` clips of one live, so that a batch holds its own negatives."""
    lives = {}
    for i, live in enumerate(live_ids):
        lives.setdefault(int(live), []).append(i)

    def order(rng):
        mixed = [rng.permutation(members) for members in lives.values()]
        groups = [members[k:k + per_live] for members in mixed for k in range(0, len(members), per_live)]
        return np.concatenate([groups[g] for g in rng.permutation(len(groups))])
    return order


def step_batches(order, batch, steps, start=0, seed=0, rank=0, world=1):
    """Batches of (epoch, i) from step `start` to `steps`, a function of (seed, step): a resumed run goes on mid-epoch.
    order(rng) -> the samples of one epoch. `batch` counts samples over all processes; this rank gets its share."""
    order_of = functools.lru_cache(1)(lambda epoch: order(np.random.default_rng((seed, epoch))))
    count, share = len(order_of(0)), batch // world
    for step in range(start, steps):
        first = step * batch + rank * share
        places = (divmod(place, count) for place in range(first, first + share))
        yield [(epoch, int(order_of(epoch)[at])) for epoch, at in places]


def shard_batches(numbers, batch, rank=0, world=1):
    """Evaluation: each of `numbers` once over all processes, no padding and nothing left out, `batch` at a time."""
    mine = [(0, i) for i in numbers[rank::world]]
    return [mine[k:k + batch] for k in range(0, len(mine), batch)]


def load(dataset, batches, workers, device, collate=None):
    """`batches`, lists of what the data set is asked for, made by `workers` processes while this one computes."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      pin_memory=device.type == "cuda", worker_init_fn=stand_back)


def stand_back(_):
    """Make a loader leave Ctrl-C and SIGTERM, which reach the whole group, to the process that it loads for, and run
    at the lowest priority: on the core of a computing thread it would hold up all threads of a matrix product."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice"):                                                      # Windows has none
        os.nice(19)


# ------------------------------------------------------------------ a room of its own: rendered livestreams
#
# A live: a salesperson before a shelf of products of the same shop. A clip is about one intended product. Each frame is
# staged in one of seven kinds. In "two held", "lifted" (another product in the hand, the intended one on the table) and
# "table" frames one picture cannot tell which product is meant; the other products change from frame to frame and the
# intended one stays, so time tells. In a "pair" clip the same two are held whenever one is: only words can tell.
# Decoys are drawn from all products of the live, those of the intended product's own category included, and in SIMILAR
# clips only from these: a vote on the category tells nothing there. All that could tell the intended product from a
# decoy (side, size, order of drawing) is drawn from one law for both, so that only time and words give it away.

KINDS = {           # share of the frames that show the product, CLEAR's left out, by the number of products in view
    "few": {"held": 0.40, "two held": 0.22, "lifted": 0.06, "table": 0.16, "occluded": 0.16},
    "medium": {"held": 0.31, "two held": 0.27, "lifted": 0.10, "table": 0.20, "occluded": 0.12},
    "abundant": {"held": 0.22, "two held": 0.32, "lifted": 0.14, "table": 0.24, "occluded": 0.08}}
SHOWN = (*KINDS["few"], "pair")
ABSENT = {0: 0.62, 1: 0.14, 2: 0.12, 4: 0.12}   # frames of 8 without it (but perhaps on the shelf) -> share of clips
CLEAR = {"short": 1, "medium": 2, "long": 2}    # frames at least in which it is held alone, by visible duration
INSTEAD = 0.4           # share of the frames without it in which another product is lifted
SIMILAR = 0.25          # of the other clips, where there are three such: all decoys are of the product's own category
PAIR = 0.15             # share of clips that show the product beside one other, always; their ASR names it
SIZES = {"small": (0.22, 0.29), "medium": (0.29, 0.38), "large": (0.38, 0.50)}   # of the frame's side; a third each
SHELF = {"few": (0, 2), "medium": (3, 4), "abundant": (5, 7)}                    # products behind; a third each
LOOKALIKE = 0.3         # of products whose category their live has already: copies but for one detail (logo, pattern)
BLUR = 0.15             # share of frames with motion blur
WRONG_WORDS = 0.10      # share of ASR words misheard (the paper measured 90.16 % right)

# A category is drawn from a few shapes in percent of a square: E ellipse, R rounded box, P polygon, C pie, L line and
# A arc (last number: width), each in colour 0 (the product's main one, with its pattern), 1 (second) or 2 (dark).
CATEGORIES = {
    "trousers": "P0 26 4 74 4 84 96 58 96 50 36 42 96 16 96|R1 26 4 74 13",
    "hat": "E0 2 58 98 86|P0 26 68 33 20 67 20 74 68|P1 27 68 29 54 71 54 73 68",
    "sneaker": "P0 6 36 32 28 54 52 94 62 94 76 6 76|R1 4 73 96 86|L2 40 38 50 46 4|L2 34 36 46 52 4",
    "handbag": "A1 28 4 72 68 180 360 7|P0 12 36 88 36 96 94 4 94|R1 40 34 60 54",
    "suitcase": "A2 36 2 64 36 180 360 6|R0 16 18 84 90|L1 34 18 34 90 5|L1 66 18 66 90 5|"
                "E2 20 86 32 98|E2 68 86 80 98",
    "bottle": "R1 41 2 59 18|P0 42 18 58 18 70 36 70 97 30 97 30 36|R1 30 56 70 76",
    "umbrella": "L2 50 50 50 92 5|A2 50 82 68 98 0 180 5|C0 2 6 98 98 180 360|L1 50 6 50 52 3",
    "plate": "E0 2 14 98 86|E1 24 32 76 68",
    "shirt": "P0 32 8 68 8 98 30 86 50 74 40 74 94 26 94 26 40 14 50 2 30|P1 42 8 58 8 50 22",
    "dress": "P0 36 4 64 4 62 40 92 96 8 96 38 40|R1 37 38 63 46", "skirt": "P0 30 14 70 14 96 88 4 88|R1 29 10 71 20",
    "coat": "P0 32 4 68 4 98 60 84 66 76 40 78 97 22 97 24 40 16 66 2 60|L1 50 6 50 97 4|E2 54 40 60 46|E2 54 60 60 66",
    "sock": "P0 34 4 66 4 66 56 90 76 84 92 64 94 34 70|R1 33 4 67 18",
    "glove": "P0 30 96 30 52 14 40 22 30 34 42 36 8 46 8 48 36 52 4 62 6 60 38 68 12 76 14 72 60 68 96|R1 29 84 69 96",
    "scarf": "R0 30 4 50 96|R0 48 4 72 70|L1 30 88 50 88 4|L1 48 62 72 62 4|R0 26 4 76 24",
    "tie": "P0 40 4 60 4 56 18 68 76 50 98 32 76 44 18|L1 40 12 60 12 4",
    "belt": "A0 6 26 94 84 0 360 12|R1 38 72 62 92|R2 44 77 56 87",
    "boot": "P0 28 4 62 4 62 56 92 72 94 86 26 86|R2 24 84 95 95|R1 27 4 63 15",
    "sandal": "P0 6 66 94 66 96 80 4 80|L1 20 66 48 30 8|L1 76 66 48 30 8|R2 4 78 96 86",
    "watch": "R0 38 2 62 98|E1 24 26 76 74|E2 32 34 68 66|L1 50 50 50 38 3|L1 50 50 60 54 3",
    "ring": "A0 16 26 84 96 0 360 10|P1 50 2 68 18 50 36 32 18",
    "necklace": "A0 10 -40 90 80 0 180 7|P1 50 66 64 82 50 98 36 82",
    "glasses": "A0 2 30 44 72 0 360 8|A0 56 30 98 72 0 360 8|L0 42 48 58 48 6|E1 10 38 36 64|E1 64 38 90 64",
    "lipstick": "R2 34 58 66 98|R0 36 36 64 60|P1 40 36 40 14 60 4 60 36", "cream jar": "R0 12 36 88 92|R1 10 16 90 40",
    "perfume": "R0 16 38 84 96|R2 42 26 58 40|E1 36 4 64 30",
    "mug": "A0 58 30 96 76 270 90 9|R0 12 16 72 92|L1 12 26 72 26 5",
    "teapot": "A0 70 30 98 76 270 90 7|P0 26 60 2 30 10 26 36 44|E0 18 30 82 92|E1 40 20 60 36",
    "pan": "R2 58 44 99 56|E0 2 20 66 82|E1 14 32 54 70",
    "lamp": "P0 32 4 68 4 92 52 8 52|R2 46 52 54 88|E1 28 84 72 97", "pillow": "R0 4 20 96 80|A1 10 26 90 74 0 360 3",
    "racket": "R2 45 54 55 98|A0 22 2 78 62 0 360 7|L1 50 4 50 60 2|L1 24 32 76 32 2",
    "phone": "R0 26 2 74 98|R2 31 12 69 84|E1 45 87 55 96", "book": "R0 14 6 86 94|L1 24 6 24 94 7|R1 40 22 78 40",
}
PATTERNS = ("plain", "striped", "barred", "slanted", "dotted", "checked")
LOGOS = {"": "", "star": "P0 50 0 62 38 100 38 70 60 80 98 50 74 20 98 30 60 0 38 38 38", "disc": "E0 5 5 95 95",
         "cross": "R0 35 0 65 100|R0 0 35 100 65", "triangle": "P0 50 2 98 94 2 94", "bar": "R0 0 32 100 68"}
HUES = ("red", "orange", "yellow", "lime", "green", "teal", "blue", "violet", "purple", "pink")
CHATTER = ("hello everybody welcome to my live|look at this|it feels so good|the price today is crazy|just for you|"
           "please follow the channel|only a few left|I use it every day myself|my mother loves it|order now and save|"
           "link number five below|how are you all tonight|we ship tomorrow|let me show you again|see the quality"
           ).split("|")


def _colour(hue, saturation, value):
    """Hue, saturation and value in 0..1 -> (red, green, blue) in 0..255."""
    return tuple(int(255 * light) for light in colorsys.hsv_to_rgb(hue, saturation, value))


def _shapes(code, side):
    """The masks of a drawing, in order: (colour number, L picture)."""
    for shape in filter(None, code.split("|")):
        numbers = [int(n) for n in shape[2:].split()]
        mask, xy = Image.new("L", (side, side)), [n * side / 100 for n in numbers]
        draw = ImageDraw.Draw(mask)
        {"E": lambda: draw.ellipse(xy, 255),
         "R": lambda: draw.rounded_rectangle(xy, side * 0.05, 255),
         "P": lambda: draw.polygon(xy, 255),
         "C": lambda: draw.pieslice(xy[:4], *numbers[4:], 255),
         "L": lambda: draw.line(xy[:4], 255, round(xy[4])),
         "A": lambda: draw.arc(xy[:4], *numbers[4:6], 255, round(xy[6]))}[shape[0]]()
        yield int(shape[1]), mask


def _product(rng, category):
    return {"category": category, "hue": int(rng.integers(len(HUES))), "shade": rng.uniform(0.65, 1, 2).tolist(),
            "drift": rng.uniform(-0.03, 0.03), "second": rng.random(),
            "pattern": str(rng.choice(PATTERNS, p=[0.4] + [0.12] * 5)), "pattern_hue": rng.random(),
            "logo": str(rng.choice(list(LOGOS))), "aspect": rng.uniform(0.85, 1.18)}


def _lookalike(rng, product):
    """The same product but for one detail."""
    detail = str(rng.choice(["logo", "pattern"]))
    others = [value for value in (LOGOS if detail == "logo" else PATTERNS) if value != product[detail]]
    return product | {detail: str(rng.choice(others))}


def _products(rng, categories, count, decoys):
    """The products of a live, no two alike, and of each the number of the product that its copies began with."""
    names = list(CATEGORIES)[:categories]
    if decoys == "same":                              # few categories in equal parts, so that each has decoys
        names = [str(name) for name in rng.permutation(names)[:max(1, min(4, count // 4))]]
        of = [names[p % len(names)] for p in range(count)]
    else:
        long_tail = np.arange(1, len(names) + 1) ** -0.5
        of = [str(name) for name in rng.choice(names, count, p=long_tail / long_tail.sum())]
    products, family = [], list(range(count))
    for p, category in enumerate(of):
        product, before = _product(rng, category), [other for other in range(p) if of[other] == category]
        if before and rng.random() < LOOKALIKE:
            while family[p] == p or product in products:                     # two copies may have changed alike
                like = int(rng.choice(before))
                product, family[p] = _lookalike(rng, products[like]), family[like]
        products.append(product)
    return products, family


def _sprite(product, side=192):
    """The product's picture, RGBA, cut to its outline."""
    y, x = np.mgrid[:side, :side] / side
    on = {"plain": lambda: np.zeros_like(x, bool), "striped": lambda: y * 7 % 1 < 0.4,
          "barred": lambda: x * 7 % 1 < 0.4, "slanted": lambda: (x + y) * 6 % 1 < 0.4,
          "checked": lambda: (x * 5 % 1 < 0.5) ^ (y * 5 % 1 < 0.5),
          "dotted": lambda: (x * 6 % 1 - 0.5) ** 2 + (y * 6 % 1 - 0.5) ** 2 < 0.09}[product["pattern"]]()
    main = np.uint8(_colour((product["hue"] / len(HUES) + product["drift"]) % 1, *product["shade"]))
    patterned = np.where(on[..., None], np.uint8(_colour(product["pattern_hue"], 0.25, 0.95)), main)
    fills = [Image.fromarray(patterned), _colour(product["second"], 0.7, 0.75), (52, 48, 52)]
    sprite, body = Image.new("RGBA", (side, side)), Image.new("L", (side, side))
    for slot, mask in _shapes(CATEGORIES[product["category"]], side):
        sprite.paste(Image.new("RGB", (side, side), fills[slot]) if slot else fills[0], mask=mask)
        body.paste(0 if slot else 255, mask=mask)
    if product["logo"]:                                            # where the main colour leaves most room
        room = np.asarray(body.filter(ImageFilter.BoxBlur(side // 9)))
        y, x = np.unravel_index(int(room.argmax()), room.shape)
        for _, mask in _shapes(LOGOS[product["logo"]], side // 4):
            sprite.paste((250, 250, 245), (int(x) - side // 8, int(y) - side // 8), mask)
    sprite = sprite.reduce(2)
    sprite = sprite.crop(sprite.getchannel("A").getbbox())
    return sprite.resize((max(1, round(sprite.width * product["aspect"])), sprite.height))


def _asr(rng, product, pair):
    """What the salesperson says, as a machine heard it: chatter, now and then the product, one word in ten wrong."""
    said = [str(text) for text in rng.choice(CHATTER, 3, replace=False)]
    name = [HUES[product["hue"]]] * (pair or rng.random() < 0.5) + [product["pattern"]] * (rng.random() < 0.3)
    name += [product["category"]] * (pair or rng.random() < 0.6)
    said.insert(int(rng.integers(4)), " ".join(name))
    any_word, words = [*HUES, *CATEGORIES, *" ".join(CHATTER).split()], " ".join(said).split()
    return " ".join(str(rng.choice(any_word)) if rng.random() < WRONG_WORDS else word for word in words)


def _place(canvas, sprite, rng, x, y, size, tilt=20):
    """Paste a product with its centre at (x, y), its longer side `size` pixels -> its box, hands not counted."""
    scale, squeeze = size / max(sprite.size), rng.uniform(0.88, 1.0)
    view = sprite.resize((max(3, round(sprite.width * scale * squeeze)), max(3, round(sprite.height * scale))))
    view = view.rotate(rng.uniform(-tilt, tilt), Image.Resampling.BILINEAR, expand=True)
    left, top = round(x - view.width / 2), round(y - view.height / 2)
    canvas.paste(view, (left, top), view)
    y, x = (np.asarray(view.getchannel("A")) > 40).nonzero()
    return [max(0, left + int(x.min())), max(0, top + int(y.min())),
            min(canvas.width, left + int(x.max()) + 1), min(canvas.height, top + int(y.max()) + 1)]


def _backdrop(rng, sprites, stock, side, crowd):
    """Wall, table and a shelf of products of `stock` behind a clip, larger than a frame so that the camera can move."""
    shelf = min(len(stock), int(rng.integers(SHELF[crowd][0], SHELF[crowd][1] + 1)))
    big = round(side * 1.15)
    wall = _colour(rng.random(), 0.2, rng.uniform(0.5, 0.95))
    table = _colour(rng.random(), 0.25, rng.uniform(0.35, 0.8))
    scene, board = Image.new("RGB", (big, big), wall), big * 0.24
    draw = ImageDraw.Draw(scene)
    draw.rectangle([0, board, big, board + big * 0.02], fill=tuple(c // 2 for c in wall))
    for n, other in enumerate(rng.choice(stock, shelf, replace=False) if shelf else []):
        size = big * rng.uniform(0.12, 0.17)
        x = big * (n + 0.5 + rng.uniform(-0.1, 0.1)) / shelf
        _place(scene, sprites[other], rng, x, board - size * 0.5, size, tilt=4)
    draw.rectangle([0, big * 0.80, big, big], fill=table)
    return scene


def _salesperson(rng, draw, unit, skin, shirt, hair):
    """Draw who sells -> where the two hands are, in pixels. unit: a hundredth of the frame's side."""
    middle = 50 * unit + rng.uniform(-6, 6) * unit
    draw.rounded_rectangle([middle - 20 * unit, 44 * unit, middle + 20 * unit, 104 * unit], 9 * unit, fill=shirt)
    draw.rectangle([middle - 4 * unit, 36 * unit, middle + 4 * unit, 47 * unit], fill=skin)
    draw.ellipse([middle - 11 * unit, 12 * unit, middle + 11 * unit, 42 * unit], fill=hair)
    draw.ellipse([middle - 9 * unit, 17 * unit, middle + 9 * unit, 41 * unit], fill=skin)
    hands = [[middle + sign * rng.uniform(18, 30) * unit, rng.uniform(50, 68) * unit] for sign in (-1, 1)]
    for sign, hand in zip((-1, 1), hands):
        elbow = [middle + sign * 27 * unit, 72 * unit]
        draw.line([middle + sign * 16 * unit, 50 * unit, *elbow], fill=shirt, width=round(9 * unit))
        draw.line([*elbow, *hand], fill=skin, width=round(6 * unit))
    return hands


def _staged(rng, kind, product, others, companion):
    """What is in the hands and what lies on the table in a frame of a kind: two lists of products."""
    lifted = kind == "lifted" or kind == "absent" and rng.random() < INSTEAD
    in_hands = {"held": [product], "occluded": [product], "two held": [product, rng.choice(others)],
                "pair": [product, companion]}.get(kind, [rng.choice(others)] if lifted else [])
    on_table = []
    if kind in ("lifted", "table") or kind == "absent" and rng.random() < 0.5:
        on_table = [*rng.choice(others, int(rng.integers(2, 4)), replace=False)] + [product] * (kind != "absent")
    return in_hands, on_table


def _frame(rng, scene, sprites, product, others, companion, kind, size, look, side):
    """One frame of a clip: RGB picture and the intended product's box (None when it is absent)."""
    left, top = (int(edge) for edge in rng.integers(0, scene.width - side + 1, 2))
    frame = scene.crop((left, top, left + side, top + side))
    draw, unit, skin, boxes = ImageDraw.Draw(frame), side / 100, look[0], {}
    hands = _salesperson(rng, draw, unit, *look)
    in_hands, on_table = _staged(rng, kind, product, others, companion)
    for which, place in zip(rng.permutation(on_table).astype(int), rng.permutation(len(on_table))):
        x = side * (place + 0.5 + rng.uniform(-0.08, 0.08)) / len(on_table)
        y, small = side * rng.uniform(0.80, 0.86), side * min(size, 0.30) * rng.uniform(0.8, 0.95)
        boxes[which] = _place(frame, sprites[which], rng, x, y, small, tilt=12)
    for which, (x, y) in zip(rng.permutation(in_hands).astype(int), rng.permutation(hands)):  # which hand tells nothing
        amount = size * rng.uniform(0.92, 1.08)
        boxes[which] = _place(frame, sprites[which], rng, x, y - 0.12 * amount * side, amount * side)
        for finger in range(3):
            fx, fy = x + (finger - 1) * 4 * unit, y + 4 * unit
            draw.ellipse([fx - 2.2 * unit, fy - 4 * unit, fx + 2.2 * unit, fy + 4 * unit], fill=skin)
    box = boxes.get(product)
    if kind == "occluded":                                              # a palm over a third to a half of the product
        x, y = rng.uniform(box[0], box[2]), rng.uniform(box[1], box[3])
        reach = size * side * rng.uniform(0.22, 0.3)
        draw.ellipse([x - reach, y - reach * 0.8, x + reach, y + reach * 0.8], fill=skin)
    light = rng.uniform(0.75, 1.15) * rng.uniform(0.94, 1.06, 3)
    frame = Image.fromarray((np.asarray(frame) * light).clip(max=255).astype(np.uint8))
    if rng.random() < BLUR:
        shift = (1, 0, rng.uniform(1, 3), 0, 1, rng.uniform(-1, 1))
        moved = Image.blend(frame, frame.transform(frame.size, Image.Transform.AFFINE, shift), 0.5)
        frame = moved.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    return frame, box


def _kinds(rng, frames, crowd, pair):
    """How each frame of a clip is staged, and its visible duration; a clip that is no pair shows its product held alone
    in CLEAR frames at least."""
    absent = min(frames - 2, round(rng.choice(list(ABSENT), p=list(ABSENT.values())) * frames / 8))
    duration = "short" if 1 - absent / frames < 0.7 else "medium" if absent else "long"
    drawn = rng.choice(list(KINDS[crowd]), frames - absent - CLEAR[duration], p=list(KINDS[crowd].values()))
    shown = ["pair"] * (frames - absent) if pair else ["held"] * CLEAR[duration] + [*drawn]
    return [str(kind) for kind in rng.permutation(shown + ["absent"] * absent)], duration


def _others(rng, product, products, decoys):
    """The products that may be in view with one, and the companion of a "pair" clip, None in other clips."""
    others = [other for other in range(len(products)) if other != product]
    alike, unlike = ([o for o in others if (products[o]["category"] == products[product]["category"]) == same]
                     for same in (True, False))
    pair = decoys == "natural" and bool(unlike) and rng.random() < PAIR
    if decoys == "same" or len(alike) >= 3 and not pair and rng.random() < SIMILAR:
        others = alike
    return others, int(rng.choice(unlike)) if pair else None


def _shop(rng, folder, products, sprites, side):
    """The shop images of a live's products, one each, on nearly white -> {image id: title} in order of the products."""
    titles = {}
    for product, sprite in zip(products, sprites):
        image_id = f"{int(rng.integers(10 ** 12)):012d}"
        words = [rng.choice(["new", "original", "classic", "hot", "premium"]), HUES[product["hue"]],
                 product["pattern"].replace("plain", ""), product["category"],
                 product["logo"] and f"with {product['logo']}", rng.choice(["free shipping", "sale", "2026", "gift"])]
        titles[image_id] = " ".join(filter(None, words))
        picture = Image.new("RGB", (side, side), (rng.integers(235, 256),) * 3)
        _place(picture, sprite, rng, side / 2, side / 2, side * rng.uniform(0.78, 0.9), tilt=3)
        picture.save(folder / f"{image_id}.jpg", quality=90)
    return titles


def _render_live(job):
    """Render one live, a function of (seed, split, number) alone -> its split, its id, its clips (dicts, whose first 11
    entries are the columns of a training row), {image id: title of its products}."""
    root, split, number, options = job
    side, frames, decoys = options["size"], options["frames"], options["decoys"]
    rng = np.random.default_rng((options["seed"], ("train", "val", "test").index(split), number))
    count = options["products"] if split == "train" else options["gallery"]
    products, family = _products(rng, options["categories"], count, decoys)
    sprites = [_sprite(product) for product in products]
    parts = rng.integers(0, [2 ** 32, 2 ** 16, 2 ** 16, 2 ** 16])
    live, clips = "-".join(f"{int(v):0{w}x}" for v, w in zip(parts, (8, 4, 4, 4))), []
    titles = _shop(rng, root / "images", products, sprites, side)
    again = max(0, options["clips"] - count) if split == "train" else 0          # some products are shown a second time
    chosen = [*rng.permutation(count), *rng.integers(0, count, again)]
    skin = _colour(0.07, rng.uniform(0.25, 0.6), rng.uniform(0.5, 0.95))
    shirt = _colour(rng.random(), rng.uniform(0, 0.35), rng.uniform(0.3, 0.9))
    look = skin, shirt, _colour(0.08, 0.5, rng.uniform(0.1, 0.5))
    for n, product in enumerate(map(int, chosen)):
        others, companion = _others(rng, product, products, decoys)
        scale, crowd = str(rng.choice(list(SIZES))), str(rng.choice(list(SHELF)))
        scene = _backdrop(rng, sprites, [product, *others], side, crowd)
        size, (kinds, duration) = rng.uniform(*SIZES[scale]), _kinds(rng, frames, crowd, companion is not None)
        asr = _asr(rng, products[product], companion is not None)
        start = 1667916000000 + number * 86400000 + n * (frames * 1000 + 30000)
        video_id = f"{live}-{start}-{start + frames * 1000}"
        frame_ids, boxes = [f"{video_id}-{t:04d}" for t in range(frames)], []
        for frame_id, kind in zip(frame_ids, kinds):
            picture, box = _frame(rng, scene, sprites, product, others, companion, kind, size, look, side)
            picture.save(root / "frames" / f"{frame_id}.jpg", quality=85)
            boxes.append(box or [])
        name, (image_id, title) = products[product]["category"], list(titles.items())[product]
        clips.append({
            "video_id": video_id, "frame_ids": frame_ids, "boxes": boxes, "image_id": image_id, "title": title,
            "category": list(CATEGORIES).index(name), "name": name, "asr": asr, "scale": scale,
            "duration": duration, "number": crowd, "kinds": kinds, "two in view": companion is not None,
            "near-identical": family.count(family[product]) > 1})
    return split, live, clips, titles


LIVESTREAMS = {"runs/livestreams": {}, "runs/livestreams-small": {                     # what train.py renders by itself
    "lives": 80, "test_lives": 20, "products": 25, "clips": 150, "gallery": 100, "frames": 10, "size": 160,
    "categories": 34}}
NUMBERS = {                # of a rendering: default, least, most, meaning
    "seed": (0, 0, 2 ** 63, "the same seed gives the same files"),
    "lives": (72, 1, 1_000_000, "training lives"),
    "val_lives": (4, 0, 1_000_000, "validation lives"),
    "test_lives": (10, 0, 1_000_000, "test lives"),
    "products": (24, 4, 1_000_000, "products of a training live"),
    "clips": (28, 1, 1_000_000, "clips of a training live, at least one for each product"),
    "gallery": (50, 4, 1_000_000, "products (and clips) of a val or test live"),
    "frames": (8, 4, 9999, "frames of a clip, one a second"),
    "size": (96, 32, 4096, "side of a frame in pixels"),
    "categories": (8, 1, len(CATEGORIES),
                   f"how many of the {len(CATEGORIES)} categories; the first 8 are {', '.join([*CATEGORIES][:8])}")}


def render(root, decoys="natural", processes=None, progress=True, **numbers):
    """Render livestreams into `root`, which appears when it is complete: a function of the numbers (see NUMBERS) alone.
    Lives share no product. decoys: "natural", any other product of the live, or "same", only those of the intended
    product's category (a stress test)."""
    options = {name: default for name, (default, *_) in NUMBERS.items()} | numbers
    for name, number in options.items():
        _, least, most, _ = NUMBERS[name]
        if not least <= number <= most:
            raise BadInput(f"--{name.replace('_', '-')} {number}: expected {least} to {most}")
    options["decoys"] = decoys
    root = Path(root)
    if root.exists():
        raise BadInput(f"{root} exists; render into another folder or remove it first")
    work = root.with_name(f"{root.name}.rendering")
    output_folder(root.parent)
    shutil.rmtree(work, ignore_errors=True)                              # what an interrupted rendering left
    for folder in ("annotations", "frames", "images"):
        output_folder(work / folder)
    counts = {"train": options["lives"], "val": options["val_lives"], "test": options["test_lives"]}
    jobs = [(work, split, n, options) for split, count in counts.items() for n in range(count)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        done = list(tqdm(pool.imap(_render_live, jobs), f"render {root}", len(jobs), unit="live", disable=not progress))
    for split in counts:
        lives = [live for of, *live in done if of == split]
        write_texts(work / "annotations", _annotations(split, lives) if lives else {})
    work.rename(root)


def _annotations(split, lives):
    """The annotations of a rendered split, from the lives as _render_live gives them: {file name: text}."""
    clips = [clip for _, clips, _ in lives for clip in clips]
    if split == "train":
        rows = ([entry if isinstance(entry, str) else json.dumps(entry) for entry in clip.values()] for clip in clips)
        return {"training_videoinfo_part_00.txt": "".join("\t".join(row[:11]) + "\n" for row in rows)}
    titles = [pair for _, _, titles in lives for pair in titles.items()]
    boxes, kinds = {}, {}
    for clip in clips:
        kinds |= zip(clip["frame_ids"], clip["kinds"])
        boxes |= {f: [[*box, clip["category"]]] if box else [] for f, box in zip(clip["frame_ids"], clip["boxes"])}
    files = {f"videoid_asr_{len(clips)}.txt": "".join(f"{clip['video_id']}\t{clip['asr']}\n" for clip in clips),
             f"image_title_{len(titles)}.txt": "".join(f"{image_id}\t{title}\n" for image_id, title in titles),
             f"videoid_to_gtimage_{len(clips)}.json": json.dumps({c["video_id"]: [c["image_id"]] for c in clips}),
             f"frameid2gtbox_{len(boxes)}.json": json.dumps(boxes),
             f"liveid_to_gallery_{len(lives)}.json": json.dumps({live: list(titles) for live, _, titles in lives}),
             f"frameid2kind_{len(kinds)}.json": json.dumps(kinds)}
    parts = {f"{name}_{value}": (name, value) for name, values in SPLITS.items() for value in values}
    parts |= {f"case_{case.replace(' ', '-')}": (case, True) for case in CASES}
    files |= {f"{part}.txt": "".join(f"{clip['video_id']}\n" for clip in clips if clip[name] == value)
              for part, (name, value) in parts.items()}
    return {f"{split}_{name}": text for name, text in files.items()}


def write_texts(folder, texts):
    """{file name: text} -> the files."""
    for name, text in texts.items():
        with whole(folder / name) as part:
            Path(part).write_text(text, encoding="utf-8")


# ------------------------------------------------------------------ a room of its own: checking a folder


def check(root, processes=None):
    """Print what is in a folder and what is wrong with it -> True when more than 1 % of anything is unusable."""
    root, found, boxes, images = Path(root), {}, Counter(), set()
    starts = {"train": "training_videoinfo", "val": "val", "test": "test"}
    splits = [split for split, start in starts.items() if any((root / "annotations").glob(f"{start}_*"))]
    if not splits:
        raise BadInput(f"{root}/annotations: no training_videoinfo_*.txt and no test files; "
                       "is this a data folder in the LPR4M layout?")
    _add(found, "files", [], len(splits))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for split in splits:
            try:
                lives = Lives(root, split, lambda text: _add(found, "rows", [text], 1))
                _check_split(lives, pool, found, boxes, images)
            except BadInput as error:
                _add(found, "files", [str(error)])
        jobs = ((root, (), None, [image_id]) for image_id in sorted(images))
        looked_at = pool.imap_unordered(_look, jobs, chunksize=64)
        for _, bad, _ in tqdm(looked_at, "check images", len(images), unit="image"):
            _add(found, "images", bad, 1)
    print(f"boxes: {boxes['kept']} whole, {boxes['clipped']} stick out of the picture and are clipped, "
          f"{boxes['dropped']} without area or outside are dropped")
    found["boxes"] = [boxes["dropped"], boxes.total(), []]
    for kind, (count, out_of, first) in found.items():
        if count:
            print(f"{kind}: {count} of {out_of} unusable", *(f"    {text}" for text in first), sep="\n")
    spoilt = [kind for kind, (count, out_of, _) in found.items() if count > 0.01 * out_of]
    print(f"more than 1 % unusable: {', '.join(spoilt)}" if spoilt else "fit for use")
    return bool(spoilt)


def _add(found, kind, texts, total=0):
    """Problems of a kind join those found: {kind: (how many, of how many, the first ten)}."""
    count, out_of, first = found.get(kind, (0, 0, []))
    found[kind] = count + len(texts), out_of + total, (first + texts)[:10]


def _check_split(lives, pool, found, boxes, images):
    """Every clip and frame of a split: adds to the problems found, the boxes counted and the shop images to look at."""
    counts, said, ids = Counter(), Counter(), np.full(len(lives), -1)
    with tqdm(total=len(lives), unit="clip", desc=f"check {lives.split}") as bar:
        for low in range(0, len(lives), 1000):                   # so many at a time that memory stays as it is
            waiting = []
            for i in range(low, min(low + 1000, len(lives))):
                try:
                    clip = lives.clip(i)
                except BadInput as error:
                    _add(found, "rows", [str(error)])
                    continue
                ids[i] = _number(clip.video_id.encode())
                boxes["dropped"] += clip.dropped
                images.update(clip.image_ids)
                counts.update(f"{value} {name}" for value, name in zip(clip.splits, SPLITS) if value)
                counts.update([lives.categories.get(clip.category, "(no category)")] if lives.split == "train" else ())
                for name, text in (("ASR", clip.asr), ("title", clip.title)):
                    said.update({name: bool(text), f"{name} words": len(text.split())})
                _add(found, "clips without frames", [] if clip.frame_ids else [clip.video_id])
                waiting.append((lives.root, clip.frame_ids, clip.boxes, ()))
            for frames, bad, tally in pool.imap_unordered(_look, waiting, chunksize=8):
                _add(found, "frames", bad, frames)
                boxes.update(tally)
            bar.update(min(1000, len(lives) - low))
    _add(found, "rows", [], len(lives))
    _add(found, "clips without frames", [], len(lives))
    order = np.argsort(ids, kind="stable")
    again = [int(i) for i in order[1:][np.diff(ids[order]) == 0] if ids[i] >= 0]
    texts = [f"{lives.where(i) if lives.split == 'train' else lives.split}: {lives.clip(i).video_id}" for i in again]
    _add(found, "ids given twice", texts, int((ids >= 0).sum()))
    if lives.split != "train":
        _check_partners(lives, found)
        images.update(image_id for gallery in lives.galleries.values() for image_id in gallery)
        counts = {f"{value} {name}": len(members) for (name, value), members in lives.members.items() if members}
    texts = "; ".join(f"{name} on {100 * said[name] / len(lives):.1f} %, "
                      f"{said[f'{name} words'] / max(1, said[name]):.1f} words" for name in ("ASR", "title"))
    print(f"{lives.split}: {len(lives)} clips, {lives.lengths.sum()} frames, {(lives.frame_counts > 0).sum()} clips "
          f"annotated; {texts}", *(f"    {name}: {count}" for name, count in sorted(counts.items())), sep="\n")


def _look(job):
    """Frames of a clip, or shop images -> how many, what is wrong with them, and how boxes lie in the frames."""
    root, frame_ids, boxes, image_ids = job
    lives, bad, tally = Lives.pictures(root), [], Counter()
    for t, name in enumerate([*frame_ids, *image_ids]):
        try:
            _, (width, height) = lives.frame(name) if t < len(frame_ids) else (lives.image(name), (0, 0))
        except BadInput as error:
            bad.append(str(error))
            continue
        for x1, y1, x2, y2, _ in boxes[t] if boxes else ():
            outside = min(x2, width) <= max(x1, 0) or min(y2, height) <= max(y1, 0)
            sticks = x1 < 0 or y1 < 0 or x2 > width or y2 > height
            tally["dropped" if outside else "clipped" if sticks else "kept"] += 1
    return len(frame_ids) + len(image_ids), bad, tally


def _check_partners(lives, found):
    """What of a test split has to meet: clips, true images, galleries, titles, splits; the counts in file names."""
    galleries = {v: lives.galleries.get(live_of(v)) for v in lives.video_ids if lives.galleries}
    apart = [v for v, ids in galleries.items() if ids is not None and not set(lives.positives.get(v, ())) & set(ids)]
    alone = [f"{v}: no ASR row" for v in lives.video_ids if v not in lives.asr]
    alone += [f"{lives.split}_{name}_{value}.txt: {v} is no clip" for (name, value), members in lives.members.items()
              for v in sorted(members - set(lives.video_ids))]
    _add(found, "lives without a gallery", [live_of(v) for v, ids in galleries.items() if ids is None], len(lives))
    _add(found, "clips whose true images are not in their gallery", apart, len(lives))
    _add(found, "ids without a partner", alone, len(lives))
    shown = {image_id for gallery in lives.galleries.values() for image_id in gallery}
    print(f"{lives.split}: {len(lives.galleries)} galleries of {len(shown)} images, "
          f"{sum(bool(lives.titles.get(image_id)) for image_id in shown)} with a title")
    for name, entries in (("videoid_asr", lives.asr), ("image_title", lives.titles),
                          ("videoid_to_gtimage", lives.positives), ("frameid2gtbox", lives.truth),
                          ("liveid_to_gallery", lives.galleries)):
        for path in (lives.root / "annotations").glob(f"{lives.split}_{name}_*"):
            expected = path.stem.rpartition("_")[2]
            says = f", its name says {expected}" if expected.isdigit() else ""
            print(f"    {path.name}: {len(entries)} entries{says}")


# ------------------------------------------------------------------ a room of its own: getting the real data


def link(download, root):
    """img2dataset's output (numbered pictures, each with a JSON side file of its url) -> root/frames and root/images.
    A picture's id is its url's last part; a frame's id ends in -start_ms-end_ms-index. Hard links, or copies across
    devices; what is there already is left. A frame stored at another size keeps its side file. -> counts"""
    if not Path(download).is_dir():
        raise BadInput(f"{download}: no such folder; expected what img2dataset wrote with --output_format files")
    done = {"linked": 0, "there before": 0, "failed to download": 0, "without an id": 0}
    sides = (os.path.join(folder, name) for folder, _, names in os.walk(download) for name in sorted(names)
             if name.endswith(".json") and not name.endswith("_stats.json"))
    with tqdm(sides, unit="picture", desc=f"link {download}") as bar:
        for side in bar:
            done[_link_picture(side, Path(root))] += 1
            bar.set_postfix(done, refresh=False)
    print(", ".join(f"{name}: {count}" for name, count in done.items()))
    return done


def _link_picture(side, root):
    """The picture of a side file gets its place in the layout -> what became of it."""
    try:
        if os.path.islink(side):                                    # may lead anywhere
            return "without an id"
        about = json.loads(Path(side).read_text(encoding="utf-8"))
        name = safe_id(Path(str(about["url"]).split("?")[0]).stem, side)
    except (ValueError, KeyError, TypeError, RecursionError, BadInput):
        return "without an id"
    for ending in (".jpg", ".png"):
        picture = side.removesuffix(".json") + ending
        if os.path.isfile(picture) and not os.path.islink(picture):
            kind = "frames" if re.fullmatch(r".*-\d+-\d+-\d+", name) else "images"
            target = root / kind / name[:2] / (name + ending)
            output_folder(target.parent)
            sizes = [(about.get(f"{when}width"), about.get(f"{when}height")) for when in ("original_", "")]
            if kind == "frames" and sizes[0] != sizes[1]:
                _link(side, target.with_suffix(".json"))
            return "linked" if _link(picture, target) else "there before"
    return "failed to download"


def _link(source, target):
    """-> False when the target was there."""
    if target.exists():
        return False
    try:
        os.link(source, target)
    except OSError:
        with whole(target) as part:                              # another device
            shutil.copyfile(source, part)
    return True


def movingfashion(source, root, processes=None):
    """MovingFashion (train.json, test.json, videos/, imgs/) -> the layout in `root`: a clip a video, a frame a second.
    A video that was done before is left, one that ffmpeg cannot read is left out. All test images form one gallery."""
    source, root = Path(source), Path(root)
    if not shutil.which("ffmpeg"):
        raise BadInput("movingfashion needs the program ffmpeg on PATH to cut videos into frames; install it "
                       "(apt install ffmpeg)")
    products = [(split, *product) for split in ("train", "test") for product in _fashion(source / f"{split}.json")]
    for name in ("annotations", "frames", "images"):
        output_folder(root / name)
    videos, gallery = [], []                                          # (split, image_id, video_id, path)
    for number, (split, key, image, paths) in enumerate(products):
        picture, image_id = inside(source / image, source).resolve(), f"{split}-{key}"
        ending = picture.suffix.lower().replace("jpeg", "jpg")
        if ending not in (".jpg", ".png"):
            raise BadInput(f"{source}/{split}.json: {key}: img_path: expected a .jpg or .png, found {image!r}")
        _link(picture, root / "images" / f"{image_id}{ending}")
        gallery += [image_id] if split == "test" else []
        videos += [(split, image_id, f"movingfashion-{number}-{n}", inside(source / path, source).resolve())
                   for n, path in enumerate(paths)]
    with ThreadPool(processes) as pool:
        cut = pool.imap(lambda video: _cut_video(*video[2:], root / "frames"), videos)
        counts = list(tqdm(cut, total=len(videos), unit="video", desc=f"cut {source}"))
    rows, test = [], {}
    for (split, image_id, video_id, _), count in zip(videos, counts):
        if count and split == "test":
            test[video_id] = [image_id]
        elif count:
            frame_ids = json.dumps([f"{video_id}-{t:04d}" for t in range(count)])
            rows.append("\t".join([video_id, frame_ids, "[]", image_id, *[""] * 7]) + "\n")
    write_texts(root / "annotations", {
        "training_videoinfo_movingfashion.txt": "".join(rows),
        "test_videoid_asr_movingfashion.txt": "".join(f"{video_id}\t\n" for video_id in test),
        "test_videoid_to_gtimage_movingfashion.json": json.dumps(test),
        "test_liveid_to_gallery_movingfashion.json": json.dumps({"movingfashion": gallery})})
    print(f"{len(rows) + len(test)} videos of {len(videos)} cut into {sum(counts)} frames; {counts.count(0)} could not "
          f"be read; {len(products)} shop images. Train with: python train.py --stage rice --view frame --data {root}")


def _fashion(path):
    """A JSON file of MovingFashion, {key: {img_path, video_paths, source}} -> [(key, image, [video, ...])]."""
    try:
        products = []
        for key, entry in json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object).items():
            image, videos = entry["img_path"], entry["video_paths"]
            if not isinstance(videos, list) or not all(isinstance(name, str) for name in (image, *videos)):
                raise TypeError(f"{key}: img_path is a text, video_paths a list of texts")
            products.append((safe_id(key, path), image, videos))
        return products
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: expected {{key: {{img_path, video_paths, source}}}}: "
                       f"{type(error).__name__} {error}") from None


def _cut_video(video_id, path, frames):
    """One frame a second of a video into frames/VIDEO_ID-INDEX.jpg -> how many; 0 when ffmpeg cannot read it."""
    if not (frames / f"{video_id}-0000.jpg").exists():
        with tempfile.TemporaryDirectory(dir=frames, prefix=".cut-") as work:
            command = ["ffmpeg", "-v", "error", "-nostdin", "-i", f"file:{path}", "-vf", "fps=1", "-q:v", "3",
                       "-start_number", "0", "-threads", "1", f"{work}/%04d.jpg"]
            if subprocess.run(command, capture_output=True).returncode or not os.listdir(work):
                return 0
            for name in sorted(os.listdir(work), reverse=True):    # the first frame comes last: once there, all are
                os.replace(f"{work}/{name}", f"{frames}/{video_id}-{name}")
    return next(n for n in itertools.count(1) if not (frames / f"{video_id}-{n:04d}.jpg").exists())


# ------------------------------------------------------------------ a room of its own: the commands


def main(argv=None):
    parser = Parser(description="Livestream data in the LPR4M layout: render, check, convert.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name, text, run, **folders):
        command = commands.add_parser(name, help=text, description=text,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        for folder, about in folders.items():
            command.add_argument(folder, help=about)
        return command

    def duplicates(given):
        import eval as evaluation                      # the one look upstairs: features need a model
        evaluation.duplicates(given.ckpt, given.dir, given.threshold)

    here = "data folder in the LPR4M layout"
    command = add("render", "render livestreams with boxes, shop images, titles and ASR", lambda given: render(
        given.dir, given.decoys, given.processes, **{name: getattr(given, name) for name in NUMBERS}),
        dir="folder to write; must not exist")
    for name, (default, _, _, about) in NUMBERS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=about)
    command.add_argument("--decoys", choices=["natural", "same"], default="natural", help="the other products in view: "
                         "any of the live, or only those of the intended one's category (a stress test)")
    add("check", "count what is in a data folder and list what is wrong; status 1 when more than 1 %% of anything is "
        "unusable", lambda given: sys.exit(int(check(given.dir, given.processes))), dir=here)
    add("link", "put what img2dataset downloaded into frames/ and images/",
        lambda given: link(given.download, given.dir), download="img2dataset's output folder", dir=here)
    add("movingfashion", "convert MovingFashion (needs the program ffmpeg)", lambda given: movingfashion(
        given.source, given.dir, given.processes), source="folder with train.json, test.json, videos/, imgs/", dir=here)
    for name in ("render", "check", "movingfashion"):
        commands.choices[name].add_argument("--processes", type=int, default=os.cpu_count(), help="processes at work")
    command = add("dedup", "list near-duplicate shop images in DIR/duplicates.txt; deletes none", duplicates, dir=here)
    command.add_argument("--ckpt", required=True, help="a RICE checkpoint, whose image features are compared")
    command.add_argument("--threshold", type=float, default=0.9, help="cosine above which two images are one")
    given = parser.parse_args(argv)
    if getattr(given, "processes", 1) < 1:
        parser.error(f"--processes {given.processes}: expected 1 or more")
    guarded(given.run, given)


if __name__ == "__main__":
    from data import main as command       # one module of this name, so that `guarded` knows its errors
    command()
