"""A curriculum: short rollouts first, every byte a target all the same, the same bits resumed."""

import dataclasses
import json
from itertools import islice

import numpy as np
import pytest
import torch

from everlong.errors import UserError
from everlong.tasks.text import BOS
from everlong.training import checkpoints, run
from everlong.training.config import TrainConfig, learning_rate
from everlong.training.learner import Learner
from everlong.training.loop import train
from everlong.training.streams import IGNORE, DocumentStream, as_documents, cut
from training.small_run import small_config, small_model, small_texts

STAGES = ((3, 1), (4, 2))
TEXTS = small_texts(90, 31, 160, 12, 77, 240, 8, seed=1)


class Killed(Exception):
    pass


def config(**options):
    given = {"steps": 12, "segments": 4, "curriculum": STAGES, "eval_every": 0}
    return small_config(**given | options)


def test_stages_come_in_order_and_the_last_number_holds():
    found = [config().segments_at(step) for step in range(12)]
    assert found == [1] * 3 + [2] * 4 + [4] * 5
    assert config(steps=99).segments_at(98) == 4
    assert [config(curriculum=()).segments_at(step) for step in (0, 9)] == [4, 4]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (0, ()),
        (2, ((2, 1),)),
        (3, ((3, 1),)),
        (5, ((3, 1), (2, 2))),
        (12, (*STAGES, (5, 4))),
    ],
)
def test_stages_are_those_that_the_steps_reach(steps, expected):
    mine = config(steps=steps)
    assert mine.stages == expected
    each = [segments for count, segments in mine.stages for _ in range(count)]
    assert each == [mine.segments_at(step) for step in range(steps)]


def test_a_huge_run_is_not_walked_through():
    assert config(steps=2**62).stages == (*STAGES, (2**62 - 7, 4))


def test_lists_of_toml_and_json_are_the_same():
    mine = config()
    again = TrainConfig(**json.loads(json.dumps(dataclasses.asdict(mine))))
    assert again == mine
    assert again.curriculum == STAGES
    assert TrainConfig().curriculum == ()


@pytest.mark.parametrize(
    "wrong",
    [
        [[1, 1], [2]],
        [3, 1],
        [[0, 1]],
        [[1, 0]],
        [[1, True]],
        [[1.0, 2]],
        [["1", 2]],
        [[1, 2**63]],
        [[-1, 2]],
        {"steps": 1},
        "11",
        7,
        None,
    ],
)
def test_impossible_curricula_are_refused(wrong):
    with pytest.raises(UserError, match=r"curriculum has the stage .*: give \[steps, segments\]"):
        config(curriculum=wrong)


def test_the_learning_rate_knows_of_no_stages():
    with_it, without = config(), config(curriculum=())
    assert [learning_rate(with_it, step) for step in range(12)] == [
        learning_rate(without, step) for step in range(12)
    ]


def learner(**options):
    model = small_model(dropout=0.0)
    return Learner(model, as_documents([b"abc" * 700]), config(**options).for_model(model))


def test_a_step_reads_the_segments_of_its_stage():
    mine, counts = learner(batch_size=1), []
    for _ in range(12):
        count, _ = mine.rollout()
        mine.update(count)
        counts.append(count)
    assert counts == [8 * segments for segments in [1] * 3 + [2] * 4 + [4] * 5]
    assert mine.tokens == sum(counts)


def test_rollouts_of_any_lengths_score_every_byte_once_an_epoch():
    sizes, rows = (30, 0, 11, 3, 50, 26), 3
    starts = np.cumsum([0, *sizes])
    documents = [
        np.arange(a, a + n).astype(np.uint8) for a, n in zip(starts, sizes, strict=False)
    ]  # all bytes are different
    stream = DocumentStream(documents, batch_size=rows, length=1, seed=4)
    pieces, open_rows = [], {}
    number = len(cut(sizes, rows))
    for length in (5, 1, 16, 2, 3, 9, 4, 1, 7, *[6] * 40):
        stream.length = length
        batch = next(stream)
        assert batch["inputs"].shape == (rows, length)
        for row in range(rows):
            real = int(batch["mask"][row].sum())
            if bool(batch["reset"][row]):
                open_rows[row] = ([], [])
                pieces.append(open_rows[row])
            open_rows[row][0].extend(batch["inputs"][row, :real].tolist())
            open_rows[row][1].extend(batch["targets"][row, :real].tolist())
    for inputs, targets in pieces:
        assert inputs[0] == BOS
        valid = [target for target in targets if target != IGNORE]
        assert targets[: len(valid)] == valid
        assert inputs[1:] == valid[: len(inputs) - 1], "rollouts of other lengths follow on"
    first_epoch = sorted(t for _, targets in pieces[:number] for t in targets if t != IGNORE)
    assert first_epoch == list(range(sum(sizes)))


@pytest.mark.parametrize("read", [0, 3, 9])
def test_a_position_resumes_whatever_the_lengths_before_it(read):
    def lengths():
        return islice([1, 7, 3, 12, 2] * 9, 30)

    stream = DocumentStream(TEXTS, batch_size=3, length=1, seed=5)
    expected, position = [], {}
    for index, length in enumerate(lengths()):
        if index == read:
            position = json.loads(json.dumps(stream.state_dict()))
        stream.length = length
        expected.append(next(stream))
    resumed = DocumentStream(TEXTS, batch_size=3, length=99, seed=5)
    resumed.load_state_dict(position)
    for index, length in enumerate(lengths()):
        if index >= read:
            resumed.length = length
            batch = next(resumed)
            assert all(torch.equal(batch[name], expected[index][name]) for name in batch)


def contents(run_dir):
    files = {
        str(path.relative_to(run_dir)): path.read_bytes()
        for folder in ("checkpoint-*", "model")
        for path in run_dir.glob(f"{folder}/*")
    }
    return files, [run.without_times(line) for line in run.read_metrics(run_dir / "metrics.jsonl")]


def stopped_after(step):
    def on_step(line):
        if line["step"] == step:
            raise Killed

    return on_step


def test_stopped_and_resumed_in_every_stage_it_ends_with_the_same_bits(tmp_path):
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    mine = config(checkpoint_every=2)
    held_out = small_texts(50, 70, seed=2)
    train(small_model(), TEXTS, held_out, mine, whole)
    for number, step in enumerate((2, 4, 9)):  # in each stage, on a checkpoint and off it
        resume = parts if number else None
        with pytest.raises(Killed):
            train(small_model(), TEXTS, held_out, mine, parts, resume, stopped_after(step))
    train(small_model(), TEXTS, held_out, mine, parts, resume=parts)
    (files, lines), (expected, expected_lines) = contents(parts), contents(whole)
    assert lines == expected_lines
    assert files == expected
    without = tmp_path / "without" / "run"
    train(small_model(), TEXTS, held_out, config(checkpoint_every=2, curriculum=()), without)
    assert contents(without)[1] != lines, "the curriculum changes what is read"


def test_validation_reads_full_rollouts_in_every_stage():
    held_out = small_texts(500, seed=2)
    found = []
    for curriculum in (STAGES, ()):
        mine = learner(curriculum=curriculum, batch_size=1, eval_batches=2)
        mine.rollout()  # no update: the weights stay
        found.append(mine.validate(held_out))
    assert found[0] == found[1]


def test_another_curriculum_is_not_resumed(tmp_path):
    run_dir = tmp_path / "run"
    train(small_model(), TEXTS, None, config(steps=2), run_dir)
    other = config(steps=4, curriculum=((3, 1),))
    with pytest.raises(UserError, match="was trained with curriculum = .*: go on with that"):
        train(small_model(), TEXTS, None, other, run_dir, resume=run_dir)


def test_a_checkpoint_from_before_there_were_curricula_is_resumed(tmp_path):
    run_dir = tmp_path / "run"
    mine = config(steps=2, curriculum=())
    train(small_model(), TEXTS, None, mine, run_dir)
    source = checkpoints.latest(run_dir)
    parts = checkpoints.load(source)
    del parts["config"]["curriculum"]
    resumed = Learner(small_model(), as_documents(TEXTS), mine.for_model(small_model()))
    resumed.restore(parts, source)
    assert resumed.step == 2
