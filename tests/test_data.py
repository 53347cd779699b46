"""data.py: renderer, layout, pictures, tokenizer, items, order of batches, check and converters."""
import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

import data
from conftest import render, threads

NO_WORDS = data.Tokenizer(torch.zeros(0, dtype=torch.uint8))


def annotate(root, **files):
    """Write root/annotations/NAME: rows of columns or texts as .txt, others as .json -> root"""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        if isinstance(value, list):
            value = "".join("\t".join(row) + "\n" for row in value)
        ending, text = (".txt", value) if isinstance(value, str) else (".json", json.dumps(value))
        (root / "annotations" / f"{name}{ending}").write_bytes(text.encode())
    return root


def columns_of(root):
    """The training rows, each a list of its columns."""
    (path,) = (root / "annotations").glob("training*")
    return [row.split("\t") for row in path.read_text().splitlines()]


@pytest.fixture
def copy(livestreams, tmp_path):
    """A copy of the fixture livestreams; all test boxes have a category that training knows."""
    root = shutil.copytree(livestreams, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    category = int(columns_of(root)[0][5])
    for path in (root / "annotations").glob("*_frameid2gtbox_*"):
        truth = json.loads(path.read_text()).items()
        annotate(root, **{path.stem: {f: [[*box[:4], category] for box in b] for f, b in truth}})
    return root


def test_rendering_is_a_function_of_its_options(tmp_path, livestreams):
    same = {"lives": 2, "val_lives": 1, "test_lives": 2, "products": 4, "clips": 4, "gallery": 4}
    data.render(tmp_path / "again", processes=2, **same, frames=4, size=64)
    render(tmp_path / "other", seed=1, **same, frames=4, size=64)
    first, again, other = (
        {file.relative_to(root): file.read_bytes() for file in root.rglob("[!.]*.*")}
        for root in (livestreams, tmp_path / "again", tmp_path / "other"))
    assert again == first and len(first) > 100
    assert not any(name.suffix == ".jpg" for name in first.keys() & other.keys())
    with pytest.raises(data.BadInput, match="exists"):
        data.render(tmp_path / "again")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough small livestreams to count shares and to train a probe on."""
    root = tmp_path_factory.mktemp("many") / "lives"
    render(root, lives=32, val_lives=0, test_lives=16, products=12, clips=12, gallery=16, frames=4,
           size=48)
    return root


def words_of(title):
    """What a title tells of a product: hue, pattern, category, logo; "" for none."""
    return [next((word for word in title.split() if word in words), "")
            for words in (data.HUES, data.PATTERNS, data.CATEGORIES, data.LOGOS)]


def test_rendered_data_fill_the_layout(many):
    train, test = data.LPRSplit(many, "train"), data.LPRSplit(many, "test")
    assert (len(train), len(test), len(train.categories)) == (384, 256, len(data.CATEGORIES))
    assert set(test.subsets) == {f"{v} {name}" for name, vs in data.SUBSETS.items() for v in vs}
    assert sum(map(len, test.subsets.values())) == 3 * len(test) and all(test.subsets.values())
    for lives in (train, test):
        for clip in map(lives.clip, range(0, len(lives), 8)):
            assert len(clip.frame_ids) == len(clip.boxes) == 4 and clip.title and clip.asr
            boxes = np.concatenate(clip.boxes)[:, :4]
            assert len(boxes) <= 4 and boxes.min() >= 0 and boxes.max() <= 48
            assert (boxes[:, 2:] - boxes[:, :2]).prod(1).min() > 16
            images = lives.frame(clip.frame_ids[3])[0], lives.image(clip.image_ids[0])
            assert images[0].shape == images[1].shape == (3, 48, 48)
    assert not {train.clip(c).image_ids[0] for c in range(len(train))} & test.titles.keys()
    for video_id, (image_id,) in test.positives.items():
        gallery, mine = test.galleries[data.live_of(video_id)], words_of(test.titles[image_id])
        others = [words_of(test.titles[other]) for other in gallery if other != image_id]
        # A look-alike has the same hue and category, and either the same pattern or the same logo.
        near = any(o[::2] == mine[::2] and (o[1] == mine[1]) != (o[3] == mine[3]) for o in others)
        assert near or video_id not in test.cases["near-identical"], (mine, others)


def test_each_difficulty_has_its_documented_share(many):
    lives = data.LPRSplit(many, "test")
    clips = [lives.clip(c) for c in range(len(lives))]
    part = {name: np.array([clip.video_id in ids for clip in clips])
            for name, ids in (lives.subsets | lives.cases).items()}
    pair = part["two-in-view"]
    assert abs(pair.mean() - data.PAIR) < 0.06 and 0.3 < part["near-identical"].mean() < 0.75
    absent = np.array([[len(boxes) for boxes in clip.boxes].count(0) for clip in clips])
    for n, duration in enumerate(("long", "medium", "short")):
        share = sum(p for frames_of_8, p in data.ABSENT.items() if round(frames_of_8 / 2) == n)
        assert abs((absent == n).mean() - share) < 0.08
        assert (part[f"{duration} duration"] == (absent == n)).all()
    side = np.array([np.diff(np.concatenate(clip.boxes)[:, :4].reshape(-1, 2, 2), axis=1).max()
                     for clip in clips])
    assert all(np.diff([np.median(side[part[f"{size} scale"]]) for size in data.PRODUCT_SIZES]) > 1)
    named = np.array([set(words_of(c.title)[::2]) <= set(c.asr.split()) for c in clips])
    assert named[pair].mean() > 0.7 > 0.6 > named[~pair].mean()     # words tell what is meant


def test_distractors_of_the_same_category_on_request(tmp_path):
    render(tmp_path / "same", lives=1, val_lives=0, test_lives=2, products=8, clips=8, gallery=20,
           frames=4, size=32, distractors="same")
    lives = data.LPRSplit(tmp_path / "same", "test")
    assert len(lives) == 40 and "two-in-view" not in lives.cases
    for ids in lives.galleries.values():
        categories = [words_of(lives.titles[image_id])[2] for image_id in ids]
        assert min(categories.count(category) for category in categories) >= 4


def accuracy(train_x, train_y, test_x, test_y):
    """Balanced accuracy of a ridge regression on one-hot labels."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    a, b = (np.c_[(x - mean) / std, np.ones(len(x))] for x in (train_x, test_x))
    weight = (1 / np.bincount(train_y)[train_y])[:, None]
    square = a.T @ (a * weight) + 0.5 * np.eye(a.shape[1])
    right = a.T @ (np.eye(train_y.max() + 1)[train_y] * weight)
    hit = (b @ np.linalg.solve(square, right)).argmax(1) == test_y
    return np.mean([hit[test_y == k].mean() for k in np.unique(test_y)])


def test_nothing_but_the_product_tells_its_category(many):
    """A probe of the product is far above chance; of the rest, or of names and place, it is not."""
    far = torch.arange(48) - torch.arange(48)[:, None]              # [x, pixel]

    def views(split):
        lives, rows = data.LPRSplit(many, split), []
        for c in range(len(lives)):
            clip = lives.clip(c)
            name = clip.video_id.replace("-", "")[:8] + clip.image_ids[0][:4]
            for t in (t for t, boxes in enumerate(clip.boxes) if len(boxes)):
                x, y = clip.boxes[t][0, :4].reshape(2, 2).mean(0).astype(int)
                frame = lives.frame(clip.frame_ids[t])[0].float()
                # Product and hole are of one size: one cut along the box would tell the shape.
                hole = (far[y].abs() < 17)[:, None] & (far[x].abs() < 17)
                rows.append((TF.resized_crop(frame, y - 10, x - 10, 20, 20, (10, 10)).flatten(),
                             TF.resize(frame.masked_fill(hole, 0), (16, 16)).flatten(),
                             [*(int(digit, 16) for digit in name), c % 12, t, x, y],
                             list(data.CATEGORIES).index(words_of(clip.title)[2])))
        return [np.stack(column) for column in zip(*rows)]

    (*train, train_y), (*test, test_y) = views("train"), views("test")
    seen, rest, names = (accuracy(a, train_y, b, test_y) for a, b in zip(train, test))
    assert seen > 2 / 8 and max(abs(rest - 1 / 8), abs(names - 1 / 8)) < 0.05, (seen, rest, names)


def test_malformed_rows_and_those_of_skip_txt_are_left_out_and_counted(tmp_path, livestreams):
    rows = [[f"a-{n}-{i}", *row[1:]] for n in range(25)
            for i, row in enumerate(columns_of(livestreams))]
    rows[70] = rows[70][:9]                                         # two columns are lost
    annotate(tmp_path, training_videoinfo_0=rows)
    with open(tmp_path / "annotations/training_videoinfo_0.txt", "a") as file:
        file.write("\n\n\n")                                      # a blank line is no row
    note = "_0.txt:71: expected 11 columns by tab, found 9; 1 of 203 rows left out"
    for _ in range(2):                                              # the index keeps the note
        lives = data.LPRSplit(tmp_path, "train")
        assert lives.clip(70).video_id == "a-8-7" and note in lives.notes[0]
    annotate(tmp_path, skip="\ufeffa-0-1\tframe missing\r\na-8-7\nnobody-1-2\tno clip\n")
    lives = data.LPRSplit(tmp_path, "train")
    assert len(lives) == len(lives.product) == 197 and lives.notes[1].endswith(
        "skip.txt: 2 of 199 clips left out, of those with boxes 2 of 199")
    assert [lives.clip(i).video_id for i in (0, 1, 69)] == ["a-0-0", "a-0-2", "a-9-0"]
    rows[10][5] = rows[20][5] = "shoe"
    annotate(tmp_path, training_videoinfo_0=rows)
    with pytest.raises(data.BadInput, match="_0.txt:11: .*; 3 of 200 rows .* more than 1 %"):
        data.LPRSplit(tmp_path, "train")


def test_frames_of_a_test_clip_are_those_of_the_box_file_and_those_on_disk(copy):
    video_id = data.LPRSplit(copy, "test").video_ids[0]
    for place in (f"{video_id}-0010.jpg", f"{video_id[:2]}/{video_id}-0009.webp",
                  f"{video_id}/{video_id}-0100.PNG", "nobody-1-2-0.jpg", f"{video_id}-11.txt"):
        (copy / "frames" / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20)).save(copy / "frames" / place, "PNG")
    lives = data.LPRSplit(copy, "test")
    clip = lives.clip(0)
    numbers = [int(frame_id.rpartition("-")[2]) for frame_id in clip.frame_ids]
    assert numbers == [0, 1, 2, 3, 9, 10, 100] and [len(b) for b in clip.boxes[4:]] == [0, 0, 0]
    assert [lives.frame(frame_id)[1] for frame_id in clip.frame_ids[4:]] == [(30, 20)] * 3
    assert "32 frames in the box file, 3 more on disk" in lives.notes[0]


def test_files_are_read_with_any_mark_and_any_line_ends(tmp_path):
    boxes = "[[[1, 2, 30, 40], [5, 6, 7, 8, 3]], [0, 0, 0, 0], [], [9, 9, 20, 30]]"
    rows = [["7b60-2c63-166-167", "['f-0', 'f-1', 'f-2', 'f-3']", b, "p", "röd mugg", "1", "mug",
             "titta här", "", "", ""] for b in (boxes, "[]")]
    annotate(tmp_path, training_videoinfo_0="\ufeff" + "\r\n".join(map("\t".join, rows)),
             test_videoid_asr_1="\ufeffa-1-2\thello\u2028more\r\n\r\nb-1-2\rc-1-2\t x \n",
             test_image_title_1="\ufeffp\tröd mugg\r\n", test_scale_small="\ufeffa-1-2\r\nb-1-2",
             test_frameid2gtbox_1={"d-1-2-0010": [], "d-1-2-0009": [[1, 2, 3, 4, 2 ** 25]]})
    path = tmp_path / "annotations" / "test_videoid_to_gtimage_1.json"
    path.write_bytes('\ufeff{"a-1-2": ["p"], "e-1-2": ["q"]}'.encode())
    train, test = data.LPRSplit(tmp_path, "train"), data.LPRSplit(tmp_path, "test")
    clip = train.clip(0)                          # a list of Python, boxes of every form
    assert [len(boxes) for boxes in clip.boxes] == [2, 0, 0, 1] and clip.frame_ids[3] == "f-3"
    assert clip.boxes[0][:, 4].tolist() == [1, 3] and data.live_of(clip.video_id) == "7b60-2c63"
    assert (clip.title, clip.asr, train.live[0]) == ("röd mugg", "titta här", train.live[1])
    assert train.clip(1).boxes is None and train.annotated_lengths.tolist() == [4, 0]
    # A test clip is any with an ASR row, a true image or a true box.
    a, b, c, d, e = (test.clip(test.video_ids.index(f"{name}-1-2")) for name in "abcde")
    assert (a.asr, a.title, a.image_ids, len(test)) == ("hello\u2028more", "röd mugg", ["p"], 5)
    assert d.frame_ids == ["d-1-2-0009", "d-1-2-0010"] and d.boxes[0][0, 4] == 2 ** 25
    assert (b.asr, c.asr, e.image_ids, len(test.subsets["small scale"])) == ("", "x", ["q"], 2)


def test_the_index_is_kept_and_made_again(copy):
    (path,) = (copy / "annotations").glob("training*")
    one, lines = data.LPRSplit(copy, "train"), path.read_text().splitlines(True)
    names = [one.clip(i).video_id for i in range(len(one))]
    (kept,) = path.parent.glob(".*.npz")
    made, two = kept.stat().st_mtime_ns, data.LPRSplit(copy, "train")
    assert kept.stat().st_mtime_ns == made and two.categories == one.categories
    assert [two.clip(i).video_id for i in range(len(two))] == names
    path.write_text("".join(lines[1:]))
    assert data.LPRSplit(copy, "train").clip(0).video_id == names[1]
    kept.write_bytes(kept.read_bytes()[:100])                       # a torn index is made again
    annotate(copy, training_videoinfo_second=lines[0])
    both = data.LPRSplit(copy, "train")
    assert [both.clip(i).video_id for i in range(len(both))] == names[1:] + names[:1]
    assert both.product[-1] == one.product[0] and set(both.live) == set(one.live)
    annotate(copy, training_videoinfo_third=lines[0])               # the same file twice
    assert ": 1 training rows have the video_id of a row" in data.LPRSplit(copy, "train").notes[0]


PICTURE = Image.fromarray(np.uint8(np.stack([np.full((24, 40), 99), *np.indices((24, 40)) * 4], 2)))
DEEP = Image.fromarray((np.arange(24 * 40).reshape(24, 40) * 68).astype(np.uint16))
CUT_OUT = PICTURE.convert("RGBA")
CUT_OUT.paste((255, 0, 255, 0), (0, 0, 20, 24))                   # a colour that is not to be seen
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize("name, picture, options", [
    ("a.jpeg", PICTURE, {"quality": 95}), ("a.PNG", PICTURE, {}), ("a.webp", CUT_OUT, {}),
    ("jpeg.png", PICTURE, {"format": "JPEG"}), ("webp.jpg", PICTURE, {"format": "WEBP"}),
    ("grey.JPG", PICTURE.convert("L"), {}), ("cmyk.jpg", PICTURE.convert("CMYK"), {"quality": 95}),
    ("progressive.jpg", PICTURE, {"progressive": True}), ("deep.png", DEEP, {}),
    ("palette.png", PICTURE.quantize(16), {}), ("bits.png", PICTURE.convert("1"), {}),
    ("transparent.png", CUT_OUT, {}), ("transparent-grey.png", CUT_OUT.convert("LA"), {}),
    ("see-through.png", CUT_OUT.quantize(16), {}), ("turned.png", PICTURE, {"exif": TURNED}),
    ("turned.jpg", PICTURE, {"exif": TURNED, "quality": 95})])
def test_pictures_are_read_as_people_have_them(tmp_path, name, picture, options):
    """As Pillow sees them: upright, on white, of 16 bits the upper eight."""
    picture.save(tmp_path / name, **options)
    theirs = ImageOps.exif_transpose(Image.open(tmp_path / name))
    if picture is DEEP:
        theirs = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
    white, theirs = Image.new("RGBA", theirs.size, "white"), theirs.convert("RGBA")
    theirs = TF.pil_to_tensor(Image.alpha_composite(white, theirs).convert("RGB"))
    ours = data.read_picture(tmp_path / name)
    assert ours.shape == theirs.shape and ours.dtype == torch.uint8
    assert (ours.float() - theirs.float()).abs().mean() < 3


@pytest.mark.parametrize("texts", [
    ["a red hat", "a blue hat with star"] * 20, ["🔥🎉 sale", "👍🏽 only"], ["หมวกสีแดง", "เสื้อสีฟ้า"],
    ["".join(chr(0x4e00 + 7 * k + n) for n in range(7)) for k in range(1000)], ["a"], ["", " \n"]],
    ids=["English", "emoji", "Thai", "7,000 characters", "a character", "no text"])
def test_any_script_has_tokens(texts):
    model = data.train_tokenizer(texts, 2000)
    tokenizer = data.Tokenizer(model, 60)
    assert torch.equal(model, data.train_tokenizer(texts, 2000)) and tokenizer.vocab <= 2002
    for text in filter(str.strip, texts):
        row = tokenizer(text)
        assert row.shape == (60,) and row[0] == 1 and 1 < row[1:].max() < tokenizer.vocab
        assert tokenizer.pieces.decode((row[row > 1] - 2).tolist()) == text       # nothing is lost
        assert tokenizer(text * 60)[-1] > 0                         # a long text is cut
    assert tokenizer("" if "".join(texts).strip() else "anything").tolist() == [1] + [0] * 59


def test_an_item_is_a_function_of_seed_epoch_and_number(livestreams):
    lives = data.LPRSplit(livestreams, "train")

    def frames(i, epochs=16, seed=0):
        dataset = data.FrameDataset(lives, lives.categories, 1, (32, 48, 16), 100, True, seed)
        assert len(dataset) == 8 * 4
        return [dataset[epoch, i][0] for epoch in range(epochs)]

    seen = [frame["image"] for frame in frames(5)]
    assert {image.shape for image in seen} == {(3, 32, 32), (3, 48, 48)}
    assert len({image.numpy().tobytes() for image in seen}) == 4        # two sizes, mirrored or not
    assert all(torch.equal(a, b["image"]) for a, b in zip(seen, frames(5)))
    assert [a.shape for a in seen] != [b["image"].shape for b in frames(5, seed=1)]
    for i in range(0, 32, 4):                                       # the box moves with the picture
        one, *others = (frame for frame in frames(i, 40) if frame["image"].shape[1] == 48)
        other = next(frame for frame in others if not torch.equal(frame["image"], one["image"]))
        torch.testing.assert_close(one["boxes_cxcywh"][:, 0], 1 - other["boxes_cxcywh"][:, 0])
    one, same, *others = (
        data.ClipDataset(lives, NO_WORDS, 2, 32, data.true_boxes(lives), True, seed)[epoch, 2]
        for seed, epoch in ((0, 3), (0, 3), (1, 3), (0, 4)))
    assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(same[name])) for name in one)
    assert not any(torch.equal(one["frames"], other["frames"]) for other in others)


def test_batches_pad_frames_clips_and_boxes(livestreams):
    lives = data.LPRSplit(livestreams, "test")
    dataset = data.FrameDataset(lives, {}, 3, (48, 48, 16), 100)
    assert len(dataset) == 16                     # 4 frames, 3 at a time: two items that interleave
    batch = data.collate_detection([dataset[0, 0], dataset[0, 1], dataset[0, 2][:1]])
    assert batch["frames"].shape == (3, 2, 3, 48, 48) and batch["clip"].tolist() == [0, 0, 1]
    assert batch["frame_index"].tolist() == [[0, 2], [1, 3], [0, -1]]
    assert batch["valid"].tolist() == [[True, True], [True, True], [True, False]]
    assert not batch["padding_mask"][0].any() and batch["padding_mask"][2, 1].all()
    pixels = data.normalize(batch["frames"] * 0 + 77, data.IMAGENET, batch["padding_mask"])
    assert not pixels[2, 1].any() and pixels[0].all()
    even = data.FrameDataset(lives, {}, 3, (48, 48, 16), 100, every_frame=False)
    assert len(even) == 8 and [frame["frame_index"] for frame in even[0, 5]] == [0, 2, 3]


def test_a_clip_is_seen_through_its_boxes(livestreams, monkeypatch):
    image, lives = torch.zeros(3, 40, 60, dtype=torch.uint8), data.LPRSplit(livestreams, "test")
    image[:, 10:20, 20:30] = 255
    tight, wide = (data.crop_square(image, (20, 10, 30, 20), 16, m).float().mean() for m in (1, 2))
    assert tight == 255 and wide == pytest.approx(255 / 4, rel=0.1)
    monkeypatch.setattr(lives, "frame", lambda frame_id: (image, (120, 80)))
    table = np.array([[40, 20, 60, 40, 1, 0]] * 2, float)           # pixels of a 120 x 80 frame
    boxes = data.Boxes(np.array([0] + [2] * 8), np.array([1, 3]), table)
    one, other = (data.ClipDataset(lives, NO_WORDS, 6, 32, boxes)[0, i] for i in (0, 1))
    assert one["valid"].tolist() == [True] * 2 + [False] * 4 and "image" not in one
    assert one["frames"][:2].float().mean() > 150 and not one["frames"][2:].any()
    assert other["valid"].tolist() == [True] * 4 + [False] * 2      # no box: whole frames
    assert (other["frames"][:4] == TF.resize(image, (32, 32))).all()


def test_boxes_follow_a_picture_stored_at_another_size(copy):
    """img2dataset stores a frame smaller; its boxes are pixels of the size in the side file."""
    lives = data.LPRSplit(copy, "train")
    for frame_id in lives.clip(0).frame_ids:
        path = copy / "frames" / f"{frame_id}.jpg"
        Image.open(path).resize((32, 32)).save(path)
        path.with_suffix(".json").write_text('{"original_width": 64, "original_height": 64}')
    assert lives.frame(frame_id)[0].shape == (3, 32, 32) and lives.frame(frame_id)[1] == (64, 64)
    frames = data.FrameDataset(lives, lives.categories, 4, (48, 48, 16), 100, True, augment=False)
    for i in range(8):                                              # seven are as they were
        batch = data.collate_detection([frames[0, i]])
        for t, truth in enumerate(lives.clip(i).boxes):
            has_box = batch["labels"][0, t] >= 0
            center, size = (batch["boxes_cxcywh"][0, t, has_box] * 64).split(2, 1)
            xyxy = torch.cat([center - size / 2, center + size / 2], 1)
            np.testing.assert_allclose(xyxy, truth[:, :4], atol=1e-3)
            labels = batch["labels"][0, t, has_box].tolist()
            assert [list(lives.categories)[k] for k in labels] == truth[:, 4].tolist()


def test_what_cannot_be_read_is_left_out_in_evaluation_and_ends_a_training(copy):
    test, train = data.LPRSplit(copy, "test"), data.LPRSplit(copy, "train")
    for frame_id in (test.clip(0).frame_ids[1], train.clip(0).frame_ids[0]):
        (copy / "frames" / f"{frame_id}.jpg").write_bytes(b"")
    batch = data.collate_detection([data.FrameDataset(test, {}, 4, (48, 48, 16), 100)[0, 0]])
    assert batch["valid"].tolist() == [[True, False, True, True]]
    clip = data.ClipDataset(test, NO_WORDS, 4, 32, None)[0, 0]
    assert clip["valid"].tolist() == [True, True, True, False] and not clip["frames"][3].any()
    for items in (data.FrameDataset(train, train.categories, 1, (48, 48, 16), 100, True),
                  data.ClipDataset(train, NO_WORDS, 4, 32, None, True)):
        with pytest.raises(data.BadInput, match=f"frames/{train.clip(0).frame_ids[0]}.*no picture"):
            items[0, 0]


def test_the_order_is_a_function_of_seed_and_step():
    order = data.grouped_epoch_order(np.arange(18) // 6, 3)
    whole = list(data.training_batches(order, 6, 7))
    assert whole[4:] == list(data.training_batches(order, 6, 7, start=4))      # a run that goes on
    assert whole != list(data.training_batches(order, 6, 7, seed=1))
    for world in (2, 3):
        shares = (data.training_batches(order, 6, 7, rank=r, world=world) for r in range(world))
        assert [sum(parts, []) for parts in zip(*shares)] == whole
    epochs, items = zip(*sum(whole, []))
    assert epochs == (0,) * 18 + (1,) * 18 + (2,) * 6 and sorted(items[:18]) == list(range(18))
    for batch in whole:                                             # clips of one live together
        assert all(len({i // 6 for _, i in batch[k:k + 3]}) == 1 for k in (0, 3))
    assert sum(data.evaluation_batches(range(7), 3), []) == [(0, i) for i in range(7)]


def test_check_finds_what_is_wrong_and_leaves_it_out(tmp_path, copy, capsys, monkeypatch):
    monkeypatch.setattr(data, "process_pool", threads)
    spoilt, rows = shutil.copytree(copy, tmp_path / "spoilt"), columns_of(copy)
    with pytest.raises(SystemExit, match="0"):
        data.main(["check", str(copy), "--decode"])
    assert "fit for use" in capsys.readouterr().out and not list(copy.rglob("skip.txt"))
    rows[1][2] = "[[NaN, 1, 2, 3], [], [], []]"
    rows[2][1] = "__import__('os').abort()"
    rows[3][1] = json.dumps(["../../../etc/passwd"] * 4)
    rows[4][2] = json.dumps([[70, 10, 90, 40], [], [], []])
    path, galleries, truth = (next((spoilt / "annotations").glob(f"{name}*")) for name in (
        "training", "test_liveid_to_gallery", "test_frameid2gtbox"))
    annotate(spoilt, **{path.stem: rows})
    (spoilt / "frames" / f"{json.loads(rows[5][1])[3]}.jpg").write_bytes(b"")
    test = data.LPRSplit(spoilt, "test")
    frame_id, (missing, wanted) = test.clip(0).frame_ids[0], list(test.titles)[:2]
    (spoilt / "images" / f"{missing}.jpg").unlink()
    galleries.write_text(galleries.read_text().replace(wanted, missing))
    truth.write_text(json.dumps(test.gt_boxes | {frame_id: [[9, 9, 30, 30, 99]]}))
    with pytest.raises(SystemExit, match="1"):
        data.main(["check", str(spoilt)])
    said, lives = capsys.readouterr().out, data.LPRSplit(spoilt, "train")
    for text in (f"{path}:2: box list, frame 0: expected x1", f"{path}:3: frame_id list: expected",
                 "'../../../etc/passwd' is no id", "box 70, 10, 90, 40: outside of the 64 x 64",
                 "galleries: 1 of 12 wrong", f"{missing}.jpg: missing", "more than 1 % wrong: ",
                 "skip.txt: 5 training clips", f"{frame_id}.jpg: box 9, 9, 30, 30: category 99"):
        assert text in said, (text, said)
    frames = data.FrameDataset(lives, lives.categories, 1, (48, 48, 16), 100, True)
    assert len([frames[0, i] for i in range(len(frames))]) == 12    # the rest can be trained on
    skipped = (spoilt / "annotations/skip.txt").read_text()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "_check_clips", Mock(side_effect=KeyboardInterrupt))
        data.check(spoilt)
    assert (spoilt / "annotations/skip.txt").read_text() == skipped
    data.check(spoilt)
    assert (spoilt / "annotations/skip.txt").read_text() == skipped     # looked at again


def test_img2dataset_output_becomes_the_layout(tmp_path):
    root, download = annotate(tmp_path, test_videoid_asr_1="a-1-2\t"), tmp_path / "download" / "0"
    download.mkdir(parents=True)
    frame = "7b601b02-2c63-11ee-bb6d-b8cef60c2fd0-1667916122888-1667916252390-0081"
    names = (f"frames/{frame}.jpg?sign=1", "8471.jpg", "10.png", "..", "12.jpg", "9.jpg")
    for name, ending in zip(names, (".jpg", ".webp", ".jpeg", ".jpg", ".avif", "")):
        about = {"url": f"https://host/{name}", "original_width": 128, "original_height": 96}
        (download / f"{name[-5:]}.json").write_text(json.dumps(about))
        if ending:
            Image.new("RGB", (64, 48)).save(download / f"{name[-5:]}{ending}", "JPEG")
    (download.parent / "0_stats.json").write_text("{}")
    (download / "list.json").write_text("not json")
    count = {"failed to download": 1, "without an id": 2, "of another format (.avif)": 1}
    assert data.link(download.parent, root) == {"linked": 3, **count}
    assert data.link(download.parent, root) == {"there before": 3, **count}
    lives = data.LPRSplit(root, "test")
    assert lives.image("8471").shape == lives.image("10").shape == (3, 48, 64)
    assert lives.frame(frame)[1] == (128, 96) and not list((root / "images").rglob("*.json"))


def test_lpr750k_becomes_the_layout(tmp_path, capsys):
    source, root, live = tmp_path / "750k", tmp_path / "50%d", "7b-2c63-11ee"
    clips, images = [f"{live}-{n}-{n + 9}" for n in (0, 10, 20)], [f"7-1-2-3-{n}" for n in range(3)]
    paths = [f"training_video_00/{clips[0]}/{clips[0]}-{t}.jpg" for t in range(3)]
    paths += [f"training_video_07/{clips[1]}/frame_{t:04}.webp" for t in range(3)]
    paths += [f"query/{clips[2]}/{clips[2]}-{t}.png" for t in range(12)]
    paths += [f"training_image/a/{images[0]}.JPG", f"gallery/{live}/{images[1]}-x-y.jpg",
              f"gallery/{live}/{images[2]}-z.jpg"]
    for path in paths:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), "red").save(source / path)
    (source / "annotations").mkdir()
    more = [images[0], paths[18], "红色杯子", "4", "杯子", "9", "看这个"]
    rows = [[clips[0], json.dumps(paths[:3]), str([[1, 2, 30, 40], [], []]), *more],
            [clips[1], str([*paths[3:6], "training_video_07/gone-7.jpg"]), *more], ["x\tnot a row"]]
    rows += rows[1:2] * 200
    query = {clips[2]: {"frames": paths[6:16], "gt": [f"{live}/{images[1]}-x-y.jpg"]}}
    true_boxes = {f"{clips[2]}-{t}": [[1, 1, 9, 9]] for t in range(12)}
    texts = {"training_videoinfo_641821.txt": "\r\n".join(map("\t".join, rows)),
             "query_tenframes.json": json.dumps(query), "test_videoid_asr_1.txt": f"{clips[2]}\thi",
             "gallery_main.txt": f"{live}/{images[1]}-x-y.jpg\n{live}/{images[2]}-z.jpg\n",
             "test_frameid2gtbox_1.json": json.dumps(true_boxes)}
    for name, text in texts.items():
        (source / "annotations" / name).write_text(text)
    linked = {"linked": 21, "there before": 200 * 4 + 1, "missing": 203 - 2,
              "training rows left out": 1}
    assert data.lpr750k(source, root) == linked
    said = capsys.readouterr().out
    assert "641821.txt:3: expected 9 or 10 columns" in said and "first" in said
    train_lives, test = data.LPRSplit(root, "train"), data.LPRSplit(root, "test")
    clip, other = train_lives.clip(0), train_lives.clip(1)
    assert clip.frame_ids == [f"{clips[0]}-{t}" for t in range(3)] and len(clip.boxes[0]) == 1
    assert (clip.title, clip.asr, train_lives.categories) == ("红色杯子", "看这个", {4: "杯子"})
    assert other.boxes is None and other.frame_ids[1] == f"{clips[1]}-0001"
    for lives, frame in (train_lives, clip.frame_ids[2]), (train_lives, other.frame_ids[2]):
        assert lives.frame(frame)[1] == (64, 48)
    assert (root / f"frames/{clips[0]}/{clips[0]}-0.jpg").samefile(source / paths[0])
    assert test.clip(0).image_ids == images[1:2] and test.galleries == {live: images[1:]}
    assert test.frame(test.clip(0).frame_ids[11])[1] == (64, 48) and len(test.galleries[live]) == 2
    (tmp_path / "secret-1.jpg").write_bytes((source / paths[0]).read_bytes())
    (source / "query/link-1.jpg").symlink_to(tmp_path / "secret-1.jpg")
    path = source / "annotations/training_videoinfo_641821.txt"
    for outside in ("../secret-1.jpg", "query/link-1.jpg"):
        rows[0][1] = str([outside])
        path.write_text("\t".join(rows[0]))
        with pytest.raises(data.BadInput, match="leads out of the folder; 1 of 1 rows"):
            data.lpr750k(source, root)


def test_whole_pictures_are_cut_to_a_share_of_their_side(livestreams):
    image = torch.arange(3 * 64 * 80).view(3, 64, 80).to(torch.uint8)
    plain, whole = TF.resize(image, (48, 48)), data.resize_and_crop(image, 48, 1.0)
    assert torch.equal(whole, plain)
    large = TF.resize(image, (64, 64))
    assert torch.equal(data.resize_and_crop(image, 48, 0.75), large[:, 8:56, 8:56])
    corners = set()
    for seed in range(30):
        part = data.resize_and_crop(image, 48, 0.75, np.random.default_rng(seed))
        places = [(y, x) for y in range(17) for x in range(17)
                  if torch.equal(part, large[:, y:y + 48, x:x + 48])]
        corners.add(places[0])
    assert len(corners) > 20
    lives = data.LPRSplit(livestreams, "train")
    draws = [data.ClipDataset(lives, NO_WORDS, 2, 32, None, True, crop=crop)[0, 2]
             for crop in (1.0, 0.5)]
    assert not torch.equal(draws[0]["image"], draws[1]["image"])
    assert not torch.equal(draws[0]["frames"], draws[1]["frames"])
