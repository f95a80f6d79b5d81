"""`everlong bench language` and `bench hybrid`: one text, one training, equal parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from everlong import recipes
from everlong.cli.prepare import Texts, build, device_of, load_texts, model_config
from everlong.cli.progress import console
from everlong.errors import Diverged, Interrupted, UserError
from everlong.evaluation import families
from everlong.evaluation.recall import check_counts
from everlong.models.config import EverlongConfig
from everlong.models.sizing import with_parameters
from everlong.provenance import git_sha
from everlong.recipes import Recipe, Table
from everlong.registry import list_memories, memory_entry
from everlong.tasks.text import Documents
from everlong.training.config import TrainConfig


def bench_language(
    recipe: Recipe,
    names: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Train what is missing in `out`, then the table, the JSON and the picture."""
    texts = _texts(recipe, seeds)
    both = texts.train, texts.validation
    first = model_config(recipe, texts)
    wanted = build(first, 0).num_parameters()
    shared = TrainConfig(**recipe.train)
    names = tuple(dict.fromkeys(names)) or list_memories(bounded=True)
    configs = {}
    for name in names:
        configs[name] = with_parameters(model_config(_contender(recipe, name), texts), wanted)
    rows, diverged = _measure(
        configs, recipe, both, shared, seeds, lambda name: out / "language" / name, say
    )
    if not rows:
        raise UserError("every training diverged: lower train.learning_rate")
    _table(families.summary(rows), "memory")
    _print_diverged(diverged)
    families.write(
        out / "language.json", _about(recipe, configs), rows, diverged, "everlong bench language"
    )
    print(f"{wanted:,} parameters, {len(seeds)} seeds; written to {out}")


def bench_hybrid(
    recipe: Recipe,
    kinds: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Recall by kind and form, language by ratio: what is missing in `out` is trained."""
    from everlong.cli.recall import accuracy_table
    from everlong.evaluation import hybrid
    from everlong.registry import suggest

    texts = _texts(recipe, seeds)
    for kind in kinds:
        if kind not in hybrid.KINDS:
            known = f" (there are {', '.join(hybrid.KINDS)})"
            raise UserError(f"no linear kind {kind!r}{suggest(kind, hybrid.KINDS)}{known}")
    kinds, seeds = tuple(dict.fromkeys(kinds)) or hybrid.KINDS, tuple(dict.fromkeys(seeds))
    both, whole = (texts.train, texts.validation), model_config(recipe, texts)
    reader = whole.layer_names[0]
    if set(whole.layer_names) != {reader} or reader not in hybrid.KINDS or whole.segment:
        raise UserError(
            f"{recipe.origin}: give model.layers one linear kind and no model.segment, "
            f"of {', '.join(hybrid.KINDS)}"
        )
    configs = {ratio: hybrid.language_config(whole, ratio) for ratio in hybrid.RATIOS}
    shared = TrainConfig(**recipe.train)
    device_of(shared)
    run, place = hybrid.HybridRun(), out / "hybrid"
    recalled = hybrid.recall(run, kinds, seeds, place, say)
    accuracy_table(hybrid.recall_summary(recalled), "form", "recall, by layers")
    read, diverged = _measure(
        configs, recipe, both, shared, seeds,
        lambda ratio: place / f"{reader}-{hybrid.RATIOS[ratio]}", say,
    )  # fmt: skip
    _table(hybrid.language_summary(read), "linear : attention")
    _print_diverged(diverged)
    hybrid.write(
        out / "hybrid.json", run, _about(recipe, configs), reader, recalled, read, diverged
    )
    print(f"{len(seeds)} seeds; written to {out}")


def _measure(
    configs: dict[str, EverlongConfig],
    recipe: Recipe,
    both: tuple[Documents, Documents],
    options: TrainConfig,
    seeds: Sequence[int],
    folder: Callable[[str], Path],
    say: Callable[[str], None],
) -> tuple[list[families.Row], list[families.Row]]:
    """Rows of every model and seed, measured in `folder(name)-seed`, and what diverged."""
    rows, diverged = [], []
    for seed in dict.fromkeys(seeds):
        for name, config in configs.items():
            place = folder(name).with_name(f"{folder(name).name}-{seed}")
            seeded = replace(options, seed=seed)
            try:
                row = families.measure(name, config, recipe.data, both, seeded, place)
            except Diverged as error:
                say(f"{name}, seed {seed}: {error}")
                diverged.append({"name": name, "seed": seed, "error": str(error).split(";")[0]})
                continue
            except Interrupted as stop:
                again = "the same command"
                raise Interrupted(stop.exit_code - 128, stop.step, again) from None
            say(f"{name}, seed {seed}: {row['bits_per_byte']:.3f} bits per byte")
            rows.append(row)
    return rows, diverged


def _print_diverged(diverged: Sequence[families.Row]) -> None:
    for each in diverged:
        print(f"{each['name']}, seed {each['seed']}: {each['error']}")


def _texts(recipe: Recipe, seeds: Sequence[int]) -> Texts:
    """What the recipe reads; `UserError` where it reads no text or its training lacks a length."""
    if recipe.task:
        raise UserError(f"{recipe.origin} trains on a generated task: name one that reads a text")
    if recipe.train.get("segment_length") is None:
        raise UserError(f"{recipe.origin}: give train.segment_length, the same for every memory")
    git_sha()  # that of the code which is loaded now
    check_counts("seeds", tuple(seeds))
    return load_texts(recipe.data)


def _about(recipe: Recipe, configs: Mapping[str, EverlongConfig]) -> Table:
    """What the JSON says of a comparison."""
    models = {name: config.to_diff_dict() for name, config in configs.items()}
    return {"recipe": recipe.table(), "models": models}


def _contender(base: Recipe, name: str) -> Recipe:
    """The memory's own recipe's model (or `--memory NAME` on the default), in the text and training
    of `base`; what `base` changes of the default model is changed here too, where it can be.

    Segments are as long as those of the training.
    """
    entry, default = memory_entry(name), recipes.load("default")
    known = name in recipes.shipped()
    own = (recipes.load(name) if known else recipes.with_memory(default, name)).model
    plain, wanted = default.model, base.model
    memory = _changes(plain.get("segment"), wanted.get("segment")) | {
        "segment_length": base.train["segment_length"]
    }
    memory = {key: value for key, value in memory.items() if key in entry.fields}
    model = own | {k: v for k, v in _changes(plain, wanted).items() if k not in _MEMORY}
    if entry.room == "segments":
        model["segment"] = {**own["segment"], **memory}
    else:
        mixers = own.get("mixers", {})
        model["mixers"] = {**mixers, name: {**mixers.get(name, {}), **memory}}
    return replace(base, origin=f"recipe {name!r}", model=model)


_MEMORY = ("segment", "layers", "mixers")


def _changes(before: Table | None, after: Table | None) -> Table:
    before, after = before or {}, after or {}
    return {k: v for k, v in after.items() if k != "name" and v != before.get(k)}


def _table(rows: Sequence[families.Row], title: str) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    columns = ("bits per byte", "gain over wiped", "bytes of state", "tokens/s", "parameters")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        spread = "" if row["interval"] is None else f" ± {row['interval']:.3f}"
        table.add_row(
            row["name"],
            f"{row['bits_per_byte']:.3f}{spread}",
            "" if row["gain"] is None else f"{row['gain']:+.3f}",
            f"{row['state_bytes']:,}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['parameters']:,}",
        )
    console().print(table)
