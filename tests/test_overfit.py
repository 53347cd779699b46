"""--overfit, the first thing to try when a model does not learn: eight clips by heart, each stage in under two minutes on two cores."""
import json

from conftest import render

import train


def test_eight_clips_are_learnt_by_heart(tmp_path):
    root, out = tmp_path / "lives", tmp_path / "run"
    render(root, lives=2, val_lives=0, test_lives=0, products=8, clips=8, frames=8)
    train.main(["--overfit", "8", "--data", str(root), "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert all(results[stage]["counts"]["clips"] == 8 and results[stage]["split"] == "train" for stage in train.STAGES)
    assert results["sd"]["results"]["sd"]["class-agnostic"]["AP50"] >= 95
    assert results["md"]["results"]["md"]["class-agnostic"]["AP50"] >= 95
    assert results["rice"]["results"]["md"]["icl"]["R1"] == 100
    log = (out / "sd.jsonl").read_text()
    train.main(["--overfit", "8", "--data", str(root), "--out", str(out)])                # the same clips: done before
    assert (out / "sd.jsonl").read_text() == log
