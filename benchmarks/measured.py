"""The tables of docs/measured.md, read from benchmarks/results: `python benchmarks/measured.py`.

Nothing is measured here: each table's JSON names the command that wrote it.
"""

import json
from pathlib import Path
from typing import Any

from everlong.cli.progress import size
from everlong.evaluation.markdown import marked, table

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def read(name: str) -> Row:
    return json.loads((RESULTS / f"{name}.json").read_text())


def state_of(row: Row) -> str:
    """Bytes of one stream's state, and whether it is bounded."""
    return size(row["state_bytes"]) + ("" if row["bounded"] else ", grows")


def decoding() -> str:
    """Models of equal parameters against the time their weights take to be read."""
    rows = [row for row in read("decoding")["models"] if row["threads"] == 1]
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    by = {(row["name"], tuple(row["shape"])): row for row in rows}
    cells = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [by[name, shape] for shape in shapes]
        cells.append([name])
        for row in own:
            cells[-1] += [f"{1e6 / row['stream_cpu']:.0f}", f"{row['fraction']:.2f}",
                          f"{row['speed']:.1f}"]  # fmt: skip
        cells[-1].append(size(own[0]["state_bytes"]))
    heads = [
        f"{what}, {layers} x {width}"
        for width, layers in shapes
        for what in ("tokens/s", "of the bound", "times Transformer-XL's")
    ]
    return table(["model", *heads, "state"], cells)


def flat() -> str:
    """Every bounded memory alone: a token far into its stream against one near the start."""
    rows = sorted(read("decoding")["memories"], key=lambda row: row["times_first"])
    last = max(map(int, rows[0]["positions"]))
    return table(
        ["memory", f"µs a token at {last:,}", "over that at 1,024", "tokens really read", "state"],
        (
            [
                row["name"],
                f"{row['positions'][str(last)]['decode_cpu']:.0f}",
                f"{row['times_first']:.2f}",
                f"{row['read']:,}",
                size(row["state_bytes"]),
            ]
            for row in rows
        ),
    )


def training() -> str:
    """Steps of training against the machine's matrix products."""
    rows = {
        (row["memory"], row["threads"], row["method"]): row
        for row in read("training-speed")["rows"]
    }
    counts = sorted({threads for _, threads, _ in rows})
    columns = [(threads, method) for threads in counts for method in ("full", "replay")]
    cells = []
    for name in dict.fromkeys(name for name, _, _ in rows):
        cells.append([name])
        for threads, method in columns:
            row = rows[name, threads, method]
            low, high = min(row["all_fraction"]), max(row["all_fraction"])
            cells[-1].append(f"{row['fraction']:.2f} [{low:.2f}, {high:.2f}]")
    words = {"full": "through time", "replay": "replay"}
    heads = (f"{words[method]}, threads: {threads}" for threads, method in columns)
    return table(["model", *heads], cells)


def cost() -> str:
    """Every memory alone, at equal width: what a token costs, and how that changes with length."""
    return table(
        [
            *("memory", "parameters", "state", "reading, µs", "training, µs", "over that at 512"),
            *("FLOPs", "of the peak", "peak, MB", "tokens"),
        ],
        (
            [
                row["name"],
                f"{row['parameters'] / 1e3:,.0f} K",
                state_of(row),
                f"{row['read']['took']:,.0f}",
                f"{row['train']['took']:,.0f}",
                ranged(row["train"]),
                f"{row['train']['flops'] / 1e6:,.1f} M",
                f"{row['train']['peak_fraction']:.2f}",
                f"{row['train']['live_bytes'] / 1e6:,.0f}",
                f"{row['train']['length']:,}",
            ]
            for row in sorted(read("cost")["summary"], key=lambda row: row["train"]["took"])
        ),
    )


def cost_decoding() -> str:
    """Every memory alone: a decoded token far into a stream against one near its start."""
    found = read("cost")
    memories = {memory["name"]: memory for memory in found["memories"]}
    rows = sorted(found["summary"], key=lambda row: row["decode"]["took"])
    return table(
        ["memory", "µs a token", "behind", "time, over that at 1,024", "FLOPs and bytes, over"],
        (
            [
                row["name"],
                f"{row['decode']['took']:,.0f}",
                f"{row['decode']['length']:,}",
                ranged(row["decode"]["pairs"]),
                counted(memories[row["name"]]),
            ]
            for row in rows
        ),
    )


def counted(memory: Row) -> str:
    """FLOPs and bytes of a decoded token at the last position over those at 1,024: no clock."""
    rows = [row for row in memory["rows"] if row["kind"] == "decode"]
    near = next(row for row in rows if row["length"] >= 1024)
    flops, held = (rows[-1][key] / near[key] for key in ("flops", "live_bytes"))
    return f"{flops:.3f}, {held:.3f}"


def cost_models() -> str:
    """Every memory as a language model, all of equal parameters."""
    rows = sorted(read("cost")["summary"], key=lambda row: row["model"]["train"]["took_cpu"])
    return table(
        ["model", "state", "training, µs a token", "of the peak", "peak, MB", "FLOPs a token",
         "decoding, µs a token"],
        (
            [
                row["name"],
                state_of(row | row["model"]),
                f"{row['model']['train']['took_cpu']:,.0f}",
                f"{row['model']['train']['peak_fraction']:.2f}",
                f"{row['model']['train']['live_bytes'] / 1e6:,.0f}",
                f"{row['model']['train']['flops'] / 1e6:,.0f} M",
                f"{row['model']['decode']['took_cpu']:,.0f}",
            ]
            for row in rows
        ),
    )  # fmt: skip


def peers() -> str:
    """Whole models of other packages, each with ours beside it."""
    own: dict[tuple[str, str], dict[tuple[str, int], Row]] = {}
    for row in read("model-peers")["rows"]:
        own.setdefault((row["beside"], row["form"]), {})[row["kind"], row["length"]] = row
    lengths = sorted({at for cells in own.values() for kind, at in cells if kind == "decode"})
    lines = []
    for (beside, form), cells in sorted(own.items(), key=lambda item: item[0][0]):
        train = next(row for (kind, _), row in cells.items() if kind == "train")
        decode = [cells["decode", at] for at in (lengths[0], lengths[-1])]
        lines.append([form if form != beside else f"**{form}**"])
        for row in (train, *decode):
            lines[-1].append(f"{row['tokens_per_second']:,.0f}")
            lines[-1].append(ranged(row["times_theirs"]) if "times_theirs" in row else "")
        lines[-1] += [size(row["state_bytes"]) for row in decode]
    what = ["training", *(f"decoding at {at:,}" for at in (lengths[0], lengths[-1]))]
    heads = [head for each in what for head in (f"{each}, tokens/s", "times theirs")]
    heads += [f"state at {at:,}" for at in (lengths[0], lengths[-1])]
    return table(["model", *heads], lines)


def remembered() -> str:
    """Share of questions answered by every memory, the best first, and the bytes it holds."""
    told = read("bytes")
    asked, rows = list(told["chance"]), []
    for row in told["summary"]:
        scores = [(row["mean"], row["interval"]), *(row["asked"][what] for what in asked)]
        rows.append(
            [
                row["name"] + (f", {row['diverged']} diverged" if row["diverged"] else ""),
                state_of(row),
                *(f"{value:.2f} ± {spread:.2f}" for value, spread in scores),
            ]
        )
    chance = ["chance", "", "", *(f"{told['chance'][what]:.2f}" for what in asked)]
    return table(["memory", "state", "all", *asked], [*rows, chance])


def ranged(found: Row) -> str:
    """A ratio of medians and its range over the rounds."""
    low, high = found["range"]
    return f"{found['times']:.2f} [{low:.2f}, {high:.2f}]"


TABLES = {
    "decoding": decoding,
    "flat": flat,
    "training": training,
    "cost": cost,
    "cost decoding": cost_decoding,
    "cost models": cost_models,
    "peers": peers,
    "bytes": remembered,
}


if __name__ == "__main__":
    print(marked(TABLES))
