"""Two processes do what one does: one launch, whose findings the tests below look at."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

import everlong
from everlong.cli import final, main
from everlong.errors import UserError
from everlong.training import distributed, learner, run
from training import distributed_workers as workers
from training.distributed_workers import CASES, HORIZONS, ROLLOUTS, SMOKE, WORLD
from training.small_run import small_model

BRIEF = {"STREAMED": (2, 3), "_PASSAGE": 40, "_CONTINUED": 5}


@pytest.fixture(scope="module")
def brief():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in BRIEF.items():
            patch.setattr(final, name, value)
        yield


@pytest.fixture(scope="module")
def launched(brief, tmp_path_factory):
    """The folder of all runs, and what each process found. `alone` is never interrupted; `one` and
    `two` are stopped after 2 of 4 steps and go on on the other number of processes."""
    folder = tmp_path_factory.mktemp("processes")
    assert main(["train", *SMOKE, "--out", str(folder / "alone"), "--set", "train.steps=4"]) == 0
    assert main(["train", *SMOKE, "--out", str(folder / "one"), "--set", "train.steps=2"]) == 0
    torch.multiprocessing.spawn(workers.worker, (str(folder),), nprocs=WORLD)
    shutil.copytree(folder / "two", folder / "two-before")
    assert main(["train", "--resume", str(folder / "two"), "--set", "train.steps=4"]) == 0
    return folder, [json.loads((folder / f"found-{r}.json").read_text()) for r in range(WORLD)]


def close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def single():
    """Gradients of one process on all rows, by horizon and rollout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "cross_entropy", workers.exact_cross_entropy)
        made = {case: list(workers.rollouts(case)) for case in CASES}
    for grads, _, exchanges in made["full"]:
        assert max(grad.abs().max() for grad in grads.values()) > 1e-3
        assert exchanges == {}
    begins = [next(batches)["reset"] for batches in [workers.stream()] for _ in range(ROLLOUTS)]
    where = {(bool(rows[:2].any()), bool(rows[2:].any())) for rows in begins}
    assert {(True, True), (False, False)} < where, "rows begin in both, in none and in one process"
    return made


@pytest.mark.parametrize("shared", ["", "-shard"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process_on_all_rows(launched, single, case, shared):
    for rank in range(WORLD):
        tensors = load_file(launched[0] / f"gradients-{rank}")
        for i, (grads, measured, _) in enumerate(single[case]):
            prefix = f"{case}{shared}.{i}."
            found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            torch.testing.assert_close(found.pop("measured"), measured)
            assert found.keys() == grads.keys(), "what no row reaches has no gradient"
            close(found, grads)


@pytest.mark.parametrize("case", CASES)
def test_a_step_exchanges_once(launched, case):
    plain, shares = (
        launched[1][0]["gradients"]["counts"][case + shared] for shared in ("", "-shard")
    )
    assert plain == [{"allreduce_": 1}] * ROLLOUTS
    own = {"_reduce_scatter_base_": 1, "allreduce_": 1}  # of the gradients, and of the loss
    # the first rollout's weights were collected for the state of fresh rows
    assert shares == [own] + [own | {"_allgather_base_": 1}] * (ROLLOUTS - 1)


@pytest.mark.supports("DistributedDataParallel in a loop of one's own", of="memformer")
def test_ddp_in_a_loop_of_ones_own(launched):
    folder, found = launched
    assert [each["gradients"]["rounds"] for each in found] == [
        {"replay": 1, "full": 1, "truncated": 1}
    ] * WORLD
    cuts, targets = workers.first_rollout(slice(None))
    model = small_model(dropout=0.0).double()
    for name in ("replay", "full", "truncated"):
        model.zero_grad()
        horizon = everlong.Horizon(name, truncate=HORIZONS[name])
        state = model.init_state(workers.ROWS)
        horizon(workers._Step(model), cuts, state, [1 / targets] * len(cuts))
        for rank in range(WORLD):
            tensors = load_file(folder / f"gradients-{rank}")
            grads = {n: p.grad for n, p in model.named_parameters()}
            close({n: tensors[f"ddp-{name}.{n}"] for n in grads}, grads)


def test_what_one_process_meets_stops_both(launched):
    folder, found = launched
    for said in (each["refusals"] for each in found):
        assert "rows" not in said, "3 rows for 2 processes"
        assert said["stopped"] == [130, 3], "a signal to one of them"
        assert "No space left on device" in said["full"]
        first, second = said["grown"]
        assert first == [[1, 1, 1, 0]] * 2 + [[1, 1, 1, 1]] * 2
        assert second == [0, 0, 1, 1]
    assert (folder / "stopped" / "checkpoint-00000003").is_dir()


def test_only_the_first_process_prints(launched):
    first, second = launched[1]
    assert first["codes"] == second["codes"] == [0] * 4
    assert second["said"] == [""] * 4
    assert all("bits per byte" in said for said in first["said"])


@pytest.mark.supports("a run on 1, then 2 processes; 2, then 1; in shares", of="memformer")
@pytest.mark.parametrize("name", ["one", "two", "shares"])
def test_a_run_on_other_numbers_of_processes_is_the_same_run(launched, name):
    folder = launched[0]
    lines, expected = (
        [run.without_times(line) for line in run.read_metrics(folder / each / "metrics.jsonl")]
        for each in (name, "alone")
    )
    assert len(lines) == len(expected) == 4
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    for part in ("model", "state", "optimizer"):
        found, wanted = (
            load_file(folder / each / "checkpoint-00000004" / f"{part}.safetensors")
            for each in (name, "alone")
        )
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)
    model = [load_file(folder / each / "model" / "model.safetensors") for each in (name, "alone")]
    for key, value in model[1].items():
        torch.testing.assert_close(model[0][key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_a_checkpoint_of_two_processes_holds_all_rows(launched):
    state = load_file(launched[0] / "two-before" / "checkpoint-00000002" / "state.safetensors")
    assert {len(leaf) for leaf in state.values()} == {4}


def torchrun(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_a_restart_needs_a_folder_to_go_on_from(monkeypatch, capsys):
    torchrun(monkeypatch, TORCHELASTIC_MAX_RESTARTS=3)
    assert main(["train", "smoke"]) == 2
    assert "--max-restarts needs a folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--resume"])
def test_a_restart_needs_a_store_of_its_own(monkeypatch, capsys, tmp_path, option):
    torchrun(monkeypatch, TORCHELASTIC_MAX_RESTARTS=3, TORCHELASTIC_USE_AGENT_STORE=True)
    assert main(["train", option, str(tmp_path / "run")]) == 2
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_generated_task_trains_in_one_process(monkeypatch, capsys, rank):
    torchrun(monkeypatch, WORLD_SIZE=WORLD, RANK=rank, LOCAL_RANK=rank)
    assert main(["train", "recall"]) == 2
    assert ("trains in one process" in capsys.readouterr().err) == (rank == 0), "said once"


def test_a_single_number_cannot_be_shared():
    model = torch.nn.Module()
    model.gate = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(UserError, match="gate is a single number"):
        distributed.Sharded(model, torch.device("cpu"))


@pytest.mark.supports("started anew by torchrun after a SIGKILL, to the same bits", of="memformer")
@pytest.mark.benchmark  # four processes and two starts of each: half a minute
def test_torchrun_starts_anew_and_the_run_has_the_same_bits(brief, tmp_path):
    script = Path(workers.__file__)
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    shared["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name, more in (("killed", ["--die"]), ("never", [])):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "--max-restarts", "1", script, tmp_path / name, *more]
        done = subprocess.run(
            command, env=shared, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        assert ("SIGKILL" in done.stderr or "exitcode: -9" in done.stderr) == bool(more)
    for part in ("checkpoint-00000006", "model"):
        names = sorted(path.name for path in (tmp_path / "never" / part).iterdir())
        for each in names:
            killed, never = ((tmp_path / n / part / each).read_bytes() for n in ("killed", "never"))
            assert killed == never, each
    lines = [
        [run.without_times(line) for line in run.read_metrics(tmp_path / n / "metrics.jsonl")]
        for n in ("killed", "never")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 6
