"""Keys written, forgotten and asked for: a key's last event is the answer, and nothing else."""

import numpy as np
import pytest

from everlong.tasks import key_updates
from everlong.tasks.key_updates import ASK, FORGET, NOTHING, KeyUpdatesConfig, make_batch
from tasks.common import certain, check_rows, check_stream, examples, show

CONFIG = KeyUpdatesConfig(length=48, num_keys=4, num_values=6)


def answers(row: list[int]) -> list[int]:
    """What a reader of the rules says at each place, -100 where nothing is asked."""
    found, held = [-100] * len(row), {}
    for at in range(0, len(row), 2):
        kind, other = row[at : at + 2]
        if kind == ASK:
            found[at + 1] = held[other]
        else:
            held |= {other: NOTHING} if kind == FORGET else {kind: other}
    return found


def test_the_docstring_shows_an_item():
    small = KeyUpdatesConfig(length=24, num_keys=4, num_values=4)
    assert examples(key_updates) == [show(make_batch(small, 0, [5]), "AFNabcd1234")]


def test_items_are_a_stream_of_their_own():
    check_stream(make_batch, CONFIG)
    check_rows(make_batch(CONFIG, 0, range(20)), CONFIG)


def test_who_keeps_the_last_event_of_every_key_is_right():
    batch = make_batch(CONFIG, 1, range(200))
    expected = [answers(row) for row in batch.inputs.tolist()]
    assert batch.targets.tolist() == expected
    assert (batch.targets != -100).any(1).all(), "every item asks"
    assert (batch.correct(certain(CONFIG, np.maximum(expected, 0))) == 1).all()
    assert batch.forgotten.equal(batch.targets == NOTHING)
    assert 0.05 < batch.forgotten.sum() / (batch.targets != -100).sum() < 0.35


def test_the_last_value_seen_is_no_answer():
    batch = make_batch(CONFIG, 2, range(300))
    tokens = batch.inputs.numpy()
    values = np.where(tokens >= CONFIG.first_value, tokens, 0)
    for at in range(1, tokens.shape[1]):
        values[:, at] = np.where(values[:, at] > 0, values[:, at], values[:, at - 1])
    assert batch.hits(certain(CONFIG, values)).sum() < 0.6 * (batch.targets != -100).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_keys": 0}, "num_keys is 0: give 1 or more"),
        ({"num_values": 1}, "num_values is 1: give 2 or more"),
        ({"asked": 1.5}, "asked is 1.5: give a share"),
        ({"asked": 0.0}, "asked 0.0 and forgotten 0.15 leave out questions or writes"),
        ({"asked": 0.9}, "leave out questions or writes"),
        ({"length": 7}, "length is 7: give an even number, 4 or more"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KeyUpdatesConfig(**options)
