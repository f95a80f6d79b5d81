"""Tiny language models over every registered memory, for the tests of the bridge."""

import pytest
import torch

import everlong
from everlong.registry import memory_entry

VOCABULARY, BOS, EOS, PAD = 19, 16, 17, 18
CONTENT = 16  # ids below are tokens of a text
ENCODER_DECODER = {"name": "memformer", "encoder_layers": 1, "segment_length": 4, "num_slots": 3}

SHAPES = {
    **{name: {"layers": [name], "num_layers": 2} for name in everlong.list_memories(room="mixers")},
    **{
        name: {"segment": {"name": name, **memory_entry(name).small}, "num_layers": 1}
        for name in everlong.list_memories(room="segments")
    },
    "memformer, encoder-decoder": {"segment": ENCODER_DECODER, "num_layers": 1},
}
UNBOUNDED = everlong.list_memories(room="mixers", bounded=False)

every_model = pytest.mark.parametrize("name", SHAPES)


def make_config(name, **options):
    shape = SHAPES[name]
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_heads": 3,
        "mixers": {layer: dict(memory_entry(layer).small) for layer in shape.get("layers", [])},
        "bos_token_id": BOS,
        "eos_token_id": None,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        **shape,
        **options,
    }
    return everlong.EverlongConfig(**options)


def make_model(name, **options):
    """Float64, in eval mode, with a head that does not echo its input."""
    torch.manual_seed(0)
    model = everlong.EverlongForCausalLM(make_config(name, **options)).double().eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
    return model


def tokens(rows, length, seed=0):
    """Ids [rows, length] that begin with bos."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, CONTENT, (rows, length), generator=generator)
    ids[:, 0] = BOS
    return ids


def left_padded(lengths, seed=0):
    """Rows of these lengths [B, T], bos in front, arbitrary ids in the padding, and the mask."""
    width = max(lengths)
    ids, mask = (
        tokens(len(lengths), width, seed),
        torch.zeros(len(lengths), width, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        ids[row, width - length] = BOS
    return ids, mask


def close(a, b):
    """Equal to 1e-9 in float64; what generate returns is rounded to float32."""
    exact = a.dtype == b.dtype == torch.float64
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=1e-9 if exact else 1e-5)
