"""The byte tokenizer: ids are bytes, text comes back exactly, files need no code of ours."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from everlong.models import tokenizer as bytes_
from everlong.models.tokenizer import byte_symbols, byte_tokenizer

BYTES = byte_tokenizer()
HARD = [
    "",
    " ",
    "  two  spaces ,  don't  I'll  n't . ",
    "\x00\x1f\x7f\x85\xa0\r\n\t\u2028",
    "æ 漢字 🎉 e\u0301",
    "<|bos|> and <|pad|> are text here <|eos|>",
    "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000, 5)])),
]


def check(tokenizer, text):
    plain = list(text.encode())
    ids = tokenizer(text).input_ids
    assert ids == [256, *plain]
    assert tokenizer(text, add_special_tokens=False).input_ids == plain
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_are_their_bytes(text):
    check(BYTES, text)


@given(st.text())
def test_any_text_is_its_bytes(text):
    check(BYTES, text)


def test_every_byte_has_its_value_as_id():
    symbols = byte_symbols()
    assert set(symbols) == set(pre_tokenizers.ByteLevel.alphabet())
    assert BYTES.convert_tokens_to_ids(symbols) == list(range(256))
    assert len(BYTES) == 259
    special = (BYTES.bos_token_id, BYTES.eos_token_id, BYTES.pad_token_id)
    assert special == (bytes_.BOS_TOKEN_ID, bytes_.EOS_TOKEN_ID, bytes_.PAD_TOKEN_ID)
    assert special == (256, 257, 258)


def test_batches_are_padded_on_the_left():
    batch = BYTES(["ab", "c"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch.input_ids.tolist() == [[256, 97, 98], [258, 256, 99]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert BYTES("a", "b").input_ids == [256, 97, 98]


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path):
    BYTES.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        check(loaded, text)
    again = loaded(["ab", "c"], padding=True)
    assert again.input_ids == [[256, 97, 98], [258, 256, 99]]
    assert set(again) == {"input_ids", "attention_mask"}


def test_half_a_character_is_shown_as_such():
    assert BYTES.decode([0xC3]) == "\ufffd"
    assert BYTES.decode([0xC3, 0xA6]) == "æ"
