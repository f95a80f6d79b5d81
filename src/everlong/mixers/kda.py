"""Kimi Delta Attention: the gated delta rule with a decay a key channel.

B batch, T time, D hidden_size, H heads, K key_size, V value_size, W conv_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from everlong.mixers.linear import DecayGate, DeltaConfig, DeltaMixer, normed
from everlong.registry import register


@dataclass(frozen=True)
class KDAConfig(DeltaConfig):
    """key_size, value_size None: hidden_size // num_heads."""


@register(
    "kda",
    room="mixers",
    config=KDAConfig,
    paper="Kimi Team 2025, arXiv 2510.26692",
    keeps="writes each value over what its key held; key channels fade at rates the input sets",
    small={"key_size": 5, "value_size": 7},
)
class KDA(DeltaMixer):
    """Kimi Delta Attention (arXiv 2510.26692, section 3). For each head, with q, k and v behind a
    short convolution and SiLU, q and k of length 1, beta = sigmoid(Wb x) (twice that with
    `negative_eigenvalues`) and g = -exp(A_log) softplus(W2 W1 x + dt_bias), one a key channel:

        S = diag(exp(g)) S,  S += beta k^T (v - k S),  o = q S / sqrt(K),
        y = Wo (RMSNorm(o) * sigmoid(W4 W3 x + b))

    *Written*: at every position the difference between the value and what its key reads. *Kept*:
    the rest, in channels whose g is near 0. *Forgotten*: what the key held, by beta; channels that
    the input closes, by g.

    State: memory [B, H, K, V] (float32 at least); tail [B, W - 1, H (2 K + V)], the convolution's
    last inputs. W1 and W3 have the rank V, as in the released layer.
    """

    def __init__(self, config: KDAConfig):
        width, heads = config.hidden_size, config.num_heads
        keys, values = (size or width // heads for size in (config.key_size, config.value_size))
        super().__init__(config, keys, values, gate=False)
        self.rate = nn.Sequential(
            nn.Linear(width, values, bias=False), nn.Linear(values, heads * keys, bias=False)
        )
        self.forget = DecayGate(heads, keys, least=1.0)
        self.low_rank_gate = nn.Sequential(
            nn.Linear(width, values, bias=False), nn.Linear(values, heads * values)
        )

    def decay(self, x: Tensor) -> Tensor:
        return self.forget(self.rate(x))

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        y = normed(self.norm, o, x).flatten(2)
        return self.out(y * torch.sigmoid(self.low_rank_gate(x)))
