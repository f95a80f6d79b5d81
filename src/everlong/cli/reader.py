"""One stream, read and continued: what `generate` and `evaluate` do with a model.

The last token is held back: it is read together with what follows it, so that a stream can be
continued, scored or saved at any place.
"""

import codecs
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from everlong import state as states
from everlong.errors import UserError
from everlong.models.card import memories

BLOCK = 1024  # tokens a call: bounds what reading holds besides the state
_PIPE = 1 << 16  # bytes read from a pipe at a time


class Reader:
    """A stream of one row: `state`, of everything but the last token, and `held`, that token."""

    def __init__(self, model: Any, bos: int):
        self.model, self.bos = model, bos
        self.device = next(model.parameters()).device
        self.reset()

    def reset(self) -> None:
        """A new stream."""
        self.state = self.model.init_state(1)
        self.held = torch.tensor([[self.bos]], device=self.device)

    @torch.no_grad()
    def read(self, ids: np.ndarray) -> Tensor:
        """Read ids Int [T]; what each was worth, in nats [T], given the stream before it."""
        costs = []
        for start in range(0, len(ids), BLOCK):
            block = torch.from_numpy(ids[start : start + BLOCK].astype(np.int64)).to(self.device)
            inputs = torch.cat([self.held[0], block[:-1]])[None]
            logits, state = self.model.stream(inputs, self.state)
            costs.append(F.cross_entropy(logits[0].float(), block, reduction="none"))
            self.state, self.held = state, block[None, -1:]
        return torch.cat(costs) if costs else torch.empty(0)

    def read_document(
        self, document: Any, wipe_every: int | None = None
    ) -> Iterator[tuple[int, Tensor, np.ndarray]]:
        """Read `document[a:b]` block by block: the place of each block, its costs and its ids.

        `wipe_every` (tokens): nothing before a multiple of it, bos counted, is remembered.
        """
        start = 0
        while start < len(document):
            stop = start + BLOCK
            if wipe_every is not None:
                # position p of the stream holds token p - 1: bos is at 0
                stop = start - (start % wipe_every) + wipe_every
                if start and start % wipe_every == 0:
                    self.state = self.model.init_state(1)
            ids = document[start:stop]
            yield start, self.read(ids), ids
            start += len(ids)

    def continue_(self, streamer: Any, seed: int, **options: Any) -> None:
        """Sample on from here through `model.generate`; the stream then ends in what was made."""
        from everlong.models.hub import EverlongCache

        cache = EverlongCache(self.state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            ids = self.model.generate(self.held, cache=cache, streamer=streamer, **options)
        self.state, self.held = cache.state, ids[:, -1:]

    @property
    def num_bytes(self) -> int:
        return states.num_bytes(self.state)

    def save(self, path: Path) -> None:
        """`UserError` where the file cannot be written."""
        whole = {"stream": self.state, "held": self.held[0]}
        origin = {"name": _name(self.model), "config_hash": fingerprint(self.model)}
        try:
            states.save(whole, path, **origin)
        except (OSError, SafetensorError) as error:  # the latter is how safetensors says it
            raise UserError(f"the state cannot be written to {path}: {error}") from error

    def load(self, path: Path) -> None:
        """`ValueError` for another model's state, or a damaged one."""
        whole = states.load(path, name=_name(self.model), config_hash=fingerprint(self.model))
        whole = states.to(whole, self.device)
        self.state, self.held = whole["stream"], whole["held"][None]


def _name(model: Any) -> str:
    return "+".join(memories(model))


def fingerprint(model: Any) -> str:
    """Of a model's shape and weights (the first few values of each): whose states it can read."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:64].detach().cpu().double().numpy().tobytes())
    config = model.config  # of a model made by extend, or of ours
    memory = config.memory if hasattr(config, "memory") else [config.segment, config.mixers]
    digest.update(repr(memory).encode())
    return digest.hexdigest()


class BytePrinter:
    """A streamer for `generate`: bytes as text as soon as they make a character."""

    def __init__(self, out: TextIO):
        self.out, self.prompt = out, True
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, ids: Tensor) -> None:
        if self.prompt:  # transformers hands over the prompt first
            self.prompt = False
            return
        values = bytes(value for value in ids.flatten().tolist() if value < 256)
        self.out.write(self.decoder.decode(values))
        self.out.flush()

    def end(self) -> None:
        self.out.write(self.decoder.decode(b"", final=True) + "\n")
        self.out.flush()


def printer(tokenizer: Any, out: TextIO) -> Any:
    """The streamer of a tokenizer; None stands for bytes."""
    if tokenizer is None:
        return BytePrinter(out)
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            out.write(text + ("\n" if stream_end else ""))
            out.flush()

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def stream_ids(source: Any, tokenizer: Any) -> Iterator[tuple[np.ndarray, int]]:
    """Ids of a binary pipe as soon as it has something to read, and how many bytes they stand for.

    With a tokenizer, text is cut behind white space, so that most cuts fall between two tokens;
    raises `UserError` for what is not UTF-8.
    """
    if tokenizer is None:
        while data := source.read1(_PIPE):
            yield np.frombuffer(data, np.uint8), len(data)
        return
    decoder, text = codecs.getincrementaldecoder("utf-8")(), ""
    while True:
        data = source.read1(_PIPE)
        try:
            text += decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise UserError(
                f"the text is not UTF-8 ({error.reason}), which a tokenizer needs"
            ) from error
        cut = max(text.rfind(" "), text.rfind("\n")) + 1
        if not data or (cut == 0 and len(text) > _PIPE):
            cut = len(text)
        if cut:
            ids = tokenizer.encode(text[:cut], add_special_tokens=False)
            yield np.array(ids, np.int64), len(text[:cut].encode())
        text = text[cut:]
        if not data:
            return
