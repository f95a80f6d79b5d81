"""Signals, divergence, a full disk: a run stops cleanly, and goes on to the same bits."""

import errno
import json
import math
import os
import resource
import signal

import pytest
import torch

from everlong.errors import DamagedCheckpoint, Diverged, Interrupted, UserError
from everlong.training import checkpoints, run
from everlong.training.learner import Learner
from everlong.training.loop import train
from training.small_run import small_config, small_model, small_texts

TEXTS = small_texts(90, 31, 160, 12, 77, 240)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# How it resumes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Nine steps in one go."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    model = small_model()
    train(model, TEXTS, small_texts(60), small_config(steps=9), run_dir)
    return run_dir, weights(model)


def lines_of(run_dir):
    return [run.without_times(line) for line in run.read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(tmp_path, whole, number, code):
    run_dir = tmp_path / "a run"

    def ask(line):
        if line["step"] == 4:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stop:
        train(small_model(), TEXTS, small_texts(60), small_config(steps=9), run_dir, on_step=ask)
    assert signal.getsignal(number) is before
    assert stop.value.exit_code == code
    assert stop.value.resume == f"everlong train --resume '{run_dir}'"
    assert stop.value.resume in str(stop.value)
    assert "\n" not in str(stop.value)
    assert checkpoints.latest(run_dir).name == "checkpoint-00000004"
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # past the checkpoint, and torn
    model = small_model(seed=99)
    train(model, TEXTS, small_texts(60), small_config(steps=9), run_dir, resume=run_dir)
    assert same(weights(model), whole[1])
    assert lines_of(run_dir) == lines_of(whole[0])


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def ask(line):
        if line["step"] == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("still running")

    with pytest.raises(KeyboardInterrupt):
        train(small_model(), TEXTS, None, small_config(eval_every=0), tmp_path, on_step=ask)
    assert checkpoints.latest(tmp_path).name == "checkpoint-00000000"


def test_a_signed_checkpoint_of_another_form_is_damaged(tmp_path):
    config = small_config(steps=1, eval_every=0)
    train(small_model(), TEXTS, None, config, tmp_path)
    path = checkpoints.latest(tmp_path)
    told = json.loads((path / "training.json").read_text())
    (path / "training.json").write_text(json.dumps(told | {"progress": {"list": [1]}}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["training.json"] = checkpoints._sha256(path / "training.json")
    del manifest["sha256"]
    manifest["sha256"] = checkpoints._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match=r"training\.json is damaged \(TypeError"):
        train(small_model(), TEXTS, None, config, tmp_path, resume=tmp_path)


def test_an_older_checkpoint_can_be_resumed_by_name(tmp_path, whole):
    config = small_config(steps=9)
    train(small_model(), TEXTS, small_texts(60), config, tmp_path)
    damaged = tmp_path / "checkpoint-00000009" / "state.safetensors"
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    older = tmp_path / "checkpoint-00000005"
    with pytest.raises(DamagedCheckpoint, match=f"resume from {older} instead"):
        train(small_model(), TEXTS, small_texts(60), config, tmp_path, resume=tmp_path)
    train(small_model(), TEXTS, small_texts(60), config, tmp_path, resume=older)
    assert lines_of(tmp_path) == lines_of(whole[0])
    assert (tmp_path / "abandoned-checkpoint-00000009").is_dir()
    assert checkpoints.latest(tmp_path).name == "checkpoint-00000009"


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    for steps in (3, 5):
        config = small_config(steps=steps, schedule="constant", eval_every=0)
        resume = None if steps == 3 else tmp_path
        result = train(small_model(), TEXTS, None, config, tmp_path, resume=resume)
    straight = small_config(steps=5, schedule="constant", eval_every=0)
    expected = train(small_model(), TEXTS, None, straight, tmp_path / "straight").metrics
    assert run.without_times(result.metrics) == run.without_times(expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": {"batch_size": 2}}, "was trained with batch_size = 3"),
        ({"config": {"seed": 8}}, "was trained with seed = 7"),
        ({"texts": TEXTS[1:]}, "the data the run was started with"),
        ({"model": {"hidden_size": 32}}, "the weights of another model"),
        ({"run_dir": "elsewhere"}, "resume a run in its own folder"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, whole, changed, message):
    config = small_config(steps=9, **changed.get("config", {}))
    model = small_model(**changed.get("model", {}))
    folder = tmp_path / changed["run_dir"] if "run_dir" in changed else whole[0]
    texts = changed.get("texts", TEXTS)
    with pytest.raises(UserError, match=message):
        train(model, texts, small_texts(60), config, folder, resume=whole[0])


# How it fails


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_divergence_stops_before_the_step_and_names_the_checkpoint(tmp_path, bad):
    model, kept = small_model(), {}

    def spoil(line):
        if line["step"] == 7:
            model.lm_head.weight.data[0, 0] = bad
            kept.update(weights(model))

    with pytest.raises(Diverged) as error:
        train(model, TEXTS, None, small_config(eval_every=0), tmp_path, on_step=spoil)
    message = str(error.value)
    assert message.startswith("step 8 diverged")
    assert str(tmp_path / "checkpoint-00000005") in message
    assert "\n" not in message
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), kept[name].nan_to_num()), "the step was not made"
    assert checkpoints.latest(tmp_path).name == "checkpoint-00000005"


# What comes after step 7, whose update breaks the weights; checkpoints are of 0, 5, 10, ...
BROKEN = {
    "checkpoint": {"checkpoint_every": 7},
    "end": {"steps": 7},
    "validation": {"eval_every": 7},
    "another step": {},
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("what", BROKEN)
def test_weights_that_an_update_broke_are_never_written(tmp_path, monkeypatch, what, bad):
    model, update = small_model(), Learner.update

    def broken(self, count):
        rate = update(self, count)
        if self.step == 7:
            model.lm_head.weight.data[0, 0] = bad
        return rate

    monkeypatch.setattr(Learner, "update", broken)
    config = small_config(**{"eval_every": 0} | BROKEN[what])
    with pytest.raises(Diverged) as error:
        train(model, TEXTS, small_texts(60), config, tmp_path)
    message, last = str(error.value), 0 if what == "checkpoint" else 5
    assert message.startswith(f"step {8 if what == 'another step' else 7} diverged")
    assert f"{tmp_path / f'checkpoint-{last:08d}'}, with a lower" in message
    assert "\n" not in message
    assert checkpoints.steps(tmp_path)[-1] == last
    assert not (tmp_path / "model").exists()
    lines = run.read_metrics(tmp_path / "metrics.jsonl")
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_a_signal_writes_no_broken_weights(tmp_path):
    model = small_model()

    def spoil(line):
        if line["step"] == 2:
            model.lm_head.weight.data[0, 0] = math.nan
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Diverged, match="checkpoint-00000000, with a lower"):
        train(model, TEXTS, None, small_config(eval_every=0), tmp_path, on_step=spoil)
    assert checkpoints.steps(tmp_path) == [0]


def test_a_far_too_high_learning_rate_diverges(tmp_path):
    config = small_config(steps=1, warmup_steps=0, learning_rate=1e39, eval_every=0)
    with pytest.raises(Diverged, match="step 1 diverged: it made weights not finite"):
        train(small_model(), TEXTS, None, config, tmp_path)
    assert checkpoints.steps(tmp_path) == [0]


def test_a_model_of_broken_weights_is_not_trained(tmp_path):
    model = small_model()
    model.lm_head.weight.data[0, 0] = math.inf
    with pytest.raises(UserError, match="the model has weights that are not finite"):
        train(model, TEXTS, None, small_config(), tmp_path)
    assert checkpoints.steps(tmp_path) == []


@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_a_full_disk_stops_with_one_line(tmp_path, monkeypatch, what):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(line):
        if line["step"] == 7:
            monkeypatch.setattr(checkpoints, "save_model", refuse)

    steps = 7 if what == "model" else 26
    config = small_config(steps=steps, eval_every=0)
    with pytest.raises(UserError, match="No space left on device") as error:
        train(small_model(), TEXTS, None, config, tmp_path, on_step=fill)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    monkeypatch.undo()
    latest = checkpoints.latest(tmp_path)
    assert latest.name == f"checkpoint-{7 if what == 'model' else 5:08d}"
    assert not list(tmp_path.glob(".*"))
    train(small_model(), TEXTS, None, small_config(eval_every=0), tmp_path, resume=tmp_path)


def test_metrics_on_a_full_disk(tmp_path):
    """A file size limit in place of a small disk: the kernel cuts a line in the middle."""
    metrics = run.Metrics(tmp_path, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
        metrics.write({"step": 1, "loss": 0.5})
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: File too large"):
            metrics.write({"step": 2, "loss": 0.25})
        metrics.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len((tmp_path / "metrics.jsonl").read_bytes()) == 40
    run.Metrics(tmp_path, 1).close()
    assert run.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
