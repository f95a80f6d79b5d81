"""Delayed recall over seeds: Stable Hadamard Memory, its ablations, and a GRU of equal state.

Every subject is the same small language model but for the mixer of its layers. It is trained on
tasks/copy_first with delays up to `train_delay` and tested at the delays of `delays`, longer ones
among them. Draws of theta are new for every item, in training and in the test, as published.
Two layers, for what the first of a linear memory writes depends on its token alone, and no token
says that it is the first. An answer that is not finite counts as wrong.
B batch, T time, D hidden_size, G state numbers of the GRU.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong.evaluation.recall import HELD_OUT, check_counts, summary
from everlong.models.config import EverlongConfig
from everlong.models.hub import EverlongForCausalLM
from everlong.provenance import write_results
from everlong.registry import check_types
from everlong.stack import Block, Stack
from everlong.state import State
from everlong.stateful import Stateful, Trace
from everlong.tasks.copy_first import CopyFirstConfig, make_batch
from everlong.tasks.recall import IGNORED

SUBJECTS = ("random theta", "fixed theta", "no calibration", "GRU")
_THETA = {"random theta": "random", "fixed theta": "fixed", "no calibration": "none"}


@dataclass(frozen=True)
class DelayedRun:
    """One training a subject and seed; all of it is some minutes on one core."""

    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 3e-3
    hidden_size: int = 32
    memory_size: int = 12  # the GRU has its square as hidden size
    num_layers: int = 2
    train_delay: int = 50
    test_items: int = 256
    delays: tuple[int, ...] = (25, 50, 100, 200, 400)

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        plain = {name: value for name, value in vars(self).items() if name != "delays"}
        check_types(DelayedRun, plain, "delayed")
        sizes = ("batch_size", "hidden_size", "memory_size", "num_layers", "test_items")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.steps < 0 or self.train_delay < 0 or self.learning_rate <= 0:
            raise ValueError("steps, train_delay: at least 0; learning_rate: above 0")
        check_counts("delays", self.delays)


class GatedRecurrence(Stateful):
    """torch's GRU (Cho et al. 2014, arXiv 1406.1078) between two maps, with its state in view.

    A baseline of this comparison, not a registered memory. State: hidden [B, G].
    """

    def __init__(self, hidden_size: int, state_size: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.recurrence = nn.GRU(hidden_size, state_size, batch_first=True)
        self.out = nn.Linear(state_size, hidden_size)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        size = self.recurrence.hidden_size
        return {"hidden": torch.zeros(batch_size, size, device=device, dtype=dtype)}

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        before = state["hidden"]
        y, after = self.recurrence(x, before[None].contiguous())
        if lengths is None:
            return self.out(y), {"hidden": after[0]}
        steps = torch.cat([before[:, None], y], 1)
        last = steps[torch.arange(len(lengths), device=x.device), lengths]
        return self.out(y), {"hidden": last}


def build(name: str, task: CopyFirstConfig, run: DelayedRun, seed: int) -> EverlongForCausalLM:
    """The subject's model; one id more than the task's stands for bos."""
    torch.manual_seed(seed)
    options = {"memory_size": run.memory_size, "theta": _THETA.get(name, "none")}
    model = EverlongForCausalLM(
        EverlongConfig(
            vocab_size=task.vocab_size + 1,
            bos_token_id=task.vocab_size,
            eos_token_id=None,
            pad_token_id=None,
            hidden_size=run.hidden_size,
            num_heads=1,
            num_layers=run.num_layers,
            layers=["stable_hadamard"],
            mixers={"stable_hadamard": options},
            segment=None,
        )
    )
    if name == "GRU":
        for block in cast(Stack, model.body.core).blocks:
            mixer = GatedRecurrence(run.hidden_size, run.memory_size**2)
            cast(Block, block).mixer = mixer
    return model


def fresh_state(model: EverlongForCausalLM, first: int, rows: int) -> State:
    """Fresh streams that draw their thetas under the seeds first, first + 1, ..."""
    state = model.init_state(rows)
    seeds = torch.arange(first, first + rows)
    layers = ({**layer, "seed": seeds} if "seed" in layer else layer for layer in state["layers"])
    return {**state, "layers": tuple(layers)}


def train(name: str, task: CopyFirstConfig, run: DelayedRun, seed: int) -> EverlongForCausalLM:
    """Train on items (seed, 0 ...) by back-propagation through the whole item."""
    model = build(name, task, run, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=run.learning_rate)
    for step in range(run.steps):
        first = step * run.batch_size
        batch = make_batch(task, seed, range(first, first + run.batch_size))
        state = fresh_state(model, first, run.batch_size)
        logits, _ = model.stream(batch.inputs, state, batch.mask)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval()


@torch.no_grad()
def accuracy(
    model: EverlongForCausalLM, delay: int, run: DelayedRun, seed: int
) -> tuple[float, float]:
    """Shares of held-out items of this delay: answered, and with finite logits at the query."""
    task = CopyFirstConfig(min_delay=delay, max_delay=delay)
    batch = make_batch(task, seed + HELD_OUT, range(run.test_items))
    state = fresh_state(model, HELD_OUT, run.test_items)
    logits, _ = model.stream(batch.inputs, state, batch.mask)
    finite = logits[:, delay + 1].isfinite().all(-1)  # one query place: all items are as long
    return float((batch.correct(logits) & finite).float().mean()), float(finite.float().mean())


def measure(
    config: DelayedRun, seeds: Sequence[int], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every subject over the seeds: rows of name, seed, delay, accuracy and finite (the share of
    items whose answer did not overflow); `say` is told of each training."""
    rows, task = [], CopyFirstConfig(max_delay=config.train_delay)
    for name in SUBJECTS:
        for seed in seeds:
            model = train(name, task, config, seed)
            found = {delay: accuracy(model, delay, config, seed) for delay in config.delays}
            scores = ", ".join(f"{value:.3f} at {delay}" for delay, (value, _) in found.items())
            say(f"{name}, seed {seed}: {scores}")
            rows += [
                {"name": name, "seed": seed, "delay": delay, "accuracy": value, "finite": finite}
                for delay, (value, finite) in found.items()
            ]
    return rows


def write(path: Path, config: DelayedRun, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows and their summary as JSON with provenance."""
    plan = {"task": asdict(CopyFirstConfig(max_delay=config.train_delay)), "run": asdict(config)}
    write_results(
        path, "everlong bench delayed", plan, summary=summary(rows, "delay"), rows=list(rows)
    )
