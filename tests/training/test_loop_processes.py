"""Several processes train what one does: rows are shared out, gradients summed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from everlong.training import run

SCRIPT = Path(__file__).parent / "distributed_run.py"


def launch(processes, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            env=os.environ
            | (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        errors = [each.communicate(timeout=100)[1] for each in started]
    finally:
        for each in started:
            each.kill()
            each.wait()
    assert [each.returncode for each in started] == [0] * processes, "\n".join(errors)


def results(run_dir, step):
    folder = run_dir / f"checkpoint-{step:08d}"
    names = ("model", "state", "optimizer")
    tensors = {n: load_file(folder / f"{n}.safetensors") for n in names}
    return tensors, [run.without_times(x) for x in run.read_metrics(run_dir / "metrics.jsonl")]


def test_two_processes_equal_one_and_resume(tmp_path):
    launch(1, tmp_path / "one")
    launch(2, tmp_path / "two", "--steps", 2)
    launch(2, tmp_path / "two", "--resume", tmp_path / "two")
    (tensors, lines), (expected, expected_lines) = (
        results(tmp_path / name, 4) for name in ("two", "one")
    )
    for line, other in zip(lines, expected_lines, strict=True):
        for key in ("loss", "bits_per_byte", "grad_norm"):
            assert line.pop(key) == pytest.approx(other.pop(key), rel=1e-4)
        line.pop("state_bytes"), other.pop("state_bytes")  # each process holds its own rows'
        assert line == other, "steps, tokens and epochs count all processes"
    for part, found in tensors.items():
        for name, value in expected[part].items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
