"""The copy task: item i is a function of (config, seed, i), and the source is out of reach."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everlong.tasks.copying import (
    FIRST_SYMBOL,
    MARK,
    CopyConfig,
    make_batch,
    make_source,
)
from everlong.tasks.recall import BLANK, IGNORED

CONFIG = CopyConfig(max_segments=3)


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_an_item_depends_on_seed_and_index_alone(seed: int, index: int) -> None:
    first, again = make_source(CONFIG, seed, index), make_source(CONFIG, seed, index)
    assert first.tolist() == again.tolist()


def test_seeds_and_indices_give_other_items() -> None:
    def sources(seed: int, first: int) -> list[list[int]]:
        return [make_source(CONFIG, seed, index).tolist() for index in range(first, first + 9)]

    assert sources(0, 0) != sources(1, 0)
    assert sources(0, 0) != sources(0, 9)


@given(st.permutations(range(7)))
def test_a_row_is_the_same_in_any_batch(order: list[int]) -> None:
    whole = make_batch(CONFIG, 5, order)
    for row, index in enumerate(order):
        alone = make_batch(CONFIG, 5, [index])
        for name in ("inputs", "targets", "mask", "lengths"):
            assert torch.equal(getattr(whole, name)[row], getattr(alone, name)[0])


def test_the_global_generators_are_not_touched() -> None:
    before, torch_before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    make_batch(CONFIG, 0, range(4))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_a_row_is_its_source_and_then_the_source_again_one_late() -> None:
    batch = make_batch(CONFIG, 1, range(60))
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (60, 24)
    assert torch.equal(batch.mask.sum(1), batch.lengths)
    assert set(batch.lengths.tolist()) == {8, 16, 24}
    for row, length in enumerate(batch.lengths.tolist()):
        inputs, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
        source, size = make_source(CONFIG, 1, row).tolist(), length // 2
        assert len(source) == size
        assert batch.mask[row, :length].all()
        assert inputs[:length] == [*source, MARK, *source[:-1]]
        assert targets[size:length] == source
        assert targets[:size] == [IGNORED] * size
        assert inputs[length:] == [BLANK] * (24 - length)
        assert targets[length:] == [IGNORED] * (24 - length)
        assert min(source) >= FIRST_SYMBOL
        assert max(source) < CONFIG.vocab_size


def test_every_symbol_and_number_of_segments_is_equally_likely() -> None:
    sources = [make_source(CONFIG, 2, index) for index in range(3000)]
    for values, kinds in (
        (np.array([len(source) // 4 for source in sources]), range(1, 4)),
        (np.concatenate(sources), range(FIRST_SYMBOL, FIRST_SYMBOL + 8)),
    ):
        counts = np.bincount(values, minlength=max(kinds) + 1)[kinds.start :]
        expected = len(values) / len(kinds)
        assert len(counts) == len(kinds)
        assert np.abs(counts - expected).max() < 5 * expected**0.5


def certain(guesses: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] whose likeliest tokens are `guesses` [B, T]."""
    return torch.nn.functional.one_hot(guesses, CONFIG.vocab_size).float()


def test_who_remembers_the_source_is_right_and_who_looks_one_symbol_back_is_right_by_chance() -> (
    None
):
    batch = make_batch(CONFIG, 3, range(1500))
    rows = torch.arange(1500)[:, None]
    back = (torch.arange(24) - batch.lengths[:, None] // 2).clamp(min=0)
    assert (batch.correct(certain(batch.inputs[rows, back])) == 1).all()
    sigma = (CONFIG.chance * (1 - CONFIG.chance) / (batch.targets != IGNORED).sum()) ** 0.5
    for guess in (batch.inputs, torch.full_like(batch.inputs, FIRST_SYMBOL)):
        found = batch.correct(certain(guess))
        share = float((found * batch.lengths).sum() / batch.lengths.sum())
        # of each reproduction's first position, the mark is no symbol: 1 / 4 of them at most
        assert CONFIG.chance * 0.75 - 6 * sigma < share < CONFIG.chance + 6 * sigma


def test_the_share_of_a_row_counts_its_targets_alone() -> None:
    config = CopyConfig(min_segments=1, max_segments=1)
    batch = make_batch(config, 0, range(2))
    guesses = batch.targets.clamp(min=0)
    guesses[0, 5] = BLANK
    guesses[:, :4] = MARK
    assert batch.correct(certain(guesses)).tolist() == [0.75, 1.0]


@pytest.mark.parametrize(("k", "layers", "reached"), [(1, 1, 1), (2, 1, 0), (2, 2, 1), (3, 2, 0)])
def test_what_caches_of_one_segment_reach(k: int, layers: int, reached: float) -> None:
    """Information flows from token to token, layer by layer, as the cache lets it."""
    config = CopyConfig(min_segments=k, max_segments=k)
    places = np.arange(config.max_length)
    distance = places[:, None] - places
    cached = places // 4 * 4 - 4  # the first token that a position's layer sees
    seen = (distance >= 0) & (places >= cached[:, None])
    through = np.eye(len(places), dtype=bool)
    for _ in range(layers):
        through = seen @ through
    queries = places[len(places) // 2 :]
    assert through[queries, queries - len(queries)].mean() == reached


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_length": 0}, "1 or more"),
        ({"num_symbols": 1}, "2 or more"),
        ({"min_segments": 0}, "1 <= min_segments"),
        ({"min_segments": 3}, "min_segments <= max_segments"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CopyConfig(**options)
