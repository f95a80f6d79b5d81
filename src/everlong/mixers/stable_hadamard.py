"""Stable Hadamard Memory: a matrix whose cells are each kept, faded or strengthened at every step.

B batch, T time, D hidden_size, M memory_size, R table_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong import state as states
from everlong.ops.counter import integers
from everlong.ops.hadamard import hadamard, hadamard_reference
from everlong.ops.ragged import valid_positions
from everlong.registry import check_choice, register
from everlong.state import State
from everlong.stateful import Stateful, Trace

_THETAS = ("random", "fixed", "none")
_LEAST_SUM = 1e-5  # added to the sums that keys and queries are divided by


@dataclass(frozen=True)
class StableHadamardConfig:
    """memory_size: rows and columns of the matrix; num_heads has no use: there is one matrix.

    theta: "random" draws a row of a learned table of table_size rows at every step, "fixed" takes
    its first row always, "none" leaves calibration out. limit: cells are clamped to [-limit, limit]
    after every write. seed: the draws of a fresh stream.
    """

    hidden_size: int
    num_heads: int
    memory_size: int = 64
    table_size: int = 128
    theta: str = "random"
    limit: float = 100.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "memory_size", "table_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_choice("theta", self.theta, _THETAS)
        if not self.limit > 0:
            raise ValueError(
                f"limit is {self.limit}: give a number above 0; a large one is no clamp"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: give a whole number of at most 64 bits")


@register(
    "stable_hadamard",
    room="mixers",
    config=StableHadamardConfig,
    paper="Le et al. 2025, arXiv 2410.10132",
    keeps="writes gated outer products into a matrix, keeps or strengthens its cells, fades others",
    small={"memory_size": 6, "table_size": 5, "limit": 0.5},  # a clamp that the laws meet
)
class StableHadamard(Stateful):
    """A matrix memory calibrated cell by cell (Le et al., ICLR 2025, arXiv 2410.10132, section 3).

    With x layer-normalised, k = relu(Wk x) and q = relu(Wq x) divided by their sums, v = Wv x,
    c = Wc x, a gate eta = sigmoid(w x), and theta a row of a learned table:

        C = 1 + tanh(theta c^T)       the calibration: entries in (0, 2), 1 is neutral
        M = clamp(M * C + eta v k^T)  element-wise; rows are values, columns are keys
        y = Wo (M q) + b              the position's own write is read

    *Written*: at every position, as far as its gate is open. *Kept*: cells whose C stays near 1;
    above 1 they are strengthened. *Forgotten*: cells with C below 1, and what a cell at the clamp
    would hold beyond it; nothing else.

    **Clamp.** To [-limit, limit] at every position, in values and gradients (none passes a clamped
    cell). The equations of the paper have none, nor does its POPGym agent; its agent for
    meta-reinforcement learning has it, at 100. `limit=1e38` is the equations. The theory bounds the
    expected product of the C's, for theta c^T that are independent with mean 0: not the product
    itself. In the layers of a deep model c is nearly constant along a stream, and the mean of a
    table's column, 0 only in expectation (and free in training), times it adds up in the exponent:
    unclamped, such cells grow exponentially, at the start and more so trained. A trace with
    `recording` is told the mean log C [B, T] as "log_calibration".

    **Draws.** The row of theta at a position is a hash of (seed[b], position[b]): training and
    evaluation draw alike, as published; any cut, batch and replay repeats the draws; torch's
    generators are not touched. A fresh or reset row has the config's seed, or a row alone would
    differ from the row in a batch: short episodes that all start afresh meet the same draws, where
    the paper has new ones for every row and episode. Write other numbers into the leaf `seed` for
    that, or to average over draws, copies of a stream being the rows. Layers of one model share the
    seed and draw the same indices, each of its own table.

    The published module and its POPGym agent cast a uniform number in [0, 1) to an integer, which
    is always 0: they run with theta="fixed". Its agent for meta-reinforcement learning samples.

    State: memory [B, M, M] (float32 at least, 0 in a fresh row), seed Int [B], position Int [B].

    Deviations: the clamp is on; no skipping of calibrations (an option of that last agent, at 1 in
    the paper); no shortcut from x to y, which the block around a mixer has. theta="none"
    has C = 1: linear attention without normalisation.
    """

    def __init__(self, config: StableHadamardConfig):
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        width, size = config.hidden_size, config.memory_size
        self.norm = nn.LayerNorm(width)
        self.key, self.query, self.value = (nn.Linear(width, size, bias=False) for _ in range(3))
        self.gate = nn.Linear(width, 1, bias=False)
        self.out = nn.Linear(size, width)
        if config.theta != "none":
            self.calibrate = nn.Linear(width, size, bias=False)
            self.theta = nn.Parameter(torch.empty(config.table_size, size))
            nn.init.xavier_uniform_(self.theta)

    def init_state(self, batch_size, *, device=None, dtype=None) -> State:
        device, dtype = self._defaults(device, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        size = self.config.memory_size
        memory = torch.zeros((), device=device, dtype=exact).expand(batch_size, size, size)
        seed = torch.full((batch_size,), self.config.seed, device=device, dtype=torch.long)
        return {"memory": memory, "seed": seed, "position": torch.zeros_like(seed)}

    def run(
        self, x: Tensor, state: State, lengths: Tensor | None, trace: Trace | None
    ) -> tuple[Tensor, State]:
        return self._read(hadamard, x, state, lengths, trace)

    def reference(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """What `forward` equals: position by position, a masked one leaving its row as it was."""
        state = self.init_state(x.shape[0]) if state is None else state
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        outputs = []
        for t in range(x.shape[1]):
            y, after = self._read(hadamard_reference, x[:, t : t + 1], state, None, None)
            state = states.where(real[:, t], after, state)
            outputs.append(torch.where(real[:, t, None, None], y, 0))
        return torch.cat(outputs, 1), state

    def _read(
        self,
        form: Callable[..., tuple[Tensor, Tensor]],
        x: Tensor,
        state: State,
        lengths: Tensor | None,
        trace: Trace | None,
    ) -> tuple[Tensor, State]:
        exact, length = state["memory"].dtype, x.shape[1]
        seen = self.norm(x)
        k, q = (_shares(F.relu(part(seen).to(exact))) for part in (self.key, self.query))
        v = self.value(seen).to(exact) * torch.sigmoid(self.gate(seen).to(exact))
        theta, c = self._factors(seen, state, exact)
        after = state["position"] + (length if lengths is None else lengths)
        if lengths is not None:  # behind a row's length: C = 1 and nothing written
            real = valid_positions(lengths, length)[..., None]
            theta, k = torch.where(real, theta, 0), torch.where(real, k, 0)
        if trace is not None and trace.recording:
            with torch.no_grad():  # 1 + tanh(z) = 2 sigmoid(2z), whose logarithm is finite
                logs = F.logsigmoid(2 * theta[..., :, None] * c[..., None, :]) + math.log(2)
                trace.record("log_calibration", logs.mean((-1, -2)))
        y, memory = form(theta, c, v, k, q, state["memory"], limit=self.config.limit)
        return self.out(y.to(x.dtype)), {"memory": memory, "seed": state["seed"], "position": after}

    def _factors(self, seen: Tensor, state: State, exact: torch.dtype) -> tuple[Tensor, Tensor]:
        """theta and c [B, T, M], whose outer product calibrates the memory."""
        if self.config.theta == "none":
            none = seen.new_zeros((), dtype=exact).expand(*seen.shape[:2], self.config.memory_size)
            return none, none
        c = self.calibrate(seen).to(exact)
        if self.config.theta == "fixed":
            return self.theta[0].to(exact).expand_as(c), c
        rows = integers(state["seed"], state["position"], seen.shape[1], self.config.table_size)
        return F.embedding(rows, self.theta).to(exact), c


def _shares(x: Tensor) -> Tensor:
    """Divided by its sum; all zeros stay zeros: nothing is written, or 0 is read."""
    return x / (_LEAST_SUM + x.sum(-1, keepdim=True))
