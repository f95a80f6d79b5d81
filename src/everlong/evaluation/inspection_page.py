"""One page of what a memory did with a text: HTML with all it needs inside, no network, no library.

The page's frame, style and script lie in `inspect_page/`. Everything that comes from outside (text,
names of files and memories) reaches it as escaped HTML, or as JSON in which no "<" stands.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from everlong.evaluation.inspection import Inspection, Writes
from everlong.evaluation.svg import Line, chart
from everlong.records import RECORDS

_LEVELS = 254  # of a quantised number; 255 is "none"
_CELLS = 3_000_000  # numbers of all positions' records in a page, a byte each
_MEANINGS = {
    "kept": "old content that is still there",
    "overwritten": "old content replaced by what the segment held",
    "forgotten": "old content gone, with nothing written in its place",
    "recalled": "the weight of each place in what was looked up",
}


@dataclass(frozen=True)
class About:
    """What stands at the top: the memory's name, what it keeps, and facts by name; at the
    bottom: where the page comes from."""

    title: str
    keeps: str
    facts: Mapping[str, str]
    source: str


def page(
    found: Inspection,
    texts: Sequence[str],
    about: About,
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """The whole HTML. texts: the `found.detailed` first tokens, as a reader sees them; metrics: the
    lines of each training's metrics.jsonl, by its name."""
    sources, left_out = _sources(found)
    data = {
        "tokens": list(texts),
        "bits": _rounded(found.bits[: found.detailed]),
        "segments": [
            [each.start, each.stop, round(each.bits, 3), each.num_bytes]
            for each in found.segments[: found.written]
        ],
        "sources": sources,
        "places": _places(found),
    }
    told = bool(data["sources"] or data["places"])
    parts = {
        "title": escape(f"{about.title}: what it kept"),
        "name": escape(about.title),
        "keeps": escape(about.keeps),
        "facts": "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
            for name, value in about.facts.items()
        ),
        "quiet": "" if told else _QUIET,
        "stream": _stream(found),
        "gates": _gates(found),
        "curves": _curves(metrics),
        "left_out": "".join(
            f"<li>{escape(line)}</li>" for line in _limits(found) + found.left_out + left_out
        ),
        "source": escape(about.source),
        "data": _json(data),
        "css": _part("page.css"),
        "js": _part("page.js"),
    }
    # one pass: what is put in is not read again
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _part("page.html"))


_QUIET = (
    '<p class="note">This memory records nothing of what it writes and reads: the page shows each '
    "token's surprise, the bytes of state and the training curves.</p>"
)


def _part(name: str) -> str:
    return (files("everlong.evaluation") / "inspect_page" / name).read_text("utf-8")


def _json(data: Any) -> str:
    """JSON that ends no script and begins no comment, whatever it holds."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _rounded(values: np.ndarray) -> list[float | None]:
    return [round(float(value), 3) if np.isfinite(value) else None for value in values]


def _packed(table: np.ndarray) -> dict[str, Any]:
    """A table [rows, columns] as bytes between its least and its largest number."""
    known = np.isfinite(table)
    low, high = (float(table[known].min()), float(table[known].max())) if known.any() else (0, 0)
    levels = np.round((np.where(known, table, low) - low) / ((high - low) or 1) * _LEVELS)
    levels = np.where(known, levels, 255).astype(np.uint8)
    return {
        "shape": list(table.shape),
        "low": low,
        "high": high,
        "bytes": base64.b64encode(levels.tobytes()).decode(),
    }


def _sources(found: Inspection) -> tuple[list[dict[str, Any]], list[str]]:
    """What is known of each token, a table [tokens, units] for each part of the memory; row t is
    what belongs to token t. A name whose tables would be too large is the mean over its parts."""
    tables: dict[str, list[tuple[str, np.ndarray]]] = {}
    for each in found.positions:
        values = np.asarray(each.values, float)
        if RECORDS[each.name].ahead:
            values = np.concatenate([np.full_like(values[:1], np.nan), values[:-1]])
        tables.setdefault(each.name, []).append((each.label, values))
    for writes in found.writes:
        if "took" in writes.found:
            tables.setdefault("took", []).append((writes.label, _took(found, writes)))
    sources, left_out = [], []
    total = sum(table.size for parts in tables.values() for _, table in parts)
    for name, parts in tables.items():
        if total > _CELLS and len(parts) > 1 and len({part.shape for _, part in parts}) == 1:
            mean = np.mean([table for _, table in parts], 0)
            parts = [(f"mean of {len(parts)} parts", mean)]
            left_out.append(f"{name} of each layer: only their mean; --tokens with fewer shows all")
        record = RECORDS[name]
        for label, table in parts:
            about = {"name": name, "part": label, "unit": record.unit, "means": record.means}
            sources.append(about | {"table": _packed(table)})
    return sources, left_out


def _took(found: Inspection, writes: Writes) -> np.ndarray:
    """The weight each slot gave each token when the token's segment was written: [tokens, N]."""
    width = max(len(array) for _, array in writes.found["took"])
    table = np.full((found.detailed, width), np.nan)
    for index, array in writes.found["took"]:
        segment = found.segments[index]
        stop = min(segment.stop, found.detailed)
        if stop > segment.start and array.shape[1] >= stop - segment.start:
            table[segment.start : stop, : len(array)] = array[:, : stop - segment.start].T
    return table


def _places(found: Inspection) -> list[dict[str, Any]]:
    """For each part of the memory tables [N, segments]: shares that were kept, overwritten and
    forgotten, which add up to 1, and what was looked up."""
    places = []
    for writes in found.writes:
        kept, faded, recall = (
            writes.table(name, found.written) for name in ("kept", "faded", "recall")
        )
        tables = {}
        if kept is not None:
            stays = 1 - faded if faded is not None else np.ones_like(kept)
            tables["kept"] = kept * stays
            if (kept < 1).any():
                tables["overwritten"] = (1 - kept) * stays
            if faded is not None:
                tables["forgotten"] = faded
        if recall is not None:
            tables["recalled"] = recall
        if tables:
            means = {name: _MEANINGS[name] for name in tables}
            tables = {name: _packed(table) for name, table in tables.items()}
            about = {"part": writes.label, "unit": writes.unit, "means": means}
            places.append(about | {"tables": tables})
    return places


def _stream(found: Inspection) -> str:
    """Bits a token, and bytes of state, behind each segment of the whole stream."""
    ends = [each.stop for each in found.segments]
    counts = [np.isfinite(found.bits[each.start : each.stop]).sum() for each in found.segments]
    bits = [
        each.bits / count if count else float("nan")
        for each, count in zip(found.segments, counts, strict=True)
    ]
    num_bytes = [each.num_bytes for each in found.segments]
    return chart("Bytes of state", "tokens read", [Line("", ends, num_bytes)], zero=True) + chart(
        "Surprise: bits a token, mean of a segment", "tokens read", [Line("", ends, bits)]
    )


def _gates(found: Inspection) -> str:
    """Every record of single tokens but attention, along the first tokens: a line a part."""
    lines: dict[str, list[Line]] = {}
    width = max(1, found.detailed // 100)
    kernel = np.ones(width) / width
    for each in found.positions:
        if RECORDS[each.name].unit != "head" and each.values.shape[1] > 1:
            continue
        ys = np.convolve(each.values.mean(1), kernel, "valid")
        xs = np.arange(len(ys)) + width
        lines.setdefault(each.name, []).append(Line(each.label, xs.tolist(), ys.tolist()))
    return "".join(
        chart(f"{name}: {RECORDS[name].means}", "tokens read", each) for name, each in lines.items()
    )


def _curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Bits per byte, learning rate and gradient norm of each training that left its lines."""
    bits, rates, norms = [], [], []
    for name, lines in metrics.items():
        if not lines:
            continue
        tokens = [line["tokens"] for line in lines]
        read = [line["bits_per_byte"] for line in lines]
        checked = [line for line in lines if "validation_bits_per_byte" in line]
        bits.append(Line(f"{name}, training", tokens, read, faint=len(read) > 200))
        if checked:
            bits.append(
                Line(
                    f"{name}, validation",
                    [line["tokens"] for line in checked],
                    [line["validation_bits_per_byte"] for line in checked],
                    dots=True,
                )
            )
        rates.append(Line(name, tokens, [line["learning_rate"] for line in lines]))
        norms.append(Line(name, tokens, [line["grad_norm"] for line in lines]))
    if not bits:
        return '<p class="note">This folder has no metrics.jsonl: no training curves.</p>'
    x_label = "tokens read in training"
    drawn = (("Bits per byte", bits), ("Learning rate", rates), ("Gradient norm", norms))
    return (
        f'<div class="charts">{"".join(chart(name, x_label, each) for name, each in drawn)}</div>'
    )


def _limits(found: Inspection) -> list[str]:
    told = []
    if found.detailed < len(found.ids):
        told.append(
            f"Tokens one by one: the first {found.detailed:,} of {len(found.ids):,} are shown "
            "(--tokens); the charts of the stream are of all."
        )
    if found.written < len(found.segments):
        told.append(
            f"Writes: the first {found.written:,} of {len(found.segments):,} segments are shown."
        )
    known = {name for writes in found.writes for name in writes.found}
    known |= {each.name for each in found.positions}
    if any(writes.unit == "slot" for writes in found.writes):
        told += [
            f"{name} ({RECORDS[name].means}): this memory does not record it."
            for name in ("took", "read")
            if name not in known
        ]
    return [*told, "Numbers of tables are rounded to 1 part in 254 of their range."]
