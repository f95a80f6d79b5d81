"""A stream of 1,000,000 tokens: bytes of state, resident memory, and the cost of an aged state.

    python benchmarks/stream.py [--tokens 1000000] [--out benchmarks/results/stream.json]

Reads the packaged book again and again with the default recipe's model (fresh weights: cost does
not depend on them), then times the same block from a fresh and from the aged state, in interleaved
pairs, for reading and for decoding token by token.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch

from everlong import recipes
from everlong import state as states
from everlong.models.config import EverlongConfig
from everlong.models.hub import EverlongForCausalLM
from everlong.provenance import write_results
from everlong.state import State
from everlong.tasks.text import encode, load_documents

PAIRS, READ_SEGMENTS, DECODED = 20, 8, 64


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def read_on(model: EverlongForCausalLM, tokens: int, ids: torch.Tensor) -> tuple[State, list[dict]]:
    """Read `tokens` tokens in calls of eight segments; a record every tenth of the way."""
    block = READ_SEGMENTS * model.period
    state, records, start = model.init_state(1), [], time.perf_counter()
    calls = -(-tokens // block)
    for call in range(calls):
        places = torch.arange(call * block, (call + 1) * block) % len(ids)
        _, state = model.stream(ids[places][None], state)
        if call % max(1, calls // 10) == 0 or call == calls - 1:
            records.append(
                {
                    "tokens": (call + 1) * block,
                    "state_bytes": states.num_bytes(state),
                    "resident_bytes": resident(),
                    "seconds": round(time.perf_counter() - start, 2),
                }
            )
    return state, records


def read(model: EverlongForCausalLM, ids: torch.Tensor, state: State) -> None:
    model.stream(ids[None, : READ_SEGMENTS * model.period], state)


def decode(model: EverlongForCausalLM, ids: torch.Tensor, state: State) -> None:
    for place in range(DECODED):
        _, state = model.stream(ids[None, place : place + 1], state)


def compare(work: Callable[[State], None], fresh: State, aged: State) -> dict:
    """Medians of interleaved pairs, and the ratio aged / fresh."""
    times: dict[str, list[float]] = {"fresh": [], "aged": []}
    for pair in range(PAIRS + 2):
        order = [("fresh", fresh), ("aged", aged)]
        for name, state in order if pair % 2 else reversed(order):
            start = time.perf_counter()
            work(state)
            if pair >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {"pairs": PAIRS, "seconds": medians, "ratio": medians["aged"] / medians["fresh"]}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--out", default="benchmarks/results/stream.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    options = recipes.load(args.recipe).model
    model = EverlongForCausalLM(EverlongConfig(**options)).eval()
    ids = torch.from_numpy(encode(np.asarray(load_documents("moby_dick")[0])))
    aged, records = read_on(model, args.tokens, ids)
    warm = records[1]["resident_bytes"]  # a tenth of the way in
    fresh = model.init_state(1)
    found = {
        "parameters": model.num_parameters(),
        "state_bytes": sorted({record["state_bytes"] for record in records}),
        "resident_growth_bytes": max(r["resident_bytes"] for r in records[1:]) - warm,
        "reading": compare(lambda state: read(model, ids, state), fresh, aged),
        "decoding": compare(lambda state: decode(model, ids, state), fresh, aged),
        "records": records,
    }
    write_results(args.out, f"python benchmarks/stream.py --recipe {args.recipe}", options, **found)
    print({key: value for key, value in found.items() if key != "records"})


if __name__ == "__main__":
    main()
