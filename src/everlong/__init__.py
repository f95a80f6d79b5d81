"""everlong: memory for sequence models.

A model that reads a stream is a function (input, state) -> (output, state). The state is explicit,
bounded, counted in bytes, and the way the stream is cut never changes the answer.

Importing this package imports neither torch nor transformers: public names load when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "EverlongConfig": "everlong.models.config",
    "EverlongForCausalLM": "everlong.models.hub",
    "Horizon": "everlong.training.horizon",
    "ReplayOptions": "everlong.training.replay",
    "ReplayTrainer": "everlong.training.trainer",
    "Stateful": "everlong.stateful",
    "Trace": "everlong.stateful",
    "create_memory": "everlong.registry",
    "extend": "everlong.models.wrap",
    "list_memories": "everlong.registry",
    "register": "everlong.registry",
    "replay": "everlong.training.replay",
    "replay_function": "everlong.training.replay",
}
_MODULES = ("auto", "ops", "state")

__all__ = [
    "EverlongConfig",
    "EverlongForCausalLM",
    "Horizon",
    "ReplayOptions",
    "ReplayTrainer",
    "Stateful",
    "Trace",
    "auto",
    "create_memory",
    "extend",
    "list_memories",
    "ops",
    "register",
    "replay",
    "replay_function",
    "state",
]

if TYPE_CHECKING:
    from everlong import auto, ops, state
    from everlong.models.config import EverlongConfig
    from everlong.models.hub import EverlongForCausalLM
    from everlong.models.wrap import extend
    from everlong.registry import create_memory, list_memories, register
    from everlong.stateful import Stateful, Trace
    from everlong.training.horizon import Horizon
    from everlong.training.replay import ReplayOptions, replay, replay_function
    from everlong.training.trainer import ReplayTrainer


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"everlong.{name}")
    raise AttributeError(f"module 'everlong' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
