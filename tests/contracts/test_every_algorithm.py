"""What every algorithm in the table must keep; a new row is tested here before anyone writes a test for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from killed import KillBefore
from rankleap.algorithms import ALGORITHMS, get_algorithm
from rankleap.config import Recipe
from rankleap.files import read_jsonl
from rankleap.training import train
from rankleap.training.build import build, check
from scripted import recipe_of, rollout, scripted

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

FROM_REWARDS = [name for name, row in ALGORITHMS.items() if row.learns_from == "rewards"]
LENGTHS = [2, 1, 3, 1, 2, 2, 3, 1]
REWARDS = [1.0, 0.0, 0.5, 0.25, 0.0, 0.1, 1.0, 0.75]


def settings_of(name: str) -> dict[str, Any]:
    """Settings under which equal rewards say nothing: for PPO, values that nothing is discounted against."""
    if name == "ppo":
        return {"gae_lambda": 1.0, "discount": 1.0}
    return {"dynamic_sampling": False} if name == "dapo" else {}


def gradient_of(name: str, out: Path, rewards: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the loss by each token's log-probability, mask)."""
    recipe = recipe_of(name, 2, 4, **settings_of(name))
    trainer = scripted(recipe, out, [LENGTHS], [list(rewards)])
    output = rollout(trainer, recipe)
    trainer.new = torch.zeros(8, 3, requires_grad=True)
    trainer.compute_loss(trainer.model, output).backward()
    return trainer.new.grad, output["completion_mask"].bool()


@pytest.mark.parametrize("name", FROM_REWARDS)
def test_equal_rewards_give_no_gradient(name: str, tmp_path: Path) -> None:
    assert gradient_of(name, tmp_path, [1.0] * 8)[0].abs().max() < 1e-6


@pytest.mark.parametrize("name", FROM_REWARDS)
def test_every_token_that_earned_something_gets_a_gradient_and_padding_gets_none(name: str, tmp_path: Path) -> None:
    gradient, mask = gradient_of(name, tmp_path, REWARDS)
    assert gradient[~mask].abs().max() == 0
    assert gradient[mask].abs().min() > 1e-4
    # A better completion is made likelier: the loss falls with its log-probability.
    assert gradient[0, 0] < 0 < gradient[1, 0]


@pytest.mark.parametrize("name", FROM_REWARDS)
def test_permuting_a_group_permutes_its_advantages(name: str, tmp_path: Path) -> None:
    recipe, order = recipe_of(name, 2, 4, **settings_of(name)), [2, 0, 3, 1, 4, 5, 6, 7]
    there = scripted(recipe, tmp_path, [LENGTHS], [REWARDS])
    here = scripted(recipe, tmp_path, [[LENGTHS[i] for i in order]], [[REWARDS[i] for i in order]])
    before, after = (rollout(trainer, recipe)["advantages"] for trainer in (there, here))
    torch.testing.assert_close(after, before[order])


def short(name: str, method: str, **algorithm: Any) -> Recipe:
    teacher = {"teacher": "bundled:sums"} if get_algorithm(name).learns_from in ("samples", "teacher") else {}
    sizes = {"steps": 4, "save_every": 2, "max_completion_tokens": 16, "learning_rate": 1e-3}
    recipe = recipe_of(name, 3, 4, sizes, **teacher, **algorithm)
    # Few enough for a resume in the second epoch; distillation has a prompt for each completion.
    task = recipe.task.model_copy(update={"train_problems": 12 if name == "distillation" else 7})
    adapter = recipe.adapter.model_copy(update={"method": method, "rank": 2})
    return recipe.model_copy(update={"adapter": adapter, "task": task})


CASES = [(name, "lora", {}) for name in ALGORITHMS] + [
    ("ppo", "full", {"beta": 0.05, "iterations": 2}),
    ("grpo", "full", {"iterations": 2, "dynamic_sampling": True, "overlong_buffer": 4}),
    ("rloo", "full", {"beta": 0.05}),
    ("sft", "full", {}),
    ("distillation", "full", {}),
]


@pytest.mark.parametrize(("name", "method", "algorithm"), CASES)
def test_a_killed_run_resumes_to_the_same_numbers(name: str, method: str, algorithm: Any, tmp_path: Path) -> None:
    recipe = short(name, method, **algorithm)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "killed", callbacks=[KillBefore(3)])
    killed = train(recipe, tmp_path / "killed")
    logged = [
        [{key: value for key, value in row.items() if key[-2:] != "_s" and key != "peak_memory_bytes"} for row in rows]
        for rows in (read_jsonl(out / "metrics.jsonl") for out in (whole, killed))
    ]
    assert [row["step"] for row in logged[0]] == [1, 2, 3, 4]
    assert all("loss" in row for row in logged[0])
    # On the later updates of a batch nothing is sampled, so there is nothing to reward.
    rewarded = [1, 3] if algorithm.get("iterations") == 2 else [1, 2, 3, 4]
    assert [row["step"] for row in logged[0] if "reward" in row] == (rewarded if name in FROM_REWARDS else [])
    assert logged[0] == logged[1]
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    last = [load_file(out / "checkpoints" / "checkpoint-4" / file) for out in (whole, killed)]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_built_is_the_trainer_of_the_row(name: str, tmp_path: Path) -> None:
    recipe = short(name, "lora")
    check(recipe)
    built = build(recipe, tmp_path)
    built.pool.close()
    row = get_algorithm(name)
    assert isinstance(built.trainer, row.trainer) and isinstance(built.trainer.args, row.config)
    assert row.paper or name == "sft"
