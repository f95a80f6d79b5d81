"""Documents as stateful batches: a row of the batch reads one document from its first byte to its
last, so that the state carried from rollout to rollout is that of the text before.

B rows, R tokens of a rollout, S tokens of a segment.
"""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everlong.errors import UserError
from everlong.tasks.text import Document, Documents

IGNORE = -100  # the target where nothing is to be predicted
Batch = dict[str, Tensor]


def as_documents(documents: Documents | Sequence[Any]) -> Documents:
    """`documents` itself, or arrays (memory maps included) and bytes as documents of bytes."""
    if isinstance(documents, Documents):
        return documents
    arrays = [np.frombuffer(d, np.uint8) if isinstance(d, bytes) else d for d in documents]
    items = [Document(str(i), a, 0, len(a), len(a)) for i, a in enumerate(arrays)]
    return Documents("arrays", tuple(items))


def cut(lengths: Sequence[int], rows: int) -> np.ndarray:
    """Pieces of documents, Int [P, 3]: document, start, stop; at least one for every row.

    Whole documents where there are enough of them; else the longest are cut into contiguous pieces
    of equal length until there are `rows`. Empty documents are left out.
    """
    if sum(lengths) < rows:
        raise UserError(
            f"the text has {sum(lengths)} tokens, too few for {rows} rows: "
            "give a longer text or a smaller batch_size"
        )
    parts = {index: 1 for index, length in enumerate(lengths) if length > 0}
    longest: list[tuple[float, int]] = [(-lengths[index], index) for index in parts]
    heapq.heapify(longest)
    for _ in range(rows - len(parts)):
        index = longest[0][1]
        parts[index] += 1
        heapq.heapreplace(longest, (-lengths[index] / parts[index], index))
    pieces = [
        (index, i * lengths[index] // n, (i + 1) * lengths[index] // n)
        for index, n in parts.items()
        for i in range(n)
    ]
    return np.array(pieces, dtype=np.int64)


class _Reader:
    """Reads rollouts of pieces. A piece of n tokens t_0 ... is the stream bos, t_0, ... t_{n-1} at
    positions 0 to n; the target at position p < n is t_p, and position n has none."""

    def __init__(self, documents: Documents, pieces: np.ndarray, length: int):
        self.documents, self.pieces, self.length = documents, pieces, length

    def blank(self, rows: int) -> dict[str, np.ndarray]:
        shape = (rows, self.length)
        return {
            "inputs": np.full(shape, self.documents.bos, np.int64),
            "targets": np.full(shape, IGNORE, np.int64),
            "mask": np.zeros(shape, np.bool_),
            "reset": np.zeros(rows, np.bool_),
        }

    def fill(self, batch: dict[str, np.ndarray], row: int, piece: int, offset: int) -> bool:
        """Write positions offset .. offset + R - 1 into a blank row; False if targets remain."""
        index, start, stop = self.pieces[piece]
        size = int(stop - start)
        last = min(offset + self.length, size)
        span = self.documents[int(index)][int(start) + max(offset - 1, 0) : int(start) + last]
        inputs = span if offset else np.concatenate([[self.documents.bos], span])
        count = min(self.length, len(inputs))
        batch["inputs"][row, :count] = inputs[:count]
        batch["targets"][row, : last - offset] = span[-(last - offset) :]
        batch["mask"][row, :count] = True
        batch["reset"][row] = offset == 0
        return last == size


def _tensors(batch: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


class DocumentStream:
    """An endless iterator of rollouts over shuffled documents.

    A rollout is `inputs` Int [B, R], `targets` Int [B, R] (the next token of the stream, also
    across rollouts; -100 at a document's end and in padding), `mask` Bool [B, R] (True = a real
    position) and `reset` Bool [B] (the row begins a document: its state must start fresh).

    Every document begins with bos, so that every byte is a target exactly once an epoch. When a
    row's document ends, the rest of the row is masked and the next rollout begins the next document
    of the epoch's order, which depends on (seed, epoch) alone. With fewer documents than rows the
    longest are cut into contiguous pieces of equal length, each of which is read as a document of
    its own and begins with bos. Text is read when it is needed.

    What a rollout holds depends on (documents, batch_size, seed), the position and `length` alone,
    which may be set anew before any rollout; `state_dict` is the position, plain data for JSON.
    """

    def __init__(
        self,
        documents: Documents | Sequence[Any],
        *,
        batch_size: int,
        length: int,
        seed: int = 0,
    ):
        documents = as_documents(documents)
        self.seed, self.batch_size = seed, batch_size
        self._reader = _Reader(documents, cut(documents.lengths, batch_size), length)
        self._text = _fingerprint(documents)
        self.epoch, self._next = 0, 0
        self._order = self._shuffle()
        self._rows = [(self._take(), 0) for _ in range(batch_size)]

    @property
    def length(self) -> int:
        """R, of the rollouts to come."""
        return self._reader.length

    @length.setter
    def length(self, length: int) -> None:
        self._reader.length = length

    def _shuffle(self) -> np.ndarray:
        generator = np.random.default_rng((self.seed, self.epoch))
        return generator.permutation(len(self._reader.pieces))

    def _take(self) -> int:
        if self._next == len(self._order):
            self.epoch, self._next = self.epoch + 1, 0
            self._order = self._shuffle()
        self._next += 1
        return int(self._order[self._next - 1])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._reader.blank(self.batch_size)
        for row, (piece, offset) in enumerate(self._rows):
            ended = self._reader.fill(batch, row, piece, offset)
            following = (self._take(), 0) if ended else (piece, offset + self._reader.length)
            self._rows[row] = following
        return _tensors(batch)

    def state_dict(self) -> dict[str, Any]:
        """The position before the next rollout."""
        return {
            "text": self._text,
            "epoch": self.epoch,
            "next": self._next,
            "rows": [list(row) for row in self._rows],
        }

    def load_state_dict(self, position: dict[str, Any]) -> None:
        """Go to a position of a stream with the same arguments; `UserError` for another text."""
        if position["text"] != self._text or len(position["rows"]) != self.batch_size:
            raise UserError(
                "the position belongs to other documents (their number, lengths or text differ): "
                "resume with the data the run was started with"
            )
        self.epoch, self._next = position["epoch"], position["next"]
        self._order = self._shuffle()
        self._rows = [(piece, offset) for piece, offset in position["rows"]]


def _fingerprint(documents: Documents) -> str:
    """Of every document's length, beginning and end: a huge text need not be read to know it."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))
        for part in (document[:_EDGE], document[max(0, len(document) - _EDGE) :]):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


_EDGE = 1024  # tokens at either end of a document


def validation_batches(
    documents: Documents | Sequence[Any], *, batch_size: int, length: int
) -> Iterator[Batch]:
    """One pass over all documents as rollouts like `DocumentStream`'s; every byte is a target once.

    Longest first, a row takes the next when its own ends; a row that finds none left is masked
    whole. Documents are cut into pieces when they are fewer than the rows; at most one row a token.
    """
    documents = as_documents(documents)
    rows = min(batch_size, sum(documents.lengths))
    if rows == 0:
        raise UserError("the text is empty: there is nothing to evaluate")
    pieces = cut(documents.lengths, rows)
    reader = _Reader(documents, pieces, length)
    queue = iter(np.argsort(pieces[:, 1] - pieces[:, 2], kind="stable"))
    work: list[tuple[int, int] | None] = [(int(next(queue)), 0) for _ in range(rows)]
    while any(work):
        batch = reader.blank(rows)
        for row, place in enumerate(work):
            if place is None:
                continue
            piece, offset = place
            if reader.fill(batch, row, piece, offset):
                following = next(queue, None)
                work[row] = None if following is None else (int(following), 0)
            else:
                work[row] = (piece, offset + length)
        yield _tensors(batch)


def segments(batch: Batch, length: int, device: torch.device | str = "cpu") -> list[Batch]:
    """The rollout cut into segments of `length` tokens: `inputs`, `targets` and `mask` [B, S].

    Segments that are padding in every row are left out, and so is a mask that masks nothing.
    """
    masks = batch["mask"].split(length, 1)  # looked at where they are: no wait for the device
    names = ("inputs", "targets", "mask")
    parts = zip(*(batch[name].to(device).split(length, 1) for name in names), strict=True)
    cuts = []
    for mask, part in zip(masks, parts, strict=True):
        if bool(mask.any()):
            cuts.append(dict(zip(names[: 2 if bool(mask.all()) else 3], part, strict=False)))
    return cuts
