"""RetNet: linear attention under a fixed decay a head, with rotary positions.

B batch, T time, D hidden_size, H heads, K key_size, V value_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.mixers.linear import LinearMixer, check_sizes
from everlong.ops import rotary
from everlong.registry import register
from everlong.state import State


@dataclass(frozen=True)
class RetNetConfig:
    """key_size, value_size: of a head; None: hidden_size // num_heads, and twice the key_size."""

    hidden_size: int
    num_heads: int
    key_size: int | None = None
    value_size: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.keys % 2:
            raise ValueError(
                f"heads have keys of width {self.keys}, and rotary positions turn pairs: "
                "give an even key_size"
            )

    @property
    def keys(self) -> int:
        return self.key_size or self.hidden_size // self.num_heads


@register(
    "retnet",
    room="mixers",
    config=RetNetConfig,
    paper="Sun et al. 2023, arXiv 2307.08621",
    keeps="writes outer products; each head fades all of them at a fixed rate of its own",
    small={"key_size": 6, "value_size": 7},
)
class RetNet(LinearMixer):
    """Multi-scale retention (arXiv 2307.08621, eq. 5 to 8). For head h, with rotary q and k:

        S = (1 - 2^(-5-h)) S + k^T v,  o = q S / sqrt(K),  y = Wo (RMSNorm(o) * silu(Wg x))

    *Written*: every position's outer product. *Kept*: what is recent: half of it is left after 22
    positions in head 0, twice as many in each next. *Forgotten*: all alike, whatever is read: no
    rate depends on the input.

    State: memory [B, H, K, V] (float32 at least); position Int [B] for the rotary angles.

    Deviations: RMS norms for group norms, as in later codes; q S is divided by sqrt(K), not also
    by the root of the sum of decays, which the norm undoes; the rates are those of the released
    code and are not learned.
    """

    def __init__(self, config: RetNetConfig):
        super().__init__(config, config.keys, config.value_size or 2 * config.keys)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        state = super().init_state(batch_size, device=device, dtype=dtype)
        device = state["memory"].device
        return {**state, "position": torch.zeros(batch_size, device=device, dtype=torch.long)}

    def vectors(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, ...]:
        turn = rotary.angles(state["position"], q.shape[1], q.shape[-1], 10_000.0, q.dtype)
        return rotary.apply(q, *turn), rotary.apply(k, *turn), v

    def decay(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        heads = torch.arange(self.num_heads, device=x.device, dtype=exact)
        return torch.log1p(-(2.0 ** (-5 - heads))).expand(*x.shape[:2], -1)
