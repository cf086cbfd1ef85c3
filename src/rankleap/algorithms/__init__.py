"""Reads the recipe's algorithm, gives the TRL settings that make its GRPO trainer that algorithm. One file per algorithm."""

from collections.abc import Callable
from typing import Any

from rankleap.algorithms import dapo, dr_grpo, grpo
from rankleap.config import AlgorithmSection
from rankleap.errors import UnknownNameError

ALGORITHMS: dict[str, Callable[[AlgorithmSection], dict[str, Any]]] = {
    "grpo": grpo.settings,
    "dapo": dapo.settings,
    "dr_grpo": dr_grpo.settings,
}


def algorithm_settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """TRL settings of the recipe's algorithm; raises ``UnknownNameError`` with the closest names."""
    if recipe.name not in ALGORITHMS:
        raise UnknownNameError("algorithm", recipe.name, ALGORITHMS)
    return ALGORITHMS[recipe.name](recipe)


__all__ = ["ALGORITHMS", "algorithm_settings"]
