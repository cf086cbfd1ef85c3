"""Reads the recipe's algorithm, gives the TRL trainer that it trains with and its settings. One file per algorithm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import Trainer, TrainingArguments
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_config import SFTConfig

from rankleap.algorithms import cispo, dapo, distillation, dr_grpo, grpo, gspo, ppo, reinforce_pp, rloo, sampling, sft
from rankleap.config import AlgorithmSection
from rankleap.errors import UnknownNameError


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One algorithm: its paper, the settings of the trainer, and what the trainer learns from."""

    name: str
    paper: str
    settings: Callable[[AlgorithmSection], dict[str, Any]]
    trainer: type[Trainer] = sampling.SamplingTrainer
    config: type[TrainingArguments] = sampling.SamplingConfig
    learns_from: Literal["rewards", "answers", "samples", "teacher"] = "rewards"
    """``answers`` of the task, right ``samples`` of a teacher, or a live ``teacher`` instead of rewards."""

    @property
    def resamples(self) -> bool:
        """Whether groups are drawn anew; PPO has no use for them."""
        return issubclass(self.trainer, sampling.SamplingTrainer) and self.trainer is not ppo.PPOTrainer


_REINFORCE = reinforce_pp.ReinforceTrainer, reinforce_pp.ReinforceConfig
_ON_POLICY = sampling.same_epochs(DistillationTrainer), DistillationConfig
_ROWS = (
    Algorithm("grpo", "2402.03300", grpo.settings),
    Algorithm("dapo", "2503.14476", dapo.settings),
    Algorithm("dr_grpo", "2503.20783", dr_grpo.settings),
    Algorithm("gspo", "2507.18071", gspo.settings),
    Algorithm("cispo", "2506.13585", cispo.settings),
    Algorithm("rloo", "2402.14740", rloo.settings, sampling.same_epochs(RLOOTrainer), RLOOConfig),
    Algorithm("reinforce_pp", "2501.03262", reinforce_pp.settings, *_REINFORCE),
    Algorithm("reinforce_pp_baseline", "2501.03262", reinforce_pp.settings, *_REINFORCE),
    Algorithm("ppo", "1707.06347", ppo.settings, ppo.PPOTrainer, ppo.PPOConfig),
    Algorithm("sft", "", sft.settings, sft.AnswerTrainer, SFTConfig, "answers"),
    Algorithm("offline_distillation", "1606.07947", sft.settings, sft.AnswerTrainer, SFTConfig, "samples"),
    Algorithm("distillation", "2306.13649", distillation.settings, *_ON_POLICY, "teacher"),
)
ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in _ROWS}


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of that name; raises ``UnknownNameError`` with the closest ones."""
    if name not in ALGORITHMS:
        raise UnknownNameError("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]


def algorithm_settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """Settings of the recipe's algorithm for its trainer's config; raises ``UnknownNameError``."""
    algorithm = get_algorithm(recipe.name)
    # Dynamic sampling is the same for all that learn from groups, so it is not said by each of them.
    shared = sampling.settings(recipe) if algorithm.resamples else {}
    return {**shared, **algorithm.settings(recipe)}


__all__ = ["ALGORITHMS", "Algorithm", "algorithm_settings", "get_algorithm"]
