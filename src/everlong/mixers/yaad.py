"""Yaad: a memory that a single outlier cannot move far.

B batch, T time, D hidden_size, H heads, C chunk_size.
"""

from dataclasses import dataclass

from everlong.mixers.miras import Miras, MirasConfig
from everlong.registry import check_choice, register

_FORMS = {"mixture": "huber_mixture", "vector": "huber", "coordinate": "huber_coordinate"}


@dataclass(frozen=True)
class YaadConfig:
    """form of the Huber loss: "vector" and "coordinate" are continuous, "mixture", as printed,
    jumps. Others as in `miras`."""

    hidden_size: int
    num_heads: int
    chunk_size: int = 16
    expansion: int = 4
    form: str = "vector"
    step_size: float = 0.1
    max_surprise: float | None = None
    conv_size: int = 4

    def __post_init__(self) -> None:
        check_choice("form", self.form, _FORMS)
        self.miras()

    def miras(self) -> MirasConfig:
        """The choices in the terms of `miras`."""
        options = {name: value for name, value in vars(self).items() if name != "form"}
        return MirasConfig(**options, bias=_FORMS[self.form], norm=True, channel_steps=True)


@register(
    "yaad",
    room="mixers",
    config=YaadConfig,
    paper="Behrouz et al. 2025, arXiv 2504.13173",
    keeps="trains a network on its pairs, on far ones no more than on near ones; a decay fades all",
    small={"chunk_size": 4, "expansion": 2},
)
class Yaad(Miras):
    """Yaad (arXiv 2504.13173, section 5.3, eq. 26): `miras` with the Huber loss of e = M(k) - v,

        M_t = keep_t M_{t-1} - step_t u_t,  u_t the gradient of |e|^2 / 2 while |e| <= level_t, else
        of level_t |e| ("vector") or level_t |e|_1 ("mixture"); or of each coordinate its own

    and M(x) = x + LayerNorm(gelu(x W_1) W_2). *Written*: errors up to the level, beyond it their
    direction alone; the level, softplus of a gate, starts at 1. *Kept*: M, as far as keep is near
    1. *Forgotten*: what like keys held, and all by keep.

    "mixture" is the printed one (eq. 16 and 26) and jumps at the level, from |u| = level to level
    sqrt(V): a stream near it is chaotic, so the default is "vector" (eq. 15).

    State and deviations: as `miras`.
    """

    def __init__(self, config: YaadConfig):
        super().__init__(config.miras())
