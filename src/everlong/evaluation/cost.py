"""What a memory costs: bytes of state against stream length, and the memory training will take.

B batch, S segment length.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from everlong import state as states
from everlong.evaluation.meters import LiveBytes
from everlong.registry import create_memory, list_memories, memory_entry

Step = Callable[[Any, Any], tuple[Tensor, Any]]

QUOTED_WIDTH, QUOTED_HEADS = 256, 4  # what "bytes of state" of a memory is quoted at


def memory_row(name: str) -> dict[str, Any]:
    """A memory's line in every table: what the registry says, and the bytes of one fresh stream.

    Width 256, 4 heads, default options; `bytes` of an unbounded memory are those of position 0.
    """
    entry = memory_entry(name)
    memory = create_memory(name, hidden_size=QUOTED_WIDTH, num_heads=QUOTED_HEADS)
    return {
        "name": name,
        "room": entry.room,
        "bounded": entry.bounded,
        "bytes": states.num_bytes(memory.init_state(1)),
        "paper": entry.paper,
        "keeps": entry.keeps,
    }


def memory_table() -> str:
    """README's table of memories in Markdown: bounded ones first, then by room and name."""
    rows = sorted(
        map(memory_row, list_memories()), key=lambda row: (not row["bounded"], row["room"])
    )
    lines = ["| memory | room | bytes of state | what it keeps | paper |", "| --- " * 5 + "|"]
    for row in rows:
        size = f"{row['bytes']:,}" if row["bounded"] else "grows"
        page = f"[{row['name']}](docs/memories/{row['name']}.md)"
        lines.append(f"| {page} | {row['room']} | {size} | {row['keeps']} | {row['paper']} |")
    return "\n".join(lines) + "\n"


def growing_bytes(model: Any, state: Any) -> int:
    """Of a language model's state, the bytes of the layers that keep more with every token.

    The rest of `state.num_bytes` is what it holds for ever. A segment memory bounds, or does not,
    all that it stands around.
    """
    config = model.config
    if config.segment:
        return 0 if memory_entry(config.segment["name"]).bounded else states.num_bytes(state)
    layers = zip(config.layer_names, state["layers"], strict=True)
    return sum(states.num_bytes(held) for name, held in layers if not memory_entry(name).bounded)


@torch.inference_mode()
def stream_bytes(
    model: Any,
    ids: Iterable[Tensor],
    segments: Iterable[int],
    of: Callable[[Any, Any], Any] = lambda _, state: states.num_bytes(state),
) -> dict[int, Any]:
    """Bytes of state of a stream after so many segments, measured by streaming it, or what
    `of` says of (model, state) instead.

    `ids` gives Int [B, S] blocks, a segment each; reading stops at the largest of `segments`, or
    raises `ValueError` when the blocks end before it.
    """
    wanted = sorted(set(segments))
    state, found, blocks = None, {}, iter(ids)
    for index in range(1, wanted[-1] + 1 if wanted else 1):
        block = next(blocks, None)
        if block is None:
            raise ValueError(f"the stream ended after {index - 1} segments of {wanted[-1]}")
        _, state = model.body_stream(block, state)
        if index in wanted:
            found[index] = of(model, state)
    return found


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training holds at its peak, by what they are for."""

    parameters: int
    gradients: int
    optimizer: int  # AdamW: two numbers a parameter
    states: int  # the carried state, and the states between segments where they are kept
    activations: (
        int  # of the segments whose graph lives at once, with what a backward needs besides
    )

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def estimate_training(
    model: Any,
    segment: Callable[[int], Any],
    step: Step,
    *,
    rows: int,
    buffered: int,
    alive: int,
    grown: int = 0,
) -> TrainingMemory:
    """Estimate AdamW's peak from one segment, run forward and back with one and with two rows.

    `segment(rows)` is a batch of that size, `step(segment, state) -> (loss, state)` the training
    step. `buffered` states are kept, each `grown` bytes a row larger than after a segment; `alive`
    segments have a graph at once (1 under replay). What the process holds besides, such as torch
    itself, is not counted.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = _bytes(trainable)
    peaks = []
    for count in (1, 2):
        with LiveBytes() as live:
            loss, state = step(segment(count), None)
            loss.backward()
        peaks.append(live.peak)
        held = states.num_bytes(state) // count + grown
        model.zero_grad()
        del loss, state
    row = peaks[1] - peaks[0]
    fixed = max(0, peaks[0] - row - gradients)
    return TrainingMemory(
        parameters=_bytes(model.parameters()),
        gradients=gradients,
        optimizer=2 * gradients,
        states=rows * buffered * held,
        activations=fixed + rows * alive * row,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
