"""Each algorithm's loss and advantages on a batch that is worked out by hand, by the code that runs; what TRL is told.

The batch has two prompts with two completions of 2, 1, 2 and 1 tokens, rewarded with 1, 0, 1 and 1. Between sampling and loss
the first completion's tokens became 1.5 and 0.9 times as likely, the second's half as likely.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankleap.algorithms import ALGORITHMS, algorithm_settings, get_algorithm
from rankleap.algorithms.reinforce_pp import normalised
from rankleap.algorithms.sampling import PUNISHMENT
from rankleap.errors import InputError, RecipeError, UnknownNameError
from rankleap.evaluation.evaluate import load_model
from rankleap.files import write_jsonl
from rankleap.training.build import build, check, trl_config
from scripted import LONGEST, recipe_of, rollout, scripted

# TRL's own default sets the name that Transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

LENGTHS, REWARDS = [2, 1, 2, 1], [1.0, 0.0, 1.0, 1.0]
RATIOS = torch.tensor([[1.5, 0.9], [0.5, 1.0], [1.0, 1.0], [1.0, 1.0]])
A = 0.5 / (math.sqrt(0.5) + 1e-4)
"""GRPO's advantage of the first completion: (1 - 1/2) / std(1, 0); the second's is -A, the others' 0."""
B = math.sqrt(3 / 16)
"""Standard deviation of the four rewards."""


def loss_of(name: str, out: Path, ratios: Tensor = RATIOS, **algorithm: Any) -> tuple[list[float], float]:
    """(advantages, loss) that the trainer makes of the batch, on the second update of it."""
    recipe = recipe_of(name, iterations=2, train={"save_every": 2}, **algorithm)
    trainer = scripted(recipe, out, [LENGTHS], [REWARDS])
    trainer.old = torch.full((4, 2), -2.0)
    output = rollout(trainer, recipe)
    trainer.new = trainer.old + ratios.log()
    return output["advantages"].tolist(), trainer.compute_loss(trainer.model, output).item()


def test_grpo_is_equations_3_and_4(tmp_path: Path) -> None:
    advantages, loss = loss_of("grpo", tmp_path)
    assert advantages == pytest.approx([A, -A, 0, 0])
    # 1.5 is clipped to 1.2; 0.5 with a negative advantage to 0.8.
    assert loss == pytest.approx(-((1.2 * A + 0.9 * A) / 2 - 0.8 * A) / 4)


def test_dapo_clips_higher_and_counts_tokens_not_completions(tmp_path: Path) -> None:
    advantages, loss = loss_of("dapo", tmp_path, dynamic_sampling=False)
    assert advantages == pytest.approx([A, -A, 0, 0])
    assert loss == pytest.approx(-(1.28 * A + 0.9 * A - 0.8 * A) / 6)


def test_dr_grpo_divides_by_no_deviation_and_by_the_longest_length(tmp_path: Path) -> None:
    advantages, loss = loss_of("dr_grpo", tmp_path)
    assert advantages == pytest.approx([0.5, -0.5, 0, 0])
    assert loss == pytest.approx(-(1.2 + 0.9 - 0.8) * 0.5 / (4 * LONGEST))


def test_gspo_has_one_ratio_for_a_completion(tmp_path: Path) -> None:
    # √(1.5·0.9) = 1.16 is clipped to 1 + 4e-4, 0.5 to 1 - 3e-4.
    assert loss_of("gspo", tmp_path)[1] == pytest.approx(-(1.0004 * A - 0.9997 * A) / 4, rel=1e-3)
    # √(1.2/1.2) is no clip at all, though each token would be.
    inside = torch.tensor([[1.3, 1 / 1.3], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert loss_of("gspo", tmp_path, inside)[1] == pytest.approx(0, abs=1e-7)


def test_cispo_clips_the_weight_and_keeps_every_gradient(tmp_path: Path) -> None:
    ratios = torch.tensor([[6.0, 0.9], [0.5, 1.0], [1.0, 1.0], [1.0, 1.0]])
    logp = ratios.log() - 2
    expected = -(5 * A * logp[0, 0] + 0.9 * A * logp[0, 1] - 0.5 * A * logp[1, 0]) / 6
    assert loss_of("cispo", tmp_path, ratios)[1] == pytest.approx(float(expected))


def test_rloo_leaves_one_out_and_takes_a_completion_as_one_action(tmp_path: Path) -> None:
    advantages, loss = loss_of("rloo", tmp_path)
    assert advantages == pytest.approx([1, -1, 0, 0])
    assert loss == pytest.approx(-(1.2 - 0.8) / 4)
    # Within the clip: 1.1 · 0.9 = 0.99 as a whole.
    inside = torch.tensor([[1.1, 0.9], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert loss_of("rloo", tmp_path, inside)[1] == pytest.approx(-(0.99 - 1) / 4)


def test_reinforce_pp_normalises_over_the_batch(tmp_path: Path) -> None:
    advantages, loss = loss_of("reinforce_pp", tmp_path)
    right, wrong = 0.25 / (B + 1e-4), -0.75 / (B + 1e-4)
    assert advantages == pytest.approx([right, wrong, right, right])
    assert loss == pytest.approx(-((1.2 + 0.9) / 2 * right + 0.8 * wrong + 2 * right) / 4)


def test_reinforce_pp_baseline_takes_off_the_group_first(tmp_path: Path) -> None:
    advantages, loss = loss_of("reinforce_pp_baseline", tmp_path)
    one = 0.5 / (math.sqrt(1 / 8) + 1e-4)
    assert advantages == pytest.approx([one, -one, 0, 0])
    assert loss == pytest.approx(-((1.2 + 0.9) / 2 - 0.8) * one / 4)


def test_a_completion_without_a_reward_is_no_part_of_the_mean() -> None:
    found = normalised(torch.tensor([1.0, math.nan, 0.0, 1.0]), 2)
    assert found.tolist() == pytest.approx([0, 0, -0.5 / (math.sqrt(1 / 6) + 1e-4), 0.5 / (math.sqrt(1 / 6) + 1e-4)])


@pytest.mark.parametrize("name", ["sft", "offline_distillation"])
def test_sft_is_the_mean_over_answer_tokens_alone(name: str, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    verdict = {"index": 0, "tokens": 9, "truncated": False, "how": "exact"}
    texts = [(" 2 Answer: 2", 1.0), (" 3 Answer: 4", 0.0), (" Answer: 7", 1.0)]
    rows = [
        {"problem_id": f"sums/train/{i}", "completion": text, "score": score, **verdict}
        for i, (text, score) in enumerate(texts)
    ]
    write_jsonl(samples, rows)
    recipe = recipe_of(name, teacher=None if name == "sft" else str(samples))
    check(recipe)
    built = build(recipe, tmp_path / "run")
    built.pool.close()
    trainer: Any = built.trainer
    tokenizer = trainer.processing_class
    batch = next(iter(trainer.get_train_dataloader()))
    total, count = 0.0, 0
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        answer = tokenizer.decode(ids[labels != -100])
        assert answer.endswith("</s>") and "=" not in answer.partition("Answer:")[2]
        assert name != "sft" or answer.strip().startswith("Answer:")
        assert name == "sft" or answer.removesuffix("</s>") in (" 2 Answer: 2", " Answer: 7")
        real = ids[: int((labels != -100).nonzero().max()) + 1]
        logps = trainer.model(real[None]).logits[0].detach().log_softmax(-1)
        total -= sum(float(logps[t - 1, real[t]]) for t in range(1, len(real)) if labels[t] != -100)
        count += int((labels != -100).sum())
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(total / count, rel=1e-5)


def test_distillation_is_the_reverse_kl_on_what_the_student_sampled(tmp_path: Path) -> None:
    teacher, tokenizer = load_model("bundled:sums")
    for weight in teacher.parameters():
        weight.data *= 1.1
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    recipe = recipe_of("distillation", teacher=str(tmp_path / "teacher"), train={"temperature": 0.8})
    built = build(recipe, tmp_path / "run")
    built.pool.close()
    trainer: Any = built.trainer
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    output = trainer._generate_and_score_completions([{"prompt": "1 + 1 ="}, {"prompt": "22 + 3 ="}])
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    length = output["completion_ids"].shape[1]
    student, teacher = (
        (model(ids, attention_mask=mask).logits.detach()[:, -length - 1 : -1] / 0.8).log_softmax(-1)
        for model in (trainer.model, trainer.teacher_model)
    )
    kl = (student.exp() * (student - teacher)).sum(-1)
    expected = (kl * output["completion_mask"]).sum() / output["completion_mask"].sum()
    assert float(expected) > 0.01
    assert trainer.compute_loss(trainer.model, output).item() == pytest.approx(float(expected), rel=1e-4)


def test_a_teacher_with_other_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bundled:backward has another vocabulary than bundled:sums"):
        build(recipe_of("distillation", teacher="bundled:backward"), tmp_path)


def test_groups_without_signal_are_drawn_anew_until_all_have_some(tmp_path: Path) -> None:
    recipe = recipe_of("dapo")
    # The second group is flat, then its successor is too, then not.
    trainer = scripted(recipe, tmp_path, [LENGTHS, [1, 1], [2, 2]], [REWARDS, [0.0, 0.0], [0.0, 1.0]])
    output = rollout(trainer, recipe)
    assert output["advantages"].tolist() == pytest.approx([A, -A, -A, A])
    assert output["completion_mask"].sum(1).tolist() == [2, 1, 2, 2]
    assert trainer._metrics["train"]["resampled"] == [2]
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [0]
    assert (trainer.draws, trainer.graded) == (3, 3)


def test_drawing_anew_ends_at_the_cap_and_says_what_is_left(tmp_path: Path) -> None:
    recipe = recipe_of("grpo", dynamic_sampling=True, max_resample=2)
    trainer = scripted(recipe, tmp_path, [LENGTHS, [1, 1], [2, 2]], [REWARDS, [0.0, 0.0], [1.0, 1.0]])
    assert rollout(trainer, recipe)["advantages"].tolist() == pytest.approx([A, -A, 0, 0])
    assert trainer._metrics["train"]["resampled"] == [2]
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [0.5]


def test_a_batch_with_signal_is_drawn_once(tmp_path: Path) -> None:
    recipe = recipe_of("dapo")
    trainer = scripted(recipe, tmp_path, [LENGTHS], [[1.0, 0.0, 0.0, 1.0]])
    rollout(trainer, recipe)
    assert (trainer.draws, trainer._metrics["train"]["resampled"]) == (1, [0])


def test_dynamic_sampling_is_dapos_own_and_a_choice_for_the_others() -> None:
    def told(name: str, **algorithm: Any) -> int:
        return algorithm_settings(recipe_of(name, **algorithm).algorithm)["max_resample"]

    assert (told("dapo"), told("grpo"), told("cispo")) == (3, 0, 0)
    assert (told("dapo", dynamic_sampling=False), told("gspo", dynamic_sampling=True, max_resample=5)) == (0, 5)


def test_overlong_completions_lose_up_to_one_and_that_is_no_signal(tmp_path: Path) -> None:
    recipe = recipe_of("dapo", overlong_buffer=2)
    built = build(recipe, tmp_path)
    built.pool.close()
    trainer: Any = built.trainer
    lengths = [[5] * n for n in (1, 2, 3, 4)]
    assert trainer.reward_funcs[1](completion_ids=lengths) == [0, 0, -0.5, -1]
    assert trainer.reward_func_names[1] == PUNISHMENT
    assert trainer._without_signal(torch.tensor([[1.0, -1.0], [1.0, 0.0], [0.0, -0.5], [1.0, 0.0]])) == [0]


def test_trl_is_told_each_loss_and_clip_and_never_left_to_its_default() -> None:
    def told(name: str, **algorithm: Any) -> tuple[Any, ...]:
        config: Any = trl_config(recipe_of(name, **algorithm), Path("unused"))
        return config.loss_type, config.importance_sampling_level, config.epsilon, config.epsilon_high

    assert told("grpo") == ("grpo", "token", 0.2, None)
    assert told("dapo") == ("dapo", "token", 0.2, 0.28)
    assert told("gspo") == ("grpo", "sequence", 3e-4, 4e-4)
    assert told("cispo") == ("cispo", "token", 0.2, 5.0)
    assert told("dapo", epsilon=0.1, epsilon_high=0.3) == ("dapo", "token", 0.1, 0.3)
    assert told("cispo", epsilon_high=1.0)[3] == 2.0


@pytest.mark.parametrize(
    "name", [name for name, row in ALGORITHMS.items() if row.learns_from in ("rewards", "teacher")]
)
def test_rollouts_are_sampled_from_the_whole_distribution(name: str) -> None:
    told: Any = trl_config(recipe_of(name), Path("unused"))
    assert (told.top_p, told.top_k, told.temperature) == (1.0, 0, 1.0)


def test_an_unknown_algorithm_gets_the_closest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'grpo'"):
        get_algorithm("grp")


@pytest.mark.parametrize(
    ("name", "algorithm", "message"),
    [
        ("sft", {"beta": 0.1}, "algorithm.beta: has no meaning for sft"),
        ("sft", {"iterations": 2}, "algorithm.iterations: has no meaning for sft"),
        ("ppo", {"dynamic_sampling": True}, "algorithm.dynamic_sampling: has no meaning for ppo"),
        ("distillation", {"overlong_buffer": 2}, "algorithm.overlong_buffer: has no meaning"),
        ("grpo", {"teacher": "bundled:sums"}, "algorithm.teacher: has no meaning for grpo"),
        ("distillation", {}, "algorithm.teacher: distillation needs one"),
        ("dapo", {"overlong_buffer": 5}, "algorithm.overlong_buffer: 5 is more than train.max_completion_tokens = 4"),
        ("grpo", {"prompts": 65}, "task.train_problems: 64 do not fill a step of 65 prompts"),
        (
            "distillation",
            {"teacher": "bundled:sums", "prompts": 33},
            "task.train_problems: 64 do not fill a step of 66",
        ),
        ("grpo", {"iterations": 3}, "train.save_every: 20 must be a multiple of algorithm.iterations = 3"),
    ],
)
def test_settings_that_do_not_fit_the_algorithm_are_refused(name: str, algorithm: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(recipe_of(name, **algorithm))


def test_samples_of_another_split_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    row = {"problem_id": "sums/test/0", "index": 0, "completion": " Answer: 1", "tokens": 4, "truncated": False}
    write_jsonl(path, [{**row, "score": 1.0, "how": "exact"}])
    with pytest.raises(InputError, match=r"such as of .'sums/test/0'.: sample with --split train"):
        build(recipe_of("offline_distillation", teacher=str(path)), tmp_path / "run")
