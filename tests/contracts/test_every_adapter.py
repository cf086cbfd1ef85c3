"""Every adapter trains exactly what it says, on a two-layer model alone; ``test_every_pair`` does it through ``train``."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from killed import numbers, short, train_apart
from rankleap.adapters import ADAPTERS, prepare, require_injected, target_modules
from rankleap.adapters.adapter import Adapter
from rankleap.checkpoints import FullCheckpoint, dense, open_checkpoint
from rankleap.config import AdapterSection
from rankleap.training import train

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")
SETTINGS = AdapterSection(rank=4, alpha=8)
TOKENS = torch.arange(24).reshape(2, 12)
WITH_PEFT = [name for name, row in ADAPTERS.items() if row.peft_class]
READABLE = [name for name in WITH_PEFT if ADAPTERS[name].readable]


def injected(small_base: Path, name: str) -> tuple[PeftModel, Adapter, tuple[str, ...]]:
    adapter, model = ADAPTERS[name], AutoModelForCausalLM.from_pretrained(small_base)
    torch.manual_seed(1)
    targets = target_modules(model, (), adapter.targets)
    config = adapter.config(SETTINGS, targets, 10)
    assert config is not None
    live = get_peft_model(model, config)
    prepare(live, adapter, beta=0.0)
    assert isinstance(live, PeftModel)
    return live, adapter, targets


@torch.no_grad()
def moved(small_base: Path, name: str) -> PeftModel:
    live = injected(small_base, name)[0]
    for weight in live.parameters():
        if weight.requires_grad:
            weight.add_(0.1 * torch.randn(weight.shape))
    return live


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


def original(small_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(small_base)


@pytest.mark.parametrize("name", WITH_PEFT)
def test_a_fresh_adapter_changes_no_logits(small_base: Path, name: str) -> None:
    torch.testing.assert_close(logits(injected(small_base, name)[0]), logits(original(small_base)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", WITH_PEFT)
def test_only_what_is_declared_trains(small_base: Path, name: str) -> None:
    live, adapter, targets = injected(small_base, name)
    count = require_injected(live, adapter, targets)
    before = {key: weight.detach().clone() for key, weight in live.named_parameters()}
    live.train()
    optimizer = torch.optim.Adam([p for p in live.parameters() if p.requires_grad], lr=0.1)
    # Twice, for what is multiplied by a zero has no gradient yet.
    for _ in range(2):
        live(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = [key for key, weight in live.named_parameters() if not torch.equal(weight, before[key])]
    assert {next((p for p in adapter.parts if f"{p}." in key), key) for key in changed} == adapter.parts
    assert count == sum(before[key].numel() for key in changed)


@pytest.mark.parametrize("name", WITH_PEFT)
def test_merged_is_what_the_adapter_does(small_base: Path, name: str) -> None:
    live = moved(small_base, name)
    found = logits(live)
    assert not torch.allclose(found, logits(original(small_base)), atol=1e-4)
    torch.testing.assert_close(logits(live.merge_and_unload()), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", READABLE)
def test_the_effective_delta_is_merged_minus_base(small_base: Path, name: str, tmp_path: Path) -> None:
    live, pristine = moved(small_base, name), FullCheckpoint(small_base)
    live.save_pretrained(str(tmp_path))
    checkpoint, merged = open_checkpoint(tmp_path), dict(live.merge_and_unload().named_parameters())
    shapes = checkpoint.shapes_on(pristine)
    assert {key for key, weight in merged.items() if not torch.equal(weight, pristine.weight(key))} >= set(shapes)
    for key in shapes:
        torch.testing.assert_close(
            dense(checkpoint.delta(key, pristine)), merged[key] - pristine.weight(key), atol=5e-6, rtol=1e-4
        )


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", ADAPTERS)
def test_sigkill_amid_a_random_step_and_amid_a_random_save_changes_no_number(
    name: str, seed: int, small_base: Path, tmp_path: Path
) -> None:
    # With a KL term where its reference is not simply the live model without its adapter.
    beta = 0.05 if ADAPTERS[name].start != "base" else 0.0
    recipe, rewards = short(name, "grpo", small_base, beta, steps=3)
    whole, run, draw = tmp_path / "whole", tmp_path / "run", random.Random(f"{name} {seed}")
    assert train_apart(recipe, whole, rewards, None) == 0
    counts = {(step, over): count for step, over, count in json.loads(whole.with_suffix(".json").read_text())}
    step = draw.randint(1, 3)
    saved = draw.randint(step, 3)
    kills = [(step, False, draw.randint(1, counts[step, False])), (saved, True, draw.randint(1, counts[saved, True]))]
    assert [train_apart(recipe, run, rewards, kill) for kill in kills] == [-signal.SIGKILL] * 2, kills
    train(recipe, run, rewards=rewards)
    rows = numbers(whole), numbers(run)
    assert rows[1] == rows[0] and len(rows[0]) == 3, kills
    file = "adapter_model.safetensors" if ADAPTERS[name].peft_class else "model.safetensors"
    first, second = (load_file(out / "checkpoints" / "checkpoint-3" / file) for out in (whole, run))
    assert all(torch.equal(weight, second[key]) for key, weight in first.items()), kills
