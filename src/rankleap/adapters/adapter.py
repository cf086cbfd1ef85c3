"""Which weights train: one row per method, built on PEFT; and whether what was asked is what the live model holds.

Target modules are the same for every method by default (every linear layer but the head), since PEFT's own defaults
differ by method and would make a comparison of methods a comparison of modules (2512.23165's released code: VeRA and
MiSS on two modules, LoRA on six). LN tuning alone cannot follow: what it trains are the norms themselves.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankleap.config import AdapterSection
from rankleap.errors import RecipeError, RunError, UnknownNameError

LIVE = "default"
"""PEFT's name for the adapter that trains."""
FEED_FORWARD = ("down_proj", "fc2", "w2", "wo", "c_proj", "dense_4h_to_h", "fc_out")
"""Layers whose *input* IA³ scales (2205.05638, §3.3: l_ff lies after the non-linearity); of all others it scales the output."""
_ADJUSTABLE = {"init_r", "target_r", "tinit", "tfinal", "feedforward_modules"}


@dataclass(frozen=True, slots=True)
class Adapter:
    """One method: its PEFT config and what sets it apart there, and what must train in a model that has it.

    ``sizes`` turns the recipe's numbers (with its steps) into fields of the config; ``fixed`` are those that make the method.
    ``rates`` are the lowest learning rate known to work in RL, a preset, and the highest, for models of 1 to 8 billion
    weights. Full: 1e-6 (2510.00553, 2512.23165), 5e-7 (2604.11446). LoRA and its kin: ten times full ("LoRA Without Regret"),
    5e-6 (2604.11446) to 1e-4 (2511.08567, where PiSSA collapses first). VeRA, IA³: about 1e-3, since at the 1e-5 of 2512.23165
    they hardly move. LN tuning, TinyLoRA: no number is published for RL; a guess to sweep from.
    """

    name: str
    peft_class: type[PeftConfig] | None
    parts: frozenset[str]
    sizes: Callable[[AdapterSection, int], dict[str, Any]] = lambda settings, steps: {}
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, float, float] = (5e-6, 1e-5, 1e-4)
    start: Literal["base", "top", "minor"] = "base"
    """What the adapter is before the first step: nothing, or the largest or smallest triplets, taken out of the base."""
    targets: Literal["linear", "norm"] = "linear"
    optimizer: Mapping[str, float] = field(default_factory=dict)
    """Settings of an optimizer of its own, with their defaults; the name of the row chooses it."""
    readable: bool = True
    """Whether ``checkpoints`` reads its files; if not, no trajectory is recorded."""

    def config(self, settings: AdapterSection, targets: tuple[str, ...], steps: int) -> PeftConfig | None:
        """PEFT's config, ``None`` where every weight trains; raises ``RecipeError`` for options that it does not have."""
        ours = self.sizes(settings, steps) | {"target_modules": list(targets)} | dict(self.fixed)
        if self.peft_class is peft.IA3Config:
            ours["feedforward_modules"] = [name for name in targets if name in FEED_FORWARD]
        names = {f.name for f in fields(self.peft_class)} if self.peft_class else set()
        known = (names | set(self.optimizer)) - (set(ours) - _ADJUSTABLE)
        for key in settings.options:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                what = "set by the method or the recipe's own keys" if key in ours else "unknown key"
                raise RecipeError(f"adapter.options.{key}: {what}" + (f", did you mean {close[0]!r}?" if close else ""))
        options = {key: value for key, value in settings.options.items() if key not in self.optimizer}
        if self.peft_class is None:
            return None
        try:
            return self.peft_class(task_type="CAUSAL_LM", **(ours | options))  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError) as error:
            raise RecipeError(f"adapter.options: PEFT's {self.peft_class.__name__} refuses them: {error}") from None


def _lora(settings: AdapterSection, _: int) -> dict[str, Any]:
    return {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}


def _adalora(settings: AdapterSection, steps: int) -> dict[str, Any]:
    """AdaLoRA starts at one and a half times the rank and ends at it (2303.10512, §4), within a run however short."""
    ranks = {"init_r": -(-settings.rank * 3 // 2), "target_r": settings.rank}
    times = {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 5}
    return {"lora_alpha": settings.alpha, "lora_dropout": settings.dropout} | ranks | times


def _ranked(dropout: str) -> Callable[[AdapterSection, int], dict[str, Any]]:
    return lambda settings, _: {"r": settings.rank, dropout: settings.dropout}


_AB = frozenset({"lora_A", "lora_B"})
_HIGH = (1e-4, 1e-3, 1e-2)
_ROWS = (
    Adapter("full", None, frozenset(), rates=(5e-7, 1e-6, 5e-6)),
    Adapter("lora", LoraConfig, _AB, _lora),
    Adapter("dora", LoraConfig, _AB | {"lora_magnitude_vector"}, _lora, {"use_dora": True}),
    Adapter("rslora", LoraConfig, _AB, _lora, {"use_rslora": True}),
    # B's rate is the ratio times A's (2402.12354), so A's begins lower than LoRA's.
    Adapter("loraplus", LoraConfig, _AB, _lora, rates=(1e-6, 5e-6, 5e-5), optimizer={"loraplus_lr_ratio": 16.0}),
    Adapter("lorafa", LoraConfig, frozenset({"lora_B"}), _lora),
    Adapter("adalora", peft.AdaLoraConfig, _AB | {"lora_E"}, _adalora),
    Adapter("miss", peft.MissConfig, frozenset({"miss_block"}), _ranked("miss_dropout")),
    Adapter("pissa", LoraConfig, _AB, _lora, {"init_lora_weights": "pissa"}, start="top"),
    # PEFT has no MiLoRA: injected as LoRA, then ``optimizer.prepare`` starts it.
    Adapter("milora", LoraConfig, _AB, _lora, start="minor"),
    Adapter(
        "vera", peft.VeraConfig, frozenset({"vera_lambda_b", "vera_lambda_d"}), _ranked("vera_dropout"), rates=_HIGH
    ),
    Adapter("ln", peft.LNTuningConfig, frozenset({"ln_tuning_layers"}), rates=(1e-5, 1e-4, 1e-3), targets="norm"),
    Adapter("ia3", peft.IA3Config, frozenset({"ia3_l"}), rates=_HIGH),
    Adapter("mica", LoraConfig, frozenset({"lora_A"}), _lora, {"init_lora_weights": "mica"}),
    Adapter("hira", peft.HiraConfig, frozenset({"hira_A", "hira_B"}), _ranked("hira_dropout"), readable=False),
    Adapter("tinylora", peft.TinyLoraConfig, frozenset({"tinylora_v"}), rates=_HIGH, readable=False),
)
ADAPTERS: dict[str, Adapter] = {row.name: row for row in _ROWS}


def get_adapter(name: str) -> Adapter:
    """The adapter of that name; raises ``UnknownNameError`` with the closest ones."""
    if name not in ADAPTERS:
        raise UnknownNameError("adapter", name, ADAPTERS)
    return ADAPTERS[name]


def target_modules(
    model: PreTrainedModel, asked: tuple[str, ...], kind: Literal["linear", "norm"] = "linear"
) -> tuple[str, ...]:
    """Names of the modules to adapt; raises ``RecipeError`` for names that match none of that kind, with the closest."""
    # Left out: a head that is tied to the embeddings cannot be merged without moving them as well.
    # By identity, for architectures name their heads differently.
    head = model.get_output_embeddings()
    found = (name for name, module in model.named_modules() if module is not head and _is_kind(module, kind))
    known = sorted({name.rpartition(".")[2] for name in found})
    unknown = [name for name in asked if name not in known]
    if unknown:
        close = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
        hint = f"did you mean {', '.join(close)}? " if close else ""
        what = "linear layer" if kind == "linear" else "norm"
        raise RecipeError(
            f"adapter.target_modules: {', '.join(unknown)} match no {what}; {hint}this model has {', '.join(known)}"
        )
    return asked or tuple(known)


def _is_kind(module: nn.Module, kind: Literal["linear", "norm"]) -> bool:
    if kind == "linear":
        return isinstance(module, nn.Linear)
    # Norms have no class in common: a layer whose own weight is a vector.
    return any(name == "weight" and p.ndim == 1 for name, p in module.named_parameters(recurse=False))


def require_injected(model: nn.Module, adapter: Adapter, targets: tuple[str, ...]) -> int:
    """Check by the live tensors that what was asked is what trains; return their count, or raise ``RunError``."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not isinstance(model, PeftModel):
        # Both sides count a tied tensor once.
        if adapter.peft_class is not None or len(trainable) != len(list(model.parameters())):
            raise RunError(f"asked for {adapter.name}, but {len(trainable)} plain tensors train")
        return sum(p.numel() for p in trainable.values())
    # The component before PEFT's name for the adapter is the part; a plain tensor is its own.
    parts = {name.partition(f".{LIVE}")[0].rpartition(".")[2] for name in trainable}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    asked = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets}
    if set(layers) != asked or parts != adapter.parts:
        raise RunError(
            f"asked for {adapter.name} on {', '.join(targets)}, but what trains is {sorted(parts)} on {len(layers)} layers "
            f"of {len(asked)}: {sorted(trainable)[:6]}"
        )
    for name, layer in layers.items():
        if isinstance(layer, LoraLayer) and "lora_A" in layer.adapter_layer_names and adapter.peft_class is LoraConfig:
            _require_variant(name, layer, adapter)
    return sum(p.numel() for p in trainable.values())


@torch.no_grad()
def _require_variant(name: str, layer: LoraLayer, adapter: Adapter) -> None:
    """Tell rsLoRA by the scale, and PiSSA and MiLoRA by the share of the weight that they start with."""
    rank, alpha, scale = layer.r[LIVE], layer.lora_alpha[LIVE], layer.scaling[LIVE]
    expected = alpha / (rank**0.5 if adapter.fixed.get("use_rslora") else rank)
    if abs(scale - expected) > 1e-6 * expected:
        raise RunError(f"asked for {adapter.name}, but {name} has the scale {scale} where it should be {expected}")
    left_MR, right_RN, residual_MN = (weight.float() for weight in _matrices(layer))
    # ‖BA‖² by its small cores. The triplets are orthogonal to what is left, so squared norms add up.
    taken = scale**2 * float(((left_MR.T @ left_MR) * (right_RN @ right_RN.T)).sum())
    share, mean = taken / (taken + float(residual_MN.square().sum())), rank / min(residual_MN.shape)
    # The mean square of the largest r is at least that of all, and of the smallest r at most.
    fits = {"base": share < 1e-9, "top": share >= mean * (1 - 1e-4), "minor": 0 < share <= mean * (1 + 1e-4)}
    if not fits[adapter.start]:
        raise RunError(
            f"asked for {adapter.name}, which starts from {adapter.start}, but {name} starts with {share:.2g} of the "
            f"squared weight in its adapter, where {mean:.2g} is the mean of as many triplets"
        )


def require_rank(model: nn.Module, adapter: Adapter, settings: AdapterSection, targets: tuple[str, ...]) -> None:
    """Raise ``RecipeError`` where the rank is larger than the smallest side of a matrix to adapt."""
    config = adapter.config(settings, targets, steps=1000)
    rank = config.init_r if isinstance(config, peft.AdaLoraConfig) else settings.rank
    if not adapter.parts & {"lora_A", "lora_B", "hira_A", "miss_block"}:
        return
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear) and rank > _smallest(module):
            raise RecipeError(
                f"adapter.rank: {adapter.name} needs rank {rank}, but {name} is {module.out_features} x "
                f"{module.in_features}; the largest rank is {_smallest(module)}"
            )


def _smallest(layer: nn.Linear) -> int:
    # Not by the weight's shape: in four bits it is packed.
    return min(layer.out_features, layer.in_features)


def _matrices(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    names = (f"lora_B.{LIVE}.weight", f"lora_A.{LIVE}.weight", "base_layer.weight")
    left_MR, right_RN, base_MN = (layer.get_parameter(name) for name in names)
    return left_MR, right_RN, base_MN


@torch.no_grad()
def start_minor(model: PeftModel) -> None:
    """MiLoRA's start (2406.09044, §3): the smallest triplets go into the adapter, W_res = W - s·B₀·A₀ stays in the base."""
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        left_MR, right_RN, weight_MN = _matrices(layer)
        left_MK, sigma_K, right_KN = torch.linalg.svd(weight_MN.float(), full_matrices=False)
        least = slice(-layer.r[LIVE], None)
        root_R = (sigma_K[least] / layer.scaling[LIVE]).sqrt()
        left_MR.copy_(left_MK[:, least] * root_R)
        right_RN.copy_(root_R[:, None] * right_KN[least])
        weight_MN.copy_(weight_MN.float() - (left_MK[:, least] * sigma_K[least]) @ right_KN[least])
    # After injection, for PEFT knows no such start; the saved config then tells how the adapter is to be read.
    vars(model.peft_config[LIVE])["init_lora_weights"] = "milora"
