"""What training looks like while it runs: a bar on a terminal, a few plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_PLAIN_LINES = 20


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What to call with each line of metrics. Everything goes to stderr: stdout is for results."""
    if not sys.stderr.isatty():
        yield lambda line: _plain(title, steps, line)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(title),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps, text="")
        yield lambda line: bar.update(task, completed=line["step"], text=describe(line))


def _plain(title: str, steps: int, line: dict[str, Any]) -> None:
    if line["step"] % max(1, steps // _PLAIN_LINES) == 0 or line["step"] in (1, steps):
        print(f"{title}: {line['step']}/{steps} {describe(line)}", file=sys.stderr, flush=True)


def describe(line: dict[str, Any]) -> str:
    """One line of metrics in words."""
    return (
        f"loss {line['loss']:.3f}, {line['bits_per_byte']:.3f} bits/byte, "
        f"{line['tokens_per_s']:,.0f} tokens/s, state {size(line['state_bytes'])}, "
        f"peak {size(line['peak_memory'])}"
    )


def console() -> Any:
    """Where tables go: as wide as the terminal, and one line a row where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 400)


def size(count: float) -> str:
    """Bytes for people: 12.3 kB (thousands, not 1,024s)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
