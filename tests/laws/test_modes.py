"""Every registered memory in half precision, compiled, and on each device."""

import contextlib

import pytest
import torch

import everlong
from laws.cases import assert_close, memory_case
from laws.numbers import check_dtype

every_memory = pytest.mark.parametrize("name", everlong.list_memories())


@pytest.mark.supports("float16")
@every_memory
def test_float16_is_finite_and_close(name):
    check_dtype(memory_case(name), torch.float16, False, 1e-2)


def found_by(read, case, memory, periods=1):
    """Output of a call that goes on and crosses boundaries, and gradients, read by `read`."""
    x = case.inputs(2, periods * memory.period + 3).to(next(memory.parameters()))
    with torch.no_grad():
        _, state = memory(x[:, :2])
    memory.zero_grad()
    y, _ = read(x[:, 2:], state)
    y.square().mean().backward()
    grads = {name: each.grad for name, each in memory.named_parameters() if each.grad is not None}
    return {"output": y.detach(), **grads}


def compiled(case, memory):
    """What the compiled memory gives, and whether it is one graph a call."""
    for whole in (True, False):
        torch.compiler.reset()
        refused = torch._dynamo.exc.TorchDynamoException if whole else ()
        with contextlib.suppress(refused):
            read = torch.compile(memory, backend="aot_eager", fullgraph=whole)
            return found_by(read, case, memory), whole
    raise AssertionError("unreachable")


@pytest.mark.benchmark  # tracing all of them takes minutes
@pytest.mark.filterwarnings("ignore")  # torch's own about what it traces: it goes on in pieces
@pytest.mark.supports("compile")
@every_memory
def test_compiled_is_eager(name, record_property):
    """Traced forward and backward, run without inductor's code: that would take an hour."""
    case = memory_case(name)
    memory = case.build()
    wanted = found_by(memory, case, memory)
    found, whole = compiled(case, memory)
    record_property("note", "whole" if whole else "in pieces")
    assert found.keys() == wanted.keys()
    for what, value in wanted.items():
        assert_close(found[what], value, what)


def here(device):
    return device == "cpu" or getattr(torch, device).is_available()


@pytest.mark.benchmark
@pytest.mark.supports("device {device}")
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@every_memory
def test_a_device_gives_in_float32_what_float64_gives(name, device):
    if not here(device):
        pytest.skip("no such device here")
    case = memory_case(name)
    exact, memory = case.build(), case.build(dtype=torch.float32)
    exact.load_state_dict(memory.state_dict())
    wanted = found_by(exact, case, exact, periods=3)
    memory.to(device)
    for what, value in found_by(memory, case, memory, periods=3).items():
        error, size = (value.double().cpu() - wanted[what]).norm(), wanted[what].norm()
        assert error <= 1e-3 * size, f"{what}: an error of {error:.2e} in {size:.2e}"
