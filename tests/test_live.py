"""A live against a shop, pictures, near-duplicates; videos and MovingFashion, by ffmpeg."""
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
from conftest import threads

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the program ffmpeg")


@pytest.fixture
def recording(run_one, livestreams, tmp_path):
    """A test live as people have it, and a function that asks RICE about it."""
    _, predicted = evaluation.evaluate(run_one / "rice.pt", out=tmp_path)
    lives, (live, found), n = predicted.split, next(iter(predicted.rankings.items())), 0
    titles, said = "\ufeff", ""
    for folder in ("live", "shop/new"):
        (tmp_path / folder).mkdir(parents=True)
    for clip in map(lives.clip, found["clips"]):
        said += f"{n}.5\t{clip.asr}\n"
        for n, frame_id in enumerate(clip.frame_ids, n):
            shutil.copy(livestreams / f"frames/{frame_id}.jpg", tmp_path / f"live/f{n}.jpg")
        n += 1
    for image_id, name in zip(found["ids"], ("new/a.jpg", "b.jpg", "c.jpg", "d.jpg")):
        shutil.copy(livestreams / f"images/{image_id}.jpg", tmp_path / "shop" / name)
        titles += f"{name}\t{lives.titles[image_id]}\r\n"
    for name, text in (("said", said), ("titles", titles)):
        (tmp_path / f"{name}.txt").write_bytes(text.encode())

    def ask(*more):
        given = ("--live @/live --shop @/shop --titles @/titles.txt --asr @/said.txt --out @ "
                 "--every 1 --window 4 --top 3 --ckpt").replace("@", str(tmp_path)).split()
        evaluation.main([*given, str(run_one / "rice.pt"), *more])
        return list(map(json.loads, open(tmp_path / "answers.jsonl", encoding="utf-8")))
    return tmp_path, predicted, found, ask


def test_a_live_is_ranked_as_its_clips_are(recording, capsys):
    """The windows of this recording are the test clips: boxes and scores are those of Table 2."""
    root, predicted, found, ask = recording
    answers, rows = ask(), np.load(next(root.glob("boxes-test-*.npy")))
    assert [(a["start"], a["end"]) for a in answers] == [(4 * n, 4 * n + 4) for n in range(4)]
    for answer, c, score in zip(answers, found["clips"], found["similarity"]["md"]["fused"]):
        best = np.argsort(-score, kind="stable")[:3]
        assert [name[-5:-4] for name, _ in answer["top"]] == ["abcd"[g] for g in best]
        assert [value for _, value in answer["top"]] == pytest.approx(score[best], abs=2e-3)
        assert answer["asr"] == predicted.split.clip(c).asr
        wanted = rows["md"][rows["clip"] == c, :4]
        np.testing.assert_allclose(np.array(answer["boxes"])[:, :4], wanted, atol=0.02)
    sheet, said = np.asarray(Image.open(root / "answers.png")), capsys.readouterr().out
    assert sheet.std() > 10 and "0:00:12 - 0:00:16" in said


def test_what_is_no_picture_is_left_out_and_named(recording, capsys):
    root, *_, ask = recording
    for name, kind in (("e.webp", "WEBP"), ("f.jpg", "WEBP"), ("g.gif", "GIF")):
        Image.new("RGB", (64, 64), "green").save(root / "shop" / name, kind)
    for name in ("shop/h.jpg", "live/f5.jpg", "live/notes.txt"):
        (root / name).write_bytes(b"")
    whole = (root / "shop/b.jpg").read_bytes()
    (root / "shop/cut.jpg").write_bytes(whole[:len(whole) // 2])
    for n in range(8, 12):
        (root / f"live/f{n}.jpg").write_bytes(whole[:len(whole) // 2])
    answers, said = ask("--top", "9"), capsys.readouterr().out
    assert "cut.jpg: left out, it is not a whole picture" in said
    # A picture that cannot be read takes its second as well, so that the others keep theirs.
    assert [a["end"] for a in answers] == [4, 8, 12, 16]
    assert [len(a["top"]) for a in answers] == [6, 6, 0, 6] and "no frame can be read" in said
    assert "shop: 1 of 9 files left out, first g.gif: is a GIF, expected JPEG, PNG or W" in said
    assert "shop: 1 of 9 files left out, first h.jpg: no pic" in said
    assert "live: 2 of 17 files left out, first " in said


def test_frames_of_a_folder_come_in_order_of_their_numbers(tmp_path):
    for n in (0, 1, 2, 9, 10, 11):
        Image.new("RGB", (8, 6), (20 * n,) * 3).save(tmp_path / f"f{n}.png")
    for every, wanted in ((1, [0, 1, 2, 9, 10, 11]), (2, [0, 2, 10]), (2.5, [0, 2, 11])):
        frames = evaluation.live_frames(tmp_path, every)
        assert [round(frame.float().mean().item() / 20) for frame in frames] == wanted


def test_pictures_are_drawn_and_near_duplicates_found(run_one, livestreams, tmp_path):
    for stage in ("md", "rice"):
        path, folder = str(run_one / f"{stage}.pt"), str(tmp_path / stage)
        evaluation.main(["--ckpt", path, "--compare", path, "--n", "2", "--pictures", folder])
        for name in ("worst", "compared", "curves"):
            picture = np.asarray(Image.open(tmp_path / stage / f"{stage}-{name}.png"))
            assert min(picture.shape[:2]) > 190 and picture.std() > 5
    for text in ("a red mug " * 30, "新鲜有机蔬菜每日新鲜采摘" * 20, "x" * 500, "\u200b\t", ""):
        assert evaluation.tile(lambda: torch.zeros(3, 9, 9), text).width < 200
    shutil.copytree(livestreams / "images", tmp_path / "images")
    one, two, *_ = sorted((tmp_path / "images").iterdir())
    shutil.copy(one, tmp_path / "images" / "copy.jpg")
    path, listed = str(run_one / "rice.pt"), tmp_path / "duplicates.txt"
    for place in (["--shop", str(tmp_path / "images")], ["--data", str(tmp_path)]):
        evaluation.main(["--ckpt", path, "--duplicates", "0.9999", "--out", str(tmp_path), *place])
        rows = [set(row.split("\t")) for row in listed.read_text().splitlines()]
        assert {one.name, "copy.jpg"} in rows and not any(two.name in row for row in rows)


def video(path, *options):
    source = "ffmpeg -v error -f lavfi -i testsrc=s=64x48:r=10 -pix_fmt yuv420p -t 10.8".split()
    subprocess.run([*source, *options, path], check=True)
    return path


def test_a_live_that_fails_keeps_the_answers_before_it(recording, capsys):
    root, *_, ask = recording
    ask()
    (root / "late.txt").write_text("5000\thello\n1\tthis\n")
    (root / "others.txt").write_text("photos\\b.jpg\tmug\n")
    before = ask("--asr", str(root / "late.txt"), "--titles", str(root / "others.txt"))
    said = capsys.readouterr().out
    assert "late.txt: 1 of 2 rows were said" in said and "others.txt: 0 of 4 photos" in said
    (root / "none").mkdir()
    with pytest.raises(SystemExit, match="2"):
        ask("--live", str(root / "none"))
    assert list(map(json.loads, open(root / "answers.jsonl", encoding="utf-8"))) == before


@needs_ffmpeg
def test_a_video_gives_the_frames_of_its_seconds(tmp_path, capsys):
    plain = video(tmp_path / "a 50%d.mp4")
    frames, all_frames = (list(data.video_frames(plain, every)) for every in (2, 0.1))
    assert len(frames) == 6 and frames[0].shape == (3, 48, 64) and len(all_frames) == 108
    assert all(torch.equal(frame, all_frames[20 * n]) for n, frame in enumerate(frames))
    deep = video(tmp_path / "b.mp4", "-pix_fmt", "yuv420p10le")     # as a phone records
    for a, b in zip(frames, data.video_frames(deep, 2), strict=True):
        assert (a.float() - b.float()).abs().mean() < 6
    fragments = video(tmp_path / "d.mp4", "-g", "10", "-movflags", "frag_keyframe+empty_moov")
    assert len(list(data.video_frames(fragments, 2))) == 6 and not capsys.readouterr().err
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(fragments.read_bytes()[:-1000])
    assert 4 <= len(list(data.video_frames(cut, 2))) <= 6
    assert "cut.mp4: damaged or cut off" in capsys.readouterr().err
    vfr = ("-vf", "select=not(mod(n\\,7))+lt(n\\,20)", "-fps_mode", "vfr")      # and this too
    assert len(list(data.video_frames(video(tmp_path / "c.mp4", *vfr), 2))) == 6


@needs_ffmpeg
def test_movingfashion_becomes_the_layout(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "process_pool", threads)
    root = tmp_path / "50%d off"
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.JPG")
    video(tmp_path / "v.mp4", "-t", "3.5").with_name("broken.mp4").write_bytes(b"no video")
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps({
            "0": {"img_path": "a.JPG", "video_paths": ["v.mp4", "broken.mp4"], "source": "net"},
            "7": {"img_path": "a.JPG", "video_paths": ["v.mp4"]}}))
    data.movingfashion(tmp_path, root)
    assert capsys.readouterr().err.count("broken.mp4: ffmpeg cannot read it") == 2
    train, test = (data.LPRSplit(root, split) for split in ("train", "test"))
    assert train.lengths.tolist() == test.lengths.tolist() == [4, 4]
    assert train.frame(train.clip(0).frame_ids[3])[0].shape == (3, 48, 64)
    assert test.clip(0).image_ids == ["test-0"] and test.image("test-7").shape == (3, 64, 64)
    assert all(ids == ["test-0", "test-7"] for ids in test.galleries.values())
