"""eval.py: its metrics against pycocotools and the public rank-k (golden numbers), cases by hand, rows over several seeds."""
import numpy as np
import pytest
import torch
from conftest import golden
from torchvision.ops import box_iou

import eval as evaluation
from data import BadInput
from eval import average_precision, chance, rank_k


def xyxy(xywh):
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).astype(np.float64)


@pytest.mark.parametrize("variant", ["all", "one"])
@pytest.mark.parametrize("categories", [True, False])
def test_average_precision_is_pycocotools(variant, categories):
    g = golden("coco_ap.npz")
    chosen = np.arange(len(g["det_image"])) if variant == "all" else g["one_det_index"]
    truth = {"image": g["gt_image"], "category": g["gt_category"] * categories, "box_xyxy": xyxy(g["gt_box_xywh"].astype(np.float64))}
    found = {"image": g["det_image"][chosen], "category": g["det_category"][chosen] * categories,
             "box_xyxy": xyxy(g["det_box_xywh"][chosen].astype(np.float64)), "score": g["det_score"][chosen]}
    result = average_precision(truth, found)
    expected = dict(zip((str(n) for n in g["stats_names"]), g[f"stats_{variant}_usecats{int(categories)}"]))
    ours = {name: result[name] for name in ("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge", "AR1", "AR10", "AR100", "ARsmall", "ARmedium", "ARlarge")}
    np.testing.assert_allclose(list(ours.values()), list(expected.values()), atol=1e-9, err_msg=str(expected.keys()))
    if categories:
        each = np.array([result["per_category"].get(c, -1) for c in range(34)])
        np.testing.assert_allclose(each, g[f"ap_per_category_{variant}"], atol=1e-9)


def boxes(*rows):
    return np.array(rows, float).reshape(-1, 4)


def test_average_precision_by_hand():
    truth = {"image": [0, 1], "category": [0, 0], "box_xyxy": boxes([0, 0, 10, 10], [0, 0, 10, 10])}
    nothing = {"image": [], "category": [], "box_xyxy": boxes(), "score": []}
    assert average_precision(truth, nothing)["AP"] == 0
    found = {"image": [0, 1], "category": [0, 0], "box_xyxy": boxes([0, 0, 10, 10], [50, 50, 60, 60]), "score": [0.3, 0.9]}
    # The wrong box comes first: precision is 1/2 up to recall 1/2, that is at recalls 0.00 .. 0.50, 51 of 101 points.
    assert average_precision(truth, found)["AP50"] == pytest.approx(0.5 * 51 / 101)
    # IoU 0.5 exactly counts; at equal scores the order of the images decides.
    half = {"image": [0, 1], "category": [0, 0], "box_xyxy": boxes([0, 0, 10, 5], [50, 50, 60, 60]), "score": [0.5, 0.5]}
    assert average_precision(truth, half)["AP50"] == pytest.approx(51 / 101)
    assert average_precision(truth, half)["AP75"] == 0
    # A category that has no true box does not count, not even against us.
    other = {"image": [0, 1, 1], "category": [0, 0, 7], "box_xyxy": boxes(*[[0, 0, 10, 10]] * 3), "score": [1, 1, 2]}
    assert average_precision(truth, other)["AP"] == pytest.approx(1)
    with pytest.raises(ValueError, match="no true box"):
        average_precision(nothing, other)


def test_rank_k_is_the_public_one():
    g = golden("rank_k.npz")
    similarity = g["query_embedding"].astype(np.float64) @ g["gallery_embedding"].astype(np.float64).T
    positive = np.zeros(similarity.shape, bool)
    for q in range(len(positive)):
        positive[q, g["gt_index"][g["gt_ptr"][q]:g["gt_ptr"][q + 1]]] = True
    gallery = g["query_live"][:, None] == g["gallery_live"][None]
    ks = [int(k) for k in g["k"]]
    assert [round(150 * v) for v in rank_k(similarity, positive, gallery, ks).values()] == [round(150 * v) for v in g["recall_per_live"]]
    assert [round(150 * v) for v in rank_k(similarity, positive, None, ks).values()] == [round(150 * v) for v in g["recall_global"]]


def test_rank_k_by_hand():
    positive = np.array([[True, False, False]])
    assert rank_k([[0.9, 0.9, 0.1]], positive)[1] == 0                                  # a tie counts against us
    assert rank_k([[0.9, 0.8, 0.1]], positive) == {1: 1, 5: 1, 10: 1}                     # a gallery smaller than k
    assert rank_k([[0.1, 0.5, 0.9]], [[True, False, True]])[1] == 1                       # any of several is enough
    assert rank_k([[0.1, 0.5, 0.9]], positive, [[True, False, False]])[1] == 1            # outside the gallery: not compared
    assert rank_k([[0.1, 0.5, 0.9]], positive, [[False, True, True]])[10] == 0            # its image is not in the gallery
    assert rank_k([[np.nan] * 3, [0.9, 0.1, 0.2]], np.repeat(positive, 2, 0))[10] == 0.5  # no prediction is a miss, and counts


def test_chance_by_hand():
    assert chance(10, 1, 1) == pytest.approx(0.1) and chance(10, 3, 5) == pytest.approx(1 - 21 / 252)
    assert chance(10, 0, 5) == 0 and chance(4, 1, 5) == 1


def some_frames(rng, clips, per_clip):
    """One box a frame for `clips` clips, some frames without a true box and some with two: what score_detections makes."""
    frame_clip = np.repeat(np.arange(clips), per_clip)
    truth = {"image": [], "category": [], "box_xyxy": []}
    for f in range(len(frame_clip)):
        for _ in range(rng.integers(3)):
            x, y = rng.uniform(0, 50, 2)
            truth["image"].append(f)
            truth["category"].append(0)
            truth["box_xyxy"].append([x, y, x + rng.uniform(10, 40), y + rng.uniform(10, 40)])
    truth = {key: np.array(value) for key, value in truth.items()}
    found = {"image": np.arange(len(frame_clip)), "category": np.zeros(len(frame_clip), int), "score": rng.random(len(frame_clip))}
    found["box_xyxy"] = np.stack([truth["box_xyxy"][truth["image"] == f][0] + rng.normal(0, 4, 4) if (truth["image"] == f).any()
                                  else np.array([0, 0, 10, 10.]) for f in range(len(frame_clip))])
    overlap = box_iou(torch.tensor(found["box_xyxy"]), torch.tensor(truth["box_xyxy"])).numpy()
    hit = np.array([(overlap[f, truth["image"] == f] >= 0.5).any() for f in range(len(frame_clip))])
    sample = {"clip": frame_clip, "score": found["score"], "hit": hit, "true": np.bincount(frame_clip[truth["image"]], minlength=clips)}
    return truth, found, sample


def test_weighted_ap50_is_average_precision_of_the_clips_drawn():
    rng = np.random.default_rng(3)
    truth, found, sample = some_frames(rng, 12, 5)
    weights = np.stack([np.ones(12, int), rng.integers(0, 3, 12), np.eye(12, dtype=int)[4]])
    for row, got in zip(weights, evaluation.ap50(sample, weights)):
        drawn = np.repeat(np.arange(12), row)                       # the same data with each clip as often as it was drawn
        parts = [(n, np.flatnonzero(sample["clip"] == c)) for n, c in enumerate(drawn)]
        place = {(n, f): n * 5 + i for n, frames in parts for i, f in enumerate(frames)}
        again = [(place[n, f], g) for n, frames in parts for f in frames for g in np.flatnonzero(truth["image"] == f)]
        wanted = average_precision(
            {"image": [i for i, _ in again], "category": [0] * len(again), "box_xyxy": truth["box_xyxy"][[g for _, g in again]]},
            {"image": [place[n, f] for n, frames in parts for f in frames], "category": [0] * 5 * len(drawn),
             "box_xyxy": found["box_xyxy"][[f for _, frames in parts for f in frames]],
             "score": found["score"][[f for _, frames in parts for f in frames]]})["AP50"]
        assert got == pytest.approx(100 * wanted, abs=1e-9)


def test_intervals_hold_the_difference_and_are_wider_over_lives():
    rng = np.random.default_rng(0)
    live = [f"live{n // 40}" for n in range(400)]
    good_live = rng.random(10)[np.arange(400) // 40]                                      # lives differ, clips of one agree
    def seeds(share):
        return [{"live": live, "place": np.where(rng.random(400) < share * good_live, 0, 3)} for _ in range(3)]
    one, other = seeds(1.0), seeds(0.6)
    difference = 100 * np.mean([(s["place"] < 1).mean() for s in one]) - 100 * np.mean([(s["place"] < 1).mean() for s in other])
    clips, lives = (evaluation.interval(one, other, evaluation.r1, by_live) for by_live in (False, True))
    assert clips[0] < difference < clips[1] and lives[0] < difference < lives[1]
    assert lives[1] - lives[0] > clips[1] - clips[0] and clips[0] > 0
    same = evaluation.interval(one, one, lambda s, w: evaluation.r1(one[0], w), True)
    assert same == [0, 0]                                                                # paired: the same model differs by nothing


def test_the_vote_adds_what_the_other_frames_say():
    logits = torch.randn(2, 3, 5, 4)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    voted = evaluation.vote(logits, valid)
    share = logits.sigmoid().amax(2)
    share = (share / share.sum(-1, keepdim=True)).log()
    wanted = logits[0, 1] + evaluation.VOTE * (share[0, 0] + share[0, 2]) / 2
    torch.testing.assert_close(voted[0, 1], wanted)
    torch.testing.assert_close(voted[1, 0], logits[1, 0])                                # a frame alone hears nothing
    assert evaluation.vote(torch.full((1, 3, 2, 4), -300.0), valid[:1]).isfinite().all()        # no score that float32 can tell from 0


@pytest.mark.parametrize("images", [3, 63, 64, 150, 333])
def test_nearest_is_the_order_of_all_products(images):
    generator = torch.Generator().manual_seed(images)
    queries, shop = torch.randn(11, 7, generator=generator), torch.randn(images, 7, generator=generator)
    products = queries @ shop.T
    score, place = evaluation.nearest(queries, shop, 5, block=4, wide=64, group=8)
    expected, _ = products.topk(min(5, images))
    assert score.shape == place.shape == (11, min(5, images)) and torch.allclose(score, expected, atol=1e-6)
    assert torch.allclose(products.gather(1, place), score, atol=1e-6) and all(len(set(row.tolist())) == len(row) for row in place)


def a_run(stage, seed, r1, **changed):
    """What `evaluate` returns, made by hand: two lives of two clips."""
    config = {"stage": stage, "seed": seed, "out": f"runs/{seed}", "boxes": "md", "negatives": "hard", "text": "both"} | changed
    place = np.array([0 if n < 4 * r1 / 100 else 7 for n in range(4)])
    results = {"md": {"icl": {"R1": r1, "R5": 75.0, "R10": 100.0}}}
    counts = {"source": "md", "cases": {"near-identical": {"clips": 2, "icl": r1 / 2}}}
    return {"stage": stage, "config": config, "results": results, "counts": counts}, None, {
        "live": ["a", "a", "b", "b"], "methods": {"icl": {"place": place}}}


def test_several_seeds_make_one_row_and_rows_are_named_by_what_differs(capsys):
    runs = [a_run("rice", 0, 25.0, negatives="rand"), a_run("rice", 1, 50.0, negatives="rand"),
            a_run("rice", 0, 75.0), a_run("rice", 1, 100.0)]
    value = evaluation.compare(runs)
    said = capsys.readouterr().out
    assert [row["name"] for row in value["rows"]] == ["negatives=rand, ICL", "negatives=hard, ICL"]
    assert value["rows"][0]["mean"]["R1"] == 37.5 and value["rows"][0]["std"]["R1"] == pytest.approx(np.std([25, 50], ddof=1))
    assert value["rows"][1]["seeds"] == [0, 1] and value["rows"][1]["mean"]["R1 near-identical"] == 43.75
    (difference,) = value["differences"]
    assert difference["mean"]["R1"] == 50 and difference["paper"][0] == pytest.approx(1.8)
    assert "37.5 ±17.7" in said and "*87.5 ±17.7" in said and "the paper's" in said
    evaluation.compare(runs, markdown=True)
    said = capsys.readouterr().out
    assert "| **87.5 ±17.7** |" in said and "| -----" in said
    with pytest.raises(BadInput, match="same clips"):
        evaluation.compare([runs[0], (*runs[1][:2], {"live": ["a"], "methods": runs[1][2]["methods"]})])
    with pytest.raises(BadInput, match="different tables"):
        evaluation.compare([runs[0], a_run("md", 0, 50.0)])
