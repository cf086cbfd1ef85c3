"""A trainer of ours on a script: completions, rewards and log-probabilities are given; all that is made of them really runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.rloo_trainer import RLOOTrainer

from rankleap.algorithms import get_algorithm
from rankleap.checkpoints import resolve_base
from rankleap.config import Recipe, make_recipe
from rankleap.training.build import trl_config

PROMPTS = ["1 + 1 =", "2 + 2 =", "3 + 3 =", "4 + 4 =", "5 + 5 ="]
LONGEST = 4


def recipe_of(
    name: str, prompts: int = 2, group: int = 2, train: dict[str, Any] | None = None, **algorithm: Any
) -> Recipe:
    values = {
        "name": "t",
        "model": {"base": "bundled:sums"},
        "task": {"name": "sums", "train_problems": 64, "validation_problems": 8, "test_problems": 8},
        "algorithm": {"name": name, **algorithm},
        "train": {
            "steps": 2,
            "learning_rate": 1e-4,
            "prompts_per_step": prompts,
            "completions_per_prompt": group,
            "max_completion_tokens": LONGEST,
            "threads": 1,
            **(train or {}),
        },
    }
    return make_recipe(values, "test")


def scripted(
    recipe: Recipe, out: Path, lengths: Sequence[Sequence[int]], rewards: Sequence[Sequence[float | None]]
) -> Any:
    """A trainer whose n-th draw has completions of ``lengths[n]`` tokens and ``rewards[n]``; then ``old`` and ``new`` are set.

    ``old`` are log-probabilities where no gradient is asked, ``new`` those under the gradient; hidden states are zero.
    """
    kind: Any = get_algorithm(recipe.algorithm.name).trainer

    class Scripted(kind):
        draws, graded, old, new = 0, 0, torch.zeros(()), torch.zeros(())

        def _generate_single_turn(self, prompt_ids: Any, *_: Any) -> Any:
            drawn = [[5] * length for length in lengths[self.draws]]
            assert len(drawn) == len(prompt_ids)
            self.draws += 1
            return drawn if isinstance(self, RLOOTrainer) else (drawn, None)

        def _get_per_token_logps_and_entropies(
            self, model: Any, ids: Tensor, mask: Tensor, keep: int, *_: Any, **__: Any
        ):
            self._hidden = torch.zeros(len(ids), keep + 1, self.model.config.hidden_size)
            logps = self.new if torch.is_grad_enabled() else self.old
            return logps.expand(len(ids), keep), torch.zeros(len(ids), keep), None

    def reward(completions: list[str], **_: Any) -> Sequence[float | None]:
        trainer.graded += 1
        return rewards[trainer.graded - 1]

    base = resolve_base("bundled:sums")
    trainer = Scripted(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        reward_funcs=reward,
        args=trl_config(recipe, out),
        train_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def rollout(trainer: Any, recipe: Recipe) -> dict[str, Any]:
    """What the trainer makes of the script's first draws."""
    train = recipe.train
    rows = [{"prompt": text} for text in PROMPTS[: train.prompts_per_step] for _ in range(train.completions_per_prompt)]
    return trainer._generate_and_score_completions(rows)
