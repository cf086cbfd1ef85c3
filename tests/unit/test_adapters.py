"""What is refused before training, what tells one method from another, and what the special ones do while they train."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraModel, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankleap.adapters import (
    ADAPTERS,
    RULES,
    adapter_callbacks,
    adapter_mistakes,
    adapter_notes,
    prepare,
    require_injected,
    require_rank,
    target_modules,
    with_adapter,
)
from rankleap.adapters.optimizer import orthogonality, require_optimizer
from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, dense, open_checkpoint, resolve_base
from rankleap.cli.doctor import doctor
from rankleap.config import AdapterSection, Recipe
from rankleap.errors import RecipeError, RunError
from rankleap.files import read_json, read_jsonl, write_json
from rankleap.training import train
from recipes import tiny

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")
TARGETS = ("q_proj", "v_proj", "down_proj")
TOKENS = torch.arange(24).reshape(2, 12)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
SHARDED = {**FSDP2, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
LAUNCHED = {
    "an adapter on FSDP2": FSDP2,
    "PiSSA, MiLoRA, MiCA": SHARDED,
    "PPO on FSDP": ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "an adapter with vLLM on": ZERO3,
}
VLLM = {"engine": "vllm-server"}


def recipe(method: str, **changes: Any) -> Recipe:
    return tiny(adapter__method=method, **changes)


REFUSED = {
    "LoRA-FA with use_dora": recipe("lorafa", adapter__options={"use_dora": True}),
    "PiSSA or MiLoRA with dropout": recipe("milora", adapter__dropout=0.1),
    "init_lora_weights that changes": recipe("lora", adapter__options={"init_lora_weights": "pissa_niter_4"}),
    "AdaLoRA without a step budget": recipe("adalora", train__steps=4, adapter__options={"tinit": 1, "tfinal": 2}),
    "[leap] with an adapter whose": recipe("hira", leap={"every": 1}),
    "an adapter on FSDP2": recipe("lora"),
    "PiSSA, MiLoRA, MiCA": recipe("vera"),
    "PPO on FSDP": recipe("lora", algorithm__name="ppo"),
    "a 4-bit base (QLoRA) with vLLM": recipe("lora", model__load_in_4bit=True, rollout=VLLM),
    "a 4-bit base with full": recipe("full", model__load_in_4bit=True),
    "an adapter with vLLM on": recipe("dora", rollout=VLLM),
    "AdaLoRA with vLLM": recipe("adalora", train__steps=10, rollout=VLLM),
    "vLLM with an algorithm": recipe("full", algorithm__name="sft", rollout=VLLM),
}


@pytest.mark.parametrize("when", REFUSED)
def test_each_unsafe_pair_is_refused_before_anything_is_written(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in LAUNCHED.get(when, {}).items():
        monkeypatch.setenv(key, value)
    rule = next(rule for rule in RULES if rule.when.startswith(when))
    with pytest.raises(RecipeError) as caught:
        train(REFUSED[when], tmp_path / "run")
    assert rule.why in str(caught.value) and rule.instead in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launched", [SHARDED, ZERO3, {**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {}])
@pytest.mark.parametrize("method", ["full", "lora", "pissa", "lorafa"])
def test_shards_refuse_what_needs_whole_matrices_and_nothing_else(
    method: str, launched: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in launched.items():
        monkeypatch.setenv(key, value)
    assert bool(adapter_mistakes(recipe(method))) == (method in ("pissa", "lorafa") and launched in (SHARDED, ZERO3))


def test_every_refusal_of_the_table_is_tried() -> None:
    assert len(REFUSED) == sum(rule.action == "refuse" for rule in RULES)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_adalora_s_own_schedule_fits_runs_of_two_steps_and_more(steps: int) -> None:
    assert bool(adapter_mistakes(recipe("adalora", train__steps=steps))) == (steps < 2)


def test_nothing_to_prune_is_refused() -> None:
    assert "target_r is not below init_r" in adapter_mistakes(recipe("adalora", adapter__options={"target_r": 6}))[0]


@pytest.mark.parametrize(("rate", "warned"), [(1e-7, True), (1e-6, False), (1e-3, False), (2e-3, True)])
def test_a_far_off_learning_rate_is_warned_of(rate: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert adapter_mistakes(recipe("lora", model__base="some/8B", train__learning_rate=rate)) == []
    assert ("begin at the preset" in caplog.text) == warned


def test_what_is_repaired_is_said() -> None:
    asked = recipe("pissa", algorithm__beta=0.1, model__dtype="bfloat16")
    assert adapter_mistakes(asked) == []
    warned, reference, saved = adapter_notes(asked)
    assert warned.startswith("warn: PiSSA or MiLoRA on a bfloat16 base")
    assert "W_res + s·B₀·A₀ is the base" in reference and "kept in initial/" in saved
    assert "trains norms and no linear layer" in adapter_notes(recipe("ln"))[0]
    assert adapter_notes(recipe("lora")) == []


def test_doctor_shows_every_adapter_and_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    doctor(as_json=True, adapters=True)
    shown = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in shown["adapters"]] == list(ADAPTERS)
    assert {row["method"] for row in shown["adapters"] if row["trajectories"] != "yes"} == {"hira", "tinylora"}
    assert [rule["when"] for rule in shown["rules"]] == [rule.when for rule in RULES]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("adalora", {"targetr": 3}, "targetr: unknown key, did you mean 'target_r'"),
        ("lora", {"r": 3}, "r: set by the method or the recipe's own keys"),
        ("dora", {"use_dora": False}, "use_dora: set by the method"),
        ("lora", {"loraplus_lr_ratio": 4.0}, "loraplus_lr_ratio: unknown key"),
        ("full", {"r": 4}, "r: unknown key"),
        ("adalora", {"orth_reg_weight": -1.0}, "AdaLoraConfig refuses them"),
    ],
)
def test_an_option_that_the_method_does_not_have_is_refused(method: str, options: dict[str, Any], message: str) -> None:
    assert message in adapter_mistakes(recipe(method, adapter__options=options))[0]


def test_options_reach_peft() -> None:
    config = ADAPTERS["vera"].config(AdapterSection(rank=8, options={"projection_prng_key": 5}), TARGETS, 10)
    assert config is not None and vars(config)["projection_prng_key"] == 5 and vars(config)["r"] == 8
    ranks = vars(ADAPTERS["adalora"].config(AdapterSection(rank=8, options={"init_r": 20}), TARGETS, 50))
    assert [ranks[key] for key in ("init_r", "target_r", "tinit", "tfinal", "total_step")] == [20, 8, 5, 10, 50]
    assert vars(ADAPTERS["ia3"].config(AdapterSection(), TARGETS, 1))["feedforward_modules"] == {"down_proj"}


def test_norms_are_all_named_for_ln_tuning(make_model: Callable[..., PreTrainedModel]) -> None:
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert set(target_modules(make_model(), (), "norm")) == norms
    assert set(target_modules(make_model("qwen3"), (), "norm")) == norms | {"q_norm", "k_norm"}
    with pytest.raises(RecipeError, match=r"q_proj match no norm; this model has input_layernorm"):
        target_modules(make_model(), ("q_proj",), "norm")


def test_targets_that_match_nothing_get_the_closest_name(make_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(RecipeError, match="gate_porj match no linear layer; did you mean gate_proj"):
        target_modules(make_model(), ("gate_porj",))


def test_a_rank_above_the_smallest_side_names_the_matrix(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    with pytest.raises(RecipeError, match=r"needs rank 17, but .*v_proj is 16 x 32; the largest rank is 16"):
        require_rank(model, ADAPTERS["lora"], AdapterSection(rank=17), TARGETS)
    with pytest.raises(RecipeError, match="adalora needs rank 18"):
        require_rank(model, ADAPTERS["adalora"], AdapterSection(rank=12), TARGETS)
    require_rank(model, ADAPTERS["lora"], AdapterSection(rank=16), TARGETS)
    require_rank(model, ADAPTERS["vera"], AdapterSection(rank=256), TARGETS)


def inject(model: PreTrainedModel, method: str, steps: int = 10, beta: float = 0.0) -> PeftModel:
    adapter = ADAPTERS[method]
    targets = target_modules(model, () if adapter.targets == "norm" else TARGETS, adapter.targets)
    config = adapter.config(AdapterSection(rank=4, alpha=8), targets, steps)
    assert isinstance(config, PeftConfig)
    live = get_peft_model(model, config)
    prepare(live, adapter, beta)
    assert isinstance(live, PeftModel)
    return live


@pytest.mark.parametrize("asked", [name for name, row in ADAPTERS.items() if row.peft_class])
def test_every_method_is_told_from_every_other_by_the_live_tensors(
    asked: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    refused: set[str] = set()
    targets = target_modules(make_model(), () if asked == "ln" else TARGETS, ADAPTERS[asked].targets)
    for method, row in ADAPTERS.items():
        if row.peft_class:
            try:
                require_injected(inject(make_model(), method), ADAPTERS[asked], targets)
            except RunError as error:
                assert f"asked for {asked}" in str(error)
                refused.add(method)
    # These two differ in their optimizer alone.
    same = {"lora", "loraplus"} if asked in ("lora", "loraplus") else {asked}
    assert refused == {name for name, row in ADAPTERS.items() if row.peft_class} - same


def test_a_layer_that_was_left_out_is_noticed(make_model: Callable[..., PreTrainedModel]) -> None:
    config = LoraConfig(r=4, target_modules=list(TARGETS), layers_to_transform=[0])
    with pytest.raises(RunError, match="on 3 layers of 6"):
        require_injected(get_peft_model(make_model(), config), ADAPTERS["lora"], TARGETS)


def trainer_of(model: nn.Module, method: str, out: Path, *more: TrainerCallback, **options: Any) -> Any:
    """A plain Transformers trainer of eight steps on one batch."""
    arguments = TrainingArguments(
        str(out / "checkpoints"), max_steps=8, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    arguments.lr_scheduler_type = "constant"  # pyright: ignore[reportAttributeAccessIssue]
    batch = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    chosen = with_adapter(Trainer, ADAPTERS[method], AdapterSection(options=options))
    callbacks = [*adapter_callbacks(ADAPTERS[method]), *more]
    return chosen(model=model, args=arguments, train_dataset=batch, callbacks=callbacks)


def test_lora_plus_lets_b_learn_faster_by_the_ratio(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    live = inject(make_model(), "loraplus")
    optimizer = trainer_of(live, "loraplus", tmp_path, loraplus_lr_ratio=4.0).create_optimizer()
    names = {id(weight): name for name, weight in live.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-2}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {4e-2}


def test_an_optimizer_that_does_not_hold_what_trains_is_refused(make_model: Callable[..., PreTrainedModel]) -> None:
    live = inject(make_model(), "lora")
    trained = [weight for weight in live.parameters() if weight.requires_grad]
    plain = torch.optim.SGD(trained, lr=0.1)
    require_optimizer(plain, live, ADAPTERS["lora"])
    with pytest.raises(RunError, match="B should learn 16 times as fast"):
        require_optimizer(plain, live, ADAPTERS["loraplus"], 16.0)
    with pytest.raises(RunError, match="leaves out 1 tensors"):
        require_optimizer(torch.optim.SGD(trained[1:], lr=0.1), live, ADAPTERS["lora"])
    with pytest.raises(RunError, match="holds 21 that do not"):
        require_optimizer(torch.optim.SGD(live.parameters(), lr=0.1), live, ADAPTERS["lora"])


class Ranks(TrainerCallback):
    """The rank of each matrix after each step."""

    def __init__(self) -> None:
        self.of_step: list[list[int]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        weights = kwargs["model"].named_parameters()
        self.of_step.append([int((weight != 0).sum()) for name, weight in weights if "lora_E" in name])


def test_adalora_s_ranks_fall_to_the_budget_and_differ(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    live, ranks = inject(make_model(), "adalora", steps=8), Ranks()
    trainer_of(live, "adalora", tmp_path, ranks).train()
    totals = [sum(found) for found in ranks.of_step]
    # Six matrices of rank 6 end at 4 on average, by the paper's cubic schedule of which the last step has no part.
    assert totals == [24 + int(12 * max(0, 1 - step / 7) ** 3) for step in range(1, 9)]
    assert len(set(ranks.of_step[-1])) > 1 and ranks.of_step[-2] == ranks.of_step[-1]
    assert isinstance(live.base_model, AdaLoraModel)


def test_adalora_s_orthogonality_term_is_in_the_gradient(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    live = inject(make_model(), "adalora").train()
    weights = {name: weight for name, weight in live.named_parameters() if weight.requires_grad}

    def gradient(weight: float) -> dict[str, Tensor]:
        trainer = trainer_of(live, "adalora", tmp_path, orth_reg_weight=weight)
        trainer.current_gradient_accumulation_steps = 2
        loss = trainer.compute_loss(live, {"input_ids": TOKENS, "labels": TOKENS})
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    without, with_term = gradient(0.0), gradient(0.5)
    expected = torch.autograd.grad(orthogonality(live), list(weights.values()), allow_unused=True)
    for (name, weight), term in zip(weights.items(), expected, strict=True):
        assert (term is None) == ("lora_E" in name)
        share = torch.zeros_like(weight) if term is None else 0.5 * term / 2
        torch.testing.assert_close(with_term[name] - without[name], share, atol=1e-6, rtol=1e-4)


def test_adalora_s_rank_count_does_not_train_on_a_bfloat16_base(make_model: Callable[..., PreTrainedModel]) -> None:
    live = inject(make_model().bfloat16(), "adalora")
    assert require_injected(live, ADAPTERS["adalora"], TARGETS) > 0


def test_lora_fa_s_a_never_moves(tmp_path: Path) -> None:
    out = train(recipe("lorafa"), tmp_path / "run")
    first, last = (load_file(out / f"checkpoints/checkpoint-{step}/adapter_model.safetensors") for step in (1, 3))
    assert all(torch.equal(tensor, last[key]) == ("lora_A" in key) for key, tensor in first.items())


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_the_kl_reference_is_the_original_base(method: str, make_model: Callable[..., PreTrainedModel]) -> None:
    with torch.no_grad():
        base = make_model()(input_ids=TOKENS).logits
        live = inject(make_model(), method, beta=0.1)
        for name, weight in live.named_parameters():
            weight += 0.1 * torch.randn(weight.shape) if ".default." in name else 0.0
        live.set_adapter("ref")
        torch.testing.assert_close(live(input_ids=TOKENS).logits, base, atol=2e-6, rtol=0)
        with live.disable_adapter():
            assert (live(input_ids=TOKENS).logits - base).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_a_lowered_base_is_kept_pristine_and_the_start_beside_the_run(method: str, tmp_path: Path) -> None:
    base = resolve_base("bundled:sums")
    before = (base / "model.safetensors").read_bytes()
    out = train(recipe(method, algorithm__beta=0.05), tmp_path / "run")
    assert (base / "model.safetensors").read_bytes() == before
    assert abs(read_jsonl(out / "metrics.jsonl")[0]["kl"]) < 1e-7 < read_jsonl(out / "metrics.jsonl")[2]["kl"]
    # A kill during the round trip leaves a run that only lacks it.
    shutil.rmtree(out / "adapter")
    manifest = read_json(out / "manifest.json")
    write_json(out / "manifest.json", {key: value for key, value in manifest.items() if key != "round_trip"})
    train(recipe(method, algorithm__beta=0.05), out)
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [1, 2, 3]
    assert read_json(out / "manifest.json")["round_trip"] == pytest.approx(manifest["round_trip"], abs=1e-5)
    start, last = open_checkpoint(out / "initial"), open_checkpoint(out / "checkpoints" / "checkpoint-3")
    plain, full = open_checkpoint(out / "adapter"), FullCheckpoint(base)
    assert isinstance(last, AdapterCheckpoint) and isinstance(plain, AdapterCheckpoint)
    assert plain.settings["method"] == "LoRA" and plain.settings["rank"] == 8
    assert read_json(out / "checkpoints/checkpoint-3/adapter_config.json")["init_lora_weights"] == method
    for name in last.shapes:
        assert float(dense(start.delta(name, full)).abs().max()) < 1e-6
        torch.testing.assert_close(dense(plain.delta(name, full)), dense(last.delta(name, full)), atol=1e-6, rtol=0)
        assert float(dense(last.delta(name, full)).abs().max()) > 1e-5
