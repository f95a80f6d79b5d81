"""The encoder-decoder: the stream is teacher forcing, its state is constant, its cost is linear."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from everlong import state as states
from everlong.models.config import EverlongConfig
from everlong.models.decoder import build_body
from everlong.training.horizon import Horizon
from everlong.training.replay import ReplayOptions, replay

S = 4


def make(dropout=0.0, encoder_layers=2, **options):
    torch.manual_seed(0)
    segment = {"name": "memformer", "segment_length": S, "num_slots": 3, **options}
    config = EverlongConfig(
        hidden_size=24,
        num_heads=3,
        num_layers=2,
        dropout=dropout,
        segment={**segment, "encoder_layers": encoder_layers},
    )
    return build_body(config).double()


def ids(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, length), generator=generator)


def teacher_forcing(body, tokens):
    """Segment by segment, each decoded in one go from the encoding of the one before it."""
    rows = tokens.shape[0]
    slots = body.writer.fresh(rows)
    bos = torch.full((rows, 1), body.bos_token_id)
    encoding = body.encode(bos, slots)
    hidden = []
    for start in range(0, tokens.shape[1], S):
        segment = tokens[:, start : start + S]
        inputs = body.embed(torch.cat([bos, segment[:, :-1]], 1))
        fresh = body.decoder.init_state(rows)
        hidden.append(body.decoder(inputs, fresh, memory=(encoding, None))[0])
        encoding, slots = (
            body.encode(segment, slots),
            body.writer(slots, body.encode(segment, slots)),
        )
    return torch.cat(hidden, 1), slots


@pytest.mark.parametrize("cut", [1, 3, 4, 20])
def test_reading_step_by_step_equals_teacher_forcing(cut):
    body, tokens = make().eval(), ids(2, 20)
    expected, slots = teacher_forcing(body, tokens)
    state, outputs = None, []
    for start in range(0, 20, cut):
        y, state = body(tokens[:, start : start + cut], state)
        outputs.append(y)
    # the output at token i predicts token i + 1, which teacher forcing predicts at its place
    torch.testing.assert_close(torch.cat(outputs, 1)[:, :-1], expected[:, 1:], atol=1e-10, rtol=0)
    torch.testing.assert_close(state["segment"]["slots"], slots, atol=1e-10, rtol=0)


def test_padding_on_the_right_changes_neither_outputs_nor_memory():
    body, tokens = make().eval(), ids(2, 11)
    y, state = body(tokens)
    padded = torch.cat([tokens, ids(2, 6, seed=1)], 1)
    mask = torch.arange(17).expand(2, -1) < 11
    z, padded_state = body(padded, mask=mask)
    torch.testing.assert_close(z[:, :11], y, atol=1e-12, rtol=0)
    assert not z[:, 11:].any()
    for mine, other in zip(states.leaves(state), states.leaves(padded_state), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_advance_gives_the_state_of_a_whole_call(start):
    body, tokens = make(dropout=0.2).train(), ids(2, 14)
    _, state = body(tokens[:, :start]) if start else (None, body.init_state(2))
    end = start + S - start % S
    torch.manual_seed(3)
    _, expected = body(tokens[:, start:end], state)
    torch.manual_seed(3)
    mine = body.advance(tokens[:, start:end], state)
    for a, b in zip(states.leaves(mine), states.leaves(expected), strict=True):
        assert torch.equal(a, b), "with dropout on, the skipped decoder must not shift the draws"


def segments_of(tokens):
    return list(tokens.split(S, 1))


def test_replay_equals_back_propagation_through_time_with_dropout():
    body, tokens = make(dropout=0.1).train(), ids(2, 6 * S)

    def step(segment, state):
        hidden, state = body(segment, state)
        return hidden.square().mean(), state

    gradients = []
    methods = [
        Horizon("full"),
        Horizon("replay"),
        Horizon(
            "replay", options=ReplayOptions(advance=lambda x, s: body.advance(x, s), check=True)
        ),
    ]
    for horizon in methods:
        body.zero_grad()
        torch.manual_seed(5)
        horizon(step, segments_of(tokens), body.init_state(2))
        gradients.append([p.grad.clone() for p in body.parameters()])
    for other in gradients[1:]:
        for mine, theirs in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)


def test_a_horizon_of_one_gives_the_writer_exactly_nothing_from_later_losses():
    body, tokens = make().train(), ids(2, 4 * S)

    def step(segment, state):
        hidden, state = body(segment, state)
        return hidden[:, :-1].square().mean(), state  # the last output already reads the new write

    for truncate, reaches in ((1, False), (None, True)):
        body.zero_grad(set_to_none=True)
        state = states.detach(body.init_state(2))
        replay(step, segments_of(tokens), state, options=ReplayOptions(truncate=truncate))
        gradient = body.writer.value.weight.grad
        assert (gradient is not None and bool(gradient.any())) is reaches


def test_bytes_of_state_are_constant_and_flops_per_token_are_flat():
    body = make().eval()
    with torch.no_grad():
        state, sizes = body.init_state(1), set()
        for start in range(3):  # tests/laws reads 1,000 segments
            _, state = body(ids(1, 10 * S + start, seed=start), state)
            sizes.add(states.num_bytes(state))
    assert len(sizes) == 1

    def flops(model, length):  # only the plain attention's matrix products are counted on CPUs
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
            model(ids(1, length))
        return counter.get_total_flops() / length

    # a fresh state costs an encoding of bos: leave it behind
    per_token = [(2 * flops(body, 2 * n) - flops(body, n)) for n in (16 * S, 64 * S)]
    assert per_token[1] == pytest.approx(per_token[0], rel=1e-6)
    vanilla = build_body(EverlongConfig(hidden_size=24, num_heads=3, num_layers=2)).double()
    attention = [flops(vanilla, n) for n in (1024, 2048)]
    assert attention[1] > 1.4 * attention[0]


def test_advance_has_the_checks_of_a_call():
    body, state = make(), make().init_state(2)
    with pytest.raises(ValueError, match="the state holds 2 rows and x 1"):
        body.advance(ids(1, S), state)
    with pytest.raises(ValueError, match="mask must be"):
        body.advance(ids(2, S), state, torch.ones(2, S - 1))
    with pytest.raises(ValueError, match="give ids, not embeddings"):
        body.advance(torch.randn(2, S, 24, dtype=torch.float64), state)


def test_embeddings_are_refused_in_one_line():
    with pytest.raises(ValueError, match="give ids, not embeddings"):
        make()(torch.randn(1, 4, 24, dtype=torch.float64))
