"""OmegaNet: a memory whose every step learns from a window of pairs, of polynomial features.

B batch, T time, D hidden_size, H heads, C chunk_size, W window.
"""

from dataclasses import dataclass
from typing import Any

from everlong.mixers.miras import Miras, MirasConfig
from everlong.registry import register


@dataclass(frozen=True)
class OmegaNetConfig:
    """window: pairs that a step learns from. degree of the features of keys and queries, which are
    key_size wide before (None: as wide as a head, at most 16). Others as in `miras`."""

    hidden_size: int
    num_heads: int
    key_size: int | None = None
    window: int = 8
    degree: int = 2
    chunk_size: int = 16
    depth: int = 2
    expansion: int = 4
    step_size: float = 0.1
    max_surprise: float | None = None
    conv_size: int = 4

    def __post_init__(self) -> None:
        self.miras()

    def miras(self) -> MirasConfig:
        """The choices in the terms of `miras`."""
        return MirasConfig(**{**vars(self), **self.more()})

    def more(self) -> dict[str, Any]:
        """What `miras` is told besides, or otherwise."""
        return {"key_size": narrow(self)}


def narrow(config: OmegaNetConfig) -> int:
    """The width of keys; where none is given at most 16: features are about half its square."""
    if config.key_size is not None:
        return config.key_size
    return max(1, min(16, config.hidden_size // max(1, config.num_heads)))


@register(
    "omeganet",
    room="mixers",
    config=OmegaNetConfig,
    paper="Behrouz et al. 2025, arXiv 2505.23735",
    keeps="trains a network on the last pairs at every step, on products of their keys' entries",
    small={"key_size": 4, "window": 3, "chunk_size": 4, "expansion": 2},
)
class OmegaNet(Miras):
    """OmegaNet, the Omega rule on polynomial features (arXiv 2505.23735, section 3.2 and 4.1, eq. 9
    to 12, without Muon): `miras` with

        M_t = keep_t M_{t-1} - sum_{i > t - W} gate_ti grad |M(phi(k_i)) - v_i|^2 / 2

    *Written*: at every position what M does not yet say of the last W pairs, each weighed by a gate
    of position t and its distance. *Kept*: M, as far as keep is near 1. *Forgotten*: what like
    features held, and all by keep.

    phi: all monomials up to `degree` in key_size variables, F = C(key_size + degree, degree) of
    them (153 for 16 and 2), so that phi(q) phi(k) = sum_i a_i (q k)^i with a_i learned, 1/i! at the
    start, then of length 1. Without that its constant and even parts let keys interfere, and a step
    of 1 diverge. M(x) = x R + gelu(phi(x) W_1) W_2 with hidden layers of expansion * key_size; the
    residual passes the plain key through a learned R, for features are no values (the paper does
    not say; without it a model learns text much worse).

    Pairs of a window that lie in the chunk before are learned from again at the weights of this
    one: they are state, and chunks do not show. Gates are sigmoids times step_size / W.

    State: as `miras`; pending holds W + C - 2 places.
    """

    def __init__(self, config: OmegaNetConfig):
        super().__init__(config.miras())
