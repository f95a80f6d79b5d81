"""The compatibility page says what tests found: of the registry's memories, and nothing else."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import everlong

ROOT = Path(__file__).parents[1]
RENEW = "run the two commands of docs/compatibility.md; for a new memory with -k NAME"


@pytest.fixture(scope="module")
def compatibility():
    path = ROOT / "benchmarks" / "compatibility.py"
    spec = importlib.util.spec_from_file_location("compatibility", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_was_found(compatibility):
    page = compatibility.PAGE.read_text()
    assert compatibility.fill(page) == page, RENEW


def test_its_memories_are_the_registry(compatibility):
    models = [of for of in compatibility.found() if of.startswith(compatibility.GENERATE)]
    assert len(models) == 2
    memories = {compatibility.memory_of(of) for of in compatibility.found() if of not in models}
    assert memories == set(everlong.list_memories()), RENEW


def test_what_is_found_and_what_is_shown_are_the_same_things(compatibility):
    """A column whose test has another name now would stay empty, a new mark would not be seen."""
    tables = ("LAWS", "TRANSFORMERS", "NUMBERS", "PROCESSES", "DECODERS")
    shown = {w for t in tables for asked in getattr(compatibility, t).values() for w in asked}
    shown |= set(compatibility.ONCE)
    results = compatibility.found().items()
    found = {w for of, told in results if not of.startswith(compatibility.GENERATE) for w in told}
    assert found == shown, RENEW


def test_a_cell_is_as_good_as_its_worst_test(compatibility):
    notes = compatibility.Notes()
    for told, shown in [
        ([["passed"], ["passed", "passed"]], "✓"),
        ([["passed: whole"]], "✓ whole"),
        ([["passed"], []], ""),
        ([], ""),
        ([["skipped: it has one form"]], "– (1)"),
        ([["skipped: it has one form"], ["passed"]], "✓"),
        ([["passed"], ["passed", "failed: too far off: 3"]], "no (2)"),
        ([[], ["failed: too far off: 3"]], "no (2)"),
    ]:
        assert compatibility.cell(told, notes) == shown
    assert str(notes) == "\n(1) it has one form<br>\n(2) too far off: 3\n"


TESTS = """
import pytest

@pytest.mark.supports("adds")
@pytest.mark.parametrize("name", ["gla", "rmt, llama"])
@pytest.mark.parametrize("number", [1, 2])
def test_adds(name, number, record_property):
    record_property("note", "fast")
    assert name == "gla" or number == 1, "too far off"

@pytest.mark.supports("says {word}", of="gla")
@pytest.mark.parametrize("word", ["hello"])
def test_says(word):
    pytest.skip("no mouth")

@pytest.mark.supports("wins")
@pytest.mark.parametrize("name", [pytest.param("gla", marks=pytest.mark.xfail(reason="tired"))])
def test_wins(name):
    raise AssertionError

@pytest.mark.supports("sets up", of="gla")
def test_sets_up(no_such_fixture): ...

@pytest.mark.supports("is left out", of="gla")
@pytest.mark.benchmark
def test_is_left_out(): ...
"""


def test_outcomes_are_written_down(tmp_path):
    """Through a worker of xdist; what was found at another commit is written anew, not mixed."""
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n  supports: shown\n  benchmark: long\naddopts = -m 'not benchmark'\n"
    )
    file = tmp_path / "found.json"
    before = {"found": {"gla": {"old": "passed"}, "hgrn": {"old": "passed"}}}
    file.write_text(json.dumps(before | {"git": {"gla": "before", "hgrn": "before"}}))
    command = [sys.executable, "-m", "pytest", "-p", "supports", "-n", "1", "--compatibility", file]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "test_it.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads(file.read_text())
    found = result["found"]
    assert found == {
        "gla": {
            "adds": "passed: fast",
            "says hello": "skipped: no mouth",
            "sets up": "failed: could not be run",
            "wins": "failed: tired",
        },
        "hgrn": {"old": "passed"},
        "rmt, llama": {"adds": "failed: AssertionError: too far off"},
    }
    assert result["git"]["hgrn"] == "before" != result["git"]["gla"]
