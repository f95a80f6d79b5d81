"""Linear attention: a running sum of outer products of keys and values.

B batch, T time, D hidden_size, H heads, K key_size, V value_size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.mixers.linear import LinearMixer, check_sizes
from everlong.registry import check_choice, register
from everlong.state import State

_MAPS = ("elu", "identity")
_LEAST = 1e-10  # added to the sums that outputs are divided by


@dataclass(frozen=True)
class LinearAttentionConfig:
    """key_size, value_size: of a head; None: hidden_size // num_heads. feature_map: "elu" (as
    published, with division) or "identity" (no division, a norm of each head instead)."""

    hidden_size: int
    num_heads: int
    key_size: int | None = None
    value_size: int | None = None
    feature_map: str = "elu"

    def __post_init__(self) -> None:
        check_sizes(self)
        check_choice("feature_map", self.feature_map, _MAPS)


@register(
    "linear_attention",
    room="mixers",
    config=LinearAttentionConfig,
    paper="Katharopoulos et al. 2020, arXiv 2006.16236",
    keeps="writes outer products of keys and values, keeps their sum, forgets nothing",
    small={"key_size": 5, "value_size": 7},
)
class LinearAttention(LinearMixer):
    """Attention with the kernel phi(q) phi(k)^T, as a recurrence (arXiv 2006.16236, eq. 16-20).

    With phi(x) = elu(x) + 1 > 0 of queries and keys, for each head:

        S += phi(k)^T v,  z += phi(k),  o = phi(q) S / (phi(q) z)

    *Written*: every position's outer product. *Kept*: their sum, for ever. *Forgotten*: nothing;
    what is stored under like keys is read mixed.

    State: memory [B, H, K, V + 1] (float32 at least), whose last column is z. feature_map
    "identity": S += k^T v and o = q S / sqrt(K), then an RMS norm of each head; [B, H, K, V].

    Deviation: heads may be narrower or wider than D / H.
    """

    def __init__(self, config: LinearAttentionConfig):
        each = config.hidden_size // config.num_heads
        self.divides = config.feature_map == "elu"
        super().__init__(config, config.key_size or each, config.value_size or each, gate=False)
        if self.divides:
            del self.norm

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        state = super().init_state(batch_size, device=device, dtype=dtype)
        memory = state["memory"]
        return {
            "memory": memory[..., :1].expand(*memory.shape[:-1], memory.shape[-1] + self.divides)
        }

    def vectors(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, ...]:
        if not self.divides:
            return q, k, v
        return F.elu(q) + 1, F.elu(k) + 1, torch.cat([v, torch.ones_like(v[..., :1])], -1)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        if not self.divides:
            return super().finish(o, x)
        return self.out((o[..., :-1] / (o[..., -1:] + _LEAST)).flatten(2).to(x.dtype))
