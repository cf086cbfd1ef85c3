"""Logits extrapolation between two checkpoints while decoding: a model for evaluation alone (2601.04537, §4).

    logits = (1 + c)·late - c·early            float32, for generate and forward

c = 0 is the late model to the bit; the paper's β is 1 + c, over softmax the same. Both models are in memory, each with a
cache of its own, so a token costs a step of both. Shapes: B rows, W width, V vocabulary.
"""

from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from rankleap.errors import InputError
from rankleap.evaluation.evaluate import load_model


class ExtrapolatedLogits(nn.Module):
    """Two models as one: what the sampler, the divergence and a plain forward call need."""

    def __init__(self, late: PreTrainedModel, early: PreTrainedModel, coefficient: float) -> None:
        """Both must have one vocabulary."""
        super().__init__()
        sizes = [cast(nn.Embedding, model.get_input_embeddings()).num_embeddings for model in (late, early)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"two models mix only over one vocabulary, got {sizes[0]} tokens late and {sizes[1]} early"
            )
        self.late, self.early, self.coefficient = late, early, coefficient

    @property
    def device(self) -> torch.device:
        """Of the late model, where tokens go."""
        return self.late.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Logits of every token, without a cache."""
        late, early = (m(input_ids=input_ids, attention_mask=attention_mask).logits for m in (self.late, self.early))
        return CausalLMOutput(logits=extrapolated(late, early, self.coefficient))

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        """What the late model generates with its logits moved on, before any temperature or nucleus."""
        ahead = _Ahead(self.early, self.coefficient, attention_mask)
        return self.late.generate(  # pyright: ignore[reportCallIssue]
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([ahead]),
            **settings,
        )


def extrapolated(late: Tensor, early: Tensor, coefficient: float) -> Tensor:
    """The closed form, float32."""
    return (1 + coefficient) * late.float() - coefficient * early.to(late.device).float()


class _Ahead(LogitsProcessor):
    """Follows one generation with the early model; ``mask_BW`` is the prompts' own, padded on the left."""

    def __init__(self, early: PreTrainedModel, coefficient: float, mask_BW: Tensor) -> None:
        self._early, self._coefficient, self._mask_BW = early, coefficient, mask_BW

    @cached_property
    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self._early.config)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        grown = input_ids.shape[1] - self._mask_BW.shape[1]
        mask_BW = nn.functional.pad(self._mask_BW, (0, grown), value=1)
        # Positions count from the first real token, as ``generate`` counts them for the late model.
        place_BW = (mask_BW.cumsum(-1) - 1).clamp_min(0)
        new = slice(self._cache.get_seq_length(), None)
        early = self._early(
            input_ids=input_ids[:, new],
            attention_mask=mask_BW,
            position_ids=place_BW[:, new],
            past_key_values=self._cache,
            use_cache=True,
        )
        return extrapolated(scores, early.logits[:, -1], self._coefficient)


def load_extrapolated(
    late: str, early: str, coefficient: float, base: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Two checkpoints as ``load_model`` reads them; ``InputError`` if a token of one has another id in the other."""
    (model, tokenizer), (before, other) = load_model(late, base), load_model(early, base)
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if moved := [token for token in ours | theirs if ours.get(token) != theirs.get(token)]:
        raise InputError(
            f"{late} and {early} have different tokenizers: {len(moved)} tokens differ, such as {moved[0]!r} "
            f"({ours.get(moved[0], 'absent')} and {theirs.get(moved[0], 'absent')}); give two checkpoints of one run"
        )
    # What sampling and KL ask of a model it has, though it is none of Transformers' own.
    return cast(PreTrainedModel, ExtrapolatedLogits(model, before, coefficient)), tokenizer
