"""The loop trains what it says it trains, and writes it down."""

import json
import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from everlong import state as states
from everlong.errors import UserError
from everlong.training import run
from everlong.training.config import TrainConfig
from everlong.training.learner import Learner
from everlong.training.loop import train
from everlong.training.streams import as_documents
from training.small_run import small_config, small_model, small_texts

TEXTS = small_texts(90, 31, 160, 12, 77, 240)


def learner(model=None, texts=TEXTS, **options):
    model = model or small_model(dropout=0.0)
    config = small_config(**options).for_model(model)
    return Learner(model, as_documents(texts), config)


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
