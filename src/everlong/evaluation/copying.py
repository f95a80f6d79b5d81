"""The copy task over seeds: what memory tokens carry and a cache of the last segment cannot.

Subjects are RMT, and Transformer-XL with a cache as long as a segment, each trained twice: on
sources of full length from the start, and by a curriculum, on sources of up to 1 segment until
they are copied, then up to 2, and so on, the number drawn for every item. With fewer layers than
the source has segments, no symbol is in reach of Transformer-XL's query for it (tasks/copying).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everlong.evaluation.curriculum import until_learnt
from everlong.evaluation.recall import HELD_OUT, WATCHED, Subject, accuracy, build, fit, summary
from everlong.models.hub import EverlongForCausalLM
from everlong.provenance import write_results
from everlong.registry import check_types
from everlong.tasks.copying import CopyBatch, CopyConfig, make_batch

SUBJECTS = ("rmt", "transformer_xl")


@dataclass(frozen=True)
class CopyRun:
    """A source of `source_segments` segments is copied; `steps` are the most of one training.

    Every `watch_every` steps, `watch_items` items of the stage's longest sources tell whether it
    is learnt (0.9 of the symbols), and at full length whether training may stop (0.998).
    """

    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 5e-3
    hidden_size: int = 32
    num_heads: int = 4
    num_layers: int = 1
    num_slots: int = 8
    segment_length: int = 4
    num_symbols: int = 8
    source_segments: int = 2
    watch_every: int = 50
    watch_items: int = 128
    test_items: int = 512

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        check_types(CopyRun, vars(self), "copy")
        for name, value in vars(self).items():
            if name not in ("steps", "learning_rate") and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")
        if self.steps < 0 or self.learning_rate <= 0:
            raise ValueError("steps must be at least 0 and learning_rate above 0")
        self.task(1, self.source_segments)

    def task(self, least: int, most: int) -> CopyConfig:
        """Of sources of `least` to `most` segments."""
        return CopyConfig(self.segment_length, self.num_symbols, least, most)


def subject(name: str, run: CopyRun) -> Subject:
    """`num_layers` layers of Transformer-XL, or of attention inside RMT."""
    length = {"segment_length": run.segment_length}
    if name == "rmt":
        return Subject(run.num_layers, {"name": name, "num_slots": run.num_slots, **length})
    options = {"memory_length": run.segment_length, **length}
    return Subject(run.num_layers, None, {name: options}, (name,))


def batches(
    model: EverlongForCausalLM, run: CopyRun, seed: int, curriculum: bool
) -> Iterator[CopyBatch]:
    """Training batches until `model`, which is trained between two of them, copies full sources."""
    stages = range(1 if curriculum else run.source_segments, run.source_segments + 1)

    def batch(longest: int, step: int) -> CopyBatch:
        first = step * run.batch_size
        task = run.task(1 if curriculum else longest, longest)
        return make_batch(task, seed, range(first, first + run.batch_size))

    def score(longest: int) -> float:
        return _accuracy(model, run, longest, seed + WATCHED, run.watch_items)

    return until_learnt(stages, run.steps, run.watch_every, batch, score)


def _accuracy(
    model: EverlongForCausalLM, run: CopyRun, segments: int, seed: int, items: int
) -> float:
    """Share of the symbols copied from sources of `segments` segments."""
    batch = make_batch(run.task(segments, segments), seed, range(items))
    model.eval()
    found = accuracy(model, batch, run.segment_length)
    model.train()
    return found


def measure(
    config: CopyRun, seeds: Sequence[int], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every subject with and without the curriculum over the seeds, by length of held-out sources.

    Rows of name, seed, symbols, accuracy (per symbol) and steps (made); `say` is told of each
    training.
    """
    rows = []
    for seed in seeds:
        for name in SUBJECTS:
            for curriculum in (False, True):
                model = build(
                    subject(name, config), config.task(1, config.source_segments), config, seed
                )
                steps: list[int] = []
                fit(
                    model,
                    batches(model, config, seed, curriculum),
                    config.segment_length,
                    config.learning_rate,
                    on_step=lambda step, _, steps=steps: steps.append(step),
                )
                found = {
                    k * config.segment_length: _accuracy(
                        model, config, k, seed + HELD_OUT, config.test_items
                    )
                    for k in range(1, config.source_segments + 1)
                }
                label = f"{name}, curriculum" if curriculum else name
                scores = ", ".join(f"{value:.3f} of {n} symbols" for n, value in found.items())
                say(f"{label}, seed {seed}: {scores} ({len(steps)} steps)")
                rows += [
                    {
                        "name": label,
                        "seed": seed,
                        "symbols": symbols,
                        "accuracy": value,
                        "steps": len(steps),
                    }
                    for symbols, value in found.items()
                ]
    return rows


def write(path: Path, config: CopyRun, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows and their summary as JSON with provenance."""
    table = summary(rows, "symbols")
    write_results(path, "everlong bench copy", asdict(config), summary=table, rows=list(rows))
