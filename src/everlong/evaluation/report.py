"""What a run looks like: its curves as a picture."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, ScalarFormatter

from everlong.errors import UserError
from everlong.training.run import read_metrics


def plot_curves(metrics: Path | str, png: Path | str) -> Path:
    """Draw bits per byte, and beneath learning rate and gradient norm, against tokens read.

    `metrics` is a run's metrics.jsonl. No display is needed. Raises `UserError` for an empty file.
    """
    lines = read_metrics(Path(metrics))
    if not lines:
        raise UserError(f"{metrics} holds no finished step: there is nothing to draw")
    tokens = [line["tokens"] for line in lines]
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))

    bits = [line["bits_per_byte"] for line in lines]
    upper.plot(tokens, bits, color="tab:blue", alpha=0.25, linewidth=1, label="training")
    upper.plot(tokens, _smooth(bits), color="tab:blue", label="training, moving mean")
    checked = [line for line in lines if "validation_bits_per_byte" in line]
    if checked:
        upper.plot(
            [line["tokens"] for line in checked],
            [line["validation_bits_per_byte"] for line in checked],
            "o-",
            color="tab:orange",
            markersize=4,
            label=f"validation (last {checked[-1]['validation_bits_per_byte']:.3f})",
        )
    upper.set_ylabel("bits per byte")
    upper.legend()
    upper.grid(alpha=0.3)

    rates = [line["learning_rate"] for line in lines]
    lower.plot(tokens, rates, color="tab:green")
    lower.set_ylabel("learning rate", color="tab:green")
    lower.set_xlabel("tokens read in training")
    lower.xaxis.set_major_formatter(EngFormatter(sep=""))
    lower.grid(alpha=0.3)
    norms = lower.twinx()
    norms.plot(tokens, [line["grad_norm"] for line in lines], color="tab:gray", alpha=0.5)
    norms.set_yscale("log")
    norms.set_ylabel("gradient norm", color="tab:gray")
    figure.savefig(png, dpi=120)
    return Path(png)


def plot_scores(rows: Iterable[Mapping[str, Any]], png: Path) -> None:
    """Bits per byte (lower is better) against bytes of state, a point a memory, best first in the
    legend. What is far worse than most stands at the upper edge, its number in the legend."""
    rows = sorted(rows, key=lambda row: row["bits_per_byte"])
    bits = [row["bits_per_byte"] for row in rows]
    top = min(max(bits), 1.15 * float(np.median(bits)))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        beyond = row["bits_per_byte"] > top
        spread = "" if row["interval"] is None else f" ± {row['interval']:.3f}"
        axes.errorbar(
            row["state_bytes"] / 1024,
            top if beyond else row["bits_per_byte"],
            None if beyond else row["interval"],
            fmt="^" if beyond else "osvD<>Pp*X"[index % 10],
            color=colormaps["tab20"](index % 20),
            capsize=3,
            label=f"{row['name']} {row['bits_per_byte']:.3f}{spread}{' (above)' * beyond}",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(min(bits) - 0.1, top + 0.02)
    axes.set_xlabel("one stream's state in KiB")
    axes.set_ylabel("bits per byte of validation text: lower is better")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(png, dpi=120)


def plot_recall(rows: Iterable[Mapping[str, Any]], chance: float, png: Path) -> None:
    """Accuracy with its interval at each number of distractors, a line a name, side by side."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["name"], []).append(row)
    counts = sorted({point["distractors"] for points in lines.values() for point in points})
    for index, (name, points) in enumerate(lines.items()):
        aside = 0.5 * (index / max(1, len(lines) - 1) - 0.5)  # equal answers stay visible
        axes.errorbar(
            [counts.index(point["distractors"]) + aside for point in points],
            [point["mean"] for point in points],
            [point["interval"] or 0 for point in points],
            label=name,
            color=colormaps["tab20"](index % 20),
            marker="osv^D<>Pp*X"[index % 11],
            linewidth=0.8,
            capsize=2,
            markersize=6,
        )
    axes.axhline(chance, color="tab:gray", linestyle=":", label="chance")
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("distractor segments between storing and asking")
    axes.set_ylabel("accuracy, mean and 95 % interval over seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(png, dpi=120)


def plot_cost(found: Sequence[Mapping[str, Any]], clock: str, png: Path) -> None:
    """A line a memory, the dearest in training first in the legend: microseconds a token, by
    `clock`, of reading, training and decoding against tokens of the stream, and training's peak.
    What growing memories cost is dashed; dots are training by replay, and reading on in calls."""
    cells = {memory["name"]: _by_kind(memory) for memory in found}
    took = f"took_{clock}"
    order = sorted(found, key=lambda memory: -cells[memory["name"]]["train"][-1][took])
    figure = Figure(figsize=(14, 9), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    word = {"cpu": "processor time", "wall": "wall clock"}[clock]
    shown = (
        (f"reading, us a token ({word})", took, 1.0, "read", "stream"),
        ("forward and backward, us a token", took, 1.0, "train", "replay"),
        ("decoding, us a token", took, 1.0, "decode", ""),
        ("forward and backward, MB alive at the peak", "live_bytes", 1e6, "train", "replay"),
    )
    for axes, (title, key, unit, solid, dotted) in zip(panels, shown, strict=True):
        lengths = set()
        for index, memory in enumerate(order):
            own = cells[memory["name"]]
            style = {"color": colormaps["tab20"](index % 20), "linewidth": 1.2, "markersize": 4}
            style["marker"] = "osv^D<>Pp*X"[index % 11]
            line = "-" if memory["bounded"] else "--"
            for kind, dashes in ((solid, line), (dotted, ":")):
                points = own.get(kind, [])
                label = memory["name"] if kind == solid else None
                x, y = [row["length"] for row in points], [row[key] / unit for row in points]
                axes.plot(x, y, dashes, label=label, **style)
                lengths |= set(x)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks: list[int] = []
        for length in sorted(lengths, reverse=True):  # what lies too close to be read has no label
            if not ticks or length <= 0.7 * ticks[-1]:
                ticks.append(length)
        axes.set_xticks(ticks, [f"{length:,}" for length in ticks], rotation=30, fontsize=8)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens", fontsize=8)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center")
    figure.savefig(png, dpi=120)


def _by_kind(memory: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in memory["rows"]:
        kinds.setdefault(row["kind"], []).append(row)
    return kinds


def plot_hybrid(
    recalled: Iterable[Mapping[str, Any]],
    read: Iterable[Mapping[str, Any]],
    pairs: int,
    chance: float,
    kind: str,
    png: Path,
) -> None:
    """Left the recall of each linear kind by form, right bits per byte of `kind` over ratios, with
    the bytes of one stream's state; means and 95 % intervals over seeds."""
    forms: dict[str, list[Mapping[str, Any]]] = {}
    for row in recalled:
        forms.setdefault(row["form"], []).append(row)
    read = list(read)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for index, (form, points) in enumerate(forms.items()):
        aside = 0.2 * (index - (len(forms) - 1) / 2)
        left.errorbar(
            [place + aside for place in range(len(points))],
            [point["mean"] for point in points],
            [point["interval"] or 0 for point in points],
            label=form,
            fmt="osv^D"[index],
            capsize=3,
        )
        left.set_xticks(range(len(points)), [point["name"] for point in points], rotation=30)
    left.axhline(1 / pairs, color="tab:gray", linestyle="--", label="any value that was shown")
    left.axhline(chance, color="tab:gray", linestyle=":", label="any value")
    left.set_ylim(0, 1.04)
    left.set_ylabel("share of the questions answered")
    left.set_title(f"{pairs} pairs, by keys of {pairs // 4} a head", fontsize=10)
    left.legend(fontsize=8)
    right.set_title(f"language, {kind}", fontsize=10)
    right.set_xlabel("linear layers to attention, and one stream's state")
    right.set_ylabel("bits per byte: lower is better")
    if read:
        bits = [row["bits_per_byte"] for row in read]
        spread = [row["interval"] or 0 for row in read]
        right.errorbar(range(len(read)), bits, spread, fmt="o-", capsize=3)
        names = [f"{row['name']}\n{row['state_bytes'] / 1024:,.0f} KiB" for row in read]
        right.set_xticks(range(len(read)), names)
        middle = (min(bits) + max(bits)) / 2
        reach = max(abs(b - middle) + s for b, s in zip(bits, spread, strict=True))
        window = max(0.25, 1.1 * reach)  # a wide one: what is flat shall look flat
        right.set_ylim(middle - window, middle + window)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(png, dpi=120)


def _smooth(values: list[float]) -> np.ndarray:
    """Means over a window around each value, a twentieth of the run wide, cut at both ends."""
    kernel = np.ones(2 * (len(values) // 40) + 1)
    counts = np.convolve(np.ones(len(values)), kernel, "same")
    return np.convolve(values, kernel, "same") / counts
