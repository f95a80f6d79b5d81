"""`everlong inspect`: a page of what a run's memory kept, overwrote and forgot of a text."""

import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

_SEGMENTS = 500  # whose writes a page holds: a column each


def inspect(
    run: Path,
    /,
    *,
    text: str,
    out: Path | None = None,
    tokens: Annotated[int, Parameter(negative=())] = 1000,
) -> None:
    """One HTML page of what the memory did with a text: kept, overwrote, forgot and read.

    The text is read as one stream from a fresh state. The page needs no network and no other file.

    Parameters
    ----------
    run
        A run folder, or a folder that save_pretrained wrote.
    text
        A file, or a packaged text of one document.
    out
        The page; inspect.html in the run folder if left out. No file is overwritten.
    tokens
        How many of the first tokens are shown one by one; the rest is in the charts.
    """
    from everlong.cli.outputs import new_file
    from everlong.cli.runs import open_run
    from everlong.errors import UserError
    from everlong.evaluation.inspection import inspect_stream
    from everlong.evaluation.inspection_page import page

    if tokens < 1:
        raise UserError(f"--tokens is {tokens}: show at least 1")
    raw, opened = _one_document(text), open_run(run)
    stream, ids = _stream(opened, raw)
    length = opened.model.period if opened.model.period > 1 else opened.segment_length or 256
    out = run / "inspect.html" if out is None else out
    started = time.perf_counter()
    with new_file(out) as file:
        found = inspect_stream(opened.model, ids, length, tokens, _SEGMENTS)
        seconds = time.perf_counter() - started
        texts = token_texts(ids[: found.detailed], opened.tokenizer)
        html = page(found, texts, _about(opened, stream, found, length), _metrics(run))
        file.write(html)
    print(
        f"{len(ids):,} tokens in {len(found.segments):,} segments, {len(ids) / seconds:,.0f} "
        f"tokens/s: {out} ({len(html.encode()) / 1e6:.1f} MB)"
    )


def _one_document(text: str) -> Any:
    from everlong.errors import UserError
    from everlong.tasks.text import load_documents

    documents = load_documents(text)
    if len(documents) > 1:
        raise UserError(f"{text} holds {len(documents)} documents: give --text one file")
    return documents


def _stream(opened: Any, raw: Any) -> tuple[Any, Any]:
    """The document in the model's tokens, and its ids behind what a stream begins with."""
    import numpy as np

    from everlong.tasks.text import tokenize

    documents = tokenize(raw, opened.tokenizer) if opened.tokenizer else raw
    return documents, np.append(opened.bos, np.asarray(documents[0]).astype(np.int64))


def token_texts(ids: Any, tokenizer: Any) -> list[str]:
    """What a reader sees of each token. What is no visible character is spelled, a new line apart;
    the bytes of one character are that character, then dots."""
    if tokenizer is not None:
        return [_visible(tokenizer.decode([token])) for token in ids.tolist()]
    texts, index, ids = [], 0, ids.tolist()
    while index < len(ids):
        here = _character(ids[index : index + 4])
        if here is None:
            token = ids[index]
            texts.append("⟨bos⟩" if token == 256 else f"\\x{token:02x}" if token < 256 else "⟨⟩")
            index += 1
        else:
            size = len(here.encode())
            texts += [_visible(here), *["·"] * (size - 1)]
            index += size
    return texts


def _character(ids: list[int]) -> str | None:
    """The UTF-8 character that these bytes begin with; None where they begin with none."""
    for size in range(1, 1 + len(ids)):
        if ids[size - 1] > 255:
            return None
        try:
            return bytes(ids[:size]).decode()
        except UnicodeDecodeError:
            continue
    return None


def _visible(text: str) -> str:
    """Characters that print and new lines as they are; others (which may turn text around) by their
    number."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
        for each in text
    )


def _about(opened: Any, stream: Any, found: Any, length: int) -> Any:
    import numpy as np

    from everlong.cli.final import LOOKS_AHEAD
    from everlong.cli.progress import size
    from everlong.evaluation.inspection_page import About
    from everlong.models.card import memories
    from everlong.models.decoder import looks_ahead
    from everlong.provenance import command, environment
    from everlong.registry import memory_entry

    config = opened.model.config
    names = memories(opened.model)
    ahead = LOOKS_AHEAD if looks_ahead(opened.model) else ""
    around = f" around {config.base['model_type']}" if hasattr(config, "base") else ""
    bits = float(np.nansum(found.bits))
    facts = {
        "run": str(opened.folder),
        "text": stream.source,
        "tokens": f"{len(found.ids):,} in {len(found.segments):,} segments of {length:,}",
        "bits per byte": f"{bits / stream.num_bytes:.3f}{ahead}",
        "state at the end": size(found.segments[-1].num_bytes),
        "parameters": f"{opened.model.num_parameters():,}",
    }
    keeps = "; ".join(f"{name}: {memory_entry(name).keeps}" for name in names)
    told = environment()
    made = f"Made by `{command()}` with everlong {told['everlong']}, torch {told['torch']}."
    return About(" + ".join(names) + around, keeps, facts, made)


def _metrics(run: Path) -> dict[str, Any]:
    """The lines that the training of the run, and of its twin, left; none for a bare model."""
    from everlong.training.run import read_metrics

    folders = {"memory": run, "twin without a memory": run / "twin"}
    found = {name: read_metrics(folder / "metrics.jsonl") for name, folder in folders.items()}
    return {name: lines for name, lines in found.items() if lines}
