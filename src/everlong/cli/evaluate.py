"""`everlong evaluate`: what a run's model pays for a text, and what it answers when it is asked."""

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any, TextIO

from cyclopts import Parameter


def evaluate(  # noqa: PLR0913 (each is an option of the command)
    run: Path,
    /,
    *,
    task: Annotated[tuple[str, ...], Parameter(negative=())] = ("language",),
    length: Annotated[tuple[int, ...], Parameter(negative=())] = (512, 2048),
    samples: int = 100,
    seed: int = 0,
    to_json: Annotated[Path | None, Parameter(name="--json")] = None,
    text: str | None = None,
    wipe: Annotated[bool, Parameter(negative=())] = False,
    surprise: Path | None = None,
) -> None:
    """Bits per byte and perplexities of a text, and accuracy of tasks at any length.

    A text is read as one stream a document, a task's items as one stream each, in constant memory.

    Parameters
    ----------
    run
        A run folder, or a folder that save_pretrained wrote.
    task
        "language" (default), "wikitext103", "pg19", "enwik8", or generated tasks, with shell
        wildcards: "needle_*". A wrong name lists all. May be given several times.
    length
        Of the tasks' items, in tokens of the model. May be given several times.
    samples
        Items of a task at each length.
    seed
        Of the items.
    to_json
        Write all that was found to this new file, with where it comes from.
    text
        A packaged text, a file or a folder; the run's own validation text if left out.
    wipe
        Start fresh at every segment: the same weights without what they remember. Of "language".
    surprise
        Write what each token cost to this new file, one JSON object a line. Of "language".
    """
    from dataclasses import asdict

    from everlong.cli.evaluate_tasks import evaluate_tasks, select
    from everlong.cli.runs import open_run
    from everlong.errors import UserError
    from everlong.evaluation.suite import Asked
    from everlong.provenance import write_results

    texts, names = select(task)
    if (wipe or surprise) and (texts != ["language"] or names):
        raise UserError("--wipe and --surprise are for the task language alone")
    if text is not None and not texts:
        raise UserError("--text is for language and the corpora: leave it out")
    asked = Asked(tuple(length), samples, seed)
    with _new(to_json), _new(surprise) as out:
        opened = open_run(run)
        rows = [_language(opened, name, text, wipe, out) for name in texts]
        if names:
            rows += evaluate_tasks(opened, names, asked)
        if to_json is not None:
            options = {"run": str(run), "tasks": [*texts, *names], "text": text, "wipe": wipe}
            config = {**options, **asdict(asked), "model": opened.model.config.to_dict()}
            write_results(to_json, "everlong evaluate", config, rows=rows)
        for path in filter(None, (to_json, surprise)):
            print(f"written to {path}")


def _new(path: Path | None) -> Any:
    from contextlib import nullcontext

    from everlong.cli.outputs import new_file

    return nullcontext() if path is None else new_file(path)


def _language(
    opened: Any, name: str, text: str | None, wipe: bool, surprise: TextIO | None
) -> dict[str, Any]:
    """Read, print, and the row."""
    from everlong.cli.final import LOOKS_AHEAD
    from everlong.cli.progress import size
    from everlong.evaluation.texts import TextScore, count_words
    from everlong.models.decoder import looks_ahead

    raw = _documents(opened, name, text)
    documents = _read_as(opened, raw)
    started = time.perf_counter()
    wipe_every = _segment_length(opened) if wipe else None
    nats, state_bytes = _read(opened, documents, wipe_every, surprise)
    seconds = time.perf_counter() - started
    tokens = sum(documents.lengths)
    score = TextScore(nats, tokens, documents.num_bytes, count_words(raw))
    piece = "context" if opened.recipe and opened.recipe.data.context else "document"
    pieces = piece if len(documents) == 1 else f"{piece}s"
    print(
        f"{score.bits_per_byte:.4f} bits per byte"
        f"{' with the memory wiped at every segment' if wipe else ''}: "
        f"{documents.num_bytes:,} bytes in {len(documents):,} {pieces}, "
        f"{tokens / seconds:,.0f} tokens/s, state {size(state_bytes)}"
        f"{LOOKS_AHEAD if looks_ahead(opened.model) else ''}"
    )
    found = {"word": score.word_perplexity, "token": score.token_perplexity}
    told = [f"{_number(value)} a {unit}" for unit, value in found.items() if value is not None]
    print(f"perplexity: {', '.join(told)} ({tokens:,} tokens, {_count(score.words)} words)")
    row = {
        "task": name,
        "bits_per_byte": score.bits_per_byte,
        "token_perplexity": score.token_perplexity,
        "word_perplexity": score.word_perplexity,
        "tokens": tokens,
        "words": score.words,
        "num_bytes": documents.num_bytes,
        "documents": len(documents),
        "tokens_per_s": tokens / seconds,
        "state_bytes": state_bytes,
    }
    return row if name == "language" else row | _as_published(name, raw, score)


def _as_published(name: str, documents: Any, score: Any) -> dict[str, Any]:
    """The measure of the published tables, printed and as part of the row."""
    from everlong.evaluation.published import published_score

    found = published_score(name, documents, score)
    print(
        f"{name}: {found['published_measure']} {_number(found['published_value'])}"
        f" over {found['published_units']:,} {found['published_count']}"
    )
    return found


def _number(value: float | None) -> str:
    return "beyond all numbers" if value is None else f"{value:,.4g}"


def _count(words: int | None) -> str:
    return "no" if words is None else f"{words:,}"


def _documents(opened: Any, name: str, text: str | None) -> Any:
    """Documents of bytes, whole."""
    from everlong.errors import UserError
    from everlong.tasks.standard import load_standard
    from everlong.tasks.text import load_documents, split

    if name != "language":
        return load_standard(name, None if text is None else Path(text))
    if text is not None:
        return load_documents(text)
    if opened.recipe is None:
        raise UserError(f"{opened.folder} is a model without a text of its own: give --text")
    data = opened.recipe.data
    return split(load_documents(data.source), data.validation)[1]


def _read_as(opened: Any, documents: Any) -> Any:
    """As the model was trained to read them: its tokens, its contexts."""
    from everlong.tasks.text import in_contexts, tokenize

    documents = tokenize(documents, opened.tokenizer) if opened.tokenizer else documents
    context = opened.recipe.data.context if opened.recipe else 0
    return in_contexts(documents, context) if context else documents


def _segment_length(opened: Any) -> int:
    return opened.segment_length or opened.model.period


def _read(
    opened: Any, documents: Any, wipe_every: int | None, surprise: TextIO | None
) -> tuple[float, int]:
    """Nats of all documents, and the most bytes of state that one of them left."""
    from everlong.cli.reader import Reader

    reader, nats, largest = Reader(opened.model, opened.bos), 0.0, 0
    for document in documents:
        reader.reset()
        for index, costs, ids in reader.read_document(document, wipe_every):
            nats += costs.double().sum().item()
            if surprise is not None:
                surprise.writelines(_lines(document.name, index, ids, costs))
        largest = max(largest, reader.num_bytes)
    return nats, largest


def _lines(name: str, start: int, ids: Any, costs: Any) -> Any:
    for index, (token, nats) in enumerate(zip(ids.tolist(), costs.tolist(), strict=True), start):
        row = {"document": name, "index": index, "token": token, "bits": nats / math.log(2)}
        yield json.dumps(row, ensure_ascii=False) + "\n"
