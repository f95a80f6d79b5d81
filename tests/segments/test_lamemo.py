"""What is special to LaMemo: exact merging, key windows that tile the stream, Transformer-XL."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import everlong
from everlong.ops.lookahead import attend, look_ahead, look_back, merge
from everlong.ops.relative import sinusoid
from everlong.segments import lamemo
from everlong.segments.lamemo import LaMemo, LaMemoConfig
from everlong.stack import Stack, StackConfig
from laws.cases import Case
from laws.checks import check

WIDTH, HEADS = 24, 3


def make(layers=2, segment=4, memory=6, width=WIDTH, heads=HEADS):
    """Every parameter moved away from where it starts, float64."""
    torch.manual_seed(0)
    config = LaMemoConfig(width, heads, segment, memory)
    core = LaMemo.make_core(config, StackConfig(width, heads, ("attention",) * layers))
    model = LaMemo(config, core).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(length, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


def project(attention, x):
    return attention.qkv(x).unflatten(-1, (3, attention.content.shape[0], -1)).unbind(-3)


def all_scores(attention, q, k, offset=0):
    """Scores [B, H, T, K] of queries that stand at offset + t, from explicit distances."""
    away = torch.arange(q.shape[1])[:, None] + offset - torch.arange(k.shape[1])
    r = attention.distance(sinusoid(away.abs().flatten(), q.shape[-1] * q.shape[-2], q.dtype))
    r = r.unflatten(-1, q.shape[-2:]).unflatten(0, away.shape)
    content = torch.einsum("bthd,bkhd->bhtk", q + attention.content, k)
    ahead = getattr(attention, "ahead", attention.causal)
    bias = torch.where((away >= 0)[..., None, None], attention.causal, ahead)
    distance = torch.einsum("btkhd,tkhd->bhtk", q[:, :, None] + bias, r)
    return (content + distance) * q.shape[-1] ** -0.5, away


def softmax_over(scores, visible, v):
    """Context [B, T, H, d] and log_sum [B, T, H]; rows that see nothing give 0 and -inf."""
    scores = scores.masked_fill(~visible, float("-inf"))
    context = scores.softmax(-1).nan_to_num() @ v.transpose(1, 2)
    return context.transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def naive(model, x):
    """The card of the method word for word: whole segments, explicit distances, last layer too.

    Returns outputs, and after each segment's update the results (C, s) of its memory by layer.
    """
    size, length = model.config.segment_length, model.config.memory_length
    blocks, outputs, history = model.core.blocks, [], []
    past = [None] * len(blocks)
    for start in range(0, x.shape[1], size):
        held = min(start, length)
        z = x[:, start - held : start + size]
        seen = []
        for i, block in enumerate(blocks):
            attention = block.mixer
            q, k, v = project(attention, block.mixer_norm(z))
            scores, away = all_scores(attention, q, k)
            context, log_sum = softmax_over(scores, away >= 0, v)
            key = torch.arange(z.shape[1])
            if held:
                window = (away < 0) & (key > held - size) & (key <= held)
                new, more = softmax_over(scores, window, v)
                old, less = past[i]
                total = (less.exp() + more.exp()[:, :held])[..., None]
                new = less.exp()[..., None] * old + more.exp()[:, :held, :, None] * new[:, :held]
                context = torch.cat([new / total, context[:, held:]], 1)
                log_sum = torch.cat([total[..., 0].log(), log_sum[:, held:]], 1)
            seen.append((context[:, :held], log_sum[:, :held]))
            past[i] = (context[:, -length:], log_sum[:, -length:])
            z = z + attention.out(context.flatten(2))
            z = z + block.feed_forward(block.feed_norm(z))
        outputs.append(model.core.norm(z[:, held:]))
        history.append(seen)
    return torch.cat(outputs, 1), history


def transformer_xl(model, x):
    """The same layers with a cache of hidden states: what LaMemo is without looking ahead."""
    size, length = model.config.segment_length, model.config.memory_length
    caches, outputs = [x[:, :0]] * len(model.core.blocks), []
    for piece in x.split(size, 1):
        for i, block in enumerate(model.core.blocks):
            both = torch.cat([caches[i], piece], 1)
            held, caches[i] = caches[i].shape[1], both[:, -length:]
            q, k, v = project(block.mixer, block.mixer_norm(both))
            scores, away = all_scores(block.mixer, q[:, held:], k, held)
            context, _ = softmax_over(scores, away >= 0, v)
            piece = piece + block.mixer.out(context.flatten(2))
            piece = piece + block.feed_forward(block.feed_norm(piece))
        outputs.append(model.core.norm(piece))
    return torch.cat(outputs, 1)


SIZES = [(4, 6), (4, 4), (4, 3), (3, 11), (1, 5), (5, 1)]  # N and M


@pytest.mark.parametrize(("segment", "memory"), SIZES)
def test_outputs_and_gradients_are_those_of_explicit_distances(segment, memory):
    model = make(layers=3, segment=segment, memory=memory)
    x = inputs(4 * segment + 2).requires_grad_()
    found = []
    for y in (model(x)[0], naive(model, x)[0]):
        weights = torch.cos(torch.arange(y.numel())).view_as(y)
        grads = torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])
        found.append([y, *grads])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("segment", "memory"), [size for size in SIZES if size[0] > 1])
def test_every_layers_results_are_those_of_explicit_distances(segment, memory):
    model, x = make(layers=3, segment=segment, memory=memory), inputs(4 * segment + 1)
    _, state = model(x)
    for layer, (context, log_sum) in zip(
        state["layers"][:-1], naive(model, x)[1][-1], strict=False
    ):
        held = context.shape[1]
        torch.testing.assert_close(layer["past"]["context"][:, -held:], context)
        torch.testing.assert_close(layer["past"]["log_sum"][:, -held:], log_sum)


@pytest.mark.parametrize("segments", [1, 2, 5])
def test_first_layer_is_one_softmax_over_all_that_was_seen(segments):
    model, x = make(), inputs(4 * segments + 1)
    _, state = model(x)
    block = model.core.blocks[0]
    q, k, v = project(block.mixer, block.mixer_norm(x))
    scores, away = all_scores(block.mixer, q, k)
    born = torch.arange(x.shape[1]) // 4 * 4  # of each position: where its segment begins
    left = torch.arange(x.shape[1]) >= (born - 6)[:, None]
    context, log_sum = softmax_over(scores, left | (away < 0), v)
    held, now = min(6, 4 * segments), 4 * segments
    past = state["layers"][0]["past"]
    wanted = context[:, now - held : now], log_sum[:, now - held : now]
    for got, want in zip((past["context"], past["log_sum"]), wanted, strict=True):
        assert (got[:, -held:] - want).abs().max() < 1e-10
        assert not got[:, :-held].any(), "unused places hold zero"


def test_without_looking_ahead_it_is_transformer_xl(monkeypatch):
    model, x = make(layers=3), inputs(19)
    wanted = transformer_xl(model, x)
    assert (model(x)[0] - wanted).abs().max() > 1e-3
    monkeypatch.setattr(lamemo, "merge", lambda old, new: old)
    assert (model(x)[0] - wanted).abs().max() < 1e-10


def test_only_the_first_token_of_a_segment_reaches_the_memory():
    model, x = make(layers=3), inputs(8)
    _, state = model(x)
    for place in range(4):
        changed = inputs(4, seed=2)
        other = changed.clone()
        other[:, place] += 1.0
        (a, left), (b, right) = model(changed, state), model(other, state)
        assert torch.equal(a[:, :place], b[:, :place])
        # what the memory found is in the results of the positions that stay
        same = [
            torch.equal(one["past"]["context"][:, :2], two["past"]["context"][:, :2])
            for one, two in zip(left["layers"][:-1], right["layers"][:-1], strict=True)
        ]
        assert same == [place > 0] * 2


@pytest.mark.parametrize(("segment", "memory"), [(4, 6), (4, 4), (3, 9), (5, 3), (2, 4)])
def test_key_windows_tile_the_stream(segment, memory):
    """With all scores 0, exp(s) C sums the values seen, as often as they were: values are unit
    vectors, one a position."""
    model = make(segment=segment, memory=memory, heads=1)
    attention, x = model.core.blocks[0].mixer, torch.eye(WIDTH, dtype=torch.float64)[None]
    with torch.no_grad():
        model.core.blocks[0].mixer_norm.weight.fill_(WIDTH**-0.5)  # unit vectors stay so
        attention.qkv.weight.zero_()[2 * WIDTH :] = torch.eye(WIDTH)
        for bias in (attention.content, attention.causal, attention.ahead):
            bias.zero_()
    state = None
    for now in range(WIDTH):
        _, state = model(x[:, now : now + 1], state)
        if now % segment:
            continue
        held, past = min(now, memory), state["layers"][0]["past"]
        counts = (past["log_sum"].exp()[..., None] * past["context"])[0, :, 0]
        for back in range(1, held + 1):
            position = now - back
            first = max(0, position // segment * segment - memory)
            wanted = torch.zeros(WIDTH, dtype=torch.float64)
            wanted[first : now + 1] = 1
            torch.testing.assert_close(counts[-back], wanted, rtol=1e-4, atol=1e-4)


def test_merging_is_one_softmax_in_any_order_and_does_not_overflow():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, 3, 5, 9, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 9, 3, 4, generator=generator, dtype=torch.float64)
    one = torch.ones((), dtype=torch.bool)
    for raised in (0.0, 1000.0):
        scores[..., 2:5] += raised
        whole = attend(scores, one, values)
        parts = [attend(scores[..., a:b], one, values[:, a:b]) for a, b in ((0, 2), (2, 5), (5, 9))]
        for i, j, k in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            for got, wanted in zip(merge(parts[i], merge(parts[j], parts[k])), whole, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", [[2, 2], [3, 3], [0, 3]])
def test_scores_by_distance_reach_their_keys(start):
    """Score = distance, all values 0: log_sum tells which distances were used."""
    start, queries, keys = torch.tensor(start), 3, 6
    by_distance = torch.arange(keys - 1, -1, -1).double().expand(2, 1, queries, keys)
    values = torch.zeros(2, keys, 1, 1, dtype=torch.float64)
    _, got = look_back(torch.zeros_like(by_distance), by_distance, values, start, None)
    for row, query in ((row, query) for row in range(2) for query in range(queries)):
        seen = torch.arange(start[row] + query + 1).double()
        torch.testing.assert_close(got[row, query, 0], seen.logsumexp(0))

    by_distance = torch.arange(5, -1, -1).double().expand(2, 1, 5, 6)
    for window in range(1, 6):
        content, values = torch.zeros(2, 1, 5, window).double(), torch.zeros(2, window, 1, 1)
        _, got = look_ahead(content, by_distance, values.double())
        for query in range(5):
            seen = torch.arange(max(1, 6 - window - query), 6 - query).double()
            torch.testing.assert_close(got[0, query, 0], seen.logsumexp(0))


def test_the_memory_is_first_in_first_out():
    model, x = make(), inputs(17)
    for length in range(1, 18):
        _, state = model(x[:, :length])
        done = length // 4 * 4
        held = min(done, 6)
        kept = state["segment"]["embeddings"]
        assert torch.equal(kept[:, 6 - held :], x[:, done - held : done])
        assert not kept[:, : 6 - held].any()
        assert torch.equal(state["segment"]["tokens"][:, : length - done], x[:, done:length])
        used = state["layers"][0]["past"]["log_sum"].ne(0).all(-1).sum(1)
        assert used.tolist() == [held, held]
    names = [sorted(layer) for layer in state["layers"]]
    assert names == [["memory", "past", "present", "tokens"], ["memory", "tokens"]]


def test_a_segment_costs_the_dense_work_of_its_tokens_and_its_memory():
    model, tokens, held = make(layers=3, segment=8, memory=16), 8, 16
    feed = model.core.blocks[0].feed_forward.down.weight.numel()
    square = WIDTH**2
    costs, state = [], None
    for i in range(5):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _, state = model(inputs(8, batch=1, seed=i), state)
        counts = counter.get_flop_counts()["Global"]
        costs.append(sum(n for op, n in counts.items() if op.__name__.startswith(("mm", "addmm"))))
    places = tokens + held
    distances = 3 * places * square
    middle = 2 * places * (4 * square + 3 * feed)
    last = places * 3 * square + tokens * (square + 3 * feed)
    assert costs[2:] == [2 * (distances + middle + last)] * 3
    assert costs[0] == 2 * tokens * 3 * (5 * square + 3 * feed)


def test_looking_ahead_learns_once_there_is_a_memory():
    model = make()
    ahead = model.core.blocks[0].mixer.ahead
    for length, learns in ((4, False), (5, True)):
        y, _ = model(inputs(length))
        (gradient,) = torch.autograd.grad(y.square().sum(), ahead, allow_unused=True)
        assert (gradient is not None and bool(gradient.any())) is learns


def test_gradients_cross_segments_until_the_state_is_detached():
    model, x = make(), inputs(8).requires_grad_()
    for cut in (False, True):
        _, state = model(x[:, :4])
        state = everlong.state.detach(state) if cut else state
        y, _ = model(x[:, 4:], state)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert bool(gradient[:, :4].any()) is not cut
        assert gradient[:, 4:].any()


def test_replay_is_exact_with_dropout_in_three_layers(tmp_path):
    def core(dropout):
        stack = StackConfig(WIDTH, HEADS, ("attention",) * 3, dropout=dropout)
        config = LaMemoConfig(WIDTH, HEADS, 4, 6)
        return LaMemo(config, LaMemo.make_core(config, stack))

    check("6 replay", Case("lamemo, three layers", core, WIDTH), tmp_path)


def test_a_trace_says_what_was_kept():
    model, trace = make(), everlong.Trace()
    model(inputs(10), trace=trace)
    assert [tuple(kept.shape) for kept in trace.records["kept"]] == [(2, 4), (2, 6)]
    assert all(kept.min() > 0 and kept.max() < 1 for kept in trace.records["kept"])


def test_results_stay_float32_in_a_bfloat16_model():
    state = make().bfloat16().init_state(1)
    assert state["layers"][0]["past"]["log_sum"].dtype == torch.float32
    assert state["layers"][0]["memory"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "must be a multiple of num_heads 5"),
        ({"hidden_size": 21}, "must be even"),
        ({"memory_length": 0}, "memory_length must be at least 1"),
        ({"segment_length": 0}, "segment_length must be at least 1"),
        ({"memory_len": 3}, "did you mean 'memory_length'"),
    ],
)
def test_bad_options_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        everlong.create_memory("lamemo", **{"hidden_size": 24, "num_heads": 3, **options})


def test_it_brings_its_own_layers():
    config = LaMemoConfig(WIDTH, HEADS, 4, 6)
    for other in (
        StackConfig(WIDTH, HEADS, ("attention", "sliding_attention")),
        StackConfig(WIDTH, HEADS, mixers={"attention": {"capacity": 4}}),
    ):
        with pytest.raises(ValueError, match="brings its own layers"):
            LaMemo.make_core(config, other)
    stack = StackConfig(WIDTH, HEADS)
    for core in (Stack(stack), LaMemo.make_core(LaMemoConfig(WIDTH, HEADS, 4, 7), stack)):
        with pytest.raises(ValueError, match="brings its own layers"):
            LaMemo(config, core)
