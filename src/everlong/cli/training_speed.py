"""`everlong bench training`: how near training comes to the speed of matrix products."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from everlong.cli.progress import console
from everlong.evaluation import training_speed
from everlong.provenance import git_sha

_CLOCK = {"cpu": "processor time", "wall": "wall clock"}


def bench_training(
    names: Sequence[str], threads: Sequence[int], out: Path, say: Callable[[str], None]
) -> None:
    """Measure; after every memory the JSON of all that is there, at the end the table."""
    git_sha()  # that of the code which is loaded now
    torch.set_flush_denormal(True)  # as training does
    config = training_speed.TrainingSpeed()
    config = replace(config, threads=tuple(threads)) if threads else config
    rows: list[training_speed.Row] = []
    for found in training_speed.measure(config, names, say):
        rows += found
        training_speed.write(out / "training-speed.json", config, rows)
    console().print(_table(rows))
    print(
        f"four layers of width {config.hidden_size}, {config.tokens:,} tokens a step; medians of "
        f"{config.rounds} rounds; peak: torch.mm around each step"
    )
    print(f"written to {out}")


def _table(rows: Sequence[training_speed.Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("memory", "threads", "method"):
        table.add_column(name)
    for name in ("seconds", "tokens/s", "GFLOP needed", "done", "peak GFLOP/s"):
        table.add_column(name, justify="right")
    table.add_column("of the peak", justify="right")
    table.add_column("with recomputation", justify="right")
    for row in rows:
        low, high = min(row["all_fraction"]), max(row["all_fraction"])
        table.add_row(
            row["memory"],
            f"{row['threads']} ({_CLOCK[row['clock']]})",
            "BPTT" if row["method"] == "full" else row["method"],
            f"{row['seconds']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['needed_gflop']:.0f}",
            f"{row['done_gflop']:.0f}",
            f"{row['peak_gflops']:.0f}",
            f"{row['fraction']:.0%} [{low:.0%}, {high:.0%}]",
            f"{row['fraction_done']:.0%}",
        )
    return table
