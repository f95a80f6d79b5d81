"""TrainConfig: what it allows, and what it makes of a model."""

import pytest
import torch

from everlong.errors import UserError
from everlong.training.config import TrainConfig, learning_rate, make_optimizer
from everlong.training.learner import Learner
from everlong.training.streams import as_documents
from training.small_run import small_config, small_model, small_texts

TEXTS = small_texts(90, 31, 160, 12, 77, 240)


def learner(model=None, texts=TEXTS, **options):
    model = model or small_model(dropout=0.0)
    config = small_config(**options).for_model(model)
    return Learner(model, as_documents(texts), config)


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
