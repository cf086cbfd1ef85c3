"""Supervised fine-tuning on the task's reference answers: the arm that papers compare reinforcement learning with.

    L = -1/Σ|a_i| Σ_i Σ_t log π(a_t | prompt, a_<t)        a_i: `Answer: X` and the end of sequence; prompts give no loss

A step takes as many sequences as a step of reinforcement learning has completions.
"""

from typing import Any

from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from rankleap.config import AlgorithmSection


def settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """Settings of TRL's SFT trainer."""
    # Nothing is cut: a truncated answer would be taught as a wrong one.
    return {"loss_type": "nll", "completion_only_loss": True, "packing": False, "max_length": None}


class AnswerTrainer(SFTTrainer):
    """TRL's trainer, whose count of tokens goes on after a resume."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Any]:
        """TRL's loss; the count is kept in the state, which is in every checkpoint."""
        self._total_train_tokens = self.state.num_input_tokens_seen
        loss = super().compute_loss(*args, **kwargs)
        self.state.num_input_tokens_seen = self._total_train_tokens
        return loss
