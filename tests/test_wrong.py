"""Mistakes that people make, a row each: one line on stderr names what to mend, status 2.

A row: what it is, the command, what spoils a copy of the data or of the run (a function of the
folder @), and what the line says, ... for anything between. ODD: what goes on and says so.
"""
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import train
from conftest import ROOT, SMALL, start, threads

MAIN = {"train": train.main, "eval": evaluation.main, "data": data.main}
SD, MD, RICE, TRUE = (f"train --stage {stage} --data @/data --out @/new --detector-dir @/run"
                      for stage in ("sd", "md", "rice", "rice --box-source true"))
AGAIN = "train --stage sd --data % --out @/run"         # goes on; %: the data of the run
TABLE1, TABLE2 = (f"eval --ckpt @/run/{s}.pt --data @/data --out @/new" for s in ("sd", "rice"))
LIVE = f"{TABLE2} --live @/data/frames --shop @/data/images"
CHECK = "data check @/data"

# ------------------------------------------------------------------ what spoils


def nothing(at):
    pass


def note(at, name):
    """An annotation file by a part of its name."""
    return next((at / "data/annotations").glob(f"*{name}*"))


def write(name, content):
    """A file below @, or an annotation file, becomes `content` or what that makes of its bytes."""
    def spoil(at):
        file = at / name if "/" in name else note(at, name)
        new = content(file.read_bytes()) if callable(content) else content
        file.write_bytes(new if isinstance(new, bytes) else new.encode())
    return spoil


def half(content):
    return content[:len(content) // 2]


def remove(name):
    return lambda at: [file.unlink() for file in (at / "data/annotations").glob(f"{name}*")]


def column(place, value):
    """A column of every training row; value: a text, or a function of the old one."""
    def change(content):
        rows = [row.split("\t") for row in content.decode().splitlines()]
        for row in rows:
            row[place] = value(row[place]) if callable(value) else value
        return "".join("\t".join(row) + "\n" for row in rows)
    return write("training", change)


def boxes(*row):
    """Every training frame has this box."""
    return column(2, lambda old: json.dumps([list(row)] * len(json.loads(old))))


def entry(name, value, key=None):
    """The first entry of a JSON file of the test split, under another key where one is given."""
    def change(content):
        table = json.loads(content)
        first = next(iter(table))
        old = table.pop(first)
        return json.dumps({key or first: value(old) if callable(value) else value} | table)
    return write(f"test_{name}", change)


def frames(change):
    """Every frame, changed by a function of its path."""
    return lambda at: [change(path) for path in [*(at / "data/frames").iterdir()]]


def page(path):
    path.write_bytes(b"<html><body>404 not found</body></html>")


def checkpoint(name, change):
    """A checkpoint of the run, changed in place."""
    def spoil(at):
        value = torch.load(at / "run" / name, weights_only=True)
        change(value)
        torch.save(value, at / "run" / name)
    return spoil


def save(name, make):
    return lambda at: torch.save(make(), at / name)


class Code:
    """Unpickled, it makes the folder `executed`."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def fashion(image="1.jpg"):
    """A MovingFashion folder of one product."""
    def spoil(at):
        (at / "mf").mkdir()
        Image.new("RGB", (9, 9)).save(at / "mf/1.jpg")
        for split in ("train", "test"):
            products = {"7": {"img_path": image, "video_paths": ["1.jpg"]}}
            (at / f"mf/{split}.json").write_text(json.dumps(products))
    return spoil


def texts(at):
    """Titles, and what is said, in a form that people write."""
    (at / "rows.txt").write_text("mug.jpg\tred mug\nno tab\n")
    (at / "clock.txt").write_text("0:10\thello\n")


def without_programs(at):
    os.environ["PATH"] = str(at)


def also(*spoils):
    return lambda at: [spoil(at) for spoil in spoils]


# ------------------------------------------------------------------ the tables

DATA = [
    ("a folder that is not there", "train --data @/nowhere --out @/new", nothing,
     "nowhere: no annotations/; `python data.py render"),
    ("annotations/ itself", "train --data @/data/annotations --out @/new", nothing,
     "annotations: no annotations/"),
    ("no training file", SD, remove("training"), "no clips in the train split"),
    ("no test files", SD, remove("test"), "no clips in the test split"),
    ("two files of one kind", TABLE2, lambda at: shutil.copy(
        note(at, "test_image_title"), at / "data/annotations/test_image_title_9.txt"),
     "test_image_title_ ... test_image_title_9.txt: which one?"),
    # training rows
    ("columns by comma", SD, write("training", lambda old: old.replace(b"\t", b",")),
     "training_videoinfo_ ... .txt:1: expected 11 columns by tab, found 1; 8 of 8 rows"),
    ("a tab in the ASR", SD, column(7, "look\tat this"), "expected 11 columns by tab, found 12"),
    ("UTF-16, as a spreadsheet writes it", SD,
     write("training", lambda old: old.decode().encode("utf-16")), ".txt:1: "),
    ("GBK, as an old editor writes it", TRUE,
     write("training", lambda old: old.replace(b"hello", "你好".encode("gbk"))),
     "training_videoinfo_ ... UTF-8"),
    ("no category", SD, column(5, ""), "no training row names a category (columns 6 and 7)"),
    ("frames without brackets", SD, column(1, "a-0-1-0, a-0-1-1"),
     "training_videoinfo_ ... : frame_id list: expected a list such as"),
    ("frames with their ending", SD, column(1, lambda old: old.replace('"]', '.jpg"]')),
     ".jpg.jpg: missing ... data.py check"),
    ("fewer boxes than frames", SD, column(2, "[[1, 2, 30, 40]]"), ": 4 frames, 1 boxes"),
    ("one box for the clip", SD, column(2, "[1, 2, 30, 40]"), "frame 0: expected x1, y1, x2, y2"),
    ("boxes by name", SD, boxes({"x1": 1, "y1": 2, "x2": 30, "y2": 40}), "frame 0: expected x1"),
    ("NaN in a box", SD, boxes(1, 2, float("nan"), 40), "frame 0: expected x1, y1, x2, y2"),
    ("a category that no row names", SD, boxes(1, 2, 30, 40, 99), "a training box has ... 99"),
    ("no boxes at all", SD, column(2, "[]"), "--stage rice --box-source none"),
    ("no shop images", TRUE, column(3, ""), "no training clip has frames and names a shop image"),
    # test files
    ("JSON that is torn", TABLE1, write("test_frameid2gtbox", half),
     "test_frameid2gtbox_ ... .json: expected a JSON object"),
    ("a gallery that is a text", TABLE2, entry("liveid_to_gallery", "a b"),
     "test_liveid_to_gallery_ ... .json: expected a JSON object"),
    ("a frame id without number", TABLE1, entry("frameid2gtbox", [], "live-0-1-first"),
     "a frame id does not end in -index"),
    ("a true box of three numbers", TABLE1, entry("frameid2gtbox", [[1, 2, 30]]),
     "true boxes of ... expected x1, y1, x2, y2(, category), found [[1, 2, 30]]"),
    ("no true boxes", TABLE1, remove("test_frameid2gtbox"), "no true boxes"),
    ("ASR in GBK", TABLE2, write("test_videoid_asr", lambda old: old + "a-0-1\t你".encode("gbk")),
     "test_videoid_asr_ ... .txt: expected UTF-8 text"),
    ("no galleries", TABLE2, remove("test_liveid_to_gallery"), "test_liveid_to_gallery_*.json"),
    ("galleries of other lives", TABLE2, write("test_liveid_to_gallery", '{"other": ["a"]}'),
     "galler"),
    # pictures
    ("no frames", SD, frames(os.remove), "missing ... data.py check"),
    ("pages saved as .jpg", SD, frames(page), ".jpg: no picture that can be read"),
    ("frames cut in half", SD, frames(lambda path: path.write_bytes(half(path.read_bytes()))),
     ".jpg: not a whole JPEG"),
    ("GIFs named .jpg", SD, frames(lambda path: Image.new("L", (64, 64)).save(path, "GIF")),
     ".jpg: is a GIF, expected JPEG, PNG or WebP"),
    ("10,001 x 10,000 pixels by the header", SD, frames(lambda path: path.write_bytes(
        path.read_bytes().replace(b"\x08\0\x40\0\x40", b"\x08\x27\x11\x27\x10"))),
     ".jpg: no picture that can be read"),
    ("empty side files", SD, frames(lambda path: path.with_suffix(".json").write_text("{}")),
     ".json: expected original_width and original_height"),
]
RUN = [
    ("no such checkpoint", "eval --ckpt @/run/md2*.pt", nothing, "md2*.pt: no such checkpoint"),
    ("none named, none there", "eval --ckpt", nothing, "no finished checkpoint in runs/"),
    ("a torn checkpoint", TABLE1, write("run/sd.pt", half), "sd.pt: not a checkpoint of train.py"),
    ("weights alone", TABLE1, save("run/sd.pt", torch.nn.Linear(2, 2).state_dict),
     "sd.pt: not a checkpoint of train.py"),
    ("code in a checkpoint", TABLE1, save("run/sd.pt", Code), "not a checkpoint of train.py"),
    ("going on otherwise", AGAIN + " --lr 0.5", nothing,
     "lr: 0.001 there, 0.5 here ... give --out for a new run"),
    ("going on with other data", "train --stage sd --data @/data --out @/run", nothing,
     "data: ... there, ... here"),
    # the stages before
    ("MD without SD", f"{MD} --detector-dir @/empty", nothing,
     "sd.pt: missing; --stage md needs ... run `train.py --stage sd"),
    ("RICE without MD", f"{RICE} --detector-dir @/empty", nothing, "md.pt: missing; --stage rice"),
    ("MD before SD has ended", MD, checkpoint("sd.pt", lambda c: c.update(step=1)),
     "sd.pt: at step 1 of 2; finish it by `train.py --stage sd"),
    ("MD on an SD of other data", MD, checkpoint("sd.pt", lambda c: c["categories"].popitem()),
     "sd.pt has the categories"),
    ("SD trained again after MD", "train --stage md --data % --out @/run", checkpoint(
        "sd.pt", lambda c: c["model"]["class_embed.bias"].add_(1)), "md.pt was trained on another"),
    # public weights
    ("weights that are not there", f"{SD} --init @/none.pth", nothing, "none.pth: "),
    ("CLIP as it comes", f"{TRUE} --init @/init.pt", lambda at: torch.jit.script(
        torch.nn.Linear(2, 2)).save(str(at / "init.pt")), "init.pt: no state dict of tensors"),
    ("weights for MD", f"{SD} --stage md --init @/init.pt", nothing, "--init "),
    ("weights of something else", f"{SD} --init @/init.pt",
     save("init.pt", torch.nn.Linear(2, 2).state_dict), "init.pt: missing, left over or of"),
    ("the paper's size from nothing", "train --stage sd --preset paper --data @/data", nothing,
     "--init"),
    # where to write, flags
    ("--out is a file", "train --data @/data --out @/file", nothing, "file"),
    ("--json in no folder", f"{TABLE1} --json @/none/x.json", nothing, "none/x.json"),
    ("a flag that is none", "train --lerning-rate 1", nothing, "--lerning-rate"),
    ("a stage that is none", "train --stage detector", nothing, "argument --stage: invalid choice"),
    *((f"{flag} {value}", f"{TRUE} {flag} {value}", nothing, flag) for flag, value in (
        ("--steps", "many"), ("--steps", "-1"), ("--batch", "0"), ("--accum", "3"),
        ("--workers", "-1"), ("--precision", "fp16"), ("--losses", "pmd"), ("--vit-heads", "3"),
        ("--vocab", "100"))),
    *((f"{flag} {value}", f"{SD} {flag} {value}", nothing, flag) for flag, value in (
        ("--backbone", "vgg16"), ("--short-side", "480"),
        ("--short-side", "80,48,16"))),
    ("a render of no size", "data render @/new --size 0", nothing, "--size 0"),
    # comparing, a live, converters
    ("SD for near-duplicates", f"{TABLE1} --duplicates 0.9", nothing, "--stage rice"),
    ("RICE beside MD", f"{TABLE2} --pictures @/new --compare @/run/md.pt", nothing, "md.pt"),
    ("a live by a detector", LIVE.replace("rice.pt", "md.pt"), nothing, "--stage rice"),
    ("a live without shop", f"{TABLE2} --live @/data/frames", nothing, "--shop FOLDER"),
    ("a live that is not there", f"{LIVE} --live @/no.mp4", nothing, "no.mp4: no such file or folder"),
    ("a shop that is not there", f"{LIVE} --shop @/shop", nothing, "shop: no such file or folder"),
    ("titles without a tab", f"{LIVE} --titles @/rows.txt", texts, "rows.txt: ... 2 ... a photo, a tab"),
    ("seconds as a clock", f"{LIVE} --asr @/clock.txt", texts, "clock.txt: ... 1 ... seconds, a tab"),
    ("a video without ffmpeg", f"{LIVE} --live @/clock.txt", also(texts, without_programs),
     "clock.txt: a video needs the program ffmpeg"),
    *((f"{f} 0", f"{LIVE} {f} 0", nothing, f) for f in ("--every", "--window", "--top")),
    ("MovingFashion without ffmpeg", "data movingfashion @/mf @/new",
     also(fashion(), without_programs), "needs the program ffmpeg"),
    ("no MovingFashion", "data movingfashion @/empty @/new", nothing, "train.json"),
    ("a path that leads out", "data movingfashion @/mf @/new", fashion("../x.jpg"), "leads out"),
]
ODD = [
    ("no picture that can be read", TABLE1, frames(page), "missing=32"),
    ("an image twice in its gallery", TABLE2, entry("liveid_to_gallery", lambda ids: ids * 2),
     "4.0 images a gallery"),
    ("a true category that training has not", TABLE1,
     entry("frameid2gtbox", [[1, 2, 30, 40, 99]]), "true boxes have a category that training"),
    ("a true image that no gallery has", TABLE2, entry("videoid_to_gtimage", ["ghost"]),
     "1 clips have no true image in the gallery"),
    ("a clip without gallery", TABLE2, entry("liveid_to_gallery", ["a"], "x"), "4 clips have no"),
    ("boxes in 0..1", CHECK, boxes(0.1, 0.2, 0.6, 0.8), "expected pixels, not 0..1"),
    ("boxes as x, y, width, height", CHECK, boxes(30, 32, 12, 9), "is it x, y, width, height?"),
    ("no product and no word", TRUE, also(column(4, ""), column(7, "")), "all done"),
    ("more of everything than there is", f"{MD} --frames 99 --ttm-topk 99,99", nothing, "all done"),
    ("more negatives than clips", f"{TRUE} --n-neg 99 --per-live 99 --train-frames 9", nothing,
     "all done"),
]


@pytest.fixture
def place(run_one, livestreams, tmp_path, monkeypatch):
    """A folder with a copy of the data and of the run."""
    at = tmp_path / "at"
    shutil.copytree(livestreams, at / "data")
    shutil.copytree(run_one, at / "run", ignore=shutil.ignore_patterns("*.png"))
    (at / "empty").mkdir()
    (at / "file").write_text("a file")
    monkeypatch.setattr(data, "process_pool", threads)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.chdir(at)
    return at


def lines_of(text):
    """Lines of stderr, but for bars."""
    return [line for line in text.replace("\r", "\n").splitlines() if line and "%|" not in line]


def run(command, at, livestreams, capsys):
    """Run a command in this process -> status, stdout, lines of stderr."""
    capsys.readouterr()
    main, *given = command.replace("@", str(at)).replace("%", str(livestreams)).split()
    status = 0
    try:
        MAIN[main]([*SMALL, *given] if main == "train" else given)
    except SystemExit as stop:
        status = stop.code or 0
    said, errors = capsys.readouterr()
    assert not list(at.rglob("*.part"))
    return status, said, lines_of(errors)


def says(line, text):
    return re.search(" *.*".join(map(re.escape, re.split(r" *\.\.\. *", text))), line)


def rows(*tables):
    return [pytest.param(*row, id=re.sub(r"[^\w .,+-]", "_", name)) for table in tables
            for name, *row in table]


def snapshot(at):
    files = [path for path in at.rglob("*") if path.is_file() and path.suffix != ".npz"]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("command, spoil, text", rows(DATA, RUN))
def test_a_mistake_is_one_line(place, livestreams, capsys, command, spoil, text):
    spoil(place)
    before = snapshot(place / "data")
    status, said, errors = run(command, place, livestreams, capsys)
    assert status == 2 and len(errors) == 1, (status, said, errors)
    assert errors[0].startswith("error: ") and len(errors[0]) < 1000
    assert says(errors[0], text), errors[0]
    assert snapshot(place / "data") == before and not (place / "executed").exists()


@pytest.mark.parametrize("command, spoil, text", rows(ODD))
def test_what_is_odd_is_told(place, livestreams, capsys, command, spoil, text):
    spoil(place)
    status, said, errors = run(command, place, livestreams, capsys)
    assert status == int("check" in command) and text in said and not errors, (said, errors)


def test_the_table_is_one():
    names = [name for name, *_ in DATA + RUN + ODD]
    assert len(names) == len(set(names)) >= 60


# ------------------------------------------------------------------ processes


def children(process, text):
    """Ids of the processes that one has started and whose command holds a text."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in found if text in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_a_process_that_fails_ends_the_command(place):
    """Beside each other: an error in a loader, a loader killed, a renderer's process killed."""
    shutil.copytree(place / "data", place / "spoilt/data")
    entry("frameid2gtbox", ["box"])(place / "spoilt")
    wrong = start(ROOT / "eval.py", "--ckpt", place / "run/sd.pt", "--data", place / "spoilt/data",
                  "--out", place / "new", "--workers", 2)
    killed = start(ROOT / "train.py", *SMALL, "--steps", 10 ** 6, "--stage", "sd", "--workers", 2,
                   "--data", place / "data", "--out", place / "new")
    render = start(ROOT / "data.py", "render", place / "lives", "--lives", 99, "--processes", 2)
    log, shown = place / "new/sd.jsonl", place / "lives.rendering/frames"
    waits = [(killed, "train.py", lambda: log.exists() and log.stat().st_size > 500),
             (render, "spawn_main", lambda: shown.exists() and any(shown.iterdir()))]
    try:
        for process, text, ready in waits:
            while process.poll() is None and not ready():
                time.sleep(0.1)
            if process.poll() is None:
                os.kill(children(process, text)[0], signal.SIGKILL)
        for process, text in ((wrong, "expected x1, y1, x2, y2"), (render, "process"),
                              (killed, "DataLoader worker ... --workers 0")):
            said, errors = process.communicate(timeout=120)
            assert process.returncode == 2 and len(lines_of(errors)) == 1, (said, errors)
            assert says(errors, text), errors
    finally:
        for process in (wrong, killed, render):
            process.kill()
    assert not (place / "lives").exists() and not list(place.rglob("*.part"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_pool_processes_end_with_their_parent(tmp_path):
    render = start(ROOT / "data.py", "render", tmp_path / "lives", "--lives", 99, "--processes", 2)
    shown = tmp_path / "lives.rendering/frames"
    while render.poll() is None and not (shown.exists() and any(shown.iterdir())):
        time.sleep(0.1)
    workers = [Path(f"/proc/{pid}/stat") for pid in children(render, "spawn_main")]
    assert len(workers) == 2
    render.kill()
    render.communicate()
    end = time.time() + 30
    while any(path.exists() and ") Z" not in path.read_text() for path in workers):
        assert time.time() < end
        time.sleep(0.1)


@pytest.mark.parametrize("said, cure", [
    ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n"),
    ("A process in the process pool was terminated abruptly", "--processes 1"),
    ("[Errno 104] Connection reset by peer", "--workers 0"),
    ("CUDA out of memory. Tried to allocate 2 GiB", "--accum 4")])
def test_the_machine_s_limits_are_told_with_a_cure(said, cure, capsys):
    with pytest.raises(SystemExit, match="2"):
        data.run_command(Mock(side_effect=RuntimeError(said)))
    (line,) = lines_of(capsys.readouterr().err)
    assert line.startswith(f"error: {said}; ") and cure in line
