"""Recall of what was overwritten, by update rule: one layer, and nothing else that differs.

Every subject is the same small language model with one layer of GatedDeltaNet's form (short
convolution, keys and queries of length 1, norm, gate); its state is decayed by no rate, by
RetNet's fixed one, or by one that the input sets, and written by plain sums or the delta rule.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from everlong.evaluation.cells import cell
from everlong.evaluation.recall import HELD_OUT, Subject, build, fit, summary
from everlong.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from everlong.models.hub import EverlongForCausalLM
from everlong.provenance import git_sha, write_results
from everlong.registry import check_types
from everlong.stack import Block, Stack
from everlong.tasks.mqar import MqarConfig, make_batch

RULES = {  # decay, and whether writes correct
    "sums (linear attention)": ("none", False),
    "fixed decay (RetNet)": ("fixed", False),
    "decay set by the input": ("input", False),
    "decay and correction (GatedDeltaNet)": ("input", True),
    "correction (DeltaNet)": ("none", True),
}
_FIXED = math.log(1 - 2.0**-5)  # RetNet's first head


@dataclass(frozen=True)
class OverwritingRun:
    """One training a rule and seed, about two minutes on one core."""

    steps: int = 2400
    batch_size: int = 32
    learning_rate: float = 1e-2  # the peak of one cycle
    hidden_size: int = 24  # also the width of keys and values, of one head
    test_items: int = 512
    length: int = 72
    num_pairs: int = 14
    num_overwritten: int = 7
    vocab_size: int = 64

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        check_types(OverwritingRun, vars(self), "overwriting")
        for name in ("steps", "batch_size", "hidden_size", "test_items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.learning_rate <= 0:
            raise ValueError("learning_rate must be above 0")
        self.task()

    def task(self) -> MqarConfig:
        return MqarConfig(
            self.length, self.num_pairs, self.num_overwritten, vocab_size=self.vocab_size
        )


class Rule(GatedDeltaNet):
    """GatedDeltaNet with parts of its rule left out. A baseline here, not a registered memory.

    A decay that the input sets starts at RetNet's. Published are draws whose strongest forget half
    within a token: among many heads some are slow, here there is one.
    """

    def __init__(self, config: GatedDeltaNetConfig, decay: str, corrects: bool):
        super().__init__(config)
        self.rule, self.corrects = decay, corrects
        if decay != "input":
            del self.rate, self.forget
        else:
            with torch.no_grad():  # g = -exp(A_log) softplus(... + dt_bias)
                self.forget.A_log.zero_()
                self.forget.dt_bias.fill_(math.log(math.expm1(-_FIXED)))
        if not corrects:
            del self.beta

    def decay(self, x: Tensor) -> Tensor:
        if self.rule == "input":
            return super().decay(x)
        rate = _FIXED if self.rule == "fixed" else 0.0
        return x.new_full((*x.shape[:2], self.num_heads), rate)

    def strength(self, x: Tensor) -> Tensor | None:
        return super().strength(x) if self.corrects else None


@dataclass(frozen=True)
class _Sizes:
    hidden_size: int
    num_heads: int = 1


def model_of(name: str, run: OverwritingRun, seed: int) -> EverlongForCausalLM:
    """The model of a rule; one id more than the task's stands for bos."""
    size = run.hidden_size
    subject = Subject(1, None, None, ("gated_deltanet",), intermediate_size=2 * size)
    model = build(subject, run.task(), _Sizes(size), seed)
    config = GatedDeltaNetConfig(size, 1, key_size=size, value_size=size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for block in cast(Stack, model.body.core).blocks:
            cast(Block, block).mixer = Rule(config, *RULES[name])
    return model


@torch.no_grad()
def accuracy(
    model: EverlongForCausalLM, task: MqarConfig, seed: int, items: int
) -> dict[str, float]:
    """Share of the questions answered on held-out items: `all` of them, and where there are such
    those for keys that were `overwritten`."""
    batch = make_batch(task, seed + HELD_OUT, range(items))
    logits, _ = model.eval().stream(batch.inputs)
    found = {"all": float(batch.correct(logits).float().mean())}
    if bool(batch.overwritten.any()):
        found["overwritten"] = float(batch.hits(logits)[batch.overwritten].float().mean())
    return found


def train(model: EverlongForCausalLM, task: MqarConfig, run: Any, seed: int) -> None:
    """One cycle over items (seed, 0 ...), each read in one call."""
    starts = range(0, run.steps * run.batch_size, run.batch_size)
    batches = (make_batch(task, seed, range(i, i + run.batch_size)) for i in starts)
    fit(model, batches, task.length, run.learning_rate, cycle=run.steps)


def measure(
    config: OverwritingRun, seeds: Sequence[int], folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every rule over the seeds, a file of `folder` each, made once: rows of name, seed, asked,
    accuracy; `say` is told of each."""
    git_sha()  # that of the code which is loaded now
    rows = []
    for seed in seeds:
        for name in RULES:

            def result(name: str = name, seed: int = seed) -> Any:
                model = model_of(name, config, seed)
                train(model, config.task(), config, seed)
                found = accuracy(model, config.task(), seed, config.test_items)
                return {"accuracy": found, "git": git_sha()}

            about = {"run": asdict(config), "rule": RULES[name]}
            decay, corrects = RULES[name]
            file = f"{decay}-{'delta' if corrects else 'sums'}-{seed}.json"
            found = cell(folder / file, about, result)
            scores = found["accuracy"]
            say(f"{name}, seed {seed}: " + ", ".join(f"{v:.3f} of {k}" for k, v in scores.items()))
            rows += [
                {"name": name, "seed": seed, "asked": k, "accuracy": v, "git": found["git"]}
                for k, v in scores.items()
            ]
    return rows


def write(path: Path, config: OverwritingRun, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows and their summary as JSON with provenance."""
    found = summary(rows, "asked")
    write_results(
        path, "everlong bench overwriting", asdict(config), summary=found, rows=list(rows)
    )
