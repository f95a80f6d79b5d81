"""DeltaNet: what is stored under a key is corrected towards its new value.

B batch, T time, D hidden_size, H heads, K key_size, V value_size, W conv_size.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from everlong.mixers.linear import LinearMixer, check_sizes, unit
from everlong.registry import register
from everlong.state import State


@dataclass(frozen=True)
class DeltaNetConfig:
    """key_size, value_size: of a head; None: hidden_size // num_heads. conv_size: positions that
    the convolution before queries, keys and values sees; 0: none. negative_eigenvalues: a
    correction may go beyond the new value, which counting and state tracking need."""

    hidden_size: int
    num_heads: int
    key_size: int | None = None
    value_size: int | None = None
    conv_size: int = 4
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, conv_size=0)


@register(
    "deltanet",
    room="mixers",
    config=DeltaNetConfig,
    paper="Yang et al. 2024, arXiv 2406.06484",
    keeps="writes each value over what its key held; a pair stays until a like key is written",
    small={"key_size": 5, "value_size": 7},
)
class DeltaNet(LinearMixer):
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
        super().__init__(config, *sizes, conv_size=config.conv_size, gate=False)
        self.beta = nn.Linear(config.hidden_size, config.num_heads, bias=False)

    def vectors(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, ...]:
        return unit(q), unit(k), v

    def strength(self, x: Tensor) -> Tensor:
        return self.beta(x).sigmoid() * (2 if self.config.negative_eigenvalues else 1)
