"""Bits per byte of a language model over documents read as streams, with and without its memory."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from everlong import state as states
from everlong.errors import UserError
from everlong.tasks.text import Documents
from everlong.training.streams import as_documents, validation_batches
from everlong.training.validation import total_nats


@dataclass(frozen=True)
class LanguageScore:
    """nats: over all scored tokens; num_bytes: of text that these stand for; seconds: of reading;
    state_bytes: held for one row at the end."""

    nats: float
    tokens: int
    num_bytes: float
    seconds: float
    state_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def bits_per_byte(
    model: Any,
    documents: Documents | Sequence[Any],
    *,
    batch_size: int = 8,
    segments: int = 4,
    segment_length: int | None = None,
    wipe: bool = False,
    max_rollouts: int | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> LanguageScore:
    """Read every document from its bos on, the state carried; each byte is scored once.

    With fewer documents than `batch_size` the longest are cut into contiguous pieces, each read as
    a document of its own: give `batch_size=1` for the exact score of one long text. `wipe` starts
    every row fresh at each multiple of `segment_length` (default: the model's period): the same
    weights without what they remember. `segments` is how many are read in one call;
    `max_rollouts` stops after so many calls. Raises `UserError` for an empty text, and for a model
    without a period when no `segment_length` is given.
    """
    length: int = segment_length or model.period
    if length == 1:
        raise UserError("the model has no segments of its own: give segment_length")
    if wipe and length % model.period:
        raise UserError(f"segment_length {length} is no multiple of the model's {model.period}")
    documents = as_documents(documents)
    device: torch.device = next(model.parameters()).device
    batches = validation_batches(documents, batch_size=batch_size, length=segments * length)
    started = time.perf_counter()
    nats, tokens, state = total_nats(
        model,
        islice(batches, max_rollouts),
        device=device,
        autocast=autocast,
        wipe_every=length if wipe else None,
    )
    seconds = time.perf_counter() - started
    num_bytes = tokens * documents.num_bytes / sum(documents.lengths)
    held = states.num_bytes(state) // states.batch_size(state)
    return LanguageScore(nats, tokens, num_bytes, seconds, held)
