"""The matrix of a linear layer that something may be put around, such as an adapter."""

from typing import Any

import torch
from torch import Tensor, nn


def weight_of(layer: nn.Module) -> Tensor:
    """The matrix [out, in] of a linear layer without bias, as the layer acts.

    A plain layer's is its weight. One that was replaced (adapted, quantised) is asked what it makes
    of the identity, so that what is computed with the matrix learns and merges with the rest.
    """
    if type(layer) is nn.Linear:
        return layer.weight
    adapted: Any = layer
    weight = adapted.weight
    return layer(torch.eye(adapted.in_features, device=weight.device, dtype=weight.dtype)).T
