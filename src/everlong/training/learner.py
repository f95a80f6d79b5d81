"""What one training step does, and all that it changes.

B rows, R tokens of a rollout, S tokens of a segment.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everlong import state as states
from everlong.errors import UserError
from everlong.state import State
from everlong.stateful import Trace
from everlong.tasks.text import Documents
from everlong.training import checkpoints, distributed
from everlong.training.config import (
    FIXED,
    TrainConfig,
    choose_device,
    learning_rate,
    make_optimizer,
    uses_bf16,
)
from everlong.training.distributed import Sharded
from everlong.training.horizon import Horizon
from everlong.training.replay import ReplayOptions
from everlong.training.streams import IGNORE, Batch, DocumentStream, segments, validation_batches
from everlong.training.trees import tree_map
from everlong.training.validation import cross_entropy, total_nats

Autocast = Callable[[], AbstractContextManager]


def segment_step(model: Any, autocast: Autocast) -> Callable[[Batch, State], tuple[Tensor, State]]:
    """`step(segment, state) -> (nats summed over the segment's targets, state)`.

    A memory's own losses, which weigh as much as nats a token, are in its gradient, not its value.
    """

    def step(segment: Batch, state: State) -> tuple[Tensor, State]:
        trace = Trace(recording=False)
        with autocast():
            logits, state = model.stream(segment["inputs"], state, segment.get("mask"), trace)
        nats = cross_entropy(logits, segment["targets"])
        if (own := trace.total()) is not None:
            weighted = own * (segment["targets"] != IGNORE).sum()
            nats = nats + weighted - weighted.detach()
        return nats, state

    return step


def state_step(model: Any, autocast: Autocast) -> Callable[[Batch, State], State]:
    """`advance(segment, state) -> state`: what the gradient-free sweep of a replay runs."""

    def advance(segment: Batch, state: State) -> State:
        with autocast():
            if hasattr(model, "advance"):
                return model.advance(segment["inputs"], state, segment.get("mask"))
            return model.body_stream(segment["inputs"], state, segment.get("mask"))[1]

    return advance


class Learner:
    """Everything that a step changes: weights, optimiser, carried state, position, generators.

    Of several processes each has the rows `rows` of the batch and of the carried state. `model` is
    what steps call: the given one, or it in shares; `given` is what checkpoints are made of.
    """

    def __init__(self, model: Any, documents: Documents, config: TrainConfig) -> None:
        self.given, self.config = model, config
        self.group = distributed.group_of(config.device)
        self.alone = self.group.num_processes == 1
        self.rows = distributed.rows_of(config.batch_size, self.group)
        self.device = choose_device(config.device, self.group)
        bf16 = uses_bf16(config.precision, self.device)
        self.autocast: Autocast = partial(torch.autocast, self.device.type, torch.bfloat16, bf16)
        self.model = self._spread(model.train())
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, config)
        advance = state_step(self.model, self.autocast) if config.horizon == "replay" else None
        options = ReplayOptions(advance=advance)
        self.horizon = Horizon(config.horizon, truncate=config.truncate, options=options)
        self.segment_step = segment_step(self.model, self.autocast)
        assert config.segment_length is not None
        length = config.segments * config.segment_length
        self.rollout_size = {"batch_size": config.batch_size, "length": length}
        self.stream = DocumentStream(documents, seed=config.seed, **self.rollout_size)
        self.tokens_per_byte = sum(documents.lengths) / documents.num_bytes
        self.step, self.tokens = 0, 0
        rows = self.rows.stop - self.rows.start
        self.state = self._carry(self.model.init_state(rows, device=self.device))

    def _spread(self, model: Any) -> Any:
        """The model on this process's device, with the main one's weights; in shares if asked."""
        model.to(self.device)
        if self.alone:
            return model
        tensors = (*model.parameters(), *model.buffers())
        distributed.copy_from_main([tensor.data for tensor in tensors])
        return Sharded(model.to("cpu"), self.device) if self.config.shard else model

    @contextmanager
    def own_generators(self) -> Iterator[None]:
        """Seeded inside, one seed a process; the caller's generators are as they were after."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed + self.group.process_index)
            yield

    def _carry(self, state: State) -> State:
        """Detached and contiguous in storage of its own: the bits of the next step must not depend
        on strides or alignment, which a checkpoint does not keep."""
        fresh = torch.contiguous_format
        return states.tree_map(lambda leaf: leaf.detach().clone(memory_format=fresh), state)

    def rollout(self) -> tuple[int, Tensor]:
        """Clipped gradients of a rollout: its targets, and [nats a target, gradient norm]."""
        length = self.config.segment_length
        assert length is not None
        self.stream.length = self.config.segments_at(self.step) * length
        everyones = next(self.stream)
        count = int((everyones["targets"] != IGNORE).sum())
        batch = {name: whole[self.rows] for name, whole in everyones.items()}
        state = self.state
        if bool(batch["reset"].any()):
            state = self.model.reset(state, batch["reset"].to(self.device))
        cuts = segments(batch, length, self.device)
        self.optimizer.zero_grad()
        weights = [1 / count] * len(cuts)
        loss, state = self.horizon(self.segment_step, cuts, state, weights)
        self.state = self._carry(state)
        self._exchange(loss)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        return count, torch.stack([loss.float(), distributed.whole(norm).float()])

    def _exchange(self, loss: Tensor) -> None:
        """The one of a step: gradients and loss become everyone's sum, in place. Nothing is to be
        averaged: the weights of the losses count all processes' targets."""
        if self.alone:
            return
        shared = isinstance(self.model, Sharded)
        reached = self.model.share_gradients() if shared else None
        distributed.sum_gradients(self.parameters, [loss], reached)

    def update(self, count: int) -> float:
        """The optimiser step; returns its learning rate."""
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step, self.tokens = self.step + 1, self.tokens + count
        return rate

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all weights are: one pass over them, and a wait for the device."""
        norm = nn.utils.get_total_norm(self.model.parameters(), math.inf)
        return math.isfinite(distributed.whole(norm))

    def parts(self) -> dict[str, Any]:
        """All of it but the weights, for a checkpoint. Every process must call it."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        state, rng = self.state, {name: value[None] for name, value in rng.items()}
        if not self.alone:
            state = distributed.gather_rows(state)
            rng = {n: distributed.gather_rows(value.to(self.device)) for n, value in rng.items()}
        return {
            "progress": {"step": self.step, "tokens": self.tokens},
            "config": dataclasses.asdict(self.config),
            "stream": self.stream.state_dict(),
            "optimizer": tree_map(self._collected, self.optimizer.state_dict()["state"]),
            "state": state,
            "rng": rng,
        }

    def restore(self, parts: dict[str, Any], source: Path) -> None:
        """Go to a checkpoint. All but `FIXED` of the configuration may differ from the run's."""
        trained = TrainConfig(**parts["config"])
        for name in FIXED:
            was, now = getattr(trained, name), getattr(self.config, name)
            if was != now:
                raise UserError(
                    f"{source} was trained with {name} = {was}: go on with that, not with {now}"
                )
        checkpoints.load_weights(self.given, source)
        optimizer = parts["optimizer"]
        if isinstance(self.model, Sharded):
            self.model.deal()
            optimizer = self._dealt(self.model, optimizer)
        self.stream.load_state_dict(parts["stream"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
        rows = states.tree_map(lambda leaf: leaf[self.rows].to(self.device), parts["state"])
        self.state = self._carry(rows)
        self.step, self.tokens = parts["progress"]["step"], parts["progress"]["tokens"]
        self._restore_generators(parts["rng"])

    def _restore_generators(self, saved: dict[str, Tensor]) -> None:
        """One each, as they were; where the number of processes is another, fresh ones."""
        rank, number = self.group.process_index, len(saved["cpu"])
        if number != self.group.num_processes:
            fresh = np.random.SeedSequence((self.config.seed, self.step, rank))
            torch.manual_seed(int(fresh.generate_state(1, np.uint64)[0]))
            return
        for name, generators in saved.items():
            # A copy: torch crashes on a generator state at an odd address, as a file may have it.
            mine = generators[rank].clone()
            if name == "cpu":
                torch.set_rng_state(mine)
            elif self.device.type == name:
                torch.cuda.set_rng_state(mine, self.device)

    def collect(self) -> None:
        """Trained weights that lie in shares into the given model. Every process must call it."""
        if isinstance(self.model, Sharded):
            self.model.collect()

    def _collected(self, leaf: Any) -> Any:
        """A leaf of the optimiser's state for a checkpoint: whole, where one will be written."""
        if not isinstance(self.model, Sharded):
            return leaf
        found = distributed.whole(leaf)
        return found.cpu() if self.group.is_main_process else None

    def _dealt(self, model: Sharded, saved: dict[int, dict[str, Tensor]]) -> dict[int, Any]:
        """The optimiser's state in shares like its parameters'."""
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {
            i: {name: model.like(value, order[i]) for name, value in values.items()}
            for i, values in saved.items()
        }

    def validate(self, documents: Any) -> dict[str, float]:
        """One pass over validation text, or its first `eval_batches` rollouts."""
        batches = validation_batches(documents, **self.rollout_size)
        first = islice(batches, self.config.eval_batches or None)
        if not self.alone:
            first = map(self._own_rows, first)
        nats, count, _ = total_nats(self.model, first, device=self.device, autocast=self.autocast)
        if not self.alone:
            nats, count = distributed.sum_of_numbers(nats, count)
        return self.language("validation_", nats / count)

    def _own_rows(self, batch: Batch) -> Batch:
        """All rows of a text too short to give each process its own: everyone then reads it all."""
        short = len(batch["reset"]) < self.config.batch_size
        return batch if short else {name: whole[self.rows] for name, whole in batch.items()}

    def language(self, prefix: str, nats: float) -> dict[str, float]:
        """`nats` a token under two names and units."""
        bits = nats / math.log(2) * self.tokens_per_byte
        return {f"{prefix}loss": nats, f"{prefix}bits_per_byte": bits}
