"""`everlong generate` and `everlong evaluate`: one stream, cut anywhere, is one stream."""

import io
import json
import math
import os

import numpy as np
import pytest
import torch

from everlong.cli.reader import BytePrinter, Reader, stream_ids
from everlong.cli.runs import open_run
from everlong.errors import UserError
from everlong.evaluation.language import bits_per_byte
from everlong.tasks.text import BOS, load_documents

PROMPT = "It was the whale, the white whale. "


@pytest.fixture
def pipe(monkeypatch):
    """`pipe(data)` puts bytes on standard input."""

    def give(data):
        stream = io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)))
        monkeypatch.setattr("sys.stdin", stream)

    return give


@pytest.fixture(scope="module")
def opened(tiny_run):
    return open_run(tiny_run)


@pytest.fixture
def text(tmp_path):
    generator = np.random.default_rng(0)
    file = tmp_path / "text"
    file.write_bytes(generator.integers(0, 256, 3001, dtype=np.uint8).tobytes())
    return file


def test_the_seed_decides_what_is_made(tiny_run, call):
    words = ["generate", tiny_run, "--prompt", PROMPT, "--max-new-tokens", 40, "--temperature", 1]
    first, again = call(*words), call(*words)
    assert first[0] == 0
    assert first[2] == ""
    assert first == again
    assert call(*words, "--seed", 1)[1] != first[1]


def test_temperature_zero_takes_the_likeliest_token(tiny_run, call, opened):
    words = ["generate", tiny_run, "--prompt", PROMPT, "--max-new-tokens", 9, "--temperature", 0]
    ids = torch.tensor([[BOS, *PROMPT.encode()]])
    with torch.no_grad():
        for _ in range(9):
            logits, _ = opened.model.stream(ids)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    made = bytes(value for value in ids[0, -9:].tolist() if value < 256)
    assert call(*words)[1] == made.decode(errors="replace") + "\n"


def test_top_k_of_one_is_greedy(tiny_run, call):
    words = ["generate", tiny_run, "--prompt", PROMPT, "--max-new-tokens", 20]
    assert call(*words, "--top-k", 1)[1] == call(*words, "--temperature", 0)[1]


@pytest.mark.parametrize("cut", [1, 7, 8, 20])
def test_a_prompt_cut_by_a_state_file_is_one_prompt(cut, tiny_run, call, tmp_path):
    greedy = ["--temperature", 0]
    whole = call("generate", tiny_run, "--prompt", PROMPT, "--max-new-tokens", 12, *greedy)
    file = tmp_path / "state"
    first = ["--prompt", PROMPT[:cut], "--max-new-tokens", 0, "--save-state", file]
    assert call("generate", tiny_run, *first)[:2] == (0, "")
    second = ["--load-state", file, "--prompt", PROMPT[cut:], "--max-new-tokens", 12]
    assert call("generate", tiny_run, *second, *greedy) == whole


def test_a_continuation_is_continued_from_its_state_file(tiny_run, call, tmp_path):
    words = ["generate", tiny_run, "--temperature", 0]
    whole = call(*words, "--prompt", PROMPT, "--max-new-tokens", 20)[1]
    file = tmp_path / "state"
    first = call(*words, "--prompt", PROMPT, "--max-new-tokens", 11, "--save-state", file)[1]
    second = call(*words, "--load-state", file, "--max-new-tokens", 9)[1]
    assert first.removesuffix("\n") + second == whole


def test_another_models_state_is_refused(tiny_run, opened, refused, tmp_path, call):
    file = tmp_path / "state"
    words = ["--prompt", "x", "--max-new-tokens", 0, "--save-state", file]
    assert call("generate", tiny_run / "twin", *words)[0] == 0
    assert "another model" in refused("generate", tiny_run, "--load-state", file)
    with torch.no_grad():  # nor is one of the same shape but with other weights
        weights = opened.model.state_dict()
        name = next(iter(weights))
        before = weights[name].clone()
        reader = Reader(opened.model, BOS)
        reader.save(file)
        weights[name].add_(1)
        with pytest.raises(ValueError, match="another model"):
            Reader(opened.model, BOS).load(file)
        weights[name].copy_(before)
    Reader(opened.model, BOS).load(file)


def test_a_damaged_state_is_refused(tiny_run, refused, tmp_path):
    file = tmp_path / "state"
    file.write_bytes(b"no state")
    assert str(file) in refused("generate", tiny_run, "--load-state", file)
    assert "--save-state" in refused("generate", tiny_run, "--load-state", tmp_path / "gone")


def test_where_a_state_goes_is_looked_at_before_anything_is_read(
    tiny_run, refused, tmp_path, monkeypatch
):
    words = ["generate", tiny_run, "--prompt", "x", "--save-state"]
    assert "no folder" in refused(*words, tmp_path / "gone" / "state")
    assert "is a folder" in refused(*words, tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot be written" in refused(*words, tmp_path / "state")


def test_a_state_that_cannot_be_written_is_one_line(opened, tmp_path):
    with pytest.raises(UserError, match="gone"):
        Reader(opened.model, BOS).save(tmp_path / "gone" / "state")


def test_a_seed_no_generator_takes_is_refused(tiny_run, refused):
    assert "--seed" in refused("generate", tiny_run, "--prompt", "x", "--seed", 2**64)


def test_something_must_be_continued(tiny_run, refused):
    assert "--prompt" in refused("generate", tiny_run)
    assert "not both" in refused("generate", tiny_run, "--prompt", "x", "--stdin")
    assert "--max-new-tokens" in refused(
        "generate", tiny_run, "--prompt", "x", "--max-new-tokens=-1"
    )
    assert "--top-p" in refused("generate", tiny_run, "--prompt", "x", "--top-p", 2)


def test_standard_input_is_read_to_its_end_in_the_same_bytes(tiny_run, call, pipe, text):
    pipe(text.read_bytes())
    code, out, err = call("generate", tiny_run, "--stdin")
    assert (code, out) == (0, "")
    told = err.splitlines()[-1]
    assert "read 3,001 bytes" in told
    score = bits_per_byte(open_run(tiny_run).model, load_documents(text), batch_size=1)
    assert f"{score.bits_per_byte:.4f} bits per byte" in told
    assert f"state {score.state_bytes:,} bytes" in told


def test_standard_input_is_continued_if_asked(tiny_run, call, pipe):
    greedy = ["--max-new-tokens", 8, "--temperature", 0]
    whole = call("generate", tiny_run, "--prompt", PROMPT, *greedy)[1]
    pipe(PROMPT.encode())
    assert call("generate", tiny_run, "--stdin", *greedy)[1] == whole


def test_nothing_on_standard_input(tiny_run, call, pipe):
    pipe(b"")
    code, _, err = call("generate", tiny_run, "--stdin")
    assert (code, "read 0 bytes" in err) == (0, True)


def test_reports_come_while_it_reads(tiny_run, call, pipe, monkeypatch):
    monkeypatch.setattr("everlong.cli.generate._INTERVAL", 0.0)
    monkeypatch.setattr("everlong.cli.reader._PIPE", 100)
    pipe(b"a" * 250)
    err = call("generate", tiny_run, "--stdin")[2]
    assert [line.split()[1] for line in err.splitlines()] == ["100", "200", "250"]


def test_what_was_read_is_saved_when_it_is_interrupted(tiny_run, call, monkeypatch, tmp_path):
    class Stopped(io.RawIOBase):
        def read1(self, size):
            if self.given:
                raise KeyboardInterrupt
            self.given = True
            return PROMPT.encode()

        given = False

    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": Stopped()}))
    file = tmp_path / "state"
    code, _, err = call("generate", tiny_run, "--stdin", "--save-state", file)
    assert code == 130
    assert f"read {len(PROMPT)} bytes" in err
    greedy = ["--max-new-tokens", 8, "--temperature", 0]
    whole = call("generate", tiny_run, "--prompt", PROMPT, *greedy)[1]
    assert call("generate", tiny_run, "--load-state", file, *greedy)[1] == whole


def test_text_comes_out_character_by_character_and_invalid_bytes_are_replaced():
    out = io.StringIO()
    printer, seen = BytePrinter(out), []
    printer.put(torch.tensor([[BOS]]))  # the prompt
    for value in "é☃".encode() + b"\xffz\xe2":
        printer.put(torch.tensor([value]))
        seen.append(out.getvalue())
    printer.end()
    assert seen == ["", "é", "é", "é", "é☃", "é☃\ufffd", "é☃\ufffdz", "é☃\ufffdz"]
    assert out.getvalue() == "é☃\ufffdz\ufffd\n"


def test_a_pipe_is_tokenized_between_words(monkeypatch):
    class Words:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [len(word) for word in text.split()]

    monkeypatch.setattr("everlong.cli.reader._PIPE", 5)
    source = io.BufferedReader(io.BytesIO("né whales and ships".encode()))
    found = list(stream_ids(source, Words()))
    assert [n for ids, _ in found for n in ids] == [2, 6, 3, 5]
    assert sum(count for _, count in found) == 20


def test_evaluate_is_the_exact_score_of_one_stream(tiny_run, call, opened, text):
    for wipe in (False, True):
        words = ["--wipe"] if wipe else []
        code, out, _ = call("evaluate", tiny_run, "--text", text, *words)
        score = bits_per_byte(opened.model, load_documents(text), batch_size=1, wipe=wipe)
        assert code == 0
        assert float(out.split()[0]) == pytest.approx(score.bits_per_byte, abs=1e-4)


def test_surprise_has_a_line_for_every_byte_and_sums_to_the_score(tiny_run, call, text, tmp_path):
    file = tmp_path / "surprise.jsonl"
    out = call("evaluate", tiny_run, "--text", text, "--surprise", file)[1]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(3001))
    assert bytes(row["token"] for row in rows) == text.read_bytes()
    mean = math.fsum(row["bits"] for row in rows) / 3001
    assert float(out.split()[0]) == pytest.approx(mean, abs=1e-4)


def test_each_document_begins_afresh(tiny_run, call, tmp_path):
    folder, file = tmp_path / "texts", tmp_path / "surprise.jsonl"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text(PROMPT)
    assert call("evaluate", tiny_run, "--text", folder, "--surprise", file)[0] == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    first = [row["bits"] for row in rows if row["document"] == "a"]
    assert first == [row["bits"] for row in rows if row["document"] == "b"]


def test_a_document_of_any_name_is_in_the_surprise(tiny_run, call, tmp_path):
    folder, file = tmp_path / "texts", tmp_path / "surprise.jsonl"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9 \xc3\xa9")
    (folder / name).write_text("x")
    assert call("evaluate", tiny_run, "--text", folder, "--surprise", file)[0] == 0
    assert [json.loads(line)["document"] for line in file.read_text().splitlines()] == [name]


def test_evaluate_of_an_empty_path_does_not_read_the_current_folder(tiny_run, refused):
    assert "names no text" in refused("evaluate", tiny_run, "--text", "")


def test_evaluate_takes_the_runs_own_validation_text(tiny_run, call, refused):
    code, out, _ = call("evaluate", tiny_run)
    assert code == 0
    assert "bytes in 1 document," in out
    assert "give --text" in refused("evaluate", tiny_run / "model")
