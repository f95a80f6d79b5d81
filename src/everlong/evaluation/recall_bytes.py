"""Recall against bytes of state: one small model a memory and seed, five questions of it.

Every model is trained on a mixture of generated tasks, a batch of each in turn, behind a token that
says which: eight pairs asked for all at once, some of them overwritten before (MQAR); one symbol to
be kept across distractors (as a passkey is); symbols to be copied out of noise, in order; and keys
that are written, forgotten and written anew. Items are T tokens long in the end; training begins
with a quarter of it, and of what is stored, since pairs from the start of which there are many are
not learned in so few steps by most. Scored are held-out items of full length, each question by
itself; beside it stand the bytes of one stream's state after an item.
B batch, T time.
"""

import time
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.multiprocessing
import torch.nn.functional as F
from matplotlib.figure import Figure

from everlong import state as states
from everlong.evaluation.cells import cell
from everlong.evaluation.recall import HELD_OUT, build, fit, interval, memory_subject
from everlong.models.hub import EverlongForCausalLM
from everlong.provenance import git_sha, usable_cores, write_results
from everlong.registry import check_types, list_memories, memory_entry
from everlong.tasks import key_updates, mqar, recall, selective_copy
from everlong.tasks._shared import IGNORED, ScoredBatch

STAGES = ((0.25, 0.5), (0.5, 0.25), (1.0, 0.25))  # part of the length, share of the steps
PAIRS = 8  # and symbols to be copied, at full length
ASKED = ("mqar", "overwritten", "passkey", "copy", "updates")
Row = dict[str, Any]


@dataclass(frozen=True)
class BytesRun:
    """What is trained, at batch 32 and width 64 by default: two layers of a memory, or a memory
    around two layers of attention.

    A memory whose step takes more than `patience` seconds (0: any may) is left out and named.
    """

    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 5e-3  # the peak of one cycle
    hidden_size: int = 64
    num_heads: int = 4
    num_slots: int = 8
    segment_length: int = 16  # also of caches and windows
    length: int = 64  # T
    test_items: int = 256  # of each task
    patience: float = 0.8  # with items of full length
    device: str = "cpu"

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        check_types(BytesRun, vars(self), "bytes")
        for name in ("steps", "batch_size", "hidden_size", "num_heads", "test_items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.length < 64 or self.length % 32:
            raise ValueError(f"length is {self.length}: give a multiple of 32, 64 or more")


TIERS = {
    "smoke": BytesRun(steps=4, batch_size=4, test_items=4, patience=0.0),
    "laptop": BytesRun(),
    "gpu": BytesRun(
        steps=4000, batch_size=64, learning_rate=2e-3, hidden_size=128, num_slots=32,
        segment_length=64, length=256, test_items=1024, patience=0.0, device="cuda",
    ),
}  # fmt: skip


class Mixture:
    """The tasks, each behind its own first token; `make_batch` as of a task's module. Of items of
    a `part` of the length, with that part of the pairs and symbols."""

    def __init__(self, run: BytesRun, part: float = 1.0) -> None:
        length, pairs = int(run.length * part), int(PAIRS * part)
        self.device = run.device
        self.segment_length = run.segment_length  # a subject's options are read from it
        distractors = length // 8 - 2  # segments of 8 between the two that store and ask
        self.tasks: dict[str, tuple[Callable[..., Any], Any]] = {
            "mqar": (mqar.make_batch, mqar.MqarConfig(length, pairs, pairs // 2, vocab_size=32)),
            "passkey": (
                recall.make_batch,
                recall.RecallConfig(min_distractors=distractors, max_distractors=distractors),
            ),
            "copy": (
                selective_copy.make_batch,
                selective_copy.SelectiveCopyConfig(length=length, num_copied=pairs),
            ),
            "updates": (key_updates.make_batch, key_updates.KeyUpdatesConfig(length=length)),
        }
        self.marks = max(config.vocab_size for _, config in self.tasks.values())
        self.vocab_size = self.marks + len(self.tasks)

    def make_batch(self, name: str, seed: int, indices: Sequence[int]) -> tuple[ScoredBatch, Any]:
        """The items of `indices`, [B, T + 1], and the batch they are made from."""
        make, config = self.tasks[name]
        batch = make(config, seed, indices)
        mark = torch.full((len(indices), 1), self.marks + list(self.tasks).index(name))
        inputs = torch.cat([mark, batch.inputs], 1).to(self.device)
        scored = torch.cat([torch.full_like(mark, IGNORED), batch.targets], 1).to(self.device)
        return ScoredBatch(inputs, scored, torch.ones_like(inputs, dtype=torch.bool)), batch


def chance(run: BytesRun) -> dict[str, float]:
    """By what is asked: the share that one who has seen nothing answers."""
    by = {name: task.chance for name, (_, task) in Mixture(run).tasks.items()}
    return {asked: by["mqar" if asked == "overwritten" else asked] for asked in ASKED}


def training(run: BytesRun, seed: int) -> Iterator[ScoredBatch]:
    """`run.steps` batches, of each task in turn, stage by stage; no item twice, but the shortest,
    of which there are few."""
    mixtures = [Mixture(run, part) for part, _ in STAGES]
    ends = list(accumulate(share for _, share in STAGES))
    for step in range(run.steps):
        mixture = mixtures[bisect(ends, step / run.steps)]
        names = list(mixture.tasks)
        indices = range(step * run.batch_size, (step + 1) * run.batch_size)
        yield mixture.make_batch(names[step % len(names)], seed, indices)[0]


@torch.no_grad()
def accuracy(model: EverlongForCausalLM, mixture: Mixture, seed: int, items: int) -> Row:
    """Share of answered questions by what is asked, and the bytes of one stream's state behind."""
    found: Row = {}
    for name in mixture.tasks:
        scored, batch = mixture.make_batch(name, seed + HELD_OUT, range(items))
        logits, state = model.eval().stream(scored.inputs)
        hits, asked = scored.hits(logits), scored.targets != IGNORED
        if name == "mqar":
            again = F.pad(batch.overwritten, (1, 0)).to(hits.device)
            found["overwritten"] = float(hits[again].float().mean())
            asked = asked & ~again
        found[name] = float(hits[asked].float().mean())
        found["state_bytes"] = states.num_bytes(state) // items
    return found


def measure_one(name: str, run: BytesRun, seed: int) -> Row:
    """Train one memory's model under a seed; `left_out` holds the seconds of its step where that is
    above the run's patience. A model that `diverged` (weights that are not finite) answers nothing.
    """
    torch.set_flush_denormal(True)  # decayed states are full of them, and they cost 4-5 times
    mixture = Mixture(run)

    def make() -> Any:
        model: Any = build(memory_subject(name, mixture, run), mixture, run, seed)
        return model.to(run.device)

    if run.patience and (taken := _seconds(make(), mixture, run, seed)) > run.patience:
        return {"left_out": taken}
    model = make()
    started = time.perf_counter()
    fit(model, training(run, seed), run.length + 1, run.learning_rate, cycle=run.steps)
    return {
        "accuracy": accuracy(model, mixture, seed, run.test_items),
        "parameters": model.num_parameters(),
        "diverged": not all(bool(p.isfinite().all()) for p in model.parameters()),
        "seconds": time.perf_counter() - started,
        "git": git_sha(),
    }


def _seconds(model: EverlongForCausalLM, mixture: Mixture, run: BytesRun, seed: int) -> float:
    """Of a training step: the quickest of two, behind one that warms up, by the processor."""
    found, (batch, _) = [], mixture.make_batch("mqar", seed, range(run.batch_size))
    for _ in range(3):
        before = time.process_time()
        fit(model, [batch], run.length + 1, run.learning_rate)
        found.append(time.process_time() - before)
    return min(found[1:])


Cell = tuple[str, int]  # memory and seed


def _file(folder: Path, task: Cell) -> Path:
    return folder / f"{task[0]}-{task[1]}.json"


def _cell(task: Cell, run: BytesRun, folder: Path) -> tuple[str, int, Row]:
    name, seed = task
    about = {"run": asdict(run), "name": name, "seed": seed}
    return name, seed, cell(_file(folder, task), about, lambda: measure_one(name, run, seed))


def _each(
    make: Callable[[Cell], tuple[str, int, Row]], tasks: Sequence[Cell], folder: Path, device: str
) -> Iterator[tuple[str, int, Row]]:
    """Those that are finished, then the others as they end: one a core, on one thread each."""
    finished = [task for task in tasks if _file(folder, task).exists()]
    yield from map(make, finished)
    missing = [task for task in tasks if task not in finished]
    if not missing:
        return
    workers = min(len(missing), usable_cores() if device == "cpu" else 1)
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(make, missing)


def measure(
    run: BytesRun,
    names: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], dict[str, float]]:
    """A row for every memory (of `names`, or all), seed and question; and what was left out, with
    the seconds of its step.

    Every training is a file of `folder`, made once; as many are made at once as there are cores,
    on one thread each (one at a time on an accelerator). `ValueError` for an unknown name.
    """
    git_sha()  # that of the code which is loaded now
    wanted = list(dict.fromkeys(names)) or list_memories()
    for name in wanted:
        memory_entry(name)
    tasks = [(name, seed) for seed in seeds for name in wanted]
    make = partial(_cell, run=run, folder=folder)
    rows, left = [], {}
    for name, seed, found in _each(make, tasks, folder, run.device):
        if "left_out" in found:
            left[name] = found["left_out"]
            say(f"{name}, seed {seed}: left out, a step takes {found['left_out']:.2f} s")
            continue
        scores = found.pop("accuracy")
        held = scores.pop("state_bytes")
        told = ", ".join(f"{scores[k]:.2f} {k}" for k in ASKED)
        say(f"{name}, seed {seed}: {'diverged' if found.get('diverged') else told}")
        shared = {"name": name, "seed": seed, "state_bytes": held, **found}
        rows += [{**shared, "asked": k, "accuracy": scores[k]} for k in ASKED]
    order = {name: at for at, name in enumerate(wanted)}
    rows.sort(key=lambda row: (order[row["name"]], row["seed"], ASKED.index(row["asked"])))
    return rows, {name: left[name] for name in wanted if name in left}


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row a memory, the best mean over all questions first: {question: (mean, interval)}."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        seeds = sorted({row["seed"] for row in own})
        by = {k: [row["accuracy"] for row in own if row["asked"] == k] for k in ASKED}
        all_of = [mean(row["accuracy"] for row in own if row["seed"] == seed) for seed in seeds]
        found.append(
            {
                "name": name,
                "bounded": memory_entry(name).bounded,
                "state_bytes": own[0]["state_bytes"],
                "parameters": own[0]["parameters"],
                "seeds": len(seeds),
                "diverged": len({row["seed"] for row in own if row.get("diverged")}),
                "mean": mean(all_of),
                "interval": interval(all_of),
                "asked": {k: (mean(values), interval(values)) for k, values in by.items()},
            }
        )
    return sorted(found, key=lambda row: -row["mean"])


def write(
    path: Path, tier: str, run: BytesRun, rows: Sequence[Row], left: Mapping[str, float]
) -> None:
    """Rows, summary and what was left out as JSON with provenance, and the picture beside it."""
    found, guessed = summary(rows), chance(run)
    write_results(
        path,
        f"everlong bench bytes --tier {tier}",
        asdict(run),
        summary=found,
        chance=guessed,
        left_out=dict(left),
        rows=list(rows),
    )
    plot(found, guessed, path.with_suffix(".png"))


def plot(found: Sequence[Row], guessed: Mapping[str, float], path: Path) -> None:
    """A panel for all questions together and one for each, accuracy over bytes of state; dotted is
    chance."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    for axes, asked in zip(panels, ("all", *ASKED), strict=True):
        for row in found:
            value, spread = (
                (row["mean"], row["interval"]) if asked == "all" else row["asked"][asked]
            )
            colour = "C0" if row["bounded"] else "C1"
            axes.errorbar(
                row["state_bytes"], value, yerr=spread, fmt="o", ms=4, lw=0.8, color=colour
            )
            axes.annotate(
                row["name"], (row["state_bytes"], value), (4, 2), textcoords="offset points", size=6
            )
        line = mean(guessed.values()) if asked == "all" else guessed[asked]
        axes.axhline(line, color="tab:gray", linestyle=":")
        axes.set(xscale="log", ylim=(-0.03, 1.05), title=asked, xlabel="bytes of state")
        axes.set_ylabel("share answered")
        axes.grid(alpha=0.3)
    figure.suptitle("Recall against bytes of state (orange: a state that grows)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
