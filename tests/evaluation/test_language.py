"""Bits per byte: each byte once, the memory carried or wiped, whatever the cut."""

import math

import pytest
import torch

from everlong import state as states
from everlong.errors import UserError
from everlong.evaluation.language import bits_per_byte
from everlong.tasks.text import Documents, encode
from training.small_run import small_model, small_texts

TEXTS = small_texts(70, 33, 8)


@pytest.fixture(scope="module")
def model():
    return small_model().double()


def score_bits(model, pieces):
    """The definition: log p of every byte of every piece, from a fresh stream that read bos."""
    with torch.no_grad():
        nats = [model.score(torch.from_numpy(encode(piece))[None])[0].sum() for piece in pieces]
    return -float(sum(nats)) / math.log(2) / sum(len(piece) for piece in pieces)


@pytest.mark.parametrize(("rows", "segments"), [(1, 1), (1, 5), (3, 2)])
def test_it_is_the_score_of_every_byte(model, rows, segments):
    model.train()
    found = bits_per_byte(model, TEXTS, batch_size=rows, segments=segments)
    assert model.training, "the mode is left as it was"
    model.eval()
    assert found.bits_per_byte == pytest.approx(score_bits(model, TEXTS), rel=1e-6)
    assert found.tokens == found.num_bytes == 111
    assert found.state_bytes == states.num_bytes(model.init_state(1))
    assert found.tokens_per_s == pytest.approx(111 / found.seconds)


def test_a_wiped_memory_knows_its_segment_alone(model):
    wiped = bits_per_byte(model, TEXTS[:1], batch_size=1, segments=3, wipe=True)
    model.eval()
    ids = torch.from_numpy(encode(TEXTS[0]))[None]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, 70, 8):  # position 0 is bos; the byte at i is predicted at i
            logits, _ = model.stream(ids[:, start : min(start + 8, 70)])
            targets = ids[0, start + 1 : start + 1 + logits.shape[1]]
            nats -= float(logits[0].log_softmax(-1)[torch.arange(len(targets)), targets].sum())
    assert wiped.bits_per_byte == pytest.approx(nats / math.log(2) / 70, rel=1e-6)
    assert wiped.tokens == 70
    whole = bits_per_byte(model, TEXTS[:1], batch_size=1, segments=3)
    assert whole.bits_per_byte != pytest.approx(wiped.bits_per_byte, rel=1e-4)


def test_fewer_documents_than_rows_are_scored_in_pieces(model):
    found = bits_per_byte(model, TEXTS[:1], batch_size=2)
    model.eval()
    halves = [TEXTS[0][:35], TEXTS[0][35:]]
    assert found.bits_per_byte == pytest.approx(score_bits(model, halves), rel=1e-6)


def test_bytes_are_those_of_the_text_not_of_its_tokens(model):
    from dataclasses import replace

    from everlong.training.streams import as_documents

    plain = as_documents(TEXTS)
    doubled = Documents("x", tuple(replace(d, num_bytes=2 * d.num_bytes) for d in plain))
    one, two = bits_per_byte(model, plain), bits_per_byte(model, doubled)
    assert two.bits_per_byte == pytest.approx(one.bits_per_byte / 2)


def test_a_part_of_the_text(model):
    first = bits_per_byte(model, TEXTS, batch_size=1, segments=1, max_rollouts=2)
    assert first.tokens == 16


def test_what_cannot_be_read_is_said(model):
    with pytest.raises(UserError, match="give segment_length"):
        bits_per_byte(small_model(segment=None), TEXTS)
    with pytest.raises(UserError, match="no multiple of the model's 8"):
        bits_per_byte(model, TEXTS, segment_length=12, wipe=True)
    with pytest.raises(UserError, match="nothing to evaluate"):
        bits_per_byte(model, [b""])
