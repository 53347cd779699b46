"""The loss and the gradients of one step on any number of processes, for test_train.py:

    torchrun --nproc_per_node 2 tests/gradients.py CASE+CASE DATA RUN OUT FLAGS
"""
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation      # noqa: E402
import train                   # noqa: E402

CASES = {"sd": ("sd", {}), "md": ("md", {}), "icl": ("rice", {"losses": "icl"}),
         "icl,pmd": ("rice", {"losses": "icl,pmd"}), "icl,pmd,pfr": ("rice", {})}
CPU = torch.device("cpu")


def main(case, root, run, out, small):
    torch.set_num_threads(1)
    rank, world = evaluation.start_processes()
    stage, given = CASES[case]
    config = train.configure({"data": root, "out": run} | small | given, stage)
    torch.manual_seed(0)
    stage = train.build_stage(config, None, CPU)
    model, dataset, collate = stage.model.train(), stage.dataset, stage.collate
    # A layer that starts at zero would hide what stands behind it.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    share = 8 // world
    items = [dataset[0, i] for i in range(rank * share, (rank + 1) * share)]
    module = train.LossModule(model)
    if world > 1:
        module = DistributedDataParallel(module)
    optimizer = train.make_optimizer(model, config)
    batch = (collate or default_collate)(items)
    loss, _ = train.forward_backward(module, optimizer, batch, config, CPU, 0)
    loss = train.reduce_metrics({"loss": loss}, world)["loss"]
    if rank == 0:
        named = model.named_parameters()
        gradients = {name: p.grad for name, p in named if p.grad is not None}
        torch.save({"loss": loss, "gradients": gradients}, out)


if __name__ == "__main__":
    for case in sys.argv[1].split("+"):
        main(case, *sys.argv[2:4], f"{sys.argv[4]}-{case}.pt", json.loads(sys.argv[5]))
    dist.destroy_process_group()
