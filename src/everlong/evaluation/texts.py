"""What a model pays for a text, by the byte, the token and the word."""

import codecs
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from everlong.tasks.text import Document, Documents

_SLICE = 1 << 20  # bytes of a document read at a time


@dataclass(frozen=True)
class TextScore:
    """nats: over all tokens; words: parts between white space, None where the text is not UTF-8."""

    nats: float
    tokens: int
    num_bytes: int
    words: int | None

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes

    @property
    def token_perplexity(self) -> float | None:
        return perplexity(self.nats, self.tokens)

    @property
    def word_perplexity(self) -> float | None:
        """None where the text has no words."""
        return perplexity(self.nats, self.words or 0)


def perplexity(nats: float, count: int) -> float | None:
    """exp of the nats of one of `count`; None for none of them, and beyond what a float holds."""
    return math.exp(nats / count) if count and nats / count < 700 else None


def count_words(documents: Iterable[Document]) -> int | None:
    """Parts between white space in documents of bytes; None where one is not UTF-8 or holds NUL.

    Documents are read in slices: they may be larger than memory.
    """
    total = 0
    try:
        for document in documents:
            total += _words(_text(document))
    except UnicodeDecodeError:
        return None
    return total


def count_lines(documents: Documents) -> int:
    """Newlines in documents of bytes."""
    return sum(
        int((document[start : start + _SLICE] == 10).sum())
        for document in documents
        for start in range(0, len(document), _SLICE)
    )


def _text(document: Document) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(document), _SLICE):
        data = document[start : start + _SLICE].tobytes()
        if b"\0" in data:
            raise UnicodeDecodeError("text", data, 0, 1, "NUL is in no text")
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def _words(pieces: Iterable[str]) -> int:
    total, open_word = 0, False
    for piece in pieces:
        if not piece:
            continue
        total += len(piece.split()) - (open_word and not piece[0].isspace())
        open_word = not piece[-1].isspace()
    return total
