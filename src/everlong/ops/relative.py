"""Relative positions of Transformer-XL: sinusoids of distances, and the shift to query-key pairs.

T queries, K keys, D width.
"""

from functools import lru_cache

import torch
from torch import Tensor

_STEP = 256  # rows by which a kept table grows


def sinusoid(distances: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """sin | cos of `distances` Int [R], base 10,000: [R, width] (arXiv 1706.03762, section 3.5).

    Angles are computed in float64, so that no distance is too large.
    """
    exponent = torch.arange(0, width, 2, device=distances.device, dtype=torch.float64) / width
    angles = distances.double()[:, None] * 10_000.0**-exponent
    return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)


def nearest(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`sinusoid` of the distances count - 1 to 0, the same in every layer and for every token:
    kept once it is computed."""
    rows = -(-count // _STEP) * _STEP
    return _kept(rows, width, dtype, device)[rows - count :]


@lru_cache(maxsize=8)
def _kept(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks next may want gradients
        return sinusoid(torch.arange(rows - 1, -1, -1, device=device), width, dtype)


def shift(scores: Tensor) -> Tensor:
    """Scores by distance to scores by key (arXiv 1901.02860, appendix B).

    scores [..., T, K]: column r belongs to distance K-1-r. Returned [..., T, K]: column j belongs
    to key j, of T queries that stand at the last T of the K places. Entries behind a query
    (j > i + K - T) are meaningless: mask them.
    """
    *outer, queries, keys = scores.shape
    padded = torch.cat([scores.new_zeros(*outer, queries, 1), scores], -1)
    return padded.reshape(*outer, keys + 1, queries)[..., 1:, :].reshape(*outer, queries, keys)
