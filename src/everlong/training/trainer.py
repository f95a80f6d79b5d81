"""transformers' Trainer, training by memory replay over the segments of each row.

B rows, T tokens of a row, V vocab_size.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from everlong.models.cache import EverlongCache
from everlong.models.hub import foretold, share_foretold
from everlong.state import State
from everlong.training.distributed import sum_gradients
from everlong.training.horizon import Horizon
from everlong.training.streams import IGNORE
from everlong.training.validation import cross_entropy

_SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
_READ = {"input_ids", "attention_mask", "labels"}


class ReplayTrainer(Trainer):
    """`transformers.Trainer` whose training step is `horizon` over the segments of a batch.

    Each row of a batch is a stream of its own that starts fresh; nothing is carried to the next
    batch. With the default horizon the gradient is that of `Trainer` (the mean over the labels of
    an optimiser step, whatever the accumulation), and one segment's activations are held instead
    of a row's. Everything else is `Trainer`'s: data, arguments, optimiser, evaluation,
    checkpoints. The model is an `EverlongForCausalLM`, an extended one, or a peft model of either.

    segment_length (tokens): default the model's `period`; must be given where that is 1.
    horizon: `everlong.Horizon`; its `scale` is set by the trainer.

    Several processes (`accelerate launch`) exchange gradients once an optimiser step.

    Raises `ValueError` for losses of another kind (label smoothing, `compute_loss_func`), NEFTune,
    DeepSpeed, FSDP, LOMO and `DataParallel`, which do the backward pass their way, and at a step
    whose batch holds more than input_ids, attention_mask and labels.
    """

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        segment_length: int | None = None,
        horizon: Horizon | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, *args, **kwargs)
        trained: Any = self.model
        if not hasattr(trained, "init_state"):
            raise ValueError(
                f"ReplayTrainer trains an everlong model, not {type(trained).__name__}: give a "
                "pretrained one a memory with everlong.extend"
            )
        if segment_length is None and trained.period > 1:
            segment_length = trained.period
        if type(segment_length) is not int or segment_length < 1:
            raise ValueError(
                f"segment_length is {segment_length!r} and the model has none of its own: give a "
                "whole number of tokens, such as segment_length=256"
            )
        self.segment_length, self.horizon = segment_length, horizon or Horizon("replay")
        self._check()

    def _check(self) -> None:
        """`ValueError` for what would not be trained as it says."""
        refused = {
            "label_smoothing_factor": self.label_smoother is not None,
            "neftune_noise_alpha, whose noise depends on the length of a call": (
                self.args.neftune_noise_alpha is not None
            ),
            "compute_loss_func": self.compute_loss_func is not None,
            "sharded weights": self.accelerator.distributed_type in _SHARDED,
            "a LOMO optimizer": "lomo" in str(self.args.optim),
            "DataParallel over several GPUs": self.args.n_gpu > 1,
        }
        for what, given in refused.items():
            if given:
                raise ValueError(
                    f"ReplayTrainer cannot train with {what}: leave it out (several GPUs: start "
                    "with `accelerate launch`), or use transformers.Trainer"
                )

    def training_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Gradients of one batch's loss, added to `.grad`; returns the loss, detached."""
        model.train()
        if callable(switch := getattr(self.optimizer, "train", None)):
            switch()
        batch = self._prepare_inputs(inputs)
        cuts = segments(batch, self.segment_length)
        if num_items_in_batch is None:
            count = max(sum(int((cut["targets"] != IGNORE).sum()) for cut in cuts), 1)
            weight = 1 / (count * self.current_gradient_accumulation_steps)
        else:
            shared = (
                self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            )
            weight = shared / max(float(num_items_in_batch), 1)
            if batch.get("attention_mask") is not None:  # of labels behind padding, which count
                kept = foretold(batch["labels"], batch["attention_mask"])
                weight /= float(share_foretold(batch["labels"], kept))
        options = replace(self.horizon.options, scale=self.accelerator.scaler)
        horizon = replace(self.horizon, options=options)
        # DistributedDataParallel would take each segment's backward pass for a whole step's
        parallel = isinstance(model, DistributedDataParallel)
        own: Any = model.module if parallel else model
        state = own.init_state(len(batch["input_ids"]), device=batch["input_ids"].device)
        step = segment_step(own, self.compute_loss_context_manager)
        loss, _ = horizon(step, cuts, state, [weight] * len(cuts))
        if parallel and self.accelerator.sync_gradients:
            parameters = [each for each in own.parameters() if each.requires_grad]
            sum_gradients(parameters)
            for each in parameters:
                if each.grad is not None:  # of what nobody's rows reached there is none
                    each.grad /= self.accelerator.num_processes
        return loss


def segments(batch: Mapping[str, Any], length: int) -> list[dict[str, Tensor]]:
    """A batch of transformers, cut: `inputs`, `targets` (the label of the next token, -100 where
    there is none) and, where it has one, `mask` [B, S] of each segment of S tokens."""
    missing, others = {"input_ids", "labels"} - set(batch), set(batch) - _READ
    if missing or others:
        raise ValueError(
            f"ReplayTrainer reads {', '.join(sorted(_READ))}: "
            + (f"the batch lacks {', '.join(sorted(missing))}" if missing else "")
            + (f"leave out {', '.join(sorted(others))}" if others and not missing else "")
        )
    mask = batch.get("attention_mask")
    labels = batch["labels"] if mask is None else foretold(batch["labels"], mask)
    whole = {"inputs": batch["input_ids"], "targets": F.pad(labels[:, 1:], (0, 1), value=IGNORE)}
    if mask is not None:
        whole["mask"] = mask
    cuts = zip(*(each.split(length, 1) for each in whole.values()), strict=True)
    return [dict(zip(whole, pieces, strict=True)) for pieces in cuts]


def segment_step(
    model: Any, context: Callable[[], AbstractContextManager]
) -> Callable[[dict[str, Tensor], State], tuple[Tensor, State]]:
    """`step(segment, state) -> (nats summed over the segment's targets, state)` by the model's
    forward, so that whatever wraps it (autocast, peft) takes part."""

    def step(segment: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        cache = EverlongCache(state)
        with context():
            logits = model(
                input_ids=segment["inputs"],
                attention_mask=segment.get("mask"),
                cache=cache,
                use_cache=True,
            ).logits
        return cross_entropy(logits, segment["targets"]), cache.state

    return step
