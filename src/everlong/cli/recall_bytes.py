"""`everlong bench bytes`: the table of recall against bytes of state."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table

from everlong.cli.progress import console
from everlong.errors import UserError
from everlong.evaluation import recall_bytes as bench
from everlong.evaluation.recall import check_counts


def bench_bytes(
    names: Sequence[str],
    tier: str,
    seeds: tuple[int, ...],
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Train what is missing in `out`, then the table, the JSON and the picture."""
    check_counts("seeds", seeds)
    run = bench.TIERS[tier]
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--tier {tier} needs a CUDA device and there is none: give --tier laptop")
    rows, left = bench.measure(run, names, seeds, out / f"bytes-{tier}", say)
    if not rows:
        raise UserError("every memory's step takes too long for this tier: name a quicker one")
    table = Table(box=None, pad_edge=False)
    for name in ("memory", "bytes of state", *bench.ASKED, "mean"):
        table.add_column(name, justify="left" if name == "memory" else "right")
    guessed = bench.chance(run)
    for row in bench.summary(rows):
        table.add_row(
            row["name"] + (f", {row['diverged']} diverged" if row["diverged"] else ""),
            f"{row['state_bytes']:,}" + ("" if row["bounded"] else " (grows)"),
            *(_cell(*row["asked"][asked]) for asked in bench.ASKED),
            _cell(row["mean"], row["interval"]),
        )
    table.add_row("chance", "", *(f"{guessed[asked]:.2f}" for asked in bench.ASKED), "")
    console().print(table)
    for name, seconds in left.items():
        print(f"left out: {name}, whose step takes {seconds:.2f} s")
    bench.write(out / "bytes.json", tier, run, rows, left)
    if tier == "smoke":
        print("a smoke run shows that all of it runs: its order says nothing")
    print(f"{len(seeds)} seeds; written to {out}")


def _cell(value: float, spread: float | None) -> str:
    return f"{value:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
