"""What a run may write over: its own unfinished start, nothing else."""

import json

import pytest

from everlong.errors import UserError
from everlong.training import checkpoints, run
from everlong.training.loop import train
from training.small_run import small_config, small_model, small_texts
from training.test_loop_resume import run_small

FOREIGN = {
    "notes.txt": "mine",
    "config.json": '{"model_type": "llama"}',
    "metrics.jsonl": "a line that has no end",
    "model/weights.bin": "mine",
    "twin/notes.txt": "mine",
    ".backup.part/notes.txt": "mine",
    ".modelling.part/notes.txt": "mine",
    ".checkpoint-00000000.part": "a file, not a folder",
    "checkpoint-7/notes.txt": "mine",
}


def files_of(folder):
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, name, beside):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(FOREIGN[name])
    if beside:  # something of ours does not make the rest ours
        (tmp_path / ".checkpoint-00000003.gone.part").mkdir()
    before = files_of(tmp_path)
    with pytest.raises(UserError) as error:
        train(small_model(), small_texts(99), None, small_config(steps=1), tmp_path)
    assert str(error.value) == f"{tmp_path} is not empty: give --out a new folder"
    assert error.value.exit_code == 2
    assert files_of(tmp_path) == before


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="run cannot be written: Not a directory"):
        run.begin(tmp_path / "run", {})


def test_a_run_killed_before_its_first_checkpoint_is_started_again(tmp_path):
    run_dir = tmp_path / "run"
    assert run_small(run_dir, "--kill", "files:2") < 0
    assert checkpoints.steps(run_dir) == []
    assert {path.name for path in run_dir.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        ".checkpoint-00000000.part",
    }
    (run_dir / ".config.json.part").write_text("{")  # as a kill while writing it leaves it
    train(small_model(), small_texts(99), None, small_config(steps=1, eval_every=0), run_dir)
    assert checkpoints.steps(run_dir) == [0, 1]
    assert not list(run_dir.glob(".*"))
    assert json.loads((run_dir / "config.json").read_text())["format"] == "everlong.run"


@pytest.mark.parametrize("line", [b"5", b"[]", b'{"a": 1}', b"\xff", b"{"])
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match="metrics.jsonl is damaged: .*remove that line"):
        run.read_metrics(path)


def test_only_our_leftovers_are_removed(tmp_path):
    ours = (".checkpoint-00000002.part", ".checkpoint-00000000.gone.part", ".model.part")
    foreign = (".backup.part", ".modelling.part", ".checkpoint-best.part", ".model")
    for name in (*ours, *foreign):
        (tmp_path / name).mkdir()
    checkpoints.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(foreign)
