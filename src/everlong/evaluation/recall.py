"""The recall toy over seeds: does the memory carry one symbol across distracting segments?

Subjects are Memformer's two forms; controls are the same weights with the memory wiped at every
segment, a horizon of one segment, and sliding-window attention of equal width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR

from everlong import state as states
from everlong.evaluation.cells import cell
from everlong.models.config import EverlongConfig
from everlong.models.hub import EverlongForCausalLM
from everlong.provenance import git_sha, write_results
from everlong.registry import check_types, memory_entry
from everlong.state import State
from everlong.stateful import Trace
from everlong.tasks.recall import IGNORED, RecallConfig, make_batch
from everlong.training.horizon import Horizon

HELD_OUT, WATCHED = 1_000_003, 2_000_003  # added to a seed: items of other streams
_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided 95 % of Student's t, by number of seeds


@dataclass(frozen=True)
class RecallRun:
    """One training of the toy, about half a minute on one core."""

    steps: int = 700
    batch_size: int = 32
    learning_rate: float = 3e-3
    hidden_size: int = 32
    num_heads: int = 4
    num_slots: int = 4
    test_items: int = 512
    distractors: tuple[int, ...] = (0, 4, 8, 32)

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        plain = {name: value for name, value in vars(self).items() if name != "distractors"}
        check_types(RecallRun, plain, "recall")
        for name in ("batch_size", "hidden_size", "num_heads", "num_slots", "test_items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.steps < 0 or self.learning_rate <= 0:
            raise ValueError("steps must be at least 0 and learning_rate above 0")
        check_counts("distractors", self.distractors)


def check_counts(name: str, values: Any) -> None:
    """`ValueError` for what is not a tuple of whole numbers from 0."""
    whole = isinstance(values, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in values)
    if whole and len(set(values)) < len(values):
        raise ValueError(f"{name} are {list(values)}: give each of them once")
    if not whole or not values:
        shown = list(values) if isinstance(values, tuple) else values
        raise ValueError(f"{name} is {shown!r}: give a list of whole numbers, such as [0, 1, 2]")


@dataclass(frozen=True)
class Subject:
    """What is trained: the model's layers, its segment memory, and how far gradients go."""

    num_layers: int
    segment: Mapping[str, Any] | None = None
    mixers: Mapping[str, Mapping[str, Any]] | None = None
    layers: tuple[str, ...] = ("attention",)
    truncate: int | None = None
    intermediate_size: int | None = None


def subjects(task: RecallConfig, run: RecallRun) -> dict[str, Subject]:
    """Both forms, each with a horizon of one, and the control without a memory."""
    slots = {"name": "memformer", "segment_length": task.segment_length, "num_slots": run.num_slots}
    both = {**slots, "encoder_layers": 1}
    window = {"sliding_attention": {"window": task.segment_length}}
    return {
        "encoder-decoder": Subject(1, both),
        "causal": Subject(2, slots),
        "encoder-decoder, horizon 1": Subject(1, both, truncate=1),
        "causal, horizon 1": Subject(2, slots, truncate=1),
        "sliding window": Subject(2, None, window, ("sliding_attention",)),
    }


# What a memory's options are on the toy, where it has them, as functions of the task and the run.
_TOY_OPTIONS: dict[str, Callable[[RecallConfig, RecallRun], int]] = {
    "segment_length": lambda task, _: task.segment_length,
    "memory_length": lambda task, _: task.segment_length,
    "compressed_length": lambda task, _: task.segment_length,
    "window": lambda task, _: task.segment_length,
    "num_slots": lambda _, run: run.num_slots,
    "memory_size": lambda _, run: run.hidden_size,
    "key_size": lambda _, run: run.hidden_size // run.num_heads,
}


def memory_subject(name: str, task: Any, run: Any, **options: Any) -> Subject:
    """A registered memory on the toy: two layers of it, or around two layers of attention.

    Segments, caches and windows are as long as the task's segments; widths and slots are the run's.
    """
    entry = memory_entry(name)
    toy = {key: value(task, run) for key, value in _TOY_OPTIONS.items() if key in entry.fields}
    toy |= options
    if entry.room == "segments":
        return Subject(2, {"name": name, **toy})
    return Subject(2, None, {name: toy}, (name,))


FAMILIES: dict[str, tuple[str, ...]] = {
    "recurrence": (
        "no_memory",
        "sliding_attention",
        "transformer_xl",
        "compressive",
        "lamemo",
        "rmt",
        "armt",
        "hmt",
        "memformer",
        "stable_hadamard",
    ),
    "linear": (
        "sliding_attention",
        "linear_attention",
        "retnet",
        "gla",
        "hgrn",
        "hgrn2",
        "deltanet",
        "gated_deltanet",
        "kda",
        "mom",
    ),
}


def family_subjects(family: str, task: RecallConfig, run: RecallRun) -> dict[str, Subject]:
    """The memories of a family by name, and what is published of them under other protocols."""
    found = {name: memory_subject(name, task, run) for name in FAMILIES[family]}
    if family == "recurrence":
        published = memory_subject("hmt", task, run, protocol="published", summary=1.0)
        found["hmt, published protocol (looks ahead)"] = published
        found["memformer, encoder-decoder"] = subjects(task, run)["encoder-decoder"]
    return found


def build(subject: Subject, task: Any, run: Any, seed: int) -> EverlongForCausalLM:
    """The subject's model for a task's `vocab_size` and a run's `hidden_size` and `num_heads`.

    One id more than the task's stands for bos.
    """
    torch.manual_seed(seed)
    return EverlongForCausalLM(
        EverlongConfig(
            vocab_size=task.vocab_size + 1,
            bos_token_id=task.vocab_size,
            eos_token_id=None,
            pad_token_id=None,
            hidden_size=run.hidden_size,
            num_heads=run.num_heads,
            num_layers=subject.num_layers,
            layers=list(subject.layers),
            intermediate_size=subject.intermediate_size,
            mixers={k: dict(v) for k, v in (subject.mixers or {}).items()},
            segment=None if subject.segment is None else dict(subject.segment),
        )
    )


def train(
    subject: Subject,
    task: RecallConfig,
    run: RecallRun,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> EverlongForCausalLM:
    """Train on items (seed, 0 ...) by replay over the whole item, segment by segment."""
    model = build(subject, task, run, seed)
    starts = range(0, run.steps * run.batch_size, run.batch_size)
    batches = (make_batch(task, seed, range(i, i + run.batch_size)) for i in starts)
    fit(model, batches, task.segment_length, run.learning_rate, subject.truncate, on_step)
    return model


def fit(
    model: EverlongForCausalLM,
    batches: Iterable[Any],
    segment_length: int,
    learning_rate: float,
    truncate: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
    cycle: int | None = None,
) -> None:
    """One optimiser step a batch, until there are no more: its `inputs`, `targets` and `mask`.

    By replay over whole items, segment by segment; the loss is the mean over targets. The rate is
    constant, or of one cycle of so many steps whose peak it is (Smith 2018, arXiv 1708.07120).
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    rate = None
    if cycle:
        rate = OneCycleLR(optimiser, learning_rate, total_steps=cycle, pct_start=0.1)
    horizon = Horizon("replay", truncate=truncate)

    def step(segment: tuple[torch.Tensor, ...], state: State) -> tuple[torch.Tensor, State]:
        inputs, targets, mask, count = segment
        trace = Trace(recording=False)
        logits, state = model.stream(inputs, state, mask, trace)
        loss = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        own = trace.total()  # a memory's own losses weigh like a target
        return loss / count + (0 if own is None else own), state

    for index, batch in enumerate(batches):
        count = (batch.targets != IGNORED).sum()
        parts = (
            part.split(segment_length, 1) for part in (batch.inputs, batch.targets, batch.mask)
        )
        segments = [(*segment, count) for segment in zip(*parts, strict=True)]
        optimiser.zero_grad()
        state = model.init_state(len(batch.inputs))
        loss, _ = horizon(step, segments, state, [1.0] * len(segments))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if rate is not None:
            rate.step()
        if on_step is not None:
            on_step(index + 1, float(loss))


@torch.no_grad()
def accuracy(
    model: EverlongForCausalLM, batch: Any, segment_length: int, wipe: bool = False
) -> float:
    """Share of queries answered (`batch.correct`, the mean over rows); `wipe` starts every segment
    from a fresh state."""
    logits, state = [], model.init_state(len(batch.inputs))
    everyone = torch.ones(len(batch.inputs), dtype=torch.bool)
    parts = (batch.inputs, batch.mask)
    for inputs, mask in zip(*(part.split(segment_length, 1) for part in parts), strict=True):
        if wipe:
            state = model.reset(state, everyone)
        found, state = model.stream(inputs, state, mask)
        logits.append(found)
    return float(batch.correct(torch.cat(logits, 1)).float().mean())


def measure(
    model: EverlongForCausalLM, task: RecallConfig, run: RecallRun, seed: int, wipe: bool = False
) -> dict[int, float]:
    """Accuracy by number of distractor segments, on another stream of items than the training's.

    With no distractor there are few different items: what is asked there was also seen.
    """
    found = {}
    for count in run.distractors:
        fixed = RecallConfig(**{**asdict(task), "min_distractors": count, "max_distractors": count})
        batch = make_batch(fixed, seed + HELD_OUT, range(run.test_items))
        found[count] = accuracy(model.eval(), batch, task.segment_length, wipe)
    return found


def compare(
    task: RecallConfig,
    run: RecallRun,
    seeds: Sequence[int],
    on_result: Callable[[str, int, dict[int, float]], None] | None = None,
) -> list[dict[str, Any]]:
    """Every subject and control over the seeds: rows of name, seed, distractors, accuracy."""
    rows = []
    for name, subject in subjects(task, run).items():
        for seed in seeds:
            model = train(subject, task, run, seed)
            cases = {name: False}
            if subject.segment is not None and subject.truncate is None:
                cases[f"{name}, memory wiped"] = True
            for case, wipe in cases.items():
                found = measure(model, task, run, seed, wipe)
                if on_result is not None:
                    on_result(case, seed, found)
                rows += [
                    {"name": case, "seed": seed, "distractors": count, "accuracy": value}
                    for count, value in found.items()
                ]
    return rows


def compare_family(
    family: str,
    task: RecallConfig,
    run: RecallRun,
    seeds: Sequence[int],
    folder: Path,
    on_result: Callable[[str, int, Mapping[str, float]], None],
) -> list[dict[str, Any]]:
    """`compare` for a family of memories; each training is a file in `folder`, made once."""
    git_sha()  # that of the code which is loaded now
    members = family_subjects(family, task, run)
    with torch.device("meta"):
        for subject in members.values():  # what cannot be built fails before anything is trained
            build(subject, task, run, 0)
    rows = []
    for seed in seeds:
        for name, subject in members.items():
            config = {"task": asdict(task), "run": asdict(run), "subject": asdict(subject)}

            def result(subject: Subject = subject, seed: int = seed) -> Any:
                model = train(subject, task, run, seed)
                held = model.init_state(1)
                return {
                    "accuracy": measure(model, task, run, seed),
                    "state_bytes": states.num_bytes(held),
                    "parameters": model.num_parameters(),
                    "git": git_sha(),
                }

            found = cell(folder / f"{name}-{seed}.json", config, result)
            on_result(name, seed, found["accuracy"])
            rest = {key: value for key, value in found.items() if key != "accuracy"}
            rows += [
                {"name": name, "seed": seed, "distractors": int(count), "accuracy": value, **rest}
                for count, value in found["accuracy"].items()
            ]
    return rows


def interval(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean (Student's t); None for one value or more than five."""
    if len(values) not in _T95:
        return None
    return _T95[len(values)] * stdev(values) / len(values) ** 0.5


def summary(rows: Sequence[Mapping[str, Any]], by: str = "distractors") -> list[dict[str, Any]]:
    """Mean over seeds with a 95 % interval (Student's t), by name and number of distractors, or
    whatever else of the rows is called `by`."""
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row["name"], row[by]), []).append(row["accuracy"])
    return [
        {
            "name": name,
            by: count,
            "mean": mean(values),
            "interval": interval(values),
            "worst": min(values),
            "best": max(values),
        }
        for (name, count), values in groups.items()
    ]


def write(
    path: Path,
    task: RecallConfig,
    run: RecallRun,
    rows: Sequence[Mapping[str, Any]],
    command: str = "everlong bench recall",
) -> None:
    """The rows and their summary as JSON with provenance."""
    config = {"task": asdict(task), "run": asdict(run)}
    write_results(path, command, config, summary=summary(rows), rows=list(rows))
