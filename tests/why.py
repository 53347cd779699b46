"""Where a gain comes from: two looks at trained models, means over checkpoints. A script:

    python tests/why.py frames runs/s?/md.pt        AP50 by what a clip shows: pairs, short clips
    python tests/why.py places runs/s?/rice.pt      R1 by the number of frames a clip is seen in
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                    # noqa: E402
import eval as evaluation      # noqa: E402


def frames(paths):
    """Class-agnostic AP50 of SD, MD with T = 1 and MD over parts of the test frames."""
    values = {}
    for path in paths:
        _, look = evaluation.evaluate(path)
        lives, rows = look.split, look.boxes
        truth = evaluation.ground_truth(rows, lives, look.categories)
        truth["category"] = np.zeros(len(truth["image"]), int)
        ids = np.array(lives.video_ids)[rows["clip"]]
        pair = np.isin(ids, list(lives.cases["two-in-view"]))
        short = np.isin(ids, list(lives.subsets["short duration"]))
        shown = np.isin(np.arange(len(rows)), truth["image"])
        parts = {"all": np.ones(len(rows), bool), "pairs": pair, "no pairs": ~pair, "short": short,
                 "short, no pairs": short & ~pair, "frames that show it": shown}
        for method in ("sd", "md_t1", "md"):
            found = {"image": np.arange(len(rows)), "category": np.zeros(len(rows), int),
                     "box_xyxy": rows[method][:, :4], "score": rows[method][:, 4]}
            row = evaluation.table_1_row(truth, found, parts)
            for name in (name for name in parts if row[name] is not None):
                values.setdefault(name, {}).setdefault(method, []).append(row[name])
    lines = []
    for name, row in values.items():
        sd, alone, md = (float(np.mean(row[method])) for method in ("sd", "md_t1", "md"))
        lines.append((name, sd, alone, md, md - sd, md - alone))
    print(evaluation.table(("AP50", "SD", "T = 1", "MD", "MD - SD", "MD - T = 1"), lines, True))


def places(paths):
    """R1 through each source of boxes when a clip is seen in 1, 2, 4 and 8 of its frames."""
    lines, device = [], evaluation.pick_device()
    for count in (1, 2, 4, 8):
        values = {}
        for path in paths:
            checkpoint = evaluation.load_checkpoint(path)
            checkpoint["config"].frames = count
            lives = data.LPRSplit(checkpoint["config"].data, "test")
            results, _, _ = evaluation.table_2(checkpoint, lives, Path(path).parent, device)
            for source, scores in results.items():
                for score, columns in scores.items():
                    values.setdefault((source, score), []).append(columns["R1"])
        lines += [(f"{count} frames, {evaluation.SOURCES[source]}, {evaluation.SCORES[score]}",
                   float(np.mean(numbers))) for (source, score), numbers in values.items()]
    print(evaluation.table(("R1", "mean"), lines, True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("look", choices=("frames", "places"))
    parser.add_argument("ckpt", nargs="+")
    args = parser.parse_args()
    {"frames": frames, "places": places}[args.look](args.ckpt)


if __name__ == "__main__":
    data.run_command(main)
