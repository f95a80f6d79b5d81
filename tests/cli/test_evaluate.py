"""`everlong evaluate` on tasks: the table, the JSON, and what is refused. Texts: test_generate."""

import json
import math

import pytest

WIKI = " \n = Whale = \n \n The <unk> whale @-@ bone swam . \n"


def test_tasks_are_a_table_and_json_with_where_it_comes_from(tiny_run, call, tmp_path):
    file = tmp_path / "tasks.json"
    words = ["--task", "needle_sing*", "--task", "mqar", "--task", "updates"]
    code, out, err = call(
        "evaluate", tiny_run, *words, "--length", 64, "--length", 600, "--samples", 12, "--seed", 1,
        "--json", file,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(file.read_text())
    assert found["command"] == "everlong evaluate"
    assert {"torch", "git"} <= found["environment"].keys()
    assert found["config"]["tasks"] == ["needle_single", "mqar", "updates"]
    assert (found["config"]["samples"], found["config"]["seed"]) == (12, 1)
    assert found["config"]["model"]["segment"]["name"] == "memformer"
    rows = {(row["task"], row["length"], row["group"]): row for row in found["rows"]}
    assert rows["updates", 64, None]["missing"].startswith("needs ")
    assert rows["mqar", 64, None]["state_bytes"] == rows["mqar", 600, None]["state_bytes"]
    assert rows["updates", 600, "deleted"]["samples"] == 1
    for row in rows.values():
        if "missing" not in row:
            low, high = row["exact_interval"]
            assert 0 <= low <= row["exact"] <= high <= 1
    lines = [line.split() for line in out.splitlines()]
    assert ["updates", "64", "missing:"] in [line[:3] for line in lines]
    assert ["updates", "600", "all"] in [line[:3] for line in lines]
    assert "lengths in bytes; intervals of 95 %" in out
    assert "updates, length 600" in err


def test_language_and_a_corpus_report_every_measure(tiny_run, call, tmp_path):
    (tmp_path / "wiki.test.tokens").write_text(WIKI)
    file = tmp_path / "found.json"
    code, out, err = call(
        "evaluate", tiny_run, "--task", "wikitext103", "--text", tmp_path, "--json", file
    )
    assert code == 0, err
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["num_bytes"], row["tokens"], row["words"]) == (len(WIKI), len(WIKI), 10)
    nats = row["bits_per_byte"] * math.log(2) * len(WIKI)
    assert row["token_perplexity"] == pytest.approx(math.exp(nats / len(WIKI)))
    assert row["word_perplexity"] == pytest.approx(math.exp(nats / 10))
    assert row["published_value"] == pytest.approx(math.exp(nats / 14))
    assert "over 14 words (counted here)" in out
    binary = tmp_path / "binary"
    binary.write_bytes(b"\0\xff" * 20)
    file = tmp_path / "binary.json"
    code, out, _ = call("evaluate", tiny_run, "--text", binary, "--json", file)
    assert code == 0
    assert " a word" not in out
    assert json.loads(file.read_text())["rows"][0]["word_perplexity"] is None


def test_what_cannot_be_asked_is_refused_in_a_line(tiny_run, refused, tmp_path):
    line = refused("evaluate", tiny_run, "--task", "pasky")
    assert "no task 'pasky'; did you mean 'passkey'?" in line
    assert all(name in line for name in ("language", "enwik8", "mqar", "babi_sim"))
    for words, message in (
        (["--task", "zz*"], "no task 'zz*'"),
        (["--task", "passkey", "--wipe"], "--wipe and --surprise are for the task language alone"),
        (["--task", "passkey", "--text", "sotu"], "--text is for language and the corpora"),
        (["--task", "passkey", "--length", 0], "give lengths of 1 or more"),
        (["--task", "passkey", "--samples", 0], "samples is 0"),
        (["--task", "enwik8"], "enwik8 is in no data set"),
        (["--task", "enwik8", "--text", tmp_path], "holds no enwik8"),
    ):
        assert message in refused("evaluate", tiny_run, *words)


@pytest.mark.parametrize("option", ["--json", "--surprise"])
def test_nothing_is_written_over_and_nothing_is_left_of_a_failure(
    tiny_run, refused, tmp_path, option
):
    text = tmp_path / "text"
    text.write_text("read me")
    line = refused("evaluate", tiny_run, "--text", text, option, text)
    assert "text exists: give a new file" in line
    assert text.read_text() == "read me"
    refused("evaluate", tiny_run, "--text", tmp_path / "gone", option, tmp_path / "found")
    assert not (tmp_path / "found").exists()
    assert "cannot be written" in refused("evaluate", tiny_run, option, tmp_path / "no" / "found")
