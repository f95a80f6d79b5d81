"""`everlong bench cost`: tables of what memories cost, and of scans and memories beside peers."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from rich.table import Table

from everlong.cli.progress import console, size
from everlong.errors import UserError
from everlong.evaluation import cost_bench, cost_peers, model_peers, test_time_peers
from everlong.evaluation.timing import trusted
from everlong.provenance import git_sha
from everlong.training.config import choose_device

_CLOCK = {"cpu": "processor time", "wall": "wall clock"}


def bench_cost(
    names: Sequence[str], device: str, patience: float, out: Path, say: Callable[[str], None]
) -> None:
    """Measure what is missing in the folder, then the tables, the JSON and the picture."""
    config = cost_bench.CostRun(device=_device(device), patience=patience)
    found = cost_bench.measure(config, out / "cost", names, say)
    clock = trusted(config.device, config.threads)
    rows = cost_bench.summary(found, clock)
    cost_bench.write(out / "cost.json", config, found)
    _time_table(rows)
    _bytes_table(rows, clock)
    for line in _conclusions(rows):
        print(textwrap.fill(line, 160))
    for row in rows:
        for left in row["skipped"]:
            print(f"left out: {row['name']}, {left['kind']} {left['length']:,}: {left['why']}")
    print(
        f"{_CLOCK[clock]} on {config.device}, {config.threads} thread, medians of at most "
        f"{config.rounds} rounds and their range; MB and peak are of the longest\n"
        "x2: the whole call at twice the length, 2 is linear, 4 quadratic; of peak: of the "
        "matrix products that were timed between\nx bytes: peak of the longest replay over the "
        f"shortest; models: {config.model_layers} layers and "
        f"{config.parameters:,} parameters each, {config.model_length:,} tokens"
    )
    print(f"written to {out}")


def _conclusions(rows: Sequence[cost_bench.Row]) -> list[str]:
    """What the tables say of bounded memories, and of growing ones beside them."""
    lines = []
    for kind in ("within 5 %", "not within 5 %"):
        told = []
        for row in rows:
            pairs = row["decode"]["pairs"]
            if row["bounded"] and pairs and pairs["even"] == (kind == "within 5 %"):
                least, most = pairs["range"]
                ratio = f"{pairs['times']:.2f} ({least:.2f}-{most:.2f})"
                told.append(f"{row['name']} {ratio} at {pairs['far']:,}")
        if told:
            lines.append(f"decoding far over decoding near, {kind}: {', '.join(told)}")
    for name, wanted in (("bounded", True), ("growing", False)):
        own = [row for row in rows if row["bounded"] == wanted]
        if not own:
            continue
        parts = []
        for kind in ("read", "train"):
            times = [row[kind]["doubled"]["times"] for row in own if row[kind]["doubled"]]
            parts += [f"{kind} {_span(times)} times the time"] if times else []
        held = [row["state_doubled"] for row in own if row["state_doubled"]]
        parts += [f"{_span(held)} times the state"] if held else []
        peaks = [row["replay"]["times_bytes"] for row in own if row["replay"]]
        parts += [f"replay's peak over its lengths {_span(peaks)} times"] if peaks else []
        lines.append(f"{name} memories at twice the length: {', '.join(parts)}")
    return lines


def _span(values: Sequence[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def _time_table(rows: Sequence[cost_bench.Row]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("memory")
    names = ("parameters", "read us", "at", "us", "x2", "train us", "at", "us", "x2")
    for name in (*names, "replay us", "of peak: read", "train", "decode us", "at", "far / near"):
        table.add_column(name, justify="right")
    for row in rows:
        calls = []
        for kind in ("read", "train"):
            one = row[kind]
            doubled = f"{one['doubled']['times']:.2f}" if one["doubled"] else ""
            calls += [f"{one['took_shortest']:.0f}", f"{one['length']:,}", f"{one['took']:.0f}"]
            calls.append(doubled)
        decode, pairs = row["decode"], row["decode"]["pairs"]
        near, far = pairs["range"] if pairs else (1, 1)
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            *calls,
            f"{row['replay']['took']:.0f}" if row["replay"] else "",
            *(f"{row[kind]['peak_fraction']:.0%}" for kind in ("read", "train")),
            f"{decode['took']:.0f}",
            f"{decode['length']:,}",
            f"{pairs['times']:.2f} ({near:.2f}-{far:.2f})" if pairs else "",
        )
    console().print(table)


def _bytes_table(rows: Sequence[cost_bench.Row], clock: str) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("memory")
    names = ("bytes of state", "x2", "read MB", "train MB", "replay MB", "at", "x bytes")
    names = (*names, "decode MB", "read kFLOP", "train kFLOP")
    for name in (*names, "model: train/s", "of peak", "decode/s", "state MB"):
        table.add_column(name, justify="right")
    for row in rows:
        replay, model = row["replay"], row["model"]
        held = [""] * 3
        if replay:
            held = [_mb(replay), f"{replay['length']:,}", f"{replay['times_bytes']:.2f}"]
        table.add_row(
            row["name"],
            f"{row['state_bytes']:,}",
            f"{row['state_doubled']:.2f}" if row["state_doubled"] else "",
            *(_mb(row[kind]) for kind in ("read", "train")),
            *held,
            _mb(row["decode"]),
            *(f"{row[kind]['flops'] / 1e3:,.0f}" for kind in ("read", "train")),
            f"{1e6 / model['train'][f'took_{clock}']:,.0f}",
            f"{model['train']['peak_fraction']:.0%}",
            f"{1e6 / model['decode'][f'took_{clock}']:,.0f}",
            f"{model['state_bytes'] / 1e6:.2f}",
        )
    console().print(table)


def _mb(found: cost_bench.Row) -> str:
    return f"{found['live_bytes'] / 1e6:,.1f}"


def bench_peers(device: str, out: Path, say: Callable[[str], None]) -> None:
    """Time the scans and their peers, then the memories that learn at test time and theirs, then
    whole models; after each number of threads its table, and the JSON of all that is there."""
    config = cost_peers.PeersRun(device=_device(device))

    def finished(rows: list[cost_peers.Row]) -> None:
        _peers_table(config, [row for row in rows if row["threads"] == rows[-1]["threads"]])
        cost_peers.write(out / "cost-peers.json", config, rows)

    cost_peers.measure(config, say, finished)
    for form in cost_peers.lacking():
        print(f"not in this transformers: {form}")
    _bench_learners(config.device, out, say)
    _bench_models(config.device, out, say)
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


def _bench_models(device: str, out: Path, say: Callable[[str], None]) -> None:
    """The third part: on the processor, too."""
    if device != "cpu":
        print("whole models are not timed: that is done on the processor, with --device cpu")
        return
    config = model_peers.ModelsRun()
    rows, missing = model_peers.measure(config, say)
    _models_table(config, rows)
    for line in missing:
        print(line)
    model_peers.write(out / "model-peers.json", config, rows, missing)


def _models_table(config: model_peers.ModelsRun, rows: Sequence[model_peers.Row]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("language models, tokens/s")
    at = [f"{position:,}" for position in config.positions]
    for name in ("parameters", "training", "times theirs", f"decode at {at[0]}", *at[1:]):
        table.add_column(name, justify="right")
    for name in (f"times at {at[0]}", f"at {at[-1]}", f"state at {at[-1]}"):
        table.add_column(name, justify="right")
    models: dict[tuple[str, str], list[model_peers.Row]] = {}
    for row in rows:
        models.setdefault((row["beside"], row["form"]), []).append(row)
    for cells in sorted(models.values(), key=lambda own: own[0]["beside"]):
        train, *decode = sorted(cells, key=lambda row: (row["kind"] != "train", row["length"]))
        table.add_row(
            train["form"],
            f"{train['parameters']:,}",
            f"{train['tokens_per_second']:,.0f}",
            _times(train),
            *(f"{row['tokens_per_second']:,.0f}" for row in decode),
            _times(decode[0]),
            _times(decode[-1]),
            size(decode[-1]["state_bytes"]),
        )
    console().print(table)
    clock = _CLOCK[trusted("cpu", config.threads)]
    print(
        f"{clock} on cpu, threads: {config.threads}, training T = {config.length:,}, medians of "
        f"{config.rounds} rounds; times theirs: with the range over the rounds\n"
    )


def _times(row: model_peers.Row) -> str:
    if "times_theirs" not in row:
        return ""
    found, (least, most) = row["times_theirs"]["times"], row["times_theirs"]["range"]
    return f"{found:.2f} ({least:.2f}-{most:.2f})"


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
