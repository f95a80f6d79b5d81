"""The text tasks as tasks of lm-eval: its files parse, and its client finds what ours finds."""

import warnings
from pathlib import Path

import pytest
import torch
import yaml

from everlong import EverlongConfig
from everlong.evaluation.codec import Codec
from everlong.evaluation.lm_eval import __main__, functions, items, tasks_path
from everlong.evaluation.suite import Asked, measure
from everlong.models.hub import EverlongForCausalLM
from everlong.models.tokenizer import byte_tokenizer
from everlong.tasks.questions import list_tasks, text_task

FILES = sorted(Path(tasks_path()).glob("*.yaml"))


class Loader(yaml.SafeLoader):
    """lm-eval's functions by their names."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_every_task_has_a_file_and_names_functions_that_are_there():
    found = {}
    for file in FILES:
        told = yaml.load(file.read_text(), Loader)
        shared = yaml.load((file.parent / told.pop("include")).read_text(), Loader)
        whole = shared | told
        assert set(text_task(told["dataset_kwargs"]["everlong_task"]).groups)
        for key in ("custom_dataset", "process_results"):
            module, name = whole[key].split(".")
            assert module == "functions"
            assert callable(getattr(functions, name))
        (document,) = items(told["dataset_kwargs"]["everlong_task"], (900,), 1)
        for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            assert whole.get(key, "prompt") in document
        found[told["task"]] = told["dataset_kwargs"]["everlong_task"]
    assert found == {f"everlong_{name}": name for name in list_tasks()} | {
        f"everlong_{name}_choice": name
        for name in list_tasks()
        if len(text_task(name).item(900, 0, 0).answers) == 1
    }


def test_documents_are_the_items_of_everlong_evaluate(caplog):
    found = items("updates", [64, 900], 12, seed=3)
    assert "everlong_updates: length 64 is missing, it needs" in caplog.text
    assert [document["length"] for document in found] == [900] * 12
    for index, document in enumerate(found):
        item = text_task("updates").item(899, 3, index)
        assert document["prompt"] == item.prompt
        assert document["candidates"][document["label"]] == document["target"] == item.answers[0]
    assert found == items("updates", [900], 12, seed=3) != items("updates", [900], 12, seed=4)
    words = items("passkey", [150], 1, count=lambda text: len(text.split()))
    assert 130 < len(words[0]["prompt"].split()) < 150
    with pytest.raises(ValueError, match="no item of updates fits into lengths .64.: it needs"):
        items("updates", [64], 12)


def test_scores_have_the_name_of_their_length():
    document = {"answers": ["12", "34"], "label": 1, "length": 512}
    assert functions.exact_match(document, [" 34, 12"]) == {
        "exact_match": 1.0,
        "exact_match@512": 1.0,
    }
    assert functions.exact_match(document, [" 34"])["exact_match"] == 0
    for nats, right in (((-2.0, -1.0, -3.0), 1.0), ((-1.0, -1.0, -3.0), 0.0)):
        scored = functions.accuracy(document, [(each, False) for each in nats])
        assert scored == {"acc": right, "acc@512": right}


def test_the_command_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.__main__", None)
    assert __main__.main() == 2
    assert "pip install 'everlong[eval]'" in capsys.readouterr().err


def test_the_client_finds_what_everlong_evaluate_finds():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what lm-eval imports
        pytest.importorskip("lm_eval", reason="needs the extra eval: pip install 'everlong[eval]'")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        torch.manual_seed(0)
        segment = {"name": "memformer", "segment_length": 16, "num_slots": 2}
        model = EverlongForCausalLM(
            EverlongConfig(hidden_size=16, num_heads=2, num_layers=1, segment=segment)
        ).eval()
        metadata = {"lengths": [64, 230, 320], "samples": 8, "seed": 2}
        manager = TaskManager(include_path=tasks_path(), include_defaults=False, metadata=metadata)
        found = simple_evaluate(
            model=HFLM(
                pretrained=model, tokenizer=byte_tokenizer(), backend="causal", max_length=1024
            ),
            tasks=["everlong_needle_single_choice", "everlong_needle_single"],
            task_manager=manager,
            batch_size=4,
            bootstrap_iters=0,
            log_samples=False,
        )
    rows = {
        row["length"]: row
        for row in measure(model, Codec(), "needle_single", Asked((64, 230, 320), 8, 2))
        if row["group"] is None
    }
    chosen = found["results"]["everlong_needle_single_choice"]
    said = found["results"]["everlong_needle_single"]
    assert "missing" in rows[64]
    assert not any("@64" in key for key in (*chosen, *said))
    for length in (230, 320):
        assert chosen[f"acc@{length},none"] == rows[length]["ranked"]
        assert said[f"exact_match@{length},none"] == rows[length]["exact"]
    assert 0 < chosen["acc,none"] < 1
