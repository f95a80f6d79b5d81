"""A run that is killed and resumed ends with the bits of one that never was."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from everlong.errors import UserError
from everlong.training import checkpoints, run
from everlong.training.loop import train
from training.small_run import STEPS, small_config, small_model, small_texts

SCRIPT = Path(__file__).parent / "small_run.py"


def run_small(run_dir, *arguments):
    command = [sys.executable, "-W", "error", str(SCRIPT), str(run_dir), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def contents(run_dir):
    """All that must be equal: every file but config.json's neighbours' times."""
    files = {
        str(path.relative_to(run_dir)): path.read_bytes()
        for folder in ("checkpoint-*", "model")
        for path in run_dir.glob(f"{folder}/*")
    }
    lines = run.read_metrics(run_dir / "metrics.jsonl")
    return files, [run.without_times(line) for line in lines]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("never") / "run"
    assert run_small(run_dir) == 0
    files, lines = contents(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["epoch"] > 0, "the run must cross an epoch"
    assert lines[-1]["loss"] < lines[0]["loss"]
    return files, lines


def kills():
    """Three random steps, and every stage of writing a checkpoint."""
    first, second, third = sorted(random.Random(6).sample(range(1, STEPS), 3))
    return [
        f"line:{first}",
        "rename:1",
        f"gradients:{second}",
        "files:4",
        f"line:{third}",
        "removal:1",
    ]


def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path, never_killed):
    run_dir = tmp_path / "run"
    reached = []
    for number, kill in enumerate(kills()):
        resume = ["--resume", run_dir] if number else []
        assert run_small(run_dir, *resume, "--kill", kill) == -signal.SIGKILL, f"{kill} never came"
        reached.append(checkpoints.steps(run_dir)[-1])
    assert reached == sorted(reached)
    assert run_small(run_dir, "--resume", run_dir) == 0
    files, lines = contents(run_dir)
    assert lines == never_killed[1]
    assert files.keys() == never_killed[0].keys()
    differing = [name for name in files if files[name] != never_killed[0][name]]
    assert differing == []
    assert not list(run_dir.glob(".*")), "leftovers of the kills are removed"


def test_killed_before_the_first_checkpoint_is_said_so(tmp_path):
    run_dir, config = tmp_path / "run", small_config(steps=1, eval_every=0)
    (run_dir / ".checkpoint-00000000.part").mkdir(parents=True)
    (run_dir / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        train(small_model(), small_texts(99), None, config, run_dir, resume=run_dir)
    train(small_model(), small_texts(99), None, config, run_dir)  # a new start is possible
