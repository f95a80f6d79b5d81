"""From what is accumulated to the weights: each map is what its docstring says."""

import pytest
import torch
from torch.testing import assert_close

from everlong.ops.retention import RETENTIONS, Retention


def matrix(seed=0):
    return torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(a, q):
    return (a.abs() ** q).sum((-1, -2), keepdim=True) ** (1 / q)


def read(kind, a, start=None, **options):
    return Retention(kind, **options).read([a], [a if start is None else start])[0]


def test_softmax_weights_are_positive_and_sum_to_c():
    a = 30 * matrix()
    w = read("softmax", a)
    assert (w >= 0).all()
    assert_close(w.sum(-2), torch.full((2, 5), 6**0.5).double())
    logs, moved = matrix(1).log_softmax(-2), matrix(2)
    naive = 6**0.5 * (0.7 * logs - moved).softmax(-2)  # alpha log W - eta z
    assert_close(read("softmax", 0.7 * matrix(1) - moved), naive)


def test_softmax_for_ten_thousand_steps_and_wiped():
    logits, generator = torch.zeros(1, 6, 5), torch.Generator().manual_seed(0)
    for _ in range(10_000):
        logits = 0.99 * logits - 0.1 * torch.randn(1, 6, 5, generator=generator)
    w = read("softmax", logits)
    assert_close(w.sum(-2), torch.full((1, 5), 6**0.5), rtol=1e-6, atol=1e-6)
    assert (w > 0).all()
    z = matrix()
    assert_close(read("softmax", 0.0 * matrix(3) - z), 6**0.5 * (-z).softmax(-2))


def test_the_dual_map_is_the_mirror_map_and_the_printed_one_is_not():
    """The gradient of -<A, W> + |W|_q^2 / 2 by W is 0 at W(A)."""
    a, found = matrix(), {}
    for kind in ("lq", "lq_dual"):
        w = read(kind, a).requires_grad_()
        loss = (-(a * w).sum((-1, -2)) + norm(w, 4)[:, 0, 0].square() / 2).sum()
        (grad,) = torch.autograd.grad(loss, w)
        found[kind] = float(grad.norm() / a.norm())
    assert found["lq_dual"] < 1e-5
    assert found["lq"] > 0.5


def test_twice_the_accumulator():
    """The printed map is of degree 3 - q: at q = 4 it halves; the dual map is of degree 1."""
    a = matrix()
    assert_close(read("lq", 2 * a), read("lq", a) / 2)
    assert_close(read("lq_dual", 200 * a), 2 * read("lq_dual", 100 * a))
    start = matrix(1)
    assert_close(read("lq", 2 * a, start), 2 * read("lq", a, start))  # within a chunk it is linear


def test_elastic_weights_reach_zero_and_are_plain_without_a_threshold():
    a, steps = matrix(), 0
    while read("elastic", a, threshold=0.1).any():
        a, steps = 0.9 * a, steps + 1
    assert 0 < steps < 100
    assert_close(read("elastic", matrix(), threshold=0.0), matrix())


@pytest.mark.parametrize("kind", RETENTIONS)
def test_a_fresh_stream_has_random_weights_of_unit_gain(kind):
    torch.manual_seed(0)
    kept = Retention(kind)
    a = kept.start(3, 40, 60).detach()
    w = read(kind, a, power=4.0)
    assert w.shape == (3, 40, 60)
    if kind == "softmax":
        return
    assert abs(float(w.std()) / (2 / 100) ** 0.5 - 1) < 0.1
    assert (w[0] - w[1]).abs().max() > 0.1  # heads start differently


def test_what_has_no_map_is_refused():
    with pytest.raises(ValueError, match="power 3"):
        Retention("lq", power=3.0).check()
    with pytest.raises(ValueError, match="above 1"):
        Retention("lq_dual", power=1.0).check()
    with pytest.raises(ValueError, match="threshold"):
        Retention("elastic", threshold=-1.0).check()
