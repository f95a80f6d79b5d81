"""WikiText-103, PG-19 and enwik8 from made files: what is read, and what it is divided by."""

import math
import sys
import types
from dataclasses import replace

import pytest

from everlong.errors import UserError
from everlong.evaluation import texts
from everlong.evaluation.published import published_score
from everlong.evaluation.texts import TextScore, count_lines, count_words, perplexity
from everlong.tasks import standard
from everlong.tasks.standard import STANDARDS, load_standard
from everlong.tasks.text import load_documents

WIKI = " \n = Whale = \n \n The <unk> whale @-@ bone swam . \n"  # 10 words, 4 ends of lines


def text_of(documents):
    return [document[:].tobytes().decode() for document in documents]


@pytest.fixture
def wiki(tmp_path):
    for name, text in (("test", WIKI), ("valid", " = Two = \n")):
        (tmp_path / f"wiki.{name}.tokens").write_text(text)
    return tmp_path


def test_wikitext_is_one_stream_per_word_and_end_of_line(wiki):
    documents = load_standard("wikitext103", wiki)
    assert text_of(documents) == [WIKI]
    assert text_of(load_standard("wikitext103", wiki, "validation")) == [" = Two = \n"]
    assert text_of(load_standard("wikitext103", wiki / "wiki.test.tokens")) == [WIKI]
    score = TextScore(28.0, 40, documents.num_bytes, count_words(documents))
    assert (score.words, count_lines(documents)) == (10, 4)
    found = published_score("wikitext103", documents, score)
    assert found["published_value"] == pytest.approx(math.exp(28 / 14))
    assert (found["published_units"], found["published_count"]) == (14, "words (counted here)")


def test_a_whole_split_is_divided_by_its_published_count(wiki, monkeypatch):
    documents = load_standard("wikitext103", wiki)
    score = TextScore(28.0, 40, documents.num_bytes, 10)
    counts = (("test", 14), ("train", 9999))
    near = replace(STANDARDS["wikitext103"], published=counts)
    monkeypatch.setitem(STANDARDS, "wikitext103", near)
    assert published_score("wikitext103", documents, score)["published_count"] == (
        "words (published, test)"
    )
    assert dict(standard.STANDARDS["pg19"].published)["test"] == 6_966_499


def test_pg19_is_a_stream_a_book_per_word(tmp_path):
    (tmp_path / "test").mkdir()
    for name in ("11", "7"):
        (tmp_path / "test" / f"{name}.txt").write_text(f"Call me\nnumber {name}.")
    (tmp_path / "test" / "metadata.csv").write_text("no book")
    documents = load_standard("pg19", tmp_path)
    assert documents.names == ["11.txt", "7.txt"]
    assert text_of(load_standard("pg19", tmp_path / "test")) == text_of(documents)
    score = TextScore(16.0, 40, documents.num_bytes, count_words(documents))
    found = published_score("pg19", documents, score)
    assert found["published_value"] == pytest.approx(math.exp(16 / 8))


def test_enwik8_is_its_last_twentieth_per_byte(tmp_path):
    file = tmp_path / "enwik8"
    file.write_bytes(bytes(range(200)))
    for source in (file, tmp_path):
        parts = [load_standard("enwik8", source, s)[0][:].tolist() for s in standard.SPLITS]
        assert [len(part) for part in parts] == [180, 10, 10]
        assert [*parts[0], *parts[1], *parts[2]] == list(range(200))
    documents = load_standard("enwik8", file)
    found = published_score("enwik8", documents, TextScore(20 * math.log(2), 10, 10, None))
    assert found["published_value"] == pytest.approx(2)
    assert found["published_count"].startswith("bytes (not the 5,000,000")
    whole = TextScore(1.0, 1, 5_000_000, None)
    assert published_score("enwik8", documents, whole)["published_count"] == "bytes"


def test_what_is_missing_is_said_with_what_to_do(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short").write_text("abc")
    for name, path, message in (
        ("wikitext103", tmp_path, "holds no wiki.test.tokens or wiki.test.raw"),
        ("wikitext103", tmp_path / "no", "no WikiText-103 at .*: give its file, or the folder"),
        ("wikitext103", tmp_path / "empty.txt", "is empty"),
        ("pg19", tmp_path / "short", "for PG-19 give the folder of its books"),
        ("pg19", tmp_path / "empty.txt", "is no folder"),
        ("enwik8", tmp_path / "short", "has 3 bytes: nothing is left for its validation split"),
        ("enwik8", None, "enwik8 is in no data set.*--text PATH"),
    ):
        split = "validation" if path == tmp_path / "short" else "test"
        with pytest.raises(UserError, match=message):
            load_standard(name, path, split)
    with pytest.raises(ValueError, match="split is 'valid'.*did you mean 'validation'"):
        load_standard("enwik8", tmp_path, "valid")
    (tmp_path / "books").mkdir()
    with pytest.raises(UserError, match="holds no .txt file"):
        load_standard("pg19", tmp_path / "books")
    binary = load_documents(tmp_path / "short")
    with pytest.raises(UserError, match="is not UTF-8 text: pg19 has words"):
        published_score("pg19", binary, TextScore(1.0, 3, 3, None))


def fake_datasets(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_the_hubs_rows_are_the_lines_of_the_file(monkeypatch):
    asked = []

    def load(*words, split):
        asked.append((*words, split))
        return [{"text": text} for text in ("", " = Whale = \n", "", WIKI.splitlines(True)[-1])]

    fake_datasets(monkeypatch, load)
    assert text_of(load_standard("wikitext103")) == [WIKI]
    assert len(text_of(load_standard("pg19"))) == 4 - 2  # empty books are left out
    assert asked[0] == ("Salesforce/wikitext", "wikitext-103-raw-v1", "test")


def test_without_network_or_package_it_says_so(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach it (offline mode is enabled)")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(UserError, match="cannot be fetched .*offline.*--text PATH"):
        load_standard("pg19")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs `pip install 'everlong.data.'` and the network"):
        load_standard("pg19")


def test_words_are_counted_in_slices(tmp_path, monkeypatch):
    text = "One twö  three\nfour,\tfive sixé "
    (tmp_path / "text").write_text(text)
    documents = load_documents(tmp_path / "text")
    for size in range(1, 12):
        monkeypatch.setattr(texts, "_SLICE", size)
        assert count_words(documents) == len(text.split()) == 6
        assert count_lines(documents) == 1
    for data in (b"abc \xff", b"a\0b", "\u00e9".encode()[:1]):
        (tmp_path / "text").write_bytes(data)
        assert count_words(load_documents(tmp_path / "text")) is None


def test_perplexity_is_none_for_nothing_and_beyond_floats():
    assert perplexity(2.0, 1) == pytest.approx(math.exp(2))
    assert perplexity(2.0, 0) is None
    assert perplexity(1e5, 1) is None
    assert TextScore(1.0, 2, 3, None).word_perplexity is None
