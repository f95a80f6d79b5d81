"""How often everlong breaks, counted: what `everlong bench reliability` does and reports.

Five parts, each by itself: `cuts` (random calls, masks and resets of every memory), `fuzz` (random
recipes and command lines), `kills` (SIGKILL and resume), `soak` (ten million tokens in one stream)
and `checkpoints` (damaged and hostile files). A part gives JSON data with `tried` and `failed`, and
each failure with what brings it back. Nothing that fails stops the count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everlong.evaluation.cells import cell
from everlong.evaluation.reliability.guarded import Main
from everlong.provenance import write_results
from everlong.registry import check_types

PARTS = ("cuts", "fuzz", "kills", "soak", "checkpoints")
Found = dict[str, Any]


@dataclass(frozen=True)
class ReliabilityRun:
    """What is counted: examples a memory (cuts), recipes and command lines (cases), SIGKILLs of one
    training (kills), tokens of each stream (tokens), damages to files (damages)."""

    examples: int = 500
    cases: int = 10_000
    kills: int = 20
    tokens: int = 10_000_000
    damages: int = 1_300
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "reliability")
        for name, value in vars(self).items():
            least = 0 if name == "seed" else 1
            if value < least:
                raise ValueError(f"{name} is {value}: give {least} or more")

    def of(self, part: str) -> Found:
        """The options that a part depends on."""
        names = {
            "cuts": "examples",
            "fuzz": "cases",
            "kills": "kills",
            "soak": "tokens",
            "checkpoints": "damages",
        }
        return {names[part]: getattr(self, names[part]), "seed": self.seed}


@dataclass(frozen=True)
class Doors:
    """The command line, which stands above this package: `main` runs one in this process, `train`
    begins `everlong train` in its own, `worker` what `fuzz.work` does."""

    main: Main
    train: Sequence[str]
    worker: Sequence[str]


def measure(
    parts: Sequence[str],
    run: ReliabilityRun,
    folder: Path,
    doors: Doors,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Found]:
    """What every one of `parts` found, by its name, in the order of `PARTS`.

    A part that is finished in `folder` is read from there, also where it is not asked for.
    `ValueError` for an unknown one, `UserError` where it was counted with other options.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"no part {part!r}: there are {', '.join(PARTS)}")
    found = {}
    for part in PARTS:
        file = folder / f"{part}.json"
        if part in parts or file.exists():
            found[part] = cell(file, run.of(part), _counted(part, run, folder, doors, say))
    return found


def _counted(
    part: str, run: ReliabilityRun, folder: Path, doors: Doors, say: Callable[[str], None]
) -> Callable[[], Found]:
    def count() -> Found:
        # imported here: each part needs another half of the package
        say(f"{part}: {run.of(part)}")
        if part == "cuts":
            from everlong.evaluation.reliability import cuts

            return cuts.measure(run.examples, run.seed, folder / "cuts", say)
        if part == "fuzz":
            from everlong.evaluation.reliability import fuzz

            return fuzz.measure(run.cases, run.seed, folder / "fuzz", doors, say)
        if part == "kills":
            from everlong.evaluation.reliability import kills

            return kills.measure(run.kills, run.seed, folder / "kills", doors.train, say)
        if part == "soak":
            from everlong.evaluation.reliability import soak

            return soak.measure(run.tokens, run.seed, say)
        from everlong.evaluation.reliability import checkpoints

        return checkpoints.measure(run.damages, run.seed, folder / "checkpoints", doors.main, say)

    return count


def rows(found: Mapping[str, Found]) -> list[list[str]]:
    """What was tried, how often, how often it failed, and what to know of it: a row a part."""
    return [
        [TITLES[part], f"{one['tried']:,}", f"{one['failed']:,}", one["note"]]
        for part, one in found.items()
    ]


TITLES = {
    "cuts": "random calls, masks and resets",
    "fuzz": "random recipes and command lines",
    "kills": "SIGKILLs of a training, each resumed",
    "soak": "tokens read in a stream",
    "checkpoints": "damaged and hostile files",
}


def write(path: Path, run: ReliabilityRun, found: Mapping[str, Found]) -> None:
    """All that was found, as JSON with provenance."""
    options = {name: value for part in found for name, value in run.of(part).items()}
    write_results(path, "everlong bench reliability", options, parts=dict(found))
