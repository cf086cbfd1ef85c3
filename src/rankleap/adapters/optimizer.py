"""What some adapters need while they train: an optimizer of their own, a schedule, a term in the loss, a kept start.

``with_adapter`` gives any Transformers or TRL trainer what its adapter needs, and checks what its optimizer holds.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankleap.adapters.adapter import LIVE, Adapter, start_minor
from rankleap.config import AdapterSection
from rankleap.errors import RunError
from rankleap.files import write_aside

INITIAL = "initial"
"""Folder of the run that keeps an adapter whose start was taken out of the base; ``checkpoints`` looks there."""
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def prepare(model: nn.Module, adapter: Adapter, beta: float) -> None:
    """After injection: start MiLoRA, freeze LoRA-FA's A, give a KL term the original base where the live one was lowered."""
    if not isinstance(model, PeftModel):
        return
    if adapter.start == "minor":
        start_minor(model)
    # AdaLoRA's ranknum is a count, which PEFT leaves trainable on a bfloat16 base.
    frozen = {"lorafa": "lora_A", "adalora": "ranknum"}.get(adapter.name)
    for name, weight in model.named_parameters() if frozen else ():
        weight.requires_grad_(weight.requires_grad and f"{frozen}." not in name)
    if adapter.name == "adalora":
        # PEFT adds its term to losses that the model itself computes (SFT): ours is added to every loss, once.
        _adalora(model)[1].orth_reg_weight = 0.0
    if adapter.start != "base" and beta:
        # TRL's reference is the adapter named "ref" where there is one: s·B₀·A₀ again, which with W_res is W exactly.
        live = model.peft_config[LIVE]
        sizes = {"r": live.r, "lora_alpha": live.lora_alpha, "target_modules": live.target_modules}  # pyright: ignore[reportAttributeAccessIssue]
        model.add_adapter("ref", LoraConfig(**sizes, task_type="CAUSAL_LM", use_rslora=live.use_rslora))  # pyright: ignore[reportAttributeAccessIssue]
        weights = dict(model.named_parameters())
        for name in [name for name in weights if ".ref." in name]:
            weights[name].data.copy_(weights[name.replace(".ref.", f".{LIVE}.")].data)
            weights[name].requires_grad_(False)


def with_adapter(trainer_class: type[Any], adapter: Adapter, settings: AdapterSection) -> type[Any]:
    """The trainer class with the adapter's optimizer, checked to hold what trains, and its term in the loss."""
    ratio = float(settings.options.get("loraplus_lr_ratio", adapter.optimizer.get("loraplus_lr_ratio", 1.0)))
    weight = float(settings.options.get("orth_reg_weight", AdaLoraConfig(total_step=1).orth_reg_weight))

    class Adapted(trainer_class):
        def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
            live: Any = self.model if model is None else model
            if self.optimizer is None and adapter.name == "loraplus":
                self.optimizer = _loraplus(live, self.args, ratio)
            if self.optimizer is None and adapter.name == "lorafa":
                self.optimizer = _lorafa(live, self.args)
            optimizer = super().create_optimizer(model)
            require_optimizer(optimizer, live, adapter, ratio)
            return optimizer

        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(model, *args, **kwargs)
            if adapter.name != "adalora" or not model.training:
                return result
            # TRL's losses are divided by the accumulation steps already, and this one counts once in each.
            live = self.accelerator.unwrap_model(model)
            term = weight * orthogonality(live) / self.current_gradient_accumulation_steps
            return (result[0] + term, *result[1:]) if isinstance(result, tuple) else result + term

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            # LoRA-FA's state goes by names, so that torch does not know to which device it belongs.
            for key, state in self.optimizer.state.items() if adapter.name == "lorafa" else ():
                if isinstance(key, str):
                    state |= {k: v.to(self.args.device) for k, v in state.items() if isinstance(v, Tensor)}

    # Trackers and model cards show the trainer's own name.
    Adapted.__name__ = trainer_class.__name__
    return Adapted


def _loraplus(model: PeftModel, args: TrainingArguments, ratio: float) -> Optimizer:
    """LoRA+ (2402.12354): B learns ``ratio`` times faster than A."""
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = create_loraplus_optimizer(model, kind, loraplus_lr_ratio=ratio, **settings)
    # No embeddings and no biases are adapted; an empty group would still be counted and logged.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def _lorafa(model: PeftModel, args: TrainingArguments) -> Optimizer:
    """LoRA-FA (2308.03303): A stays where it started, and B's gradient is what approximates full fine-tuning's best."""
    config = model.peft_config[LIVE]
    optimizer = create_lorafa_optimizer(model, config.r, config.lora_alpha, args.learning_rate)  # pyright: ignore[reportAttributeAccessIssue]
    # PEFT hands over the whole model; what is needed are the pairs of A and B.
    group = optimizer.param_groups[0]
    kept = [
        number for number, name in enumerate(group["names"]) if f"lora_A.{LIVE}" in name or f"lora_B.{LIVE}" in name
    ]
    for key in ("params", "names", "scaling_factors"):
        group[key] = [group[key][number] for number in kept]
    return optimizer


def require_optimizer(optimizer: Optimizer, model: nn.Module, adapter: Adapter, ratio: float = 1.0) -> None:
    """Raise ``RunError`` unless the optimizer moves exactly what trains, at the rates that the method has."""
    held = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    # LoRA-FA reads the frozen A beside each B. What is not the model's, such as a value head, is the trainer's affair.
    still = {id(p) for name, p in model.named_parameters() if adapter.name != "lorafa" or "lora_A" not in name}
    missing = [name for key, name in trained.items() if key not in held]
    if missing or (set(held) & still) - set(trained):
        raise RunError(
            f"{adapter.name}: the optimizer leaves out {len(missing)} tensors that train ({missing[:3]}) and holds "
            f"{len((set(held) & still) - set(trained))} that do not"
        )
    rates = {held[key] * (1 if "lora_B" in name else ratio) for key, name in trained.items()}
    if adapter.optimizer and max(rates) > min(rates) * (1 + 1e-9):
        raise RunError(f"{adapter.name}: B should learn {ratio:g} times as fast as A, got {sorted(set(held.values()))}")


def orthogonality(model: PeftModel) -> Tensor:
    """AdaLoRA's R(P, Λ, Q) (2303.10512, Eq. 4), as PEFT has it: the mean of ‖PᵀP - I‖_F and ‖QQᵀ - I‖_F over all matrices."""
    terms: list[Tensor] = []
    for name, weight in model.named_parameters():
        if f"lora_A.{LIVE}" in name or f"lora_B.{LIVE}" in name:
            gram_RR = weight @ weight.T if "lora_A" in name else weight.T @ weight
            terms.append(torch.linalg.matrix_norm(gram_RR - torch.eye(len(gram_RR), device=weight.device)))
    return torch.stack(terms).mean()


def _adalora(model: nn.Module) -> tuple[AdaLoraModel, AdaLoraConfig]:
    tuner = model.base_model if isinstance(model, PeftModel) else None
    config = tuner.peft_config[LIVE] if isinstance(tuner, AdaLoraModel) else None
    if not isinstance(tuner, AdaLoraModel) or not isinstance(config, AdaLoraConfig):
        raise RunError(f"adalora needs PEFT's AdaLoRA model, got {type(model).__name__}")
    return tuner, config


@dataclass
class RankSchedule(TrainerCallback):
    """Lets AdaLoRA adapt: after every optimizer step, while gradients are there, scores triplets and prunes to the budget.

    Scores ride in the optimizer's state, so that a checkpoint has them and a resume goes on with them. Pruned triplets
    may come back, so they are saved as they are, with a Λ of 0, instead of cut off (PEFT's way, which it cannot resume).
    """

    pattern: dict[str, list[bool]] = field(default_factory=dict)
    """Which triplets of each matrix are kept."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a resume, what was pruned shows by its zeros."""
        names = ((name, p) for name, p in _adalora(kwargs["model"])[0].model.named_parameters() if "lora_E" in name)
        self.pattern = {name: (p != 0).flatten().tolist() for name, p in names}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Transformers calls this between ``optimizer.step`` and ``zero_grad``; its count of steps moves only later."""
        (tuner, config), moments = _adalora(kwargs["model"]), kwargs["optimizer"].state
        allocator = tuner.rankallocator
        weights = {name: p for name, p in tuner.model.named_parameters() if p.requires_grad}
        scores = {key: vars(allocator)[key] for key in _SCORES}
        for key, of in scores.items():
            of.update({n: moments[p][key] for n, p in weights.items() if n not in of and key in moments[p]})
        config.rank_pattern = self.pattern
        tuner.update_and_allocate(state.global_step + 1)
        self.pattern, config.rank_pattern = config.rank_pattern or {}, None
        for key in _SCORES:
            for name, score in vars(allocator)[key].items():
                moments[weights[name]][key] = score


@dataclass
class KeepStart(TrainerCallback):
    """Saves the adapter as it is before the first step, once, beside the checkpoints: what its deltas are measured from."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a resume it is there already."""
        place = Path(str(args.output_dir)).parent / INITIAL
        if state.global_step == 0 and state.is_world_process_zero:
            with write_aside(place) as aside:
                kwargs["model"].save_pretrained(str(aside), selected_adapters=[LIVE])


def adapter_callbacks(adapter: Adapter) -> list[TrainerCallback]:
    """What an adapter needs between the steps."""
    schedule = [RankSchedule()] if adapter.name == "adalora" else []
    return [*schedule, *([KeepStart()] if adapter.start != "base" else [])]


@torch.no_grad()
def largest_difference(first: nn.Module, second: nn.Module, tokens_BT: Tensor) -> float:
    """The largest difference between two models' logits, relative to the largest logit; ``inf`` if one is not finite."""
    logits = [
        model.eval()(input_ids=tokens_BT.to(next(model.parameters()).device)).logits.float().cpu()
        for model in (first, second)
    ]
    difference = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    return difference if math.isfinite(difference) else math.inf
