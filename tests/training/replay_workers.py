"""What the processes of the data-parallel test run: a module, so that they can import it."""

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import everlong
from training.replay_toys import LENGTH, WIDTH, Toy

COUNT, WORLD, ROWS = 4, 2, 2


def make(rows):
    """The toy, without dropout, and the segments of the given rows of the joined batch."""
    torch.manual_seed(0)
    toy = Toy(dropout=0.0).double()
    x = torch.randn(COUNT, WORLD * ROWS, LENGTH, WIDTH, dtype=torch.float64)
    target = torch.zeros((), dtype=torch.float64)
    return toy, [{"x": segment[rows], "target": target} for segment in x]


def worker(rank, folder):
    """Gradients of three rollouts on this process's rows, and the all-reduces of each."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    toy, segments = make(slice(rank * ROWS, (rank + 1) * ROWS))
    model, rounds = DistributedDataParallel(toy), []

    def counting(state, bucket):
        rounds[-1] += 1
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, counting)
    results = []
    for keep in ("all", "sqrt", "all"):
        rounds.append(0)
        model.zero_grad()
        options = everlong.ReplayOptions(no_sync=model.no_sync, keep=keep, check=True)
        everlong.replay(model, segments, toy.init_state(ROWS), options=options)
        results.append({name: p.grad.clone() for name, p in toy.named_parameters()})
    torch.save({"rounds": rounds, "results": results}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
