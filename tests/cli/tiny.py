"""Changes that make any recipe small enough to test."""

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
