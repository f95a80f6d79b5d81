"""EverlongConfig: what it expands, what it refuses and what it suggests."""

import copy
import json

import pytest
from transformers import AutoConfig

import everlong
from everlong import EverlongConfig
from everlong.models import hub  # noqa: F401 (registers with AutoConfig)

SEGMENT = {"name": "memformer", "segment_length": 4, "num_slots": 3}


def test_the_defaults_are_a_byte_model():
    config = EverlongConfig()
    assert config.layer_names == ["attention"] * 4
    assert (config.vocab_size, config.tie_word_embeddings, config.segment) == (259, True, None)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, 258)


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (["attention"], "AAAAA"),
        ("attention", "AAAAA"),
        (["sliding_attention*2", "attention"], "SSASS"),
        (["sliding_attention * 3", "attention * 2"], "SSSAA"),
    ],
)
def test_the_pattern_repeats_to_the_number_of_layers(layers, wanted):
    config = EverlongConfig(layers=layers, num_layers=5)
    assert "".join(name[0].upper() for name in config.layer_names) == wanted


def test_both_spellings_mean_the_same():
    theirs = EverlongConfig(num_hidden_layers=2, num_attention_heads=8)
    ours = EverlongConfig(num_layers=2, num_heads=8)
    assert (theirs.num_layers, theirs.num_heads) == (2, 8)
    assert (ours.num_hidden_layers, ours.num_attention_heads) == (2, 8)
    assert theirs.to_dict() == ours.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 4, "num_hidden_layers": 4}, "another spelling of num_layers"),
        ({"hiden_size": 8}, "did you mean 'hidden_size'"),
        ({"num_hiden_layers": 8}, "did you mean 'num_hidden_layers'"),
        ({"segments": None}, "did you mean 'segment'"),
        ({"layer_types": ["linear_attention"]}, "did you mean 'layers'"),
        ({"layers": ["atention"]}, "did you mean 'attention'"),
        ({"layers": ["memformer"]}, "cannot be a layer"),
        ({"layers": []}, "at least one mixer"),
        ({"layers": [3]}, "layers holds names"),
        ({"layers": ["attention*x"]}, r"such as attention\*3"),
        ({"layers": ["attention*0"]}, r"such as attention\*3"),
        ({"layers": ["attention*5"]}, "names 5 mixers and num_layers is 4"),
        ({"mixers": {"atention": {}}}, "did you mean 'attention'"),
        ({"mixers": {"sliding_attention": {"windw": 3}}}, "did you mean 'window'"),
        ({"mixers": {"sliding_attention": 3}}, "table of options"),
        ({"segment": "memformer"}, 'table with a "name"'),
        ({"segment": {"segment_length": 4}}, 'table with a "name"'),
        ({"segment": {"name": "attention"}}, "cannot be the segment memory"),
        ({"segment": {**SEGMENT, "slots": 4}}, "did you mean 'num_slots'"),
        ({"segment": {**SEGMENT, "num_slots": 0}}, "num_slots must be at least 1"),
        ({"segment": {**SEGMENT, "encoder_layers": 1}, "bos_token_id": None}, "give bos_token_id"),
        ({"hidden_size": 30, "num_heads": 4}, "does not divide"),
        ({"hidden_size": 12, "num_heads": 4}, "multiple of 2"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1"),
        ({"hidden_size": "256"}, "hidden_size must be a whole number"),
        ({"num_layers": True}, "num_layers must be a whole number"),
        ({"intermediate_size": 0}, "intermediate_size must be a whole number"),
        ({"layers": 5}, "layers must be a list of names"),
        ({"mixers": 3}, "mixers must be a table of options"),
        ({"mixers": [1]}, "mixers must be a table of options"),
        ({"segment": {"name": 3}}, "name must be a string"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number"),
        ({"bos_token_id": 1.5}, "bos_token_id must be a token id"),
        ({"eos_token_id": "abc"}, "eos_token_id must be a token id"),
        ({"eos_token_id": ["a"]}, "eos_token_id must be a token id"),
        ({"tie_word_embeddings": 3}, "tie_word_embeddings must be true or false"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"dropout": "high"}, r"dropout must lie in \[0, 1\)"),
        ({"vocab_size": 100, "bos_token_id": 100}, "bos_token_id 100 is not in a vocabulary"),
        ({"vocab_size": 100, "eos_token_id": [3, 200]}, "eos_token_id 200 is not in a vocabulary"),
    ],
)
def test_mistakes_are_refused_with_a_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        EverlongConfig(**options)


def test_a_small_vocabulary_has_no_byte_tokens():
    config = EverlongConfig(vocab_size=258)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, None)


def test_keywords_of_transformers_pass():
    """Also where they resemble ours (num_labels, num_beams), and what clients add."""
    config = EverlongConfig(num_labels=3, num_beams=2, attn_implementation="eager", written_by="me")
    assert (config.num_labels, config.written_by) == (3, "me")


def test_a_config_survives_its_file(tmp_path):
    config = EverlongConfig(
        layers=["sliding_attention*2", "attention"],
        num_hidden_layers=6,
        mixers={"sliding_attention": {"window": 7}},
        segment=SEGMENT,
        intermediate_size=64,
        dropout=0.1,
        eos_token_id=[1, 2],
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    assert "num_hidden_layers" not in json.loads((tmp_path / "config.json").read_text())
    for loaded in (EverlongConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is EverlongConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert loaded.layer_names == config.layer_names
    assert copy.deepcopy(config) == config
    edited = EverlongConfig.from_pretrained(tmp_path, num_hidden_layers=3)
    assert edited.layer_names == config.layer_names[:3]


def test_two_configs_share_nothing():
    one, other = EverlongConfig(), EverlongConfig()
    one.mixers["attention"] = {"dropout": 0.5}
    one.layers.append("sliding_attention")
    assert other.mixers == {}
    assert other.layer_names == ["attention"] * 4
    assert everlong.EverlongConfig is EverlongConfig
