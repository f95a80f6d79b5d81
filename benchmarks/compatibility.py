"""Writes the tables of docs/compatibility.md from what tests found.

    make test ARGS="-m supports --compatibility=benchmarks/results/compatibility.json"
    python benchmarks/compatibility.py

The first runs the tests and writes the file (tests/supports.py). Nothing is listed here but which
tests a column is made of: no passed test, no tick.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import everlong

RESULT = Path(__file__).parent / "results" / "compatibility.json"
PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
IN_MODELS = "134567"  # laws that are asked of language models too
Columns = dict[str, list[str]]


def laws(*names: str) -> list[str]:
    """What the checks of these names show: of a memory, and of a language model over it."""
    return [f"law {n}" for n in names] + [f"model law {n}" for n in names if n[0] in IN_MODELS]


LAWS: Columns = {
    "any cut": laws("1 any cut"),
    "whole gradient": laws("1 gradient"),
    "fast = slow": laws("2 reference"),
    "causal": laws("3 causal"),
    "rows": laws("4 row alone", "4 reset", "4 served"),
    "masks": laws("4 mask", "4 mask kinds", "4 masked row"),
    "bounded": laws("5 form", "5 bounded"),
    "pure": laws("5 detached", "5 pure", "5 quiet"),
    "replay": laws("6 replay", "6 advance", "6 truncation"),
    "saved": laws("7 saved"),
    "position 10⁷": laws("7 far"),
    "refusals": laws("9 options", "9 shapes"),
}
TRANSFORMERS: Columns = {
    "greedy": ["generate: greedy", "generate: each token once"],
    "sampling": ["generate: sampling"],
    "beams": ["generate: beams"],
    "left padding": ["generate: left padding"],
    "goes on": ["generate: resumed", "generate: from a state"],
    "prompt in chunks": ["generate: prompt in chunks"],
    "LoRA": ["LoRA"],
    "layers recomputed": ["gradient checkpointing"],
    "segments recomputed": laws("6 checkpoint"),
}
NUMBERS: Columns = {
    "float32, bfloat16, autocast": laws("7 precision"),
    "exact sums in bfloat16": [*laws("7 accumulators"), "bfloat16 files"],
    "float16": ["float16"],
    "torch.compile": ["compile"],
    "CPU": ["device cpu"],
    "CUDA": ["device cuda"],
    "MPS": ["device mps"],
}
PROCESSES: Columns = {
    "gradients of 2 processes": ["processes: gradients"],
    "weights in shares (FSDP2)": ["processes: shares"],
    "another number of processes": ["processes: another number"],
}
DECODERS: Columns = {
    "any cut, rows": [f"extend law {n}" for n in ("1 any cut", "4 mask", "4 served")],
    "all of laws 1, 4": [
        f"extend law {n}"
        for n in ("1 gradient", "4 row alone", "4 mask kinds", "4 masked row", "4 reset")
    ],
    "reaches back": ["extend: reaches back"],
    "constant state": ["extend: the state never grows"],
    "replay": ["extend: replay"],
    "layers recomputed": ["extend: gradient checkpointing"],
    "greedy": ["extend: greedy"],
    "left padding": ["extend: left padding"],
    "beams, sampling": ["extend: beams and samples"],
    "saved": ["extend: saved"],
}
ONCE = (
    "DistributedDataParallel in a loop of one's own",
    "a run on 1, then 2 processes; 2, then 1; in shares",
    "started anew by torchrun after a SIGKILL, to the same bits",
)
GENERATE = "generate, "  # begins what the options of generate are asked of: a model


def found() -> dict[str, dict[str, str]]:
    return json.loads(RESULT.read_text())["found"]


def memory_of(of: str) -> str:
    """The memory of a variant, "rmt, llama" or "rmt as published, gemma3"."""
    return of.partition(",")[0].split()[0]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


class Notes:
    """Reasons that stand below a table, numbered in the order they are met."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def number(self, reason: str) -> str:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"({self.reasons.index(reason) + 1})"

    def __str__(self) -> str:
        lines = [f"({i}) {reason}" for i, reason in enumerate(self.reasons, 1)]
        return "\n" + "<br>\n".join(lines) + "\n" if lines else ""


def cell(told: list[list[str]], notes: Notes) -> str:
    """Of the outcomes of each thing asked: one failure is a no, a thing never asked leaves the cell
    empty, and where all were skipped it says why."""
    every = [outcome.partition(": ") for outcomes in told for outcome in outcomes]
    for kind, _, why in every:
        if kind == "failed":
            return f"no {notes.number(why)}"
    if not told or not all(told):
        return ""
    passed = [why for kind, _, why in every if kind == "passed"]
    if passed:
        return " ".join(["✓", *filter(None, passed[:1])])
    return f"– {notes.number(every[0][2])}"


def memories(columns: Columns) -> str:
    """A row a registered memory. An unbounded one passes law 5 by growing as it says."""
    results, notes, rows = found(), Notes(), []
    growing = everlong.list_memories(bounded=False)
    for name in everlong.list_memories():
        own = [results[of] for of in results if memory_of(of) == name]
        cells = [f"[{name}](memories/{name}.md)"]
        for heading, asked in columns.items():
            told = [[each[what] for each in own if what in each] for what in asked]
            said = cell(told, notes)
            cells.append(
                "grows" if (said, heading) == ("✓", "bounded") and name in growing else said
            )
        rows.append(cells)
    return table(["memory", *columns], rows) + str(notes)


def decoders() -> str:
    """A row a segment memory: the pretrained decoders around which everything asked passed."""
    results, notes, rows, seen = found(), Notes(), [], set()
    for name in everlong.list_memories(room="segments"):
        cells = [f"[{name}](memories/{name}.md)"]
        for asked in DECODERS.values():
            passed = []
            for of, told in results.items():
                if memory_of(of) == name and any(what in told for what in asked):
                    said = cell([[told[what]] if what in told else [] for what in asked], notes)
                    variant, _, decoder = of.removeprefix(name).strip().partition(", ")
                    label = f"{decoder} {variant}".strip()
                    passed += [label] if said == "✓" else [f"{label}: {said}"] if said else []
                    seen |= set() if variant or said != "✓" else {label}
            cells.append(passed)
        rows.append(cells)
    told = [[c if isinstance(c, str) else _all(c, seen) for c in cells] for cells in rows]
    return table(["memory", *DECODERS], told) + str(notes) + f"\nall: {', '.join(sorted(seen))}.\n"


def _all(passed: list[str], seen: set[str]) -> str:
    left = [label for label in passed if label not in seen]
    return ", ".join(["all", *left] if seen <= set(passed) else passed)


def options() -> str:
    """The options of generate by what all models say of them."""
    results = {of: told for of, told in found().items() if of.startswith(GENERATE)}
    lists: dict[str, list[str]] = {"works": [], "refused": [], "otherwise": []}
    for what in next(iter(results.values())):
        kind, _, option = what.partition(": ")
        outcomes = {told.get(what, "not asked") for told in results.values()}
        name, comma, variant = option.partition(",")
        shown = f"`{name}`{comma}{variant}"
        if outcomes == {"passed"}:
            lists[kind].append(shown)
        else:
            lists["otherwise"].append(f"{shown} ({'; '.join(sorted(outcomes))})")
    models = " and ".join(of.removeprefix(GENERATE) for of in results)
    text = f"Asked of: {models}.\n"
    for kind, names in lists.items():
        if names:
            text += f"\n**{kind.capitalize()}** ({len(names)}): {'; '.join(names)}.\n"
    return text


def once() -> str:
    """What is asked of one memory, as it is about the loop and not about the memory."""
    results = found()
    rows = []
    for what in ONCE:
        told = {of: results[of][what] for of in results if what in results[of]}
        rows += [[what, of, "✓" if said == "passed" else said] for of, said in told.items()]
    return table(["asked", "of", ""], rows)


def where() -> str:
    """Versions and commits behind the file."""
    result = json.loads(RESULT.read_text())
    environment = result["environment"]
    names = ("python", "torch", "transformers", "accelerate", "peft", "cuda", "mps")
    told = ", ".join(f"{name} {environment.get(name, 'not installed')}" for name in names)
    commits = sorted({str(sha) for sha in result["git"].values()})
    return f"{told}; commit {', '.join(commits)} (+: with changes).\n"


TABLES = {
    "laws": lambda: memories(LAWS),
    "transformers": lambda: memories(TRANSFORMERS),
    "options": options,
    "numbers": lambda: memories(NUMBERS),
    "processes": lambda: memories(PROCESSES),
    "once": once,
    "decoders": decoders,
    "where": where,
}


def fill(page: str) -> str:
    """The page with the tables between their marks."""
    for name, make in TABLES.items():
        marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        page, number = re.subn(marks, lambda m: m[1] + make() + m[2], page, flags=re.DOTALL)  # noqa: B023
        assert number == 1, f"{PAGE.name} has no place for the table {name!r}"
    return page


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
