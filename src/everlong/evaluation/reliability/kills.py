"""SIGKILL at random moments: a training that was killed and resumed ends as one that was not.

A tiny recipe is trained once without a disturbance, and once killed again and again: most times
somewhere in or behind a random step, with a checkpoint behind every second one, and each fifth time
while it is still starting. In the end every file of the last checkpoint (weights, optimiser, state,
generators, positions) and of model/ must have the same bytes, and the metrics the same numbers.
"""

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from everlong.evaluation.reliability.guarded import TINY
from everlong.training import checkpoints
from everlong.training.run import read_metrics, without_times

STEPS_A_KILL = 15
SPREAD_S = 0.08  # a kill comes up to so much later than its step: two steps and a checkpoint
PATIENCE_S = 300.0
_TEXT = "the whale and the sea and the ship\n" * 600


def measure(
    kills: int, seed: int, folder: Path, train: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """`train` is the command that recipes and options are put behind; one thread each time."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(_TEXT)
    steps = STEPS_A_KILL * kills + 1
    whole, killed = folder / "whole", folder / "killed"
    starting_s = _run_whole([*train, *_words(folder, whole, steps)], whole)
    say(f"{steps} steps without a disturbance; the first after {starting_s:.1f} s")
    generator, rows = random.Random(seed), []
    places = iter(sorted(generator.sample(range(1, steps), kills)))
    for number in range(kills):
        words = _again(folder, killed, steps)
        early = number % 5 == 4
        step = None if early else next(places)
        delay = generator.uniform(0, starting_s if early else SPREAD_S)
        row = _kill([*train, *words], killed, step, delay)
        rows.append(row)
        say(f"kill {number + 1} of {kills}: {row}")
    _finish([*train, *_again(folder, killed, steps)])
    apart = differences(whole, killed)
    return {
        "tried": kills,
        "failed": len(apart),
        "note": _note(rows, steps, apart),
        "steps": steps,
        "differences": apart,
        "rows": rows,
    }


def _note(rows: Sequence[dict[str, Any]], steps: int, apart: Sequence[str]) -> str:
    early = sum(row["wanted_step"] is None for row in rows)
    torn = sum(row["half_written"] for row in rows)
    end = f"{len(apart)} files or lines differ" if apart else "all bits equal"
    return f"{steps} steps, {early} kills at the start, {torn} within a checkpoint; {end}"


def _words(folder: Path, run: Path, steps: int) -> list[str]:
    changes = [*TINY, f"train.steps={steps}", "train.checkpoint_every=2", "train.eval_every=20"]
    words = ["smoke", "--data", str(folder / "text.txt"), "--out", str(run)]
    return words + [word for change in changes for word in ("--set", change)]


def _again(folder: Path, run: Path, steps: int) -> list[str]:
    """To go on; from nothing where a kill came before the first checkpoint."""
    if run.exists() and checkpoints.steps(run):
        return ["--resume", str(run)]
    return _words(folder, run, steps)


def _begin(command: Sequence[str]) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)


def _finish(command: Sequence[str]) -> None:
    process = _begin(command)
    _, said = process.communicate(timeout=PATIENCE_S)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said[-500:]}")


def _run_whole(command: Sequence[str], run: Path) -> float:
    """Train to the end; seconds until the first step."""
    started = time.monotonic()
    process = _begin(command)
    _wait_for(run, 1, process)
    starting_s = time.monotonic() - started
    _, said = process.communicate(timeout=PATIENCE_S)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said[-500:]}")
    return starting_s


def _kill(command: Sequence[str], run: Path, step: int | None, delay: float) -> dict[str, Any]:
    """Begin, wait for `step` (None: for nothing) and `delay` seconds more, kill; what was left."""
    process = _begin(command)
    if step is not None:
        _wait_for(run, step, process)
    time.sleep(delay)
    process.kill()
    _, said = process.communicate()
    if process.returncode >= 0:
        raise RuntimeError(f"{' '.join(command)} ended before it was killed: {said[-500:]}")
    kept = checkpoints.steps(run) if run.exists() else []
    return {
        "wanted_step": step,
        "step": _last_step(run),
        "checkpoint": kept[-1] if kept else None,
        "half_written": any(map(checkpoints.is_leftover, run.glob(".*"))),
    }


def _wait_for(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while _last_step(run) < step and process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"no step {step} in {run} after {PATIENCE_S:.0f} s")
        time.sleep(0.002)


def _last_step(run: Path) -> int:
    """That of the last whole line of the metrics; 0 before there is one."""
    lines = read_metrics(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def differences(whole: Path, killed: Path) -> list[str]:
    """Every file and line of one run that is not the other's; nothing where they are equal."""
    found = []
    for name in (f"checkpoint-{max(checkpoints.steps(whole)):08d}", "model"):
        one, other = _files(whole / name), _files(killed / name)
        found += [f"{name}/{file}" for file in one | other if one.get(file) != other.get(file)]
    lines, others = (
        [without_times(line) for line in read_metrics(run / "metrics.jsonl")]
        for run in (whole, killed)
    )
    if len(lines) != len(others):
        found.append(f"metrics.jsonl: {len(lines)} and {len(others)} lines")
    for a, b in zip(lines, others, strict=False):
        if a != b:
            found.append(f"metrics.jsonl, step {a.get('step')}")
    scores = [
        [row["bits_per_byte"] for row in json.loads((run / "results.json").read_text())["rows"]]
        for run in (whole, killed)
    ]
    return found + (["results.json"] if scores[0] != scores[1] else [])


def _files(folder: Path) -> dict[str, bytes]:
    files = folder.rglob("*") if folder.exists() else ()
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}
