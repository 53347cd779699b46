"""data.py: the layout and its errors, the renderer, samples, batches, order."""
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import data
from conftest import render, threads
from data import BadInput


def digest(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("[!.]*")) if p.is_file()}


def test_rendering_is_deterministic(tmp_path, livestreams):
    same = dict(lives=2, val_lives=1, test_lives=2, products=4, clips=4, gallery=4, frames=4, size=64)
    data.render(tmp_path / "again", processes=2, progress=False, **same)
    render(tmp_path / "other", seed=1, **same)
    assert digest(tmp_path / "again") == digest(livestreams)
    assert digest(tmp_path / "other").keys() != digest(livestreams).keys()
    with pytest.raises(BadInput, match="exists"):
        data.render(tmp_path / "again")


def test_rendered_data_fills_the_layout(tmp_path):
    root = tmp_path / "lives"
    render(root, lives=2, val_lives=1, test_lives=2, products=20, clips=24, gallery=20, frames=8, size=48)
    train, val, test = (data.Lives(root, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (48, 20, 40)
    assert set(test.members) == {(name, value) for name, values in data.SPLITS.items() for value in values}
    assert all(test.members.values()) and sum(map(len, test.members.values())) == 3 * 40
    kinds, areas = set(), []
    for lives in (train, test):
        for c in range(len(lives)):
            clip = lives.clip(c)
            kinds |= set(clip.kinds or [])
            assert len(clip.frame_ids) == len(clip.boxes) == 8 and clip.title and clip.asr
            for frame_id, boxes in zip(clip.frame_ids, clip.boxes):
                assert lives.frame(frame_id)[0].shape == (3, 48, 48)
                assert len(boxes) <= 1 and (boxes[:, :4] >= 0).all() and (boxes[:, :4] <= 48).all()
                areas += [(b[2] - b[0]) * (b[3] - b[1]) for b in boxes]
            assert lives.image(clip.image_ids[0]).shape == (3, 48, 48)
    assert kinds <= {*data.SHOWN, "absent"} and min(areas) > 16
    trained_on = {train.clip(c).image_ids[0] for c in range(len(train))}
    assert all(len(ids) == 20 and not trained_on & set(ids) for ids in test.galleries.values())
    assert all(set(test.positives[v]) <= set(test.galleries[v.rsplit("-", 2)[0]]) for v in test.video_ids)
    assert len(train.categories) <= 8 and len(data.CATEGORIES) == 34


def test_lookalikes_differ_in_one_detail_and_no_two_products_are_the_same():
    rng = np.random.default_rng(0)
    for _ in range(50):
        product = data._product(rng, str(rng.choice(list(data.CATEGORIES))))
        twin = data._lookalike(rng, product)
        assert [k for k in product if product[k] != twin[k]] in (["logo"], ["pattern"])
        assert not np.array_equal(np.asarray(data._sprite(product)), np.asarray(data._sprite(twin)))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough small livestreams to count shares and to train a probe on."""
    root = tmp_path_factory.mktemp("many") / "lives"
    data.render(root, lives=48, val_lives=0, test_lives=16, products=12, clips=12, gallery=24, frames=4, size=48, processes=2, progress=False)
    return root


def test_each_difficulty_has_its_documented_share(many):
    lives = data.Lives(many, "test")
    kinds = [lives.clip(c).kinds for c in range(len(lives))]
    pairs = np.array(["pair" in k for k in kinds])
    assert abs(pairs.mean() - data.PAIR) < 0.06 and lives.cases["two in view"] == {lives.video_ids[c] for c in np.flatnonzero(pairs)}
    assert all(set(k) <= {"pair", "absent"} for k, pair in zip(kinds, pairs) if pair)
    for crowd, shares in data.KINDS.items():
        frames = [k for c, ks in enumerate(kinds) if not pairs[c] and lives.video_ids[c] in lives.members["number", crowd] for k in ks]
        drawn = {k: frames.count(k) / len(frames) for k in shares}
        # At least one or two frames of a clip show the product held alone, so the others' shares are lower than drawn.
        assert abs(drawn["lifted"] / drawn["table"] - shares["lifted"] / shares["table"]) < 0.25 and drawn["held"] > shares["held"]
        assert 0.1 < drawn["held"] and sum(drawn.values()) < 1
    ambiguous = {crowd: np.mean([k in ("two held", "lifted", "table") for c, ks in enumerate(kinds) if not pairs[c]
                                 and lives.video_ids[c] in lives.members["number", crowd] for k in ks]) for crowd in data.KINDS}
    assert ambiguous["few"] < ambiguous["medium"] < ambiguous["abundant"]
    near = np.mean([video_id in lives.cases["near-identical"] for video_id in lives.video_ids])
    assert 0.3 < near < 0.75
    for c in np.flatnonzero(pairs):                                   # what only words can tell, words do tell
        said, title = lives.clip(int(c)).asr.split(), lives.clip(int(c)).title.split()
        assert title[1] in data.HUES and any(word in data.CATEGORIES for word in title) and said
    named = [len(set(lives.clip(int(c)).asr.split()) & set(lives.clip(int(c)).title.split())) >= 2 for c in np.flatnonzero(pairs)]
    assert np.mean(named) > 0.7


def test_decoys_of_the_same_category_on_request(tmp_path):
    render(tmp_path / "same", lives=1, val_lives=0, test_lives=2, products=8, clips=8, gallery=20, frames=4, size=32, decoys="same")
    lives = data.Lives(tmp_path / "same", "test")
    assert not lives.cases["two in view"] and len(lives) == 40
    by_live = {}
    for c in range(len(lives)):
        title = lives.clip(c).title.split()
        by_live.setdefault(data.live_of(lives.video_ids[c]), []).append(next(w for w in title if w in data.CATEGORIES))
    assert all(by.count(category) >= 4 for by in by_live.values() for category in by)


def probe(train_x, train_y, test_x, test_y):
    """Balanced accuracy of a ridge regression on one-hot labels."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    a, b = ((np.c_[(x - mean) / std, np.ones(len(x))]) for x in (train_x, test_x))
    weight = 1 / np.bincount(train_y)[train_y]
    target = np.eye(train_y.max() + 1)[train_y]
    solution = np.linalg.solve(a.T @ (a * weight[:, None]) + 0.5 * np.eye(a.shape[1]), a.T @ (target * weight[:, None]))
    right = (b @ solution).argmax(1) == test_y
    return np.mean([right[test_y == k].mean() for k in np.unique(test_y)])


def test_nothing_but_the_product_tells_its_category(many):
    """A probe that sees the product is far above chance; with the product cut out, or from names, order and place, it is not."""
    def views(split):
        lives, out = data.Lives(many, split), {"product": [], "the rest": [], "name, order and place": [], "category": []}
        for c in range(len(lives)):
            clip = lives.clip(c)
            name = next(word for word in clip.title.split() if word in data.CATEGORIES)
            for t, boxes in enumerate(clip.boxes):
                if len(boxes):
                    x, y = boxes[0, [0, 2]].mean(), boxes[0, [1, 3]].mean()
                    frame = lives.frame(clip.frame_ids[t])[0].float()
                    out["product"].append(TF.resize(TF.crop(frame, round(y) - 10, round(x) - 10, 20, 20), (10, 10)).flatten())
                    # One size for all products and centred on the box: a hole cut along the box would tell its shape.
                    yy, xx = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
                    hole = ((yy - y).abs() < 17) & ((xx - x).abs() < 17)
                    out["the rest"].append(TF.resize(frame.masked_fill(hole, 0), (16, 16)).flatten())
                    digits = [int(d, 16) for d in (clip.video_id[:8] + clip.image_ids[0][:4])]
                    out["name, order and place"].append(torch.tensor([*digits, c % 24, t, len(clip.frame_ids), x, y], dtype=torch.float32))
                    out["category"].append([*data.CATEGORIES].index(name))
        return {key: np.stack(value) if key != "category" else np.array(value) for key, value in out.items()}

    train, test = views("train"), views("test")
    reached = {key: probe(train[key], train["category"], test[key], test["category"]) for key in train if key != "category"}
    chance = 1 / 8
    assert reached["product"] > 2 * chance
    assert abs(reached["the rest"] - chance) < 0.05 and abs(reached["name, order and place"] - chance) < 0.05, reached


def test_all_34_categories_can_be_drawn():
    for name in data.CATEGORIES:
        product = dict(category=name, hue=3, shade=[0.9, 0.9], drift=0, second=0.5, pattern="dotted", pattern_hue=0.2, logo="star", aspect=1.0)
        sprite = np.asarray(data._sprite(product))
        assert (sprite[..., 3] > 0).mean() > 0.1 and len(np.unique(sprite[sprite[..., 3] > 0][:, :3], axis=0)) > 3


def test_ids_are_split_from_the_right():
    assert data.live_of("7b601b02-2c63-11ee-bb6d-b8cef60c2fd0-1667916122888-1667916252390") == "7b601b02-2c63-11ee-bb6d-b8cef60c2fd0"


@pytest.mark.parametrize("column, value, says", [
    (1, "[\"a\"", "frame_id list"), (1, "__import__('os').system('true')", "frame_id list"), (1, "[\"../../etc/passwd\"]", "not an id"),
    (1, "['a', 'b', 'c', 'd',]", "commas for 5"), (1, "[" * 50000, "frame_id list"), (2, "[" * 50000, "box list"),
    (2, "[[1, 2, 3]]", "4 frames but 1"), (2, "[[0, 0, NaN, 5], [], [], []]", "frame 0: expected x1"), (2, "[[1, 2, 3, 4]]", "4 frames but 1"),
    (2, "[1, 2, 3, 4]", "frame 0: expected x1"), (2, "[[[1, 2, 3, 4], null], [], [], []]", "frame 0: expected x1"),
    (2, "[{\"x\": 1}, [], [], []]", "frame 0: expected x1"), (2, "[[false, false, true, true], [], [], []]", "frame 0: expected x1"),
    (2, f"[[0, 0, {'9' * 400}, 5], [], [], []]", "frame 0: expected x1"),
    (0, "../x-1-2", "not an id"), (3, "../x", "not an id"), (4, "\udce9", "UTF-8"), (5, "shoe", "category id"), (None, "a\tb", "11 columns")])
def test_bad_rows_say_file_row_and_field(tmp_path, livestreams, column, value, says):
    root = tmp_path / "bad"
    (root / "annotations").mkdir(parents=True)
    path = root / "annotations" / "training_videoinfo_part_00.txt"
    rows = (livestreams / "annotations" / "training_videoinfo_part_00.txt").read_text().splitlines()
    fields = rows[2].split("\t")
    if column is not None:
        fields[column] = value
    rows[2] = value if column is None else "\t".join(fields)
    path.write_text("\n".join(rows) + "\n", errors="surrogateescape")
    with pytest.raises(BadInput, match=says) as error:
        data.Lives(root, "train").clip(2)
    assert f"{path}:3" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, text, says", [
    ("test_frameid2gtbox_1.json", "[1]", "expected an object"), ("test_frameid2gtbox_1.json", "{", "not JSON"),
    ("test_frameid2gtbox_1.json", "{\"live-1-2-abc\": []}", "whole number"), ("test_frameid2gtbox_1.json", "{\"../a-1-2-3\": []}", "not an id"),
    ("test_videoid_to_gtimage_1.json", "{\"a-1-2\": 8471}", "list of image ids"), ("test_liveid_to_gallery_1.json", "{\"a\": null}", "list of image ids"),
    ("test_liveid_to_gallery_1.json", "{\"a\": [\"../b\"]}", "not an id"), ("test_videoid_asr_1.txt", "a/b\thello", "not an id"),
    ("test_videoid_asr_1.txt", "caf\udce9-1-2\thello", "UTF-8"), ("test_videoid_asr_2.txt", "a-1-2\tb", "which one"), ("test_videoid_asr_1.txt", "", "no clips")])
def test_bad_test_files_are_named(tmp_path, name, text, says):
    notes = tmp_path / "annotations"
    notes.mkdir()
    (notes / "test_videoid_asr_1.txt").write_text("" if "no clips" == says else "live-1-2\thello\n")
    (notes / name).write_text(text, errors="surrogateescape")
    with pytest.raises(BadInput, match=says):
        data.Lives(tmp_path, "test")


def test_every_test_clip_counts_and_texts_keep_their_lines(tmp_path):
    notes = tmp_path / "annotations"
    notes.mkdir()
    (notes / "test_videoid_asr_1.txt").write_text("a-1-2\thello\u2028more\r\n\nb-1-2\n", encoding="utf-8")
    (notes / "test_videoid_to_gtimage_1.json").write_text(json.dumps({"c-1-2": ["x"]}))
    (notes / "test_frameid2gtbox_1.json").write_text(json.dumps({"d-1-2-0010": [], "d-1-2-0009": [[1, 2, 3, 4, 20000001]]}))
    lives = data.Lives(tmp_path, "test")
    assert lives.video_ids == ["a-1-2", "b-1-2", "c-1-2", "d-1-2"] and lives.lengths.tolist() == [0, 0, 0, 2]
    assert lives.clip(0).asr == "hello\u2028more" and lives.clip(2).image_ids == ["x"]
    assert lives.clip(3).frame_ids == ["d-1-2-0009", "d-1-2-0010"] and lives.clip(3).boxes[0][0, 4] == 20000001


def test_a_python_list_and_boxes_of_every_form_are_read(tmp_path, livestreams):
    rows = (livestreams / "annotations" / "training_videoinfo_part_00.txt").read_text().splitlines()
    fields = rows[0].split("\t")
    fields[1] = repr(json.loads(fields[1]))                                    # Python's quotes
    fields[2] = "[[[1, 2, 30, 40], [5, 6, 7, 8, 3]], [0, 0, 0, 0], [], [9, 9, 20, 30]]"
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "training_videoinfo_x.txt").write_text("\t".join(fields) + "\n")
    boxes = data.Lives(tmp_path, "train").clip(0).boxes
    assert [len(b) for b in boxes] == [2, 0, 0, 1]
    assert boxes[0][:, 4].tolist() == [int(fields[5]), 3]


def test_missing_and_broken_pictures_are_named(tmp_path, livestreams):
    root = tmp_path / "broken"
    shutil.copytree(livestreams, root)
    lives = data.Lives(root, "train")
    first, second = lives.clip(0).frame_ids[:2]
    (root / "frames" / f"{first}.jpg").unlink()
    (root / "frames" / f"{second}.jpg").write_bytes(b"no picture")
    for frame_id, says in ((first, "missing"), (second, "not a readable")):
        with pytest.raises(BadInput, match=says) as error:
            lives.frame(frame_id)
        assert frame_id in str(error.value)


def test_even_frames():
    assert data.even_frames(10, 10) == list(range(10)) and data.even_frames(3, 10) == [0, 1, 2]
    assert data.even_frames(100, 4) == [12, 37, 62, 87]
    assert data.even_frames(1, 8) == [0]


def test_detection_samples_are_a_function_of_seed_epoch_and_number(livestreams):
    lives = data.Lives(livestreams, "train")
    make = lambda seed: data.DetectionSet(lives, lives.categories, 1, (32, 48, 16), 100, True, seed)
    samples = make(0)
    assert len(samples) == 8 * 4
    a, b = samples[(3, 5)], make(0)[(3, 5)]
    assert torch.equal(a["frames"][0], b["frames"][0]) and torch.equal(a["boxes_cxcywh"][0], b["boxes_cxcywh"][0])
    seen = [samples[(e, 5)] for e in range(16)]
    assert {tuple(s["frames"][0].shape) for s in seen} == {(3, 32, 32), (3, 48, 48)}
    assert len({s["frames"][0].numpy().tobytes() for s in seen}) == 4                # two sizes, each flipped or not
    assert [s["frames"][0].shape for s in seen] != [make(1)[(e, 5)]["frames"][0].shape for e in range(16)]
    for i in range(len(samples)):                                                 # the box moves with the flip
        large = [s for s in (samples[(e, i)] for e in range(40)) if s["frames"][0].shape[1] == 48]
        one, other = large[0], next(s for s in large if not torch.equal(s["frames"][0], large[0]["frames"][0]))
        torch.testing.assert_close(one["boxes_cxcywh"][0][:, 0], 1 - other["boxes_cxcywh"][0][:, 0])


def test_batches_pad_frames_clips_and_boxes(livestreams):
    lives = data.Lives(livestreams, "test")
    samples = data.DetectionSet(lives, data.Lives(livestreams, "train").categories, 3, (48, 48, 16), 100, False)
    assert len(samples) == 16                                                   # 4 frames, 3 at a time: two parts that interleave
    batch = data.collate_detection([samples[(0, i)] for i in range(2)] + [{**samples[(0, 2)], "frames": samples[(0, 2)]["frames"][:1]}])
    assert batch["frames"].shape == (3, 2, 3, 48, 48) and batch["position"].tolist()[:2] == [[0, 2], [1, 3]]
    assert batch["valid"].tolist() == [[True, True], [True, True], [True, False]]
    assert not batch["padding"][0].any() and batch["padding"][2, 1].all()
    pixels = data.to_float(torch.full_like(batch["frames"], 77), data.IMAGENET, batch["padding"])
    assert not pixels[2, 1].any() and pixels[0].all()                           # whatever lies where nothing was written
    lives = data.Lives(livestreams, "train")
    samples = data.DetectionSet(lives, lives.categories, 4, (48, 48, 16), 100, True)
    for i in range(8):
        item = next(s for s in (samples[(e, i)] for e in range(40)) if torch.equal(s["frames"][0], TF.resize(
            lives.frame(lives.clip(i).frame_ids[0])[0], (48, 48), antialias=True)))             # one that was not flipped
        batch = data.collate_detection([item])
        for t, truth in enumerate(lives.clip(i).boxes):
            assert int((batch["labels"][0, t] >= 0).sum()) == len(truth)
            if len(truth):
                cx, cy, w, h = (batch["boxes_cxcywh"][0, t, 0] * 64).tolist()
                np.testing.assert_allclose([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], truth[0, :4], atol=1e-3)
                assert list(lives.categories)[batch["labels"][0, t, 0]] == truth[0, 4]


def test_pairs_see_the_clip_through_its_boxes(livestreams):
    lives = data.Lives(livestreams, "train")
    tokenizer = data.Tokenizer(data.train_tokenizer([lives.clip(c).title for c in range(len(lives))] * 20, vocab=120))
    boxes = data.true_boxes(lives)
    for view in ("box", "mask", "frame"):
        samples = data.PairSet(lives, tokenizer, 2, 32, 2, view, boxes, True)
        batch = torch.utils.data.default_collate([samples[(0, i)] for i in range(3)])
        assert batch["frames"].shape == (3, 2, 3, 32, 32) and batch["keep"].shape == (3, 2, 4) and batch["image"].shape == (3, 3, 32, 32)
        assert batch["asr"].shape == batch["title"].shape == (3, 24) and (batch["title"][:, 0] == 1).all()
        assert bool(batch["keep"].all()) == (view != "mask") and batch["keep"].any(-1).all()
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:20, 20:30] = 255
    assert data.square_view(image, (20, 10, 30, 20), 16, margin=1.0).float().mean() == 255
    assert data.square_view(image, (20, 10, 30, 20), 16, margin=2.0).float().mean() == pytest.approx(255 / 4, rel=0.1)
    with pytest.raises(BadInput, match="--view frame"):
        data.PairSet(lives, tokenizer, 2, 32, 2, "box", None, True)


def test_a_mirrored_frame_keeps_the_patches_of_its_box(livestreams, monkeypatch):
    lives = data.Lives(livestreams, "train")
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, :20, :30] = 200                                                       # the box: a quarter of the picture, top left
    monkeypatch.setattr(lives, "frame", lambda name: (image, (60, 40)))
    boxes = data.true_boxes(lives)
    boxes["box"][:, :4] = 0, 0, 29, 19
    samples = data.PairSet(lives, data.Tokenizer(torch.zeros(0, dtype=torch.uint8)), 2, 32, 2, "mask", boxes, True)
    seen = set()
    for epoch, i in itertools.product(range(4), range(len(samples))):
        item = samples[(epoch, i)]
        bright = item["frames"].float().mean(1).unfold(1, 16, 16).unfold(2, 16, 16).mean((3, 4)).flatten(1) > 50        # [T,P]
        assert torch.equal(bright, item["keep"])
        seen |= {tuple(kept) for kept in item["keep"].tolist()}
    assert seen == {(True, False, False, False), (False, True, False, False)}


def test_a_box_without_category_trains_nobody(tmp_path, livestreams):
    rows = (livestreams / "annotations" / "training_videoinfo_part_00.txt").read_text().splitlines()
    fields = rows[0].split("\t")
    fields[2], fields[5] = "[[1, 2, 30, 40], [], [], []]", ""
    shutil.copytree(livestreams / "frames", tmp_path / "frames")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "training_videoinfo_x.txt").write_text("\n".join(["\t".join(fields), *rows[1:]]) + "\n")
    lives = data.Lives(tmp_path, "train")
    item = data.DetectionSet(lives, lives.categories, 1, (48, 48, 16), 100, True)[(0, 0)]
    assert "category -1" in item["bad"] and not item["frames"]


def test_a_short_clip_is_filled_up(livestreams):
    lives = data.Lives(livestreams, "test")
    boxes = {"start": np.array([0] * len(lives) + [0]), "position": np.zeros(0, int), "box": np.zeros((0, 6))}
    item = data.PairSet(lives, data.Tokenizer(data.train_tokenizer([])), 6, 32, 2, "box", boxes, False)[(0, 0)]
    assert item["frames"].shape == (6, 3, 32, 32) and item["valid"].tolist() == [True] * 4 + [False] * 2 and "image" not in item
    lives.frames[lives.video_ids[0]] = []
    assert not data.PairSet(lives, data.Tokenizer(data.train_tokenizer([])), 6, 32, 2, "box", boxes, False)[(0, 0)]["valid"].any()


def test_in_evaluation_frames_with_unsure_boxes_are_left_out(livestreams):
    lives, nothing = data.Lives(livestreams, "test"), data.Tokenizer(data.train_tokenizer([]))
    score = np.array([0.5, 0.9, 0.9 * data.SURE + 0.01, 0.9 * data.SURE - 0.01], np.float32)
    boxes = data.true_boxes(lives) | {"start": np.full(len(lives) + 1, 4), "position": np.arange(4)}
    boxes["start"][0], boxes["box"] = 0, np.concatenate([np.tile([[5, 5, 40, 40]], (4, 1)), score[:, None], np.zeros((4, 1))], 1)
    assert data.boxed_rows(boxes, 0).tolist() == [1, 2] and data.boxed_rows(boxes, 0, every=True).tolist() == [0, 1, 2, 3]
    assert data.boxed_rows(boxes, 1).tolist() == []
    item = data.PairSet(lives, nothing, 6, 32, 2, "box", boxes, False)[(0, 0)]
    boxes["box"] = np.where(np.arange(6) == 4, 1.0, boxes["box"])                                # all alike: all are seen
    every = data.PairSet(lives, nothing, 6, 32, 2, "box", boxes, False)[(0, 0)]
    assert item["valid"].sum() == 2 and every["valid"].sum() == 4 and torch.equal(item["frames"][:2], every["frames"][1:3])
    boxes["box"] = np.where(np.arange(6) == 4, -1.0, boxes["box"])                               # none could be read by the detector
    assert not len(data.boxed_rows(boxes, 0)) and data.PairSet(lives, nothing, 6, 32, 2, "box", boxes, False)[(0, 0)]["valid"].sum() == 4


def test_tokenizer_of_nothing_and_of_text():
    empty = data.Tokenizer(data.train_tokenizer([]))
    assert empty("anything").tolist() == [1] + [0] * 23 and len(data.train_tokenizer(["", ""])) == 0
    proto = data.train_tokenizer(["red hat", "blue hat with star"] * 50, vocab=40)
    tokens = data.Tokenizer(proto)
    assert torch.equal(proto, data.train_tokenizer(["red hat", "blue hat with star"] * 50, vocab=40))
    assert tokens("red hat").tolist() != tokens("blue hat").tolist() and int(tokens("red hat").max()) < tokens.vocab
    assert tokens("").tolist() == [1] + [0] * 23


def test_order_depends_on_seed_and_step_alone():
    order = data.live_by_live([i // 6 for i in range(18)], 3)
    whole = list(data.step_batches(order, 6, 7))
    assert whole[4:] == list(data.step_batches(order, 6, 7, start=4))                              # a resumed run goes on
    halves = zip(*(data.step_batches(order, 6, 7, rank=r, world=2) for r in (0, 1)))
    assert [a + b for a, b in halves] == whole                                                      # two ranks see one batch
    seen = [i for batch in whole[:3] for _, i in batch]
    assert sorted(seen) == list(range(18)) and [e for batch in whole for e, _ in batch] == [0] * 18 + [1] * 18 + [2] * 6
    assert all(len({i // 6 for _, i in batch[k:k + 3]}) == 1 for batch in whole for k in (0, 3))      # clips of one live together
    assert whole != list(data.step_batches(order, 6, 7, seed=1))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_hold_every_sample_once(world):
    shards = [[i for batch in data.shard_batches(range(7), 2, rank, world) for _, i in batch] for rank in range(world)]
    assert sorted(sum(shards, [])) == list(range(7))


def test_boxes_follow_a_picture_stored_at_another_size(tmp_path, livestreams):
    """img2dataset stores a frame smaller and writes its original size beside it: boxes are given in the original's pixels."""
    shutil.copytree(livestreams, tmp_path / "small")
    before, lives = data.Lives(livestreams, "train"), data.Lives(tmp_path / "small", "train")
    clip = lives.clip(0)
    for frame_id in clip.frame_ids:
        path = tmp_path / "small" / "frames" / f"{frame_id}.jpg"
        Image.open(path).resize((32, 32)).save(path)
        path.with_suffix(".json").write_text(json.dumps({"original_width": 64, "original_height": 64, "width": 32}))
    assert lives.frame(clip.frame_ids[0])[0].shape == (3, 32, 32) and lives.frame(clip.frame_ids[0])[1] == (64, 64)
    sets = [data.DetectionSet(part, part.categories, 4, (48, 48, 16), 100, True, augment=False)[(0, 0)] for part in (before, lives)]
    assert all(torch.equal(a, b) for a, b in zip(*(item["boxes_cxcywh"] for item in sets))) and sets[1]["size"][0] == (64, 64)
    pairs = [data.PairSet(part, data.Tokenizer(data.train_tokenizer([])), 2, 32, 2, "box", data.true_boxes(part), True, augment=False)[(0, 0)] for part in (before, lives)]
    alike = np.corrcoef(pairs[0]["frames"].flatten(), pairs[1]["frames"].flatten())[0, 1]               # the same part of the scene
    assert alike > 0.5
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(BadInput, match="original_width"):
        lives.frame(clip.frame_ids[-1])


def test_evaluation_leaves_nothing_out(tmp_path, livestreams):
    shutil.copytree(livestreams, tmp_path / "holes")
    lives = data.Lives(tmp_path / "holes", "test")
    first, second = lives.clip(0), lives.clip(1)
    (tmp_path / "holes" / "frames" / f"{first.frame_ids[1]}.jpg").unlink()
    for frame_id in second.frame_ids:
        (tmp_path / "holes" / "frames" / f"{frame_id}.jpg").write_bytes(b"")
    item = data.DetectionSet(lives, [0], 4, (48, 48, 16), 100, False)[(0, 0)]
    batch = data.collate_detection([item])
    assert batch["valid"].tolist() == [[True, False, True, True]] and batch["position"].tolist() == [[0, 1, 2, 3]] and batch["bad"][0]
    sets = data.PairSet(lives, data.Tokenizer(data.train_tokenizer([])), 4, 32, 2, "frame", None, False)
    assert sets[(0, 0)]["valid"].sum() == 3 and sets[(0, 1)]["valid"].sum() == 0 and sets[(0, 1)]["bad"]


def test_the_index_is_kept_and_made_again(tmp_path, livestreams):
    shutil.copytree(livestreams, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    path = next((tmp_path / "copy" / "annotations").glob("training*"))
    kept = path.with_name(f".{path.name}.index.npz")
    one = data.Lives(tmp_path / "copy", "train")
    made, names = kept.stat().st_mtime_ns, [one.clip(i).video_id for i in range(len(one))]
    two = data.Lives(tmp_path / "copy", "train")
    assert kept.stat().st_mtime_ns == made and two.clip(3).video_id == names[3] and two.categories == one.categories
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines[1:]))
    assert len(data.Lives(tmp_path / "copy", "train")) == len(one) - 1 and data.Lives(tmp_path / "copy", "train").clip(0).video_id == names[1]
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(data.Lives(tmp_path / "copy", "train")) == len(one) - 1
    (tmp_path / "copy" / "annotations" / "training_videoinfo_part_01.txt").write_text(lines[0])             # a second part
    both = data.Lives(tmp_path / "copy", "train")
    assert len(both) == len(one) and both.clip(len(one) - 1).video_id == names[0]
    assert both.product[-1] == one.product[0] and set(both.live) == set(one.live)


# ------------------------------------------------------------------ checking and converting


def test_check_finds_everything_and_says_where(tmp_path, livestreams, capsys, monkeypatch):
    root = tmp_path / "lives"
    shutil.copytree(livestreams, root)
    assert data.check(root, processes=1) is False and "fit for use" in capsys.readouterr().out
    path = root / "annotations" / "training_videoinfo_part_00.txt"
    rows = [row.split("\t") for row in path.read_text().splitlines()]
    rows[1] = rows[1][:9]                                                              # a column lost
    rows[2][2] = "[[NaN, 1, 2, 3], [], [], []]"
    rows[3][1] = "__import__('os').system('touch " + str(tmp_path / "owned") + "')"
    rows[4][1] = json.dumps(["../../../etc/passwd"] * 4)
    rows[5][2] = json.dumps([[-5, -5, 30, 30], [10, 10, 10, 40], [0, 0, 0, 0], [70, 70, 90, 90]])
    rows[6][0] = rows[0][0]
    path.write_bytes("\n".join("\t".join(row) for row in rows).encode() + b"\n" + "\t".join(["caf\xe9"] * 11).encode("latin-1") + b"\n")
    test = data.Lives(root, "test")
    (root / "frames" / f"{test.clip(0).frame_ids[0]}.jpg").write_bytes(b"broken")
    (root / "images" / f"{test.clip(1).image_ids[0]}.jpg").unlink()
    galleries = root / "annotations" / "test_liveid_to_gallery_2.json"
    wanted = test.clip(2).image_ids[0]
    galleries.write_text(galleries.read_text().replace(f'"{wanted}", ', "").replace(f', "{wanted}"', ""))
    (root / "annotations" / "test_scale_small.txt").write_text("nobody-1-2\n")
    (truth,) = (root / "annotations").glob("test_frameid2gtbox_*")
    truth.write_text(json.dumps(json.loads(truth.read_text()) | {test.clip(3).frame_ids[0]: [[9, 9, 9, 40], [9, 9, 30, 30]]}))
    monkeypatch.setattr(data.multiprocessing, "get_context", threads)
    assert data.check(root, processes=1) is True
    said = capsys.readouterr().out
    for text in (f"{path}:2: expected 11 columns", f"{path}:3: box list", f"{path}:4: frame_id list", f"{path}:5: frame_id list: '../../../etc",
                 f"{path}:7: {rows[0][0]}", f"{path}:9: ", "not a readable JPEG", f"{wanted}"[:0] + "clips whose true images are not in their gallery: 1",
                 "nobody-1-2 is no clip", "images: 1 of", "1 stick out", "3 without area or outside", "more than 1 %",
                 f"rows: 5 of {len(rows) + 1 + len(test) + len(data.Lives(root, 'val'))} unusable", "ASR on", "words"):
        assert text in said, (text, said)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(SystemExit, match="1"):
        data.main(["check", str(root), "--processes", "1"])
    with pytest.raises(SystemExit, match="2"):
        data.main(["check", str(tmp_path), "--processes", "1"])


def test_img2dataset_output_becomes_the_layout(tmp_path, livestreams, capsys):
    download, root = tmp_path / "download" / "00000", tmp_path / "lives"
    download.mkdir(parents=True)
    live = "7b601b02-2c63-11ee-bb6d-b8cef60c2fd0-1667916122888-1667916252390-0081"
    pictures = sorted((livestreams / "images").iterdir())
    for n, (url, status) in enumerate([(f"https://host/frames/{live}.jpg?sign=1", "success"), ("https://host/8471.jpg", "success"),
                                       ("https://host/9.jpg", "failed_to_download"), ("https://host/..", "success")]):
        side = {"url": url, "status": status, "width": 64, "height": 64, "original_width": 128, "original_height": 128}
        (download / f"{n:09d}.json").write_text(json.dumps(side))
        if status == "success":
            shutil.copy(pictures[n], download / f"{n:09d}.jpg")
    (download.parent / "00000_stats.json").write_text("{}")
    (download / "000000009.json").write_text("not json")
    assert data.link(download.parent, root) == {"linked": 2, "there before": 0, "failed to download": 1, "without an id": 2}
    assert data.link(download.parent, root)["there before"] == 2
    lives = data.Lives.pictures(root)
    image, size = lives.frame(live)
    assert image.shape == (3, 64, 64) and size == (128, 128) and lives.image("8471").shape == (3, 64, 64)
    assert data.live_of(live.rpartition("-")[0]) == "7b601b02-2c63-11ee-bb6d-b8cef60c2fd0"
    assert not list((root / "images").rglob("*.json"))


def test_movingfashion_becomes_the_layout(tmp_path, livestreams, monkeypatch):
    source = tmp_path / "mf"
    (source / "imgs").mkdir(parents=True)
    (source / "videos").mkdir()
    frame = sorted((livestreams / "frames").iterdir())[0]
    shutil.copy(frame, source / "imgs" / "a.jpg")
    entry = {"img_path": "imgs/a.jpg", "video_paths": ["videos/v.mp4", "videos/broken.mp4"], "source": "net-a-porter"}
    for split in ("train", "test"):
        (source / f"{split}.json").write_text(json.dumps({"0": entry, "7": entry | {"video_paths": ["videos/v.mp4"]}}))
    (source / "videos" / "broken.mp4").write_bytes(b"no video")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(BadInput, match="ffmpeg"):
            data.movingfashion(source, tmp_path / "lives")
    if not shutil.which("ffmpeg"):
        pytest.skip("the program ffmpeg is not installed")
    subprocess.run(["ffmpeg", "-v", "error", "-loop", "1", "-i", str(frame), "-t", "4", "-r", "5", "-pix_fmt", "yuv420p",
                    str(source / "videos" / "v.mp4")], check=True)
    data.movingfashion(source, tmp_path / "lives", processes=2)
    train, test = (data.Lives(tmp_path / "lives", split) for split in ("train", "test"))
    assert len(train) == 2 and len(test) == 2 and set(train.lengths) == set(test.lengths) == {4}
    assert test.galleries == {"movingfashion": ["test-0", "test-7"]} and test.clip(0).image_ids == ["test-0"] and test.clip(0).boxes is None
    assert train.frame(train.clip(0).frame_ids[3])[0].shape == (3, 64, 64) and test.image("test-7").shape == (3, 64, 64)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "lives" / "frames").iterdir()}
    data.movingfashion(source, tmp_path / "lives", processes=1)                                         # again: nothing is cut twice
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "lives" / "frames").iterdir()}
    (source / "test.json").write_text(json.dumps({"0": entry | {"img_path": "../../secret.jpg"}}))
    with pytest.raises(BadInput, match="leads out"):
        data.movingfashion(source, tmp_path / "lives")
    (source / "test.json").write_text("[1]")
    with pytest.raises(BadInput, match="test.json"):
        data.movingfashion(source, tmp_path / "lives")


def test_a_loader_does_not_grow(livestreams):
    """2,000 samples, a new file each time: what a worker holds stays the same."""
    lives = data.Lives(livestreams, "train")
    samples = data.DetectionSet(lives, lives.categories, 1, (48, 64, 16), 100, True)
    def used():
        return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2 ** 20
    sizes = []
    for epoch in range(2200 // len(samples)):
        for i in range(len(samples)):
            samples[(epoch, i)]
        sizes.append(used())
    assert sizes[-1] - sizes[len(sizes) // 10] < 8                                                      # MiB


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"x\t" * 10 + b"[" * 2_000_000])
def test_a_hopeless_training_file_is_one_line(tmp_path, content, capsys):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "training_videoinfo_0.txt").write_bytes(content)
    with pytest.raises(BadInput, match="annotations"):
        lives = data.Lives(tmp_path, "train")
        lives.clip(0)


class Standing(torch.utils.data.Dataset):
    def __getitem__(self, key):
        return os.nice(0), *(signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM))


def test_a_loader_leaves_signals_and_cores_to_the_process_it_loads_for():
    here, there = (next(iter(data.load(Standing(), [[0]], workers, torch.device("cpu")))) for workers in (0, 1))
    assert [int(x) for x in here] == [os.nice(0), 0, 0] and [int(x) for x in there] == [19, 1, 1]
