"""WikiText-103, PG-19 and enwik8, from files on this machine or through `datasets`.

What is scored, and by what its cost is divided, is what the published tables do:

    wikitext103  the test file is one stream, as it lies (its tokens are separated by white space);
                 per word: tokens and line ends, 245,569 in the test split
    pg19         each book of the test split is a stream of its own; per word of the published
                 count, 6,966,499 in the test split (Rae et al. 2020, arXiv 1911.05507)
    enwik8       the last 5,000,000 of 100,000,000 bytes, after 90 for training and 5 for
                 validation; bits per character, which is a byte
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everlong.errors import UserError
from everlong.registry import check_choice
from everlong.tasks.text import Document, Documents

SPLITS = ("train", "validation", "test")
ENWIK8_BYTES = 100_000_000


@dataclass(frozen=True)
class Standard:
    """unit: "word" or "character"; ends: whether the ends of lines are words too; published: words
    of the split as published, by split; hub: a data set of Hugging Face's hub and its part."""

    name: str
    unit: str
    files: Callable[[Path, str], Documents]
    ends: bool = False
    published: tuple[tuple[str, int], ...] = ()
    hub: tuple[str, ...] = ()


def load_standard(name: str, path: Path | None = None, split: str = "test") -> Documents:
    """The documents of a split. `path` None: through `datasets`, from the hub or its cache.

    Raises `UserError`, which says what to get, for missing files, a missing package or network.
    """
    check_choice("split", split, SPLITS)
    standard = STANDARDS[name]
    if path is not None:
        return standard.files(path, split)
    return _from_hub(standard, split)


def _wikitext(path: Path, split: str) -> Documents:
    short = "valid" if split == "validation" else split
    names = [f"wiki.{short}.tokens", f"wiki.{short}.raw"]
    file = _file(path, names, "WikiText-103")
    return _documents(path, [_whole(file)])


def _pg19(path: Path, split: str) -> Documents:
    folder = path / split if (path / split).is_dir() else path
    if not folder.is_dir():
        raise UserError(
            f"{path} is no folder: for PG-19 give the folder of its books (.txt), or of its splits"
        )
    books = sorted(folder.glob("*.txt"))
    if not books:
        raise UserError(f"{folder} holds no .txt file: PG-19 is a folder with one book in each")
    return _documents(path, [_whole(book) for book in books])


def _enwik8(path: Path, split: str) -> Documents:
    file = _file(path, ["enwik8"], "enwik8")
    size = file.stat().st_size
    ends = {"train": (0, 90), "validation": (90, 95), "test": (95, 100)}[split]
    start, stop = (size * percent // 100 for percent in ends)
    if start == stop:
        raise UserError(f"{file} has {size} bytes: nothing is left for its {split} split")
    return _documents(path, [Document(f"{file.name}[{split}]", file, start, stop, stop - start)])


def _file(path: Path, names: list[str], title: str) -> Path:
    """The path itself, or the first of the names in the folder that it is."""
    places = [path / name for name in names] if path.is_dir() else [path]
    for place in places:
        if place.is_file():
            return place
    if path.is_dir():
        raise UserError(f"{path} holds no {' or '.join(names)}: give the {title} file itself")
    raise UserError(f"no {title} at {path}: give its file, or the folder with {' or '.join(names)}")


def _whole(file: Path) -> Document:
    size = file.stat().st_size
    return Document(file.name, file, 0, size, size)


def _documents(source: Path | str, items: list[Document]) -> Documents:
    items = [item for item in items if len(item)]
    if not items:
        raise UserError(f"{source} is empty: there is nothing to read in it")
    return Documents(str(source), tuple(items))


def _from_hub(standard: Standard, split: str) -> Documents:
    asked = f"{standard.name} from files: --text PATH"
    if not standard.hub:
        raise UserError(f"{standard.name} is in no data set that can be loaded: give {asked}")
    try:
        datasets: Any = importlib.import_module("datasets")  # of an extra
    except ImportError as error:
        raise UserError(
            f"{standard.name} needs `pip install 'everlong[data]'` and the network, or give {asked}"
        ) from error
    try:
        rows: Any = datasets.load_dataset(*standard.hub, split=split)
    except (OSError, ValueError) as error:  # of the hub, of the network, of the cache
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{standard.name} cannot be fetched ({reason}): go online once, or give {asked}"
        ) from error
    texts = (row["text"].encode() for row in rows)
    data = [b"".join(_lines(texts))] if standard.ends else list(texts)
    items = [
        Document(
            f"{standard.name}[{index}]", np.frombuffer(text, np.uint8), 0, len(text), len(text)
        )
        for index, text in enumerate(data)
    ]
    return _documents(standard.hub[0], items)


def _lines(rows: Iterator[bytes]) -> Iterator[bytes]:
    """Lines as in the file: the hub's rows lack the white space of empty ones."""
    for row in rows:
        yield row or b" \n"


STANDARDS = {
    each.name: each
    for each in (
        Standard(
            "wikitext103",
            "word",
            _wikitext,
            ends=True,
            published=(("train", 103_227_021), ("validation", 217_646), ("test", 245_569)),
            hub=("Salesforce/wikitext", "wikitext-103-raw-v1"),
        ),
        Standard(
            "pg19",
            "word",
            _pg19,
            published=(("train", 1_973_136_207), ("validation", 3_007_061), ("test", 6_966_499)),
            hub=("emozilla/pg19",),
        ),
        Standard("enwik8", "character", _enwik8),
    )
}
