"""What is special to the Compressive Transformer: its rows, its reach, what trains f_c."""

import pytest
import torch

import everlong
from everlong import state as states
from everlong.mixers.compressive import Compressive
from everlong.stack import Stack, StackConfig
from everlong.stateful import Trace
from laws.cases import Case, memory_case
from laws.checks import check

SIZES = {"segment_length": 4, "memory_length": 4, "compressed_length": 4, "rate": 2}


def noise(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(name="compressive", seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_heads": 2, **(SIZES if name == "compressive" else {})}
    return everlong.create_memory(name, **{**sizes, **options}).double()


def read_in(memory, x, cuts, trace=None):
    outputs, state = [], None
    for piece in x.split(cuts, 1):
        y, state = memory(piece, state, trace=trace)
        outputs.append(y)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize(
    ("compressed", "rate", "cache"),
    [(5, 1, 11), (0, 2, 6), (0, 1, 6)],
    ids=["c=1", "C=0", "C=0, c=1"],
)
def test_without_squeezing_it_is_transformer_xl_with_the_cache_of_both(compressed, rate, cache):
    options = {"memory_length": 6, "compressed_length": compressed, "rate": rate}
    memory = make(compressor="mean", **options)
    plain = make("transformer_xl", segment_length=4, memory_length=cache)
    plain.load_state_dict(memory.state_dict())
    x = noise(2, 45, 8)
    torch.testing.assert_close(memory(x)[0], plain(x)[0], rtol=1e-10, atol=1e-10)
    y, _ = read_in(memory, x, [3, 10, 1, 1, 17, 13])
    torch.testing.assert_close(y, plain(x)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory_length", [4, 6, 2])  # equal to, above and below the segment's
@pytest.mark.parametrize("compressor", ["mean", "max", "conv"])
def test_rows_are_made_of_what_left_the_memory_in_windows_of_the_stream(compressor, memory_length):
    memory, x, state = (
        make(compressor=compressor, memory_length=memory_length),
        noise(2, 40, 8),
        None,
    )
    for segment in range(10):
        _, state = memory(x[:, 4 * segment : 4 * segment + 4], state)
        gone = max(0, 4 * segment + 4 - memory_length)  # positions that have left
        first, second = x[:, 0:gone:2], x[:, 1:gone:2]
        if compressor == "mean":
            rows = (first + second) / 2
        elif compressor == "max":
            rows = torch.maximum(first, second)
        else:  # a convolution with kernel and stride 2
            kernel = memory.compressor.weight.detach()
            rows = first @ kernel[:, :8].T + second @ kernel[:, 8:].T
        kept = min(4, gone // 2)  # C, or as many as there are
        held = torch.cat([rows.new_zeros(2, 4 - kept, 8), rows[:, gone // 2 - kept :]], 1)
        torch.testing.assert_close(state["compressed"], held, rtol=1e-12, atol=1e-12)


def positions_that_change(memory, place, length):
    """The input positions that change output `place`: each is changed in a row of its own."""
    x = noise(1, length, 8).expand(length + 1, -1, -1).clone()
    x[range(length), range(length)] += 1.0
    with torch.no_grad():
        y = memory(x)[0][:, place]
    return ((y[:-1] - y[-1]).abs().amax(-1) > 1e-13).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("compressor", ["mean", "conv"])
def test_the_first_output_of_a_segment_reaches_the_memory_and_what_was_squeezed(compressor):
    layers = StackConfig(
        8,
        2,
        layers=("compressive",) * 2,
        mixers={"compressive": {**SIZES, "compressor": compressor}},
    )
    torch.manual_seed(0)
    memory = Stack(layers).double()
    reach = 2 * (4 + 2 * 4)  # L (M + c C)
    assert positions_that_change(memory, 32, 40) == list(range(32 - reach, 33))
    assert positions_that_change(memory, 35, 40) == list(range(32 - reach, 36))
    alone = make(compressor=compressor)
    assert positions_that_change(alone, 20, 24) == list(range(20 - 12, 21))


def test_a_compressed_row_counts_as_one_place():
    """What a query reads is one sequence: compressed rows, then the memory, then its segment."""
    memory, x = make(compressor="mean"), noise(1, 14, 8)
    y, _ = memory(x)
    rows = x[:, :8].unflatten(1, (4, 2)).mean(2)  # at position 13: P = 12, memory [8, 12)
    before = torch.cat([rows, x[:, 8:13]], 1)
    wanted = memory.attention(x[:, 13:], before, torch.tensor([[9]]))
    torch.testing.assert_close(y[:, 13:], wanted, rtol=1e-12, atol=1e-12)


def attend(memory, h, rows):
    """softmax(h Wq (rows Wk)^T / sqrt(d)) rows Wv, head by head, written once more."""
    q_map, kv_map = memory.attention.query.weight, memory.attention.key_value.weight
    found = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q, k, v = h @ q_map[part].T, rows @ kv_map[:8][part].T, rows @ kv_map[8:][part].T
        found.append((q @ k.mT / 2).softmax(-1) @ v)
    return torch.stack(found, 1)


@pytest.mark.parametrize("memory_length", [4, 8])  # 8: what leaves is not the whole memory
def test_the_loss_compares_attention_to_what_leaves_with_attention_to_its_compression(
    memory_length,
):
    memory, x, trace = make(memory_length=memory_length), noise(3, 19, 8), Trace()
    memory(x, trace=trace)
    found = trace.losses["compression"]
    boundaries = list(range(memory_length + 4, 20, 4))
    assert len(found) == len(boundaries)
    for loss, boundary in zip(found, boundaries, strict=True):
        gone = boundary - memory_length
        old, h = x[:, gone - 4 : gone], x[:, boundary - 4 : boundary]
        squeezed = old.flatten(1).unflatten(1, (2, 16)) @ memory.compressor.weight.T
        wanted = (attend(memory, h, old) - attend(memory, h, squeezed)).square().mean()
        torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-14)


def test_a_memory_that_leaves_in_part_is_compared_in_that_part():
    """M = 6, S = 4: at the boundary 8 only the positions 0 and 1 have left."""
    memory, x, trace = make(memory_length=6), noise(2, 8, 8), Trace()
    memory(x, trace=trace)
    (loss,) = trace.losses["compression"]
    old, h = x[:, :2], x[:, 4:8]
    squeezed = old.flatten(1)[:, None] @ memory.compressor.weight.T
    wanted = (attend(memory, h, old) - attend(memory, h, squeezed)).square().mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-14)


def test_the_loss_does_not_depend_on_calls_or_on_where_other_rows_stand():
    memory, x = make(), noise(2, 30, 8)

    def total(*calls):
        trace, state = Trace(), None
        for piece, mask in calls:
            _, state = memory(piece, state, mask, trace)
        return torch.stack(trace.losses["compression"]).sum()

    whole = total((x, None))
    torch.testing.assert_close(total(*((piece, None) for piece in x.split(7, 1))), whole)
    later = torch.ones(2, 33, dtype=torch.bool)
    later[0, :3] = later[1, -3:] = (
        False  # three positions of padding: before the one, behind the other
    )
    padded = torch.zeros(2, 33, 8, dtype=torch.float64)
    padded[later] = x.flatten(0, 1)
    torch.testing.assert_close(total((padded, later)), whole)
    cut = [(piece, part) for piece, part in zip(padded.split(5, 1), later.split(5, 1), strict=True)]
    torch.testing.assert_close(total(*cut), whole)


def test_rows_that_stand_apart_read_what_they_read_alone():
    memory, x = make(memory_length=6), noise(3, 60, 8)
    starts, outputs, carried = (0, 5, 19), [], []
    for row, start in enumerate(starts):
        carried.append(memory(x[row : row + 1, :start])[1] if start else memory.init_state(1))
        outputs.append(memory(x[row : row + 1, start : start + 30], carried[-1])[0])
    together = torch.stack([x[row, start : start + 30] for row, start in enumerate(starts)])
    y, state = memory(together, states.cat(carried))
    torch.testing.assert_close(y, torch.cat(outputs), rtol=1e-10, atol=1e-10)
    assert state["position"].tolist() == [30, 35, 49]


def test_the_two_losses_share_no_parameter_still_after_three_steps():
    memory = make()
    optimiser = torch.optim.Adam(memory.parameters(), 1e-2)
    state = None
    for step in range(4):
        trace = Trace()
        y, state = memory(noise(2, 12, 8, seed=step), state, trace=trace)
        assert all(p.requires_grad for p in memory.parameters())
        own, task = torch.stack(trace.losses["compression"]).sum(), (y - 1).square().mean()
        reached = []
        for loss in (own, task):
            memory.zero_grad()
            loss.backward(retain_graph=True)
            reached.append({n for n, p in memory.named_parameters() if p.grad is not None})
            assert all(p.grad.any() for p in memory.parameters() if p.grad is not None)
        assert reached[0] == {"compressor.weight"}
        assert reached[1] == {n for n, _ in memory.named_parameters()} - reached[0]
        memory.zero_grad()
        (own + task).backward()
        optimiser.step()
        state = states.detach(state)


def test_the_compressor_learns():
    memory = make()
    optimiser = torch.optim.Adam(memory.parameters(), 3e-2)
    x, found = noise(2, 20, 8), []
    for _ in range(25):
        trace = Trace()
        memory(x, trace=trace)
        loss = torch.stack(trace.losses["compression"]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("compressor", ["mean", "max"])
def test_pooling_has_nothing_to_train(compressor):
    memory, trace = make(compressor=compressor), Trace()
    memory(noise(2, 30, 8), trace=trace)
    assert not trace.losses
    assert not any("compressor" in name for name, _ in memory.named_parameters())


@pytest.mark.parametrize("compressor", ["mean", "max", "conv"])
def test_nothing_but_the_compressor_is_cut_off(compressor, tmp_path, monkeypatch):
    """Law 1, the gradient, of inputs and of every parameter but f_c's, here a buffer."""
    monkeypatch.setattr(Compressive, "stop_gradient", "")
    case = memory_case("compressive", compressor=compressor)

    def frozen(dropout):
        memory = case.make(dropout)
        if compressor == "conv":
            weight = memory.compressor.weight.detach()
            del memory.compressor.weight
            memory.compressor.register_buffer("weight", weight)
        return memory

    check("1 gradient", Case("compressive", frozen, 24), tmp_path)


@pytest.mark.parametrize("law", ["1 any cut", "4 mask"])
def test_pooling_obeys_the_laws(law, tmp_path):
    check(law, memory_case("compressive", compressor="max"), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"segment_length": 6, "rate": 4}, "segment_length must be a positive multiple of rate 4"),
        ({"memory_length": 5}, "memory_length must be a positive multiple"),
        ({"memory_length": 0}, "memory_length"),
        ({"rate": 0}, "rate must be at least 1"),
        ({"compressed_length": -1}, "compressed_length"),
        ({"compressor": "meen"}, "use one of conv, mean, max; did you mean 'mean'"),
        ({"hidden_size": 9, "num_heads": 3}, "even"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)
