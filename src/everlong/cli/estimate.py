"""`everlong train --dry-run`: what a recipe would take. Nothing is written."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everlong.cli.train import Plan

_WORDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimiser (AdamW)",
    "states": "states carried and kept for the sweep back",
    "activations": "activations",
}


def print_estimate(plan: "Plan") -> None:
    """Parameters, bytes of state, tokens a step, and the memory training would hold."""
    from everlong import state as states
    from everlong.cli.prepare import build, device_of, model_config, twin_config
    from everlong.cli.progress import size
    from everlong.evaluation.cost import estimate_training

    model = build(model_config(plan.recipe, plan.texts), plan.config.seed)
    config = plan.config.for_model(model)
    length, rows = config.segment_length, config.batch_size
    assert length is not None
    held = states.num_bytes(model.init_state(1))
    texts, each = plan.texts, config.stages or ((0, config.segments),)
    print(f"device: {device_of(config)}")
    print(f"parameters: {model.num_parameters():,}")
    if plan.recipe.twin:
        twin = build(twin_config(model.config, length), config.seed)
        print(f"parameters of the twin: {twin.num_parameters():,}")
    grown = _grown(model, plan.texts.train.lengths, length)
    held += grown
    at_most = " at the longest document's end, as it grows" * (grown > 0)
    print(f"bytes of state: {held:,} a stream{at_most}, {rows * held:,} for {rows} rows")
    for number, (_, segments) in enumerate(each):
        label = "tokens a step" if number == 0 else f"  in stage {number + 1}"
        tokens = rows * segments * length
        print(f"{label}: {tokens:,} ({rows} rows x {segments} segments x {length})")
    read = sum(steps * rows * segments * length for steps, segments in each)
    share = read / sum(texts.train.lengths)
    print(f"steps: {config.steps:,}, {share:.2f} times the {texts.train.num_bytes:,} bytes of text")
    buffered, alive = _horizon(config)
    sizes = {"rows": rows, "buffered": buffered, "alive": alive, "grown": grown}
    found = estimate_training(model, _segment(length), _step(model), **sizes)
    print(f"memory for training: about {size(found.total)} (besides torch itself), of which")
    for name, value in asdict(found).items():
        print(f"  {size(value):>9}  {_WORDS[name]}")


def _grown(model: Any, lengths: list[int], segment_length: int) -> int:
    """Bytes by which a stream's state grows up to the longest document's end: 0 if bounded."""
    import torch

    from everlong.evaluation.cost import growing_bytes

    with torch.inference_mode():
        ids = torch.zeros(1, segment_length, dtype=torch.long)
        held = growing_bytes(model, model.init_state(1))
        after = growing_bytes(model, model.body_stream(ids)[1])
    return max(lengths) * (after - held) // segment_length


def _horizon(config: Any) -> tuple[int, int]:
    """States kept at once, and segments with a graph at once, in the longest rollout."""
    most = max((segments for _, segments in config.stages), default=config.segments)
    if config.horizon in ("replay", "checkpoint"):
        return most + 1, 1
    return 1, min(config.truncate or most, most)


def _segment(length: int) -> Any:
    import torch

    def make(rows: int) -> Any:
        ids = torch.zeros(rows, length, dtype=torch.long)
        return {"inputs": ids, "targets": ids}

    return make


def _step(model: Any) -> Any:
    from contextlib import nullcontext

    from everlong.training.learner import segment_step

    return segment_step(model, nullcontext)
