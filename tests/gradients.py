"""One training step's gradients on any number of processes, for test_train.py: torchrun ... gradients.py CASE DATA RUN OUT."""
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation      # noqa: E402
import train                   # noqa: E402

CASES = {"sd": ("sd", {}), "md": ("md", {}), "icl": ("rice", {"losses": "icl"}), "icl,pmd": ("rice", {"losses": "icl,pmd"}),
         "icl,pmd,pfr": ("rice", {})}


def main(case, root, run, out, small):
    torch.set_num_threads(1)
    rank, world = evaluation.start_processes()
    stage, given = CASES[case]
    config = train.configure({"data": root, "out": run} | small | given, stage)
    torch.manual_seed(0)
    model, _, samples, _, collate = train.prepare(config, torch.device("cpu"), None)
    model.train()
    for name, parameter in model.named_parameters():        # zero-initialised layers would hide what stands behind them
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    share = 8 // world
    items = [samples[(0, i)] for i in range(8)][rank * share:(rank + 1) * share]
    batch = (collate or torch.utils.data.default_collate)(items)
    wrapped = train.Step(model)
    wrapped = DistributedDataParallel(wrapped, broadcast_buffers=False) if world > 1 else wrapped
    optimizer = train.optimizer_of(model, config)
    loss, terms = train.forward_backward(wrapped, optimizer, batch, config, torch.device("cpu"), 0)
    line = train.report(loss, terms, torch.zeros(()), world)
    if rank == 0:
        torch.save({"loss": line["loss"], "gradients": {n: p.grad for n, p in model.named_parameters() if p.grad is not None}}, out)


if __name__ == "__main__":
    for name in sys.argv[1].split("+"):
        main(name, *sys.argv[2:4], f"{sys.argv[4]}-{name}.pt", json.loads(sys.argv[5]))
    if dist.is_initialized():
        dist.destroy_process_group()
