"""Metrics in other places too, and what a run folder says of its origin."""

import json
import platform
import sys
from pathlib import Path

import pytest
import torch

from cli.tiny import SEGMENT, TINY, sets
from everlong import provenance
from everlong.cli import main
from everlong.errors import UserError
from everlong.training import tracking
from everlong.training.run import read_config, read_metrics

RUN = ("train", "smoke", *sets(*TINY, *SEGMENT, "train.eval_every=0", "train.checkpoint_every=1"))


@pytest.fixture
def briefly(monkeypatch):
    """What follows the training is not of interest."""
    monkeypatch.setattr("everlong.cli.final.evaluate", lambda *_: {})
    for name in ("show", "continue_passage"):
        monkeypatch.setattr(f"everlong.cli.final.{name}", lambda *_: None)


def train(monkeypatch, *words):
    words = [str(word) for word in words]
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/everlong", *words])
    return main(words)


def test_tensorboard_has_the_lines_of_metrics_and_a_resumed_run_replaces_its_own(
    tmp_path, monkeypatch, briefly
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert train(monkeypatch, *RUN, "--out", run, "--track", "tensorboard") == 0
    again = ("train", "--resume", run / "checkpoint-00000001", "--track", "tensorboard")
    assert train(monkeypatch, *again) == 0
    for folder in (run, run / "twin"):
        lines = read_metrics(folder / "metrics.jsonl")
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        for key in ("loss", "tokens_per_s"):
            found = {event.step: event.value for event in events.Scalars(key)}
            assert found == pytest.approx({line["step"]: line[key] for line in lines})
        assert len(events.Scalars("loss")) == len(lines) == 2

    config = read_config(run)
    assert config["command"].startswith("everlong train smoke --set model.hidden_size=16")
    assert config["environment"]["torch"] == torch.__version__
    assert config["environment"]["git"] == provenance.environment()["git"]
    assert config["train"]["seed"] == 0
    (line,) = (run / "resumed.jsonl").read_text().splitlines()
    resumed = json.loads(line)
    assert resumed["step"] == 1
    assert resumed["command"] == provenance.command()
    assert resumed["environment"] == config["environment"]


def test_trackio_has_them_too_and_keeps_to_this_machine(tmp_path, monkeypatch, briefly, capsys):
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "kept")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "kept")
    run = tmp_path / "run"
    assert train(monkeypatch, *RUN, "--out", run, "--track", "trackio") == 0
    assert "Trackio" not in capsys.readouterr().out
    from trackio.sqlite_storage import SQLiteStorage

    assert set(SQLiteStorage.get_runs("everlong")) == {"run", "run-twin"}
    logged = SQLiteStorage.get_logs("everlong", "run")
    lines = read_metrics(run / "metrics.jsonl")
    assert [(each["step"], each["loss"]) for each in logged] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]


def test_a_missing_package_names_the_extra_before_anything_is_written(
    tmp_path, monkeypatch, capsys
):
    for name in ("trackio", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
        assert train(monkeypatch, *RUN, "--out", tmp_path / "run", "--track", name) == 2
        told = capsys.readouterr().err
        assert told == f"everlong: --track {name} needs a package: pip install 'everlong[track]'\n"
        with pytest.raises(UserError, match="everlong\\[track\\]"):
            tracking.check(name)
    assert not list(tmp_path.iterdir())


def test_the_environment_names_the_extras_that_are_there_and_no_machine_or_user():
    found = provenance.environment()
    assert {"tensorboard", "trackio", "peft", "memory", "cores"} <= found.keys()
    assert "flash-linear-attention" not in found
    assert Path.home().name not in " ".join(found.values()).split()
    assert platform.node() not in " ".join(found.values())


def test_the_command_is_the_one_to_type_again(monkeypatch):
    for argv, told in (
        (
            ["/x/bin/everlong", "train", "--set", "a='b c'"],
            """everlong train --set 'a='"'"'b c'"'"''""",
        ),
        (["/x/everlong/__main__.py", "train"], "python -m everlong train"),
        (["train_it.py", "7"], "python train_it.py 7"),
        ([""], "python"),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        assert provenance.command() == told
