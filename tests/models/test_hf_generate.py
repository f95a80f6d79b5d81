"""Every option of generate: it says with the state what it says without, or it is refused."""

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    WatermarkingConfig,
)

import everlong
from everlong.models.tokenizer import byte_tokenizer
from models.hub_models import close, make_model

STEPS, EOS, PAD = 7, 257, 258
SIZES = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": EOS, "pad_token_id": PAD}
TOKENIZER = byte_tokenizer()
PROMPT = TOKENIZER(["Call me", "Ishmael"], return_tensors="pt").input_ids


def llama():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(**SIZES, **sizes, num_attention_heads=3)).eval()


def extended():
    torch.manual_seed(2)
    model = everlong.extend(llama().double(), "rmt", segment_length=4, num_slots=2)
    with torch.no_grad():
        model.lm_head.weight.normal_()
    return model


@pytest.fixture(scope="module", params=["memformer", "extended"])
def model(request):
    if request.param == "extended":
        return extended()
    return make_model("memformer", **SIZES)


@pytest.fixture(scope="module")
def plain(model):
    """Greedy without any option: what an option must change."""
    return said(run(model, {}))


def run(model, options, **more):
    """Greedy with a seed, logits returned, unless the options say otherwise."""
    torch.manual_seed(5)
    usual = {"inputs": PROMPT, "max_new_tokens": STEPS, "do_sample": False}
    usual |= {"return_dict_in_generate": True, "output_scores": True}
    options = {**usual, **options, **more}
    options.setdefault("attention_mask", torch.ones_like(options["inputs"]))
    return model.generate(**options)


def said(result):
    """What was said behind the prompt, a list of ids a row, padding left out."""
    length = PROMPT.shape[1]
    return [[t for t in row if t != PAD] for row in result.sequences[:, length:].tolist()]


def repeated(rows):
    return any(len(set(row)) < len(row) for row in rows)


class Only(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[1]) != 66, -torch.inf)


class After(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        stop = input_ids.shape[1] >= PROMPT.shape[1] + 3
        return torch.full((len(input_ids),), stop)


SAMPLE, BEAMS = {"do_sample": True}, {"num_beams": 3}
SHORT = {"eos_token_id": list(range(0, 259, 2))}  # half of all tokens end a row
# by option: what is given, and what then holds of what is said (a: with it, b: greedy without)
WORKS = {
    "max_length": ({"max_length": 12, "max_new_tokens": None}, lambda a, b: len(a[0]) == 4),
    "max_new_tokens": ({"max_new_tokens": 3}, lambda a, b: a == [row[:3] for row in b]),
    "min_length": ({**SHORT, "min_length": 11}, lambda a, b: min(map(len, a)) >= 4),
    "min_new_tokens": ({**SHORT, "min_new_tokens": 5}, lambda a, b: min(map(len, a)) >= 5),
    "early_stopping": ({**BEAMS, **SHORT, "early_stopping": True}, lambda a, b: a != b),
    "max_time": ({"max_time": 1e-9}, lambda a, b: a == [row[:1] for row in b]),
    "num_beams": (BEAMS, lambda a, b: len(a) == 2),
    "length_penalty": ({**BEAMS, **SHORT, "length_penalty": -5.0}, lambda a, b: len(a[0]) == 1),
    "do_sample": (SAMPLE, lambda a, b: a != b),
    "temperature": ({**SAMPLE, "temperature": 1e-4}, lambda a, b: a == b),
    "top_k": ({**SAMPLE, "top_k": 1}, lambda a, b: a == b),
    "top_p": ({**SAMPLE, "top_p": 1e-6}, lambda a, b: a == b),
    "min_p": ({**SAMPLE, "min_p": 1.0}, lambda a, b: a == b),
    "top_h": ({**SAMPLE, "top_h": 1e-6}, lambda a, b: a == b),
    "typical_p": ({**SAMPLE, "typical_p": 0.2}, lambda a, b: a != b),
    "epsilon_cutoff": ({**SAMPLE, "epsilon_cutoff": 0.9}, lambda a, b: a == b),
    "eta_cutoff": ({**SAMPLE, "eta_cutoff": 0.9}, lambda a, b: a != b),
    "renormalize_logits": ({**SAMPLE, "renormalize_logits": True}, lambda a, b: a != b),
    "repetition_penalty": ({"repetition_penalty": 1e6}, lambda a, b: not repeated(a)),
    "encoder_repetition_penalty": (
        {"encoder_repetition_penalty": 1e6},
        lambda a, b: set(a[0]) <= set(PROMPT[0].tolist()),
    ),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 1}, lambda a, b: not repeated(a)),
    "encoder_no_repeat_ngram_size": (
        {"encoder_no_repeat_ngram_size": 1},
        lambda a, b: not set(a[0]) & set(PROMPT[0].tolist()),
    ),
    "bad_words_ids": ({"bad_words_ids": [[i] for i in range(99)]}, lambda a, b: min(a[0]) >= 99),
    "suppress_tokens": ({"suppress_tokens": list(range(99))}, lambda a, b: min(a[0]) >= 99),
    "begin_suppress_tokens": (
        {"begin_suppress_tokens": list(range(99))},
        lambda a, b: a[0][0] >= 99,
    ),
    "sequence_bias": ({"sequence_bias": {(7,): 1e6}}, lambda a, b: a[0] == [7] * STEPS),
    "forced_bos_token_id": (
        {"forced_bos_token_id": 9, "inputs": PROMPT[:, :1], "max_new_tokens": STEPS + 7},
        lambda a, b: a != b,
    ),
    "forced_eos_token_id": ({"forced_eos_token_id": EOS}, lambda a, b: a[0][-1] == EOS),
    "exponential_decay_length_penalty": (
        {"exponential_decay_length_penalty": (2, 1e6)},
        lambda a, b: [row.index(EOS) for row in a] == [3, 3],
    ),
    "remove_invalid_values": ({"remove_invalid_values": True}, lambda a, b: a == b),
    "guidance_scale": ({"guidance_scale": 9.0}, lambda a, b: a != b),
    "negative_prompt_ids": (
        {"guidance_scale": 9.0, "negative_prompt_ids": PROMPT[:, :3]},
        lambda a, b: a != b,
    ),
    "watermarking_config": (
        {"watermarking_config": WatermarkingConfig(bias=1e4)},
        lambda a, b: a != b,
    ),
    "watermarking_config, SynthID": (
        {**SAMPLE, "watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2], ngram_len=3)},
        lambda a, b: a != b,
    ),
    "num_return_sequences": ({**SAMPLE, "num_return_sequences": 3}, lambda a, b: len(a) == 6),
    "num_return_sequences, beams": (
        {**BEAMS, **SAMPLE, "num_return_sequences": 2},
        lambda a, b: len(a) == 4 and a[0] != a[1],
    ),
    "eos_token_id": (SHORT, lambda a, b: all(row[-1] % 2 == 0 or len(row) == STEPS for row in a)),
    "stop_strings": (
        {"stop_strings": [chr(c) for c in range(32, 127)], "tokenizer": TOKENIZER},
        lambda a, b: any(len(x) < len(y) and x == y[: len(x)] for x, y in zip(a, b, strict=True)),
    ),
    "token_healing": (
        {"token_healing": True, "tokenizer": TOKENIZER},
        lambda a, b: len(a) == 2,
    ),
    "stopping_criteria": (
        {"stopping_criteria": StoppingCriteriaList([After()])},
        lambda a, b: a == [row[:3] for row in b],
    ),
    "logits_processor": (
        {"logits_processor": LogitsProcessorList([Only()])},
        lambda a, b: a == [[66] * STEPS] * 2,
    ),
    "prefix_allowed_tokens_fn": (
        {"prefix_allowed_tokens_fn": lambda row, _: [5 + row]},
        lambda a, b: a == [[5] * STEPS, [6] * STEPS],
    ),
    "disable_compile": ({"disable_compile": True}, lambda a, b: a == b),
    "prefill_chunk_size": ({"prefill_chunk_size": 3}, lambda a, b: a == b),
    "cache_implementation": ({"cache_implementation": "dynamic"}, lambda a, b: a == b),
    "output_logits": ({"output_logits": True}, lambda a, b: a == b),
}
# by option: what is given, and a part of what is said to it
ASSISTED = "not supported with stateful models"
ELSEWHERE = "requires `trust_remote_code=True`"  # transformers keeps these in repositories
SMALL = "its state is already as small as its memory makes it"
REFUSED = {
    "assistant_model": ({"assistant_model": llama}, ASSISTED),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 2}, ASSISTED),
    "assistant_early_exit": ({"assistant_early_exit": 1}, ASSISTED),
    "use_mtp": ({"use_mtp": True}, ASSISTED),
    "is_assistant": ({"is_assistant": True}, "cannot be an assistant"),
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, ELSEWHERE),
    "dola_layers": ({"dola_layers": "low"}, ELSEWHERE),
    "force_words_ids": ({**BEAMS, "force_words_ids": [[3]]}, ELSEWHERE),
    "num_beam_groups": (
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        ELSEWHERE,
    ),
    "cache_implementation, static": ({"cache_implementation": "static"}, SMALL),
    "cache_implementation, quantized": ({"cache_implementation": "quantized"}, SMALL),
    "cache_implementation, offloaded": ({"cache_implementation": "offloaded"}, SMALL),
    "cache_implementation, paged": ({"cache_implementation": "paged"}, "continuous batching"),
    "output_attentions": ({"output_attentions": True}, "trace=everlong.Trace"),
    "output_hidden_states": ({"output_hidden_states": True}, "trace=everlong.Trace"),
    "stop_strings, alone": ({"stop_strings": ["a"]}, "pass the model's tokenizer"),
}
# what says nothing of its own: what it is part of is above, or transformers leaves it unread here
PARTS = {
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "compile_config",
    "constraints",
    "continuous_batching_config",
    "decoder_start_token_id",
    "diversity_penalty",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_scores",
    "pad_token_id",
    "return_dict_in_generate",
    "speculation_type",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
}


def known(options):
    """Whether this transformers has the options; its newest floor may lack the newest of them."""
    extra = {"inputs", "tokenizer", "assistant_model", "negative_prompt_ids", "is_assistant"}
    extra |= {"stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn"}
    return all(key in extra or hasattr(GenerationConfig(), key) for key in options)


@pytest.mark.supports("works: {option}", of="generate, {model}")
@pytest.mark.parametrize("option", WORKS)
def test_an_option_says_with_the_state_what_it_says_without(model, plain, option):
    options, holds = WORKS[option]
    if not known(options):
        pytest.skip("this transformers has no such option")
    result = run(model, options)
    again = run(model, options, use_cache=False) if option != "prefill_chunk_size" else result
    assert torch.equal(result.sequences, again.sequences)
    for a, b in zip(result.scores, again.scores, strict=True):
        close(a, b)
    assert holds(said(result), plain), said(result)


@pytest.mark.supports("refused: {option}", of="generate, {model}")
@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_cannot_work_is_refused(model, option):
    options, message = REFUSED[option]
    if not known(options):
        pytest.skip("this transformers has no such option")
    options = {k: v() if k == "assistant_model" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        run(model, options)


def test_no_option_is_forgotten():
    named = {key for given, _ in [*WORKS.values(), *REFUSED.values()] for key in given}
    assert set(GenerationConfig().to_dict()) - named - PARTS == set()


def test_what_is_streamed_is_what_is_said(model):
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True)
    result = run(model, {"inputs": PROMPT[:1]}, streamer=streamer)
    assert "".join(streamer) == TOKENIZER.decode(said(result)[0])


def test_beams_return_their_scores(model):
    """`sequences_scores` are the mean log probabilities of what is said, by `score`."""
    result = run(model, {**BEAMS, "num_return_sequences": 2, "length_penalty": 1.0})
    log_probs, _ = model.score(result.sequences)
    length = result.sequences.shape[1] - PROMPT.shape[1]
    close(result.sequences_scores, log_probs[:, -length:].mean(1))


def test_a_loop_of_ones_own(model, plain):
    """`custom_generate` is handed what the usual loop is."""

    def greedy(model, input_ids, generation_config, **kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k in ("cache", "past_key_values")}
        logits = model(input_ids, **kwargs).logits
        return torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)

    ids = model.generate(PROMPT, custom_generate=greedy, max_new_tokens=1)
    assert ids[:, -1].tolist() == [row[0] for row in plain]


def test_neither_an_assistant_nor_batched_continuously(model):
    with pytest.raises(ValueError, match="cannot be an assistant"):
        llama().generate(PROMPT[:1], assistant_model=model, max_new_tokens=3)
    with pytest.raises(ValueError, match="this model keeps a State"):
        model.generate_batch([[256, 3]], generation_config=GenerationConfig(max_new_tokens=2))
