"""The loop trains what it says it trains, stops cleanly, and leaves nothing behind."""

import errno
import json
import math
import os
import resource
import signal
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from everlong import state as states
from everlong.errors import DamagedCheckpoint, Diverged, Interrupted, UserError
from everlong.training import checkpoints, run
from everlong.training.config import TrainConfig, learning_rate, make_optimizer
from everlong.training.learner import Learner
from everlong.training.loop import train
from everlong.training.streams import as_documents
from training.small_run import small_config, small_model, small_texts

TEXTS = small_texts(90, 31, 160, 12, 77, 240)


def learner(model=None, texts=TEXTS, **options):
    model = model or small_model(dropout=0.0)
    config = small_config(**options).for_model(model)
    return Learner(model, as_documents(texts), config)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What a step computes


def test_a_step_is_the_gradient_of_the_mean_over_the_rollouts_targets():
    mine, model = learner(clip=1e9), small_model(dropout=0.0)
    batch = next(learner().stream)
    count, measured = mine.rollout()
    logits, state = model.stream(batch["inputs"], None, batch["mask"])
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)
    loss.backward()
    assert count == int((batch["targets"] != -100).sum())
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(measured, torch.stack([loss, norm]).detach())
    for a, b in zip(mine.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    pairs = zip(states.leaves(mine.state), states.leaves(state), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_rows_remember_across_rollouts_until_their_document_ends():
    mine = learner(batch_size=2, segments=2, texts=small_texts(400, 30))
    batches = list(islice(learner(batch_size=2, segments=2, texts=small_texts(400, 30)).stream, 3))
    assert [batch["reset"].tolist() for batch in batches] == [
        [True, True],
        [False, False],
        [True, False] if bool(batches[2]["reset"][0]) else [False, True],
    ]
    state = None
    for batch in batches:
        if state is not None:
            state = mine.model.reset(state, batch["reset"])
        with torch.no_grad():
            logits, state = mine.model.stream(batch["inputs"], state, batch["mask"])
            expected = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        _, measured = mine.rollout()  # no update: the weights stay
        torch.testing.assert_close(measured[0], expected)


def test_a_learned_initial_state_is_trained_at_every_document():
    # With one segment a rollout, the slots' bias v acts through the initial state v / |v| alone.
    mine = learner(batch_size=1, segments=1)
    bias = mine.model.get_parameter("body.core.writer.bias")
    fresh = []
    for _ in range(40):
        fresh.append(mine.stream._rows[0][1] == 0)
        mine.rollout()
        assert (bias.grad is not None) == fresh[-1]
    assert 1 < sum(fresh) < 40


def test_horizons_agree_with_dropout(tmp_path):
    losses = {}
    for method in ("full", "checkpoint", "replay"):
        lines = []
        config = small_config(steps=6, eval_every=0, horizon=method)
        model = small_model(dropout=0.2)
        train(model, TEXTS, None, config, tmp_path / method, on_step=lines.append)
        losses[method] = [line["loss"] for line in lines]
    assert losses["checkpoint"] == pytest.approx(losses["full"], rel=1e-5)
    assert losses["replay"] == pytest.approx(losses["full"], rel=1e-5)


def test_truncation_cuts_the_gradient():
    def writes_learn(**options):
        mine = learner(**options)
        mine.rollout()
        return mine.model.get_parameter("body.core.writer.value.weight").grad is not None

    assert writes_learn(horizon="truncated", truncate=2)
    assert not writes_learn(horizon="truncated", truncate=1)
    assert not writes_learn(horizon="replay", truncate=1)
    assert writes_learn(horizon="replay")


def test_bf16_stays_close(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        lines = []
        config = small_config(steps=5, eval_every=0, precision=precision)
        model = small_model(dropout=0.0)
        train(model, TEXTS, None, config, tmp_path / precision, on_step=lines.append)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        losses[precision] = [line["loss"] for line in lines]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


# What it is configured by


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001
    constant = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, schedule="constant")
    assert {learning_rate(constant, step) for step in range(10, 200)} == {1.0}


def test_only_matrices_decay():
    model = small_model()
    marked = model.get_parameter("body.core.writer.key.weight")
    marked._no_weight_decay = True
    config = small_config(weight_decay=0.3)
    decayed, spared = make_optimizer(model, config).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for p in decayed["params"]}
    assert decayed | {names[id(p)] for p in spared["params"]} == set(names.values())
    left = {"body.embed.weight", "body.core.writer.bias", "body.core.writer.key.weight"}
    assert not left & decayed
    assert {"body.core.writer.value.weight"} < decayed
    assert all(model.get_parameter(name).ndim >= 2 for name in decayed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": "replai"}, "did you mean 'replay'"),
        ({"schedule": "linear"}, "not one of cosine, constant"),
        ({"device": "tpu"}, "not one of auto, cpu, cuda, mps"),
        ({"steps": -1}, "steps is -1: give an integer of at least 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"segments": True}, "segments is True"),
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"betas": (0.9,)}, "give two numbers"),
        ({"horizon": "truncated"}, "needs truncate"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**options)


def test_a_model_without_segments_needs_a_length():
    model = small_model(segment=None)
    with pytest.raises(UserError, match=r"give train\.segment_length"):
        learner(model)
    assert learner(model, segment_length=8).rollout_size["length"] == 24


def test_a_missing_device_is_said_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no cuda device here"):
        learner(device="cuda")


# What it writes


def test_the_run_folder(tmp_path):
    lines, model = [], small_model()
    config = small_config(steps=7, checkpoint_every=3, eval_every=3)
    outside = torch.get_rng_state()
    result = train(
        model, TEXTS, small_texts(60), config, tmp_path, on_step=lines.append, about={"data": "x"}
    )
    assert torch.equal(torch.get_rng_state(), outside), "the caller's generator is left alone"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-00000006",
        "checkpoint-00000007",
        "config.json",
        "metrics.jsonl",
        "model",
    ]
    written = run.read_config(tmp_path)
    assert TrainConfig(**written["train"]) == config.for_model(model)
    assert written["model"]["hidden_size"] == 16
    assert written["data"] == "x"
    assert run.read_metrics(tmp_path / "metrics.jsonl") == lines
    assert result.metrics == lines[-1]
    assert (result.step, states.batch_size(result.state)) == (7, 3)
    for line in lines:
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2))
        assert line["state_bytes"] == states.num_bytes(result.state)
    tokens = [line["tokens_per_s"] * line["seconds"] for line in lines]
    assert sum(tokens) == pytest.approx(lines[-1]["tokens"])
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6, 7]
    assert set(run.TIMES) < set(lines[0])
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert same(dict(model.state_dict()), dict(loaded.state_dict()))


def test_equal_runs_have_equal_metrics_but_for_times(tmp_path):
    runs = []
    for name in ("a", "b"):
        config = small_config(steps=6)
        train(small_model(), TEXTS, small_texts(60), config, tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        runs.append([json.dumps(run.without_times(json.loads(line))) for line in lines])
    assert runs[0] == runs[1]


def test_a_run_is_not_started_over_another(tmp_path):
    config = small_config(steps=1, eval_every=0)
    train(small_model(), TEXTS, None, config, tmp_path)
    with pytest.raises(UserError, match="holds a run already: resume it"):
        train(small_model(), TEXTS, None, config, tmp_path)


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
