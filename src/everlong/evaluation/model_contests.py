"""Which models of other packages `model_peers` times, and which of ours beside each.

Options of the others are chosen to do what ours do, and no more: one residual stream instead of
hyper-connections, no Transformer-XL memories beside RMT's own, dense feed-forward layers in
Qwen3-Next. The extra `peers` brings the packages; transformers is there anyway, on a processor with
its fallbacks in plain torch.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from everlong.evaluation.model_forms import (
    Everlong,
    Language,
    MacPackage,
    MemformerPackage,
    RmtPackage,
    Transformers,
)
from everlong.evaluation.test_time_peers import FINITE
from everlong.models.config import EverlongConfig
from everlong.models.sizing import build, with_parameters

if TYPE_CHECKING:
    from everlong.evaluation.model_peers import ModelsRun

_VOCABULARY = 259
_REMEDY = 'pip install "everlong[peers]"'
# Tokens of a refresh of ours; titans-pytorch's share a gate and a step. Its weights are refreshed
# every segment only: a call puts all its refreshes together anew at each, and would never end.
_CHUNK = 16
_PERSISTENT = 4
Options = dict[str, Any]


class Missing(Exception):
    """A package cannot be imported; the message names it and the extra that brings it."""


def contests(config: "ModelsRun") -> Iterator[Callable[[], list[Language]]]:
    """For each peer what builds it, and behind it ours, of as many parameters; `Missing` from there
    where its package is not installed."""
    half, sizes = config.layers // 2, {"segment_length": config.segment, "num_slots": config.slots}
    memformer = {"name": "memformer", "encoder_layers": half, **sizes}
    memory = {"chunk_size": min(_CHUNK, config.segment)}
    mac = {"titans_mac": {"segment_length": config.segment, "memory": memory}}
    pairs: list[tuple[Callable[[ModelsRun], Language], list[Options]]] = [
        (_memformer, [{"num_layers": half, "segment": memformer}]),
        (_rmt, [{"segment": {"name": "rmt", **sizes}}]),
        (_mac, [{"layers": ["titans_mac"], "mixers": mac}]),
        (_gpt2, [{"layers": ["attention"]}, {"layers": ["gated_deltanet"]}]),
        (_mamba2, [{"layers": ["gla"]}]),
        (_rwkv, [{"layers": ["hgrn"]}]),
        (_qwen3_next, [{"layers": ["gated_deltanet*3", "attention"]}]),
    ]
    for make, shapes in pairs:
        yield lambda make=make, shapes=shapes: _contest(make(config), shapes, config)


def _contest(theirs: Language, shapes: list[Options], config: "ModelsRun") -> list[Language]:
    found = [theirs]
    for shape in shapes:
        options = {"num_layers": config.layers, **shape}
        wanted = EverlongConfig(
            vocab_size=_VOCABULARY,
            hidden_size=config.width,
            num_heads=config.heads,
            **options,
        )
        sized = with_parameters(wanted, theirs.parameters)
        form = "ours, " + " + ".join(shape.get("layers", [shape.get("segment", {}).get("name")]))
        options["intermediate_size"] = sized.intermediate_size
        found.append(Everlong(form, "everlong", build(sized, config.seed), options))
    return found


def _package(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script in a dependency
            return importlib.import_module(name.replace("-", "_"))
    except ImportError as error:
        raise Missing(f"{name} is not timed ({error}): {_REMEDY}") from error


def _memformer(config: "ModelsRun") -> Language:
    package = _package("memformer")
    torch.manual_seed(config.seed)
    options: Options = {"dim": config.width, "num_memory_slots": config.slots}
    for part in ("enc", "dec"):
        options |= {
            f"{part}_num_tokens": _VOCABULARY,
            f"{part}_depth": config.layers // 2,
            f"{part}_heads": config.heads,
            f"{part}_max_seq_len": config.segment,
        }
    net = package.Memformer(mem_update_attn_heads=config.heads, **options)
    return MemformerPackage("memformer", f"memformer {version('memformer')}", net, options)


def _rmt(config: "ModelsRun") -> Language:
    name = "recurrent-memory-transformer-pytorch"
    package = _package(name)
    torch.manual_seed(config.seed)
    options = {
        "dim": config.width,
        "depth": config.layers,
        "heads": config.heads,
        "dim_head": config.width // config.heads,
        "num_memory_tokens": config.slots,
        "seq_len": config.segment,
        "num_residual_streams": 1,
        "use_xl_memories": False,
    }
    net = package.RecurrentMemoryTransformer(num_tokens=_VOCABULARY, causal=True, **options)
    wrapped = package.RecurrentMemoryTransformerWrapper(net)
    return RmtPackage(name, f"{name} {version(name)}", wrapped, options)


def _mac(config: "ModelsRun") -> Language:
    name = "titans-pytorch"
    package = _package(name)
    torch.manual_seed(config.seed)
    size = config.width // config.heads
    options = {
        "dim": config.width,
        "depth": config.layers,
        "heads": config.heads,
        "dim_head": size,
        "segment_len": config.segment,
        "num_persist_mem_tokens": _PERSISTENT,
        "num_longterm_mem_tokens": 0,
        "num_residual_streams": 1,
        "neural_memory_segment_len": min(_CHUNK, config.segment),
        "neural_memory_batch_size": config.segment,
    }
    memory = {"dim_head": size, "heads": config.heads, **FINITE}
    net = package.MemoryAsContextTransformer(
        num_tokens=_VOCABULARY,
        neural_memory_model=package.MemoryMLP(size, depth=2, expansion_factor=4.0),
        neural_memory_kwargs=memory,
        **options,
    )
    return MacPackage(f"{name} MAC", f"{name} {version(name)}", net, options | memory)


def _transformers(name: str, config: "ModelsRun", options: Options) -> Language:
    """A model by its class's prefix, with random weights."""
    package = importlib.import_module("transformers")
    torch.manual_seed(config.seed)
    shape = getattr(package, f"{name}Config")(vocab_size=_VOCABULARY, **options, **_IDS)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    net = getattr(package, f"{name}{head}")(shape)
    return Transformers(
        f"transformers {name}", f"transformers {version('transformers')}", net, options
    )


_IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def _gpt2(config: "ModelsRun") -> Language:
    places = max(config.length, max(config.positions) + config.segment)
    options = {
        "n_positions": places,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
    }
    return _transformers("GPT2", config, options)


def _mamba2(config: "ModelsRun") -> Language:
    """The published shape: two times the width inside, heads of 64, one group, states of 128."""
    size = min(64, config.width)
    options = {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "head_dim": size,
        "num_heads": 2 * config.width // size,
        "n_groups": 1,
        "state_size": 2 * size,
    }
    return _transformers("Mamba2", config, options)


def _rwkv(config: "ModelsRun") -> Language:
    options = {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "context_length": config.length,
    }
    return _transformers("Rwkv", config, options)


def _qwen3_next(config: "ModelsRun") -> Language:
    size = config.width // config.heads
    options = {
        "hidden_size": config.width,
        "intermediate_size": 8 * config.width // 3 // 32 * 32,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": size,
        "linear_num_key_heads": config.heads,
        "linear_num_value_heads": config.heads,
        "linear_key_head_dim": size,
        "linear_value_head_dim": size,
        "mlp_only_layers": list(range(config.layers)),
        "tie_word_embeddings": True,
        "max_position_embeddings": max(config.positions) + config.segment,
    }
    return _transformers("Qwen3Next", config, options)
