"""Polynomial features: their product is the kernel, and nothing else is asked of them."""

from itertools import product
from math import comb, factorial

import pytest
import torch

from everlong.ops.features import polynomial, polynomial_size


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def exponential(degree):
    return torch.tensor([1 / factorial(i) for i in range(degree + 1)], dtype=torch.float64)


def kernel(q, k, a):
    return sum(a[i] * (q @ k.mT) ** i for i in range(len(a)))


@pytest.mark.parametrize(("width", "degree"), [*product((1, 2, 5), range(5))])
def test_the_product_of_features_is_the_kernel(width, degree):
    q, k = noise(3, 7, width), noise(3, 6, width, seed=1)
    for a in (exponential(degree), noise(degree + 1, seed=2).abs()):
        found = polynomial(q, a) @ polynomial(k, a).mT
        torch.testing.assert_close(found, kernel(q, k, a), rtol=1e-12, atol=1e-12)


def test_degree_two_is_the_one_of_the_card_and_holds_in_float32():
    x = noise(9, 16)
    ones = torch.ones(9, 1, dtype=torch.float64)
    pairs = [
        x[:, i] * x[:, j] * (0.5**0.5 if i == j else 1) for i in range(16) for j in range(i, 16)
    ]
    wanted = torch.cat([ones, x, torch.stack(pairs, 1)], 1)
    torch.testing.assert_close(polynomial(x, exponential(2)), wanted)
    q, k = (torch.nn.functional.normalize(noise(9, 16, seed=s).float(), dim=-1) for s in (1, 2))
    phi = polynomial(q, exponential(2)), polynomial(k, exponential(2))
    assert phi[0].dtype == torch.float32
    s = q @ k.mT
    torch.testing.assert_close(phi[0] @ phi[1].mT, 1 + s + s**2 / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("width", "degree"), [(1, 3), (8, 2), (64, 2), (6, 4)])
def test_the_number_of_features_is_the_binomial(width, degree):
    assert polynomial_size(width, degree) == comb(width + degree, degree)
    assert polynomial(noise(2, width), exponential(degree)).shape == (
        2,
        polynomial_size(width, degree),
    )
    assert polynomial_size(64, 2) == 2145


def test_the_linear_coefficients_give_the_plain_vectors():
    q, k = noise(4, 5), noise(3, 5, seed=1)
    a = torch.tensor([0.0, 1, 0]).double()
    phi = polynomial(q, a)
    assert torch.equal(phi[:, 1:6], q)
    assert not phi[:, :1].any()
    assert not phi[:, 6:].any()
    torch.testing.assert_close(phi @ polynomial(k, a).mT, q @ k.mT)


def test_gradients_in_the_input_and_in_the_coefficients():
    x, a = noise(2, 3).requires_grad_(), exponential(3).requires_grad_()
    assert torch.autograd.gradcheck(polynomial, (x, a))
    assert torch.autograd.gradgradcheck(polynomial, (x, a))
    with torch.no_grad():
        x[0, 1] = 0.0
    assert torch.autograd.gradcheck(polynomial, (x, a))


def test_a_degree_switched_off_has_no_gradient_and_no_nan():
    x, a = noise(4, 5).requires_grad_(), torch.tensor([0.0, 1, 0]).double().requires_grad_()
    polynomial(x, a).square().sum().backward()
    assert x.grad.isfinite().all()
    assert a.grad[1] > 0
    assert a.grad[[0, 2]].tolist() == [0, 0]


def test_what_has_no_features_is_refused():
    with pytest.raises(ValueError, match="negative.*logarithms"):
        polynomial(noise(2, 3), torch.tensor([1.0, -0.1]))
    for wrong in (torch.ones(2, 2), torch.ones(0)):
        with pytest.raises(ValueError, match="one a degree"):
            polynomial(noise(2, 3), wrong)
    for width, degree in ((0, 2), (3, -1)):
        with pytest.raises(ValueError, match="at least 1 variable"):
            polynomial_size(width, degree)
