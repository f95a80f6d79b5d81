"""State tracking: things are moved about, token by token, and their order is the answer."""

from itertools import permutations

import numpy as np
import pytest
import torch

from everlong.tasks import state_tracking
from everlong.tasks.state_tracking import (
    GROUPS,
    StateTrackingConfig,
    make_batch,
    products,
)
from tasks.common import certain, check_chance, check_rows, check_stream, examples, show


def config(group: str) -> StateTrackingConfig:
    return StateTrackingConfig(group, length=12)


def carry(group: str, row: list[int]) -> list[int]:
    """Where every thing is after each token, as the number of that permutation."""
    elements = list(permutations(range(GROUPS[group])))
    places, found = list(range(GROUPS[group])), []
    for token in row:
        places = [elements[token][place] for place in places]
        found.append(elements.index(tuple(places)))
    return found


def test_the_docstring_shows_items() -> None:
    shown = [show(make_batch(config(group), 0, [0]), "012345") for group in ("S3", "parity")]
    assert examples(state_tracking) == shown


@pytest.mark.parametrize("group", GROUPS)
def test_items_are_a_stream_of_their_own(group: str) -> None:
    check_stream(make_batch, config(group))
    batch = make_batch(config(group), 0, range(300))
    check_rows(batch, config(group))
    check_chance(batch, config(group))


@pytest.mark.parametrize("group", GROUPS)
def test_who_moves_the_things_is_right_and_who_forgets_the_first_token_by_chance(
    group: str,
) -> None:
    batch = make_batch(config(group), 1, range(300))
    rows = batch.inputs.tolist()
    assert (batch.correct(certain(config(group), [carry(group, row) for row in rows])) == 1).all()
    forgetful = certain(config(group), [[0, *carry(group, row[1:])] for row in rows])
    share, chance = float(batch.correct(forgetful).mean()), config(group).chance
    # either all or none of a row's positions are right
    assert abs(share - chance) < 5 * (chance * (1 - chance) / 300) ** 0.5


def test_parity_counts_ones() -> None:
    batch = make_batch(StateTrackingConfig(), 2, range(50))
    assert torch.equal(batch.targets, batch.inputs.cumsum(1) % 2)


@pytest.mark.parametrize("group", GROUPS)
def test_the_products_are_a_group(group: str) -> None:
    table, size = np.array(products(group)), config(group).vocab_size
    assert table.shape == (size, size)
    everything = list(range(size))
    assert table[0].tolist() == table[:, 0].tolist() == everything  # 0 changes nothing
    assert (np.sort(table, 0) == np.arange(size)[:, None]).all()
    assert (np.sort(table, 1) == everything).all()
    a, b, c = np.random.default_rng(0).integers(size, size=(3, 500))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table == table.T).all() == (group == "parity")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "S6"}, "unknown group 'S6': give one of parity, S3, S4, S5"),
        ({"length": 0}, "length is 0: give 1 or more"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StateTrackingConfig(**options)
