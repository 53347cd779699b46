"""How fast: our code beside this machine's limit and beside the public packages, on the same work in one run.

    python tests/bench.py                                         every row that needs no other package
    python tests/bench.py --peer-python OTHER/bin/python          and the peers, from an environment of their own, which has
                                                                  torch, transformers, timm, scipy, faiss-cpu, faster-coco-eval
    python tests/bench.py --before OLD_CHECKOUT                   and an earlier copy of this project
    python tests/bench.py --rows sd,ap --repeats 9 --json FILE    some rows; all figures as JSON
    python tests/bench.py --gpu                                   on a CUDA device instead: training at the paper's sizes; peers as above
    python tests/bench.py --grow                                  instead: each work at 1, 2, 4 and 8 times its size
    python tests/bench.py --race OLD_CHECKOUT                     instead: the whole quickstart beside an earlier copy's, ten seconds each
                                                                  in turns, the other one stopped (about half an hour)
    python tests/bench.py --profile runs/livestreams              instead: where the time of a training step goes (with --before: went)

Each contender is a process of its own, built once, warmed up by one turn; then all of a row take turns, and the table shows the median
(lowest - highest) of the turns and the peak memory of the process. A ratio is ours over the other's, of the medians. All keep the memory
that they free, as train.py and eval.py do, but for the peers, the members of `processes` and an earlier copy that did not yet.
"""
import argparse
import inspect
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
THREADS = 2
CALLS = 20              # of a matcher in one turn

# ------------------------------------------------------------------ our works: each returns what one turn runs; `times` is its size


def sd_model(queries=300):
    import torch
    import detect
    torch.manual_seed(0)
    return detect.SD(classes=91, queries=queries)


def pictures(batch, height, width):
    import torch
    return torch.randn(batch, 3, height, width), torch.zeros(batch, height, width, dtype=torch.bool)


def sd_small_pictures(times):
    import torch
    model, (images, padding) = sd_model(300 * times).eval(), pictures(2, 480, 640)
    return torch.inference_mode()(lambda: model(images, padding))


def sd_large_picture(times):
    import torch
    model, (images, padding) = sd_model(300 * times).eval(), pictures(1, 800, 1066)
    return torch.inference_mode()(lambda: model(images, padding))


def sd_step(times):
    import torch
    model, (images, padding) = sd_model().train(), pictures(2 * times, 480, 640)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-6, fused=True)
    batch = {"frames": images[:, None], "padding": padding[:, None], "labels": torch.randint(91, (len(images), 1, 1)),
             "boxes_cxcywh": torch.rand(len(images), 1, 1, 4) / 3 + 0.3, "valid": torch.ones(len(images), 1, dtype=torch.bool)}

    def step():
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return step


def md_clip(times):
    import torch
    import detect
    model, (images, padding) = detect.MD(sd_model()).eval(), pictures(10 * times, 480, 640)
    return torch.inference_mode()(lambda: model(images[None], padding[None], torch.ones(1, len(images), dtype=torch.bool)))


def sd_clip(times):
    import torch
    model, (images, padding) = sd_model().eval(), pictures(10 * times, 480, 640)
    return torch.inference_mode()(lambda: model(images, padding))


def targets(boxes, queries=300):
    import torch
    torch.manual_seed(0)
    return (torch.randn(1, 16, queries, 34), torch.rand(1, 16, queries, 4) / 2 + 0.2, torch.randint(34, (16, boxes)),
            torch.rand(16, boxes, 4) / 2 + 0.2)


def match_one(times):
    import detect
    case = targets(1, 300 * times)
    return lambda: [detect.match(*case) for _ in range(CALLS)]


def match_three(times):
    import detect
    case = targets(3, 300 * times)
    return lambda: [detect.match(*case) for _ in range(CALLS)]


def plain_match(boxes, times):
    """The public matcher's way: costs of all predictions of the batch to all targets of the batch, then image by image."""
    import torch
    import detect
    from torchvision.ops import box_convert, generalized_box_iou
    logits, predicted, labels, wanted = targets(boxes, 300 * times)

    def match():
        p, b, ids, t = logits[0].flatten(0, 1).sigmoid(), predicted[0].flatten(0, 1), labels.flatten(), wanted.flatten(0, 1)
        negative, positive = 0.75 * p ** 2 * -(1 - p + 1e-8).log(), 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        cost = 5 * torch.cdist(b, t, p=1) + 2 * (positive[:, ids] - negative[:, ids])
        cost = cost - 2 * generalized_box_iou(box_convert(b, "cxcywh", "xyxy"), box_convert(t, "cxcywh", "xyxy"))
        parts = cost.view(16, -1, 16 * boxes).split(boxes, -1)
        return [detect.assign(part[i]) for i, part in enumerate(parts)]
    return lambda: [match() for _ in range(CALLS)]


def truth_and_detections(times):
    import numpy as np
    rng, frames = np.random.default_rng(0), 62_500 * times
    image = np.concatenate([np.arange(frames), rng.integers(frames, size=frames // 3)])
    corner, side = rng.uniform(0, 400, (len(image), 2)), rng.uniform(10, 200, (len(image), 2))
    truth = {"image": image, "category": rng.integers(34, size=len(image)), "box_xyxy": np.concatenate([corner, corner + side], 1)}
    near = truth["box_xyxy"][:frames] + rng.normal(0, 8, (frames, 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    wrong = rng.random(frames) < 0.4
    guess = np.where(wrong, rng.integers(34, size=frames), truth["category"][:frames])
    return truth, {"image": np.arange(frames), "category": guess, "box_xyxy": near, "score": rng.random(frames)}


def ap(times):
    import eval as evaluation
    truth, found = truth_and_detections(times)
    return lambda: evaluation.average_precision(truth, found)


def gallery(times):
    import torch
    torch.manual_seed(0)
    return tuple(torch.nn.functional.normalize(torch.randn(rows, 512), dim=1) for rows in (20_079, 66_358 * times))


def search(times):
    import eval as evaluation
    clips, images = gallery(times)
    return lambda: evaluation.nearest(clips, images, 10)


def products_alone(times):
    import torch
    clips, images = gallery(times)
    room = torch.empty(2048, len(images))
    return lambda: [torch.mm(part, images.T, out=room[:len(part)]) for part in clips.split(2048)] and None


def lives(times):
    """Per-live rank-k as eval.py has it after the embeddings: 110 lives, 20,079 clips, 66,358 images in all."""
    import numpy as np
    import torch
    import eval as evaluation
    clips, images = gallery(1)
    clips, images = clips.repeat(times, 1), images.repeat(times, 1)
    parts = list(zip(np.array_split(np.arange(len(clips)), 110 * times), np.array_split(np.arange(len(images)), 110 * times)))

    def rank():
        for queries, ids in parts:
            positive = np.zeros((len(queries), len(ids)), bool)
            positive[np.arange(len(queries)), np.arange(len(queries)) % len(ids)] = True
            evaluation.rank_k((clips[queries[0]:queries[-1] + 1] @ images[ids[0]:ids[-1] + 1].T).numpy(), positive)
    return torch.inference_mode()(rank)


def photos(times):
    """JPEG files of 540 x 960 in the layout: smooth pictures with some noise, quality 90."""
    import numpy as np
    from PIL import Image
    folder, rng = Path(tempfile.mkdtemp()), np.random.default_rng(0)
    (folder / "frames").mkdir()
    for n in range(40 * times):
        small = Image.fromarray(rng.integers(0, 255, (27, 48, 3), np.uint8)).resize((960, 540), Image.Resampling.BICUBIC)
        noisy = np.asarray(small, np.int16) + rng.integers(-12, 12, (540, 960, 3), np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"frames/{n}.jpg", quality=90)
    return folder, [str(n) for n in range(40 * times)]


def jpeg(times):
    """A file as a sample of a detector: found in its folder, checked, decoded, resized, padded into its batch of 8.

    As in a loader, no batch is kept when the next one is made; nor does the work beside it keep its pictures.
    """
    import torch
    import data
    torch.set_num_threads(1)
    folder, names = photos(times)
    lives = data.Lives.pictures(folder)
    samples = data.DetectionSet.__new__(data.DetectionSet)
    samples.lives, samples.categories, samples.frames, samples.train, samples.augment = lives, {}, 1, False, False
    samples.shortest, samples.longest, samples.seed = (480, 480, 1), 1333, 0
    clips = [data.Clip(f"live-0-{n}", [name], None, [], "", "") for n, name in enumerate(names)]
    samples._find = lambda i: (i, clips[i], [0])

    def turn():
        for low in range(0, len(names), 8):
            data.collate_detection([samples[0, i] for i in range(low, low + 8)])
    return turn


def decode_alone(times):
    import torch
    import torchvision
    from torchvision.transforms.v2 import functional as TF
    torch.set_num_threads(1)
    folder, names = photos(times)
    read, decode = torchvision.io.read_file, torchvision.io.decode_jpeg

    def turn():
        for name in names:
            TF.resize(decode(read(f"{folder}/frames/{name}.jpg")), (480, 853), antialias=True)
    return turn


def rice_model():
    import torch
    import rice
    torch.manual_seed(0)
    return rice.RICE({"width": 768, "layers": 12, "heads": 12, "patch": 32, "size": 224, "dim": 512}, 2000, masked=False).train()


def rice_step(times):
    import torch
    model, B, T = rice_model(), 2 * times, 10
    batch = {"image": torch.randn(B, 3, 224, 224), "title": torch.randint(2, 2000, (B, 24)), "frames": torch.randn(B, T, 3, 224, 224),
             "keep": torch.ones(B, T, 49, dtype=torch.bool), "valid": torch.ones(B, T, dtype=torch.bool),
             "asr": torch.randint(2, 2000, (B, 24)), "product": torch.arange(B), "seed": 0}

    def step():
        model.zero_grad()
        model.loss(batch)[0].backward()
    return step


def encoder_alone(times):
    import torch
    model, images = rice_model().visual, torch.randn(2 * times * 11, 3, 224, 224)

    def step():
        model.zero_grad()
        model(images)[0].square().sum().backward()
    return step


def training_step(stage, preset="tiny", size=(96, 96), world=1, device="cpu", **more):
    """-> a function that takes one step of train.py without its loader: a preset's model and (one of `world` shares of) its batch of
    random pictures of `size`, uint8 as a loader gives them."""
    import torch
    import eval as evaluation
    import train
    torch.manual_seed(0)
    config = train.configure({"preset": preset} | more, stage)
    model = evaluation.build(vars(config), 34, 2000).train().to(device)
    optimizer, B, T = train.optimizer_of(model, config), config.batch // world, {"sd": 1, "md": config.frames, "rice": config.train_frames}[stage]
    batch = {"valid": torch.ones(B, T, dtype=torch.bool), "clip": torch.arange(B)}
    if stage == "rice":
        S, P = config.size, (config.size // (config.patch or 16)) ** 2
        batch |= {"asr": torch.randint(2, 2000, (B, 24)), "title": torch.randint(2, 2000, (B, 24)), "product": torch.arange(B),
                  "frames": torch.randint(255, (B, T, 3, S, S), dtype=torch.uint8), "keep": torch.ones(B, T, P, dtype=torch.bool),
                  "image": torch.randint(255, (B, 3, S, S), dtype=torch.uint8)}
    else:
        batch |= {"boxes_cxcywh": torch.rand(B, T, 1, 4) / 3 + 0.3, "labels": torch.randint(34, (B, T, 1)), "size": torch.ones(B, T, 2),
                  "frames": torch.randint(255, (B, T, *size, 3), dtype=torch.uint8).movedim(-1, 2),
                  "padding": torch.zeros(B, T, *size, dtype=torch.bool)}
    if device == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    wrapped, device = train.Step(model), torch.device(device)
    earlier = [world] * ("world" in inspect.signature(train.forward_backward).parameters)       # with --before
    wrapped = torch.nn.parallel.DistributedDataParallel(wrapped) if torch.distributed.is_initialized() else wrapped

    def step():
        train.forward_backward(wrapped, optimizer, batch, config, device, 0, *earlier)
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], config.clip_norm)
        optimizer.step()
    step.pictures = B * (T + (stage == "rice"))
    return step


def five_steps(stage):
    def work(times):
        step = training_step(stage)
        return lambda: [step() for _ in range(5 * times)]
    return work


def member(rank, world, store, gate):
    """One of the processes of `processes`: a step each time that the gate opens."""
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    step = training_step("rice", world=world)
    while True:
        gate.wait()
        step()
        gate.wait()


def processes(times):
    """A step of the quickstart's RICE, the same batch on `times` processes of one thread each."""
    import torch.multiprocessing as multiprocessing
    gate = multiprocessing.get_context("spawn").Barrier(times + 1)
    multiprocessing.spawn(member, (times, f"{tempfile.mkdtemp()}/store", gate), times, join=False, daemon=True)
    return lambda: (gate.wait(), gate.wait())


def products(times):
    import torch
    a = torch.randn(2048, 2048 * times)
    return lambda: a @ a.T


def on_gpu(step, calls):
    """What one turn runs on a CUDA device, `calls` steps and their end; .flops and .pictures of a turn tell how much that is."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        step()
    torch.cuda.reset_peak_memory_stats()

    def turn():
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    turn.flops, turn.pictures = calls * counter.get_total_flops(), calls * getattr(step, "pictures", 0)
    return turn


def gpu_step(stage, calls=5, precision="bf16"):
    """Training steps of the paper preset, the share of one of eight devices, pictures of 800 x 1333 padded as a loader does."""
    return lambda times: on_gpu(training_step(stage, "paper", (800, 1344), 8, "cuda", precision=precision), calls)


def gpu_products(dtype):
    def work(times):
        import torch
        a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=getattr(torch, dtype))
        return on_gpu(lambda: a @ b, 10)
    return work


def gpu_search(times):
    import torch
    import eval as evaluation
    clips, images = (x.cuda() for x in gallery(times))
    return on_gpu(lambda: evaluation.nearest(clips, images, 10), 5)


def gpu_search_products(times):
    import torch
    clips, images = (x.cuda() for x in gallery(times))
    return on_gpu(lambda: [part @ images.T for part in clips.split(2048)], 5)


# ------------------------------------------------------------------ the peers' works, run by --peer-python


def peer_detector():
    import torch
    from transformers import DabDetrConfig, DabDetrForObjectDetection
    torch.manual_seed(0)
    return DabDetrForObjectDetection(DabDetrConfig(use_pretrained_backbone=False, num_labels=91))


def peer_sd(height, width, batch):
    def work(times):
        import torch
        model, (images, padding) = peer_detector().eval(), pictures(batch, height, width)
        return torch.inference_mode()(lambda: model(pixel_values=images, pixel_mask=(~padding).long()))
    return work


def peer_step(batch=2, height=480, width=640, device="cpu", bf16=False):
    def work(times):
        import torch
        model, (images, padding) = peer_detector().train().to(device), (x.to(device) for x in pictures(batch, height, width))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-6, fused=True)
        labels = [{"class_labels": torch.randint(91, (1,), device=device), "boxes": torch.rand(1, 4, device=device) / 3 + 0.3} for _ in images]

        def step():
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = model(pixel_values=images, pixel_mask=(~padding).long(), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        step.pictures = batch
        return on_gpu(step, 5) if device == "cuda" else step
    return work


def peer_ap(times):
    import contextlib
    import io
    import numpy as np
    from faster_coco_eval import COCO, COCOeval_faster
    truth, found = truth_and_detections(times)
    xywh = {id(t): np.concatenate([t["box_xyxy"][:, :2], t["box_xyxy"][:, 2:] - t["box_xyxy"][:, :2]], 1) for t in (truth, found)}
    side = [{"image_id": int(i), "category_id": int(c), "bbox": b.tolist(), "area": float(b[2] * b[3]), "iscrowd": 0, "id": n + 1}
            for n, (i, c, b) in enumerate(zip(truth["image"], truth["category"], xywh[id(truth)]))]
    answers = [{"image_id": int(i), "category_id": int(c), "bbox": b.tolist(), "score": float(s)}
               for i, c, b, s in zip(found["image"], found["category"], xywh[id(found)], found["score"])]
    dataset = {"images": [{"id": int(i)} for i in found["image"]], "categories": [{"id": c} for c in range(34)], "annotations": side}

    def judge():
        with contextlib.redirect_stdout(io.StringIO()):
            judged = COCO(dataset)
            run = COCOeval_faster(judged, judged.loadRes(answers), "bbox")
            run.evaluate()
            run.accumulate()
            run.summarize()
    return judge


def peer_search(times):
    import faiss
    faiss.omp_set_num_threads(THREADS)
    clips, images = (x.numpy() for x in gallery(times))
    index = faiss.IndexFlatIP(512)
    index.add(images)
    return lambda: index.search(clips, 10)


# ------------------------------------------------------------------ the rows

# name: what it is, our work and its size, {contender: work}, {contender: ratio to stay under}
ROWS = {
    "products": ("matrix products, 2048^3: the machine's rate", products, 1, {}, {}),
    "sd": ("SD, 2 pictures of 480 x 640", sd_small_pictures, 1, {"transformers": peer_sd(480, 640, 2)}, {"transformers": 0.60}),
    "sd-large": ("SD, 1 picture of 800 x 1066", sd_large_picture, 1, {"transformers": peer_sd(800, 1066, 1)}, {"transformers": 0.60}),
    "sd-step": ("SD, a training step, 2 pictures of 480 x 640", sd_step, 1, {"transformers": peer_step()}, {"transformers": 0.75}),
    "md": ("MD, a clip of 10 frames of 480 x 640", md_clip, 1, {"SD on the frames": sd_clip}, {"SD on the frames": 1.10}),
    "match-1": (f"matching, 16 frames, 1 box each, {CALLS} calls", match_one, 1, {"plain loop": lambda n: plain_match(1, n)}, {"plain loop": 0.25}),
    "match-3": (f"matching, 16 frames, 3 boxes each, {CALLS} calls", match_three, 1, {"plain loop": lambda n: plain_match(3, n)}, {"plain loop": 0.5}),
    "ap": ("AP, 62,500 frames, 83,333 boxes", ap, 1, {"faster-coco-eval": peer_ap}, {"faster-coco-eval": 0.05}),
    "ap-large": ("AP, 500,000 frames, 666,666 boxes", ap, 8, {}, {}),
    "search": ("first 10 of 66,358 images for 20,079 clips", search, 1, {"products alone": products_alone, "faiss": peer_search},
               {"products alone": 1.25, "faiss": 0.25}),
    "lives": ("rank-k in 110 galleries of 603 images", lives, 1, {}, {}),
    "jpeg": ("40 JPEG of 540 x 960 to a batch, one core", jpeg, 1, {"decode + resize": decode_alone}, {"decode + resize": 1 / 0.85}),
    "rice": ("RICE, forward + backward, 4 clips of 10 frames", rice_step, 2, {"encoder alone": encoder_alone}, {"encoder alone": 1.15}),
    "processes": ("RICE, a step of the quickstart", processes, 1, {}, {}),
    "tiny-sd": ("quickstart, 5 steps of SD", five_steps("sd"), 1, {}, {}),
    "tiny-md": ("quickstart, 5 steps of MD", five_steps("md"), 1, {}, {}),
    "tiny-rice": ("quickstart, 5 steps of RICE", five_steps("rice"), 1, {}, {}),
}
# The same for a GPU: two minutes on one H200.
GPU_ROWS = {
    "gpu-products": ("products of 8192^3, bf16: the device's rate", gpu_products("bfloat16"), 1, {"float32": gpu_products("float32")}, {}),
    "gpu-sd": ("SD, 5 training steps, 8 pictures of 800 x 1333, bf16", gpu_step("sd"), 1,
               {"float32": gpu_step("sd", precision="float32"), "transformers": peer_step(8, 800, 1344, "cuda"),
                "transformers, bf16": peer_step(8, 800, 1344, "cuda", True)}, {}),
    "gpu-md": ("MD, a training step, 8 clips of 10 frames of 800 x 1333, bf16", gpu_step("md", 1), 1,
               {"float32": gpu_step("md", 1, "float32")}, {}),
    "gpu-rice": ("RICE, 5 training steps, 32 clips of 10 frames and their images, bf16", gpu_step("rice"), 1,
                 {"float32": gpu_step("rice", precision="float32")}, {}),
    "gpu-search": ("first 10 of 66,358 images for 20,079 clips", gpu_search, 1, {"products alone": gpu_search_products}, {}),
}
ROWS |= GPU_ROWS
PEERS = ("transformers", "transformers, bf16", "faster-coco-eval", "faiss")
GROWTH = {"sd": "queries: 300", "md": "frames: 10", "sd-step": "pictures: 2", "match-3": "queries: 300", "ap": "frames: 62,500",
          "search": "gallery: 66,358", "lives": "lives: 110", "jpeg": "files: 40", "rice": "clips: 2", "processes": "processes: 1"}


class Contender:
    """A process that holds one work ready and does it once whenever it is asked."""

    def __init__(self, python, code, row, name, times):
        command = [python, __file__, "--work", json.dumps([row, name, times])]
        settings = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(code), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings, cwd=code)
        self.seconds, self.memory, self.flops, self.pictures = [], 0.0, 0, 0

    def turn(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{' '.join(self.process.args)}: failed")
        seconds, self.memory, self.flops, self.pictures = json.loads(answer)
        self.seconds.append(seconds)

    def leave(self):
        self.process.stdin.close()
        self.process.wait()
        middle = statistics.median(self.seconds)
        amount = {"tflops_a_second": self.flops / middle / 1e12, "pictures_a_second": self.pictures / middle} if self.flops else {}
        return {"median": middle, "lowest": min(self.seconds), "highest": max(self.seconds), "memory_gb": self.memory} | amount


def work(row, name, times):
    """The other end of a Contender."""
    import torch
    torch.set_num_threads(THREADS)
    if name not in PEERS:
        import eval as evaluation
        getattr(evaluation, "keep_memory", int)()                    # as train.py and eval.py do; an earlier copy may not have it
    once = (ROWS[row][1] if name == "ours" else ROWS[row][3][name])(times)
    for _ in sys.stdin:
        begin = time.perf_counter()
        once()
        seconds, memory = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        if row in GPU_ROWS:
            memory = torch.cuda.max_memory_allocated() / 2 ** 30
            torch.cuda.empty_cache()                                                         # for the others of the row
        print(json.dumps([seconds, memory, getattr(once, "flops", 0), getattr(once, "pictures", 0)]), flush=True)


def measure(row, repeats, peer=None, before=None, times=None, alone=False):
    _, _, own, rivals, _ = ROWS[row]
    times, field = times or own, {"ours": (sys.executable, HERE)}
    field |= {} if alone else {name: (peer if name in PEERS else sys.executable, HERE) for name in rivals if peer or name not in PEERS}
    field |= {"before": (sys.executable, Path(before).resolve())} if before else {}
    entered = {name: Contender(python, code, row, "ours" if name == "before" else name, times) for name, (python, code) in field.items()}
    for contender in entered.values():                                                       # a turn to warm up
        contender.turn()
        contender.seconds.clear()
    for _ in range(repeats):
        for contender in entered.values():
            contender.turn()
    return {name: contender.leave() for name, contender in entered.items()}


def clock(figures):
    unit, name = (1, "s") if figures["median"] >= 1 else (1000, "ms")
    return f"{figures['median'] * unit:.3g} {name} ({figures['lowest'] * unit:.3g} - {figures['highest'] * unit:.3g})"


def compare(names, repeats, peer, before):
    from eval import table
    rows, result = [], {}
    for name in names:
        text, _, _, _, targets = ROWS[name]
        result[name] = figures = measure(name, repeats, peer, before)
        for who, figure in figures.items():
            ratio = None if who == "ours" else figures["ours"]["median"] / figure["median"]
            rates = (f"{figure.get(rate, 0):.0f}" for rate in ("pictures_a_second", "tflops_a_second")) if name in GPU_ROWS else ()
            rows.append((text if who == "ours" else "", who, clock(figure), f"{figure['memory_gb']:.2f} GB",
                         "" if ratio is None else f"{ratio:.3f}", "" if who not in targets else f"{targets[who]:.3g}", *rates))
        print(f"{name}: {', '.join(f'{who} {clock(figure)}' for who, figure in figures.items())}", file=sys.stderr, flush=True)
    rates = ("pictures/s", "TFLOP/s") if set(names) <= GPU_ROWS.keys() else ()
    print(table(("work", "who", "time", "peak memory", "ours / theirs", "aim: at most", *rates), rows, True))
    return result


def grow(names, repeats):
    from eval import table
    rows, result = [], {}
    for name in (n for n in names if n in GROWTH):
        figures = [measure(name, repeats, times=times, alone=True)["ours"] for times in (1, 2, 4, 8)]
        result[name] = figures
        rows.append((ROWS[name][0].split(",")[0], GROWTH[name], *(f"{f['median'] / figures[0]['median']:.1f}" for f in figures),
                     *(f"{f['memory_gb']:.2f}" for f in figures)))
        print(f"{name}: {', '.join(map(clock, figures))}", file=sys.stderr, flush=True)
    print(table(("work", "grows", "1x", "2x", "4x", "8x", "GB, 1x", "2x", "4x", "8x"), rows, True))
    return result


def race(before, turn=10):
    """Seconds that `python train.py` runs, ours and an earlier copy's, until each stage has its results."""
    from eval import table
    with tempfile.TemporaryDirectory() as folder:
        places = {who: Path(folder) / who for who in ("ours", "before")}
        running, spent, marks = {}, dict.fromkeys(places, 0.0), {who: {} for who in places}
        for (who, place), code in zip(places.items(), (HERE, Path(before))):
            place.mkdir()
            for file in code.glob("*.py"):
                shutil.copy(file, place)
            with open(place / "said", "w") as said:
                running[who] = subprocess.Popen([sys.executable, "train.py"], cwd=place, stdout=said, stderr=said, start_new_session=True)
            os.killpg(running[who].pid, signal.SIGSTOP)
        try:
            while running:
                for who, process in list(running.items()):
                    begin = time.perf_counter()
                    os.killpg(process.pid, signal.SIGCONT)
                    try:
                        process.wait(turn)
                        del running[who]
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGSTOP)
                    spent[who] += time.perf_counter() - begin
                    results = places[who] / "runs/tiny/results.json"
                    done = json.loads(results.read_text()) if results.exists() else {}
                    marks[who] = {stage: spent[who] for stage in done} | marks[who]
                    if process.returncode:
                        sys.exit(f"{who}: {(places[who] / 'said').read_text()[-1000:]}")
        finally:
            for process in running.values():
                os.killpg(process.pid, signal.SIGKILL)
    stages = list(marks["ours"])
    rows = [(who, *(f"{mark[stage]:.0f}" for stage in stages)) for who, mark in marks.items()]
    rows.append(("ours / before", *(f"{marks['ours'][stage] / marks['before'][stage]:.3f}" for stage in stages)))
    print(table(("seconds until the results of", *stages), rows, True))
    return marks


def profile(folder, steps=10):
    """Share of each part of a training step, by torch.profiler, for the stages of the tiny preset."""
    import torch
    import data
    import detect
    import eval as evaluation
    import rice
    import train
    from torch.profiler import record_function
    parts = {"pictures": (data, "to_float"), "loss": (detect, "detection_loss"), "forward": (detect.SD, "features"), "TTM": (detect.MD, "temporal"),
             "encoders": (rice.RICE, "forward"), "PMD": (rice.PMD, "forward"), "backward": (torch.Tensor, "backward"),
             "clipping": (torch.nn.utils, "clip_grad_norm_"), "check": (train, "stop_where_not_finite"), "logging": (train, "report")}
    for label, (place, name) in ((label, part) for label, part in parts.items() if hasattr(*part)):
        def marked(*arguments, _call=getattr(place, name), _label=f"# {label}", **named):
            with record_function(_label):
                return _call(*arguments, **named)
        setattr(place, name, marked)
    if hasattr(evaluation, "keep_memory"):
        evaluation.keep_memory()
    result, rows = {}, []
    with tempfile.TemporaryDirectory() as out:
        for stage in train.STAGES:
            settings = {"data": folder, "out": out, "steps": steps, "workers": 0, "stage": stage}
            settings |= {"boxes": "true"} if stage == "rice" else {}
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
                begin = time.perf_counter()
                train.train(train.configure(settings, stage), 0, 1, evaluation.pick_device())
                wall = time.perf_counter() - begin
            spent = {e.key: e.cpu_time_total / 1000 / steps for e in run.key_averages()}
            result[stage] = {"step": 1000 * wall / steps} | {
                label: value for label, value in ((key.removeprefix("# "), value) for key, value in spent.items()
                                                 if key.startswith(("# ", "enumerate(DataLoader)", "Optimizer.step")))}
            rows += [(stage if n == 0 else "", name.split("#")[0], f"{value:.1f}") for n, (name, value) in
                     enumerate(sorted(result[stage].items(), key=lambda pair: -pair[1]))]
    print(evaluation.table(("stage", "part", "ms a step"), rows, True))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"some of {', '.join(ROWS)} [those of a CPU]")
    parser.add_argument("--gpu", action="store_true", help="the rows of a CUDA device")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender [5]")
    parser.add_argument("--peer-python", help="the python of an environment that has the public packages")
    parser.add_argument("--before", help="folder of an earlier copy of this project")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--grow", action="store_true", help="each work at 1, 2, 4, 8 times its size")
    parser.add_argument("--race", metavar="OLD", help="whole quickstarts in turns with that of an earlier copy of this project")
    parser.add_argument("--profile", metavar="DATA", help="where the time of a training step goes, on this data folder")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.work:
        return work(*json.loads(flags.work))
    import torch
    if flags.gpu and not torch.cuda.is_available():
        parser.error("--gpu: no CUDA device here")
    sys.path.insert(0, flags.before if flags.profile and flags.before else str(HERE))
    import torchvision
    names = flags.rows.split(",") if flags.rows else [name for name in ROWS if (name in GPU_ROWS) == flags.gpu]
    setting = {"threads": THREADS, "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
               "machine": torch.cuda.get_device_name() if flags.gpu else platform.machine(), "repeats": flags.repeats}
    print(", ".join(f"{name} {value}" for name, value in setting.items()), "\n")
    result = (race(flags.race) if flags.race else profile(flags.profile) if flags.profile else grow(names, flags.repeats) if flags.grow
              else compare(names, flags.repeats, flags.peer_python, flags.before))
    if flags.json:
        Path(flags.json).write_text(json.dumps({"setting": setting, "figures": result}, indent=1))


if __name__ == "__main__":
    main()
