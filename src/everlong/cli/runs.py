"""The folder of a run, as the commands read it: its recipe, its newest weights, its tokenizer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.logging import (
    disable_progress_bar,
    get_verbosity,
    set_verbosity,
    set_verbosity_error,
)

from everlong.cli.final import SUMS, weight_sums
from everlong.cli.prepare import load_tokenizer
from everlong.errors import UserError
from everlong.models.config import EverlongConfig
from everlong.models.hub import EverlongForCausalLM, StreamForCausalLM
from everlong.models.wrap import ExtendedConfig, ExtendedForCausalLM
from everlong.recipes import Recipe
from everlong.tasks.text import BOS, VOCAB_SIZE
from everlong.training import checkpoints
from everlong.training.run import read_config

# what parsers raise for nonsense, transformers' among them
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
_UNREADABLE += (SafetensorError,)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # whole, or in several files


@dataclass(frozen=True)
class Run:
    """`recipe` is None for a bare model folder; tokenizer: None for bytes."""

    folder: Path
    model: StreamForCausalLM
    tokenizer: Any
    recipe: Recipe | None
    segment_length: int | None

    @property
    def bos(self) -> int:
        """What a stream begins with: bos, or eos where the model has no bos; `UserError` for one
        that has neither."""
        config = self.model.config
        for each in (config.bos_token_id, config.eos_token_id):
            if each is not None:
                return each[0] if isinstance(each, list | tuple) else each
        raise UserError(
            f"the model of {self.folder} has neither a bos nor an eos, and a stream begins with "
            "one: give its config.json a bos_token_id"
        )


def open_run(folder: Path) -> Run:
    """The trained model of a run (of an unfinished one, its newest checkpoint), or a folder that
    `save_pretrained` wrote; on the best device there is. Raises `UserError` for anything else."""
    torch.set_flush_denormal(True)  # decayed states are full of them, and they cost 4-5 times
    if not folder.is_dir():
        raise UserError(f"no run at {folder}: give the folder that `everlong train` wrote")
    recipe, segment_length, weights = None, None, folder
    if not any((folder / name).exists() for name in _WEIGHTS):
        config = described(folder)
        segment_length = config.get("train", {}).get("segment_length")
        if "recipe" in config:
            recipe = Recipe.from_table(config["recipe"], str(folder / "config.json"))
        finished = folder / "model"
        weights = finished if finished.exists() else checkpoints.latest(folder)
    model = _load(weights).eval()
    model.to(best_device())  # pyright: ignore[reportArgumentType] (transformers' decorated `to`)
    tokenizer = None
    if (model.config.vocab_size, model.config.bos_token_id) != (VOCAB_SIZE, BOS):
        source = recipe.data.tokenizer if recipe and recipe.data.tokenizer else weights
        tokenizer = load_tokenizer(source)
    return Run(folder, model, tokenizer, recipe, segment_length)


def described(folder: Path) -> dict[str, Any]:
    """The run's config.json; `UserError` where it is not what a training wrote."""
    config = read_config(folder)
    parts = ("train", "recipe")
    if not isinstance(config, dict) or any(
        not isinstance(config.get(part, {}), dict) for part in parts
    ):
        raise UserError(f"{folder / 'config.json'} is damaged: it does not describe a run")
    return config


def best_device() -> torch.device:
    from accelerate import PartialState

    return PartialState().default_device


def _load(folder: Path) -> StreamForCausalLM:
    disable_progress_bar()  # it would draw one for every few weights
    _check_sums(folder)
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
        if kind not in (EverlongConfig.model_type, ExtendedConfig.model_type):
            raise UserError(f"it is a plain {kind} model: give it a memory with everlong.extend")
        known = ExtendedForCausalLM if kind == ExtendedConfig.model_type else EverlongForCausalLM
        _check_index(folder)
        with _only_errors():
            # otherwise it would unpickle a pytorch_model.bin where there are no safetensors
            given = {"use_safetensors": True, "output_loading_info": True}
            model, told = known.from_pretrained(folder, **given)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} holds no model that can be read: {reason}") from error
    _check_kinds(model, folder)
    if lacking := sorted(told["missing_keys"]):
        raise UserError(f"{folder} lacks weights of its own model: {', '.join(lacking)[:200]}")
    return model


def _check_sums(folder: Path) -> None:
    """`UserError` unless the weights are those written, where the folder says what was."""
    if (folder / "manifest.json").exists():
        checkpoints.verify(folder)
    sums = folder / SUMS
    if not sums.exists():
        return
    try:
        written = dict(line.split("  ")[::-1] for line in sums.read_text("utf-8").splitlines())
    except ValueError as error:
        raise UserError(f"{sums} is damaged: remove it to read what is there") from error
    if written != weight_sums(folder):
        raise UserError(
            f"the weights in {folder} are damaged: they are not those written (where they were "
            f"changed on purpose, remove {SUMS})"
        )


def _check_index(folder: Path) -> None:
    """`ValueError` for a model in several files that are not files of its folder, or no weights."""
    index = folder / _WEIGHTS[1]
    if not index.exists():
        return
    for name in set(json.loads(index.read_bytes())["weight_map"].values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {name}, which is no file of weights beside it")


def _check_kinds(model: Any, folder: Path) -> None:
    """`UserError` for whole numbers where weights are: they would be converted in silence."""
    held = model.state_dict()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in held.keys() & set(file.keys()):
                kind = file.get_slice(name).get_dtype()
                if held[name].is_floating_point() and not kind.startswith(("F", "BF")):
                    raise UserError(f"{path} is damaged: {name} is of {kind}")


@contextmanager
def _only_errors() -> Iterator[None]:
    """transformers tells what it misses in a table, which is an error of one line here."""
    before = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(before)
