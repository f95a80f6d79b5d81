"""Refusals that name the cause, the bit check, mixed precision, and any pytree as state."""

import dataclasses
import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

import everlong
from everlong import ReplayOptions
from training.replay_toys import Case, bptt, difference


def run(case, **kwargs):
    return everlong.replay(case.toy, case.segments, case.toy.init_state(), **kwargs)


class Forgetful(nn.Module):
    """Its step depends on how often it ran: a state hidden in an attribute."""

    def __init__(self):
        super().__init__()
        self.weight, self.count = nn.Parameter(torch.ones(3)), 0

    def forward(self, x, state):
        self.count += 1
        memory = {"layers": (state["layers"][0], state["layers"][1] + x + self.count)}
        return (self.weight * memory["layers"][1]).sum(), memory


def test_check_names_the_leaf_and_the_segment():
    state = {"layers": (torch.zeros(3), torch.zeros(3))}
    with pytest.raises(RuntimeError, match=r"replaying segment 1 gave another 'layers\.1'"):
        everlong.replay(Forgetful(), [1.0, 2.0, 3.0], state, options=ReplayOptions(check=True))


@pytest.mark.parametrize("wrong", [float("nan"), -0.0])
def test_check_compares_bits(wrong):
    weight = torch.ones(1, requires_grad=True)
    values = iter([0.0, 0.0, wrong, 0.0, wrong])

    def step(x, state):
        return weight.sum(), torch.full_like(state, next(values))

    with pytest.raises(RuntimeError, match="gave another ''"):
        everlong.replay(step, [0, 1, 2], torch.zeros(1), options=ReplayOptions(check=True))


def test_check_accepts_nan_that_comes_back():
    weight = torch.ones(1, requires_grad=True)
    options = ReplayOptions(check=True)
    everlong.replay(lambda x, m: (weight.sum(), m / 0), [0, 1], torch.zeros(1), options=options)


def test_check_of_plain_leaves():
    weight, count = torch.ones(1, requires_grad=True), iter(range(9))
    with pytest.raises(RuntimeError, match="gave another 'n'"):
        everlong.replay(
            lambda x, m: (weight.sum(), {"n": next(count)}),
            [0, 1],
            {"n": 0},
            options=ReplayOptions(check=True),
        )


def test_check_compares_advance_with_step():
    case = Case(3)

    def advance(segment, state):
        after = case.toy.advance(segment, state)
        return {**after, "slots": after["slots"] * 1.001}

    with pytest.raises(RuntimeError, match="replaying segment 1 gave another 'slots'"):
        run(case, options=ReplayOptions(advance=advance, check=True))


@pytest.mark.parametrize("wrong", [torch.Tensor.double, lambda leaf: leaf[None]])
def test_check_compares_dtype_and_shape(wrong):
    weight = torch.ones(1, requires_grad=True)
    options = ReplayOptions(advance=lambda x, m: wrong(m), check=True)
    with pytest.raises(RuntimeError, match="gave another ''"):
        everlong.replay(
            lambda x, m: (weight.sum(), m.float()[:1]), [0, 1], torch.zeros(1), options=options
        )


def test_another_structure_is_refused_without_check():
    weight = torch.ones(1, requires_grad=True)

    def step(x, state):
        return weight.sum(), (state, None)

    with pytest.raises(RuntimeError, match="another structure"):
        everlong.replay(step, [0, 1], torch.ones(1), options=ReplayOptions(advance=lambda x, m: m))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x, m: (None, m), "no segment has a loss"),
        (lambda x, m: (torch.ones(2), m), r"loss of segment 0 is \[2\]: return a scalar"),
        (lambda x, m: (1.0, m), "loss of segment 0 is float"),
        (lambda x, m: torch.ones(()), "must return a pair"),
        (lambda x, m: (torch.ones(()), m), "no loss depends on a tensor that requires grad"),
        (lambda x, m: (torch.ones(()), {"cell": object()}), "leaf 'cell' is a object"),
    ],
)
def test_refusals(step, message):
    with pytest.raises(ValueError, match=message):
        everlong.replay(step, [0, 1], torch.ones(1))


def test_impossible_arguments_are_refused():
    case = Case(3)
    with pytest.raises(ValueError, match="no segments"):
        everlong.replay(case.toy, [], None)
    with pytest.raises(ValueError, match="2 weights for 3 segments"):
        run(case, weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="truncate is 0"):
        ReplayOptions(truncate=0)
    with pytest.raises(ValueError, match="did you mean 'sqrt'"):
        ReplayOptions(keep="sqr")
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReplayOptions().truncate = 3


@dataclasses.dataclass
class Cell:
    value: torch.Tensor
    age: int


torch.utils._pytree.register_dataclass(Cell)
Pair = namedtuple("Pair", "left right")


def test_any_pytree():
    weight = torch.full((2,), 0.9, dtype=torch.float64, requires_grad=True)

    def step(segment, state):
        (cell, [pair, phase]), flag = state
        value = cell.value * weight + segment["x"]
        turned = phase * torch.exp(1j * weight)  # a complex leaf is differentiated too
        after = OrderedDict(b=value.sin(), a=pair["a"] + 1)
        loss = (value * pair["b"]).sum() + turned.real.sum()
        return loss, ((Cell(value, cell.age + 1), [after, turned]), not flag)

    def outcome(method):
        weight.grad, zero = None, torch.zeros(2, dtype=torch.float64)
        start = OrderedDict(b=zero + 1, a=torch.zeros(1, dtype=torch.int32))
        state = ((Cell(zero, 0), [start, torch.ones(2, dtype=torch.complex128)]), False)
        segments = [{"x": zero + t, "name": "text", "more": Pair(None, object())} for t in range(5)]
        loss, ((cell, [pair, _]), flag) = method(step, segments, state)
        assert (cell.age, pair["a"].item(), flag) == (5, 5, True)
        return {"loss": loss, "grad": weight.grad}

    assert difference(outcome(bptt), outcome(everlong.replay)) <= 1e-12


@pytest.mark.parametrize("scale", [1024.0, "scaler"])
def test_scale_multiplies_every_gradient(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scale == "scaler" else scale
    plain = Case(4).outcome(everlong.replay)
    scaled = Case(4).outcome(everlong.replay, options=ReplayOptions(scale=scaler))
    for name, value in plain.items():
        factor = 1024 if name.startswith("d ") else 1
        assert torch.equal(scaled[name], value * factor), name


def test_a_scaler_steps_once_a_rollout():
    case, plain = Case(4), Case(4)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    for each, options in ((case, ReplayOptions(scale=scaler)), (plain, ReplayOptions())):
        each.outcome(everlong.replay, options=options)
    torch.optim.SGD(plain.toy.parameters(), 0.1).step()
    scaler.step(torch.optim.SGD(case.toy.parameters(), 0.1))
    scaler.update()
    assert scaler.get_scale() == 128
    for a, b in zip(case.toy.parameters(), plain.toy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_scaler_sees_an_overflow():
    case = Case(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [parameter.clone() for parameter in case.toy.parameters()]
    for segment in case.segments:
        segment["target"] = torch.full((), 1e4)
    case.outcome(everlong.replay, options=ReplayOptions(scale=scaler))
    optimizer = torch.optim.SGD(case.toy.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(a, b) for a, b in zip(before, case.toy.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("caching", [True, False])
def test_autocast(dtype, caching):
    """Each segment casts its weights anew, as BPTT does without the cast cache."""

    def under_autocast(step, segments, state):
        with torch.autocast("cpu", dtype=dtype, cache_enabled=caching):
            state = {**state, "slots": state["slots"] @ torch.eye(8)}
            return everlong.replay(step, segments, state, options=ReplayOptions(check=True))

    def by_hand(step, segments, state):
        with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
            state = {**state, "slots": state["slots"] @ torch.eye(8)}
            total = 0.0
            for segment in segments:
                loss, state = step(segment, state)
                total = total + loss / len(segments)
        total.backward()
        return total, state

    expected, found = Case(4).outcome(by_hand), Case(4).outcome(under_autocast)
    assert difference(expected, found) <= 1e-6
    assert difference(expected, Case(4).outcome(bptt)) > 1e-4
    assert found["d mix.weight"].dtype == torch.float32


def test_weights_may_change_between_rollouts_in_one_autocast():
    """torch's cast cache knows a weight by its address: a stale cast would be used again."""

    def outcome(spaced):
        case = Case(3, dropout=0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(case)
            with torch.no_grad():
                case.toy.mix.weight.mul_(2)
            if spaced:
                torch.clear_autocast_cache()
            return run(case)[0]

    assert torch.equal(outcome(False), outcome(True))


def test_backward_runs_outside_autocast():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    weight = torch.ones(1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        everlong.replay(lambda x, m: (Probe.apply(weight).sum(), m), [0, 1], None)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [True, True, False, True, False]


def test_weights_may_have_a_graph():
    weights = torch.full((3,), 0.5, requires_grad=True)
    loss, _ = run(Case(3), weights=weights)
    assert not loss.requires_grad
    assert weights.grad is None


def test_evaluation_mode_and_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case = Case(3)
        case.toy.eval()
        loss, _ = run(case)
        assert torch.equal(loss, run(case)[0])
