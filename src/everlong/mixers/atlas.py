"""Atlas: OmegaNet whose steps are orthogonalised, as Muon's.

B batch, T time, D hidden_size, H heads, C chunk_size, W window.
"""

from dataclasses import dataclass
from typing import Any

from everlong.mixers.miras import Miras
from everlong.mixers.omeganet import OmegaNetConfig
from everlong.registry import register


@dataclass(frozen=True)
class AtlasConfig(OmegaNetConfig):
    """every: positions between two steps, a divisor of chunk_size (None: chunk_size); step_size:
    the most a step moves a matrix, in its spectral norm. Others as in `omeganet`."""

    step_size: float = 0.1
    every: int | None = 4

    def more(self) -> dict[str, Any]:
        """What `miras` is told besides, or otherwise."""
        return {**super().more(), "algorithm": "muon"}


@register(
    "atlas",
    room="mixers",
    config=AtlasConfig,
    paper="Behrouz et al. 2025, arXiv 2505.23735",
    keeps="trains a network on the last pairs with Muon: each step moves all directions alike",
    small={"key_size": 4, "window": 3, "chunk_size": 4, "expansion": 2, "every": 2},
)
class Atlas(Miras):
    """Atlas (arXiv 2505.23735, section 5, eq. 32 and 33): `omeganet` with

        S_t = slow_t S_{t-1} + sum_{i > t - W} gate_ti grad |M(phi(k_i)) - v_i|^2 / 2
        M_t = keep_t M_{t-1} - step_t NS(S_t)

    NS: five Newton-Schulz steps to the nearest orthogonal matrix. They do not see how long S is, so
    gates weigh pairs against each other and step_t, a gate of its own times step_size, is how far M
    goes (the main text's form; in the appendix no step is left outside).

    *Written*: the directions of the window's gradients, all alike. *Kept*: M, as far as keep is
    near 1. *Forgotten*: what like features held, and all by keep.

    NS needs the matrix: there is no dual form. A step is taken at every `every`-th position of a
    chunk, with keep_t alone at the others; every=1 is the equation, at the time and memory of all
    weights a position. With every = chunk_size nothing of a chunk is read within it.

    State: as `miras`, with momenta; pending holds W + C - 2 places.
    """

    def __init__(self, config: AtlasConfig):
        super().__init__(config.miras())
