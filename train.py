"""Train SD, MD and RICE, one loop for all three.

    python train.py                                   the quickstart: data, three models, tables
    python train.py --stage sd                        one stage; sd, then md, then rice
    torchrun --nproc_per_node 8 train.py --stage md   the same on eight devices; --batch is global
    python train.py --overfit 8                       can it learn eight clips at all?
    torchrun --nproc_per_node 8 train.py --preset paper --data LPR4M --stage sd --init dab_detr.pth

    flags and preset -> configure: Config -> build_stage: model, data set, order of an epoch
        -> train: batch -> loss -> gradient -> AdamW -> OUT/STAGE.jsonl, OUT/STAGE.pt
        -> eval.evaluate -> OUT/results.json
    A run that was stopped goes on from its last checkpoint by the same command.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import eval as evaluation
import rice
from data import BadInput, require
from eval import STAGES, is_main_process

# ---- configuration

RENDERED = "runs/livestreams"      # rendered when it is missing


def config_field(default, text, choices=None, group=None):
    """A field of Config with the help of its flag. group: a heading of the help, for this field
    and those after it."""
    about = {"default": default, "help": text, "choices": choices, "group": group}
    return field(default_factory=lambda: default, metadata=about)


@dataclass
class Config:
    """All that decides a run of one stage; the defaults are the paper's where it gives a value.

    Checkpoints made before lack a new field. A run that goes on takes its default; eval.py has to
    read it by getattr(config, name, default).
    """
    stage: str = config_field("all", "stages to train", ("sd", "md", "rice", "all"), "run")
    preset: str = config_field("tiny", "sizes and recipe", ("tiny", "paper"))
    data: str = config_field(RENDERED, "data folder; this one is rendered")
    out: str = config_field("", "run folder [runs/PRESET; with --overfit runs/overfit]")
    detector_dir: str = config_field("", "folder of the sd.pt and md.pt to build on [--out]")
    overfit: int = config_field(0, "train and test on so many clips alone; 0: off")
    seed: int = config_field(0, "seed of weights, order, augmentation and negatives")
    init: str = config_field("", "public weights or a checkpoint; none: from scratch")
    workers: int = config_field(8, "loader processes of each training process")
    save_every: int = config_field(1000, "steps between checkpoints")
    log_every: int = config_field(50, "steps between lines of the log")
    eval_every: int = config_field(0, "steps between evaluations on val lives; 0: none")
    precision: str = config_field("float32", "bf16: by autocast", ("float32", "bf16"),
                                  "optimisation")
    steps: int = config_field(0, "training steps; 0: as many as --epochs makes")
    epochs: float = config_field(20.0, "passes over the frames (sd) or clips (md, rice)")
    batch: int = config_field(64, "frames (sd) or clips a step, of all processes")
    accum: int = config_field(1, "parts of a batch, to save memory; ICL sees one part")
    lr: float = config_field(1e-4, "peak learning rate")
    backbone_lr: float = config_field(1e-5, "peak learning rate of SD's backbone, RICE's ViT")
    weight_decay: float = config_field(1e-4, "weight decay of AdamW")
    adam_eps: float = config_field(1e-8, "epsilon of AdamW")
    clip_norm: float = config_field(0.1, "gradients are clipped to this norm")
    warmup: int = config_field(0, "steps over which the learning rate rises")
    schedule: str = config_field("drop", "decay to x0.1, or cosine to 0", ("drop", "cosine"))
    decay_start: float = config_field(0.75, "share of the steps before the decay")
    frames: int = config_field(10, "evenly spaced frames of a clip (md, rice tests)", None,
                               "pictures")
    short_side: list = config_field([480, 800, 32], "shortest side, pixels: low,high,step")
    long_side: int = config_field(1333, "limit of the longest side, pixels")
    backbone: str = config_field("resnet50", "small, or resnet18 .. resnet152", (
        "small", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), "detectors")
    dim: int = config_field(256, "channels of the transformer")
    heads: int = config_field(8, "attention heads")
    encoder_layers: int = config_field(6, "encoder layers")
    decoder_layers: int = config_field(6, "decoder layers, 2 or more")
    ffn: int = config_field(2048, "channels of the feed-forward nets")
    queries: int = config_field(300, "anchor boxes")
    ttm_topk: list = config_field([80, 50, 30], "queries of a frame in each step of the TTM")
    box_source: str = config_field("md", "boxes it looks through", ("md", "sd", "true", "none"),
                                   "rice")
    train_frames: int = config_field(10, "frames of a clip in a training step")
    per_live: int = config_field(1, "clips of one live side by side in a batch")
    vit_width: int = config_field(768, "channels of the image encoder")
    vit_layers: int = config_field(12, "layers of the image encoder")
    vit_heads: int = config_field(12, "attention heads of the image encoder")
    vit_patch: int = config_field(32, "pixels of a patch; 0: a convolutional stem")
    image_size: int = config_field(224, "side of RICE's pictures, pixels")
    crop: float = config_field(0.875, "share of the side kept of a whole picture")
    embedding: int = config_field(512, "channels of the ICL embedding")
    text: str = config_field("both", "texts to read", ("both", "asr", "title", "none"))
    text_length: int = config_field(77, "tokens of a text")
    vocab: int = config_field(20000, "pieces of the tokenizer at most, from 600 on")
    losses: str = config_field("icl,pmd,pfr", "of RICE", ("icl", "icl,pmd", "icl,pmd,pfr"))
    pfr_weight: float = config_field(0.05, "weight of PFR; the public code: 1")
    n_neg: int = config_field(3, "negative clips of an image in the PMD")
    negatives: str = config_field("hard", "drawn by ICL similarity or evenly", ("hard", "rand"))
    rerank: int = config_field(20, "first images that the PMD scores in evaluation")


PRESETS = {
    # The supplement is the defaults. RICE's recipe is the public code's, which does not clip.
    "paper": {
        "all": {}, "sd": {}, "md": {"lr": 2e-4, "backbone_lr": 2e-5},
        "rice": {"steps": 5000, "batch": 96, "lr": 1e-4, "backbone_lr": 1e-6, "weight_decay": 0.2,
                 "adam_eps": 1e-6, "clip_norm": 1e9, "warmup": 500, "schedule": "cosine",
                 "decay_start": 0.0, "precision": "bf16"}},
    # Steps for 9 to 15 minutes on two CPU cores.
    "tiny": {
        "all": {"workers": 0, "save_every": 100, "log_every": 20, "frames": 8, "init": "none",
                "short_side": [80, 80, 16], "long_side": 176, "schedule": "cosine",
                "decay_start": 0.5, "clip_norm": 1.0, "backbone": "small", "dim": 128, "heads": 4,
                "encoder_layers": 1, "decoder_layers": 3, "ffn": 256, "queries": 16,
                "ttm_topk": [12, 8, 4]},
        "sd": {"steps": 760, "batch": 32, "lr": 1e-3, "backbone_lr": 1e-3, "warmup": 50},
        "md": {"steps": 430, "batch": 8, "lr": 5e-4, "backbone_lr": 5e-4, "warmup": 20},
        "rice": {"steps": 390, "batch": 48, "lr": 1e-3, "backbone_lr": 1e-3, "warmup": 30,
                 "decay_start": 0.1, "weight_decay": 0.05, "clip_norm": 5.0, "train_frames": 3,
                 "per_live": 24, "vit_width": 128, "vit_layers": 2, "vit_heads": 4, "vit_patch": 0,
                 "image_size": 64, "crop": 1.0, "embedding": 128, "text_length": 24,
                 "vocab": 2000}}}
OVERFIT = {"sd": {"steps": 200, "batch": 16}, "md": {"steps": 80, "batch": 8},
           "rice": {"steps": 60, "batch": 8}}
SD_FIELDS = {"queries", "dim", "heads", "encoder_layers", "decoder_layers", "ffn", "backbone"}
LEAST = {"overfit": 0, "seed": 0, "workers": 0, "eval_every": 0, "steps": 0, "warmup": 0,
         "vit_patch": 0, "decoder_layers": 2, "rerank": 10}      # other whole numbers: 1
# None of these changes what a run that goes on computes; --init counts at its start alone.
MAY_CHANGE_ON_RESUME = {"workers", "save_every", "log_every", "eval_every", "out", "detector_dir",
                        "init", "rerank"}


def configure(given, stage):
    """The configuration of a stage: defaults, preset, --overfit, then the flags {name: value}."""
    preset = PRESETS[given.get("preset", "tiny")]
    overfit = OVERFIT[stage] if given.get("overfit") else {}
    config = Config(**preset["all"] | preset[stage] | overfit | given | {"stage": stage})
    config.out = config.out or ("runs/overfit" if config.overfit else f"runs/{config.preset}")
    config.detector_dir = config.detector_dir or config.out
    for item in dataclasses.fields(Config):
        value = getattr(config, item.name)
        least = LEAST.get(item.name, 1) if isinstance(value, int) else 0
        if isinstance(value, (int, float)):
            require(least <= value < math.inf,
                    f"{flag_of(item.name)} {value}: expected a number, {least} or more")
    require(0 < config.crop <= 1, f"--crop {config.crop}: expected a share above 0, at most 1")
    with data.expecting(f"--short-side {config.short_side}: expected lowest,highest,step"):
        lowest, highest, step = config.short_side
        if not 0 < lowest <= highest or step < 1:
            raise ValueError("none between lowest and highest")
    sizes = "--vit-width, --vit-heads, --vit-patch, --image-size" if stage == "rice" else "--dim"
    # Building the model raises where sizes do not fit. On "meta" it takes no memory.
    with data.expecting(f"{sizes}: do not fit together"), torch.device("meta"):
        evaluation.build_model(config, classes=1, vocab=600)
    return config


def flag_of(name):
    return f"--{name.replace('_', '-')}"


# ---- stages


@dataclass
class Stage:
    """What the loop trains, and on what."""
    model: nn.Module
    extras: dict                # what a checkpoint holds besides weights
    dataset: torch.utils.data.Dataset
    epoch_order: Callable       # random generator -> the items of an epoch
    collate: Callable = None    # items -> batch; None: PyTorch's own


def build_stage(config, saved, device):
    """-> Stage. saved: the checkpoint that the run goes on from, or None."""
    split = data.LPRSplit(config.data, "train")
    evaluation.print_notes(split)
    if config.overfit:
        split.subset(config.overfit)
    if config.stage == "rice":
        return build_rice(config, split, saved, device)
    return build_detector(config, split)


def build_detector(config, split):
    """SD on single frames, or MD on clips on top of the SD of --detector-dir."""
    require(split.categories, f"{config.data}: no training row names a category (columns 6 and 7)")
    extras = {"categories": split.categories}
    frames = 1
    if config.stage == "md":
        sd, frames = load_finished(config, "sd"), config.frames
        extras["base"] = evaluation.fingerprint(sd)
        require(sd["categories"] == split.categories,
                f"{config.detector_dir}/sd.pt has the categories {sd['categories']}, "
                f"{config.data} has {split.categories}")
        for name in SD_FIELDS:           # whatever the flags say
            setattr(config, name, getattr(sd["config"], name))
    model = evaluation.build_model(config, len(split.categories))
    if config.stage == "md":
        model.sd.load_state_dict(sd["model"])
    dataset = data.FrameDataset(
        split, split.categories, frames, config.short_side, config.long_side, train=True,
        seed=config.seed, augment=not config.overfit)
    return Stage(model, extras, dataset, lambda rng: rng.permutation(len(dataset)),
                 data.collate_detection)


def build_rice(config, split, saved, device):
    """RICE on clips and their shop images, through the boxes of --box-source."""
    vocabulary = saved["tokenizer"] if saved else train_vocabulary(config, split)
    tokenizer = data.Tokenizer(vocabulary, config.text_length)
    model = evaluation.build_model(config, len(split.categories), tokenizer.vocab)
    extras = {"categories": split.categories, "tokenizer": vocabulary}
    boxes = None
    if config.box_source == "true":
        boxes = data.true_boxes(split)
    elif config.box_source != "none":
        detector = load_finished(config, config.box_source)
        extras["base"] = evaluation.fingerprint(detector)
        extras["detector"] = {"config": vars(detector["config"]), "model": detector["model"],
                              "categories": detector["categories"]}
        rows = evaluation.predict_boxes(detector, split, config.detector_dir, device, False)
        boxes = evaluation.boxes_by_clip(rows, config.box_source, len(split))
    dataset = data.ClipDataset(
        split, tokenizer, config.train_frames, config.image_size, boxes, train=True,
        seed=config.seed, text=config.text, augment=not config.overfit, crop=config.crop)
    order = data.grouped_epoch_order(split.live[dataset.clips], config.per_live)
    return Stage(model, extras, dataset, order)


def train_vocabulary(config, split):
    """The tokenizer's model from the titles and ASR of at most 10,000 clips, empty for --text
    none."""
    texts = []
    if config.text != "none":
        for i in range(0, len(split), 1 + len(split) // 10_000):
            clip = split.clip(i)
            texts += [clip.title, clip.asr]
    return data.train_tokenizer(texts, config.vocab)


def load_finished(config, stage):
    """The checkpoint of an earlier stage at its last step; BadInput says how to get there."""
    path = f"{config.detector_dir}/{stage}.pt"
    command = f"`train.py --stage {stage} --preset {config.preset} --data {config.data}`"
    others = "--detector-dir" if config.stage == "md" else "--detector-dir or --box-source none"
    require(Path(path).exists(), f"{path}: missing; --stage {config.stage} needs a trained "
            f"{stage.upper()}: run {command} first, or give {others}")
    checkpoint = evaluation.load_checkpoint(path)
    step, steps = checkpoint["step"], checkpoint["config"].steps
    require(step == steps, f"{path}: at step {step} of {steps}; finish it by {command}")
    return checkpoint


def to_device(batch, config, device, step):
    """A batch on the device, pictures normalised."""
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if config.stage != "rice":
        frames = data.normalize(batch["frames"], data.IMAGENET, batch["padding_mask"])
        return batch | {"frames": frames}
    for name in ("frames", "image"):
        batch[name] = data.normalize(batch[name], data.CLIP)
    return batch | {"seed": config.seed * 1_000_003 + step}


# ---- a step


class LossModule(nn.Module):
    """What DDP wraps: a module whose forward is the loss of a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)


def make_optimizer(model, config):
    """AdamW. Backbone and image encoder have a learning rate of their own; biases of RICE do not
    decay, as in the public code."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = config.backbone_lr if name.startswith(("backbone.", "visual.")) else config.lr
            no_decay = config.stage == "rice" and name.endswith("bias")
            decay = 0.0 if no_decay else config.weight_decay
            groups.setdefault((lr, decay), []).append(parameter)
    return torch.optim.AdamW([{"params": parameters, "peak": lr, "weight_decay": decay}
                              for (lr, decay), parameters in groups.items()],
                             eps=config.adam_eps, fused=True)


def lr_factor(step, config):
    """Factor on the peak learning rate, a pure function of the step."""
    warmup_factor = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    progress = step / config.steps
    if progress < config.decay_start:
        return warmup_factor
    if config.schedule == "drop":
        return warmup_factor * 0.1
    decay = (progress - config.decay_start) / (1 - config.decay_start)
    return warmup_factor * 0.5 * (1 + math.cos(math.pi * decay))


def forward_backward(module, optimizer, batch, config, device, step):
    """The gradient of a batch, in --accum parts one after the other -> loss, and {term: value} of
    the last part."""
    optimizer.zero_grad()
    size = len(batch["clip"]) // config.accum
    total = 0.0
    for n in range(config.accum):
        part = {name: value[n * size:(n + 1) * size] for name, value in batch.items()}
        defer_sync = n + 1 < config.accum and isinstance(module, DistributedDataParallel)
        with module.no_sync() if defer_sync else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, terms = module(to_device(part, config, device, step * config.accum + n))
            (loss / config.accum).backward()
        total += loss.detach() / config.accum
    return total, terms


def take_step(module, optimizer, batch, config, device, step):
    """One step of AdamW -> {metric: tensor}."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_factor(step, config)
    loss, terms = forward_backward(module, optimizer, batch, config, device, step)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    optimizer.step()
    return {"loss": loss, **terms, "norm": norm}


# ---- the loop


def train(config, rank, world, device):
    """Train a stage to its last step, from its checkpoint if there is one -> False when it was
    complete already."""
    path = Path(config.out) / f"{config.stage}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    saved = evaluation.load_checkpoint(path) if path.exists() else None
    steps_there = evaluation.all_gather_object(saved["step"] if saved else -1)
    require(len(set(steps_there)) == 1,
            f"{path}: not the same for all processes; --out must be on shared storage")
    if saved and is_finished(config, saved, path):
        return False
    stage = build_stage(config, saved, device)
    model, extras = stage.model, stage.extras
    items = len(stage.dataset)
    config.steps = config.steps or max(1, int(config.epochs * items / config.batch))
    extras["versions"] = {"torch": str(torch.__version__), "torchvision": torchvision.__version__}
    extras["left_out"] = stage.dataset.split.notes
    optimizer, start, best = init_or_resume(model, config, saved, extras, path, device)
    module = LossModule(model.train())
    if world > 1:
        module = DistributedDataParallel(module, [device] if device.type == "cuda" else None)
    batches = data.training_batches(
        stage.epoch_order, config.batch, config.steps, start, config.seed, rank, world)
    loader = data.make_loader(stage.dataset, batches, config.workers, device, stage.collate)
    bar = data.progress_bar(text=f"train {config.stage}", show=rank == 0,
                            total=config.steps * config.batch, initial=start * config.batch,
                            unit="frame" if config.stage == "sd" else "clip")
    for step, batch in enumerate(loader, start):
        metrics = take_step(module, optimizer, batch, config, device, step)
        bar.update(config.batch)

        log_now = is_due(config.log_every, step, config)
        save_now = is_due(config.save_every, step, config)
        evaluate_now = is_due(config.eval_every, step, config)
        if log_now or save_now or evaluate_now:
            # Reduced over all processes, so that all of them stop at the same step.
            values = reduce_metrics(metrics, world)
            require(math.isfinite(values["loss"] + values["norm"]),
                    f"{config.stage}, step {step + 1}: not finite: {values}; try a lower --lr, or "
                    f"float32. {path}, if there, is the last good state")
            shown = {name: f"{value:.3g}" for name, value in values.items() if name != "norm"}
            bar.set_postfix(shown)
        if log_now:
            write_log(path, {"step": step + 1, "lr": config.lr * lr_factor(step, config), **values})
        if save_now or evaluate_now:
            # No random generator's state: all that is drawn is a function of (seed, step) or
            # (seed, epoch, i).
            checkpoint = {"config": vars(config), "step": step + 1, "best": best, **extras,
                          "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if evaluate_now:
            best = checkpoint["best"] = validate(model, checkpoint, path, device)
        if save_now:
            save(path, checkpoint)
    bar.close()
    evaluation.barrier()        # torchrun ends all processes when one ends: wait until rank 0 saved
    return True


def is_due(every, step, config):
    """Whether something is done after this step: every so many, and after the last; 0: never."""
    return every > 0 and ((step + 1) % every == 0 or step + 1 == config.steps)


def reduce_metrics(values, world):
    """{name: tensor} -> {name: number}, the mean over all processes."""
    numbers = torch.stack([value.detach().float() for value in values.values()])
    if world > 1:
        dist.all_reduce(numbers)
    return dict(zip(values, (numbers / world).tolist()))


def write_log(path, line):
    if is_main_process():
        with open(path.with_suffix(".jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


def validate(model, checkpoint, path, device):
    """Evaluate on the val lives: a line of the log, and STAGE-best.pt when none was better -> the
    best value so far."""
    model.eval()
    metric = evaluation.validation_metric(model, checkpoint, path.parent, device)
    model.train()
    write_log(path, {"step": checkpoint["step"], **metric})
    (value,) = metric.values()
    if value > checkpoint["best"]:
        save(path.with_name(f"{path.stem}-best.pt"), checkpoint | {"best": value})
    return max(checkpoint["best"], value)


# ---- checkpoints and resuming


def save(path, checkpoint):
    """Write to a temporary file, then rename: a killed process or a full disk leaves the
    checkpoint before this one."""
    if is_main_process():
        try:
            with data.atomic_write(path) as temporary:
                torch.save(checkpoint, temporary)
        except RuntimeError as error:            # torch's own writer
            reason = str(error).splitlines()[0]
            raise BadInput(f"{path}: cannot be written, is the disk full? The checkpoint before it "
                           f"is whole ({reason})") from None


def config_diff(config, saved):
    """What differs from the configuration of a checkpoint and would change the weights."""
    ignored = MAY_CHANGE_ON_RESUME | (SD_FIELDS if config.stage == "md" else set())
    ignored = ignored if config.steps else ignored | {"steps"}         # counted from --epochs
    there = vars(Config()) | vars(saved)
    return [f"{name}: {there[name]} there, {value} here" for name, value in vars(config).items()
            if name not in ignored and value != there[name]]


def is_finished(config, saved, path):
    """Whether a checkpoint is the last of this very run; BadInput when the detector that it was
    trained on has changed since."""
    if saved["step"] != saved["config"].steps or config_diff(config, saved["config"]):
        return False
    base = f"{config.detector_dir}/{'sd' if config.stage == 'md' else config.box_source}.pt"
    if "base" in saved and Path(base).exists():
        require(evaluation.fingerprint(evaluation.load_checkpoint(base)) == saved["base"],
                f"{path} was trained on another {base}; remove it, or give --out")
    return True


def init_or_resume(model, config, saved, extras, path, device):
    """Weights of the checkpoint, of --init, or as they are -> optimizer, first step, best value."""
    message = ""
    if saved:
        changed = config_diff(config, saved["config"])
        changed += [name for name in ("categories", "base") if saved.get(name) != extras.get(name)]
        hint = "" if config.stage == "md" else f", with --init {path} to go on from its weights"
        require(not changed, f"{path} was made otherwise ({'; '.join(changed)}); give --out for a "
                f"new run{hint}")
        model.load_state_dict(saved["model"])
        message = f"{path}: goes on from step {saved['step']} of {config.steps}"
    elif config.init not in ("", "none"):
        message = load_public_weights(model, config.init)
    optimizer = make_optimizer(model.to(device), config)
    start = 0
    if saved:
        start = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
    if is_main_process():
        # What a stopped run logged after its last checkpoint is logged anew.
        log = path.with_suffix(".jsonl")
        lines = log.read_text().splitlines(True) if start and log.exists() else []
        kept = [line for line in lines
                if line.endswith("\n") and json.loads(line)["step"] <= start]
        data.write_text(log, "".join(kept))
        if message:
            print(message)
    return optimizer, start, saved["best"] if saved else -1.0


# ---- public weights


def load_public_weights(model, path):
    """Load DAB-DETR, a torchvision ResNet (SD's backbone), OpenAI's CLIP (RICE's image encoder, as
    a state dict) or our own checkpoint by name and shape. Heads of other classes or words start
    anew; any other difference is an error. -> a line that says what was loaded"""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):   # DETR's files hold flags
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key.removeprefix("module."): value.float()
                 for key, value in state.get("model", state).items()}
    except Exception as error:           # torch.load raises whatever the bytes lead to
        raise BadInput(f"{path}: no state dict of tensors ({type(error).__name__})") from None
    prefix = ""                                    # of the part of our model that it fills
    if "layer4.0.conv1.weight" in state:           # a ResNet
        prefix = "backbone.0.body."
        state = {prefix + key: value for key, value in state.items() if not key.startswith("fc.")}
    elif "visual.proj" in state and "text_proj.weight" not in state:      # CLIP
        prefix = "visual."
        state = {key: value for key, value in state.items() if key.startswith(prefix)}
        positions = state["visual.positional_embedding"]
        positions = rice.interpolate_pos_embed(positions, model.visual.grid)
        state["visual.positional_embedding"] = positions
    own = {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
    for key in own.keys() - state.keys():
        # The box head has two names in our model; a file may hold it under one.
        if key.removeprefix("transformer.decoder.") in state:
            state[key] = state[key.removeprefix("transformer.decoder.")]
    loaded = {key: value for key, value in state.items()
              if key in own and value.shape == own[key].shape}
    anew = sorted(own.keys() - loaded.keys())
    wrong = [key for key in anew if "class_embed" not in key and not key.startswith("text.token")]
    wrong += [key for key in state if key not in own and not key.endswith("num_batches_tracked")]
    require(not wrong, f"{path}: missing, left over or of another shape: {', '.join(wrong[:8])}")
    model.load_state_dict(loaded, strict=False)
    return (f"{path}: loaded {len(loaded)} tensors; made anew for other classes or words: "
            f"{', '.join(anew) or 'none'}")


# ---- the command


def check_before(configs, world):
    """BadInput for what would stop a stage, before anything is rendered or trained."""
    first = configs[0]
    for config in configs:
        require(config.batch % (world * config.accum) == 0, f"--batch {config.batch}: expected a "
                f"multiple of {world} processes x --accum {config.accum}")
        # The small backbone and the convolutional stem learn from scratch, MD starts from SD.
        needs_weights = {"sd": config.backbone != "small", "md": False,
                         "rice": config.vit_patch > 0}[config.stage]
        require(config.init or not needs_weights,
                f"--stage {config.stage}: give --init FILE, the public weights that this size "
                "starts from (see README), or --init none")
    if first.init not in ("", "none"):
        require(Path(first.init).is_file(), f"--init {first.init}: no such file")
        require(len(configs) == 1 and first.stage != "md",
                f"--init {first.init}: expected --stage sd or rice beside it; MD starts from the "
                "SD of --detector-dir")
    needs = {"sd": "none", "md": "sd", "rice": first.box_source}[first.stage]
    if needs in ("sd", "md"):
        load_finished(first, needs)


def check_data(configs):
    """BadInput for what a stage would lack when it is trained or judged. One process does this,
    and makes the index."""
    first = configs[0]
    split = data.LPRSplit(first.data, "train")
    for config in configs:
        if config.stage == "rice":
            data.ClipDataset(split, None, config.train_frames, config.image_size, None, train=True)
        else:
            data.FrameDataset(split, split.categories, 1, config.short_side, config.long_side, True)
    judged = ["test", "val"] if first.eval_every else ["test"]
    for name in [] if first.overfit else judged:
        split = data.LPRSplit(first.data, name)
        for config in configs:
            evaluation.check_split(split, config.stage)


def run(given):
    rank, world = evaluation.start_processes()
    device, begin = evaluation.pick_device(), time.time()
    asked_for = given.get("stage", "all")
    configs = [configure(given, stage) for stage in STAGES if asked_for in (stage, "all")]
    check_before(configs, world)
    root = configs[0].data
    path = Path(configs[0].out) / "results.json"
    if rank == 0:
        if root == RENDERED and not Path(root).exists():
            data.render(root)
        check_data(configs)
    evaluation.barrier()
    results = json.loads(path.read_text()) if path.exists() else {}
    for config in configs:
        file = f"{config.out}/{config.stage}.pt"
        trained = train(config, rank, world, device)
        result = results.get(config.stage)
        if result and not trained:
            # Evaluated before: once more only when the test data have changed since.
            if result["files"] == evaluation.stamp_of_files(root, result["split"]):
                if rank == 0:
                    print(f"{config.stage}: done before ({file})")
                    evaluation.show(result)
                continue
        results[config.stage], predicted = evaluation.evaluate(file, workers=config.workers)
        if rank == 0:
            evaluation.show(results[config.stage])
            data.write_text(path, json.dumps(results, indent=1))
            curves = evaluation.draw_curves(f"{config.out}/{config.stage}.jsonl",
                                            f"{config.out}/{config.stage}.png")
            print(f"\npictures: {evaluation.draw_examples(predicted, config.out)}, {curves}")
    if rank == 0:
        print(f"\nall done after {(time.time() - begin) / 60:.1f} minutes: {path}")


def int_list(text):
    return [int(number) for number in text.split(",")]


def tiny_preset():
    """What --preset tiny changes, as lines of the help."""
    lines = ["[defaults] are the paper's; --preset tiny changes:"]
    for stage, values in PRESETS["tiny"].items():
        flags = [f"{flag_of(name)}\0{default_text(value)}" for name, value in values.items()]
        lines.append(textwrap.fill(f"{stage}: {', '.join(flags)}", 79, initial_indent="  ",
                                   subsequent_indent="    ", break_on_hyphens=False))
    return "\n".join(lines).replace("\0", " ")          # a value stays beside its flag


def default_text(value):
    return str(value).strip("[]").replace(" ", "")


def main(argv=None):
    parser = data.Parser(
        usage="train.py [--FLAG VALUE ...]", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train SD, MD and RICE; with no flag: the whole quickstart.",
        epilog=tiny_preset())
    for item in dataclasses.fields(Config):
        about, default = item.metadata, default_text(item.metadata["default"])
        group = parser.add_argument_group(about["group"]) if about["group"] else group
        choices = about["choices"] or ()
        text = about["help"] + (f": {' | '.join(choices)}" if 0 < len(choices) < 5 else "")
        group.add_argument(flag_of(item.name), type=int_list if item.type is list else item.type,
                           metavar="X", choices=about["choices"], default=argparse.SUPPRESS,
                           help=text + (f" [{default}]" if default else ""))
    try:
        data.run_command(run, vars(parser.parse_args(argv)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
