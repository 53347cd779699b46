"""Livestreams: the LPR4M layout on disk, items and batches, and a renderer that writes the layout.

    python data.py render runs/livestreams      the quickstart's data
    python data.py check DIR                    what is in a folder, and what is wrong with it
    python data.py link DOWNLOAD DIR            img2dataset's output -> frames/ and images/
    python data.py lpr750k SOURCE DIR           the public RICE code's data -> this layout
    python data.py movingfashion SOURCE DIR     MovingFashion -> this layout (needs ffmpeg)

DIR/annotations holds (SPLIT: test or val)
    training_videoinfo_*.txt             a clip a row, 11 columns by tab: video_id, frame_id list,
        box list, image_id, title, category id, category name, ASR, 3 that are not read
    SPLIT_videoid_asr_*.txt              video_id, ASR
    SPLIT_image_title_*.txt              image_id, title
    SPLIT_videoid_to_gtimage_*.json      {video_id: [image_id, ...]}
    SPLIT_frameid2gtbox_*.json           {frame_id: [[x1, y1, x2, y2(, category)], ...]}
    SPLIT_liveid_to_gallery_*.json       {live_id: [image_id, ...]}
    SPLIT_{scale,duration,number}_{value}.txt    video ids of a column of Table 1
    SPLIT_case_{name}.txt                video ids of a column of Table 2
    skip.txt                             training clips that are left out; check writes it
DIR/frames/FRAME_ID.jpg and DIR/images/IMAGE_ID.jpg (.jpeg, .png, .webp) may lie one folder down,
named by the first two letters of the id or by the clip. A FRAME_ID.json gives original_width and
original_height of a frame stored smaller: its boxes are pixels of that size.
video_id = live_id-start_ms-end_ms, frame_id = video_id-index; a live id may hold hyphens.

What is wrong with the data. Training: a row of another shape is left out when it is indexed (more
than 1 % of them: an error); a row that cannot be parsed and a picture that cannot be read stop
the training, unless `check` has put their clip into skip.txt. Evaluation: a frame that cannot be
read has no box (SD, MD) or is left out (RICE); a clip or a true image that cannot is a miss.

An item is a function of (seed, epoch, i), the order of the batches one of (seed, step).
Letters, the same in all files: B batch, T frames of a clip, M true boxes of a frame, H W pixels
of a batch or a picture, J tokens of a text.
"""
import argparse
import ast
import colorsys
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing.queues
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities")

# Columns of Table 1 in the order of eval.PAPER_1: new ones come last. _annotate writes their files.
SUBSETS = {"scale": ("small", "medium", "large"), "duration": ("short", "medium", "long"),
           "number": ("abundant", "medium", "few")}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # what DAB-DETR's weights expect
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", ".WEBP")
Image.MAX_IMAGE_PIXELS = 100_000_000 // 2    # Pillow raises beyond twice as many
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

# ---- errors, files, progress


class BadInput(Exception):
    """Something the user can mend; its text is the one line that is printed (status 2)."""


def require(condition, text):
    """BadInput with this text unless the condition holds."""
    if not condition:
        raise BadInput(text)


@contextlib.contextmanager
def expecting(text):
    """What reading a value raises becomes BadInput with this text."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{text} ({error})") from None


KILLED = "was a DataLoader worker killed? Try --workers 0, or docker run --shm-size 8g"
CURES = {"open files": "try ulimit -n 4096, or --workers 0",
         "DataLoader worker|shared memory|Connection re|EOFError": KILLED,
         "process pool": "was the memory short? Try --processes 1",
         "out of memory|allocate memory": "try --accum 4, --precision bf16 or a smaller --batch"}


def run_command(command, *arguments):
    """Run a command. What the user can mend ends in one line on stderr and status 2."""
    try:
        return command(*arguments)
    except (BadInput, OSError, EOFError, RuntimeError) as error:
        text = str(error).strip() or type(error).__name__
        line = text.splitlines()[-1]              # a loader process puts its traceback before it
        if not isinstance(error, BadInput):
            cures = [cure for said, cure in CURES.items() if re.search(said, text)]
            if isinstance(error, RuntimeError) and not cures:
                raise
            line = "; ".join([text.splitlines()[0], *cures[:1]])
        _end(f"error: {line.removeprefix('data.BadInput: ')}", 2)
    except KeyboardInterrupt:
        _end("stopped; training and box prediction go on from what they saved", 130)


def _end(line, status):
    """Print a last line and exit. What loader processes raise at their end says nothing new."""
    print(f"\n{line}", file=sys.stderr)
    sys.unraisablehook = lambda _: None
    sys.exit(status)


@contextlib.contextmanager
def atomic_write(path):
    """Write to a temporary file, then rename: yields the temporary path."""
    temporary = f"{path}.{os.getpid()}.part"
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or path       # a full disk does not say which file
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)


def rows_text(entries):
    """{key: text} as rows key<TAB>text."""
    return "".join(f"{key}\t{text}\n" for key, text in entries.items())


def write_text(path, text):
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def read_text(path):
    """A UTF-8 file, with or without a byte order mark."""
    with expecting(f"{path}: expected UTF-8 text"):
        return Path(path).read_text(encoding="utf-8-sig")


def progress_bar(iterable=None, text="", show=True, **more):
    return tqdm(iterable, desc=text, disable=not show, delay=1, mininterval=0.5, **more)


@contextlib.contextmanager
def process_pool(processes=None):
    # Unlike multiprocessing.Pool it notices when a process is killed.
    spawn, processes = multiprocessing.get_context("spawn"), processes or min(16, os.cpu_count())
    pool = ProcessPoolExecutor(processes, spawn, initializer=_start_pool_process)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_pool_process():
    """Ctrl-C ends a pool process without a word, and it ends when its parent was killed."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


# ---- index and splits
#
# LPR4M has 4 million training rows, too many to hold. The index keeps 53 bytes of each: where the
# row begins in its file, and what the order of batches needs. A row is parsed when it is asked for.


@dataclass
class Clip:
    """One clip. boxes[t] is [n,5]: x1 y1 x2 y2 in pixels and the category id (-1: not told)."""
    video_id: str
    frame_ids: list
    boxes: list | None          # None: the clip is not annotated
    image_ids: list             # the shop images of its product
    title: str
    asr: str
    category: int = -1


def live_of(video_id):
    return video_id.rsplit("-", 2)[0]


def parse_list(text, where):
    """A list written as JSON or as a Python literal. It is never evaluated as code."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = parse(text or "[]")
            if isinstance(value, list):
                return value
    raise BadInput(f'{where}: expected a list such as ["a", "b"], found {text[:40]!r}')


def parse_boxes(entry, category, where):
    """The boxes of one frame -> [n,5]. An entry is a box or a list of boxes, each of 4 numbers or
    5, the last its category; [] or zeros: no box. Boxes without area are left out."""
    with expecting(f"{where}: expected x1, y1, x2, y2(, category), found {str(entry)[:60]}"):
        rows = entry or []
        if rows and not isinstance(rows[0], list):
            rows = [rows]
        boxes = np.array([row if len(row) == 5 else [*row, category] for row in rows], float)
        boxes = np.asarray_chkfinite(boxes.reshape(-1, 5))
        if (boxes[:, 2:4] < boxes[:, :2]).any():
            raise ValueError("x2 < x1 or y2 < y1: is it x, y, width, height?")
        if 0 < boxes[:, :4].max(initial=0) <= 1:
            raise ValueError("expected pixels, not 0..1")
    return boxes[(boxes[:, 2:4] > boxes[:, :2]).all(1)]


INDEX_DTYPE = np.dtype([("offset", "i8"), ("video", "i8"), ("product", "i8"), ("live", "i8"),
                        ("row", "i4"), ("length", "i4"), ("annotated", "?")])


def columns_of(line, tab="\t"):
    """The columns of a row by tab, without spaces and line ends: text, or bytes with tab=b"\\t"."""
    return [column.strip() for column in line.split(tab)]


def hash_id(name):
    """A 56-bit hash of an id (bytes), -1 for an empty one."""
    digest = hashlib.blake2b(name, digest_size=7).digest()
    return int.from_bytes(digest, "big") if name else -1


def index_row(columns, offset, row):
    """The index entry (INDEX_DTYPE) of a training row from its columns (bytes); ValueError if
    malformed."""
    if len(columns) != 11:
        raise ValueError(f"expected 11 columns by tab, found {len(columns)}")
    int(columns[5] or b"0")
    length = columns[1].count(b",") + (columns[1].strip(b" []") != b"")
    # [] for the whole row: not annotated. [] for one frame: the product is not there.
    annotated = columns[2].replace(b" ", b"") not in (b"", b"[]")
    video, product = hash_id(columns[0]), hash_id(columns[3])
    live = hash_id(columns[0].rsplit(b"-", 2)[0])
    return offset, video, product, live, row, length, annotated


def index_training_file(path):
    """Index of a training file, {category id: name}, and a note on malformed rows, which are left
    out. All three are kept beside the file until it changes."""
    stamp = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    cache = path.with_name(f".{path.name}.index.npz")
    with contextlib.suppress(Exception), np.load(cache) as saved:      # missing, old or corrupt
        if str(saved["stamp"]) == stamp and saved["index"].dtype == INDEX_DTYPE:
            names = json.loads(str(saved["categories"]))
            return saved["index"], {int(c): name for c, name in names.items()}, str(saved["note"])
    tables, rows, malformed = [], [], []
    categories = {}
    offset = number = 0
    bar = progress_bar(text=f"index {path.name}", total=path.stat().st_size, unit="B",
                       unit_scale=True)
    with bar, open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf")
            columns = columns_of(text, b"\t")
            try:
                if text.strip():
                    rows.append(index_row(columns, offset, number))
                    if columns[5]:
                        categories.setdefault(int(columns[5]), columns[6].decode(errors="replace"))
            except ValueError as error:
                malformed.append(f"{path}:{number}: {error}")
            if len(rows) == 65536:       # a table takes a tenth of the memory of a list
                tables.append(np.array(rows, INDEX_DTYPE))
                rows = []
            offset += len(line)
            bar.update(len(line))
    note = f"{malformed[0]}; {len(malformed)} of {number} rows left out" if malformed else ""
    require(len(malformed) <= 0.01 * number,
            f"{note} would be more than 1 %: is this a training file?")
    index = np.concatenate([*tables, np.array(rows, INDEX_DTYPE)])
    with contextlib.suppress(OSError), atomic_write(cache) as part, open(part, "wb") as file:
        np.savez(file, stamp=stamp, index=index, note=note, categories=json.dumps(categories))
    return index, categories, note


class LPRSplit:
    """One split ("train", "val" or "test") of a data folder; `clip(i)` parses clip i when asked.

    Of every split: lengths [clips], the frames of each; annotated_lengths [clips], the same, 0 for
    training clips without boxes and for a split without any; notes, what was left out.
    Of "train": product and live [clips] (hashed ids, -1: none) and categories {id: name}; class k
    of a detector is the k-th. heed_skip: leave out the clips of skip.txt.
    Of the others, by id: video_ids, frames, gt_boxes, asr, titles, positives (true images),
    galleries, subsets (columns of Table 1) and cases (of Table 2). A test clip is any with an ASR
    row, a true image or an entry in the box file; its frames are those there and those on disk.
    """

    def __init__(self, root, name, heed_skip=True):
        self.root, self.name, self.notes = Path(root), name, []
        self.annotations = self.root / "annotations"
        require(self.annotations.is_dir(),
                f"{root}: no annotations/; `python data.py render {root}` makes one")
        if name == "train":
            self._index_training_files(heed_skip)
        else:
            self._read_evaluation_files()
        why = "".join(f" ({note})" for note in self.notes)
        require(len(self), f"{self.annotations}: no clips in the {name} split{why}")

    def __len__(self):
        return len(self.lengths)

    def _index_training_files(self, heed_skip):
        self.files = sorted(self.annotations.glob("training_videoinfo_*.txt"))
        parts, categories = [], {}
        for path in self.files:
            index, names, note = index_training_file(path)
            parts.append(index)
            categories |= names
            if note:
                self.notes.append(note)
        self.categories = dict(sorted(categories.items()))
        self.index = np.concatenate([np.zeros(0, INDEX_DTYPE), *parts])
        self.file = np.repeat(np.arange(len(parts)), list(map(len, parts)))
        repeated = len(self.index) - len(np.unique(self.index["video"]))
        if repeated:
            self.notes.append(f"{self.annotations}: {repeated} training rows have the video_id of "
                              "a row before them: is a file there twice?")
        keep, skip_file = np.full(len(self.index), True), self.annotations / "skip.txt"
        if heed_skip and skip_file.exists():
            lines = read_text(skip_file).splitlines()
            skipped = [hash_id(line.partition("\t")[0].encode()) for line in lines]
            keep, annotated = ~np.isin(self.index["video"], skipped), self.index["annotated"]
            self.notes.append(
                f"{skip_file}: {(~keep).sum()} of {len(keep)} clips left out, of those with boxes "
                f"{(~keep & annotated).sum()} of {annotated.sum()}")
        self._keep(keep)

    def _keep(self, rows):
        """Keep these clips of a training split."""
        self.index, self.file = self.index[rows], self.file[rows]
        self.lengths, self.product = self.index["length"], self.index["product"]
        self.live = self.index["live"]
        self.annotated_lengths = self.lengths * self.index["annotated"]

    def _read(self, pattern):
        """This split's file of that name: rows by tab -> {id: text}, JSON -> {id: list}."""
        paths, rows = sorted(self.annotations.glob(f"{self.name}_{pattern}")), {}
        if len(paths) > 1:
            raise BadInput(f"{paths[0]} and {paths[1].name}: which one? Keep one {pattern}")
        if paths and pattern.endswith(".json"):
            with expecting(f"{paths[0]}: expected a JSON object {{id: [...], ...}}"):
                rows = json.loads(read_text(paths[0]) or "{}")
                for key, entry in rows.items():
                    if not isinstance(entry, list):
                        raise ValueError(f"{key} has no list")
        elif paths:
            for line in read_text(paths[0]).split("\n"):
                key, _, text = line.partition("\t")
                if key.strip():
                    rows[key.strip()] = text.strip()
        return rows

    def _read_evaluation_files(self):
        self.asr, self.titles = self._read("videoid_asr_*.txt"), self._read("image_title_*.txt")
        self.positives = self._read("videoid_to_gtimage_*.json")
        self.galleries = self._read("liveid_to_gallery_*.json")
        self.gt_boxes = self._read("frameid2gtbox_*.json")
        self.subsets, self.cases = {}, {}
        for name, values in SUBSETS.items():
            for value in values:
                self.subsets[f"{value} {name}"] = self._read(f"{name}_{value}.txt")
        for path in sorted(self.annotations.glob(f"{self.name}_case_*")):
            name = path.stem.split("_case_")[1]
            self.cases[name] = self._read(f"case_{name}.txt")
        self.frames = {video_id: set() for video_id in [*self.asr, *self.positives]}
        for frame_id in self.gt_boxes:
            self.frames.setdefault(frame_id.rpartition("-")[0], set()).add(frame_id)
        for frame_id in self._frames_on_disk():
            self.frames[frame_id.rpartition("-")[0]].add(frame_id)
        with expecting(f"{self.root}: a frame id does not end in -index"):
            for video_id, ids in self.frames.items():
                self.frames[video_id] = sorted(ids, key=lambda f: int(f.rpartition("-")[2]))
        self.video_ids = list(self.frames)
        self.lengths = np.array(list(map(len, self.frames.values())), np.int64)
        self.annotated_lengths = self.lengths * bool(self.gt_boxes)
        unlisted = self.lengths.sum() - len(self.gt_boxes)
        if self.gt_boxes and unlisted:
            self.notes.append(f"{self.name}: {len(self.gt_boxes)} frames in the box file, "
                              f"{unlisted} more on disk, which show no product")

    def _frames_on_disk(self):
        """Ids of the frames in frames/ that belong to a clip of this split."""
        root, named = self.root / "frames", set(self.frames)
        named.update([video_id[:2] for video_id in self.frames])
        folders = [root] if root.is_dir() else []
        for folder in folders:                     # a folder that is found is looked into as well
            for entry in os.scandir(folder):
                frame_id, ending = os.path.splitext(entry.name)
                if ending in ENDINGS and frame_id.rpartition("-")[0] in self.frames:
                    yield frame_id
                elif folder == root and entry.name in named and entry.is_dir():
                    folders.append(entry.path)

    def subset(self, count):
        """Cut a training split to `count` clips of different products, to be evaluated on too."""
        if self.annotated_lengths.any():
            self._keep(self.annotated_lengths > 0)
        # A clip without a shop image counts as a product of its own.
        product = np.where(self.product >= 0, self.product, -2 - np.arange(len(self)))
        self._keep(np.sort(np.unique(product, return_index=True)[1])[:count])
        self.video_ids, self.subsets, self.cases, self.galleries = [], {}, {}, {}
        self.gt_boxes, self.titles, self.positives = {}, {}, {}
        for clip in map(self.clip, range(len(self))):
            self.video_ids.append(clip.video_id)
            for frame_id, boxes in zip(clip.frame_ids, clip.boxes or []):
                self.gt_boxes[frame_id] = boxes.tolist()
            self.titles |= dict.fromkeys(clip.image_ids, clip.title)
            self.positives[clip.video_id] = clip.image_ids
        for video_id in self.video_ids:
            self.galleries[live_of(video_id)] = list(self.titles)

    def clip(self, i):
        """Clip i; BadInput with file:row, or the id of a test frame, when it cannot be parsed."""
        if self.name == "train":
            return self._training_clip(i)
        video_id, where = self.video_ids[i], f"{self.root}: true boxes of"
        frame_ids, images = self.frames[video_id], self.positives.get(video_id, [])
        boxes = [parse_boxes(self.gt_boxes.get(f), -1, f"{where} {f}") for f in frame_ids]
        title = self.titles.get(images[0], "") if images else ""
        return Clip(video_id, frame_ids, boxes if self.gt_boxes else None, images, title,
                    self.asr.get(video_id, ""))

    def training_row(self, i):
        """file:row of training clip i, and its columns."""
        path = self.files[self.file[i]]
        with open(path, "rb") as file:
            file.seek(self.index["offset"][i])
            line = file.readline().decode("utf-8-sig", "replace")
        return f"{path}:{self.index['row'][i]}", columns_of(line)

    def _training_clip(self, i):
        where, columns = self.training_row(i)
        require("\ufffd" not in "".join(columns), f"{where}: expected UTF-8 text")
        video_id, frames, boxes, image_id, title, category, _, asr, *_ = columns
        clip = Clip(video_id, parse_list(frames, f"{where}: frame_id list"), None,
                    [image_id] if image_id else [], title, asr, int(category or -1))
        if self.index["annotated"][i]:
            entries = parse_list(boxes, f"{where}: box list")
            require(len(entries) == len(clip.frame_ids),
                    f"{where}: {len(clip.frame_ids)} frames, {len(entries)} boxes")
            clip.boxes = [parse_boxes(entry, clip.category, f"{where}: box list, frame {t}")
                          for t, entry in enumerate(entries)]
        return clip

    def image(self, image_id):
        """Shop image, uint8 [3,H,W]."""
        return read_picture(self.path("images", image_id))

    def frame(self, frame_id):
        """Frame uint8 [3,H,W], and the (width, height) in pixels that its boxes refer to."""
        path = self.path("frames", frame_id)
        image = read_picture(path)
        return image, original_size(path, image.shape[2], image.shape[1])

    def path(self, folder, name):
        """The path of a frame or an image; BadInput when it is missing."""
        base = self.root / folder
        flat = path_inside(base, name)
        for path in (flat, f"{base}/{name[:2]}/{name}", f"{base}/{name.rpartition('-')[0]}/{name}"):
            for ending in ENDINGS:
                if os.path.isfile(path + ending):
                    return path + ending
        raise BadInput(f"{flat}.jpg: missing (nor .png, .webp, nor in {name[:2]}/); `python "
                       f"data.py check {self.root}` finds all that is missing")


# ---- pictures


def path_inside(folder, name):
    """folder/name; BadInput when the id could lead out of the folder."""
    if not isinstance(name, str) or not name or name[0] == "." or re.search(r"[/\\\0]", name):
        raise BadInput(f"{folder}: {str(name)[:60]!r} is no id (a text without / and leading dot)")
    return f"{folder}/{name}"


def original_size(path, width, height):
    """The (width, height) that the boxes of a frame refer to: of its side file, or its own."""
    side_file = f"{os.path.splitext(path)[0]}.json"
    if not os.path.exists(side_file):
        return width, height
    with expecting(f"{side_file}: expected original_width and original_height"):
        about = json.loads(read_text(side_file))
        return int(about["original_width"]), int(about["original_height"])


def check_picture(path, content=None):
    """(format, width, height) of a picture by its header; BadInput when it is none of ours.
    content: the bytes of its file, where they are read already."""
    try:
        with Image.open(io.BytesIO(content) if content else path) as picture:
            kind, size, found = picture.format, picture.size, f"is a {picture.format}"
    except Exception as error:          # a decoder raises whatever the bytes lead to
        kind, size, found = None, (), f"no picture that can be read: {type(error).__name__}"
    require(kind in ("JPEG", "MPO", "PNG", "WEBP"), f"{path}: {found}, expected JPEG, PNG or WebP")
    return kind, *size


def read_picture(path):
    """A JPEG, PNG or WebP as uint8 [3,H,W], upright by its EXIF data, on white where it is
    transparent. BadInput when it cannot be read."""
    kind = "picture that can be read"
    try:
        content = Path(path).read_bytes()
        kind, *_ = check_picture(path, content)
        if kind in ("JPEG", "MPO"):
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            return decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
        with Image.open(io.BytesIO(content)) as picture:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):            # 16 bits
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        white = Image.new("RGBA", picture.size, "white")
        return TF.pil_to_tensor(Image.alpha_composite(white, picture.convert("RGBA")))[:3]
    except (RuntimeError, OSError, SyntaxError):
        raise BadInput(f"{path}: not a whole {kind}") from None


def even_frames(count, frames):
    """At most `frames` positions among `count` frames, at even intervals (supplement, 2.2)."""
    if count <= frames:
        return list(range(count))
    return [int((i + 0.5) * count / frames) for i in range(frames)]


# ---- tokenizer


def train_tokenizer(texts, vocab=2000):
    """A sentencepiece model of the texts as uint8 [bytes], empty when there is no text. Characters
    beyond the vocab / 2 most frequent are written as bytes, so that any script fits."""
    texts = [text[:2000] for text in texts if text.strip()]
    require(vocab >= 600, f"--vocab {vocab}: expected 600 or more")
    if not texts:
        return torch.zeros(0, dtype=torch.uint8)
    characters = Counter()
    for text in texts:
        characters.update(text)
    if len(characters) > vocab // 2:
        rare = {ord(character): " " for character, _ in characters.most_common()[vocab // 2:]}
        texts = [text.translate(rare) for text in texts]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab, pad_id=3,
        hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0,
        max_sentence_length=2 ** 20, input_sentence_size=500_000, num_threads=1, minloglevel=2)
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


class Tokenizer:
    """Text -> token ids [J]: a start token (1), the pieces of the text, padding (0).
    model: what train_tokenizer gave."""

    def __init__(self, model, length=24):
        self.length, self.pieces = length, None
        if len(model):
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model.numpy().tobytes())
        self.vocab = 2 + (self.pieces.get_piece_size() if self.pieces else 0)

    def __call__(self, text):
        ids = self.pieces.encode(text)[:self.length - 1] if self.pieces else []
        return torch.tensor([1] + [i + 2 for i in ids] + [0] * (self.length - 1 - len(ids)))


# ---- what a detector sees


class FrameDataset(Dataset):
    """Frames with their boxes, `frames` at a time: 1 in SD's training (an item a frame), else more
    (an item a clip, in MD's training the same even frames in every epoch).

    Item: a list of dicts, see load. categories: ids in order of class. short_side: (lowest,
    highest, step) of the shortest side, drawn in training, the highest in evaluation; long_side:
    limit of the longest (supplement, 2.2). Evaluation with every_frame cuts a longer clip into
    several items that interleave; without it, it takes `frames` even ones. augment=False: pictures
    as in evaluation.
    """

    def __init__(self, split, categories, frames, short_side, long_side, train=False, seed=0,
                 every_frame=True, augment=True):
        self.split, self.frames, self.train, self.seed = split, frames, train, seed
        self.class_of = {category: k for k, category in enumerate(categories)}
        self.short_side, self.long_side, self.augment = short_side, long_side, train and augment
        counts = split.annotated_lengths if train else split.lengths
        all_frames = (frames == 1) if train else every_frame
        self.items_per_clip = np.minimum(counts, 1)
        if all_frames:
            self.items_per_clip = -(-counts // frames)             # rounded up
        self.cumulative_items = np.concatenate([[0], np.cumsum(self.items_per_clip)])
        require(len(self) or not train, f"{split.root}: no training clip has boxes, so no detector "
                "can be trained; RICE can: --stage rice --box-source none")

    def __len__(self):
        return int(self.cumulative_items[-1])

    def __getitem__(self, key):
        epoch, i = key
        c = int(np.searchsorted(self.cumulative_items, i, side="right")) - 1
        clip = self.split.clip(c)
        count = len(clip.frame_ids)
        chosen = even_frames(count, self.frames)
        # A long clip makes several items; item `part` has the frames part, part + parts, ...
        parts, part = self.items_per_clip[c], i - self.cumulative_items[c]
        if parts > 1:
            chosen = range(part, count, parts)
        rng = np.random.default_rng((self.seed, epoch, i))
        low, high, step = self.short_side
        side = high
        if self.augment:
            side = low + step * int(rng.integers((high - low) // step + 1))
        mirror = self.augment and rng.random() < 0.5
        return [self.load(clip, int(t), side, mirror) | {"clip": c} for t in chosen]

    def load(self, clip, t, side, mirror):
        """Frame t: image uint8 [3,H,W] (None: unreadable, in evaluation), boxes_cxcywh [M,4] in
        0..1, cut at its border, labels [M] (none in evaluation), size (w, h) in pixels of boxes."""
        try:
            image, size = self.split.frame(clip.frame_ids[t])
        except BadInput:
            if self.train:                # `check` puts such clips into skip.txt
                raise
            return {"frame_index": t, "image": None}
        height, width = image.shape[1:]
        scale = min(side / min(height, width), self.long_side / max(height, width))
        image = TF.resize(image, [max(1, round(height * scale)), max(1, round(width * scale))])
        boxes = clip.boxes[t] if self.train else np.zeros((0, 5))
        xyxy = torch.from_numpy(boxes[:, :4] / np.tile(size, 2)).clamp(0, 1).float()
        inside = (xyxy[:, 2:] > xyxy[:, :2]).all(1)
        with expecting(f"{self.split.root}: a training box has a category (-1: none given) that "
                       f"is none of column 6: {[*self.class_of][:40]}"):
            labels = torch.tensor([self.class_of[c] for c in boxes[:, 4]], dtype=torch.long)
        cxcywh = box_convert(xyxy[inside], "xyxy", "cxcywh")
        if mirror:
            image, cxcywh[:, 0] = image.flip(2), 1 - cxcywh[:, 0]
        return {"frame_index": t, "image": image, "boxes_cxcywh": cxcywh, "labels": labels[inside],
                "size": size}


def collate_detection(items):
    """Items of FrameDataset -> frames uint8 [B,T,3,H,W], padding_mask [B,T,H,W], valid [B,T]
    (False: no such frame, or unreadable), boxes_cxcywh [B,T,M,4], labels [B,T,M] (-1: no box),
    size [B,T,2] (w, h), frame_index [B,T] (-1: no such frame), clip [B]."""
    B, T = len(items), max(map(len, items))
    read = [frame for item in items for frame in item if frame["image"] is not None]
    H, W = np.max([(16, 16)] + [frame["image"].shape[1:] for frame in read], 0)
    M = max([1] + [len(frame["labels"]) for frame in read])
    # Channels last in memory, as convolutions want it.
    batch = {"frames": torch.zeros(B, T, H, W, 3, dtype=torch.uint8).movedim(-1, 2),
             "padding_mask": torch.ones(B, T, H, W, dtype=torch.bool),
             "valid": torch.zeros(B, T, dtype=torch.bool), "boxes_cxcywh": torch.zeros(B, T, M, 4),
             "labels": torch.full((B, T, M), -1), "size": torch.ones(B, T, 2),
             "frame_index": torch.full((B, T), -1),
             "clip": torch.tensor([item[0]["clip"] for item in items])}
    for b, item in enumerate(items):
        for t, frame in enumerate(item):
            batch["frame_index"][b, t] = frame["frame_index"]
            if frame["image"] is None:
                continue
            (_, h, w), boxes = frame["image"].shape, len(frame["labels"])
            batch["frames"][b, t, :, :h, :w] = frame["image"]
            batch["padding_mask"][b, t, :h, :w] = False
            batch["valid"][b, t] = True
            batch["boxes_cxcywh"][b, t, :boxes] = frame["boxes_cxcywh"]
            batch["labels"][b, t, :boxes] = frame["labels"]
            batch["size"][b, t] = torch.tensor(frame["size"])
    return batch


@functools.cache
def norm_stats(device, statistics):
    """Mean and deviation [3,1,1] on a device, sent there once."""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in statistics]


def normalize(pixels, statistics, padding_mask=None):
    """uint8 pictures [...,3,H,W] -> normalised floats, 0 where padded, as DETR has them."""
    mean, std = norm_stats(pixels.device, statistics)
    pixels = (pixels.float() / 255 - mean) / std
    return pixels if padding_mask is None else pixels.masked_fill(padding_mask.unsqueeze(-3), 0)


# ---- what RICE sees


@dataclass
class Boxes:
    """The boxes that clips are seen through. Those of clip c are rows start[c]:start[c+1] of
    frame_index [rows] and box [rows,6]: x1 y1 x2 y2 in pixels, and two numbers that RICE does not
    see, score and class."""
    start: np.ndarray
    frame_index: np.ndarray
    box: np.ndarray


def true_boxes(split):
    """The first true box of each frame that has one -> Boxes."""
    start, rows = [0], []
    for c in range(len(split)):
        clip = split.clip(c) if split.annotated_lengths[c] else None       # parsing takes long
        for t, boxes in enumerate(clip.boxes if clip else []):
            rows += [(t, *boxes[0, :4], 1, boxes[0, 4])] if len(boxes) else []
        start.append(len(rows))
    table = np.array(rows, np.float32).reshape(-1, 7)
    return Boxes(np.array(start), table[:, 0].astype(int), table[:, 1:])


def crop_square(image, box_xyxy, size, margin=1.15):
    """The square around a pixel box, a little larger than it, black outside of the picture:
    uint8 [3,H,W] -> [3,size,size]."""
    x1, y1, x2, y2 = (float(v) for v in box_xyxy)
    half = max(4.0, max(x2 - x1, y2 - y1) * margin) / 2
    left, top, side = round((x1 + x2) / 2 - half), round((y1 + y2) / 2 - half), round(2 * half)
    return TF.resize(TF.crop(image, top, left, side, side), (size, size))


def resize_and_crop(image, size, crop, rng=None):
    """A picture resized to a square of side size / crop, of which size x size pixels stay, from
    the middle or, with rng, from anywhere: uint8 [3,H,W] -> [3,size,size]."""
    side = round(size / crop)
    image, room = TF.resize(image, (side, side)), side - size
    top, left = rng.integers(room + 1, size=2).tolist() if rng else (room // 2, room // 2)
    return TF.crop(image, top, left, size, size)


class ClipDataset(Dataset):
    """Clips with their texts and, in training, their shop image, as RICE sees them.

    Item: frames uint8 [T,3,H,W], valid [T] (False: filled up), asr [J], title [J], clip; in
    training image uint8 [3,H,W] and product_id. boxes: a frame is seen as the square around its
    box; None, or no box in the clip: whole frames. text: "asr", "title", "both" or "none".
    crop: share of the side that is kept of whole frames and images. Training draws `frames` of
    the frames with a box, evaluation takes them at even intervals and leaves out what it cannot
    read. augment=False: nothing is drawn at random.
    """

    def __init__(self, split, tokenizer, frames, size, boxes, train=False, seed=0, text="both",
                 augment=True, crop=1.0):
        self.split, self.tokenizer, self.frames, self.size = split, tokenizer, frames, size
        self.boxes, self.train, self.seed, self.text = boxes, train, seed, text
        self.augment, self.crop, self.clips = train and augment, crop, np.arange(len(split))
        if train:
            self.clips = np.flatnonzero((split.product >= 0) & (split.lengths > 0))
        require(len(self.clips),
                f"{split.root}: no training clip has frames and names a shop image")

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        epoch, i = key
        c = int(self.clips[i])
        clip = self.split.clip(c)
        rng = np.random.default_rng((self.seed, epoch, i))
        views = self.views_of(c, len(clip.frame_ids))
        chosen = even_frames(len(views), self.frames)
        if self.augment and len(views) > self.frames:
            chosen = sorted(rng.choice(len(views), self.frames, replace=False))
        frames, read = torch.zeros(self.frames, 3, self.size, self.size, dtype=torch.uint8), 0
        for j in chosen:
            t, box = views[j]
            try:
                frames[read] = self.view(clip.frame_ids[t], box, rng)
                read += 1
            except BadInput:
                if self.train:            # `check` puts such clips into skip.txt
                    raise
        item = {"frames": frames, "valid": torch.arange(self.frames) < read, "clip": c}
        for name in ("asr", "title"):
            item[name] = self.tokenizer(getattr(clip, name) if self.text in (name, "both") else "")
        if self.train:
            image = self.whole(self.split.image(clip.image_ids[0]), rng)
            item |= {"image": image, "product_id": int(self.split.product[c])}
        return item

    def views_of(self, c, frames):
        """[(frame, box), ...] of clip c; without any box all frames, and None for the box."""
        views = []
        if self.boxes:
            for row in range(self.boxes.start[c], self.boxes.start[c + 1]):
                views.append((self.boxes.frame_index[row], self.boxes.box[row, :4]))
        return views or [(t, None) for t in range(frames)]

    def view(self, frame_id, box, rng):
        """A frame through its box, or whole -> uint8 [3,size,size]."""
        image, size = self.split.frame(frame_id)
        if box is None:
            return self.whole(image, rng)
        height, width = image.shape[1:]
        edges = np.array([width, height, width, height])
        box = (box * (edges / np.tile(size, 2))).clip(0, edges)
        if self.augment:
            box = box + np.tile(rng.uniform(-0.06, 0.06, 2) * (box[2:] - box[:2]), 2)
        return self.jitter(crop_square(image, box, self.size), rng)

    def whole(self, image, rng):
        image = resize_and_crop(image, self.size, self.crop, rng if self.augment else None)
        return self.jitter(image, rng)

    def jitter(self, image, rng):
        """In training: half of the pictures are mirrored, all are in a slightly other light."""
        if not self.augment:
            return image
        image = image.flip(2) if rng.random() < 0.5 else image
        light = rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, (3, 1, 1))
        return (image * torch.from_numpy(light).float()).clamp(0, 255).to(torch.uint8)


class GalleryDataset(Dataset):
    """Shop images `ids`. Item: image uint8 [3,size,size], title [J], valid (False: it cannot be
    read). read: id -> uint8 [3,H,W] or BadInput. titles: {id: text}. crop: see ClipDataset."""

    def __init__(self, read, titles, tokenizer, size, ids, crop=1.0):
        self.read, self.titles, self.tokenizer = read, titles, tokenizer
        self.size, self.ids, self.crop = size, ids, crop

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, key):
        image_id, item = self.ids[key[1]], {"valid": True}
        item["title"] = self.tokenizer(self.titles.get(image_id, ""))
        try:
            return item | {"image": resize_and_crop(self.read(image_id), self.size, self.crop)}
        except BadInput:
            image = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return item | {"image": image, "valid": False}


# ---- order of batches


def grouped_epoch_order(live_ids, per_live):
    """Order of one epoch for RICE: groups of `per_live` clips of one live in random order, so
    that a batch holds negatives of the same shop; 1: random order. -> a function of rng"""
    if per_live == 1:                    # millions of groups of one clip take seconds and memory
        return lambda rng: rng.permutation(len(live_ids))
    by_live = np.argsort(live_ids, kind="stable")
    members = np.split(by_live, np.flatnonzero(np.diff(live_ids[by_live])) + 1)

    def order(rng):
        groups = []
        for clips in members:
            clips = rng.permutation(clips)
            groups += [clips[k:k + per_live] for k in range(0, len(clips), per_live)]
        return np.concatenate([groups[g] for g in rng.permutation(len(groups))])
    return order


def training_batches(order, batch, steps, start=0, seed=0, rank=0, world=1):
    """Batches of (epoch, i) for steps start .. steps, a function of (seed, step). order(rng): the
    items of one epoch. `batch` counts the items of all processes; this one gets its share."""
    @functools.lru_cache(1)                      # an epoch serves many batches
    def order_of(epoch):
        return order(np.random.default_rng((seed, epoch)))

    count, share = len(order_of(0)), batch // world
    for step in range(start, steps):
        first = step * batch + rank * share
        positions = [divmod(n, count) for n in range(first, first + share)]
        yield [(epoch, int(order_of(epoch)[position])) for epoch, position in positions]


def evaluation_batches(items, size):
    """Each of `items` once, `size` at a time."""
    return [[(0, int(i)) for i in items[k:k + size]] for k in range(0, len(items), size)]


def make_loader(dataset, batches, workers, device, collate=None):
    """`batches` of keys of the data set, loaded by `workers` processes. Forked ones share the
    index and the boxes with this process."""
    fork = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      pin_memory=device.type == "cuda", multiprocessing_context=fork,
                      worker_init_fn=start_loader_process)


def start_loader_process(_):
    """A loader process leaves Ctrl-C to the process that it loads for. It ends when a batch cannot
    be sent there (/dev/shm is full), or that process would wait for the batch for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Its errors go to that process. What is printed here is only that the process has gone.
    sys.excepthook = lambda *_: None
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)


# ---- rendered livestreams
#
# A live is a salesperson with the products of one shop; a clip is about one of them. In "two
# held", "lifted" (another product in the hand, the intended one on the table) and "table" frames
# one frame cannot tell which is meant. The others change from frame to frame and the intended one
# stays, so the clip can tell. A "pair" clip shows the same two together: only words tell.

STAGINGS = ("held", "two held", "lifted", "table", "occluded")
# By number of products in view: the shares of the stagings, and how many stand behind, [low, high).
STAGING_SHARES = {"few": (0.40, 0.22, 0.06, 0.16, 0.16), "medium": (0.31, 0.27, 0.10, 0.20, 0.12),
                  "abundant": (0.22, 0.32, 0.14, 0.24, 0.08)}
SHELF = {"few": (0, 3), "medium": (3, 5), "abundant": (5, 8)}
PRODUCT_SIZES = {"small": (0.22, 0.29), "medium": (0.29, 0.38), "large": (0.38, 0.50)}  # of a frame
ABSENT = {0: 0.62, 1: 0.14, 2: 0.12, 4: 0.12}    # {absent frames of 8: share of the clips}
LEAST_HELD = {"short": 1, "medium": 2, "long": 2}      # "held" frames of a clip, except pair clips
OTHER_HELD = 0.4        # chance that another product is held where the intended one is absent
SAME_CATEGORY = 0.25    # chance that another clip shows products of its own category alone
PAIR = 0.15             # chance of a pair clip
LOOKALIKE = 0.3         # chance that a product copies one of its category but for one detail
BLUR = 0.15             # share of blurred frames
WRONG_WORDS = 0.10      # share of ASR words that were misheard (the paper: 9.84 %)

# Shapes in percent of a square: E ellipse, P polygon, R rectangle, then the number of a colour:
# 0 main, 1 second, 2 dark, 3 a hole.
CATEGORIES = {
    "trousers": "P0 26 4 74 4 84 96 58 96 50 36 42 96 16 96|R1 26 4 74 13",
    "hat": "E0 2 58 98 86|P0 26 68 33 20 67 20 74 68|P1 27 68 29 54 71 54 73 68",
    "sneaker": "P0 6 36 32 28 54 52 94 62 94 76 6 76|R1 4 73 96 86|P2 38 38 42 36 52 46 48 48",
    "handbag": "E1 24 4 76 72|E3 32 12 68 64|P0 12 36 88 36 96 94 4 94|R1 40 34 60 54",
    "suitcase": "R2 32 2 68 30|R3 38 8 62 30|R0 16 18 84 90|R1 30 18 36 90|R1 64 18 70 90",
    "bottle": "R1 41 2 59 18|P0 42 18 58 18 70 36 70 97 30 97 30 36|R1 30 56 70 76",
    "umbrella": "E0 2 6 98 98|R3 0 52 100 100|R2 48 50 53 96|P1 44 8 56 8 64 52 36 52",
    "plate": "E0 2 14 98 86|E1 24 32 76 68"}
LOGOS = {"": "", "disc": "E0 5 5 95 95", "cross": "R0 35 0 65 100|R0 0 35 100 65",
         "triangle": "P0 50 2 98 94 2 94", "bar": "R0 0 32 100 68"}
PERSON = "R0 30 44 70 104|R1 46 36 54 47|E2 39 12 61 42|E1 41 17 59 41"
PATTERNS = ("plain", "striped", "barred", "slanted", "checked")
HUES = ("red", "orange", "yellow", "lime", "green", "teal", "blue", "violet", "purple", "pink")
CHATTER = ("hello everybody welcome", "look at this", "it feels so good", "just for you today",
           "the price is crazy", "only a few left", "I use it every day myself", "order now")


def _rgb(hue, saturation, value):
    return tuple(int(255 * v) for v in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _draw(picture, code, colours, left, top, side):
    """Draw shapes such as those of CATEGORIES into a square of a picture."""
    draw = ImageDraw.Draw(picture)
    kinds = {"E": draw.ellipse, "P": draw.polygon, "R": draw.rectangle}
    for shape in filter(None, code.split("|")):
        points = np.array(shape[2:].split(), float).reshape(-1, 2) * side / 100 + (left, top)
        kinds[shape[0]](points.ravel().tolist(), fill=colours[int(shape[1])])


def _shop_products(rng, count, distractors):
    """The products of a live, no two alike, and for each the number of the one it looks like."""
    names = list(CATEGORIES)
    frequency = np.arange(1, len(names) + 1) ** -0.5
    if distractors == "same":          # few categories in equal parts: each has distractors
        names = rng.permutation(names)[:max(1, min(4, count // 4))]
    products = []
    family = list(range(count))
    for p in range(count):
        category = rng.choice(list(CATEGORIES), p=frequency / frequency.sum())
        category = names[p % len(names)] if distractors == "same" else category
        hue, (bright, strong) = rng.integers(10), rng.uniform(0.65, 1, 2)
        product = {"category": str(category),
                   "hue": HUES[hue], "logo": rng.choice(list(LOGOS)),
                   "pattern": rng.choice(PATTERNS, p=[0.4] + [0.15] * 4),
                   "main": (*_rgb((hue + rng.uniform(-0.3, 0.3)) / 10, strong, bright), 255),
                   "second": _rgb(rng.random(), 0.7, 0.75), "mark": _rgb(rng.random(), 0.25, 0.95)}
        alike = [o for o in range(p) if products[o]["category"] == product["category"]]
        if alike and rng.random() < LOOKALIKE:
            # Change one detail of another product, again until no other product has it.
            while family[p] == p or product in products:
                other = rng.choice(alike)
                detail = rng.choice(["logo", "pattern"])
                value = rng.choice(list(LOGOS if detail == "logo" else PATTERNS))
                product = products[other] | {detail: value}
                family[p] = family[other]
        products.append(product)
    return products, family


def _sprite(product, side):
    """The picture of a product, RGBA, cut to its outline: at most side / 2 pixels on a side."""
    y, x = np.mgrid[:side, :side] / side
    marked = {"plain": x < 0, "striped": y * 7 % 1 < 0.4, "barred": x * 7 % 1 < 0.4,
              "slanted": (x + y) * 6 % 1 < 0.4, "checked": (x * 5 % 1 < 0.5) ^ (y * 5 % 1 < 0.5)}
    sprite = Image.new("RGBA", (side, side))
    colours = product["main"], product["second"], (52, 48, 52), (0, 0, 0, 0)
    _draw(sprite, CATEGORIES[product["category"]], colours, 0, 0, side)
    pixels = np.array(sprite)
    free = (pixels == product["main"]).all(2)
    pixels[free & marked[product["pattern"]], :3] = product["mark"]
    sprite = Image.fromarray(pixels)
    room = Image.fromarray(free.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(side // 9))
    top, left = np.unravel_index(np.argmax(room), room.size) - np.array(side // 8)
    _draw(sprite, LOGOS[product["logo"]], [(250, 250, 245)], left, top, side // 4)
    sprite = sprite.reduce(2)
    return sprite.crop(sprite.getchannel("A").getbbox())


def _paste(canvas, sprite, rng, x, y, size, tilt=20):
    """Paste a product with its centre at (x, y), about `size` pixels long, turned -> its box."""
    scale, squeeze = size / max(sprite.size), rng.uniform(0.88, 1.0)
    width, height = round(sprite.width * scale * squeeze), round(sprite.height * scale)
    view = sprite.resize((max(3, width), max(3, height)))
    view = view.rotate(rng.uniform(-tilt, tilt), Image.Resampling.BILINEAR, expand=True)
    left, top = round(x - view.width / 2), round(y - view.height / 2)
    canvas.paste(view, (left, top), view)
    y, x = (np.asarray(view.getchannel("A")) > 40).nonzero()
    return [max(0, left + int(x.min())), max(0, top + int(y.min())),
            min(canvas.width, left + int(x.max()) + 1), min(canvas.height, top + int(y.max()) + 1)]


@dataclass
class _ClipPlan:
    """What a clip of product p shows."""
    p: int
    stagings: list              # of its frames
    scale: str                  # key of PRODUCT_SIZES
    number: str                 # of products in view: key of STAGING_SHARES
    duration: str               # how long p is visible
    others: list                # products that may be in view beside p
    companion: int              # of a pair clip, else None


def _plan_clip(rng, p, products, frames, distractors):
    number = rng.choice(list(STAGING_SHARES))
    scale = rng.choice(list(PRODUCT_SIZES))
    others = [o for o in range(len(products)) if o != p]
    alike = [o for o in others if products[o]["category"] == products[p]["category"]]
    unlike = sorted({*others} - {*alike})
    companion = None
    if distractors == "same" and len(alike) > 2:
        others = alike
    elif unlike and rng.random() < PAIR:
        companion = rng.choice(unlike)
    elif len(alike) > 2 and rng.random() < SAME_CATEGORY:
        others = alike
    absent = round(rng.choice(list(ABSENT), p=list(ABSENT.values())) * frames / 8)
    absent = min(frames - 2, absent)
    duration = "short" if 1 - absent / frames < 0.7 else "medium" if absent else "long"
    shown = ["held"] * LEAST_HELD[duration]
    shown += [*rng.choice(STAGINGS, frames - absent - len(shown), p=STAGING_SHARES[number])]
    if companion is not None:
        shown = ["pair"] * len(shown)
    stagings = rng.permutation(shown + ["absent"] * absent)
    return _ClipPlan(p, stagings, scale, number, duration, others, companion)


def _backdrop(rng, plan, sprites, side):
    """Wall, shelf and table of a clip, larger than a frame so that the camera can move."""
    stock = [plan.p, *plan.others]
    big = round(side * 1.15)
    count = min(len(stock), rng.integers(*SHELF[plan.number]))
    scene = Image.new("RGB", (big, big), _rgb(rng.random(), 0.2, rng.uniform(0.5, 0.95)))
    table = _rgb(rng.random(), 0.25, rng.uniform(0.35, 0.8))
    _draw(scene, "R0 0 24 100 26|R1 0 80 100 100", [(90, 80, 70), table], 0, 0, big)
    for n, other in enumerate(rng.choice(stock, count, replace=False)):
        size = side * rng.uniform(0.14, 0.19)
        x = big * (n + 0.5 + rng.uniform(-0.1, 0.1)) / count
        _paste(scene, sprites[other], rng, x, 0.28 * side - size * 0.5, size, tilt=4)
    return scene


def _products_in_view(rng, plan, staging):
    """The products in the hands and on the table of a frame."""
    p, absent = plan.p, staging == "absent"
    other = rng.choice(plan.others)
    other_held = rng.random() < OTHER_HELD
    in_hands = {"two held": [p, other], "lifted": [other], "table": [], "pair": [p, plan.companion],
                "absent": [other] if other_held else []}.get(staging, [p])
    on_table = []
    if staging in ("lifted", "table") or (absent and rng.random() < 0.5):
        on_table = rng.choice(plan.others, rng.integers(2, 4), replace=False).tolist()
        if not absent:
            on_table.append(p)
    return in_hands, on_table


def _draw_person(rng, frame, look):
    """Draw the salesperson -> the places (x, y) of both hands. look: shirt, skin, hair."""
    side, draw, hands = frame.width, ImageDraw.Draw(frame), []
    middle = side * rng.uniform(0.44, 0.56)
    _draw(frame, PERSON, look, middle - side / 2, 0, side)
    for arm in (-side, side):
        hands.append((middle + arm * rng.uniform(0.18, 0.30), side * rng.uniform(0.50, 0.68)))
        draw.line([middle + arm * 0.17, side * 0.47, *hands[-1]], look[1], round(side * 0.06))
    return hands


def _frame(rng, plan, staging, sprites, scene, size, look):
    """One frame of a clip: RGB picture and the box of product p, [] when it is absent. size: of p,
    as a share of the frame."""
    in_hands, on_table = _products_in_view(rng, plan, staging)
    side, skin = round(scene.width / 1.15), look[1]
    left, top = rng.integers(0, scene.width - side + 1, 2).tolist()
    frame = scene.crop((left, top, left + side, top + side))
    hands = _draw_person(rng, frame, look)
    draw, boxes = ImageDraw.Draw(frame), {}
    for slot, which in enumerate(rng.permutation(on_table)):
        x = side * (slot + 0.5 + rng.uniform(-0.08, 0.08)) / len(on_table)
        y = side * rng.uniform(0.80, 0.86)
        small = side * min(size, 0.30) * rng.uniform(0.8, 0.95)
        boxes[which] = _paste(frame, sprites[which], rng, x, y, small, tilt=12)
    for which, (x, y) in zip(rng.permutation(in_hands), rng.permutation(hands)):
        pixels = size * rng.uniform(0.92, 1.08) * side
        boxes[which] = _paste(frame, sprites[which], rng, x, y - 0.12 * pixels, pixels)
        draw.ellipse([x - 0.06 * side, y, x + 0.06 * side, y + 0.07 * side], skin)
    box = boxes.get(plan.p, [])
    if staging == "occluded":                      # a palm over a part of the product
        x, y = rng.uniform(box[0], box[2]), rng.uniform(box[1], box[3])
        reach = size * side * rng.uniform(0.22, 0.3)
        draw.ellipse([x - reach, y - reach * 0.8, x + reach, y + reach * 0.8], skin)
    light = rng.uniform(0.75, 1.15) * rng.uniform(0.94, 1.06, 3)
    frame = Image.fromarray((np.asarray(frame) * light).clip(max=255).astype(np.uint8))
    if rng.random() < BLUR:
        frame = frame.filter(ImageFilter.BoxBlur((rng.uniform(0.4, 2.1), 0.3)))
    return frame, box


def _texts(rng, product, pair=False):
    """The title of a product, and what the salesperson says of it as a machine heard it."""
    hue, pattern, category = product["hue"], product["pattern"], product["category"]
    title = [rng.choice(["new", "original", "hot"]), hue, pattern.replace("plain", ""), category,
             product["logo"], rng.choice(["free shipping", "sale", "gift"])]
    said = rng.choice(CHATTER, 3, replace=False).tolist()
    chances = {hue: 1.0 if pair else 0.5, pattern: 0.3, category: 1.0 if pair else 0.6}
    said.insert(rng.integers(4), " ".join(w for w, p in chances.items() if rng.random() < p))
    vocabulary = [*HUES, *CATEGORIES, *" ".join(CHATTER).split()]
    heard = []
    for word in " ".join(said).split():
        heard.append(rng.choice(vocabulary) if rng.random() < WRONG_WORDS else word)
    return " ".join(filter(None, title)), " ".join(heard)


def _render_shop(rng, folder, products, sprites, side):
    """Write a shop image of each product -> {image id: title}, in order of the products."""
    titles = {}
    for product, sprite in zip(products, sprites):
        image_id = f"{rng.integers(10 ** 12):012d}"
        titles[image_id], _ = _texts(rng, product)
        picture = Image.new("RGB", (side, side), _rgb(0, 0, rng.uniform(0.92, 1)))
        _paste(picture, sprite, rng, side / 2, side / 2, side * rng.uniform(0.78, 0.9), tilt=3)
        picture.save(folder / f"{image_id}.jpg", quality=90)
    return titles


def _render_live(root, options, split, number):
    """Render one live, a function of what is given -> {annotation file: {id: entry}}."""
    side, frames, train = options["size"], options["frames"], split == "train"
    rng = np.random.default_rng((options["seed"], ("train", "val", "test").index(split), number))
    count = options["products"] if train else options["gallery"]
    products, family = _shop_products(rng, count, options["distractors"])
    sprites = [_sprite(product, 2 * side) for product in products]
    files = defaultdict(dict)
    live = "-".join(f"{v:04x}" for v in rng.integers(0, 2 ** 16, 4))
    titles = _render_shop(rng, root / "images", products, sprites, side)
    look = (_rgb(rng.random(), rng.uniform(0, 0.35), rng.uniform(0.3, 0.9)),       # shirt
            _rgb(0.07, rng.uniform(0.25, 0.6), rng.uniform(0.5, 0.95)),            # skin
            _rgb(0.08, 0.5, rng.uniform(0.1, 0.5)))                                # hair
    again = rng.integers(0, count, max(0, options["clips"] - count) if train else 0)
    for n, p in enumerate([*rng.permutation(count), *again]):
        plan = _plan_clip(rng, p, products, frames, options["distractors"])
        scene = _backdrop(rng, plan, sprites, side)
        size = rng.uniform(*PRODUCT_SIZES[plan.scale])
        boxes = {}
        start = 1667916000000 + number * 86400000 + n * 30000 * frames
        video_id = f"{live}-{start}-{start + frames * 1000}"
        for t, staging in enumerate(plan.stagings):
            frame_id = f"{video_id}-{t:04d}"
            picture, boxes[frame_id] = _frame(rng, plan, staging, sprites, scene, size, look)
            picture.save(root / "frames" / f"{frame_id}.jpg", quality=85)
        _, asr = _texts(rng, products[p], plan.companion is not None)
        image, category = list(titles.items())[p], products[p]["category"]
        if train:
            row = _training_row(plan, boxes, image, category, asr)
            files["training_videoinfo_0.txt"][video_id] = row
        else:
            _annotate(files, video_id, plan, boxes, image[0], category, asr)
            if family.count(family[p]) > 1:
                files["test_case_near-identical.txt"][video_id] = ""
    if not train:
        files["test_image_title_0.txt"] = titles
        files["test_liveid_to_gallery_0.json"][live] = list(titles)
    return {name.replace("test_", f"{split}_"): entries for name, entries in files.items()}


def _training_row(plan, boxes, image, category, asr):
    """The columns of a training clip but its id, by tab. image: (id, title)."""
    lists = json.dumps(list(boxes)), json.dumps(list(boxes.values()))
    class_id = str(list(CATEGORIES).index(category))
    more = plan.scale, plan.duration, plan.number
    return "\t".join([*lists, *image, class_id, category, asr, *more])


def _annotate(files, video_id, plan, boxes, image_id, category, asr):
    """Write a test clip into the annotation files."""
    files["test_videoid_asr_0.txt"][video_id] = asr
    files["test_videoid_to_gtimage_0.json"][video_id] = [image_id]
    class_id = list(CATEGORIES).index(category)
    for frame_id, box in boxes.items():
        files["test_frameid2gtbox_0.json"][frame_id] = [[*box, class_id]] if box else []
    for name in (f"scale_{plan.scale}", f"duration_{plan.duration}", f"number_{plan.number}"):
        files[f"test_{name}.txt"][video_id] = ""
    if plan.companion is not None:
        files["test_case_two-in-view.txt"][video_id] = ""


RENDER_OPTIONS = {                                    # default, least, help
    "seed": (0, 0, "the same seed gives the same files"),
    "lives": (72, 1, "training lives"),
    "val_lives": (4, 0, "validation lives"),
    "test_lives": (10, 0, "test lives"),
    "products": (24, 4, "products of a training live"),
    "clips": (28, 1, "clips of a training live, at least one a product"),
    "gallery": (50, 4, "products, and clips, of a val or test live"),
    "frames": (8, 4, "frames of a clip, one a second"),
    "size": (96, 32, "width and height of a frame, pixels")}


def render(root, distractors="natural", processes=None, **options):
    """Render livestreams into `root`, which appears when it is complete: a function of the options
    (RENDER_OPTIONS) alone. distractors: "natural", any other product of the live, or "same", only
    those of the intended product's category."""
    root = Path(root)
    for name, (default, least, _) in RENDER_OPTIONS.items():
        value = options.setdefault(name, default)
        require(value >= least, f"--{name.replace('_', '-')} {value}: at least {least}")
    require(not root.exists(), f"{root} exists; render into another folder or remove it first")
    work, files = root.with_name(f"{root.name}.rendering"), defaultdict(dict)
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("annotations", "frames", "images"):
        (work / folder).mkdir(parents=True)
    splits, numbers = [], []
    for split, name in (("train", "lives"), ("val", "val_lives"), ("test", "test_lives")):
        splits += [split] * options[name]
        numbers += range(options[name])
    job = functools.partial(_render_live, work, options | {"distractors": distractors})
    with process_pool(processes) as pool:
        lives = pool.map(job, splits, numbers)
        for live in progress_bar(lives, f"render {root}", total=len(splits), unit="live"):
            for name, entries in live.items():
                files[name] |= entries
    for name, entries in files.items():
        text = json.dumps(entries) if ".json" in name else rows_text(entries)
        write_text(work / "annotations" / name, text)
    work.rename(root)


# ---- checking a folder


def check(root, decode=False, processes=None):
    """Print what is in a folder and what is wrong, write annotations/skip.txt: training clips that
    cannot be used. -> True when more than 1 % of something is wrong"""
    root = Path(root)
    problems, skip, categories = {}, {}, {}
    counts, wrong = Counter(), Counter()
    skip_file = root / "annotations" / "skip.txt"
    for name, start in (("train", "training_"), ("val", "val_"), ("test", "test_")):
        if not any(skip_file.parent.glob(f"{start}*")):
            print(f"{name}: no files {start}*")
            continue
        split = LPRSplit(root, name, heed_skip=False)
        categories = split.categories if name == "train" else categories
        print(f"{name}: {len(split)} clips, {(split.annotated_lengths > 0).sum()} annotated, "
              f"{split.lengths.sum()} frames", *split.notes, sep="\n    ")
        starts = range(0, len(split), 256)
        job = functools.partial(_check_clips, root, name, categories, decode)
        with process_pool(processes) as pool:
            parts = pool.map(job, starts)
            for findings in progress_bar(parts, f"check {name}", total=len(starts)):
                counts.update(findings.counts)
                for kind, text, video_id in findings.problems:
                    wrong[kind] += 1
                    if wrong[kind] <= 10:             # millions of texts would fill the memory
                        problems.setdefault(kind, []).append(text)
                    if name == "train":
                        skip[video_id] = text
    require(counts, f"{root}/annotations: no training_videoinfo_*.txt and no test files")
    for kind, texts in problems.items():
        print(f"{kind}: {wrong[kind]} of {counts[kind]} wrong", *texts, sep="\n    ")
    if skip:
        text = rows_text(skip)
        if not skip_file.exists() or read_text(skip_file) != text:     # else boxes are made anew
            write_text(skip_file, text)
        print(f"annotations/skip.txt: {len(skip)} training clips that training now leaves out")
    else:
        skip_file.unlink(missing_ok=True)
    spoilt = [kind for kind in problems if wrong[kind] > 0.01 * counts[kind]]
    print(f"more than 1 % wrong: {', '.join(spoilt)}" if spoilt else "fit for use")
    return bool(spoilt)


_open_split = functools.cache(functools.partial(LPRSplit, heed_skip=False))


class _Findings:
    """problems [(kind, text, video id)], and counts {kind: how many were looked at}."""

    def __init__(self):
        self.problems, self.counts = [], Counter()

    def attempt(self, video_id, kind, function, *arguments):
        """What function(*arguments) gives; a BadInput becomes a problem, and None."""
        self.counts[kind] += 1
        try:
            return function(*arguments)
        except BadInput as error:
            self.problems.append((kind, str(error), video_id))
            return None


def _check_clips(root, name, categories, decode, start):
    """-> _Findings of 256 clips."""
    split, findings, looked_at = _open_split(root, name), _Findings(), set()
    for i in range(start, min(start + 256, len(split))):
        video_id = split.training_row(i)[1][0] if name == "train" else split.video_ids[i]
        clip = findings.attempt(video_id, "rows", split.clip, i)
        if clip is None:
            continue
        images = clip.image_ids
        if name != "train" and split.galleries:
            findings.attempt(video_id, "galleries", _check_gallery, split, clip)
            gallery = split.galleries.get(live_of(video_id), [])
            images = [image_id for image_id in gallery if image_id not in looked_at]
            looked_at.update(images)            # a gallery is looked at once, not once a clip
        for image_id in images:
            findings.attempt(video_id, "images", _check_image, split, image_id, decode)
        count = len(clip.frame_ids)
        for t in range(count) if clip.boxes else even_frames(count, 10):
            boxes = clip.boxes[t] if clip.boxes else ()
            findings.attempt(video_id, "frames", _check_frame, split, clip.frame_ids[t], boxes,
                             categories, decode)
    return findings


def _check_gallery(split, clip):
    live = live_of(clip.video_id)
    gallery = split.galleries.get(live, [])
    require(set(gallery) & set(clip.image_ids),
            f"{clip.video_id}: the gallery of its live {live!r} ({len(gallery)} images) holds none "
            f"of its true images {clip.image_ids}")


@functools.lru_cache(100_000)
def _check_image(split, image_id, decode):
    read = read_picture if decode else check_picture
    read(split.path("images", image_id))


def _check_frame(split, frame_id, boxes, categories, decode):
    path = split.path("frames", frame_id)
    width, height = original_size(path, *check_picture(path)[1:])
    for x1, y1, x2, y2, category in boxes:
        wrong = ""
        if x1 >= width or y1 >= height or x2 > 1.5 * width or y2 > 1.5 * height:
            wrong = f"outside of the {width} x {height} frame; expected x1, y1, x2, y2"
        elif category >= 0 and categories and category not in categories:
            wrong = f"category {category:g}, the training files have {[*categories][:40]}"
        require(not wrong, f"{path}: box {x1:g}, {y1:g}, {x2:g}, {y2:g}: {wrong}")
    if decode:
        read_picture(path)


# ---- converters


def link_file(source, target):
    """A hard link, or on another device a symbolic one -> False when the target was there."""
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(os.path.abspath(source))
    return True


class Tally(Counter):
    """How often each thing happened, and where first."""

    def __init__(self):
        super().__init__()
        self.first = {}

    def add(self, what, where):
        self[what] += 1
        self.first.setdefault(what, where)

    def show(self):
        for what, count in self.items():
            print(f"{what}: {count}, first {self.first[what]}")
        if not self:
            print("nothing found")


def link_picture(path, target, done):
    """Link a picture as `target` and its own ending -> the link, None without a picture."""
    if path.suffix not in ENDINGS:
        done.add(f"of another format ({path.suffix})", path)
    elif not path.is_file():
        done.add("missing", path)
    else:
        target = Path(f"{target}{path.suffix}")
        done.add("linked" if link_file(path, target) else "there before", path)
        return target


def path_of(source, name, folder=""):
    """source/name, else source/folder/name; BadInput when it leads out of `source`, which is
    resolved, by its name or by a link."""
    path = source / name
    if not path.is_file():
        path = source / folder / name
    require(path.resolve().is_relative_to(source), f"{path} leads out of the folder")
    return path


def link(download, root):
    """img2dataset's output (pictures, each with a JSON file of its url) -> root/frames and
    root/images. The id is the last part of the url; that of a frame ends in -start-end-index.
    -> {what happened: count}"""
    done = Tally()
    for side in progress_bar(Path(download).rglob("*.json"), f"link {download}", unit="file"):
        if side.name.endswith("_stats.json"):
            continue
        try:
            with expecting(f"{side}: expected a url"):
                about = json.loads(read_text(side))
                name = Path(str(about["url"]).split("?")[0]).stem
            path_inside(root, name)
        except BadInput:
            done.add("without an id", side)
            continue
        others = [path for path in side.parent.glob(f"{side.stem}.*") if path != side]
        if not others:
            done.add("failed to download", side)
            continue
        picture = next((path for path in others if path.suffix in ENDINGS), others[0])
        kind = "frames" if re.fullmatch(r".*-\d+-\d+-\d+", name) else "images"
        target = link_picture(picture, f"{root}/{kind}/{name[:2]}/{name}", done)
        if target and kind == "frames" and about.get("original_width") != about.get("width"):
            link_file(side, target.with_suffix(".json"))
    done.show()
    return done


def lpr750k(source, root):
    """LPR750K as the public RICE code has it -> the layout in `root`, by links.

    SOURCE/annotations holds training_videoinfo_*.txt with rows of video_id, frame paths, (boxes,)
    image_id, image path, title, category id and name, product id, ASR; query_*.json {video_id:
    {"frames": [path, ...], "gt": [image, ...]}}; gallery_*.txt with a path LIVE/IMAGE a row; and
    the test_ files of the layout, which are taken as they are. -> {what happened: count}
    """
    source, root = Path(source).resolve(), Path(root)
    done = Tally()
    annotations, target = source / "annotations", root / "annotations"
    target.mkdir(parents=True, exist_ok=True)
    training = sorted(annotations.glob("training_videoinfo_*.txt"))
    queries, galleries = sorted(annotations.glob("query_*")), sorted(annotations.glob("gallery_*"))
    require(training and queries and galleries,
            f"{annotations}: expected training_videoinfo_*.txt, query_*.json and gallery_*.txt")
    for path in training:
        _training_file_of_750k(source, root, path, done)
    positives = _queries_of_750k(source, root, queries[0], done)
    gallery = _galleries_of_750k(source, root, galleries[0], done)
    for name, value in (("videoid_to_gtimage", positives), ("liveid_to_gallery", gallery)):
        if not any(annotations.glob(f"test_{name}_*")):
            write_text(target / f"test_{name}_0.json", json.dumps(value))
    for path in annotations.glob("test_*"):
        link_file(path, target / path.name)
    done.show()
    return done


def _training_file_of_750k(source, root, path, done):
    malformed, number = [], 0
    target = root / "annotations" / path.name
    with open(path, "rb") as lines, atomic_write(target) as part, open(part, "wb") as file:
        for number, line in enumerate(progress_bar(lines, path.name, unit="row"), 1):
            try:
                file.write(_row_of_750k(source, root, line, done).encode())
            except BadInput as error:
                malformed.append(f"{path}:{number}: {error}")
                done.add("training rows left out", malformed[-1])
        if len(malformed) > 0.01 * number:
            raise BadInput(f"{malformed[0]}; {len(malformed)} of {number} rows would be left out")


def _row_of_750k(source, root, line, done):
    """A training row in the layout's columns; its pictures are linked."""
    line = line.decode("utf-8-sig", "replace")
    columns = columns_of(line)
    if len(columns) == 9:
        columns.insert(2, "[]")                    # no column of boxes
    require(len(columns) == 10, f"expected 9 or 10 columns by tab, found {len(columns)}")
    video_id, paths, boxes, image_id, image, title, category, name, _, asr = columns
    frame_ids = _link_frames(source, root, video_id, parse_list(paths, "frame paths"), done)
    picture = path_of(source, image, "training_image")
    link_picture(picture, path_inside(root / "images" / image_id[:2], image_id), done)
    row = [video_id, json.dumps(frame_ids), boxes, image_id, title, category, name, asr, "", "", ""]
    return "\t".join(row) + "\n"


def _link_frames(source, root, video_id, paths, done):
    """Link the frames of a clip -> their ids: the name, or the clip's id and the number in it."""
    folder, frame_ids = path_inside(root / "frames", video_id), []
    for path in paths:
        with expecting(f"{path}: expected a path whose name ends in the frame's number"):
            frame_id = Path(path).stem
            if not frame_id.startswith(f"{video_id}-"):
                frame_id = f"{video_id}-{re.search('[0-9]+$', frame_id)[0]}"
        link_picture(path_of(source, path, "query"), path_inside(folder, frame_id), done)
        frame_ids.append(frame_id)
    return frame_ids


def _queries_of_750k(source, root, file, done):
    """Link the frames of the test clips -> {video_id: [image_id, ...]}, their true images."""
    positives = {}
    with expecting(f'{file}: expected {{video_id: {{"frames": [...], "gt": [...]}}}}'):
        for video_id, entry in progress_bar(json.loads(read_text(file)).items(), file.name):
            others = path_of(source / "query", video_id).glob("*")      # not only those listed
            paths = {*entry["frames"], *(f"query/{video_id}/{path.name}" for path in others)}
            _link_frames(source, root, video_id, sorted(paths), done)
            positives[video_id] = [_image_id_of_750k(name) for name in entry["gt"]]
    return positives


def _galleries_of_750k(source, root, file, done):
    """Link the shop images of the test lives -> {live_id: [image_id, ...]}."""
    galleries = defaultdict(list)
    for path in progress_bar(read_text(file).splitlines(), file.name):
        image_id = _image_id_of_750k(path.strip())
        if image_id:
            picture = path_of(source, path.strip(), "gallery")
            link_picture(picture, path_inside(root / "images" / image_id[:2], image_id), done)
            galleries[Path(path.strip()).parent.name].append(image_id)       # by its live
    return galleries


def _image_id_of_750k(name):
    """The first five parts of a file's name; an id stays as it is."""
    path = Path(name)
    name = path.stem if path.suffix in ENDINGS else path.name
    return "-".join(name.split("-")[:5])


def need_ffmpeg(path):
    require(shutil.which("ffmpeg"),
            f"{path}: a video needs the program ffmpeg (apt install ffmpeg)")


def video_frames(path, every):
    """The frames of a video at seconds 0, every, 2 every, ...: uint8 [3,H,W] each. The program
    ffmpeg makes them; it may read local files only."""
    need_ffmpeg(path)
    # The chosen frames count as one every 1/25 s, or ffmpeg would repeat and drop some. It reads
    # the sound too, into nothing: it tells of some cut files only there.
    select = f"setpts=PTS-STARTPTS,select=gte(t\\,selected_n*{every}),settb=1/25,setpts=N"
    command = ["ffmpeg", "-v", "warning", "-nostdin", "-protocol_whitelist", "file,pipe",
               "-i", f"file:{path}", "-vf", select, "-r", "25", "-pix_fmt", "rgb24",
               "-c:v", "ppm", "-f", "image2pipe", "-",
               "-map", "0:v:0", "-map", "0:a?", "-c", "copy", "-f", "null", "-"]
    with tempfile.TemporaryFile() as log, \
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as ffmpeg:
        try:
            while ffmpeg.stdout.readline() == b"P6\n":
                width, height = map(int, ffmpeg.stdout.readline().split())
                ffmpeg.stdout.readline()                                 # 255
                pixels = bytearray(ffmpeg.stdout.read(width * height * 3))
                if len(pixels) < width * height * 3:                     # ffmpeg was killed
                    break
                image = torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, 3)
                yield image.permute(2, 0, 1)
            ffmpeg.wait()
        finally:
            ffmpeg.kill()
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    reason = said[-1] if said else "no reason given"
    require(ffmpeg.returncode == 0, f"{path}: ffmpeg cannot read it: {reason}")
    damage = "corrupt|partial file|prematurely|truncated|invalid|error"
    said = [line for line in said if re.search(damage, line, re.IGNORECASE)]
    if said:
        print(f"{path}: damaged or cut off, as ffmpeg says: {said[-1]}", file=sys.stderr)


def movingfashion(source, root, processes=None):
    """MovingFashion (train.json, test.json, videos/, imgs/) -> the layout in `root`: a clip a
    video, a frame a second. All test images form one gallery."""
    need_ffmpeg(source)
    source, root = Path(source).resolve(), Path(root)
    videos, gallery = {}, []
    done = Tally()
    for folder in ("annotations", "frames", "images"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        file = source / f"{split}.json"
        with expecting(f"{file}: expected {{key: {{img_path, video_paths}}}}"):
            for key, entry in json.loads(read_text(file)).items():
                image_id = f"{split}-{key}"
                image = path_of(source, entry["img_path"])
                link_picture(image, path_inside(root / "images", image_id), done)
                if split == "test":
                    gallery.append(image_id)
                for n, path in enumerate(entry["video_paths"]):
                    videos[f"{image_id}_{n}-0-0"] = path_of(source, path)
    rows, positives = [], {}
    job = functools.partial(_cut_video, root / "frames")
    with process_pool(processes) as pool:
        cut = progress_bar(pool.map(job, videos, videos.values()), "cut", total=len(videos))
        for video_id, frame_ids in zip(videos, cut):
            image_id = video_id.rpartition("_")[0]
            if frame_ids and image_id.startswith("test-"):
                positives[video_id] = [image_id]
            elif frame_ids:
                row = [video_id, json.dumps(frame_ids), "[]", image_id, *[""] * 7]
                rows.append("\t".join(row) + "\n")
    write_text(root / "annotations/training_videoinfo_0.txt", "".join(rows))
    galleries = {live_of(video_id): gallery for video_id in positives}
    for name, value in (("videoid_to_gtimage", positives), ("liveid_to_gallery", galleries)):
        write_text(root / f"annotations/test_{name}_0.json", json.dumps(value))
    done.show()
    print(f"{len(rows) + len(positives)} of {len(videos)} videos, {len(gallery)} test images; "
          f"train with: python train.py --stage rice --box-source none --data {root}")


def _cut_video(folder, video_id, path):
    """Write a frame a second -> frame ids, none when ffmpeg cannot read the video."""
    frame_ids = []
    try:
        for t, frame in enumerate(video_frames(path, 1)):
            frame_ids.append(f"{video_id}-{t}")
            TF.to_pil_image(frame).save(folder / f"{frame_ids[-1]}.jpg", quality=92)
    except BadInput as error:
        print(error, file=sys.stderr)
        return []
    return frame_ids


# ---- commands


class Parser(argparse.ArgumentParser):
    """argparse that ends in one line, as all errors do here."""

    def error(self, message):
        print(f"error: {message}; see `python {self.prog} --help`", file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    parser = Parser(description="Livestream data in the LPR4M layout: render, check, convert.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command, text, **arguments):
        part = commands.add_parser(command.__name__, help=text,
                                   description=text.replace("%%", "%"))
        part.set_defaults(command=command)
        for name, about in arguments.items():
            part.add_argument(name, help=about)
        return part.add_argument

    folder = "data folder in the LPR4M layout"
    option = add(render, "render livestreams with boxes, shop images, titles and ASR", root=folder)
    for name, (default, _, text) in RENDER_OPTIONS.items():
        option(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N",
               help=f"{text} [{default}]")
    option("--distractors", choices=("natural", "same"), default="natural",
           help="other products in view: any, or those of the product's category [natural]")
    option("--processes", type=int, metavar="N", help="processes [all cores, at most 16]")
    option = add(check, "what is in a folder and what is wrong with it; status 1 when more than "
                 "1 %% of something is wrong", root=folder)
    option("--decode", action="store_true", help="decode every picture")
    option("--processes", type=int, metavar="N", help="processes [all cores, at most 16]")
    add(link, "put what img2dataset downloaded into frames/ and images/",
        download="img2dataset's output folder", root=folder)
    add(lpr750k, "convert LPR750K, the download of the public RICE code, by links",
        source="folder with annotations/, training_image/, query/, gallery/", root=folder)
    option = add(movingfashion, "convert MovingFashion (needs the program ffmpeg)",
                 source="folder with train.json, test.json, videos/, imgs/", root=folder)
    option("--processes", type=int, metavar="N", help="processes [all cores, at most 16]")
    args = vars(parser.parse_args(argv))
    wrong = run_command(functools.partial(args.pop("command"), **args))
    sys.exit(1 if wrong is True else 0)


if __name__ == "__main__":
    import data          # one module of this name, so that errors of other processes are known
    data.main()
