"""The recall task from a recipe: one training for `train`, all of them for `bench recall`."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everlong.evaluation.recall import RecallRun
    from everlong.recipes import Recipe
    from everlong.tasks.recall import RecallConfig

TEST_TIME = "test-time"  # the family of which nothing is trained


@dataclass(frozen=True)
class Plan:
    """form: which of `evaluation.recall.subjects` `train` trains."""

    form: str
    seeds: tuple[int, ...]
    task: "RecallConfig"
    run: "RecallRun"


def read_plan(recipe: "Recipe") -> Plan:
    """Raises `UserError`, naming the recipe, for a task that is not recall or cannot be."""
    from everlong.errors import UserError
    from everlong.evaluation.recall import RecallRun, check_counts, subjects
    from everlong.registry import check_types, suggest
    from everlong.tasks.recall import RecallConfig

    # TOML has lists, our configs tuples
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in recipe.task.items()
    }
    name, form = options.pop("name", None), options.pop("form", "encoder-decoder")
    if name != "recall":
        raise UserError(f'{recipe.origin}: [task] name is {name!r}; there is only "recall"')
    for section in ("model", "train"):
        if getattr(recipe, section):
            raise UserError(
                f"{recipe.origin} trains on a generated task, which reads [task] alone: "
                f"leave out [{section}] (task.steps, task.hidden_size and the like are there)"
            )
    seeds = options.pop("seeds", (0, 1, 2))
    known = {field.name for field in fields(RecallConfig)}
    of_task = {k: v for k, v in options.items() if k in known}
    try:
        check_counts("seeds", seeds)
        check_types(RecallConfig, of_task, "recall")
        task = RecallConfig(**of_task)
        run = RecallRun(**{k: v for k, v in options.items() if k not in known})
    except ValueError as error:
        raise UserError(f"{recipe.origin}: [task] {error}") from error
    choices = list(subjects(task, run))
    if form not in choices:
        hint = suggest(str(form), choices) or f" (there are {', '.join(choices)})"
        raise UserError(f"{recipe.origin}: [task] no form {form!r}{hint}")
    return Plan(form, seeds, task, run)


def train_recall(recipe: "Recipe", given: Mapping[str, Any], run_dir: Path, dry_run: bool) -> None:
    """Train the recipe's form on its first seed; its accuracy, and the same with memory wiped."""
    from everlong.errors import UserError
    from everlong.evaluation import recall
    from everlong.provenance import origin

    plan = read_plan(recipe)
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise UserError(f"{recipe.origin} trains on a generated task: leave out {unused[0]}")
    subject, seed = recall.subjects(plan.task, plan.run)[plan.form], plan.seeds[0]
    model = recall.build(subject, plan.task, plan.run, seed)
    print(f"{model.num_parameters():,} parameters, {plan.form}, {plan.run.steps:,} steps")
    if dry_run:
        return
    if run_dir.exists():
        raise UserError(f"{run_dir} exists: give --out a new folder")
    run_dir.mkdir(parents=True)
    started, every = time.perf_counter(), max(1, plan.run.steps // 10)

    def say(step: int, loss: float) -> None:
        if step % every == 0:
            print(f"training: {step}/{plan.run.steps} loss {loss:.3f}", file=sys.stderr)

    model = recall.train(subject, plan.task, plan.run, seed, say)
    found = {
        name: recall.measure(model, plan.task, plan.run, seed, wipe)
        for name, wipe in (("with its memory", False), ("memory wiped", True))
    }
    _table(
        [{"name": n, "distractors": d, "mean": a} for n, by in found.items() for d, a in by.items()]
    )
    print(f"chance {plan.task.chance:.3f}; {time.perf_counter() - started:.0f} s")
    model.save_pretrained(run_dir / "model")
    about = {"recipe": recipe.table(), "accuracy": found} | origin()
    (run_dir / "results.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    print(f"Everything is in {run_dir}")


def bench_recall(recipe: "Recipe", path: Path, say: Callable[[str], None]) -> None:
    """Every subject and control over the seeds, as a table and as JSON."""
    from everlong.evaluation import recall

    plan = read_plan(recipe)

    def report(name: str, seed: int, found: Mapping[int, float]) -> None:
        scores = ", ".join(f"{value:.3f} at {count}" for count, value in found.items())
        say(f"{name}, seed {seed}: {scores}")

    rows = recall.compare(plan.task, plan.run, plan.seeds, report)
    _table(recall.summary(rows))
    print(f"chance {plan.task.chance:.3f}, {len(plan.seeds)} seeds")
    recall.write(path, plan.task, plan.run, rows)
    print(f"written to {path}")


def bench_family(recipe: "Recipe", family: str, out: Path, say: Callable[[str], None]) -> None:
    """Every memory of a family over the seeds: table, JSON and picture; resumable."""
    from everlong.errors import UserError
    from everlong.evaluation import recall
    from everlong.evaluation.report import plot_recall
    from everlong.registry import suggest

    if family not in recall.FAMILIES:
        known = *recall.FAMILIES, TEST_TIME
        raise UserError(
            f"no family {family!r}{suggest(family, known)} (there are {', '.join(known)})"
        )
    plan = read_plan(recipe)

    def report(name: str, seed: int, found: Mapping[str, float]) -> None:
        scores = ", ".join(f"{value:.3f} at {count}" for count, value in found.items())
        say(f"{name}, seed {seed}: {scores}")

    name = f"recall-{family}"
    rows = recall.compare_family(family, plan.task, plan.run, plan.seeds, out / name, report)
    found = recall.summary(rows)
    _table(found)
    command = f"everlong bench recall --family {family}"
    recall.write(out / f"{name}.json", plan.task, plan.run, rows, command)
    plot_recall(found, plan.task.chance, out / f"{name}.png")
    print(f"chance {plan.task.chance:.3f}, {len(plan.seeds)} seeds; written to {out}")


def bench_test_time(recipe: str, changes: Sequence[str], out: Path) -> None:
    """What memories that learn at test time do without training: tables, JSON and picture."""
    from everlong.errors import UserError
    from everlong.evaluation import behaviour

    for given, what in ((recipe != "recall", f"the recipe {recipe!r}"), (changes, "--set")):
        if given:
            raise UserError(f"--family {TEST_TIME} trains nothing: leave out {what}")
    run = behaviour.BehaviourRun()
    found = behaviour.measure(run)
    late = f"squared error of a map's last {run.late} keys, by step / (1 - momentum)"
    titles = {
        "overwriting": ("asked", f"signs read right, {run.rewritten} of {run.keys} written twice"),
        "momentum": ("reach", late),
        "outliers": ("outliers", "squared error, by writes that are outliers"),
        "capacity": ("pairs", "signs read right, by pairs written"),
    }
    for name, (by, title) in titles.items():
        small = name in ("momentum", "outliers")
        accuracy_table(found[name], by, title, ".2g" if small else ".3f")
        print()
    behaviour.write(out / f"recall-{TEST_TIME}.json", run, found)
    print(f"{run.seeds} seeds; written to {out}")


def accuracy_table(rows: list[dict[str, Any]], by: str, title: str, digits: str = ".3f") -> None:
    """Means of `evaluation.recall.summary(rows, by)`, one line a name."""
    from rich.table import Table

    from everlong.cli.progress import console

    counts = list(dict.fromkeys(row[by] for row in rows))
    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    for count in counts:
        table.add_column(str(count), justify="right")
    cells = {(row["name"], row[by]): _cell(row, digits) for row in rows}
    for name in dict.fromkeys(row["name"] for row in rows):
        table.add_row(name, *(cells[name, count] for count in counts))
    console().print(table)


def _table(rows: list[dict[str, Any]]) -> None:
    accuracy_table(rows, "distractors", "accuracy, by distractor segments")


def _cell(row: Mapping[str, Any], digits: str) -> str:
    if row["mean"] is None:
        return "diverges"
    spread = f" ± {row['interval']:{digits}}" if row.get("interval") is not None else ""
    return f"{row['mean']:{digits}}{spread}"
