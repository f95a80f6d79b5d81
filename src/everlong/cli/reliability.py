"""`everlong bench reliability`: its table, and the worker of its random command lines.

`python -m everlong.cli.reliability FOLDER SEED FIRST LAST` is such a worker.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from everlong.cli import _BENCHES, _COMMANDS, build_app, main
from everlong.evaluation import reliability

_ITSELF = "bench reliability"  # is not fuzzed: it would begin workers of its own


def bench_reliability(
    parts: Sequence[str],
    run: reliability.ReliabilityRun,
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Count what is not counted yet, then the table and the JSON of all that is."""
    from rich.table import Table

    from everlong.cli.progress import console
    from everlong.provenance import git_sha

    git_sha()  # that of the code which is loaded now
    doors = reliability.Doors(
        main,
        train=[sys.executable, "-m", "everlong", "train"],
        worker=[sys.executable, "-m", "everlong.cli.reliability"],
    )
    folder = out.absolute() / "reliability"
    found = reliability.measure(parts or reliability.PARTS, run, folder, doors, say)
    table = Table(box=None, pad_edge=False)
    for name in ("what", "tried", "failed", "which"):
        table.add_column(name, justify="right" if name in ("tried", "failed") else "left")
    for row in reliability.rows(found):
        table.add_row(*row)
    console().print(table)
    reliability.write(out / "reliability.json", run, found)
    print(f"written to {out}")


def vocabulary() -> dict[str, list[tuple[str, bool]]]:
    """Every command with its options, and whether an option takes a value: as the parser has it.

    An option without a name stands for words that the command takes.
    """
    app, found = build_app(), {}
    for name in (*_COMMANDS, *(f"bench {each}" for each in _BENCHES)):
        if name == _ITSELF:
            continue
        command = app
        for word in name.split():
            command = command[word]
        arguments = command.assemble_argument_collection()
        found[name] = [
            (option, argument.hint is not bool and not option.startswith(("--no-", "--empty-")))
            for argument in arguments
            for option in argument.names
            if option.startswith("--")
        ]
        if any(argument.index is not None for argument in arguments):
            found[name].append(("", True))
    return found


if __name__ == "__main__":
    from everlong.evaluation.reliability.fuzz import work

    place, seed, first, last = sys.argv[1:]
    work(main, vocabulary(), Path(place), int(seed), range(int(first), int(last)))
