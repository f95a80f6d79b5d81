"""The slot writer: its loop is the definition, the fast form and one masked attention equal it."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from everlong.ops import slots as ops

B, N, S, D, H = 2, 5, 7, 12, 3


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [draw(B, N, D), draw(B, N, D), draw(B, N, D), draw(B, S, D), draw(B, S, D)]


def one_masked_attention(slots, q, k, keys, values, heads, tau):
    """N queries over N + S keys, allowed[i, j] = (j == i) or (j >= N)."""
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    allowed = torch.cat([torch.eye(N), torch.ones(N, S)], 1).bool()
    y = F.scaled_dot_product_attention(
        split(q),
        split(torch.cat([k, keys], 1)),
        split(torch.cat([slots, values], 1)),
        attn_mask=allowed,
        scale=1 / (tau * math.sqrt(D // heads)),
    )
    return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_fast_form_equals_the_loop_in_values_and_gradients(parts, tau):
    forms = [
        lambda *p: ops.write(*p, heads=H, tau=tau)[0],
        lambda *p: one_masked_attention(*p, heads=H, tau=tau),
        lambda *p: ops.write_reference(*p, heads=H, tau=tau),
    ]
    results = []
    for form in forms:
        inputs = [p.clone().requires_grad_() for p in parts]
        y = form(*inputs)
        (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()).sum().backward()
        results.append([y.detach(), *(p.grad for p in inputs)])
    for result in results[:2]:
        for mine, reference in zip(result, results[2], strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-12, rtol=0)


def test_a_slot_never_sees_another(parts):
    slots, *rest = parts
    weights = [torch.randn(D, D, dtype=torch.float64) for _ in range(2)]

    def writer(m):
        return ops.write(m, m @ weights[0], m @ weights[1], *rest[2:], heads=H, tau=0.5)[0]

    jacobian = torch.autograd.functional.jacobian(writer, slots[:1].expand(B, -1, -1))[0, :, :, 0]
    for i in range(N):
        for j in range(N):
            block = jacobian[i, :, j]
            assert (block.abs().max() > 1e-3) if i == j else torch.equal(block, block * 0)


def test_slots_and_biases_permute_together(parts):
    order = torch.tensor([3, 0, 4, 1, 2])
    slots, q, k, *tokens = parts
    bias = torch.randn(N, D, dtype=torch.float64)
    straight, _ = ops.write(slots, q, k, *tokens, heads=H, tau=0.25)
    turned, _ = ops.write(slots[:, order], q[:, order], k[:, order], *tokens, heads=H, tau=0.25)
    torch.testing.assert_close(
        ops.normalise(straight, bias)[:, order],
        ops.normalise(turned, bias[order]),
        atol=1e-12,
        rtol=0,
    )


def test_temperature_zero_copies_or_overwrites_and_one_is_plain_softmax(parts):
    slots, q, k, keys, values = parts
    written, weights = ops.write(slots, q, k, keys, values, heads=1, tau=1e-6)
    kept = weights[..., 0]
    assert set(kept.flatten().tolist()) == {0.0, 1.0}, "the draw must hold both cases"
    own = (q * k).sum(-1)
    tokens = torch.einsum("bnd,bsd->bns", q, keys)
    taken = values.gather(1, tokens.argmax(-1)[..., None].expand(-1, -1, D))
    hard = torch.where((own > tokens.amax(-1))[..., None], slots, taken)
    torch.testing.assert_close(written, hard, atol=1e-9, rtol=0)

    weights = (torch.cat([own[..., None], tokens], -1) / math.sqrt(D)).softmax(-1)
    plain = weights[..., :1] * slots + weights[..., 1:] @ values
    torch.testing.assert_close(
        ops.write(slots, q, k, keys, values, heads=1, tau=1.0)[0], plain, atol=1e-12, rtol=0
    )


def test_padding_only_leaves_the_slot_and_partial_padding_equals_removal(parts):
    slots, q, k, keys, values = parts
    nothing = torch.zeros(B, S, dtype=torch.bool)
    written, weights = ops.write(slots, q, k, keys, values, heads=H, tau=0.25, mask=nothing)
    kept = weights[..., 0]
    assert torch.equal(written, slots)
    assert torch.equal(kept, torch.ones_like(kept))
    some = torch.arange(S).expand(B, -1) < 4
    masked, _ = ops.write(slots, q, k, keys, values, heads=H, tau=0.25, mask=some)
    short, _ = ops.write(slots, q, k, keys[:, :4], values[:, :4], heads=H, tau=0.25)
    torch.testing.assert_close(masked, short, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [0.1, 0.5, 1.15, 3.2])
def test_forgetting_law(size):
    """A slot that keeps itself turns towards v by theta' = atan2(sin theta, cos theta + |v|)."""
    target = F.normalize(torch.randn(D, dtype=torch.float64), dim=0)
    start = torch.randn(D, dtype=torch.float64)
    start = F.normalize(start - (start @ target) * target, dim=0)  # 90 degrees away
    slot, angle, seen = start[None, None], math.pi / 2, [math.pi / 2]
    for _ in range(20):
        slot = ops.normalise(slot, size * target[None])
        angle = math.atan2(math.sin(angle), math.cos(angle) + size)
        cosine, sine = slot[0, 0] @ target, slot[0, 0] @ start
        assert math.atan2(sine, cosine) == pytest.approx(angle, abs=1e-10)
        seen.append(angle)
    assert all(later < earlier for earlier, later in itertools.pairwise(seen))
    halving = next(i for i, a in enumerate(seen) if a <= math.pi / 4 + 1e-12)
    assert halving == {0.1: 9, 0.5: 2, 1.15: 1, 3.2: 1}[size]
