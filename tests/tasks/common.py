"""What is true of every generated task, and how its batches are shown."""

import re
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def examples(module: ModuleType) -> list[tuple[str, str]]:
    """The inputs and targets shown in the module's docstring, in order, without spaces."""
    shown = re.findall(r"^ +inputs +(.+)\n +targets +([^(\n]+)", module.__doc__ or "", re.MULTILINE)
    return [(inputs.replace(" ", ""), targets.replace(" ", "")) for inputs, targets in shown]


def show(batch, letters: str) -> tuple[str, str]:
    """Row 0 as the docstrings show it: token i is the i-th of `letters`, no target is a dash."""
    inputs, targets = batch.inputs[0].tolist(), batch.targets[0].tolist()
    return "".join(letters[i] for i in inputs), "".join(
        (letters + "-")[max(i, -1)] for i in targets
    )


def certain(config, guesses) -> Tensor:
    """Logits [B, T, V] whose likeliest tokens are `guesses` [B, T]."""
    return F.one_hot(torch.as_tensor(np.asarray(guesses)), config.vocab_size).float()


def check_stream(make_batch, config) -> None:
    """Items are functions of (config, seed, index), and other generators are left alone."""
    before, torch_before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    order = [3, 0, 4, 1]
    whole = make_batch(config, 5, order)
    for row, index in enumerate(order):
        alone = make_batch(config, 5, [index])
        for name, found in vars(alone).items():
            assert torch.equal(getattr(whole, name)[row], found[0]), name
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)
    for seed, indices in ((6, order), (5, [13, 10, 14, 11])):
        other = make_batch(config, seed, indices)
        assert (other.inputs != whole.inputs).any(1).all()


def check_rows(batch, config) -> None:
    """Shapes, dtypes and ranges; rows without padding."""
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape
    assert batch.inputs.shape[1] == config.length == config.max_length
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.mask.dtype == torch.bool
    assert batch.mask.all()
    assert 0 <= batch.inputs.min() <= batch.inputs.max() < config.vocab_size
    asked = batch.targets[batch.targets != -100]
    assert 0 <= asked.min() <= asked.max() < config.vocab_size


def check_chance(batch, config) -> None:
    """Random logits are right 1 / V of the time, a guess among the answers as often as is said."""
    generator = torch.Generator().manual_seed(0)
    asked = batch.targets != -100
    answers = batch.targets[asked].unique()
    assert config.chance == 1 / len(answers)
    random = torch.rand(*batch.inputs.shape, config.vocab_size, generator=generator)
    picked = answers[torch.randint(len(answers), batch.inputs.shape, generator=generator)]
    for logits, share in (
        (random, 1 / config.vocab_size),
        (certain(config, picked), config.chance),
    ):
        found = batch.correct(logits).mean().item()
        assert abs(found - share) < 5 * (share * (1 - share) / asked.sum().item()) ** 0.5
