"""Checkpoints are whole or absent, damage is named, and a full disk loses nothing."""

import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from everlong import EverlongConfig, EverlongForCausalLM
from everlong.errors import DamagedCheckpoint, UserError
from everlong.training import checkpoints


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return EverlongForCausalLM(EverlongConfig(hidden_size=16, num_heads=2, num_layers=1))


@pytest.fixture
def parts(model):
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    shared = torch.arange(6.0)
    return {
        "progress": {"step": 3, "rate": 0.1 + 0.2, "none": None, "flag": True},
        "optimizer": optimizer.state_dict(),
        "state": {"layers": (shared, {"view": shared[2:4]}), "turned": torch.rand(3, 2).T},
        "rng": {"cpu": torch.get_rng_state()},
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        pairs = zip(a, b, strict=True)
        return type(a) is type(b) and all(equal(x, y) for x, y in pairs)
    return type(a) is type(b) and a == b


def test_everything_comes_back(tmp_path, model, parts):
    path = checkpoints.save(tmp_path, 3, model, parts)
    assert path.name == "checkpoint-00000003"
    assert equal(parts, checkpoints.load(path)), "keys (integers too), types, bits"
    assert load_file(path / "rng.safetensors")["rng.cpu"].dtype == torch.uint8

    other = EverlongForCausalLM(EverlongConfig(hidden_size=16, num_heads=2, num_layers=1))
    checkpoints.load_weights(other, path)
    assert equal(dict(model.state_dict()), dict(other.state_dict()))
    assert equal(
        dict(model.state_dict()), dict(EverlongForCausalLM.from_pretrained(path).state_dict())
    )


def test_no_pickle_is_read_or_written(tmp_path, model, parts, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    path = checkpoints.save(tmp_path, 3, model, parts)
    checkpoints.load(path)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors", ".md", ".py"}


def test_what_a_checkpoint_cannot_hold_is_named(tmp_path, model):
    with pytest.raises(TypeError, match=r"progress\.when is a object"):
        checkpoints.save(tmp_path, 1, model, {"progress": {"when": object()}})
    assert list(tmp_path.iterdir()) == []


def test_keeps_the_last_ones(tmp_path, model, parts):
    for step in (0, 5, 10, 15):
        checkpoints.save(tmp_path, step, model, parts, keep=2)
    assert checkpoints.steps(tmp_path) == [10, 15]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-00000010",
        "checkpoint-00000015",
    ]
    assert checkpoints.latest(tmp_path).name == "checkpoint-00000015"


def test_a_checkpoint_that_lies_elsewhere_is_left_there(tmp_path, model, parts):
    for step in (1, 2):
        checkpoints.save(tmp_path / "run", step, model, parts)
    link, elsewhere = checkpoints.folder(tmp_path / "run", 1), tmp_path / "elsewhere"
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    checkpoints.save(tmp_path / "run", 3, model, parts, keep=1)
    assert checkpoints.steps(tmp_path / "run") == [3]
    assert (elsewhere / "manifest.json").exists()


def test_the_card_of_a_checkpoint_is_its_reader_s(tmp_path, model, parts):
    path = checkpoints.save(tmp_path, 1, model, parts)
    (path / "README.md").write_text("license: mine")
    checkpoints.verify(path)


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        checkpoints.latest(tmp_path)


FILES = ("model.safetensors", "optimizer.safetensors", "state.safetensors", "training.json")


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "config.json"])
@pytest.mark.parametrize("how", ["flip a bit", "cut short", "remove"])
def test_damage_is_an_error_that_names_the_file_and_the_good_one(tmp_path, model, parts, name, how):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, model, parts)
    file = tmp_path / "checkpoint-00000002" / name
    data = bytearray(file.read_bytes())
    if how == "remove":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(DamagedCheckpoint) as error:
        checkpoints.latest(tmp_path)
    message = str(error.value)
    assert str(file) in message
    assert message.endswith(f"resume from {tmp_path / 'checkpoint-00000001'} instead")
    assert "\n" not in message
    checkpoints.verify(tmp_path / "checkpoint-00000001")
    with pytest.raises(DamagedCheckpoint):
        checkpoints.load(tmp_path / "checkpoint-00000002")


def test_damage_of_all_is_said_so(tmp_path, model, parts):
    for step in (1, 2):
        path = checkpoints.save(tmp_path, step, model, parts)
        (path / "training.json").write_text("{}")
    with pytest.raises(DamagedCheckpoint, match="no other is whole: start the run again"):
        checkpoints.latest(tmp_path)


def sign(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: checkpoints._sha256(path / name) for name in manifest["files"]}
    manifest |= changes
    del manifest["sha256"]
    manifest["sha256"] = checkpoints._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_newer_format_is_refused(tmp_path, model, parts):
    path = checkpoints.save(tmp_path, 1, model, parts)
    sign(path, version=3)
    with pytest.raises(UserError, match="format version 3, this everlong reads 2"):
        checkpoints.load(path)


def rewritten(path, change):
    told = json.loads((path / "training.json").read_text())
    (path / "training.json").write_text(json.dumps(change(told)))


HOSTILE = {
    "nested": lambda path: (path / "training.json").write_text("[" * 100_000),
    "a name that leads out": lambda path: rewritten(
        path, lambda told: told | {"../secret": told["rng"]}
    ),
    "an absolute name": lambda path: rewritten(path, lambda told: told | {"/tmp/x": told["rng"]}),
    "no tensors": lambda path: save_file({}, path / "rng.safetensors"),
    "no safetensors": lambda path: (path / "rng.safetensors").write_bytes(b"\x80\x04pickle"),
    "another shape": lambda path: save_file(
        {"rng.cpu": torch.get_rng_state()[None]}, path / "rng.safetensors"
    ),
    "another dtype": lambda path: save_file(
        {"rng.cpu": torch.get_rng_state().float()}, path / "rng.safetensors"
    ),
}


@pytest.mark.parametrize("missing", ["format", "files"])
def test_a_signed_manifest_that_lacks_a_key_is_damaged(tmp_path, model, parts, missing):
    path = checkpoints.save(tmp_path, 1, model, parts)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest[missing], manifest["sha256"]
    manifest["sha256"] = checkpoints._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is damaged"):
        checkpoints.load(path)


def test_a_part_without_a_kind_is_damaged(tmp_path, model, parts):
    path = checkpoints.save(tmp_path, 1, model, parts)
    rewritten(path, lambda told: told | {"rng": {}})
    sign(path)
    with pytest.raises(DamagedCheckpoint, match="a part has no kind"):
        checkpoints.load(path)


@pytest.mark.parametrize("how", list(HOSTILE))
def test_what_is_signed_and_is_no_checkpoint_is_refused_in_one_line(tmp_path, model, parts, how):
    path = checkpoints.save(tmp_path, 1, model, parts)
    HOSTILE[how](path)
    sign(path)
    with pytest.raises(DamagedCheckpoint, match=str(path)) as error:
        checkpoints.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "."])
def test_a_manifest_that_leads_out_is_refused(tmp_path, model, parts, name):
    path = checkpoints.save(tmp_path, 1, model, parts)
    (tmp_path / "secret").write_text("secret")
    files = json.loads((path / "manifest.json").read_text())["files"]
    sign(path, files=files | {name: "0"})
    with pytest.raises(DamagedCheckpoint, match="is no name of a file beside it"):
        checkpoints.load(path)


@pytest.mark.parametrize("name", ["manifest.json", "training.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["pipe", "device", "folder"])
def test_what_may_have_no_end_is_not_read(tmp_path, model, parts, name, how):
    path = checkpoints.save(tmp_path, 1, model, parts)
    (path / name).unlink()
    if how == "pipe":
        os.mkfifo(path / name)
    elif how == "device":
        (path / name).symlink_to("/dev/zero")
    else:
        (path / name).mkdir()
    with pytest.raises(DamagedCheckpoint, match=f"{name} cannot be read"):
        checkpoints.load(path)


@pytest.mark.parametrize("name", ["training.json", "model.safetensors"])
def test_a_manifest_that_leaves_out_what_is_needed_is_refused(tmp_path, model, parts, name):
    path = checkpoints.save(tmp_path, 1, model, parts)
    files = json.loads((path / "manifest.json").read_text())["files"]
    del files[name]
    sign(path, files=files)
    with pytest.raises(DamagedCheckpoint, match=name):
        checkpoints.load(path)


def test_weights_of_another_model_are_refused(tmp_path, model, parts):
    path = checkpoints.save(tmp_path, 1, model, parts)
    wider = EverlongForCausalLM(EverlongConfig(hidden_size=32, num_heads=2, num_layers=1))
    with pytest.raises(UserError, match="holds the weights of another model") as error:
        checkpoints.load_weights(wider, path)
    assert "\n" not in str(error.value)


def _full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_in_rust(*_, **__):  # as safetensors reports it
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize(
    ("target", "failure"),
    [
        ("everlong.training.checkpoints.save_file", _full_in_rust),
        ("pathlib.Path.write_text", _full),
        ("os.fsync", _full),
        ("os.replace", _full),
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path, model, parts, monkeypatch, target, failure
):
    checkpoints.save(tmp_path, 1, model, parts)
    with monkeypatch.context() as patch:
        patch.setattr(target, failure)
        with pytest.raises(UserError) as error:
            checkpoints.save(tmp_path, 2, model, parts)
    message = str(error.value)
    assert "checkpoint-00000002 could not be written (No space left on device" in message
    assert message.endswith("checkpoint-00000001 is intact")
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]
    assert checkpoints.latest(tmp_path).name == "checkpoint-00000001"


def test_a_disk_that_is_really_full(tmp_path, model, parts):
    """A file size limit in place of a small disk: the kernel refuses the write in the middle."""
    import resource
    import signal

    checkpoints.save(tmp_path, 1, model, parts)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(UserError, match=r"could not be written \(File too large"):
            checkpoints.save(tmp_path, 2, model, parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]


def test_leftovers_of_a_kill_are_no_checkpoints(tmp_path, model, parts):
    path = checkpoints.save(tmp_path, 1, model, parts)
    shutil.copytree(path, tmp_path / ".checkpoint-00000002.part")
    shutil.copytree(path, tmp_path / ".checkpoint-00000000.gone.part")
    assert checkpoints.latest(tmp_path) == path
    checkpoints.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_going_on_before_the_last_sets_later_ones_aside(tmp_path, model, parts):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, model, parts)
    checkpoints.set_later_aside(tmp_path / "checkpoint-00000001")
    assert checkpoints.steps(tmp_path) == [1]
    assert (tmp_path / "abandoned-checkpoint-00000002").is_dir()


def test_files_reach_the_disk_before_the_name_does(tmp_path, model, parts, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle):
        path = os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc") else str(handle)
        events.append(os.path.basename(path))
        fsync(handle)

    def note_replace(source, target):
        if "checkpoint" in os.path.basename(target):
            events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    path = checkpoints.save(tmp_path, 1, model, parts)
    renamed = events.index("renamed")
    expected = {file.name for file in path.iterdir()} | {".checkpoint-00000001.part"}
    if os.path.exists("/proc"):
        assert set(events[:renamed]) == expected
        assert events[renamed + 1 :] == [tmp_path.name], "the folder that holds the new name"
    else:
        assert renamed == len(expected)
        assert len(events) == len(expected) + 2
