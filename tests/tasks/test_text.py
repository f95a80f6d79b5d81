"""Documents: the packaged ones are whole, the user's are read lazily, and errors say what to do."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from everlong.tasks import text
from everlong.tasks.text import (
    BOS,
    Document,
    Documents,
    encode,
    in_contexts,
    load_documents,
    split,
    tokenize,
)


def in_memory(*contents: bytes) -> Documents:
    items = [
        Document(str(i), np.frombuffer(content, np.uint8), 0, len(content), len(content))
        for i, content in enumerate(contents)
    ]
    return Documents("test", tuple(items))


def content(document: Document) -> bytes:
    return document[:].tobytes()


def test_moby_dick_is_one_document() -> None:
    documents = load_documents("moby_dick")
    assert documents.names == ["moby_dick"]
    assert documents.num_bytes == documents.lengths[0] == 1_204_997
    assert content(documents[0]).startswith(b"CHAPTER 1. Loomings.\n\nCall me Ishmael.")


def test_sotu_is_233_speeches_by_year() -> None:
    documents = load_documents("sotu")
    assert len(documents) == 233
    assert documents.names == sorted(documents.names)
    assert documents.names[0] == "1790_george_washington_n"
    assert documents.names[-1] == "2021_joseph_r_biden_d"
    assert documents.num_bytes == sum(documents.lengths) == 10_761_413
    assert content(documents[0]).startswith(b"Fellow-Citizens of the Senate")


def test_a_file_is_one_document_of_any_bytes(tmp_path) -> None:
    data = bytes(range(256)) * 3
    (tmp_path / "x.bin").write_bytes(data)
    documents = load_documents(tmp_path / "x.bin")
    assert documents.names == ["x.bin"]
    assert content(documents[0]) == data
    assert documents[0][250:260].tobytes() == data[250:260]
    assert np.asarray(documents[0]).dtype == np.uint8


def test_a_folder_is_walked_in_order_without_hidden_and_empty_files(tmp_path) -> None:
    for name in ("b/z.txt", "b/a.txt", "a.txt", "c.txt", ".hidden", ".git/config", "empty"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty" else name)
    documents = load_documents(str(tmp_path))
    assert documents.names == ["a.txt", "b/a.txt", "b/z.txt", "c.txt"]
    assert [content(document).decode() for document in documents] == documents.names


def test_a_file_is_not_read_before_it_is_asked_for(tmp_path) -> None:
    path = tmp_path / "huge"
    size = 1 << 40
    with path.open("wb") as file:
        file.truncate(size)  # sparse: it takes no room on the disk, and would not fit in memory
        file.seek(size - 3)
        file.write(b"end")
    train, validation = split(load_documents(path))
    assert train.num_bytes + validation.num_bytes == size
    assert validation[0][-3:].tobytes() == b"end"
    assert train[0][1 << 39 : (1 << 39) + 4].tolist() == [0, 0, 0, 0]


def test_a_file_that_shrinks_while_in_use_is_an_error(tmp_path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a" * 100)
    document = load_documents(path)[0]
    path.write_bytes(b"a" * 10)
    with pytest.raises(ValueError, match="shorter"):
        document[50:60]
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        document[0:5]


def test_errors_name_the_source_and_the_remedy(tmp_path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden").write_text("x")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "moby_dik": r"did you mean 'moby_dick'.*packaged texts: moby_dick, sotu",
        str(tmp_path / "nothing"): "no file or folder",
        str(tmp_path / "empty" / "below"): "cannot be read",
        str(tmp_path / "empty"): "is empty",
        str(tmp_path / "folder"): "holds no text",
        str(tmp_path / "dangling"): "link cannot be read",
        str(tmp_path / "pipe"): "neither a regular file nor a folder",
    }
    for source, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_documents(source)
        assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_an_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "x").write_text("secret")
    opened = Path.open

    def refuse(path: Path, *args, **kwargs):  # permissions alone would not stop a test run as root
        if path.name == "x":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match="x cannot be read .Permission denied.: check"):
        load_documents(tmp_path)


def test_one_document_gives_its_last_tenth_to_validation() -> None:
    train, validation = split(load_documents("moby_dick"))
    assert validation.num_bytes == pytest.approx(120_500, abs=3)
    assert train.num_bytes + validation.num_bytes == 1_204_997
    whole = content(load_documents("moby_dick")[0])
    assert content(train[0]) + content(validation[0]) == whole


def test_many_documents_give_every_tenth_to_validation() -> None:
    documents = load_documents("sotu")
    train, validation = split(documents)
    assert validation.names == documents.names[9::10]
    assert sorted(train.names + validation.names) == documents.names
    assert split(documents)[1].names == validation.names


def test_fewer_than_ten_documents_give_the_last_one() -> None:
    train, validation = split(in_memory(b"a", b"b", b"c"))
    assert (train.names, validation.names) == (["0", "1"], ["2"])


@given(st.text(min_size=40), st.floats(0.1, 0.5))
def test_a_split_cuts_no_character(string: str, fraction: float) -> None:
    data = string.encode()
    train, validation = split(in_memory(data), fraction)
    assert content(train[0]).decode() + content(validation[0]).decode() == string
    assert 0 <= validation.num_bytes - int(len(data) * fraction) <= 3


def test_a_split_of_bytes_that_are_no_text_stays_where_it_is() -> None:
    assert split(in_memory(b"\x80" * 100))[1].num_bytes == 10


@pytest.mark.parametrize("fraction", [0, -0.1, 0.6, float("nan")])
def test_a_split_refuses_impossible_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match="at most 0.5"):
        split(in_memory(b"abc"), fraction)


def test_a_split_refuses_a_text_too_short() -> None:
    for data in (b"abc", "aé".encode()):
        with pytest.raises(ValueError, match="too few to hold out"):
            split(in_memory(data), 0.1)


@given(st.binary())
def test_encode_puts_bos_before_the_bytes(data: bytes) -> None:
    ids = encode(data)
    assert ids.dtype == np.int64
    assert ids.tolist() == [BOS, *data]
    assert encode(in_memory(data)[0]).tolist() == ids.tolist()


def test_ids_beside_the_bytes() -> None:
    assert (text.BOS, text.EOS, text.PAD, text.VOCAB_SIZE) == (256, 257, 258, 259)


def byte_level(**special: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{symbol: i + 1 for i, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(*known: str, unk: str | None = "[UNK]") -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["[UNK]", "<s>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token=unk)


def test_a_tokenizer_encodes_whole_documents() -> None:
    tokenizer = byte_level(eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    string = "Thar she blows – ω <|endoftext|> \n"
    documents = tokenize(in_memory(string.encode(), b"x"), tokenizer)
    assert documents.bos == 0  # no bos of its own: the end of text begins a document
    assert documents.vocab_size == 257
    assert documents.num_bytes == len(string.encode()) + 1
    assert tokenizer.decode(documents[0][:]) == string
    assert documents.lengths == [len(string.encode()) - len("<|endoftext|>") + 1, 1]
    assert encode(documents[1], documents.bos).tolist() == [0, tokenizer.encode("x")[0]]


def test_tokenized_documents_are_split_before() -> None:
    with pytest.raises(ValueError, match="split first"):
        split(tokenize(in_memory(b"abc" * 10), byte_level(bos_token="<|endoftext|>")))


def test_white_space_may_be_dropped() -> None:
    assert tokenize(in_memory(b"  a  b \n"), words("a", "b"))[0][:].tolist() == [2, 3]


def test_bytes_that_are_not_utf8_are_named_by_file_and_offset() -> None:
    with pytest.raises(ValueError, match="1: byte 3 is not UTF-8"):
        tokenize(in_memory(b"fine", b"abc\xff"), byte_level(bos_token="<|endoftext|>"))


def test_the_offset_is_counted_from_the_start_of_the_file(tmp_path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a" * 99 + b"\xff")
    held_out = split(load_documents(tmp_path / "x.txt"))[1]
    with pytest.raises(ValueError, match="x.txt: byte 99 is not UTF-8"):
        tokenize(held_out, byte_level(bos_token="<|endoftext|>"))


def test_unknown_words_are_named_by_file_and_offset() -> None:
    data = "a b [UNK] a é b c".encode()
    with pytest.raises(ValueError, match="0: the tokenizer cannot encode 'é' at byte 12"):
        tokenize(in_memory(data), words("a", "b"))


def test_a_character_dropped_in_silence_is_named_by_file_and_offset() -> None:
    alphabet = {"<s>": 0, "a": 1, "b": 2}
    for pre_tokenizer in (None, pre_tokenizers.WhitespaceSplit()):
        tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))  # no unknown token
        if pre_tokenizer is not None:
            tokenizer.pre_tokenizer = pre_tokenizer
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
        assert tokenize(in_memory(b"abba"), fast)[0][:].tolist() == [1, 2, 2, 1]
        with pytest.raises(ValueError, match="cannot encode 'X' at byte 7"):
            tokenize(in_memory(b"abbabbaXabab"), fast)


def test_a_normalizer_that_drops_characters_is_caught() -> None:
    tokenizer = words("a", "b")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("!", "")
    with pytest.raises(ValueError, match="cannot encode '!' at byte 3"):
        tokenize(in_memory(b"a b! a"), tokenizer)


def test_a_tokenizer_needs_offsets_and_a_first_token() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer.json"):
        tokenize(in_memory(b"a"), Slow())
    with pytest.raises(ValueError, match="bos"):
        tokenize(in_memory(b"a"), byte_level())


def test_contexts_are_the_same_text_in_shorter_documents() -> None:
    text = bytes(range(256)) * 3
    documents = in_memory(text[:700], text[700:])
    pieces = in_contexts(documents, 300)
    assert pieces.lengths == [300, 300, 100, 68]
    assert b"".join(map(content, pieces)) == text
    assert pieces.num_bytes == len(text)
    assert len(set(pieces.names)) == 4
    assert in_contexts(documents, 1000).lengths == documents.lengths
    with pytest.raises(ValueError, match="context is 0"):
        in_contexts(documents, 0)
