"""Dot against its equations, as one system over the whole stream; and what is special to it."""

import pytest
import torch
import torch.nn.functional as F

import everlong
from everlong import state as states
from laws.cases import memory_case
from laws.checks import LAWS, check

H, D = 2, 12
VARIANTS = [
    {},
    {"rule": "hebbian"},
    {"conv_size": 0, "key_size": 3, "value_size": 5, "max_step": 2.0, "sharpness": 4.0},
]


def make(**options):
    torch.manual_seed(0)
    memory = everlong.create_memory("dot", hidden_size=D, num_heads=H, **options).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return memory


def noise(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def l2(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def projections(m, x):
    """q, k, v [B, H, T, each], behind the convolution where there is one."""
    qkv = m.qkv(x)
    if m.convolution is not None:
        w = m.convolution.weight
        padded = F.pad(qkv, (0, 0, w.shape[1] - 1, 0))
        qkv = F.silu(sum(padded[:, i : i + x.shape[1]] * w[:, i] for i in range(w.shape[1])))
    k, v = m.sizes
    return (p.unflatten(-1, (H, -1)).transpose(1, 2) for p in qkv.split([H * k, H * k, H * v], -1))


def expected(m, x):
    q, k, z = projections(m, x)
    q, k, c = l2(q), l2(k), m.config.sharpness
    if m.config.rule == "delta":
        beta = m.config.max_step * torch.sigmoid(m.beta(x)).transpose(1, 2)[..., None]
        system = torch.eye(x.shape[1]) + beta * (c * (k @ k.mT - 1)).exp().tril(-1)
        z = torch.linalg.solve(system, beta * z)
    o = ((c * (q @ k.mT - 1)).exp().tril() @ z).transpose(1, 2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.norm.weight
    return m.out(o.flatten(2) * F.silu(m.gate(x))), k.transpose(1, 2), z.transpose(1, 2)


@pytest.mark.parametrize("options", VARIANTS)
def test_it_computes_its_equations_in_values_and_gradients(options):
    memory, x = make(**options), noise(2, 150, D).requires_grad_()
    y, state = memory(x)
    results = []
    for found in ((y, state["keys"], state["values"]), expected(memory, x)):
        loss = sum(part.square().sum() for part in found)
        results.append([*found, *torch.autograd.grad(loss, [x, *memory.parameters()])])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_the_hebbian_rule_obeys_the_laws(law, tmp_path):
    check(law, memory_case("dot", rule="hebbian", capacity=None, sharpness=2.0), tmp_path)


def test_a_value_written_again_is_all_that_its_key_reads_or_is_added():
    for rule in ("delta", "hebbian"):
        memory = make(rule=rule, conv_size=0, sharpness=1e4)
        if rule == "delta":
            memory.strength = lambda x: torch.ones(*x.shape[:2], H, dtype=torch.float64)
        key, other = noise(1, 1, D, seed=3), noise(1, 6, D, seed=4)
        x = torch.cat([key, other, key], 1)
        _, state = memory(x)
        v = memory.qkv(key)[0, 0, -2 * memory.sizes[1] :].unflatten(0, (H, -1))
        same = torch.einsum("bhk,bthk->bth", state["keys"][:, -1], state["keys"]) > 0.999
        held = (same[..., None] * state["values"]).sum(1)[0]
        times = 1 if rule == "delta" else 2
        torch.testing.assert_close(held, times * v, rtol=0.02, atol=0.02)


def test_the_state_grows_by_a_key_and_a_value_a_position():
    memory = everlong.create_memory("dot", hidden_size=24, num_heads=3)
    _, state = memory(torch.randn(1, 10, 24))
    for length in (11, 12):
        before, (_, state) = states.num_bytes(state), memory(torch.randn(1, 1, 24), state)
        assert state["keys"].shape[:2] == (1, length)
        assert states.num_bytes(state) - before == 2 * 24 * 4


def test_keys_have_the_parameters_dtype_and_what_is_built_upon_is_exact():
    for rule, values in (("delta", torch.float32), ("hebbian", torch.bfloat16)):
        memory = everlong.create_memory("dot", hidden_size=24, num_heads=3, rule=rule).bfloat16()
        x = torch.randn(1, 80, 24).bfloat16()
        y, state = memory(x)
        assert (y.dtype, state["keys"].dtype) == (torch.bfloat16, torch.bfloat16)
        assert state["values"].dtype == values
        cut, after = memory(x[:, :70])
        rest, _ = memory(x[:, 70:], after)  # reads the keys that the first call read
        torch.testing.assert_close(torch.cat([cut, rest], 1), y, rtol=0.02, atol=0.02)


def test_a_capacity_holds_that_many_tokens_and_says_so():
    memory, grown, x = make(capacity=7), make(), noise(1, 7, D)
    size = states.num_bytes(memory.init_state(1))
    y, state = memory(x)
    assert states.num_bytes(state) == size
    torch.testing.assert_close(y, grown(x)[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="raise capacity, or use gated_deltanet"):
        memory(noise(1, 1, D), state)


def test_mistakes_are_named():
    for options, words in (
        ({"rule": "delt"}, "did you mean 'delta'"),
        ({"max_step": 2.5}, "at most 2"),
        ({"max_step": 0.0}, "above 0"),
        ({"rule": "hebbian", "max_step": 0.5}, "leave it out"),
        ({"sharpness": 0.0}, "sharpness is 0.0"),
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"conv_size": 1}, "conv_size is 1"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**options)
