"""DAPO (2503.14476, Eqs. 8, 11, 13): clip-higher, a loss that is a mean over tokens, dynamic sampling, overlong punishment.

    L = -1/Σ|o_i| Σ_i Σ_t min(ρ A, clip(ρ, 1-ε, 1+ε_high) A)        ε = 0.2, ε_high = 0.28, no KL term
    R_length(o) = 0 up to L_max - L_cache tokens, then down in a line to -1 at L_max, the longest completion

Dynamic sampling is on unless the recipe says no (``sampling.py``, which has how we differ). The punishment is TRL's, and is
added to the reward where ``overlong_buffer`` gives L_cache.
"""

from typing import Any

from rankleap.algorithms import sampling
from rankleap.algorithms.grpo import EPSILON
from rankleap.config import AlgorithmSection

EPSILON_HIGH = 0.28


def settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """TRL settings that make its trainer this algorithm."""
    return {
        # Eq. 8's mean over tokens: TRL divides by those of the whole batch, micro-batches included.
        "loss_type": "dapo",
        "scale_rewards": "group",
        "epsilon": recipe.epsilon or EPSILON,
        "epsilon_high": recipe.epsilon_high or EPSILON_HIGH,
        **sampling.settings(recipe, by_default=True),
    }
