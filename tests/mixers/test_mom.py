"""What is special to MoM: who is written and who waits, its parallel form, routing and balance."""

import statistics
import time

import pytest
import torch

import everlong
from everlong import state as states
from everlong.mixers.mom import RULES
from everlong.stateful import Trace


def make(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_heads": 2, "key_size": 4, "value_size": 3}
    memory = everlong.create_memory("mom", **{**sizes, **options}).double()
    with torch.no_grad():
        memory.router.weight.mul_(4)  # clear choices
    return memory


def noise(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_equal(got, wanted, tolerance=1e-9):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def routed(memory, x, **given):
    trace = Trace()
    memory(x, trace=trace, **given)
    return trace.records["routed"][0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 2, 70])
def test_groups_equal_the_loop(rule, length):
    memory = make(rule=rule, num_memories=7)
    x, start = noise(3, length, 12).requires_grad_(), memory(noise(3, 5, 12, seed=2))[1]
    wanted = [x, *states.leaves(start), *memory.parameters()]
    found = []
    for form in (memory, memory.reference):
        y, state = form(x, start)
        leaves = states.leaves(state)
        loss = sum((leaf * leaf.cos()).sum() for leaf in (y, *leaves))
        grads = torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True)
        found.append([y, *leaves, *grads])
    for got, exact in zip(*found, strict=True):
        assert_equal(got, exact)
    counts = torch.stack([row.flatten().bincount(minlength=7) for row in routed(memory, x)])
    assert length == 70 or (counts == 0).any()  # some memories stay empty


def test_groups_of_very_unlike_lengths_equal_the_loop():
    """All tokens to one memory but a few: it is read in several pieces."""
    memory = make(num_memories=8, top_k=1)
    x = noise(2, 200, 12)
    x[..., 0] = torch.where(torch.arange(200) % 9 == 0, 0, 3)
    with torch.no_grad():
        memory.router.weight[2, 0] = 100.0
    counts = routed(memory, x).flatten().bincount(minlength=8)
    assert counts[2] > 340
    assert (counts > 0).sum() > 4
    assert_equal(memory(x), memory.reference(x))


@torch.no_grad()
def plain(name, memory, **options):
    """The registered layer `name` with the weights of a MoM that has one memory."""
    sizes = {"hidden_size": 12, "num_heads": 2, "key_size": 4, "value_size": 3, **options}
    layer = everlong.create_memory(name, **sizes).double()
    own = memory.write[0].mT.split(memory.parts)
    layer.qkv.weight.copy_(torch.cat([memory.query.weight, own[0]]))
    for part in ("norm", "gate", "out"):
        getattr(layer, part).load_state_dict(getattr(memory, part).state_dict())
    if name == "gla":
        layer.forget[0].weight.copy_(own[2])
        layer.forget[1].load_state_dict(memory.forget.map.state_dict())
    else:
        layer.beta.weight.copy_(own[1])
        layer.rate.weight.copy_(own[2])
        layer.forget.load_state_dict(memory.forget.state_dict())
        weights = memory.query_convolution.weight, memory.convolution.weight
        layer.convolution.weight.copy_(torch.cat(weights))
    return layer


@pytest.mark.parametrize(("rule", "conv_size"), [("gated_deltanet", 4), ("gla", 0)])
def test_one_memory_is_the_plain_layer(rule, conv_size):
    memory = make(num_memories=1, top_k=1, shared=False, rule=rule, conv_size=conv_size)
    layer, x = plain(rule, memory), noise(2, 100, 12)
    y, state = memory(x)
    wanted, held = layer(x)
    assert_equal(y, wanted, 1e-12)
    assert_equal(state["memory"][:, 0], held["memory"], 1e-12)


def test_all_tokens_to_one_of_several_memories_is_the_plain_layer():
    memory = make(top_k=1, shared=False)
    with torch.no_grad():
        memory.router.weight.zero_()  # ties: to the first
    layer, x = plain("gated_deltanet", memory), noise(2, 100, 12)
    y, state = memory(x)
    wanted, held = layer(x)
    assert_equal(y, wanted, 1e-12)
    assert_equal(state["memory"][:, 0], held["memory"], 1e-12)
    assert not state["memory"][:, 1:].any()
    assert not state["tail"][:, 1:].any()


def test_ties_go_to_the_lowest_index():
    memory = make(num_memories=9, top_k=3)
    with torch.no_grad():
        memory.router.weight.fill_(1.0)
        memory.router.weight[4] = 2.0
    x = noise(1, 40, 12).round()  # sums are exact
    total = x.sum(-1)[0]
    chosen = routed(memory, x)[0]
    assert (chosen[total > 0] == torch.tensor([4, 0, 1])).all()
    assert (chosen[total <= 0] == torch.tensor([0, 1, 2])).all()
    assert (total > 0).any()
    assert (total < 0).any()


@pytest.mark.parametrize("rule", RULES)
def test_a_memory_that_is_not_chosen_waits_bit_for_bit(rule):
    memory = make(rule=rule, num_memories=5)
    _, before = memory(noise(2, 30, 12))
    for length in (1, 2):
        x = noise(2, length, 12, seed=4)
        _, after = memory(x, before)
        chosen = routed(memory, x, state=before)
        for row in range(2):
            sent = set(chosen[row].flatten().tolist())
            assert len(sent) < 5
            for name in ("memory", "tail"):
                for e in range(5):
                    same = torch.equal(after[name][row, e], before[name][row, e])
                    assert same == (e not in sent), (name, row, e)
        assert not torch.equal(after["shared"], before["shared"])


@pytest.mark.parametrize("rule", ["linear_attention", "retnet", "gla"])
def test_equal_memories_that_all_get_everything_are_one(rule):
    several = make(rule=rule, num_memories=3, top_k=3, shared=False)
    one = make(rule=rule, num_memories=1, top_k=1, shared=False)
    with torch.no_grad():
        several.router.weight.zero_()
        several.write[:] = several.write[:1]
        weights = {**several.state_dict(), "write": several.write[:1]}
    one.load_state_dict({**weights, "router.weight": one.router.weight})
    x = noise(2, 80, 12)
    assert_equal(several(x)[0], one(x)[0], 1e-12)


def test_in_training_no_row_and_no_past_position_sees_another():
    memory = make(num_memories=3, top_k=1).train()
    x = noise(3, 40, 12)
    y, _ = memory(x)
    for row, j in ((0, 0), (1, 17), (2, 38), (1, 39)):
        other = x.clone()
        other[row, j] = noise(12, seed=9)
        moved = (memory(other)[0] - y).abs().amax(-1) > 1e-12
        assert moved[row, j]
        assert not moved[row, :j].any()
        assert not moved[torch.arange(3) != row].any()


def test_a_stream_split_anywhere_is_one_call():
    memory = make(num_memories=3)
    x = noise(2, 20, 12)
    y, state = memory(x)
    for cut in (1, 2, 3, 7, 12, 18, 19):
        first, carried = memory(x[:, :cut])
        outputs = [first]
        for t in range(cut, 20):  # prefill, then decode
            out, carried = memory(x[:, t : t + 1], carried)
            outputs.append(out)
        assert_equal(torch.cat(outputs, 1), y)
        assert_equal(carried, state)


def test_gradients_pass_the_router_weights():
    memory = make(hidden_size=4, num_heads=1, key_size=2, value_size=2, num_memories=3)
    x = noise(1, 4, 4)

    def read(weight):
        return torch.func.functional_call(memory, {"router.weight": weight}, (x,))[0]

    chosen = routed(memory, x)
    assert torch.autograd.gradcheck(read, memory.router.weight.detach().requires_grad_())
    assert torch.equal(routed(memory, x), chosen)
    memory(x)[0].square().sum().backward()
    assert memory.router.weight.grad.any()


def balance(memory, x, **given):
    trace = Trace(recording=False)
    memory(x, trace=trace, **given)
    assert not trace.records
    (loss,) = trace.losses["balance"]
    return loss


@torch.no_grad()
def test_balance_is_k_where_memories_are_used_alike_and_more_where_not():
    memory, x = make(balance=1.0), noise(2, 100, 12) + 0.3
    found = []
    for seed in range(20):
        memory.router.weight.copy_(noise(4, 12, seed=seed))
        found.append(balance(memory, x))
    assert torch.stack(found).mean() > 2.1
    memory.router.weight.copy_(make().router.weight)
    half = make(balance=0.5)
    assert_equal(2 * balance(half, x), balance(memory, x))
    memory.router.weight.zero_()
    assert_equal(balance(memory, x), torch.tensor(2.0).double())
    off = Trace()
    make(balance=0.0)(x, trace=off)
    assert not off.losses


def test_balance_counts_real_positions_alone():
    memory, x = make(), noise(2, 9, 12)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3:], mask[1] = False, False
    spoilt = torch.where(mask[..., None], x, torch.nan)
    assert_equal(balance(memory, spoilt, mask=mask), balance(memory, x[:1, :3]), 1e-12)
    assert (routed(memory, spoilt, mask=mask)[1] == -1).all()
    assert not balance(memory, x, mask=torch.zeros_like(mask)).any()


def test_balance_raises_the_logits_of_memories_that_are_not_used():
    memory = make(top_k=1)
    x = noise(2, 50, 12)
    x[..., 0] = 1
    with torch.no_grad():
        memory.router.weight[:, 0] = torch.tensor([3.0, -1, -1, -1])
        memory.router.weight[:, 1:] *= 0.01
    assert (routed(memory, x) == 0).all()
    balance(memory, x).backward()
    assert memory.router.weight.grad[0, 0] > 0
    assert (memory.router.weight.grad[1:, 0] < 0).all()


@pytest.mark.parametrize("rule", ["gated_deltanet", "gla"])
def test_the_state_is_one_more_than_the_memories(rule):
    for count in (2, 6):
        state = make(num_memories=count, rule=rule).init_state(3)
        base = 3 * 2 * 4 * 3 * 8
        held = states.num_bytes({name: state[name] for name in ("memory", "shared")})
        assert held == (count + 1) * base
    alone = make(shared=False, conv_size=0, num_memories=6).init_state(3)
    assert set(alone) == {"memory"}
    assert states.num_bytes(alone) == 6 * base


def test_a_bfloat16_model_keeps_its_matrices_in_float32():
    memory = make().bfloat16()
    _, state = memory(noise(1, 5, 12).bfloat16())
    kinds = {name: leaf.dtype for name, leaf in state.items()}
    assert kinds["memory"] == kinds["shared"] == torch.float32
    assert kinds["tail"] == torch.bfloat16


@pytest.mark.benchmark
def test_16_memories_cost_as_much_as_4():
    """Two of either are written: at T = 2,048 within 1.3 times, forward and backward."""
    memories = {
        count: everlong.create_memory("mom", hidden_size=128, num_heads=4, num_memories=count)
        for count in (4, 16)
    }
    x, times = torch.randn(1, 2048, 128), {4: [], 16: []}
    for _ in range(9):
        for count, memory in memories.items():
            start = time.process_time()
            memory(x)[0].square().sum().backward()
            times[count].append(time.process_time() - start)
    medians = {count: statistics.median(found[1:]) for count, found in times.items()}
    assert medians[16] < 1.3 * medians[4], medians


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 5}, "top_k 5 is more than num_memories 4"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"num_memories": 0}, "num_memories must be at least 1"),
        ({"conv_size": 1}, "conv_size is 1"),
        ({"rule": "gated_delta"}, "did you mean 'gated_deltanet'"),
        ({"balance": -0.1}, "balance is -0.1"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        make(**options)
    assert "\n" not in str(caught.value)
