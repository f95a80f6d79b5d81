"""The pages tell the truth: every memory has one, tables are computed, blocks and commands run.

Python blocks run page by page, in order and in one namespace, in an empty folder, without warnings
in Python's sense or in logging's. Of the shell's commands `everlong list`, `show` and `env` run,
and `train` runs with --dry-run. In the tutorial whose commands make a run and go on with it all of
them run as they stand, but tiny. All others (`bench`, and what needs a run) are read by the command
line's own parser. `make`, `pip` and `python FILE` must name what there is; TOML must be TOML.
"""

import importlib.util
import json
import logging
import re
import shlex
import tomllib
from itertools import dropwhile
from pathlib import Path

import pytest
import yaml
from cyclopts import CycloptsError

import everlong
from cli.tiny import TINY, sets
from everlong import registry
from everlong.cli import build_app, final, main
from everlong.evaluation.cost import memory_row, memory_table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
WHOLE = ("own_text.md",)  # its commands make a run and go on with it
QUIET = ("list", "show", "env")
OTHERS = ("curl", "tail", "cat", "hf", "git", "mkdocs", "zensical", "lm_eval")  # not ours
LANGUAGES = {"python", "bash", "console", "toml", "json", "text", ""}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def blocks(page):
    """(language, text) of every fenced block, in order."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(text):
    """The simple commands of a shell block, as lists of words: pipes and `&&` part them."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        found = [[]]
        for word in lexer:
            if set(word) <= set("|&;<>"):
                found.append([])
            else:
                found[-1].append(word)
        for words in found:
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield words


def parse(words):
    build_app().parse_args(words, print_error=False, exit_on_error=False)


def shrunk(words):
    """The command of a tutorial at test size."""
    if words[0] == "train":
        steps = "train.steps=3" if "--resume" in words else "train.steps=2"
        words = [re.sub(r"train\.steps=.*", steps, word) for word in words]
        own = [change for change in TINY if not change.startswith("train.steps")]
        words += [] if "--resume" in words else sets(*own)
    elif words[0] == "generate":
        words = [*words, "--max-new-tokens", "5"]
    return words


def run_everlong(words, page):
    parse(words)
    if page.name in WHOLE:
        words = shrunk(words)
    elif words[0] == "train" and "--resume" not in words:
        words = words if "--dry-run" in words else [*words, "--dry-run"]
    elif words[0] not in QUIET:
        return
    assert main(words) == 0, words


def check_pip(words):
    assert words[0] == "install"
    for word in words[1:]:
        extras = re.search(r"\[(.*)\]", word)
        known = {*PROJECT["optional-dependencies"]}
        assert extras is None or set(extras[1].split(",")) <= known, word


def run_command(words, page):
    program, *rest = dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)  # variables
    if program in ("torchrun", "accelerate"):
        program, *rest = "everlong", *rest[rest.index("everlong") + 1 :]
    if program.removeprefix(".venv/bin/") == "everlong":
        run_everlong(rest, page)
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif program == "pip":
        check_pip(rest)
    elif program == "python" and rest[0] == "-c":
        exec(rest[1], {})
    elif program == "python" and rest[:2] == ["-m", "everlong"]:
        run_everlong(rest[2:], page)
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), words
    else:
        assert program in OTHERS, f"{words}: say in {Path(__file__).name} how to check it"


@pytest.fixture
def aside(tmp_path, monkeypatch):
    """An empty folder, and a short end of a training; what a page registers is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(final, "STREAMED", (2, 5))
    monkeypatch.setattr(final, "_PASSAGE", 40)
    monkeypatch.setattr(final, "_CONTINUED", 5)
    everlong.list_memories()
    before = dict(registry._ENTRIES)
    yield
    registry._ENTRIES.clear()
    registry._ENTRIES.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_runs(page, aside, caplog):
    names = {"__name__": "__main__"}
    for number, (language, text) in enumerate(blocks(page)):
        assert language in LANGUAGES
        if language == "python":
            exec(compile(text, f"{page.name}, block {number}", "exec"), names)
            assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
        elif language in ("bash", "console"):
            for words in commands(text):
                run_command(words, page)
        elif language == "toml":
            tomllib.loads(text)
        elif language == "json":
            json.loads(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_in_the_text_are_commands(page):
    for told in re.findall(r"`(everlong\s[^`]*)`", page.read_text()):
        words = shlex.split(told)[1:]
        if not words[1:] or (words[0] == "bench" and not words[2:]):
            words.append("--help")  # a command's name alone: that it is one
        parse(words)


@pytest.mark.parametrize(
    "line",
    [
        "everlong trian",
        "everlong bench recal",
        "tail -f x | everlong generate run --promt x",
        "torchrun --nproc_per_node 2 -m everlong train --sett a=b",
        "make nothing",
        "pip install 'everlong[nothing]'",
        "python examples/gone.py",
        "frobnicate",
    ],
)
def test_a_command_that_is_wrong_is_found(line):
    *before, last = commands(line)
    for words in before:
        run_command(words, ROOT / "README.md")
    with pytest.raises((CycloptsError, AssertionError)):
        run_command(last, ROOT / "README.md")


def test_every_memory_has_a_page():
    pages = {page.stem for page in (DOCS / "memories").glob("*.md")}
    assert pages == set(everlong.list_memories())


def test_the_table_of_memories_is_the_registry():
    assert marked(README, "memories") == memory_table(), "put evaluation.cost.memory_table() there"
    assert all(f"[{name}]" in README for name in everlong.list_memories())
    assert memory_row("attention")["bounded"] is False


@pytest.mark.parametrize("name", ["choose", "measured", "memformer_paper"])
def test_the_tables_of_a_page_are_the_results(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (DOCS / f"{name}.md").read_text()
    for part, make in script.TABLES.items():
        assert marked(page, part) == make(), f"put what `python benchmarks/{name}.py` prints there"


def marked(text, name):
    """What stands between the marks of a computed table."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_sites_navigation_names_every_page_once():
    def walk(entry):
        if isinstance(entry, str):
            yield entry
        for below in entry.values() if isinstance(entry, dict) else entry:
            if not isinstance(entry, str):
                yield from walk(below)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = list(walk(site["nav"]))
    assert sorted(listed) == sorted(
        page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")
    )


def test_files_and_links_that_pages_name_exist():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    inside = ROOT / "src" / "everlong"
    for line in tree[1].splitlines()[1:]:
        for name in re.match(r"\s*((?:\S+ {1,2})+)", line)[1].split():
            assert (inside / name if line.startswith(" ") else ROOT / name).exists(), line
