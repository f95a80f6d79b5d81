"""Where a number comes from: versions, hardware and commit, for results, runs and bug reports."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")
# Of the extras: named where they are installed.
_EXTRAS = ("lm-eval", "datasets", "peft", "trackio", "tensorboard", "flash-linear-attention")


def environment() -> dict[str, str]:
    """What is installed and on what it runs; no user or host name."""
    import torch

    import everlong

    found = {
        "everlong": everlong.__version__,
        "git": git_sha() or "not a checkout",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": f"{usable_cores()} usable, {torch.get_num_threads()} torch threads",
        "memory": f"{memory_bytes() / 1e9:.0f} GB",
    }
    found |= {name: _version(name) or "not installed" for name in _PACKAGES}
    found |= {name: told for name in _EXTRAS if (told := _version(name)) is not None}
    found["cuda"] = _cuda()
    found["mps"] = "yes" if torch.backends.mps.is_available() else "no"
    return found


@cache
def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def git_sha() -> str | None:
    """The commit of the checkout this package lies in, with + where files have changed.

    That of the first call: a long benchmark asks before it starts, for the code it runs is loaded.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        told = [
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
            )
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        ]
    except (OSError, subprocess.TimeoutExpired):
        return None
    if any(done.returncode for done in told):
        return None
    return told[0].stdout.strip() + ("+" if told[1].stdout else "")


def command() -> str:
    """What this process was started with, to be typed again."""
    program, *words = sys.argv or [""]
    if Path(program).parent.name == "everlong" and Path(program).name == "__main__.py":
        start = ["python", "-m", "everlong"]
    elif Path(program).name == "everlong":
        start = ["everlong"]
    else:
        start = ["python", *([program] if program else [])]
    return shlex.join([*start, *words])


def origin() -> dict[str, Any]:
    """What a run folder says besides its configuration: the exact command, and where it ran."""
    return {"command": command(), "environment": environment()}


def append_origin(path: Path, step: int) -> None:
    """A line for each time a run goes on: from which step, by which command, and where."""
    from everlong.errors import UserError

    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | origin()) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def write_results(path: str | Path, command: str, config: Mapping[str, Any], **found: Any) -> None:
    """A result as data: the command that makes it, its configuration, what was found, and where."""
    result = {"command": command, "config": dict(config), **found, "environment": environment()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


def usable_cores() -> int:
    """That this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([str(torch.version.cuda), *devices])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
