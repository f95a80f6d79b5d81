"""Models of equal size: what a fair comparison starts from."""

import copy

import torch

from everlong.errors import UserError
from everlong.models.config import EverlongConfig
from everlong.models.hub import EverlongForCausalLM

_TOLERANCE = 0.01  # of the parameters


def build(config: EverlongConfig, seed: int) -> EverlongForCausalLM:
    """A fresh model; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EverlongForCausalLM(config)


def with_parameters(config: EverlongConfig, wanted: int) -> EverlongConfig:
    """The same model with the `intermediate_size` that gives it `wanted` parameters.

    `UserError` where none comes within 1 %.
    """

    def sized(size: int) -> EverlongConfig:
        copied = copy.deepcopy(config)
        copied.intermediate_size = size
        return copied

    def count(size: int) -> int:
        with torch.device("meta"):
            return EverlongForCausalLM(sized(size)).num_parameters()

    one, two = count(1), count(2)
    best = max(1, 1 + round((wanted - one) / (two - one)))
    found = count(best)
    if abs(found - wanted) > _TOLERANCE * wanted:
        raise UserError(
            f"no such model has {wanted:,} parameters (the nearest {found:,}): "
            "make the model larger"
        )
    return sized(best)
