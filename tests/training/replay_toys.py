"""A small recurrent memory with every kind of state leaf, and plain BPTT to compare with."""

from dataclasses import dataclass

import torch
from torch import nn

WIDTH, SLOTS, ROWS, LENGTH = 8, 3, 2, 5


class Toy(nn.Module):
    """Reads slots by attention, writes them from the segment; `writer` acts through them alone.

    The state holds a float leaf, a clock, a plain number and None, a view that would pin its
    segment's activations, and a leaf that is passed on unchanged.
    """

    def __init__(self, dropout=0.2):
        super().__init__()
        self.first = nn.Parameter(torch.randn(SLOTS, WIDTH))
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.writer = nn.Linear(WIDTH, WIDTH)
        self.mix, self.head = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.calls = 0

    def init_state(self, rows=ROWS):
        first = self.first.expand(rows, -1, -1)
        return {
            "slots": first.tanh(),
            "clock": torch.zeros(rows, dtype=torch.long),
            "pair": (first[:, :2] * 0.5, 0, None),
            "anchor": first * 2,
        }

    def encode(self, x, state):
        """What the next state needs, and the hidden layer [B, S, D]."""
        slots, (trail, count, note) = state["slots"], state["pair"]
        scores = self.drop((self.query(x) @ slots.transpose(1, 2)).softmax(-1))
        read = scores @ self.value(slots + 0.1 * state["anchor"])
        hidden = self.drop(torch.tanh(self.mix(torch.cat([x, read], -1))) + trail.mean(1, True))
        written = self.drop(torch.tanh(self.writer(scores.transpose(1, 2) @ hidden)))
        after = {
            "slots": 0.5 * slots + written,
            "clock": state["clock"] + x.shape[1],
            "pair": (hidden[:, -2:], count + 1, note),
            "anchor": state["anchor"],
        }
        return hidden, after

    def forward(self, segment, state):
        self.calls += 1
        hidden, after = self.encode(segment["x"], state)
        if "target" not in segment:
            return None, after
        output = self.head(self.drop(hidden))
        return (output - segment["target"]).square().mean(), after

    def advance(self, segment, state):
        return self.encode(segment["x"], state)[1]


def bptt(step, segments, state, weights=None):
    """Back-propagation through time as one writes it by hand."""
    weights = [1 / len(segments)] * len(segments) if weights is None else weights
    total = 0.0
    for weight, segment in zip(weights, segments, strict=True):
        loss, state = step(segment, state)
        total = total if loss is None else total + weight * loss
    total.backward()
    return total.detach(), state


@dataclass
class Case:
    """A toy, its segments, and the leaves to differentiate; equal for equal arguments."""

    count: int
    dtype: torch.dtype = torch.float32
    dropout: float = 0.2
    upstream: bool = False  # the segments come out of one graph, and share a tensor

    def __post_init__(self):
        generator = torch.Generator().manual_seed(3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.toy = Toy(self.dropout).to(self.dtype)
            self.embed = nn.Linear(WIDTH, WIDTH).to(self.dtype)
        shape = (self.count, ROWS, LENGTH, WIDTH)
        self.x = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
        if self.upstream:
            self.x.requires_grad_()
            inputs = torch.tanh(self.embed(self.x))
            bias = inputs.mean((0, 1, 2))  # one tensor in every segment
            self.segments = [{"x": x, "target": bias} for x in inputs]
        else:
            leaves = [x.clone().requires_grad_() for x in self.x]
            self.inputs = leaves
            target = torch.zeros(WIDTH, dtype=self.dtype)
            self.segments = [{"x": x, "target": target} for x in leaves]

    def outcome(self, how, **kwargs):
        """Everything that must not depend on the method, by name."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            loss, state = how(self.toy, self.segments, self.toy.init_state(), **kwargs)
            draw = torch.rand(3)
        found = {"loss": loss, "draw": draw, "slots": state["slots"], "trail": state["pair"][0]}
        assert state["pair"][1:] == (self.count, None)
        for name, parameter in self.toy.named_parameters():
            found[f"d {name}"] = parameter.grad
        if self.upstream:
            found |= {"d x": self.x.grad, "d embed": self.embed.weight.grad}
        else:
            found |= {f"d x[{t}]": x.grad for t, x in enumerate(self.inputs)}
        return {name: value.detach() for name, value in found.items() if value is not None}


def difference(a, b):
    """The largest absolute difference over all entries; they must have the same ones."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
