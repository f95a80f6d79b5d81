"""Sinusoids of distances, and the shift from distances to pairs."""

import math

import pytest
import torch

from everlong.ops.relative import shift, sinusoid


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 6), (5, 5), (3, 8), (7, 8)])
def test_the_shift_is_the_score_of_each_pair(queries, keys):
    """With an empty and a filled cache: key j stands i + K - T - j places before query i."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, 4, generator=generator, dtype=torch.float64)
    table = torch.randn(keys, 4, generator=generator, dtype=torch.float64)  # row n: distance n
    got = shift(q @ table.flip(0).T)
    assert got.shape == (2, queries, keys)
    for i in range(queries):
        for j in range(i + keys - queries + 1):
            wanted = q[:, i] @ table[i + keys - queries - j]
            torch.testing.assert_close(got[:, i, j], wanted, rtol=1e-12, atol=1e-12)


def test_the_shift_passes_gradients_to_the_distances_that_are_seen():
    scores = torch.zeros(2, 3, requires_grad=True)
    visible = torch.ones(2, 3).tril(1)
    (shift(scores) * visible).sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_sinusoids_are_sines_then_cosines_of_distance_over_powers_of_10000():
    table = sinusoid(torch.tensor([0, 1, 7]), 6, torch.float64)
    for row, distance in zip(table, (0, 1, 7), strict=True):
        angles = [distance / 10_000 ** (2 * k / 6) for k in range(3)]
        wanted = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(wanted, dtype=torch.float64))


def test_angles_of_far_distances_are_exact():
    table = sinusoid(torch.tensor([10_000_001]), 2, torch.float32)
    assert abs(float(table[0, 0]) - math.sin(10_000_001)) < 1e-6
    assert table.dtype == torch.float32
