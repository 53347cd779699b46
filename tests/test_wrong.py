"""Wrong and odd inputs, one table: a wrong one is one line on stderr and status 2, an odd but legal one is handled.

A row: what it is, the command, what spoils a copy of the data or of the run, and what the error has to say (or a function
that looks at what a legal one gave). No row may run code of a file, leave a *.part, or write outside of its own folder.
"""
import io
import json
import os
import pickle
import re
import shutil
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, threads
from PIL import Image, ImageOps

import data
import eval as evaluation
import train

MAIN = {"train": train.main, "eval": evaluation.main, "data": data.main}
SD, MD, RICE = (f"train --stage {stage} --data @/data --out @/new --detectors @/run" for stage in train.STAGES)
AGAIN = "train --stage sd --data % --out @/run"                               # goes on where the run stands; %: the data it was trained on
TABLE1, TABLE2 = "eval --ckpt @/run/sd.pt --data @/data --out @/new", "eval --ckpt @/run/rice.pt --data @/data --out @/new"
CHECK = "data check @/data --processes 1"
DEEP = "[" * 100_000
HTML = b"<html><body>404 not found</body></html>"


# ------------------------------------------------------------------ what spoils: functions of the place @


def note(at, name):
    return next((at / "data/annotations").glob(f"*{name}*"))


def write(path, content):
    """`path` below @, or an annotation file by a part of its name, becomes `content` (or what a function makes of its bytes)."""
    def spoil(at):
        file = at / path if "/" in path else note(at, path)
        new = content(file.read_bytes()) if callable(content) else content
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(new if isinstance(new, bytes) else new.encode("utf-8", "surrogatepass"))
    return spoil


def column(place, value):
    """A column of every training row; value: a text or a function of the old one."""
    def change(content):
        rows = [row.split(b"\t") for row in content.splitlines()]
        for row in rows:
            row[place] = value(row[place].decode()).encode() if callable(value) else value if isinstance(value, bytes) else value.encode()
        return b"".join(b"\t".join(row) + b"\n" for row in rows)
    return write("training_videoinfo", change)


def entry(name, change):
    """The JSON object of a test file, changed by a function of (object, its first key)."""
    def spoil(content):
        value = json.loads(content)
        change(value, next(iter(value)))
        return json.dumps(value)
    return write(name, spoil)


def renamed(new):
    """An entry goes by another key."""
    return lambda value, key: value.update({new: value.pop(key)})


def checkpoint(name, change):
    """A checkpoint of the run, changed in place, or replaced by what the function gives."""
    def spoil(at):
        value = torch.load(at / "run" / name, weights_only=True)
        new = change(value)
        torch.save(value if new is None else new, at / "run" / name)
    return spoil


def field(name, value, file="sd.pt"):
    return checkpoint(file, lambda c: c["config"].__setitem__(name, value))


def half(content):
    return content[:len(content) // 2]


class Code:
    """Unpickled, it makes the file @/executed."""

    def __init__(self, at):
        self.at = at

    def __reduce__(self):
        return os.mkdir, (str(self.at / "executed"),)


def code(name, save):
    return lambda at: save({"model": Code(at), "config": {}, "step": 0, "categories": {}}, at / name)


def plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


def frames(content):
    """Every frame's file becomes these bytes."""
    return lambda at: [path.write_bytes(content) for path in (at / "data/frames").iterdir()]


def link_out(folder, ending):
    """Every file of a folder is a link to a file outside of the data (a side file: beside the picture)."""
    def spoil(at):
        for path in list((at / "data" / folder).glob("*.jpg")):
            shutil.copy(path, at / path.name)
            (at / f"{path.stem}.json").write_text('{"original_width": 64, "original_height": 64}')
            if ending == "jpg":
                path.unlink()
            path.with_suffix(f".{ending}").symlink_to(at / f"{path.stem}.{ending}")
    return spoil


def encoded(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


RED = Image.fromarray(np.stack([np.full((24, 40), 200), *np.indices((24, 40)) * 4], 2).astype(np.uint8))     # no corner like another
GREY16 = Image.fromarray((np.arange(24 * 40).reshape(24, 40) * 68).astype(np.uint16))
TURNED = Image.Exif()
TURNED[0x0112] = 6                                                             # EXIF: turn by 90 degrees
HEADER = b"IHDR" + (50000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
PNG_HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\r" + HEADER + zlib.crc32(HEADER).to_bytes(4, "big") + encoded(RED, "PNG")[33:]
JPEG_HUGE = encoded(RED, "JPEG").replace(b"\x08\x00\x18\x00\x28", b"\x08\xc3\x50\xc3\x50")
PICTURES = {"grey JPEG": (RED.convert("L"), "JPEG", {}), "CMYK JPEG": (RED.convert("CMYK"), "JPEG", {"quality": 95}),
            "RGBA PNG": (RED.convert("RGBA"), "PNG", {}), "grey and alpha PNG": (RED.convert("LA"), "PNG", {}),
            "16-bit PNG": (GREY16, "PNG", {}), "palette PNG": (RED.quantize(16), "PNG", {}), "1-bit PNG": (RED.convert("1"), "PNG", {}),
            "progressive JPEG": (RED, "JPEG", {"progressive": True}), "turned JPEG": (RED, "JPEG", {"exif": TURNED, "quality": 95}),
            "turned PNG": (RED, "PNG", {"exif": TURNED}), "1 x 3000 PNG": (RED.resize((1, 3000)), "PNG", {}),
            "APNG": (RED, "PNG", {"save_all": True, "append_images": [ImageOps.mirror(RED)]})}


def looks(image):
    """The frames are read as Pillow, a second reader, sees the picture (16 bits: as the upper eight)."""
    def look(at, said):
        first = next((at / "data/frames").iterdir())
        ours = data.Lives.pictures(at / "data").frame(first.stem)[0]
        eight = Image.fromarray((np.asarray(image) / 257).astype(np.uint8)) if image.mode.startswith("I;16") else image
        theirs = ImageOps.exif_transpose(Image.open(first)).convert("RGB") if image is eight else eight.convert("RGB")
        theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
        assert ours.shape == theirs.shape and ours.dtype == torch.uint8 and "frames: " not in said
        assert (ours.float() - theirs.float()).abs().mean() < 3
    return look


def says(text):
    def look(at, said):
        assert text in said
    return look


def asr(value):
    return write("test_videoid_asr", lambda old: b"".join(row.split(b"\t")[0] + b"\t" + value + b"\n" for row in old.splitlines()))


def first_line(value):
    return lambda old: value + b"\n" + old


def video(source, at):
    """A MovingFashion folder of one product."""
    (at / "mf").mkdir()
    (at / "mf/1.jpg").write_bytes(encoded(RED, "JPEG"))
    for split in ("train", "test"):
        (at / "mf" / f"{split}.json").write_text(source if isinstance(source, str) else json.dumps(source))


def fashion(**changes):
    entry = {"img_path": "1.jpg", "video_paths": ["v.mp4"], "source": "net"} | changes
    return lambda at: video({"7": entry}, at)


def with_ffmpeg(spoil):
    """The same, and something called ffmpeg is on PATH, which finds every video broken."""
    def both(at):
        spoil(at)
        (at / "bin").mkdir()
        (at / "bin/ffmpeg").write_text("#!/bin/sh\nexit 1\n")
        (at / "bin/ffmpeg").chmod(0o755)
        os.environ["PATH"] = str(at / "bin")
    return both


def without_path(at):
    os.environ["PATH"] = str(at)


def download(*sides):
    """img2dataset's folder with these side files, each with a picture."""
    def spoil(at):
        (at / "download").mkdir()
        for n, side in enumerate(sides):
            (at / f"download/{n}.json").write_text(side)
            (at / f"download/{n}.jpg").write_bytes(encoded(RED, "JPEG"))
    return spoil


def cache(content):
    """The boxes that an evaluation keeps are torn."""
    def spoil(at):
        evaluation.main(["--ckpt", str(at / "run/sd.pt"), "--data", str(at / "data"), "--out", str(at / "new")])
        for path in (at / "new").glob("boxes-*.npz"):
            path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    return spoil


def other_arrays(old):
    content = io.BytesIO()
    np.savez(content, clip=np.arange(3), position=np.arange(2))
    return content.getvalue()


def index(change):
    """The index beside the training file, changed by a function of its arrays; its size and time still fit."""
    def spoil(at):
        data.Lives(at / "data", "train")
        path = next((at / "data/annotations").glob(".*.index.npz"))
        arrays = dict(np.load(path)) if callable(change) else {}
        if callable(change):
            change(arrays)
            with open(path, "wb") as file:
                np.savez(file, **arrays)
        else:
            path.write_bytes(change)
    return spoil


def also(*spoils):
    return lambda at: [spoil(at) for spoil in spoils]


STANDS_AT_1 = checkpoint("sd.pt", lambda c: c.update(step=1))
NOTHING = lambda at: None
LEGAL = says("")

TABLE = [
    # folders
    ("missing folder", "train --data @/nowhere --out @/new", NOTHING, "no annotations/ folder"),
    ("file instead of folder", "train --data @/file --out @/new", NOTHING, "no annotations/ folder"),
    ("empty folder", "train --data @/empty --out @/new", NOTHING, "no annotations/ folder"),
    ("eval of a missing folder", "eval --ckpt @/run/sd.pt --data @/nowhere --out @/new", NOTHING, "no annotations/ folder"),
    ("check of a missing folder", "data check @/nowhere", NOTHING, "is this a data folder"),
    ("NUL in a path", "train --data @/da\0ta --out @/new", NOTHING, "no annotations/ folder"),
    ("no training file", SD, lambda at: note(at, "training").unlink(), "expected at least one part"),
    ("training file is a folder", SD, lambda at: (note(at, "training").unlink(), (at / "data/annotations/training_videoinfo_1.txt").mkdir()), "irectory"),
    ("no such split", TABLE1 + " --split val", lambda at: [p.unlink() for p in (at / "data/annotations").glob("val_*")], "no clips in the val split"),
    # training rows
    ("binary annotation", SD, write("training", bytes(range(256)) * 9), "training_videoinfo_part_00.txt:1: expected 11 columns"),
    ("empty annotation", SD, write("training", b""), "no clips"),
    ("rows that are not UTF-8", SD, column(4, b"caf\xe9"), "expected UTF-8"),
    ("../ as video id", SD, column(0, "../../x-0-1"), "is not an id"),
    ("../ as frame id", SD, column(1, lambda old: old.replace('["', '["../../', 1)), "is not an id"),
    ("absolute frame id", SD, column(1, lambda old: old.replace('["', '["/etc/', 1)), "is not an id"),
    ("NUL in a frame id", SD, column(1, lambda old: old.replace('["', '["\\u0000', 1)), "is not an id"),
    ("../ as image id", RICE + " --boxes true", column(3, "../../etc/passwd"), "is not an id"),
    ("frame id of 10,000 letters", SD, column(1, lambda old: old.replace('["', '["' + "x" * 10_000, 1)), "missing"),
    ("code as a list", SD, column(1, "__import__('os').mkdir('executed')"), "expected a list"),
    ("deep nesting", SD, column(2, DEEP), "expected a list"),
    ("integer of 5,000 digits in a box", SD, column(2, f"[[{'9' * 5000}, 1, 2, 3]]"), "expected a list"),
    ("integer of 400 digits in a box", SD, column(2, lambda old: json.dumps([[0, 0, 10 ** 400, 9]] * len(json.loads(old)))), "expected x1, y1"),
    ("NaN in a box", SD, column(2, lambda old: json.dumps([[0, 0, float("nan"), 9]] * len(json.loads(old)))), "expected x1, y1"),
    ("infinity in a box", SD, column(2, lambda old: json.dumps([[0, 0, float("inf"), 9]] * len(json.loads(old)))), "expected x1, y1"),
    ("true as a number", SD, column(2, lambda old: json.dumps([[0, 0, True, True]] * len(json.loads(old)))), "expected x1, y1"),
    ("more boxes than frames", SD, column(2, "[[], [], []]"), "4 frames but 3 entries"),
    ("category of 30 digits", SD, column(5, "9" * 30), "expected a whole number"),
    ("negative category", SD, column(5, "-3"), "expected a whole number"),
    ("blank category", RICE + " --boxes true", column(5, " "), LEGAL),
    ("a column more", SD, column(7, "a\tb"), "expected 11 columns by tab, found 12"),
    ("a video id twice", CHECK, write("training", lambda old: old + old.splitlines(True)[0]), says("ids given twice: 1 of")),
    ("a huge box, out of the picture", RICE + " --boxes true", column(2, lambda old: json.dumps([[0, 0, 9e15, 9e15]] * len(json.loads(old)))), LEGAL),
    ("every ASR empty", RICE + " --boxes true", also(column(7, ""), column(4, "")), LEGAL),
    ("ASR of 100,000 letters in training", RICE + " --boxes true", write("training", lambda old: b"\t".join([*old.split(b"\t")[:7], b"word " * 20_000, *old.split(b"\t")[8:]])), LEGAL),
    # test files
    ("../ in a gallery", TABLE2, entry("test_liveid_to_gallery", lambda v, k: v[k].append("../../x")), "is not an id"),
    ("absolute path in a gallery", TABLE2, entry("test_liveid_to_gallery", lambda v, k: v[k].append("/etc/passwd")), "is not an id"),
    ("NUL in a gallery", TABLE2, entry("test_liveid_to_gallery", lambda v, k: v[k].append("a\0b")), "is not an id"),
    ("number in a gallery", TABLE2, entry("test_liveid_to_gallery", lambda v, k: v[k].append(7)), "is not an id"),
    ("gallery is a text", TABLE2, entry("test_liveid_to_gallery", lambda v, k: v.update({k: "abc"})), "expected a list of image ids"),
    ("newline in a live id", TABLE2, entry("test_liveid_to_gallery", renamed("a\nb")), "is not an id"),
    ("the same image twice in a gallery", TABLE2, entry("test_liveid_to_gallery", lambda v, k: v[k].extend(v[k])), says("4.0 images a gallery")),
    ("../ as a true image", TABLE2, entry("test_videoid_to_gtimage", lambda v, k: v.update({k: ["../x"]})), "is not an id"),
    ("../ as a video id with true images", TABLE2, entry("test_videoid_to_gtimage", renamed("../x-0-1")), "is not an id"),
    ("../ as a frame id with boxes", TABLE1, entry("test_frameid2gtbox", renamed("../x-0-1-0")), "is not an id"),
    ("absolute frame id with boxes", TABLE1, entry("test_frameid2gtbox", renamed("/x-0-1-0")), "is not an id"),
    ("frame id without a number", TABLE1, entry("test_frameid2gtbox", renamed("x-y")), "index a whole number"),
    ("frame index of 5,000 digits", TABLE1, entry("test_frameid2gtbox", renamed("x-0-1-" + "9" * 5000)), "index a whole number"),
    ("NaN in a true box", TABLE1, entry("test_frameid2gtbox", lambda v, k: v.update({k: [[0, 0, float("nan"), 1]]})), "expected x1, y1"),
    ("a text as a true box", TABLE1, entry("test_frameid2gtbox", lambda v, k: v.update({k: "box"})), "expected x1, y1"),
    ("deep nesting in JSON", TABLE1, write("test_frameid2gtbox", DEEP), "not JSON"),
    ("a list for an object", TABLE1, write("test_frameid2gtbox", "[]"), "expected an object"),
    ("a key twice", TABLE1, write("test_frameid2gtbox", '{"a-0-1-0": [], "a-0-1-0": [1]}'), "stands twice"),
    ("JSON that is not UTF-8", TABLE1, write("test_frameid2gtbox", b'{"\xff": []}'), "expected UTF-8"),
    ("integer of 5,000 digits in JSON", TABLE1, write("test_frameid2gtbox", f'{{"a-0-1-0": [[0, 0, {"9" * 5000}, 1]]}}'), "not JSON"),
    ("../ in a file of a split", TABLE1, write("test_scale_small", b"../../etc/passwd\n"), "is not an id"),
    ("../ in a title's row", TABLE2, write("test_image_title", first_line(b"../x\ttitle")), "is not an id"),
    ("../ in an ASR row", TABLE2, write("test_videoid_asr", first_line(b"../x-0-1\ttext")), "is not an id"),
    ("ASR that is not UTF-8", TABLE2, asr(b"\xff\xfe"), "expected UTF-8"),
    ("a title twice, not the same", TABLE2, write("test_image_title", first_line(b"a\tred\na\tblue")), "another text"),
    ("two files for one", TABLE2, lambda at: shutil.copy(note(at, "test_image_title"), at / "data/annotations/test_image_title_9.txt"), "which one?"),
    ("a kind that is a list", TABLE1, entry("test_frameid2kind", lambda v, k: v.update({k: ["x"]})), "is not an id"),
    ("every test ASR empty", TABLE2, asr(b""), LEGAL),
    ("test ASR of 100,000 letters", TABLE2, asr(b"word " * 20_000), LEGAL),
    ("test ASR of one word of 200,000 letters", TABLE2, asr(b"w" * 200_000), LEGAL),
    # pictures
    ("HTML saved as .jpg", SD, frames(HTML), "not a readable JPEG or PNG"),
    ("pictures of 0 bytes", SD, frames(b""), "not a readable JPEG or PNG"),
    ("half a JPEG's header", SD, frames(encoded(RED, "JPEG")[:200]), "not a readable JPEG or PNG"),
    ("PNG that says 50,000 x 50,000", SD, frames(PNG_HUGE), "50000 x 50000 pixels, more than"),
    ("JPEG that says 50,000 x 50,000", SD, frames(JPEG_HUGE), "50000 x 50000 pixels, more than"),
    ("animated GIF named .jpg", SD, frames(encoded(RED, "GIF", save_all=True, append_images=[ImageOps.mirror(RED)])), "not a readable JPEG or PNG"),
    ("frames that are folders", SD, lambda at: [(p.unlink(), p.mkdir()) for p in (at / "data/frames").iterdir()], "missing"),
    ("links out of the folder", SD, link_out("frames", "jpg"), "a link that leads out"),
    ("side files that are links out of the folder", SD, link_out("frames", "json"), "a link that leads out"),
    ("shop images that are links out of the folder", CHECK, link_out("images", "jpg"), says("a link that leads out")),
    *((f"side file {text[:40]}", SD, lambda at, text=text: [p.with_suffix(".json").write_text(text) for p in list((at / "data/frames").iterdir())], "expected an object with")
      for text in ("[]", DEEP, '{"original_width": 1e999, "original_height": 4}', '{"original_width": -4, "original_height": 4}',
                   '{"original_width": 1' + "0" * 400 + ', "original_height": 4}')),
    *((name, CHECK, frames(encoded(image, kind, **options)), looks(image)) for name, (image, kind, options) in PICTURES.items()),
    ("evaluation of pictures of 1 x 3000", "eval --ckpt @/run/rice.pt --data @/data --out @/new", frames(encoded(RED.resize((1, 3000)), "PNG")), LEGAL),
    ("evaluation of frames of 3000 x 1", TABLE1, frames(encoded(RED.resize((3000, 1)), "PNG")), LEGAL),
    ("evaluation without a picture", TABLE1, frames(b""), says("missing=32")),
    # checkpoints
    ("missing checkpoint", "eval --ckpt @/run/none.pt", NOTHING, "no such checkpoint"),
    ("checkpoint is a folder", "eval --ckpt @/run", NOTHING, "no such checkpoint"),
    ("truncated checkpoint", TABLE1, write("run/sd.pt", half), "not a checkpoint of train.py"),
    ("truncated checkpoint to go on from", AGAIN, write("run/sd.pt", half), "not a checkpoint of train.py"),
    ("truncated checkpoint of the stage before", MD, write("run/sd.pt", half), "not a checkpoint of train.py"),
    ("empty checkpoint", TABLE1, write("run/sd.pt", b""), "not a checkpoint of train.py"),
    ("code in a checkpoint", TABLE1, code("run/sd.pt", torch.save), "not a checkpoint of train.py"),
    ("code in a plain pickle", TABLE1, code("run/sd.pt", plain_pickle), "not a checkpoint of train.py"),
    ("code in public weights", SD + " --init @/init.pth", code("init.pth", torch.save), "not a state dict"),
    ("another stage's checkpoint before", MD, lambda at: shutil.copy(at / "run/md.pt", at / "run/sd.pt"), "holds stage md, not sd"),
    ("another stage's checkpoint to go on from", "train --stage rice --data % --out @/run", lambda at: shutil.copy(at / "run/sd.pt", at / "run/rice.pt"), "holds stage sd"),
    ("checkpoint that is a list", TABLE1, checkpoint("sd.pt", lambda c: [1, 2]), "not a checkpoint of train.py"),
    ("checkpoint that is a tensor", TABLE1, checkpoint("sd.pt", lambda c: torch.zeros(3)), "not a checkpoint of train.py"),
    ("weights alone", TABLE1, checkpoint("sd.pt", lambda c: c["model"]), "no categories, config, model, step"),
    ("configuration a text", TABLE1, checkpoint("sd.pt", lambda c: c.update(config="tiny")), "not a checkpoint of train.py"),
    ("configuration without dim", TABLE1, checkpoint("sd.pt", lambda c: c["config"].pop("dim")and None), "has no dim"),
    ("dim a text", TABLE1, field("dim", "wide"), "has dim 'wide'"),
    ("frames zero", TABLE1, field("frames", 0), "has frames 0"),
    ("shortest a number", TABLE1, field("shortest", 48), "not a checkpoint of train.py"),
    ("workers negative", TABLE1, field("workers", -1), "has workers -1"),
    ("unknown stage", TABLE1, field("stage", "sdd"), "has stage 'sdd'"),
    ("dim of 2 ** 40", TABLE1, field("dim", 2 ** 40), "has dim 1099511627776"),
    ("dim with a line break", TABLE1, field("dim", "a\nb"), "has dim 'a\\nb'"),
    ("a text with an escape", TABLE1, field("lr", "a\x1b[31m"), "has lr 'a\\x1b[31m'"),
    ("a text that is no text", TABLE1, field("lr", "\ud800"), "not a checkpoint of train.py"),
    ("shortest backwards", TABLE1, field("shortest", [64, 48, 16]), "has shortest"),
    ("shortest a table", TABLE1, field("shortest", {48: 1, 64: 2, 16: 3}), "has shortest"),
    ("a million layers", TABLE1, field("encoder_layers", 10 ** 6), "has encoder_layers 1000000"),
    ("no category", TABLE1, checkpoint("sd.pt", lambda c: c.update(categories={})), "expected one or more"),
    ("step a tensor", TABLE1, checkpoint("sd.pt", lambda c: c.update(step=torch.tensor(2))), "step: expected 0 to"),
    ("step and a half", AGAIN, checkpoint("sd.pt", lambda c: c.update(step=1.5)), "step: expected 0 to"),
    ("weights of another kind", TABLE1, checkpoint("sd.pt", lambda c: c["model"].update({"class_embed.bias": c["model"]["class_embed.bias"].cfloat()})), "weights that do not fit"),
    ("a detector in a detector", TABLE1, checkpoint("sd.pt", lambda c: c.update(detector=dict(c))), "detector: expected one of stage"),
    ("dim of another model", TABLE1, field("dim", 64), "weights that do not fit"),
    ("no weights", TABLE1, checkpoint("sd.pt", lambda c: c.update(model={})), "weights that do not fit"),
    ("weights a list", TABLE1, checkpoint("sd.pt", lambda c: c.update(model=[1])), "not a checkpoint of train.py"),
    ("weights that are numbers", TABLE1, checkpoint("sd.pt", lambda c: c["model"].update({k: 1 for k in c["model"]})), "not a checkpoint of train.py"),
    ("a weight not a number", TABLE1, checkpoint("sd.pt", lambda c: c["model"].update({"class_embed.bias": c["model"]["class_embed.bias"] / 0})), "not finite"),
    ("a weight of another shape", MD, checkpoint("sd.pt", lambda c: c["model"].update({"class_embed.bias": torch.zeros(99)})), "weights that do not fit"),
    ("categories a list", TABLE1, checkpoint("sd.pt", lambda c: c.update(categories=list(c["categories"]))), "not a checkpoint of train.py"),
    ("a category less", TABLE1, checkpoint("sd.pt", lambda c: c["categories"].popitem() and None), "weights that do not fit"),
    ("versions a tensor", TABLE1, checkpoint("sd.pt", lambda c: c.update(versions=torch.ones(2))), "not a checkpoint of train.py"),
    ("step a text", TABLE1, checkpoint("sd.pt", lambda c: c.update(step="2")), "not a checkpoint of train.py"),
    ("step beyond the last", AGAIN, checkpoint("sd.pt", lambda c: c.update(step=99)), "step: expected 0 to 2"),
    ("no optimizer to go on with", AGAIN, also(STANDS_AT_1, checkpoint("sd.pt", lambda c: c.pop("optimizer") and None)), "optimizer's state does not fit"),
    ("an optimizer of other shapes", AGAIN, also(STANDS_AT_1, checkpoint("sd.pt", lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(7)))), "optimizer's state does not fit"),
    ("an optimizer that is not finite", AGAIN, also(STANDS_AT_1, checkpoint("sd.pt", lambda c: c["optimizer"]["state"][0].update(exp_avg=c["optimizer"]["state"][0]["exp_avg"] / 0))), "optimizer's state does not fit"),
    ("an optimizer of several steps", AGAIN, also(STANDS_AT_1, checkpoint("sd.pt", lambda c: c["optimizer"]["state"][0].update(step=torch.zeros(2)))), "optimizer's state does not fit"),
    ("an optimizer without state", AGAIN, also(STANDS_AT_1, checkpoint("sd.pt", lambda c: c["optimizer"].update(state={}))), "optimizer's state does not fit"),
    ("no detector inside", TABLE2, checkpoint("rice.pt", lambda c: c.pop("detector") and None), "which neither this data nor a detector"),
    ("RICE as its own detector", TABLE2, checkpoint("rice.pt", lambda c: c.update(detector=dict(c))), "detector: expected one of stage"),
    ("weights too large to add", TABLE2, checkpoint("rice.pt", lambda c: c["model"].update({"visual.proj": torch.full_like(c["model"]["visual.proj"], 1e38)})), "embeddings are not finite"),
    ("no vocabulary", TABLE2, checkpoint("rice.pt", lambda c: c.pop("tokenizer").numel() and None), "not a checkpoint of train.py"),
    ("a vocabulary of noise", TABLE2, checkpoint("rice.pt", lambda c: c.update(tokenizer=torch.arange(99, dtype=torch.uint8))), "not a sentencepiece model"),
    ("a detector inside that is none", TABLE2, checkpoint("rice.pt", lambda c: c["detector"].update(config="md")), "not a checkpoint of train.py"),
    ("missing public weights", SD + " --init @/none.pth", NOTHING, "no such file"),
    ("HTML as public weights", SD + " --init @/init.pth", write("./init.pth", HTML), "not a state dict"),
    ("public weights of something else", SD + " --init @/init.pth", lambda at: torch.save({"layer4.0.conv1.weight": torch.zeros(1)}, at / "init.pth"), "left over"),
    ("positions that are a number", RICE + " --boxes true --init @/init.pth", lambda at: torch.save({"visual.positional_embedding": torch.tensor(1.0)}, at / "init.pth"), "of another shape"),
    # what a run keeps
    ("results.json torn", AGAIN, write("run/results.json", half), "results.json: not JSON"),
    ("results.json not UTF-8", AGAIN, write("run/results.json", b"\xff\xfe"), "results.json: not JSON"),
    ("results.json a list", AGAIN, write("run/results.json", "[1]"), "results.json: not JSON of results"),
    ("results.json without results", AGAIN, write("run/results.json", lambda old: json.dumps({"sd": {"fingerprint": json.loads(old)["sd"]["fingerprint"]}})), "not results"),
    ("a line of the log torn at its end", AGAIN, also(STANDS_AT_1, write("run/sd.jsonl", lambda old: old[:-9])), says("goes on from step 1 of 2")),
    ("a line of the log spoilt", AGAIN, also(STANDS_AT_1, write("run/sd.jsonl", first_line(b"\xff{"))), "sd.jsonl:1: not a line of the log"),
    ("a line of the log without its step", AGAIN, also(STANDS_AT_1, write("run/sd.jsonl", first_line(b'{"step": "x"}'))), "sd.jsonl:1: not a line of the log"),
    ("kept boxes torn", TABLE1, cache(half), "not the boxes that were kept"),
    ("kept boxes empty", TABLE1, cache(b""), "not the boxes that were kept"),
    ("kept boxes of other arrays", TABLE1, cache(other_arrays), "not the boxes that were kept"),
    ("index empty", SD, index(b""), LEGAL),
    ("index of noise", SD, index(b"PK\x03\x04" + bytes(range(200))), LEGAL),
    ("index that names other places", SD, index(lambda a: a["rows"]["offset"].__iadd__(3)), "not the row that was indexed"),
    ("index that names places before the file", SD, index(lambda a: a["rows"]["offset"].__isub__(10 ** 6)), "not the row that was indexed"),
    # where to write
    ("--out is a file", "train --data @/data --out @/file", NOTHING, "is a file, or below one"),
    ("--out below a file", "train --data @/data --out @/file/x", NOTHING, "is a file, or below one"),
    ("eval's --out is a file", "eval --ckpt @/run/sd.pt --data @/data --out @/file", NOTHING, "is a file, or below one"),
    ("--json into a missing folder", TABLE1 + " --json @/none/x.json", NOTHING, "expected a file in a folder that exists"),
    ("--json is a folder", TABLE1 + " --json @/run", NOTHING, "expected a file in a folder that exists"),
    ("render into a folder that exists", "data render @/data", NOTHING, "exists; render into another folder"),
    ("render into the root folder", "data render /", NOTHING, "exists; render into another folder"),
    ("render below a file", "data render @/file/x", NOTHING, "is a file, or below one"),
    # flags
    ("unknown flag", "train --banana 1", NOTHING, "--banana"), ("unknown flag of eval", "eval --ckpt x --banana", NOTHING, "--banana"),
    ("unknown flag of data", "data check x --banana", NOTHING, "--banana"), ("unknown command", "data banana", NOTHING, "banana"),
    ("no command", "data", NOTHING, "COMMAND"), ("no checkpoint", "eval", NOTHING, "--ckpt"), ("flag without value", "train --steps", NOTHING, "--steps"),
    ("unknown stage flag", "train --stage x", NOTHING, "--stage x"), ("unknown preset", "train --preset x", NOTHING, "--preset x"),
    ("unknown split", "eval --ckpt x --split banana", NOTHING, "--split"), ("unknown decoys", "data render @/r --decoys x", NOTHING, "--decoys"),
    *((f"{flag} {value}", f"{SD} {flag} {value}", NOTHING, flag) for flag, value in (
        ("--steps", "many"), ("--steps", "1.5"), ("--steps", "-1"), ("--batch", "0"), ("--lr", "nan"), ("--lr", "inf"), ("--lr", "-inf"), ("--lr", "fast"),
        ("--epochs", "inf"), ("--epochs", "nan"), ("--drop", "nan"), ("--drop", "2"), ("--clip-norm", "inf"), ("--weight-decay", "nan"), ("--dense", "nan"), ("--looks", "inf"),
        ("--encoder-layers", "1000000"), ("--decoder-layers", "1"), ("--dim", "2147483632"), ("--keep", "1" + ",1" * 1000), ("--workers", "99999"),
        ("--seed", "9" * 30), ("--steps", "9" * 30), ("--shortest", "9" * 5000 + ",1,1"), ("--shortest", "a,b,c"), ("--shortest", "48,64,0"), ("--keep", ","),
        ("--keep", "-1"), ("--precision", "float16"), ("--schedule", "x"), ("--backbone", "vgg"), ("--accum", "3"), ("--longest", "0"), ("--frames", "0"))),
    ("a picture of one pixel", RICE + " --boxes true --size 1 --patch 1", NOTHING, "--size 1"),
    ("heads that do not divide", RICE + " --boxes true --vit-heads 3", NOTHING, "heads 3"),
    ("queries kept of more than there are", MD + " --keep 999", NOTHING, LEGAL),
    ("more frames than there are", MD + " --frames 999", NOTHING, LEGAL),
    ("more negatives than there are", RICE + " --boxes true --n-neg 999", NOTHING, LEGAL),
    ("more clips of a live than there are", RICE + " --boxes true --per-live 999 --train-frames 99", NOTHING, LEGAL),
    ("--rerank of more than the gallery", TABLE2 + " --rerank 999", NOTHING, says("PMD on the first 999")),
    ("--rerank 0", TABLE2 + " --rerank 0", NOTHING, "--rerank 1 or more"), ("--rerank a text", TABLE2 + " --rerank x", NOTHING, "--rerank"),
    ("--workers negative", TABLE2 + " --workers -1", NOTHING, "--workers"), ("--processes 0", "data check @/data --processes 0", NOTHING, "--processes 0"),
    *((f"render {flags[:40]}", f"data render @/r {flags}", NOTHING, flags.split()[0]) for flags in (
        "--size 0", "--size -5", "--size 99999999", "--lives 0", "--lives " + "9" * 20, "--categories 0", "--categories 99", "--frames 3", "--products 0",
        "--seed -1", "--clips 0", "--gallery -2", "--size x", "--val-lives -1")),
    # conversions
    ("dedup of a missing folder", "data dedup @/nowhere --ckpt @/run/rice.pt", NOTHING, "no .jpg and no .png"),
    ("dedup with a detector", "data dedup @/data --ckpt @/run/sd.pt", NOTHING, "expected a checkpoint of --stage rice"),
    ("dedup above 1", "data dedup @/data --ckpt @/run/rice.pt --threshold 1.5", NOTHING, "a cosine"),
    ("dedup by nan", "data dedup @/data --ckpt @/run/rice.pt --threshold nan", NOTHING, "a cosine"),
    ("dedup by a text", "data dedup @/data --ckpt @/run/rice.pt --threshold high", NOTHING, "--threshold"),
    ("dedup of a name with a newline", "data dedup @/data --ckpt @/run/rice.pt", lambda at: (at / "data/images/a\nb.jpg").write_bytes(b""), "is not an id"),
    ("dedup of an image that lies twice", "data dedup @/data --ckpt @/run/rice.pt --threshold 0.999999", lambda at: [
        (p.parent / p.name[:2]).mkdir(exist_ok=True) or shutil.copy(p, p.parent / p.name[:2]) for p in list((at / "data/images").glob("*.jpg"))[:1]], LEGAL),
    ("link of a missing folder", "data link @/nowhere @/new", NOTHING, "no such folder"),
    ("link of side files that are none", "data link @/download @/new", download("[]", DEEP, "{", '{"url": "http://x/..%2f"}', '{"url": "http://x/a\\u0000b.jpg"}'),
     says("without an id: 5")),
    ("link to a file", "data link @/download @/file", download('{"url": "http://x/a.jpg"}'), "file"),
    ("movingfashion without ffmpeg", "data movingfashion @/mf @/new", also(fashion(), without_path), "needs the program ffmpeg"),
    ("movingfashion without train.json", "data movingfashion @/empty @/new", with_ffmpeg(NOTHING), "train.json: expected"),
    ("movingfashion a list", "data movingfashion @/mf @/new", with_ffmpeg(lambda at: video([1], at)), "train.json: expected"),
    ("movingfashion not JSON", "data movingfashion @/mf @/new", with_ffmpeg(lambda at: video("{", at)), "train.json: expected"),
    ("movingfashion deep", "data movingfashion @/mf @/new", with_ffmpeg(lambda at: video(DEEP, at)), "train.json: expected"),
    ("movingfashion image a number", "data movingfashion @/mf @/new", with_ffmpeg(fashion(img_path=7)), "img_path is a text"),
    ("movingfashion videos a text", "data movingfashion @/mf @/new", with_ffmpeg(fashion(video_paths="v.mp4")), "video_paths a list"),
    ("movingfashion ../ image", "data movingfashion @/mf @/new", with_ffmpeg(fashion(img_path="../data/x.jpg")), "leads out of the folder"),
    ("movingfashion absolute video", "data movingfashion @/mf @/new", with_ffmpeg(fashion(video_paths=["/etc/passwd"])), "leads out of the folder"),
    ("movingfashion NUL", "data movingfashion @/mf @/new", with_ffmpeg(fashion(img_path="a\0.jpg")), "leads out of the folder"),
    ("movingfashion ../ key", "data movingfashion @/mf @/new", with_ffmpeg(lambda at: video({"../7": {"img_path": "1.jpg", "video_paths": []}}, at)), "is not an id"),
    ("movingfashion image missing", "data movingfashion @/mf @/new", with_ffmpeg(fashion(img_path="2.jpg")), "2.jpg"),
    ("movingfashion videos that cannot be cut", "data movingfashion @/mf @/new", with_ffmpeg(fashion()), says("2 could not be read")),
]


def test_the_table_is_one():
    assert len(TABLE) >= 60 and len({name for name, *_ in TABLE}) == len(TABLE)


@pytest.mark.parametrize("command, spoil, outcome", [pytest.param(*row, id=re.sub(r"[^\w .,+-]", "_", name)[:60]) for name, *row in TABLE])
def test_wrong_and_odd_inputs(run_one, livestreams, tmp_path, capsys, monkeypatch, command, spoil, outcome):
    at = tmp_path / "at"
    shutil.copytree(livestreams, at / "data")
    shutil.copytree(run_one, at / "run")
    (at / "empty").mkdir()
    (at / "file").write_text("a file")
    monkeypatch.setattr(data.multiprocessing, "get_context", threads)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.chdir(at)
    spoil(at)
    before, outside = snapshot(at), capsys.readouterr() and snapshot(livestreams)
    main, *arguments = command.replace("@", str(at)).replace("%", str(livestreams)).split(" ")
    stop = types.SimpleNamespace(value=types.SimpleNamespace(code=0))
    try:
        MAIN[main]([*arguments[:1], *(SMALL if main == "train" else []), *arguments[1:]] if main == "data" else [*(SMALL if main == "train" else []), *arguments])
    except SystemExit as error:
        stop.value.code = error.code or 0
    said = capsys.readouterr()
    errors = [line for line in said.err.replace("\r", "\n").splitlines() if "error: " in line]
    if callable(outcome):
        assert stop.value.code in (0, 1 if "check" in command else 0) and not errors, said.err
        outcome(at, said.out)
    else:
        assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and outcome in errors[0], said
        assert said.err.rstrip().endswith(errors[0]) and len(errors[0]) < 3000
    assert "Traceback" not in said.err and not (at / "executed").exists()
    after = snapshot(at)
    assert not [name for name in after if name.endswith(".part")] and snapshot(livestreams) == outside
    for name in ("file", *(n for n in before if n.startswith("data/") and "index.npz" not in n)):
        assert after.get(name) == before.get(name), name


def snapshot(root):
    """What lies in a folder: {path: size and time}."""
    return {str(p.relative_to(root)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in Path(root).rglob("*") if not p.is_dir() or p.is_symlink()}
