"""How near training comes to the speed at which this machine multiplies matrices.

A step is all that the loop makes of a rollout: reading it, forward, loss, backward by a horizon's
method, clipping, AdamW. Its matrix products are counted, `evaluation.meters.Flops`:

    needed  what plain back-propagation through time multiplies for the same rollout
    done    what the method multiplies, its recomputed forward passes among them

    fraction = needed / seconds / peak,      fraction_done = done / seconds / peak

`peak` is that of `torch.mm` in float32 on as many threads, at the best of the square `sizes`, timed
before and behind every step: what else the machine does slows both.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from everlong.errors import UserError
from everlong.evaluation.meters import Flops
from everlong.evaluation.recall import check_counts
from everlong.evaluation.timing import interleaved, timed, torch_threads, trusted
from everlong.models.config import EverlongConfig
from everlong.models.hub import EverlongForCausalLM
from everlong.provenance import write_results
from everlong.registry import check_types, suggest
from everlong.training.config import TrainConfig
from everlong.training.learner import Learner
from everlong.training.streams import as_documents

METHODS = ("full", "checkpoint", "replay")
TARGET = 0.75  # of the peak, recomputation not counted
_GIGA = 1e9
_PROBE = 4e9  # operations that a look at the peak takes
Row = dict[str, Any]


@dataclass(frozen=True)
class TrainingSpeed:
    """What is measured: rollouts of `segments` segments of `segment_length` tokens in `batch_size`
    rows, `rounds` timed steps of each method. Every row begins a stream with its rollout. `sizes`:
    of the square matrices whose product is the peak."""

    rounds: int = 3
    threads: tuple[int, ...] = (1, 2)
    batch_size: int = 2
    segments: int = 4
    segment_length: int = 256
    hidden_size: int = 512
    num_heads: int = 8
    num_slots: int = 64
    sizes: tuple[int, ...] = (512, 1024, 2048)
    seed: int = 0

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        plain = {n: v for n, v in vars(self).items() if n not in ("threads", "sizes")}
        check_types(type(self), plain, "training")
        for name in ("threads", "sizes"):
            check_counts(name, getattr(self, name))
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} are {list(getattr(self, name))}: give numbers above 0")
        for name in ("rounds", "batch_size", "segments", "segment_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")

    @property
    def tokens(self) -> int:
        """Of a rollout."""
        return self.batch_size * self.segments * self.segment_length

    def models(self) -> dict[str, dict[str, Any]]:
        """What is trained, four layers each: options of `EverlongConfig` by name."""
        size = self.segment_length

        def around(name: str, slots: int, **more: Any) -> dict[str, Any]:
            return {"segment": {"name": name, "segment_length": size, "num_slots": slots, **more}}

        window = {"sliding_attention": {"window": size}}
        cache = {"transformer_xl": {"segment_length": size, "memory_length": size}}
        linear = "gated_deltanet*3"
        return {
            "memformer": around("memformer", self.num_slots),
            "memformer-encoder-decoder": {
                "num_layers": 3,
                **around("memformer", self.num_slots, encoder_layers=1),
            },
            "rmt": around("rmt", self.num_slots // 4),
            "gated_deltanet": {"layers": ["gated_deltanet"]},
            "hybrid": {"layers": [linear, "attention"]},
            "sliding-hybrid": {"layers": [linear, "sliding_attention"], "mixers": window},
            "titans": {"layers": ["titans"]},
            "transformer_xl": {"layers": ["transformer_xl"], "mixers": cache},
            "attention": {"layers": ["attention"]},
        }


class Subject:
    """One model in training; its method is chosen step by step."""

    def __init__(self, name: str, config: TrainingSpeed) -> None:
        torch.manual_seed(config.seed)
        options: dict[str, Any] = {"num_layers": 4, "num_heads": config.num_heads}
        options |= config.models()[name]
        model = EverlongForCausalLM(EverlongConfig(hidden_size=config.hidden_size, **options))
        generator = np.random.default_rng(config.seed)
        length = config.segments * config.segment_length
        texts = generator.integers(0, 256, (config.batch_size, length)).astype(np.uint8)
        training = TrainConfig(
            batch_size=config.batch_size,
            segments=config.segments,
            segment_length=config.segment_length,
            horizon="replay",
            precision="fp32",
            device="cpu",
        )
        self.parameters = sum(p.numel() for p in model.parameters())
        self.learner = Learner(model, as_documents(list(texts)), training)

    def step(self, method: str) -> None:
        learner = self.learner
        learner.horizon = replace(learner.horizon, method=method)
        count, measured = learner.rollout()
        measured.tolist()  # as the loop looks at loss and norm
        learner.update(count)

    def flops(self, method: str) -> int:
        """Of the matrix products of one step."""
        with Flops() as flops:
            self.step(method)
        return flops.total


class Peak:
    """`torch.mm` at the best of some sizes, with as many threads as torch has now."""

    def __init__(self, sizes: Sequence[int], device: str = "cpu") -> None:
        self.clock = trusted(device, torch.get_num_threads())
        self.size, best = sizes[0], 0.0
        for size in sizes:
            self._make(size)
            found = max(self.measure() for _ in range(3))
            if found > best:
                self.size, best = size, found
        self._make(self.size)

    def _make(self, size: int) -> None:
        self.matrices = [torch.ones(size, size) for _ in range(3)]

    def measure(self) -> float:
        """Operations a second, now."""
        a, b, out = self.matrices
        each = 2 * len(a) ** 3
        calls = max(1, round(_PROBE / each))

        def run() -> None:
            for _ in range(calls):
                torch.mm(a, b, out=out)

        return calls * each / getattr(timed(run, "cpu")[1], self.clock)


def measure(
    config: TrainingSpeed,
    names: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[list[Row]]:
    """The rows of one model after the other: one for every number of threads and method.

    `seconds` are medians over the rounds, of the processor with one thread, else of the clock on
    the wall. Restores torch's generators and threads. `UserError` for an unknown name.
    """
    known = config.models()
    for name in names:
        if name not in known:
            hint = suggest(name, list(known))
            raise UserError(f"{name} is not trained here{hint} (there are {', '.join(known)})")
    for name in dict.fromkeys(names) or known:
        with torch.random.fork_rng():
            yield _measure(name, config, say)


def _measure(name: str, config: TrainingSpeed, say: Callable[[str], None]) -> list[Row]:
    say(f"{name}: counting")
    subject, rows = Subject(name, config), []
    with torch_threads(1):
        flops = {method: subject.flops(method) for method in METHODS}  # which also warms up
    for threads in config.threads:
        with torch_threads(threads):
            peak = Peak(config.sizes)
            found: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
            for turn, order in interleaved(METHODS, config.rounds, config.seed):
                say(f"{name}, threads {threads}, round {turn + 1} of {config.rounds}")
                for method in order:
                    found[method].append(_visit(subject, method, peak))
        for method in METHODS:
            about = {"memory": name, "method": method, "threads": threads, "clock": peak.clock}
            counts = {"needed": flops["full"], "done": flops[method]}
            rows.append(
                about
                | _row(config, counts, found[method], peak.size)
                | {"parameters": subject.parameters}
            )
    return rows


def _visit(subject: Subject, method: str, peak: Peak) -> tuple[float, float]:
    """Seconds of a step, and the peak around it."""
    before = peak.measure()
    _, spent = timed(lambda: subject.step(method), "cpu")
    return getattr(spent, peak.clock), mean((before, peak.measure()))


def _row(
    config: TrainingSpeed, flops: dict[str, int], found: Sequence[tuple[float, float]], size: int
) -> Row:
    fractions = {
        key: [count / seconds / peak for seconds, peak in found] for key, count in flops.items()
    }
    seconds = median(each for each, _ in found)
    return {
        **{f"{key}_gflop": count / _GIGA for key, count in flops.items()},
        "seconds": seconds,
        "all_seconds": [round(each, 4) for each, _ in found],
        "tokens_per_second": config.tokens / seconds,
        "peak_size": size,
        "peak_gflops": median(peak for _, peak in found) / _GIGA,
        "all_peak_gflops": [round(peak / _GIGA, 2) for _, peak in found],
        "fraction": median(fractions["needed"]),
        "all_fraction": [round(each, 4) for each in fractions["needed"]],
        "fraction_done": median(fractions["done"]),
    }


def write(path: Path, config: TrainingSpeed, rows: Sequence[Row]) -> None:
    """Rows as JSON with provenance; `reached`: which of BPTT's reach the target."""
    reached = [
        {"memory": row["memory"], "threads": row["threads"], "fraction": row["fraction"]}
        | {"reached": row["fraction"] >= TARGET}
        for row in rows
        if row["method"] == "full"
    ]
    write_results(
        path,
        "everlong bench training",
        asdict(config),
        target=TARGET,
        reached=reached,
        rows=list(rows),
    )
