"""The tasks of `everlong evaluate`: which are meant, and their table."""

import sys
from collections.abc import Sequence
from typing import Any


def select(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tasks of texts ("language" and the corpora) and generated ones that patterns name.

    Wildcards stand for generated ones. `UserError` that lists all names for an unknown one.
    """
    from everlong.evaluation.suite import choose, task_names
    from everlong.tasks.standard import STANDARDS

    texts = ["language", *STANDARDS]
    wanted = list(dict.fromkeys(pattern for pattern in patterns if pattern in texts))
    rest = [pattern for pattern in patterns if pattern not in texts]
    return wanted, choose(rest, task_names(), beside=texts)


def evaluate_tasks(opened: Any, names: Sequence[str], asked: Any) -> list[dict[str, Any]]:
    """Ask, print the table, and the rows."""
    from everlong.cli.final import LOOKS_AHEAD
    from everlong.evaluation.codec import Codec
    from everlong.evaluation.suite import measure
    from everlong.models.decoder import looks_ahead

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    codec = Codec(opened.tokenizer, opened.bos)
    rows = [row for name in names for row in measure(opened.model, codec, name, asked, say)]
    _table(rows)
    ahead = LOOKS_AHEAD if looks_ahead(opened.model) else ""
    print(
        f"{asked.samples} items a length, seed {asked.seed}; lengths in {codec.name}; intervals of "
        f"95 % (Wilson). said: greedy generation is the answer; first: the answer is the likeliest "
        f"of the candidates; chance: of a random order of them, or of one answer to all items, "
        f"whichever is more{ahead}"
    )
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    from everlong.cli.progress import console

    table = Table(box=None, pad_edge=False)
    for column in ("task", "length", "asked", "items", "said", "first", "chance", "trace", "state"):
        table.add_column(column, justify="left" if column in ("task", "asked") else "right")
    for row in rows:
        start = row["task"], f"{row['length']:,}"
        if "missing" in row:
            table.add_row(*start, f"missing: {row['missing']}")
            continue
        table.add_row(
            *start,
            row["group"] or "all",
            str(row["samples"]),
            _share(row, "exact"),
            _share(row, "ranked"),
            f"{max(row['chance'], row.get('constant', 0)):.3f}",
            _traces(row),
            f"{row['state_bytes']:,} B",
        )
    console().print(table)


def _share(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.2f} ({low:.2f}-{high:.2f})"


def _traces(row: dict[str, Any]) -> str:
    """Of answers, and of what should be forgotten."""
    traces = row.get("trace_by_role", {})
    shown = [
        f"{role} {traces[role]:+.1f}" for role in ("answer", "stale", "erased") if role in traces
    ]
    return ", ".join(shown)
