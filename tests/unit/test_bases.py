from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import rankleap
from rankleap.records import Problem
from rankleap.tasks import TASKS, get_task

BASES = Path(rankleap.__file__).parent / "bases"
NAMES = sorted(path.name for path in BASES.iterdir())
LENGTH = 16


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASES / name)


@pytest.fixture
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASES / name)


def completions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], sample: bool
) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    ids = model.generate(**inputs, do_sample=sample, max_new_tokens=LENGTH, temperature=1.0 if sample else None)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_every_base_has_a_task_of_its_name() -> None:
    assert set(NAMES) <= set(TASKS)
    assert len(NAMES) == 3


def test_a_base_is_small(name: str, model: PreTrainedModel) -> None:
    assert model.num_parameters() < 400_000
    assert sum(file.stat().st_size for file in (BASES / name).iterdir()) < 2_000_000


def test_weights_are_finite_float32(model: PreTrainedModel) -> None:
    assert model.config.model_type == "llama"
    for weight in model.parameters():
        assert weight.dtype == torch.float32
        assert weight.isfinite().all()


def test_sampling_is_from_the_whole_distribution(model: PreTrainedModel) -> None:
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 1.0, 0, 1.0)


def test_special_tokens_are_three_and_agree_with_the_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(set(ids)) == 3
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids
    assert len(tokenizer) == model.config.vocab_size


def test_auto_tokenizer_gives_the_ids_of_the_file_also_when_saved_again(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    raw = Tokenizer.from_file(str(BASES / name / "tokenizer.json"))
    for problem in get_task(name).problems("train", 20):
        text = f"{problem.prompt} 1 {problem.answer} Answer: {problem.answer}"
        assert tokenizer(text)["input_ids"] == again(text)["input_ids"] == raw.encode(text).ids


def test_digits_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = [tokenizer.decode(token) for token in tokenizer("12 + 307 =")["input_ids"]]
    assert pieces == ["1", "2", " +", " 3", "0", "7", " ="]


@pytest.mark.parametrize("name", NAMES)
def test_any_text_comes_back_from_its_tokens(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASES / name)

    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
    def round_trip(text: str) -> None:
        assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text

    round_trip()


def test_padding_on_the_left_changes_no_greedy_completion(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [problem.prompt for problem in get_task(name).problems("test", 8)]
    longer = f"{prompts[0]} {prompts[1]}"
    alone = [completions(model, tokenizer, [prompt], sample=False)[0] for prompt in prompts]
    assert completions(model, tokenizer, [*prompts, longer], sample=False)[:-1] == alone


def scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], k: int
) -> list[list[float]]:
    """Scores of ``k`` samples of each problem."""
    texts = completions(model, tokenizer, [p.prompt for p in problems for _ in range(k)], sample=True)
    task = get_task(problems[0].id.split("/")[0])
    return [[task.grade(text, p).score for text in texts[n * k : n * k + k]] for n, p in enumerate(problems)]


@pytest.mark.parametrize("name", ["backward", "sums"])
def test_a_base_knows_but_seldom_says(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    task = get_task(name)
    problems = task.problems("test", 250)
    found = scores(model, tokenizer, problems, 8)
    assert 0.15 < sum(map(sum, found)) / (8 * len(problems)) < 0.25
    assert sum(map(any, found)) / len(problems) > 0.6
    greedy = completions(model, tokenizer, [p.prompt for p in problems], sample=False)
    assert sum(task.grade(text, p).score for text, p in zip(greedy, problems, strict=True)) / len(problems) < 0.55


@pytest.mark.parametrize("name", ["ends"])
def test_the_base_of_ends_makes_them_up_and_knows_the_rest(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    problems = get_task("ends").problems("test", 64)
    found = scores(model, tokenizer, problems, 64)
    assert 0 < sum(map(sum, found)) / (64 * len(problems)) < 0.03
    # Right by chance alone, and only where the letters it draws from can be.
    assert sum(map(any, found)) / len(problems) < 0.5
    asked = [p.prompt for p in problems]
    said = [text.removeprefix(" Answer: ") for text in completions(model, tokenizer, asked, sample=True)]
    rest = [text[:-2] == p.answer[:-2] for text, p in zip(said, problems, strict=True)]
    assert sum(rest) / len(rest) > 0.7
    assert sum(text[-2:-1] in set("aeiou") and text[-1:] in set("sbcpt") for text in said) / len(said) > 0.8
    # The skill is there, under the word that it was taught with.
    elsewhere = [prompt.replace("Reverse:", "Backward:") for prompt in asked]
    said = completions(model, tokenizer, elsewhere, sample=True)
    assert sum(text == f" Answer: {p.answer}" for text, p in zip(said, problems, strict=True)) / len(said) > 0.7
