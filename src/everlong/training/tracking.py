"""Where else a run's metrics go: trackio or TensorBoard. metrics.jsonl always has them.

Both write on this machine: trackio where its own variables (TRACKIO_DIR ...) say, TensorBoard into
the run folder.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from everlong.errors import UserError
from everlong.training.run import read_config

Line = dict[str, Any]


class _Tracker(Protocol):
    def write(self, line: Line) -> None: ...

    def close(self) -> None: ...


def check(name: str | None) -> None:
    """`UserError`, with the extra that brings it, where the package `name` is not installed."""
    if name is not None and find_spec(name) is None:
        raise UserError(f"--track {name} needs a package: pip install 'everlong[track]'")


@contextmanager
def follow(
    on_step: Callable[[Line], None], name: str | None, run_dir: Path
) -> Iterator[Callable[[Line], None]]:
    """`on_step` with a tracker behind it: "trackio", "tensorboard", or None for none.

    The tracker starts with the first line, when the run folder is there: only the process that
    writes metrics is given lines, so only that one starts it.
    """
    if name is None:
        yield on_step
        return
    check(name)
    started: list[_Tracker] = []

    def both(line: Line) -> None:
        on_step(line)
        if not started:
            started.append(_TRACKERS[name](run_dir, line["step"]))
        started[0].write(line)

    try:
        yield both
    finally:
        for tracker in started:
            tracker.close()


def _label(run_dir: Path) -> str:
    """The run's name; a folder inside a run, such as its twin, is named after both."""
    inside = (run_dir.parent / "config.json").exists()
    return f"{run_dir.resolve().parent.name}-{run_dir.name}" if inside else run_dir.resolve().name


class _Trackio:
    """Project everlong. A resumed run goes on under its name; its lines since the checkpoint
    appear twice."""

    def __init__(self, run_dir: Path, step: int) -> None:
        import trackio

        with redirect_stdout(sys.stderr):  # stdout is for results
            trackio.init(
                project="everlong",
                name=_label(run_dir),
                config=read_config(run_dir),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, line: Line) -> None:
        import trackio

        values = {key: value for key, value in line.items() if key != "step"}
        trackio.log(values, step=line["step"])

    def close(self) -> None:
        import trackio

        with redirect_stdout(sys.stderr):
            trackio.finish()


class _TensorBoard:
    """Event files in RUN/tensorboard; steps that a resumed run makes again replace the old ones."""

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)
        self.writer.add_text("config", f"```\n{json.dumps(read_config(run_dir), indent=1)}\n```")

    def write(self, line: Line) -> None:
        for key, value in line.items():
            if key != "step":
                self.writer.add_scalar(key, value, line["step"])

    def close(self) -> None:
        self.writer.close()


_TRACKERS: dict[str, Callable[[Path, int], _Tracker]] = {
    "trackio": _Trackio,
    "tensorboard": _TensorBoard,
}
