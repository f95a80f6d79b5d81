"""`import everlong.auto`: from then on transformers' Auto classes and pipelines load our models."""

from everlong.models.config import EverlongConfig
from everlong.models.hub import EverlongForCausalLM
from everlong.models.wrap import ExtendedConfig, ExtendedForCausalLM

__all__ = ["EverlongConfig", "EverlongForCausalLM", "ExtendedConfig", "ExtendedForCausalLM"]
