"""What is special to ARMT: the matrices, who reads and writes them, the one stop-gradient."""

import pytest
import torch
from torch import nn

import everlong
from everlong.ops import associative
from everlong.segments.armt import ARMT, ARMTConfig
from everlong.stack import StackConfig, Taps
from everlong.stateful import Stateful

S, M, D = 4, 2, 24
CONFIG = ARMTConfig(D, 3, segment_length=S, num_slots=M, key_size=4, nu=2)


def make(layers: int = 2, seed: int = 0) -> ARMT:
    """Two layers of attention with values that are learned already."""
    torch.manual_seed(seed)
    memory = ARMT(CONFIG, ARMT.make_core(CONFIG, StackConfig(D, 3, ("attention",) * layers)))
    for layer in memory.associations:
        nn.init.normal_(layer.value.weight, std=0.2)
    with torch.no_grad():
        memory.tokens.normal_()
    return memory.double().eval()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_tokens(memory: ARMT, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, memory.tokens.expand(len(x), -1, -1)], 1)


def test_the_first_segment_is_the_core_with_appended_tokens():
    memory, x = make(), draw(2, S, D)
    y, state = memory(x)
    outputs = {}
    taps = Taps(lambda i, x: x, outputs.__setitem__)
    plain, _ = memory.core(with_tokens(memory, x), taps=taps)
    torch.testing.assert_close(y, plain[:, :S], atol=1e-12, rtol=0)
    for i, (held, layer) in enumerate(
        zip(state["segment"]["layers"], memory.associations, strict=True)
    ):
        u = outputs[i][:, S:]
        key = associative.features(layer.key(u), CONFIG.nu)
        b = torch.sigmoid(layer.strength(u).squeeze(-1))
        empty = torch.zeros_like(held["matrix"]), torch.zeros_like(held["norm"])
        matrix, norm = associative.write_reference(*empty, key, layer.value(u), b)
        torch.testing.assert_close(held["matrix"], matrix, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(held["norm"], norm, atol=1e-12, rtol=1e-9)


def test_later_segments_are_enriched_before_every_layer_tokens_and_memory_tokens_alike():
    memory = make()
    _, state = memory(draw(2, S, D))
    x, held = draw(2, S, D, seed=2), state["segment"]["layers"]
    outputs = {}

    def enter(i, h):
        query = associative.features(memory.associations[i].query(h), CONFIG.nu)
        read = torch.einsum("bpd,btp->btd", held[i]["matrix"], query)
        return h + read / (torch.einsum("bp,btp->bt", held[i]["norm"], query) + 1e-5)[..., None]

    joined, _ = memory.core(with_tokens(memory, x), taps=Taps(enter, outputs.__setitem__))
    y, after = memory(x, state)
    torch.testing.assert_close(y, joined[:, :S], atol=1e-10, rtol=0)
    plain, _ = memory.core(x)
    assert (y - plain).abs().max() > 1e-3
    for i, layer in enumerate(memory.associations):
        wanted, _ = layer.write(outputs[i][:, S:], held[i])
        got = after["segment"]["layers"][i]
        torch.testing.assert_close(got["matrix"], wanted["matrix"], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(got["norm"], wanted["norm"], atol=1e-9, rtol=1e-9)


def test_without_values_it_is_the_core_at_every_segment_and_so_it_starts():
    torch.manual_seed(0)
    memory = everlong.create_memory("armt", size="small", hidden_size=D, num_heads=3).double()
    x = draw(2, 5 * S + 1, D)
    y, state = memory(x)
    for start in range(0, x.shape[1], S):
        alone, _ = memory.core(x[:, start : start + S])
        torch.testing.assert_close(y[:, start : start + S], alone, atol=1e-12, rtol=0)
    for held in state["segment"]["layers"]:
        assert not held["matrix"].any()
        assert held["norm"].any()


def test_only_the_matrices_cross_a_boundary():
    memory, x = make(), draw(1, 2 * S, D)
    _, state = memory(x[:, :S])
    carried, _ = memory(x[:, S:], state)
    alone, _ = memory(x[:, S:])
    assert (carried - alone).abs().max() > 1e-3
    state["segment"] = memory.init_state(1)["segment"]
    emptied, _ = memory(x[:, S:], state)
    torch.testing.assert_close(emptied, alone, atol=1e-12, rtol=0)


def test_gradients_reach_the_first_of_eight_segments():
    memory, x = make(), draw(1, 8 * S, D).requires_grad_()
    y, _ = memory(x)
    (gradient,) = torch.autograd.grad(y[:, 7 * S :].square().sum(), x)
    for segment in gradient.split(S, 1):
        assert segment.any()


def test_nothing_but_g_is_held_back_from_the_gradient(monkeypatch):
    """With g as constants, automatic differentiation equals central differences everywhere."""
    memory, x = make(), draw(2, 3 * S + 1, D).requires_grad_()
    found, novelty = [], associative.novelty

    def record(norm, keys):
        found.append(novelty(norm, keys))
        return found[-1]

    def loss():
        y, state = memory(x)
        held = [leaf for layer in state["segment"]["layers"] for leaf in layer.values()]
        parts = [y[:, S:], *held]
        return torch.stack([(part * draw(*part.shape, seed=5)).sum() for part in parts]).sum()

    monkeypatch.setattr(associative, "novelty", record)
    loss()
    constants = list(found)
    assert len(constants) == 6
    assert any(((g > 0) & (g < 1)).any() for g in constants)

    def replayed():
        left = iter(constants)
        monkeypatch.setattr(associative, "novelty", lambda norm, keys: next(left))
        return loss()

    values = {"x": x, **dict(memory.named_parameters())}
    gradients = torch.autograd.grad(replayed(), list(values.values()))
    generator = torch.Generator().manual_seed(6)
    for (name, value), gradient in zip(values.items(), gradients, strict=True):
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        ends = []
        with torch.no_grad():
            original = value.detach().clone()
            for sign in (1, -1):
                value.copy_(original + sign * 1e-6 * direction)
                ends.append(replayed())
            value.copy_(original)
        numeric = (ends[0] - ends[1]) / 2e-6
        exact = (gradient * direction).sum()
        torch.testing.assert_close(
            exact, numeric, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"by {name}: {m}"
        )


def test_the_state_costs_a_matrix_a_layer_however_long_the_stream():
    memory, x = make(), draw(2, 9 * S, D)
    state = memory.init_state(2)
    size = everlong.state.num_bytes(state)
    numbers = CONFIG.num_features * (D + 1)
    assert everlong.state.num_bytes(state["segment"]) == 2 * 2 * 8 * numbers
    for length in (1, S, 9 * S):
        _, after = memory(x[:, :length], state)
        assert everlong.state.num_bytes(after) == size


def test_matrices_stay_float32_in_a_bfloat16_model_and_under_autocast():
    memory, x = make().float(), draw(2, 2 * S + 1, D).float()
    exact, _ = memory(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = memory(x)
    held = state["segment"]["layers"][0]
    assert held["matrix"].dtype == held["norm"].dtype == torch.float32
    assert (y - exact).abs().mean() < 0.05
    y, state = memory.bfloat16()(x.bfloat16())
    held = state["segment"]["layers"][0]
    assert y.dtype == torch.bfloat16
    assert held["matrix"].dtype == held["norm"].dtype == torch.float32
    assert (y.float() - exact).abs().mean() < 0.05


def test_trace_records_what_is_kept_and_changes_nothing():
    memory, x, trace = make(), draw(2, 2 * S + 1, D), everlong.Trace()
    plain, _ = memory(x)
    traced, _ = memory(x, trace=trace)
    assert torch.equal(plain, traced)
    assert [tuple(kept.shape) for kept in trace.records["kept"]] == [(2, 2, M)] * 2
    assert all(kept.min() > 0 and kept.max() < 1 for kept in trace.records["kept"])


class Sums(Stateful):
    """A core of our own: two layers, each adding the running sum of its inputs."""

    num_layers = 2

    def init_state(self, batch_size, *, device=None, dtype=None):
        return tuple(torch.zeros(batch_size, 1, D, dtype=torch.float64) for _ in range(2))

    def run(self, x, state, lengths, trace, taps):
        sums = []
        for i, before in enumerate(state):
            x = taps.enter(i, x)
            if lengths is not None:
                x = x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
            total = before + x.cumsum(1)
            x = x + 0.1 * total
            taps.leave(i, x)
            sums.append(total[:, -1:])
        return x, tuple(sums)


def test_it_needs_no_more_of_a_core_than_taps_and_its_number_of_layers():
    torch.manual_seed(0)
    memory = everlong.create_memory("armt", size="small", hidden_size=D, num_heads=3, core=Sums())
    memory.double()
    for layer in memory.associations:
        nn.init.normal_(layer.value.weight)
    x, mask = draw(2, 3 * S, D), torch.ones(2, 3 * S, dtype=torch.bool)
    mask[0, 1:3] = False  # the rows fill their segments at different places
    y, state = memory(x, mask=mask)
    assert len(state["segment"]["layers"]) == 2
    alone, _ = memory(x[:1, mask[0]])
    torch.testing.assert_close(y[:1, mask[0]], alone, atol=1e-12, rtol=0)


def test_a_core_without_taps_is_refused():
    core = everlong.create_memory("attention", hidden_size=D, num_heads=3, capacity=6)
    with pytest.raises(ValueError, match="its run takes taps="):
        everlong.create_memory("armt", size="small", hidden_size=D, num_heads=3, core=core)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_length": 0}, "segment_length must be at least 1"),
        ({"num_slots": 0}, "num_slots must be at least 1"),
        ({"nu": 0}, "nu must be at least 1"),
        ({"key_size": 3}, "key_size 3 must be above nu = 3"),
        ({"key_sizes": 8}, "did you mean 'key_size'"),
        ({"num_heads": 5}, "multiple of 2 \\* num_heads"),
    ],
)
def test_bad_options_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        everlong.create_memory("armt", **{"hidden_size": D, "num_heads": 3, **options})
