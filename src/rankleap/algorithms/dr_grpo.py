"""Dr. GRPO (2503.20783, §3.2): no division by the standard deviation, none by the completion's length.

A_i = r_i - mean(r)
L   = -1/(G·L_max) Σ_i Σ_t min(ρ A, clip(ρ, 1-ε, 1+ε) A)        a constant L_max instead of |o_i|
"""

from typing import Any

from rankleap.algorithms import grpo
from rankleap.config import AlgorithmSection


def settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """TRL settings that make its trainer this algorithm."""
    # L_max is TRL's max_completion_length.
    return {**grpo.settings(recipe), "loss_type": "dr_grpo", "scale_rewards": "none"}
