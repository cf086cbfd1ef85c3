"""CISPO (MiniMax-M1, 2506.13585, Eqs. 4-5): the weight is clipped and not the update, so no token loses its gradient.

    L = -1/Σ|o_i| Σ_i Σ_t sg(min(ρ, 1+ε_high)) A_i log π(o_t)        A_i as in GRPO, no lower bound

How we differ: the paper tunes ε_high and does not print it; 1+ε_high = 5 is the middle of what ScaleRL (2510.13786) found
to work alike.
"""

from typing import Any

from rankleap.algorithms import grpo
from rankleap.config import AlgorithmSection

EPSILON_HIGH = 4.0


def settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """TRL settings that make its trainer this algorithm."""
    # TRL's epsilon_high is here the bound itself.
    bound = 1 + (recipe.epsilon_high or EPSILON_HIGH)
    return {**grpo.settings(recipe), "loss_type": "cispo", "epsilon_high": bound}
