"""Time of the linear-attention scans, forward and backward, against loops and transformers' own.

    OMP_NUM_THREADS=1 python benchmarks/linear_ops.py [--length 4096] [--rounds 7] [--loop]

One table; every round runs all forms once, in an order drawn anew, and medians are shown, of wall
clock and of this thread's processor time (the one to trust on a machine that is shared). `--loop`
adds the position-by-position references. Megabytes are those of tensors kept for the gradient.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from everlong.ops.delta import delta_rule, linear_attention
from everlong.ops.dplr import dplr, dplr_reference
from everlong.ops.scan import scan, scan_reference
from everlong.ops.shortconv import short_convolution

Form = Callable[[], tuple[torch.Tensor, ...]]
HEADS, WIDTH = 4, 64


def forms(length: int, loop: bool) -> tuple[dict[str, Form], list[torch.Tensor]]:
    """Every form as a call without arguments, and the tensors its gradients are taken for."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, length, *shape, generator=generator)

    q, k, v = (draw(HEADS, WIDTH) for _ in range(3))
    k, q = (x / x.norm(dim=-1, keepdim=True) for x in (k, q))
    g, beta = -0.1 * draw(HEADS).abs(), draw(HEADS).sigmoid()
    channels = -0.1 * draw(HEADS, WIDTH).abs()
    a, b = 0.9 * k, -0.5 * k
    f, i, x = draw(HEADS * WIDTH).sigmoid(), draw(HEADS * WIDTH), draw(HEADS * WIDTH)
    weight, tail = torch.randn(HEADS * WIDTH, 4), torch.zeros(1, 3, HEADS * WIDTH)
    state, start = torch.zeros(1, HEADS, WIDTH, WIDTH), torch.zeros(1, HEADS * WIDTH)
    leaves = [q, k, v, g, beta, channels, a, b, f, i, x, weight]
    for leaf in leaves:
        leaf.requires_grad_()
    found: dict[str, Form] = {
        "linear, a decay a head": lambda: linear_attention(q, k, v, g, state),
        "linear, a decay a channel": lambda: linear_attention(q, k, v, channels, state),
        "delta, a decay a head": lambda: delta_rule(q, k, v, g, beta, state),
        "delta, a decay a channel": lambda: delta_rule(q, k, v, channels, beta, state),
        "dplr, a decay a head": lambda: dplr(q, k, v, g, (a, b), state),
        "dplr, a decay a channel": lambda: dplr(q, k, v, channels, (a, b), state),
        "scan": lambda: scan(f, i, start),
        "short convolution": lambda: short_convolution(x, weight, tail),
        "transformers, gated delta": lambda: torch_chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=state, output_final_state=True
        ),
    }
    if loop:
        found["loop of dplr"] = lambda: dplr_reference(q, k, v, channels, (a, b), state)
        found["loop of scan"] = lambda: scan_reference(f, i, start)
    return found, leaves


def measure(form: Form, leaves: list[torch.Tensor]) -> dict[str, float]:
    """Seconds forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    marks = [(time.perf_counter(), time.thread_time())]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = form()
    marks.append((time.perf_counter(), time.thread_time()))
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    marks.append((time.perf_counter(), time.thread_time()))
    (wall, own), (half_wall, half_own), (end_wall, end_own) = marks
    return {
        "forward": half_wall - wall,
        "backward": end_wall - half_wall,
        "forward, own": half_own - own,
        "backward, own": end_own - half_own,
        "megabytes": sum(kept.values()) / 1e9,  # shown times 1,000, as the seconds are
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loop", action="store_true")
    options = parser.parse_args()
    calls, leaves = forms(options.length, options.loop)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(options.rounds + 1):
        random.Random(turn).shuffle(order)
        for name in order:
            result = measure(calls[name], leaves)
            if turn:  # the first round warms up
                found[name].append(result)
    columns = list(next(iter(found.values()))[0])
    print(f"T = {options.length}, {HEADS} heads of {WIDTH}; ms, and MB kept for the gradient")
    print(f"{'':28}" + "".join(f"{column:>16}" for column in columns))
    for name, results in found.items():
        middle = [1e3 * statistics.median(r[column] for r in results) for column in columns]
        print(f"{name:28}" + "".join(f"{value:16.1f}" for value in middle))


if __name__ == "__main__":
    main()
