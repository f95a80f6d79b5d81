"""Tiny pretrained decoders of several families, random but whole, for the tests of `extend`."""

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 31
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 28,
    "eos_token_id": None,
    "pad_token_id": 30,
}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=28,
            eos_token_id=None,
            pad_token_id=30,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=3.0,
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)),
}
every_backbone = pytest.mark.parametrize("backbone", MODELS)


class ExactNorm(nn.Module):
    """An RMS norm of transformers without its rounding to float32, which would hide 1e-9."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps
        self.offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0

    def forward(self, x):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * scale * (self.weight + self.offset)


def make_backbone(name, exact=False):
    """In eval mode, with biases and scales that are not at their initial values; `exact`: float64
    throughout."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for each in model.parameters():
                each.add_(0.1 * torch.randn_like(each))
    if not exact:
        return model
    for module in list(model.modules()):
        for child, part in list(module.named_children()):
            if type(part).__name__.endswith("RMSNorm"):
                setattr(module, child, ExactNorm(part))
    return model.double()
