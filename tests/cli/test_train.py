"""`everlong train`: what it writes, how it goes on, what it says beforehand."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from cli.tiny import SEGMENT, TINY, sets
from everlong.cli import final
from everlong.cli.prepare import Texts
from everlong.cli.runs import open_run
from everlong.tasks.text import Document, Documents
from everlong.training.run import read_metrics, without_times

ARGUMENTS = sets(*TINY, *SEGMENT)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_folder_holds_metrics_configuration_weights_curves_and_results(tiny_run):
    lines = read_metrics(tiny_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert {"loss", "bits_per_byte", "tokens_per_s", "state_bytes", "peak_memory"} <= {*lines[0]}
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["recipe"]["model"]["hidden_size"] == 16
    assert (tiny_run / "model" / "model.safetensors").exists()
    assert (tiny_run / "model" / "tokenizer.json").exists()
    assert (tiny_run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_alone_reads_the_model_folder(tiny_run):
    import transformers

    import everlong.auto  # noqa: F401 (registers our classes)

    folder = tiny_run / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Call me", return_tensors="pt").input_ids
    assert ids.tolist() == [[256, *b"Call me"]]
    assert model(ids).logits.shape == (1, 8, 259)


def test_the_table_compares_memory_wiped_memory_and_an_equal_twin(tiny_run):
    own, wiped, twin = results(tiny_run)["rows"]
    assert [row["name"] for row in (own, wiped, twin)] == [
        "memformer",
        "memformer, wiped at every segment",
        "twin without a memory",
    ]
    assert len({row["bits_per_byte"] for row in (own, wiped, twin)}) == 3
    assert twin["parameters"] == pytest.approx(own["parameters"], rel=0.01)
    assert own["state_bytes"]["10"] == own["state_bytes"]["20"] > 0
    assert own["tokens_per_s"] > 0
    same = [
        read_metrics(folder / "metrics.jsonl")[-1]["tokens"]
        for folder in (tiny_run, tiny_run / "twin")
    ]
    assert same[0] == same[1]
    assert "environment" in results(tiny_run)


def test_what_the_user_sees(call, briefly, tmp_path):
    code, out, err = call("train", "smoke", "--out", tmp_path / "run", *ARGUMENTS)
    assert code == 0
    assert "parameters on cpu" in err
    for words in ("loss", "bits/byte", "tokens/s", "state", "peak", "its twin: 2/2"):
        assert words in err
    for words in ("bits per byte", "tokens/s", "state after 2 segments", "state after 5 segments"):
        assert words in out
    assert "A passage it had not seen" in out
    assert out.rstrip().endswith(str(tmp_path / "run"))


def test_the_same_recipe_gives_the_same_bits(call, briefly, tmp_path):
    metrics = []
    for name in "ab":
        assert call("train", "smoke", "--out", tmp_path / name, *ARGUMENTS)[0] == 0
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        metrics.append([without_times(line) for line in lines])
    assert metrics[0] == metrics[1]


def test_a_finished_run_says_so_and_goes_on_only_for_more_steps(call, briefly, tmp_path):
    folder = tmp_path / "run"
    assert call("train", "smoke", "--out", folder, *ARGUMENTS)[0] == 0
    before = (folder / "metrics.jsonl").read_text()
    code, out, _ = call("train", "--resume", folder)
    assert code == 0
    assert "is finished" in out
    assert "bits per byte" in out
    assert (folder / "metrics.jsonl").read_text() == before
    code, out, _ = call("train", "--resume", folder, "--set", "train.steps=3")
    assert code == 0
    for place in (folder, folder / "twin"):
        assert [line["step"] for line in read_metrics(place / "metrics.jsonl")] == [1, 2, 3]
    assert results(folder)["steps"] == 3
    assert "is finished" in call("train", "--resume", folder)[1]  # it knows its new length


def test_one_checkpoint_can_be_gone_back_to(call, briefly, tmp_path):
    folder = tmp_path / "run"
    more = sets("train.checkpoint_every=1", "train.keep_checkpoints=9", "twin=false")
    assert call("train", "smoke", "--out", folder, *ARGUMENTS, *more)[0] == 0
    before = read_metrics(folder / "metrics.jsonl")
    assert call("train", "--resume", folder / "checkpoint-00000001")[0] == 0
    after = read_metrics(folder / "metrics.jsonl")
    assert [without_times(line) for line in after] == [without_times(line) for line in before]


@pytest.mark.parametrize(
    "words",
    [
        "--memory no_memory",
        "--data sotu",
        "--out x",
        "--tokenizer x",
        "--set model.dropout=0.5",
        "--set data.source=sotu",
        "--set twin=false",
        "--set train.seed=3",
        "--set train.batch_size=9",
    ],
)
def test_resuming_changes_nothing_that_the_run_was_started_with(words, tiny_run, refused):
    meant = words.rpartition("=")[0] or words.split()[0]
    assert meant in refused("train", "--resume", tiny_run, *words.split())


@pytest.mark.parametrize("damaged", ["[1]", "[]", "{}", '{"steps": 2, "rows": []}', '"x"', "{"])
def test_damaged_results_are_said_so(damaged, tiny_run, refused, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "results.json").write_text(damaged)
    assert "results.json is damaged" in refused("train", "--resume", folder)


@pytest.mark.parametrize(
    ("config", "meant"),
    [
        ("[1]", "config.json is damaged"),
        ('{"train": 3, "recipe": {}}', "config.json is damaged"),
        ('{"recipe": {"model": 3}}', "model must be a section"),
        ('{"recipe": {"data": {"sauce": "x"}}}', "did you mean 'source'"),
        ("{}", "everlong.training.loop.train(..., resume="),
    ],
)
def test_a_run_that_this_command_did_not_start_is_said_so(
    config, meant, tiny_run, refused, tmp_path
):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "config.json").write_text(config)
    assert meant in refused("train", "--resume", folder)


def test_a_run_of_the_library_has_no_text_of_its_own(tiny_run, refused, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    del config["recipe"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "give --text" in refused("evaluate", folder)


def test_the_end_of_a_training_reads_texts_by_slices(monkeypatch):
    ids = np.arange(70_000) % 251
    document = Document("long", ids, 0, len(ids), len(ids))
    asked, read = [], Document._read

    def watched(self, start, count):
        asked.append(count)
        return read(self, start, count)

    monkeypatch.setattr(Document, "_read", watched)
    texts = Texts(Documents("long", (document,)), Documents("long", (document,)))
    blocks = final._blocks(torch.nn.Linear(1, 1), texts, 7)
    found = torch.cat([next(blocks)[0] for _ in range(20_010)])
    wanted = [256, *ids.tolist()] * 3
    assert found.tolist() == wanted[: len(found)]
    assert max(asked) <= final._SLICE < len(ids)


def test_the_passage_continued_is_all_that_is_read_of_the_text(tiny_run, call, monkeypatch, capsys):
    text = np.frombuffer(b"whale " * 5000, np.uint8)
    document = Document("long", text, 0, len(text), len(text))
    asked = []
    monkeypatch.setattr(
        Document, "_read", lambda self, start, count: asked.append(count) or text[start:][:count]
    )
    monkeypatch.setattr(final, "_PASSAGE", 40)
    monkeypatch.setattr(final, "_CONTINUED", 3)
    texts = Texts(Documents("long", (document,)), Documents("long", (document,)))
    final.continue_passage(open_run(tiny_run).model, texts)
    assert asked == [40]
    assert "whale whale" in capsys.readouterr().out


def test_a_recipe_and_resume_exclude_each_other(tiny_run, refused):
    assert "RECIPE" in refused("train", "smoke", "--resume", tiny_run)


def test_a_folder_with_a_run_in_it_is_left_alone(tiny_run, call):
    before = sorted(tiny_run.rglob("*"))
    code, out, err = call("train", "smoke", "--out", tiny_run, *ARGUMENTS)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("everlong: ")
    assert "holds a run already" in err
    assert sorted(tiny_run.rglob("*")) == before


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("train", "smoke", "--dry-run", *ARGUMENTS)
    assert (code, err) == (0, "")
    found = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert found["device"] == "cpu"
    assert found["tokens a step"].startswith("32 (2 rows x 2 segments x 8)")
    assert int(found["parameters"].replace(",", "")) > 1000
    assert "memory for training" in out
    assert list(tmp_path.iterdir()) == []


def test_a_text_of_ones_own_in_any_bytes(call, briefly, tmp_path):
    (tmp_path / "texts").mkdir()
    for name, data in (("a", bytes(range(256)) * 4), ("b", b"\xff\xfe" * 300), ("c", b"x" * 500)):
        (tmp_path / "texts" / name).write_bytes(data)
    code, _, err = call(
        "train", "smoke", "--data", tmp_path / "texts", "--out", tmp_path / "run", *ARGUMENTS
    )
    assert code == 0, err
    assert "1,624 bytes" in err  # the last of fewer than ten documents is held out


def test_a_run_goes_on_from_another_folder_than_it_was_started_in(
    call, briefly, tmp_path, monkeypatch
):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert call("train", "smoke", "--data", "text", "--out", "run", *ARGUMENTS)[0] == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = call("train", "--resume", "../run", "--set", "train.steps=3")
    assert code == 0, err


def test_an_empty_text_is_refused(refused, tmp_path):
    (tmp_path / "empty").touch()
    assert "is empty" in refused("train", "smoke", "--data", tmp_path / "empty")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small tokenizer of words, without an unknown token for most of Unicode."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=special)
    raw.train_from_iterator(["the whale and the sea and the ship"], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    return folder


def test_a_tokenizer_of_ones_own(call, briefly, tmp_path, tokenizer):
    text = tmp_path / "text"
    text.write_text("the whale and the sea and the ship " * 200)
    words = ["--data", text, "--tokenizer", tokenizer, "--out", tmp_path / "run"]
    code, out, err = call("train", "smoke", *words, *ARGUMENTS, *sets("data.validation=0.1"))
    assert code == 0, err
    score = call("evaluate", tmp_path / "run")
    assert score[0] == 0
    code, out, err = call("generate", tmp_path / "run", "--prompt", "the", "--max-new-tokens", 4)
    assert code == 0, err
    assert set(out) <= set("the whale and the sea and the ship\n")


def test_a_text_the_tokenizer_cannot_encode_is_refused(refused, tmp_path, tokenizer):
    text = tmp_path / "text"
    text.write_text("the whale ☃ and the sea " * 50)
    line = refused("train", "smoke", "--data", text, "--tokenizer", tokenizer)
    assert "cannot encode" in line


def test_a_memory_by_name(call, briefly, tmp_path):
    words = ["train", "smoke", "--memory", "sliding_attention", "--out", tmp_path / "run"]
    code, out, err = call(*words, *sets(*TINY, "model.mixers.sliding_attention.window=8"))
    assert code == 0, err
    assert out.splitlines()[1].startswith("sliding_attention")


def test_an_unbounded_memory_is_said_to_grow(call, briefly, tmp_path):
    words = ["train", "smoke", "--memory", "attention", "--out", tmp_path / "run"]
    code, out, err = call(*words, *sets(*TINY, "twin=false"))
    assert code == 0, err
    assert "grows" in out.splitlines()[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_a_checkpoint_and_the_command_that_goes_on(
    number, code, tmp_path, call, briefly
):
    command = [sys.executable, "-m", "everlong", "train", "smoke", "--out", "run", *ARGUMENTS]
    command += sets("train.steps=100000", "train.eval_every=0", "train.checkpoint_every=0")
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("training: 1/"):
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "everlong train --resume run" in err
    assert "Traceback" not in err
    step = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    done, _, err = call("train", "--resume", tmp_path / "run", "--set", f"train.steps={step + 1}")
    assert done == 0, err
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step + 1


@pytest.mark.parametrize("change", ["model.segment.num_slotz=4", "model.segment.name=memformer"])
def test_a_change_that_the_memory_drops_is_refused(refused, change):
    error = refused("train", "smoke", "--dry-run", "--memory", "attention", "--set", change)
    assert f"--set {change} means nothing with --memory attention" in error
