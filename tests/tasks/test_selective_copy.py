"""Selective copying: the symbols alone, in their order, are the answer, wherever they stood."""

import numpy as np
import pytest

from everlong.tasks import selective_copy
from everlong.tasks.copying import FIRST_SYMBOL, MARK
from everlong.tasks.recall import BLANK
from everlong.tasks.selective_copy import SelectiveCopyConfig, make_batch
from tasks.common import certain, check_chance, check_rows, check_stream, examples, show

CONFIG = SelectiveCopyConfig(length=20, num_copied=5)


def test_the_docstring_shows_an_item() -> None:
    config = SelectiveCopyConfig(length=16, num_copied=4)
    assert examples(selective_copy) == [show(make_batch(config, 0, [0]), ".Mabcdefgh")]


def test_items_are_a_stream_of_their_own() -> None:
    check_stream(make_batch, CONFIG)
    check_rows(make_batch(CONFIG, 0, range(20)), CONFIG)
    check_chance(make_batch(CONFIG, 3, range(500)), CONFIG)


@pytest.mark.parametrize("config", [CONFIG, SelectiveCopyConfig(10, 5), SelectiveCopyConfig()])
def test_who_skips_the_noise_is_right_and_every_mark_counts(config) -> None:
    batch = make_batch(config, 1, range(200))
    n = config.num_copied
    answers = [[t for t in row if t not in (BLANK, MARK)] for row in batch.inputs.tolist()]
    assert {len(answer) for answer in answers} == {n}
    guesses = np.array([[BLANK] * (config.length - n) + answer for answer in answers])
    assert (batch.correct(certain(config, guesses)) == 1).all()
    guesses[:, -1] = BLANK
    assert batch.correct(certain(config, guesses)).tolist() == pytest.approx([1 - 1 / n] * 200)
    assert (batch.inputs[:, -n:] == MARK).all()
    assert (batch.inputs[:, :-n] != MARK).all()
    assert (batch.targets[:, :-n] == -100).all()


def test_no_fixed_delay_finds_the_symbols() -> None:
    batch = make_batch(CONFIG, 4, range(200))
    for delay in range(CONFIG.length):
        late = np.roll(batch.inputs, delay, 1)
        assert batch.correct(certain(CONFIG, late)).mean() < 0.4


def test_every_place_and_symbol_is_equally_likely() -> None:
    source = make_batch(CONFIG, 2, range(1000)).inputs[:, :-5].numpy()
    symbols = np.bincount(source[source != BLANK])[FIRST_SYMBOL:]
    assert len(symbols) == CONFIG.num_symbols
    for counts in ((source != BLANK).sum(0), symbols):
        assert np.abs(counts - counts.mean()).max() < 5 * counts.mean() ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_copied": 0}, "num_copied is 0: give 1 or more"),
        ({"num_symbols": 1}, "num_symbols is 1: give 2 or more"),
        ({"length": 15}, "length is 15: 8 symbols and as many marks need 16 or more"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveCopyConfig(**options)
