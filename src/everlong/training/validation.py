"""What a language model pays for text it has not seen: one gradient-free pass with carried state.

B rows, R tokens of a rollout, S tokens of a segment.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.state import State
from everlong.training.streams import IGNORE, Batch, segments


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats summed over the valid targets: logits [B, T, V], targets Int [B, T] -> float32."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


@torch.no_grad()
def total_nats(
    model: Any,
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    wipe_every: int | None = None,
) -> tuple[float, int, State]:
    """Nats and valid targets of all rollouts, and the last state; the model is read in eval mode.

    `wipe_every` (tokens): every row starts fresh at each multiple of it, so that nothing is known
    of the text before. Rollouts must be whole multiples of it.
    """
    training = model.training
    model.eval()
    nats, count, state = 0.0, 0, None
    try:
        for batch in batches:
            length = batch["inputs"].shape[1]
            assert wipe_every is None or length % wipe_every == 0, "wiping inside a call"
            rows = batch["reset"].to(device)
            everyone = torch.ones_like(rows)
            with autocast():
                if state is None:
                    state = model.init_state(len(rows), device=device)
                elif bool(batch["reset"].any()):
                    state = model.reset(state, rows)
                for segment in segments(batch, wipe_every or length, device):
                    if wipe_every:
                        state = model.reset(state, everyone)
                    logits, state = model.stream(segment["inputs"], state, segment.get("mask"))
                    nats += cross_entropy(logits, segment["targets"]).item()
            count += int((batch["targets"] != IGNORE).sum())
    finally:
        model.train(training)
    return nats, count, state
