"""--overfit, the first thing to try when a model does not learn: eight clips, all three stages."""
import json

from conftest import render

import train


def test_eight_clips_are_learnt(tmp_path):
    root, out = tmp_path / "lives", tmp_path / "run"
    render(root, lives=2, val_lives=0, test_lives=0, products=8, clips=8, frames=8)
    command = ["--overfit", "8", "--data", str(root), "--out", str(out)]
    train.main(command)
    results = json.loads((out / "results.json").read_text())
    for stage in train.STAGES:
        assert results[stage]["counts"]["clips"] == 8 and results[stage]["split"] == "train"
    assert results["sd"]["results"]["sd"]["class-agnostic"]["AP50"] >= 95
    assert results["md"]["results"]["md"]["class-agnostic"]["AP50"] >= 95
    assert results["rice"]["results"]["md"]["icl"]["R1"] == 100
    log = (out / "sd.jsonl").read_text()
    train.main(command)                      # the same clips: done before
    assert (out / "sd.jsonl").read_text() == log
