"""The Stateful face of a language model: functions (ids, state) -> (result, state).

B batch, T time, D hidden_size, V vocab_size.
"""

import torch
from torch import Tensor, nn

from everlong.ops.ragged import pack, unpack
from everlong.state import State
from everlong.stateful import Stateful, Trace, checked_mask


class StreamModel:
    """For a module with a `body` (ids [B, T] -> hidden [B, T, D]) and an `lm_head` on top of it.

    Masks and resets are the body's: a masked position is removed from its row's stream.
    """

    body: Stateful
    lm_head: nn.Linear

    @property
    def period(self) -> int:
        """Segment or chunk length, 1 if none."""
        return self.body.period

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state of `batch_size` fresh streams."""
        return self.body.init_state(batch_size, device=device, dtype=dtype)

    def reset(self, state: State, rows: Tensor) -> State:
        """Rows (Bool [B]) of a state, of `stream` or of `score`, start a new stream."""
        if set(state) != {"stream", "last", "started"}:
            return self.body.reset(state, rows)
        return {
            "stream": self.body.reset(state["stream"], rows),
            "last": state["last"].masked_fill(rows[:, None], 0),
            "started": state["started"] & ~rows,
        }

    def advance(
        self, input_ids: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> State:
        """The new state alone, by the body's shortest way."""
        return self.body.advance(input_ids, state, mask)

    def body_stream(
        self,
        input_ids: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, State]:
        """Hidden states [B, T, D] before the head, and the new state."""
        return self.body(input_ids, state, mask, trace)

    def stream(
        self,
        input_ids: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, State]:
        """Logits [B, T, V] of the token behind each position, and the new state."""
        hidden, state = self.body(input_ids, state, mask, trace)
        return self.lm_head(hidden), state

    def init_score_state(self, batch_size: int) -> State:
        """What `score` starts from.

        stream: a state of `stream`; last [B, D]: the hidden state that predicts the next token;
        started Bool [B]: whether there is one.
        """
        weight = self.lm_head.weight
        return {
            "stream": self.init_state(batch_size),
            "last": weight.new_zeros(batch_size, weight.shape[1]),
            "started": torch.zeros(batch_size, device=weight.device, dtype=torch.bool),
        }

    def score(
        self, input_ids: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Log probability (nats, float32 at least) [B, T] of each token given its stream so far.

        The first token of a stream (a document's bos) is predicted by nothing: 0 by convention, as
        where masked. `state` is that of an earlier `score`, which also holds the prediction of the
        next token, so any cut of the stream gives the same numbers.
        """
        held = self.init_score_state(input_ids.shape[0]) if state is None else state
        if "stream" not in held:
            raise ValueError(
                "score continues from the state score returned, not from that of stream: it also "
                "needs the prediction of the next token (init_score_state makes a fresh one)"
            )
        ids, lengths, order = input_ids, None, None
        holes = None if mask is None else checked_mask(input_ids, mask)
        if holes is not None:
            ids, lengths, order = pack(input_ids, holes)
        hidden, stream = self.body(ids, held["stream"], lengths=lengths)
        before = torch.cat([held["last"][:, None], hidden.to(held["last"].dtype)], 1)
        log_probs = _log_probs(self.lm_head(before[:, :-1]), ids)
        first = torch.where(held["started"], log_probs[:, 0], 0)
        log_probs = torch.cat([first[:, None], log_probs[:, 1:]], 1)
        if lengths is None or order is None:
            last, started = before[:, -1], torch.ones_like(held["started"])
        else:
            last = before[torch.arange(len(lengths), device=lengths.device), lengths]
            started = held["started"] | (lengths > 0)
            log_probs = unpack(log_probs, lengths, order, input_ids.shape[1])
        return log_probs, {"stream": stream, "last": last, "started": started}


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """logits [B, T, V], ids [B, T] -> log softmax at the ids, float32 at least."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(exact).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
