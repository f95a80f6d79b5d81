"""What memory replay costs against back-propagation through time and gradient checkpointing.

Bytes held, time, and the difference of gradients, for two forms of the Memformer language model:
"whole", decoder-only, whose next state needs every layer, and "quarter", encoder-decoder, whose
next state needs the encoder, one layer of four. The first sweep of replay runs `model.advance`, as
in training.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from everlong.evaluation.meters import LiveBytes, SavedBytes
from everlong.models.config import EverlongConfig
from everlong.models.hub import EverlongForCausalLM
from everlong.provenance import write_results
from everlong.training.horizon import Horizon
from everlong.training.rollout import ReplayOptions, Rollout

METHODS = ("full", "checkpoint", "replay")
FORMS = ("whole", "quarter")
Row = dict[str, Any]


@dataclass(frozen=True)
class ReplayCost:
    """What is measured: rollouts of `counts` segments, timed in interleaved rounds; of those with
    more than 16 segments fewer, but at least 3."""

    counts: tuple[int, ...] = (2, 4, 8, 16, 64)
    rounds: int = 9
    batch_size: int = 2
    segment_length: int = 64
    hidden_size: int = 256
    num_heads: int = 4
    num_slots: int = 16
    dropout: float = 0.1
    seed: int = 0


class Subject:
    """One form of the model and its segments; a run of a method leaves its gradients in it."""

    def __init__(self, form: str, config: ReplayCost) -> None:
        layers = {"whole": (0, 4), "quarter": (1, 3)}[form]
        memory = {
            "name": "memformer",
            "segment_length": config.segment_length,
            "num_slots": config.num_slots,
            "encoder_layers": layers[0],
        }
        self.form, self.config = form, config
        self.forwards = self.backwards = 0
        torch.manual_seed(config.seed)
        self.model = EverlongForCausalLM(
            EverlongConfig(
                hidden_size=config.hidden_size,
                num_heads=config.num_heads,
                num_layers=layers[1],
                dropout=config.dropout,
                segment=memory,
            )
        ).train()
        shape = (config.batch_size, max(config.counts) * config.segment_length + 1)
        self.ids = torch.randint(256, shape)
        self.options = ReplayOptions(advance=self.advance)

    def segments(self, count: int) -> list[tuple[Tensor, Tensor]]:
        length = count * self.config.segment_length
        inputs, targets = self.ids[:, :length], self.ids[:, 1 : length + 1]
        return list(zip(inputs.chunk(count, 1), targets.chunk(count, 1), strict=True))

    def step(self, segment: tuple[Tensor, Tensor], state: Any) -> tuple[Tensor, Any]:
        self.forwards += 1
        logits, state = self.model.stream(segment[0], state)
        loss = F.cross_entropy(logits.flatten(0, 1), segment[1].flatten())
        if loss.requires_grad:
            loss.register_hook(self._count_backward)
        return loss, state

    def advance(self, segment: tuple[Tensor, Tensor], state: Any) -> Any:
        self.forwards += 1
        return self.model.advance(segment[0], state)

    def _count_backward(self, _: Tensor) -> None:
        self.backwards += 1

    def run(self, method: str, count: int) -> None:
        self.model.zero_grad()
        self.forwards = self.backwards = 0
        torch.manual_seed(self.config.seed)
        state = self.model.init_state(self.config.batch_size)
        Horizon(method, options=self.options)(self.step, self.segments(count), state)

    def gradients(self) -> dict[str, Tensor]:
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def buffer_bytes(self, method: str, count: int) -> int:
        """Of the states that replay holds between its sweeps."""
        if method != "replay":
            return 0
        state = self.model.init_state(self.config.batch_size)
        rollout = Rollout(self.step, self.segments(count), state, self.options, range(count))
        rollout.sweep(0, count - 1)
        return rollout.buffer.num_bytes()

    def path_share(self) -> float:
        """The measured cost of a segment's state path against its whole forward pass."""
        segment = self.segments(1)[0]
        path, whole = [], []
        with torch.no_grad():
            state = self.step(segment, self.model.init_state(self.config.batch_size))[1]
            for _ in range(20):
                path.append(_seconds(lambda: self.advance(segment, state))[1])
                whole.append(_seconds(lambda: self.step(segment, state))[1])
        return statistics.median(path) / statistics.median(whole)


def _seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def measure(config: ReplayCost, report: Callable[[str], None] = lambda line: None) -> list[Row]:
    """A row for every form, number of segments and method. Restores torch's generators."""
    rows: list[Row] = []
    with torch.random.fork_rng():
        for form in FORMS:
            subject = Subject(form, config)
            share = subject.path_share()
            for count in config.counts:
                report(f"{form}, {count} segments")
                rows += _measure(subject, count, share)
    return rows


def _measure(subject: Subject, count: int, share: float) -> list[Row]:
    rows, exact = [], {}
    for method in METHODS:
        with LiveBytes() as live:
            subject.run(method, count)
        with SavedBytes(subject.model.parameters()) as saved:
            subject.run(method, count)
        found = subject.gradients()
        exact = exact or found
        assert found.keys() == exact.keys()
        rows.append(
            {
                "form": subject.form,
                "segments": count,
                "method": method,
                "forwards": subject.forwards,
                "backwards": subject.backwards,
                "saved_bytes": saved.peak,
                "live_bytes": live.peak,
                "gradient_difference": max(_difference(found[n], exact[n]) for n in found),
                "largest_gradient": max(float(g.abs().max()) for g in found.values()),
                "buffer_bytes": subject.buffer_bytes(method, count),
            }
        )
    for row in rows:
        if row["method"] == "replay":  # the theory: a backward costs two forwards
            row |= {"path_share": share, "theory": 1 + share * (count - 1) / (3 * count)}
    _time(subject, count, rows)
    return rows


def _time(subject: Subject, count: int, rows: list[Row]) -> None:
    """Medians into `rows`: of the clock, and of the processor's seconds, which a busy machine
    stretches less. Each round takes the methods in another order."""
    rounds = subject.config.rounds
    rounds = rounds if count <= 16 else max(3, rounds * 16 // count)
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for number in range(rounds):
        for method in METHODS[number % 3 :] + METHODS[: number % 3]:
            times[method].append(_seconds(lambda m=method: subject.run(m, count)))
    for clock, (seconds, ratio) in enumerate(
        (("seconds", "times_bptt"), ("cpu_seconds", "cpu_times_bptt"))
    ):
        median = {m: statistics.median(pair[clock] for pair in times[m]) for m in METHODS}
        for row in rows:
            row[seconds] = median[row["method"]]
            row[ratio] = median[row["method"]] / median["full"]
            row["all_" + seconds] = [round(pair[clock], 4) for pair in times[row["method"]]]


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def write(
    config: ReplayCost, rows: Sequence[Row], results: Path, figure: Path, command: str
) -> None:
    """Rows as JSON with their provenance, and as a picture."""
    write_results(results, command, asdict(config), rows=list(rows))
    plot(rows, figure)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Peak bytes, and time against BPTT, by number of segments."""
    colours = dict(zip(METHODS, ("tab:gray", "tab:orange", "tab:blue"), strict=True))
    needs = {"whole": "every layer", "quarter": "one layer of four"}
    counts = sorted({row["segments"] for row in rows})
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for form, style in zip(FORMS, ("o-", "s--"), strict=True):
        for method in METHODS:
            line = [row for row in rows if (row["form"], row["method"]) == (form, method)]
            label = {"full": "BPTT"}.get(method, method) + f", next state needs {needs[form]}"
            for axes, key, unit in ((left, "live_bytes", 1e6), (right, "times_bptt", 1)):
                points = ([row["segments"] for row in line], [row[key] / unit for row in line])
                axes.plot(*points, style, color=colours[method], label=label, markersize=4)
    left.set_ylabel("peak bytes of tensors (MB)")
    right.set_ylabel("time / time of BPTT")
    left.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("segments in the rollout")
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
