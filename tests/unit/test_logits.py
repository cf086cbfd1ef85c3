"""Logits extrapolation: the closed form, at every token, with a cache in both models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rankleap.checkpoints import resolve_base
from rankleap.errors import InputError
from rankleap.evaluation import Sampling
from rankleap.evaluation.sampler import forward_kl, sample
from rankleap.leap.logits import ExtrapolatedLogits, extrapolated, load_extrapolated

PROMPTS = ["1 + 2 =", "12 + 34 + 5 =", "7 - 3 ="]
GREEDY = Sampling(temperature=0, max_new_tokens=12)
SAMPLED = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=12)


@pytest.fixture(scope="module")
def late() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(resolve_base("bundled:sums")).eval()


@pytest.fixture(scope="module")
def early() -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(resolve_base("bundled:sums")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve_base("bundled:sums"))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_without_a_coefficient_it_is_the_late_model(
    late: PreTrainedModel, early: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> None:
    same = ExtrapolatedLogits(late, early, 0.0)
    assert sample(same, tokenizer, PROMPTS, 4, sampling, 3) == sample(late, tokenizer, PROMPTS, 4, sampling, 3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("coefficient", [0.0, 0.7, 2.0, -1.0])
def test_logits_are_the_closed_form(late: PreTrainedModel, early: PreTrainedModel, coefficient: float) -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        found = ExtrapolatedLogits(late, early, coefficient)(tokens, mask).logits
        first, second = (model(input_ids=tokens, attention_mask=mask).logits for model in (late, early))
    torch.testing.assert_close(found, (1 + coefficient) * first - coefficient * second, rtol=1e-6, atol=1e-5)
    low = first.bfloat16(), second.bfloat16()
    assert torch.equal(
        extrapolated(*low, coefficient), (1 + coefficient) * low[0].float() - coefficient * low[1].float()
    )


@pytest.mark.parametrize("coefficient", [0.5, 2.0, -1.0])
def test_each_token_is_the_best_of_a_fresh_forward_pass_whatever_the_padding(
    late: PreTrainedModel, early: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, coefficient: float
) -> None:
    mixed = ExtrapolatedLogits(late, early, coefficient)
    drawn = sample(mixed, tokenizer, PROMPTS, 1, GREEDY, 0)  # pyright: ignore[reportArgumentType]
    for prompt, (one,) in zip(PROMPTS, drawn, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for token in one.token_ids:
            with torch.no_grad():
                logits = mixed(torch.tensor([ids])).logits[0, -1]
            # A tie within rounding may fall either way.
            assert logits[token] >= logits.max() - 1e-3
            ids = [*ids, token]
    assert drawn != sample(late, tokenizer, PROMPTS, 1, GREEDY, 0) or coefficient == 0.5


def test_minus_one_is_the_early_model_and_divergence_is_measured_on_it(
    late: PreTrainedModel, early: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    mixed = ExtrapolatedLogits(late, early, -1.0)
    drawn = sample(mixed, tokenizer, PROMPTS, 1, GREEDY, 0)  # pyright: ignore[reportArgumentType]
    assert drawn == sample(early, tokenizer, PROMPTS, 1, GREEDY, 0)
    widths: list[int] = []
    hook = early.register_forward_pre_hook(
        lambda _, args, kw: widths.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    sample(mixed, tokenizer, PROMPTS, 1, GREEDY, 0)  # pyright: ignore[reportArgumentType]
    hook.remove()
    assert widths[0] > 1 and set(widths[1:]) == {1}, "the early model has a cache of its own"
    kl = [forward_kl(late, model, tokenizer, PROMPTS, drawn).value for model in (mixed, early)]  # pyright: ignore[reportArgumentType]
    assert kl[0] == pytest.approx(kl[1], rel=1e-4) != 0


def test_another_vocabulary_or_tokenizer_is_refused(
    late: PreTrainedModel, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"one vocabulary, got \d+ tokens late and 99 early"):
        ExtrapolatedLogits(late, make_model(vocab_size=99), 1.0)
    with pytest.raises(InputError, match=r"different tokenizers: \d+ tokens differ, such as"):
        load_extrapolated("bundled:sums", "bundled:backward", 1.0)
    assert isinstance(load_extrapolated("bundled:sums", "bundled:sums", 1.0)[0], ExtrapolatedLogits)
