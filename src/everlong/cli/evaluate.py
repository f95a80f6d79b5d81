"""`everlong evaluate`: what a run's model pays for a text."""

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter


def evaluate(
    run: Path,
    /,
    *,
    text: str | None = None,
    wipe: Annotated[bool, Parameter(negative=())] = False,
    surprise: Path | None = None,
) -> None:
    """Bits per byte of a text, read as one stream a document in constant memory.

    Parameters
    ----------
    run
        A run folder, or a folder that save_pretrained wrote.
    text
        A packaged text, a file or a folder; the run's own validation text if left out.
    wipe
        Start fresh at every segment: the same weights without what they remember.
    surprise
        Write what each token cost to this file, one JSON object a line.
    """
    from everlong.cli.final import LOOKS_AHEAD
    from everlong.cli.progress import size
    from everlong.cli.runs import open_run
    from everlong.models.decoder import looks_ahead

    opened = open_run(run)
    documents = _documents(opened, text)
    length = _segment_length(opened)
    started = time.perf_counter()
    nats, state_bytes = _read(opened, documents, length if wipe else None, surprise)
    seconds = time.perf_counter() - started
    bits = nats / math.log(2) / documents.num_bytes
    pieces = "contexts" if opened.recipe and opened.recipe.data.context else "documents"
    print(
        f"{bits:.4f} bits per byte{' with the memory wiped at every segment' if wipe else ''}: "
        f"{documents.num_bytes:,} bytes in {len(documents):,} {pieces}, "
        f"{sum(documents.lengths) / seconds:,.0f} tokens/s, state {size(state_bytes)}"
        f"{LOOKS_AHEAD if looks_ahead(opened.model.config) else ''}"
    )


def _documents(opened: Any, text: str | None) -> Any:
    from everlong.cli.prepare import load_texts
    from everlong.errors import UserError
    from everlong.tasks.text import in_contexts, load_documents, tokenize

    if text is not None:
        documents = load_documents(text)
        documents = tokenize(documents, opened.tokenizer) if opened.tokenizer else documents
        context = opened.recipe.data.context if opened.recipe else 0
        return in_contexts(documents, context) if context else documents
    if opened.recipe is None:
        raise UserError(f"{opened.folder} is a model without a text of its own: give --text")
    return load_texts(opened.recipe.data).validation


def _segment_length(opened: Any) -> int:
    return opened.segment_length or opened.model.period


def _read(
    opened: Any, documents: Any, wipe_every: int | None, surprise: Path | None
) -> tuple[float, int]:
    """Nats of all documents, and the most bytes of state that one of them left."""
    from contextlib import nullcontext

    from everlong.cli.reader import Reader

    reader, nats, largest = Reader(opened.model, opened.bos), 0.0, 0
    # a file name that is not UTF-8 becomes JSON's own escapes: nothing of it is lost
    file = surprise and surprise.open("w", encoding="utf-8", errors="backslashreplace")
    with file or nullcontext() as out:
        for document in documents:
            reader.reset()
            for index, costs, ids in reader.read_document(document, wipe_every):
                nats += costs.double().sum().item()
                if out is not None:
                    out.writelines(_lines(document.name, index, ids, costs))
            largest = max(largest, reader.num_bytes)
    return nats, largest


def _lines(name: str, start: int, ids: Any, costs: Any) -> Any:
    for index, (token, nats) in enumerate(zip(ids.tolist(), costs.tolist(), strict=True), start):
        row = {"document": name, "index": index, "token": token, "bits": nats / math.log(2)}
        yield json.dumps(row, ensure_ascii=False) + "\n"
