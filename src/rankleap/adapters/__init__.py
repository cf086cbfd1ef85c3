"""Reads a method's name, adds few trainable weights to a base model, checks that they are what was asked."""

from rankleap.adapters.adapter import ADAPTERS, Adapter, get_adapter, require_injected, require_rank, target_modules
from rankleap.adapters.compatibility import RULES, Rule, adapter_mistakes, adapter_notes
from rankleap.adapters.optimizer import adapter_callbacks, largest_difference, prepare, with_adapter

__all__ = [
    "ADAPTERS",
    "RULES",
    "Adapter",
    "Rule",
    "adapter_callbacks",
    "adapter_mistakes",
    "adapter_notes",
    "get_adapter",
    "largest_difference",
    "prepare",
    "require_injected",
    "require_rank",
    "target_modules",
    "with_adapter",
]
