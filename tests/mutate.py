"""Random damage to random files: whatever it does, a command succeeds or ends with one line and status 2. Not a test of pytest:

    python tests/mutate.py --count 1000 --seed 0                about two cases a second; exit status 1 when one fails
    python tests/mutate.py --seed 0 --case 17                    one case again

A case damages one file of a tiny data set and run (bytes, rows, columns or a value), then checks, reads, trains or evaluates.
Another exception, more or less than one line of error, a *.part left, code that ran, or more than 60 s of the processor is a failure.
"""
import argparse
import contextlib
import io
import json
import multiprocessing.dummy
import random
import resource
import shutil
import signal
import tempfile
import traceback
from pathlib import Path

import torch
from conftest import SMALL
from tqdm import tqdm

import data
import eval as evaluation
import train

NASTY = ["", " ", "..", "../../x", "/etc/passwd", "a\0b", "\ud800", "a\nb\tc", "x" * 5000, "nan", "9" * 5000, "١", -1, 0, 1, 2, 255, 2 ** 31, 2 ** 63,
         10 ** 400, -0.5, 1e308, float("nan"), float("inf"), None, True, [], {}, [[]], [None], {"a": 1}, [1, 2, 3, 4], "[" * 9999, "__import__('os').mkdir('executed')"]
KINDS = {"data/annotations/t*": "check lives train eval", "data/annotations/v*": "check lives", "data/annotations/.*": "lives train",
         "data/frames/*.jpg": "check train eval", "data/frames/*.json": "check train eval", "data/images/*": "check train eval",
         "run/*.pt": "eval again next", "run/*.npz": "eval next", "run/*.json": "again", "run/*.jsonl": "again"}       # file -> what is done then


def nodes(value):
    """Every (container, key) in nested dicts and lists."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from nodes(value[key])


def damage_value(value, rng):
    """An entry of nested dicts and lists is removed, doubled, renamed, replaced."""
    box, key = rng.choice(list(nodes(value)) or [({0: 0}, 0)])
    how = rng.randrange(4)
    if how == 0:
        del box[key]
    elif how == 1:
        box[key] = box[rng.choice(list(box) if isinstance(box, dict) else range(len(box)))]
    elif how == 2 and isinstance(box, dict):
        box[rng.choice([n for n in NASTY if isinstance(n, str)])] = box.pop(key)
    elif torch.is_tensor(box[key]) and box[key].numel() and rng.random() < 0.5:
        box[key].view(-1)[rng.randrange(box[key].numel())] = rng.choice([-1, 0, 100])
    else:
        box[key] = rng.choice(NASTY)
    return value


def damage_rows(content, rng):
    rows = [row.split(b"\t") for row in content.split(b"\n")]
    row, other, how = rng.choice(rows), rng.choice(rows), rng.randrange(4)
    if how < 2:
        rows[rng.randrange(len(rows)):rng.randrange(2)] = [other]
    else:
        row[rng.randrange(len(row))] = rng.choice([rng.choice(other), str(rng.choice(NASTY)).encode("utf-8", "surrogatepass")])
    return b"\n".join(b"\t".join(row) for row in rows)


def damage_bytes(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 30])):
        at, n = rng.randrange(len(content) + 1), rng.choice([1, 1, 4, 100, len(content) if rng.random() < 0.1 else 1])
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in content[at:at + n])
        content[at:at + n] = rng.choice([b"", b"", flipped, flipped, 2 * content[at:at + n], rng.choice([b"\0", b"\xff", b"9", b"-", b"[", b"\t", b"\n"]) * n])
    return bytes(content)


def damage(path, rng):
    if path.suffix == ".pt" and rng.random() < 0.6:
        torch.save(damage_value(torch.load(path, weights_only=True), rng), path)
    elif path.suffix == ".json" and rng.random() < 0.6:
        path.write_text(json.dumps(damage_value(json.loads(path.read_text()), rng)))
    else:
        path.write_bytes((damage_rows if path.suffix == ".txt" and rng.random() < 0.6 else damage_bytes)(path.read_bytes(), rng))


def act(action, stage, at):
    if action == "check":
        data.main(["check", str(at / "data"), "--processes", "1"])
    elif action == "eval":
        evaluation.main(["--ckpt", str(at / f"run/{stage}.pt"), "--data", str(at / "data"), "--out", str(at / "run")])
    elif action == "lives":
        for split in ("train", "val", "test"):
            with contextlib.suppress(data.BadInput):
                read = data.Lives(at / "data", split)
                list(map(read.clip_or_none, range(len(read))))
    else:
        stage = {"sd": "md", "md": "rice"}.get(stage, stage) if action == "next" else stage
        train.main(["--stage", stage, "--data", str(at / "data"), "--out", str(at / ("run" if action == "again" else "new")),
                    "--detectors", str(at / "run"), *SMALL])


def hang(*_):
    raise GeneratorExit("more than 60 s of the processor, or 15 minutes")               # no Exception: what catches those must not catch it


def run_case(root, rng, name):
    """-> "succeeded", "refused" or "failed", and what it was."""
    at, said, status = root / "case", io.StringIO(), 0
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(root / "base", at)
    kind = rng.choice(list(KINDS))
    path = rng.choice(sorted(at.glob(kind), key=lambda path: (path.suffix != ".npz" and path.name, path.stat().st_size)))   # theirs hold a hash
    action, stage = rng.choice(KINDS[kind].split()), path.stem if path.suffix in (".pt", ".jsonl") else rng.choice(train.STAGES)
    what = f"{name}: {path.relative_to(at)}, {action} {stage}"
    damage(path, rng)
    signal.setitimer(signal.ITIMER_PROF, 60)             # of the processor: on a busy machine the clock tells little
    signal.alarm(900)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            act(action, stage, at)
    except SystemExit as stop:
        status = stop.code or 0
    except (Exception, GeneratorExit):
        return "failed", f"{what}\n{traceback.format_exc()}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    errors = [line for line in said.getvalue().replace("\r", "\n").splitlines() if line.startswith("error: ")]
    left = [p.name for p in root.rglob("*") if p.name.endswith(".part") or p.name == "executed"]
    if left or len(errors) != (status == 2) or status not in ((0, 1, 2) if action == "check" else (0, 2)):
        return "failed", f"{what}: status {status}, {len(errors)} errors {errors[:3]}, left {left}"
    return "refused" if status == 2 else "succeeded", what


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("count", 1000), ("seed", 0), ("case", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))                 # what asks for more fails here instead of elsewhere
    data.multiprocessing.get_context = lambda kind: multiprocessing.dummy        # threads: no seconds to start
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, hang)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        root = Path(folder)
        data.render(root / "case/data", lives=2, val_lives=1, test_lives=1, products=4, clips=4, gallery=4, frames=4, size=64)
        for path in sorted((root / "case/data/frames").iterdir())[::5]:
            path.with_suffix(".json").write_text('{"original_width": 64, "original_height": 64}')
        train.main(["--data", str(root / "case/data"), "--out", str(root / "case/run"), *SMALL])
        checkpoint = torch.load(root / "case/run/rice.pt", weights_only=True)
        torch.save(checkpoint | {"step": 1}, root / "case/run/rice.pt")          # RICE has a step to go
        (root / "case").rename(root / "base")
        counts, bar = {"succeeded": 0, "refused": 0, "failed": 0}, tqdm(range(options.count) if options.case is None else [options.case], unit="case")
        tqdm._instances.discard(bar)                                             # or a command's error would close it
        for case in bar:
            outcome, what = run_case(root, random.Random(f"{options.seed} {case}"), f"--seed {options.seed} --case {case}")
            counts[outcome] += 1
            bar.set_postfix(counts, refresh=False)
            if outcome == "failed":
                bar.write(what)
    print(f"seed {options.seed}: {counts}")
    raise SystemExit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
