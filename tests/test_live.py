"""Recognising a live, and the pictures."""
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import eval as evaluation


@pytest.fixture(scope="session")
def recording(livestreams, tmp_path_factory):
    """A test live as people have it: frames in a folder (a clip after the other, T = 4), shop images, texts; and its clips."""
    lives, root = data.Lives(livestreams, "test"), tmp_path_factory.mktemp("recording")
    live = next(iter(lives.galleries))
    clips = [q for q, video_id in enumerate(lives.video_ids) if data.live_of(video_id) == live]
    (root / "frames").mkdir(), (root / "shop" / "new").mkdir(parents=True)
    n, said = 0, []
    for q in clips:
        said.append(f"{n}.5\t{lives.clip(q).asr}\n")
        for frame_id in lives.clip(q).frame_ids:
            shutil.copy(livestreams / "frames" / f"{frame_id}.jpg", root / "frames" / f"frame{n}.jpg")
            n += 1
    for k, image_id in enumerate(lives.galleries[live]):
        shutil.copy(livestreams / "images" / f"{image_id}.jpg", root / "shop" / ("new" if k == 0 else "") / f"{image_id}.jpg")
    (root / "asr.txt").write_text("".join(said))
    (root / "titles.txt").write_text("".join(f"{'new/' if k == 0 else ''}{i}\t{lives.titles[i]}\n" for k, i in enumerate(lives.galleries[live])))
    return {"root": root, "lives": lives, "live": live, "clips": clips}


def ask(run, recording, out, *more):
    root = recording["root"]
    evaluation.main(["--ckpt", str(run / "rice.pt"), "--live", str(root / "frames"), "--shop", str(root / "shop"), "--every", "1", "--window", "4",
                     "--top", "3", "--asr", str(root / "asr.txt"), "--titles", str(root / "titles.txt"), "--out", str(out), *more])
    return [json.loads(line) for line in (out / "answers.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("more, score", [([], "icl"), (["--rerank", "4"], "fused")])
def test_a_live_is_ranked_as_its_clips_are(run_one, recording, tmp_path, more, score, capsys):
    """The windows of this recording are the test clips, so that boxes and scores must be those of the evaluation."""
    answers = ask(run_one, recording, tmp_path, *more)
    assert [(a["start"], a["end"]) for a in answers] == [(4.0 * n, 4.0 * n + 4) for n in range(len(recording["clips"]))]
    checkpoint = evaluation.read_checkpoint(run_one / "rice.pt")
    *_, shown, _ = evaluation.score_ranking(checkpoint, recording["lives"], tmp_path, torch.device("cpu"))
    row = next(row for row in shown["rows"] if row["live"] == recording["live"])
    for place, answer in enumerate(answers):
        scores = row["score"][shown["source"]][score][place]
        best = np.argsort(-scores, kind="stable")[:3]
        assert [os.path.basename(name)[:-4] for name, _ in answer["top"]] == [row["ids"][m] for m in best]
        assert [s for _, s in answer["top"]] == pytest.approx(scores[best].tolist(), abs=2e-3)
        assert answer["margin"] == pytest.approx(float(scores[best[0]] - scores[best[1]]), abs=2e-3)
        assert answer["asr"] == recording["lives"].clip(recording["clips"][place]).asr
        rows = range(shown["boxes"]["start"][recording["clips"][place]], shown["boxes"]["start"][recording["clips"][place] + 1])
        assert np.allclose([box[:4] for box in answer["boxes"]], [shown["boxes"]["box"][r][:4] for r in rows], atol=0.02)
    said = capsys.readouterr().out
    assert "4 clips" in said and "0:00:16" in said and "answers-1.png" in said
    with Image.open(tmp_path / "answers-1.png") as sheet:
        assert sheet.width > 5 * evaluation.SIDE and np.asarray(sheet).std() > 10


def test_a_stopped_live_goes_on(run_one, recording, tmp_path, capsys):
    whole = ask(run_one, recording, tmp_path)
    log = tmp_path / "answers.jsonl"
    text = log.read_text()
    log.write_text(text[:text.index("\n") + 30])                              # one whole line, and a torn one
    assert ask(run_one, recording, tmp_path) == whole and log.read_text() == text
    with pytest.raises(SystemExit) as stop:
        ask(run_one, recording, tmp_path, "--window", "2")
    assert stop.value.code == 2 and "window: 4 there, 2 here" in capsys.readouterr().err and log.read_text() == text
    (tmp_path / "settings.json").unlink()                                     # nobody knows which question was answered
    with pytest.raises(SystemExit) as stop:
        ask(run_one, recording, tmp_path)
    assert stop.value.code == 2 and "answers.jsonl" in capsys.readouterr().err and log.read_text() == text


def test_odd_signs_of_a_text_are_no_end_of_a_row(run_one, recording, tmp_path):
    shop, name = tmp_path / "shop", "a\u2028b\x85c.jpg"
    shop.mkdir()
    shutil.copy(next((recording["root"] / "shop").glob("*.jpg")), shop / name)
    (tmp_path / "titles.txt").write_bytes(f"\ufeff{name}\tred\x0bmug\r\n".encode())
    assert evaluation.read_tabbed(tmp_path / "titles.txt", "image") == [(name, "red\x0bmug")]
    more = ["--shop", str(shop), "--titles", str(tmp_path / "titles.txt")]
    whole = ask(run_one, recording, tmp_path, *more)
    assert whole[0]["top"][0][0] == name and ask(run_one, recording, tmp_path, *more) == whole


def test_the_shop_is_embedded_once_and_anew_where_it_changed(run_one, recording, tmp_path, monkeypatch):
    shop, embedded, embed = tmp_path / "shop", [], evaluation.Embedder.embed
    shutil.copytree(recording["root"] / "shop", shop)

    def counted(self, dataset, numbers, *rest):
        embedded.append(len(numbers))
        return embed(self, dataset, numbers, *rest)
    monkeypatch.setattr(evaluation.Embedder, "embed", counted)
    embedder = evaluation.Embedder(evaluation.read_checkpoint(run_one / "rice.pt"), torch.device("cpu"))
    again = lambda key="a" * 64: evaluation.open_shop(shop, {}, embedder, key)
    before, features = again()
    assert embedded == [4] and len(before) == len(features) == 4
    assert torch.equal(again()[1], features) and embedded == [4]
    Image.new("RGB", (40, 30), "red").save(shop / before.ids[-1])
    (shop / "broken.png").write_bytes(b"no picture")
    after, changed = again()
    assert embedded == [4, 2] and len(after) == len(changed) == 4 and "broken.png" not in after.ids
    for name, row in zip(before.ids, features):
        assert torch.equal(changed[after.ids.index(name)], row) == (name != before.ids[-1])
    again("b" * 64)
    assert embedded == [4, 2, 5]
    (kept,) = tmp_path.glob(f".shop-{'b' * 12}.npz")
    kept.write_bytes(b"torn")
    again("b" * 64)
    assert embedded[-1] == 5


def test_broken_frames_are_passed_over(run_one, recording, tmp_path):
    root = tmp_path / "live"
    shutil.copytree(recording["root"] / "frames", root)
    for n in (1, 4, 5, 6, 7):
        (root / f"frame{n}.jpg").write_bytes(b"no picture")
    answers = ask(run_one, recording, tmp_path / "out", "--live", str(root))
    assert answers[0]["boxes"][1] is None and answers[0]["boxes"][2] and answers[0]["top"]
    assert answers[1]["boxes"] == [None] * 4 and answers[1]["top"] == [] and len(answers) == 4


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the program ffmpeg")
def test_a_video_gives_the_frame_of_each_second(tmp_path):
    """Frame n of a video of 5 a second has brightness 8n: what comes out tells when it was."""
    for n in range(30):
        Image.new("RGB", (96, 64), (8 * n,) * 3).save(tmp_path / f"{n:02d}.png")
    video = tmp_path / "v.mp4"
    subprocess.run(["ffmpeg", "-v", "error", "-framerate", "5", "-i", tmp_path / "%02d.png", "-c:v", "libx264", "-qp", "0", "-pix_fmt", "yuv444p",
                    video], check=True)
    assert evaluation.seconds_of(video, 1) == pytest.approx(6, abs=0.1)
    for every, start, expected in ((1, 0, [0, 5, 10, 15, 20, 25]), (2, 0, [0, 10, 20]), (2, 2, [10, 20]), (0.4, 4, [20, 22, 24, 26, 28])):
        frames = list(evaluation.frames_of(video, every, 1, start))
        seen = [round(float(frame.float().mean()) / 8) for frame in frames]
        assert seen[:len(expected)] == expected and len(seen) <= len(expected) + 1 and frames[0].shape == (3, 64, 96)
    (tmp_path / "no.mp4").write_bytes(b"no video at all")
    with pytest.raises(data.BadInput, match="no video"):
        evaluation.seconds_of(tmp_path / "no.mp4", 1)


def test_frames_of_a_folder_come_in_order_of_their_numbers(tmp_path):
    for n in (0, 1, 2, 9, 10, 11):
        Image.new("RGB", (8, 6), (20 * n,) * 3).save(tmp_path / f"f{n}.png")
    seen = lambda *given: [round(float(f.float().mean()) / 20) for f in evaluation.frames_of(tmp_path, *given)]
    assert seen(1, 1, 0) == [0, 1, 2, 9, 10, 11] and seen(2, 1, 0) == [0, 2, 10] and seen(2, 1, 2) == [2, 10] and seen(1, 2, 0) == [0, 2, 10]


@pytest.mark.parametrize("flags, says", [
    (["--live", "nowhere"], "no such file or folder"), (["--shop", "nowhere"], "no such folder"), (["--every", "0"], "--every"),
    (["--every", "nan"], "--every"), (["--window", "0"], "--window"), (["--top", "-1"], "--top"), (["--rerank", "-2"], "--rerank"),
    (["--fps", "0"], "--fps"), (["--asr", "nowhere.txt"], "nowhere.txt"), (["--titles", "bad.txt"], "bad.txt:2: expected image<TAB>text"),
    (["--asr", "words.txt"], "words.txt:1: 'soon' is no number of seconds"), (["--asr", "latin.txt"], "expected UTF-8"),
    (["--detector", "nowhere.pt"], "nowhere.pt"), (["--live", "empty"], "no .jpg and no .png")])
def test_wrong_questions_are_one_line(run_one, recording, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_text("a\tb\nno tab\n"), (tmp_path / "words.txt").write_text("soon\thello\n")
    (tmp_path / "latin.txt").write_bytes(b"1\tcaf\xe9\n"), (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        ask(run_one, recording, tmp_path / "out", *flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and says in error


def test_pictures_of_misses_and_hits(run_one, livestreams, tmp_path, capsys):
    for stage in ("md", "rice"):
        evaluation.main(["--ckpt", str(run_one / f"{stage}.pt"), "--pictures", str(tmp_path / stage), "--n", "2", "--out", str(tmp_path)])
        drawn = {path.name for path in (tmp_path / stage).iterdir()}
        assert "curves.png" in drawn and any("misses-1" in name for name in drawn), drawn
        for name in drawn:
            with Image.open(tmp_path / stage / name) as picture:
                assert min(picture.size) > 100 and np.asarray(picture).std() > 5, name
    evaluation.main(["--ckpt", str(run_one / "rice.pt"), "--compare", str(run_one / "rice.pt"), "--pictures", str(tmp_path / "both"), "--n", "2",
                     "--out", str(tmp_path)])
    assert (tmp_path / "both" / "ranking-compared-1.png").exists()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--ckpt", str(run_one / "rice.pt"), "--compare", str(run_one / "md.pt"), "--pictures", str(tmp_path / "both"), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "expected the same stage" in capsys.readouterr().err


@pytest.mark.parametrize("fonts", [True, False])
@pytest.mark.parametrize("text", ["a red mug " * 30, "新鲜有机蔬菜每日新鲜采摘" * 20, "Filmjölk 3 %", "한국어 日本語 mixed", "", "x" * 500, "\u200b\ufffd\x00\t"])
def test_text_stays_in_its_place_whatever_it_holds(monkeypatch, fonts, text):
    if not fonts:
        monkeypatch.setattr(evaluation, "FONTS", ())
        evaluation.font.cache_clear()
    picture = Image.new("RGB", (400, 120), "white")
    evaluation.write(ImageDraw.Draw(picture), (10, 10), text, 150, 3)
    inked = np.argwhere(np.asarray(picture).min(2) < 200)
    evaluation.font.cache_clear()
    assert len(inked) > 10 or not text.strip("\u200b\ufffd\x00\t")
    assert not len(inked) or (inked[:, 1].max() <= 162 and inked[:, 0].max() <= 10 + 3 * 15 + 4)


def test_attention_shows_where_the_maps_look():
    """A map that looks at one patch of one frame: the heat is there."""
    model = torch.nn.Module()
    model.visual, maps = torch.nn.Module(), torch.full((1, 2, 1 + 16 + 1, 3 * 17 + 1), -9.0)
    model.visual.grid = 4
    maps[:, :, 1:17, 17 + 1 + 6] = 9.0                                         # frame 1, patch 6: row 1, column 2
    model.pmd = lambda *_: (None, maps)
    model.patch_maps = lambda maps, padding, T: (maps[:, :, 1:17, :-1].unflatten(-1, (3, 17))[..., 1:].flatten(-2), padding[:, :48])
    model.pfr_head = lambda maps: maps.mean(1, keepdim=True)
    sheet = np.asarray(evaluation.attention_sheet(model, torch.full((3, 3, 64, 64), 90, dtype=torch.uint8), torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8),
                                                  (torch.zeros(1), torch.zeros(1), torch.zeros(1, 52, dtype=torch.bool))), int)
    red = sheet[:evaluation.SIDE, evaluation.SIDE + 4:, 0] - sheet[:evaluation.SIDE, evaluation.SIDE + 4:, 2]
    y, x = np.unravel_index(red.argmax(), red.shape)
    step, wide = evaluation.SIDE / 4, evaluation.SIDE + 4
    assert wide + 2 * step <= x <= wide + 3 * step and step <= y <= 2 * step
    assert red[:, :evaluation.SIDE].max() < 10 < red.max()


def test_curves_are_drawn_from_the_log(tmp_path):
    log = tmp_path / "md.jsonl"
    log.write_text("".join(json.dumps({"step": s, "lr": 1, "loss": 9 / s, "norm": 1}) + "\n" for s in range(1, 30)) + '{"step": 30, "AP50": 60.0}\n{"torn')
    with Image.open(evaluation.draw_curves(log, tmp_path / "c.png")) as picture:
        assert picture.width > 500 and (np.asarray(picture) == evaluation.COLOURS["md"]).all(2).sum() > 100
    log.write_bytes(log.read_bytes() + b'\n[1]\n{"lr": 1}\n{"step": "x"}\n\xff\xfe\n')
    assert evaluation.draw_curves(log, tmp_path / "c.png") == tmp_path / "c.png"                  # lines that are none are passed over
    assert evaluation.draw_curves(tmp_path / "none.jsonl", tmp_path / "d.png") is None and not (tmp_path / "d.png").exists()
