"""What two processes do for test_distributed_memories, in one launch, with every memory in turn.

Of each memory a learner in float64 makes two rollouts without an optimiser step, and what it
carries is written and read between them: see `alone`, `together` and `resumed`.
"""

import contextlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import everlong
from everlong.stateful import Trace
from everlong.training import checkpoints, distributed, learner
from everlong.training.learner import Learner
from everlong.training.streams import as_documents
from models.hub_models import SHAPES, make_config
from training.distributed_workers import ROWS, TEXTS, WORLD, exact_cross_entropy
from training.small_run import small_config

BYTES = {"vocab_size": 259, "bos_token_id": 256, "pad_token_id": 258, "num_layers": 1}


# A memory's own loss is a mean over the rows of one process, where one process has them all.
WITHOUT = ", without its own loss"
NAMES = [*SHAPES, *(name + WITHOUT for name in ("compressive", "mom"))]


@contextlib.contextmanager
def losses(name, own=True):
    """The loop's loss in float64; with a memory's own loss if `own` and its name do not say no."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "cross_entropy", exact_cross_entropy)
        if WITHOUT in name or not own:
            patch.setattr(Trace, "total", lambda _: None)
        yield


def make_learner(name, seed=0, **options):
    """Three segments of 8 tokens a rollout; an untied head, so that all is seen to be trained."""
    torch.manual_seed(seed)
    name = name.removesuffix(WITHOUT)
    kind = SHAPES[name] | BYTES | ({"layers": [name]} if "layers" in SHAPES[name] else {})
    model = everlong.EverlongForCausalLM(make_config(name, **kind)).double()
    given = {"batch_size": ROWS, "segments": 3, "segment_length": 8, "clip": 1e9}
    return Learner(model, as_documents(TEXTS), small_config(**given | options))


def rollout(made):
    """Its gradients, whole, by parameter."""
    made.rollout()
    inner = getattr(made.model, "_inner", made.model)
    found = {n: p.grad for n, p in inner.named_parameters() if p.grad is not None}
    return {name: distributed.whole(grad).clone() for name, grad in found.items()}


def save(made, folder):
    """A checkpoint, as the loop writes it: of all rows, by the first process."""
    parts = made.parts()
    distributed.from_main(made.group, lambda: str(checkpoints.save(folder, 0, made.given, parts)))


def resumed(name, folder, seed=0):
    """The gradients of the second rollout, from another's checkpoint behind the first."""
    made, source = make_learner(name, seed), checkpoints.folder(folder, 0)
    made.restore(checkpoints.load(source), source)
    with losses(name, own=False):
        return rollout(made)


def alone(name, folder):
    """One process: the gradients of both rollouts; the checkpoint between them in `folder`."""
    made = make_learner(name)
    with losses(name):
        first = rollout(made)
    save(made, folder)
    with losses(name, own=False):
        return first, rollout(made)


def together(name, folder, rank):
    """Gradients of the first rollout, plain and in shares, and of the second from one process's
    checkpoint; the checkpoint of two processes. Seeds differ: all begin with the first's weights.
    """
    plain, shares = (make_learner(name, seed=rank, shard=shard) for shard in (False, True))
    with losses(name):
        found = {"plain": rollout(plain), "shares": rollout(shares)}
    save(plain, folder / name / "two")
    found["resumed"] = resumed(name, folder / name / "one", seed=rank)
    tensors = {f"{k}.{n}": g.contiguous() for k, grads in found.items() for n, g in grads.items()}
    save_file(tensors, folder / name / f"gradients-{rank}")


def worker(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, not used
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    for name in NAMES:
        together(name, Path(folder), rank)
    dist.destroy_process_group()
