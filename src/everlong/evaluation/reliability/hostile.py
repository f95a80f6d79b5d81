"""What somebody might put into a checkpoint or a model on purpose: paths, pickles, lying headers.

Damages as in `damage`. Each must be refused in one line.
"""

import io
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from everlong.evaluation.reliability.damage import (
    any_file,
    newest,
    previous,
    sha256,
    sign,
    write_manifest,
)

MARKER = "a pickle was executed"


# Paths


def outside(pick: random.Random, folder: Path) -> str:
    """Names in a signed manifest or in training.json that lead out of the checkpoint."""
    path = newest(folder)
    secret = folder / "secret.safetensors"
    shutil.copyfile(path / "optimizer.safetensors", secret)
    ways = "../../secret.safetensors", str(secret), "./../../secret.safetensors"
    way = pick.choice(ways)
    kind = "an absolute path" if way == str(secret) else way
    manifest = json.loads((path / "manifest.json").read_text())
    if pick.random() < 0.5:
        manifest["files"][way] = sha256(secret)
        write_manifest(path, manifest)
        return f"manifest.json names {kind}"
    file = path / "training.json"
    parts = json.loads(file.read_text())
    parts[way.removesuffix(".safetensors")] = parts["optimizer"]
    file.write_text(json.dumps(parts))
    sign(path)
    return f"training.json names {kind}"


def link(pick: random.Random, folder: Path) -> str:
    """A file of the checkpoint is a link: to another's content, to nothing, in a circle, to a
    device without an end, to a folder; or is a pipe."""
    path = newest(folder)
    file = any_file(pick, path)
    other = previous(folder) / "optimizer.safetensors"
    file.unlink()
    ways = {
        "a link to another file": str(other),
        "a link to nothing": "gone",
        "a link to itself": file.name,
        "a link to /dev/zero": "/dev/zero",
        "a link to a folder": "/etc",
    }
    way = pick.choice((*ways, "a pipe"))
    if way == "a pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(ways[way])
    return f"{file.name} is {way}"


# Pickles


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"echo executed > '{self.marker}'",))


def pickled(pick: random.Random, folder: Path) -> bytes:
    """As pickle writes it, or as torch.save does."""
    bomb = _Bomb(folder / MARKER)
    if pick.random() < 0.5:
        return pickle.dumps(bomb)
    buffer = io.BytesIO()
    torch.save(bomb, buffer)
    return buffer.getvalue()


def pickle_in(pick: random.Random, folder: Path) -> str:
    """In place of a safetensors file of the newest checkpoint, signed or not."""
    path = newest(folder)
    file = pick.choice(sorted(path.glob("*.safetensors")))
    file.write_bytes(pickled(pick, folder))
    if signed := pick.random() < 0.7:
        sign(path)
    return f"{file.name} is a pickle{', signed' if signed else ''}"


_PICKLES = ("pytorch_model.bin", "optimizer.pt", "training.pt", "rng_state.pth", "state.pkl")


def pickle_beside(pick: random.Random, folder: Path) -> str:
    """Under the names that other programs load, the weights removed."""
    for path in (newest(folder), folder / "RUN" / "model"):
        if path.exists():
            for name in _PICKLES:
                (path / name).write_bytes(pickled(pick, folder))
    path = folder / "RUN" / "model" if (folder / "RUN" / "model").exists() else newest(folder)
    (path / "model.safetensors").unlink()
    if path.name != "model":
        sign(path)
    return f"{path.name} holds {', '.join(_PICKLES)} and no model.safetensors"


# Headers of safetensors


def header(pick: random.Random, file: Path, but: str = "") -> str:
    """A header that lies about lengths, offsets, kinds and shapes, or is none; not in way `but`."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + size])
    names = [name for name in table if name != "__metadata__"]
    name = pick.choice(names)
    one, body = table[name], data[8 + size :]

    def kind() -> None:
        wide = {"F32": "I32", "F64": "I64", "I64": "F64", "U8": "I8", "F16": "I16"}
        one["dtype"] = wide.get(one["dtype"], "U8")

    def two_names() -> None:
        table.pop(name)
        table[f"{name}.again"] = one

    ways: dict[str, Callable[[], Any]] = {
        "length": lambda: pick.choice((2**63, 2**40, 100_000_001, len(data), 0, 1)),
        "no JSON": lambda: b"\xff" * size,
        "deep": lambda: b"[" * 50_000,
        "offsets outside": lambda: one.update(data_offsets=[0, 2**62]),
        "offsets backwards": lambda: one.update(data_offsets=one["data_offsets"][::-1]),
        "negative shape": lambda: one.update(shape=[-1]),
        "huge shape": lambda: one.update(shape=[2**40, 2**40]),
        "another shape": lambda: one.update(shape=[1, *one["shape"], 1]),
        "unknown dtype": lambda: one.update(dtype="F31"),
        "another dtype": kind,
        "tensor missing": lambda: table.pop(name),
        "renamed": two_names,
    }
    way = pick.choice([each for each in ways if each != but])
    made = ways[way]()
    if way == "length":
        file.write_bytes(struct.pack("<Q", made) + data[8:])
    else:
        text = made if isinstance(made, bytes) else json.dumps(table).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return f"{file.name}: {way} ({name})"


def header_signed(pick: random.Random, folder: Path) -> str:
    path = newest(folder)
    # bits that are signed as another kind of number are but other numbers, which he may write
    told = header(pick, pick.choice(sorted(path.glob("*.safetensors"))), but="another dtype")
    sign(path)
    return f"{told}, signed"


def index(pick: random.Random, folder: Path) -> str:
    """The index of a model in several files leads out of its folder, or to a pickle."""
    path = folder / "RUN" / "model"
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    names = [name for name in json.loads(data[8 : 8 + size]) if name != "__metadata__"]
    secret = folder / "secret.safetensors"
    weights.rename(secret)
    (path / "evil.bin").write_bytes(pickled(pick, folder))
    way = pick.choice(("../../secret.safetensors", str(secret), "evil.bin"))
    told = {"metadata": {}, "weight_map": dict.fromkeys(names, way)}
    (path / "model.safetensors.index.json").write_text(json.dumps(told))
    kind = "an absolute path" if way == str(secret) else way
    return f"model.safetensors.index.json names {kind}"
