"""Which settings do not go together: one table, read before any training and printed by ``rankleap doctor --adapters``."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from rankleap.adapters.adapter import ADAPTERS, Adapter
from rankleap.config import Recipe
from rankleap.errors import RecipeError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of a recipe with an unsafe combination (``repair``: it runs, made right), why, and what to do instead."""

    action: Literal["refuse", "warn", "repair"]
    when: str
    why: str
    instead: str
    applies: Callable[[Recipe, Adapter], bool]

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.when}: {self.why}; {self.instead}"


def _budget(recipe: Recipe) -> tuple[int, int]:
    """AdaLoRA's steps from the first to the last pruning, and how far the rank falls."""
    sizes = ADAPTERS["adalora"].sizes(recipe.adapter, recipe.train.steps) | recipe.adapter.options
    return sizes["total_step"] - sizes["tfinal"] - sizes["tinit"], sizes["init_r"] - sizes["target_r"]


def _other_rate(recipe: Recipe, adapter: Adapter) -> bool:
    # Bundled bases are ten thousand times smaller, and learn at rates a hundred times larger.
    far = not adapter.rates[0] / 10 <= recipe.train.learning_rate <= adapter.rates[2] * 10
    return far and not recipe.model.base.startswith("bundled:")


def _start(recipe: Recipe) -> str:
    return str(recipe.adapter.options.get("init_lora_weights")).partition("_niter_")[0]


def _launched(**settings: str) -> bool:
    """Whether ``accelerate launch`` set all of these; its variables are all that can be seen before training."""
    return all(os.environ.get(name, "").lower() == value.lower() for name, value in settings.items())


def _sharded() -> bool:
    """Whether no process holds whole weights: FSDP of either version, or ZeRO-3."""
    return _zero3() or _launched(ACCELERATE_USE_FSDP="true")


def _zero3() -> bool:
    return _launched(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3")


# VeRA and TinyLoRA fail at the wrapping (accelerate 1.15, torch 2.13), the others would be something else in silence.
_WHOLE = ("pissa", "milora", "mica", "adalora", "lorafa", "vera", "tinylora")


def _merged(recipe: Recipe, adapter: Adapter) -> bool:
    return recipe.rollout.engine != "transformers" and adapter.peft_class is not None


# One line each for when, why and instead, so that the table can be read as one.
# fmt: off
RULES: tuple[Rule, ...] = (
    Rule("refuse", "LoRA-FA with use_dora",
         "PEFT's optimizer pairs tensors by their order and would take DoRA's magnitudes for half of a pair",
         "use dora, or lorafa without it",
         lambda recipe, row: row.name == "lorafa" and bool(recipe.adapter.options.get("use_dora"))),
    Rule("refuse", "PiSSA or MiLoRA with dropout",
         "the adapter holds a part of the base, which dropout would switch off",
         "set adapter.dropout to 0",
         lambda recipe, row: row.start != "base" and recipe.adapter.dropout > 0),
    Rule("refuse", "init_lora_weights that changes the base (pissa_niter_N, olora, corda, loftq, lora_ga)",
         "deltas, reloads (pissa_niter_N draws its SVD anew) and the KL reference need a base that is nowhere on disk",
         "use the method pissa or milora, whose start is exact and kept",
         lambda recipe, row: _start(recipe) in ("pissa", "olora", "corda", "loftq", "lora_ga")),
    Rule("refuse", "AdaLoRA without a step budget",
         "fewer than two steps lie between tinit and tfinal, or target_r is not below init_r: no rank could move",
         "raise train.steps, lower adapter.options tinit and tfinal, or leave the ranks to adapter.rank",
         lambda recipe, row: row.name == "adalora" and (_budget(recipe)[0] < 2 or _budget(recipe)[1] < 1)),
    Rule("refuse", "[leap] with an adapter whose files are not read (HiRA, TinyLoRA)",
         "no trajectory can be had of it",
         "leave [leap] out, or use another method",
         lambda recipe, row: recipe.leap is not None and not row.readable),
    Rule("refuse", "an adapter on FSDP2 with FULL_STATE_DICT",
         "only the first process's shards of it are saved and resumed",
         "set fsdp_state_dict_type to SHARDED_STATE_DICT",
         lambda _, row: row.peft_class is not None and _launched(
             ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")),
    Rule("refuse", "PiSSA, MiLoRA, MiCA, AdaLoRA, LoRA-FA, VeRA or TinyLoRA on FSDP or ZeRO-3",
         "their start, ranks, optimizer or shared projections need whole matrices, and each process holds a shard",
         "launch with recipes/accelerate/ddp.yaml or zero2.yaml, or use lora",
         lambda _, row: row.name in _WHOLE and _sharded()),
    Rule("refuse", "PPO on FSDP or ZeRO",
         "its value head lies outside the model that they train and save",
         "launch with recipes/accelerate/ddp.yaml, or use an algorithm without a value head",
         lambda recipe, _: recipe.algorithm.name == "ppo"
         and (_launched(ACCELERATE_USE_FSDP="true") or _launched(ACCELERATE_USE_DEEPSPEED="true"))),
    Rule("refuse", "a 4-bit base (QLoRA) with vLLM",
         "vLLM gets merged weights, and merging rounds them to 4 bits again: it would sample from another policy",
         "set rollout.engine to transformers, or model.load_in_4bit to false",
         lambda recipe, row: recipe.model.load_in_4bit and recipe.rollout.engine != "transformers"),
    Rule("refuse", "a 4-bit base with full, LN tuning, PiSSA, MiLoRA or MiCA",
         "4-bit weights neither train nor can an adapter's start be computed from them, or taken out of them",
         "use lora, or set model.load_in_4bit to false",
         lambda recipe, row: recipe.model.load_in_4bit and row.name in ("full", "ln", "pissa", "milora", "mica")),
    Rule("refuse", "an adapter with vLLM on FSDP or ZeRO-3",
         "the base can be neither merged nor put back whole where each process holds a shard",
         "launch with recipes/accelerate/ddp.yaml or zero2.yaml, or set rollout.engine to transformers",
         lambda recipe, row: _merged(recipe, row) and _sharded()),
    Rule("refuse", "AdaLoRA with vLLM",
         "its counts of ranks would be sent along with the weights, under names that vLLM does not know",
         "use another method, or set rollout.engine to transformers",
         lambda recipe, row: row.name == "adalora" and _merged(recipe, row)),
    Rule("refuse", "vLLM with an algorithm that samples nothing",
         "sft and offline_distillation train on given text",
         "leave [rollout] out",
         lambda recipe, _: recipe.rollout.engine != "transformers"
         and recipe.algorithm.name in ("sft", "offline_distillation")),
    Rule("warn", "PiSSA or MiLoRA on a bfloat16 base",
         "what is left of the base is rounded once more, so that training does not quite start from it",
         "set model.dtype to float32",
         lambda recipe, row: row.start != "base" and recipe.model.dtype == "bfloat16"),
    Rule("warn", "a learning rate ten times outside the range known to work for the method",
         "methods need rates up to a thousand times apart",
         "begin at the preset that `rankleap doctor --adapters` shows",
         _other_rate),
    Rule("warn", "an adapter on ZeRO-3",
         "TRL keeps adapters in bfloat16 there, and in float32 everywhere else: another arm under the same name",
         "launch with recipes/accelerate/zero2.yaml or ddp.yaml",
         lambda recipe, row: row.peft_class is not None and recipe.model.dtype == "bfloat16" and _zero3()),
    Rule("warn", "FSDP without a GPU",
         "accelerate shards on devices only, and trains by DDP on a CPU without a word",
         "launch with recipes/accelerate/ddp.yaml",
         lambda *_: _launched(ACCELERATE_USE_FSDP="true") and not torch.cuda.is_available()),
    Rule("repair", "an adapter with vLLM",
         "it is merged for every sync and taken out again, which rounds the frozen base a little each time",
         "a pristine copy is put back after each sync, and what it undid is logged as base_drift",
         _merged),
    Rule("repair", "AdaLoRA in any trainer",
         "no trainer moves its ranks, and its orthogonality term is only added to losses that the model computes",
         "ranks are allocated after every step, and the term is added to every loss",
         lambda _, row: row.name == "adalora"),
    Rule("repair", "PiSSA or MiLoRA with beta > 0",
         "the model without its adapter, TRL's reference, is not the base",
         "a frozen copy of the start is the reference, for W_res + s·B₀·A₀ is the base",
         lambda recipe, row: row.start != "base" and recipe.algorithm.beta > 0),
    Rule("repair", "PiSSA or MiLoRA saved",
         "on the original base the adapter is another model",
         "its start is kept in initial/, and the last step in adapter/ as plain LoRA of twice the rank",
         lambda _, row: row.start != "base"),
    Rule("repair", "LN tuning",
         "it trains norms and no linear layer, and by PEFT's defaults for Qwen only one of each layer's",
         "every norm is named",
         lambda _, row: row.targets == "norm"),
)
# fmt: on


def adapter_mistakes(recipe: Recipe) -> list[str]:
    """What is wrong with a recipe's adapter, a line each, before any training; warnings are logged."""
    adapter = ADAPTERS.get(recipe.adapter.method)
    if adapter is None:
        return []
    try:
        adapter.config(recipe.adapter, ("any",), recipe.train.steps)
    except RecipeError as error:
        return [str(error)]
    met = _met(recipe)
    for rule in met:
        if rule.action == "warn":
            log.warning("%s", rule)
    return [f"adapter.method: {rule}" for rule in met if rule.action == "refuse"]


def adapter_notes(recipe: Recipe) -> list[str]:
    """What is made right or warned of in a recipe that runs; for its manifest."""
    return [f"{rule.action}: {rule}" for rule in _met(recipe)]


def _met(recipe: Recipe) -> list[Rule]:
    return [rule for rule in RULES if rule.applies(recipe, ADAPTERS[recipe.adapter.method])]
