"""How fast: our code beside the public packages, the same work in one run.

    python tests/bench.py                             every row that needs no other package
    python tests/bench.py --peer-python OTHER/python  and the peers, from an environment of
                                     torch, transformers, timm, scipy, faster-coco-eval
    python tests/bench.py --before OLD                and an earlier copy of this project
    python tests/bench.py --rows sd,ap --repeats 9 --json FILE    some rows; all figures as JSON
    python tests/bench.py --gpu                       instead: training steps on a CUDA device
    python tests/bench.py --race OLD                  instead: the whole quickstart and that of an
                                                      earlier copy, in turns of ten seconds
    python tests/bench.py --profile runs/livestreams  instead: where a training step's time goes

Each contender is a process of its own, built once and warmed up by one turn. Then all of a row take
turns. The table shows the median (lowest - highest) of the turns and the peak memory of the
process. A ratio is ours over the other's, of the medians. OLD may be the first edition.
"""
import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF

HERE, THREADS, FIRST_EDITION = Path(__file__).resolve().parent.parent, 2, False
PEERS = "transformers", "transformers, bf16", "faster-coco-eval, AP"
if sys.argv[-1] not in PEERS:                      # their python need not have what we import
    sys.path.insert(0, os.environ.get("BENCH_CODE", str(HERE)))
    import data
    import detect
    import eval as evaluation
    import rice
    import train
    FIRST_EDITION = hasattr(evaluation, "keep_memory")
if FIRST_EDITION:                                  # by the names of the second
    evaluation.keep_memory()                       # as its commands do
    evaluation.build_model = lambda config, *sizes: evaluation.build(vars(config), *sizes)
    train.LossModule, train.make_optimizer = train.Step, train.optimizer_of

# ------------------------------------------------------------------ works: each returns its turn


def detector_batch(B, T, height, width):
    """A batch as data.collate_detection makes it, random, one box a frame."""
    frames = torch.randint(255, (B, T, height, width, 3), dtype=torch.uint8).movedim(-1, 2)
    mask = "padding" if FIRST_EDITION else "padding_mask"
    return {"frames": frames, mask: torch.zeros(B, T, height, width, dtype=torch.bool),
            "valid": torch.ones(B, T, dtype=torch.bool), "labels": torch.randint(34, (B, T, 1)),
            "boxes_cxcywh": torch.rand(B, T, 1, 4) / 3 + 0.3, "clip": torch.arange(B)}


def rice_batch(B, T, side, patches, tokens):
    """A batch of data.ClipDataset, random, each pair of a product of its own."""
    frames = torch.randint(255, (B, T, 3, side, side), dtype=torch.uint8)
    asr, title = torch.randint(2, 2000, (2, B, tokens))
    batch = {"frames": frames, "valid": torch.ones(B, T, dtype=torch.bool), "asr": asr,
             "image": frames[:, 0].clone(), "title": title, "clip": torch.arange(B)}
    if FIRST_EDITION:
        seen = torch.ones(B, T, patches, dtype=torch.bool)
        return batch | {"product": torch.arange(B), "keep": seen}
    return batch | {"product_id": torch.arange(B)}


def training_step(stage, preset="tiny", batch=0, size=None, device="cpu", precision="float32"):
    """A step of train.py without its loader. batch: 0: the preset's. size: of the frames; None:
    those of the preset in turns, 80 x 80, in the first edition 96 x 96 too."""
    given = {"preset": preset, "precision": precision} | ({"batch": batch} if batch else {})
    config = train.configure(given, stage)
    if FIRST_EDITION:
        config.short_side, config.image_size, config.text_length = config.shortest, config.size, 24
    model = evaluation.build_model(config, 34, 2000).train().to(device)
    module, optimizer = train.LossModule(model), train.make_optimizer(model, config)
    if stage == "rice":
        shape = config.train_frames, config.image_size, model.visual.grid ** 2, config.text_length
        batches = [rice_batch(config.batch, *shape)]
    else:
        low, high, step = config.short_side
        sizes = [size] if size else [(side, side) for side in range(low, high + 1, step)]
        frames = 1 if stage == "sd" else config.frames
        batches = [detector_batch(config.batch, frames, *size) for size in sizes]
    if device == "cuda":
        batches = [{name: x.pin_memory() for name, x in batch.items()} for batch in batches]
    batches, device = itertools.cycle(batches), torch.device(device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def take_step():
        train.forward_backward(module, optimizer, next(batches), config, device, 0)
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
    return take_step


def optimizer_step(model, loss):
    """A step by the loss that loss() gives."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-6, fused=True)

    def take_step():
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
    return take_step


def pictures(batch, height, width):
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    return torch.randn(batch, 3, height, width), mask


def sd_inference(batch, height, width):
    model, (images, mask) = detect.SD(classes=91).eval(), pictures(batch, height, width)
    return torch.inference_mode()(lambda: model(images, mask))


def md_inference():
    model, (images, mask) = detect.MD(detect.SD(classes=91)).eval(), pictures(10, 480, 640)
    clip = images[None], mask[None], torch.ones(1, 10, dtype=torch.bool)
    return torch.inference_mode()(lambda: model(*clip))


def encoder_step():
    """RICE's image encoder alone, on the pictures of 4 clips and their shop images."""
    encoder, images = rice.ViT().train(), torch.rand(4 * 11, 3, 224, 224)
    return optimizer_step(encoder, lambda: encoder(images)[0].square().sum())


def truth_and_detections(frames):
    """A detection a frame; a true box a frame and a third of them more."""
    rng = np.random.default_rng(0)
    image = np.concatenate([np.arange(frames), rng.integers(frames, size=frames // 3)])
    corner, category = rng.uniform(0, 400, (len(image), 2)), rng.integers(34, size=len(image))
    box = np.concatenate([corner, corner + rng.uniform(10, 200, (len(image), 2))], 1)
    near = box[:frames] + np.tile(rng.normal(0, 8, (frames, 2)), 2)
    wrong, other = rng.random(frames) < 0.4, rng.integers(34, size=frames)
    found = {"image": image[:frames], "category": np.where(wrong, other, category[:frames]),
             "box_xyxy": near, "score": rng.random(frames)}
    return {"image": image, "category": category, "box_xyxy": box}, found


def table_1_row(frames):
    """All columns of Table 1: AP, AP50, AP75, and AP50 in three times three parts."""
    truth, found = truth_and_detections(frames)
    rng, names = np.random.default_rng(1), evaluation.COLUMNS_1[3:]
    parts = {name: rng.random(frames) < 1 / 3 for name in names}
    return lambda: evaluation.table_1_row(truth, found, parts)


def search(products_alone=False):
    """Plain torch, as a user of the embeddings would write it."""
    clips, images = normalize(torch.randn(20_079, 512)), normalize(torch.randn(66_358, 512))

    def rank():
        for queries in clips.split(1024):
            similarity = queries @ images.T
            if not products_alone:
                similarity.topk(10)
    return rank


def jpeg(decode_and_resize_alone=False):
    """40 files as a detector gets them: found, checked, decoded, resized, put into batches of 8.
    No batch is kept, nor a picture of the work beside it."""
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    paths = [Path(folder.name, f"frames/live-0-{n}-0.jpg") for n in range(40)]
    asr = Path(folder.name, "annotations/test_videoid_asr_all.txt")
    for path in (paths[0], asr):
        path.parent.mkdir()
    asr.write_text("".join(f"live-0-{n}\t\n" for n in range(40)))
    for path in paths:                             # smooth pictures with some noise
        smooth = TF.resize(torch.randint(255, (3, 27, 48)).float(), (540, 960))
        noisy = (smooth + torch.randint(-12, 12, smooth.shape)).clamp(0, 255).byte()
        torchvision.io.write_jpeg(noisy, str(path), 90)
    dataset = data.FrameDataset(data.LPRSplit(folder.name, "test"), [0], 1, (480, 480, 1), 1333)

    def load():
        for keys in data.evaluation_batches(range(40), 8):
            data.collate_detection([dataset[key] for key in keys])

    def decode_and_resize():
        for path in paths:
            image = torchvision.io.decode_jpeg(torchvision.io.read_file(str(path)))
            TF.resize(image, (480, 853), antialias=True)
    load.folder = decode_and_resize.folder = folder    # it lasts as long as they do
    return decode_and_resize if decode_and_resize_alone else load


def products(dtype):
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=dtype)
    return lambda: a @ b


def peer_detector(batch, height, width, training=False, device="cpu", bf16=False):
    from transformers import DabDetrConfig, DabDetrForObjectDetection
    config = DabDetrConfig(use_pretrained_backbone=False, num_labels=91)
    model = DabDetrForObjectDetection(config).train(training).to(device)
    images, padding = (x.to(device) for x in pictures(batch, height, width))
    given = {"pixel_values": images, "pixel_mask": (~padding).long()}
    if not training:
        return torch.inference_mode()(lambda: model(**given))
    labels = [{"class_labels": torch.randint(91, (1,), device=device),
               "boxes": torch.rand(1, 4, device=device) / 3 + 0.3} for _ in images]

    def loss():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return model(**given, labels=labels).loss
    return optimizer_step(model, loss)


def peer_ap(frames):
    from faster_coco_eval import COCO, COCOeval_faster
    truth, found = truth_and_detections(frames)
    for side in (truth, found):
        side["box_xyxy"][:, 2:] -= side["box_xyxy"][:, :2]           # x, y, w, h from here on
    rows = zip(*(column.tolist() for column in truth.values()))
    annotations = [{"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3],
                    "iscrowd": 0} for n, (i, c, b) in enumerate(rows, 1)]
    rows = zip(*(column.tolist() for column in found.values()))
    answers = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in rows]
    dataset = {"images": [{"id": i} for i in range(frames)],
               "categories": [{"id": c} for c in range(34)], "annotations": annotations}

    def judge():
        with contextlib.redirect_stdout(io.StringIO()):
            judged = COCO(dataset)
            run = COCOeval_faster(judged, judged.loadRes(answers), "bbox")
            run.evaluate()
            run.accumulate()
            run.summarize()
    return judge


# ------------------------------------------------------------------ the rows
# name: (what it is, aim of ours / theirs, our work, {who: their work})

ROWS = {
    "sd": ("SD, 2 pictures of 480 x 640", "0.65", (sd_inference, 2, 480, 640),
           {"transformers": (peer_detector, 2, 480, 640)}),
    "sd-large": ("SD, 1 picture of 800 x 1066", "0.65", (sd_inference, 1, 800, 1066),
                 {"transformers": (peer_detector, 1, 800, 1066)}),
    "sd-step": ("SD, a training step, 2 pictures of 480 x 640", "0.65",
                (training_step, "sd", "paper", 2, (480, 640)),
                {"transformers": (peer_detector, 2, 480, 640, True)}),
    "md": ("MD, 10 frames of 480 x 640", "1.10", (md_inference,),
           {"SD": (sd_inference, 10, 480, 640)}),
    "ap": ("a row of Table 1, 62,500 frames", "0.10", (table_1_row, 62_500),
           {"faster-coco-eval, AP": (peer_ap, 62_500)}),
    "ap-large": ("the same, 500,000 frames; aim: under 1 GB", "0.10", (table_1_row, 500_000),
                 {"faster-coco-eval, AP": (peer_ap, 500_000)}),
    "search": ("first 10 of 66,358 images for 20,079 clips", "1.20", (search,),
               {"products alone": (search, True)}),
    "jpeg": ("40 JPEG of 540 x 960 to batches, one core", "1.15", (jpeg,),
             {"decode + resize": (jpeg, True)}),
    "rice": ("RICE, a training step, 4 clips of 10 frames", "1.15",
             (training_step, "rice", "paper", 4), {"encoder alone": (encoder_step,)}),
    "tiny-sd": ("quickstart, 5 steps of SD", "", (training_step, "sd"), {}),
    "tiny-md": ("quickstart, 5 steps of MD", "", (training_step, "md"), {}),
    "tiny-rice": ("quickstart, 5 steps of RICE", "", (training_step, "rice"), {})}
GPU_SD = training_step, "sd", "paper", 8, (800, 1344), "cuda"      # one of eight devices; padded
GPU_MD = training_step, "md", "paper", 8, (800, 1344), "cuda"
GPU_RICE = training_step, "rice", "paper", 12, None, "cuda"
GPU_ROWS = {
    "gpu-products": ("5 products of 8192^3, bf16", "", (products, torch.bfloat16),
                     {"float32": (products, torch.float32)}),
    "gpu-sd": ("SD, 5 steps, 8 pictures of 800 x 1333, bf16", "", (*GPU_SD, "bf16"),
               {"float32": GPU_SD,
                "transformers": (peer_detector, 8, 800, 1344, True, "cuda"),
                "transformers, bf16": (peer_detector, 8, 800, 1344, True, "cuda", True)}),
    "gpu-md": ("MD, 5 steps, 8 clips, bf16", "", (*GPU_MD, "bf16"), {"float32": GPU_MD}),
    "gpu-rice": ("RICE, 5 steps, 12 clips, bf16", "", (*GPU_RICE, "bf16"), {"float32": GPU_RICE})}
ALL_ROWS = ROWS | GPU_ROWS
WITH_BEFORE = "sd", "sd-large", "sd-step", "md", "rice", "tiny-sd", "tiny-md", "tiny-rice"

# ------------------------------------------------------------------ taking turns


class Contender:
    """A process that holds one work ready and does it once whenever it is asked."""

    def __init__(self, row, who, python, code):
        env = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONWARNINGS": "ignore",
                            "BENCH_CODE": str(code)}
        self.process = subprocess.Popen([python, __file__, "--work", row, who], env=env, cwd=code,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.turns = []

    def turn(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{' '.join(self.process.args)}: failed")
        self.turns.append(json.loads(answer))

    def leave(self):
        self.process.stdin.close()
        self.process.wait()
        seconds = [turn["seconds"] for turn in self.turns[1:]]         # the first warms up
        return self.turns[-1] | {"median": float(np.median(seconds)), "lowest": min(seconds),
                                 "highest": max(seconds)}


def work(row, who):
    """The other end of a Contender."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    _, _, ours, others = ALL_ROWS[row]
    make, *arguments = others.get(who, ours)
    once, tflop, on_gpu = make(*arguments), 0, row in GPU_ROWS
    calls = 5 if row.startswith(("tiny", "gpu")) else 1
    if on_gpu:
        with FlopCounterMode(display=False) as counter:
            once()
        tflop = calls * counter.get_total_flops() / 1e12
        torch.cuda.reset_peak_memory_stats()
    for _ in sys.stdin:
        begin = time.perf_counter()
        for _ in range(calls):
            once()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        if on_gpu:
            memory = torch.cuda.max_memory_allocated() / 2 ** 30
            torch.cuda.empty_cache()               # for the others of the row
        print(json.dumps({"seconds": seconds, "memory_gb": memory, "tflop": tflop}), flush=True)


def measure(row, repeats, peer_python, before):
    """{who: figures} of a row."""
    places = {"ours": (sys.executable, HERE)}
    for who in ALL_ROWS[row][3]:
        if peer_python or who not in PEERS:
            places[who] = peer_python if who in PEERS else sys.executable, HERE
    if before and row in WITH_BEFORE:
        places["before"] = sys.executable, Path(before).resolve()
    contenders = {who: Contender(row, who, *place) for who, place in places.items()}
    for _ in range(1 + repeats):
        for contender in contenders.values():
            contender.turn()
    return {who: contender.leave() for who, contender in contenders.items()}


def compare(names, repeats, peer_python, before):
    rows, result = [], {}
    for name in names:
        text, aim, _, others = ALL_ROWS[name]
        result[name] = figures = measure(name, repeats, peer_python, before)
        for who, figure in figures.items():
            clock = "{median:.3g} s ({lowest:.3g} - {highest:.3g})".format(**figure)
            print(f"{name}: {who} {clock}", file=sys.stderr, flush=True)
            ratio = "" if who == "ours" else f"{figures['ours']['median'] / figure['median']:.3f}"
            rate = f"{figure['tflop'] / figure['median']:.0f}" if figure["tflop"] else ""
            rows.append((text if who == "ours" else "", who, clock,
                         f"{figure['memory_gb']:.2f} GB", rate, ratio,
                         aim if who in others else ""))
    header = "work", "who", "time", "peak memory", "TFLOP/s", "ours / theirs", "aim: at most"
    print(evaluation.table(header, rows, True))
    return result


def start_quickstart(code, folder):
    """`python train.py` in a folder of its own, stopped until its first turn."""
    folder.mkdir()
    with open(folder / "said", "w") as said:
        process = subprocess.Popen([sys.executable, code / "train.py"], cwd=folder, stdout=said,
                                   stderr=said, start_new_session=True)
    os.killpg(process.pid, signal.SIGSTOP)
    return process


def race(before, turn=10):
    """Seconds that `python train.py` runs until each stage has its results, ours and an earlier
    copy's. While one runs the other is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))      # nothing stays behind
    running, marks, seconds = {}, {"ours": {}, "before": {}}, Counter()
    with tempfile.TemporaryDirectory() as root:
        try:
            for who, code in (("ours", HERE), ("before", Path(before).resolve())):
                running[who] = start_quickstart(code, Path(root, who))
            while running:
                for who, process in list(running.items()):
                    begin = time.perf_counter()
                    os.killpg(process.pid, signal.SIGCONT)
                    try:
                        process.wait(turn)
                        del running[who]
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGSTOP)
                    seconds[who] += time.perf_counter() - begin
                    results = Path(root, who, "runs/tiny/results.json")
                    for stage in json.loads(results.read_text()) if results.exists() else ():
                        marks[who].setdefault(stage, seconds[who])
                    if process.returncode:
                        sys.exit(f"{who}: {Path(root, who, 'said').read_text()[-1000:]}")
        finally:
            for process in running.values():
                os.killpg(process.pid, signal.SIGKILL)
    rows = [(who, *(f"{mark:.0f}" for mark in marks[who].values())) for who in marks]
    ratios = [f"{mark / marks['before'][stage]:.3f}" for stage, mark in marks["ours"].items()]
    rows.append(("ours / before", *ratios))
    print(evaluation.table(("seconds until the results of", *marks["ours"]), rows, True))
    return marks


def profile(folder, steps=10):
    """Milliseconds of the parts of a training step of the tiny preset, by torch.profiler."""
    for place, name in ((data, "normalize"), (detect.SD, "features"), (detect.MD, "run_ttm"),
                        (detect, "detection_loss"), (rice.RICE, "encode_images"),
                        (rice.RICE, "encode_clips"), (rice.PMD, "forward"),
                        (torch.Tensor, "backward"), (torch.nn.utils, "clip_grad_norm_")):
        marked = torch.profiler.record_function(f"> {place.__name__}.{name}")
        setattr(place, name, marked(getattr(place, name)))
    known, result, rows = ("> ", "enumerate(DataLoader)", "Optimizer.step"), {}, []
    with tempfile.TemporaryDirectory() as out:
        for stage in train.STAGES:
            given = {"data": folder, "out": out, "steps": steps, "workers": 0, "stage": stage}
            config = train.configure(given | {"box_source": "true"}, stage)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
                train.train(config, 0, 1, evaluation.pick_device())
            events = [event for event in run.events() if event.name.startswith(known)]
            ends = [(event.time_range.start, event.time_range.end) for event in events]
            spent = Counter({"the whole step": np.ptp(ends)})
            for event in events:
                spent[event.name.split("#")[0].strip("> ")] += event.time_range.elapsed_us()
            result[stage] = {name: us / 1000 / steps for name, us in spent.most_common()}
            rows += [(stage, name, value) for name, value in result[stage].items()]
    print(evaluation.table(("stage", "part", "ms a step"), rows, True))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", help=f"some of {', '.join(ALL_ROWS)} [those of a CPU]")
    add("--gpu", action="store_true", help="the rows of a CUDA device")
    add("--repeats", type=int, default=5, help="turns of each contender [5]")
    add("--peer-python", help="the python of an environment that has the public packages")
    add("--before", metavar="OLD", help="folder of an earlier copy of this project")
    add("--json", metavar="FILE", help="write all figures to this file")
    add("--race", metavar="OLD", help="whole quickstarts in turns with that of an earlier copy")
    add("--profile", metavar="DATA", help="where a training step's time goes, on this folder")
    add("--work", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.work:
        return work(*flags.work)
    machine = torch.cuda.get_device_name() if flags.gpu else os.uname().machine
    setting = {"threads": THREADS, "repeats": flags.repeats, "torch": torch.__version__,
               "torchvision": torchvision.__version__, "machine": machine}
    print(", ".join(f"{name} {value}" for name, value in setting.items()), "\n")
    if flags.race:
        result = race(flags.race)
    elif flags.profile:
        result = profile(flags.profile)
    else:
        names = flags.rows.split(",") if flags.rows else GPU_ROWS if flags.gpu else ROWS
        result = compare(names, flags.repeats, flags.peer_python, flags.before)
    if flags.json:
        Path(flags.json).write_text(json.dumps({"setting": setting, "figures": result}, indent=1))


if __name__ == "__main__":
    main()
