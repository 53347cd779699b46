"""A run that is killed (SIGKILL) again and again ends with the bits of one that was left alone. Not a test of pytest:

    python tests/kills.py --stage sd --kills 20 --seed 0            sd, md or rice; minutes; exit status 1 on a difference

Each life is the same command. It dies at a random moment of training, while it starts, with half a checkpoint written, or
between writing and renaming one. Weights, optimizer and log are then compared with the uninterrupted run's.
"""
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import ROOT, SMALL
from tqdm import tqdm

import data
import train

# argv: what dies, the how-manieth time, flags of train.py
LIFE = """
import os, signal, sys, train
what, left, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
fsync, replace = os.fsync, os.replace
def die(when, path):
    global left
    left -= what == when and str(path).endswith(".pt.part")
    return what == when and left < 0
def half(file):
    if die("half a checkpoint", os.readlink(f"/proc/self/fd/{file}")):
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), 9)
    fsync(file)
def rename(source, target):
    if die("before the rename", source):
        os.kill(os.getpid(), 9)
    replace(source, target)
os.fsync, os.replace = half, rename
train.main(flags)
"""


def step_of(checkpoint):
    """The step a checkpoint stands at, 0 when there is none; it has to be whole at any moment."""
    return torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0


def live(what, left, flags, path, rng):
    """One life of the command -> what happened to it, None when it came to its end."""
    process = subprocess.Popen([sys.executable, "-c", LIFE, what, str(left), *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    if what in ("training", "starting"):
        before = path.stat().st_mtime_ns if path.exists() else 0
        while what == "training" and process.poll() is None and (path.stat().st_mtime_ns if path.exists() else 0) == before:
            time.sleep(0.01)                                                     # until it has saved once
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
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    rng, root = random.Random(options.seed), Path(tempfile.mkdtemp())
    data.render(root / "lives", lives=2, val_lives=1, test_lives=2, products=4, clips=4, gallery=4, frames=4, size=64, processes=1, progress=False)
    flags = {name: ["--data", str(root / "lives"), *SMALL, "--steps", str(options.steps), "--save-every", "1", "--detectors",
                    str(root / "detectors"), "--out", str(root / name)] for name in ("whole", "killed")}
    for stage in train.STAGES[:train.STAGES.index(options.stage)]:
        train.main(["--stage", stage, "--data", str(root / "lives"), *SMALL, "--out", str(root / "detectors")])
    live("nothing", 0, ["--stage", options.stage, *flags["whole"]], root / "none", rng)
    path, deaths = root / "killed" / f"{options.stage}.pt", 0
    print(f"{'kill':>4}  {'moment':<26}{'step':>5}")
    with tqdm(total=options.kills, unit="kill") as bar:
        while deaths < options.kills:
            what = rng.choice(["training", "training", "starting", "half a checkpoint", "before the rename"])
            what = live(what, rng.randrange(12), ["--stage", options.stage, *flags["killed"]], path, rng)
            if what is None:
                break
            deaths += 1
            tqdm.write(f"{deaths:>4}  {what:<26}{step_of(path):>5}")
            bar.update()
    live("nothing", 0, ["--stage", options.stage, *flags["killed"]], path, rng)
    one, two = (torch.load(root / name / f"{options.stage}.pt", weights_only=True) for name in ("whole", "killed"))
    same = {"weights": all(torch.equal(value, two["model"][name]) for name, value in one["model"].items()),
            "optimizer": all(torch.equal(value, two["optimizer"]["state"][p][name])
                             for p, state in one["optimizer"]["state"].items() for name, value in state.items()),
            "log": len({(root / name / f"{options.stage}.jsonl").read_bytes() for name in ("whole", "killed")}) == 1,
            "no leftovers": not list((root / "killed").glob("*.part")), "as many kills as asked for": deaths == options.kills}
    print(f"{options.stage}, {deaths} kills, {one['step']} steps: " + ", ".join(f"{name} {'ok' if ok else 'NOT OK'}" for name, ok in same.items()))
    shutil.rmtree(root)
    sys.exit(0 if all(same.values()) else 1)


if __name__ == "__main__":
    main()
