"""What is special to Transformer-XL: its scores, its windows, how far it reaches."""

import pytest
import torch

import everlong
from everlong.ops.relative import sinusoid
from everlong.stack import Stack, StackConfig
from laws.cases import memory_case
from laws.checks import check


def noise(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_heads": 2, "segment_length": 4, "memory_length": 6}
    memory = everlong.create_memory("transformer_xl", **{**sizes, **options})
    with torch.no_grad():
        for parameter in memory.parameters():  # u and v as large as the rest
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return memory.to(dtype)


def stack(layers=2, name="transformer_xl", **options):
    torch.manual_seed(0)
    return Stack(StackConfig(8, 2, layers=(name,) * layers, mixers={name: options})).double()


def first_visible(position, segment_length, memory_length, same_length=False):
    if same_length:
        return max(0, position - memory_length + 1)
    return max(0, position // segment_length * segment_length - memory_length)


def pair_by_pair(memory, x):
    """The paper's equations once more, a pair at a time."""
    attention, config = memory.attention, memory.config
    width, heads = config.hidden_size, config.num_heads
    head = width // heads
    q = attention.query(x).unflatten(-1, (heads, head))
    k, v = attention.key_value(x).unflatten(-1, (2, heads, head)).unbind(2)
    outputs = []
    for i in range(x.shape[1]):
        lowest = first_visible(i, config.segment_length, config.memory_length, config.same_length)
        scores = []
        for j in range(lowest, i + 1):
            r = attention.distance(sinusoid(torch.tensor([i - j]), width, torch.float64))
            r = r.view(heads, head)
            content = ((q[:, i] + attention.content_bias[:, 0]) * k[:, j]).sum(-1)
            by_distance = ((q[:, i] + attention.distance_bias[:, 0]) * r).sum(-1)
            scores.append((content + by_distance) / head**0.5)
        weights = torch.stack(scores, -1).softmax(-1)
        found = torch.einsum("bhk,bkhd->bhd", weights, v[:, lowest : i + 1])
        outputs.append(attention.out(found.flatten(1)))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("cuts", [[23], [4, 4, 4, 4, 4, 3], [1, 6, 2, 9, 5]])
def test_the_scores_are_the_papers_pair_by_pair(same_length, cuts):
    """Also with a filled cache, where a bias taken by the query's index alone would be off."""
    memory, x = make(same_length=same_length), noise(2, 23, 8)
    state, outputs = None, []
    for piece in x.split(cuts, 1):
        y, state = memory(piece, state)
        outputs.append(y)
    wanted = pair_by_pair(memory, x)
    torch.testing.assert_close(torch.cat(outputs, 1), wanted, rtol=1e-11, atol=1e-12)


def test_long_calls_are_read_in_blocks_that_change_nothing():
    memory, x = make(memory_length=3, segment_length=5), noise(1, 230, 8)
    torch.testing.assert_close(memory(x)[0], pair_by_pair(memory, x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("segment_length", [1, 3, 6, 24])
def test_with_a_cache_of_everything_segments_are_one_pass(segment_length):
    whole = stack(segment_length=24, memory_length=1)
    parts = stack(segment_length=segment_length, memory_length=24)
    parts.load_state_dict(whole.state_dict())
    x = noise(2, 24, 8)
    torch.testing.assert_close(parts(x)[0], whole(x)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("memory_length", "same"), [(12, 3), (6, 2)])
def test_a_smaller_cache_agrees_until_it_overflows(memory_length, same):
    """Segments of 6: outputs of the first `same` are those of one pass, the next one's are not."""
    whole = stack(segment_length=24, memory_length=1)
    parts = stack(segment_length=6, memory_length=memory_length)
    parts.load_state_dict(whole.state_dict())
    x = noise(2, 24, 8)
    differs = (parts(x)[0] - whole(x)[0]).abs().amax((0, 2)) > 1e-9
    assert not differs[: 6 * same].any()
    assert differs[6 * same : 6 * same + 6].all()


def positions_that_change(memory, place, length):
    """The input positions that change output `place`: each is changed in a row of its own."""
    x = noise(1, length, 8).expand(length + 1, -1, -1).clone()
    x[range(length), range(length)] += 1.0
    with torch.no_grad():
        y = memory(x)[0][:, place]
    differs = (y[:-1] - y[-1]).abs().amax(-1) > 1e-13
    return differs.nonzero()[:, 0].tolist()


def test_the_first_output_of_a_segment_reaches_exactly_layers_times_memory():
    memory = stack(segment_length=6, memory_length=6)
    assert positions_that_change(memory, 18, 24) == list(range(6, 19))
    assert positions_that_change(memory, 23, 24) == list(range(6, 24))  # its segment shares it
    deep = stack(layers=3, segment_length=3, memory_length=6)
    assert positions_that_change(deep, 21, 23) == list(range(3, 22))


def test_same_length_sees_exactly_memory_length_keys():
    memory = make(same_length=True, memory_length=5)
    assert memory.period == 1
    for place in (3, 4, 5, 17):
        seen = list(range(max(0, place - 4), place + 1))
        assert positions_that_change(memory, place, 20) == seen
    assert positions_that_change(make(same_length=True, memory_length=1), 7, 9) == [7]


def test_segments_end_at_multiples_of_stream_positions():
    memory = make(memory_length=4)
    assert positions_that_change(memory, 8, 12) == list(range(4, 9))
    assert positions_that_change(memory, 11, 12) == list(range(4, 12))


def test_steps_are_segments_under_same_length_in_float32():
    memory = make(torch.float32, same_length=True, memory_length=16)
    x, state, outputs = noise(2, 60, 8).float(), None, []
    whole, _ = memory(x)
    for t in range(60):
        y, state = memory(x[:, t : t + 1], state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("truncate", "reached"), [(None, [0, 1, 2]), (2, [2]), (1, [2])])
def test_a_truncated_horizon_is_the_papers_stop_gradient(truncate, reached):
    memory = stack(segment_length=4, memory_length=4)
    segments = [noise(2, 4, 8, seed=s).requires_grad_() for s in range(3)]

    def step(segment, state):
        y, state = memory(segment, state)
        return (y.square().mean() if segment is segments[2] else None), state

    everlong.Horizon("full", truncate=truncate)(step, segments)
    grads = [segment.grad is not None and bool(segment.grad.any()) for segment in segments]
    assert [i for i, grad in enumerate(grads) if grad] == reached


def test_a_row_masked_throughout_is_finite():
    memory = make()
    mask = torch.tensor([[False] * 9, [True] * 9])
    x = noise(2, 9, 8)
    x[0] = float("nan")
    y, state = memory(x, None, mask)
    assert y.isfinite().all()
    assert state["past"].isfinite().all()
    assert state["position"].tolist() == [0, 9]
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in memory.parameters() if p.grad is not None)


@pytest.mark.parametrize("law", ["1 any cut", "1 gradient", "3 causal", "4 mask", "5 bounded"])
def test_same_length_obeys_the_laws(law, tmp_path):
    check(law, memory_case("transformer_xl", same_length=True), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 9, "num_heads": 3}, "even"),
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"segment_length": 0}, "segment_length must be at least 1"),
        ({"memory_length": 0}, "memory_length must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)
