"""Attention: the reference is a masked softmax with rotary positions over the whole stream."""

import pytest
import torch

import everlong
from everlong.ops import rotary


def plain(memory, x, window=None):
    """Every query against every key, one by one: the definition."""
    attention = memory.attention
    zero = torch.zeros(x.shape[0], dtype=torch.long)
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)
    q, k = rotary.rotate(q, zero), rotary.rotate(k, zero)
    outputs = torch.zeros_like(q)
    for t in range(x.shape[1]):
        first = 0 if window is None else max(0, t - window + 1)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, first : t + 1]) / q.shape[-1] ** 0.5
        outputs[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, first : t + 1])
    return attention.out(outputs.flatten(2))


@pytest.mark.parametrize(
    ("name", "options", "window"),
    [
        ("attention", {}, None),
        ("attention", {"capacity": 200}, None),
        ("sliding_attention", {"window": 1}, 1),
        ("sliding_attention", {"window": 5}, 5),
        ("sliding_attention", {"window": 70}, 70),
    ],
)
def test_equals_the_definition_in_values_and_gradients(name, options, window):
    torch.manual_seed(0)
    memory = everlong.create_memory(name, hidden_size=24, num_heads=3, **options).double()
    for length in (1, 4, 5, 6, 150):
        x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
        results = []
        for y in (memory(x)[0], plain(memory, x, window)):
            wanted = [x, *memory.parameters()]
            results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
        for mine, reference in zip(*results, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-9, rtol=0)


def test_the_window_sees_exactly_that_many_tokens():
    memory = everlong.create_memory("sliding_attention", hidden_size=24, num_heads=3, window=5)
    x = torch.randn(1, 80, 24, requires_grad=True)
    y, _ = memory(x)
    (gradient,) = torch.autograd.grad(y[:, 60].sum(), x)
    assert gradient[0].abs().amax(-1).nonzero().flatten().tolist() == [56, 57, 58, 59, 60]


def test_a_full_capacity_says_what_to_do():
    memory = everlong.create_memory("attention", hidden_size=24, num_heads=3, capacity=4)
    _, state = memory(torch.randn(1, 4, 24))
    with pytest.raises(ValueError, match="raise capacity, or use sliding_attention"):
        memory(torch.randn(1, 1, 24), state)


@pytest.mark.parametrize("width", [8, 64])
def test_rotary_positions_are_relative_at_ten_million(width):
    """In float32 a query and key far down the stream meet at the angle they had at its start."""
    q, k = torch.randn(2, 1, 16, 2, width).unbind(0)
    scores = []
    for start in (0, 10_000_000):
        at = torch.tensor([start])
        turned = rotary.rotate(q, at), rotary.rotate(k, at)
        scores.append(torch.einsum("bihd,bjhd->bhij", *turned))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=0)
