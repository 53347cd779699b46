"""How sure is a difference? 95 % intervals by a paired bootstrap over lives and seeds. A script:

    python tests/intervals.py md runs/s?/md.pt                        MD - SD, MD - (T = 1): AP50
    python tests/intervals.py rice runs/s?/rice.pt                    PMD and fused - ICL: R1
    python tests/intervals.py rice runs/s?/rice.pt --than runs/rand?/rice.pt   two models, R1

Both sides see the same lives drawn; each side draws its seeds.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                    # noqa: E402
import eval as evaluation      # noqa: E402

DRAWS = 1000


def r1(sample, weights):
    """R1 in percent when clip q counts weights[:, q] times: [draws]."""
    return 100 * weights @ (sample["rank"] < 1) / weights.sum(1)


def ap50(sample, weights):
    """Class-agnostic AP50 in percent when clip q counts weights[:, q] times: [draws]."""
    order = np.argsort(-sample["score"], kind="stable")
    values = []
    for weight in weights:
        counted = weight[sample["clip"][order]]
        tp = np.cumsum(counted * sample["hit"][order])
        total = max(1, weight @ sample["boxes"])
        precision = tp / np.maximum(np.cumsum(counted), 1)
        precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        values.append(100 * precision[np.searchsorted(tp / total, np.linspace(0, 1, 101))].mean())
    return np.array(values)


def samples_of(path, stage):
    """{method: what r1 or ap50 needs}, and the live of each clip."""
    _, predicted = evaluation.evaluate(path)
    lives = predicted.split
    live = np.array([data.live_of(video_id) for video_id in lives.video_ids])
    if stage == "rice":
        rank = {}
        for ranked in predicted.rankings.values():
            for score, similarity in ranked["similarity"][predicted.source].items():
                values = evaluation.rank_of_first_positive(similarity, ranked["positive"])
                rank.setdefault(score, np.full(len(lives), 10 ** 9))[ranked["clips"]] = values
        return {score: {"rank": values} for score, values in rank.items()}, live
    truth = evaluation.ground_truth(predicted.boxes, lives, predicted.categories)
    boxes = np.bincount(predicted.boxes["clip"][truth["image"]], minlength=len(lives))
    methods = {}
    for method in (m for m in evaluation.METHODS if m in predicted.boxes.dtype.names):
        box = predicted.boxes[method]
        iou = evaluation.box_iou_rows(box[truth["image"], :4], truth["box_xyxy"])
        hit = np.isin(np.arange(len(box)), truth["image"][iou >= 0.5])
        methods[method] = {"clip": predicted.boxes["clip"], "score": box[:, 4], "hit": hit,
                           "boxes": boxes}
    return methods, live


def interval(one, other, statistic, live):
    """Mean and 95 % interval of mean(one) - mean(other), each the samples of its seeds."""
    rng, number = np.random.default_rng(0), np.unique(live, return_inverse=True)[1]
    lives = number.max() + 1
    weights = rng.multinomial(lives, np.full(lives, 1 / lives), DRAWS)[:, number]
    means = []
    for side in (one, other):
        values = np.stack([statistic(sample, weights) for sample in side])
        seeds = rng.integers(len(side), size=values.shape)
        means.append(np.take_along_axis(values, seeds, 0).mean(0))
    every = np.ones((1, len(live)), int)
    mean = [np.mean([statistic(sample, every) for sample in side]) for side in (one, other)]
    return mean[0] - mean[1], *np.percentile(means[0] - means[1], [2.5, 97.5])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("md", "rice"))
    parser.add_argument("ckpt", nargs="+", help="checkpoints, one a seed")
    parser.add_argument("--than", nargs="+", default=[], help="checkpoints to compare with")
    args = parser.parse_args()
    statistic = r1 if args.stage == "rice" else ap50
    runs = [samples_of(path, args.stage) for path in args.ckpt]
    live = runs[0][1]
    rows = {method: [run[method] for run, _ in runs] for method in runs[0][0]}
    if args.than:
        others = [samples_of(path, args.stage)[0] for path in args.than]
        pairs = [(f"{method} - other {method}", rows[method], [other[method] for other in others])
                 for method in rows]
    else:
        first = "md" if args.stage == "md" else "icl"
        pairs = [(f"{m} - {first}", rows[m], rows[first]) for m in rows if m != first]
        if first == "md":
            pairs = [(f"md - {m}", rows["md"], rows[m]) for m in rows if m != "md"]
    lines = [(name, *(f"{v:+.1f}" for v in interval(one, other, statistic, live)))
             for name, one, other in pairs]
    print(evaluation.table(("difference", "mean", "2.5 %", "97.5 %"), lines, True))


if __name__ == "__main__":
    data.run_command(main)
