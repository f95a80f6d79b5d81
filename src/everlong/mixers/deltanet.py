"""DeltaNet: what is stored under a key is corrected towards its new value.

B batch, T time, D hidden_size, H heads, K key_size, V value_size, W conv_size.
"""

from dataclasses import dataclass

from everlong.mixers.linear import DeltaConfig, DeltaMixer
from everlong.registry import register


@dataclass(frozen=True)
class DeltaNetConfig(DeltaConfig):
    """key_size, value_size None: hidden_size // num_heads."""


@register(
    "deltanet",
    room="mixers",
    config=DeltaNetConfig,
    paper="Yang et al. 2024, arXiv 2406.06484",
    keeps="writes each value over what its key held; a pair stays until a like key is written",
    small={"key_size": 5, "value_size": 7},
)
class DeltaNet(DeltaMixer):
    """The delta rule in linear attention (arXiv 2406.06484, section 2.2 and 3.4). For each head,
    with q, k and v behind a short convolution and SiLU, q and k of length 1, and beta =
    sigmoid(Wb x), twice that with `negative_eigenvalues` (arXiv 2411.12537):

        S += beta k^T (v - k S),  o = q S / sqrt(K),  y = Wo RMSNorm(o)

    *Written*: at every position the difference between the value and what its key reads. *Kept*:
    everything under keys that are orthogonal to it. *Forgotten*: what its key held, as far as beta
    goes; nothing by itself.

    State: memory [B, H, K, V] (float32 at least); tail [B, W - 1, H (2 K + V)], the convolution's
    last inputs.
    """

    def __init__(self, config: DeltaNetConfig):
        each = config.hidden_size // config.num_heads
        sizes = config.key_size or each, config.value_size or each
        super().__init__(config, *sizes, gate=False)
