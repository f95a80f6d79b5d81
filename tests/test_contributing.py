"""The example of CONTRIBUTING.md is a memory: whoever copies it starts from one that obeys."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

from everlong.stateful import Stateful


def test_the_example_memory_obeys_the_first_laws() -> None:
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block
    entry = {}

    def register(name: str, **options):  # the real one would add it to everybody's registry
        entry.update(name=name, **options)
        return lambda cls: cls

    namespace = {"torch": torch, "dataclass": dataclass, "Stateful": Stateful, "register": register}
    exec(textwrap.dedent(block[1]), namespace)
    config = entry["config"](hidden_size=4, **entry["small"])
    memory = namespace["Fading"](config)

    x = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fresh = memory.init_state(2, dtype=torch.float64)
    whole, state = memory(x, fresh)
    first, middle = memory(x[:, :3], fresh)
    second, last = memory(x[:, 3:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-12)

    mask = torch.tensor([[True] * 7, [True, False] + [True] * 5])
    x[1, 1] = float("nan")
    masked, _ = memory(x, fresh, mask)
    valid = torch.cat([x[1:, :1], x[1:, 2:]], 1)
    compacted, _ = memory(valid, memory.init_state(1, dtype=torch.float64))
    torch.testing.assert_close(masked[1, mask[1]], compacted[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(masked[0], whole[0], rtol=0, atol=1e-12)
