"""What is special to Memformer: unit slots, forgetting, roles of its options, its errors."""

import pytest
import torch

import everlong
from everlong.segments.memformer import MemformerConfig, SlotWriter
from everlong.stack import Stack, StackConfig


def make(**options):
    torch.manual_seed(0)
    return everlong.create_memory(
        "memformer", size="small", hidden_size=24, num_heads=3, **options
    ).double()


@pytest.mark.parametrize("options", [{}, {"gate": True}, {"temperature": 1.0}])
def test_every_slot_is_a_unit_row_after_every_write(options):
    memory = make(**options)
    state = memory.init_state(2)
    bias = memory.writer.bias
    start = bias / bias.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(state["segment"]["slots"], start.expand(2, -1, -1))
    for _ in range(5):
        before = state["segment"]["slots"]
        _, state = memory(torch.randn(2, 4, 24, dtype=torch.float64), state)
        slots = state["segment"]["slots"]
        assert (slots.norm(dim=-1) - 1).abs().max() < 1e-6
        assert not torch.allclose(slots, before)


def test_a_segment_of_padding_without_bias_leaves_the_slots():
    writer = SlotWriter(MemformerConfig(24, 3, num_slots=3)).double()
    slots = writer.fresh(2)
    torch.nn.init.zeros_(writer.bias)
    hidden = torch.randn(2, 4, 24, dtype=torch.float64)
    after = writer(slots, hidden, torch.zeros(2, 4, dtype=torch.bool))
    torch.testing.assert_close(after, slots, atol=1e-6, rtol=0)


def test_the_gate_closed_keeps_the_slot_but_for_forgetting():
    memory = make(gate=True)
    last = memory.writer.gate[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, -40.0)
    slots = memory.init_state(1)["segment"]["slots"]
    _, state = memory(torch.randn(1, 4, 24, dtype=torch.float64))
    torch.testing.assert_close(state["segment"]["slots"], slots, atol=1e-9, rtol=0)


def test_slots_stay_float32_in_a_bfloat16_model_and_under_autocast():
    memory = everlong.create_memory("memformer", size="small", hidden_size=24, num_heads=3)
    x = torch.randn(2, 9, 24)
    exact, exact_state = memory(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = memory(x)
    assert state["segment"]["slots"].dtype == torch.float32
    assert (state["segment"]["slots"] - exact_state["segment"]["slots"]).abs().max() < 0.05
    y, state = memory.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert state["segment"]["slots"].dtype == torch.float32
    assert state["segment"]["hidden"].dtype == torch.bfloat16
    assert (y.float() - exact).abs().max() < 0.2


def test_writing_does_not_depend_on_autocast():
    writer = SlotWriter(MemformerConfig(24, 3, num_slots=3))
    slots, hidden = writer.fresh(2), torch.randn(2, 4, 24)
    exact = writer(slots, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(writer(slots, hidden), exact)


def test_only_the_slots_cross_a_boundary():
    """With the slots put back to M_0, a finished segment leaves nothing behind."""
    memory = make()
    x = torch.randn(1, 8, 24, dtype=torch.float64)
    _, state = memory(x[:, :4])
    fresh = memory.init_state(1)
    state["segment"]["slots"] = fresh["segment"]["slots"]
    alone, _ = memory(x[:, 4:])
    carried, _ = memory(x[:, 4:], state)
    torch.testing.assert_close(carried, alone, atol=1e-12, rtol=0)


def test_carry_core_lets_a_bounded_core_see_across_segments():
    wiped = make(carry_core=False)
    carried = make(carry_core=True)
    assert type(carried.core.blocks[0].mixer).__name__ == "SlidingAttention"
    for memory, crosses in ((wiped, False), (carried, True)):
        torch.nn.init.zeros_(memory.core.blocks[0].reader.out.weight)  # slots tell nothing
        x = torch.randn(1, 8, 24, dtype=torch.float64, requires_grad=True)
        y, _ = memory(x)
        (gradient,) = torch.autograd.grad(y[:, 4:].sum(), x)
        assert bool(gradient[:, :4].any()) is crosses


def test_it_wraps_any_stack_of_mixers():
    config = MemformerConfig(24, 3, segment_length=4, num_slots=3)
    layers = ("sliding_attention", "attention")
    core = Stack(
        StackConfig(24, 3, layers, {"sliding_attention": {"window": 2}}, capacity=4),
        type(make()).reader(config),
    )
    memory = everlong.create_memory(
        "memformer", hidden_size=24, num_heads=3, segment_length=4, num_slots=3, core=core
    )
    _, state = memory(torch.randn(2, 11, 24))
    assert len(state["layers"]) == 2


def test_trace_records_what_was_kept_and_read_and_changes_nothing():
    memory, x = make().eval(), torch.randn(2, 9, 24, dtype=torch.float64)
    trace = everlong.Trace()
    plain, _ = memory(x)
    traced, _ = memory(x, trace=trace)
    assert torch.equal(plain, traced)
    assert [tuple(kept.shape) for kept in trace.records["kept"]] == [(2, 3), (2, 3)]
    assert all(kept.min() >= 0 and kept.max() <= 1 for kept in trace.records["kept"])
    torch.testing.assert_close(
        trace.records["read"][0].sum(-1), torch.ones(2, 4, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forgetting": 0.0}, "a fresh slot is v / |v|"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"num_slots": 0}, "num_slots must be at least 1"),
        ({"num_slot": 3}, "did you mean 'num_slots'"),
        ({"encoder_layers": 1}, "put it in a model's"),
        ({"num_heads": 5}, "multiple of 2 \\* num_heads"),
    ],
)
def test_bad_options_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        everlong.create_memory("memformer", **{"hidden_size": 24, "num_heads": 3, **options})


def test_a_core_that_cannot_read_is_refused():
    core = everlong.create_memory("attention", hidden_size=24, num_heads=3, capacity=4)
    with pytest.raises(ValueError, match="its run takes memory="):
        everlong.create_memory("memformer", size="small", hidden_size=24, num_heads=3, core=core)
