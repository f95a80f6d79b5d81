"""The kernels of flash-linear-attention behind `everlong.ops.delta` and `everlong.ops.dplr`.

The extra `gpu` brings them. They serve CUDA tensors in bfloat16, be that v's dtype or autocast's;
the layers of `mixers/` widen what they project, so under bfloat16 autocast only. A head of more
than 256 or an odd number of key channels they leave to the chunked forms.
They multiply in that dtype and carry the state in float32; decays and strengths stay in float32.
A key of length 1 is that to 4e-3 in bfloat16: with beta near 2 and no decay a state may grow, where
that of the chunked forms does not. Gradients are of first order, which the kernels do not check.

Float32 stays with the chunked forms, whose products are as exact as torch is told to make them: the
kernels would round to tf32, or refuse. So does float16: the states between chunks are kept in it,
and overflow on a long stream. Without the extra the chunked forms serve everything; an extra that
is installed and fails, fails loudly.

`ops.scan` has no kernel. Of HGRN's two, the chunked one gives no gradient by the state it starts
from; the recurrent one walks position by position, and takes log decays where our f may be 0.
"""

import importlib
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST = 256  # the key channels of a head that all kernels can hold
DTYPE = torch.bfloat16


def serve(q: Tensor, v: Tensor, state: Tensor) -> bool:
    """Whether the kernels compute this. Ask before autocast is switched off."""
    if v.device.type != "cuda" or v.shape[1] == 1:  # a chunk of one position is the loop
        return False
    if torch.float64 in (q.dtype, v.dtype, state.dtype):  # which autocast leaves alone, too
        return False
    autocast = torch.is_autocast_enabled(v.device.type)
    dtype = torch.get_autocast_dtype(v.device.type) if autocast else v.dtype
    if dtype != DTYPE:
        return False
    keys = q.shape[-1]  # of 16-bit numbers their backward pass refuses an odd one
    return keys % 2 == 0 and keys <= WIDEST and _installed() is not None


@cache
def _installed() -> Any:
    """`fla.ops`, or None without the extra. Imported only here: where no GPU is, it cannot be."""
    try:
        return importlib.import_module("fla.ops")
    except ModuleNotFoundError as error:
        if error.name in ("fla", "fla.ops"):
            return None
        raise  # installed, but not whole


def linear_attention(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """As `delta.linear_attention`, from what `chunks.prepare` returns; so are the others."""
    kernel = "chunk_simple_gla" if g.dim() == 3 else "chunk_gla"
    return _run(kernel, state, {"q": q, "k": k, "v": v}, g=g)


def delta_rule(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Without decay too: that g is 0 would have to be read from the device."""
    kernel = "chunk_gated_delta_rule" if g.dim() == 3 else "chunk_kda"
    return _run(kernel, state, {"q": q, "k": k, "v": v}, g=g, beta=beta)


def dplr(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Their a reads the state before it decays, as ours does; their decay is by channel."""
    g = g if g.dim() == 4 else g[..., None].expand_as(k)
    return _run("chunk_dplr_delta_rule", state, {"q": q, "k": k, "v": v, "a": a, "b": b}, gk=g)


def _run(
    kernel: str, state: Tensor, rows: dict[str, Tensor], **exact: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and norm are off: queries come scaled, and keys normalised where they are to be."""
    values = state.shape[-1]
    odd = values % 2  # which their backward pass refuses, too: a column of zeros more
    rows = {name: row.to(DTYPE) for name, row in rows.items()}
    rows["v"], state = F.pad(rows["v"], (0, odd)), F.pad(state, (0, odd))
    call = getattr(_installed(), kernel)
    o, last = call(**rows, **exact, scale=1.0, initial_state=state, output_final_state=True)
    return o[..., :values], last[..., :values]
