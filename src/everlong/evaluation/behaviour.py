"""What memories that learn at test time do, without training: four measures of one linear map.

*Overwriting*: which values are read of keys that were written twice. *Momentum*: how well a fixed
map is followed. *Outliers*: what a few wild values leave behind. *Capacity*: how many pairs are
read right. All through `everlong.ops.dual` in chunks of one position, where a gradient is taken at
the weights right before it, from weights of zero. Keys have length 1, and values are signs but in
*momentum*. Errors are squared: |read - value|^2 / |value|^2, each over all that is read.

X seeds, a memory each, N writes, F width of keys or of their features, V width of values, W window.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from everlong.ops.biases import BIASES
from everlong.ops.block import Inner
from everlong.ops.dual import Call, Pairs, dual, network
from everlong.ops.features import polynomial
from everlong.ops.schedule import Gates, lags
from everlong.provenance import git_sha, write_results

COMMAND = "everlong bench recall --family test-time"
_SHOWN = 1e-4, 100.0  # errors in the picture; above are only those that diverge
_DIVERGED = 1e6  # a squared error from here on is one that grows for ever
Row = dict[str, Any]


@dataclass(frozen=True)
class BehaviourRun:
    """width: of keys and values. keys are written in `overwriting`, then the first `rewritten`
    again; as many orthonormal ones in `outliers`, at random, `writes` in all, of which a share of
    `corrupted` with normal noise of deviation `noise`. A map of normal numbers is followed over
    `stream` keys; its late error is that of the last `late`, each before it is written. `pairs`,
    `window`: of capacity."""

    seeds: int = 100
    width: int = 16
    keys: int = 12
    rewritten: int = 6
    stream: int = 300
    late: int = 100
    writes: int = 600
    corrupted: float = 0.1
    noise: float = 20.0
    pairs: tuple[int, ...] = (8, 16, 32, 64, 128)
    window: int = 8

    def __post_init__(self) -> None:
        """`ValueError`, naming the options, for impossible values."""
        if self.seeds < 2:
            raise ValueError(f"seeds is {self.seeds}: give 2 or more, for there is an interval")
        if not 0 < self.rewritten < self.keys <= self.width:
            raise ValueError("give 0 < rewritten < keys <= width")
        if not 0 < self.late < self.stream:
            raise ValueError("give 0 < late < stream")


@dataclass(frozen=True)
class Rule:
    """How a memory learns its pairs: M = keep M - S, S = momentum S + step * the gradients of the
    last `window`. step None: 1 / the largest eigenvalue of the window's gram matrix. bias: of
    `everlong.ops.biases` (exponent 3), or "dot"; limit: of a gradient's length. degree: of features
    of the keys, whose kernel starts exp(q . k), brought to length 1, as `omeganet` starts."""

    step: float | None = 1.0
    keep: float = 1.0
    momentum: float | None = None
    bias: str = "l2"
    level: float = 1.0
    limit: float | None = None
    window: int = 1
    degree: int = 1

    def inner(self) -> Inner:
        if self.bias == "dot":
            return Inner(lambda o, target: -target, self.limit)
        bias, level = BIASES[self.bias], torch.tensor(self.level)
        return Inner(lambda o, target: bias(o - target, level, 3.0), self.limit)

    def features(self, keys: Tensor) -> Tensor:
        if self.degree == 1:
            return keys
        order = torch.arange(self.degree + 1) + 1.0
        return F.normalize(polynomial(keys, (-torch.lgamma(order)).exp()), dim=-1)  # 1 / i!


OVERWRITING = {
    "sums": Rule(bias="dot"),
    "sums, 5 % decay": Rule(bias="dot", keep=0.95),
    "gradient, step 1": Rule(),
    "momentum 0.3, step 0.7": Rule(momentum=0.3, step=0.7),
}
MOMENTA, REACHES = (None, 0.5, 0.9), (0.1, 0.2, 1.0)  # a reach is step / (1 - momentum)
OUTLIERS = {  # a level of 1 a coordinate, and of a vector of 16 signs its length
    "l2": Rule(0.3),
    "Huber, vector": Rule(0.3, bias="huber", level=4.0),
    "Huber, coordinate": Rule(0.3, bias="huber_coordinate"),
    "Huber, mixture": Rule(0.3, bias="huber_mixture"),
    "l1": Rule(0.3, bias="l1"),
    "l3": Rule(0.3, bias="lp"),
    "l3, limit 4": Rule(0.3, bias="lp", limit=4.0),
}


def capacity_rules(window: int) -> dict[str, Rule]:
    """With and without a window, with and without features."""
    return {
        "last pair": Rule(None),
        f"last {window} pairs": Rule(None, window=window),
        "last pair, degree 2": Rule(None, degree=2),
        f"last {window} pairs, degree 2": Rule(None, window=window, degree=2),
    }


@torch.no_grad()
def learn(
    keys: Tensor, values: Tensor, rule: Rule, query: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """keys [X, N, F] and values [X, N, V] in turn -> what query [X, N, F] (None: the keys) reads
    right behind each of them [X, N, V], and the last weights [X, F, V]."""
    seeds, count, width = keys.shape
    query, window = keys if query is None else query, rule.window
    windows, targets = (_windows(x, window) for x in (keys, values))
    place = torch.arange(window) + torch.arange(count)[:, None]
    real = (place >= window - 1)[:, None].expand(-1, seeds, -1)
    if rule.step is None:
        step = 1 / torch.linalg.eigvalsh(windows @ windows.mT)[..., -1]
    else:
        step = keys.new_full((count, seeds), rule.step)
    gates = Gates(
        keep=keys.new_full((count, seeds, 1), rule.keep),
        momentum=None if rule.momentum is None else keys.new_full((count, seeds, 1), rule.momentum),
        write=lags(step[..., None, None].expand(-1, -1, 1, window), real),
    )
    start = [keys.new_zeros(seeds, width, values.shape[-1])]
    moving = [] if rule.momentum is None else start
    full = torch.ones(count, seeds, dtype=torch.bool)
    pairs = Pairs(query.transpose(0, 1)[:, :, None], windows, (targets,))
    y, weights, _ = dual(Call(pairs, gates, full), start, moving, rule.inner())
    return y[:, :, 0].transpose(0, 1), weights[0]


def _windows(x: Tensor, window: int) -> Tensor:
    """x [X, N, D] -> the last W of each position, zeros before the first: [N, X, W, D]."""
    return F.pad(x, (0, 0, window - 1, 0)).unfold(1, window, 1).permute(1, 0, 3, 2).contiguous()


def overwriting(run: BehaviourRun) -> list[Row]:
    """Rows of name, asked, and the share of signs that are read right."""

    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        return _unit(run.keys, run, g), _signs(run.keys, run, g), _signs(run.rewritten, run, g)

    (keys, values, again), count = _draws(run, draw), run.rewritten
    stream = torch.cat([keys, keys[:, :count]], 1), torch.cat([values, again], 1)
    wanted, rows = torch.cat([again, values[:, count:]], 1), []
    for name, rule in OVERWRITING.items():
        _, weights = learn(*stream, rule)
        right = (network([weights], keys).sign() == wanted).float().mean(-1)
        for asked, part in (("rewritten", right[:, :count]), ("kept", right[:, count:])):
            rows.append(_row(name, "asked", asked, part.mean(-1)))
    return rows


def momentum(run: BehaviourRun) -> list[Row]:
    """Rows of name, momentum, step, reach = step / (1 - momentum), and the late error."""

    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        return torch.randn(run.width, run.width, generator=g), _unit(run.stream, run, g)

    fixed, keys = _draws(run, draw)
    values, rows = keys @ fixed, []
    for slow in MOMENTA:
        for reach in REACHES:
            step = reach * (1 - (slow or 0))
            rule = Rule(step, momentum=slow)
            read, _ = learn(keys, values, rule, query=keys.roll(-1, 1))  # that of the next key
            error = _error(read[:, -run.late - 1 : -1], values[:, -run.late :])
            row = _row(f"momentum {slow or 0}", "reach", reach, error)
            rows.append(row | {"momentum": slow or 0, "step": round(step, 6)})
    return rows


def outliers(run: BehaviourRun) -> list[Row]:
    """Rows of name, outliers, and the error of the values in the end."""

    def draw(g: torch.Generator) -> tuple[Tensor, ...]:
        keys = torch.linalg.qr(torch.randn(run.width, run.width, generator=g))[0][: run.keys]
        order = torch.randint(run.keys, (run.writes,), generator=g)
        hit = torch.rand(run.writes, 1, generator=g) < run.corrupted
        noise = run.noise * torch.randn(run.writes, run.width, generator=g)
        return keys, _signs(run.keys, run, g), order, hit * noise

    keys, values, order, noise = _draws(run, draw)
    place = order[..., None].expand(-1, -1, run.width)
    rows = []
    for name, rule in OUTLIERS.items():
        for label, added in (("none", 0 * noise), (f"{100 * run.corrupted:.3g} %", noise)):
            _, weights = learn(keys.gather(1, place), values.gather(1, place) + added, rule)
            rows.append(_row(name, "outliers", label, _error(network([weights], keys), values)))
    return rows


def capacity(run: BehaviourRun) -> list[Row]:
    """Rows of name, pairs, and the share of signs that are read right after one pass."""
    rows = []
    for count in run.pairs:
        keys, values = _draws(run, lambda g, n=count: (_unit(n, run, g), _signs(n, run, g)))
        for name, rule in capacity_rules(run.window).items():
            seen = rule.features(keys)
            _, weights = learn(seen, values, rule)
            right = (network([weights], seen).sign() == values).float().mean((1, 2))
            rows.append(_row(name, "pairs", count, right))
    return rows


TABLES: dict[str, Callable[[BehaviourRun], list[Row]]] = {
    "overwriting": overwriting,
    "momentum": momentum,
    "outliers": outliers,
    "capacity": capacity,
}


def measure(run: BehaviourRun) -> dict[str, list[Row]]:
    """Every table: rows of name, what it is by, and mean, interval, least and most over seeds; of
    what diverged for some seed (`diverged` says for how many) the mean is None."""
    git_sha()  # that of the code which is loaded now
    return {name: table(run) for name, table in TABLES.items()}


def _draws(
    run: BehaviourRun, draw: Callable[[torch.Generator], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """What is drawn of each seed, stacked."""
    each = [draw(torch.Generator().manual_seed(seed)) for seed in range(run.seeds)]
    return tuple(torch.stack(part) for part in zip(*each, strict=True))


def _unit(count: int, run: BehaviourRun, g: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(count, run.width, generator=g), dim=-1)


def _signs(count: int, run: BehaviourRun, g: torch.Generator) -> Tensor:
    return torch.randint(2, (count, run.width), generator=g) * 2.0 - 1


def _error(read: Tensor, values: Tensor) -> Tensor:
    """Squared and relative, [X]."""
    return (read - values).square().sum((1, 2)) / values.square().sum((1, 2))


def _row(name: str, by: str, at: Any, found: Tensor) -> Row:
    row: Row = {"name": name, by: at, "seeds": len(found)}
    lost = int((~(found < _DIVERGED)).sum())  # NaN is lost too
    if lost:
        return row | {"mean": None, "interval": None, "diverged": lost}
    z = NormalDist().inv_cdf(0.975)
    t = z + (z**3 + z) / (4 * (len(found) - 1))  # Student's, nearly
    spread = {"mean": found.mean(), "interval": t * found.std() / len(found) ** 0.5}
    spread |= {"least": found.min(), "most": found.max()}
    return row | {key: float(value) for key, value in spread.items()} | {"diverged": 0}


def write(path: Path, run: BehaviourRun, tables: Mapping[str, Sequence[Row]]) -> None:
    """The tables and what they compare as JSON with provenance, and the picture beside it."""
    compared = {"overwriting": OVERWRITING, "outliers": OUTLIERS}
    compared["capacity"] = capacity_rules(run.window)
    rules = {
        table: {k: asdict(rule) for k, rule in named.items()} for table, named in compared.items()
    }
    found = {name: list(rows) for name, rows in tables.items()}
    write_results(path, COMMAND, {"run": asdict(run), "rules": rules}, **found)
    plot(run, tables, path.with_suffix(".png"))


def plot(run: BehaviourRun, tables: Mapping[str, Sequence[Row]], png: Path) -> None:
    """A panel a table: means and 95 % intervals over seeds."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    (a, b), (c, d) = figure.subplots(2, 2)
    figure.suptitle(f"means and 95 % intervals over {run.seeds} seeds, no training", fontsize=10)
    pairs = f"{run.keys} pairs, keys of {run.width}"
    a.set_title(f"overwriting: {pairs}, {run.rewritten} of them written twice", fontsize=10)
    _aside(a, tables["overwriting"], "asked", "{} keys")

    b.set_title(f"momentum: a fixed map over {run.stream} keys of {run.width}", fontsize=10)
    _lines(b, tables["momentum"], "reach", 10)
    same = [row for row in tables["momentum"] if row["step"] == min(REACHES)]
    where = [row["reach"] for row in same], [row["mean"] for row in same]
    b.plot(
        *where, "o", color="black", markersize=13, fillstyle="none", label=f"step {min(REACHES)}"
    )
    b.set_yscale("log")
    b.set_xlabel("step / (1 - momentum)")
    b.set_ylabel(f"squared relative error, last {run.late} keys")

    c.set_title(f"outliers: {pairs}, {run.writes} writes at step 0.3", fontsize=10)
    c.set_yscale("log")
    _aside(c, tables["outliers"], "outliers", "outliers: {}", _SHOWN)
    c.set_ylabel("squared relative error")

    d.set_title(f"capacity: one pass over keys of {run.width}", fontsize=10)
    d.axhline(0.5, color="tab:gray", linestyle=":", label="chance")
    _lines(d, tables["capacity"], "pairs", 2)
    d.set_xlabel("pairs written")
    for axes in (a, d):
        axes.set_ylabel("share of signs read right")
    for axes in (a, b, c, d):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center" if axes is c else "best")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)


def _aside(
    axes: Axes, rows: Sequence[Row], by: str, label: str, ends: tuple[float, float] | None = None
) -> None:
    """The names beside each other, a mark for each of what `by` is; what is beyond the `ends` is a
    triangle there."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    low, high = ends or (0.0, 1.0)
    for index, at in enumerate(dict.fromkeys(row[by] for row in rows)):
        colour, shift = ("tab:blue", "tab:orange")[index], 0.16 * (2 * index - 1)
        axes.plot([], [], "os"[index], color=colour, label=label.format(at))
        for row in (row for row in rows if row[by] == at):
            mean = high if row["mean"] is None else max(row["mean"], low)
            inside = low < mean < high
            spread = row["interval"] if inside else None
            mark = "os"[index] if inside else "^" if mean == high else "v"
            where = names.index(row["name"]) + shift
            axes.errorbar(where, mean, spread, fmt=mark, color=colour, capsize=3)
    axes.set_xticks(range(len(names)), [textwrap.fill(name, 13) for name in names], fontsize=8)
    if ends:
        axes.set_ylim(low / 1.6, high * 1.6)
        axes.plot([], [], "v", color="tab:gray", label=f"below {low:g}")
        axes.plot([], [], "^", color="tab:gray", label="diverged")


def _lines(axes: Axes, rows: Sequence[Row], by: str, base: int) -> None:
    """A line a name over what `by` is."""
    for index, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        own = [row for row in rows if row["name"] == name]
        points = ([row[key] for row in own] for key in (by, "mean", "interval"))
        axes.errorbar(*points, fmt="osv^"[index] + "-", capsize=3, label=name)
    places = sorted({row[by] for row in rows})
    axes.set_xscale("log", base=base)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
