"""The recipe: what to train, how, and what to record. TOML in, resolved JSON out, every mistake reported at once.

Records are frozen and refuse unknown keys; the text under a field is its help. Names of methods (task, adapter, algorithm,
predictor) are plain strings here and are looked up in their family's dict by ``training.checks``.
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rankleap.errors import RecipeError


class _Section(BaseModel):
    # TOML can say inf and nan, and inf passes every lower bound.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelSection(_Section):
    """The base model."""

    base: str
    """`bundled:NAME`, a directory, or a name on the Hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision to load the weights in; TRL computes in what is loaded."""
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = None
    """How attention is computed; unset leaves Transformers' choice."""
    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits (QLoRA, by bitsandbytes); for adapters only."""


class TaskSection(_Section):
    """The problems; the three splits are disjoint by construction."""

    name: str
    """A task, as listed by `rankleap doctor`."""
    train_problems: int = Field(default=4000, ge=1)
    """Distinct prompts to train on."""
    validation_problems: int = Field(default=256, ge=2)
    """Prompts on which leaps are chosen and gated."""
    test_problems: int = Field(default=400, ge=2)
    """Prompts on which results are reported."""


class AdapterSection(_Section):
    """Which weights train."""

    method: str = "full"
    """A method, as listed by `rankleap doctor --adapters`."""
    rank: int = Field(default=16, ge=1)
    """Rank of each adapter matrix; AdaLoRA's average rank at the end."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's scale is alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    target_modules: tuple[str, ...] = ()
    """Names of the modules to adapt; empty means every linear layer but the head (LN tuning: every norm)."""
    options: dict[str, Any] = {}
    """Further settings of the method, by PEFT's names for them: `target_r`, `projection_prng_key`, `loraplus_lr_ratio` …"""


class AlgorithmSection(_Section):
    """How rewards become gradients."""

    name: str = "grpo"
    """`grpo`, `dapo`, `dr_grpo`, `gspo`, `cispo`, `rloo`, `reinforce_pp`, `reinforce_pp_baseline`, `ppo`; without rewards
    `sft`, `offline_distillation`, `distillation`."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL term against the base."""
    epsilon: float | None = Field(default=None, gt=0)
    """Clip range of the importance ratio, downwards; unset means what the algorithm's paper uses."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Clip range upwards; unset means what the algorithm's paper uses."""
    iterations: int = Field(default=1, ge=1)
    """Optimizer steps on each batch of completions; from the second on, the clip range acts."""
    dynamic_sampling: bool | None = None
    """Draw groups whose rewards are all equal anew; unset means only for `dapo`."""
    max_resample: int = Field(default=3, ge=1)
    """How often a step may draw such groups anew."""
    overlong_buffer: int | None = Field(default=None, ge=1)
    """Tokens before `train.max_completion_tokens` over which the reward falls by 1; unset means it does not."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """PPO: how much the next token's value counts."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """PPO: 0 trusts the value head alone, 1 the reward alone."""
    value_coefficient: float = Field(default=0.1, gt=0)
    """PPO: weight of the value loss."""
    value_clip: float = Field(default=0.2, gt=0)
    """PPO: how far a value may move on one batch before its loss stops falling."""
    value_learning_rate: float = Field(default=1e-4, gt=0)
    """PPO: peak learning rate of the value head."""
    teacher: str | None = None
    """Distillation: `bundled:NAME`, a model's or a checkpoint's directory, a name on the Hub; offline also a `.jsonl` of
    samples of the task's train split, as `rankleap evaluate` writes them."""


class TrainSection(_Section):
    """The optimisation."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate moves after warm-up; `linear` and `cosine` decay to zero."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from zero."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Distinct prompts in one optimizer step."""
    completions_per_prompt: int = Field(default=8, ge=2)
    """Completions of each prompt: the group whose mean is the baseline."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Completions in one forward pass, over all processes together; unset means all of a step at once."""
    max_completion_tokens: int = Field(default=32, ge=1)
    """Longest completion."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the rollouts."""
    agreement_every: int = Field(default=50, ge=0)
    """Steps between comparisons of the sampler's log-probabilities with the trainer's (not for RLOO); 0 for none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    save_every: int = Field(default=20, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int | None = Field(default=None, ge=1)
    """Keep only the newest so many; unset keeps all."""
    report_to: tuple[str, ...] = ()
    """Experiment trackers, as in TRL: `wandb`, `tensorboard`, `trackio`, `mlflow`."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; unset leaves torch's choice."""


class RolloutSection(_Section):
    """What samples the completions."""

    engine: Literal["transformers", "vllm-colocate", "vllm-server"] = "transformers"
    """`vllm-colocate` shares the training GPUs; `vllm-server` asks a `vllm serve` elsewhere; both get merged weights."""
    memory_share: float = Field(default=0.3, gt=0, lt=1)
    """Colocated vLLM: share of each GPU's memory that it takes."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Colocated vLLM: GPUs that hold one model together."""
    server_url: str = "http://localhost:8000"
    """vLLM server: where it listens."""


class RecordSection(_Section):
    """The trajectory recorder."""

    rank: int = Field(default=4, ge=1)
    """Singular triplets kept of each matrix."""


class LeapSection(_Section):
    """Train, leap, train on from there (re-grounding)."""

    methods: tuple[str, ...] = ("window",)
    """Predictors to choose among."""
    windows: tuple[int, ...] = (4,)
    """How many of the last checkpoints a predictor sees; each is tried."""
    coefficients: tuple[float, ...] = (1.0,)
    """How far to go; each is tried with each predictor and window."""
    every: int = Field(default=40, ge=1)
    """Steps between leaps; a multiple of `train.save_every`."""
    samples: int = Field(default=4, ge=1)
    """Completions of each validation problem for choosing and for the gate."""
    budget: int | None = Field(default=None, ge=1)
    """Completions that choosing may take, by successive halving; unset lets every candidate answer every problem."""
    confidence: float = Field(default=0.8, ge=0.5, lt=1)
    """The gate accepts when the leap is better than its origin with this one-sided confidence."""
    max_kl: float | None = Field(default=None, gt=0)
    """Largest forward KL(base‖leap) per token, in nats; unset does not measure it."""
    max_norm_ratio: float = Field(default=4.0, gt=1)
    """Largest ‖leap − base‖ / ‖origin − base‖."""
    max_length_ratio: float = Field(default=2.0, gt=1)
    """Mean tokens of a completion may grow or shrink by this factor."""
    max_truncation_rise: float = Field(default=0.1, ge=0, le=1)
    """Share of completions cut off at `train.max_completion_tokens`, above the origin's own."""
    shrinks: int = Field(default=0, ge=0)
    """How often a refused leap is halved and looked at again; the looks share the gate's error, so each is stricter."""
    proceed_from: Literal["leap", "origin"] = "leap"
    """`leap` trains on from an accepted leap; `origin` only writes it and leaves the training path alone."""
    optimizer_state: Literal["carry", "rescale", "reset"] = "carry"
    """What becomes of Adam's moments when training goes on from a leap: kept, the first one aged by the steps leapt, or none."""


class Recipe(_Section):
    """A whole run."""

    name: str
    """Name of the run; its directory is `runs/NAME` unless `--out` says otherwise."""
    seed: int = Field(default=0, ge=0)
    """Seeds everything that is random."""
    model: ModelSection
    task: TaskSection
    adapter: AdapterSection = AdapterSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    rewards: dict[str, float] = {"task": 1.0}
    """Weights of the rewards that are added up: `task` its verdict, `format` one marked answer,
    `repetition` (negative) of token 3-grams."""
    train: TrainSection
    rollout: RolloutSection = RolloutSection()
    record: RecordSection = RecordSection()
    leap: LeapSection | None = None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe, apply ``a.b=value`` overrides, and validate; ``RecipeError`` lists every mistake."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(values, override)
    return make_recipe(values, str(path))


def make_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """Validate nested values as a recipe; ``source`` names them in the error."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{source} is not a valid recipe:\n" + "\n".join(_complaints(error))) from None


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one dotted key; the value is read as TOML, and as a plain string where it is not TOML."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise RecipeError(f"--set needs KEY=VALUE, such as train.steps=100; got {override!r}")
    *sections, key = dotted.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override!r}: {section!r} is a value, not a section")
    try:
        values[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # Nobody quotes twice for a shell, so a bare word is meant as text.
        values[key] = text


def _complaints(error: ValidationError) -> Iterator[str]:
    for detail in error.errors():
        where = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(detail["loc"][-1]), _keys(detail["loc"][:-1]), n=1, cutoff=0.5)
            what = "unknown key" + (f", did you mean {close[0]!r}?" if close else "")
        elif detail["type"] == "missing":
            what = "missing"
        else:
            what = f"{_plain(detail['msg'])}, got {detail['input']!r}"
        yield f"  {where}: {what}"


def _keys(sections: Sequence[int | str]) -> list[str]:
    """Keys of the record found by walking down ``sections`` from the recipe."""
    record: type[BaseModel] = Recipe
    for section in sections:
        annotation = record.model_fields[str(section)].annotation
        # An optional section is a union with None; the record is one of its arguments.
        candidates = [annotation, *get_args(annotation)]
        record = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(record.model_fields)


def _plain(message: str) -> str:
    for formal, plain in (
        ("Input should", "should"),
        ("greater than or equal to", "at least"),
        ("less than or equal to", "at most"),
    ):
        message = message.replace(formal, plain)
    return message
