"""What only a CUDA device can show: it is compared with the CPU. Skipped without one."""
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
def without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)     # float32 as on the CPU


def model_and_batch(stage, livestreams, run_one):
    """A trained model of a stage, its configuration, and a batch on the host."""
    given = flags_of(["--data", str(livestreams), "--out", str(run_one), *SMALL])
    config = train.configure(given, stage)
    checkpoint = evaluation.load_checkpoint(run_one / f"{stage}.pt")
    stage = train.build_stage(config, checkpoint, CPU)
    stage.model.load_state_dict(checkpoint["model"])
    items = [stage.dataset[key] for key in next(iter(data.training_batches(stage.epoch_order, 4, 1)))]
    return stage.model.train(), config, (stage.collate or default_collate)(items)


def add_second_box(batch):
    """A second box in the first frame, so that the matching needs an assignment."""
    if "labels" in batch:
        batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=-1)
        batch["boxes_cxcywh"] = torch.nn.functional.pad(batch["boxes_cxcywh"], (0, 0, 0, 1))
        batch["labels"][0, 0] = torch.tensor([0, 1])
        batch["boxes_cxcywh"][0, 0, 1] = torch.tensor([0.3, 0.6, 0.2, 0.3])
    return batch


@pytest.mark.parametrize("second_box", [False, True])
@pytest.mark.parametrize("stage", train.STAGES)
def test_loss_and_gradients_are_those_of_the_cpu(run_one, livestreams, stage, second_box):
    model, config, batch = model_and_batch(stage, livestreams, run_one)
    batch, losses, gradients = add_second_box(batch) if second_box else batch, {}, {}
    for device in (CPU, GPU):
        model.to(device).zero_grad()
        loss, _ = model.loss(train.to_device(batch, config, device, 0))
        loss.backward()
        losses[device], named = loss.item(), model.named_parameters()
        gradients[device] = {n: p.grad.cpu().clone() for n, p in named if p.grad is not None}
    assert losses[GPU] == pytest.approx(losses[CPU], rel=1e-4)
    assert gradients[GPU].keys() == gradients[CPU].keys()
    whole = torch.stack([gradient.norm() for gradient in gradients[CPU].values()]).norm()
    for name, gradient in gradients[CPU].items():
        difference = (gradients[GPU][name] - gradient).norm()
        assert difference < 1e-3 * gradient.norm() + 1e-5 * whole, name


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("stage", train.STAGES)
def test_no_call_in_a_step_waits_for_the_device(run_one, livestreams, stage, precision):
    model, config, batch = model_and_batch(stage, livestreams, run_one)
    batch, config.precision = {k: value.pin_memory() for k, value in batch.items()}, precision
    optimizer, module = train.make_optimizer(model.to(GPU), config), train.LossModule(model)
    for mode in ("default", "error"):               # the first step makes what is made once
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, _ = train.forward_backward(module, optimizer, batch, config, GPU, 0)
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip_norm)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("stage", train.STAGES)
def test_bf16_is_within_one_percent(run_one, livestreams, stage):
    model, config, batch = model_and_batch(stage, livestreams, run_one)
    if stage == "md":
        model.steps = (9, 9, 9)       # all: between nearly equal scores rounding chooses others
    model, batch = model.to(GPU), train.to_device(batch, config, GPU, 0)
    loss = model.loss(batch)[0]
    with torch.autocast("cuda", torch.bfloat16):
        rough = model.loss(batch)[0]
    assert rough.dtype == torch.float32 and rough != loss
    assert rough.item() == pytest.approx(loss.item(), rel=0.01)


@pytest.mark.parametrize("stage", train.STAGES)
def test_evaluation_finds_the_same(run_one, livestreams, tmp_path, stage):
    checkpoint, found = evaluation.load_checkpoint(run_one / f"{stage}.pt"), {}
    for device in (CPU, GPU):
        lives, out = data.LPRSplit(livestreams, "test"), tmp_path / device.type
        out.mkdir()
        if stage == "rice":
            *_, ranked = evaluation.table_2(checkpoint, lives, out, device)
            found[device] = [live["similarity"]["md"]["icl"] for live in ranked.values()]
        else:
            found[device] = evaluation.predict_boxes(checkpoint, lives, out, device)[stage][:, :5]
    np.testing.assert_allclose(found[GPU], found[CPU], atol=1e-2)


def test_a_run_trains_and_evaluates_all_stages(livestreams, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "pick_device", lambda: GPU)
    train.main(["--data", str(livestreams), "--out", str(tmp_path), *SMALL, "--precision", "bf16"])
    assert set(json.loads((tmp_path / "results.json").read_text())) == set(train.STAGES)
