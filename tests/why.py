"""Where a gain comes from: three looks at trained models, means over checkpoints. A script:

    python tests/why.py frames runs/s?/md.pt        AP50 by what a clip shows: pairs, short clips
    python tests/why.py places runs/s?/rice.pt      R1 by the number of frames a clip is seen in
    python tests/why.py vote runs/s?/md.pt          AP50 of SD, a vote of its frames on the category,
                                                    MD with T = 1 and MD; --data DIR: other lives
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_convert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                    # noqa: E402
import eval as evaluation      # noqa: E402


def frames(paths):
    """Class-agnostic AP50 of SD, MD with T = 1 and MD over parts of the test frames."""
    values = {}
    for path in paths:
        _, predicted = evaluation.evaluate(path)
        lives, rows = predicted.split, predicted.boxes
        truth = evaluation.ground_truth(rows, lives, predicted.categories)
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


@torch.no_grad()
def voted_boxes(checkpoint, split, device):
    """[frames,6] in order of clip and frame: as rows of predict_boxes, but the frames of an item
    vote on its category by SD's scores, and each takes its best box of that category."""
    config, model = checkpoint["config"], evaluation.load_model(checkpoint, device)
    dataset = data.FrameDataset(split, checkpoint["categories"], config.frames, config.short_side,
                                config.long_side)
    batches, rows = data.evaluation_batches(range(len(dataset)), 4), []
    for batch in data.make_loader(dataset, batches, 0, device, data.collate_detection):
        batch = {name: value.to(device) for name, value in batch.items()}
        frames = data.normalize(batch["frames"], data.IMAGENET, batch["padding_mask"])
        _, logits, boxes, *_ = model.run_sd(frames, batch["padding_mask"])
        score = logits.sigmoid() * batch["valid"][..., None, None]             # [B,T,N,K]
        category = score.amax(2).sum(1).argmax(-1)[:, None].expand(score.shape[:2])    # [B,T]
        score, query = score.gather(3, category[..., None, None].expand(*score.shape[:3], 1)).max(2)
        box = boxes.gather(2, query[..., None].expand(*query.shape, 4))[:, :, 0]
        box = box_convert(box, "cxcywh", "xyxy").clamp(0, 1) * batch["size"].repeat(1, 1, 2)
        answer = torch.cat([box, score, category[..., None]], -1)[batch["frame_index"] >= 0]
        place = torch.stack([batch["clip"][:, None].expand(score.shape[:2]),
                             batch["frame_index"]], -1)[batch["frame_index"] >= 0]
        rows.append(torch.cat([place, answer], 1).cpu().numpy())
    rows = np.concatenate(rows)
    return rows[np.lexsort((rows[:, 1], rows[:, 0])), 2:]


def vote(paths, data_dir):
    """Class-agnostic AP50 of SD, of a vote on the category, of MD with T = 1 and of MD."""
    lines, device = [], evaluation.pick_device()
    for path in paths:
        result, predicted = evaluation.evaluate(path, data_dir, out="runs/why", workers=0)
        rows = voted_boxes(evaluation.load_checkpoint(path), predicted.split, device)
        truth = evaluation.ground_truth(predicted.boxes, predicted.split, predicted.categories)
        truth["category"] = np.zeros(len(truth["image"]), int)
        found = {"image": np.arange(len(rows)), "category": np.zeros(len(rows), int),
                 "box_xyxy": rows[:, :4], "score": rows[:, 4]}
        voted = 100 * evaluation.average_precision(truth, found)["AP50"]
        sd, alone, md = (result["results"][method]["class-agnostic"]["AP50"]
                         for method in ("sd", "md_t1", "md"))
        lines.append((path, sd, voted, alone, md, md - alone, md - voted))
    mean = np.mean([line[1:] for line in lines], 0)
    lines.append(("mean", *map(float, mean)))
    print(evaluation.table(("AP50", "SD", "vote", "T = 1", "MD", "MD - T = 1", "MD - vote"), lines,
                           True))


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
    parser.add_argument("look", choices=("frames", "places", "vote"))
    parser.add_argument("ckpt", nargs="+")
    parser.add_argument("--data", help="of vote: the lives [those of the training]")
    args = parser.parse_args()
    if args.look == "vote":
        vote(args.ckpt, args.data)
    else:
        {"frames": frames, "places": places}[args.look](args.ckpt)


if __name__ == "__main__":
    data.run_command(main)
