"""Newton-Schulz: near orthogonal at full rank, blind to scale, and never infinite."""

import pytest
import torch

from everlong.ops.newton_schulz import newton_schulz


def noise(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (32, 32, 24)])
def test_singular_values_end_near_one(shape):
    for seed in range(5):
        values = torch.linalg.svdvals(newton_schulz(noise(*shape, seed=seed)))
        assert values.min() > 0.6
        assert values.max() < 1.25


def test_singular_vectors_stay_and_batches_are_matrices_alone():
    matrix = noise(2, 3, 6, 4, dtype=torch.float64)
    found = newton_schulz(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.mT @ found @ right.mT
    diagonal = torch.diag_embed(torch.diagonal(inside, dim1=-2, dim2=-1))
    torch.testing.assert_close(inside, diagonal, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1, 2], newton_schulz(matrix[1, 2]))
    torch.testing.assert_close(found.mT, newton_schulz(matrix.mT))


@pytest.mark.parametrize("factor", [1e-3, 0.1, 7.0, 1e6])
def test_a_factor_drops_out(factor):
    matrix = noise(16, 12)
    wanted = newton_schulz(matrix)
    torch.testing.assert_close(newton_schulz(factor * matrix), wanted, rtol=0, atol=1e-4)


def test_nothing_stays_nothing():
    zero = torch.zeros(2, 4, 3, requires_grad=True)
    found = newton_schulz(zero)
    assert not found.any()
    found.sum().backward()
    assert zero.grad.isfinite().all()


def test_a_matrix_of_low_rank_stays_finite_and_of_low_rank():
    matrix = noise(12, 2) @ noise(2, 9, seed=1)
    values = torch.linalg.svdvals(newton_schulz(matrix))
    assert values.isfinite().all()
    assert values[1] > 0.6
    assert values[2:].max() < 1e-3


@pytest.mark.parametrize("shape", [(4, 3), (3, 4)])
def test_gradient(shape):
    matrix = noise(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(newton_schulz, matrix)
    assert torch.autograd.gradgradcheck(newton_schulz, matrix)


def test_float32_at_least_and_float64_throughout():
    matrix = noise(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = newton_schulz(matrix)
    assert torch.equal(found, newton_schulz(matrix))
    assert newton_schulz(matrix.bfloat16()).dtype == torch.float32
    assert newton_schulz(matrix.double()).dtype == torch.float64


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="matrix must be"):
        newton_schulz(torch.ones(3))
