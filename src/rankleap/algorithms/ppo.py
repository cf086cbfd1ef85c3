"""PPO (1707.06347, Eqs. 7, 9, 11-12) with GAE (1506.02438, Eq. 16): a value head instead of a group as the baseline.

    r_t = -β log(π_old/π_base)(o_t),  and at the last token the reward of the completion as well
    δ_t = r_t + γ V_{t+1} - V_t          A_t = δ_t + γλ A_{t+1}          R_t = A_t + V_t        V after the end is 0
    L   = 1/Σ|o_i| Σ_i Σ_t [ -min(ρ Â, clip(ρ, 1-ε, 1+ε) Â) + c/2 max((V-R)², (clip(V, V_old±ε_V)-R)²) ]

Â is A whitened over the batch. V is one linear layer on the last hidden state, so policy and value share their forward pass;
it starts at 0, has its own AdamW at a constant rate, and lies in ``value_head.safetensors`` beside the model.

How we differ: the value loss is clipped (as OpenAI's code does, the paper does not); there is no entropy bonus; the head's
gradient is not counted in ``max_grad_norm``. Shapes: B completions, T tokens of the longest, P of a prompt, H hidden.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rankleap.algorithms import grpo
from rankleap.algorithms.sampling import SamplingConfig, SamplingTrainer
from rankleap.config import AlgorithmSection

HEAD = "value_head.safetensors"


@dataclass
class PPOConfig(SamplingConfig):
    """TRL's settings, and those of the value function."""

    discount: float = 1.0
    gae_lambda: float = 0.95
    value_coefficient: float = 0.1
    value_clip: float = 0.2
    value_learning_rate: float = 1e-4


def settings(recipe: AlgorithmSection) -> dict[str, Any]:
    """TRL's settings and ours."""
    own = {"discount", "gae_lambda", "value_coefficient", "value_clip", "value_learning_rate"}
    # The name is TRL's for a mean over tokens.
    return {**grpo.settings(recipe), "loss_type": "dapo", **recipe.model_dump(include=own)}


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """(advantages_BT, returns_BT) of completions that end where their mask does; zero behind."""
    advantages_BT = torch.zeros_like(rewards_BT)
    next_advantage_B = next_value_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + discount * next_value_B - values_BT[:, t]
        next_advantage_B = (delta_B + discount * gae_lambda * next_advantage_B) * mask_BT[:, t]
        next_value_B = values_BT[:, t] * mask_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, or that of the value held within ``clip`` of the old one where it is larger."""
    held = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (held - returns).square())


def whitened(advantages_BT: Tensor, mask_BT: Tensor, sums: Tensor) -> Tensor:
    """Zero mean and unit variance, given the ``sums`` of A, A² and tokens over all processes; zero where masked."""
    mean, square = sums[0] / sums[2], sums[1] / sums[2]
    return (advantages_BT - mean) * (square - mean.square()).clamp(min=0).add(1e-8).rsqrt() * mask_BT


class PPOTrainer(SamplingTrainer):
    """TRL's GRPO trainer with advantages of every token and the value loss; its policy loss is TRL's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        live = self.accelerator.unwrap_model(self.model)
        policy: Any = live.get_base_model() if isinstance(live, PeftModel) else live
        width = policy.config.get_text_config().hidden_size
        self.value_head = nn.Linear(width, 1, device=self.accelerator.device)
        for parameter in self.value_head.parameters():
            nn.init.zeros_(parameter)
            # The head lies outside the wrapped model, so nobody else averages its gradient over processes.
            parameter.register_hook(lambda gradient: self.accelerator.reduce(gradient, "mean"))
        rate = self.args.value_learning_rate
        # Apart from the policy's, which an adapter may have its own kind of.
        self._head_optimizer = AdamW(self.value_head.parameters(), lr=rate, weight_decay=0.0)
        self._hidden: Tensor | None = None
        policy.base_model.register_forward_hook(self._keep_hidden)
        # TRL would put the KL into the loss; here it is in the reward.
        self.beta = 0.0

    def _keep_hidden(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._hidden = output.last_hidden_state

    def _values(self, length: int) -> Tensor:
        """Values_BT of the states before each of the last ``length`` tokens of the latest forward pass."""
        hidden, self._hidden = self._hidden, None  # the graph must not outlive its step
        assert hidden is not None
        return self.value_head(hidden[:, -length - 1 : -1].float()).squeeze(-1)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL computes the base's log-probabilities only where beta says so.
        self.beta = self.args.beta
        output = super()._generate_and_score_completions(inputs)
        self.beta = 0.0
        logps_BT, values_BT = self._rollout_values(output)
        rewards_B = self.local(self.rewards())
        # Without a reward there is no episode to learn from.
        output["completion_mask"] = output["completion_mask"] * ~rewards_B.isnan()[:, None]
        mask_BT = output["completion_mask"].float()
        rewards_BT = torch.zeros_like(values_BT)
        if self.args.beta:
            kl_BT = (logps_BT - output["ref_per_token_logps"]) * mask_BT
            rewards_BT -= self.args.beta * kl_BT
            self._metrics["train"]["kl"].append((kl_BT.sum() / mask_BT.sum()).item())
        last_B = (mask_BT.sum(1).long() - 1).clamp(min=0)
        rewards_BT[torch.arange(len(last_B)), last_B] += rewards_B.nan_to_num(0.0)
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, self.args.discount, self.args.gae_lambda)
        sums = torch.stack([advantages_BT.sum(), advantages_BT.square().sum(), mask_BT.sum()])
        advantages_BT = whitened(advantages_BT, mask_BT, self.accelerator.reduce(sums))
        return {**output, "advantages": advantages_BT, "returns": returns_BT, "values": values_BT}

    def _rollout_values(self, output: dict[str, Any]) -> tuple[Tensor, Tensor]:
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        length, size = output["completion_ids"].shape[1], self.args.per_device_train_batch_size
        found: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for some_ids, some_mask in zip(ids.split(size), mask.split(size), strict=True):
                logps, _, _ = self._get_per_token_logps_and_entropies(self.model, some_ids, some_mask, length)
                found.append((logps, self._values(length)))
        return torch.cat([logps for logps, _ in found]), torch.cat([values for _, values in found])

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        policy_loss = super()._compute_loss(model, inputs)
        mask_BT = inputs["completion_mask"]
        # The same forward pass: TRL's loss has just made it.
        values_BT = self._values(mask_BT.shape[1])
        loss_BT = clipped_value_loss(values_BT, inputs["values"], inputs["returns"], self.args.value_clip) * mask_BT
        self._metrics["train"]["value_loss"].append((loss_BT.sum() / mask_BT.sum().clamp(min=1)).item())
        # Divided as TRL divides the policy's: by the tokens of the whole batch, micro-batches included.
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return policy_loss + self.args.value_coefficient * loss_BT.sum() / tokens

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer of the policy; the head steps with it, by an optimizer of its own."""
        optimizer = super().create_optimizer(model)
        optimizer.register_step_post_hook(lambda *_: self._step_head())
        return optimizer

    def _step_head(self) -> None:
        self._head_optimizer.step()
        self._head_optimizer.zero_grad()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            states = self._head_optimizer.state_dict()["state"]
            moments = {f"{number}.{key}": value for number, state in states.items() for key, value in state.items()}
            save_file({**self.value_head.state_dict(), **moments}, Path(output_dir or str(self.args.output_dir)) / HEAD)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = load_file(Path(resume_from_checkpoint) / HEAD)
        self.value_head.load_state_dict({name: saved.pop(name) for name in ("weight", "bias")})
        states: dict[int, dict[str, Tensor]] = {0: {}, 1: {}}
        for name, value in saved.items():
            states[int(name[0])][name[2:]] = value
        self._head_optimizer.load_state_dict({**self._head_optimizer.state_dict(), "state": states})
