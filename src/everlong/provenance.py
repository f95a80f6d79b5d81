"""Where a number comes from: versions, hardware and commit, for results, runs and bug reports."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")


def environment() -> dict[str, str]:
    """What is installed and on what it runs; no user or host name."""
    import torch

    import everlong

    found = {
        "everlong": everlong.__version__,
        "git": git_sha() or "not a checkout",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": f"{_usable_cores()} usable, {torch.get_num_threads()} torch threads",
    }
    found |= {name: _version(name) for name in _PACKAGES}
    cuda = torch.cuda.is_available()
    found["cuda"] = f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if cuda else "no"
    found["mps"] = "yes" if torch.backends.mps.is_available() else "no"
    return found


@cache
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


def write_results(path: str | Path, command: str, config: Mapping[str, Any], **found: Any) -> None:
    """A result as data: the command that makes it, its configuration, what was found, and where."""
    result = {"command": command, "config": dict(config), **found, "environment": environment()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
