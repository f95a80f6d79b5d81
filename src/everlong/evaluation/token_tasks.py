"""The tasks of token ids, at any length, asked of any stream model whose vocabulary has them.

B items, T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from everlong import state as states
from everlong.evaluation.asking import BLOCK
from everlong.tasks import (
    associative,
    copy_first,
    copying,
    mqar,
    recall,
    selective_copy,
    state_tracking,
    streams_of_pairs,
)
from everlong.tasks._shared import IGNORED


@dataclass(frozen=True)
class TokenTask:
    """config(length): the task's options at a length; the last item may be a little shorter."""

    make_batch: Callable[[Any, int, Sequence[int]], Any]
    config: Callable[[int], Any]
    about: str


def _pairs(length: int) -> Any:
    pairs = max(1, length // 4 - 1)
    return associative.AssociativeConfig(num_keys=max(32, pairs), min_pairs=pairs, max_pairs=pairs)


def _distractors(length: int) -> Any:
    count = max(0, length // 8 - 2)
    return recall.RecallConfig(min_distractors=count, max_distractors=count)


def _copied(length: int) -> Any:
    return copying.CopyConfig(segment_length=max(1, length // 2), max_segments=1)


def _delayed(length: int) -> Any:
    delay = max(0, length - 2)
    return copy_first.CopyFirstConfig(min_delay=delay, max_delay=delay)


def _interleaved(length: int) -> Any:
    pairs = max(1, length // 6)
    return streams_of_pairs.StreamsConfig(num_pairs=pairs, num_keys=pairs)


def _tracked(group: str) -> Callable[[int], Any]:
    return lambda length: state_tracking.StateTrackingConfig(group, length)


TOKEN_TASKS: dict[str, TokenTask] = {
    "recall": TokenTask(recall.make_batch, _distractors, "one symbol across distractors"),
    "copy_first": TokenTask(copy_first.make_batch, _delayed, "the first symbol after a delay"),
    "copy": TokenTask(copying.make_batch, _copied, "the first half once more"),
    "selective_copy": TokenTask(
        selective_copy.make_batch,
        lambda length: selective_copy.SelectiveCopyConfig(length=length),
        "8 symbols among blanks, in order",
    ),
    "associative": TokenTask(associative.make_batch, _pairs, "one of as many pairs as there fit"),
    "mqar": TokenTask(
        mqar.make_batch,
        lambda length: mqar.MqarConfig(length=length),
        "8 pairs, all asked for: multi-query associative recall",
    ),
    "pair_streams": TokenTask(
        streams_of_pairs.make_batch, _interleaved, "pairs of two streams with the same keys"
    ),
    "parity": TokenTask(state_tracking.make_batch, _tracked("parity"), "the parity so far"),
    "s3": TokenTask(state_tracking.make_batch, _tracked("S3"), "products of permutations of 3"),
    "s5": TokenTask(state_tracking.make_batch, _tracked("S5"), "products of permutations of 5"),
}


@torch.no_grad()
def share_right(model: Any, batch: Any) -> tuple[list[float], int, int]:
    """Of each row, the share of its targets that are the likeliest tokens; tokens of the longest
    row, and bytes of one row's state behind them. Streams in blocks of constant size.
    """
    device = next(model.parameters()).device
    length = int(batch.mask.sum(1).max())
    state = model.init_state(len(batch.inputs))
    right = torch.zeros(len(batch.inputs))
    for start in range(0, length, BLOCK):
        span = slice(start, min(start + BLOCK, length))
        inputs, mask, targets = (
            part[:, span].to(device) for part in (batch.inputs, batch.mask, batch.targets)
        )
        logits, state = model.stream(inputs, state, mask)
        right += (logits.argmax(-1) == targets).sum(1).cpu()
    asked = (batch.targets != IGNORED).sum(1)
    return (right / asked).tolist(), length, states.num_bytes(state) // len(batch.inputs)
