"""The associative matrix: its loop is the definition; a pair written is a pair read."""

import pytest
import torch

from everlong.ops import associative as ops

B, M, K, D, NU = 2, 3, 6, 5, 3
P = 2 * NU * K


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def parts() -> list[torch.Tensor]:
    """A matrix and norm that hold something, and M pairs with their strengths."""
    keys = ops.features(draw(B, M, K, seed=1), NU)
    norm = ops.features(draw(B, 2, K, seed=2), NU).sum(1)
    return [draw(B, P, D), norm, keys, draw(B, M, D, seed=3), draw(B, M, seed=4).sigmoid()]


def test_features_are_products_of_entries_nu_apart():
    x = draw(4, K)
    found = ops.features(x, NU)
    r = [[max(v, 0.0) for v in row] + [max(-v, 0.0) for v in row] for row in x.tolist()]
    for row, wanted in enumerate(r):
        for j in range(1, NU + 1):
            for i in range(2 * K):
                got = found[row, (j - 1) * 2 * K + i]
                assert got == wanted[i] * wanted[i - j]
    assert found.min() >= 0


def test_an_empty_matrix_reads_zero():
    empty = torch.zeros(B, P, D), torch.zeros(B, P)
    assert torch.equal(
        ops.read(*empty, ops.features(torch.randn(B, 4, K), NU)), torch.zeros(B, 4, D)
    )


def test_writing_equals_the_loop_in_values_and_gradients(parts):
    results = []
    for form in (ops.write, ops.write_reference):
        inputs = [p.clone().requires_grad_() for p in parts]
        matrix, norm = form(*inputs)
        loss = (matrix * draw(B, P, D, seed=7)).sum() + (norm * draw(B, P, seed=8)).sum()
        loss.backward()
        results.append([matrix.detach(), norm.detach(), *(p.grad for p in inputs)])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-12, rtol=1e-12)


def test_a_pair_is_read_back_and_rewriting_replaces_it_without_growth():
    empty = draw(B, P, D) * 0, draw(B, P) * 0
    key = ops.features(2 * draw(B, 1, K), NU)
    values, sure = draw(2, B, 1, D, seed=3), torch.ones(B, 1, dtype=torch.float64)
    matrix, norm = ops.write(*empty, key, values[0], sure)
    torch.testing.assert_close(ops.read(matrix, norm, key), values[0], rtol=1e-4, atol=0)
    again, norm_again = ops.write(matrix, norm, key, values[1], sure)
    torch.testing.assert_close(ops.read(again, norm_again, key), values[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(norm_again, norm, rtol=1e-5, atol=0)


def test_b_says_how_much_is_replaced():
    empty = draw(B, P, D) * 0, draw(B, P) * 0
    key = ops.features(2 * draw(B, 1, K), NU)
    values = draw(2, B, 1, D, seed=3)
    sure = torch.ones(B, 1, dtype=torch.float64)
    held = ops.write(*empty, key, values[0], sure)
    for strength in (0.0, 0.25):
        after = ops.write(*held, key, values[1], strength * sure)
        wanted = (1 - strength) * values[0] + strength * values[1]
        torch.testing.assert_close(ops.read(*after, key), wanted, rtol=1e-4, atol=1e-4)


def test_keys_without_a_common_feature_do_not_disturb_each_other():
    x = torch.zeros(1, 2, K, dtype=torch.float64)
    x[0, 0, :2], x[0, 1, :2] = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])
    keys, values = ops.features(x, NU), draw(1, 2, D)
    assert (keys[0, 0] * keys[0, 1]).sum() == 0
    ones = torch.ones(1, 2, dtype=torch.float64)
    held = ops.write(draw(1, P, D) * 0, draw(1, P) * 0, keys, values, ones)
    torch.testing.assert_close(ops.read(*held, keys), values, rtol=1e-4, atol=0)


def test_novelty_lies_between_0_and_1_and_has_no_gradient(parts):
    _, norm, keys, *_ = parts
    torch.testing.assert_close(ops.novelty(norm * 0, keys), torch.ones(B, M).double())
    assert torch.equal(ops.novelty(keys.sum(1), keys), torch.zeros(B, M).double())
    some = ops.novelty(norm, keys)
    assert ((some > 0) & (some < 1)).any()
    assert not ops.novelty(norm.requires_grad_(), keys.requires_grad_()).requires_grad
