"""Which of torchrun's processes this is, by its variables: nothing need be imported for it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path


def several() -> bool:
    return _number("WORLD_SIZE", 1) > 1


def tells_errors() -> bool:
    """Whether this process says what the user can put right: one of each machine does."""
    return not several() or _number("LOCAL_RANK", 0) == 0


@contextmanager
def main_speaks() -> Iterator[None]:
    """Only the first process prints here; exceptions of the others still say what went wrong."""
    with ExitStack() as stack:
        if several() and _number("RANK", 0) > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def check_restarts(run: Path | None) -> None:
    """`ValueError` where torchrun may start this anew, and that would fail: without a run to find
    again, or where the new processes share a store with the dead and read their addresses in it."""
    if _number("TORCHELASTIC_MAX_RESTARTS", 0) == 0:
        return
    if run is None:
        raise ValueError("--max-restarts needs a folder to go on from: give --out (or --resume)")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "a restart would find the addresses of the processes that died, and may hang: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun --max-restarts"
        )


def is_restarted() -> bool:
    """Whether torchrun started this anew, after a process had died."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def _number(name: str, otherwise: int) -> int:
    return int(os.environ.get(name) or otherwise)
