"""The recall toy: item i is a function of (config, seed, i), and only a memory can answer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everlong.tasks.recall import (
    BLANK,
    FIRST_SYMBOL,
    QUERY,
    STORE,
    RecallConfig,
    make_batch,
    make_item,
)

CONFIG = RecallConfig()
SIZE = 8


def segments(index: int, config: RecallConfig = CONFIG) -> np.ndarray:
    return make_item(config, 0, index).tokens.reshape(-1, config.segment_length)


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_an_item_depends_on_seed_and_index_alone(seed: int, index: int) -> None:
    first, again = make_item(CONFIG, seed, index), make_item(CONFIG, seed, index)
    assert first.tokens.tolist() == again.tokens.tolist()
    assert (first.answer, first.distractors) == (again.answer, again.distractors)


def test_seeds_and_indices_give_other_items() -> None:
    def streams(seed: int, first: int) -> list[list[int]]:
        return [make_item(CONFIG, seed, index).tokens.tolist() for index in range(first, first + 9)]

    assert streams(0, 0) != streams(1, 0)
    assert streams(0, 0) != streams(0, 9)


@given(st.permutations(range(7)))
def test_a_row_is_the_same_in_any_batch(order: list[int]) -> None:
    whole = make_batch(CONFIG, 5, order)
    for row, index in enumerate(order):
        alone = make_batch(CONFIG, 5, [index])
        for name in ("inputs", "targets", "mask", "lengths", "answers", "distractors"):
            assert torch.equal(getattr(whole, name)[row], getattr(alone, name)[0])


def test_the_global_generators_are_not_touched() -> None:
    before, torch_before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    make_batch(CONFIG, 0, range(4))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_the_first_segment_stores_and_the_last_one_asks() -> None:
    for index in range(200):
        item, rows = make_item(CONFIG, 0, index), segments(index)
        assert rows.shape == (item.distractors + 2, SIZE)
        place = rows[0].tolist().index(STORE)
        assert rows[0, place + 1] == item.answer
        assert (rows[0] != BLANK).sum() == 2
        assert rows[-1].tolist() == [BLANK] * (SIZE - 1) + [QUERY]
        assert not np.isin(rows[1:-1], [STORE, QUERY]).any()


def test_every_place_symbol_and_number_of_distractors_is_equally_likely() -> None:
    items = [make_item(CONFIG, 1, index) for index in range(4000)]
    places = [item.tokens.tolist().index(STORE) for item in items]
    for values, kinds in (
        ([item.distractors for item in items], range(5)),
        ([item.answer for item in items], range(FIRST_SYMBOL, FIRST_SYMBOL + 8)),
        (places, range(SIZE - 1)),
    ):
        expected = len(items) / len(kinds)
        counts = np.bincount(values, minlength=max(kinds) + 1)[kinds.start :]
        assert len(counts) == len(kinds)
        assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_a_quarter_of_a_distractor_is_symbols() -> None:
    config = RecallConfig(min_distractors=4)
    tokens = np.concatenate([segments(index, config)[1:-1] for index in range(500)])
    share = (tokens >= FIRST_SYMBOL).mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / tokens.size) ** 0.5
    counts = np.bincount(tokens[tokens >= FIRST_SYMBOL])[FIRST_SYMBOL:]
    assert len(counts) == 8
    assert counts.min() > 0.85 * counts.mean()


def logits_for(guesses: list[int], batch) -> torch.Tensor:
    """Certain of `guesses[b]` at the query of row b, of symbol 0 elsewhere."""
    logits = torch.zeros(*batch.inputs.shape, CONFIG.vocab_size)
    logits[..., BLANK] = 1
    logits[torch.arange(len(guesses)), batch.lengths - 1, torch.tensor(guesses)] = 2
    return logits


def test_who_finds_the_mark_is_right_and_who_guesses_is_right_by_chance() -> None:
    batch = make_batch(CONFIG, 2, range(2000))
    rows = [row[mask].tolist() for row, mask in zip(batch.inputs, batch.mask, strict=True)]
    remembered = [row[row.index(STORE) + 1] for row in rows]
    assert batch.correct(logits_for(remembered, batch)).all()

    sigma = (CONFIG.chance * (1 - CONFIG.chance) / 2000) ** 0.5
    constant = batch.correct(logits_for([FIRST_SYMBOL] * 2000, batch)).float().mean().item()
    assert abs(constant - CONFIG.chance) < 5 * sigma
    # The last symbol seen is no better, where a distractor holds one.
    last = [[token for token in row[SIZE:] if token >= FIRST_SYMBOL] for row in rows]
    distracted = torch.tensor([bool(symbols) for symbols in last])
    guesses = [symbols[-1] if symbols else BLANK for symbols in last]
    share = batch.correct(logits_for(guesses, batch))[distracted].float().mean().item()
    assert abs(share - CONFIG.chance) < 5 * sigma * (2000 / distracted.sum().item()) ** 0.5


def test_a_batch_pads_on_the_right_and_scores_the_query_alone() -> None:
    batch = make_batch(CONFIG, 3, range(50))
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (50, 48)
    assert torch.equal(batch.mask.sum(1), batch.lengths)
    assert torch.equal(batch.lengths, (batch.distractors + 2) * SIZE)
    assert len(set(batch.lengths.tolist())) == 5
    for row in range(50):
        length = int(batch.lengths[row])
        assert batch.mask[row, :length].all()
        assert batch.inputs[row, length - 1] == QUERY
        assert batch.targets[row, length - 1] == batch.answers[row]
        assert (batch.inputs[row, length:] == BLANK).all()
    assert (batch.targets != -100).sum() == 50
    assert batch.inputs.max() < CONFIG.vocab_size


def test_a_fixed_number_of_distractors() -> None:
    config = RecallConfig(min_distractors=32, max_distractors=32)
    batch = make_batch(config, 0, range(3))
    assert batch.inputs.shape == (3, 34 * SIZE)
    assert batch.mask.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_length": 1}, "2 or more"),
        ({"num_symbols": 1}, "2 or more"),
        ({"min_distractors": 5}, "min_distractors <= max_distractors"),
        ({"min_distractors": -1}, "0 <= min_distractors"),
        ({"noise": 1.5}, "share from 0 to 1"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecallConfig(**options)
