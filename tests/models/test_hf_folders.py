"""Saved folders: what a process that never heard of us makes of them, and what they say."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import everlong
import everlong.auto
from everlong import state as states
from everlong.models import card
from everlong.models.tokenizer import byte_tokenizer
from models.backbones import make_backbone
from models.hub_models import SHAPES, close, make_config, make_model, tokens

FILES = {"README.md", "config.json", "everlong_auto.py", "generation_config.json"}
FILES |= {"model.safetensors"}
BYTES = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def extended():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return everlong.extend(make_backbone("llama"), "rmt", segment_length=4, num_slots=2)


_FRESH = """
import contextlib, io, json, os, re, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
own, other, again = sys.argv[1:]
found = {}
try:
    with contextlib.redirect_stdout(io.StringIO()):
        AutoModelForCausalLM.from_pretrained(own)
except ValueError as error:
    found["refused"] = str(error)
assert "everlong" not in sys.modules
trust = {"trust_remote_code": True}
for name, folder in (("own", own), ("other", other)):
    config = AutoConfig.from_pretrained(folder, **trust)
    model = AutoModelForCausalLM.from_pretrained(folder, **trust)
    ids = model.dummy_inputs["input_ids"] % 19
    found[name] = [type(config).__module__, type(model).__module__, model(ids).logits.tolist()]
    model.save_pretrained(again)
    rebuilt = AutoModelForCausalLM.from_config(config, **trust)
    found[name] += [sorted(os.listdir(again)), type(rebuilt).__name__]
speak = pipeline("text-generation", model=own, device="cpu", **trust)
options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
found["said"] = speak("Call me", **options)[0]["generated_text"]
tokenizer = AutoTokenizer.from_pretrained(own)
ids = tokenizer("Call me", return_tensors="pt").input_ids
model = AutoModelForCausalLM.from_pretrained(own, **trust)
found["ids"] = model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
for folder in (own, other):
    os.chdir(folder)
    exec(re.search(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL)[1], {})
print(json.dumps(found))
"""


def test_folders_work_in_a_process_that_imports_nothing_of_ours(tmp_path):
    """With `trust_remote_code=True` alone, models of both kinds; what they save works again."""
    own, other = make_model("memformer", **BYTES).float(), extended()
    folders = [tmp_path / name for name in ("own", "other", "again")]
    own.save_pretrained(folders[0])
    byte_tokenizer().save_pretrained(folders[0])
    other.save_pretrained(folders[1])
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _FRESH, *map(str, folders)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment, "TRANSFORMERS_VERBOSITY": "warning"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "LOAD REPORT" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "trust_remote_code=True" in found["refused"]
    for name, model, home in (("own", own, "hub"), ("other", other, "wrap")):
        config, module, logits, files, rebuilt = found[name]
        assert config.startswith("everlong.models.")
        assert module == f"everlong.models.{home}"
        assert set(files) == FILES, "no copies of our modules"
        assert rebuilt == type(model).__name__
        wanted = model.eval()(model.dummy_inputs["input_ids"] % 19).logits
        torch.testing.assert_close(torch.tensor(logits), wanted, rtol=0, atol=1e-5)
    ids = byte_tokenizer()("Call me", return_tensors="pt").input_ids
    wanted = own.generate(ids, max_new_tokens=6, do_sample=False)
    assert found["ids"] == wanted.tolist()
    assert found["said"] == byte_tokenizer().decode(wanted[0, ids.shape[1] :])


# model cards


@pytest.mark.parametrize("name", SHAPES)
def test_a_card_tells_what_the_state_costs(name):
    """For every memory: valid metadata, bytes after 3 and 30 tokens, or that it grows."""
    model = make_model(name)
    page = ModelCard(card.text(model))
    memory = name.split(",")[0]
    assert page.data.library_name == "everlong"
    assert page.data.pipeline_tag == "text-generation"
    assert page.data.tags == ["everlong", memory]
    size = int(re.search(r"state of a stream \| ([\d,]+) bytes", page.text)[1].replace(",", ""))
    with torch.no_grad():
        sizes = {states.num_bytes(model.stream(tokens(1, count))[1]) for count in (3, 30)}
    if "(bounded)" in page.text:
        assert sizes == {size}
    else:
        assert f"{memory} grows with every token" in page.text
        assert max(sizes) > size
    assert everlong.registry.memory_entry(memory).keeps in page.text
    assert f"| parameters | {model.num_parameters():,}" in page.text


def test_a_card_names_layers_bases_and_protocols():
    config = make_config("memformer", segment=None, layers=["gla", "attention"], num_layers=2)
    text = card.text(everlong.EverlongForCausalLM(config))
    assert "# A language model with `gla` and `attention`" in text
    assert "attention grows with every token" in text
    text = card.text(extended())
    assert "| layers | `LlamaForCausalLM` |" in text
    assert "of them trained" in text
    published = {"name": "hmt", "segment_length": 4, "recall_size": 3, "protocol": "published"}
    for protocol, said in (("causal", False), ("published", True)):
        config = make_config("hmt", segment={**published, "protocol": protocol})
        text = card.text(everlong.EverlongForCausalLM(config))
        assert ("depend on later tokens" in text) is said


def test_a_card_of_ones_own_stays(tmp_path):
    model = make_model("memformer")
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert (tmp_path / "README.md").read_text() == "mine"
    quiet = tmp_path / "quiet"
    model.save_pretrained(quiet, is_main_process=False)
    assert not (quiet / "README.md").exists()


# device maps


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(where, tmp_path):
    for model, name in ((make_model("memformer").float(), "own"), (extended().eval(), "other")):
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, device_map=where)
        assert type(loaded) is type(model)
        ids = tokens(2, 9)
        close(loaded(ids).logits, model(ids).logits)
        wanted = {key: each.requires_grad for key, each in model.named_parameters()}
        assert {key: each.requires_grad for key, each in loaded.named_parameters()} == wanted
        steps = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(loaded.generate(ids, **steps), model.generate(ids, **steps))


@pytest.mark.filterwarnings("ignore")  # of the other packages that write to the disk
def test_a_map_that_offloads_is_refused(tmp_path):
    make_model("memformer").float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='such as device_map="cpu"'):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "off"
        )
