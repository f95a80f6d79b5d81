"""Language models over every registered memory under the laws of a stream of token ids.

(Generation through transformers, law 8, has its own tests.)
"""

import pytest

import everlong
from everlong.registry import memory_entry
from laws.cases import Case, Face
from laws.checks import LAWS, check

VOCABULARY = 31
MODEL_LAWS = [law for law in LAWS if law[0] in "134567"]
ENCODER_DECODER = {"name": "memformer", "encoder_layers": 1, "segment_length": 4, "num_slots": 3}
MODELS = {
    **{name: {"layers": [name], "num_layers": 2} for name in everlong.list_memories(room="mixers")},
    **{
        name: {"segment": {"name": name, **memory_entry(name).small}, "num_layers": 1}
        for name in everlong.list_memories(room="segments")
    },
    "memformer, encoder-decoder": {"segment": ENCODER_DECODER, "num_layers": 1},
}


def model_case(name: str) -> Case:
    options = MODELS[name]
    small = {layer: dict(memory_entry(layer).small) for layer in options.get("layers", [])}

    def make(dropout: float) -> Face:
        config = everlong.EverlongConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_heads=3,
            mixers=small,
            dropout=dropout,
            bos_token_id=VOCABULARY - 1,
            **options,
        )
        return Face(everlong.EverlongForCausalLM(config))

    bounded = all(memory_entry(layer).bounded for layer in small)
    return Case(name, make, VOCABULARY, tokens=True, bounded=bounded)


@pytest.mark.supports("model law {law}")
@pytest.mark.parametrize("law", MODEL_LAWS)
@pytest.mark.parametrize("name", MODELS)
def test_model_obeys(name, law, tmp_path):
    check(law, model_case(name), tmp_path)
