"""What a finished training is worth: the table, the curves, and a passage continued."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from everlong.errors import UserError

if TYPE_CHECKING:
    from everlong.cli.prepare import Texts
    from everlong.training.config import TrainConfig

Results = dict[str, Any]
LOOKS_AHEAD = " (looks ahead)"
SUMS = "SHA256SUMS"
STREAMED = (10, 1000)  # segments after which the bytes of state are measured
_PASSAGE, _SHOWN, _CONTINUED = 4096, 160, 320  # tokens read before, shown of them, made
_SLICE = 1 << 16  # tokens of a document read at a time


def evaluate(
    model: Any, twin: Any | None, texts: "Texts", config: "TrainConfig", run_dir: Path
) -> Results:
    """Measure, write results.json and curves.png into the run folder, and return the results."""
    from everlong.evaluation.report import plot_curves
    from everlong.models.decoder import looks_ahead
    from everlong.provenance import write_results

    print("measuring on the validation text", file=sys.stderr)
    length = config.segment_length
    assert length is not None
    names = model.config.segment, "+".join(dict.fromkeys(model.config.layer_names))
    name = names[0]["name"] if names[0] else names[1]
    name += LOOKS_AHEAD if looks_ahead(model) else ""
    rows = [_row(name, model, texts, length, run_dir)]
    if length % model.period == 0:
        wiped = _bits(model, texts, length, wipe=True)
        rows.append({"name": f"{name}, wiped at every segment", "bits_per_byte": wiped})
    if twin is not None:
        rows.append(_row("twin without a memory", twin, texts, length, run_dir / "twin"))
    found = {"steps": config.steps, "segment_length": length, "rows": rows}
    found["cut"] = len(texts.validation) < _ROWS
    described = {"model": model.config.to_dict(), "train": asdict(config)}
    aside = run_dir / ".results.json.part"
    write_results(aside, "everlong train", described, **found)
    if config.steps:
        plot_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
    os.replace(aside, _file(run_dir))  # last: where it lies, the run is finished
    return found


def _row(name: str, model: Any, texts: "Texts", length: int, run_dir: Path) -> dict[str, Any]:
    from everlong.evaluation.cost import stream_bytes
    from everlong.training.run import read_metrics

    speeds = [line["tokens_per_s"] for line in read_metrics(run_dir / "metrics.jsonl")]
    bounded = is_bounded(model.config)
    measured = STREAMED if bounded else STREAMED[:1]  # reading on costs more and more
    both = stream_bytes(model, _blocks(model, texts, length), measured, _held_and_growing)
    growing = {} if bounded else {"growing_bytes": {n: grown for n, (_, grown) in both.items()}}
    return {
        "name": name,
        "bits_per_byte": _bits(model, texts, length, wipe=False),
        "tokens_per_s": median(speeds) if speeds else None,
        "state_bytes": {n: held for n, (held, _) in both.items()},
        **growing,
        "parameters": model.num_parameters(),
    }


def _held_and_growing(model: Any, state: Any) -> tuple[int, int]:
    from everlong import state as states
    from everlong.evaluation.cost import growing_bytes

    return states.num_bytes(state), growing_bytes(model, state)


def _bits(model: Any, texts: "Texts", length: int, wipe: bool) -> float:
    from everlong.evaluation.language import bits_per_byte

    found = bits_per_byte(
        model, texts.validation, segment_length=length, wipe=wipe, batch_size=_ROWS, segments=4
    )
    return found.bits_per_byte


_ROWS = 8


def _blocks(model: Any, texts: "Texts", length: int) -> Any:
    """The training text as one endless stream of segments, Int [1, S]."""
    import torch

    device = next(model.parameters()).device
    ids = _ids(texts.train)
    while True:
        yield torch.tensor([list(islice(ids, length))], device=device)


def _ids(documents: Any) -> Iterator[int]:
    """All documents, over and over; a slice at a time, as they may be larger than memory."""
    for document in cycle(documents):
        yield documents.bos
        for start in range(0, len(document), _SLICE):
            yield from document[start : start + _SLICE].tolist()


def is_bounded(config: Any) -> bool:
    """Whether a model's state keeps its size; a segment memory bounds what it stands around."""
    from everlong.registry import memory_entry

    if config.segment:
        return memory_entry(config.segment["name"]).bounded
    return all(memory_entry(name).bounded for name in config.layer_names)


def show(results: Results) -> None:
    """The table, on stdout."""
    from rich.table import Table

    from everlong.cli.progress import console

    table = Table(box=None, pad_edge=False)
    table.add_column("on the validation text")
    steps = [f"state after {count:,} segments" for count in STREAMED]
    for column in ("bits per byte", "tokens/s", *steps, "parameters"):
        table.add_column(column, justify="right")
    for row in results["rows"]:
        states = {int(count): value for count, value in row.get("state_bytes", {}).items()}
        sizes = [f"{states[n]:,} B" if n in states else "grows" for n in STREAMED]
        for count, grown in row.get("growing_bytes", {}).items():
            kept = states[int(count)] - grown
            sizes[STREAMED.index(int(count))] = f"{kept:,} B + {grown:,} B growing"
        known = "tokens_per_s" in row
        speed = f"{row['tokens_per_s']:,.0f}" if known and row["tokens_per_s"] else ""
        cells = (speed, *sizes, f"{row['parameters']:,}") if known else ("",) * 4
        table.add_row(row["name"], f"{row['bits_per_byte']:.3f}", *cells)
    console().print(table)
    own, *others = results["rows"]
    for other in others:
        gain = other["bits_per_byte"] - own["bits_per_byte"]
        words = "less" if gain >= 0 else "more"
        print(f"{abs(gain):.3f} bits per byte {words} than: {other['name']}")
    if results.get("cut"):
        print(
            f"The text was cut into {_ROWS} pieces, each read from a fresh state; `everlong "
            "evaluate` reads each document, or context, whole."
        )


def continue_passage(model: Any, texts: "Texts") -> None:
    """Read a passage of the validation text, then go on with it."""
    from everlong.cli.reader import Reader, printer

    model.eval()
    ids = texts.validation[0][:_PASSAGE]
    reader = Reader(model, texts.validation.bos)
    reader.read(ids)
    shown = ids[-_SHOWN:]
    tokenizer = texts.tokenizer
    raw = tokenizer is None
    tail = bytes(shown.tolist()).decode(errors="replace") if raw else tokenizer.decode(shown)
    print(f"\nA passage it had not seen:\n{tail}\nand how it goes on:")
    out = printer(tokenizer, sys.stdout)
    reader.continue_(out, seed=0, max_new_tokens=_CONTINUED, do_sample=True, temperature=0.8)


def finish(tokenizer: Any, folder: Path) -> None:
    """Beside the weights the tokenizer, so that the folder is whole for transformers' Auto classes,
    and the sums by which damaged weights are known (`sha256sum -c` reads them too)."""
    from everlong.models.tokenizer import byte_tokenizer

    try:
        (tokenizer or byte_tokenizer()).save_pretrained(folder)
        lines = (f"{digest}  {name}\n" for name, digest in weight_sums(folder).items())
        (folder / SUMS).write_text("".join(lines), "utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error


def weight_sums(folder: Path) -> dict[str, str]:
    """sha256 of every file of weights, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_results(run_dir: Path) -> Results | None:
    """What `evaluate` wrote, None for a run that is not finished."""
    if not _file(run_dir).exists():
        return None
    damaged = f"{_file(run_dir)} is damaged: remove it and resume the run"
    try:
        found = json.loads(_file(run_dir).read_text("utf-8"))
    except ValueError as error:
        raise UserError(damaged) from error
    if not isinstance(found, dict) or not isinstance(found.get("steps"), int):
        raise UserError(damaged)
    rows = found.get("rows")
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
        raise UserError(damaged)
    return found


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and {"name", "bits_per_byte"} <= row.keys()


def _file(run_dir: Path) -> Path:
    return run_dir / "results.json"
