"""Which settings do not go together: one table, read before any training and printed by ``rankleap doctor --adapters``."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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


_FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
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
         lambda _, row: row.peft_class is not None and _FSDP2.items() <= os.environ.items()),
    Rule("warn", "PiSSA or MiLoRA on a bfloat16 base",
         "what is left of the base is rounded once more, so that training does not quite start from it",
         "set model.dtype to float32",
         lambda recipe, row: row.start != "base" and recipe.model.dtype == "bfloat16"),
    Rule("warn", "a learning rate ten times outside the range known to work for the method",
         "methods need rates up to a thousand times apart",
         "begin at the preset that `rankleap doctor --adapters` shows",
         _other_rate),
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
