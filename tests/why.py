"""A script, no test: three looks at why an aim of the README is missed. Means over the checkpoints (seeds), in percent.

    python tests/why.py frames runs/s?/md.pt                       AP50 by what a clip shows: pairs, and for how long
    python tests/why.py places runs/s?/rice.pt                     R1 by the number of frames that a clip is seen through
    python tests/why.py looks runs/s?/md.pt --data runs/stress     do queries know which of two held products was seen before?
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from torchvision.ops import box_convert, box_iou, roi_align

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                    # noqa: E402
import detect                  # noqa: E402
import eval as evaluation      # noqa: E402

SEEN_THROUGH = 1, 2, 4, 8


def frames(paths, root):
    """Class-agnostic AP50 of SD, its vote, MD with T = 1 and MD over parts of the test frames."""
    table = {}
    for path in paths:
        checkpoint = evaluation.read_checkpoint(path)
        lives = data.Lives(root or checkpoint["config"]["data"], "test")
        rows = evaluation.predicted_boxes(checkpoint, lives, Path(path).parent, evaluation.pick_device())
        truth, kinds = evaluation.truth_of(rows, lives, list(checkpoint["categories"]))
        shown = np.isin(np.arange(len(kinds)), truth["image"])
        pair, short = (np.isin(rows["clip"], [c for c, video_id in enumerate(lives.video_ids) if video_id in part])
                       for part in (lives.cases["two in view"], lives.members["duration", "short"]))
        long = np.bincount(rows["clip"], shown, len(lives))[rows["clip"]].astype(int)
        parts = {"all": shown | True, "all, no pairs": ~pair, "pairs": pair, "short": short, "short, no pairs": short & ~pair, "frames that show it": shown}
        parts |= {f"the same, of clips that show it {n} times": shown & (long == n) for n in np.unique(long[shown])}
        for name, part in parts.items():
            true = {key: value[part[truth["image"]]] for key, value in truth.items()} | {"category": 0}
            for method in evaluation.LABELS:
                here = np.flatnonzero(part & (rows[method][:, 4] >= 0))
                found = {"image": here, "box_xyxy": rows[method][here, :4].astype(np.float64), "score": rows[method][here, 4]}
                true["category"], found["category"] = np.zeros(len(true["image"]), int), np.zeros(len(here), int)
                ap = evaluation.average_precision(true, found)["AP50"] if len(true["image"]) else np.nan
                table.setdefault(name, {}).setdefault(method, []).append(100 * ap)
    lines = []
    for name, row in table.items():
        sd, vote, alone, md = (float(np.mean(row[method])) for method in ("sd", "vote", "md1", "md"))
        lines.append((name, sd, vote, alone, md, md - sd, md - alone))
    print(evaluation.table(("AP50", "SD", "vote", "T = 1", "MD", "MD - SD", "MD - T = 1"), lines, True))


def places(paths, root):
    """R1 through true, MD's and SD's boxes when a clip is seen through 1, 2, 4, 8 of its frames."""
    lines = []
    for count in SEEN_THROUGH:
        hits = {}
        for path in paths:
            checkpoint = evaluation.read_checkpoint(path)
            config = checkpoint["config"] | {"frames": count}
            lives = data.Lives(root or config["data"], "test")
            *_, look, _ = evaluation.score_ranking(checkpoint | {"config": config}, lives, Path(config["detectors"]), evaluation.pick_device())
            clips = np.concatenate([row["clips"] for row in look["rows"]])
            pair = np.array([lives.video_ids[c] in lives.cases["two in view"] for c in clips])
            for source in ("true", "md", "sd"):
                for score in look["embedder"].scores:
                    place = np.concatenate([row["place"][source][score] for row in look["rows"]])
                    for name, part in (("all", pair | True), ("no pairs", ~pair)):
                        hits.setdefault((name, score, source), []).append(100 * (place[part] < 1).mean())
        for name, score in dict.fromkeys((name, score) for name, score, _ in hits if score != "pmd"):
            true, md, sd = (float(np.mean(hits[name, score, source])) for source in ("true", "md", "sd"))
            lines.append((f"{count} frames, {name}, {evaluation.SCORES[score]}", true, md, sd, true - md, md - sd))
    print(evaluation.table(("R1", "true boxes", "MD", "SD", "true - MD", "MD - SD"), lines, True))


@torch.no_grad()
def looks(paths, root):
    """In frames that show two held products: is the product's query (IoU 0.5 or more) nearer to those of the clip's frames
    that show it alone than the other product's (the surest below IoU 0.3)? By what is compared; half would be chance."""
    lines = []
    for path in paths:
        checkpoint = evaluation.read_checkpoint(path)
        config, device = checkpoint["config"], evaluation.pick_device()
        lives, model = data.Lives(root or config["data"], "test"), evaluation.restore(checkpoint, device)
        samples = data.DetectionSet(lives, checkpoint["categories"], config["frames"], config["shortest"], config["longest"], False)
        nearer, found, told, seen = {"content": [], "thumbnail": [], "pixels": []}, [], [], []
        for i in evaluation.watch(range(len(samples)), "clips"):
            batch = data.collate_detection([samples[0, i]])
            pictures = data.to_float(batch["frames"].to(device), data.IMAGENET, batch["padding"].to(device))
            *single, scene = model.single(pictures, batch["padding"].to(device))
            content, logits, boxes = (x[0].cpu() for x in single)                                # [T,N,C], [T,N,K], [T,N,4]
            steps = model.temporal(*single, scene, batch["valid"].to(device))
            picked = detect.pick(*(step[-1][0].cpu() for step in steps))[0]                      # [T,4]
            extent = box_convert(boxes, "cxcywh", "xyxy") * detect.picture_size(batch["padding"][0])[:, None].repeat(1, 1, 2)
            pixels = roi_align(pictures[0].cpu(), list(extent), 3, sampling_ratio=2).flatten(1).view(*boxes.shape[:2], -1)
            known = {"content": normalize(content, dim=-1), "thumbnail": model.sd.looks_embed(single[0][0]).cpu(), "pixels": pixels}
            clip, alone, two = lives.clip(int(batch["clip"])), [], []
            for t, place in enumerate(batch["position"][0].tolist()):
                if len(clip.boxes[place]):
                    true = torch.tensor(clip.boxes[place][:1, :4]).float() / batch["size"][0, t].repeat(2)
                    iou = box_iou(box_convert(boxes[t], "cxcywh", "xyxy"), true)[:, 0]
                    other = logits[t].amax(-1).sigmoid().masked_fill(iou >= 0.3, -1)
                    if iou.max() >= 0.5 and clip.kinds[place] == "held":
                        alone.append((t, int(iou.argmax())))
                    if iou.max() >= 0.5 and clip.kinds[place] == "two held" and other.max() > 0.1:
                        two.append((t, int(iou.argmax()), int(other.argmax())))
                        found.append(bool(box_iou(box_convert(picked[t:t + 1], "cxcywh", "xyxy"), true) >= 0.5))
            for t, own in alone:
                told.append(known["thumbnail"][t, own])
                seen.append(pixels[t, own])
            for name, x in known.items() if alone else ():
                before = torch.stack([x[place] for place in alone])
                apart = [[torch.cdist(x[t, q][None], before).mean() for q in pair] for t, *pair in two]
                nearer[name] += [bool(own < other) for own, other in apart]
        told, seen = torch.stack(told), torch.stack(seen)
        share = 1 - ((told - seen) ** 2).mean() / seen.var(0, correction=0).mean()
        lines.append((path, *(100 * float(np.mean(right)) for right in nearer.values()), 100 * float(np.mean(found)), 100 * float(share)))
    print(evaluation.table(("", "content", "thumbnail", "pixels", "MD finds it", "R2 of the thumbnail"), lines, True))


if __name__ == "__main__":
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["frames", "places", "looks"], help="which look to take")
    parser.add_argument("ckpt", nargs="+", help="checkpoints that differ in their seed alone")
    parser.add_argument("--data", help="data folder (default: the one of the training)")
    given = parser.parse_args()
    data.guarded({"frames": frames, "places": places, "looks": looks}[given.what], given.ckpt, given.data)
