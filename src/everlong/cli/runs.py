"""The folder of a run, as the commands read it: its recipe, its newest weights, its tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from everlong.cli.prepare import load_tokenizer
from everlong.errors import UserError
from everlong.models.hub import EverlongForCausalLM, StreamForCausalLM
from everlong.models.wrap import ExtendedConfig, ExtendedForCausalLM
from everlong.recipes import Recipe
from everlong.tasks.text import BOS, VOCAB_SIZE
from everlong.training import checkpoints
from everlong.training.run import read_config


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
        return BOS if self.model.config.bos_token_id is None else self.model.config.bos_token_id


def open_run(folder: Path) -> Run:
    """The trained model of a run (of an unfinished one, its newest checkpoint), or a folder that
    `save_pretrained` wrote; on the best device there is. Raises `UserError` for anything else."""
    torch.set_flush_denormal(True)  # decayed states are full of them, and they cost 4-5 times
    if not folder.is_dir():
        raise UserError(f"no run at {folder}: give the folder that `everlong train` wrote")
    recipe, segment_length, weights = None, None, folder
    if not (folder / "model.safetensors").exists():
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
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
        known = ExtendedForCausalLM if kind == ExtendedConfig.model_type else EverlongForCausalLM
        return known.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} holds no model that can be read: {reason}") from error
