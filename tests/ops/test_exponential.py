"""The blocked form is the loop, and the loop is the delta rule under features that are made."""

import math

import pytest
import torch

from everlong.ops import exponential as ops
from everlong.ops.delta import delta_rule

B, H, K, V, C = 2, 2, 4, 3, ops.BLOCK
RULES = ["delta", "hebbian"]


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def parts(rule, length, before=0, *, batch=B, heads=H, k=K, v=V, most=1.0):
    """q, k, v, beta, and the keys and values of earlier calls."""
    shape = batch, length, heads
    beta = most * draw(*shape, seed=3).sigmoid() if rule == "delta" else None
    held = unit(draw(batch, before, heads, k, seed=4)), draw(batch, before, heads, v, seed=5)
    q, keys = unit(draw(*shape, k, seed=0)), unit(draw(*shape, k, seed=1))
    return [q, keys, draw(*shape, v, seed=2), beta, *held]


def everything(form, inputs, **options):
    """o, z, and the gradients of a loss on both by every input."""
    given = [None if part is None else part.clone().requires_grad_() for part in inputs]
    found = form(*given, **options)
    loss = sum((out * draw(*out.shape, seed=7).to(out.dtype)).sum() for out in found)
    wanted = [part for part in given if part is not None and part.numel()]
    return [*found, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def assert_equal(found, wanted, tolerance=1e-10):
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def features(x, order=13):
    """phi of exp(x . y - 1), [..., sum of K^n]: powers of x up to an order that leaves nothing."""
    found, power = [], x.new_ones(*x.shape[:-1], 1)
    for n in range(order):
        found.append(power / math.sqrt(math.factorial(n) * math.e))
        power = (power[..., None] * x[..., None, :]).flatten(-2)
    return torch.cat(found, -1)


def test_the_delta_rule_is_that_of_the_features():
    q, k, v, beta, *held = parts("delta", 30, k=2)
    phi_q, phi_k = features(q), features(k)
    torch.testing.assert_close((phi_q * phi_k).sum(-1), ((q * k).sum(-1) - 1).exp())
    empty = torch.zeros(B, H, phi_k.shape[-1], V).double()
    wanted, memory = delta_rule(phi_q, phi_k, v, torch.zeros(B, 30, H).double(), beta, empty)
    for form in (ops.exponential_reference, ops.exponential_memory):
        o, z = form(q, k, v, beta, *held)
        assert_equal([o], [wanted], 1e-9)
        assert_equal([torch.einsum("bthf,bthv->bhfv", phi_k, z)], [memory], 1e-9)


def test_the_delta_rule_is_the_paper_s_updates_one_by_one():
    """With the kernel exp(k . k') and a step eta: z_t = eta (v_t - sum_i z_i exp(k_i . k_t))."""
    q, k, v, beta, *held = parts("delta", 40)
    eta, written, outputs = beta / math.e, [], []
    for t in range(40):
        value = v[:, t]
        for i, z in enumerate(written):
            value = value - z * (k[:, i] * k[:, t]).sum(-1, keepdim=True).exp()
        written.append(eta[:, t, :, None] * value)
        read = [z * (k[:, i] * q[:, t]).sum(-1, keepdim=True).exp() for i, z in enumerate(written)]
        outputs.append(sum(read))
    for form in (ops.exponential_reference, ops.exponential_memory):
        o, z = form(q, k, v, beta, *held)
        assert_equal([o, z], [torch.stack(outputs, 1), math.e * torch.stack(written, 1)])


def test_hebbian_is_attention_without_its_denominator():
    q, k, v, _, *held = inputs = parts("hebbian", 150)
    scores = torch.einsum("bihk,bjhk->bhij", q, k)
    wanted = torch.einsum("bhij,bjhv->bihv", scores.exp().tril(), v)
    for form in (ops.exponential_reference, ops.exponential_memory):
        o, z = form(*inputs)
        assert_equal([math.e * o, z], [wanted, v])
    softmax = torch.nn.functional.scaled_dot_product_attention(
        *(part.transpose(1, 2) for part in (q, k, v)), is_causal=True, scale=1.0
    ).transpose(1, 2)
    sums, _ = ops.exponential_memory(q, k, torch.ones_like(v), None, *held)
    assert_equal([o / sums], [softmax])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("before", [0, 1, C + 3])
@pytest.mark.parametrize("length", [1, 2, C - 1, C, C + 1, 2 * C + 9])
def test_blocks_are_the_loop_in_values_and_gradients(rule, before, length):
    inputs = parts(rule, length, before, most=2.0)
    for lengths, sharpness in ((None, 1.0), (torch.tensor([length // 2, length]), 3.0)):
        options = {"sharpness": sharpness, "lengths": lengths}
        wanted = everything(ops.exponential_reference, inputs, **options)
        assert_equal(everything(ops.exponential_memory, inputs, **options), wanted)
        single = [None if part is None else part.float() for part in inputs]
        found = everything(ops.exponential_memory, single, **options)
        for got, want in zip(found, wanted, strict=True):
            if got is not None:
                assert got.dtype == torch.float32
                assert (got - want).norm() <= 1e-5 * want.norm()


def test_a_loss_that_weighs_all_reads_alike_keeps_its_digits():
    """Reads' gradients all point one way, and writes' undo them: block by block in float32."""
    inputs, found = parts("delta", 1024, batch=1, heads=1, k=16), []
    for dtype in (torch.float64, torch.float32):
        given = [part.to(dtype).requires_grad_() for part in inputs]
        o, _ = ops.exponential_memory(*given)
        found.append(torch.autograd.grad(o.sum(), given[:4]))
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() <= 2e-5 * want.norm()


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_those_of_differences(rule, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 2)
    inputs = parts(rule, 5, 2, batch=1, heads=1, k=2, v=2)
    given = [part.requires_grad_() for part in inputs if part is not None]

    def read(q, k, v, *rest):
        beta, keys, values = rest if rule == "delta" else (None, *rest)
        return ops.exponential_memory(q, k, v, beta, keys, values, sharpness=1.5)

    assert torch.autograd.gradcheck(read, given)


@pytest.mark.parametrize("rule", RULES)
def test_any_cut_is_one_call(rule):
    *inputs, keys, values = parts(rule, 2 * C + 5, 3)
    wanted = ops.exponential_memory(*inputs, keys, values)
    for pieces in ([C, C + 5], [1, 2 * C, 4], [1] * (2 * C + 5)):
        given = [None if part is None else part.split(pieces, 1) for part in inputs]
        found, held = [], (keys, values)
        for n in range(len(pieces)):
            piece = [None if part is None else part[n] for part in given]
            found.append(ops.exponential_memory(*piece, *held))
            held = torch.cat([held[0], piece[1]], 1), torch.cat([held[1], found[-1][1]], 1)
        assert_equal([torch.cat(part, 1) for part in zip(*found, strict=True)], wanted)


@pytest.mark.parametrize("rule", RULES)
def test_what_stands_behind_a_row_s_length_does_not_matter(rule):
    inputs, length = parts(rule, C + 9, 4), 20
    wanted = everything(
        ops.exponential_memory,
        [p if i > 3 or p is None else p[:, :length] for i, p in enumerate(inputs)],
    )
    spoilt = [
        None if part is None else torch.cat([part[:, :length], part[:, length:] * torch.nan], 1)
        for part in inputs[:4]
    ]
    given = [None if p is None else p.requires_grad_() for p in [*spoilt, *inputs[4:]]]
    o, z = ops.exponential_memory(*given, lengths=torch.full((B,), length))
    assert_equal([o[:, :length], z[:, :length]], wanted[:2])
    assert not z[:, length:].any()
    grads = torch.autograd.grad(o[:, :length].sum() + z.sum(), [p for p in given if p is not None])
    assert all(grad.isfinite().all() for grad in grads)


def test_the_same_key_again_overwrites_under_delta_and_adds_under_hebbian():
    key, others = unit(draw(1, 1, 1, 8)), unit(draw(1, C, 1, 8, seed=1))
    k = torch.cat([key, others, key], 1)
    v = draw(1, C + 2, 1, V, seed=2)
    empty = v.new_zeros(1, 0, 1, 8), v.new_zeros(1, 0, 1, V)
    o, _ = ops.exponential_memory(k, k, v, v.new_ones(1, C + 2, 1), *empty)
    assert_equal([o], [v])  # a value stored whole is what its key reads, whatever it held
    o, _ = ops.exponential_memory(k, k, v, None, *empty, sharpness=1e3)  # like keys and no others
    assert_equal([o[:, -1]], [v[:, 0] + v[:, -1]])
    o, _ = ops.exponential_memory(k, k, v, v.new_ones(1, C + 2, 1), *empty, sharpness=1e3)
    assert_equal([o[:, -1]], [v[:, -1]])


def test_a_step_of_2_never_enlarges_what_is_stored():
    """The norm of M in the space of phi, over 4,096 writes of 0 at the most there is."""
    inputs = parts("delta", 4096, 50, batch=1, heads=1, k=16)
    q, k, v, beta, keys, values = (part.float() for part in inputs)
    _, z = ops.exponential_memory(q, k, 0 * v, 0 * beta + 2, keys, values)
    k, z = (torch.cat(pair, 1)[0, :, 0].double() for pair in ((keys, k), (values, z)))
    gram = (k @ k.T - 1).exp()
    before, after = ((z[:n].T @ gram[:n, :n] @ z[:n]).trace() for n in (50, 4146))
    assert after <= 1.001 * before


def test_what_a_backward_needs_is_linear_in_the_length():
    def kept(length):
        numbers = []
        inputs = [part.requires_grad_() for part in parts("delta", length)]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: numbers.append(x.numel()) or x, lambda x: x
        ):
            ops.exponential_memory(*inputs)
        return sum(numbers)

    assert kept(1024) <= 2 * kept(512)


def recall(rule, sharpness, count, width=16, draws=5):
    """The share of signs read back, of `count` random pairs written once: the docs quote it."""
    right = []
    for seed in range(draws):
        k = unit(draw(1, count, 1, width, seed=seed))
        v = draw(1, count, 1, width, seed=100 + seed).sign()
        beta = v.new_ones(1, count, 1) if rule == "delta" else None
        empty = v.new_zeros(1, 0, 1, width)
        _, z = ops.exponential_memory(k, k, v, beta, empty, empty, sharpness=sharpness)
        zero = torch.zeros_like(v)
        read, _ = ops.exponential_memory(k, k, zero, None, k, z, sharpness=sharpness)
        right.append((read.sign() == v).double().mean())
    return float(torch.stack(right).mean())


@pytest.mark.parametrize(
    ("rule", "sharpness", "shares"),
    [
        ("delta", 1, (0.81, 0.71, 0.63)),
        ("delta", 2, (0.97, 0.90, 0.79)),
        ("delta", 4, (1.00, 1.00, 0.99)),
        ("hebbian", 1, (0.73, 0.63, 0.57)),
        ("hebbian", 2, (0.92, 0.76, 0.66)),
        ("hebbian", 4, (1.00, 1.00, 0.92)),
    ],
)
def test_a_sharper_kernel_recalls_more_pairs(rule, sharpness, shares):
    found = [recall(rule, sharpness, count) for count in (16, 64, 256)]
    assert found == pytest.approx(shares, abs=0.02)
