"""Moneta: a memory that takes errors at the power p and keeps its weights in a norm of power q.

B batch, T time, D hidden_size, H heads, C chunk_size.
"""

from dataclasses import dataclass

from everlong.mixers.miras import Miras, MirasConfig
from everlong.registry import check_choice, register

_MAPS = {"paper": "lq", "dual": "lq_dual"}


@dataclass(frozen=True)
class MonetaConfig:
    """exponent p of the error and power q of the norm. map: "paper", as printed, or "dual", the
    mirror map of the norm. Others as in `miras`."""

    hidden_size: int
    num_heads: int
    chunk_size: int = 16
    expansion: int = 4
    exponent: float = 3.0
    power: float = 4.0
    map: str = "paper"
    step_size: float = 0.01
    max_surprise: float | None = 1.0
    conv_size: int = 4

    def __post_init__(self) -> None:
        check_choice("map", self.map, _MAPS)
        self.miras()

    def miras(self) -> MirasConfig:
        """The choices in the terms of `miras`."""
        options = {name: value for name, value in vars(self).items() if name != "map"}
        return MirasConfig(
            **options, bias="lp", retention=_MAPS[self.map], norm=True, channel_steps=True
        )


@register(
    "moneta",
    room="mixers",
    config=MonetaConfig,
    paper="Behrouz et al. 2025, arXiv 2504.13173",
    keeps="trains a network on errors at power 3; its weights are kept in a norm of power 4",
    small={"chunk_size": 4, "expansion": 2},
)
class Moneta(Miras):
    """Moneta (arXiv 2504.13173, section 5.3, eq. 24 and 25): `miras` with

        u_t = grad |M(k_t) - v_t|_p^p,  A_t = keep_t A_{t-1} - step_t u_t
        W_t = A_t / |A_t|_q^(q-2)

    p = 3, q = 4, of which the factor is renewed at the start of a chunk, and M(x) = x +
    LayerNorm(gelu(x W_1) W_2). *Written*: large errors more than in proportion, small ones less.
    *Kept*: A, as far as keep is near 1. *Forgotten*: what like keys held, and all by keep.

    **The printed map is not the mirror map of its norm.** It is of degree 3 - q: at q = 4 weights
    grow as A fades, so that keep below 1 enlarges them. map="dual" is W = sign(A) |A|^(p*-1) /
    |A|_p*^(p*-2), 1/p* + 1/q = 1, of degree 1; it is not linear in A, so weights are made explicit
    at every position, which costs time. An A of a fresh stream is that of random weights.

    p = 3 has steeper gradients far from the value than the squared error, and diverges with gross
    outliers; max_surprise = 1 shortens a pair's gradient, and is not in the paper.

    State and deviations: as `miras`; weights holds A.
    """

    def __init__(self, config: MonetaConfig):
        super().__init__(config.miras())
