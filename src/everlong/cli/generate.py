"""`everlong generate`: a stream continued, or read for ever in constant memory."""

import math
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

_INTERVAL = 2.0  # seconds between two reports of --stdin
_LENGTH = 200  # tokens made where the user says nothing

_Whole = Annotated[int | None, Parameter(validator=validators.Number(gte=0))]


def generate(  # noqa: PLR0913 (a command's options)
    run: Path,
    /,
    *,
    prompt: str | None = None,
    stdin: Annotated[bool, Parameter(negative=())] = False,
    load_state: Path | None = None,
    save_state: Path | None = None,
    max_new_tokens: _Whole = None,
    temperature: Annotated[float, Parameter(validator=validators.Number(gte=0))] = 0.8,
    top_k: _Whole = None,
    top_p: Annotated[float | None, Parameter(validator=validators.Number(gt=0, lte=1))] = None,
    seed: Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**63))] = 0,
) -> None:
    """Continue a text; the continuation goes to stdout as it is made.

    Parameters
    ----------
    run
        A run folder, or a folder that save_pretrained wrote.
    prompt
        The text to continue.
    stdin
        Read standard input to its end, however long it is, and report bits per byte and bytes of
        state on stderr; then continue it by --max-new-tokens (here 0 if left out).
    load_state
        Begin where a state file ends instead of at the beginning of a text.
    save_state
        Write where the stream ends.
    max_new_tokens
        200 if left out.
    temperature
        0 always takes the likeliest token.
    top_k
        Sample among the likeliest k only.
    top_p
        Sample among the likeliest tokens that make up this much probability.
    seed
        Of the sampling.
    """
    from everlong.errors import UserError

    if prompt is not None and stdin:
        raise UserError("give --prompt or --stdin, not both")
    if prompt is None and not stdin and load_state is None:
        raise UserError("nothing to continue: give --prompt, --stdin or --load-state")
    count = (0 if stdin else _LENGTH) if max_new_tokens is None else max_new_tokens
    sampling = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    if stdin and sys.stdin is None:
        raise UserError("standard input is closed: --stdin reads from a pipe or a file")
    if save_state is not None:
        _check_writable(save_state)
    reader, tokenizer = _open(run, load_state)
    try:
        if stdin:
            _read_pipe(reader, tokenizer)
        elif prompt:
            reader.read(_encode(prompt, tokenizer))
        if count:
            reader.continue_(_printer(tokenizer), seed, max_new_tokens=count, **sampling)
    finally:
        if save_state is not None:  # after Ctrl-C too: what was read is not read again
            reader.save(save_state)


def _open(run: Path, load_state: Path | None) -> tuple[Any, Any]:
    from everlong.cli.reader import Reader
    from everlong.cli.runs import open_run
    from everlong.errors import UserError

    opened = open_run(run)
    reader = Reader(opened.model, opened.bos)
    if load_state is not None:
        if not load_state.is_file():
            raise UserError(f"no state file at {load_state}: --save-state writes one")
        reader.load(load_state)
    return reader, opened.tokenizer


def _check_writable(file: Path) -> None:
    """Before anything is read: a long stream is not lost to a folder that is not there."""
    from everlong.errors import UserError

    if file.is_dir():
        raise UserError(f"--save-state {file} is a folder: give a file in it")
    if not file.parent.is_dir():
        raise UserError(f"--save-state {file}: there is no folder {file.parent}, make it first")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"--save-state {file}: the folder {file.parent} cannot be written")


def _printer(tokenizer: Any) -> Any:
    from everlong.cli.reader import printer

    return printer(tokenizer, sys.stdout)


def _encode(text: str, tokenizer: Any) -> Any:
    import numpy as np

    if tokenizer is None:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int64)


def _read_pipe(reader: Any, tokenizer: Any) -> None:
    """Read standard input to its end; a report every few seconds and one at the end."""
    from everlong.cli.reader import stream_ids

    nats, count, told, reported = 0.0, 0, -1, time.monotonic()
    try:
        for ids, num_bytes in stream_ids(sys.stdin.buffer, tokenizer):
            nats += reader.read(ids).double().sum().item()
            count += num_bytes
            if time.monotonic() - reported >= _INTERVAL:
                _report(nats, count, reader)
                told, reported = count, time.monotonic()
    finally:
        if told != count:
            _report(nats, count, reader)


def _report(nats: float, count: int, reader: Any) -> None:
    bits = f"{nats / math.log(2) / count:.4f} bits per byte" if count else "nothing"
    print(f"read {count:,} bytes: {bits}, state {reader.num_bytes:,} bytes", file=sys.stderr)
