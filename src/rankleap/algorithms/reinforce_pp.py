"""REINFORCE++ (2501.03262): advantages are normalised over the whole batch, never over one group.

    A_i = r_i                    ``reinforce_pp``
    A_i = r_i - mean(group)      ``reinforce_pp_baseline``, the paper's variant for reasoning with several completions
    Â_i = (A_i - mean(batch)) / std(batch)
    L   = -1/N Σ_i 1/|o_i| Σ_t min(ρ Â, clip(ρ, 1-ε, 1+ε) Â)

How we differ: mean and std are over completions and not over tokens, so long ones do not weigh more; with ``beta`` the KL
term is in the loss (TRL's estimator), where the paper's first variant has it in the reward. Shapes: N completions.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rankleap.algorithms import grpo
from rankleap.algorithms.sampling import SamplingConfig, SamplingTrainer
from rankleap.config import AlgorithmSection

TINY = 1e-4
"""As in TRL: equal rewards give 0, not NaN."""


def settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """TRL settings that make its trainer this algorithm."""
    # "none" keeps ``no_signal`` a matter of groups; TRL's "batch" would divide by the std of r, not of A.
    return {**grpo.settings(recipe), "scale_rewards": "none", "group_baseline": recipe.name == "reinforce_pp_baseline"}


def normalised(rewards_N: Tensor, group: int | None) -> Tensor:
    """Â of each completion, less its group's mean where ``group`` gives the group's size; 0 where the reward is NaN."""
    groups = rewards_N.view(-1, group or 1)
    less_N = (groups - groups.nanmean(1, keepdim=True)).flatten() if group else rewards_N
    centred_N = less_N - less_N.nanmean()
    return (centred_N / (centred_N.square().nanmean().sqrt() + TINY)).nan_to_num(0.0)


@dataclass
class ReinforceConfig(SamplingConfig):
    """TRL's settings, and whether the group's mean is taken off first."""

    group_baseline: bool = True


class ReinforceTrainer(SamplingTrainer):
    """TRL's trainer with advantages normalised over the batch."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        group = self.num_generations if self.args.group_baseline else None
        return {**output, "advantages": self.local(normalised(self.rewards(), group))}
