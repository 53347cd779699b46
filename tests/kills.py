"""A run that is killed (SIGKILL) again and again ends with the bits of one that was left alone. Not a test of pytest:

    python tests/kills.py --stage sd --kills 20 --seed 0            sd, md or rice; minutes; exit status 1 on a difference

Each life is the same command. It dies at a random moment of training, while it starts, with half a checkpoint written, or
between writing and renaming one. Weights, optimizer and log are then compared with the uninterrupted run's.
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
from conftest import ROOT, SMALL

import data
import train

# A life: what it dies of, at which checkpoint, flags of train.py.
LIFE = """
import os, sys, train
what, left, fsync, replace = sys.argv[1], int(sys.argv[2]), os.fsync, os.replace
def die(when, path):
    global left
    left -= what == when and path.endswith(".pt.part")
    return what == when and left < 0
def half(file):
    if die("half a checkpoint", os.readlink(f"/proc/self/fd/{file}")):
        os.kill(os.ftruncate(file, os.fstat(file).st_size // 2) or os.getpid(), 9)
    fsync(file)
os.fsync = half
os.replace = lambda source, target: os.kill(os.getpid(), 9) if die("before the rename", str(source)) else replace(source, target)
train.main(sys.argv[3:])
"""


def live(what, left, flags, path, rng):
    """One life -> what it died of, None when it came to its end."""
    process = subprocess.Popen([sys.executable, "-c", LIFE, what, str(left), *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    saved = lambda: path.stat().st_mtime_ns if path.exists() else 0
    before = saved()
    while what == "training" and process.poll() is None and saved() == before:
        time.sleep(0.01)                                                         # until it has saved once
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=train.STAGES, default="sd")
    for name, default in (("kills", 20), ("seed", 0), ("steps", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        sys.exit(compare(options, Path(root), random.Random(options.seed)))


def compare(options, root, rng):
    data.render(root / "lives", lives=2, val_lives=1, test_lives=2, products=4, clips=4, gallery=4, frames=4, size=64, processes=1)
    common = ["--data", str(root / "lives"), *SMALL, "--stage"]
    for before in train.STAGES[:train.STAGES.index(options.stage)]:
        train.main([*common, before, "--out", str(root / "before")])
    common += [options.stage, "--steps", str(options.steps), "--save-every", "1", "--detectors", str(root / "before"), "--out"]
    path, deaths = root / "killed" / f"{options.stage}.pt", 0
    live("nothing", 0, [*common, str(root / "whole")], path, rng)
    print(f"\n{'kill':>4}  {'moment':<26}{'step':>5}")
    while deaths < options.kills:
        what = rng.choice(["training", "training", "starting", "half a checkpoint", "before the rename"])
        what = live(what, rng.randrange(12), [*common, str(path.parent)], path, rng)
        if what is None:
            break
        deaths += 1
        print(f"{deaths:>4}  {what:<26}{torch.load(path, weights_only=True)['step'] if path.exists() else 0:>5}", flush=True)
    live("nothing", 0, [*common, str(path.parent)], path, rng)
    one, two = (torch.load(root / name / path.name, weights_only=True) for name in ("whole", "killed"))
    state = lambda c: {(p, name): value for p, s in c["optimizer"]["state"].items() for name, value in s.items()}
    same = lambda a, b: a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
    right = {"weights": same(one["model"], two["model"]), "optimizer": same(state(one), state(two)), "no leftovers": not list(path.parent.glob("*.part")),
             "log": len({(root / name / f"{options.stage}.jsonl").read_bytes() for name in ("whole", "killed")}) == 1, "as many kills as asked for": deaths == options.kills}
    print(f"{options.stage}, {deaths} kills, {two['step']} steps: " + ", ".join(f"{name} {'ok' if ok else 'NOT OK'}" for name, ok in right.items()))
    return 0 if all(right.values()) else 1


if __name__ == "__main__":
    main()
