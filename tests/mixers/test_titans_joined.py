"""What is special to the three architectures that join Titans' memory to attention: each equals its
definition, looks at no later token, and sees its persistent tokens for ever."""

import pytest
import torch

import everlong
from everlong import state as states
from everlong.mixers.attention import SelfAttention
from everlong.ops import rotary
from everlong.ops.spans import spans
from laws.cases import memory_case
from laws.checks import check

NAMES = ("titans_mac", "titans_mag", "titans_mal")


def make(name, **options):
    torch.manual_seed(0)
    memory = everlong.create_memory(name, "small", hidden_size=24, num_heads=3, **options).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return memory


def noise(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def seen(attention, x, others, t, first):
    """Query x[:, t] against x[:, first : t + 1], others at their own places, and tokens without a
    place, one head and one score at a time."""
    placed, placeless = others
    zero = torch.zeros(x.shape[0], dtype=torch.long)

    def heads(tokens):
        return attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)

    q, k, v = heads(x)
    turned = rotary.rotate(q, zero)[:, t]
    keys, values = [rotary.rotate(k, zero)[:, first : t + 1]], [v[:, first : t + 1]]
    if placed is not None:
        _, k, v = heads(placed)
        keys.append(rotary.rotate(k, zero)[:, first : t + 1])
        values.append(v[:, first : t + 1])
    scores = torch.einsum("bhd,bshd->bhs", turned, torch.cat(keys, 1))
    if placeless is not None:
        _, k, v = heads(placeless.expand(x.shape[0], -1, -1))
        scores = torch.cat([scores, torch.einsum("bhd,bshd->bhs", q[:, t], k)], -1)
        values.append(v)
    weights = (scores / q.shape[-1] ** 0.5).softmax(-1)
    return attention.out(torch.einsum("bhs,bshd->bhd", weights, torch.cat(values, 1)).flatten(1))


def windowed(attention, x, persistent, window):
    rows = [
        seen(attention, x, (None, persistent), t, max(0, t - window + 1)) for t in range(x.shape[1])
    ]
    return torch.stack(rows, 1)


def gated(memory, y, m):
    def norm(layer, z):
        return z * (z.square().mean(-1, keepdim=True) + layer.eps).rsqrt() * layer.weight

    gate = memory.gate
    return gate.out(norm(gate.gate, y).sigmoid() * norm(gate.value, m))


def mag(memory, x):
    count = memory.config.num_persistent
    persistent = memory.persistent.expand(x.shape[0], -1, -1)
    y = windowed(memory.attention.attention, x, persistent, memory.config.window)
    m, _ = memory.memory(torch.cat([persistent, x], 1))
    return gated(memory, y, m[:, count:])


def mal(memory, x):
    count = memory.config.num_persistent
    m, _ = memory.memory(torch.cat([memory.persistent.expand(x.shape[0], -1, -1), x], 1))
    m = memory.norm(m)
    return windowed(memory.attention.attention, m[:, count:], m[:, :count], memory.config.window)


def mac(memory, x):
    outputs, state = [], memory.memory.init_state(x.shape[0])
    for s in x.split(memory.config.segment_length, 1):
        h = memory.memory.recall(s, state["weights"])
        rows = [seen(memory.attention, s, (h, memory.persistent), t, 0) for t in range(s.shape[1])]
        y = torch.stack(rows, 1)
        m, state = memory.memory(y, state)
        outputs.append(gated(memory, y, m))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(
    ("name", "plain"), [("titans_mac", mac), ("titans_mag", mag), ("titans_mal", mal)]
)
@pytest.mark.parametrize("length", [1, 8, 27, 70])
def test_equals_the_definition_in_values_and_gradients(name, plain, length):
    memory, x = make(name), noise(2, length, 24).requires_grad_()
    found = []
    for y in (memory(x)[0], plain(memory, x)):
        grads = torch.autograd.grad(
            y.cos().sum(), [x, *memory.parameters()], materialize_grads=True
        )
        found.append([y, *grads])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_token_moves_nothing_before_it_and_later_segments_behind_it(name, training):
    memory, x = make(name).train(training), noise(2, 28, 24)
    y, _ = memory(x)
    for j in (0, 3, 7, 8, 12, 20, 27):
        other = x.clone()
        other[:, j] = noise(2, 24, seed=9)
        moved = (memory(other)[0] - y).abs().amax((0, 2))
        assert not (moved[:j] > 1e-12).any()
        assert moved[j] > 1e-6
        assert j == 27 or moved[27] > 1e-12  # through the memory


@pytest.mark.parametrize("name", NAMES)
def test_persistent_tokens_are_seen_for_ever(name):
    """Without a graph through the state, what is left of them is what attention sees."""
    memory = make(name)
    _, state = memory(noise(2, 100, 24))
    state = states.detach(state)
    if name == "titans_mal":
        fresh = memory.init_state(2)["prefix"]
        for held, first in zip(state["prefix"], fresh, strict=True):
            assert torch.equal(held, first)
        wanted = state["prefix"] = tuple(leaf.requires_grad_() for leaf in state["prefix"])
    else:
        wanted = (memory.persistent,)
    y, _ = memory(noise(2, 9, 24, seed=2), state)
    for t in range(9):
        for grad in torch.autograd.grad(y[:, t].sum(), wanted, retain_graph=True):
            assert (grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_state_is_differentiable_in_the_persistent_tokens(name):
    memory = make(name)
    y, _ = memory(noise(1, 1, 24), memory.init_state(1))
    (grad,) = torch.autograd.grad(y.sum(), memory.persistent)
    assert grad.any(1).all()


@pytest.mark.parametrize("law", ["1 any cut", "3 causal", "4 served", "5 form", "7 far"])
@pytest.mark.parametrize("name", NAMES)
def test_without_persistent_tokens_the_laws_hold(name, law, tmp_path):
    case = memory_case(name, num_persistent=0)
    assert case.build().persistent is None
    assert "prefix" not in case.build().init_state(1)
    check(law, case, tmp_path)


def test_mac_reads_the_memory_of_the_segments_start():
    memory, x = make("titans_mac"), noise(2, 40, 24)
    state, starts = memory.init_state(2), []
    for t in range(40):
        starts.append(state["start"])
        at_boundary = state["position"][0] % 8 == 0
        if at_boundary:  # nothing but the memory crosses it
            assert_equal(state["start"], state["memory"]["weights"])
            assert not state["keys"].any()
            assert not state["values"].any()
        _, state = memory(x[:, t : t + 1], state)
        assert not state["keys"][:, (t + 1) % 8 :].any()
    for t in range(40):
        assert_equal(starts[t], starts[t - t % 8], 0.0)
    assert (starts[8][0] - starts[0][0]).abs().max() > 1e-6


def assert_equal(got, wanted, tolerance=1e-12):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_mac_rows_end_their_segments_each_in_its_own_time():
    memory, x = make("titans_mac"), noise(3, 21, 24)
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[0, 2:5], mask[1, 9], mask[2] = False, False, False
    _, state = memory(x, None, mask)
    assert state["position"].tolist() == [18, 20, 0]
    for row in range(2):
        _, alone = memory(x[row : row + 1, mask[row]])
        alone = alone["start"]
        assert_equal(states.select(state["start"], torch.tensor([row])), alone, 1e-9)


def test_spans_end_where_any_row_fills_a_segment():
    found = [*spans(torch.tensor([0, 6]), 9, torch.tensor([9, 3]), 4)]
    assert [(s.start, s.stop) for s in found] == [(0, 2), (2, 4), (4, 8), (8, 9)]
    assert [s.lengths.tolist() for s in found] == [[2, 2], [2, 1], [4, 0], [1, 0]]
    full = [None if s.full is None else s.full.tolist() for s in found]
    assert full == [[False, True], [True, False], [True, False], None]
    whole = [*spans(torch.tensor([3, 3]), 5, None, 4)]
    assert [(s.start, s.stop, s.lengths) for s in whole] == [(0, 1, None), (1, 5, None)]
    assert not [*spans(torch.tensor([1]), 3, torch.tensor([0]), 4)]


@pytest.mark.parametrize("length", [1, 5, 6, 150])
def test_a_prefix_is_as_near_to_every_query_as_itself(length):
    torch.manual_seed(0)
    memory = everlong.create_memory("sliding_attention", hidden_size=24, num_heads=3, window=5)
    memory, x, tokens = memory.double(), noise(2, length, 24), noise(1, 3, 24, seed=2)
    attention = memory.attention
    y, _ = memory(x, prefix=attention.prefix(tokens))
    assert_equal(y, windowed(attention, x, tokens, 5), 1e-9)


def test_attention_over_a_whole_call_takes_a_prefix():
    torch.manual_seed(0)
    attention, x, tokens = SelfAttention(24, 3).double(), noise(2, 6, 24), noise(1, 3, 24, seed=2)
    q, k, v = attention.project(x, torch.zeros(2, dtype=torch.long), wide=True)
    prefix = attention.prefix(tokens)
    causal = attention.attend(q, k, v, None, causal=True, prefix=prefix)
    assert_equal(causal, windowed(attention, x, tokens, 6), 1e-9)
    both = attention.attend(q, k, v, None, prefix=prefix)
    assert_equal(both[:, -1], causal[:, -1])
    assert (both[:, 0] - causal[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("titans_mac", {"segment_length": 6}, "no multiple of the memory's chunk_size 4"),
        ("titans_mac", {"segment_length": 0}, "segment_length must be at least 1"),
        ("titans_mag", {"window": 0}, "window must be at least 1"),
        ("titans_mal", {"window": -1}, "window must be at least 1"),
        ("titans_mag", {"num_persistent": -1}, "num_persistent is -1"),
        ("titans_mal", {"memory": 3}, "memory must be a table of options of titans"),
        ("titans_mac", {"memory": {"chunk_sise": 4}}, "did you mean 'chunk_size'"),
        ("titans_mag", {"memory": {"hidden_size": 8}}, "leave it out"),
        ("titans_mal", {"dropout": 1.0}, "dropout must be"),
        ("titans_mag", {"segment_length": 4}, "no option 'segment_length'"),
    ],
)
def test_impossible_options_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        make(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_made_of_them(name):
    small = {"chunk_size": 4, "expansion": 2}
    config = everlong.EverlongConfig(
        hidden_size=24, num_heads=3, num_layers=2, layers=[name], mixers={name: {"memory": small}}
    )
    loaded = everlong.EverlongConfig.from_dict(config.to_dict())
    assert loaded.mixers[name]["memory"] == small
    model = everlong.EverlongForCausalLM(loaded)
    logits, _ = model.stream(torch.randint(0, 256, (1, 5)))
    assert logits.shape == (1, 5, 259)


def test_a_state_of_another_segment_or_window_is_refused():
    x = noise(2, 9, 24)
    _, state = make("titans_mac", segment_length=8)(x)
    with pytest.raises(ValueError, match="other options"):
        make("titans_mac", segment_length=4)(x, state)
    for name in ("titans_mag", "titans_mal"):
        _, state = make(name, window=5)(x)
        with pytest.raises(ValueError, match="other options"):
            make(name, window=4)(x, state)
