"""Damaged and hostile files: each is refused in one line, and nothing else is lost.

A tiny run is copied, damaged and read through the command line: `train --resume` up to its first
step (weights, optimiser, state, generators and metrics are back by then), or `generate`. Behind a
damaged newest checkpoint the one before must still be read. Meanwhile every way to read a pickle is
watched, and a pickle that runs writes a file that is looked for.
"""

import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from everlong.evaluation.reliability.damage import previous
from everlong.evaluation.reliability.damages import DAMAGES
from everlong.evaluation.reliability.guarded import (
    MEMORY,
    Main,
    Outcome,
    Stopped,
    call,
    make_run,
    memory_at_most,
)
from everlong.evaluation.reliability.hostile import MARKER

CPU_S = 2.0
READ = "read"  # the outcome of what was read without complaint
_STEPS = "train.steps=5"


def measure(
    damages: int, seed: int, folder: Path, main: Main, say: Callable[[str], None]
) -> dict[str, Any]:
    """A row for each kind of damage, in turn until `damages` are done."""
    kept = _furnish(main, folder)
    kinds = list(DAMAGES)
    rows = {
        kind: {"kind": kind, "must_be_refused": DAMAGES[kind].refused, "tried": 0}
        | {"refused": 0, READ: 0, "failed": 0, "failures": []}
        for kind in kinds
    }
    for number in range(damages):
        kind = kinds[number % len(kinds)]
        row = rows[kind]
        told, outcome, wrong = one(main, kept, folder / "place", kind, f"{seed}:{number}")
        row["tried"] += 1
        row["refused"] += outcome.refused
        row[READ] += _reads(outcome)
        if wrong:
            row["failed"] += 1
            row["failures"].append({"what": told, "wrong": wrong, "trace": outcome.trace[-1500:]})
        if (number + 1) % 200 == 0:
            failed = sum(each["failed"] for each in rows.values())
            say(f"{number + 1:,} of {damages:,}: {failed} failed")
    for row in rows.values():
        row["failures"] = row["failures"][:5]
    total = {key: sum(row[key] for row in rows.values()) for key in ("refused", READ, "failed")}
    return {
        "tried": damages,
        "failed": total["failed"],
        "note": f"{len(kinds)} kinds; refused {total['refused']:,}, read {total[READ]:,}",
        "rows": list(rows.values()),
    }


def _furnish(main: Main, folder: Path) -> dict[str, Path]:
    """For each door what lies there, whole: RUN/ and state.safetensors."""
    shutil.rmtree(folder, ignore_errors=True)
    used = folder / "use"
    run = make_run(main, used / "RUN", "train.steps=4", "train.checkpoint_every=2")
    words = ["generate", str(run), "--prompt", "the", "--max-new-tokens", "1"]
    outcome = call(main, [*words, "--save-state", str(used / "state.safetensors")])
    if outcome.code != 0:
        raise RuntimeError(f"no state was saved: {outcome.said or outcome.trace}")
    resumed = shutil.copytree(used, folder / "resume")
    shutil.rmtree(resumed / "RUN" / "model")
    (resumed / "RUN" / "results.json").unlink()
    return {"use": used, "state": used, "resume": resumed}


def one(
    main: Main, kept: dict[str, Path], place: Path, kind: str, seed: str
) -> tuple[str, Outcome, str]:
    """One damage: what was done, what came of it, and what is wrong with that ("" for nothing)."""
    wanted = DAMAGES[kind]
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(kept[wanted.door], place)
    told = wanted.do(random.Random(seed), place)
    with no_pickles() as used, memory_at_most(MEMORY):
        outcome = _through(main, wanted.door, place)
        wrong = _wrong(outcome, wanted.refused)
        if not wrong and wanted.door == "resume" and outcome.refused and wanted.refused:
            before = _resume(main, previous(place))
            wrong = "" if _reads(before) else f"the checkpoint before is lost: {before.said}"
    if used:
        wrong = f"{used[0]} was called"
    if (place / MARKER).exists():
        wrong = MARKER
    return told, outcome, wrong.replace(f"{place}/", "")


def _wrong(outcome: Outcome, refused: bool | None) -> str:
    if outcome.kind == "raised":
        return outcome.place
    if outcome.kind == "limit" or "not enough memory" in outcome.said:
        return "it did not come to an end"
    if outcome.refused:
        return ""
    if not _reads(outcome):
        return f"exit {outcome.code}: {outcome.said[-300:]}"
    return "it was read without complaint" if refused else ""


def _reads(outcome: Outcome) -> bool:
    return outcome.kind == READ or outcome.code == 0


def _through(main: Main, door: str, place: Path) -> Outcome:
    run = place / "RUN"
    if door == "resume":
        return _resume(main, run)
    words = ["generate", str(run), "--prompt", "the", "--max-new-tokens", "1"]
    if door == "state":
        words += ["--load-state", str(place / "state.safetensors")]
    return call(main, words, cpu_s=CPU_S)


def _resume(main: Main, source: Path) -> Outcome:
    """`train --resume` up to where its next step would begin."""
    from everlong.training.learner import Learner

    def stop(*_: Any) -> None:
        raise Stopped(READ)

    with mock.patch.object(Learner, "rollout", stop):
        return call(main, ["train", "--resume", str(source), "--set", _STEPS], cpu_s=CPU_S)


@contextmanager
def no_pickles() -> Iterator[list[str]]:
    """The names of what was called to read a pickle, as it is; the call itself goes through."""
    import torch

    used: list[str] = []

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            used.append(name)
            return original(*arguments, **options)

        return called

    with (
        mock.patch.object(pickle, "load", watched("pickle.load", pickle.load)),
        mock.patch.object(pickle, "loads", watched("pickle.loads", pickle.loads)),
        mock.patch.object(pickle, "Unpickler", watched("pickle.Unpickler", pickle.Unpickler)),
        mock.patch.object(torch, "load", watched("torch.load", torch.load)),
    ):
        yield used
