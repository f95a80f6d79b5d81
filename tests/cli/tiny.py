"""Changes that make any recipe small enough to test."""

import json

from everlong.registry import memory_entry

TINY = (
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.num_layers=1",
    "data.validation=0.002",
    "train.steps=2",
    "train.batch_size=2",
    "train.segments=2",
    "train.warmup_steps=1",
    "train.eval_batches=1",
    "train.device=cpu",
)
SEGMENT = ("model.segment.segment_length=8", "model.segment.num_slots=2")


def sets(*changes):
    return [word for change in changes for word in ("--set", change)]


def small_memory(model):
    """The test sizes of whatever memory a recipe's [model] is made of."""
    if model.get("segment"):
        name, at = model["segment"]["name"], "model.segment"
        return list(_assignments(at, memory_entry(name).small))
    pattern = sum(int(item.partition("*")[2] or 1) for item in model["layers"])
    changes = ["train.segment_length=8", f"model.num_layers={pattern}"]
    for name in dict.fromkeys(item.partition("*")[0] for item in model["layers"]):
        changes += _assignments(f"model.mixers.{name}", memory_entry(name).small)
    return changes


def _assignments(at, options):
    """key=value for every option, those of a nested table by dotted keys."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _assignments(f"{at}.{key}", value)
        else:
            yield f"{at}.{key}={json.dumps(value)}"
