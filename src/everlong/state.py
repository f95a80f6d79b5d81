"""What a State is: nested dicts and tuples of tensors, batch first in EVERY leaf.

No None, no Python numbers, no zero-size leaves. Unused places hold zero. A state is a value: every
function here returns a new one and leaves its arguments alone.

States of unbounded memories may differ in length (dimension 1): `where` and `cat` pad the shorter
ones with zeros, which is what an unused place holds anyway.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = Any  # Tensor | tuple[State, ...] | dict[str, State]: recursive, so spelled in words

_FORMAT, _VERSION = "everlong.state", "2"


def tree_map(fn: Callable[..., Any], state: State, *others: State) -> State:
    """Apply `fn` to every leaf of `state` (and that leaf of `others`), keeping the structure."""
    if isinstance(state, Tensor):
        return fn(state, *others)
    if isinstance(state, dict):
        for other in others:
            if not isinstance(other, dict) or other.keys() != state.keys():
                raise ValueError(f"states differ: one has {sorted(state)}, another {_kind(other)}")
        return {k: tree_map(fn, v, *(o[k] for o in others)) for k, v in state.items()}
    if isinstance(state, tuple):
        for other in others:
            if not isinstance(other, tuple) or len(other) != len(state):
                raise ValueError(f"states differ: a tuple of {len(state)} and {_kind(other)}")
        return tuple(tree_map(fn, *parts) for parts in zip(state, *others, strict=True))
    raise ValueError(f"a state holds dicts, tuples and tensors only, not {_kind(state)}")


def _kind(value: Any) -> str:
    return f"keys {sorted(value)}" if isinstance(value, dict) else type(value).__name__


def flatten(state: State) -> dict[str, Tensor]:
    """Leaves by path: `{"layers.0.keys": tensor, ...}`, in order of structure."""
    if isinstance(state, Tensor):
        return {"": state}
    if not isinstance(state, dict | tuple):
        raise ValueError(f"a state holds dicts, tuples and tensors only, not {_kind(state)}")
    items = state.items() if isinstance(state, dict) else enumerate(state)
    found = {}
    for key, value in items:
        if "." in str(key):
            raise ValueError(f"{key!r} cannot name a part of a state: paths are joined by dots")
        for path, leaf in flatten(value).items():
            found[f"{key}.{path}" if path else str(key)] = leaf
    return found


def leaves(state: State) -> list[Tensor]:
    """Every tensor of the state, in order of structure."""
    return list(flatten(state).values())


def batch_size(state: State) -> int:
    """Rows of the state (dimension 0 of its first leaf)."""
    first = state
    while not isinstance(first, Tensor):
        if not isinstance(first, dict | tuple):
            raise ValueError(f"a state holds dicts, tuples and tensors only, not {_kind(first)}")
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    return first.shape[0]


def shapes(state: State) -> Any:
    """Of every leaf, without the rows, in the structure of the state."""
    return tree_map(lambda leaf: leaf.shape[1:], state)


def num_bytes(state: State) -> int:
    """Bytes held by the leaves, all rows together: what a server must keep between two calls."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))


def detach(state: State) -> State:
    """The same values without their graph."""
    return tree_map(Tensor.detach, state)


def to(
    state: State,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> State:
    """Move every leaf to `device`; cast floating-point ones to `dtype` (clocks stay integers)."""

    def move(leaf: Tensor) -> Tensor:
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

    return tree_map(move, state)


def select(state: State, rows: Tensor) -> State:
    """Rows of the state by index (Int[R]), repeats allowed: beam search, batching, serving."""
    return tree_map(lambda leaf: leaf.index_select(0, rows.to(leaf.device)), state)


def where(rows: Tensor, a: State, b: State) -> State:
    """Row by row, `a` where `rows` (Bool[B]) is true and `b` elsewhere."""

    def choose(x: Tensor, y: Tensor) -> Tensor:
        x, y = _same_length([x, y])
        return torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, y)

    return tree_map(choose, a, b)


def cat(states: list[State]) -> State:
    """Join states of several streams into one batch, in order."""
    return tree_map(lambda *parts: torch.cat(_same_length(list(parts))), states[0], *states[1:])


def split(state: State) -> list[State]:
    """One state a row, the inverse of `cat`. Leaves are copies: a row does not pin the batch."""
    return [
        tree_map(lambda leaf, row=row: leaf[row : row + 1].clone(), state)
        for row in range(batch_size(state))
    ]


def _same_length(parts: list[Tensor]) -> list[Tensor]:
    if all(part.shape[1:] == parts[0].shape[1:] for part in parts):
        return parts
    longest = max(part.shape[1] for part in parts)
    padded = [pad_length(part, longest) for part in parts]
    if any(part.shape[1:] != padded[0].shape[1:] for part in padded):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"states of different memories cannot be joined: leaf shapes {shapes}")
    return padded


def pad_length(leaf: Tensor, length: int) -> Tensor:
    """Zeros behind dimension 1 up to `length`."""
    if leaf.shape[1] >= length:
        return leaf
    missing = leaf.new_zeros(leaf.shape[0], length - leaf.shape[1], *leaf.shape[2:])
    return torch.cat([leaf, missing], 1)


def save(state: State, path: str | Path, name: str = "", config_hash: str = "") -> None:
    """Write a safetensors file: leaves by path, structure and origin in the metadata.

    `name` and `config_hash` say which memory the state belongs to; `load` checks them when asked.
    The file is written aside and renamed, so a reader never sees half of it.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in flatten(state).items()}
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "memory": name,
        "config_hash": config_hash,
        "structure": json.dumps(_structure(state)),
    }
    metadata["sha256"] = _digest(metadata, tensors)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, aside, metadata)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load(path: str | Path, name: str | None = None, config_hash: str | None = None) -> State:
    """Read a state written by `save`; `ValueError` if it is damaged or of another memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    except TypeError as error:  # tensors of a kind that torch does not read
        raise ValueError(f"{path} is damaged: {error}") from error
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise ValueError(
            f"{path} is not an everlong state of version {_VERSION}: write it with state.save"
        )
    if metadata.pop("sha256", "") != _digest(metadata, tensors):
        raise ValueError(f"{path} is damaged: it is not what was written there")
    for what, wanted in (("memory", name), ("config_hash", config_hash)):
        if wanted is not None and metadata[what] != wanted:
            raise ValueError(
                f"{path} holds the state of another model: its {what} is {metadata[what]!r}, "
                f"this one's {wanted!r}"
            )
    return _build(json.loads(metadata["structure"]), tensors, "")


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Of all that a file says, so that a changed bit is seen wherever it is."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for key in sorted(tensors):
        leaf = tensors[key]
        digest.update(f"{key} {leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(leaf.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _structure(state: State) -> Any:
    if isinstance(state, Tensor):
        return 0
    if isinstance(state, dict):
        return {key: _structure(value) for key, value in state.items()}
    return [_structure(value) for value in state]


def _build(structure: Any, tensors: dict[str, Tensor], path: str) -> State:
    if structure == 0:
        return tensors[path]
    prefix = f"{path}." if path else ""
    if isinstance(structure, dict):
        return {k: _build(v, tensors, f"{prefix}{k}") for k, v in structure.items()}
    return tuple(_build(v, tensors, f"{prefix}{i}") for i, v in enumerate(structure))
