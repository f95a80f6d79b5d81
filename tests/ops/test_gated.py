"""The gate of SwiGLU: silu(gate) * value and its gradients, of two tensors and of one."""

import torch
import torch.nn.functional as F

from everlong.ops.gated import gated, swiglu


def numbers(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def test_of_two():
    gate, value = numbers(2, 3, 4), numbers(2, 5, 3, 4)[:, 1]
    assert torch.equal(gated(gate, value), F.silu(gate) * value)
    assert torch.autograd.gradcheck(gated, (gate, value))


def test_of_one():
    both = numbers(2, 3, 8)
    gate, value = both.chunk(2, -1)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert torch.equal(swiglu(both), F.silu(gate) * value)
    assert torch.autograd.gradcheck(swiglu, (both,))


def test_the_wider_dtype_is_kept():
    """Under autocast a gate is bfloat16 where what was read is float32."""
    gate, value = numbers(3, 4, dtype=torch.bfloat16), numbers(3, 4, dtype=torch.float32)
    y = gated(gate, value)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert gate.grad is not None
    assert gate.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.silu(gate.float()) * value)
