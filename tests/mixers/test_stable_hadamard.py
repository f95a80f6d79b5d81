"""What is special to Stable Hadamard Memory: its draws, its calibration, what C = 1 leaves."""

import pytest
import torch
from torch import nn

import everlong
from everlong.ops.counter import integers
from everlong.stateful import Trace


def make(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_heads": 2, "memory_size": 4}
    return everlong.create_memory("stable_hadamard", **{**sizes, **options}).double()


def noise(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def vectors(memory, x):
    """k, q and v (gate included), written once more from the paper."""
    seen = nn.functional.layer_norm(x, x.shape[-1:], memory.norm.weight, memory.norm.bias)
    k, q = (part(seen).clamp(min=0) for part in (memory.key, memory.query))
    k, q = (part / (1e-5 + part.sum(-1, keepdim=True)) for part in (k, q))
    return k, q, memory.gate(seen).sigmoid() * memory.value(seen)


def test_without_calibration_the_memory_is_the_sum_of_what_was_written():
    memory, x = make(theta="none"), noise(2, 40, 8)
    y, state = memory(x)
    k, q, v = vectors(memory, x)
    total, outputs = torch.zeros(2, 4, 4, dtype=torch.float64), []
    for t in range(40):
        total = total + v[:, t, :, None] * k[:, t, None, :]
        outputs.append(memory.out((total @ q[:, t, :, None])[..., 0]))
    assert torch.equal(state["memory"], total)
    torch.testing.assert_close(y, torch.stack(outputs, 1), rtol=1e-12, atol=1e-12)
    assert not any("calibrate" in name or "theta" in name for name, _ in memory.named_parameters())


def test_the_fixed_row_multiplies_rows_by_theta_and_columns_by_c():
    memory, x = make(theta="fixed"), noise(2, 9, 8)
    with torch.no_grad():
        memory.theta.mul_(10)
    _, state = memory(x)
    k, _, v = vectors(memory, x)
    c = memory.calibrate(memory.norm(x))
    cells = torch.zeros(2, 4, 4, dtype=torch.float64)
    for t in range(9):
        z = torch.einsum("v,bk->bvk", memory.theta[0], c[:, t])
        cells = cells * 2 * torch.sigmoid(2 * z) + torch.einsum("bv,bk->bvk", v[:, t], k[:, t])
    torch.testing.assert_close(state["memory"], cells, rtol=1e-10, atol=1e-12)


def test_keys_and_queries_are_shares():
    k, q, _ = vectors(make(memory_size=32), noise(2, 50, 8))  # wide: no sum is near 0
    for part in (k, q):
        assert (part >= 0).all()
        assert (part.sum(-1) - 1).abs().max() < 1e-4


def test_a_key_of_zeros_writes_nothing_and_a_query_of_zeros_reads_0():
    memory, x = make(theta="none"), noise(1, 3, 8)
    nn.init.zeros_(memory.key.weight)
    assert not memory(x)[1]["memory"].any()
    memory = make()
    nn.init.zeros_(memory.query.weight)
    y, state = memory(x)
    assert state["memory"].all()
    torch.testing.assert_close(y, memory.out.bias.expand_as(y))


def test_every_row_of_the_table_is_drawn_and_learns():
    memory = make()
    memory(noise(1, 3000, 8))[0].square().sum().backward()
    assert memory.theta.grad.any(1).all()
    fixed = make(theta="fixed")
    fixed(noise(1, 3000, 8))[0].square().sum().backward()
    assert fixed.theta.grad[0].any()
    assert not fixed.theta.grad[1:].any()


def test_draws_repeat_with_the_seed_and_differ_between_seeds():
    memory, x = make(), noise(1, 30, 8)
    assert torch.equal(memory(x)[0], memory(x)[0])
    assert torch.equal(memory.train()(x)[0], memory.eval()(x)[0])
    state = memory.init_state(3)
    state["seed"] = torch.tensor([0, 1, 0])
    y, after = memory(x.expand(3, -1, -1), state)
    torch.testing.assert_close(y[0], y[2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y[0], y[1])
    assert torch.equal(after["seed"], state["seed"])
    other = make(seed=1)
    torch.testing.assert_close(other(x)[0][0], y[1], rtol=1e-12, atol=1e-12)


def test_gradients_with_the_draws_held_are_those_of_differences():
    memory = make(hidden_size=4)
    names = [name for name, _ in memory.named_parameters()]

    def read(x, *values):
        y, state = torch.func.functional_call(memory, dict(zip(names, values, strict=True)), (x,))
        return y, state["memory"]

    values = [p.detach().clone().requires_grad_() for p in memory.parameters()]
    assert torch.autograd.gradcheck(read, (noise(1, 5, 4).requires_grad_(), *values))


def log_products(table, rows, c):
    """Sums of log C over time: table [R, M], rows Int [T], c [N, M] or [T, N, M] -> [N, M, M]."""
    total = torch.zeros(())
    for t, row in enumerate(rows.tolist()):
        factors = c if c.dim() == 2 else c[t]
        z = table[row, None, :, None] * factors[:, None, :]
        total = total + nn.functional.logsigmoid(2 * z) + torch.log(torch.tensor(2.0))
    return total


def rows_of(length, table_size):
    """What a layer draws along a stream of seed 1."""
    return integers(torch.tensor([1]), torch.tensor([0]), length, table_size)[0]


def test_random_rows_shrink_the_spread_of_products_and_do_not_explode():
    torch.manual_seed(3)
    table = make(memory_size=24).theta.detach().float()
    drawn = rows_of(200, len(table))
    spans = {}
    for scale in (1.0, 4.0):
        c = scale * noise(64, 24).float()
        for name, rows in (("random", drawn), ("fixed", torch.zeros_like(drawn))):
            found = log_products(table, rows, c).flatten()
            spans[name, scale] = (found.quantile(0.05).item(), found.quantile(0.95).item())
    for scale in (1.0, 4.0):
        low, high = spans["random", scale]
        fixed_low, fixed_high = spans["fixed", scale]
        assert 3 * (high - low) < fixed_high - fixed_low, spans
        assert high < 4, spans
        assert fixed_high > 20, spans


def test_independent_inputs_have_products_of_mean_1():
    table = make(memory_size=24).theta.detach().float()
    c = noise(50, 512, 24).float()
    drawn = rows_of(50, len(table))
    for rows in (drawn, torch.zeros_like(drawn)):
        mean = log_products(table, rows, c).exp().mean()
        assert abs(mean - 1) < 0.1


def test_a_trace_is_told_the_mean_log_calibration():
    memory, x = make(theta="fixed"), noise(2, 6, 8)
    trace = Trace()
    memory(x, trace=trace)
    c = memory.calibrate(memory.norm(x))
    gates = 1 + torch.tanh(memory.theta[0][:, None] * c[..., None, :])
    (record,) = trace.records["log_calibration"]
    torch.testing.assert_close(record, gates.log().mean((-1, -2)).detach())


def test_constant_inputs_grow_without_the_clamp_and_stand_at_it_with_it():
    """One input for ever, as the deep layers of a model nearly see: c is constant, and the largest
    of the products of C grows exponentially unless the columns of the table have mean 0."""
    x = noise(1, 1, 8).float().expand(1, 5000, 8)
    free, bound = (make(memory_size=64, limit=limit).float() for limit in (1e38, 100.0))
    with torch.no_grad():
        assert free(x)[1]["memory"].abs().max() > 1e30
        y, state = bound(x)
        assert state["memory"].abs().max() == 100
        assert y.isfinite().all()


def test_a_deep_model_stays_within_the_limit_on_a_long_stream():
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_heads": 1, "num_layers": 4, "layers": ["stable_hadamard"]}
    config = everlong.EverlongConfig(vocab_size=259, segment=None, **options)
    model, state = everlong.EverlongForCausalLM(config).eval(), None
    ids = torch.randint(256, (1, 1500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, state = model.stream(ids, state)
    assert logits.isfinite().all()
    assert all(layer["memory"].abs().max() <= 100 for layer in state["layers"])


def test_training_on_a_carried_state_does_not_diverge():
    """Twenty steps at the recipe's rate, each on the next segment of one stream."""
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_heads": 1, "num_layers": 4, "layers": ["stable_hadamard"]}
    config = everlong.EverlongConfig(vocab_size=259, segment=None, **options)
    model, state = everlong.EverlongForCausalLM(config), None
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    ids = torch.randint(97, 101, (2, 20 * 64 + 1), generator=torch.Generator().manual_seed(0))
    losses = []
    for at in range(0, 20 * 64, 64):
        logits, state = model.stream(ids[:, at : at + 64], state)
        targets = ids[:, at + 1 : at + 65].flatten()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets)
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm.isfinite()
        optimiser.step()
        state = everlong.state.detach(state)
        losses.append(loss.item())
    assert losses[-1] < 1.6  # of four symbols: ln 4 = 1.39


def test_a_bfloat16_model_keeps_its_matrix_in_float32():
    memory = make().bfloat16()
    _, state = memory(noise(1, 5, 8).bfloat16())
    assert state["memory"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_size": 0}, "memory_size must be at least 1"),
        ({"table_size": 0}, "table_size must be at least 1"),
        ({"theta": "randm"}, "did you mean 'random'"),
        ({"limit": 0.0}, "limit is 0.0"),
        ({"seed": 2**63}, "64 bits"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)
