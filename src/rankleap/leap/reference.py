"""The base beside the leap: forward KL(base‖leap), which predicts forgetting where norms do not (RL's Razor, 2509.04259)."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rankleap.evaluation import Sampling
from rankleap.evaluation.divergence import forward_kl
from rankleap.evaluation.sampler import sample
from rankleap.records import Problem


class BaseReference:
    """The base model, loaded when first needed; costs the memory of a second model."""

    def __init__(self, directory: Path, sampling: Sampling, seed: int) -> None:
        """``directory`` holds the base; one completion of each problem is drawn from it with ``seed``."""
        self._directory, self._sampling, self._seed = directory, sampling, seed

    @cached_property
    def _model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self._directory)

    def kl(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> float:
        """Forward KL in nats per token on completions that the base itself gives to these problems."""
        self._model.to(model.device)  # pyright: ignore[reportArgumentType]
        prompts = [problem.prompt for problem in problems]
        # Drawn with one seed at every call, so all leaps are held against the same completions.
        drawn = sample(self._model, tokenizer, prompts, 1, self._sampling, self._seed)
        return forward_kl(self._model, model, tokenizer, prompts, drawn).value
