"""PPO on an episode that is worked out by hand, by itself and through the trainer; its head on disk."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trl.trainer.utils import split_tensor_dict

from rankleap.algorithms.ppo import HEAD, clipped_value_loss, gae, whitened
from rankleap.checkpoints import open_run
from rankleap.files import read_jsonl
from rankleap.training import train
from rankleap.training.build import build
from scripted import recipe_of, rollout, scripted

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def test_gae_of_an_episode_of_three_tokens() -> None:
    # γ = 0.9, λ = 0.5, so γλ = 0.45; the reward comes with the last token. The second episode has one token.
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 0.2, 0.4], [0.5, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.5)
    # δ₃ = 1 - 0.4 = 0.6;  δ₂ = 0.9·0.4 - 0.2 = 0.16;  δ₁ = 0.9·0.2 - 0.5 = -0.32
    # A₃ = 0.6;  A₂ = 0.16 + 0.45·0.6 = 0.43;  A₁ = -0.32 + 0.45·0.43 = -0.1265;  R = A + V
    torch.testing.assert_close(advantages, torch.tensor([[-0.1265, 0.43, 0.6], [1.5, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.3735, 0.63, 1.0], [2.0, 0.0, 0.0]]))


def test_gae_without_discount_or_trust_in_values_is_the_reward_less_the_value() -> None:
    values = torch.tensor([[0.5, 0.2, 0.4]])
    advantages, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), values, torch.ones(1, 3), 1.0, 1.0)
    torch.testing.assert_close(advantages, 1 - values)
    torch.testing.assert_close(returns, torch.ones(1, 3))


def test_a_value_that_moved_too_far_keeps_the_larger_loss() -> None:
    old, returns = torch.full((4,), 1.0), torch.tensor([2.0, 2.0, 0.0, 2.0])
    values = torch.tensor([1.1, 1.5, 1.5, 3.5])
    # Within ±0.2; towards the return, held at 1.2; away from it, as it is; past it, as it is.
    expected = torch.tensor([0.9**2, 0.8**2, 1.5**2, 1.5**2]) / 2
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.2), expected)


def test_whitening_sees_only_tokens() -> None:
    advantages, mask = torch.tensor([[1.0, 3.0], [2.0, 99.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    got = whitened(advantages, mask, torch.tensor([6.0, 14.0, 3.0]))
    deviation = math.sqrt(2 / 3)
    torch.testing.assert_close(got, torch.tensor([[-1 / deviation, 1 / deviation], [0.0, 0.0]]), atol=1e-6, rtol=1e-5)


def test_the_trainer_puts_reward_kl_value_and_clip_together(tmp_path: Path) -> None:
    recipe = recipe_of(
        "ppo",
        1,
        2,
        discount=0.9,
        gae_lambda=0.5,
        beta=0.1,
        iterations=2,
        value_coefficient=0.5,
        train={"save_every": 2},
    )
    trainer = scripted(recipe, tmp_path, [[2, 1]], [[1.0, 0.0]])
    trainer.value_head.bias.data.fill_(0.5)
    # The base is asked under no gradient too, and by another model.
    logps = iter([torch.full((2, 2), -2.0), torch.full((2, 2), -3.0), torch.full((2, 2), -2.0)])
    type(trainer).old = property(lambda _: next(logps))  # pyright: ignore[reportAttributeAccessIssue]
    output = rollout(trainer, recipe)
    # Every token costs 0.1·(-2 + 3) = 0.1. First: δ₂ = 1 - 0.1 - 0.5 = 0.4, δ₁ = -0.1 + 0.45 - 0.5 = -0.15, A₁ = -0.15 + 0.18.
    # Second: δ₁ = 0 - 0.1 - 0.5.
    raw = torch.tensor([[0.03, 0.4], [-0.6, 0.0]])
    torch.testing.assert_close(output["returns"], torch.tensor([[0.53, 0.9], [-0.1, 0.0]]))
    mean, square = raw.sum() / 3, raw.square().sum() / 3
    white = (raw - mean) / (square - mean**2).sqrt()
    torch.testing.assert_close(output["advantages"][0], white[0])
    assert output["advantages"][1].tolist() == pytest.approx([float(white[1, 0]), 0])
    assert trainer._metrics["train"]["kl"] == [pytest.approx(1)]
    # On the second update, all tokens are 1.5 times as likely, and the value has moved from 0.5 to 0.9, held at 0.7.
    trainer.new = torch.full((2, 2), -2.0 + math.log(1.5))
    trainer.value_head.bias.data.fill_(0.9)
    a, b, c = (float(x) for x in (white[0, 0], white[0, 1], white[1, 0]))
    policy = -sum(min(1.5 * x, 1.2 * x) for x in (a, b, c)) / 3
    value = (max(0.37**2, 0.17**2) + max(0.0, 0.2**2) + max(1.0**2, 0.8**2)) / 2 / 3
    assert trainer.compute_loss(trainer.model, output).item() == pytest.approx(policy + 0.5 * value)


def test_a_completion_without_a_reward_trains_neither_policy_nor_value(tmp_path: Path) -> None:
    recipe = recipe_of("ppo", 1, 3)
    trainer = scripted(recipe, tmp_path, [[2, 2, 2]], [[1.0, None, 0.0]])
    output = rollout(trainer, recipe)
    assert output["completion_mask"].sum(1).tolist() == [2, 0, 2]
    assert output["advantages"][1].tolist() == output["returns"][1].tolist() == [0, 0]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_head_learns_and_lies_beside_the_model(method: str, tmp_path: Path) -> None:
    sizes = {"steps": 2, "save_every": 1, "max_completion_tokens": 16}
    recipe = recipe_of("ppo", 4, 4, sizes)
    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"method": method, "rank": 2})})
    out = train(recipe, tmp_path / "run")
    heads = [load_file(out / "checkpoints" / f"checkpoint-{step}" / HEAD) for step in (1, 2)]
    assert [float(head["0.step"]) for head in heads] == [1, 2]
    # One step of Adam moves by its rate, 1e-4, and no further.
    assert float(heads[0]["weight"].abs().max()) == pytest.approx(1e-4, rel=1e-2)
    assert not torch.equal(heads[0]["weight"], heads[1]["weight"])
    assert all(row["value_loss"] > 0 for row in read_jsonl(out / "metrics.jsonl"))
    assert open_run(out).steps == [1, 2]
    weights = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}[method]
    assert not any("value" in name for name in load_file(out / "checkpoints" / "checkpoint-2" / weights))


def test_a_value_head_finds_what_a_reward_is_worth(tmp_path: Path) -> None:
    recipe = recipe_of("ppo", 1, 2, value_learning_rate=0.1)
    trainer: Any = scripted(recipe, tmp_path, [[2, 2]] * 60, [[1.0, 1.0]] * 60)
    trainer.create_optimizer()
    for _ in range(60):
        trainer.compute_loss(trainer.model, rollout(trainer, recipe)).backward()
        trainer.optimizer.step()
    assert float(trainer.value_head.bias.detach()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_value_is_of_the_state_before_its_token(method: str, tmp_path: Path) -> None:
    recipe = recipe_of("ppo")
    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"method": method, "rank": 2})})
    built = build(recipe, tmp_path)
    trainer: Any = built.trainer
    trainer.value_head.weight.data.normal_()
    rows = [{"prompt": "1 + 1 =", "problem_id": "sums/train/0"}] * 2 + [
        {"prompt": "22 + 3 =", "problem_id": "sums/train/1"}
    ] * 2
    output = trainer._generate_and_score_completions(rows)
    built.pool.close()
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    hidden = trainer.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1].detach()
    before = hidden[:, output["prompt_ids"].shape[1] - 1 : -1]
    torch.testing.assert_close(output["values"], trainer.value_head(before).squeeze(-1).detach(), atol=1e-4, rtol=1e-4)


def test_micro_batches_add_up_to_the_whole_batch(tmp_path: Path) -> None:
    recipe = recipe_of("ppo", 2, 2)
    gradients = []
    for micro in (4, 2):
        asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": micro})})
        trainer = scripted(asked, tmp_path, [[2, 1, 3, 1]], [[1.0, 0.0, 0.5, 0.1]])
        trainer.current_gradient_accumulation_steps = 4 // micro
        output = rollout(trainer, asked)
        trainer.new = torch.zeros(micro, 3)
        for part in split_tensor_dict(output, 4 // micro):
            trainer.compute_loss(trainer.model, part).backward()
        gradients.append(trainer.value_head.bias.grad)
    assert gradients[0].abs() > 1e-3
    torch.testing.assert_close(*gradients)
