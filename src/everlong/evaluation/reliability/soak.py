"""One endless stream: millions of tokens through small models, and whether anything grows.

A model that keeps what it read, in its state or beside it, does not show it in a test of seconds.
Read are random bytes, one row, in calls of a fixed length; watched are the resident memory of this
process, the bytes of the state after every call, and that every logit is finite.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from resource import getpagesize
from typing import Any

import numpy as np
import torch

from everlong import state as states
from everlong.errors import UserError
from everlong.models.config import EverlongConfig
from everlong.models.sizing import build

CALL = 1000  # tokens: a multiple of neither segment nor chunk
MARKS = 100  # times that memory is looked at
ALLOWED = 4 << 20  # bytes of growth that a flat process may show; 400 bytes a call of ten thousand
_STATM = Path("/proc/self/statm")
_BYTES = 256

MODELS: Mapping[str, Mapping[str, Any]] = {
    "memformer": {
        "layers": ["attention"],
        "segment": {"name": "memformer", "segment_length": 64, "num_slots": 32},
    },
    "gated_deltanet": {"layers": ["gated_deltanet"]},
}


def measure(tokens: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """A row for each of `MODELS`. `UserError` on a system that does not tell resident memory."""
    shape: dict[str, Any] = {"hidden_size": 64, "num_heads": 2, "num_layers": 2}
    rows = []
    for name, options in MODELS.items():
        model = build(EverlongConfig(**shape, **options), seed).eval()
        row = {"name": name, **read(model, tokens, seed, say)}
        rows.append(row)
        say(f"{name}: {row['growth_bytes']:+,} bytes of memory, failed: {row['failures']}")
    grown = ", ".join(f"{row['growth_bytes'] / 1e6:+.2f} MB" for row in rows)
    return {
        "tried": sum(row["tokens"] for row in rows),
        "failed": sum(len(row["failures"]) for row in rows),
        "note": f"{len(rows)} models, {tokens:,} each; resident memory {grown}",
        "allowed_bytes": ALLOWED,
        "config": shape | {name: dict(options) for name, options in MODELS.items()},
        "rows": rows,
    }


@torch.inference_mode()
def read(
    model: Any, tokens: int, seed: int, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Read `tokens` (or as many more as fill a call); what grew, and the marks on the way.

    `growth_bytes` is the slope of resident memory over all marks behind the first tenth, times the
    tokens read there: what a line through them says, not two noisy ends.
    """
    torch.set_flush_denormal(True)  # decayed states are full of them, and they cost 4-5 times
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    state = model.init_state(1)
    held, sizes, finite, largest = states.num_bytes(state), set(), True, 0.0
    calls = -(-tokens // CALL)
    marks: list[dict[str, Any]] = []
    started = time.process_time()
    for number in range(1, calls + 1):
        ids = torch.randint(_BYTES, (1, CALL), generator=generator).to(device)
        logits, state = model.stream(ids, state)
        sizes.add(states.num_bytes(state))
        peak = logits.abs().max().item()
        finite, largest = finite and np.isfinite(peak), max(largest, peak)
        if number * MARKS // calls > (number - 1) * MARKS // calls:
            mark = {"tokens": number * CALL, "resident_bytes": resident()}
            marks.append(mark | {"state_bytes": states.num_bytes(state)})
            if len(marks) % (MARKS // 10) == 0:
                say(f"{mark['tokens']:,} tokens, {mark['resident_bytes'] / 1e6:.1f} MB")
    behind = marks[len(marks) // 10 :]
    growth = _slope(behind) * (behind[-1]["tokens"] - behind[0]["tokens"])
    failures = [] if growth <= ALLOWED else [f"resident memory grew by {growth:,.0f} bytes"]
    failures += [] if sizes == {held} else [f"the state had {sorted(sizes)[:5]} bytes, not {held}"]
    failures += [] if finite else ["a logit was not finite"]
    return {
        "tokens": calls * CALL,
        "calls": calls,
        "growth_bytes": round(growth),
        "state_bytes": held,
        "largest_logit": largest,
        "failures": failures,
        "cpu_s": round(time.process_time() - started, 1),
        "marks": marks,
    }


def resident() -> int:
    """Bytes of this process in memory."""
    try:
        return int(_STATM.read_text().split()[1]) * getpagesize()
    except OSError as error:
        raise UserError(f"resident memory is read from {_STATM}, which Linux has") from error


def _slope(marks: list[dict[str, Any]]) -> float:
    """Bytes a token, by least squares."""
    if len(marks) < 2:
        return 0.0
    x = np.array([mark["tokens"] for mark in marks], float)
    y = np.array([mark["resident_bytes"] for mark in marks], float)
    return float(np.polyfit(x - x.mean(), y - y.mean(), 1)[0])
