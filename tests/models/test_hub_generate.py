"""Law 8: what transformers' generate says with the state is what it says without."""

import copy
import logging

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import utils as generation

from everlong import state as states
from everlong.models.decoders import CACHE_NAME
from everlong.models.hub import EverlongCache
from models.hub_models import (
    BOS,
    EOS,
    PAD,
    UNBOUNDED,
    close,
    every_model,
    left_padded,
    make_model,
    tokens,
)

STEPS = 7  # crosses a boundary of every small segment, chunk and window


@pytest.fixture(autouse=True)
def _no_complaints():
    """transformers warns through logging: that fails too."""
    heard = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert heard == []


def generate(model, ids, steps=STEPS, **options):
    return model.generate(
        ids,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **options},
    )


def reread(model, ids, mask=None):
    """Logits behind the last column, from the first token on: no state is carried."""
    with torch.no_grad():
        return model.stream(ids, mask=mask)[0][:, -1]


def check_logits(model, result, mask=None):
    """Every step's logits are those of reading the whole prefix again."""
    steps = len(result.logits)
    start = result.sequences.shape[1] - steps
    for step, logits in enumerate(result.logits):
        prefix = result.sequences[:, : start + step]
        seen = None
        if mask is not None:
            seen = torch.cat([mask, mask.new_ones(len(mask), step)], 1)
        close(logits, reread(model, prefix, seen))


@pytest.mark.supports("generate: greedy")
@every_model
def test_greedy_with_the_state_is_greedy_without(name):
    model, ids = make_model(name), tokens(2, 6)
    result = generate(model, ids)
    check_logits(model, result)
    assert torch.equal(result.sequences, generate(model, ids, use_cache=False).sequences)
    short = reread(model, result.sequences[:, -2:-1])
    assert (short - result.logits[-1]).abs().max() > 1e-3, "the past must matter"


@pytest.mark.supports("generate: sampling")
@every_model
def test_sampling_with_the_state_is_sampling_without(name):
    model, ids, answers = make_model(name), tokens(2, 5), []
    for use_cache in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            options = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
            answers.append(generate(model, ids, use_cache=use_cache, **options))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert answers[0].sequences.shape == (6, 5 + STEPS)
    assert len({tuple(row.tolist()) for row in answers[0].sequences}) == 6
    check_logits(model, answers[0])


@pytest.mark.supports("generate: beams")
@every_model
def test_beam_search_with_the_state_is_beam_search_without(name):
    model, reordered = make_model(name, eos_token_id=EOS), False
    for seed in range(5):
        ids, mask = left_padded([6, 3], seed)
        options = {"attention_mask": mask, "num_beams": 4, "num_return_sequences": 2}
        a = generate(model, ids, **options, output_scores=True)
        b = generate(model, ids, **options, output_scores=True, use_cache=False)
        assert torch.equal(a.sequences, b.sequences)
        close(a.sequences_scores, b.sequences_scores)
        parents = a.beam_indices[:, 1:] % 4
        reordered = reordered or bool((parents[:, 1:] != parents[:, :-1]).any())
        if reordered:
            break
    assert reordered, "without a reorder nothing is tested"


@pytest.mark.supports("generate: left padding")
@every_model
def test_left_padded_rows_say_what_they_say_alone(name):
    model = make_model(name)
    ids, mask = left_padded([7, 1, 4])
    result = generate(model, ids, attention_mask=mask)
    check_logits(model, result, mask)
    for row, length in enumerate(mask.sum(1)):
        alone = generate(model, ids[row : row + 1, -length:])
        assert torch.equal(alone.sequences[0, length:], result.sequences[row, 7:])
    junk = torch.where(mask.bool(), ids, PAD)
    again = generate(model, junk, attention_mask=mask)
    assert torch.equal(again.sequences[:, 7:], result.sequences[:, 7:])


@pytest.mark.supports("generate: resumed")
@every_model
def test_resuming_is_one_shot(name):
    model = make_model(name)
    ids, mask = left_padded([5, 3])
    whole = generate(model, ids, 9, attention_mask=mask)
    first = generate(model, ids, 4, attention_mask=mask)
    seen = torch.cat([mask, mask.new_ones(2, 4)], 1)
    cache = first[CACHE_NAME]
    assert cache.get_seq_length() == 8, "all but the last token was read"
    second = generate(model, first.sequences, 5, attention_mask=seen, cache=cache)
    assert torch.equal(second.sequences, whole.sequences)
    close(torch.stack(second.logits), torch.stack(whole.logits[4:]))


@pytest.mark.supports("generate: from a state")
@every_model
def test_a_state_continues_with_new_tokens_alone(name):
    """The prompt is never shown again: what a stream of unlimited length needs."""
    model, ids = make_model(name), tokens(2, 9)
    with torch.no_grad():
        _, state = model.stream(ids[:, :6])
    result = generate(model, ids[:, 6:], cache=EverlongCache(state))
    whole = generate(model, ids)
    assert torch.equal(result.sequences[:, 3:], whole.sequences[:, 9:])
    close(torch.stack(result.logits), torch.stack(whole.logits))


@pytest.mark.supports("generate: each token once")
@every_model
def test_every_token_is_read_once_and_the_cache_does_not_grow(name):
    model, read = make_model(name), []
    model.body.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    ids = tokens(1, 5)
    short = generate(model, ids, 2)[CACHE_NAME]
    read.clear()
    long = generate(model, ids, 60)[CACHE_NAME]
    assert read == [5] + [1] * 59
    assert long.get_seq_length() == 64
    grown = states.num_bytes(long.state) - states.num_bytes(short.state)
    assert (grown > 0) == (name in UNBOUNDED)


def test_a_copied_cache_branches():
    """The model never changes a state in place: two futures share one past."""
    model, ids = make_model("memformer"), tokens(1, 6)
    result = generate(model, ids, 3)
    before = states.tree_map(torch.clone, result[CACHE_NAME].state)
    branch = copy.copy(result[CACHE_NAME])
    one = generate(model, result.sequences, cache=branch).sequences
    kept = result[CACHE_NAME]
    assert all(map(torch.equal, states.leaves(kept.state), states.leaves(before)))
    assert kept.get_seq_length() == 8 < branch.get_seq_length()
    assert torch.equal(generate(model, result.sequences, cache=kept).sequences, one)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_the_cache_goes_by_its_old_name_too():
    """What was written for it goes on; the newest transformers says its new name."""
    model, ids = make_model("memformer"), tokens(1, 6)
    wanted = generate(model, ids).sequences[:, 6:]
    for name in ("cache", "past_key_values"):
        cache = model(ids[:, :4])[CACHE_NAME]
        assert torch.equal(generate(model, ids, **{name: cache}).sequences[:, 6:], wanted)
        assert cache.get_seq_length() == 6 + STEPS - 1, "it is the one that was given"


def test_a_cache_that_is_given_reads_no_step_too_many(monkeypatch):
    """On Apple's devices transformers stops a step late if nobody sees the cache afterwards."""
    if not hasattr(generation, "DeferredStopCheck"):
        pytest.skip("this transformers always stops in time")
    real, asked = generation.DeferredStopCheck.is_supported, []

    def on_mps(_, *args, **options):
        asked.append(real(torch.device("mps"), *args, **options))
        return False

    monkeypatch.setattr(generation.DeferredStopCheck, "is_supported", staticmethod(on_mps))
    for cache in (EverlongCache(), None):
        make_model("memformer").generate(tokens(1, 4), max_new_tokens=3, cache=cache)
    assert asked == [False, True]


def test_one_prompt_is_continued_several_ways():
    """A cache of one row serves several samples or beams."""
    model, ids = make_model("memformer"), tokens(1, 6)
    cache = generate(model, ids, 1)[CACHE_NAME]
    more = tokens(1, 9, seed=1)
    more[:, :6] = ids
    beams = generate(model, more, cache=copy.copy(cache), num_beams=3).sequences
    assert torch.equal(beams, generate(model, more, num_beams=3).sequences)


def test_a_finished_row_is_padded_and_the_others_go_on():
    model = make_model("sliding_attention")
    free = generate(model, tokens(3, 4), 10).sequences[:, 4:]
    stop = int(free[0, 3])
    result = generate(model, tokens(3, 4), 10, eos_token_id=stop, pad_token_id=PAD).sequences[:, 4:]
    for row, wanted in zip(result.tolist(), free.tolist(), strict=True):
        cut = wanted.index(stop) + 1 if stop in wanted else len(wanted)
        assert row[:cut] == wanted[:cut]
        assert set(row[cut:]) <= {PAD}
    assert (result == PAD).any()


@pytest.mark.supports("generate: prompt in chunks")
@every_model
def test_a_prompt_may_be_read_in_chunks(name):
    model = make_model(name)
    ids, mask = left_padded([11, 6])
    whole = generate(model, ids, attention_mask=mask)
    chunks = generate(model, ids, attention_mask=mask, prefill_chunk_size=3)
    assert torch.equal(chunks.sequences, whole.sequences)


@pytest.mark.parametrize("configured", [False, True])
def test_an_unused_dynamic_cache_will_do(configured):
    model, ids = make_model("memformer"), tokens(2, 6)
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    result = generate(model, ids, cache=cache)
    assert torch.equal(result.sequences, generate(model, ids).sequences)
    assert cache.get_seq_length() == 6 + STEPS - 1


def test_embeddings_are_read_like_their_tokens():
    model, ids = make_model("memformer"), tokens(2, 6)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    result = generate(model, None, inputs_embeds=embeds)
    assert torch.equal(result.sequences, generate(model, ids).sequences[:, 6:])
    encoder_decoder = make_model("memformer, encoder-decoder")
    with pytest.raises(ValueError, match="give ids, not embeddings"):
        generate(encoder_decoder, None, inputs_embeds=embeds)


def test_nothing_given_begins_with_bos():
    model = make_model("sliding_attention")
    assert generate(model, None).sequences[0, 0] == BOS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "leave the option out"),
        ({"cache_implementation": "quantized"}, "leave the option out"),
        ({"cache_implementation": "offloaded"}, "leave the option out"),
        ({"prompt_lookup_num_tokens": 2}, "not supported with stateful models"),
        ({"use_cache": False, "cache": EverlongCache()}, "leave out the cache"),
        ({"position_ids": torch.arange(4)[None]}, "position_ids"),
        ({"output_hidden_states": True}, "trace=everlong.Trace"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model("sliding_attention"), tokens(1, 4), **options)


def test_foreign_caches_are_refused():
    model, ids = make_model("sliding_attention"), tokens(1, 4)
    static = StaticCache(config=model.config, max_cache_len=20)
    used = DynamicCache()
    used.update(torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 4, 8), 0)
    for cache in (static, used):
        with pytest.raises(ValueError, match="EverlongCache or an unused DynamicCache"):
            model(ids, cache=cache)


def test_a_cache_that_has_read_everything_asks_for_new_tokens():
    model, ids = make_model("sliding_attention"), tokens(1, 4)
    cache = model(ids)[CACHE_NAME]
    for given in (ids, ids[:, :2]):
        with pytest.raises(ValueError, match="give the whole sequence with its new tokens"):
            generate(model, given, cache=cache)


def test_the_cache_is_handled_like_any_other():
    """Rows, devices, resets: what transformers and its clients do to a cache."""
    model, ids = make_model("attention"), tokens(3, 5)
    cache = model(ids)[CACHE_NAME]
    past = states.tree_map(torch.clone, cache.state)
    assert (len(cache), cache.batch_size, cache.get_max_length()) == (1, 3, -1)
    assert cache.get_mask_sizes(2, 0) == (7, 0)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_repeat_interleave(2)
    wanted = states.select(past, torch.tensor([0, 0, 2, 2]))
    assert all(map(torch.equal, states.leaves(cache.state), states.leaves(wanted)))
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    cache.crop(0)
    assert all(map(torch.equal, states.leaves(cache.state), states.leaves(wanted)))
    with pytest.raises(ValueError, match="cannot be rolled back"):
        cache.crop(1)
    cache.reset()
    assert (cache.state, cache.get_seq_length()) == (None, 0)
    close(model(ids, cache=cache).logits, model(ids).logits)


def test_this_model_is_no_assistant():
    """transformers marks an assistant's calls in its generation config."""
    wanted = GenerationConfig(max_new_tokens=3, is_assistant=True)
    with pytest.raises(ValueError, match="cannot be an assistant"):
        make_model("attention").generate(tokens(1, 4), generation_config=wanted)


def test_the_default_config_generates_bytes():
    """With the ids of the byte tokenizer, as a user meets it."""
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    model = make_model("memformer", vocab_size=259, **ids)
    assert model.generate(torch.tensor([[256, 104, 105]]), max_new_tokens=5).shape == (1, 8)
