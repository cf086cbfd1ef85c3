"""GSPO (2507.18071, Eqs. 5-7): one importance ratio for a whole completion, the geometric mean over its tokens.

    s_i = (π(o_i) / π_old(o_i))^(1/|o_i|)
    L   = -1/G Σ_i min(s_i A_i, clip(s_i, 1-ε, 1+ε_high) A_i)        ε = 3e-4, ε_high = 4e-4;  A_i as in GRPO

The range is narrow because s is a mean. It acts from the second update on a batch on: set ``algorithm.iterations``.
"""

from typing import Any

from rankleap.algorithms import grpo
from rankleap.config import AlgorithmSection

EPSILON, EPSILON_HIGH = 3e-4, 4e-4


def settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """TRL settings that make its trainer this algorithm."""
    return {
        **grpo.settings(recipe),
        "importance_sampling_level": "sequence",
        "epsilon": recipe.epsilon or EPSILON,
        "epsilon_high": recipe.epsilon_high or EPSILON_HIGH,
    }
