"""`everlong bench decoding`: the tables of how fast a token is decoded."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table

from everlong.cli.progress import console, size
from everlong.evaluation import decoding as bench
from everlong.provenance import git_sha


def bench_decoding(
    names: Sequence[str], threads: tuple[int, ...], out: Path, say: Callable[[str], None]
) -> None:
    """Measure models, then memories alone; their tables and the JSON."""
    git_sha()  # that of the code which is loaded now
    torch.set_flush_denormal(True)  # decayed states are full of them, and they cost 4-5 times
    config = bench.DecodingRun(threads=threads)
    models = bench.measure_models(config, names, say)
    _models_table(models)
    bench.write(out / "decoding.json", config, models, [])
    memories = bench.measure_memories(config, (), say)
    _memories_table(config, memories)
    bench.write(out / "decoding.json", config, models, memories)
    print(f"written to {out}")


def _models_table(rows: Sequence[bench.Row]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    names = ("layers x width", "threads", "tokens/s", "generate", "of the bound", "state")
    for name in (*names, f"times {bench.CACHE}"):
        table.add_column(name, justify="right")
    for row in rows:
        width, layers = row["shape"]
        rates = (1e6 / row[f"{key}_{row['clock']}"] for key in ("stream", "generate"))
        table.add_row(
            row["name"],
            f"{layers} x {width}",
            str(row["threads"]),
            *(f"{rate:,.1f}" for rate in rates),
            f"{row['fraction']:.0%}",
            size(row["state_bytes"]),
            "" if row["speed"] is None else f"{row['speed']:.1f}",
        )
    console().print(table)
    print("one thread: processor time; more: wall clock. The bound: weights read once a token\n")


def _memories_table(config: bench.DecodingRun, rows: Sequence[bench.Row]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("memory alone")
    first, last = min(config.positions), max(config.positions)
    for name in ("read", "state", f"us a token at {first:,}", f"at {last:,}", "ratio", "flat"):
        table.add_column(name, justify="right")
    for row in rows:
        times = (row["positions"][str(place)]["decode_cpu"] for place in (first, last))
        table.add_row(
            row["name"],
            f"{row['read']:,}",
            size(row["state_bytes"]),
            *(f"{time:.0f}" for time in times),
            f"{row['times_first']:.3f}",
            "yes" if row["flat"] else "no",
        )
    console().print(table)
