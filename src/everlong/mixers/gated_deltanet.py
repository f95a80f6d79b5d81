"""GatedDeltaNet: the delta rule on a state that each head may let fade.

B batch, T time, D hidden_size, H heads, K key_size, V value_size, W conv_size.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from everlong.mixers.linear import DecayGate, DeltaConfig, DeltaMixer
from everlong.registry import register


@dataclass(frozen=True)
class GatedDeltaNetConfig(DeltaConfig):
    """key_size, value_size None: 3/4 of hidden_size // num_heads, and twice the key_size."""


@register(
    "gated_deltanet",
    room="mixers",
    config=GatedDeltaNetConfig,
    paper="Yang et al. 2025, arXiv 2412.06464",
    keeps="writes each value over what its key held; each head fades at a rate the input sets",
    small={"key_size": 5, "value_size": 7},
)
class GatedDeltaNet(DeltaMixer):
    """The gated delta rule (arXiv 2412.06464, eq. 10, and section 3.4). For each head, with q, k
    and v behind a short convolution and SiLU, q and k of length 1, beta = sigmoid(Wb x) (twice that
    with `negative_eigenvalues`) and g = -exp(A_log) softplus(Wa x + dt_bias):

        S = exp(g) S,  S += beta k^T (v - k S),  o = q S / sqrt(K),
        y = Wo (RMSNorm(o) * silu(Wg x))

    *Written*: at every position the difference between the value and what its key reads. *Kept*:
    the rest, as far as g is near 0. *Forgotten*: what the key held, by beta; all of a head, by g.

    State: memory [B, H, K, V] (float32 at least); tail [B, W - 1, H (2 K + V)], the convolution's
    last inputs.
    """

    def __init__(self, config: GatedDeltaNetConfig):
        keys = config.key_size or max(1, 3 * config.hidden_size // (4 * config.num_heads))
        values = config.value_size or 2 * keys
        super().__init__(config, keys, values)
        self.rate = nn.Linear(config.hidden_size, config.num_heads, bias=False)
        self.forget = DecayGate(config.num_heads)

    def decay(self, x: Tensor) -> Tensor:
        return self.forget(self.rate(x))
