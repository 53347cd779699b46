"""eval.py: AP and rank-k against pycocotools and the public code, tables, what cannot be read."""
import shutil

import numpy as np
import pytest

import eval as evaluation
import intervals
from conftest import golden
from eval import average_precision, rank_k


def boxes(image, category, box, **score):
    return {"image": np.array(image, int), "category": np.array(category, int),
            "box_xyxy": np.array(box, float).reshape(-1, 4), **score}


def coco(categories, variant):
    """True boxes and detections of the golden file, one detection an image or all of them."""
    g, sides = golden("coco_ap.npz"), []
    some = g["one_det_index"] if variant == "one" else np.arange(len(g["det_image"]))
    for name, rows in (("gt", slice(None)), ("det", some)):
        left, right = np.split(np.float64(g[f"{name}_box_xywh"][rows]), 2, 1)
        sides.append(boxes(g[f"{name}_image"][rows], g[f"{name}_category"][rows] * categories,
                           np.c_[left, left + right]))
    return sides[0], sides[1] | {"score": g["det_score"][some]}


@pytest.mark.parametrize("variant", ["all", "one"])
@pytest.mark.parametrize("categories", [True, False])
def test_average_precision_is_that_of_pycocotools(variant, categories):
    g, result = golden("coco_ap.npz"), average_precision(*coco(categories, variant))
    expected = g[f"stats_{variant}_usecats{int(categories)}"][:3]
    np.testing.assert_allclose([result["AP"], result["AP50"], result["AP75"]], expected, atol=1e-9)
    if categories:
        each = [result["per_category"].get(c, -1) for c in range(34)]
        np.testing.assert_allclose(each, g[f"ap_per_category_{variant}"], atol=1e-9)


def test_average_precision_by_hand():
    square, away = [0, 0, 10, 10], [50, 50, 60, 60]
    truth, nothing = boxes([0, 1], [0, 0], [square] * 2), boxes([], [], [], score=[])
    assert average_precision(truth, nothing)["AP"] == 0
    # The wrong box comes first: precision is 1/2 at recalls 0.00 .. 0.50, 51 of 101 points.
    found = boxes([0, 1], [0, 0], [square, away], score=[0.3, 0.9])
    assert average_precision(truth, found)["AP50"] == pytest.approx(0.5 * 51 / 101)
    # IoU 0.5 exactly counts; at equal scores the order of the images decides.
    found = boxes([0, 1], [0, 0], [[0, 0, 10, 5], away], score=[0.5, 0.5])
    result = average_precision(truth, found)
    assert result["AP50"] == pytest.approx(51 / 101) and result["AP75"] == 0
    # A category that has no true box does not count, not even against us.
    found = boxes([0, 1, 1], [0, 0, 7], [square] * 3, score=[1, 1, 2])
    assert average_precision(truth, found)["AP"] == pytest.approx(1)
    with pytest.raises(ValueError, match="no true box"):
        average_precision(nothing, found)


def test_rank_k_is_the_public_one():
    g = golden("rank_k.npz")
    similarity = np.float64(g["query_embedding"]) @ np.float64(g["gallery_embedding"]).T
    positive = np.zeros(similarity.shape, bool)
    for q, (start, end) in enumerate(zip(g["gt_ptr"], g["gt_ptr"][1:])):
        positive[q, g["gt_index"][start:end]] = True
    gallery, ks = g["query_live"][:, None] == g["gallery_live"], g["k"].tolist()
    for part, wanted in ((gallery, g["recall_per_live"]), (None, g["recall_global"])):
        shares = list(rank_k(similarity, positive, part, ks).values())
        np.testing.assert_allclose(shares, wanted, rtol=0, atol=1e-9)          # 1/150 is a clip


def test_rank_k_by_hand():
    first = np.array([[True, False, False]])
    assert rank_k([[0.9, 0.9, 0.1]], first)[1] == 0                     # a tie counts against us
    assert rank_k([[0.9, 0.8, 0.1]], first) == {1: 1, 5: 1, 10: 1}      # a small gallery
    assert rank_k([[0.1, 0.5, 0.9]], [[True, False, True]])[1] == 1     # any of several
    assert rank_k([[0.1, 0.5, 0.9]], first, first)[1] == 1              # others are not for sale
    assert rank_k([[0.1, 0.5, 0.9]], first, ~first)[10] == 0            # nor is this one
    assert rank_k([[0.1]], [[True]], [[False]])[10] == 0                # an empty gallery
    assert rank_k([[np.nan] * 3, [9, 1, 2]], first.repeat(2, 0))[10] == 0.5        # a miss counts


def test_a_part_of_table_1_is_its_average_precision():
    truth, found = coco(True, "one")
    parts = {"few": np.arange(200) < 60, "odd": np.arange(200) % 2 > 0,
             "none": ~np.isin(np.arange(200), truth["image"])}
    columns, whole = evaluation.table_1_row(truth, found, parts), average_precision(truth, found)
    assert all(columns[n] == 100 * whole[n] for n in ("AP", "AP75")) and columns["none"] is None
    for name in ("few", "odd"):
        sides = ({k: side[k][parts[name][side["image"]]] for k in side} for side in (truth, found))
        assert columns[name] == pytest.approx(100 * average_precision(*sides)["AP50"], abs=1e-9)
        assert 5 < columns[name] != columns["AP50"]


def test_weighted_ap50_is_average_precision_of_the_clips_drawn():
    truth, found = coco(False, "one")            # clips of 5 images
    d, t = (found["image"][:, None] == truth["image"]).nonzero()
    d = d[evaluation.box_iou_rows(found["box_xyxy"][d], truth["box_xyxy"][t]) >= 0.5]
    sample = {"clip": found["image"] // 5, "score": found["score"],
              "hit": np.isin(np.arange(len(found["image"])), d),
              "boxes": np.bincount(truth["image"] // 5, minlength=40)}
    weights = np.stack([np.ones(40, int), np.arange(40) * 7 % 3, np.arange(40) == 4])
    for weight, value in zip(weights, intervals.ap50(sample, weights)):
        drawn = []                               # each clip as often as it was drawn
        for side in (truth, found):
            rows = [np.flatnonzero(side["image"] // 5 == c) for c in np.arange(40).repeat(weight)]
            image = [side["image"][r] % 5 + 5 * n for n, r in enumerate(rows)]
            drawn.append({key: side[key][np.concatenate(rows)] for key in side})
            drawn[-1]["image"] = np.concatenate(image)
        assert value == pytest.approx(100 * average_precision(*drawn)["AP50"], abs=1e-9)


def test_an_interval_holds_the_difference_and_is_paired():
    rng, live = np.random.default_rng(0), np.arange(400) // 40
    good = rng.random(10)[live]                  # lives differ, clips of a live agree
    one, other = ([{"rank": 3 * (rng.random(400) > s * good)} for _ in "123"] for s in (1, 0.6))
    mean, low, high = intervals.interval(one, other, intervals.r1, live)
    first, second = (np.mean([sample["rank"] < 1 for sample in side]) for side in (one, other))
    assert 0 < low < mean < high and mean == pytest.approx(100 * (first - second))
    assert intervals.interval(one, other, intervals.r1, np.arange(400))[2] < high
    assert intervals.interval(one[:1], one[:1], intervals.r1, live) == (0, 0, 0)


def test_tables_line_up_and_seeds_make_one_row(capsys):
    rows = [("SD", 46.64, None), ("MD, all", (47.06, 0.123), "x")]
    plain, marked = (evaluation.table(("", "AP", "R1"), rows, markdown) for markdown in (0, 1))
    assert plain == "                 AP  R1\nSD             46.6   -\nMD, all  47.1 ± 0.1   x"
    assert marked.splitlines() == [
        "|         |         AP | R1 |", "| ------- | ---------: | -: |",
        "| SD      |       46.6 |  - |", "| MD, all | 47.1 ± 0.1 |  x |"]
    results = []
    for seed, r1, negatives in ((0, 25.0, "rand"), (1, 50.0, "rand"), (0, 80.0, "hard")):
        methods = {"true": {}, "md": {"icl": {"R1": r1, "R5": 75.0, "R10": None}}}
        results.append({"config": {"seed": seed, "out": f"runs/{seed}", "negatives": negatives},
                        "stage": "rice", "counts": {"source": "md"}, "results": methods})
    evaluation.show_seeds(results, markdown=True)
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]]
                       for line in capsys.readouterr().out.splitlines()[-4:])
    assert lines == [["negatives=rand MD boxes, ICL", "2", "37.5 ± 17.7", "75.0 ± 0.0", "-"],
                     ["negatives=hard MD boxes, ICL", "1", "80.0", "75.0", "-"]]
    assert head == ["", "seeds", "R1", "R5", "R10"]


@pytest.fixture
def holes(livestreams, run_one, tmp_path):
    """A copy of the data, and a function that evaluates the checkpoint of a stage on it."""
    root = shutil.copytree(livestreams, tmp_path / "holes")
    return root, lambda stage: evaluation.evaluate(run_one / f"{stage}.pt", root, out=tmp_path)


def test_a_frame_that_cannot_be_read_is_a_miss(holes):
    root, evaluate = holes
    whole, predicted = evaluate("md")
    lives, away = predicted.split, np.arange(0, 32, 5)
    names = [f"{frame_id}.jpg" for c in range(8) for frame_id in lives.clip(c).frame_ids]
    for n in away:
        (root / "frames" / names[n]).rename(root / names[n])
    spoilt, predicted = evaluate("md")
    assert whole["counts"]["missing"] == 0 and spoilt["counts"]["missing"] == len(away)
    rows = np.array(predicted.boxes)
    truth = evaluation.ground_truth(rows, lives, predicted.categories)
    rows["sd"][truth["image"], :4] = truth["box_xyxy"]              # as if all boxes were right
    left = np.setdiff1d(np.arange(32), away)
    assert (rows["sd"][left, 4] > 0).all() and (rows["sd"][away, 4] < 0).all()
    found = boxes(left, 0 * left, rows["sd"][left, :4], score=rows["sd"][left, 4])
    wanted = average_precision(truth | {"category": 0 * truth["category"]}, found)["AP50"]
    results, _ = evaluation.table_1(rows, lives, predicted.categories)
    assert results["sd"]["class-agnostic"]["AP50"] == pytest.approx(100 * wanted) and wanted > 0.5
    for n in away:                               # boxes are not kept when the frames change
        (root / names[n]).rename(root / "frames" / names[n])
    assert evaluate("md")[0]["results"] == whole["results"]


def test_an_image_that_cannot_be_read_never_helps(holes):
    root, evaluate = holes
    whole, predicted = evaluate("rice")
    (live, found), (_, other) = predicted.rankings.items()
    first, blind = (predicted.split.clip(c) for c in (found["clips"][0], other["clips"][1]))
    (root / "images" / f"{first.image_ids[0]}.jpg").write_bytes(b"")
    for frame_id in blind.frame_ids:
        (root / "frames" / f"{frame_id}.jpg").unlink()
    spoilt, predicted = evaluate("rice")
    assert spoilt["counts"]["missing images"] == spoilt["counts"]["missing"] == 1
    for source, scores in spoilt["results"].items():
        for score, columns in scores.items():
            assert columns["R10"] == 75 and whole["results"][source][score]["R10"] == 100
            similarity = predicted.rankings[live]["similarity"][source][score]
            positive = predicted.rankings[live]["positive"]
            rank = evaluation.rank_of_first_positive(similarity, positive)
            assert rank[0] > 10 and (0 < rank[1:]).all() and (rank[1:] < 4).all()     # it is ahead


def test_titles_are_not_used_in_a_gallery_that_is_not_fully_titled(holes):
    (path,), found = (holes[0] / "annotations").glob("test_image_title*"), []
    rows = path.read_text().splitlines(True)
    for kept in (rows, rows[1:], []):
        path.write_text("".join(kept))
        result, predicted = holes[1]("rice")
        found.append([live["similarity"]["true"]["icl"] for live in predicted.rankings.values()])
        assert result["counts"]["untitled"] == (len(kept) == 7)
    full, part, none = found
    one = [rows[0].split("\t")[0] in live["ids"] for live in predicted.rankings.values()].index(True)
    assert np.array_equal(part[one], none[one]) and not np.allclose(full[one], none[one])
    assert np.array_equal(part[1 - one], full[1 - one])
