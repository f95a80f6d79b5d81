"""Laws 1 and 4 over pretrained decoders with a memory around them."""

from typing import Any

import pytest
import torch

import everlong
from everlong.registry import memory_entry
from laws.cases import Case, Face
from laws.checks import LAWS, check
from models.backbones import MODELS, VOCABULARY, make_backbone

CASES = {
    **{f"rmt, {backbone}": ("rmt", backbone, {}) for backbone in MODELS},
    "rmt as published, gemma3": ("rmt", "gemma3", {"mask": "paper"}),
    "memformer, gpt2": ("memformer", "gpt2", {}),
    "memformer, gemma3": ("memformer", "gemma3", {}),
    "armt, gpt2": ("armt", "gpt2", {}),
    "armt, llama": ("armt", "llama", {}),
    "hmt, qwen3": ("hmt", "qwen3", {"sensory": 2}),
}
EVERY_LAW = (*(name for name in CASES if name.startswith("rmt, ")), "memformer, gpt2")
HARDEST = ("1 any cut", "4 mask", "4 served")  # of any cut and of rows, which the others also ask
CHECKS = [
    (name, law)
    for name in CASES
    for law in LAWS
    if law[0] in "14" and (name in EVERY_LAW or law in HARDEST)
]


class Calm(Case):
    """ARMT divides by as little as 1e-5, and what it reads enters what it writes: with weights as
    large as the others' its matrices reach 1e40 within these streams."""

    def build(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
        memory = super().build(dropout, dtype)
        with torch.no_grad():
            for layer in memory.model.body.memory.associations:
                layer.value.weight.mul_(1e-3)
        return memory


def wrap_case(name: str) -> Case:
    memory, backbone, options = CASES[name]

    def make(dropout: float) -> Face:
        small = {**memory_entry(memory).small, **options}
        model = everlong.extend(make_backbone(backbone, exact=True), memory, train="all", **small)
        if model.core.prefix is not None:
            with torch.no_grad():
                model.core.prefix.gate.fill_(0.8)
        return Face(model)

    return (Calm if memory == "armt" else Case)(name, make, VOCABULARY, tokens=True)


@pytest.mark.supports("extend law {law}")
@pytest.mark.parametrize(("name", "law"), CHECKS)
def test_wrapped_model_obeys(name, law, tmp_path):
    check(law, wrap_case(name), tmp_path)
