"""Dynamic sampling (DAPO, 2503.14476, Eq. 11): every step trains on groups that carry signal, for all that learn from groups.

    0 < |{i: o_i is right}| < G        here: the rewards of a group are not all equal, the overlong punishment left aside

Groups without signal are drawn anew, with other prompts, in at most ``max_resample`` rounds a step. What is without signal
after that stays in the batch and is counted in ``no_signal``; ``resampled`` counts the groups that were drawn anew.

How we differ: only the groups that are missing are drawn, not whole batches; there is a cap; prompts are drawn with
replacement. The logged reward is that of the batch that trains, so it is no measure of the model.

Every ``agreement_every`` steps, what the sampler drew with is held against what trains: the log-probability of each sampled token
as the sampler had it (KV cache, evaluation mode, or vLLM) and in the trainer's own forward pass. Where they part, ρ is not 1
at the first update and the gradient is that of another policy than the one that was sampled.
Shapes: N completions of one process, F reward functions, K groups drawn anew.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rankleap.config import AlgorithmSection

log = logging.getLogger(__name__)

MOST_APART = 0.05
"""Mean |Δ log-probability| of a token that is worth a warning: a quarter of the usual clip range."""
MOST_APART_IN_FLOAT32 = 1e-3
"""The same where nothing is rounded: a thousand times what two ways of computing one model differ by."""
PUNISHMENT = "soft_overlong_punishment_reward"
"""TRL's name of the length term; lengths that differ are no signal about the answer."""


@dataclass
class SamplingConfig(GRPOConfig):
    """TRL's settings, and how often a step may draw groups anew; 0 turns dynamic sampling off."""

    max_resample: int = 0
    agreement_every: int = 0
    """Steps between two comparisons of sampler and trainer; 0 for none."""


def settings(recipe: AlgorithmSection, by_default: bool = False) -> dict[str, Any]:
    """Whether groups are drawn anew; ``by_default`` where the algorithm's paper does."""
    asked = by_default if recipe.dynamic_sampling is None else recipe.dynamic_sampling
    return {"max_resample": recipe.max_resample if asked else 0}


def same_epochs(trainer: type[Any]) -> type[Any]:
    """One of TRL's trainers that sample, clocked; its prompts are the same after a resume, where TRL's generator starts again."""

    class SameEpochs(trainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            sampler = super()._get_train_sampler(dataset)
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(sampler.seed + epoch)
            return sampler

        def _generate(self, prompts: list[Any]) -> Any:
            return self._clocked("rollout_s", super()._generate, prompts)

        def _calculate_rewards(self, *args: Any) -> Tensor:
            return self._clocked("reward_s", super()._calculate_rewards, *args)

        def _clocked(self, phase: str, work: Callable[..., Any], *args: Any) -> Any:
            start_s, done = time.perf_counter(), work(*args)
            # One number, since TRL would log the mean of a step's several draws.
            self._metrics["train"][phase] = [sum(self._metrics["train"][phase]) + time.perf_counter() - start_s]
            return done

    SameEpochs.__name__ = trainer.__name__
    return SameEpochs


class _Overheard:
    """While open, notes the log-probability of each token that ``model.generate`` draws, from its own forward passes."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        self._model, self._temperature = model, temperature
        self._logps: list[Tensor] = []
        self._next = torch.empty(0)

    def __enter__(self) -> Self:
        self._hook = self._model.register_forward_hook(self._hear, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _hear(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # What a pass predicted is known by what the next one is fed.
        if len(self._next):
            token_N1 = kwargs["input_ids"][:, -1:]
            self._logps.append(self._next.gather(1, token_N1))
        self._next = (output.logits[:, -1].float() / self._temperature).log_softmax(-1)

    def of(self, completion_ids: list[list[int]]) -> list[list[float | None]]:
        """A row for each completion; ``None`` for the last token of the longest, which is fed to no pass."""
        rows = torch.cat(self._logps, dim=1).tolist() if self._logps else [[] for _ in completion_ids]
        return [[*row, None][: len(ids)] for row, ids in zip(rows, completion_ids, strict=True)]


class SamplingTrainer(same_epochs(GRPOTrainer)):
    """TRL's trainer, drawing groups without signal anew, and keeping the rewards for those who make advantages of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drawn: tuple[Any, ...] | None = None
        self._graded: Tensor | None = None
        self._rewards_NF = torch.empty(0)
        self._warned = False

    def rewards(self) -> Tensor:
        """Weighted reward of each completion of the batch, over all processes; NaN where no function gave one."""
        return self._weighted(self._rewards_NF).masked_fill(self._rewards_NF.isnan().all(1), torch.nan)

    def local(self, values: Tensor) -> Tensor:
        """The part of ``values``, gathered from all processes, that belongs to this one."""
        return values.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.args.max_resample and self.model.training:
            inputs = self._draw(inputs)
        output = super()._generate_and_score_completions(inputs)
        # Of the batch that trains, not of what dynamic sampling drew and left.
        self._metrics["train"]["skipped"].append(self._rewards_NF.isnan().all(1).float().mean().item())
        if self._agreement_is_due() and "sampling_per_token_logps" in output:
            self._compare(output)
        return output

    def _agreement_is_due(self) -> bool:
        every = self.args.agreement_every
        # Completions are drawn at every num_iterations-th step alone.
        return bool(every) and self.model.training and self.state.global_step % every < self.num_iterations

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm or not self._agreement_is_due():
            return super()._generate_single_turn(*args, **kwargs)
        live = self.accelerator.unwrap_model(self.model)
        with _Overheard(live.get_base_model() if isinstance(live, PeftModel) else live, self.temperature) as sampler:
            completion_ids, _ = super()._generate_single_turn(*args, **kwargs)
        return completion_ids, sampler.of(completion_ids)

    @torch.no_grad()
    def _compare(self, output: dict[str, Any]) -> None:
        ids, mask = (
            torch.cat([output[f"{part}_{kind}"] for part in ("prompt", "completion")], dim=1)
            for kind in ("ids", "mask")
        )
        completion_NT = output["completion_mask"]
        # Dropout draws here too, and the run's own draws must not depend on whether it is watched.
        with torch.random.fork_rng():
            trainer_NT = self._get_per_token_logps_and_entropies(
                self.model, ids, mask, completion_NT.shape[1], self.args.per_device_train_batch_size
            )[0]
        apart_NT = (trainer_NT - output["sampling_per_token_logps"]).abs()
        known_NT = completion_NT.bool() & ~apart_NT.isnan()
        apart_NT = apart_NT.where(known_NT, 0.0)
        of_all_P3 = self.accelerator.gather(torch.stack([apart_NT.sum(), known_NT.sum(), apart_NT.max()])[None])
        mean, most = (of_all_P3[:, 0].sum() / of_all_P3[:, 1].sum().clamp(min=1)).item(), of_all_P3[:, 2].max().item()
        self._metrics["train"]["logp_gap"].append(mean)
        self._metrics["train"]["logp_gap_max"].append(most)
        bound = MOST_APART if self.args.bf16 or self.use_vllm else MOST_APART_IN_FLOAT32
        if not mean <= bound and not self._warned:
            self._warned = True
            log.warning(
                "step %d: sampler and trainer part by %.3f nats a token (at most %.3f); turn off dropout, use one precision for "
                "both (model.dtype), or correct for it by importance sampling",
                self.state.global_step,
                mean,
                most,
            )

    def _draw(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Draw until every group has signal; TRL then finds this batch, drawn and graded, instead of drawing its own."""
        size = self.num_generations
        rows, drawn = list(inputs), self._generate([row["prompt"] for row in inputs])
        graded_NF, resampled = self._grade(rows, drawn), 0
        for _ in range(self.args.max_resample):
            flat = self._without_signal(graded_NF)
            # All processes draw equally many, for grading gathers from all of them.
            count = int(self.accelerator.gather(torch.tensor([len(flat)], device=graded_NF.device)).max())
            if not count:
                break
            # The global random state is in the checkpoint, so a resumed run draws the same prompts.
            chosen = torch.randint(len(self.train_dataset), (count,)).tolist()
            others = [self.train_dataset[i] for i in chosen for _ in range(size)]
            anew = self._generate([row["prompt"] for row in others])
            graded_anew_NF = self._grade(others, anew)
            for k, group in enumerate(flat):
                here, there = slice(group * size, (group + 1) * size), slice(k * size, (k + 1) * size)
                rows[here], graded_NF[here] = others[there], graded_anew_NF[there]
                for old, new in zip(drawn, anew, strict=True):
                    # Of what TRL returns, lists hold a row for each completion; images and tools are empty here.
                    if isinstance(old, list) and old:
                        old[here] = new[there]
            resampled += count * self.accelerator.num_processes
        self._metrics["train"]["resampled"].append(resampled)
        self._drawn, self._graded = drawn, self.accelerator.gather(graded_NF)
        return rows

    def _grade(self, rows: list[dict[str, Any]], drawn: tuple[Any, ...]) -> Tensor:
        prompts = [row["prompt"] for row in rows]
        return self.local(self._calculate_rewards(rows, prompts, drawn[3], drawn[1])).clone()

    def _without_signal(self, rewards_NF: Tensor) -> list[int]:
        answers = torch.tensor([name != PUNISHMENT for name in self.reward_func_names], device=rewards_NF.device)
        grouped = self._weighted(rewards_NF * answers).view(-1, self.num_generations)
        return torch.isclose(grouped.amax(1), grouped.amin(1)).nonzero().flatten().tolist()

    def _weighted(self, rewards_NF: Tensor) -> Tensor:
        return (rewards_NF * self.reward_weights.to(rewards_NF.device)).nansum(1)

    def _generate(self, prompts: list[Any]) -> Any:
        drawn, self._drawn = self._drawn, None
        return drawn or super()._generate(prompts)

    def _calculate_rewards(self, *args: Any) -> Tensor:
        graded, self._graded = self._graded, None
        self._rewards_NF = super()._calculate_rewards(*args) if graded is None else graded
        return self._rewards_NF
