"""The training loop: documents in, a trained model and a run folder out.

One step is one rollout: detach the carried state, reset the rows that begin a document, read T
segments through the horizon, clip once, one optimiser step. A run that was killed and resumed has
the bits of one that was not (weights, optimiser, carried state, metrics without times), on the same
CPU with the same number of threads and versions; on accelerators as far as their kernels are
deterministic.

Under `torchrun` or `accelerate launch` each process reads its share of the rows and keeps their
state, and gradients are summed once a step, behind the last backward. Rows are those of one batch
however many processes there are, and a checkpoint holds them all: a run goes on with another number
of processes. See docs/distributed.md.
"""

import dataclasses
import math
import resource
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather
from torch import Tensor

from everlong import provenance
from everlong import state as states
from everlong.errors import Diverged, Interrupted, UserError
from everlong.state import State
from everlong.tasks.text import Documents
from everlong.training import checkpoints, run
from everlong.training.config import TrainConfig
from everlong.training.distributed import from_main
from everlong.training.learner import Learner
from everlong.training.signals import StopSignals
from everlong.training.streams import as_documents

__all__ = ["TrainConfig", "TrainResult", "train"]

Line = dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """metrics: the last line written; state: the carried state of this process's rows after the
    last step."""

    step: int
    metrics: Line
    state: State


def train(
    model: Any,
    train_documents: Documents | Sequence[Any],
    validation_documents: Documents | Sequence[Any] | None,
    config: TrainConfig,
    run_dir: Path | str,
    resume: Path | str | None = None,
    on_step: Callable[[Line], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train `model` (an EverlongForCausalLM, or anything with its stream methods) in place.

    `resume` is the run folder (its newest checkpoint, verified) or one checkpoint of it. `on_step`
    is given every line of metrics.jsonl after it is written; `about` is added to config.json.
    Writes checkpoint 0 before the first step and `model/` at the end. torch's generator is seeded
    from `config.seed` inside and left as it was outside.

    Denormals are flushed to zero from here on: decayed memories are full of them, and they cost
    CPUs 4-5 times. torch's worker threads inherit this only if they start later, so a program
    calls `torch.set_flush_denormal(True)` before its first tensor (the command line does).

    Raises `UserError` for what the user can put right (a full disk, another model's checkpoint),
    `DamagedCheckpoint`, `Diverged`, and `Interrupted` after Ctrl-C or SIGTERM. Of several processes
    all raise together. The folder is the main process's: only it reads `resume` to choose and
    writes; all read the checkpoint. With `config.shard` the weights come into `model` at the end.
    """
    torch.set_flush_denormal(True)
    run_dir = Path(run_dir)
    learner = Learner(model, as_documents(train_documents), config.for_model(model))
    source = None
    if resume is not None:
        found = from_main(learner.group, lambda: str(_resume_source(run_dir, Path(resume))))
        source = Path(found)
    with learner.own_generators(), StopSignals() as signals:
        if source is not None:
            parts = checkpoints.load(source)
            with checkpoints.whole(source):
                learner.restore(parts, source)
        session = _Session(learner, run_dir, signals, on_step)
        try:
            session.open(source, about or {})
            return session.go(validation_documents)
        finally:
            session.close()


def _resume_source(run_dir: Path, resume: Path) -> Path:
    source = resume if (resume / "manifest.json").exists() else checkpoints.latest(resume)
    if source.resolve().parent != run_dir.resolve():
        raise UserError(
            f"{source} is not a checkpoint of {run_dir}: resume a run in its own folder"
        )
    return source


class _Session:
    """What surrounds the steps: the run folder, validation, checkpoints and signals."""

    def __init__(
        self,
        learner: Learner,
        run_dir: Path,
        signals: StopSignals,
        on_step: Callable[[Line], None] | None,
    ) -> None:
        self.learner, self.run_dir, self.signals, self.on_step = learner, run_dir, signals, on_step
        self.config, self.is_main = learner.config, learner.group.is_main_process
        self.metrics: run.Metrics | None = None
        self.saved = learner.step

    def open(self, source: Path | None, about: Mapping[str, Any]) -> None:
        from_main(self.learner.group, partial(self._open_folder, source, about))
        if source is None:
            self.checkpoint()

    def _open_folder(self, source: Path | None, about: Mapping[str, Any]) -> None:
        if source is None:
            described = {"train": dataclasses.asdict(self.config)}
            described["model"] = self.learner.given.config.to_dict()
            run.begin(self.run_dir, described | provenance.origin() | dict(about))
        checkpoints.remove_leftovers(self.run_dir)
        if source is not None:
            checkpoints.set_later_aside(source)
            provenance.append_origin(self.run_dir / "resumed.jsonl", self.learner.step)
        self.metrics = run.Metrics(self.run_dir, self.learner.step)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()

    def go(self, validation: Any) -> TrainResult:
        line: Line = {}
        while self.learner.step < self.config.steps:
            line = self.step(validation)
            ended = self.learner.step == self.config.steps
            if ended or _due(self.learner.step, self.config.checkpoint_every):
                self.checkpoint()
            if self.on_step is not None and self.is_main:
                self.on_step(line)
            self.stop_if_asked()
        self.refuse_broken_weights()
        self.learner.collect()
        write = partial(checkpoints.save_model, self.learner.given)
        folder = self.run_dir / "model"
        from_main(self.learner.group, lambda: checkpoints.write_folder(folder, write))
        self.learner.given.to(self.learner.device)  # where it is unless it was trained in shares
        self.stop_if_asked()
        return TrainResult(self.learner.step, line, self.learner.state)

    def step(self, validation: Any) -> Line:
        learner, started = self.learner, time.perf_counter()
        count, measured = learner.rollout()
        loss, norm = measured.tolist()  # the only wait for the device, where nothing is saved
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"step {learner.step + 1} diverged (loss {loss:.4g}, gradient norm {norm:.4g}) and "
                f"was not made; {self.remedy()}"
            )
        rate = learner.update(count)
        seconds = time.perf_counter() - started
        line = {"step": learner.step, "epoch": learner.stream.epoch, "tokens": learner.tokens}
        line |= learner.language("", loss)
        line |= {"learning_rate": rate, "grad_norm": norm}
        line |= {"state_bytes": states.num_bytes(learner.state) * learner.group.num_processes}
        ended = learner.step == self.config.steps and self.config.eval_every > 0
        if validation is not None and (ended or _due(learner.step, self.config.eval_every)):
            self.refuse_broken_weights()
            line |= learner.validate(validation)
        times = (seconds, count / seconds, _peak_memory(learner.device))
        line |= dict(zip(run.TIMES, times, strict=True))
        from_main(learner.group, partial(self._write, line))
        return line

    def _write(self, line: Line) -> None:
        assert self.metrics is not None
        self.metrics.write(line)

    def remedy(self) -> str:
        good = checkpoints.folder(self.run_dir, self.saved)
        return f"resume from the last good checkpoint, {good}, with a lower learning_rate"

    def refuse_broken_weights(self) -> None:
        """Before anything is made of them. Between, the next step's loss tells it without a wait.

        Every process holds the same weights, so that all raise or none.
        """
        if self.learner.is_finite():
            return
        step = self.learner.step
        if step == 0:
            raise UserError("the model has weights that are not finite: start from others")
        raise Diverged(f"step {step} diverged: it made weights not finite; {self.remedy()}")

    def checkpoint(self) -> None:
        self.refuse_broken_weights()
        parts = self.learner.parts()
        self.learner.collect()
        from_main(self.learner.group, partial(self._save, parts))
        self.saved = self.learner.step

    def _save(self, parts: Mapping[str, Any]) -> None:
        assert self.metrics is not None
        self.metrics.flush()
        learner, keep = self.learner, self.config.keep_checkpoints
        checkpoints.save(self.run_dir, learner.step, learner.given, parts, keep=keep)

    def stop_if_asked(self) -> None:
        number = self.signals.number or 0
        if not self.learner.alone:
            asked = gather(torch.tensor([number], device=self.learner.device))
            number = int(cast(Tensor, asked).max())
        if number:
            if self.saved != self.learner.step:
                self.checkpoint()
            resume = f"everlong train --resume {shlex.quote(str(self.run_dir))}"
            raise Interrupted(number, self.learner.step, resume)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process used so far, on a CUDA device that of the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
