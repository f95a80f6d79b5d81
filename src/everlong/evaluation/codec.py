"""Text to ids and back, for a model of bytes or of a tokenizer's tokens."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from everlong.tasks.text import BOS

_TAIL = 64  # characters of a prompt's end that decide how its continuation is cut into tokens


@dataclass(frozen=True, eq=False)
class Codec:
    """`tokenizer` None stands for bytes; `bos` begins every stream."""

    tokenizer: Any = None
    bos: int = BOS

    @property
    def name(self) -> str:
        """What a token is, for results."""
        return "bytes" if self.tokenizer is None else f"tokens of {type(self.tokenizer).__name__}"

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64 [N], without a bos."""
        if self.tokenizer is None:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return np.array(ids, dtype=np.int64)

    def continuation(self, prompt: str, text: str) -> np.ndarray:
        """Ids of `text` as they are behind `prompt`, int64 [N]."""
        if self.tokenizer is None:
            return self.encode(text)
        tail = prompt[-_TAIL:]
        return self.encode(tail + text)[len(self.encode(tail)) :]

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids; of bytes, what is not UTF-8 and what is no byte becomes a mark."""
        if self.tokenizer is None:
            return bytes(i if i < 256 else 0xFF for i in ids.tolist()).decode(errors="replace")
        return self.tokenizer.decode(ids.tolist())

    def counter(self) -> Any:
        """Tokens of a piece of text, as the tasks count them; pieces that recur are counted once.

        Pieces begin where words do, so that their sum is that of the whole text but for tokenizers
        that join words.
        """
        return lru_cache(maxsize=1 << 16)(lambda text: len(self.encode(text)))
