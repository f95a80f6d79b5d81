"""Gated linear attention: every key channel fades at a rate that the input sets.

B batch, T time, D hidden_size, H heads, K key_size, V value_size, R gate_rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong.mixers.linear import LinearMixer, check_sizes
from everlong.registry import register

_TEMPERATURE = 16  # keeps decays near 1 at the start


@dataclass(frozen=True)
class GLAConfig:
    """key_size, value_size: of a head; None: hidden_size // (2 num_heads) and hidden_size //
    num_heads. gate_rank: of the map from the input to the decays."""

    hidden_size: int
    num_heads: int
    key_size: int | None = None
    value_size: int | None = None
    gate_rank: int = 16

    def __post_init__(self) -> None:
        check_sizes(self, gate_rank=1)


@register(
    "gla",
    room="mixers",
    config=GLAConfig,
    paper="Yang et al. 2024, arXiv 2312.06635",
    keeps="writes outer products; each key channel fades at a rate that the input sets",
    small={"key_size": 5, "value_size": 7, "gate_rank": 3},
)
class GLA(LinearMixer):
    """Gated linear attention (arXiv 2312.06635, eq. 3 and section 4.4). For each head:

        S = diag(exp(g)) S + k^T v with g = logsigmoid(W2 W1 x + b) / 16, one a key channel,
        o = q S / sqrt(K),  y = Wo (RMSNorm(o) * silu(Wg x))

    *Written*: every position's outer product. *Kept*: channels whose decay stays near 1, as all do
    at the start. *Forgotten*: what lies in channels that the input closes, all of it at once.

    State: memory [B, H, K, V] (float32 at least).
    """

    def __init__(self, config: GLAConfig):
        each = config.hidden_size // config.num_heads
        keys = config.key_size or max(1, each // 2)
        super().__init__(config, keys, config.value_size or each)
        self.forget = nn.Sequential(
            nn.Linear(config.hidden_size, config.gate_rank, bias=False),
            nn.Linear(config.gate_rank, config.num_heads * keys),
        )

    def decay(self, x: Tensor) -> Tensor:
        a = self.forget(x)
        g = F.logsigmoid(a.to(torch.promote_types(a.dtype, torch.float32))) / _TEMPERATURE
        return g.unflatten(-1, (self.num_heads, -1))
