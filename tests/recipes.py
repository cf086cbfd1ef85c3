"""Recipes of runs that take a second."""

from collections.abc import Mapping
from typing import Any

from rankleap.config import Recipe, make_recipe

TINY: dict[str, Any] = {
    "name": "t",
    "model": {"base": "bundled:sums"},
    "task": {"name": "sums", "train_problems": 32, "validation_problems": 4, "test_problems": 2},
    "adapter": {"rank": 4, "alpha": 8},
    "algorithm": {},
    "train": {
        "steps": 3,
        "learning_rate": 1e-3,
        "prompts_per_step": 4,
        "completions_per_prompt": 8,
        "max_completion_tokens": 16,
        "save_every": 1,
        "threads": 1,
    },
}


def changed(values: Mapping[str, Any], **changes: Any) -> Recipe:
    """``values`` with ``section__key`` set, or a whole section replaced; ``None`` leaves a section out."""
    result = dict(values)
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        result[section] = {**result[section], key: value} if key else value
    return make_recipe({section: value for section, value in result.items() if value is not None}, "test")


def tiny(**changes: Any) -> Recipe:
    """Three steps on the bundled sums."""
    return changed(TINY, **changes)
