"""`everlong bench cost`: tables of what memories cost, and of scans and memories beside peers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from rich.table import Table

from everlong.cli.progress import console, size
from everlong.errors import UserError
from everlong.evaluation import cost_bench, cost_peers, test_time_peers
from everlong.evaluation.timing import trusted
from everlong.provenance import git_sha
from everlong.training.config import choose_device

_CLOCK = {"cpu": "processor time", "wall": "wall clock"}


def bench_cost(names: Sequence[str], device: str, out: Path, say: Callable[[str], None]) -> None:
    """Measure memories, then the table, the JSON and the picture."""
    config = cost_bench.CostRun(device=_device(device))
    rows = cost_bench.measure(config, names, say)
    clock = trusted(config.device, config.threads)
    table = Table(box=None, pad_edge=False)
    table.add_column("memory")
    table.add_column("bytes of state", justify="right")
    table.add_column("us a token")
    ends = f"{max(config.lengths):,} / {min(config.lengths):,}"
    lengths = sorted(set(config.lengths))
    for name in (*(f"{length:,}" for length in lengths), ends, "decoding"):
        table.add_column(name, justify="right")
    for found in cost_bench.summary(rows, clock):
        own = {row["length"]: row for row in rows if row["name"] == found["name"]}
        for key, label in (("forward", "forward"), ("both", "forward + backward")):
            first = key == "forward"
            cells = (f"{own[n][f'{key}_{clock}']:.1f}" if n in own else "" for n in lengths)
            ratio = f"{found[f'times_{key}']:.2f}"
            if found["longest"] < max(lengths):
                ratio += f" at {found['longest']:,}"
            table.add_row(
                found["name"] if first else "",
                f"{found['state_bytes']:,}" if first else "",
                label,
                *cells,
                ratio,
                f"{found['decode']:.0f}" if first else "",
            )
    console().print(table)
    print(
        f"{_CLOCK[clock]} on {config.device}, {config.threads} thread, medians of "
        f"{config.rounds} rounds; state and decoding after the longest call"
    )
    cost_bench.write(out / "cost.json", config, rows)
    print(f"written to {out}")


def bench_peers(device: str, out: Path, say: Callable[[str], None]) -> None:
    """Time the scans and their peers, then the memories that learn at test time and theirs; after
    each number of threads its table, and the JSON of all that is there."""
    config = cost_peers.PeersRun(device=_device(device))

    def finished(rows: list[cost_peers.Row]) -> None:
        _peers_table(config, [row for row in rows if row["threads"] == rows[-1]["threads"]])
        cost_peers.write(out / "cost-peers.json", config, rows)

    cost_peers.measure(config, say, finished)
    for form in cost_peers.lacking():
        print(f"not in this transformers: {form}")
    _bench_learners(config.device, out, say)
    print(f"written to {out}")


def _bench_learners(device: str, out: Path, say: Callable[[str], None]) -> None:
    """The second part: it needs an extra, and the processor."""
    left = "memories that learn at test time are not timed: "
    if device != "cpu":
        print(f"{left}that is done on the processor, with --device cpu")
        return
    try:
        test_time_peers.titans_pytorch()
    except ValueError as error:
        print(f"{left}{error}")
        return
    config = test_time_peers.LearnersRun()

    def finished(rows: list[test_time_peers.Row]) -> None:
        _learners_table(config, [row for row in rows if row["threads"] == rows[-1]["threads"]])
        test_time_peers.write(out / "test-time-peers.json", config, rows)

    rows = test_time_peers.measure(config, say, finished)
    for form, refresh in test_time_peers.left_out(config, rows):
        print(f"not enough memory for: {form}, refreshed every {refresh}")


def _learners_table(
    config: test_time_peers.LearnersRun, rows: Sequence[test_time_peers.Row]
) -> None:
    clock, threads = rows[0]["clock"], rows[0]["threads"]
    table = Table(box=None, pad_edge=False)
    table.add_column("memories that learn at test time")
    table.add_column("refreshed every")
    names = ("forward ms", "backward ms", "both ms", "tokens/s", "times ours")
    for name in (*names, "alive a token", "state"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["form"],
            f"{row['refresh']} tokens",
            *(f"{row[f'{key}_{clock}']:,.0f}" for key in ("forward", "backward", "both")),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['times_ours']:.1f}",
            size(row["live_bytes"] / row["live_tokens"]),
            size(row["state_bytes"][-1][1]),
        )
    console().print(table)
    print(f"{_CLOCK[clock]} on cpu, threads: {threads}, T = {config.length:,}\n")


def _peers_table(config: cost_peers.PeersRun, rows: Sequence[cost_peers.Row]) -> None:
    clock, threads = rows[0]["clock"], rows[0]["threads"]
    table = Table(box=None, pad_edge=False)
    table.add_column("rule")
    table.add_column("form")
    for name in ("forward ms", "backward ms", "both ms", "times ours", "kept"):
        table.add_column(name, justify="right")
    for name in ("value difference", "gradient difference"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["rule"] if row["form"] == "ours" else "",
            row["form"],
            *(f"{row[f'{key}_{clock}']:,.1f}" for key in ("forward", "backward", "both")),
            f"{row['times_ours']:.1f}",
            size(row["kept_bytes"]),
            f"{row['value_difference']:.0e}",
            f"{row['gradient_difference']:.0e}",
        )
    console().print(table)
    print(f"{_CLOCK[clock]} on {config.device}, threads: {threads}, T = {config.length:,}\n")


def _device(name: str) -> str:
    git_sha()  # that of the code which is loaded now
    torch.set_flush_denormal(True)  # decayed states are full of them, and they cost 4-5 times
    return choose_device(name, PartialState(cpu=name == "cpu")).type


def refuse_names(names: Sequence[str]) -> None:
    if names:
        raise UserError(f"--peers times what has peers, not {names[0]}: leave the names out")
