"""On-policy distillation (GKD, 2306.13649, with λ = 1 and the reverse KL): a teacher scores every token the student samples.

    L = 1/Σ|o_i| Σ_i Σ_t KL(π(· | o_<t) ‖ π_teacher(· | o_<t))        o_i sampled from π, no gradient through the sampling

Full distributions, at the sampling temperature; student and teacher share a vocabulary. Offline distillation is sequence-level
(1606.07947): SFT on completions that the teacher sampled before, and here only on those that are right, as rejection
sampling (2308.01825) does; its settings are those of ``sft.py``.
"""

from typing import Any

from rankleap.config import AlgorithmSection


def settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """Settings of TRL's distillation trainer."""
    # Its beta chooses the divergence: 1 is the reverse KL, 0 the forward one.
    return {"beta": 1.0}
