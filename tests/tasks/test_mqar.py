"""Multi-query recall: a dictionary answers everything, and what it asks when is as stated."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from everlong.tasks import mqar
from everlong.tasks.mqar import MqarConfig, make_batch, make_item
from tasks.common import certain, check_chance, check_rows, check_stream, examples, show

CARD = MqarConfig(length=72, num_pairs=14, num_overwritten=7)  # tells delta rules from sums
FEW = MqarConfig(length=40, num_pairs=8, num_overwritten=3, num_queries=5, vocab_size=16)


def look_up(config: MqarConfig, row: list[int], overwrite: bool = True) -> list[int]:
    """At every token the value that last followed it before, 0 if none did."""
    known, found = {}, []
    for token, following in zip(row, [*row[1:], 0], strict=True):
        found.append(known.get(token, 0))
        if token < config.num_keys <= following and (overwrite or token not in known):
            known[token] = following
    return found


def test_the_docstring_shows_an_item() -> None:
    config = MqarConfig(length=16, num_pairs=3, num_overwritten=1, vocab_size=16)
    letters = "abcdefgh12345678"
    assert examples(mqar) == [show(make_batch(config, 0, [2]), letters)]


@pytest.mark.parametrize("config", [MqarConfig(), CARD, FEW])
def test_items_are_a_stream_of_their_own(config: MqarConfig) -> None:
    check_stream(make_batch, config)
    check_rows(make_batch(config, 0, range(20)), config)


@pytest.mark.parametrize(
    "config", [MqarConfig(), CARD, FEW, MqarConfig(24, 8, vocab_size=16), MqarConfig(3, 1)]
)
def test_who_looks_up_what_last_followed_is_right_and_who_keeps_the_first_is_not(
    config: MqarConfig,
) -> None:
    batch = make_batch(config, 1, range(200))
    rows = batch.inputs.tolist()
    assert (batch.correct(certain(config, [look_up(config, row) for row in rows])) == 1).all()

    stale = certain(config, [look_up(config, row, overwrite=False) for row in rows])
    asked = batch.targets != -100
    assert torch.equal(batch.hits(stale), asked & ~batch.overwritten)
    kept = (asked & ~batch.overwritten).sum(1) / config.queries
    assert torch.equal(batch.correct(stale), kept)
    if config.num_overwritten:
        assert batch.hits(stale)[batch.overwritten].float().mean() == 0


def test_writes_come_first_and_each_key_is_asked_for_once() -> None:
    assert (CARD.written, CARD.queries, CARD.length) == (42, 14, 72)
    for config in (CARD, FEW):
        for index in range(50):
            item = make_item(config, 2, index)
            tokens, size = item.tokens, 2 * config.num_pairs
            pairs = tokens[: config.written].reshape(-1, 2)
            assert (pairs[:, 0] < config.num_keys).all()
            assert (pairs[:, 1] >= config.num_keys).all()
            first, again = pairs[: config.num_pairs], pairs[config.num_pairs :]
            assert len(set(first[:, 0])) == len(set(first[:, 1])) == config.num_pairs
            assert len(set(again[:, 0])) == config.num_overwritten
            assert all(dict(first.tolist())[key] != value for key, value in again.tolist())
            asked = item.targets != -100
            assert not asked[: config.written].any()
            keys = tokens[asked]
            assert len(set(keys)) == len(keys) == config.queries
            assert np.isin(keys, first[:, 0]).all()
            assert (item.overwritten[asked] == np.isin(keys, again[:, 0])).all()
            assert not item.overwritten[~asked].any()
            # no filler is one of the keys that were written
            fillers = tokens[config.written :][~asked[config.written :]]
            assert not np.isin(fillers, tokens[:size:2]).any()


def test_fillers_are_drawn_from_the_other_keys_and_all_values_alike() -> None:
    config = MqarConfig(length=64, num_pairs=2, vocab_size=8)
    items = [make_item(config, 0, index) for index in range(500)]
    fillers = np.concatenate([item.tokens[4:][item.targets[4:] == -100] for item in items])
    counts = np.bincount(fillers, minlength=8)
    expected = len(fillers) / 6 * np.array([0.5] * 4 + [1] * 4)  # half the keys are others
    assert np.abs(counts - expected).max() < 0.1 * expected.min()


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1])
def test_gaps_follow_the_power_law(power_a: float) -> None:
    config = MqarConfig(length=20, num_pairs=2, num_queries=1, power_a=power_a)
    batch = make_batch(config, 4, range(1500))
    gaps = (batch.targets != -100).int().argmax(1) - config.written
    weights = np.arange(1, 17) ** (power_a - 1.0)
    expected = 1500 * weights / weights.sum()
    counts = np.bincount(gaps, minlength=16)
    assert (np.abs(counts - expected) < 5 * expected**0.5).all()


def test_any_pair_may_be_asked_for_first_and_any_may_be_overwritten() -> None:
    batch = make_batch(CARD, 6, range(700))
    rows = torch.arange(700)
    first = batch.inputs[rows, (batch.targets != -100).int().argmax(1)]
    pair = (batch.inputs[:, :28:2] == first[:, None]).int().argmax(1)
    again = (batch.inputs[:, :28:2] == batch.inputs[:, 28:29]).int().argmax(1)
    for counts in (np.bincount(pair, minlength=14), np.bincount(again, minlength=14)):
        assert np.abs(counts - 50).max() < 5 * 50**0.5


def test_chance() -> None:
    batch = make_batch(CARD, 3, range(300))
    check_chance(batch, CARD)
    plain = make_batch(replace(CARD, num_overwritten=0), 3, range(300))
    shown = plain.inputs[:, 1:2].expand(-1, 72)  # the first pair's value, whatever is asked
    assert torch.allclose(plain.correct(certain(CARD, shown)), torch.tensor(1 / 14))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 3}, "vocab_size is 3: give 4 or more"),
        ({"num_pairs": 0}, "num_pairs is 0: give 1 or more"),
        ({"num_pairs": 33, "length": 999}, "raise vocab_size to 66 or more"),
        ({"num_overwritten": -1}, "num_overwritten is -1: give 0 to 8, which is num_pairs"),
        ({"num_overwritten": 9}, "num_overwritten is 9: give 0 to 8"),
        ({"num_queries": 9}, "num_queries is 9: give 1 to 8"),
        ({"num_queries": 0}, "num_queries is 0: give 1 to 8"),
        ({"power_a": 0}, "power_a is 0: give a number above 0, 1 at most"),
        ({"power_a": 1.5}, "power_a is 1.5"),
        ({"length": 23}, "length is 23: 16 tokens of writes and 8 questions need 24 or more"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MqarConfig(**options)
