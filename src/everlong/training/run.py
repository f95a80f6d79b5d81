"""The folder of a run: config.json, metrics.jsonl, checkpoint-*/ and, at the end, model/."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everlong.errors import UserError
from everlong.training import checkpoints

# Keys of a metrics line that differ between two equal runs; all others are equal to the bit.
TIMES = ("seconds", "tokens_per_s", "peak_memory")


_FORMAT = {"format": "everlong.run"}


def begin(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Make the folder and write config.json, `config` with a mark that the folder is a run's.

    `UserError`, with nothing touched, where a run lies already or anything else but what a run
    that was killed before its first checkpoint leaves.
    """
    try:
        found = list(run_dir.iterdir()) if run_dir.exists() else []
        if not all(_is_early(path) for path in found):
            if _is_marked(run_dir / "config.json") and checkpoints.steps(run_dir):
                raise UserError(
                    f"{run_dir} holds a run already: resume it, or choose another folder"
                )
            raise UserError(f"{run_dir} is not empty: give --out a new folder")
        run_dir.mkdir(parents=True, exist_ok=True)
        _replace(run_dir / "config.json", json.dumps(_FORMAT | dict(config), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written: {error.strerror}") from error


def _is_early(path: Path) -> bool:
    """Whether a run wrote this before its first checkpoint: it may go."""
    if path.name == "config.json":
        return _is_marked(path)
    if path.name == "metrics.jsonl":
        return path.is_file() and path.stat().st_size == 0
    asides = {_aside(path.with_name(name)).name for name in ("config.json", "metrics.jsonl")}
    return path.name in asides or checkpoints.is_leftover(path)


def _is_marked(path: Path) -> bool:
    """Whether this is a config.json that `begin` wrote."""
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError:
        return False
    return isinstance(config, dict) and _FORMAT.items() <= config.items()


def read_config(run_dir: Path) -> dict[str, Any]:
    """What `begin` wrote."""
    file = run_dir / "config.json"
    if not run_dir.is_dir():
        raise UserError(
            f"there is no run at {run_dir}: one that was stopped as it began leaves none"
        )
    try:
        return json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{run_dir} is not a run: {file.name} {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: it is not JSON") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path} is damaged: a line is not JSON; remove that line") from error
    for number, line in enumerate(found, 1):
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise UserError(f"{path} is damaged: line {number} is of no step; remove that line")
    return found


def without_times(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMES}


class Metrics:
    """Appends to metrics.jsonl, one JSON object a step; on opening, lines past `step` are cut."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        try:
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            _replace(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            # Unbuffered: after a failed write nothing is left to fail again on closing.
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, line: Mapping[str, Any]) -> None:
        """Handed to the system at once: a killed process loses no finished step's line."""
        data = json.dumps(line).encode() + b"\n"
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """To the disk, before a checkpoint that relies on it."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self._file.close()

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be written: {error.strerror}")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _replace(path: Path, text: str) -> None:
    aside = _aside(path)
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
