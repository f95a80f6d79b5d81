"""The recurrences of ops/ in all their forms, ours and transformers', on the same tensors.

B batch (1), T time, H heads, K = V head size, D = H K, W positions of a convolution.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.delta import delta_rule, linear_attention
from everlong.ops.dplr import dplr, dplr_reference
from everlong.ops.ragged import expand_like
from everlong.ops.scan import scan, scan_reference
from everlong.ops.shortconv import short_convolution

Form = Callable[[], tuple[Tensor, Tensor]]  # outputs and the last state
OURS, STEP = "ours", "step by step"
# What transformers computes without kernels: model and function. Not every release has them all.
THEIRS = {
    "transformers qwen3_next, chunks": ("qwen3_next", "torch_chunk_gated_delta_rule"),
    "transformers qwen3_next, step by step": ("qwen3_next", "torch_recurrent_gated_delta_rule"),
    "transformers kimi_linear, chunks": ("kimi_linear", "chunk_kimi_delta_attention"),
    "transformers mamba2, chunks of 64": ("mamba2", "mamba2_chunk_scan"),
    "transformers mamba2, chunks of 256": ("mamba2", "mamba2_chunk_scan"),
}


@dataclass(frozen=True)
class Rule:
    """One recurrence: forms that answer the same, and the tensors their gradients are taken for.

    The definition, which the others are compared with, is the last of `forms`.
    """

    name: str
    forms: Mapping[str, Form]
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Inputs:
    """What all forms read. Queries and keys have length 1; logs of decays are 0 to -0.3."""

    q: Tensor  # [B, T, H, K]
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    heads: Tensor  # log decays, one a head [B, T, H]
    channels: Tensor  # one a channel [B, T, H, K]
    beta: Tensor  # [B, T, H]
    rate: Tensor  # Mamba2's A [H], below 0
    step: Tensor  # and its dt [B, T, H], above 0: the log decay is A dt, and dt v is written
    state: Tensor  # [B, H, K, V]
    f: Tensor  # [B, T, D]
    i: Tensor
    start: Tensor  # [B, D]
    weight: Tensor  # [D, W]
    tail: Tensor  # [B, W - 1, D]


def draw(length: int, num_heads: int, head_size: int, seed: int, device: str) -> Inputs:
    """T, H, K and the seed of the drawing; every tensor is a leaf that gets a gradient."""
    generator = torch.Generator().manual_seed(seed)
    width = num_heads * head_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def stream(*shape: int) -> Tensor:
        return normal(1, length, *shape)

    k = F.normalize(stream(num_heads, head_size), dim=-1)
    found = Inputs(
        q=F.normalize(stream(num_heads, head_size), dim=-1),
        k=k,
        v=stream(num_heads, head_size),
        a=0.9 * k,
        b=-0.5 * k,
        heads=-0.1 * stream(num_heads).abs(),
        channels=-0.1 * stream(num_heads, head_size).abs(),
        beta=stream(num_heads).sigmoid(),
        rate=-0.2 * torch.rand(num_heads, generator=generator),
        step=stream(num_heads).sigmoid(),
        state=normal(1, num_heads, head_size, head_size),
        f=stream(width).sigmoid(),
        i=stream(width),
        start=normal(1, width),
        weight=normal(width, 4),
        tail=normal(1, 3, width),
    )
    return Inputs(
        **{
            field.name: getattr(found, field.name).to(device).requires_grad_()
            for field in fields(Inputs)
        }
    )


def transformers_functions() -> dict[str, Callable[..., Any] | None]:
    """Of `THEIRS` the functions, without the choice of kernels that is wrapped around them; None
    for one that the installed transformers lacks."""
    found: dict[str, Callable[..., Any] | None] = {}
    for form, (model, name) in THEIRS.items():
        path = f"transformers.models.{model}.modeling_{model}"
        known = importlib.util.find_spec(f"transformers.models.{model}") is not None
        function = getattr(importlib.import_module(path), name, None) if known else None
        found[form] = None if function is None else inspect.unwrap(function)
    return found


def all_rules(t: Inputs) -> list[Rule]:
    """Every recurrence, with what transformers has of it."""
    theirs = transformers_functions()
    return [
        _ssd(t, theirs),
        Rule(
            "linear attention, a decay a channel",
            {
                OURS: lambda: linear_attention(t.q, t.k, t.v, t.channels, t.state),
                STEP: lambda: dplr_reference(t.q, t.k, t.v, t.channels, None, t.state),
            },
            (t.q, t.k, t.v, t.channels, t.state),
        ),
        _delta("delta rule, a decay a head", t, t.heads, theirs, "transformers qwen3_next"),
        _delta("delta rule, a decay a channel", t, t.channels, theirs, "transformers kimi_linear"),
        _dplr("dplr, a decay a head", t, t.heads),
        _dplr("dplr, a decay a channel", t, t.channels),
        Rule(
            "first-order scan",
            {
                OURS: lambda: scan(t.f, t.i, t.start),
                STEP: lambda: scan_reference(t.f, t.i, t.start),
            },
            (t.f, t.i, t.start),
        ),
        Rule(
            "short convolution",
            {
                OURS: lambda: short_convolution(t.i, t.weight, t.tail),
                "torch conv1d": lambda: _convolution(t),
            },
            (t.i, t.weight, t.tail),
        ),
    ]


def _ssd(t: Inputs, theirs: Mapping[str, Callable[..., Any] | None]) -> Rule:
    """Mamba2's rule from its own inputs; ours makes the log decays and scales v by itself too."""

    def mamba2(function: Callable[..., Any], chunk_size: int) -> tuple[Tensor, Tensor]:
        o, state = function(
            t.v, t.step, t.rate, t.k, t.q, chunk_size,
            initial_states=t.state.mT, return_final_states=True,
        )  # fmt: skip
        return o, state.mT

    def scaled() -> tuple[Tensor, Tensor]:
        return t.step[..., None] * t.v, t.rate * t.step

    def ours() -> tuple[Tensor, Tensor]:
        v, g = scaled()
        return linear_attention(t.q, t.k, v, g, t.state)

    def step() -> tuple[Tensor, Tensor]:
        v, g = scaled()
        return dplr_reference(t.q, t.k, v, g, None, t.state)

    forms: dict[str, Form] = {OURS: ours}
    for size in (64, 256):
        form = f"transformers mamba2, chunks of {size}"
        if (function := theirs[form]) is not None:
            forms[form] = partial(mamba2, function, size)
    forms[STEP] = step
    return Rule("linear attention, a decay a head", forms, (t.q, t.k, t.v, t.rate, t.step, t.state))


def _delta(
    name: str, t: Inputs, g: Tensor, theirs: Mapping[str, Callable[..., Any] | None], model: str
) -> Rule:
    """transformers' forms scale the queries by 1 / sqrt(K) themselves: ours are given them so."""

    def scaled() -> Tensor:
        return t.q * t.q.shape[-1] ** -0.5

    def step() -> tuple[Tensor, Tensor]:
        low_rank = expand_like(g, t.k).exp() * t.k, -t.beta[..., None] * t.k
        return dplr_reference(scaled(), t.k, t.beta[..., None] * t.v, g, low_rank, t.state)

    forms: dict[str, Form] = {OURS: lambda: delta_rule(scaled(), t.k, t.v, g, t.beta, t.state)}
    for form, function in theirs.items():
        if function is not None and form.startswith(model):
            forms[form] = partial(
                function, t.q, t.k, t.v, g, t.beta,
                initial_state=t.state, output_final_state=True,
            )  # fmt: skip
    forms[STEP] = step
    return Rule(name, forms, (t.q, t.k, t.v, g, t.beta, t.state))


def _dplr(name: str, t: Inputs, g: Tensor) -> Rule:
    forms: dict[str, Form] = {
        OURS: lambda: dplr(t.q, t.k, t.v, g, (t.a, t.b), t.state),
        STEP: lambda: dplr_reference(t.q, t.k, t.v, g, (t.a, t.b), t.state),
    }
    return Rule(name, forms, (t.q, t.k, t.v, g, t.a, t.b, t.state))


def _convolution(t: Inputs) -> tuple[Tensor, Tensor]:
    seen = torch.cat([t.tail, t.i], 1)
    y = F.conv1d(seen.mT, t.weight[:, None], groups=len(t.weight)).mT
    return y, seen[:, t.i.shape[1] :]
