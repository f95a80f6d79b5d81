"""Norms whose gradients are written out: torch's values, and the gradients of what they compute."""

import pytest
import torch
import torch.nn.functional as F

from everlong.ops.norm import RMSNorm, rms_norm, unit

EPS = 1e-6


def numbers(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(2, 3, 5), (5,), (40, 500)])  # the last is many numbers
def test_rms_norm_is_torch_s(shape):
    x, weight = numbers(*shape), numbers(shape[-1])
    y = rms_norm(x, weight, EPS)
    torch.testing.assert_close(y, F.rms_norm(x, weight.shape, weight, EPS), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS), y)  # of both sweeps of a replay
    if x.numel() < 100:
        assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_module_is_torch_s_module(dtype):
    ours, theirs = RMSNorm(6, eps=EPS).to(dtype), torch.nn.RMSNorm(6, eps=EPS).to(dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    found = []
    for norm in (ours, theirs):
        x = numbers(4, 6, dtype=dtype)
        norm(x).square().sum().backward()
        found.append((x.grad, norm.weight.grad))
    torch.testing.assert_close(*found)


def test_unit_vectors():
    x = numbers(2, 3, 5)
    torch.testing.assert_close(unit(x, 1e-12).norm(dim=-1), torch.ones(2, 3).double())
    assert torch.autograd.gradcheck(lambda x: unit(x, EPS), (x,))
    none = torch.zeros(1, 4).requires_grad_()
    unit(none, EPS).sum().backward()
    assert none.grad is not None
    assert none.grad.isfinite().all()
