"""Laws of sampling from a live model, and of the forward KL over what was sampled."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import rankleap
from rankleap.errors import InputError, NotFiniteError
from rankleap.evaluation import Sampling
from rankleap.evaluation.sampler import Completion, forward_kl, sample

BASE = Path(rankleap.__file__).parent / "bases" / "sums"
PROMPTS = ["15 - 43 =", "7 + 8 =", "23 - 60 - 11 =", "71 + 83 ="]
SHORT = Sampling(max_new_tokens=20)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def loaded() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE)


@pytest.fixture
def model(loaded: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(loaded)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shifted(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return moved


def test_the_same_seed_gives_the_same_completions(model, tokenizer) -> None:
    once, again, other = (sample(model, tokenizer, PROMPTS, 8, SHORT, seed) for seed in (0, 0, 1))
    assert once == again != other
    assert [len(group) for group in once] == [8] * 4


def test_samples_of_one_prompt_differ(model, tokenizer) -> None:
    assert all(len(set(group)) > 1 for group in sample(model, tokenizer, PROMPTS, 16, SHORT, 0))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_completions_are_those_of_each_prompt_alone(model, tokenizer, batch_size: int) -> None:
    greedy = Sampling(temperature=0.0, max_new_tokens=20, batch_size=batch_size)
    together = sample(model, tokenizer, PROMPTS, 2, greedy, 0)
    for prompt, group in zip(PROMPTS, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        width = ids.shape[1]
        while ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        alone = ids[0, width:].tolist()
        assert group == [Completion(tokenizer.decode(alone, skip_special_tokens=True), tuple(alone), False)] * 2


def test_draws_follow_the_softmax_at_their_temperature(model, tokenizer) -> None:
    one_token = Sampling(temperature=5.0, max_new_tokens=1)
    (group,) = sample(model, tokenizer, PROMPTS[:1], 2000, one_token, 0)
    logits = model(tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]).logits[0, -1]
    expected = (logits / 5.0).softmax(-1)
    drawn = torch.bincount(torch.tensor([one.token_ids[0] for one in group]), minlength=len(expected)) / 2000
    # E|drawn − p| summed over tokens is at most Σ √(p(1 − p)/n), and the sum concentrates around it.
    noise = (expected * (1 - expected) / 2000).sqrt().sum()
    assert (drawn - expected).abs().sum() < 1.2 * noise


def test_a_small_top_p_is_greedy(model, tokenizer) -> None:
    narrow, greedy = Sampling(top_p=1e-6, max_new_tokens=20), Sampling(temperature=0.0, max_new_tokens=20)
    assert sample(model, tokenizer, PROMPTS, 3, narrow, 0) == sample(model, tokenizer, PROMPTS, 3, greedy, 0)


@pytest.mark.parametrize(
    "smuggled",
    [
        {"top_k": 1},
        {"temperature": 0.01},
        {"top_p": 0.01},
        {"min_p": 0.9},
        {"repetition_penalty": 3.0},
        {"min_new_tokens": 19},
        {"suppress_tokens": [2]},
        {"num_return_sequences": 2},
        {"max_length": 8},
    ],
)
def test_the_models_own_generation_config_changes_nothing(model, tokenizer, smuggled: dict[str, object]) -> None:
    clean = sample(model, tokenizer, PROMPTS, 4, SHORT, 0)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=2, pad_token_id=0, **smuggled)
    assert sample(model, tokenizer, PROMPTS, 4, SHORT, 0) == clean


def test_an_end_that_only_the_model_declares_ends_a_completion(model, tokenizer) -> None:
    (colon,) = tokenizer(" Answer:")["input_ids"][-1:]
    model.generation_config.eos_token_id = [2, colon]
    for group in sample(model, tokenizer, PROMPTS, 4, SHORT, 0):
        assert {one.token_ids[-1] for one in group} <= {2, colon}
        assert any(one.token_ids[-1] == colon for one in group)


def test_a_completion_is_truncated_exactly_if_it_has_no_end(model, tokenizer) -> None:
    seen = set()
    for limit in (3, 11, 20):
        for group in sample(model, tokenizer, PROMPTS, 16, Sampling(max_new_tokens=limit), 0):
            for one in group:
                assert one.truncated == (one.token_ids[-1] != tokenizer.eos_token_id)
                assert tokenizer.eos_token_id not in one.token_ids[:-1]
                assert one.tokens == limit if one.truncated else one.tokens <= limit
                assert "</s>" not in one.text and "<pad>" not in one.text
                seen.add(one.truncated)
    assert seen == {True, False}


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
def test_sampling_leaves_no_trace_in_a_model_in_training(model, tokenizer) -> None:
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.model.layers[1].eval()
    declared = model.generation_config
    flags = [(name, module.training) for name, module in model.named_modules()]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    state = torch.get_rng_state()
    sample(model, tokenizer, PROMPTS, 2, SHORT, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(name, module.training) for name, module in model.named_modules()] == flags
    assert model.generation_config is declared
    assert model.is_gradient_checkpointing and model.config.use_cache is False
    assert all(weight.requires_grad and torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_failure_inside_leaves_no_trace_either(model, tokenizer) -> None:
    model.train()
    declared, state = model.generation_config, torch.get_rng_state()
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data[:4]
    with pytest.raises(IndexError):
        sample(model, tokenizer, PROMPTS, 2, SHORT, 0)
    assert model.training and model.generation_config is declared
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_fresh_adapter_with_dropout_samples_as_its_base(model, tokenizer, task_type: str | None) -> None:
    clean = sample(model, tokenizer, PROMPTS, 4, SHORT, 0)
    declared = model.generation_config
    adapted = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], task_type=task_type))
    adapted.train()
    assert sample(adapted, tokenizer, PROMPTS, 4, SHORT, 0) == clean
    assert adapted.training and model.generation_config is declared


def test_no_prompts_give_no_completions(model, tokenizer) -> None:
    assert sample(model, tokenizer, [], 4, SHORT, 0) == []


def test_a_prompt_without_tokens_is_refused(model, tokenizer) -> None:
    with pytest.raises(InputError, match="prompt '' has no tokens"):
        sample(model, tokenizer, ["1 + 1 =", ""], 1, SHORT, 0)


def test_no_completions_at_all_are_refused(model, tokenizer) -> None:
    with pytest.raises(InputError, match="at least 1 completion"):
        sample(model, tokenizer, PROMPTS, 0, SHORT, 0)


def test_all_wrong_settings_are_said_at_once() -> None:
    with pytest.raises(InputError, match=r"temperature: should be at least 0, got -1; top_p: .* got 0; batch_size"):
        Sampling(temperature=-1, top_p=0, batch_size=0)


def test_a_model_does_not_diverge_from_itself(model, tokenizer) -> None:
    drawn = sample(model, tokenizer, PROMPTS, 4, SHORT, 0)
    estimate = forward_kl(model, copy.deepcopy(model), tokenizer, PROMPTS, drawn)
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_forward_kl_is_the_token_average_computed_row_by_row(model, tokenizer, batch_size: int) -> None:
    moved = shifted(model, 0.02)
    drawn = sample(model, tokenizer, PROMPTS, 4, SHORT, 0)
    divergences = []
    for prompt, group in zip(PROMPTS, drawn, strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        for one in group:
            ids = torch.tensor([[*prompt_ids, *one.token_ids]])
            base, other = (each(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1) for each in (model, moved))
            divergences.extend((base.exp() * (base - other)).sum(-1).tolist())
    estimate = forward_kl(model, moved, tokenizer, PROMPTS, drawn, batch_size)
    assert estimate.value == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert estimate.low < estimate.value < estimate.high


def test_forward_kl_agrees_with_the_log_ratio_of_what_was_drawn(model, tokenizer) -> None:
    moved = shifted(model, 0.02)
    drawn = sample(model, tokenizer, PROMPTS, 200, Sampling(max_new_tokens=1), 0)
    ratios = []
    for prompt, group in zip(PROMPTS, drawn, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        base, other = (each(ids).logits[0, -1].log_softmax(-1) for each in (model, moved))
        ratios.append((base - other)[torch.tensor([one.token_ids[0] for one in group])])
    crude = torch.cat(ratios)
    exact = forward_kl(model, moved, tokenizer, PROMPTS, drawn).value
    assert abs(exact - crude.mean()) < 3 * crude.std() / len(crude) ** 0.5
    assert exact > 0


def test_forward_kl_grows_with_the_move_and_leaves_the_modes(model, tokenizer) -> None:
    drawn = sample(model, tokenizer, PROMPTS, 4, SHORT, 0)
    model.train()
    near, far = (forward_kl(model, shifted(model, scale), tokenizer, PROMPTS, drawn) for scale in (0.005, 0.05))
    assert 0 < near.value < far.value
    assert model.training


def test_a_broken_model_has_no_divergence(model, tokenizer) -> None:
    drawn = sample(model, tokenizer, PROMPTS, 1, SHORT, 0)
    with pytest.raises(NotFiniteError, match="look at its weights"):
        forward_kl(model, shifted(model, float("nan")), tokenizer, PROMPTS, drawn)


def test_completions_of_other_prompts_are_refused(model, tokenizer) -> None:
    with pytest.raises(InputError, match="got 1 for 4"):
        forward_kl(model, model, tokenizer, PROMPTS, [[]])
