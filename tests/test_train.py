"""The whole pipeline in small: every stage through train.main, one process and two, resume, errors, the README's commands."""
import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate
from conftest import ROOT, SMALL, flags_of, golden, render, start, threads

import data
import eval as evaluation
import gradients
import rice
import train


@pytest.fixture(scope="session")
def run_two(livestreams, tmp_path_factory):
    """The same by two gloo processes under torchrun."""
    out = tmp_path_factory.mktemp("two")
    done = ended(launch("train.py", "--data", livestreams, "--out", out, *SMALL))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def launch(*command, processes=2, restarts=0):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "--max-restarts", restarts, *command)


def ended(process):
    """What a process said, when it has ended."""
    said, error = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, said, error)


def log_of(out, stage):
    return [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_behind(run_one):
    results = json.loads((run_one / "results.json").read_text())
    assert set(results) == {"sd", "md", "rice"}
    assert set(results["md"]["results"]) == {"sd", "vote", "md1", "md"} and set(results["rice"]["results"]) == {"true", "md", "sd"}
    assert set(results["md"]["results"]["md"]["class-agnostic"]) == set(evaluation.COLUMNS_1)
    assert results["md"]["counts"] == {"clips": 8, "frames": 32, "boxes": results["sd"]["counts"]["boxes"], "missing": 0}
    assert set(results["rice"]["results"]["md"]["fused"]) == {"R1", "R5", "R10"} and results["rice"]["counts"]["gallery"] == 4
    for stage in train.STAGES:
        checkpoint = torch.load(run_one / f"{stage}.pt", weights_only=True)
        assert checkpoint["step"] == 2 and checkpoint["config"]["stage"] == stage
        assert [line["step"] for line in log_of(run_one, stage)] == [1, 2]
    for picture in ("detections.png", "ranking.png"):
        assert evaluation.Image.open(run_one / picture).size[0] > 400
    assert not list(run_one.glob("*.part"))


def test_two_processes_take_the_same_steps(run_one, run_two):
    for stage in train.STAGES:
        for one, two in zip(log_of(run_one, stage), log_of(run_two, stage), strict=True):
            assert one.keys() == two.keys()
            for name in one:
                # The first step starts from the same weights; AdamW then magnifies rounding where a gradient is nearly zero.
                near = 2e-5 if one["step"] == 1 and stage == "sd" else 5e-4
                assert two[name] == pytest.approx(one[name], rel=near, abs=1e-6), (stage, name)


def test_one_step_is_the_same_on_any_number_of_processes(run_one, livestreams, tmp_path):
    """The same global batch of 8: loss and every gradient on 1, 2 and 4 gloo processes, for SD, MD, ICL, PMD and PFR."""
    flags = flags_of(SMALL)
    cases = "sd+md+icl+icl,pmd+icl,pmd,pfr"
    runs = [launch("tests/gradients.py", cases, livestreams, run_one, tmp_path / str(n), json.dumps(flags), processes=n) for n in (2, 4)]
    for case in cases.split("+"):
        gradients.main(case, str(livestreams), str(run_one), tmp_path / f"1-{case}.pt", flags)
    for done in map(ended, runs):
        assert done.returncode == 0, done.stderr[-3000:]
    for case in cases.split("+"):
        one, *others = (torch.load(tmp_path / f"{n}-{case}.pt", weights_only=True) for n in (1, 2, 4))
        for other in others:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5), case
            assert other["gradients"].keys() == one["gradients"].keys()
            whole = torch.cat([g.flatten() for g in one["gradients"].values()]).norm()
            for name, gradient in one["gradients"].items():
                near = 1e-5 * max(gradient.norm(), 1e-2 * whole)                       # a gradient near zero is rounding alone
                assert (other["gradients"][name] - gradient).norm() <= near, (case, name)


def test_a_batch_in_parts_is_the_batch(livestreams, tmp_path):
    given = {"data": str(livestreams), "out": str(tmp_path)} | flags_of(SMALL) | {"dense": 0.0, "looks": 0.0}
    gradients = []
    for accum in (1, 2, 4):
        config = train.configure(given | {"accum": accum}, "sd")
        torch.manual_seed(0)
        model, _, samples, _, collate = train.prepare(config, torch.device("cpu"), None)
        batch = collate([samples[(0, i)] for i in range(8)])
        loss, terms = train.forward_backward(train.Step(model), train.optimizer_of(model, config), batch, config, torch.device("cpu"), 0)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad] + [loss[None]]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def wait_for(path, process, seconds=60):
    end = time.time() + seconds
    while not path.exists() and process.poll() is None and time.time() < end:
        time.sleep(0.05)
    assert path.exists(), process.communicate(timeout=10)


@pytest.fixture(scope="session")
def thirty_steps(livestreams, tmp_path_factory):
    """Flags of a run, and the folder of one that was left alone, with as many threads as the others."""
    flags, whole = ["--stage", "sd", "--data", str(livestreams), *SMALL, "--steps", "30"], tmp_path_factory.mktemp("whole")
    assert ended(start("train.py", *flags, "--out", whole)).returncode == 0
    return flags, whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(thirty_steps, tmp_path, number):
    flags, whole = thirty_steps
    command = ["train.py", *flags, "--out", tmp_path / "cut", "--save-every", "3"]
    process = start(*command, "--workers", "1", start_new_session=True)
    wait_for(tmp_path / "cut" / "sd.pt", process)
    os.killpg(process.pid, number)                                                    # the worker hears it, too
    _, error = process.communicate(timeout=60)
    stopped = evaluation.read_checkpoint(tmp_path / "cut" / "sd.pt")
    if process.returncode == 128 + number:                                            # unless it was done before it heard
        assert "the same command goes on" in error and f"step {stopped['step']} of 30" in error and stopped["step"] < 30
    process = start(*command, "--log-every", "1")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    if stopped["step"] < 30:
        assert f"goes on from step {stopped['step']} of 30; workers: 1 there, 0 here" in said
    one, two = (evaluation.read_checkpoint(folder / "sd.pt") for folder in (whole, tmp_path / "cut"))
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    assert (whole / "sd.jsonl").read_text() == (tmp_path / "cut" / "sd.jsonl").read_text()


def test_a_killed_process_is_started_again_from_the_last_checkpoint(livestreams, tmp_path):
    """torchrun --max-restarts: one of two processes is killed; the job ends with the weights of a job that was left alone."""
    flags = ["--stage", "sd", "--data", str(livestreams), *SMALL, "--steps", "40", "--save-every", "5"]
    whole = launch("train.py", *flags, "--out", tmp_path / "whole")
    process = launch("train.py", *flags, "--out", tmp_path / "cut", restarts=3)
    wait_for(tmp_path / "cut" / "sd.pt", process, 90)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    done = ended(process)
    assert done.returncode == 0 == ended(whole).returncode, done.stderr[-2000:]
    one, two = (evaluation.read_checkpoint(tmp_path / part / "sd.pt") for part in ("whole", "cut"))
    assert two["step"] == 40 and all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_that_is_freed_stays():
    code = """
import resource, torch, eval as evaluation
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given = faults()
evaluation.keep_memory()
faults()
print(given, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    given, kept = map(int, done.stdout.split())
    assert given > 10_000 and kept < 100, (given, kept)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    code = f"""
import resource, torch, train, data
path = {str(tmp_path / 'sd.pt')!r}
train.save(path, {{"step": 1, "model": torch.zeros(10)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
data.guarded(train.save, path, {{"step": 2, "model": torch.zeros(100_000)}})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert torch.load(tmp_path / "sd.pt", weights_only=True)["step"] == 1 and os.listdir(tmp_path) == ["sd.pt"]


def same(ours, theirs):
    """Two results, number by number; other batches round other last digits of a score, nothing more."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            same(ours[key], theirs[key])
    else:
        assert ours == (pytest.approx(theirs, rel=1e-5) if theirs is not None else None)


@pytest.mark.parametrize("stage", train.STAGES)
def test_eval_alone_gives_the_same_numbers_on_any_number_of_processes(run_one, stage, tmp_path):
    trained = json.loads((run_one / "results.json").read_text())[stage]["results"]
    evaluation.main(["--ckpt", str(run_one / f"{stage}.pt"), "--json", str(tmp_path / "one.json"), "--out", str(tmp_path)])
    same(json.loads((tmp_path / "one.json").read_text())["results"], trained)
    if stage != "sd":
        done = ended(launch("eval.py", "--ckpt", run_one / f"{stage}.pt", "--json", tmp_path / "three.json", "--out", tmp_path / "3", processes=3))
        assert done.returncode == 0, done.stderr[-3000:]
        same(json.loads((tmp_path / "three.json").read_text())["results"], trained)


def test_a_second_run_says_that_all_is_done(run_one, livestreams, capsys):
    before = {stage: (run_one / f"{stage}.pt").read_bytes() for stage in train.STAGES}
    train.main(["--data", str(livestreams), "--out", str(run_one), *SMALL])
    said = capsys.readouterr().out
    assert all(f"{stage}: done before" in said for stage in train.STAGES) and "all done" in said and "Table 2" in said
    assert before == {stage: (run_one / f"{stage}.pt").read_bytes() for stage in train.STAGES}


def test_a_stage_notices_that_the_one_before_it_changed(run_one, livestreams, tmp_path, capsys):
    for stage in train.STAGES:
        shutil.copy(run_one / f"{stage}.pt", tmp_path)
    (tmp_path / "sd.pt").unlink()
    train.main(["--stage", "sd", "--data", str(livestreams), "--out", str(tmp_path), *SMALL, "--seed", "1"])
    for stage, before in (("md", "sd"),):
        with pytest.raises(SystemExit):
            train.main(["--stage", stage, "--data", str(livestreams), "--out", str(tmp_path), *SMALL])
        assert f"another {before}.pt" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--view", "mask"], ["--view", "frame"], ["--boxes", "true", "--negatives", "rand"], ["--losses", "icl"]])
def test_rice_trains_and_ranks_in_every_view(run_one, livestreams, tmp_path, flags):
    shutil.copy(run_one / "md.pt", tmp_path)
    train.main(["--stage", "rice", "--data", str(livestreams), "--out", str(tmp_path), *SMALL, *flags])
    result = json.loads((tmp_path / "results.json").read_text())["rice"]
    assert 0 <= result["results"]["none" if "frame" in flags else "true"]["icl"]["R1"] <= 100 and (tmp_path / "ranking.png").exists()


def test_val_is_watched_and_the_best_is_kept(run_one, livestreams, tmp_path, capsys):
    for stage, name in (("sd", "AP50"), ("rice", "R1")):
        flags = ["--stage", stage, "--data", str(livestreams), "--out", str(tmp_path), "--detectors", str(run_one), "--eval-every", "2"]
        train.main([*flags, *SMALL, "--steps", "4"])
        watched = {line["step"]: line[name] for line in log_of(tmp_path, stage) if name in line}
        best, last = (evaluation.read_checkpoint(tmp_path / f"{stage}{end}.pt") for end in ("-best", ""))
        assert set(watched) == {2, 4} and watched[best["step"]] == max(watched.values()) == best["best"] == last["best"]
        evaluation.main(["--ckpt", str(tmp_path / f"{stage}-best.pt"), "--split", "val", "--json", str(tmp_path / "j.json")])
        results = json.loads((tmp_path / "j.json").read_text())["results"]
        value = results["sd"]["class-agnostic"]["AP50"] if stage == "sd" else results["md"]["icl"]["R1"]
        assert value == pytest.approx(best["best"], abs=1e-6)
    flags = ["--stage", "sd", "--data", str(livestreams), "--out", str(tmp_path / "two"), "--eval-every", "1", "--frames", "2"]
    train.main([*SMALL, *flags, "--steps", "1"])                                            # val clips have more frames than 2
    assert "AP50" in log_of(tmp_path / "two", "sd")[-1]


@pytest.mark.parametrize("text, read", [("none", set()), ("asr", {"asr"}), ("title", {"title"}), ("both", {"asr", "title"})])
def test_only_the_texts_asked_for_are_read(run_one, livestreams, text, read):
    config = train.configure({"data": str(livestreams), "out": str(run_one), "text": text} | flags_of(SMALL), "rice")
    *_, samples, _, _ = train.prepare(config, torch.device("cpu"), None)
    item = samples[(0, 0)]
    assert {name for name in ("asr", "title") if (item[name] > 1).any()} == read
    lives = data.Lives(livestreams, "test")
    shop = data.ImageSet(lives.image, lives.titles, samples.tokenizer, 48, list(lives.titles), text)
    assert bool((shop[(0, 0)]["title"] > 1).any()) == ("title" in read)


def test_several_checkpoints_make_one_table(run_one, livestreams, tmp_path, capsys):
    for seed in (1, 2):
        train.main(["--stage", "rice", "--data", str(livestreams), "--out", str(tmp_path / str(seed)), "--detectors", str(run_one),
                    "--negatives", "rand", "--seed", str(seed), *SMALL])
    capsys.readouterr()
    evaluation.main(["--ckpt", str(tmp_path / "?" / "rice.pt"), str(run_one / "rice.pt"), "--json", str(tmp_path / "j.json")])
    said, result = capsys.readouterr().out, json.loads((tmp_path / "j.json").read_text())
    assert [row["name"] for row in result["rows"]] == [f"negatives={n}, {score}" for n in ("rand", "hard") for score in ("ICL", "PMD", "ICL + PMD")]
    assert result["rows"][0]["seeds"] == [1, 2] and len(result["runs"]) == 3 and "the paper's" in said
    evaluation.main(["--ckpt", str(run_one / "md.pt"), str(run_one / "md.pt"), str(run_one / "sd.pt"), "--markdown", "--json", str(tmp_path / "j.json")])
    said, result = capsys.readouterr().out, json.loads((tmp_path / "j.json").read_text())
    assert [d["name"] for d in result["differences"]] == ["MD - SD", "MD - SD, vote", "MD - MD, T = 1"]
    one = result["runs"][0]["results"]
    assert result["differences"][0]["mean"]["AP50"] == pytest.approx(one["md"]["class-agnostic"]["AP50"] - one["sd"]["class-agnostic"]["AP50"])
    assert result["differences"][0]["paper"][1] == pytest.approx(0.5) and "| MD - SD " in said


def test_eval_names_what_is_missing_and_counts_it_as_a_miss(run_one, livestreams, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(livestreams, root)
    path = next((root / "annotations").glob("test_frameid2gtbox_*.json"))
    gone = data.Lives(root, "test").video_ids[0]
    path.write_text(json.dumps({f: b for f, b in json.loads(path.read_text()).items() if not f.startswith(gone)}))
    evaluation.main(["--ckpt", str(run_one / "rice.pt"), "--data", str(root), "--out", str(tmp_path / "new"), "--json", str(tmp_path / "j.json")])
    counts = json.loads((tmp_path / "j.json").read_text())["counts"]
    assert counts["missing"] == 1 and counts["clips"] == 8 and "missing=1" in capsys.readouterr().out
    for name in ("test_videoid_to_gtimage", "test_liveid_to_gallery"):
        next((root / "annotations").glob(f"{name}_*")).unlink()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--ckpt", str(run_one / "rice.pt"), "--data", str(root)])
    assert stop.value.code == 2 and "test_liveid_to_gallery" in capsys.readouterr().err
    evaluation.main(["--ckpt", str(run_one / "md.pt"), "--data", str(root), "--out", str(tmp_path)])
    path.write_text("{}")                                          # and no picture of a test frame either: nothing to detect on
    for frame in (root / "frames").iterdir():
        frame.unlink()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--ckpt", str(run_one / "md.pt"), "--data", str(root), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "have no frames" in capsys.readouterr().err


@pytest.fixture(scope="session")
def broken(tmp_path_factory):
    """120 training clips, one with a row that is none and one without its pictures: not more than 1 % of either kind alone."""
    root = tmp_path_factory.mktemp("broken") / "lives"
    render(root, lives=10, val_lives=0, test_lives=1, products=21, clips=21, gallery=4, frames=4, size=32)
    path = next((root / "annotations").glob("training*"))
    rows = path.read_text().splitlines()
    fields = rows[7].split("\t")
    rows[7] = "\t".join([*fields[:2], fields[2][:-9], *fields[3:]])                        # the box list is not closed
    path.write_text("\n".join(rows) + "\n")
    for frame_id in json.loads(rows[30].split("\t")[1]):
        (root / "frames" / f"{frame_id}.jpg").write_bytes(b"no picture")
    return root


@pytest.mark.parametrize("stage", ["sd", "rice"])
def test_a_clip_that_cannot_be_read_is_skipped_and_counted(broken, tmp_path, capsys, stage):
    flags = ["--stage", stage, "--data", str(broken), "--out", str(tmp_path), *SMALL, "--steps", "0", "--epochs", "1", "--batch", "30"]
    train.main([*flags, *(["--boxes", "true"] if stage == "rice" else [])])
    said = capsys.readouterr().out
    assert f"{stage}: 2 of 210 clips could not be read and were skipped" in said


def test_all_processes_skip_alike_and_stop_when_too_much_is_broken(broken, tmp_path, capsys):
    worse = tmp_path / "worse"
    shutil.copytree(broken, worse)
    for path in sorted((worse / "frames").iterdir())[:200]:
        path.write_bytes(b"no picture")
    flags = ["--stage", "sd", *SMALL, "--steps", "0", "--epochs", "1", "--batch", "30"]
    done, stopped = map(ended, [launch("train.py", *flags, "--data", root, "--out", tmp_path / root.name) for root in (broken, worse)])
    assert done.returncode == 0 and "sd: 2 of 210 clips could not be read and were skipped" in done.stdout, done.stderr[-2000:]
    assert stopped.returncode and "more than 1 %" in stopped.stderr and "Traceback (most recent call last):\n  File \"train.py" not in stopped.stderr
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--data", str(worse), "--out", str(tmp_path / "alone")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "more than 1 %" in said and "Traceback" not in said


def test_a_clip_without_frames_teaches_rice_nothing(livestreams, run_one, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(livestreams, root)
    (path,) = (root / "annotations").glob("training_videoinfo_*.txt")
    first, *others = path.read_text().splitlines(True)
    columns = first.split("\t")
    path.write_text("\t".join([columns[0], "[]", "[]", *columns[3:]]) + "".join(others))
    lives = data.Lives(root, "train")
    assert lives.lengths[0] == 0 and lives.product[0] >= 0
    pairs = data.PairSet(lives, data.Tokenizer(torch.zeros(0, dtype=torch.uint8)), 2, 48, 3, "frame", None, True)
    assert 0 not in pairs.clips and len(pairs) == len(lives) - 1


def test_rice_is_not_judged_on_what_it_was_not_trained_on(run_one, livestreams, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(livestreams, root)
    for path in (root / "annotations").glob("test_frameid2gtbox_*"):
        path.unlink()
    checkpoint = evaluation.read_checkpoint(run_one / "rice.pt")
    checkpoint["config"]["boxes"] = "true"
    del checkpoint["detector"]
    with pytest.raises(data.BadInput, match="RICE was trained on true boxes"):
        evaluation.box_sources(checkpoint, data.Lives(root, "test"), tmp_path, torch.device("cpu"), True)


def test_processes_that_find_different_checkpoints_end_in_one_line(livestreams, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "everyones", lambda step: [step, 3])
    config = train.configure({"data": str(livestreams), "out": str(tmp_path)} | flags_of(SMALL), "sd")
    with pytest.raises(data.BadInput, match="sd.pt is not the same for all processes"):
        train.train(config, 0, 1, torch.device("cpu"))


def test_a_comparison_draws_each_clip_once(tmp_path):
    drawn = []

    def row(c):
        drawn.append(c)
        return evaluation.GREY
    looks = [{"name": "x", "hard": np.array(hard), "row": row} for hard in ([0, 0, 3, 0, 0], [0, 2, 0, 0, 0])]
    evaluation.draw_comparison(looks, ("a", "b"), tmp_path, 9)
    assert drawn[::2] == [1, 2, 0, 3, 4]


def test_skipping_a_pair_equals_a_batch_without_it():
    torch.manual_seed(0)
    clip, image, product = torch.randn(5, 8), torch.randn(5, 8), torch.tensor([4, 2, -1, 9, 2])
    rest = product >= 0
    torch.testing.assert_close(rice.icl_loss(clip, image, 10.0, product), rice.icl_loss(clip[rest], image[rest], 10.0, product[rest]))
    clips, real = rice.sample_negatives(torch.zeros(5, 5), product, product, 4)
    assert not (clips[real] == 2).any()
    score = torch.randn(5, 4)
    torch.testing.assert_close(rice.pmd_loss(score, None, product), rice.pmd_loss(score[rest]))


def test_one_bad_weight_stops_the_run_before_it_spreads(run_one, livestreams, tmp_path, capsys, monkeypatch):
    build = evaluation.build

    def spoiled(*arguments):
        model = build(*arguments)
        model.input_proj.weight.data[0, 0] = math.nan
        return model
    monkeypatch.setattr(evaluation, "build", spoiled)
    with pytest.raises(SystemExit) as stop:
        train.main(["--stage", "sd", "--data", str(livestreams), "--out", str(tmp_path), *SMALL])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "step 1: " in error and "step 1, process 0" in error and "weight input_proj.weight" in error and "-16679160" in error
    assert not (tmp_path / "sd.pt").exists()


class ReadBack(TorchDispatchMode):
    """Notes every operation for whose outcome the host has to wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"):
            self.seen.append(name)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_step_never_waits_for_the_device(run_one, livestreams, stage):
    config = train.configure({"data": str(livestreams), "out": str(run_one)} | flags_of(SMALL), stage)
    model, _, samples, order, collate = train.prepare(config, torch.device("cpu"), None)
    keys = next(iter(data.step_batches(order, 4, 1)))
    batch = (collate or default_collate)([samples[key] for key in keys])
    optimizer = train.optimizer_of(model.train(), config)
    train.ready(batch, config, torch.device("cpu"), 0)                       # what is sent to the device once, is there
    with ReadBack() as host:
        loss, _ = train.forward_backward(train.Step(model), optimizer, batch, config, torch.device("cpu"), 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        assert host.seen == []
        float(loss)
    assert host.seen == ["_local_scalar_dense"]


class Mixed(TorchDispatchMode):
    """Notes every operation that meets tensors of two devices, or copies between them and waits."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out, name = function(*arguments, **(named or {})), function.overloadpacket.__name__
        devices = {t.device.type for t in tree_leaves((arguments, named)) if torch.is_tensor(t) and t.dim()}
        waits = name == "_to_copy" and out.device != arguments[0].device and not named.get("non_blocking")
        if len(devices) > 1 and name != "copy_" or waits:
            self.seen.append(name)
        return out


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_loss_on_a_device_that_is_not_here_meets_nothing_of_the_host(stage, monkeypatch):
    """Tensors without memory that say they lie on a CUDA device: what test_gpu.py asks of a real one, of the forward pass."""
    monkeypatch.setattr(rice, "gumbel", lambda shape, seed: torch.rand(shape))                      # fakes take no generator
    config = train.configure({}, stage)
    with FakeTensorMode():
        with torch.device("cuda"):
            model, B, T = evaluation.build(vars(config), 8, 500), 3, 1 if stage == "sd" else 2
            batch = {"valid": torch.ones(B, T, dtype=torch.bool), "seed": 0, "image": torch.rand(B, 3, 64, 64), "product": torch.arange(B),
                     "asr": torch.ones(B, 24, dtype=torch.long), "title": torch.ones(B, 24, dtype=torch.long), "keep": torch.ones(B, T, 16) > 0,
                     "frames": torch.rand(B, T, 3, 64, 64), "padding": torch.zeros(B, T, 64, 64) > 0, "labels": torch.zeros(B, T, 1).long(),
                     "boxes_cxcywh": torch.rand(B, T, 1, 4)}
        with Mixed() as host:
            assert model.loss(batch)[0].device.type == "cuda" and host.seen == []
            torch.ones(2, 2, device="cuda")[[1, 0]], torch.tensor([1.0], device="cuda")             # what it is there to find
            assert len(host.seen) == 2


def test_all_processes_stop_together_at_a_bad_weight(run_one, livestreams, tmp_path):
    state = torch.load(run_one / "sd.pt", weights_only=True)["model"]
    state["input_proj.bias"][3] = math.inf
    torch.save(state, tmp_path / "bad.pth")
    done = ended(launch("train.py", "--stage", "sd", "--data", livestreams, "--out", tmp_path / "run", *SMALL, "--init", tmp_path / "bad.pth"))
    assert done.returncode and not (tmp_path / "run" / "sd.pt").exists()
    assert "is not finite" in done.stderr and "weight input_proj.bias" in done.stderr and 'train.py", line' not in done.stderr


def test_bf16_loss_is_within_one_percent(run_one, livestreams):
    for stage in train.STAGES:
        config = train.configure({"data": str(livestreams), "out": str(run_one)} | vars(train_options()), stage)
        checkpoint = evaluation.read_checkpoint(run_one / f"{stage}.pt")
        model, _, samples, order, collate = train.prepare(config, torch.device("cpu"), checkpoint)
        model.load_state_dict(checkpoint["model"])
        if stage == "md":
            model.steps = (9, 9, 9)             # all queries: between nearly equal scores rounding would choose others
        keys = next(iter(data.step_batches(order, 4, 1)))
        batch = train.ready((collate or torch.utils.data.default_collate)([samples[k] for k in keys]), config, torch.device("cpu"), 0)
        exact = model.loss(batch)[0]
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.loss(batch)[0]
        assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.01) and rough != exact


def train_options():
    """SMALL as train.main's parser reads it."""
    return argparse.Namespace(**flags_of(SMALL))


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_stopped_run_resumes_to_the_same_weights(run_one, livestreams, tmp_path, monkeypatch, stage):
    shutil.copy(run_one / "sd.pt", tmp_path), shutil.copy(run_one / "md.pt", tmp_path)
    options = ["--stage", stage, "--data", str(livestreams), *SMALL, "--steps", "4", "--save-every", "2"]
    if stage == "sd":
        (tmp_path / "sd.pt").unlink()
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        for before in tmp_path.glob("?d.pt"):
            if before.stem != stage:
                shutil.copy(before, tmp_path / name)
    train.main([*options, "--out", str(tmp_path / "whole")])
    calls, report = [], train.report

    def stop_at_three(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return report(*arguments)
    monkeypatch.setattr(train, "report", stop_at_three)
    with pytest.raises(SystemExit) as stop:
        train.main([*options, "--out", str(tmp_path / "stopped")])
    assert stop.value.code == 130
    monkeypatch.setattr(train, "report", report)
    assert torch.load(tmp_path / "stopped" / f"{stage}.pt", weights_only=True)["step"] == 2
    train.main([*options, "--out", str(tmp_path / "stopped")])
    whole, resumed = (torch.load(tmp_path / name / f"{stage}.pt", weights_only=True) for name in ("whole", "stopped"))
    assert all(torch.equal(whole["model"][k], resumed["model"][k]) for k in whole["model"])
    assert log_of(tmp_path / "whole", stage) == log_of(tmp_path / "stopped", stage)


@pytest.mark.parametrize("command, says", [
    (["--stage", "md"], "train it with `python train.py --stage sd`"),
    (["--stage", "rice"], "train it with `python train.py --stage md`"),
    (["--stage", "xx"], "--stage xx"), (["--heads", "3"], "--dim"), (["--batch", "0"], "--batch 0"), (["--lr", "-1"], "--lr -1"),
    (["--workers", "-1"], "--workers -1"), (["--seed", "-1"], "--seed -1"), (["--backbone", "foo"], "--backbone foo"), (["--size", "40"], "--size"),
    (["--shortest", "80,48,16"], "--shortest"), (["--save-every", "0"], "--save-every 0"), (["--init", "x.pth"], "--stage sd or --stage rice"),
    (["--view", "box", "--boxes", "none"], "--view box"), (["--preset", "huge"], "--preset huge"), (["--shortest", "1,2"], "--shortest"),
    (["--stage", "sd", "--data", "nowhere"], "nowhere"), (["--stage", "sd", "--init", "nothing.pth"], "nothing.pth")])
def test_bad_input_is_one_line_and_status_2(tmp_path, livestreams, capsys, command, says):
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(tmp_path), *SMALL, *([] if "--data" in command else ["--data", str(livestreams)]), *command])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and says in error and "\n" not in error


def test_another_configuration_or_a_broken_checkpoint_is_refused(tmp_path, run_one, livestreams, capsys):
    shutil.copy(run_one / "sd.pt", tmp_path)
    with pytest.raises(SystemExit):
        train.main(["--stage", "sd", "--data", str(livestreams), "--out", str(tmp_path), *SMALL, "--lr", "0.5"])
    assert "lr: 0.001 there, 0.5 here" in capsys.readouterr().err
    (tmp_path / "sd.pt").write_bytes(b"torn")
    for main, arguments in ((train.main, ["--stage", "md", "--data", str(livestreams), "--out", str(tmp_path), *SMALL]),
                            (evaluation.main, ["--ckpt", str(tmp_path / "sd.pt")])):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and "not a checkpoint" in capsys.readouterr().err


def test_an_error_in_a_loader_process_is_one_line_too(tmp_path, livestreams, capsys):
    root = tmp_path / "data"
    shutil.copytree(livestreams, root)
    for path in (root / "frames").glob("*.jpg"):
        path.unlink()
    with pytest.raises(SystemExit) as stop:
        train.main(["--stage", "sd", "--data", str(root), "--out", str(tmp_path / "run"), *SMALL, "--workers", "1"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and "missing" in error


def test_learning_rate_is_a_function_of_the_step():
    paper = train.Config(steps=20)
    assert [round(train.learning_rate(s, paper), 3) for s in (0, 14, 15, 19)] == [1, 1, 0.1, 0.1]
    tiny = train.configure({}, "sd")
    assert train.learning_rate(0, tiny) == pytest.approx(1 / 50) and train.learning_rate(49, tiny) == 1
    assert train.learning_rate(tiny.steps, tiny) == pytest.approx(0)


def test_the_paper_preset_is_the_supplement():
    sd, md, rice = (train.configure({"preset": "paper"}, stage) for stage in train.STAGES)
    assert (sd.shortest, sd.longest, sd.lr, sd.backbone_lr, sd.weight_decay, sd.batch, sd.epochs, sd.drop) == ([480, 800, 32], 1333, 1e-4, 1e-5, 1e-4, 64, 20, 0.75)
    assert (sd.backbone, sd.encoder_layers, sd.decoder_layers, sd.queries) == ("resnet50", 6, 6, 300)
    assert (md.lr, md.backbone_lr, md.frames, md.keep) == (2e-4, 2e-5, 10, [80, 50, 30])
    assert (rice.width, rice.patch, rice.size, rice.frames, rice.n_neg, rice.negatives) == (768, 32, 224, 10, 3, "hard")


def test_public_weights_load_by_name_and_only_the_class_head_may_differ(tmp_path):
    torch.manual_seed(0)
    make = lambda classes: evaluation.build({"stage": "sd", "queries": 5, "dim": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 2, "ffn": 16,
                                             "backbone": "resnet18", "dense": 0.0, "looks": 0.0}, classes, None)
    public, ours = make(91), make(34)
    torch.save({"model": {f"module.{k}": v for k, v in public.state_dict().items()}, "args": argparse.Namespace(lr=1)}, tmp_path / "coco.pth")
    head = ours.class_embed.weight.clone()
    assert "re-initialised class_embed.bias, class_embed.weight, unused 0" in train.start_from(ours, tmp_path / "coco.pth")
    for key, value in public.state_dict().items():
        assert key.startswith("class_embed.") or torch.equal(ours.state_dict()[key], value)
    assert torch.equal(ours.class_embed.weight, head)
    body = {k: v + 1 for k, v in public.backbone[0].body.state_dict().items()} | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    torch.save(body, tmp_path / "resnet.pth")
    train.start_from(ours, tmp_path / "resnet.pth")
    assert torch.equal(ours.backbone[0].body.conv1.weight, body["conv1.weight"])
    state = public.state_dict()
    state.pop("input_proj.bias")
    torch.save(state | {"stranger": torch.zeros(1)}, tmp_path / "bad.pth")
    with pytest.raises(data.BadInput, match="missing: input_proj.bias; left over: stranger"):
        train.start_from(ours, tmp_path / "bad.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(data.BadInput, match="not a state dict"):
        train.start_from(ours, tmp_path / "list.pth")


def test_clip_weights_load_into_the_image_encoder(tmp_path):
    model = rice.RICE({"width": 64, "layers": 2, "heads": 1, "patch": 8, "size": 32, "dim": 32}, 10)
    weights = golden("clip_vit_tiny.pt")["state_dict"]
    torch.save({k: v.half() for k, v in weights.items()} | {"logit_scale": torch.tensor(1.0), "text_projection": torch.zeros(2, 2)}, tmp_path / "clip.pt")
    train.start_from(model, tmp_path / "clip.pt")
    assert all(torch.equal(model.state_dict()[k], v.half().float()) for k, v in weights.items())


def test_torchscript_archives_are_read_as_data_and_positions_fit(tmp_path):
    g = golden("clip_vit_tiny.pt")
    vit = rice.ViT(64, 2, 1, 8, 32, 32)
    vit.load_state_dict(g["state_dict"])
    holder = torch.nn.Module()
    holder.visual = torch.jit.trace(vit.eval(), torch.zeros(1, 3, 32, 32), check_trace=False)
    archive = tmp_path / "ViT.pt"
    torch.jit.save(torch.jit.script(holder), archive)
    read = train.read_weights(archive)
    assert all(torch.equal(read[k], v) for k, v in g["state_dict"].items())
    model = rice.RICE({"width": 64, "layers": 2, "heads": 1, "patch": 8, "size": 48, "dim": 32}, 10)
    assert "interpolated from 16 to 36 patches" in train.start_from(model, archive)
    fitted, old = model.visual.positional_embedding, g["state_dict"]["visual.positional_embedding"]
    assert torch.equal(fitted[0], old[0]) and torch.allclose(rice.fit_positions(old, 4), old, atol=1e-6)
    ramp = torch.arange(8.0)[:, None, None].expand(8, 8, 3).reshape(64, 3)           # a position that grows downwards goes on doing so
    taller = rice.fit_positions(torch.cat([torch.zeros(1, 3), ramp]), 16)[1:].view(16, 16, 3)
    assert (taller.diff(dim=0)[2:-2] > 0).all() and torch.allclose(taller, taller[:, :1])


def readme_commands():
    """The commands of the bash blocks of README and results.md; of a loop its inner ones, with a value for its variables."""
    text = "".join((ROOT / name).read_text() for name in ("README.md", ".github/results.md"))
    lines = [line.split("  #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", text, re.S)
             for line in block.splitlines() if line.strip() and not line.startswith("#")]
    return [("for" if line.startswith("for ") else "", re.sub(r"\$\(\(.*?\)\)|\$\w+", "0", command.strip()))
            for line in lines for command in re.split(r";|&&", re.sub(r"for .*?; do|; done", "", line)) if command.strip()]


def test_the_readmes_own_data_is_the_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(code.strip().splitlines()) <= 10
    exec(code, {})
    train, test = data.Lives("mine", "train"), data.Lives("mine", "test")
    assert [len(boxes) for boxes in train.clip(0).boxes] == [1, 0] and train.categories == {1: "mug"} and train.clip(0).title == "red mug"
    assert test.clip(0).image_ids == ["mug8"] and test.galleries == {"live2": ["mug8", "mug9"]} and test.clip(0).boxes[0][0, 4] == 1


def test_near_duplicates_are_listed(run_one, livestreams, tmp_path, capsys):
    shutil.copytree(livestreams / "images", tmp_path / "lives" / "images")
    some = sorted((tmp_path / "lives" / "images").iterdir())[3]
    shutil.copy(some, some.with_name("again.jpg"))
    groups = evaluation.duplicates(run_one / "rice.pt", tmp_path / "lives", 0.99999, block=3)
    assert [sorted(group) for group in groups if "again" in group] == [sorted([some.stem, "again"])]
    listed = dict(line.split("\t") for line in (tmp_path / "lives" / "duplicates.txt").read_text().splitlines())
    assert listed.get("again") == some.stem or listed.get(some.stem) == "again"
    assert all(len(group) > 1 for group in groups) and evaluation.duplicates(run_one / "rice.pt", tmp_path / "lives", 1.0, block=100) == []


def test_the_readme_counts_lines_and_shows_a_picture():
    text = (ROOT / "README.md").read_text()
    for name, lines in re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", text, re.M):
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 20, name
    assert all((ROOT / path).exists() for path in re.findall(r"!\[.*?\]\((.*?)\)", text))


def help_of(script, capsys):
    mains = {"train.py": train.main, "eval.py": evaluation.main, "data.py": data.main}
    if script not in mains:
        return ended(start(script, "--help")).stdout
    capsys.readouterr()
    with pytest.raises(SystemExit):
        mains[script](["--help"])
    return capsys.readouterr().out


def test_what_the_readme_says_runs(tmp_path, livestreams, monkeypatch, capsys):
    """Every command of the README: those of the quickstart are run on small sizes, the others' flags are parsed."""
    commands = readme_commands()
    assert {"pip install -r requirements.txt", "python train.py", "python -m pytest"} <= {command for _, command in commands}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.multiprocessing, "get_context", threads)
    (tmp_path / "runs").mkdir()
    shutil.copytree(livestreams, tmp_path / "runs" / "livestreams")
    ran, known = 0, {}
    for loop, command in commands:
        words = shlex.split(command)
        script = next((w for w in words if w.endswith(".py")), None)
        arguments = words[words.index(script) + 1:] if script else []
        if script == "train.py" and "--preset" not in arguments and not loop:
            train.main([*arguments, *SMALL])
        elif script == "eval.py" and "runs/tiny" in command and not loop:
            evaluation.main(arguments)
        elif script == "data.py" and arguments[0] == "render":
            data.main([arguments[0], str(tmp_path / f"rendered{ran}"), *arguments[2:], "--lives", "1", "--val-lives", "0", "--test-lives", "1",
                       "--products", "4", "--clips", "4", "--gallery", "4", "--frames", "4", "--processes", "1"])
        elif script:
            if script not in known:
                known[script] = set(re.findall(r"--[a-z-]+", help_of(script, capsys)))
            assert set(re.findall(r"--[a-z-]+", " ".join(arguments))) <= known[script], command
        ran += bool(script)
    assert ran >= 8 and (tmp_path / "runs" / "tiny" / "results.json").exists()
