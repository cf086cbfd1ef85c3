"""DAPO (2503.14476, Eq. 8): clip-higher and a loss that is a mean over tokens, without a KL term.

    L = -1/Σ|o_i| Σ_i Σ_t min(ρ A, clip(ρ, 1-ε, 1+ε_high) A)        ε = 0.2, ε_high = 0.28

How we differ: no dynamic sampling and no overlong shaping; groups without signal are reported as ``frac_reward_zero_std``.
"""

from typing import Any

from rankleap.config import AlgorithmSection

EPSILON_HIGH = 0.28


def settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """TRL settings that make its trainer this algorithm."""
    high = EPSILON_HIGH if recipe.epsilon_high is None else recipe.epsilon_high
    # Eq. 8's mean over tokens: TRL divides by those of the whole batch, micro-batches included.
    return {"loss_type": "dapo", "scale_rewards": "group", "epsilon": recipe.epsilon, "epsilon_high": high}
