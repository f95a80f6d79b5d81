"""Tokens sorted into groups: in time within each, and batched in pieces without much padding."""

import pytest
import torch

from everlong.ops.groups import groups, pieces, take


def choices(rows, length, places, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, length, places, generator=generator).argsort(-1)[..., :k]


def test_groups_are_sorted_by_place_then_row_then_time_without_what_is_not_real():
    chosen = choices(3, 9, 4, 2)
    real = torch.arange(9) < torch.tensor([9, 0, 5])[:, None]
    order, lengths = groups(chosen, real, 4)
    wanted = [
        [(place, row, t, j) for t in range(9) for j in range(2) if chosen[row, t, j] == place]
        for place in range(4)
        for row in range(3)
    ]
    wanted = [[each for each in group if real[each[1], each[2]]] for group in wanted]
    assert lengths.flatten().tolist() == [len(group) for group in wanted]
    flat = [(row * 9 + t) * 2 + j for group in wanted for _, row, t, j in group]
    assert order.tolist() == flat
    assert len(groups(chosen, None, 4)[0]) == chosen.numel()


@pytest.mark.parametrize("lengths", [[0, 0], [1, 1, 0, 1], [3, 0, 40, 1, 7], [0, 9], [1000, 1, 1]])
def test_pieces_are_every_token_once_in_order_and_meet_no_empty_group(lengths):
    found = [[] for _ in lengths]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    places = 0
    for group, index, left in pieces(torch.tensor(lengths), 4):
        assert index.shape == (len(group), int(left.max()))
        assert left.min() > 0
        assert int(index.max()) < sum(lengths)
        places += index.numel()
        for g, row, n in zip(group.tolist(), index.tolist(), left.tolist(), strict=True):
            found[g] += row[:n]
    assert found == [
        list(range(start, start + n)) for start, n in zip(starts, lengths, strict=True)
    ]
    filled = sum(n > 0 for n in lengths)
    assert places <= 2 * sum(lengths) + 4 * filled


def test_take_gathers_rows_by_a_table():
    x, index = torch.arange(12.0).view(6, 2), torch.tensor([[5, 0, 0], [1, 2, 3]])
    assert torch.equal(take(x, index), x[index])
