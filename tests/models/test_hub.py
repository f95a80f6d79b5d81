"""The model class: its forward, its score, its files."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import everlong
from everlong import state as states
from everlong.models.decoders import CACHE_NAME
from everlong.models.hub import EverlongForCausalLM
from everlong.models.tokenizer import byte_tokenizer
from models.hub_models import (
    UNBOUNDED,
    close,
    every_model,
    left_padded,
    make_config,
    make_model,
    tokens,
)


@pytest.fixture
def model():
    return make_model("memformer")


# forward


@every_model
def test_forward_is_stream(name):
    model, (ids, mask) = make_model(name), left_padded([9, 4])
    logits, state = model.stream(ids, mask=mask)
    out = model(ids, attention_mask=mask)
    close(out.logits, logits)
    assert all(map(torch.equal, states.leaves(out[CACHE_NAME].state), states.leaves(state)))
    first = model(ids[:, :5], attention_mask=mask[:, :5])
    second = model(ids[:, 5:], attention_mask=mask, cache=first[CACHE_NAME])
    close(torch.cat([first.logits, second.logits], 1), logits)


def test_the_loss_shifts_its_labels(model):
    ids = tokens(2, 7)
    labels = ids.clone()
    labels[0, 4:] = -100
    loss = model(ids, labels=labels).loss
    logits = model.stream(ids)[0]
    close(loss, F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:]))
    half = model(ids, labels=labels, num_items_in_batch=torch.tensor(18)).loss
    close(half, loss / 2)  # 9 labels are predicted
    loss.backward()
    missing = [name for name, each in model.named_parameters() if each.grad is None]
    assert missing == []


def test_the_loss_of_a_padded_row_is_that_of_the_row(model):
    ids, labels = tokens(1, 7), tokens(1, 7)
    expected = model(ids, labels=labels).loss
    for left, right in ((3, 0), (0, 2), (2, 2)):
        mask = F.pad(torch.ones(1, 7, dtype=torch.long), (left, right))
        padded = F.pad(ids, (left, right)), F.pad(labels, (left, right), value=-100)
        found = {}
        for items in (None, torch.tensor(7)):  # labels of the row, as a trainer counts them
            given = {"attention_mask": mask, "labels": padded[1], "num_items_in_batch": items}
            found[items is None] = model(padded[0], **given).loss
        close(found[True], expected)
        close(found[False], expected * (7 if left else 6) / 7)


def test_only_the_wanted_logits_are_made(model):
    ids = tokens(2, 7)
    logits = model(ids).logits
    close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])


def test_without_a_cache_none_is_returned_or_moved(model):
    ids = tokens(1, 5)
    assert model(ids, use_cache=False).get(CACHE_NAME) is None
    cache = model(ids)[CACHE_NAME]
    out = model(tokens(1, 3, seed=1), cache=cache, use_cache=False)
    assert (out.get(CACHE_NAME), cache.get_seq_length()) == (None, 5)
    logits, _ = model(ids, return_dict=False)
    close(logits, model(ids).logits)


def test_the_cache_goes_by_its_old_name_too(model):
    """transformers renamed it: what was written before goes on."""
    ids, more = tokens(1, 5), tokens(1, 3, seed=1)
    wanted = model(more, cache=model(ids)[CACHE_NAME]).logits
    close(model(more, past_key_values=model(ids).past_key_values).logits, wanted)
    cache = model(ids)[CACHE_NAME]
    with pytest.raises(ValueError, match="give one of them"):
        model(more, cache=cache, past_key_values=cache)


def test_a_trainer_collects_the_logits_alone(model):
    """It takes the keys to ignore out of the output and holds what is left of every batch."""
    out = model(tokens(1, 5), labels=tokens(1, 5))
    assert set(out) - set(model.config.keys_to_ignore_at_inference) == {"loss", "logits"}


def test_a_trace_sees_inside(model):
    trace = everlong.Trace()
    close(model(tokens(1, 9), trace=trace).logits, model(tokens(1, 9)).logits)
    assert trace.records


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "exactly one of them"),
        ({"input_ids": tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 24)}, "exactly one"),
        ({"input_ids": tokens(1, 3), "attention_mask": torch.ones(1, 2)}, "3 columns"),
        ({"input_ids": tokens(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)}, "3 columns"),
        ({"input_ids": tokens(1, 3), "position_ids": torch.arange(3)}, "counted by the state"),
        ({"input_ids": tokens(1, 3), "token_type_ids": torch.zeros(1, 3)}, "leave it out"),
        ({"input_ids": tokens(1, 3), "output_attentions": True}, "trace=everlong.Trace"),
    ],
)
def test_what_forward_cannot_do_is_refused(model, given_, message):
    with pytest.raises(ValueError, match=message):
        model(**given_)


# score


@every_model
@given(
    cuts=st.sets(st.integers(1, 12), max_size=4),
    holes=st.lists(st.booleans(), min_size=26, max_size=26),
    at=st.integers(0, 12),
)
def test_any_cut_of_a_stream_scores_alike(name, cuts, holes, at):
    """With masked positions, and a reset of row 1 before column `at`."""
    model, ids = make_model(name), tokens(2, 13)
    mask = torch.tensor(holes).view(2, 13)
    wanted = torch.zeros(2, 13, dtype=torch.float64)
    with torch.no_grad():
        for row, spans in enumerate([[(0, 13)], [(0, at), (at, 13)]]):
            for begin, end in spans:
                places = begin + mask[row, begin:end].nonzero().flatten()
                if len(places) > 1:
                    seen = ids[row : row + 1, places]
                    logits = model.stream(seen[:, :-1])[0].log_softmax(-1)
                    wanted[row, places[1:]] = logits.gather(-1, seen[:, 1:, None])[0, :, 0]
        found, state, edges = [], None, sorted({0, at, *cuts, 13})
        for begin, end in itertools.pairwise(edges):
            if begin == at and state is not None:
                state = model.reset(state, torch.tensor([False, True]))
            piece, state = model.score(ids[:, begin:end], state, mask[:, begin:end])
            found.append(piece)
    close(torch.cat(found, 1), wanted)
    fresh = model.init_score_state(2)
    if name not in UNBOUNDED:
        assert states.num_bytes(state) == states.num_bytes(fresh)
    assert states.flatten(state).keys() == states.flatten(fresh).keys()


def test_a_masked_row_keeps_its_score_state(model):
    _, state = model.score(tokens(2, 6))
    junk = torch.full((2, 3), 10**6)
    none = torch.tensor([[True, True, True], [False, False, False]])
    log_probs, after = model.score(torch.where(none, tokens(2, 3), junk), state, none)
    assert log_probs[1].tolist() == [0, 0, 0]
    for new, old in zip(states.leaves(after), states.leaves(state), strict=True):
        assert torch.equal(new[1], old[1])


def test_score_wants_its_own_state(model):
    _, state = model.stream(tokens(1, 3))
    with pytest.raises(ValueError, match="init_score_state"):
        model.score(tokens(1, 3), state)


@every_model
def test_advance_is_stream_without_logits(name):
    model, (ids, mask) = make_model(name), left_padded([8, 8])
    state = model.advance(ids)
    close(
        *(
            torch.cat([each.flatten() for each in states.leaves(s) if each.is_floating_point()])
            for s in (state, model.stream(ids)[1])
        )
    )
    close(model.body_stream(ids, mask=mask)[0] @ model.lm_head.weight.T, model.stream(ids)[0])
    assert model.period == model.body.period


# files


@every_model
@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_changes_nothing(name, tied, tmp_path):
    model = make_model(name, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    kinds = {path.suffix for path in tmp_path.iterdir()}
    assert kinds == {".json", ".safetensors", ".md", ".py"}
    generator = torch.random.get_rng_state()
    loaded, info = EverlongForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(torch.random.get_rng_state(), generator), "nothing was initialised again"
    assert not any(info.values())
    assert loaded.dtype == torch.float64
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    for (key, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    ids = tokens(2, 11)
    close(loaded(ids).logits, model(ids).logits)  # a file's tensors are aligned otherwise in memory


def test_building_keeps_each_modules_own_initialisation():
    config = make_config("memformer", hidden_size=48)
    torch.manual_seed(0)
    model = EverlongForCausalLM(config)
    torch.manual_seed(0)
    body = everlong.models.decoder.build_body(config)
    for (key, a), b in zip(
        model.body.state_dict().items(), body.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key


def test_what_a_checkpoint_lacks_is_built_afresh(tmp_path):
    model = make_model("memformer", hidden_size=48)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    lacking = "body.core.writer.bias"
    kept = weights.pop(lacking)
    save_file(weights, path, {"format": "pt"})
    loaded, info = EverlongForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {lacking}
    found = loaded.get_parameter(lacking)
    assert not torch.equal(found, kept)
    lengths = [each.norm(dim=1).mean().item() for each in (found, kept)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.3), "random, and of the right size"
    for key, weight in weights.items():
        assert torch.equal(loaded.state_dict()[key], weight), key


def test_buffers_outside_the_file_survive_loading(tmp_path, monkeypatch):
    """transformers builds without memory and leaves non-persistent buffers empty."""
    build = everlong.models.hub.build_body

    def with_buffer(config):
        body = build(config)
        body.register_buffer("table", torch.arange(5.0), persistent=False)
        return body

    monkeypatch.setattr("everlong.models.hub.build_body", with_buffer)
    make_model("memformer").float().save_pretrained(tmp_path)
    loaded = EverlongForCausalLM.from_pretrained(tmp_path)
    assert loaded.body.table.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.supports("bfloat16 files")
@every_model
def test_bfloat16_loads_and_keeps_exact_accumulators(name, tmp_path):
    model = make_model(name).float()
    model.save_pretrained(tmp_path)
    half = EverlongForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {each.dtype for each in half.parameters()} == {torch.bfloat16}
    ids = tokens(2, 11)
    out = half(ids)
    wanted = model(ids).logits
    assert (out.logits.float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    held = states.flatten(out[CACHE_NAME].state)
    slots = {key: each.dtype for key, each in held.items() if key.endswith("slots")}
    assert set(slots.values()) <= {torch.float32}
    assert slots or "segment" not in held
    log_probs, state = half.score(ids)
    assert log_probs.dtype == torch.float32
    _, again = half.score(ids, state)
    assert {key: (each.dtype, each.shape[2:]) for key, each in states.flatten(state).items()} == {
        key: (each.dtype, each.shape[2:]) for key, each in states.flatten(again).items()
    }
    assert half.generate(ids, max_new_tokens=3).shape == (2, 14)


def test_the_vocabulary_can_grow(model):
    model.resize_token_embeddings(25)
    ids = torch.tensor([[24, 20, 3]])
    assert model(ids).logits.shape == (1, 3, 25)
    assert model.config.vocab_size == 25


def test_a_config_is_checked_when_the_model_is_built():
    config = make_config("memformer")
    config.segment = {"name": "memformer", "slots": 3}
    with pytest.raises(ValueError, match="did you mean 'num_slots'"):
        EverlongForCausalLM(config)


_FRESH = """
import json, sys
import everlong.auto
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

folder, text = sys.argv[1:]
config = AutoConfig.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
batch = tokenizer([text, text[:3]], padding=True, return_tensors="pt")
generated = model.generate(**batch, max_new_tokens=6, do_sample=False)
said = pipeline("text-generation", model=folder, device="cpu")(
    text, max_new_tokens=6, do_sample=False, return_full_text=False
)
print(json.dumps({
    "config": [type(config).__name__, config.segment],
    "ids": batch.input_ids.tolist(),
    "logits": model(batch.input_ids, attention_mask=batch.attention_mask).logits.tolist(),
    "generated": generated[:, batch.input_ids.shape[1]:].tolist(),
    "said": said[0]["generated_text"],
}))
"""


def test_a_folder_works_in_a_fresh_process_with_one_import(tmp_path):
    """Offline, with warnings as errors, and without running the code in the folder."""
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    model = make_model("memformer", vocab_size=259, **ids).float()
    tokenizer = byte_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "Call me Ishmæl"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _FRESH, str(tmp_path), text],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "not supported" not in done.stderr, "the pipeline must know the class"
    assert "LOAD REPORT" not in done.stderr, "every weight must be found"
    found = json.loads(done.stdout.splitlines()[-1])
    batch = tokenizer([text, text[:3]], padding=True, return_tensors="pt")
    assert found["config"] == ["EverlongConfig", model.config.segment]
    assert found["ids"] == batch.input_ids.tolist()
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), logits)
    generated = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert found["generated"] == generated[:, batch.input_ids.shape[1] :].tolist()
    assert found["said"] == tokenizer.decode(found["generated"][0], skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_an_adapter_learns_and_generates(model):
    """LoRA of peft on ours: module names are plain, keyword arguments pass through."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["qkv", "up"], r=2)
    )
    ids = tokens(2, 6)
    adapted(input_ids=ids, labels=ids).loss.backward()
    learned = [name for name, each in adapted.named_parameters() if each.grad is not None]
    assert learned
    assert all("lora_" in name for name in learned)
    assert adapted.generate(input_ids=ids, max_new_tokens=3).shape == (2, 9)
