"""The pages tell the truth: every memory has one, tables are the registry's, code blocks run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import everlong
from everlong.evaluation.cost import memory_row, memory_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{index}")
    for page in PAGES
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def test_every_memory_has_a_page():
    pages = {page.stem for page in (ROOT / "docs" / "memories").glob("*.md")}
    assert pages == set(everlong.list_memories())


def test_the_table_of_memories_is_the_registry():
    pattern = r"<!-- memories -->\n(.*?)<!-- /memories -->"
    found = re.search(pattern, PAGES[0].read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == memory_table(), "put what evaluation.cost.memory_table() returns there"
    assert all(f"[{name}]" in found[1] for name in everlong.list_memories())
    assert memory_row("attention")["bounded"] is False


@pytest.mark.parametrize("block", BLOCKS)
def test_code_blocks_run(block):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_files_and_links_that_pages_name_exist():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    assert tree is not None
    inside = ROOT / "src" / "everlong"
    for line in tree[1].splitlines()[1:]:
        for name in re.match(r"\s*((?:\S+ {1,2})+)", line)[1].split():
            assert (inside / name if line.startswith(" ") else ROOT / name).exists(), line
