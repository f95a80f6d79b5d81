"""What happens to files of a run by accident, and edits of their JSON, signed or not.

Every damage is `damage(pick, folder) -> what was done`; `folder` holds a copy of a run, RUN/, and a
state file, state.safetensors. Whoever signs a manifest anew needs no secret: it is a sum.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from everlong.evaluation.reliability import odd
from everlong.training import checkpoints

Damager = Callable[[random.Random, Path], str]
CARD = "README.md"  # is not summed: it is for its reader to change


def newest(folder: Path) -> Path:
    return checkpoints.folder(folder / "RUN", checkpoints.steps(folder / "RUN")[-1])


def previous(folder: Path) -> Path:
    return checkpoints.folder(folder / "RUN", checkpoints.steps(folder / "RUN")[-2])


def sign(path: Path) -> None:
    """Write the manifest that belongs to what now lies in a checkpoint: no secret is needed."""
    files = {
        file.name: sha256(file)
        for file in sorted(path.iterdir())
        if file.name not in ("manifest.json", CARD) and file.is_file()
    }
    held = json.loads((path / "manifest.json").read_text())
    write_manifest(path, held | {"files": files})


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    kept = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(kept | {"sha256": digest}))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# Accidents: any file of the newest checkpoint


def any_file(pick: random.Random, path: Path) -> Path:
    return pick.choice([f for f in sorted(path.iterdir()) if f.is_file() and f.name != CARD])


def cut_short(pick: random.Random, path: Path) -> str:
    file = any_file(pick, path) if path.is_dir() else path
    data = file.read_bytes()
    keep = pick.randrange(len(data))
    file.write_bytes(data[:keep])
    return f"{file.name} cut to {keep} of {len(data)} bytes"


def flip_bits(pick: random.Random, path: Path) -> str:
    file = any_file(pick, path) if path.is_dir() else path
    data = bytearray(file.read_bytes())
    places = [pick.randrange(8 * len(data)) for _ in range(pick.choice((1, 1, 2, 8)))]
    for place in set(places):
        data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)
    return f"{file.name}, bits {sorted(set(places))} flipped"


def remove(pick: random.Random, path: Path) -> str:
    file = any_file(pick, path)
    file.unlink()
    return f"{file.name} removed"


def swap(pick: random.Random, folder: Path) -> str:
    """A file of the checkpoint before, or two of one checkpoint exchanged."""
    path = newest(folder)
    file = any_file(pick, path)
    other = previous(folder) / file.name
    if pick.random() < 0.5 or other.read_bytes() == file.read_bytes():
        other = pick.choice([f for f in sorted(path.iterdir()) if f.name not in (file.name, CARD)])
        aside = path / "aside"
        file.rename(aside)
        other.rename(file)
        aside.rename(other)
        return f"{file.name} and {other.name} exchanged"
    shutil.copyfile(other, file)
    return f"{file.name} of {other.parent.name}"


# Edits of JSON


def edit(pick: random.Random, path: Path) -> str:
    """Somewhere in one of the checkpoint's JSON files, its sums left alone."""
    name = pick.choice(("manifest.json", "training.json", "config.json"))
    edit_json(pick, path / name)
    return f"{name} edited"


def edit_json(pick: random.Random, file: Path) -> None:
    held = before = json.loads(file.read_text("utf-8"))
    while held == before:
        held = json.loads(file.read_text("utf-8"))
        _edit(pick, held)
    file.write_text(json.dumps(held))


def _edit(pick: random.Random, owner: Any) -> None:
    """One change at a random place of nested dicts and lists."""
    keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
    key = pick.choice(keys) if keys else None
    if key is None:
        return
    if owner[key] and isinstance(owner[key], dict | list) and pick.random() < 0.85:
        _edit(pick, owner[key])
        return
    way = pick.randrange(3)
    if way == 0 and isinstance(owner, dict):
        owner[odd.typo(pick, str(key))] = owner.pop(key)
    elif way == 1 and isinstance(owner, list):
        del owner[key]
    else:
        owner[key] = odd.value(pick)


def edit_signed(pick: random.Random, path: Path) -> str:
    name = pick.choice(("training.json", "training.json", "config.json", "manifest.json"))
    edit_json(pick, path / name)
    if name != "manifest.json":
        sign(path)
    else:
        held = json.loads((path / name).read_text())
        if isinstance(held, dict):
            write_manifest(path, held)
    return f"{name} edited, signed anew"


def nested(pick: random.Random, path: Path) -> str:
    """JSON so deep that a parser runs out of stack."""
    name = pick.choice(("manifest.json", "training.json"))
    (path / name).write_text("[" * 100_000 + "]" * 100_000)
    if name != "manifest.json":
        sign(path)
    return f"{name} nested 100,000 deep, signed anew"


def run_file(pick: random.Random, folder: Path) -> str:
    """A file of the run beside its checkpoints."""
    run = folder / "RUN"
    names = [n for n in ("config.json", "metrics.jsonl", "results.json") if (run / n).exists()]
    file = run / pick.choice(names)
    if file.suffix == ".json" and pick.random() < 0.5:
        edit_json(pick, file)
        return f"{file.name} edited"
    return pick.choice((cut_short, flip_bits))(pick, file)
