"""The tables of docs/measured.md, read from benchmarks/results: `python benchmarks/measured.py`.

Nothing is measured here: each table's JSON names the command that wrote it.
"""

import json
from pathlib import Path
from typing import Any

from everlong.evaluation.markdown import table

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def read(name: str) -> Row:
    return json.loads((RESULTS / f"{name}.json").read_text())


def bytes_of(count: float) -> str:
    """In the unit that needs the fewest digits."""
    for unit, size in (("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


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
        cells[-1].append(bytes_of(own[0]["state_bytes"]))
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
                bytes_of(row["state_bytes"]),
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


TABLES = {"decoding": decoding, "flat": flat, "training": training}


if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"<!-- {name} -->\n{make()}<!-- /{name} -->\n")
