"""A continuation's ids are those that stand behind its prompt, whatever the tokenizer joins."""

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from everlong.evaluation.codec import Codec


def test_a_continuation_is_cut_as_behind_its_prompt():
    vocabulary = {"<u>": 0, "a": 1, "b": 2, "ab": 3, " ": 4, " a": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), (" ", "a")], unk_token="<u>"))
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer), bos=0)
    for prompt, text in (("b", " a"), ("aa", "b"), ("b a", "b"), ("a" * 200, "b")):
        whole, before = codec.encode(prompt + text), codec.encode(prompt)
        found = codec.continuation(prompt, text)
        assert np.array_equal(found, whole[len(before) :]), (prompt, text)
    assert codec.continuation("a", "b").size == 0, "the prompt's last token holds it"
