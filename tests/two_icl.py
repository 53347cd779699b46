"""A script, no test: what does fusing ICL with a second ICL model gain, in place of the PMD?

    python tests/two_icl.py runs/icl0/rice.pt runs/icl1/rice.pt

Prints R1 of each checkpoint by ICL and, for each pair of them, of the sum of both similarities, in percent.
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation


def main(paths):
    scored = {}
    for path in paths:
        checkpoint = evaluation.read_checkpoint(path)
        config, lives = checkpoint["config"], data.Lives(checkpoint["config"]["data"], "test")
        *_, shown, _ = evaluation.score_ranking(checkpoint, lives, Path(config["detectors"]), evaluation.pick_device(), every_source=False)
        scored[path] = [(row["score"][shown["source"]]["icl"], row["positive"]) for row in shown["rows"]]
    for one, other in [*zip(paths, paths), *itertools.combinations(paths, 2)]:
        places = [evaluation.first_true((a + b) / 2, true) for (a, true), (b, _) in zip(scored[one], scored[other])]
        hits, clips = sum((place == 0).sum() for place in places), sum(map(len, places))
        print(f"{100 * hits / clips:6.1f}  {one}{'' if one == other else f' + {other}'}")


if __name__ == "__main__":
    data.guarded(main, sys.argv[1:])
