"""The pairs toy: item i is a function of (config, seed, i), and each answer is in its stream."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everlong.tasks.associative import AssociativeConfig, make_batch, make_item
from everlong.tasks.recall import BLANK, FIRST_SYMBOL, QUERY

CONFIG = AssociativeConfig()
SIZE = CONFIG.segment_length


def pairs_of(tokens: np.ndarray) -> list[tuple[int, int]]:
    """The key and value of each segment but the last, in order."""
    found = []
    for segment in tokens.reshape(-1, SIZE)[:-1]:
        key, value = segment[segment != BLANK].tolist()
        assert segment.tolist().index(value) == segment.tolist().index(key) + 1
        found.append((key, value))
    return found


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


def test_every_segment_holds_a_pair_and_the_last_asks_for_one() -> None:
    for index in range(200):
        item = make_item(CONFIG, 0, index)
        pairs = pairs_of(item.tokens)
        assert CONFIG.min_pairs <= len(pairs) <= CONFIG.max_pairs
        assert len({key for key, _ in pairs}) == len(pairs)
        assert all(FIRST_SYMBOL <= key < CONFIG.first_value for key, _ in pairs)
        assert all(CONFIG.first_value <= value < CONFIG.vocab_size for _, value in pairs)
        *blanks, mark, asked = item.tokens[-SIZE:].tolist()
        assert blanks == [BLANK] * (SIZE - 2)
        assert mark == QUERY
        assert dict(pairs)[asked] == item.answer
        assert [key for key, _ in pairs].index(asked) == len(pairs) - 1 - item.distractors


def test_all_pairs_keys_values_and_places_are_equally_likely() -> None:
    config = AssociativeConfig(min_pairs=4)
    items = [make_item(config, 1, index) for index in range(3000)]
    places = [np.flatnonzero(item.tokens[:SIZE])[0] for item in items]
    for values, kinds in (
        ([item.distractors for item in items], range(4)),
        ([item.answer for item in items], range(config.first_value, config.vocab_size)),
        ([pairs_of(item.tokens)[2][0] for item in items], range(FIRST_SYMBOL, config.first_value)),
        (places, range(SIZE - 1)),
    ):
        expected = len(items) / len(kinds)
        counts = np.bincount(values, minlength=kinds.stop)[kinds.start :]
        assert len(counts) == len(kinds)
        assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_a_batch_pads_on_the_right_and_scores_the_query_alone() -> None:
    batch = make_batch(CONFIG, 3, range(50))
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (50, 5 * SIZE)
    assert batch.inputs.shape[1] == CONFIG.max_length
    assert torch.equal(batch.mask.sum(1), batch.lengths)
    assert len(set(batch.lengths.tolist())) == 4
    for row in range(50):
        length = int(batch.lengths[row])
        item = make_item(CONFIG, 3, row)
        assert batch.inputs[row, :length].tolist() == item.tokens.tolist()
        assert batch.mask[row, :length].all()
        assert (batch.inputs[row, length:] == BLANK).all()
        assert batch.targets[row, length - 1] == batch.answers[row] == item.answer
    assert (batch.targets != -100).sum() == 50
    assert batch.inputs.max() < CONFIG.vocab_size


def test_who_looks_up_the_key_is_right_and_who_guesses_is_right_by_chance() -> None:
    batch = make_batch(CONFIG, 2, range(2000))
    rows = [row[mask].numpy() for row, mask in zip(batch.inputs, batch.mask, strict=True)]

    def share(guesses: list[int]) -> float:
        logits = torch.zeros(*batch.inputs.shape, CONFIG.vocab_size)
        logits[torch.arange(2000), batch.lengths - 1, torch.tensor(guesses)] = 1
        return float(batch.correct(logits).float().mean())

    assert share([dict(pairs_of(row))[row[-1]] for row in rows]) == 1
    sigma = (CONFIG.chance * (1 - CONFIG.chance) / 2000) ** 0.5
    assert abs(share([CONFIG.first_value] * 2000) - CONFIG.chance) < 5 * sigma


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_length": 1}, "segment_length is 1: give 2 or more"),
        ({"num_values": 1}, "num_values is 1: give 2 or more"),
        ({"min_pairs": 0}, "1 <= min_pairs"),
        ({"min_pairs": 5}, "min_pairs <= max_pairs"),
        ({"max_pairs": 33}, "raise num_keys"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AssociativeConfig(**options)
