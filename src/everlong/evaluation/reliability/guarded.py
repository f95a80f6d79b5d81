"""One command line in this process, watched: what it said, how it ended, and never for long."""

import io
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

MEMORY = 3 << 30  # bytes that a case may take besides what the process holds already
Main = Callable[[Sequence[str]], int]
WALL_S = 20.0  # and ten times its own: for what waits, such as for a pipe that nobody writes to


class Stopped(BaseException):
    """Raised where the work would begin, or has lasted too long: no code of ours catches it."""


@dataclass(frozen=True)
class Outcome:
    """kind: "exit", "raised" (an exception left main), or what `Stopped` was raised with.

    trace: the exception and the way to it, in words; place: its type and the last line of
    everlong on the way. said: standard error.
    """

    kind: str
    code: int | None = None
    said: str = ""
    place: str = ""
    trace: str = ""

    @property
    def refused(self) -> bool:
        """In one line, with code 2."""
        last = self.said.splitlines()[-1:] or [""]
        told = last[0].startswith("everlong: ") and "Traceback" not in self.said
        return self.kind == "exit" and self.code == 2 and told


def call(main: Main, words: Sequence[str], stdin: bytes = b"", cpu_s: float = 5.0) -> Outcome:
    """Run `main(words)` with streams of its own. Only in the main thread of a process."""
    out, err, given = (io.BytesIO(value) for value in (b"", b"", stdin))
    said = io.TextIOWrapper(err, "utf-8", errors="backslashreplace", write_through=True)
    # strict, as a terminal's is: what cannot be encoded is an exception there too
    told = io.TextIOWrapper(out, "utf-8", write_through=True)

    def ended(kind: str, **more: Any) -> Outcome:
        return Outcome(kind, said=anywhere(err.getvalue().decode("utf-8")), **more)

    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(told))
        stack.enter_context(redirect_stderr(said))
        stack.enter_context(mock.patch.object(sys, "stdin", io.TextIOWrapper(given, "utf-8")))
        try:
            with at_most(cpu_s):
                code = main(list(words))
            return ended("exit", code=code)
        except Stopped as stop:
            return ended(str(stop))
        except SystemExit as left:
            return ended("exit", code=left.code if isinstance(left.code, int) else 1)
        except Exception as error:  # noqa: BLE001 (to be counted is what this is for)
            trace = anywhere("".join(traceback.format_exception(error)))
            return ended("raised", place=_place(error), trace=trace[-3000:])


def anywhere(text: str) -> str:
    """The same without the folders of this machine: what is kept of it is read on others."""
    for known in (Path(__file__).parents[2], Path(sys.prefix), Path.cwd()):
        text = text.replace(f"{known}{os.sep}", "")
    return text


def _place(error: Exception) -> str:
    """Where everlong was when it broke: what groups failures that are one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f
        for f in frames
        if "/everlong/" in f.filename and "/evaluation/reliability/" not in f.filename
    ]
    at = f"{ours[-1].filename.rpartition('/everlong/')[2]}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {at}"


@contextmanager
def at_most(cpu_s: float) -> Iterator[None]:
    """`Stopped` after so many seconds of this process's own time, or many more by the clock."""

    def stop(*_: Any) -> None:
        raise Stopped("limit")

    timers = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
    before = {number: signal.signal(number, stop) for number in timers.values()}
    try:
        # again and again: one that is raised in a finalizer goes unheard
        signal.setitimer(signal.ITIMER_PROF, cpu_s, 1.0)
        signal.setitimer(signal.ITIMER_REAL, WALL_S + 10 * cpu_s, 1.0)
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def no_training() -> Iterator[None]:
    """No optimiser is made and no process begun: whatever would train stops there, with all its
    checks behind."""
    import torch

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped("would train")

    with (
        mock.patch.object(torch.optim.AdamW, "__init__", stop),
        mock.patch.object(BaseProcess, "start", stop),
    ):
        yield


@contextmanager
def memory_at_most(more: int) -> Iterator[None]:
    """This process may take so many bytes more inside: what has no end is refused, not killed."""
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # no Linux: the limit would not hold there either
        yield
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def make_run(main: Main, folder: Path, *changes: str) -> Path:
    """A tiny trained run at `folder`, of a text beside it; raises `RuntimeError` if that fails."""
    text = folder.parent / "text.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("the whale and the sea and the ship\n" * 600)
    words = ["train", "smoke", "--data", str(text), "--out", str(folder)]
    for change in (*TINY, *changes):
        words += ["--set", change]
    outcome = call(main, words, cpu_s=120.0)
    if outcome.code != 0:
        raise RuntimeError(f"{' '.join(words)} failed: {outcome.said or outcome.trace}")
    return folder


TINY = (
    "twin=false",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.num_layers=1",
    "model.segment.segment_length=8",
    "model.segment.num_slots=2",
    "data.validation=0.02",
    "train.batch_size=2",
    "train.segments=2",
    "train.warmup_steps=1",
    "train.eval_batches=1",
    "train.device=cpu",
)
