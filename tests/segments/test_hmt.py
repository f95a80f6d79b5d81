"""What is special to HMT: the recall, the queue of embeddings, how far gradients go, what leaks."""

import pytest
import torch

import everlong
from everlong.segments.recall import Recall
from laws.cases import memory_case
from laws.checks import check

PUBLISHED = {"protocol": "published"}
WIDTH, SEGMENT = 24, 4


def make(name="hmt", **options):
    torch.manual_seed(0)
    sizes = {"size": "small", "hidden_size": WIDTH, "num_heads": 3}
    sizes |= {"sensory": 0} if name == "hmt" else {}
    return everlong.create_memory(name, **{**sizes, **options}).double()


def inputs(length, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


def core_on(memory, *parts):
    """The core's output on these parts [B, n, D] in a row, from a fresh state."""
    return memory.core(torch.cat(parts, 1))[0]


def segment_by_segment(memory, x, trace=None):
    """The states behind every segment of x [B, n * S, D]."""
    found, state = [], None
    for segment in x.split(SEGMENT, 1):
        _, state = memory(segment, state, trace=trace)
        found.append(state["segment"])
    return found


@pytest.mark.parametrize("options", [{}, PUBLISHED, {"sensory": 2}], ids=str)
def test_the_first_segment_is_the_core_on_its_learned_embedding(options):
    memory, x = make(**options), inputs(SEGMENT)
    y, state = memory(x)
    start = memory.memory.expand(2, 1, -1)
    whole = core_on(memory, start, x, start)
    torch.testing.assert_close(y, whole[:, 1:-1], atol=1e-12, rtol=0)
    torch.testing.assert_close(state["segment"]["cache"][:, 0], whole[:, -1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("sensory", [0, 2])
def test_two_segments_by_hand(sensory):
    """[P ; sensory ; X ; P] with P the only embedding there is, whatever the summary says."""
    memory, x = make(sensory=sensory), inputs(2 * SEGMENT)
    y, state = memory(x)
    _, first = memory(x[:, :SEGMENT])
    only = first["segment"]["cache"][:, :1]
    torch.testing.assert_close(first["segment"]["recalled"], only[:, 0], atol=1e-12, rtol=0)
    again = x[:, SEGMENT - sensory : SEGMENT]
    whole = core_on(memory, only, again, x[:, SEGMENT:], only)
    torch.testing.assert_close(y[:, SEGMENT:], whole[:, 1 + sensory : -1], atol=1e-12, rtol=0)
    written = state["segment"]["cache"][:, 1]
    torch.testing.assert_close(written, whole[:, -1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{"summary": 0.5}, {"summary": 1.0}, {"sensory": 3}], ids=str)
def test_the_causal_summary_reads_the_end_of_the_last_segment(options):
    memory, x = make(**options), inputs(3 * SEGMENT)
    _, state = memory(x)
    j = memory.config.summary_length
    prompt = memory.prompt.expand(2, 1, -1)
    summary = core_on(memory, prompt, x[:, -j:], prompt)[:, -1]
    scores = torch.einsum(
        "bd,bnd->bn",
        memory.recall.query(summary),
        memory.recall.key(state["segment"]["cache"]),
    )
    wanted = (scores / WIDTH**0.5).softmax(-1)[:, None] @ state["segment"]["cache"]
    torch.testing.assert_close(state["segment"]["recalled"], wanted[:, 0], atol=1e-12, rtol=0)


def test_the_published_summary_reads_the_beginning_of_its_segment():
    memory, x = make(**PUBLISHED), inputs(3 * SEGMENT)
    _, state = memory(x[:, : 2 * SEGMENT])
    _, after = memory(x[:, 2 * SEGMENT : 2 * SEGMENT + 3], state)
    prompt = memory.prompt.expand(2, 1, -1)
    summary = core_on(memory, prompt, x[:, 2 * SEGMENT : 2 * SEGMENT + 2], prompt)[:, -1]
    count = torch.tensor([2, 2])
    wanted, _ = memory.recall(summary, state["segment"]["cache"], count)
    torch.testing.assert_close(after["segment"]["recalled"], wanted, atol=1e-12, rtol=0)
    # a call of one token has no more to summarise; the rest of the segment keeps what it picked
    _, one = memory(x[:, 2 * SEGMENT : 2 * SEGMENT + 1], state)
    assert not torch.allclose(one["segment"]["recalled"], wanted)
    _, later = memory(x[:, 2 * SEGMENT + 1 : 2 * SEGMENT + 3], one)
    assert torch.equal(later["segment"]["recalled"], one["segment"]["recalled"])


def test_recall_is_a_convex_mix_in_any_order():
    torch.manual_seed(0)
    recall = Recall(WIDTH, 7).double()
    summary, past, count = inputs(1)[:, 0], inputs(5, seed=1), torch.tensor([3, 9])
    found, weights = recall(summary, past, count)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, dtype=torch.float64))
    assert bool((weights[0, 3:] == 0).all())
    assert bool((weights[1] > 0).all())
    torch.testing.assert_close(found, torch.einsum("bn,bnd->bd", weights, past))
    order = torch.tensor([3, 1, 4, 0, 2])
    other, permuted = recall(summary, past[:, order], torch.tensor([9, 9]))
    torch.testing.assert_close(other[1], found[1])
    torch.testing.assert_close(permuted[1], weights[1, order])
    torch.nn.init.zeros_(recall.query.weight)
    torch.testing.assert_close(recall(summary, past, count)[0][1], past[1].mean(0))


@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=str)
def test_the_cache_is_a_queue_of_the_last_embeddings(options):
    memory = make(**options)
    found = segment_by_segment(memory, inputs(8 * SEGMENT))
    newest = [segment["cache"][:, n % 3] for n, segment in enumerate(found)]
    for n, segment in enumerate(found):
        for age in range(3):
            if age <= n:
                assert torch.equal(segment["cache"][:, (n - age) % 3], newest[n - age])
            else:
                assert not segment["cache"][:, (n - age) % 3].any()
    assert len({everlong.state.num_bytes(segment) for segment in found}) == 1


def test_gradient_reaches_every_remembered_segment_hardly_weaker():
    """Every embedding in the cache is one step from the segment that recalls it."""
    memory, x = make(recall_size=20), inputs(18 * SEGMENT).requires_grad_()
    y, _ = memory(x)
    (gradient,) = torch.autograd.grad(y[:, -SEGMENT:].square().sum(), x)
    by_segment = gradient.unflatten(1, (-1, SEGMENT)).square().sum((0, 2, 3)).sqrt()
    assert float(by_segment.min() / by_segment[-2]) > 0.5


@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=str)
def test_prompt_and_recall_learn_once_two_segments_are_kept(options):
    memory = make(**options)
    learned = [memory.prompt, memory.recall.query.weight, memory.recall.key.weight]
    for segments, learns in ((2, False), (3, True)):
        y, _ = memory(inputs(segments * SEGMENT))
        loss = y[:, -SEGMENT:].square().sum()
        found = torch.autograd.grad(loss, learned, allow_unused=True)
        for gradient in found:
            assert (gradient is not None and float(gradient.norm()) > 1e-9) is learns


def _leak(memory, swap):
    """Whether the first output of the third segment moves with its second token, and whether it
    does when all embeddings are equal (`swap`), so that it does not matter which is picked."""
    x = inputs(3 * SEGMENT)
    _, state = memory(x[:, : 2 * SEGMENT])
    if swap:
        segment = dict(state["segment"])
        segment["cache"] = segment["cache"][:, :1].expand(-1, 3, -1)
        state = {**state, "segment": segment}
    last = x[:, 2 * SEGMENT :].clone().requires_grad_()
    y, _ = memory(last, state)
    (gradient,) = torch.autograd.grad(y[:, 0].sum(), last)
    return float(gradient[:, 1:].abs().max())


def test_the_causal_protocol_does_not_look_ahead_and_the_published_only_through_the_recall():
    assert _leak(make(), swap=False) == 0
    published = make(**PUBLISHED)
    assert _leak(published, swap=False) > 1e-6
    assert _leak(published, swap=True) < 1e-15
    x = inputs(3 * SEGMENT).requires_grad_()
    y, _ = published(x)
    (gradient,) = torch.autograd.grad(y[:, 2 * SEGMENT].sum(), x)
    assert not gradient[:, 2 * SEGMENT + 2 :].any()  # behind the half that is summarised
    assert [make(**options).config.looks_ahead for options in ({}, PUBLISHED)] == [False, True]


def test_without_recall_it_is_rmt_with_one_memory_token_bit_for_bit():
    rmt, hmt = make("rmt", num_slots=1), make(recall=False)
    hmt.load_state_dict(rmt.state_dict())
    x = inputs(3 * SEGMENT + 1)
    (y, state), (other, other_state) = rmt(x), hmt(x)
    assert torch.equal(y, other)
    wanted = state["segment"]["memory"][:, 0]
    assert torch.equal(other_state["segment"]["recalled"], wanted)
    sensory = make(recall=False, sensory=2)
    sensory.load_state_dict(rmt.state_dict())
    again, _ = sensory(x)
    torch.testing.assert_close(again[:, :SEGMENT], y[:, :SEGMENT])
    assert not torch.allclose(again[:, SEGMENT:], y[:, SEGMENT:])


def test_the_trace_says_what_was_recalled_by_rows_that_did():
    memory, trace = make(), everlong.Trace()
    lengths = torch.tensor([3 * SEGMENT, 3 * SEGMENT - 2])
    mask = torch.arange(3 * SEGMENT) < lengths[:, None]
    memory(inputs(3 * SEGMENT), mask=mask, trace=trace)
    sums = torch.stack([weights.sum(-1) for weights in trace.records["recall"]])
    assert torch.allclose(sums, torch.tensor([[1.0, 1], [1, 1], [1, 0]]).double())


@pytest.mark.parametrize("law", ["4 row alone", "4 served"])
def test_with_sensory_tokens_it_obeys(law, tmp_path):
    check(law, memory_case("hmt", sensory=3), tmp_path)


@pytest.mark.parametrize("law", ["4 row alone", "5 form"])
def test_the_published_protocol_obeys_what_it_is_not_exempt_from(law, tmp_path):
    check(law, memory_case("hmt", sensory=1, **PUBLISHED), tmp_path)


def test_sensory_tokens_and_tail_do_not_mind_the_cut():
    memory, x = make(sensory=3), inputs(4 * SEGMENT + 1)
    y, state = memory(x)
    for length in (1, 3, SEGMENT + 1):
        outputs, last = [], None
        for piece in x.split(length, 1):
            out, last = memory(piece, last)
            outputs.append(out)
        torch.testing.assert_close(torch.cat(outputs, 1), y)
        torch.testing.assert_close(last, state)


def test_the_published_protocol_may_be_cut_at_boundaries():
    memory, x = make(**PUBLISHED), inputs(5 * SEGMENT)
    y, state = memory(x)
    first, middle = memory(x[:, : 2 * SEGMENT])
    rest, last = memory(x[:, 2 * SEGMENT :], middle)
    torch.testing.assert_close(torch.cat([first, rest], 1), y)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall_size": 0}, "recall_size must be at least 1"),
        ({"recall_width": 0}, "recall_width must be at least 1"),
        ({"sensory": 5}, "from 0 to segment_length 4"),
        ({"sensory": -1}, "from 0 to segment_length 4"),
        ({"summary": 0.0}, "recall=False"),
        ({"summary": 1.5}, "at most 1"),
        ({"protocol": "paper"}, "use one of causal, published"),
        ({"num_slots": 2}, "hmt has no option 'num_slots'"),
    ],
)
def test_bad_options_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
