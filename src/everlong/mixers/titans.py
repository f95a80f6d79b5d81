"""Titans' neural memory: a small network a head, trained on the stream with momentum and decay.

B batch, T time, D hidden_size, H heads, C chunk_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.mixers.miras import Miras, MirasConfig
from everlong.ops.dual import network
from everlong.ops.spans import spans
from everlong.registry import register
from everlong.state import State, pad_length
from everlong.stateful import Trace


@dataclass(frozen=True)
class TitansConfig:
    """depth: matrices of the network (1: a linear map), with hidden layers expansion times as wide
    as a head. chunk_size: positions whose gradients are taken at the same weights: part of the
    function, not a question of speed. step_size: the most a pair's gate gives. max_surprise: a
    pair's longer gradients are shortened to this length; None, as published, shortens none.
    decay_first: linear memory alone."""

    hidden_size: int
    num_heads: int
    chunk_size: int = 16
    depth: int = 2
    expansion: int = 4
    step_size: float = 0.05
    max_surprise: float | None = 1.0
    decay_first: bool = False
    conv_size: int = 4

    def __post_init__(self) -> None:
        self.miras()

    def miras(self) -> MirasConfig:
        """The choices in the terms of `miras`."""
        return MirasConfig(**vars(self), algorithm="momentum", residual=self.depth > 1)


@register(
    "titans",
    room="mixers",
    config=TitansConfig,
    paper="Behrouz et al. 2025, arXiv 2501.00663",
    keeps="trains a network on its pairs with momentum; a decay the input sets fades the rest",
    small={"chunk_size": 4, "expansion": 2},
)
class Titans(Miras):
    """The long-term memory module, LMM (arXiv 2501.00663, section 3.1 and 3.2, eq. 11 to 14). With
    q, k, v behind a short convolution and SiLU, q and k of length 1, for every head

        u_t = grad |M(k_t) - v_t|^2 / 2 at the weights the chunk starts from
        S_t = slow_t S_{t-1} + step_t u_t,  M_t = keep_t M_{t-1} - S_t,  o_t = M_t(q_t)
        y = Wo (RMSNorm(o) * silu(Wg x))

    and M(x) = x + gelu(x W_1) W_2 (depth 1: M(x) = x W). *Written*: surprise, the gradient of what
    M does not yet say, and what is left of past surprise. *Kept*: M, as far as keep is near 1, .999
    at the start. *Forgotten*: what like keys held; all of M, at the rate the input sets.

    In the paper's letters keep is 1 - alpha, slow is eta and step is theta, half as large for its
    loss without the 1/2. keep = 0 leaves S_t, not nothing: surprise outlives a wipe.

    State: as `miras`: weights and momenta, a tuple of [B, H, I, O] a layer, what the unfinished
    chunk learns from, tail and position.

    The paper leaves open, and here is: the weights of a fresh stream (learned, one a head); the
    chunk (16); the largest step (0.05: of a chunk's gradients the sum is taken); where u is taken
    when M fades (before; decay_first: as GatedDeltaNet). max_surprise is not in the paper; without
    it a step of 0.1 left float32 within 13 steps of a training on text.
    """

    def __init__(self, config: TitansConfig):
        super().__init__(config.miras())

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        if trace is not None and trace.recording:
            self._tell(trace, x, state, lengths)
        return super().run(x, state, lengths, trace)

    @torch.no_grad()
    def _tell(self, trace: Trace, x: Tensor, state: State, lengths: Tensor | None) -> None:
        """What is left of M after a position, and the length of M(k) - v there, a head: read again
        chunk by chunk, as M is learned anew only where a chunk ends."""
        exact, surprise = state["weights"][0].dtype, []
        for span in spans(state["position"], x.shape[1], lengths, self.period):
            piece = x[:, span.start : span.stop]
            _, written, _ = self._written(piece, state, span.lengths, exact)
            k, v = written["keys"].transpose(1, 2), written["values"].transpose(1, 2)
            found = network(list(state["weights"]), k)
            error = v - found - (self._residual(k) if self.config.residual else 0)
            surprise.append(error.norm(dim=-1).transpose(1, 2))
            _, state = self._span(piece, state, span.lengths)
        if surprise:
            trace.record("decay", self.gates(x, exact)["keep"].squeeze(-1).sigmoid())
            trace.record("surprise", pad_length(torch.cat(surprise, 1), x.shape[1]))
