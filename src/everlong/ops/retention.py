"""How weights are kept: from what is accumulated, A [X, I, O], to the weights W of the network.

X = B * H networks, I and O widths into and out of a layer. A moves by A_t = keep_t A_{t-1} - step u
(arXiv 2504.13173, section 4 and 5.2):

none, l2    W = A; with "none" keep is 1.
softmax     W = c softmax(A) over what enters each output, c = sqrt(I): weights are positive and
            those of an output sum to c. A is log W up to a constant (Memora, eq. 22: the same rule,
            for gradients of a chunk are taken at one W, and without the lag of a position).
lq          W = A / |A|_q^(q-2), the factor taken at a chunk's start (Moneta, eq. 23, as printed: it
            is of degree 3 - q, so that at q = 4 a larger A is a smaller W).
lq_dual     W = sign(A) |A|^(p-1) / |A|_p^(p-2), 1 / p + 1 / q = 1: the mirror map of |W|_q^2 / 2.
elastic     W = sign(A) max(|A| - threshold, 0): weights that fade become 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

RETENTIONS = ("l2", "none", "softmax", "lq", "lq_dual", "elastic")
_TINY = 1e-12  # inside norms
_SMOOTH = 1e-8  # under the root of |A| in powers, which are steep at 0


@dataclass(frozen=True)
class Retention:
    """One of RETENTIONS, with its q and its threshold."""

    kind: str
    power: float = 4.0
    threshold: float = 0.01

    def check(self) -> None:
        """`ValueError` for numbers that have no map."""
        if self.kind == "lq" and self.power == 3:
            raise ValueError(
                'retention "lq" with power 3 has one norm for all A: give another power'
            )
        if self.kind == "lq_dual" and not self.power > 1:
            raise ValueError(f"power is {self.power}: the dual map needs a power above 1")
        if self.threshold < 0:
            raise ValueError(f"threshold is {self.threshold}: give 0 or more")

    @property
    def linear(self) -> bool:
        return self.kind in ("none", "l2")

    def scale(self, start: Tensor) -> Tensor:
        """The factor of "lq", [X, 1, 1]."""
        return _norm(start, self.power) ** (2 - self.power)

    def weights(self, a: Tensor) -> Tensor:
        """W(A) of the other kinds; A [..., I, O]."""
        if self.kind == "softmax":
            return a.shape[-2] ** 0.5 * a.softmax(-2)
        if self.kind == "lq_dual":
            p = self.power / (self.power - 1)
            return _power(a, p - 1) * _norm(a, p) ** (2 - p)
        if self.kind == "elastic":
            return a.sign() * (a.abs() - self.threshold).clamp(min=0)
        return a

    def read(self, now: list[Tensor], start: list[Tensor]) -> list[Tensor]:
        """The weights of every layer, for A now (and where the chunk started)."""
        if self.kind == "lq":
            return [a * self.scale(b) for a, b in zip(now, start, strict=True)]
        return [self.weights(a) for a in now]

    def start(self, heads: int, entering: int, leaving: int) -> nn.Parameter:
        """A of a fresh stream, learned, [H, I, O]: that of random weights."""
        w = torch.randn(heads, entering, leaving) * (2 / (entering + leaving)) ** 0.5
        if self.kind == "softmax":
            w = torch.randn_like(w)
        elif self.kind == "lq":
            w = w * _norm(w, self.power) ** ((self.power - 2) / (3 - self.power))
        elif self.kind == "lq_dual":
            w = _power(w, self.power - 1) * _norm(w, self.power) ** (2 - self.power)
        elif self.kind == "elastic":
            w = w + w.sign() * self.threshold
        return nn.Parameter(w)


def _power(a: Tensor, exponent: float) -> Tensor:
    """sign(a) |a|^exponent, smooth at 0."""
    return a * (a.square() + _SMOOTH) ** ((exponent - 1) / 2)


def _norm(a: Tensor, q: float) -> Tensor:
    """|A|_q of matrices [..., I, O], as [..., 1, 1]."""
    return (a.abs() ** q).sum((-1, -2), keepdim=True).add(_TINY) ** (1 / q)
