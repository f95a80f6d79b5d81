"""Rotary positions: rotations, relative, and exact far down a stream."""

import math

import pytest
import torch

from everlong.ops import rotary


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("position", [5, 100_000_007])
def test_rotate_is_the_published_rotation_of_each_pair(position):
    x, base = numbers(1, 3, 1, 6), 123.0
    got = rotary.rotate(x, torch.tensor([position]), base)
    for t in range(3):
        for pair, frequency in enumerate((1.0, base ** (-2 / 6), base ** (-4 / 6))):
            angle = (position + t) * frequency
            a, b = x[0, t, 0, pair], x[0, t, 0, pair + 3]
            wanted = (
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            )
            found = got[0, t, 0, [pair, pair + 3]]
            torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-6)


def test_rotation_keeps_lengths_and_position_zero_is_the_identity():
    x = numbers(2, 4, 3, 8)
    got = rotary.rotate(x, torch.tensor([0, 7]))
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(got[0, 0], x[0, 0])


def test_scores_depend_on_distances_only():
    q, k = numbers(2, 6, 3, 8, seed=1), numbers(2, 6, 3, 8, seed=2)

    def scores(position: torch.Tensor) -> torch.Tensor:
        return torch.einsum(
            "bthd,bshd->bhts", rotary.rotate(q, position), rotary.rotate(k, position)
        )

    near = scores(torch.tensor([0, 0]))
    torch.testing.assert_close(scores(torch.tensor([3, 911])), near, rtol=0, atol=1e-10)


def test_rows_at_different_places_are_the_rows_alone():
    x, positions = numbers(3, 5, 2, 4), torch.tensor([0, 4, 1_000_003])
    together = rotary.rotate(x, positions)
    for row in range(3):
        alone = rotary.rotate(x[row : row + 1], positions[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)
    same = torch.tensor([9, 9, 9])
    assert torch.equal(rotary.rotate(x, same), rotary.rotate(x, same[:1]))


def test_float32_is_exact_at_position_ten_million():
    x = numbers(1, 64, 2, 16).float()
    position = torch.tensor([10_000_000])
    exact = rotary.rotate(x.double(), position)
    torch.testing.assert_close(
        rotary.rotate(x, position).double(), exact, rtol=0, atol=1e-6
    )  # angles in float32 would be off by up to one radian
    assert rotary.rotate(x, position).dtype == torch.float32
    low = rotary.rotate(x.bfloat16(), position)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), exact, rtol=0.02, atol=0.05)


def test_angles_are_shared_by_rows_that_stand_together():
    cos, _ = rotary.angles(torch.tensor([3, 3]), 4, 8, 10_000.0, torch.float32)
    assert cos.shape == (1, 4, 1, 8)
    cos, _ = rotary.angles(torch.tensor([3, 4]), 4, 8, 10_000.0, torch.float32)
    assert cos.shape == (2, 4, 1, 8)


def test_turned_in_one_go_are_queries_and_keys():
    qkv, position = numbers(2, 3, 6, 4).requires_grad_(), torch.tensor([0, 5])
    cos, sin = rotary.angles(position, 3, 4, 10_000.0, qkv.dtype)
    q, k, v = qkv.split(2, 2)
    expected = rotary.apply(q, cos, sin), rotary.apply(k, cos, sin), v
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            for got, wanted in zip(rotary.turn(qkv, 2, cos, sin), expected, strict=True):
                assert torch.equal(got, wanted)
    assert torch.autograd.gradcheck(lambda x: rotary.turn(x, 2, cos, sin), (qkv,))
