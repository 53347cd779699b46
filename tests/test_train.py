"""The pipeline in small: all stages, several processes, going on, weights, the README."""
import dataclasses
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import time
from argparse import Namespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, flags_of, golden, start, threads
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

import data
import eval as evaluation
import gradients
import rice
import train

CPU = torch.device("cpu")
# Frames of one size: a backbone feels padding, and how much a batch has depends on its share.
ONE_SIZE = ["--short-side", "64,64,16"]


def launch(*command, processes=2, restarts=0):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return start(*torchrun, "--max-restarts", restarts, *command)


def ended(process):
    """Wait for a process -> status, stdout, stderr."""
    try:
        said, error = process.communicate(timeout=120)
        return process.returncode, said, error
    finally:
        process.terminate()              # when it takes too long; torchrun ends its processes, too


def succeeds(process):
    status, said, error = ended(process)
    assert status == 0, error[-3000:]
    return said


def lines_of(error):          # but for bars
    return [line for line in re.split("[\r\n]+", error) if line and "%|" not in line]


def fails(capsys, *command):
    """The one line in which a training ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(list(command))
    (line,) = lines_of(capsys.readouterr().err)
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


def flags(livestreams, out, *more):
    return ["--data", str(livestreams), "--out", str(out), *SMALL, *more]


def load(path):
    return torch.load(path, weights_only=True)


def log_of(out, stage):
    return [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]


def same_training(one, two):
    """Two checkpoints with the same weights and optimizer to the last bit, and the same logs."""
    (ours, names_1), (theirs, names_2) = (tree_flatten([load(path)[name] for name in (
        "step", "model", "optimizer")]) for path in (one, two))
    assert names_1 == names_2 and len(ours) > 50
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(ours, theirs))
    assert log_of(one.parent, one.stem) == log_of(two.parent, two.stem)


@pytest.fixture(scope="session")
def run_two(livestreams, tmp_path_factory):
    """A run of all stages by two gloo processes."""
    out = tmp_path_factory.mktemp("two")
    succeeds(launch("train.py", *flags(livestreams, out, *ONE_SIZE)))
    return out


def test_a_run_leaves_everything_behind(run_one):
    results = json.loads((run_one / "results.json").read_text())
    assert [set(results[stage]["results"]) for stage in train.STAGES] == [
        {"sd"}, {"sd", "md_t1", "md"}, {"true", "md", "sd"}]
    assert set(results["md"]["results"]["md"]["class-agnostic"]) == set(evaluation.COLUMNS_1)
    assert {"clips": 8, "frames": 32, "missing": 0}.items() <= results["md"]["counts"].items()
    assert {"R1", "R5", "R10"} <= set(results["rice"]["results"]["md"]["fused"])
    for stage in train.STAGES:
        checkpoint = load(run_one / f"{stage}.pt")
        assert checkpoint["step"] == 2 and checkpoint["config"]["stage"] == stage
        assert [line["step"] for line in log_of(run_one, stage)] == [1, 2]
    for picture in ("detections.png", "ranking.png", "sd.png", "md.png", "rice.png"):
        assert evaluation.Image.open(run_one / picture).size[0] > 400
    assert not list(run_one.glob("*.part"))


def test_two_processes_log_the_same_as_one(livestreams, tmp_path, run_two):
    train.main(flags(livestreams, tmp_path, *ONE_SIZE))
    for stage in train.STAGES:
        for one, two in zip(log_of(tmp_path, stage), log_of(run_two, stage), strict=True):
            assert two == pytest.approx(one, rel=2e-5, abs=1e-6), stage


def test_one_step_is_the_same_on_1_2_and_4_processes(run_one, livestreams, tmp_path):
    """Loss and every gradient of the same batch of 8, for SD, MD, ICL, PMD and PFR."""
    small, cases = flags_of([*SMALL, *ONE_SIZE]), "+".join(gradients.CASES)
    runs = [launch("tests/gradients.py", cases, livestreams, run_one, tmp_path / str(n),
                   json.dumps(small), processes=n) for n in (2, 4)]
    for case in gradients.CASES:
        gradients.main(case, str(livestreams), str(run_one), tmp_path / f"1-{case}.pt", small)
    for process in runs:
        succeeds(process)
    for case in gradients.CASES:
        one, *others = (load(tmp_path / f"{n}-{case}.pt") for n in (1, 2, 4))
        whole = torch.cat([g.flatten() for g in one["gradients"].values()]).norm()
        for other in others:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5), case
            assert other["gradients"].keys() == one["gradients"].keys()
            for name, gradient in one["gradients"].items():
                near = 1e-5 * max(gradient.norm(), 1e-2 * whole)   # near zero it is rounding alone
                assert (other["gradients"][name] - gradient).norm() <= near, (case, name)


def test_a_batch_in_parts_is_the_batch(livestreams, tmp_path):
    """With one box in each frame, the parts of --accum have the gradient of the whole batch."""
    found = []
    for accum in (1, 2):
        given = flags_of(flags(livestreams, tmp_path)) | {"accum": accum}
        config = train.configure(given, "sd")
        torch.manual_seed(0)
        stage = train.build_stage(config, None, CPU)
        model, dataset = stage.model, stage.dataset
        items = (dataset[0, i] for i in range(len(dataset)))
        items = [item for item in items if len(item[0]["labels"]) == 1][:8]
        batch, optimizer = stage.collate(items), train.make_optimizer(model, config)
        train.forward_backward(train.LossModule(model), optimizer, batch, config, CPU, 0)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert len(items) == 8 and (found[1] - found[0]).norm() < 1e-5 * found[0].norm()


KILLED = """
import os, pathlib, sys
sys.path.insert(0, os.getcwd())
import train
marker, step = pathlib.Path(sys.argv[1]), int(sys.argv[2])
def write_and_die(path, line, write_log=train.write_log):
    write_log(path, line)
    if line["step"] == step and os.environ.get("RANK", "0") == "0" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), 9)
train.write_log = write_and_die
train.main(sys.argv[3:])
"""


def test_killed_runs_end_as_those_left_alone(run_one, livestreams, tmp_path, capsys):
    """All stages die by SIGKILL, saved at step 2 and logged until step 3."""
    more = ["--steps", "4", "--save-every", "2", "--detector-dir", str(run_one), "--stage"]
    killed, alone = (flags(livestreams, tmp_path / name, *more) for name in ("killed", "alone"))
    runs = [start("-c", KILLED, tmp_path / stage, 3, *killed, stage) for stage in train.STAGES]
    for stage, process in zip(train.STAGES, runs):
        assert ended(process)[0] == -signal.SIGKILL
        assert load(tmp_path / "killed" / f"{stage}.pt")["step"] == 2
        assert [line["step"] for line in log_of(tmp_path / "killed", stage)] == [1, 2, 3]
        train.main([*alone, stage])
        train.main([*killed, stage])
        assert f"{stage}.pt: goes on from step 2 of 4" in capsys.readouterr().out
        same_training(*(tmp_path / name / f"{stage}.pt" for name in ("alone", "killed")))


def test_torchrun_starts_killed_processes_again(run_two, livestreams, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    marker, script, out = tmp_path / "dead", tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED)
    more = ["--stage", "sd", "--save-every", "1", *ONE_SIZE]
    said = succeeds(launch(script, marker, 2, *flags(livestreams, out, *more), restarts=1))
    assert marker.exists() and "goes on from step 1 of 2" in said
    same_training(run_two / "sd.pt", out / "sd.pt")


def test_signals_end_a_run_at_once(livestreams, tmp_path):
    more = ["--stage", "sd", "--steps", "2000", "--save-every", "3", "--workers", "1"]
    outs = [tmp_path / "SIGTERM", tmp_path / "SIGINT"]
    runs = [start("train.py", *flags(livestreams, out, *more), start_new_session=True)
            for out in outs]
    for out, process in zip(outs, runs):
        while not (out / "sd.pt").exists():
            assert process.poll() is None, ended(process)
            time.sleep(0.05)
    os.kill(runs[0].pid, signal.SIGTERM)
    os.killpg(runs[1].pid, signal.SIGINT)                   # Ctrl-C: the loader process hears it
    (terminated, *_), (stopped, _, error) = map(ended, runs)
    assert terminated == -signal.SIGTERM and stopped == 130
    assert lines_of(error)[0].startswith("stopped; training and box prediction go on")
    assert "KeyboardInterrupt" not in error
    assert all(load(out / "sd.pt")["step"] % 3 == 0 for out in outs)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    train.save(tmp_path / "sd.pt", {"step": 1, "model": torch.zeros(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises((OSError, data.BadInput), match="sd.pt"):
            train.save(tmp_path / "sd.pt", {"step": 2, "model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load(tmp_path / "sd.pt")["step"] == 1 and os.listdir(tmp_path) == ["sd.pt"]


def test_a_second_run_says_that_all_is_done(run_one, livestreams, capsys):
    before = {path: path.read_bytes() for path in run_one.glob("*.pt")}
    train.main(flags(livestreams, run_one))
    said = capsys.readouterr().out
    assert all(f"{stage}: done before" in said for stage in train.STAGES) and len(before) == 3
    assert "all done" in said and "Table 1" in said and "Table 2" in said
    assert before == {path: path.read_bytes() for path in run_one.glob("*.pt")}


def test_a_finished_run_is_judged_again_when_the_data_changed(livestreams, tmp_path, capsys):
    shutil.copytree(livestreams, tmp_path / "data")
    command = [*flags(tmp_path / "data", tmp_path / "run"), "--stage", "sd"]
    train.main(command)
    (file,) = (tmp_path / "data/annotations").glob("test_frameid2gtbox*")
    boxes = json.loads(file.read_text())
    file.write_text(json.dumps({frame_id: boxes[frame_id][:1] for frame_id in list(boxes)[:3]}))
    capsys.readouterr()
    train.main(command)
    said = capsys.readouterr().out
    assert "done before" not in said and "32 frames, 3 boxes" in said
    train.main(command)
    assert "done before" in capsys.readouterr().out


def test_a_stage_notices_that_the_one_before_it_changed(run_one, livestreams, tmp_path, capsys):
    for stage in train.STAGES:
        shutil.copy(run_one / f"{stage}.pt", tmp_path)
    for before, stage in (("sd", "md"), ("md", "rice")):
        (tmp_path / f"{before}.pt").unlink()
        command = flags(livestreams, tmp_path, "--stage")
        train.main([*command, before, "--seed", "1"])
        error = fails(capsys, *command, stage)
        assert f"{stage}.pt was trained on another {tmp_path}/{before}.pt" in error


@pytest.mark.parametrize("command, says", [
    (["--stage", "md"], "sd.pt: missing; --stage md needs a trained SD: run `train.py --stage sd"),
    (["--stage", "md", "--data", "runs/livestreams"], "sd.pt: missing"),
    (["--stage", "rice"], "md.pt: missing; --stage rice needs a trained MD"),
    (["--stage", "rice", "--box-source", "sd"], "sd.pt: missing"),
    (["--stage", "sd", "--data", "nowhere"], "nowhere: no annotations/"),
    (["--backbone", "resnet50", "--init", ""], "--stage sd: give --init FILE"),
    (["--stage", "rice", "--box-source", "none", "--vit-patch", "8", "--init", ""],
     "--stage rice: give --init FILE"),
    (["--init", "clip.pth", "--stage", "sd"], "--init clip.pth: no such file")])
def test_what_is_missing_is_told_before_anything_is_made(
        livestreams, tmp_path, capsys, monkeypatch, command, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "render", None)
    assert says in fails(capsys, *flags(livestreams, tmp_path / "run"), *command)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file, flag, says", [
    ("test_liveid_to_gallery", [], "needed to rank"), ("test_videoid_to_gtimage", [], "needed to"),
    ("test_frameid2gtbox", [], "no true boxes"), ("test_", [], "no clips in the test split"),
    ("val_", ["--eval-every", "9"], "no clips in the val split")])
def test_what_later_stages_are_judged_by_is_looked_for_first(
        livestreams, tmp_path, capsys, file, flag, says):
    shutil.copytree(livestreams, tmp_path / "data")
    for path in (tmp_path / "data/annotations").glob(f"{file}*"):
        path.unlink()
    assert says in fails(capsys, *flags(tmp_path / "data", tmp_path / "run"), *flag)
    assert not list((tmp_path / "run").glob("*"))


def test_no_shop_image_is_told_before_the_detectors_are_trained(livestreams, tmp_path, capsys):
    shutil.copytree(livestreams, tmp_path / "data")
    (path,) = (tmp_path / "data/annotations").glob("training_*.txt")
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    path.write_text("".join("\t".join([*row[:3], "", *row[4:]]) + "\n" for row in rows))
    assert "names a shop image" in fails(capsys, *flags(tmp_path / "data", tmp_path / "run"))
    assert not list((tmp_path / "run").glob("*"))


def test_a_loss_that_is_not_finite_stops_the_run(livestreams, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "xavier_uniform_", lambda p: p.data.fill_(math.nan))
    assert "step 1: not finite" in fails(capsys, "--stage", "sd", *flags(livestreams, tmp_path))
    assert not (tmp_path / "sd.pt").exists()


def test_eval_alone_gives_the_same_numbers_on_1_and_3_processes(run_one, tmp_path):
    trained = json.loads((run_one / "results.json").read_text())
    command = ["--ckpt", *(str(run_one / f"{stage}.pt") for stage in train.STAGES)]
    other = launch("eval.py", *command, "--json", tmp_path / "3.json", "--out", tmp_path / "3",
                   processes=3)
    evaluation.main([*command, "--json", str(tmp_path / "1.json"), "--out", str(tmp_path / "1")])
    succeeds(other)
    for file in ("1.json", "3.json"):
        for result in json.loads((tmp_path / file).read_text()):
            (ours, names_1), (theirs, names_2) = (
                tree_flatten(r["results"]) for r in (result, trained[result["stage"]]))
            assert names_1 == names_2               # None: a column without boxes
            np.testing.assert_allclose(np.array(ours, float), np.array(theirs, float), 1e-5)
            assert result["counts"] == trained[result["stage"]]["counts"]


def test_a_prediction_that_was_stopped_goes_on(run_one, livestreams, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    checkpoint = evaluation.load_checkpoint(run_one / "md.pt")
    lives, stops = data.LPRSplit(livestreams, "test"), [DEFAULT, KeyboardInterrupt, *[DEFAULT] * 3]
    predict = Mock(wraps=evaluation.boxes_of_batch, side_effect=stops)
    monkeypatch.setattr(evaluation, "boxes_of_batch", predict)
    with pytest.raises(KeyboardInterrupt):
        evaluation.predict_boxes(checkpoint, lives, cut, CPU)
    assert len(list(cut.glob("boxes-test-*/*.npy"))) == 1 and not list(cut.glob("*.npy"))
    rows = evaluation.predict_boxes(checkpoint, lives, cut, CPU)
    assert predict.call_count == 3                                 # the first part was kept
    expected = evaluation.predict_boxes(checkpoint, lives, whole, CPU)
    assert rows.dtype.names == ("clip", "frame", "sd", "md_t1", "md") and len(rows) == 32
    assert isinstance(rows, np.memmap) and rows.tobytes() == expected.tobytes()
    evaluation.predict_boxes(checkpoint, lives, cut, CPU)          # found again
    assert predict.call_count == 5 and len(list(cut.iterdir())) == 1


@pytest.mark.parametrize("stage, name", [("sd", "AP50"), ("rice", "R1")])
def test_val_is_watched_and_the_best_is_kept(run_one, livestreams, tmp_path, stage, name):
    train.main(["--stage", stage, *flags(livestreams, tmp_path), "--detector-dir", str(run_one),
                "--eval-every", "2", "--steps", "4", "--frames", "2"])
    watched = {line["step"]: line[name] for line in log_of(tmp_path, stage) if name in line}
    best, last = (load(tmp_path / f"{stage}{end}.pt") for end in ("-best", ""))
    assert set(watched) == {2, 4} and watched[best["step"]] == max(watched.values())
    assert best["best"] == last["best"] == max(watched.values())
    model = evaluation.load_model(evaluation.load_checkpoint(tmp_path / f"{stage}-best.pt"), CPU)
    assert evaluation.validation_metric(model, best, tmp_path, CPU) == {name: best["best"]}


@pytest.mark.parametrize("more, source", [
    (["--box-source", "none"], "none"), (["--box-source", "true", "--negatives", "rand"], "true"),
    (["--losses", "icl"], "md")])
def test_rice_trains_and_ranks_in_other_views(run_one, livestreams, tmp_path, more, source):
    shutil.copy(run_one / "md.pt", tmp_path)
    train.main(["--stage", "rice", *flags(livestreams, tmp_path, *more)])
    result = json.loads((tmp_path / "results.json").read_text())["rice"]
    assert result["counts"]["source"] == source and (tmp_path / "ranking.png").exists()
    assert 0 <= result["results"][source]["icl"]["R1"] <= 100
    assert ("fused" in result["results"][source]) == ("--losses" not in more)


@pytest.mark.parametrize("text", ["none", "asr", "title", "both"])
def test_only_the_texts_asked_for_are_read(run_one, livestreams, text):
    read = {"none": [], "both": ["asr", "title"]}.get(text, [text])
    config = train.configure(flags_of(flags(livestreams, run_one, "--text", text)), "rice")
    dataset = train.build_stage(config, None, CPU).dataset
    assert [name for name in ("asr", "title") if (dataset[0, 0][name] > 1).any()] == read
    checkpoint = evaluation.load_checkpoint(run_one / "rice.pt")
    checkpoint["config"].text = text
    lives, embedder = data.LPRSplit(livestreams, "test"), evaluation.Embedder(checkpoint, CPU)
    _, tokens, _ = embedder.embed_images(lives.image, lives.titles, list(lives.titles))
    differ = (tokens[:, -1] - tokens[:1, -1]).abs().max() > 1e-6         # the title's token
    assert differ == ("title" in read)


def test_several_checkpoints_make_one_table(run_one, livestreams, tmp_path, capsys):
    for seed in ("1", "2"):
        train.main(["--stage", "rice", *flags(livestreams, tmp_path / seed), "--seed", seed,
                    "--detector-dir", str(run_one), "--negatives", "rand"])
    capsys.readouterr()
    evaluation.main(["--ckpt", str(tmp_path / "?" / "rice.pt"), str(run_one / "rice.pt"),
                     "--json", str(tmp_path / "j.json"), "--markdown"])
    rows = [[cell.strip() for cell in line.strip("| ").split("|")]
            for line in capsys.readouterr().out.splitlines() if "negatives=" in line]
    assert [row[:2] for row in rows] == [
        [f"negatives={kind} MD boxes, {score}", seeds] for kind, seeds in (("rand", "2"), ("hard", "1"))
        for score in ("ICL", "PMD", "ICL + PMD")]
    value = [result["results"]["md"]["icl"]["R1"]
             for result in json.loads((tmp_path / "j.json").read_text())]
    assert rows[0][2] == f"{np.mean(value[:2]):.1f} ± {np.std(value[:2], ddof=1):.1f}"
    assert rows[3][2] == f"{value[2]:.1f}"
    # Run folders of one configuration: all sources of boxes.
    evaluation.main(["--ckpt", str(tmp_path / "1"), str(tmp_path / "2"), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines if " boxes, " in line]
    assert names == [f"{boxes} boxes, {score}" for boxes in ("true", "MD", "SD")
                     for score in ("ICL", "PMD", "ICL + PMD")]


def test_photos_can_be_loaded_by_spawned_processes(run_one, livestreams, monkeypatch):
    """macOS and Windows send the data set to a loader process as a pickle."""
    make_loader = data.make_loader
    monkeypatch.setattr(data, "make_loader", lambda dataset, *rest: make_loader(
        pickle.loads(pickle.dumps(dataset)), *rest))
    embedder = evaluation.Embedder(evaluation.load_checkpoint(run_one / "rice.pt"), CPU)
    photos = evaluation.photos_of(livestreams / "images")
    names, embedding, tokens = embedder.embed_photos(photos, {}, tokens=False)
    assert len(names) == len(photos) == len(embedding) and tokens.shape[1] == 0


def test_near_duplicates_are_listed(run_one, livestreams, tmp_path):
    shutil.copytree(livestreams / "images", tmp_path / "images")
    some = sorted((tmp_path / "images").iterdir())[3]
    shutil.copy(some, some.with_name("again.jpg"))
    checkpoint = evaluation.load_checkpoint(run_one / "rice.pt")
    groups = evaluation.duplicates(checkpoint, tmp_path / "images", 0.99999, tmp_path)
    first, second = sorted([some.name, "again.jpg"])
    assert [first, second] in groups and all(len(group) > 1 for group in groups)
    assert f"{second}\t{first}\n" in (tmp_path / "duplicates.txt").read_text()
    assert evaluation.duplicates(checkpoint, tmp_path / "images", 1.0, tmp_path) == []


class Mixed(TorchDispatchMode):
    """Notes operations that meet tensors of two devices, or copy between them and wait."""
    seen = ()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out, name = function(*arguments, **(named or {})), function.overloadpacket.__name__
        devices = {x.device for x in tree_leaves((arguments, named))
                   if torch.is_tensor(x) and x.dim()}
        waits = name == "_to_copy" and out.device != arguments[0].device
        if len(devices) > 1 and name != "copy_" or waits and not named.get("non_blocking"):
            self.seen += (name,)
        return out


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_forward_pass_on_a_device_never_waits_for_the_host(stage, monkeypatch):
    """Tensors without memory that say they are on a CUDA device; test_gpu.py asks a real one."""
    # Fake tensors take no generator.
    monkeypatch.setattr(rice, "gumbel_noise", lambda shape, seed: torch.rand(shape))
    B, T = 3, 1 if stage == "sd" else 2
    with FakeTensorMode():
        with torch.device("cuda"):
            model = evaluation.build_model(train.configure({}, stage), 8, 500)
            pixels, words = torch.rand(B, T, 3, 64, 64), torch.ones(B, 24, dtype=torch.long)
            batch = {"frames": pixels, "valid": torch.ones(B, T) > 0}
            if stage == "rice":
                batch |= {"image": pixels[:, 0], "product_id": words[:, 0], "asr": words,
                          "title": words, "seed": 0}
            else:
                batch |= {"padding_mask": pixels[:, :, 0] < 0, "labels": words[:, :T, None],
                          "boxes_cxcywh": pixels[:, :, 0, :1, :4]}
        with Mixed() as host:
            assert model.loss(batch)[0].device.type == "cuda" and host.seen == ()
            torch.ones(2, 2, device="cuda")[[1, 0]], torch.tensor([1.0], device="cuda")
            assert len(host.seen) == 2


def test_learning_rate_is_a_function_of_the_step():
    paper, tiny = train.Config(steps=20), train.configure({}, "sd")
    assert [round(train.lr_factor(s, paper), 3) for s in (0, 14, 15, 19)] == [1, 1, 0.1, 0.1]
    assert train.lr_factor(0, tiny) == pytest.approx(1 / 50) and train.lr_factor(49, tiny) == 1
    assert train.lr_factor(tiny.steps * 3 // 4, tiny) == pytest.approx(0.5)
    assert train.lr_factor(tiny.steps, tiny) == pytest.approx(0)


RECIPE = {
    # supplement, 2.2; queries, layers and losses as DAB-DETR has them
    "detector": {
        "batch": 64, "epochs": 20, "decay_start": 15 / 20, "schedule": "drop", "warmup": 0,
        "weight_decay": 1e-4, "clip_norm": 0.1, "adam_eps": 1e-8, "short_side": [480, 800, 32],
        "long_side": 1333, "backbone": "resnet50", "dim": 256, "heads": 8, "ffn": 2048,
        "encoder_layers": 6, "decoder_layers": 6, "queries": 300, "precision": "float32"},
    "sd": {"lr": 1e-4, "backbone_lr": 1e-5},
    "md": {"lr": 2e-4, "backbone_lr": 2e-5, "frames": 10, "ttm_topk": [80, 50, 30]},
    # the public code's recipe of ICL + PMD + PFR; MD's boxes and hard negatives are the supplement's
    "rice": {
        "vit_width": 768, "vit_layers": 12, "vit_heads": 12, "vit_patch": 32, "embedding": 512,
        "image_size": 224, "crop": 224 / 256, "frames": 10, "train_frames": 10, "per_live": 1,
        "batch": 96, "steps": 5000, "lr": 1e-4, "backbone_lr": 1e-6, "adam_eps": 1e-6,
        "weight_decay": 0.2, "warmup": 500, "schedule": "cosine", "decay_start": 0.0,
        "clip_norm": 1e9, "precision": "bf16", "losses": "icl,pmd,pfr", "n_neg": 3,
        "negatives": "hard", "box_source": "md", "text": "both", "text_length": 77}}


def test_the_paper_preset_is_the_recipe():
    for stage in train.STAGES:
        config = train.configure({"preset": "paper"}, stage)
        print(stage, vars(config))
        expected = RECIPE[stage] | (RECIPE["detector"] if stage != "rice" else {})
        assert {name: getattr(config, name) for name in expected} == expected
    linear = torch.nn.Linear
    model = torch.nn.ModuleDict({"visual": linear(1, 1), "pmd": linear(1, 1)})
    groups = train.make_optimizer(model, config).param_groups
    found = {(group["peak"], group["weight_decay"], group["eps"]): len(group["params"])
             for group in groups}
    assert found == {(1e-6, 0.2, 1e-6): 1, (1e-6, 0, 1e-6): 1, (1e-4, 0.2, 1e-6): 1,
                     (1e-4, 0, 1e-6): 1}
    assert [train.lr_factor(step, config) for step in (0, 249, 5000)] == pytest.approx(
        [1 / 500, 0.5 * train.lr_factor(249, dataclasses.replace(config, warmup=0)), 0])


def refused(model, state, path, says):
    torch.save(state, path)
    with pytest.raises(data.BadInput, match=says):
        train.load_public_weights(model, path)


def test_detector_weights_load_by_name_and_only_the_class_head_may_differ(tmp_path):
    config = Namespace(stage="sd", queries=5, dim=16, heads=2, encoder_layers=1, decoder_layers=2,
                       ffn=16, backbone="resnet18")
    torch.manual_seed(0)
    public, ours = (evaluation.build_model(config, classes) for classes in (91, 34))
    state, head, path = public.state_dict(), ours.class_embed.weight.clone(), tmp_path / "x.pth"
    saved = {f"module.{key}": value for key, value in state.items()}
    torch.save({"model": saved, "args": Namespace(lr=1)}, path)
    line = train.load_public_weights(ours, path)
    assert line.endswith("for other classes or words: class_embed.bias, class_embed.weight")
    for key, value in state.items():
        assert key.startswith("class_embed.") or torch.equal(ours.state_dict()[key], value)
    assert torch.equal(ours.class_embed.weight, head)
    body = {key: value + 1 for key, value in public.backbone[0].body.state_dict().items()}
    torch.save(body | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}, path)
    train.load_public_weights(ours, path)
    assert torch.equal(ours.backbone[0].body.conv1.weight, body["conv1.weight"])
    assert torch.equal(ours.input_proj.weight, state["input_proj.weight"])
    bias = state.pop("input_proj.bias")
    refused(ours, state, path, "input_proj.bias")
    refused(ours, state | {"input_proj.bias": bias, "stranger": bias}, path, "stranger")
    refused(ours, state | {"input_proj.bias": bias[1:]}, path, "input_proj.bias")
    refused(ours, [1, 2], path, "no state dict")


def test_our_own_checkpoints_load_with_other_classes_and_words(run_one):
    for stage, anew in (("sd", "class_embed.bias, class_embed.weight"),
                        ("rice", "text.token_embedding.weight")):
        checkpoint = evaluation.load_checkpoint(run_one / f"{stage}.pt")
        model = evaluation.build_model(checkpoint["config"], 3, 700)
        line = train.load_public_weights(model, run_one / f"{stage}.pt")
        assert line.endswith(f"or words: {anew}")
        for key, value in checkpoint["model"].items():
            assert key in anew or torch.equal(model.state_dict()[key], value)


def test_clip_weights_load_into_the_image_encoder_and_positions_fit(tmp_path):
    weights, path = golden("clip_vit_tiny.pt")["state_dict"], tmp_path / "clip.pth"
    halves = {key: value.half() for key, value in weights.items()}
    torch.save(halves | {"logit_scale": torch.tensor(1.0), "text_projection": torch.zeros(2, 2)},
               path)
    positions = halves.pop("visual.positional_embedding").float()
    for size, patches in ((32, 16), (48, 36)):
        vit = {"width": 64, "layers": 2, "heads": 1, "patch": 8, "size": size, "dim": 32}
        model = rice.RICE(vit, 10)
        train.load_public_weights(model, path)
        fitted = model.visual.positional_embedding
        assert len(fitted) == 1 + patches and torch.equal(fitted[0], positions[0])
        assert size == 48 or torch.allclose(fitted, positions, atol=1e-6)
        for key, value in halves.items():
            assert torch.equal(model.state_dict()[key], value.float())
    # A position that grows downwards goes on doing so.
    ramp = torch.arange(8.0)[:, None, None].expand(8, 8, 3).reshape(64, 3)
    taller = rice.interpolate_pos_embed(torch.cat([torch.zeros(1, 3), ramp]), 16)[1:]
    taller = taller.view(16, 16, 3)
    assert (taller.diff(dim=0)[2:-2] > 0).all() and torch.allclose(taller, taller[:, :1])


# ------------------------------------------------------------------ what the README says

MAINS = {"train.py": train.main, "eval.py": evaluation.main, "data.py": data.main}
README = (ROOT / "README.md").read_text()


def commands_of(text):
    """The commands in a text, [(whether in a bash block, script, arguments)]."""
    found = []
    pattern = r"```bash\n(.*?)```|`((?:python|torchrun) [^`]+)`"
    for block, prose in re.findall(pattern, text, re.S):
        block = re.sub(r"\$\(\(.*?\)\)|\$\w+", "0", re.sub(r"#.*", "", block))
        for command in re.split(r"&&|;|\n", block or prose):
            words = shlex.split(command)
            found += [(bool(block), word, words[n + 1:]) for n, word in enumerate(words)
                      if word in MAINS]
    return found


def test_commands_of_the_documents_have_flags_that_exist(capsys):
    commands = commands_of(README + (ROOT / ".github" / "results.md").read_text())
    assert len(commands) > 8
    for _, script, arguments in commands:
        with pytest.raises(SystemExit) as stop:
            MAINS[script]([*arguments[:script == "data.py"], "--help"])
        known = re.findall(r"--[a-z-]+", capsys.readouterr().out)
        used = {word for word in arguments if word.startswith("--")}
        assert stop.value.code == 0 and used <= set(known), (script, arguments)


def test_the_quickstart_runs(livestreams, tmp_path, monkeypatch):
    """The README's commands for the tiny preset, at small sizes and in their order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "process_pool", threads)
    shutil.copytree(livestreams, tmp_path / "runs" / "livestreams")
    shutil.copytree(livestreams / "images", tmp_path / "photos")
    (tmp_path / "live.mp4").mkdir()                  # a folder with a frame a second is a live, too
    for n, frame in enumerate(sorted((livestreams / "frames").iterdir())[:3]):
        shutil.copy(frame, tmp_path / "live.mp4" / f"{n}.jpg")
    (tmp_path / "titles.txt").write_text("mug\tred mug\n")
    (tmp_path / "said.txt").write_text("0.5\tlook at this\n")
    for alone, script, arguments in commands_of(README):
        if alone and script == "train.py" and "--preset" not in arguments:
            train.main([*arguments, *SMALL])
        elif alone and script == "eval.py" and "runs/paper" not in " ".join(arguments):
            evaluation.main(arguments)
    assert list(tmp_path.rglob("runs/tiny/results.json")) and list(tmp_path.rglob("answers.jsonl"))
    exec(re.findall(r"```python\n(.*?)```", README, re.S)[1], {})
    photos = torch.load("photos.pt")
    assert len(photos["photo"]) == len(photos["embedding"]) == len(os.listdir("photos"))


def test_the_readmes_own_data_is_the_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 10
    exec(code, {})
    clips, test = data.LPRSplit("mine", "train"), data.LPRSplit("mine", "test")
    clip, query = clips.clip(0), test.clip(0)
    assert [len(boxes) for boxes in clip.boxes] == [1, 0] and clips.categories == {1: "mug"}
    assert clip.title == "red mug" and query.image_ids == ["mug8"] and query.boxes[0][0, 4] == 1
    assert test.galleries == {"live2": ["mug8", "mug9"]}


def test_the_readme_counts_lines_and_shows_pictures():
    counts = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.M))
    assert set(counts) == {"detect.py", "rice.py", "data.py", "train.py", "eval.py"}
    for name, lines in counts.items():
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 20, name
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures and all((ROOT / path).exists() for path in pictures)
