"""A run that is killed again and again ends with the bits of one that was left alone. A script:

    python tests/kills.py --stage sd --kills 20 --seed 0     sd, md or rice; status 1: a difference

Each life is the same command. It dies by SIGKILL at a random moment of training, while it starts,
with half a checkpoint written, or between writing and renaming one. Weights, optimizer and log are
then compared with those of an uninterrupted run.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data                    # noqa: E402
import train                   # noqa: E402
from conftest import SMALL     # noqa: E402

# One life: what it dies of, at which checkpoint, then the flags of train.py.
LIFE = """
import os, sys, torch, train
what, left, save, replace = sys.argv[1], int(sys.argv[2]), torch.save, os.replace
def dies(when):
    global left
    left -= what == when
    return what == when and left < 0
def torn_save(value, path):
    save(value, path)
    if dies("half a checkpoint"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), 9)
def no_replace(source, target):
    if ".pt." in str(source) and dies("before the rename"):
        os.kill(os.getpid(), 9)
    replace(source, target)
torch.save, os.replace = torn_save, no_replace
train.main(sys.argv[3:])
"""


def live(what, left, flags, path, rng):
    """One life -> what it died of, None when it came to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "-c", LIFE, what, str(left), *flags], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=environment)
    before = path.stat().st_mtime_ns if path.exists() else 0
    while what == "training" and process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns != before:     # it has saved once
            break
        time.sleep(0.01)
    if what in ("training", "starting"):
        delay = rng.uniform(0, 1 if what == "training" else 6)
        what = f"{what}, {delay:.3f} s"
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
    error = process.communicate()[1]
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"it did not go on: status {process.returncode}: {error[-2000:]}")
    return what if process.returncode else None


def compare(args, root, rng):
    data.render(root / "lives", lives=2, val_lives=1, test_lives=2, products=4, clips=4, gallery=4,
                frames=4, size=64, processes=1)
    common = ["--data", str(root / "lives"), *SMALL, "--stage"]
    for before in train.STAGES[:train.STAGES.index(args.stage)]:
        train.main([*common, before, "--out", str(root / "before")])
    common += [args.stage, "--steps", str(args.steps), "--save-every", "1", "--detector-dir",
               str(root / "before"), "--out"]
    path, deaths = root / "killed" / f"{args.stage}.pt", 0
    live("nothing", 0, [*common, str(root / "whole")], path, rng)
    moments = ["training", "training", "starting", "half a checkpoint", "before the rename"]
    while deaths < args.kills:
        what = live(rng.choice(moments), rng.randrange(12), [*common, str(path.parent)], path, rng)
        if what is None:
            break
        deaths += 1
        step = torch.load(path, weights_only=True)["step"] if path.exists() else 0
        print(f"{deaths:>4}  {what:<26}{step:>5}", flush=True)
    live("nothing", 0, [*common, str(path.parent)], path, rng)
    whole, killed = root / "whole" / path.name, path
    one, two = (torch.load(file, weights_only=True) for file in (whole, killed))
    state = [{(p, name): value for p, part in checkpoint["optimizer"]["state"].items()
              for name, value in part.items()} for checkpoint in (one, two)]
    logs = [file.with_suffix(".jsonl").read_bytes() for file in (whole, killed)]
    right = {"weights": same(one["model"], two["model"]), "optimizer": same(*state),
             "log": logs[0] == logs[1], "as many kills as asked for": deaths == args.kills}
    said = ", ".join(f"{name} {'ok' if ok else 'NOT OK'}" for name, ok in right.items())
    print(f"{args.stage}, {deaths} kills, {two['step']} steps: {said}")
    return 0 if all(right.values()) else 1


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=train.STAGES, default="sd")
    for name, default in (("kills", 20), ("seed", 0), ("steps", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        sys.exit(compare(args, Path(root), random.Random(args.seed)))


if __name__ == "__main__":
    main()
