"""Every adapter trains exactly what it says: on a two-layer model alone, and through ``train``, saved, resumed and reloaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from killed import KillBefore
from rankleap.adapters import ADAPTERS, prepare, require_injected, target_modules
from rankleap.adapters.adapter import Adapter
from rankleap.checkpoints import FullCheckpoint, dense, open_checkpoint, resolve_base
from rankleap.config import AdapterSection
from rankleap.files import read_json, read_jsonl
from rankleap.training import train
from recipes import tiny

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")
SETTINGS = AdapterSection(rank=4, alpha=8)
TOKENS = torch.arange(24).reshape(2, 12)
WITH_PEFT = [name for name, row in ADAPTERS.items() if row.peft_class]
READABLE = [name for name in WITH_PEFT if ADAPTERS[name].readable]


@pytest.fixture(scope="module")
def base(make_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the tokenizer of a bundled base."""
    directory = tmp_path_factory.mktemp("adapters") / "base"
    sums = resolve_base("bundled:sums")
    tokenizer = AutoTokenizer.from_pretrained(sums)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    make_model(vocab_size=len(tokenizer), tie_word_embeddings=True, **special).save_pretrained(directory)
    for path in sums.glob("tokenizer*"):
        shutil.copyfile(path, directory / path.name)
    return directory


def injected(base: Path, name: str) -> tuple[PeftModel, Adapter, tuple[str, ...]]:
    adapter, model = ADAPTERS[name], AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    targets = target_modules(model, (), adapter.targets)
    config = adapter.config(SETTINGS, targets, 10)
    assert config is not None
    live = get_peft_model(model, config)
    prepare(live, adapter, beta=0.0)
    assert isinstance(live, PeftModel)
    return live, adapter, targets


@torch.no_grad()
def moved(base: Path, name: str) -> PeftModel:
    live = injected(base, name)[0]
    for weight in live.parameters():
        if weight.requires_grad:
            weight.add_(0.1 * torch.randn(weight.shape))
    return live


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


def original(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("name", WITH_PEFT)
def test_a_fresh_adapter_changes_no_logits(base: Path, name: str) -> None:
    torch.testing.assert_close(logits(injected(base, name)[0]), logits(original(base)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", WITH_PEFT)
def test_only_what_is_declared_trains(base: Path, name: str) -> None:
    live, adapter, targets = injected(base, name)
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
def test_merged_is_what_the_adapter_does(base: Path, name: str) -> None:
    live = moved(base, name)
    found = logits(live)
    assert not torch.allclose(found, logits(original(base)), atol=1e-4)
    torch.testing.assert_close(logits(live.merge_and_unload()), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", READABLE)
def test_the_effective_delta_is_merged_minus_base(base: Path, name: str, tmp_path: Path) -> None:
    live, pristine = moved(base, name), FullCheckpoint(base)
    live.save_pretrained(str(tmp_path))
    checkpoint, merged = open_checkpoint(tmp_path), dict(live.merge_and_unload().named_parameters())
    shapes = checkpoint.shapes_on(pristine)
    assert {key for key, weight in merged.items() if not torch.equal(weight, pristine.weight(key))} >= set(shapes)
    for key in shapes:
        torch.testing.assert_close(
            dense(checkpoint.delta(key, pristine)), merged[key] - pristine.weight(key), atol=5e-6, rtol=1e-4
        )


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_resumes_to_the_same_numbers_and_reloads_on_the_original_base(
    base: Path, name: str, tmp_path: Path
) -> None:
    # With a KL term where the reference is not simply the live model without its adapter.
    asked = tiny(adapter__method=name, algorithm__beta=0.05 if ADAPTERS[name].start != "base" else 0.0)
    whole = train(asked, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(asked, tmp_path / "run", callbacks=[KillBefore(2)])
    again = train(asked, tmp_path / "run")
    columns = ("step", "loss", "grad_norm")
    first, second = ([[row[c] for c in columns] for row in read_jsonl(out / "metrics.jsonl")] for out in (whole, again))
    assert first == second
    assert len(first) == 3 and all(row[2] > 0 for row in first)
    weights = "adapter_model.safetensors" if ADAPTERS[name].peft_class else "model.safetensors"
    last = [load_file(out / "checkpoints" / "checkpoint-3" / weights) for out in (whole, again)]
    assert all(torch.equal(tensor, last[1][key]) for key, tensor in last[0].items())
    differences = read_json(again / "manifest.json")["round_trip"]
    assert set(differences) == {"reloaded", *(["effective"] if ADAPTERS[name].readable else [])}
    assert max(differences.values()) < 1e-5
