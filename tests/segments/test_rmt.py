"""What is special to RMT: who sees memory tokens, how far gradients go, what retrieval adds."""

from functools import partial

import pytest
import torch

import everlong
from everlong.segments.rmt import RMT, RMTConfig
from everlong.stack import Stack, StackConfig
from laws.cases import memory_case
from laws.checks import check

VARIANTS = [{}, {"mask": "paper"}, {"retrieval": 2}, {"retrieval": 2, "mask": "paper"}]
variants = pytest.mark.parametrize("options", VARIANTS, ids=str)


def make(**options):
    torch.manual_seed(0)
    return everlong.create_memory(
        "rmt", **{"size": "small", "hidden_size": 24, "num_heads": 3, **options}
    ).double()


def inputs(length, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 24, generator=generator, dtype=torch.float64)


def with_memory(memory, rows):
    """A fresh state that holds these memory tokens."""
    state = memory.init_state(rows.shape[0])
    return {**state, "segment": {**state["segment"], "memory": rows}}


@pytest.mark.parametrize("law", ["1 any cut", "4 served", "5 form"])
def test_all_options_together_obey(law, tmp_path):
    check(law, memory_case("rmt", **VARIANTS[-1]), tmp_path)


def test_a_segment_is_the_core_on_read_tokens_write():
    memory, x = make(), inputs(4)
    mem = memory.memory.expand(2, -1, -1)
    whole, _ = memory.core(torch.cat([mem, x, mem], 1))
    alone, _ = memory.core(torch.cat([mem, x], 1))
    y, state = memory(x)
    torch.testing.assert_close(y, whole[:, 2:6], atol=1e-12, rtol=0)
    torch.testing.assert_close(y, alone[:, 2:], atol=1e-12, rtol=0)  # the write block is unseen
    torch.testing.assert_close(state["segment"]["memory"], whole[:, 6:], atol=1e-12, rtol=0)
    second = inputs(4, seed=1)
    read = torch.cat([whole[:, 6:], second], 1)
    wanted, _ = memory.core(read)
    torch.testing.assert_close(memory(second, state)[0], wanted[:, 2:], atol=1e-12, rtol=0)


def _paper_mask(slots, tokens):
    """Bool [n, n], read from the paper: who (row) sees whom (column)."""
    length = 2 * slots + tokens
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:slots, :slots] = True
    mask[-slots:] = True
    return mask


def test_the_paper_s_mask_is_one_pass_under_a_full_mask(monkeypatch):
    """Against one call of the core whose attention is given the mask of all m + S + m positions."""
    memory, x = make(mask="paper"), inputs(4)
    y, state = memory(x)
    mem = memory.memory.expand(2, -1, -1)
    attention = memory.core.blocks[0].mixer.attention
    attend = type(attention).attend
    mask = _paper_mask(2, 4)[None]
    monkeypatch.setattr(
        attention, "attend", lambda q, k, v, _, causal=False: attend(attention, q, k, v, mask)
    )
    whole, _ = memory.core(torch.cat([mem, x, mem], 1))
    torch.testing.assert_close(y, whole[:, 2:6], atol=1e-12, rtol=0)
    torch.testing.assert_close(state["segment"]["memory"], whole[:, 6:], atol=1e-12, rtol=0)


@variants
def test_who_sees_whom(options):
    """A token reaches the tokens from it on and every row that is written; the memory reaches all;
    with the causal mask a memory token sees those before it, with the paper's all of its block."""
    memory = make(**options)
    x = inputs(4, batch=1).requires_grad_()
    start = inputs(2, batch=1, seed=1).requires_grad_()
    y, state = memory(x, with_memory(memory, start))
    written = state["segment"]["memory"]
    for t in range(4):
        by_x, by_start = torch.autograd.grad(y[:, t].sum(), [x, start], retain_graph=True)
        reached = by_x.any(-1)[0]
        assert reached[: t + 1].all()
        assert not reached[t + 1 :].any()
        assert by_start.any(-1).all()
    for row in range(2):
        by_x, by_start = torch.autograd.grad(written[:, row].sum(), [x, start], retain_graph=True)
        assert by_x.any(-1).all()
        assert by_start.any(-1).all()


def _keep(seen: list, _module: torch.nn.Module, args: tuple) -> None:
    seen.append(args[0])


def test_a_row_of_the_read_block_sees_those_before_it_or_all():
    """One layer cannot tell: with two, the first token sees what row 0 saw of row 1."""
    found = {}
    for mask in ("causal", "paper"):
        core = Stack(StackConfig(24, 3, ("attention",) * 2, capacity=8))
        memory = make(mask=mask, core=core)
        seen = []
        core.get_submodule("blocks.1.mixer").register_forward_pre_hook(partial(_keep, seen))
        start = inputs(2, batch=1, seed=1).requires_grad_()
        memory(inputs(1, batch=1), with_memory(memory, start))
        (gradient,) = torch.autograd.grad(seen[0][:, 0].sum(), start)
        found[mask] = bool(gradient[:, 1].any())
    assert found == {"causal": False, "paper": True}


@variants
def test_gradient_reaches_the_first_memory_through_eight_segments_unless_it_is_cut(options):
    memory, x = make(**options), inputs(9 * 4, batch=1)
    start = inputs(2, batch=1, seed=1).requires_grad_()
    for cut in (False, True):
        state = with_memory(memory, start)
        for segment in x.split(4, 1):
            state = everlong.state.detach(state) if cut and state["position"].any() else state
            y, state = memory(segment, state)
        loss = y.sum()
        (gradient,) = torch.autograd.grad(loss, start, allow_unused=True)
        assert (gradient is None) if cut else bool(gradient.any())


def test_only_the_memory_crosses_a_boundary():
    memory, x = make(), inputs(8)
    _, state = memory(x[:, :4])
    fresh = memory.init_state(2)
    for path, leaf in everlong.state.flatten(state["layers"]).items():
        assert torch.equal(leaf, everlong.state.flatten(fresh["layers"])[path])
    assert list(state["segment"]) == ["memory"]


def test_retrieval_reads_what_the_past_holds_and_forgets_the_oldest():
    memory = make(retrieval=2)
    _, state = memory(inputs(4))
    kept = [memory.init_state(2)["segment"]["memory"]]
    for seed in range(1, 5):
        kept.append(state["segment"]["memory"])
        count = state["position"] // 4
        places = [(int(count[0]) - age) % 2 for age in (1, 2)[: int(count[0])]]
        for age, place in enumerate(places):
            held = state["segment"]["past"][:, place]
            assert torch.equal(held, kept[-2 - age])
        _, state = memory(inputs(4, seed=seed), state)


def test_retrieval_weighs_the_past_and_the_present_and_nothing_else():
    memory, trace = make(retrieval=2), everlong.Trace()
    _, state = memory(inputs(12), trace=trace)
    sums = torch.ones(2, 2, dtype=torch.float64)
    for segment, weights in enumerate(trace.records["recall"]):
        assert weights.shape == (2, 2, 6)  # memory tokens, and rows of 2 past memories and this
        torch.testing.assert_close(weights.sum(-1), sums)
        assert bool((weights[..., 2 * segment : 4] == 0).all())  # places not written yet
        assert bool((weights[..., : 2 * min(segment, 2)] > 0).all())
    x = inputs(4, seed=7)
    y, _ = memory(x, state)
    state["segment"]["past"] = state["segment"]["past"].flip(1)
    torch.testing.assert_close(memory(x, state)[0], y)  # in any order
    state["segment"]["past"] = state["segment"]["past"] + inputs(2, batch=1)[:, :, None]
    assert not torch.allclose(memory(x, state)[0], y)


def test_memory_tokens_stay_float32_in_a_bfloat16_model_and_under_autocast():
    memory = make(retrieval=2).float()
    x = inputs(9).float()
    exact, _ = memory(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = memory(x)
    assert {leaf.dtype for leaf in state["segment"].values()} == {torch.float32}
    assert (y.float() - exact).abs().max() < 0.1
    y, state = memory.bfloat16()(x.bfloat16())
    assert {leaf.dtype for leaf in state["segment"].values()} == {torch.float32}
    assert y.dtype == torch.bfloat16


def test_it_wraps_any_causal_mixers_and_tells_them_their_length():
    stack = StackConfig(24, 3, ("sliding_attention", "attention"))
    memory = make(core=RMT.make_core(RMTConfig(24, 3, 4, 2), stack))
    y, state = memory(inputs(11))
    assert state["layers"][1]["keys"].shape[1] == 4 + 2 * 2
    torch.testing.assert_close(memory(inputs(11)[:, :7])[0], y[:, :7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots must be at least 1"),
        ({"mask": "full"}, "use one of causal, paper"),
        ({"retrieval": -1}, "retrieval must be 0 or more"),
        ({"num_heads": 5}, "multiple of 2 \\* num_heads"),
        ({"num_slot": 3}, "did you mean 'num_slots'"),
    ],
)
def test_bad_options_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_paper_s_mask_refuses_a_core_that_only_looks_back():
    core = Stack(StackConfig(24, 3, ("attention", "sliding_attention"), capacity=8))
    with pytest.raises(ValueError, match='use mask="causal"'):
        make(mask="paper", core=core)
    bare = everlong.create_memory("sliding_attention", size="small", hidden_size=24, num_heads=3)
    with pytest.raises(ValueError, match='use mask="causal"'):
        make(mask="paper", core=bare)
