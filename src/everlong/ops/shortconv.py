"""A short causal convolution, channel by channel, that carries its last inputs from call to call.

B batch, T time, D width, W positions the convolution sees (4 in the linear-attention layers).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.ragged import expand_like


def short_convolution(
    x: Tensor,
    weight: Tensor,
    tail: Tensor,
    *,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = sum_w weight[:, w] * x_{t-W+1+w} (+ bias): the last weight meets the newest input.

    x [B, T, D], weight [D, W], bias [D], tail [B, W - 1, D] the inputs before x (zeros at the start
    of a stream) -> y [B, T, D] and the next tail. With `lengths` Int [B] the tail ends at a row's
    own last real position; y behind it is meaningless, and x there may hold anything.
    """
    length, width = x.shape[1], weight.shape[-1]
    seen = torch.cat([tail.to(x.dtype), x], 1)
    y = F.conv1d(seen.mT, weight[:, None], bias, groups=weight.shape[0]).mT
    if lengths is None:
        return y, seen[:, length:]
    places = lengths[:, None] + torch.arange(width - 1, device=x.device)
    index = expand_like(places, x).expand(-1, -1, x.shape[-1])
    return y, seen.gather(1, index)
