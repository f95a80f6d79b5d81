"""Document-contiguous batches: every byte a target once, rows that stay on their document."""

import json
from itertools import chain, islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.errors import UserError
from everlong.tasks.text import BOS, load_documents
from everlong.training.streams import IGNORE, DocumentStream, cut, segments, validation_batches


def texts(*lengths):
    """Documents whose bytes are all different from those before, up to 256."""
    starts = np.cumsum([0, *lengths])
    return [np.arange(a, b).astype(np.uint8) for a, b in pairwise(starts)]


def read_rows(batches):
    """Per row, the pieces it read: (inputs, targets) of its real positions, split at resets."""
    pieces = []
    open_rows: dict[int, list] = {}
    for batch in batches:
        for row in range(len(batch["reset"])):
            mask = batch["mask"][row]
            if not bool(mask.any()):
                assert not bool(batch["reset"][row])
                continue
            if bool(batch["reset"][row]):
                open_rows[row] = [[], []]
                pieces.append(open_rows[row])
            real = int(mask.sum())
            assert bool(mask[:real].all()), "a row's real positions come first"
            open_rows[row][0] += batch["inputs"][row, :real].tolist()
            open_rows[row][1] += batch["targets"][row, :real].tolist()
            assert bool((batch["targets"][row, real:] == IGNORE).all())
    return pieces


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda ls: sum(ls) > 0)


@settings(deadline=None, max_examples=60)
@given(lengths=lengths, rows=st.integers(1, 5), length=st.integers(1, 17))
def test_validation_scores_every_byte_once(lengths, rows, length):
    documents = texts(*lengths)
    pieces = read_rows(validation_batches(documents, batch_size=rows, length=length))
    scored = []
    for inputs, targets in pieces:
        valid = [t for t in targets if t != IGNORE]
        assert inputs[0] == BOS
        assert inputs[1:] == valid[: len(inputs) - 1], "inputs are the targets, one later"
        assert targets[: len(valid)] == valid, "only the last position has no target"
        assert len(targets) - len(valid) <= 1
        scored.append(valid)
    whole = np.concatenate(documents).tolist()
    assert sorted(chain(*scored)) == whole  # bytes are distinct
    assert all(piece in (whole[i : i + len(piece)] for i in range(len(whole))) for piece in scored)


@settings(deadline=None, max_examples=60)
@given(lengths=lengths, rows=st.integers(1, 5), length=st.integers(1, 17), seed=st.integers(0, 9))
def test_an_epoch_of_training_scores_every_byte_once(lengths, rows, length, seed):
    if sum(lengths) < rows:
        rows = 1
    documents = texts(*lengths)
    stream = DocumentStream(documents, batch_size=rows, length=length, seed=seed)
    number = len(cut(lengths, rows))
    batches = list(islice(stream, number))  # a piece is at least one rollout
    while stream.epoch == 0:
        batches.append(next(stream))
    batches += islice(stream, max(lengths))  # the pieces that are open are read to their ends
    first = [targets for _, targets in read_rows(batches)[:number]]
    first_epoch = sorted(t for t in chain(*first) if t != IGNORE)
    assert first_epoch == sorted(np.concatenate(documents).tolist())


def test_targets_continue_across_rollouts():
    stream = DocumentStream(texts(20), batch_size=1, length=6)
    batches = list(islice(stream, 4))
    inputs = torch.cat([batch["inputs"][0] for batch in batches])
    targets = torch.cat([batch["targets"][0] for batch in batches])
    assert inputs.tolist()[:21] == [BOS, *range(20)]
    assert targets.tolist()[:21] == [*range(20), IGNORE]
    assert [bool(batch["reset"][0]) for batch in batches] == [True, False, False, False]
    assert batches[3]["mask"][0].tolist() == [True, True, True, False, False, False]
    assert bool(next(stream)["reset"][0]), "the next document begins at the next rollout"


def test_fewer_documents_than_rows_are_cut_into_equal_pieces():
    pieces = cut([100, 0, 20], 6)
    assert [(d, b - a) for d, a, b in pieces.tolist()] == [(0, 20)] * 5 + [(2, 20)]
    assert cut([5, 6, 7], 2).tolist() == [[0, 0, 5], [1, 0, 6], [2, 0, 7]]
    with pytest.raises(UserError, match="3 tokens, too few for 4 rows"):
        cut([3], 4)


def test_every_rollout_has_a_target_in_every_row():
    stream = DocumentStream(texts(4, 8, 3), batch_size=2, length=4)  # ends on rollout boundaries
    for batch in islice(stream, 20):
        assert bool((batch["targets"] != IGNORE).any(1).all())


def test_epochs_are_shuffled_by_the_seed_alone():
    def order(seed):
        stream = DocumentStream(texts(*[4] * 9), batch_size=1, length=4, seed=seed)
        return [int(batch["targets"][0, 0]) // 4 for batch in islice(stream, 27)]

    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002 (that nobody touched it)
    torch_state = torch.get_rng_state()
    one = order(1)
    assert sorted(one[:9]) == sorted(one[9:18]) == list(range(9))
    assert one[:9] != one[9:18]
    assert one == order(1)
    assert one != order(2)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("read", [0, 1, 7, 30])
def test_resumes_from_json(read):
    documents, arguments = texts(30, 11, 3, 50), {"batch_size": 3, "length": 7, "seed": 5}
    stream = DocumentStream(documents, **arguments)
    list(islice(stream, read))
    position = json.loads(json.dumps(stream.state_dict()))
    resumed = DocumentStream(documents, **arguments)
    resumed.load_state_dict(position)
    for expected, found in zip(islice(stream, 40), islice(resumed, 40), strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def edited(documents):
    """Of the same lengths, with one byte changed."""
    return [*documents[:-1], np.where(np.arange(len(documents[-1])) == 5, 0, documents[-1])]


@pytest.mark.parametrize("others", [texts(30, 12), edited(texts(30, 11))])
def test_a_position_of_another_text_is_refused(others):
    position = DocumentStream(texts(30, 11), batch_size=2, length=7).state_dict()
    other = DocumentStream(others, batch_size=2, length=7)
    with pytest.raises(UserError, match="the data the run was started with"):
        other.load_state_dict(position)


def test_reads_a_file_in_runs(tmp_path):
    file = tmp_path / "big"
    np.arange(1000).astype(np.uint8).tofile(file)
    documents = load_documents(file)
    in_memory = [np.fromfile(file, np.uint8)]
    mapped = [np.memmap(file, np.uint8, "r")]
    streams = [
        DocumentStream(source, batch_size=3, length=10) for source in (documents, in_memory, mapped)
    ]
    file_reads = []
    read = type(documents[0])._read
    for _ in range(5):
        batches = [next(stream) for stream in streams]
        for batch in batches[1:]:
            assert all(torch.equal(batch[name], batches[0][name]) for name in batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(documents[0]),
            "_read",
            lambda self, start, count: file_reads.append(count) or read(self, start, count),
        )
        next(streams[0])
    assert file_reads, "nothing was read"
    assert max(file_reads) <= 11, "a rollout reads what it needs"


def test_segments_leave_padding_out():
    batch = next(DocumentStream(texts(5), batch_size=1, length=12))
    cuts = segments(batch, 4)
    assert [segment["inputs"].shape[1] for segment in cuts] == [4, 4]
    assert ["mask" in segment for segment in cuts] == [False, True]
    assert cuts[1]["targets"].tolist() == [[4, IGNORE, IGNORE, IGNORE]]
    assert cuts[1]["mask"].tolist() == [[True, True, False, False]]


def test_an_empty_validation_text_is_refused():
    with pytest.raises(UserError, match="nothing to evaluate"):
        next(validation_batches([b""], batch_size=2, length=4))
