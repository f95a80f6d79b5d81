"""The tables of docs/reliability.md, computed from the JSON: none of their numbers is typed."""

from collections.abc import Iterable, Mapping
from typing import Any

from everlong.evaluation.markdown import table
from everlong.evaluation.reliability import TITLES


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Markdown by name, of what `everlong bench reliability` wrote."""
    parts = result["parts"]
    return {
        "parts": table(
            ("what", "tried", "failed", "which", "command"),
            (
                (
                    TITLES[part],
                    f"{found['tried']:,}",
                    f"{found['failed']:,}",
                    found["note"],
                    f"`everlong bench reliability {part}`",
                )
                for part, found in parts.items()
            ),
        ),
        "failures": table(
            ("part", "what failed", "times", "for example"),
            (
                (part, *each)
                for part, found in parts.items()
                for each in FAILED[part](found)
                if found["failed"]
            ),
        ),
        "soak": table(
            ("model", "tokens", "bytes of state", "resident, first tenth", "at the end", "growth"),
            map(_soaked, parts["soak"]["rows"]),
        ),
        "damages": table(
            ("damage", "tried", "refused in one line", "read", "failed"),
            (
                (row["kind"], *(f"{row[key]:,}" for key in ("tried", "refused", "read", "failed")))
                for row in parts["checkpoints"]["rows"]
            ),
        ),
    }


def _soaked(row: Mapping[str, Any]) -> tuple[str, ...]:
    marks = row["marks"]
    first, last = (f"{mark['resident_bytes'] / 1e6:.1f} MB" for mark in (marks[9], marks[-1]))
    grown = f"{row['growth_bytes'] / 1e6:+.2f} MB"
    return row["name"], f"{row['tokens']:,}", f"{row['state_bytes']:,}", first, last, grown


def _of_cuts(found: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for row in found["rows"]:
        if row["failed"]:
            yield row["name"], str(row["failed"]), row["failures"][0].split(";")[0]
        if not row["refuses_empty"]:
            yield row["name"], "1", "a call of no tokens is not refused"


def _of_fuzz(found: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for each in found["failures"]:
        words = " ".join(each["first"].get("words", ()))
        yield each["place"], str(each["times"]), f"`everlong {words}`"


def _of_kills(found: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    yield "bits differ", str(found["failed"]), ", ".join(found["differences"][:2])


def _of_soak(found: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for row in found["rows"]:
        for failure in row["failures"]:
            yield row["name"], "1", failure


def _of_checkpoints(found: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for row in found["rows"]:
        if row["failed"]:
            first = row["failures"][0]
            yield row["kind"], str(row["failed"]), f"{first['what']}: {first['wrong']}"


FAILED = {
    "cuts": _of_cuts,
    "fuzz": _of_fuzz,
    "kills": _of_kills,
    "soak": _of_soak,
    "checkpoints": _of_checkpoints,
}
