"""What a saved folder says of its model: a model card, and the file that names our classes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from everlong import registry
from everlong import state as states
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
    config: Any = model.config
    segment = config.memory if config.model_type == "everlong_extended" else config.segment
    layers = _layers(model)
    names = layers if segment is None else [segment["name"]]
    title = " and ".join(f"`{name}`" for name in names)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    total = model.num_parameters()
    return _CARD.format(
        tags="\n".join(f"- {name}" for name in names),
        title=title,
        layers=", ".join(f"`{name}`" for name in layers),
        state=_state(model, segment, layers),
        parameters=f"{total:,}" + (f", {trained:,} of them trained" if trained != total else ""),
        keeps="\n".join(_keeps(name) for name in names) + _warning(config, segment),
        loader=LOADER,
    )


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
def _state(model: "StreamForCausalLM", segment: Any, layers: list[str]) -> str:
    """Bytes of one stream's state; what a segment memory stands around is bounded by it."""
    size = f"{states.num_bytes(model.init_state(1)):,} bytes"
    deciding = layers if segment is None else [segment["name"]]
    growing = [name for name in deciding if not registry.memory_entry(name).bounded]
    if not growing:
        return f"{size}, the same after any number of tokens (bounded)"
    return f"{size} at its start; {' and '.join(growing)} grows with every token"


def _warning(config: Any, segment: Any) -> str:
    """Said of protocols whose predictions depend on later tokens."""
    if segment is None:
        return ""
    options = {"hidden_size": config.hidden_size, "num_heads": getattr(config, "num_heads", 1)}
    options |= {key: value for key, value in segment.items() if key != "name"}
    built = registry.build_config(registry.memory_entry(segment["name"]), options)
    if not getattr(built, "looks_ahead", False):
        return ""
    return "\n\nIts predictions depend on later tokens: its scores are no causal model's."
