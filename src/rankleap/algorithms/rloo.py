"""RLOO (2402.14740): REINFORCE on whole completions, the baseline being the mean of the other ones.

    A_i = r_i - 1/(G-1) Σ_{j≠i} r_j        r_i includes -β Σ_t log(π/π_base)
    L   = -1/G Σ_i A_i π(o_i)/π_old(o_i)   a completion is one action; on the first update this is REINFORCE

How we differ: from the second update on a batch on (``algorithm.iterations``), TRL clips the ratio of the completion as PPO does.
"""

from typing import Any

from rankleap.algorithms.grpo import EPSILON
from rankleap.config import AlgorithmSection


def settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """Settings of TRL's RLOO trainer."""
    return {
        # The paper's advantage is not scaled.
        "normalize_advantages": False,
        "epsilon": recipe.epsilon or EPSILON,
        "epsilon_high": recipe.epsilon_high,
    }
