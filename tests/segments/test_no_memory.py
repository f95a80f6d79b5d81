import pytest
import torch

import everlong


def test_nothing_crosses_a_boundary():
    memory = everlong.create_memory("no_memory", size="small", hidden_size=24, num_heads=3)
    x = torch.randn(2, 11, 24, requires_grad=True)
    y, _ = memory(x)
    (gradient,) = torch.autograd.grad(y[:, 6].sum(), x)
    reached = gradient[0].abs().amax(-1).nonzero().flatten().tolist()
    assert reached == [4, 5, 6], "its own segment, up to itself"


def test_a_segment_of_nothing_is_refused():
    with pytest.raises(ValueError, match="segment_length must be at least 1"):
        everlong.create_memory("no_memory", hidden_size=24, num_heads=3, segment_length=0)


def test_a_boundary_keeps_the_dtypes_of_the_state():
    memory = everlong.create_memory("no_memory", size="small", hidden_size=24, num_heads=3)
    state = memory.init_state(2, dtype=torch.bfloat16)
    _, after = memory(torch.randn(2, 5, 24), state)
    before = [leaf.dtype for leaf in everlong.state.leaves(state)]
    assert [leaf.dtype for leaf in everlong.state.leaves(after)] == before
