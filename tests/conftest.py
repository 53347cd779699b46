"""Shared by the tests: the golden files, the backbone recipe, and once a session a tiny rendered data set and the three stages trained on it."""
import dataclasses
import multiprocessing.dummy
import os
import subprocess
import sys
import tempfile
import unittest.mock
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GOLDEN = Path(__file__).parent / "golden"
SMALL = ("--steps 2 --batch 4 --workers 0 --frames 4 --shortest 48,64,16 --longest 96 --dim 32 --heads 4 --queries 9 --ffn 32 "
         "--decoder-layers 2 --keep 6,4,2 --train-frames 2 --per-live 4 --width 32 --layers 1 --vit-heads 2 --size 48 --embedding 16 --log-every 1").split()


torch.set_num_threads(1)              # tensors here are tiny, and the second core is for the processes that tests start


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding capabilities of TorchVision")


def start(*command, **more):
    """A Python command that goes on beside the tests, on one thread a process."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                            **pipes | more)


BESIDE = "tests/test_train.py", "tests/test_detect.py"


def pytest_collection_modifyitems(config, items):
    """When all tests are asked for, BESIDE, half of their time, is a pytest of its own beside the other files: there are two cores."""
    if set(config.invocation_params.args) <= {"-q", "-v", "-x"}:
        log = tempfile.TemporaryFile("w+")
        config.beside = log, start("-m", "pytest", "-q", *BESIDE, stdout=log, stderr=subprocess.STDOUT)
        items[:] = [item for item in items if f"tests/{item.path.name}" not in BESIDE]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "beside"):
        beside = session.config.beside[1].wait()                         # whatever the others did, it is heard to its end
        session.exitstatus = session.exitstatus or beside


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "beside"):
        config.beside[0].seek(0)
        terminalreporter.section(f"beside the others: {' '.join(BESIDE)}")
        terminalreporter.write(config.beside[0].read())


def threads(kind=None):
    """Threads in place of processes, which take seconds to start: for multiprocessing.get_context."""
    return multiprocessing.dummy


def render(root, **numbers):
    import data
    with unittest.mock.patch.object(data.multiprocessing, "get_context", threads):
        data.render(root, processes=1, progress=False, **numbers)


def flags_of(flags):
    """The flags of a command as `configure` takes them."""
    import train
    fields = {train.flag(item.name): item for item in dataclasses.fields(train.Config)}
    read = {list: train.numbers}
    return {fields[name].name: read.get(fields[name].type, fields[name].type)(value) for name, value in zip(flags[::2], flags[1::2])}


def golden(name):
    return torch.load(GOLDEN / name, weights_only=True) if name.endswith(".pt") else np.load(GOLDEN / name)


def recipe(body):
    """Deterministic weights of a torchvision ResNet, the ones the golden features were made with."""
    state = {}
    for key, old in body.state_dict().items():
        draw = np.random.RandomState(zlib.crc32(key.encode()))
        shape = tuple(old.shape)
        if key.endswith("running_mean") or key.endswith("bias"):
            value = 0.1 * draw.standard_normal(shape)
        elif key.endswith("running_var"):
            value = draw.uniform(0.5, 1.5, shape)
        elif old.dim() == 4:
            value = draw.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            value = draw.uniform(0.4, 0.8, shape)
        state[key] = torch.tensor(value, dtype=torch.float32)
    return state


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu():
    """Many tests compare to the last bit, which a GPU's atomic sums do not keep; test_gpu.py asks for its device itself."""
    import eval as evaluation
    with unittest.mock.patch.object(evaluation, "pick_device", lambda: torch.device("cpu")):
        yield


@pytest.fixture(scope="session")
def livestreams(tmp_path_factory):
    """8 training clips (2 lives of 4 products), 4 validation and 4 test clips."""
    root = tmp_path_factory.mktemp("data") / "livestreams"
    render(root, lives=2, val_lives=1, test_lives=2, products=4, clips=4, gallery=4, frames=4, size=64)
    return root


@pytest.fixture(scope="session")
def run_one(livestreams, tmp_path_factory):
    """A run folder in which all three stages were trained by one process, two steps each."""
    import train
    out = tmp_path_factory.mktemp("one")
    train.main(["--data", str(livestreams), "--out", str(out), *SMALL])
    return out
