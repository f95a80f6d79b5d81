"""Text as streams of bytes: the packaged books, or any file or folder of the user's own.

Token ids 0-255 are the byte values; 256 begins every document, 257 ends one, 258 is padding.
Nothing here imports torch: documents are numpy arrays, read when they are asked for.
"""

import os
import stat
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from everlong.registry import suggest
from everlong.tasks.corpora import packaged, read_content, untar

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 259


@dataclass(frozen=True, eq=False)
class Document:
    """A run of tokens: `document[a:b]` reads them as an array, `len(document)` costs nothing.

    `source` is a file whose bytes are read on demand (uint8), so a document may be larger than
    memory, or an array held in memory (uint8 bytes; int32 ids after `tokenize`). The document is
    `source[start:stop]`, without a bos. `num_bytes` is the size of its text.
    """

    name: str
    source: Path | np.ndarray
    start: int
    stop: int
    num_bytes: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, span: slice) -> np.ndarray:
        first, last, step = span.indices(len(self))
        assert step == 1, "documents are read in runs"
        return self._read(self.start + first, max(0, last - first))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype, copy=copy)

    def _read(self, start: int, count: int) -> np.ndarray:
        if isinstance(self.source, np.ndarray):
            return self.source[start : start + count]
        try:
            data = np.fromfile(self.source, dtype=np.uint8, count=count, offset=start)
        except OSError as error:
            raise _unreadable(self.source, error) from error
        if len(data) != count:
            raise ValueError(f"{self.source} has become shorter while in use: start again")
        return data


@dataclass(frozen=True, eq=False)
class Documents(Sequence[Document]):
    """Documents in a fixed order, and the ids a model of them needs."""

    source: str
    items: tuple[Document, ...]
    bos: int = BOS
    vocab_size: int = VOCAB_SIZE

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | Sequence[Document]:
        return self.items[index]

    @property
    def names(self) -> list[str]:
        return [document.name for document in self.items]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document, without the bos."""
        return [len(document) for document in self.items]

    @property
    def num_bytes(self) -> int:
        return sum(document.num_bytes for document in self.items)


def load_documents(source: str | os.PathLike[str]) -> Documents:
    """The documents of "moby_dick" (one), "sotu" (233), or of a file or folder of the user's.

    A file is one document of any bytes. A folder is walked whole, each file a document, in the
    order of their relative paths; hidden files and folders, empty files and what is no regular file
    are left out. A packaged name wins over a folder of that name: write "./sotu" for the folder.
    Raises `ValueError` for what is missing, empty or unreadable.
    """
    if not os.fspath(source) or "\0" in os.fspath(source):
        # an empty path would be the current folder, whatever lies in it
        raise ValueError(
            f"{os.fspath(source)!r} names no text: give a packaged text "
            f'({", ".join(packaged())}), a file, or a folder ("." is the current one)'
        )
    corpora = packaged()
    if source in corpora:
        return _load_packaged(str(source))
    path = Path(source)
    if path.is_dir():
        items = tuple(_walk(path))
        if not items:
            raise ValueError(
                f"the folder {path} holds no text: put at least one file with text in it"
            )
        return Documents(str(source), items)
    size = _size(path, str(source))
    if size is None:
        raise ValueError(
            f"{path} is neither a regular file nor a folder: copy its content into a file"
        )
    if size == 0:
        raise ValueError(f"{path} is empty: there is nothing to read in it")
    return Documents(str(source), (Document(path.name, path, 0, size, size),))


def _load_packaged(name: str) -> Documents:
    corpus = packaged()[name]
    content = read_content(corpus)
    texts = untar(content) if ".tar" in corpus.file else {name: content}
    items = [
        Document(title, np.frombuffer(text, np.uint8), 0, len(text), len(text))
        for title, text in texts.items()
    ]
    return Documents(name, tuple(items))


def _walk(folder: Path) -> Iterator[Document]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error)

    paths = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    for path in sorted(paths):
        if size := _size(path):
            yield Document(path.relative_to(folder).as_posix(), path, 0, size, size)


def _size(path: Path, source: str | None = None) -> int | None:
    """Bytes of a readable regular file, None for what is no regular file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return None
        with path.open("rb"):
            return status.st_size
    except FileNotFoundError as error:
        if source is None:
            raise _unreadable(path, error) from error
        choices = ", ".join(packaged())
        raise ValueError(
            f"no file or folder {source!r}{suggest(source, packaged())} (packaged texts: {choices})"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: object, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be read ({error.strerror}): check its permissions")


def split(documents: Documents, fraction: float = 0.1) -> tuple[Documents, Documents]:
    """Training and validation documents, the same at every call.

    One document: its last `fraction` of bytes is for validation (the cut is moved back by up to
    three bytes so that no UTF-8 character is cut). Many: whole documents are held out, every tenth
    (the 10th, 20th, ...; every round(1 / fraction)-th), or the last one where there are fewer.
    Split before `tokenize`. Raises `ValueError` when nothing would be left on one side.
    """
    if not 0 < fraction <= 0.5:
        raise ValueError(f"fraction is {fraction}: hold out more than 0 and at most 0.5")
    if len(documents) == 1:
        train, held_out = _cut(documents.items[0], fraction)
        return replace(documents, items=(train,)), replace(documents, items=(held_out,))
    step = min(round(1 / fraction), len(documents))
    held = [index % step == step - 1 for index in range(len(documents))]
    train = tuple(item for item, out in zip(documents.items, held, strict=True) if not out)
    validation = tuple(item for item, out in zip(documents.items, held, strict=True) if out)
    return replace(documents, items=train), replace(documents, items=validation)


def _cut(document: Document, fraction: float) -> tuple[Document, Document]:
    if isinstance(document.source, np.ndarray) and document.source.dtype != np.uint8:
        raise ValueError("these documents are tokenized already: split first, then tokenize")
    cut = len(document) - int(len(document) * fraction)
    if cut < len(document):
        near = document[max(0, cut - 3) : cut + 1][::-1]
        starts = np.flatnonzero(near & 0xC0 != 0x80)  # bytes that do not continue a character
        cut -= int(starts[0]) if len(starts) else 0
    if not 0 < cut < len(document):
        raise ValueError(
            f"{document.name} has {len(document)} bytes, too few to hold out {fraction:g} of them: "
            "give a longer text"
        )
    middle = document.start + cut
    return (
        replace(document, stop=middle, num_bytes=cut),
        replace(document, start=middle, num_bytes=document.num_bytes - cut),
    )


def encode(data: bytes | np.ndarray | Document, bos: int = BOS) -> np.ndarray:
    """Token ids, int64 [1 + length]: bos, then the bytes (or the ids of a tokenized document)."""
    values = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.asarray(data)
    return np.concatenate([np.array([bos]), values]).astype(np.int64)


def in_contexts(documents: Documents, context: int) -> Documents:
    """The same text in documents of at most `context` tokens, each read from a fresh state: what a
    model whose state grows needs, since a long text would fill the machine."""
    if context < 1:
        raise ValueError(f"context is {context}: give the tokens of a document, at least 1")

    def piece(whole: Document, start: int) -> Document:
        stop = min(start + context, len(whole))
        before, after = (whole.num_bytes * edge // len(whole) for edge in (start, stop))
        places = whole.start + start, whole.start + stop
        return Document(f"{whole.name}[{start}:{stop}]", whole.source, *places, after - before)

    starts = ((whole, start) for whole in documents for start in range(0, len(whole), context))
    return replace(documents, items=tuple(piece(*each) for each in starts))


def tokenize(documents: Documents, tokenizer: Any) -> Documents:
    """The same documents as ids of a Hugging Face tokenizer, int32, held in memory.

    All are encoded now, whole, so that a text it cannot encode is met before any training.
    `bos` becomes the tokenizer's, or its end-of-text where it has none. Raises `ValueError`, with
    the file and the byte offset, for bytes that are not UTF-8 and for characters the tokenizer
    drops (other than white space) or replaces by its unknown token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("the tokenizer has no offsets: use one that has a tokenizer.json")
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise ValueError("the tokenizer has neither a bos nor an eos token: give it a bos_token")
    items = tuple(_tokenize(document, tokenizer) for document in documents)
    return replace(documents, items=items, bos=bos, vocab_size=len(tokenizer))


def _tokenize(document: Document, tokenizer: Any) -> Document:
    data = document[:].tobytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{document.name}: byte {document.start + error.start} is not UTF-8, which a tokenizer "
            "needs: convert the file, or read bytes (no tokenizer)"
        ) from error
    ids, spans = _encode_text(text, tokenizer)
    lost = _first_lost(text, ids, spans, tokenizer)
    if lost is not None:
        offset = document.start + len(text[:lost].encode())
        raise ValueError(
            f"{document.name}: the tokenizer cannot encode {text[lost]!r} at byte {offset}: "
            "use another tokenizer, or read bytes (no tokenizer)"
        )
    return Document(document.name, ids, 0, len(ids), len(data))


def _encode_text(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [N] and the characters they stand for, int64 [N, 2]."""
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    spans = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.array(encoding["input_ids"], dtype=np.int32), spans


def _first_lost(text: str, ids: np.ndarray, spans: np.ndarray, tokenizer: Any) -> int | None:
    """The first character that became the unknown token, or none at all (white space apart)."""
    if tokenizer.unk_token_id is not None:
        for first, last in spans[ids == tokenizer.unk_token_id]:
            # "Unknown" and "end of text" are one token in some vocabularies: the text may name it.
            if text[first:last].strip() != tokenizer.unk_token:
                return int(first)
    if not _drops(text, spans):
        return None
    # Tokens after a dropped character may have shifted spans: look for the first prefix that drops.
    lengths = range(1, len(text) + 1)
    return bisect_left(
        lengths, True, key=lambda n: _drops(text[:n], _encode_text(text[:n], tokenizer)[1])
    )


def _drops(text: str, spans: np.ndarray) -> bool:
    """Whether a character other than white space is in no token's span."""
    begun = np.bincount(spans[:, 0], minlength=len(text) + 1)
    ended = np.bincount(spans[:, 1], minlength=len(text) + 1)
    uncovered = np.flatnonzero(np.cumsum(begun - ended)[:-1] <= 0)
    return any(not text[index].isspace() for index in uncovered)
