"""Copy-first: item i is a function of (config, seed, i), and only the first token answers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everlong.tasks.copy_first import CopyFirstConfig, make_batch, make_item
from everlong.tasks.recall import BLANK, FIRST_SYMBOL, QUERY

CONFIG = CopyFirstConfig(max_delay=20)


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_an_item_depends_on_seed_and_index_alone(seed, index):
    assert make_item(CONFIG, seed, index).tolist() == make_item(CONFIG, seed, index).tolist()


def test_seeds_and_indices_give_other_items():
    def streams(seed, first):
        return [make_item(CONFIG, seed, index).tolist() for index in range(first, first + 9)]

    assert streams(0, 0) != streams(1, 0)
    assert streams(0, 0) != streams(0, 9)


@given(st.permutations(range(5)))
def test_a_row_is_the_same_in_any_batch(order):
    whole = make_batch(CONFIG, 5, order)
    for row, index in enumerate(order):
        alone = make_batch(CONFIG, 5, [index])
        for name in ("inputs", "targets", "mask", "lengths", "answers", "distractors"):
            assert torch.equal(getattr(whole, name)[row], getattr(alone, name)[0])


def test_the_global_generators_are_not_touched():
    before, torch_before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    make_batch(CONFIG, 0, range(4))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_a_symbol_a_noisy_delay_and_the_query():
    items = [make_item(CONFIG, 1, index) for index in range(3000)]
    assert all(item[0] >= FIRST_SYMBOL and item[-1] == QUERY for item in items)
    delays = np.bincount([len(item) - 2 for item in items], minlength=21)
    assert len(delays) == 21
    assert abs(delays - 3000 / 21).max() < 5 * (3000 / 21) ** 0.5
    first = np.bincount([item[0] for item in items])[FIRST_SYMBOL:]
    assert len(first) == 8
    assert abs(first - 3000 / 8).max() < 5 * (3000 / 8) ** 0.5
    middle = np.concatenate([item[1:-1] for item in items])
    symbols = middle[middle != BLANK]
    assert set(symbols.tolist()) == set(range(FIRST_SYMBOL, FIRST_SYMBOL + 8))
    assert abs(len(symbols) / len(middle) - 0.25) < 5 * (0.1875 / len(middle)) ** 0.5


def test_only_the_first_token_answers():
    config = CopyFirstConfig(min_delay=20, max_delay=20)
    batch = make_batch(config, 2, range(2000))

    def share(guesses):
        return batch.correct(torch.eye(config.vocab_size)[guesses][:, None].expand(-1, 22, -1))

    assert share(batch.inputs[:, 0]).all()
    seen = batch.inputs[:, 1:-1]
    symbol = seen >= FIRST_SYMBOL
    latest = (symbol * torch.arange(20)).argmax(1)
    guess = share(seen[torch.arange(2000), latest])[symbol.any(1)].float().mean().item()
    assert abs(guess - config.chance) < 5 * (config.chance * (1 - config.chance) / 1900) ** 0.5


def test_a_batch_pads_on_the_right_and_scores_the_query_alone():
    batch = make_batch(CONFIG, 3, range(50))
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (50, 22)
    assert torch.equal(batch.mask.sum(1), batch.lengths)
    assert torch.equal(batch.lengths, batch.distractors + 2)
    rows = torch.arange(50)
    assert (batch.inputs[rows, batch.lengths - 1] == QUERY).all()
    assert torch.equal(batch.targets[rows, batch.lengths - 1], batch.answers)
    assert torch.equal(batch.inputs[:, 0], batch.answers)
    assert (batch.targets != -100).sum() == 50
    assert not batch.inputs[~batch.mask].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_symbols": 1}, "2 or more"),
        ({"min_delay": 51}, "min_delay <= max_delay"),
        ({"min_delay": -1}, "0 <= min_delay"),
        ({"noise": -0.1}, "share from 0 to 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CopyFirstConfig(**options)
