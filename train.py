"""Train SD (the detector of one frame), MD (of a clip) and RICE (which shop image? by three losses: ICL, contrastive;
PMD, matching of pairs; PFR, rebuilding of patches), one loop for all three.

    python train.py                                                the whole quickstart: data, three models, the tables
    python train.py --stage sd                                     one stage; sd, then md, then rice
    torchrun --nproc_per_node 8 train.py --stage md                the same on eight devices; batch sizes are global
    python train.py --overfit 8                                    eight clips by heart: can it learn at all?
    torchrun --nproc_per_node 8 train.py --preset paper --data LPR4M --stage sd --init dab_detr_r50_coco.pth

    flags -> configure -> Config -> prepare: model, samples, order of an epoch
          -> loop: batch (frames [B,T,3,H,W], boxes_cxcywh [B,T,M,4], or frames [B,T,3,S,S], image [B,3,S,S])
                   -> loss [] -> gradient -> AdamW -> RUN/STAGE.jsonl, STAGE.pt -> eval.evaluate -> RUN/results.json
    A run that was stopped goes on where it stood, by the same command.

Letters: B samples of a step on this process, T frames, M boxes of a frame, H W pixels, S side of a square view.

The file: configuration; what differs between the stages; a step; the loop; then what a long run needs besides: stopping
and going on, public weights, the command.
"""
import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import signal
import sys
import threading
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
import rice
from data import BadInput

# ------------------------------------------------------------------ configuration


def option(default, group, text, low=None):
    """A field of Config with its flag's group and help; numbers below `low` (whole ones: 1, others: 0) are refused."""
    low = int(isinstance(default, int)) if low is None else low
    about = {"group": group, "help": text, "low": low, "default": default}
    return field(default_factory=lambda: default, metadata=about)          # a dataclass takes no list as a default


@dataclass
class Config:
    """Everything that decides a run of one stage; the defaults are the paper's where it gives a value."""
    stage: str = option("sd", "run", "sd, md, rice, or all of them in this order")
    preset: str = option("tiny", "run", "tiny: the quickstart; small: 34 categories, for a GPU; paper: the recipe")
    data: str = option("runs/livestreams", "run", "data folder in LPR4M's layout; the default ones are rendered")
    out: str = option("", "run", "run folder: checkpoints, logs, pictures [runs/PRESET, with --overfit runs/overfit]")
    detectors: str = option("", "run", "run folder of the sd.pt and md.pt that a later stage needs [--out]")
    overfit: int = option(0, "run", "learn this many clips by heart and evaluate on them: can it learn at all?", low=0)
    seed: int = option(0, "run", "decides initialisation, order, augmentation and negatives", low=0)
    init: str = option("", "run", "public weights to start from: DAB-DETR's or a ResNet's (sd), CLIP's (rice)")
    workers: int = option(8, "run", "processes that load pictures, for each training process", low=0)
    save_every: int = option(1000, "run", "steps between checkpoints")
    log_every: int = option(50, "run", "steps between lines of the log")
    eval_every: int = option(0, "run", "steps between evaluations on the val lives, the best is kept; 0: none", low=0)

    precision: str = option("float32", "optimisation", "float32, or bf16: autocast, matching and losses in float32")
    steps: int = option(0, "optimisation", "training steps; 0: as many as --epochs makes", low=0)
    epochs: float = option(20.0, "optimisation", "passes over the samples (frames for sd, clips for md and rice)")
    batch: int = option(64, "optimisation", "samples a step over all processes: frames (sd), clips (md, rice)")
    accum: int = option(1, "optimisation", "parts of a step's batch, one after the other, to save memory; ICL sees one")
    lr: float = option(1e-4, "optimisation", "peak learning rate")
    backbone_lr: float = option(1e-5, "optimisation", "peak learning rate of SD's backbone and RICE's image encoder")
    weight_decay: float = option(1e-4, "optimisation", "AdamW's weight decay")
    clip_norm: float = option(0.1, "optimisation", "gradients longer than this are shortened to it")
    warmup: int = option(0, "optimisation", "steps over which the learning rate rises", low=0)
    schedule: str = option("drop", "optimisation", "after --drop of the steps; drop: x0.1; cosine: to 0 along a cosine")
    drop: float = option(0.75, "optimisation", "share of the steps before the rate falls; the paper: 15 of 20 epochs")

    frames: int = option(10, "pictures", "frames of a clip, at even intervals (md; rice in evaluation)")
    shortest: list = option([480, 800, 32], "pictures", "shortest side, pixels: lowest, highest, step; training draws")
    longest: int = option(1333, "pictures", "limit of the longest side, pixels")

    backbone: str = option("resnet50", "detectors", "a torchvision ResNet, or small: stride 8, starts from nothing")
    dim: int = option(256, "detectors", "channels of the transformer")
    heads: int = option(8, "detectors", "attention heads")
    encoder_layers: int = option(6, "detectors", "encoder layers")
    decoder_layers: int = option(6, "detectors", "decoder layers, 2 or more", low=2)
    ffn: int = option(2048, "detectors", "width of the feed-forward nets")
    queries: int = option(300, "detectors", "anchor boxes")
    dense: float = option(0.0, "detectors", "weight of the loss by which memory tokens tell the category; the paper: 0")
    looks: float = option(0.0, "detectors", "weight of the loss by which queries paint their box; the paper: 0")
    keep: list = option([80, 50, 30], "detectors", "queries of a frame that each step of the TTM keeps")

    boxes: str = option("md", "rice", "boxes a clip is seen through: md, sd, true (the annotation's), none")
    view: str = option("box", "rice", "box: a square around it; mask: the patches it touches; frame: whole frames")
    train_frames: int = option(10, "rice", "frames drawn from a clip in training")
    per_live: int = option(8, "rice", "clips of one live side by side in a batch: negatives from the same shop")
    width: int = option(768, "rice", "token width of the image encoder")
    layers: int = option(12, "rice", "its layers")
    vit_heads: int = option(12, "rice", "its attention heads")
    patch: int = option(32, "rice", "pixels of a patch; 0: tokens of 16 pixels from convolutions", low=0)
    size: int = option(224, "rice", "side of its pictures, pixels")
    embedding: int = option(512, "rice", "length of the ICL embedding, with text and without")
    text: str = option("both", "rice", "texts that are read: asr (the clip's), title (the image's), both, none")
    losses: str = option("icl,pmd,pfr", "rice", "which losses: icl[,pmd[,pfr]]")
    n_neg: int = option(3, "rice", "negative clips of an image in the PMD")
    negatives: str = option("hard", "rice", "hard: drawn by ICL similarity; rand: drawn evenly")
    rerank: int = option(20, "rice", "how many first images the PMD scores in evaluation")


# The supplement's recipe is the defaults above (MD's 2e-5 is for a backbone, frozen with the rest of SD). It gives none
# for RICE; those values follow the public code's file.
PRESETS = {
    "paper": {
        "sd": {}, "md": {"lr": 2e-4, "backbone_lr": 2e-5},
        "rice": {"epochs": 5.0, "batch": 256, "lr": 1e-4, "backbone_lr": 1e-6, "weight_decay": 0.2, "clip_norm": 1.0}},
    "tiny": {
        "all": {"workers": 2, "save_every": 100, "log_every": 20, "frames": 8, "shortest": [80, 96, 16], "longest": 176,
                "schedule": "cosine", "drop": 0.5, "clip_norm": 1.0, "backbone": "small", "dim": 128, "heads": 4,
                "encoder_layers": 1, "decoder_layers": 3, "ffn": 256, "queries": 16, "dense": 1.0, "looks": 1.0,
                "keep": [12, 8, 4]},
        "sd": {"steps": 800, "batch": 32, "lr": 1e-3, "backbone_lr": 1e-3, "warmup": 50},
        "md": {"steps": 440, "batch": 8, "lr": 5e-4, "backbone_lr": 5e-4, "warmup": 20},
        "rice": {"steps": 350, "batch": 48, "lr": 1e-3, "backbone_lr": 1e-3, "warmup": 30, "drop": 0.1,
                 "weight_decay": 0.05, "clip_norm": 5.0, "train_frames": 3, "per_live": 24, "width": 128, "layers": 2,
                 "vit_heads": 4, "patch": 0, "size": 64, "embedding": 128}},
    "small": {
        "all": {"data": "runs/livestreams-small", "schedule": "cosine", "drop": 0.5, "clip_norm": 1.0,
                "shortest": [128, 160, 16], "longest": 320, "backbone": "small", "dim": 192, "heads": 6,
                "encoder_layers": 2, "decoder_layers": 4, "ffn": 768, "queries": 25, "dense": 1.0, "looks": 1.0,
                "keep": [15, 10, 5]},
        "sd": {"steps": 10000, "batch": 64, "lr": 7e-4, "backbone_lr": 7e-4, "warmup": 300},
        "md": {"steps": 3000, "batch": 16, "lr": 5e-4, "backbone_lr": 5e-4, "warmup": 100},
        "rice": {"steps": 4000, "batch": 128, "lr": 1e-3, "backbone_lr": 1e-3, "warmup": 200, "drop": 0.1,
                 "weight_decay": 0.05, "clip_norm": 5.0, "train_frames": 4, "per_live": 25, "width": 256, "layers": 4,
                 "vit_heads": 4, "patch": 0, "size": 96, "embedding": 256}},
}
# With --overfit: enough steps for a handful of clips; whatever the preset's model, it has to learn them.
OVERFIT = {"sd": {"steps": 200, "batch": 16}, "md": {"steps": 80, "batch": 8}, "rice": {"steps": 60, "batch": 8}}
STAGES = evaluation.STAGES
CHOICES = evaluation.CHOICES | {"schedule": ("drop", "cosine"), "precision": ("float32", "bf16")}


def configure(given, stage):
    """The configuration of one stage: the defaults, the preset, --overfit's values, then what the user gave."""
    if given.get("preset", "tiny") not in PRESETS:
        raise BadInput(f"--preset {given['preset']}: expected one of {', '.join(PRESETS)}")
    preset = PRESETS[given.get("preset", "tiny")]
    overfit = OVERFIT[stage] if given.get("overfit") else {}
    config = Config(**(preset.get("all", {}) | preset[stage] | overfit | given | {"stage": stage}))
    config.out = config.out or ("runs/overfit" if config.overfit else f"runs/{config.preset}")
    config.detectors = config.detectors or config.out
    for item in dataclasses.fields(Config):
        name, value, low = item.name, getattr(config, item.name), item.metadata["low"]
        if name in CHOICES and value not in CHOICES[name]:
            raise BadInput(f"--{name} {value}: expected one of {' | '.join(CHOICES[name])}")
        if isinstance(value, (int, float)) and not low <= value < 2 ** 31:
            raise BadInput(f"{flag(name)} {value}: expected {low} or more{', and finite' if value > low else ''}")
        if name != "steps" and not evaluation.NEEDED.get(name, lambda _: True)(value):
            raise BadInput(f"{flag(name)} {str(value)[:60]}: out of range ({item.metadata['help']})")
    if config.drop > 1:
        raise BadInput("--drop is a share, 0 to 1")
    if config.boxes == "none" and given.get("view", "frame") != "frame":
        raise BadInput(f"--view {config.view} needs --boxes md, sd or true")
    if config.view == "frame" or config.boxes == "none":
        config.view, config.boxes = "frame", "none"
    try:
        evaluation.shapes_of(vars(config), 1, 4)
    except ValueError as error:
        raise BadInput(f"--{error}") from None
    except RuntimeError as error:
        raise BadInput(f"--dim, --width, --size ...: too large for any memory: {str(error).splitlines()[0]}") from None
    return config


def flag(name):
    return f"--{name.replace('_', '-')}"


def numbers(text):
    """A flag's list: whole numbers with commas between."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers and commas between, found {text[:60]!r}") from None


# ------------------------------------------------------------------ what differs between the stages


def prepare(config, device, saved):
    """-> model, what its checkpoint holds besides, samples, order of an epoch, collate; all the rest is the same.
    saved: the checkpoint of this stage that the run goes on from, or None."""
    lives = data.Lives(config.data, "train")
    lives = lives.few(config.overfit) if config.overfit else lives
    return (prepare_rice if config.stage == "rice" else prepare_detector)(config, lives, device, saved)


def prepare_detector(config, lives, device, saved):
    """SD on single frames, or MD on clips with the SD of the folder --detectors in it."""
    if not lives.categories:
        raise BadInput(f"{config.data}: no training row names a category (columns 6 and 7); one category is enough")
    kept, base = {"categories": lives.categories}, finished(config, "sd") if config.stage == "md" else None
    if base:
        if base["categories"] != lives.categories:
            raise BadInput(f"{config.detectors}/sd.pt knows the categories {str(base['categories'])[:200]}, "
                           f"{config.data} has {str(lives.categories)[:200]}")
        # MD's detector is the one that SD trained, whatever the flags say.
        for name in evaluation.OF_SD:
            setattr(config, name, base["config"][name])
        kept["base"] = evaluation.fingerprint(base)
    model = evaluation.build(vars(config), len(lives.categories), None)
    if base:
        model.sd.load_state_dict(base["model"])
    samples = data.DetectionSet(lives, lives.categories, config.frames if base else 1, config.shortest, config.longest,
                                True, config.seed, augment=not config.overfit)
    return model, kept, samples, lambda rng: rng.permutation(len(samples)), data.collate_detection


def prepare_rice(config, lives, device, saved):
    """RICE on clips with their shop images, through the boxes of a detector of --detectors, the true ones or none."""
    clips = map(lives.clip_or_none, range(0, len(lives), max(1, len(lives) // 200_000)))         # read when asked for
    texts = (text for clip in clips if clip for text in (clip.title, clip.asr))
    vocabulary = saved["tokenizer"] if saved else data.train_tokenizer(texts)
    tokenizer = data.Tokenizer(vocabulary)
    model = evaluation.build(vars(config), len(lives.categories), tokenizer.vocab)
    kept = {"categories": lives.categories, "tokenizer": vocabulary}
    boxes = data.true_boxes(lives) if config.boxes == "true" else None
    if config.boxes in ("sd", "md"):
        detector = finished(config, config.boxes)
        kept["base"] = evaluation.fingerprint(detector)
        kept["detector"] = {name: detector[name] for name in ("config", "categories", "model")}
        found = evaluation.predicted_boxes(detector, lives, config.detectors, device, every_frame=False)
        boxes = evaluation.seen_through(found, config.boxes, len(lives))
    samples = data.PairSet(lives, tokenizer, config.train_frames, config.size, model.visual.grid, config.view, boxes,
                           True, config.seed, config.text, augment=not config.overfit)
    return model, kept, samples, data.live_by_live(lives.live[samples.clips], config.per_live), None


def finished(config, stage):
    """The checkpoint of an earlier stage, at its last step."""
    path = f"{config.detectors}/{stage}.pt"
    checkpoint = evaluation.read_checkpoint(path)
    held, steps = (checkpoint["config"][name] for name in ("stage", "steps"))
    if held != stage:
        raise BadInput(f"{path} holds stage {held}, not {stage}; train it with `python train.py --stage {stage}`")
    if checkpoint["step"] < steps:
        raise BadInput(f"{path} stands at step {checkpoint['step']} of {steps}; finish it with "
                       f"`python train.py --stage {stage} --preset {config.preset} --out {config.detectors}`")
    return checkpoint


def ready(batch, config, device, step):
    """A collated batch on the device, pictures as normalised floats."""
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items() if torch.is_tensor(value)}
    if config.stage == "rice":
        batch |= {name: data.to_float(batch[name], data.CLIP) for name in ("frames", "image")}
        return batch | {"seed": config.seed * 1_000_003 + step}
    return batch | {"frames": data.to_float(batch["frames"], data.IMAGENET, batch["padding"])}


# ------------------------------------------------------------------ a step


class Step(nn.Module):
    """What DDP wraps: a model whose forward is its loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)


def optimizer_of(model, config):
    """AdamW; the backbone (SD) and the image encoder (RICE) have a learning rate of their own."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith(("backbone.", "visual."))].append(parameter)
    rates = [{"params": groups[True], "peak": config.backbone_lr}, {"params": groups[False], "peak": config.lr}]
    return torch.optim.AdamW(rates, weight_decay=config.weight_decay, fused=True)


def learning_rate(step, config):
    """Factor on the peak learning rate, a pure function of the step."""
    done = step / config.steps
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if done < config.drop:
        return rise
    if config.schedule == "drop":
        return rise * 0.1
    return rise * 0.5 * (1 + math.cos(math.pi * (done - config.drop) / (1 - config.drop)))


def forward_backward(wrapped, optimizer, batch, config, device, step):
    """The gradient of one step's batch, in --accum parts one after the other; -> loss and terms.

    A detector's loss is a mean over the part's boxes on all processes; times the part's share of the batch's boxes, the
    parts add up to the loss of the batch at once (nearly, with --dense and --looks, which have counts of their own).
    ICL and PMD meet only the clips of their part: another loss, the mean over smaller batches with fewer negatives.
    """
    optimizer.zero_grad()
    cuts = [len(batch["clip"]) * n // config.accum for n in range(config.accum + 1)]
    parts = [{name: value[low:high] for name, value in batch.items()} for low, high in zip(cuts, cuts[1:])]
    share = [1.0]
    if config.accum > 1:
        counts = [int((part["labels"] >= 0).sum()) if "labels" in part else 1 for part in parts]
        count = over_all(torch.tensor(counts, dtype=torch.float32))
        share = (count.clamp(min=1) / count.sum().clamp(min=1)).tolist()
    total, sums = 0.0, {}
    for n, part in enumerate(parts):
        more = n + 1 < len(parts) and isinstance(wrapped, DistributedDataParallel)
        with wrapped.no_sync() if more else contextlib.nullcontext():            # gradients meet once, at the last part
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms = wrapped(ready(part, config, device, step * config.accum + n))
                loss = loss * share[n]
            loss.backward()
        total = total + loss.detach()
        sums = {name: sums.get(name, 0.0) + value * share[n] for name, value in terms.items()}
    return total, sums


def over_all(value, operation=dist.ReduceOp.SUM):
    """A tensor after `operation` over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value, operation)
    return value


def wait_for_all():
    """A barrier, where there are several processes."""
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------ the loop


def train(config, rank, world, device):
    """Train one stage to its last step, from its checkpoint if it has one; -> False when it was complete already."""
    path = data.output_folder(config.out) / f"{config.stage}.pt"
    torch.manual_seed(config.seed)
    saved = saved_before(config, path)
    if len(set(evaluation.everyones(saved["step"] if saved else -1))) > 1:
        raise BadInput(f"{path} is not the same for all processes: --out must lie on storage that all machines share")
    if saved and complete(config, saved, path):
        return False
    if config.eval_every:
        data.Lives(config.data, "val")                                           # tells now what is missing, not later
    model, kept, samples, order, collate = prepare(config, device, saved)
    config.steps = config.steps or max(1, int(config.epochs * len(samples) / config.batch))
    kept |= {"best": -1.0, "versions": {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}}
    optimizer, start, log = begin(config, saved, model, kept, path, device, rank)
    model.train()
    wrapped = Step(model)
    if world > 1:
        wrapped = DistributedDataParallel(wrapped, [device] if device.type == "cuda" else None)
    sampler = data.step_batches(order, config.batch, config.steps, start, config.seed, rank, world)
    batches = data.load(samples, sampler, config.workers, device, collate)
    unread = {}                                                                  # clip -> why it cannot be read
    wrong = torch.tensor(math.inf, device=device)                                # first step that was not finite

    def checkpoint(step):
        # No random generator's state: all that is drawn is a function of (seed, step) or (seed, epoch, i).
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return {"config": vars(config), "step": step} | states | kept

    bar = tqdm(total=config.steps * config.batch, initial=start * config.batch, desc=f"train {config.stage}",
               unit="frame" if config.stage == "sd" else "clip", mininterval=1, disable=rank > 0)
    with heard() as seen, bar:
        for step, batch in enumerate(batches, start):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, config)
            loss, terms = forward_backward(wrapped, optimizer, batch, config, device, step)
            norm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], config.clip_norm)
            wrong = wrong.where(torch.stack([loss, norm]).isfinite().all(), wrong.clamp(max=step + 1))
            stop = heard_by_all(batch, unread, seen, config, samples)
            log_it, save_it, judge_it = (every and ((step + 1) % every == 0 or step + 1 == config.steps)
                                         for every in (config.log_every, config.save_every, config.eval_every))
            if log_it or save_it or judge_it or stop or step == start:           # else nothing waits for the device
                stop_where_not_finite(wrong, loss, terms, norm, model, step, batch, samples.lives, rank)
            optimizer.step()
            bar.update(config.batch)
            if log_it:
                line = report(loss, terms, norm, world)
                shown = {name: f"{value:.3g}" for name, value in line.items() if name != "norm"}
                bar.set_postfix(shown | ({"bad": len(unread)} if unread else {}))
                write_line(log, {"step": step + 1, "lr": config.lr * learning_rate(step, config)} | line, rank)
            if judge_it:
                judge(checkpoint(step + 1), model, kept, path, device, bar, rank)
            if (save_it or stop) and rank == 0:
                save(path, checkpoint(step + 1))
            if stop:
                wait_for_all()                     # who leaves first has torchrun end the others, amid a save
                raise Stopped(f"{path} holds step {step + 1} of {config.steps}", 128 + (seen or [signal.SIGTERM])[0])
    if unread and rank == 0:
        print(f"{config.stage}: {len(unread)} of {len(samples.lives)} clips could not be read and were skipped; "
              f"the first: {next(iter(unread.values()))}")
    wait_for_all()
    return True


def begin(config, saved, model, kept, path, device, rank):
    """Weights as initialised, those of --init, or those of the checkpoint that the run goes on from.

    -> the optimizer, the first step, and the log, cut to it. kept: what is in each checkpoint besides weights;
    its "best" is the best value on the val lives so far.
    """
    said = hold_against(config, saved, kept, path) if saved else start_from(model, config.init) if config.init else ""
    optimizer, start = optimizer_of(model.to(device), config), saved["step"] if saved else 0
    log = path.with_suffix(".jsonl")
    if saved:
        go_on_from(saved, model, optimizer, path)
        kept["best"] = saved.get("best", -1.0)
    if rank == 0:
        cut_log(log, start)
        print(said, end="\n" * bool(said))
    return optimizer, start, log


def judge(checkpoint, model, kept, path, device, bar, rank):
    """A line of the log with AP50 or R1 of the val lives; the best model so far is kept in STAGE-best.pt."""
    config, step = checkpoint["config"], checkpoint["step"]
    value = evaluation.validate(model, checkpoint, config["detectors"], device)
    best, kept["best"] = kept["best"], max(kept["best"], *value.values())
    write_line(path.with_suffix(".jsonl"), {"step": step} | value, rank)
    if rank == 0:
        minutes = bar.format_dict["elapsed"] / 60
        tqdm.write(f"{config['stage']}, step {step} of {config['steps']}, {minutes:.1f} minutes: val {value}")
        if kept["best"] > best:
            save(path.with_name(f"{path.stem}-best.pt"), checkpoint | {"best": kept["best"]})


def report(loss, terms, norm, world):
    """Loss, its terms (of the last layer) and the gradient's length as numbers, averaged over all processes."""
    values = {"loss": loss.detach()} | {name: value.flatten()[-1] for name, value in terms.items()} | {"norm": norm}
    numbers = over_all(torch.stack([value.float() for value in values.values()]))
    return dict(zip(values, (numbers / world).tolist()))


def write_line(log, line, rank):
    if rank == 0:
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")


def heard_by_all(batch, unread, seen, config, samples):
    """Add what any process could not read in this step to `unread`; -> whether one was told to stop: the same on all.

    Exchanged on the host, so the device is not waited for. BadInput when more than 1 % of the clips cannot be read.
    """
    mine = [(int(clip), reason) for clip, reason in zip(batch["clip"], batch["bad"]) if reason]
    flags = over_all(torch.tensor([len(mine), len(seen)]))
    if flags[0] > 0:
        for clip, reason in (pair for part in evaluation.everyones(mine) for pair in part):
            unread.setdefault(clip, reason)
    if len(unread) > 0.01 * len(samples.lives):
        raise BadInput(f"{config.data}: {len(unread)} of {len(samples.lives)} clips cannot be read, more than 1 %; "
                       f"`python data.py check {config.data}` lists them all; the first: "
                       f"{'; '.join(list(unread.values())[:10])}")
    return bool(flags[1])


def stop_where_not_finite(wrong, loss, terms, norm, model, step, batch, lives, rank):
    """End the run on all processes when a loss or gradient of one was not finite at step `wrong` or since (inf: never);
    asked at the first step, at each line of the log, and before a checkpoint is saved or judged, so none is spoilt."""
    if over_all(wrong, dist.ReduceOp.MIN).isinf():
        return
    tensors = [(f"weight {name}", p) for name, p in model.named_parameters()]
    tensors += [(f"gradient of {name}", p.grad) for name, p in model.named_parameters() if p.grad is not None]
    first = next((name for name, value in tensors if not value.isfinite().all()), "no weight and no gradient")
    values = {name: round(value.flatten()[-1].item(), 4) for name, value in terms.items()}
    clips = [lives.clip(int(c)).video_id for c in batch["clip"][:4]]
    raise BadInput(f"step {int(wrong)}: the loss or its gradient is not finite; at step {step + 1}, process {rank}: "
                   f"{loss.item():.4g}, {norm.item():.4g}; terms {values}; first bad tensor: {first}; "
                   f"clips {', '.join(clips)}, ...; the last checkpoint is whole, try a lower --lr")


# ------------------------------------------------------------------ stopping and going on


class Stopped(Exception):
    """A run that was told to stop has saved its state: a text that says where it stands, and the exit status."""


@contextlib.contextmanager
def heard():
    """Notes Ctrl-C and SIGTERM (what a scheduler or torchrun sends) in a list, so that the step in hand is finished and
    saved; the same one again ends the process at once."""
    seen, before = [], {}

    def note(number, _):
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save(path, checkpoint):
    """Written whole or not at all: a process that dies here, or a full disk, leaves the checkpoint before this one."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    try:
        with data.whole(path) as part, open(part, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}; the file that was there before is whole; make "
                       "room, and the same command goes on from it") from None


def saved_before(config, path):
    """The checkpoint that this run left, or None."""
    saved = evaluation.read_checkpoint(path) if path.exists() else None
    if saved and saved["config"]["stage"] != config.stage:
        raise BadInput(f"{path} holds stage {saved['config']['stage']}, not {config.stage}; remove it, or give --out "
                       "for a new run")
    return saved


def complete(config, saved, path):
    """Whether a checkpoint is this very run's last; BadInput when another detector stands where its own stood."""
    if saved["step"] != saved["config"]["steps"] or differences(config, saved["config"]):
        return False
    base = Path(config.detectors) / ("sd.pt" if config.stage == "md" else f"{config.boxes}.pt")
    if "base" in saved and base.exists() and evaluation.fingerprint(evaluation.read_checkpoint(base)) != saved["base"]:
        raise BadInput(f"{path} was trained on another {base.name} than the one that is there now; "
                       "remove it, or give --out for a new run")
    return True


def differences(config, saved, harmless=False):
    """What the user changed since the checkpoint was made, as text; steps counted from epochs do not differ, nor does
    what MD takes from SD. harmless: of the fields that change no weight (eval.WEIGHTLESS), instead of those that do."""
    now, free = vars(config), evaluation.WEIGHTLESS
    settled = set(evaluation.OF_SD if config.stage == "md" else ()) | set(() if now["steps"] else ("steps",))
    counted = free if harmless else now.keys() - free - settled
    return [f"{name}: {saved.get(name)} there, {now[name]} here" for name in now
            if name in counted and now[name] != saved.get(name)]


def hold_against(config, saved, kept, path):
    """-> one line that says where the run goes on; BadInput when it would go on as another run."""
    changed = differences(config, saved["config"])
    changed += [name for name in ("categories", "base") if saved.get(name) != kept.get(name)]
    if changed:
        raise BadInput(f"{path} was made with another configuration or on other data ({', '.join(changed)}); "
                       "give --out for a new run, or remove the file")
    return "; ".join([f"{path}: goes on from step {saved['step']} of {config.steps}",
                      *differences(config, saved["config"], harmless=True)])


def go_on_from(saved, model, optimizer, path):
    """Weights and the optimizer's state of a checkpoint."""
    model.load_state_dict(saved["model"])
    try:
        optimizer.load_state_dict({"state": saved["optimizer"]["state"],
                                   "param_groups": optimizer.state_dict()["param_groups"]})
        fits = len(optimizer.state) > 0
        for parameter, state in optimizer.state.items():
            first, second = state["exp_avg"], state["exp_avg_sq"]
            fits &= first.shape == second.shape == parameter.shape and float(state["step"]) >= 0
            fits &= bool(first.isfinite().all() and second.isfinite().all() and (second >= 0).all())
    except Exception:                                                            # whatever its bytes lead to
        fits = False
    if not fits:
        raise BadInput(f"{path}: the optimizer's state does not fit the weights; remove it, and it is trained anew")


def cut_log(log, start):
    """Leave out the lines that a stopped run wrote after its last checkpoint, the one of step `start`."""
    def step_of(line):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return math.inf                                                      # a line that a dying process tore
        return step if type(step) is int and line.endswith(b"\n") else math.inf
    lines = log.read_bytes().splitlines(True) if start and log.exists() else []
    steps = [step_of(line) for line in lines]
    if math.inf in steps[:-1]:
        raise BadInput(f'{log}:{steps.index(math.inf) + 1}: not a line of the log, {{"step": ...}}; remove it, or all')
    with data.whole(log) as part:
        Path(part).write_bytes(b"".join(line for line, step in zip(lines, steps) if step <= start))


# ------------------------------------------------------------------ public weights


def start_from(model, path):
    """Public weights by name and shape; the class head may differ and is then left as initialised, nothing else may.

    A whole DAB-DETR checkpoint ({"model": ...}, with or without "module."), a torchvision ResNet for its backbone, or
    CLIP for RICE's image encoder: a state dict, or OpenAI's TorchScript archive. Kept in float32.
    -> one line that says what was loaded; position embeddings of another picture size are interpolated, and it says so.
    """
    state, said = read_weights(path), ""
    own, place = model.state_dict(), ""
    if "layer4.0.conv1.weight" in state:
        place, state = "backbone.0.body.", {key: value for key, value in state.items() if not key.startswith("fc.")}
    elif hasattr(model, "visual"):
        place = "visual."
        state = {key.removeprefix(place): value for key, value in state.items() if key.startswith(place)}
        positions, patches = state.get("positional_embedding"), model.visual.grid ** 2
        there = len(positions) - 1 if positions is not None and positions.dim() == 2 else patches
        if there != patches and math.isqrt(there) ** 2 == there:
            state["positional_embedding"] = rice.fit_positions(positions, model.visual.grid)
            said = f"; position embeddings interpolated from {there} to {patches} patches"
    unused = [key for key in state if key.endswith("num_batches_tracked")]
    state = {place + key: value for key, value in state.items() if key not in unused}
    # The decoder's box head is the model's own under a second name, which a checkpoint may leave out.
    own = {key: value for key, value in own.items()
           if key.startswith(place) and (key in state or not key.startswith("transformer.decoder.bbox_embed."))}
    shapes = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    new = {key for key in shapes if key.startswith("class_embed.")}
    wrong = {"missing": own.keys() - state, "left over": state.keys() - own, "of another shape": shapes - new}
    if any(wrong.values()):
        named = [f"{text}: {', '.join(sorted(keys)[:8])}" for text, keys in wrong.items() if keys]
        raise BadInput(f"{path}: {'; '.join(named)}")
    model.load_state_dict({key: value for key, value in state.items() if key not in new}, strict=False)
    return (f"{path}: loaded {len(own) - len(new)}, re-initialised {', '.join(sorted(new)) or 'none'}, "
            f"unused {len(unused)}{said}")


def read_weights(path):
    """The tensors of a weights file by name, in float32; nothing in the file is run."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file")
    try:
        return {key: value.float() for key, value in rice.read_torchscript(path).items()}
    except (zipfile.BadZipFile, KeyError, IndexError):
        pass                                                                     # no archive: a state dict, then
    except Exception as error:             # pickle raises whatever the bytes lead it to
        raise BadInput(f"{path}: not a TorchScript archive of weights ({type(error).__name__})") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):          # DETR's checkpoints hold their flags too
            state = torch.load(path, map_location="cpu", weights_only=True)
        return {key.removeprefix("module."): value.float() for key, value in state.get("model", state).items()}
    except Exception as error:
        raise BadInput(f"{path}: not a state dict of tensors ({type(error).__name__})") from None


# ------------------------------------------------------------------ the command


def run(given):
    evaluation.keep_memory()
    rank, world = evaluation.start_processes()
    device = evaluation.pick_device()
    wanted = given.get("stage", "all")
    if wanted not in (*STAGES, "all"):
        raise BadInput(f"--stage {wanted}: expected one of {', '.join(STAGES)}, all")
    if given.get("init") and wanted not in ("sd", "rice"):
        raise BadInput("--init gives one stage its public weights: say which with --stage sd or --stage rice")
    configs = [configure(given, stage) for stage in STAGES if wanted in (stage, "all")]
    for config in configs:
        if config.batch % (world * config.accum):
            raise BadInput(f"--batch {config.batch} is that of all processes together; it must be a multiple of their "
                           f"number, {world}, times --accum {config.accum}")
    if rank == 0 and configs[0].data in data.LIVESTREAMS and not Path(configs[0].data).exists():
        data.render(configs[0].data, **data.LIVESTREAMS[configs[0].data])
    if world > 1 and rank == 0:
        data.Lives(configs[0].data, "train")                           # one process makes the index, the others find it
    wait_for_all()
    path = Path(configs[0].out) / "results.json"
    results = results_before(path)
    for config in configs:
        trained = train(config, rank, world, device)
        checkpoint, before = f"{config.out}/{config.stage}.pt", results.get(config.stage, {})
        if trained or before.get("fingerprint") != evaluation.fingerprint(evaluation.read_checkpoint(checkpoint)):
            results[config.stage], look, _ = evaluation.evaluate(checkpoint, workers=config.workers)
            if rank == 0:
                evaluation.show(results[config.stage])
                evaluation.write_json(path, results)
                log = Path(config.out) / f"{config.stage}.jsonl"
                print(f"\npictures: {evaluation.draw_examples(look, config.out)}, "
                      f"{evaluation.draw_curves(log, log.with_suffix('.png'), results[config.stage])}")
        elif rank == 0:
            print(f"{config.stage}: done before ({checkpoint})")
            try:
                evaluation.show(before)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                raise BadInput(f"{path}: {config.stage}: not results; remove it, and it is made again") from None
    if rank == 0:
        print(f"\nall done: {path}")


def results_before(path):
    """The results of stages that were trained before, {} when there are none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not all(isinstance(result, dict) for result in results.values()):
            raise ValueError
        return results
    except (ValueError, AttributeError, RecursionError):
        raise BadInput(f"{path}: not JSON of results by stage; remove it, and it is made again") from None


def main(argv=None):
    parser = data.Parser(
        usage="train.py [--FLAG VALUE ...]",
        description="Train SD, MD and RICE; with no argument: the whole quickstart.",
        epilog="Defaults are the paper's; --preset tiny (the default) changes many of them: see PRESETS in train.py.")
    for group, items in itertools.groupby(dataclasses.fields(Config), lambda item: item.metadata["group"]):
        group = parser.add_argument_group(group)
        for item in items:
            default = "all" if item.name == "stage" else item.metadata["default"]
            shown = f" [{','.join(map(str, default)) if item.type is list else default}]" if default != "" else ""
            group.add_argument(flag(item.name), type=numbers if item.type is list else item.type, metavar="X",
                               default=argparse.SUPPRESS, help=item.metadata["help"] + shown)
    try:
        data.guarded(run, vars(parser.parse_args(argv)))
    except Stopped as stopped:
        text, code = stopped.args
        print(f"stopped: {text}; the same command goes on from there", file=sys.stderr)
        sys.exit(code)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
