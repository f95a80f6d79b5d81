"""Checkpoints that are whole or absent, without pickle.

    RUN/checkpoint-00000120/
        config.json, model.safetensors    as `save_pretrained` writes them: `from_pretrained` reads
        optimizer.safetensors, ...        the tensors of each part, by path
        training.json                     everything else, with the places of the tensors
        manifest.json                     the sha256 of every file

Written aside, flushed to the disk and renamed. Damage is an error, never skipped over.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from transformers.utils import logging

from everlong.errors import DamagedCheckpoint, UserError

_FORMAT, _VERSION = "everlong.checkpoint", 2
_NEEDED = {"model.safetensors", "training.json"}
_ASIDE = ".part"
_LEFTOVER = re.compile(r"\.(checkpoint-\d+|model)(\.gone)?\.part")


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / f"checkpoint-{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """Steps of the run's checkpoints, lowest first, whole or damaged."""
    names = (path.name.removeprefix("checkpoint-") for path in run_dir.glob("checkpoint-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def save(
    run_dir: Path, step: int, model: nn.Module, parts: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write the checkpoint of `step`, then remove all but the last `keep`.

    `parts` are dicts, lists and tuples of tensors and JSON values. Raises `UserError` (a full disk,
    missing permission); what was there before is then still there, and nothing else.
    """

    def write(path: Path) -> None:
        save_model(model, path)
        structure = {}
        for name, part in parts.items():
            tensors: dict[str, Tensor] = {}
            structure[name] = _encode(part, name, tensors, set())
            if tensors:
                save_file(tensors, path / f"{name}.safetensors")
        (path / "training.json").write_text(json.dumps(structure), "utf-8")
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "step": step,
            # the card is for its reader to change
            "files": {f.name: _sha256(f) for f in sorted(path.iterdir()) if f.name != "README.md"},
        }
        manifest["sha256"] = _digest(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")

    path = folder(run_dir, step)
    before = [s for s in steps(run_dir) if s < step]
    intact = f"; {folder(run_dir, before[-1]).name} is intact" if before else ""
    write_folder(path, write, intact)
    for old in [*before, step][:-keep]:
        _remove(folder(run_dir, old))
    return path


def save_model(model: Any, path: Path) -> None:
    """`model.save_pretrained(path)` without its progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(path)
    finally:
        if shown:
            logging.enable_progress_bar()


def load(path: Path) -> dict[str, Any]:
    """The `parts` of a checkpoint, tensors on the CPU; `DamagedCheckpoint` if a file changed."""
    verify(path)
    try:
        structure = json.loads((path / "training.json").read_text("utf-8"))
        return {name: _decode(part, _tensors(path, name)) for name, part in structure.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"{path / 'training.json'} is damaged: {_one_line(error)}"
        ) from error
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path} holds damaged tensors: {_one_line(error)}") from error


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Parts of a loaded checkpoint are used in here: `DamagedCheckpoint` where one lacks what was
    written, as one that was edited and signed anew may."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {_one_line(error)}"
        raise DamagedCheckpoint(f"{path / 'training.json'} is damaged ({what})") from error


def _tensors(path: Path, part: str) -> dict[str, Tensor]:
    """Those of a part; none where it has no file."""
    file = path / f"{_plain(part)}.safetensors"
    return load_file(file) if file.exists() else {}


def _plain(name: str) -> str:
    """A name that leads nowhere else; `ValueError` for any other."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no name of a file beside it")
    return name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_weights(model: nn.Module, path: Path) -> None:
    """Weights of a verified checkpoint into `model`; `UserError` if they are another model's."""
    try:
        load_model(model, path / "model.safetensors")
    except OSError as error:
        raise DamagedCheckpoint(f"{path} holds no weights: {error.strerror}") from error
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} holds the weights of another model: {_one_line(error)}") from error


def latest(run_dir: Path) -> Path:
    """The newest checkpoint of a run, verified.

    A damaged one raises `DamagedCheckpoint`, which names the file and the newest good checkpoint:
    going back is the user's decision.
    """
    found = steps(run_dir)
    if not found:
        raise UserError(f"{run_dir} holds no checkpoint to resume from: start the run again")
    newest = folder(run_dir, found[-1])
    try:
        verify(newest)
    except DamagedCheckpoint as error:
        good = next((folder(run_dir, s) for s in found[-2::-1] if _is_whole(run_dir, s)), None)
        remedy = f"resume from {good} instead" if good else "no other is whole: start the run again"
        raise DamagedCheckpoint(f"{error}; {remedy}") from error
    return newest


def verify(path: Path) -> None:
    """Raise `DamagedCheckpoint`, naming the file, unless every file is the one that was written."""
    manifest = _manifest(path)
    for name, expected in manifest["files"].items():
        try:
            found = _sha256(_regular(path / name))
        except OSError as error:
            raise DamagedCheckpoint(f"{path / name} cannot be read: {error.strerror}") from error
        if found != expected:
            raise DamagedCheckpoint(f"{path / name} is damaged: its sha256 is not the one written")


def _manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(_regular(file).read_text("utf-8"))
        written = manifest.pop("sha256")
    except OSError as error:
        raise DamagedCheckpoint(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is damaged: it is no manifest") from error
    if written != _digest(manifest) or manifest.get("format") != _FORMAT:
        raise DamagedCheckpoint(f"{file} is damaged: it is not the manifest written")
    version, files = manifest.get("version"), manifest.get("files")
    if version != _VERSION:
        raise UserError(f"{path} has format version {version}, this everlong reads {_VERSION}")
    if not isinstance(files, dict) or not set(files) >= _NEEDED:
        raise DamagedCheckpoint(
            f"{file} is damaged: it does not name {' and '.join(sorted(_NEEDED))}"
        )
    for name in files:
        try:
            _plain(name)
        except ValueError as error:
            raise DamagedCheckpoint(f"{file} is damaged: {error}") from error
    return manifest


def _regular(path: Path) -> Path:
    """`path`; `OSError` where it is a folder, a pipe or a device, which may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device")
    return path


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_whole(run_dir: Path, step: int) -> bool:
    try:
        verify(folder(run_dir, step))
    except DamagedCheckpoint:
        return False
    return True


def write_folder(path: Path, write: Callable[[Path], Any], otherwise: str = "") -> None:
    """Make the folder `path` by `write(aside)`: it appears whole, in place of what was there.

    `OSError`s become a `UserError` of one line that ends in `otherwise`.
    """
    aside = path.with_name(f".{path.name}{_ASIDE}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        for file in aside.rglob("*"):
            _flush(file)
        _flush(aside)
        if path.exists():
            _remove(path)
        os.replace(aside, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
        raise UserError(f"{path} could not be written ({reason}){otherwise}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def set_later_aside(path: Path) -> None:
    """Rename the run's checkpoints after `path` to `abandoned-...`: a run goes on before them."""
    step = int(path.name.split("-")[-1])
    for later in steps(path.parent):
        if later > step:
            write_to = path.parent / f"abandoned-{folder(path.parent, later).name}"
            shutil.rmtree(write_to, ignore_errors=True)
            folder(path.parent, later).rename(write_to)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed run had not finished writing or removing."""
    for path in filter(is_leftover, run_dir.glob(f".*{_ASIDE}")):
        shutil.rmtree(path, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether this is a folder of ours that was not finished: a checkpoint or model/."""
    return path.is_dir() and _LEFTOVER.fullmatch(path.name) is not None


def _remove(path: Path) -> None:
    """Under another name first, so that a kill leaves no half of a checkpoint behind."""
    gone = path.with_name(f".{path.name}.gone{_ASIDE}")
    if path.is_symlink():  # what it points to is elsewhere, and stays
        path.unlink()
        return
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def _flush(path: Path) -> None:
    """To the disk itself: a rename must not get there before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode(tree: Any, path: str, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    """JSON of a tree; its tensors go to `tensors`. Dicts keep their keys' types and order."""
    if isinstance(tree, Tensor):
        tensor = tree.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # safetensors refuses storage that is shared
        storages.add(tensor.untyped_storage().data_ptr())
        assert path not in tensors, f"two tensors at {path}"
        tensors[path] = tensor
        return {"tensor": path, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}
    if isinstance(tree, Mapping):
        items = [[k, _encode(v, f"{path}.{k}", tensors, storages)] for k, v in tree.items()]
        return {"dict": items}
    if isinstance(tree, list | tuple):
        items = [_encode(v, f"{path}.{i}", tensors, storages) for i, v in enumerate(tree)]
        return {"tuple" if isinstance(tree, tuple) else "list": items}
    if tree is not None and not isinstance(tree, bool | int | float | str):
        raise TypeError(f"{path} is a {type(tree).__name__}, which no checkpoint holds")
    return tree


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if not tree:
        raise ValueError("a part has no kind")
    (kind, value) = next(iter(tree.items()))
    if kind == "tensor":
        tensor = tensors[value]
        if [list(tensor.shape), str(tensor.dtype)] != [tree["shape"], tree["dtype"]]:
            raise ValueError(
                f"{value} is {list(tensor.shape)} {tensor.dtype}, not as it was written"
            )
        return tensor
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in value}
    items = [_decode(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items
