"""A tiny trained run, made once, and a way to call the command line in this process."""

import pytest

from cli.tiny import SEGMENT, TINY, sets
from everlong.cli import final, main


@pytest.fixture
def call(capsys):
    """`call(*words)` -> (exit code, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(call):
    """A call that must end with one line on stderr and code 2; returns that line."""

    def run(*words):
        code, out, err = call(*words)
        assert (code, out) == (2, ""), (code, out, err)
        assert err.startswith("everlong: ")
        assert err.count("\n") == 1
        return err.strip()

    return run


@pytest.fixture
def briefly(monkeypatch):
    """The final measurement streams fewer segments and makes less text."""
    monkeypatch.setattr(final, "STREAMED", (2, 5))
    monkeypatch.setattr(final, "_PASSAGE", 40)
    monkeypatch.setattr(final, "_CONTINUED", 5)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The smoke recipe with a twin, two steps, everything measured."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(final, "STREAMED", (10, 20))
        assert main(["train", "smoke", "--out", str(folder), *sets(*TINY, *SEGMENT)]) == 0
    return folder
