"""The language models of `model_peers`, ours and others', behind one door: ids in, logits out.

B batch (1), T time, V vocabulary, S segment.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everlong import state as states
from everlong.evaluation.test_time_peers import their_bytes

# What is looked up (GPT-2's table of positions), and what titans-pytorch holds and never trains.
_APART = ("transformer.wpe.", ".memory_model.", ".rotary_emb.")
_ROOM = 16  # segments that titans-pytorch may decode behind what it read


class Language:
    """A causal language model over one stream."""

    ours = False

    def __init__(self, form: str, package: str, net: Any, options: Mapping[str, Any]) -> None:
        self.form, self.package, self.net, self.options = form, package, net, dict(options)

    @property
    def parameters(self) -> int:
        """Of the weights that work; tables of positions, and what is never trained, are apart."""
        named = self.net.named_parameters()
        return sum(p.numel() for name, p in named if not any(part in name for part in _APART))

    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, T] of a fresh stream -> [B, T, V]."""
        raise NotImplementedError

    def read(self, ids: Tensor) -> Any:
        """What is held behind ids [B, T], T whole segments, of a fresh stream."""
        raise NotImplementedError

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token [B, 1] -> logits [B, V] and what is held now; may change `state` in place."""
        raise NotImplementedError

    def held(self, state: Any) -> int:
        """Bytes of all tensors in `state`."""
        return num_bytes(state)


class Everlong(Language):
    """One of ours."""

    ours = True

    def logits(self, ids: Tensor) -> Tensor:
        return self.net.stream(ids)[0]

    def read(self, ids: Tensor) -> Any:
        return self.net.stream(ids)[1]

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = self.net.stream(token, state)
        return logits[:, -1], state

    def held(self, state: Any) -> int:
        return states.num_bytes(state)


class Transformers(Language):
    """A causal language model of transformers, with the cache its `generate` uses."""

    @property
    def cache(self) -> str:
        """What the cache is called, in the call and in the output."""
        names = inspect.signature(self.net.forward).parameters
        return next(
            name for name in ("past_key_values", "cache", "cache_params", "state") if name in names
        )

    def logits(self, ids: Tensor) -> Tensor:
        return self.net(ids, use_cache=False).logits

    def read(self, ids: Tensor) -> Any:
        return getattr(self.net(ids, use_cache=True), self.cache)

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        found = self.net(token, use_cache=True, **{self.cache: state})
        return found.logits[:, -1], getattr(found, self.cache)


class MemformerPackage(Language):
    """memformer 0.3: a segment is predicted from the encoding of the one before it and from itself.

    Its `generate` passes a mask that its own decoder does not take. What it would do is done here:
    the decoder reads the tokens of the segment again for every token.
    """

    def _encode(self, tokens: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        found = self.net(tokens, mems=slots)
        return found.enc_out, found.mem

    def _decoder(self, tokens: Tensor, encoding: Tensor) -> Tensor:
        return self.net.decoder.net(tokens, context=encoding)

    def logits(self, ids: Tensor) -> Tensor:
        size, found = self.options["enc_max_seq_len"], []
        before, slots = torch.zeros_like(ids[:, :size]), None
        for part in ids.split(size, 1):
            encoding, slots = self._encode(before, slots)
            found.append(self._decoder(part, encoding))
            before = part
        return torch.cat(found, 1)

    def read(self, ids: Tensor) -> Any:
        size = self.options["enc_max_seq_len"]
        encoding, slots = self._encode(torch.zeros_like(ids[:, :size]), None)
        for part in ids.split(size, 1):
            encoding, slots = self._encode(part, slots)
        return encoding, slots, ids[:, :0].clone()

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        encoding, slots, tokens = state
        tokens = torch.cat([tokens, token], 1)
        logits = self._decoder(tokens, encoding)[:, -1]
        if tokens.shape[1] == self.options["enc_max_seq_len"]:
            encoding, slots = self._encode(tokens, slots)
            tokens = tokens[:, :0].clone()
        return logits, (encoding, slots, tokens)


class RmtPackage(Language):
    """recurrent-memory-transformer-pytorch: as in its `generate`, the model reads the tokens of the
    segment again for every token."""

    def logits(self, ids: Tensor) -> Tensor:
        return self.net(ids)[0]

    def read(self, ids: Tensor) -> Any:
        memories = None
        for part in ids.split(self.net.seq_len, 1):
            memories = self.net.transformer(part, memories)[1]
        return memories, ids[:, :0].clone()

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        memories, tokens = state
        tokens = torch.cat([tokens, token], 1)
        logits, written, _ = self.net.transformer(tokens, memories)
        if tokens.shape[1] == self.net.seq_len:
            memories, tokens = written, tokens[:, :0].clone()
        return logits[:, -1], (memories, tokens)


class MacPackage(Language):
    """titans-pytorch's memory as context, as in its `sample` with a cache: every call is given all
    tokens of the stream and picks its own."""

    def _call(self, ids: Tensor, cache: Any, positions: Any) -> tuple[Any, Any]:
        return self.net(ids, cache=cache, return_cache=True, factorized_pos_emb=positions)

    def logits(self, ids: Tensor) -> Tensor:
        return self.net(ids)

    def read(self, ids: Tensor) -> Any:
        net = self.net
        total = net.seq_len_with_longterm_mem(ids.shape[1] + _ROOM * net.segment_len)
        shape = net.axial_pos_emb.maybe_derive_outer_dim(total, (net.neural_memory_segment_len,))
        positions = net.axial_pos_emb(shape, return_factorized=True)
        _, (index, keys, memories) = self._call(ids, None, positions)
        # The weights after every chunk of what was read: the next call ignores them.
        memories = [memory._replace(updates=None) for memory in memories]
        return ids, (index, keys, memories), positions

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        ids, cache, positions = state
        ids = torch.cat([ids, token], 1)
        logits = None
        while logits is None:  # a learned token at a segment's end has no logits
            logits, cache = self._call(ids, cache, positions)
        return logits[:, -1], (ids, cache, positions)

    def held(self, state: Any) -> int:
        ids, (_, keys, memories), _ = state
        return num_bytes((ids, keys)) + sum(map(their_bytes, memories))


def num_bytes(held: Any) -> int:
    """Of every tensor in containers and in transformers' caches, each once."""
    total, seen, waiting = 0, set(), [held]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            total += each.numel() * each.element_size()
        elif isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, list | tuple | set):
            waiting += each
        elif type(each).__module__.startswith("transformers.cache_utils"):
            waiting += vars(each).values()
    return total
