"""Figure 5 of the Memformer paper: time, FLOPs and memory against length and against memory size.

Memformer (both forms), Transformer-XL and a vanilla decoder with its growing cache read a stream
segment by segment without gradients, fresh weights, equal width and layers, float32. Then Memformer
and Transformer-XL with equally many places of memory: the peak of reading, and of one segment's
training step with a full memory. Bytes are those of tensors made while reading, so of states and
activations and not of parameters. S tokens of a segment, N slots, M places of a cache.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from everlong import state as states
from everlong.evaluation.cells import cell
from everlong.evaluation.meters import Flops, LiveBytes
from everlong.evaluation.recall import check_counts
from everlong.evaluation.timing import interleaved, timed, torch_threads
from everlong.models.config import EverlongConfig
from everlong.models.sizing import build
from everlong.provenance import git_sha
from everlong.registry import check_types

Row = dict[str, Any]
VANILLA, XL, PUBLISHED, CAUSAL = "vanilla", "transformer_xl", "memformer", "memformer, causal"


@dataclass(frozen=True)
class LengthRun:
    """lengths: tokens of a stream, whole segments; sizes: places of a memory, those of `lengths`
    have `num_slots` and `cache`; rows: of a batch, `length_rows` against the length."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    num_slots: int = 64
    cache: int = 256
    rounds: int = 3
    rows: int = 4
    segment_length: int = 64
    hidden_size: int = 128
    num_heads: int = 4
    num_layers: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """`ValueError`, naming the option, for a wrong type or an impossible value."""
        plain = {k: v for k, v in vars(self).items() if k not in ("lengths", "sizes")}
        check_types(type(self), plain, "length")
        check_counts("lengths", self.lengths)
        check_counts("sizes", self.sizes)
        if any(length < 1 or length % self.segment_length for length in self.lengths):
            raise ValueError(
                f"lengths are {list(self.lengths)}: give multiples of segment_length, "
                f"{self.segment_length}"
            )


def model_config(name: str, run: LengthRun, places: int | None = None) -> EverlongConfig:
    """A subject's model, with so many places of memory (None: what the run says)."""
    options: Row = {
        "hidden_size": run.hidden_size,
        "num_heads": run.num_heads,
        "num_layers": run.num_layers,
    }
    slots = {
        "name": "memformer",
        "segment_length": run.segment_length,
        "num_slots": places or run.num_slots,
    }
    cached = {"segment_length": run.segment_length, "memory_length": places or run.cache}
    own: Mapping[str, Row] = {
        VANILLA: {},
        XL: {"layers": ["transformer_xl"], "mixers": {"transformer_xl": cached}},
        CAUSAL: {"segment": slots},
        PUBLISHED: {
            "num_layers": run.num_layers - 1,
            "segment": {**slots, "encoder_layers": 1},
        },
    }
    return EverlongConfig(**{**options, **own[name]})


def tokens(run: LengthRun, rows: int, length: int) -> Sequence[torch.Tensor]:
    """Segments Int [rows, S] of random bytes."""
    generator = torch.Generator().manual_seed(run.seed)
    ids = torch.randint(256, (rows, length), generator=generator)
    return ids.split(run.segment_length, 1)


@torch.no_grad()
def read(
    model: Any,
    segments: Sequence[torch.Tensor],
    at: Callable[[int, Any], None] = lambda length, state: None,
) -> Any:
    """The state behind a stream; `at` is told of tokens read and the state after each segment."""
    state, length = model.init_state(len(segments[0])), 0
    for ids in segments:
        _, state = model.stream(ids, state)
        length += ids.shape[1]
        at(length, state)
    return state


def by_length(name: str, run: LengthRun) -> list[Row]:
    """FLOPs a token, peak bytes and bytes of state after each of `lengths`: one reading."""
    model = build(model_config(name, run), run.seed).eval()
    rows: list[Row] = []
    with LiveBytes() as live, Flops() as flops:

        def at(length: int, state: Any) -> None:
            if length in run.lengths:
                rows.append(
                    {
                        "name": name,
                        "length": length,
                        "flops": flops.total / length,
                        "peak_bytes": live.peak,
                        "state_bytes": states.num_bytes(state),
                    }
                )

        read(model, tokens(run, 1, max(run.lengths)), at)
    return rows


def times(run: LengthRun, names: Sequence[str]) -> dict[str, dict[int, list[float]]]:
    """Processor seconds from the start of a stream to each of `lengths`, round by round."""
    models = {name: build(model_config(name, run), run.seed).eval() for name in names}
    segments = tokens(run, 1, max(run.lengths))
    found: dict[str, dict[int, list[float]]] = {
        name: {length: [] for length in run.lengths} for name in names
    }
    with torch_threads(1):
        for model in models.values():
            read(model, segments[:2])
        for _, order in interleaved(list(names), run.rounds, run.seed):
            for name in order:
                model, spent, state = models[name], 0.0, None
                for index, ids in enumerate(segments):
                    (_, state), took = timed(lambda: _next(model, ids, state), "cpu")  # noqa: B023
                    spent += took.cpu
                    length = (index + 1) * run.segment_length
                    if length in found[name]:
                        found[name][length].append(spent)
    return found


@torch.no_grad()
def _next(model: Any, ids: torch.Tensor, state: Any) -> Any:
    return model.stream(ids, state)


def by_size(name: str, places: int, run: LengthRun) -> Row:
    """Peak bytes of reading until the memory is full, of one segment's training step behind it, and
    FLOPs a token of that segment's reading."""
    config = model_config(name, run, places)
    model = build(config, run.seed).eval()
    full = tokens(run, run.rows, places + 2 * run.segment_length)
    with LiveBytes() as live:
        state = read(model, full[:-1])
    with Flops() as flops:
        _next(model, full[-1], state)
    held = states.num_bytes(state)
    with LiveBytes() as training:
        logits, after = model.train().stream(full[-1], copy.copy(state))
        loss = F.cross_entropy(logits.flatten(0, 1), full[-1].flatten())
        loss.backward()
    del after
    return {
        "name": name,
        "places": places,
        "state_bytes": held // run.rows,
        "read_bytes": live.peak,
        "train_bytes": training.peak + held,
        "flops": flops.total / full[-1].numel(),
    }


def measure(run: LengthRun, folder: Path, say: Callable[[str], None]) -> Row:
    """{"length": rows, "size": rows}; a file of `folder` for each part, made once.

    Rows of "length" have seconds a token, median over rounds and all of them.
    """
    git_sha()  # that of the code which is loaded now
    about, names = asdict(run), (VANILLA, XL, CAUSAL, PUBLISHED)

    def lengths() -> Row:
        taken, rows = times(run, names), []
        for row in (row for name in names for row in by_length(name, run)):
            each = [seconds / row["length"] for seconds in taken[row["name"]][row["length"]]]
            rows.append(row | {"seconds": median(each), "all_seconds": each})
        return {"rows": rows, "git": git_sha()}

    def sizes() -> Row:
        pairs = [(name, places) for places in run.sizes for name in (XL, CAUSAL, PUBLISHED)]
        return {"rows": [by_size(name, places, run) for name, places in pairs], "git": git_sha()}

    found = {}
    for part, make in (("length", lengths), ("size", sizes)):
        say(f"length: by {part}")
        found[part] = cell(folder / f"{part}.json", about, make)
    return found


def plot(found: Row, path: Path) -> None:
    """FLOPs and time a token and peak memory against the length; memory against memory size."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2).flat
    drawn = (
        ("length", "length", "flops", 1e6, "MFLOP a token"),
        ("length", "length", "seconds", 1e-6, "processor microseconds a token"),
        ("length", "length", "peak_bytes", 1e6, "peak MB of reading one stream"),
        ("size", "places", "train_bytes", 1e6, "peak MB of a training step"),
    )
    for axes, (part, x, y, unit, label) in zip(panels, drawn, strict=True):
        rows = found[part]["rows"]
        for marker, name in zip("osv^", dict.fromkeys(row["name"] for row in rows), strict=False):
            own = [row for row in rows if row["name"] == name]
            colour = f"C{(VANILLA, XL, CAUSAL, PUBLISHED).index(name)}"
            axes.plot(
                [row[x] for row in own],
                [row[y] / unit for row in own],
                marker=marker,
                color=colour,
                label=name,
                markersize=4,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlabel("tokens read" if part == "length" else "slots, or places of a cache")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
