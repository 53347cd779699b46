"""Shared by the tests: golden numbers, and a small data set and run, made once a session."""
import dataclasses
import os
import signal
import subprocess
import sys
import unittest.mock
import zlib
from concurrent.futures import ThreadPoolExecutor as threads
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SMALL = ("--steps 2 --batch 4 --workers 0 --frames 4 --short-side 48,64,16 --long-side 96 --dim 32 "
         "--heads 4 --queries 9 --ffn 32 --decoder-layers 2 --ttm-topk 6,4,2 --train-frames 2 "
         "--per-live 4 --vit-width 32 --vit-layers 1 --vit-heads 2 --image-size 48 --embedding 16 "
         "--log-every 1").split()
BESIDE = "tests/test_train.py", "tests/test_detect.py"       # half of the time of all tests
torch.set_num_threads(1)     # tensors are tiny here, and tests start processes on the other cores
# A shell ignores Ctrl-C for its background jobs, and the processes that tests start would as well.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding capabilities")


def start(*command, **more):
    """A Python command that goes on beside the tests, on one thread a process."""
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, **more)


def pytest_collection_modifyitems(config, items):
    """When all tests are asked for, BESIDE is a pytest of its own beside the other files."""
    if set(config.invocation_params.args) <= {"-q", "-v", "-x"}:
        config.beside = start("-m", "pytest", "-q", *BESIDE)
        items[:] = [item for item in items if f"tests/{item.path.name}" not in BESIDE]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "beside"):
        text, errors = session.config.beside.communicate()
        session.exitstatus = session.exitstatus or session.config.beside.returncode
        session.config.get_terminal_writer().write(f"\n{' '.join(BESIDE)}:\n{text}{errors}")


def render(root, **options):
    """data.render by threads; processes take seconds to start."""
    import data
    with unittest.mock.patch.object(data, "process_pool", threads):
        data.render(root, processes=1, **options)


def flags_of(flags):
    """The flags of a command as `configure` takes them."""
    import train
    given = dict(zip(flags[::2], flags[1::2]))
    fields = {train.flag_of(item.name): item for item in dataclasses.fields(train.Config)}
    read = {list: train.int_list}
    return {fields[f].name: read.get(fields[f].type, fields[f].type)(given[f]) for f in given}


def golden(name):
    path = ROOT / "tests/golden" / name
    return torch.load(path, weights_only=True) if name.endswith(".pt") else np.load(path)


def recipe(body):
    """The weights of a torchvision ResNet that the golden features were made with."""
    state = {}
    for key, old in body.state_dict().items():
        draw, shape = np.random.RandomState(zlib.crc32(key.encode())), tuple(old.shape)
        if key.endswith(("running_mean", "bias")):
            value = 0.1 * draw.standard_normal(shape)
        elif old.dim() == 4:
            value = draw.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            value = draw.uniform(*(0.5, 1.5) if key.endswith("var") else (0.4, 0.8), shape)
        state[key] = torch.tensor(value, dtype=torch.float32)
    return state


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu():
    """Many tests compare to the last bit, which a GPU's atomic sums do not keep."""
    import eval as evaluation
    with unittest.mock.patch.object(evaluation, "pick_device", lambda: torch.device("cpu")):
        yield


@pytest.fixture(scope="session")
def livestreams(tmp_path_factory):
    """8 training clips (2 lives of 4 products), 4 validation and 8 test clips."""
    root = tmp_path_factory.mktemp("data") / "livestreams"
    counts = {"lives": 2, "val_lives": 1, "test_lives": 2, "products": 4, "clips": 4, "gallery": 4}
    render(root, **counts, frames=4, size=64)
    return root


@pytest.fixture(scope="session")
def run_one(livestreams, tmp_path_factory):
    """A run folder in which all three stages were trained by one process, two steps each."""
    import train
    out = tmp_path_factory.mktemp("one")
    train.main(["--data", str(livestreams), "--out", str(out), *SMALL])
    return out
