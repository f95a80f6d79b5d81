"""The Memformer's slot writer: a slot sees itself and the tokens of a segment, never another slot.

B batch, N slots, S segment length, D width, H heads, d = D / H. Equation numbers are those of the
reference below; they follow Wu et al., arXiv 2010.06891 v2, sections 2.2 and 2.3.
"""

import torch
from torch import Tensor


def write_reference(
    slots: Tensor, q: Tensor, k: Tensor, keys: Tensor, values: Tensor, heads: int, tau: float
) -> Tensor:
    """Slot by slot and head by head: the definition.

    slots, q, k [B, N, D]: raw slots, their query and key maps; keys, values [B, S, D] of the tokens
    -> m' [B, N, D].
    """
    width = slots.shape[-1] // heads
    written = []
    for i in range(slots.shape[1]):
        parts = []
        for h in range(heads):
            at = slice(h * width, (h + 1) * width)
            own = (q[:, i, at] * k[:, i, at]).sum(-1, keepdim=True)
            tokens = torch.einsum("bd,bsd->bs", q[:, i, at], keys[:, :, at])
            logits = torch.cat([own, tokens], -1) / width**0.5
            weights = (logits / tau).softmax(-1)
            kept = weights[:, :1] * slots[:, i, at]
            taken = torch.einsum("bs,bsd->bd", weights[:, 1:], values[:, :, at])
            parts.append(kept + taken)
        written.append(torch.cat(parts, -1))
    return torch.stack(written, 1)


def write(
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    heads: int,
    tau: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for all slots at once; the slot block of the attention is reduced to its diagonal.

    mask Bool [B, S]: tokens that are real; with none of them a slot keeps itself exactly.
    Returns m' [B, N, D] and the weights a_i [B, N, H, 1 + S], the slot's own first.
    """
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731 (used five times)
    q, k, keys, values, own_value = split(q), split(k), split(keys), split(values), split(slots)
    scale = 1.0 / (tau * q.shape[-1] ** 0.5)
    own = (q * k).sum(-1, keepdim=True) * scale
    tokens = q @ keys.transpose(-1, -2) * scale
    if mask is not None:
        tokens = tokens.masked_fill(~mask[:, None, None], float("-inf"))
    weights = torch.cat([own, tokens], -1).softmax(-1)
    written = weights[..., :1] * own_value + weights[..., 1:] @ values
    return written.transpose(1, 2).flatten(2), weights.transpose(1, 2)


def normalise(slots: Tensor, bias: Tensor) -> Tensor:
    """Biased memory normalisation: u = m' + v, m = u / |u| over the whole width (eq. 7).

    The bias v [N, D] is where an unused slot drifts; |v| is how fast, and how soon gradients fade.
    """
    moved = slots + bias
    return moved * (moved.square().sum(-1, keepdim=True) + 1e-16).rsqrt()
