"""`everlong train`: a recipe in, a run folder out; or a run goes on where it stopped."""

import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from everlong.cli.processes import check_restarts, is_restarted, main_speaks, several

if TYPE_CHECKING:
    from everlong.cli.prepare import Texts
    from everlong.recipes import Data, Recipe
    from everlong.training.config import TrainConfig

Device = Literal["auto", "cpu", "cuda", "mps"]
Track = Literal["trackio", "tensorboard"]


@dataclass(frozen=True)
class Plan:
    """What is to be trained, where it goes, and from which checkpoint on (None: from nothing)."""

    recipe: "Recipe"
    config: "TrainConfig"
    texts: "Texts"
    run_dir: Path
    resume: Path | None = None
    track: Track | None = None


@main_speaks()
def train(  # noqa: PLR0913 (a command's options)
    recipe: str | None = None,
    /,
    *,
    data: str | None = None,
    memory: str | None = None,
    changes: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    resume: Path | None = None,
    out: Path | None = None,
    device: Device | None = None,
    tokenizer: str | None = None,
    track: Track | None = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Train a model and measure what its memory is worth.

    On several devices: torchrun --nproc-per-node N -m everlong train ...

    Parameters
    ----------
    recipe
        A recipe of yours (a file ending in .toml) or a shipped one; "default" if left out.
    data
        A packaged text (moby_dick, sotu), a file, or a folder with one document a file; any bytes.
    memory
        A name from `everlong list`: a segment memory around the layers, or what every layer is.
    changes
        section.key=value, over what the recipe says; may be repeated.
    resume
        A run folder (or one checkpoint of it) to go on with.
    out
        The run folder; a new one under runs/ if left out.
    device
        auto takes the best there is.
    tokenizer
        A folder or tokenizer.json of a Hugging Face tokenizer; bytes if left out.
    track
        Send the metrics there too (the extra `track`); RUN/metrics.jsonl always has them.
    dry_run
        Say what it would take and write nothing.
    """
    if track is not None:
        from everlong.training.tracking import check

        check(track)
    check_restarts(resume or out)
    if resume is not None:
        fixed = {"RECIPE": recipe, "--data": data, "--memory": memory, "--out": out}
        plan = _resumed(resume, fixed | {"--tokenizer": tokenizer}, changes, device)
    elif is_restarted() and out is not None and _has_begun(out):
        plan = _resumed(out, {}, (), device)
    else:
        from everlong import recipes

        chosen = recipes.load(recipe or "default", changes)
        if chosen.task:
            from everlong.cli.recall import train_recall

            if several():
                raise ValueError(f"{chosen.origin} trains in one process: leave out torchrun")
            given = {"--data": data, "--memory": memory, "--tokenizer": tokenizer}
            given |= {"--device": device, "--track": track}
            train_recall(chosen, given, out or _new_run(chosen.origin), dry_run)
            return
        if memory is not None:
            chosen = recipes.with_memory(chosen, memory)
            recipes.check_kept(chosen, changes, memory)
            out = out or _new_run(memory)
        plan = _fresh(chosen, data, tokenizer, device, out)
    if plan is None:
        return
    if dry_run:
        from everlong.cli.estimate import print_estimate

        print_estimate(plan)
    else:
        _train(replace(plan, track=track))


def _fresh(
    recipe: "Recipe", data: str | None, tokenizer: str | None, device: str | None, out: Path | None
) -> Plan:
    from everlong.cli.prepare import load_texts
    from everlong.errors import UserError
    from everlong.training.config import TrainConfig

    given = {"source": data, "tokenizer": tokenizer}
    given = {key: value for key, value in given.items() if value is not None}
    chosen = replace(recipe.data, **given)
    options: dict[str, Any] = recipe.train | ({} if device is None else {"device": device})
    try:
        config = TrainConfig(**options)
    except ValueError as error:
        raise UserError(f"{recipe.origin}: [train] {error}") from error
    texts = load_texts(chosen)
    recipe = replace(recipe, data=_lasting(chosen))
    return Plan(recipe, config, texts, out or _new_run(recipe.origin))


def _lasting(data: "Data") -> "Data":
    """The same where the run is resumed from another folder: paths made absolute."""
    from everlong.tasks.corpora import packaged

    named = data.source in packaged()
    source = data.source if named else str(Path(data.source).absolute())
    tokenizer = data.tokenizer and str(Path(data.tokenizer).absolute())
    return replace(data, source=source, tokenizer=tokenizer)


def _has_begun(run_dir: Path) -> bool:
    from everlong.training import checkpoints

    return bool(checkpoints.steps(run_dir))


def _new_run(origin: str) -> Path:
    name = Path(origin.removeprefix("recipe ").strip("'")).stem
    stamp = time.strftime("%Y%m%d-%H%M%S")
    taken = (
        Path("runs", f"{name}-{stamp}{more}") for more in ("", *(f"-{n}" for n in range(2, 99)))
    )
    return next(path for path in taken if not path.exists())


def _resumed(
    resume: Path, fixed: dict[str, Any], changes: tuple[str, ...], device: str | None
) -> Plan | None:
    """The plan of a run that was stopped; None, and a word about it, for one that is finished."""
    from everlong import recipes
    from everlong.cli.final import read_results, show
    from everlong.cli.prepare import load_texts
    from everlong.cli.runs import described
    from everlong.errors import UserError
    from everlong.training import checkpoints
    from everlong.training.config import FIXED, TrainConfig

    run_dir = resume.parent if (resume / "manifest.json").exists() else resume
    given = [name for name, value in fixed.items() if value is not None]
    own = [change.partition("=")[0].strip() for change in changes]
    given += [f"--set {key}" for key in own if not key.startswith("train.") or key[6:] in FIXED]
    if given:
        raise UserError(
            f"--resume goes on with what {run_dir} was started with: leave out {given[0]}"
        )
    about = described(run_dir)
    if "recipe" not in about:
        raise UserError(
            f"{run_dir} was not started by `everlong train`: go on with it in Python, with "
            f"everlong.training.loop.train(..., resume={str(run_dir)!r})"
        )
    source = resume if run_dir != resume else checkpoints.latest(run_dir)
    options = checkpoints.load(source).get("config")
    known = {field.name for field in fields(TrainConfig)}
    if not isinstance(options, dict) or options.keys() - known:
        raise UserError(f"{source} is damaged: it does not say how it was trained")
    for change in changes:
        options |= recipes.parse_change(change)["train"]
    if device is not None:
        options["device"] = device
    config = TrainConfig(**options)
    recipe = recipes.Recipe.from_table(about["recipe"], str(run_dir / "config.json"))
    results = read_results(run_dir)
    if results is not None and results["steps"] >= config.steps and resume == run_dir:
        print(f"{run_dir} is finished; --set train.steps=N goes on from step {results['steps']:,}")
        show(results)
        return None
    return Plan(recipe, config, load_texts(recipe.data), run_dir, source)


def _train(plan: Plan) -> None:
    """The model, then its twin if there is one, then what both are worth.

    Several processes train; the first then measures alone."""
    from everlong.cli import final
    from everlong.cli.prepare import build, model_config, twin_config
    from everlong.training.distributed import from_main, group_of, leave

    group = group_of(plan.config.device)
    is_main, tokenizer = group.is_main_process, plan.texts.tokenizer
    run_dir = from_main(group, lambda: str(plan.run_dir))  # its name may be of another second
    plan = replace(plan, run_dir=Path(run_dir))
    model = build(model_config(plan.recipe, plan.texts), plan.config.seed)
    plan = replace(plan, config=plan.config.for_model(model))
    _announce(plan, model)
    _loop(plan, model, "training")
    from_main(group, lambda: final.finish(tokenizer, plan.run_dir / "model"))
    twin = None
    if plan.recipe.twin:
        folder = plan.run_dir / "twin"
        started = from_main(group, lambda: _has_begun(folder))
        assert plan.config.segment_length is not None
        twin = build(twin_config(model.config, plan.config.segment_length), plan.config.seed)
        beside = replace(plan, run_dir=folder, resume=folder if started else None)
        _loop(beside, twin, "its twin", plan.run_dir)
        from_main(group, lambda: final.finish(tokenizer, folder / "model"))
    leave(group)
    if is_main:
        _measure(plan, model, twin)


def _measure(plan: Plan, model: Any, twin: Any | None) -> None:
    from everlong.cli import final

    try:
        results = final.evaluate(model, twin, plan.texts, plan.config, plan.run_dir)
        final.show(results)
        final.continue_passage(model, plan.texts)
        print(f"\nEverything is in {plan.run_dir}")
    except KeyboardInterrupt:
        print(
            f"everlong train --resume {plan.run_dir}  measures the trained model", file=sys.stderr
        )
        raise


def _loop(plan: Plan, model: Any, title: str, run_dir: Path | None = None) -> None:
    """One training; `run_dir` is the folder to resume where it is not the plan's own."""
    from everlong.cli.progress import progress
    from everlong.errors import Interrupted
    from everlong.training.loop import train
    from everlong.training.tracking import follow

    about = {"recipe": plan.recipe.table()}
    texts = plan.texts
    with (
        progress(title, plan.config.steps) as shown,
        follow(shown, plan.track, plan.run_dir) as on_step,
    ):
        try:
            train(
                model,
                texts.train,
                texts.validation,
                plan.config,
                plan.run_dir,
                resume=plan.resume,
                on_step=on_step,
                about=about,
            )
        except Interrupted as stop:
            if run_dir is None:
                raise
            resume = f"everlong train --resume {run_dir}"
            raise Interrupted(stop.exit_code - 128, stop.step, resume) from None


def _announce(plan: Plan, model: Any) -> None:
    """What is about to run, on stderr."""
    from everlong.cli.prepare import device_of
    from everlong.models.decoder import looks_ahead

    if looks_ahead(model):
        print(
            "a published protocol that looks ahead inside a segment: its numbers compare with no "
            "causal model's",
            file=sys.stderr,
        )
    device = device_of(plan.config)
    config, texts = plan.config, plan.texts
    assert config.segment_length is not None
    stages = config.stages or ((0, config.segments),)
    row = config.batch_size * config.segment_length
    tokens = " then ".join(f"{row * segments:,}" for _, segments in stages)
    print(
        f"{model.num_parameters():,} parameters on {device}; {texts.train.num_bytes:,} bytes of "
        f"{texts.train.source}; {config.steps:,} steps of {tokens} tokens; into {plan.run_dir}",
        file=sys.stderr,
    )
