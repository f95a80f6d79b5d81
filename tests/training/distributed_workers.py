"""What two processes do for test_distributed, in one launch; each writes what it found.

Run by torchrun, with RUN --die: a training of which rank 1 kills itself once.
"""

import contextlib
import errno
import io
import json
import os
import signal
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from everlong.cli import final, main
from everlong.errors import Interrupted, UserError
from everlong.registry import memory_entry
from everlong.training import checkpoints, distributed, learner
from everlong.training.horizon import Horizon
from everlong.training.learner import Learner
from everlong.training.loop import train
from everlong.training.replay import ReplayOptions
from everlong.training.streams import IGNORE, DocumentStream, as_documents, segments
from training.small_run import small_config, small_model, small_texts

WORLD, ROWS, LENGTH, ROLLOUTS = 2, 4, 8, 3
TEXTS = small_texts(90, 31, 160, 12, 77, 240, 8, seed=1)  # rows end, and begin, at their own times
HORIZONS = {"replay": None, "full": None, "checkpoint": None, "truncated": 2}
# A learned state of fresh rows has a gradient where a row begins: in one process, or in none.
LEARNED_START = "replay of a learned start"
CASES = (*HORIZONS, LEARNED_START)
TITANS = {"segment": None, "layers": ["titans"], "mixers": {"titans": memory_entry("titans").small}}
SMOKE = [
    *(
        "smoke",
        "--device",
        "cpu" if torch.cuda.is_available() else "auto",
        "--set",
        "twin=false",
        "--set",
        "train.schedule=constant",
    ),
    *("--set", "model.num_layers=1", "--set", "train.checkpoint_every=2"),
    *("--set", "train.eval_every=2", "--set", "data.validation=0.001"),
]


def exact_cross_entropy(logits, targets):
    """The loop's own, without its float32."""
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


class Exchanges(TorchDispatchMode):
    """Counts the calls of torch.distributed."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def rollouts(case, seed=0, **options):
    """Of each rollout of a learner in float64: its gradients (whole); loss, norm and number of
    parameters without weight decay; exchanges.

    With `exact_cross_entropy` in the learner's module; rollouts follow each other, weights stay.
    """
    given = {"segments": 4, "clip": 1e9, "segment_length": LENGTH}
    given |= {"horizon": case.split()[0], "truncate": HORIZONS.get(case)}
    kind = TITANS if case == LEARNED_START else {}
    model = small_model(seed, dropout=0.0, **kind).double()
    for name, parameter in model.named_parameters():
        parameter._no_weight_decay = name.endswith("feed_forward.up.weight")
    made = Learner(model, as_documents(TEXTS), small_config(batch_size=ROWS, **given | options))
    for _ in range(ROLLOUTS):
        with Exchanges() as exchanges:
            _, measured = made.rollout()
        inner = getattr(made.model, "_inner", made.model)
        found = {n: p.grad for n, p in inner.named_parameters() if p.grad is not None}
        grads = {name: distributed.whole(grad).clone() for name, grad in found.items()}
        spared = sum(len(g["params"]) for g in made.optimizer.param_groups if not g["weight_decay"])
        yield grads, torch.tensor([*measured.tolist(), spared]), dict(exchanges.counts)


class _Step(nn.Module):
    """`step(segment, state)` as a module: what DistributedDataParallel wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, segment, state):
        logits, state = self.model.stream(segment["inputs"], state, segment.get("mask"))
        return exact_cross_entropy(logits, segment["targets"]), state


def stream():
    return DocumentStream(TEXTS, batch_size=ROWS, length=4 * LENGTH, seed=7)


def first_rollout(rows):
    """The segments of the first rollout for these rows, and the targets of all rows."""
    batch = next(stream())
    own = {name: whole[rows] for name, whole in batch.items()}
    return segments(own, LENGTH), int((batch["targets"] != IGNORE).sum())


def wrapped(rank):
    """DistributedDataParallel in a loop of one's own: gradients, and bucket rounds a rollout."""
    model = small_model(dropout=0.0).double().train()
    ddp, rounds, found = DistributedDataParallel(_Step(model)), {}, {}

    def counting(_, bucket):
        rounds[name] += 1
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, counting)
    cuts, targets = first_rollout(slice(2 * rank, 2 * rank + 2))
    for name in ("replay", "full", "truncated"):
        rounds[name] = 0
        model.zero_grad()
        options = ReplayOptions(no_sync=ddp.no_sync)
        horizon = Horizon(name, truncate=HORIZONS[name], options=options)
        horizon(ddp, cuts, model.init_state(2), [WORLD / targets] * len(cuts))  # it averages
        found |= {f"{name}.{n}": p.grad.clone() for n, p in model.named_parameters()}
    return rounds, found


def gradients(rank, folder):
    """Of the learner's rollouts by every horizon, shared or not; and the exchanges of each."""
    counts, tensors, rounded = {}, {}, learner.cross_entropy
    learner.cross_entropy = exact_cross_entropy
    for shard in (False, True):
        for case in CASES:
            name = f"{case}{'-shard' * shard}"
            # of other seeds: all begin with the weights of the first
            for i, (grads, measured, made) in enumerate(rollouts(case, seed=rank, shard=shard)):
                counts.setdefault(name, []).append(made)
                tensors |= {f"{name}.{i}.{n}": g for n, g in grads.items()}
                tensors[f"{name}.{i}.measured"] = measured
    learner.cross_entropy = rounded
    rounds, found = wrapped(rank)
    tensors |= {f"ddp-{name}": grad for name, grad in found.items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / f"gradients-{rank}")
    return {"counts": counts, "rounds": rounds}


def refusals(rank, folder):
    """What one process alone meets, both must stop at."""
    group, said = PartialState(cpu=True), {}

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with contextlib.suppress(UserError):
        distributed.rows_of(3, group)
        said["rows"] = "accepted"
    update, save_model = Learner.update, checkpoints.save_model
    config = small_config(batch_size=ROWS, eval_every=0, steps=9)

    def asked(self, count):
        rate = update(self, count)
        if rank == 1 and self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return rate

    Learner.update = asked
    try:
        train(small_model(), TEXTS, None, config, folder / "stopped")
    except Interrupted as stop:
        said["stopped"] = [stop.exit_code, stop.step]
    Learner.update = update
    if rank == 0:
        checkpoints.save_model = refuse
    try:
        train(small_model(), TEXTS, None, config, folder / "full")
    except UserError as error:
        said["full"] = str(error)
    checkpoints.save_model = save_model
    lengths = distributed.gather_rows((torch.ones(2, 3 + rank), torch.full((2,), rank)))
    said["grown"] = [leaf.tolist() for leaf in lengths]
    return said


def worker(rank, folder):
    """Everything; each `everlong train` ends its group, so that the next begins one."""
    folder, stores = Path(folder), count()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, not used
    torch.set_num_threads(1)

    def join():
        store = f"file://{folder}/store-{next(stores)}"
        dist.init_process_group("gloo", store, rank=rank, world_size=WORLD)

    def command(*words):
        join()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            codes.append(main(["train", *map(str, words)]))
        said.append(printed.getvalue())

    codes, said = [], []
    final.STREAMED, final._PASSAGE, final._CONTINUED = (2, 3), 40, 5
    join()
    found = {"gradients": gradients(rank, folder), "refusals": refusals(rank, folder)}
    dist.destroy_process_group()
    PartialState._reset_state()
    command(*SMOKE, "--out", folder / "two", "--set", "train.steps=2")
    command("--resume", folder / "one", "--set", "train.steps=4")
    shares = ["--out", folder / "shares", "--set", "train.shard=true"]
    command(*SMOKE, *shares, "--set", "train.steps=2")
    command("--resume", folder / "shares", "--set", "train.steps=4")
    found |= {"codes": codes, "said": said}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


def killed_once():
    """The smoke run; the first time, rank 1 dies before the fourth step is made."""
    update = Learner.update

    def fatal(self, count):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and "--die" in sys.argv
        if first and self.step == 3 and self.group.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, count)

    Learner.update = fatal
    more = ["--set", "train.steps=6", "--set", "model.dropout=0.1"]
    sys.exit(main(["train", *SMOKE, *more, "--out", sys.argv[1]]))


if __name__ == "__main__":
    killed_once()
