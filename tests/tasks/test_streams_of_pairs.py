"""Interleaved streams: item i is a function of (config, seed, i) and holds every answer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everlong.tasks.streams_of_pairs import StreamsConfig, make_batch, make_item

CONFIG = StreamsConfig(num_streams=3, num_pairs=5, num_keys=7, num_values=4)


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_an_item_depends_on_seed_and_index_alone(seed, index):
    first, again = make_item(CONFIG, seed, index), make_item(CONFIG, seed, index)
    assert first.tokens.tolist() == again.tokens.tolist()
    assert first.targets.tolist() == again.targets.tolist()


def test_seeds_and_indices_give_other_items():
    def items(seed, first):
        return [make_item(CONFIG, seed, index).tokens.tolist() for index in range(first, first + 9)]

    assert items(0, 0) != items(1, 0)
    assert items(0, 0) != items(0, 9)


def test_the_global_generators_are_not_touched():
    before, torch_before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    make_batch(CONFIG, 0, range(4))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_every_pair_is_told_once_and_asked_for_once_in_another_order():
    streams = CONFIG.streams()
    shared = 0
    for index in range(50):
        item = make_item(CONFIG, 0, index)
        told, asked = item.tokens[: 2 * 15].reshape(-1, 2).tolist(), item.tokens[2 * 15 :].tolist()
        pairs = dict(told)
        assert len(item.tokens) == len(item.targets) == CONFIG.max_length
        assert len(pairs) == 15
        assert sorted(pairs) == sorted(asked)
        assert (item.targets[: 2 * 15] == -100).all()
        assert item.targets[2 * 15 :].tolist() == [pairs[key] for key in asked]
        for key, value in told:
            assert 0 <= key < CONFIG.first_value <= value < CONFIG.vocab_size
            assert streams[key] == streams[value]
        assert [list(pairs).index(key) for key in asked] != list(range(15))
        by_stream = [{key % 7 for key in pairs if key // 7 == s} for s in range(3)]
        assert all(len(keys) == 5 for keys in by_stream)
        shared += len(set.intersection(*by_stream))
    assert shared > 0


def test_streams_interleave_and_answers_are_equally_likely():
    batch = make_batch(CONFIG, 1, range(600))
    assert len(CONFIG.streams()) == CONFIG.vocab_size
    first = CONFIG.streams()[batch.inputs[:, 0]]
    assert (first.bincount() - 200).abs().max() < 5 * 200**0.5
    changes = CONFIG.streams()[batch.inputs[:, :30:2]].diff(dim=1) != 0
    assert 0.6 < changes.float().mean() < 0.8  # 10 of 14 are expected
    answers = batch.targets[batch.targets != -100] - CONFIG.first_value
    expected = len(answers) / 12
    assert (answers.bincount(minlength=12) - expected).abs().max() < 5 * expected**0.5


def test_who_looks_up_is_right_and_who_takes_the_other_stream_is_right_by_chance():
    batch = make_batch(CONFIG, 2, range(300))
    logits = torch.zeros(*batch.inputs.shape, CONFIG.vocab_size)
    asked = batch.targets != -100
    targets = batch.targets[asked]
    logits[asked] = torch.nn.functional.one_hot(targets, CONFIG.vocab_size).float()
    assert batch.correct(logits).all()
    assert batch.correct(logits).shape == (300, 15)
    assert batch.mask.all()
    guess = targets - (targets - CONFIG.first_value) % 4  # the first value of the right stream
    logits[asked] = torch.nn.functional.one_hot(guess, CONFIG.vocab_size).float()
    share = float(batch.correct(logits).float().mean())
    assert abs(share - CONFIG.chance) < 5 * (0.25 * 0.75 / 4500) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_streams": 0}, "num_streams is 0: give 1 or more"),
        ({"num_pairs": 0}, "num_pairs is 0"),
        ({"num_values": 1}, "num_values is 1: give 2 or more"),
        ({"num_pairs": 17}, "raise num_keys"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StreamsConfig(**options)
