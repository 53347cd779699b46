"""What the code costs on a data set of LPR4M's size, whose rows are made up. A script:

    python tests/scale.py make DIR --share 0.01       a model of LPR4M in the layout of data.py
    python tests/scale.py measure DIR                 seconds and memory of each task on it
    python tests/scale.py measure DIR --full-count    4,013,617 clips, where no text is needed
    python tests/scale.py table --markdown            all that was measured so far

The training files hold SHARE of LPR4M's rows; the test files have its full size. Every task runs in
a process of its own on one thread. GB is the most memory that this process ever held; the pages of
a memory-mapped file count too. The figures are kept in runs/scale.json (--results). No picture of a
training clip is made: where a task reads one, it gets the same JPEG each time.
"""
import argparse
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data                    # noqa: E402
import eval as evaluation      # noqa: E402
import train                   # noqa: E402

CLIPS, PRODUCTS, CATEGORIES, FRAMES = 4_013_617, 332_438, 34, 118        # of training
CLIPS_OF_LIVE, ANNOTATED, MALFORMED, SKIPPED = 183, 36, 10_000, 100      # one clip in so many
TEST_CLIPS, TEST_LIVES, GALLERY, TITLED = 20_079, 110, 66_358, 6_076
TEST_FRAMES, LISTED, TEST_BOXES = 501_656, 426_751, 669_374
METHODS = "sd", "md_t1", "md"
PAPER = {stage: train.configure({"preset": "paper"}, stage) for stage in evaluation.STAGES}
DETECTOR = {"model": {}, "config": PAPER["md"],
            "categories": {category: f"category {category}" for category in range(CATEGORIES)}}

# ---- making the data


def id_of(kind, number):
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{kind} {number}"))


def make_writer(rng):
    """A function that writes a text of so many words: there are 30,000 words of one to three
    Chinese characters, and few of them are frequent."""
    lengths = rng.integers(1, 4, 30_000)
    words = ["".join(map(chr, 0x4E00 + rng.integers(6_000, size=n))) for n in lengths]
    weights = 1 / np.arange(1, 30_001)
    limits = np.cumsum(weights / weights.sum())[:-1]
    return lambda count: "".join([words[n] for n in np.searchsorted(limits, rng.random(count))])


def training_row(n, write, rng):
    """The columns of training clip n. One clip in 36 has boxes, in ten of its frames."""
    live, place = divmod(n, CLIPS_OF_LIVE)
    product = live * PRODUCTS * CLIPS_OF_LIVE // CLIPS + place % 16      # 15 or 16 in a live
    category, start = product % CATEGORIES, place * 1000 * FRAMES
    video_id = f"{id_of('live', live)}-{start}-{start + 1000 * FRAMES}"
    frames, boxes = [f"{video_id}-{t}" for t in range(FRAMES)], []
    if n % ANNOTATED == 0:
        boxes = [[] for _ in frames]
        for t in data.even_frames(FRAMES, 10):
            boxes[t] = [100 + t, 200, 300 + t, 500]
    # A tab in a title spoils the row.
    title = write(15) + ("\t" if n % MALFORMED == MALFORMED // 2 else "") + write(5)
    return [video_id, json.dumps(frames), json.dumps(boxes), id_of("product", product), title,
            str(category), f"category {category}", write(rng.integers(100, 300)), "", "", ""]


def write_training(folder, share):
    """Ten training files, and a skip.txt."""
    rng, count = np.random.default_rng(0), round(CLIPS * share)
    write, skipped = make_writer(rng), []
    for part, numbers in enumerate(np.array_split(np.arange(count), 10)):
        path = folder / f"training_videoinfo_{part}.txt"
        with open(path, "w", encoding="utf-8") as file:
            for n in numbers.tolist():
                row = training_row(n, write, rng)
                file.write("\t".join(row) + "\n")
                if n % SKIPPED == 1:
                    skipped.append(f"{row[0]}\tits picture is missing\n")
    (folder / "skip.txt").write_text("".join(skipped))


def write_test(folder):
    """The test files -> ids of the frames that no file lists."""
    rng, clips, rows = np.random.default_rng(1), [], {}
    write = make_writer(rng)
    for n in range(TEST_CLIPS):
        live = id_of("test live", n * TEST_LIVES // TEST_CLIPS)
        clips.append(f"{live}-{n * 75_000}-{(n + 1) * 75_000}")
    galleries = {}
    for g in range(GALLERY):
        live = id_of("test live", g * TEST_LIVES // GALLERY)
        galleries.setdefault(live, []).append(id_of("image", g))
    # Only the true images have titles.
    true = {}
    for number, (live, images) in enumerate(galleries.items()):
        true[live] = images[:TITLED // TEST_LIVES + (number < TITLED % TEST_LIVES)]
    positives = {}
    for n, clip in enumerate(clips):
        images = true[data.live_of(clip)]
        positives[clip] = [images[n % len(images)]]

    # A clip has 24 or 25 frames. A listed frame has one box or two.
    shorter, frames, boxes = 25 * TEST_CLIPS - TEST_FRAMES, [], {}
    for n, clip in enumerate(clips):
        frames += [f"{clip}-{t}" for t in range(25 - (n < shorter))]
    order = rng.permutation(TEST_FRAMES).tolist()
    corners = (rng.integers(20, 250, (LISTED, 2, 4)) + [0, 100, 250, 400]).tolist()
    for n, f in enumerate(order[:LISTED]):
        count = 1 + (n < TEST_BOXES - LISTED)
        boxes[frames[f]] = [[*box, n % CATEGORIES] for box in corners[n][:count]]

    rows["videoid_asr_1"] = {clip: write(200) for clip in clips}
    rows["image_title_1"] = {image: write(15) for images in true.values() for image in images}
    for name, values in data.SUBSETS.items():
        which = rng.integers(3, size=TEST_CLIPS)
        for k, value in enumerate(values):
            rows[f"{name}_{value}"] = {clips[n]: "" for n in np.flatnonzero(which == k)}
    for name, entries in rows.items():
        lines = [f"{key}\t{text}\n" for key, text in entries.items()]
        (folder / f"test_{name}.txt").write_text("".join(lines), encoding="utf-8")
    for name, entries in (("videoid_to_gtimage", positives), ("liveid_to_gallery", galleries),
                          ("frameid2gtbox", boxes)):
        (folder / f"test_{name}_{len(entries)}.json").write_text(json.dumps(entries))
    return [frames[f] for f in order[LISTED:]]


def write_full_count(folder):
    """Ten training files without a byte, whose kept index says that they hold all rows."""
    rng, index = np.random.default_rng(0), np.zeros(CLIPS, data.INDEX_DTYPE)
    index["video"] = rng.permutation(CLIPS) * 2 ** 33
    index["live"] = rng.permutation(CLIPS)[np.arange(CLIPS) // CLIPS_OF_LIVE] * 2 ** 33
    index["product"] = rng.integers(PRODUCTS, size=CLIPS) * 2 ** 36
    index["length"], index["annotated"] = FRAMES, np.arange(CLIPS) % ANNOTATED == 0
    names = json.dumps(DETECTOR["categories"])
    for part, rows in enumerate(np.array_split(index, 10)):
        path = folder / f"training_videoinfo_{part}.txt"
        path.touch()
        np.savez(path.with_name(f".{path.name}.index.npz"), note="", categories=names, index=rows,
                 stamp=f"0 {path.stat().st_mtime_ns}")
    (folder / "skip.txt").write_text("".join(f"clip {n}\t\n" for n in range(CLIPS // SKIPPED)))


def make(root, share):
    for folder in ("annotations", "full/annotations", "frames"):
        (root / folder).mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (60, 34, 3), np.uint8)
    Image.fromarray(noise).resize((540, 960)).save(root / "picture.jpg")
    shutil.copyfile(root / "picture.jpg", root / "full/picture.jpg")
    write_training(root / "annotations", share)
    write_full_count(root / "full/annotations")
    # A frame that no file lists exists by its picture. A file can have some 65,000 links.
    for n, frame_id in enumerate(write_test(root / "annotations")):
        if n % 50_000 == 0:
            source = shutil.copyfile(root / "picture.jpg", root / f"picture-{n}.jpg")
        target = root / f"frames/{frame_id[:2]}/{frame_id}.jpg"
        target.parent.mkdir(exist_ok=True)
        os.link(source, target)
    (root / "share.json").write_text(json.dumps(share))


# ---- tasks: functions of the folder and an open split


def open_split(root, name):
    """A split. Clips of the full count have no row to read: their frames are made up."""
    lives = data.LPRSplit(root, name)
    if root.name == "full":
        frames = list(range(FRAMES))
        lives._training_clip = lambda i: data.Clip(str(i), frames, None, [str(i)], "", "")
    return lives


def index_files(root, _):
    for path in root.glob("annotations/.*.npz"):
        path.unlink()
    data.LPRSplit(root, "train")


def train_tokenizer(root, lives):
    """As train.py makes it before RICE's first step: with a small ViT and no boxes little else is
    done there."""
    small = {"vit_width": 32, "vit_layers": 1, "vit_heads": 1, "box_source": "none"}
    train.build_rice(train.configure({"preset": "paper", **small}, "rice"), lives, None, None)


def frame_dataset(lives, stage):
    config = PAPER[stage]
    return data.FrameDataset(lives, lives.categories, 1 if stage == "sd" else config.frames,
                             config.short_side, config.long_side, train=True)


def clip_dataset(lives, boxes=None):
    tokenizer = data.Tokenizer(torch.zeros(0, dtype=torch.uint8), 77)
    return data.ClipDataset(lives, tokenizer, 10, 224, boxes, train=True)


def order_frames(root, lives):
    dataset = frame_dataset(lives, "sd")
    next(data.training_batches(lambda rng: rng.permutation(len(dataset)), 64, 1))


def order_clips(root, lives):
    order = data.grouped_epoch_order(lives.live[clip_dataset(lives).clips], 1)
    next(data.training_batches(order, 96, 1))


def first_batch(stage, size, root, lives):
    lives.path = lambda folder, name: str(root / "picture.jpg")
    dataset = clip_dataset(lives) if stage == "rice" else frame_dataset(lives, stage)
    keys = [(0, int(i)) for i in np.random.default_rng(0).permutation(len(dataset))[:size]]
    collate = None if stage == "rice" else data.collate_detection
    next(iter(data.make_loader(dataset, [keys], 0, torch.device("cpu"), collate)))


def true_boxes(root, lives):
    data.true_boxes(lives)


def write_parts(root, lives):
    """Predicted boxes at random places, as eval._predict_parts leaves them in a folder."""
    for path in root.glob(f"boxes-{lives.name}-*.npy"):
        path.unlink()
    (root / f"parts-{lives.name}").mkdir()
    size, rng = max(4, len(lives) // 256), np.random.default_rng(0)
    fields = [("clip", "i4"), ("frame", "i4"), *((method, "f4", 6) for method in METHODS)]
    for first in range(0, len(lives), size):
        clips = np.arange(first, min(first + size, len(lives)))
        counts = np.minimum(lives.lengths[clips], 10 if lives.name == "train" else 1000)
        rows = np.zeros(counts.sum(), fields)
        rows["clip"] = np.repeat(clips, counts)
        rows["frame"] = np.concatenate([np.arange(count) for count in counts])
        for method in METHODS:
            rows[method][:, :4] = rng.integers(20, 250, (len(rows), 4)) + [0, 100, 250, 400]
            rows[method][:, 4] = rng.random(len(rows))
            rows[method][:, 5] = rng.integers(CATEGORIES, size=len(rows))
        np.save(root / f"parts-{lives.name}/{first:09d}.npy", rows)


def predict(root, lives):
    """eval.predict_boxes, which finds the parts of write_parts in the place of a model."""
    evaluation._predict_parts = lambda model, checkpoint, lives, folder, *rest: (
        (root / f"parts-{lives.name}").rename(folder))
    return evaluation.predict_boxes(DETECTOR, lives, root, None, lives.name != "train", "none")


def clip_through_boxes(root, lives):
    lives.path = lambda folder, name: str(root / "picture.jpg")
    boxes = evaluation.boxes_by_clip(predict(root, lives), "md", len(lives))
    clip_dataset(lives, boxes)[0, len(lives) // 2]


def table_1(root, lives):
    evaluation.table_1(predict(root, lives), lives, DETECTOR["categories"])


class RandomEmbedder:
    """In the place of eval.Embedder."""

    def __init__(self, *_):
        torch.manual_seed(0)

    def embed_images(self, read, titles, ids):
        return torch.randn(len(ids), 512), None, torch.ones(len(ids), dtype=torch.bool)

    def embed_clips(self, lives, clips, boxes):
        return torch.randn(len(clips), 512), None, None, torch.ones(len(clips), dtype=torch.bool)

    def similarity(self, clip, image, *_):
        icl, pmd = clip @ image.T, torch.randn(len(clip), len(image))
        return {"icl": icl, "pmd": pmd, "fused": icl + pmd}


def table_2(root, lives):
    evaluation.Embedder = RandomEmbedder
    evaluation.table_2({"config": PAPER["rice"], "detector": DETECTOR}, lives, root, None)


def check_part(root, lives):
    """What a process of `data.py check` does with 256 clips. Most of their pictures are missing."""
    data._open_split = lambda *_: lives
    data._check_clips(root, lives.name, DETECTOR["categories"], False, 0)


def open_train(root, _):
    data.LPRSplit(root, "train")


def open_test(root, _):
    data.LPRSplit(root, "test")


# name: (the split that is opened before, the task)
TASKS = {
    "imports alone": (None, lambda root, lives: None),
    "training files, index": (None, index_files),
    "training split, opened by its index": (None, open_train),
    "tokenizer": ("train", train_tokenizer),
    "order of SD's frames": ("train", order_frames),
    "order of RICE's clips": ("train", order_clips),
    "a batch of SD, 64 frames": ("train", functools.partial(first_batch, "sd", 64)),
    "a batch of MD, 8 clips": ("train", functools.partial(first_batch, "md", 8)),
    "a batch of RICE, 12 clips": ("train", functools.partial(first_batch, "rice", 12)),
    "true boxes of all training clips": ("train", true_boxes),
    "training boxes, parts made up": ("train", write_parts),
    "training boxes, parts joined": ("train", predict),
    "training boxes, one clip through them": ("train", clip_through_boxes),
    "check of 256 training clips": ("train", check_part),
    "test split, opened": (None, open_test),
    "test boxes, parts made up": ("test", write_parts),
    "test boxes, parts joined": ("test", predict),
    "Table 1": ("test", table_1),
    "Table 2": ("test", table_2),
    "check of 256 test clips": ("test", check_part)}
# Tasks that read no row of a training file, and are no matter of the test files.
FULL_COUNT = {"imports alone", "training split, opened by its index", "order of SD's frames",
              "order of RICE's clips", "training boxes, parts made up",
              "training boxes, parts joined", "training boxes, one clip through them"}


# ---- measuring


def run_task(root, name):
    """What a process of its own does -> prints seconds and GB."""
    split, task = TASKS[name]
    lives = open_split(root, split) if split else None
    start = time.perf_counter()
    task(root, lives)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss            # in units of 1,024 bytes
    print(json.dumps([seconds, peak * 1024 / 1e9]))


def measure(root, full_count, only, results):
    column = "full" if full_count else f"{json.loads((root / 'share.json').read_text()):g}"
    folder = root / "full" if full_count else root
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in TASKS:
        if only not in name or full_count and name not in FULL_COUNT:
            continue
        done = subprocess.run([sys.executable, __file__, "task", folder, name], env=environment,
                              stdout=subprocess.PIPE, text=True)
        cost = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        print(f"{column}, {name}: {cost or 'died'}", flush=True)
        known = json.loads(results.read_text()) if results.exists() else {}
        known.setdefault(column, {})[name] = cost
        results.parent.mkdir(exist_ok=True)
        data.write_text(results, json.dumps(known, indent=1))


def ratio(first, second):
    """How many times `first` the second is, where both are large enough to tell."""
    return f"{second / first:.1f}" if first and second and min(first, second) > 0.02 else None


def show(results, markdown):
    """A row a task: seconds, then GB. The last column of each is how many times that of the first
    share the second share's is; memory is compared without that of the imports."""
    known, rows = json.loads(results.read_text()), []
    columns = sorted(known)
    for name in TASKS:
        seconds, memory = zip(*[known[column].get(name) or (None, None) for column in columns])
        imports = known[columns[0]].get("imports alone", (0, 0))[1]
        beyond = [value and value - imports for value in memory]
        row = [*seconds, *memory]
        row = [None if value is None else f"{value:.2f}" for value in row]
        row.insert(len(columns), ratio(*(seconds * 2)[:2]))
        rows.append((name, *row, ratio(*(beyond * 2)[:2])))
    header = ["", *(f"{column}, s" for column in columns), "times",
              *(f"{column}, GB" for column in columns), "times"]
    print(evaluation.table(header, rows, markdown))


def main():
    parser = data.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["make", "measure", "table", "task"])
    parser.add_argument("dir", nargs="?", type=Path, metavar="DIR", help="folder of the data")
    parser.add_argument("task", nargs="?", help="what measure starts for one task")
    parser.add_argument("--share", type=float, default=0.01, help="of LPR4M's training rows [0.01]")
    parser.add_argument("--full-count", action="store_true", help="measure 4,013,617 clips")
    parser.add_argument("--only", default="", help="measure the tasks whose name holds this")
    parser.add_argument("--results", type=Path, default=ROOT / "runs/scale.json")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    if args.command == "make":
        make(args.dir, args.share)
    elif args.command == "task":
        run_task(args.dir, args.task)
    else:
        if args.command == "measure":
            measure(args.dir, args.full_count, args.only, args.results)
        show(args.results, args.markdown)


if __name__ == "__main__":
    main()
