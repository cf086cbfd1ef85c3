"""GRPO (2402.03300, Eqs. 3-4): the group is its own baseline.

    A_i = (r_i - mean(r)) / std(r)        over the G completions of one prompt
    L   = -1/G Σ_i 1/|o_i| Σ_t min(ρ A, clip(ρ, 1-ε, 1+ε) A)        mean per completion, then over completions

TRL's own default ``loss_type`` is ``dapo``, so ``grpo`` is said explicitly.
"""

from typing import Any

from rankleap.config import AlgorithmSection

EPSILON = 0.2


def settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """TRL settings that make its trainer this algorithm."""
    return {
        "loss_type": "grpo",
        # The std(r) of A_i, to which TRL adds 1e-4; so equal rewards give 0, not NaN.
        "scale_rewards": "group",
        "epsilon": recipe.epsilon or EPSILON,
        # Unset, TRL clips upwards by epsilon too, as L does.
        "epsilon_high": recipe.epsilon_high,
    }
