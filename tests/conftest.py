"""Tiny models made on the spot, adapters saved by PEFT itself, a synthetic run, and trajectories in memory."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no directory must fail at once

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from rankleap.checkpoints import Delta, resolve_base
from rankleap.errors import TrajectoryError
from rankleap.files import write_jsonl
from rankleap.records import Sample
from rankleap.tasks import get_task
from rankleap.trajectory import Trajectory

torch.set_num_threads(1)
disable_progress_bar()
settings.register_profile("rankleap", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("rankleap")

STEPS = (10, 20, 30, 40)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def pytest_configure(config: pytest.Config) -> None:
    # Read by PEFT in every model that it wraps; nothing of ours touches it.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class MemoryTrajectory(Trajectory):
    """Deltas kept in memory."""

    def __init__(self, steps: Sequence[int], deltas: dict[str, list[Delta]]) -> None:
        super().__init__(steps, {name: tuple(path[0].shape) for name, path in deltas.items()})
        self.paths = deltas

    def delta(self, name: str, step: int) -> Delta:
        return self.paths[name][self.steps.index(step)]

    def until(self, step: int) -> "MemoryTrajectory":
        kept = [s for s in self.steps if s <= step]
        if not kept:
            raise TrajectoryError(f"no step up to {step}")
        return MemoryTrajectory(kept, {name: path[: len(kept)] for name, path in self.paths.items()})


@pytest.fixture(scope="session")
def memory_trajectory() -> type[MemoryTrajectory]:
    """``memory_trajectory(steps, {name: [delta of each step]})``."""
    return MemoryTrajectory


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """``make_model("llama" | "qwen3", seed=0, **config)``: two layers of width 32."""

    def make(family: str = "llama", seed: int = 0, **config: object) -> PreTrainedModel:
        torch.manual_seed(seed)
        if family == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 8, **config}))
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **config}))

    return make


@pytest.fixture(scope="session")
def base_directory(make_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, saved by Transformers."""
    directory = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def small_base(make_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the tokenizer of the bundled ``sums``, and the right samples of a teacher in ``right.jsonl``."""
    directory, sums = tmp_path_factory.mktemp("small") / "base", resolve_base("bundled:sums")
    tokenizer = AutoTokenizer.from_pretrained(sums)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    make_model(vocab_size=len(tokenizer), tie_word_embeddings=True, **special).save_pretrained(directory)
    for path in sums.glob("tokenizer*"):
        shutil.copyfile(path, directory / path.name)
    problems = get_task("sums").problems("train", 8)
    right = [Sample(p.id, 0, f" Answer: {p.answer}", 4, truncated=False, score=1.0, how="right") for p in problems]
    write_jsonl(directory / "right.jsonl", [asdict(one) for one in right])
    return directory


@pytest.fixture(scope="session")
def run_directory(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from ``base_directory``: every weight drifts along its own line with noise; ``checkpoint-10`` … ``-40``."""
    run = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(base_directory)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    drift = {name: torch.randn(weight.shape, generator=generator) for name, weight in start.items()}
    for step in STEPS:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(start[name] + 1e-3 * step * drift[name] + 1e-3 * noise)
        model.save_pretrained(run / f"checkpoint-{step}")
    return run


@pytest.fixture(scope="session")
def save_adapter(base_directory: Path) -> Callable[..., PeftModel]:
    """``save_adapter(directory, seed=0, **LoraConfig)``: an adapter on ``base_directory`` with B (and m) moved, saved by PEFT."""

    def save(directory: Path, seed: int = 0, **config: object) -> PeftModel:
        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **config}
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(base_directory), LoraConfig(task_type="CAUSAL_LM", **settings)
        )
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn(weight.shape))
        model.save_pretrained(str(directory))
        return model

    return save


@pytest.fixture(scope="session")
def lora_run(save_adapter: Callable[..., PeftModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run on ``base_directory`` with another adapter at each of four steps."""
    run = tmp_path_factory.mktemp("lora")
    for step in STEPS:
        save_adapter(run / f"checkpoint-{step}", seed=step)
    return run


@pytest.fixture(scope="session")
def weights_of() -> Callable[[torch.nn.Module], dict[str, Tensor]]:
    """Parameters of a live model by name, tied ones once, in float32."""

    def weights(model: torch.nn.Module) -> dict[str, Tensor]:
        return {name: weight.detach().float().clone() for name, weight in model.named_parameters()}

    return weights
