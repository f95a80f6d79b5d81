"""A small real run in a process of its own, which kills itself where it is told to.

    python small_run.py RUN [--resume PATH] [--kill WHERE:WHEN]

WHERE is "line" (after the metrics line of step WHEN), "gradients" (before the optimiser step that
follows step WHEN), "files" (in a checkpoint, before its WHEN-th file is flushed), "rename" (before
the WHEN-th checkpoint gets its name) or "removal" (when the WHEN-th old one is half removed).
"""

import argparse
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import torch

from everlong import EverlongConfig, EverlongForCausalLM
from everlong.training import checkpoints
from everlong.training.config import TrainConfig
from everlong.training.learner import Learner
from everlong.training.loop import train

STEPS = 26


def small_model(seed=0, **options):
    shape = {"hidden_size": 16, "num_heads": 2, "num_layers": 2, "dropout": 0.1}
    segment = {"name": "memformer", "segment_length": 8, "num_slots": 4}
    torch.manual_seed(seed)
    return EverlongForCausalLM(EverlongConfig(**shape | {"segment": segment} | options))


def small_texts(*lengths, seed=0):
    """Documents with something to learn: each repeats words of its own."""
    generator = np.random.default_rng(seed)
    words = [generator.integers(97, 123, generator.integers(3, 9)) for _ in range(20)]
    texts = []
    for length in lengths:
        chosen = generator.choice(20, 3)
        text = np.concatenate([words[i] for i in generator.choice(chosen, length)])
        texts.append(text[:length].astype(np.uint8))
    return texts


def small_config(**options):
    given = {"steps": STEPS, "batch_size": 3, "segments": 3, "warmup_steps": 4, "seed": 7}
    given |= {"eval_every": 6, "eval_batches": 2, "checkpoint_every": 5, "device": "cpu"}
    return TrainConfig(**given | options)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_on_call(owner, name, when):
    """The `when`-th call of `owner.name` kills this process."""
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def counted(*arguments, **options):
        if next(calls) == when:
            die()
        return original(*arguments, **options)

    setattr(owner, name, counted)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--kill", default=":0")
    arguments = parser.parse_args()
    where, when = arguments.kill.split(":")
    on_step = None
    if where == "line":
        on_step = lambda line: die() if line["step"] == int(when) else None  # noqa: E731
    elif where == "gradients":
        update = Learner.update
        Learner.update = lambda self, count: (  # pyright: ignore[reportAttributeAccessIssue]
            die() if self.step == int(when) else update(self, count)
        )
    elif where == "files":
        kill_on_call(checkpoints, "_flush", int(when))
    elif where == "rename":
        replace, count = os.replace, iter(range(1, 10**9))

        def replace_or_die(source, target):
            if Path(target).name.startswith("checkpoint-") and next(count) == int(when):
                die()
            replace(source, target)

        os.replace = replace_or_die
    elif where == "removal":
        remove, count = shutil.rmtree, iter(range(1, 10**9))

        def remove_half(path, *rest, **options):
            if ".gone" in Path(path).name and Path(path).exists() and next(count) == int(when):
                (path / "model.safetensors").unlink()
                die()
            remove(path, *rest, **options)

        shutil.rmtree = remove_half
    texts, held_out = small_texts(90, 31, 160, 12, 77, 240, 8, seed=1), small_texts(50, 70, seed=2)
    train(
        small_model(), texts, held_out, small_config(), arguments.run_dir, arguments.resume, on_step
    )


if __name__ == "__main__":
    main()
