"""Memora: a memory whose weights stay on a simplex, moved in their logarithms.

B batch, T time, D hidden_size, H heads, C chunk_size.
"""

from dataclasses import dataclass

from everlong.mixers.miras import Miras, MirasConfig
from everlong.registry import register


@dataclass(frozen=True)
class MemoraConfig:
    """As in `miras`."""

    hidden_size: int
    num_heads: int
    chunk_size: int = 16
    expansion: int = 4
    step_size: float = 0.1
    max_surprise: float | None = None
    conv_size: int = 4

    def __post_init__(self) -> None:
        self.miras()

    def miras(self) -> MirasConfig:
        """The choices in the terms of `miras`."""
        return MirasConfig(**vars(self), retention="softmax", norm=True, channel_steps=True)


@register(
    "memora",
    room="mixers",
    config=MemoraConfig,
    paper="Behrouz et al. 2025, arXiv 2504.13173",
    keeps="trains a network on its pairs in the logarithms of its weights, which stay positive",
    small={"chunk_size": 4, "expansion": 2},
)
class Memora(Miras):
    """Memora (arXiv 2504.13173, section 5.3, eq. 27): `miras` with

        W_t = c softmax(keep_t log W_{t-1} - step_t grad |M(k_t) - v_t|^2 / 2)

    over what enters each output of a matrix, c = sqrt(its inputs), and M(x) = x +
    LayerNorm(gelu(x W_1) W_2). *Written*: a pair's gradient, as a factor of every weight. *Kept*:
    the weights' proportions, as far as keep is near 1. *Forgotten*: by keep, towards equal weights;
    none becomes 0, and those of an output always sum to c.

    A softmax does not see what is added to all, so the logarithms are kept as L_t = keep_t L_{t-1}
    - step_t u_t, W = c softmax(L): exactly the rule, at every position of a chunk. (The paper is
    linear within a chunk and puts one position behind it.) Weights are made explicit at every
    position: time a position is that of all weights, several times that of a dual form.

    State and deviations: as `miras`; weights holds L. The softmax's axis and c are not printed;
    decay is one a head, for one a channel would see what is added to all.
    """

    def __init__(self, config: MemoraConfig):
        super().__init__(config.miras())
