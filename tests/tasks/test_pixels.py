"""Pixels: real digits as rows of tokens; what is held out is never trained on."""

from types import SimpleNamespace

import numpy as np
import pytest

from everlong.errors import UserError
from everlong.tasks import pixels
from everlong.tasks.pixels import PixelsConfig, digits, epochs, indices, make_batch

TASK = PixelsConfig(levels=4, test=10)


@pytest.fixture
def drawn(monkeypatch):
    """Thirty digits in scikit-learn's place; digit 0 holds all greys."""
    images = np.random.default_rng(0).integers(0, 17, (30, 8, 8)).astype(float)
    images[0].flat[:17] = range(17)
    package = SimpleNamespace(load_digits=lambda: SimpleNamespace(images=images))
    monkeypatch.setattr(pixels, "import_module", lambda name: package)
    digits.cache_clear()
    yield images
    digits.cache_clear()


def test_greys_become_levels_in_order_row_by_row(drawn):
    for levels in (2, 4, 17):
        tokens = digits(levels)
        assert tokens.shape == (30, 64)
        counts = np.bincount(tokens[0, :17], minlength=levels)
        assert (np.diff(tokens[0, :17]) >= 0).all()
        assert len(counts) == levels
        assert counts.max() - counts.min() <= 1
    assert digits(17).reshape(30, 8, 8).tolist() == drawn.tolist()


def test_every_digit_is_trained_on_or_held_out(drawn):
    train, test = (indices(TASK, 3, part) for part in ("train", "test"))
    assert len(test) == 10
    assert sorted([*train, *test]) == list(range(30))
    assert test.tolist() == indices(TASK, 3, "test").tolist()
    assert test.tolist() != indices(TASK, 4, "test").tolist()
    with pytest.raises(ValueError, match="leave some"):
        indices(PixelsConfig(test=30), 0, "test")


def test_an_epoch_shows_each_digit_once_and_none_that_is_held_out(drawn):
    batches = epochs(TASK, 0, 6, 7)
    assert [len(batch) for batch in batches] == [6] * 7
    for first in (0, 3):
        seen = np.concatenate(batches[first : first + 3])
        assert len(set(seen.tolist())) == 18
        assert not set(seen.tolist()) & set(indices(TASK, 0, "test").tolist())
    assert batches[0].tolist() != batches[3].tolist()
    with pytest.raises(ValueError, match="batch_size is 21"):
        epochs(TASK, 0, 21, 1)


def test_a_pixel_is_predicted_from_those_before_it(drawn):
    batch = make_batch(TASK, [4, 0])
    assert batch.targets.numpy().tolist() == digits(4)[[4, 0]].tolist()
    assert batch.inputs[:, 0].tolist() == [TASK.bos] * 2
    assert batch.inputs[:, 1:].tolist() == batch.targets[:, :-1].tolist()
    assert batch.mask.all()
    assert TASK.bos == 4 == TASK.vocab_size - 1


def test_the_real_digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    digits.cache_clear()
    tokens = digits(17)
    assert tokens.shape == (1797, 64)
    assert tokens[0, :8].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert (tokens.min(), tokens.max()) == (0, 16)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    def gone(name):
        raise ImportError(name)

    monkeypatch.setattr(pixels, "import_module", gone)
    digits.cache_clear()
    with pytest.raises(UserError, match="digits"):
        digits(4)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"levels": 1}, "levels is 1"), ({"levels": 18}, "have 17"), ({"test": 0}, "test is 0")],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        PixelsConfig(**options)
