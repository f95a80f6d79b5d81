"""`everlong bench memformer`: the Memformer paper's claims, part by part, into one JSON."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from everlong import recipes
from everlong.cli.prepare import load_texts
from everlong.cli.progress import console
from everlong.errors import UserError
from everlong.evaluation import memformer_length as length
from everlong.evaluation import memformer_pixels as pixels
from everlong.evaluation import memformer_roles as roles
from everlong.evaluation import memformer_text as text
from everlong.evaluation.recall import check_counts
from everlong.provenance import git_sha, write_results
from everlong.recipes import Recipe
from everlong.registry import suggest
from everlong.tasks.text import Documents
from everlong.training.config import TrainConfig

Part = dict[str, Any]
Say = Callable[[str], None]
_STREAMS, _ROUNDS = 16, 5  # of the costs at equal quality


def bench_memformer(parts: Sequence[str], seeds: Sequence[int], out: Path, say: Say) -> None:
    """Measure what is missing in `out`, print it, and write memformer.json beside it.

    Parts that are not named stay in the JSON as they are there. `UserError` for an unknown one.
    """
    for part in parts:
        if part not in _PARTS:
            known = f" (there are {', '.join(_PARTS)})"
            raise UserError(f"no part {part!r}{suggest(part, _PARTS)}{known}")
    git_sha()  # that of the code which is loaded now
    check_counts("seeds", tuple(seeds))
    path, folder = out / "memformer.json", out / "memformer"
    found = _held(path)
    for part in dict.fromkeys(parts or _PARTS):
        found[part] = _PARTS[part](tuple(seeds), folder, say)
        # after every part: a long benchmark that is stopped has what is finished
        ordered = {name: found[name] for name in _PARTS if name in found}
        write_results(path, "everlong bench memformer", {"parts": list(ordered)}, **ordered)
    if "length" in found:
        length.plot(found["length"], out / "memformer_length.png")
    print(f"written to {out}")


def _held(path: Path) -> dict[str, Part]:
    if not path.exists():
        return {}
    try:
        held = json.loads(path.read_text("utf-8"))
        return {part: held[part] for part in held["config"]["parts"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what this command wrote: give --out another") from error


def _length(seeds: Sequence[int], folder: Path, say: Say) -> Part:
    run = length.LengthRun()
    found = length.measure(run, folder / "length", say)
    _table(
        "memory", ("tokens", "MFLOP a token", "µs a token", "peak MB", "state bytes"),
        (
            (row["name"], f"{row['length']:,}", f"{row['flops'] / 1e6:.2f}",
             f"{row['seconds'] * 1e6:.0f}", f"{row['peak_bytes'] / 1e6:.2f}",
             f"{row['state_bytes']:,}")
            for row in found["length"]["rows"]
        ),
    )  # fmt: skip
    _table(
        "memory", ("places", "state bytes", "reading MB", "training MB", "MFLOP a token"),
        (
            (row["name"], f"{row['places']:,}", f"{row['state_bytes']:,}",
             f"{row['read_bytes'] / 1e6:.1f}", f"{row['train_bytes'] / 1e6:.1f}",
             f"{row['flops'] / 1e6:.2f}")
            for row in found["size"]["rows"]
        ),
    )  # fmt: skip
    return {"config": asdict(run), **found}


def _pixels(seeds: Sequence[int], folder: Path, say: Say) -> Part:
    run = pixels.PixelsRun()
    rows = pixels.measure(run, seeds, folder / "pixels", say)
    found = pixels.summary(rows, pixels.slotted(run.slots[0]))
    _table(
        "digits", ("perplexity a pixel", "against the first slots", "slots wiped", "state bytes"),
        (
            (row["name"], _with(row["perplexity"], row["interval"]),
             _with(row["gap"], row["gap_interval"], "+"),
             "" if row["slots_wiped"] is None else f"{row['slots_wiped']:.4f}",
             f"{row['state_bytes']:,}")
            for row in found
        ),
    )  # fmt: skip
    return {"config": asdict(run), "summary": found, "rows": rows}


def _language(seeds: Sequence[int], folder: Path, say: Say) -> Part:
    from everlong.evaluation.families import summary

    recipe, texts = _text()
    rows = text.measure(recipe, texts, seeds, folder / "language", say)
    found = summary(rows)
    _table(
        "text", ("bits per byte", "wiping costs", "state bytes", "tokens/s"),
        (
            (row["name"], _with(row["bits_per_byte"], row["interval"]),
             "" if row["gain"] is None else f"{row['gain']:+.4f}", f"{row['state_bytes']:,}",
             f"{row['tokens_per_s']:,.0f}")
            for row in found
        ),
    )  # fmt: skip
    models = {name: config.to_diff_dict() for name, config in text.contenders(recipe).items()}
    about = {"recipe": recipe.table(), "held_out_bytes": text.HELD_OUT_BYTES, "models": models}
    return {"config": about, "summary": found, "rows": rows}


def _equal(seeds: Sequence[int], folder: Path, say: Say) -> Part:
    """At equal quality: the trainings of `language` (made here where they are missing) and what
    reading costs."""
    recipe, texts = _text()
    trained = text.measure(recipe, texts, seeds, folder / "language", say)
    costs = text.costs(recipe, _STREAMS, _ROUNDS, folder / "equal", say)
    found = text.equal_quality(trained, costs)
    _table(
        f"reading {_STREAMS} streams", ("peak MB", "state bytes", "MFLOP a token", "µs a token"),
        (
            (row["name"], f"{row['peak_bytes'] / 1e6:.2f}", f"{row['state_bytes']:,}",
             f"{row['flops'] / 1e6:.3f}", f"{row['seconds'] * 1e6:.1f}")
            for row in costs
        ),
    )  # fmt: skip
    _table(
        "against the Memformer",
        ("compared", "as good", "peak", "state", "carried", "FLOPs", "time"),
        (
            (rival, row["compared"], "yes" if row["equal"] else "none is",
             *(f"{value:.2f} x" for value in row["ratios"].values()))
            for rival, row in found.items()
        ),
    )  # fmt: skip
    return {"config": {"streams": _STREAMS, "rounds": _ROUNDS}, "costs": costs, "rivals": found}


def _roles(seeds: Sequence[int], folder: Path, say: Say) -> Part:
    recipe, texts = _text()
    longer = text.roles_recipe(recipe)
    config = text.contenders(recipe)[text.MEMFORMER]
    options = TrainConfig(**longer.train)
    rows = roles.measure(config, recipe.data, texts, options, seeds, folder / "roles", say)
    found = roles.summary(rows)
    _table(
        "slots", ("at", "keep", "mix", "fed", "|v|", "|v| where fed"),
        (
            (row["model"], row["where"],
             *(_with(row[name], row[f"{name}_interval"]) for name in ("keep", "mix", "fed")),
             *("" if row.get(name) is None else f"{row[name]:.2f}"
               for name in ("speed", "fed_speed")))
            for row in found
        ),
    )  # fmt: skip
    limits = {"keeps": roles.KEEPS, "fed": roles.FED, "start": roles.START, "middle": roles.MIDDLE}
    return {"config": {**limits, "train": longer.train}, "summary": found, "rows": rows}


_PARTS: dict[str, Callable[[Sequence[int], Path, Say], Part]] = {
    "length": _length,
    "pixels": _pixels,
    "language": _language,
    "equal": _equal,
    "roles": _roles,
}


def _text() -> tuple[Recipe, tuple[Documents, Documents]]:
    recipe = recipes.load("families", text.CHANGES)
    texts = load_texts(recipe.data)
    return recipe, text.shortened((texts.train, texts.validation))


def _with(value: float | None, spread: float | None, sign: str = "") -> str:
    if value is None:
        return "none"
    return f"{value:{sign}.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console().print(table)
