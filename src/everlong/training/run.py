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


def begin(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Make the folder and write config.json; `UserError` where a run lies already."""
    if read_metrics(run_dir / "metrics.jsonl") or checkpoints.steps(run_dir):
        raise UserError(f"{run_dir} holds a run already: resume it, or choose another folder")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _replace(run_dir / "config.json", json.dumps(config, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written: {error.strerror}") from error


def read_config(run_dir: Path) -> dict[str, Any]:
    """What `begin` wrote."""
    file = run_dir / "config.json"
    try:
        return json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{run_dir} is not a run: {file.name} {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: it is not JSON") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path} is damaged: a line is not JSON; remove that line") from error


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


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
