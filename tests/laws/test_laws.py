"""Every registered memory under every law that applies: nobody lists methods by hand."""

import pytest

import everlong
from laws.cases import memory_case
from laws.checks import LAWS, check


@pytest.mark.supports("law {law}")
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", everlong.list_memories())
def test_memory_obeys(name, law, tmp_path):
    check(law, memory_case(name), tmp_path)
