"""How a run trains: TrainConfig, its learning rate at a step, its optimiser and its device."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from everlong.errors import UserError
from everlong.registry import check_types, suggest
from everlong.training.horizon import METHODS

_CHOICES = {
    "horizon": METHODS,
    "schedule": ("cosine", "constant"),
    "precision": ("auto", "fp32", "bf16"),
    "device": ("auto", "cpu", "cuda", "mps"),
}
_AT_LEAST_ZERO = (
    "steps",
    "warmup_steps",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "seed",
)
_AT_LEAST_ONE = ("batch_size", "segments", "segment_length", "truncate", "keep_checkpoints")
# A carried state and a stream position belong to these: a resumed run cannot change them.
FIXED = ("batch_size", "segments", "curriculum", "segment_length", "seed")


@dataclass(frozen=True)
class TrainConfig:
    """One optimiser step reads a rollout: `segments` segments of `segment_length` tokens a row.

    steps:            optimiser steps of the whole run
    batch_size:       rows, over all processes
    curriculum:       stages (steps, segments) that come first: so many steps read rollouts of so
                      many segments instead, `segments` holds for the steps after the last stage
    segment_length:   tokens; None: the model's period (needed where the model has none)
    horizon:          "replay", "full", "checkpoint" or "truncated", see `everlong.Horizon`
    truncate:         segments that gradients go back at most; None: all of the rollout
    learning_rate:    after `warmup_steps` of linear rise; "cosine" then falls to 0 at `steps`
    weight_decay:     of matrices; norms, biases, embeddings and marked parameters are left alone
    clip:             the largest norm of the gradient
    precision:        "fp32", "bf16" (autocast), or "auto": bf16 on CUDA devices that have it
    eval_every:       steps between validations (one more at the end); 0: none
    eval_batches:     rollouts of a validation; 0: all of the validation text
    checkpoint_every: steps between checkpoints (one more at the end); 0: at the end only
    shard:            of several processes each keeps a share of weights and optimiser (FSDP2)
    """

    steps: int = 1000
    batch_size: int = 16
    segments: int = 4
    curriculum: tuple[tuple[int, int], ...] = ()
    segment_length: int | None = None
    horizon: str = "replay"
    truncate: int | None = None
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    schedule: str = "cosine"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    eval_every: int = 0
    eval_batches: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    shard: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):  # of TOML and JSON
            object.__setattr__(self, "betas", tuple(self.betas))
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                hint = suggest(str(value), choices)
                raise UserError(f"{name} is {value!r}, not one of {', '.join(choices)}{hint}")
        for name in _AT_LEAST_ZERO:
            self._check_integer(name, 0)
        for name in _AT_LEAST_ONE:
            if getattr(self, name) is not None:
                self._check_integer(name, 1)
        object.__setattr__(self, "curriculum", _stages(self.curriculum))
        check_types(TrainConfig, vars(self), "TrainConfig")
        if not (0 < self.learning_rate < math.inf and self.clip > 0 and self.weight_decay >= 0):
            raise UserError("learning_rate and clip must be above 0, weight_decay at least 0")
        betas = self.betas if isinstance(self.betas, tuple) else ()
        if len(betas) != 2 or not all(type(b) in (int, float) and 0 <= b < 1 for b in betas):
            given = list(betas) or self.betas
            raise UserError(f"betas are {given!r}: give two numbers in [0, 1)")
        if self.horizon == "truncated" and self.truncate is None:
            raise UserError("horizon 'truncated' needs truncate, a number of segments >= 1")

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name} is {value!r}: give an integer of at least {least}")
        if value >= 2**63:
            raise UserError(f"{name} is {value}: give an integer below 2**63")

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """(steps, segments) of all that the run reads, in order: steps add up to `steps`."""
        left, found = self.steps, []
        for steps, segments in (*self.curriculum, (self.steps, self.segments)):
            if made := min(steps, left):
                found.append((made, segments))
            left -= made
        return tuple(found)

    def segments_at(self, step: int) -> int:
        """Segments of the rollout that step `step` (0 is the first) reads."""
        for steps, segments in self.curriculum:
            if step < steps:
                return segments
            step -= steps
        return self.segments

    def for_model(self, model: Any) -> "TrainConfig":
        """The same with `segment_length` filled in from the model's period."""
        if self.segment_length is not None:
            return self
        if model.period == 1:
            raise UserError("the model has no segments of its own: give train.segment_length")
        return replace(self, segment_length=model.period)


def _stages(given: Any) -> tuple[tuple[int, int], ...]:
    """`curriculum` as TOML and JSON (lists) or Python give it, checked."""
    stages = given if isinstance(given, list | tuple) else [given]
    for stage in stages:
        pair = stage if isinstance(stage, list | tuple) and len(stage) == 2 else (0, 0)
        if not all(type(number) is int and 0 < number < 2**63 for number in pair):
            raise UserError(
                f"curriculum has the stage {stage!r}: give [steps, segments], two integers of at "
                "least 1, for each stage, such as [[100, 1], [100, 2]]"
            )
    return tuple((steps, segments) for steps, segments in stages)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step `step` (0 is the first): linear warm-up, then constant or a cosine to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW. Decayed are matrices but embeddings, biases and what is marked `_no_weight_decay`."""
    spared = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.Embedding) or name.endswith("bias") or parameter.ndim < 2
    }

    def decays(parameter: Tensor) -> bool:
        return id(parameter) not in spared and not getattr(parameter, "_no_weight_decay", False)

    def group(parameters: Iterable[Tensor], weight_decay: float) -> dict[str, Any]:
        return {"params": list(parameters), "weight_decay": weight_decay}

    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        group(filter(decays, trainable), config.weight_decay),
        group((p for p in trainable if not decays(p)), 0.0),
    ]
    groups = [each for each in groups if each["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def choose_device(name: str, group: PartialState) -> torch.device:
    """`name`, or the best here; that of the process in a group of many.

    Raises `UserError` for a device that this machine or this torch lacks.
    """
    has = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in has and not has[name]():
        raise UserError(f"torch finds no {name} device here: use device 'auto' or 'cpu'")
    if group.num_processes > 1:
        return torch.device(group.device or "cpu")
    return torch.device(group.default_device if name == "auto" else name)


def uses_bf16(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"
