"""Reads a method's name, adds few trainable weights to a base model, checks that they are what was asked."""

from rankleap.adapters.adapter import ADAPTERS, Adapter, get_adapter, require_injected, target_modules

__all__ = ["ADAPTERS", "Adapter", "get_adapter", "require_injected", "target_modules"]
