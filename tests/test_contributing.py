"""The example of docs/new_memory.md is a memory: whoever copies it starts from one that obeys."""

import importlib.util
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from everlong import registry
from laws.cases import memory_case
from laws.checks import LAWS, check


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The example, copied into a file and registered for as long as these tests run."""
    page = (Path(__file__).parents[1] / "docs" / "new_memory.md").read_text()
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block
    file = tmp_path_factory.mktemp("mixers") / "fading.py"
    file.write_text(textwrap.dedent(block[1]))
    spec = importlib.util.spec_from_file_location("fading", file)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield "fading"
    del registry._ENTRIES["fading"]


@pytest.mark.parametrize("law", LAWS)
def test_the_example_obeys(example, law, tmp_path):
    check(law, memory_case(example), tmp_path)
