"""What the generated tasks share: checks of their options, and batches scored target by target."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # a target that is not scored


def check_least(config: object, least: int, *names: str) -> None:
    """`ValueError` for the first of the options `names` that is below `least`."""
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise ValueError(f"{name} is {value}: give {least} or more")


def check_span(config: object, least: int, name: str) -> None:
    """`ValueError` unless least <= min_NAME <= max_NAME, the ends of a range that is drawn from."""
    low, high = getattr(config, f"min_{name}"), getattr(config, f"max_{name}")
    if not least <= low <= high:
        raise ValueError(
            f"{name} from {low} to {high} is no range: give {least} <= min_{name} <= max_{name}"
        )


def check_share(config: object, name: str) -> None:
    """`ValueError` unless the option is from 0 to 1."""
    value = getattr(config, name)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: give a share from 0 to 1")


@dataclass(frozen=True)
class ScoredBatch:
    """Rows with any number of targets. V is the vocabulary of the logits."""

    inputs: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], -100 where nothing is asked
    mask: Tensor  # bool [B, T], True = a token of the row

    def hits(self, logits: Tensor) -> Tensor:
        """Where a target is the likeliest token: [B, T, V] -> bool [B, T], False where none is."""
        return logits.argmax(-1) == self.targets.to(logits.device)

    def correct(self, logits: Tensor) -> Tensor:
        """Share of each row's targets that are its likeliest tokens: [B, T, V] -> float [B]."""
        return self.hits(logits).sum(1) / (self.targets != IGNORED).sum(1).to(logits.device)


def full_rows(
    inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and mask [B, T] of items of one length T, on the CPU, without padding."""
    tokens = torch.from_numpy(np.stack(inputs))
    return tokens, torch.from_numpy(np.stack(targets)), torch.ones_like(tokens, dtype=torch.bool)
