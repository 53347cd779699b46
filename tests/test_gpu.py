"""What only a CUDA device can show; without one these tests are skipped (bench.py --gpu measures, this file compares with the CPU)."""
import json

import numpy as np
import pytest
import torch
from conftest import SMALL, flags_of
from torch.utils.data import default_collate

import data
import eval as evaluation
import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions in float32: by default cuDNN rounds their factors to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def prepared(stage, livestreams, run_one, count=4):
    """A trained model of a stage, its configuration, and a collated batch of its samples."""
    config = train.configure({"data": str(livestreams), "out": str(run_one)} | flags_of(SMALL), stage)
    checkpoint = evaluation.read_checkpoint(run_one / f"{stage}.pt")
    model, _, samples, order, collate = train.prepare(config, CPU, checkpoint)
    model.load_state_dict(checkpoint["model"])
    keys = next(iter(data.step_batches(order, count, 1)))
    return model.train(), config, (collate or default_collate)([samples[key] for key in keys])


def two_boxes(batch):
    """A second box in the first frame of the batch, for the matching that needs an assignment."""
    if "labels" in batch:
        batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=-1)
        batch["boxes_cxcywh"] = torch.nn.functional.pad(batch["boxes_cxcywh"], (0, 0, 0, 1))
        batch["labels"][0, 0], batch["boxes_cxcywh"][0, 0, 1] = torch.tensor([0, 1]), torch.tensor([0.3, 0.6, 0.2, 0.3])
    return batch


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("stage", train.STAGES)
def test_loss_and_gradients_are_those_of_the_cpu(run_one, livestreams, stage, several):
    model, config, batch = prepared(stage, livestreams, run_one)
    batch, found = two_boxes(batch) if several else batch, {}
    for device in (CPU, GPU):
        model.to(device).zero_grad()
        loss, _ = model.loss(train.ready(batch, config, device, 0))
        loss.backward()
        found[device] = loss.item(), {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found[GPU][0] == pytest.approx(found[CPU][0], rel=1e-4)
    assert found[GPU][1].keys() == found[CPU][1].keys()
    length = torch.stack([g.norm() for g in found[CPU][1].values()]).norm()
    for name, gradient in found[CPU][1].items():
        assert (found[GPU][1][name] - gradient).norm() < 1e-3 * gradient.norm() + 1e-5 * length, name


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("stage", train.STAGES)
def test_no_call_in_a_step_waits_for_the_device(run_one, livestreams, stage, precision):
    model, config, batch = prepared(stage, livestreams, run_one)
    config.precision = precision
    batch = {name: value.pin_memory() if torch.is_tensor(value) else value for name, value in batch.items()}
    optimizer = train.optimizer_of(model.to(GPU), config)
    for mode in ("default", "error"):                     # the first step makes what is made once
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, _ = train.forward_backward(train.Step(model), optimizer, batch, config, GPU, 0)
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], config.clip_norm)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("stage", train.STAGES)
def test_bf16_is_within_one_percent(run_one, livestreams, stage):
    model, config, batch = prepared(stage, livestreams, run_one)
    if stage == "md":
        model.steps = (9, 9, 9)                           # all queries: between nearly equal scores rounding would choose others
    batch = train.ready(batch, config, GPU, 0)
    exact = model.to(GPU).loss(batch)[0]
    with torch.autocast("cuda", torch.bfloat16):
        rough = model.loss(batch)[0]
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.01) and rough != exact


@pytest.mark.parametrize("stage", train.STAGES)
def test_evaluation_finds_the_same(run_one, livestreams, tmp_path, stage):
    numbers = {}
    for device in (CPU, GPU):
        lives, checkpoint = data.Lives(livestreams, "test"), evaluation.read_checkpoint(run_one / f"{stage}.pt")
        if stage == "rice":
            *_, places = evaluation.score_ranking(checkpoint, lives, data.output_folder(tmp_path / device.type), device)
            numbers[device] = places["icl"]
        else:
            rows = evaluation.predict(evaluation.restore(checkpoint, device), checkpoint["config"], checkpoint["categories"], lives, device)
            numbers[device] = rows[stage][:, :5]
    np.testing.assert_allclose(numbers[GPU], numbers[CPU], atol=1e-2)


def test_nearest_is_the_order_of_all_products():
    queries, images = torch.randn(70, 16), torch.randn(20_000, 16)
    expected, found = evaluation.nearest(queries, images, 10), evaluation.nearest(queries.to(GPU), images.to(GPU), 10)
    assert (found[1].cpu() == expected[1]).float().mean() > 0.99
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-4, atol=1e-4)


def test_a_run_trains_and_evaluates_all_stages(livestreams, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "pick_device", lambda: GPU)
    train.main(["--data", str(livestreams), "--out", str(tmp_path), *SMALL, "--precision", "bf16"])
    assert json.loads((tmp_path / "results.json").read_text()).keys() == set(train.STAGES)
