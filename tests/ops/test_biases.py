"""Every cotangent is the gradient of its loss, and does what it is for."""

import pytest
import torch
from torch.testing import assert_close

from everlong.ops import biases
from everlong.ops.biases import BIASES

P = 3.0


def length(e):
    return e.square().sum(-1, keepdim=True).sqrt()


# as the paper writes them, with |e| and sign(e) as they are
LOSSES = {
    "l2": lambda e, level: e.square().sum() / 2,
    "l1": lambda e, level: e.abs().sum(),
    "lp": lambda e, level: (e.abs() ** P).sum(),
    "huber": lambda e, level: torch.where(
        length(e) <= level, length(e).square() / 2, level * (length(e) - level / 2)
    ).sum(),
    "huber_coordinate": lambda e, level: torch.where(
        e.abs() <= level, e.square() / 2, level * (e.abs() - level / 2)
    ).sum(),
    "huber_mixture": lambda e, level: torch.where(
        length(e) <= level, length(e).square() / 2, level * e.abs().sum(-1, keepdim=True)
    ).sum(),
    "shift": lambda e, level: (length(e) + level).square().sum() / 2,
}


def errors(size):
    """[20, 5], no coordinate near 0 and no length near the level 2."""
    generator = torch.Generator().manual_seed(1)
    e = size * torch.randn(20, 5, generator=generator, dtype=torch.float64)
    return torch.where(e.abs() < 0.6, 0.6 * e.sign(), e)


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("size", [0.01, 3.0])
def test_it_is_the_gradient_of_its_loss(name, size, monkeypatch):
    monkeypatch.setattr(biases, "SHARP", 1e3)  # sign(e) as it is
    monkeypatch.setattr(biases, "EPS", 0.0)
    e, level = errors(size).requires_grad_(), torch.tensor(2.0, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(LOSSES[name](e, level), e)
    assert_close(BIASES[name](e, level, P), wanted, rtol=1e-10, atol=1e-10)


def test_the_table_has_every_bias():
    assert set(LOSSES) == set(BIASES)


@pytest.mark.parametrize("name", ["huber", "huber_coordinate", "huber_mixture"])
def test_huber_is_l2_below_its_level(name):
    e = errors(3.0)
    assert_close(BIASES[name](e, torch.tensor(1e6).double(), P), e)


def test_how_far_an_outlier_reaches():
    e, level = 1e6 * errors(1.0), torch.tensor(2.0).double()
    assert_close(length(BIASES["huber"](e, level, P)), torch.full((20, 1), 2.0).double())
    assert BIASES["huber_coordinate"](e, level, P).abs().max() == 2
    jump = length(BIASES["huber_mixture"](e, level, P))  # the printed form jumps to level sqrt(V)
    assert_close(jump, torch.full((20, 1), 2 * 5**0.5).double())


def test_they_and_their_gradients_are_finite_at_zero():
    for name, bias in BIASES.items():
        e = torch.zeros(3, 5, requires_grad=True)
        (grad,) = torch.autograd.grad(bias(e, torch.tensor(1.0), P).sum(), e)
        assert grad.isfinite().all(), name
