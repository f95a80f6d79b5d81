"""The commands read a model that `extend` made as they read ours."""

import numpy as np
import pytest

import everlong
from everlong.cli.reader import Reader
from everlong.cli.runs import open_run
from everlong.models import card
from models.backbones import make_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = everlong.extend(make_backbone("llama"), "rmt", segment_length=4, num_slots=2)
    folder = tmp_path_factory.mktemp("extended") / "model"
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture(scope="module")
def opened(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("everlong.cli.runs.load_tokenizer", lambda source: None)
        return open_run(folder)


def test_its_state_is_saved_and_read_and_no_other_model_s(opened, tmp_path):
    reader = Reader(opened.model, opened.bos)
    reader.read(np.arange(9))
    reader.save(tmp_path / "state")
    again = Reader(opened.model, opened.bos)
    again.load(tmp_path / "state")
    assert again.held.equal(reader.held)
    other = everlong.extend(make_backbone("llama"), "rmt", segment_length=4, num_slots=3)
    with pytest.raises(ValueError, match="another model"):
        Reader(other, opened.bos).load(tmp_path / "state")
    assert card.memories(opened.model) == ["rmt"]


def test_a_stream_begins_with_bos_or_else_with_eos(opened):
    config = opened.model.config
    assert opened.bos == config.bos_token_id == 28
    for bos, eos, first in ((None, 5, 5), (None, [7, 8], 7), (3, 5, 3)):
        config.bos_token_id, config.eos_token_id = bos, eos
        assert opened.bos == first
    config.bos_token_id = config.eos_token_id = None
    with pytest.raises(ValueError, match="neither a bos nor an eos.*give its config.json"):
        _ = opened.bos
    config.bos_token_id = 28
