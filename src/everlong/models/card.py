"""What a saved folder says of its model: a model card, and the file that names our classes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from everlong import registry
from everlong import state as states
from everlong.models.decoder import looks_ahead
from everlong.stack import Stack

if TYPE_CHECKING:
    from everlong.models.hub import StreamForCausalLM

LOADER = "everlong_auto"
_CLASSES = {
    "everlong": ("EverlongConfig", "EverlongForCausalLM"),
    "everlong_extended": ("ExtendedConfig", "ExtendedForCausalLM"),
}
_LOADER = '''"""The classes of this folder's model, which are those of the package everlong."""

from everlong.auto import {config}, {model}

__all__ = ["{config}", "{model}"]
'''
_CARD = """---
library_name: everlong
pipeline_tag: text-generation
license: unknown # of the weights, yours to state; the package everlong is Apache-2.0
tags:
- everlong
{tags}
---

# A language model with {title}

It reads a stream of any length. What it remembers is an explicit state that goes in and comes out.

| | |
| --- | --- |
| memory | {title} |
| layers | {layers} |
| state of a stream | {state} |
| parameters | {parameters} |

{keeps}

```python
import torch
import everlong.auto  # pip install everlong
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")  # this folder; elsewhere its path or repository
ids = torch.zeros(1, 8, dtype=torch.long)  # a tokenizer's ids
logits, state = model.stream(ids)  # what the state holds goes on with the next call
logits, state = model.stream(ids, state)
model.generate(ids, max_new_tokens=8, do_sample=False)
```

`trust_remote_code=True` does instead of `import everlong.auto`, where the package is installed:
`{loader}.py` names its classes.
"""

_AHEAD = "\n\nIts predictions depend on later tokens: its scores are no causal model's."


def write(model: "StreamForCausalLM", folder: Path) -> None:
    """The loader file, `auto_map` in the model's config, and README.md unless there is one."""
    kind: str = model.config.model_type
    config, cls = _CLASSES[kind]
    (folder / f"{LOADER}.py").write_text(_LOADER.format(config=config, model=cls), "utf-8")
    model.config.auto_map = {
        "AutoConfig": f"{LOADER}.{config}",
        "AutoModelForCausalLM": f"{LOADER}.{cls}",
    }
    page = folder / "README.md"
    if not page.exists():
        page.write_text(text(model), "utf-8")


def text(model: "StreamForCausalLM") -> str:
    """The model card: the memories, what they keep, bytes of a stream's state, how to load."""
    layers, names = _layers(model), memories(model)
    title = " and ".join(f"`{name}`" for name in names)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    total = model.num_parameters()
    return _CARD.format(
        tags="\n".join(f"- {name}" for name in names),
        title=title,
        layers=", ".join(f"`{name}`" for name in layers),
        state=_state(model, names),
        parameters=f"{total:,}" + (f", {trained:,} of them trained" if trained != total else ""),
        keeps="\n".join(_keeps(name) for name in names) + (_AHEAD if looks_ahead(model) else ""),
        loader=LOADER,
    )


def memories(model: "StreamForCausalLM") -> list[str]:
    """The names of the memories that decide what is kept: the segment memory, or the layers'."""
    config: Any = model.config
    extended = config.model_type == "everlong_extended"
    segment = config.memory if extended else config.segment
    return [segment["name"]] if segment else list(dict.fromkeys(config.layer_names))


def _layers(model: "StreamForCausalLM") -> list[str]:
    """What the layers are: mixers by name, the class of a pretrained model, or the memory's own."""
    config: Any = model.config
    if config.model_type == "everlong_extended":
        return config.base["architectures"]
    if any(isinstance(each, Stack) for each in model.modules()):
        return list(dict.fromkeys(config.layer_names))
    return [config.segment["name"]]


def _keeps(name: str) -> str:
    entry = registry.memory_entry(name)
    return f"- `{name}` ({entry.paper}): {entry.keeps}."


@torch.no_grad()
def _state(model: "StreamForCausalLM", names: list[str]) -> str:
    """Bytes of one stream's state; what a segment memory stands around is bounded by it."""
    size = f"{states.num_bytes(model.init_state(1)):,} bytes"
    growing = [name for name in names if not registry.memory_entry(name).bounded]
    if not growing:
        return f"{size}, the same after any number of tokens (bounded)"
    return f"{size} at its start; {' and '.join(growing)} grows with every token"
