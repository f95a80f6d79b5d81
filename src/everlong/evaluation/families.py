"""Bits per byte against bytes of state: every memory at equal parameters and equal tokens.

S tokens of a segment.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from everlong.errors import UserError
from everlong.evaluation.cells import cell
from everlong.evaluation.cost import stream_bytes
from everlong.evaluation.language import bits_per_byte
from everlong.evaluation.recall import interval
from everlong.evaluation.report import plot_scores
from everlong.models.config import EverlongConfig
from everlong.models.sizing import build
from everlong.provenance import git_sha, write_results
from everlong.recipes import Data
from everlong.tasks.text import Documents
from everlong.training import checkpoints
from everlong.training.config import TrainConfig
from everlong.training.loop import train
from everlong.training.run import read_config, read_metrics

_NOT_THE_MODEL = ("architectures", "dtype", "transformers_version")
_STREAMED = 40  # segments after which a growing state is quoted
Row = dict[str, Any]


def measure(
    name: str,
    config: EverlongConfig,
    data: Data,
    texts: tuple[Documents, Documents],
    options: TrainConfig,
    folder: Path,
) -> Row:
    """Train on `texts[0]` in a run folder and score `texts[1]`; a finished cell is read
    back. `data` says where the texts are from.

    A run that was stopped goes on. `UserError` for a folder that holds another configuration's.
    """
    named = config.to_diff_dict()
    model = {key: value for key, value in named.items() if key not in _NOT_THE_MODEL}
    sizes = [texts[0].num_bytes, texts[1].num_bytes]
    described = {"model": model, "data": asdict(data), "bytes": sizes, "train": asdict(options)}
    return cell(
        folder / "cell.json",
        described,
        lambda: _measure(name, config, texts, options, folder, described),
    )


def _measure(
    name: str,
    config: EverlongConfig,
    texts: tuple[Documents, Documents],
    options: TrainConfig,
    folder: Path,
    described: Row,
) -> Row:
    model = build(copy.deepcopy(config), options.seed)  # saving a model writes into its config
    started = bool(checkpoints.steps(folder)) if folder.exists() else False
    about = {"cell": json.loads(json.dumps(described))}
    if started and read_config(folder).get("cell") != about["cell"]:
        raise UserError(f"{folder} was begun with other options: give --out a new folder")
    resume = folder if started else None
    train(model, texts[0], None, options, folder, resume=resume, about=about)
    length = options.segment_length
    assert length is not None
    lines = read_metrics(folder / "metrics.jsonl")
    return {
        "name": name,
        "seed": options.seed,
        "bits_per_byte": bits_per_byte(model, texts[1], segment_length=length).bits_per_byte,
        "wiped_bits_per_byte": _wiped(model, texts[1], length),
        "state_bytes": _streamed_bytes(model, texts[1], length),
        "parameters": model.num_parameters(),
        "tokens": lines[-1]["tokens"],
        "tokens_per_s": median(line["tokens_per_s"] for line in lines),
        "git": git_sha(),
    }


def _wiped(model: Any, documents: Documents, length: int) -> float | None:
    """The same weights, every segment from a fresh state; None where that cuts a longer period."""
    if length % model.period:
        return None
    return bits_per_byte(model, documents, segment_length=length, wipe=True).bits_per_byte


def _streamed_bytes(model: Any, documents: Documents, length: int) -> int:
    """Bytes of one stream's state in the middle of a segment, where it is largest."""
    ids = torch.tensor(documents[0][: _STREAMED * length - length // 2].tolist())
    device = next(model.parameters()).device
    pieces = ids.to(device)[None].split(length, 1)
    return stream_bytes(model.eval(), pieces, [len(pieces)])[len(pieces)]


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row a memory, best first: means over seeds, with the 95 % interval of bits per byte."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    found = []
    for name, same in groups.items():
        bits = [row["bits_per_byte"] for row in same]
        wiped = [row["wiped_bits_per_byte"] for row in same if row["wiped_bits_per_byte"]]
        found.append(
            {
                "name": name,
                "seeds": len(same),
                "bits_per_byte": mean(bits),
                "interval": interval(bits),
                "gain": mean(wiped) - mean(bits) if wiped else None,
                "state_bytes": same[0]["state_bytes"],
                "parameters": same[0]["parameters"],
                "tokens": same[0]["tokens"],
                "tokens_per_s": median(row["tokens_per_s"] for row in same),
            }
        )
    return sorted(found, key=lambda row: row["bits_per_byte"])


def write(
    path: Path,
    config: Mapping[str, Any],
    rows: Sequence[Row],
    diverged: Sequence[Row],
    command: str,
) -> None:
    """Rows, summary and what diverged as JSON with provenance, and the picture beside it."""
    found = summary(rows)
    write_results(path, command, config, summary=found, rows=list(rows), diverged=list(diverged))
    plot_scores(found, path.with_suffix(".png"))
