"""eval.py's metrics against pycocotools and the public rank-k (golden numbers), and small cases worked by hand."""
import numpy as np
import pytest
from conftest import golden

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
