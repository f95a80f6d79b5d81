"""The linear layers against their equations, written once more, position by position."""

import math

import pytest
import torch
import torch.nn.functional as F

import everlong
from everlong import state as states
from everlong.evaluation.cost import growing_bytes
from everlong.mixers import linear
from everlong.training.config import TrainConfig, make_optimizer

H, D = 2, 12
KINDS = {
    "linear_attention": {},
    "retnet": {},
    "gla": {"gate_rank": 3},
    "hgrn": {"layer_index": 1, "num_layers": 3},
    "hgrn2": {"layer_index": 2, "num_layers": 3},
    "deltanet": {},
    "gated_deltanet": {"negative_eigenvalues": True},
    "kda": {},
}


def make(name, **options):
    torch.manual_seed(0)
    options = {**KINDS.get(name, {}), **options}
    memory = everlong.create_memory(name, hidden_size=D, num_heads=H, **options).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return memory


def noise(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def l2(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def turned(x, t):
    """Rotary: the pair (i, i + d/2) of x [..., d] by t / 10000^(2i/d)."""
    d = x.shape[-1]
    pairs = torch.complex(x[..., : d // 2], x[..., d // 2 :])
    angle = t * 10_000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], -1)


def projections(m, x):
    """q, k, v [B, T, H, each], behind the convolution where there is one."""
    qkv = m.qkv(x)
    if m.convolution is not None:
        w = m.convolution.weight
        padded = F.pad(qkv, (0, 0, w.shape[1] - 1, 0))
        qkv = F.silu(sum(padded[:, i : i + x.shape[1]] * w[:, i] for i in range(w.shape[1])))
    k, v = m.sizes
    return (p.unflatten(-1, (H, -1)) for p in qkv.split([H * k, H * k, H * v], -1))


def matrices(q, k, v, g, beta):
    """S = diag(e^g) S, then k^T v, or beta k^T (v - k S); o = q S; all [B, T, H, ...]."""
    state, outputs = torch.zeros(*k.shape[:1], H, k.shape[-1], v.shape[-1]).double(), []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None] * state
        new = v[:, t]
        if beta is not None:
            new = beta[:, t, :, None] * (new - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], new)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def decay(gate, a):
    return -gate.A_log.exp()[:, None] * F.softplus(a + gate.dt_bias).unflatten(-1, (H, -1))


def expected(name, m, x):
    b, t, _ = x.shape
    if name in ("hgrn", "hgrn2"):
        floor = torch.sigmoid(m.forget.floor)
        f = floor + (1 - floor) * torch.sigmoid(m.rate(x))
        if name == "hgrn":
            h, outputs = torch.zeros(b, D).double(), []
            for i in range(t):
                h = f[:, i] * h + (1 - f[:, i]) * F.silu(m.input(x[:, i]))
                outputs.append(h)
            return m.out(rms(torch.stack(outputs, 1), m.norm.weight) * F.silu(m.gate(x))), h
        q, f, v = (p.unflatten(-1, (H, -1)) for p in (F.silu(m.query(x)), f, m.value(x)))
        o, state = matrices(q * m.sizes[0] ** -0.5, 1 - f, v, f.log(), None)
        return m.out(rms(o.flatten(2), m.norm.weight)), state
    q, k, v = projections(m, x)
    g, beta = torch.zeros(b, t, H, 1).double(), None
    if name == "linear_attention":
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scores = torch.einsum("bihk,bjhk->bhij", q, k).tril()
        o = torch.einsum("bhij,bjhv->bihv", scores / scores.sum(-1, keepdim=True), v)
        z = torch.cat([v, torch.ones(b, t, H, 1).double()], -1)
        return m.out(o.flatten(2)), torch.einsum("bthk,bthv->bhkv", k, z)
    if name == "retnet":
        places = torch.arange(t)[:, None, None]
        q, k = turned(q, places), turned(k, places)
        g = g + torch.log(1 - 2.0 ** (-5 - torch.arange(H).double()))[:, None]
    if name == "gla":
        g = torch.log(torch.sigmoid(m.forget(x))).unflatten(-1, (H, -1)) / 16
    if name in ("deltanet", "gated_deltanet", "kda"):
        q, k, beta = l2(q), l2(k), torch.sigmoid(m.beta(x)) * (2 if name[0] == "g" else 1)
    if name in ("gated_deltanet", "kda"):
        g = decay(m.forget, m.rate(x))
    o, state = matrices(q * m.sizes[0] ** -0.5, k, v, g, beta)
    y = rms(o, m.norm.weight).flatten(2)
    if name == "kda":
        y = y * torch.sigmoid(m.low_rank_gate(x))
    elif name != "deltanet":
        y = y * F.silu(m.gate(x))
    return m.out(y), state


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_computes_its_equations(name):
    memory, x = make(name), noise(2, 70, D)
    y, state = memory(x)
    wanted, last = expected(name, memory, x)
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state["memory"], last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", [*KINDS, "mom"])
def test_long_calls_are_read_in_spans(name, ragged, monkeypatch):
    """The same values and gradients, and no piece that is longer."""
    memory, x = make(name), noise(2, 150, D).requires_grad_()
    mask = torch.arange(150) < torch.tensor([[150], [70]]) if ragged else None
    state = states.detach(memory(noise(2, 5, D, seed=2))[1])

    def everything():
        y, after = memory(x, state, mask=mask)
        leaves = [leaf for leaf in states.leaves(after) if leaf.is_floating_point()]
        loss = y.square().sum() + sum(leaf.square().sum() for leaf in leaves)
        given = [x, *(part for part in memory.parameters() if part.requires_grad)]
        return [y, *leaves, *torch.autograd.grad(loss, given, allow_unused=True)]

    whole, seen = everything(), []
    if hasattr(memory, "_span"):
        read = memory._span
        monkeypatch.setattr(linear, "READ", 1)
        monkeypatch.setattr(
            memory, "_span", lambda x, *rest: seen.append(x.shape[1]) or read(x, *rest)
        )
    for found, wanted in zip(everything(), whole, strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert seen == ([64, 64, 22] if name != "hgrn" else [])  # whose scan is flat as it is


def test_the_study_s_linear_attention_is_a_plain_sum_behind_a_norm():
    memory, x = make("linear_attention", feature_map="identity"), noise(2, 70, D)
    q, k, v = projections(memory, x)
    o, last = matrices(q * memory.sizes[0] ** -0.5, k, v, torch.zeros(2, 70, H, 1).double(), None)
    y, state = memory(x)
    torch.testing.assert_close(y, memory.out(rms(o, memory.norm.weight).flatten(2)))
    torch.testing.assert_close(state["memory"], last)


def test_without_a_decay_gated_deltanet_is_deltanet():
    sizes = {"key_size": 5, "value_size": 6, "negative_eigenvalues": False}
    gated, plain, x = make("gated_deltanet", **sizes), make("deltanet", **sizes), noise(2, 40, D)
    plain.load_state_dict(gated.state_dict(), strict=False)
    with torch.no_grad():
        gated.forget.A_log.fill_(-200)
    gated.gate = None
    torch.testing.assert_close(gated(x)[0], plain(x)[0], rtol=1e-12, atol=1e-12)


def test_a_value_written_again_is_all_that_its_key_reads():
    memory = make("deltanet", conv_size=0, key_size=4, value_size=5)
    key, value = noise(1, 1, D, seed=3), noise(1, 1, D, seed=4)
    mixed = torch.cat([key, noise(1, 6, D, seed=5), value], 1)
    memory.strength = lambda x: torch.ones(*x.shape[:2], H, dtype=torch.float64)  # beta = 1
    _, k, v = projections(memory, mixed)
    _, state = memory(mixed)
    held = torch.einsum("bhk,bhkv->bhv", l2(k[:, -1]), state["memory"])
    torch.testing.assert_close(held, v[:, -1], rtol=1e-4, atol=1e-4)  # |k|^2 = 1 - eps / |k|^2


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
def test_a_reflection_adds_no_more_than_the_value_it_writes(name):
    memory = make(name, negative_eigenvalues=True).float()
    memory.strength = lambda x: torch.full((*x.shape[:2], H), 2.0)  # beta, the most there is
    state = {**memory.init_state(1), "memory": 30 * noise(1, H, *memory.sizes, seed=2).float()}
    before = torch.linalg.matrix_norm(state["memory"], 2)
    with torch.no_grad():  # values of 0: the state is turned and reflected, and may only fade
        memory.qkv.weight[2 * H * memory.sizes[0] :] = 0
    y, after = memory(noise(1, 4096, D).float(), state)
    assert y.isfinite().all()
    assert (torch.linalg.matrix_norm(after["memory"], 2) <= 1.001 * before).all()


def test_floors_rise_with_the_layers_of_the_whole_stack():
    config = everlong.EverlongConfig(
        hidden_size=16, num_heads=2, num_layers=6, layers=["hgrn", "hgrn2", "attention"]
    )
    blocks = everlong.EverlongForCausalLM(config).body.core.blocks
    floors = [getattr(getattr(block.mixer, "forget", None), "floor", None) for block in blocks]
    assert floors[0] is None
    for index in (1, 3, 4):
        torch.testing.assert_close(torch.sigmoid(floors[index]), torch.full((16,), index / 6))
    assert floors[2] is floors[5] is None  # attention


@pytest.mark.parametrize("name", KINDS)
def test_nothing_that_sets_a_decay_is_decayed_by_the_optimiser(name):
    memory = make(name)
    decayed, *_ = make_optimizer(memory, TrainConfig(segment_length=8)).param_groups
    ids = {id(parameter) for parameter in decayed["params"]}
    names = {key for key, p in memory.named_parameters() if id(p) in ids}
    assert not {key for key in names if "A_log" in key or "dt_bias" in key or "floor" in key}
    assert "out.weight" in names


def test_decays_start_near_1():
    x = noise(4, 50, D).float()
    for name in ("gla", "gated_deltanet", "kda"):
        torch.manual_seed(0)
        memory = everlong.create_memory(name, hidden_size=D, num_heads=H)
        g = memory.decay(x)
        assert g.max() <= 0
        assert g.median() > math.log(0.5)


def test_retnet_s_rates_are_fixed_and_exact():
    memory = make("retnet")
    assert not any("decay" in name for name, _ in memory.named_parameters())
    rates = memory.decay(noise(1, 1, D)).exp()[0, 0]
    assert rates.tolist() == pytest.approx([1 - 1 / 32, 1 - 1 / 64], abs=1e-15)


def test_only_the_attention_layers_of_a_hybrid_grow():
    config = everlong.EverlongConfig(
        hidden_size=16, num_heads=2, num_layers=8, layers=["gated_deltanet*3", "attention"]
    )
    model = everlong.EverlongForCausalLM(config)
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    kept = set()
    for length in (1, 10, 40):
        _, state = model.stream(ids[:, :length])
        grown = growing_bytes(model, state)
        assert grown == 2 * (2 * length * 16 * 4 + 8)  # two layers: keys, values and a clock
        kept.add(states.num_bytes(state) - grown)
    assert len(kept) == 1


def test_mistakes_are_named():
    for name, options, words in (
        ("deltanet", {"conv_size": 1}, "conv_size is 1"),
        ("gla", {"gate_rank": 0}, "gate_rank"),
        ("gla", {"key_size": 0}, "key_size"),
        ("retnet", {"key_size": 3}, "even key_size"),
        ("hgrn", {"layer_index": 3, "num_layers": 3}, "layer_index 3"),
        ("linear_attention", {"feature_map": "eluu"}, "did you mean 'elu'"),
        ("deltanet", {"num_heads": 13}, "too small"),
    ):
        with pytest.raises(ValueError, match=words):
            everlong.create_memory(name, **{"hidden_size": 12, "num_heads": 2, **options})


def test_a_model_counts_its_layers_itself():
    with pytest.raises(ValueError, match="leave them out"):
        everlong.EverlongConfig(layers=["hgrn"], mixers={"hgrn": {"layer_index": 1}})
