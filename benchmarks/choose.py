"""The tables of docs/choose.md, read from benchmarks/results: `python benchmarks/choose.py`.

Nothing is measured here: each table names the command that wrote its JSON.
"""

import json
from pathlib import Path
from typing import Any

from everlong.evaluation.markdown import marked, table

RESULTS = Path(__file__).parent / "results"
BUDGETS = (4_096, 131_072, 1_048_576)  # bytes of one stream's state


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def link(name: str) -> str:
    """The page of a memory; what follows a comma names the variant."""
    memory, comma, variant = name.partition(",")
    return f"[{memory}](memories/{memory}.md){comma}{variant}"


def recall() -> str:
    """Accuracy by distance, the mean of the seeds and the worst one; best at the far end first."""
    found: dict[str, dict[int, Any]] = {}
    size: dict[str, int] = {}
    for family in ("recall-recurrence", "recall-linear"):
        told = read(family)
        for row in told["summary"]:
            found.setdefault(row["name"], {})[row["distractors"]] = row
        size |= {row["name"]: row["state_bytes"] for row in told["rows"]}
    distances = sorted(next(iter(found.values())))[1:]
    order = sorted(found, key=lambda name: [-found[name][d]["mean"] for d in reversed(distances)])
    cells = (
        [f"{row['mean']:.2f} ({row['worst']:.2f})" for row in (found[name][d] for d in distances)]
        for name in order
    )
    rows = ([link(name), f"{size[name]:,}", *told] for name, told in zip(order, cells, strict=True))
    return table(["memory", "bytes of state", *(f"{d} segments later" for d in distances)], rows)


def language(name: str) -> str:
    """Bits per byte at equal parameters, best first."""
    told = read(name)
    columns = ["memory", "bytes of state", "bits per byte", "wiping it costs", "tokens/s trained"]
    rows = (
        [
            link(row["name"]),
            f"{row['state_bytes']:,}",
            f"{row['bits_per_byte']:.3f} ± {row['interval']:.3f}",
            f"{row['gain']:+.3f}",
            f"{row['tokens_per_s']:,.0f}",
        ]
        for row in sorted(told["summary"], key=lambda row: row["bits_per_byte"])
    )
    return table(columns, rows)


def budgets() -> str:
    """The best bits per byte that fits, of what `everlong bench language` trained."""
    scored = read("language")["summary"]
    rows = []
    for budget in BUDGETS:
        fits = [row for row in scored if row["state_bytes"] <= budget]
        best = min(fits, key=lambda row: row["bits_per_byte"])
        rows.append([f"{budget:,}", link(best["name"]), f"{best['bits_per_byte']:.3f}"])
    return table(["bytes for a stream", "best that fits", "bits per byte"], rows)


TABLES = {
    "recall": recall,
    "language": lambda: language("language"),
    "test-time": lambda: language("language-test-time"),
    "budgets": budgets,
}

if __name__ == "__main__":
    print(marked(TABLES))
