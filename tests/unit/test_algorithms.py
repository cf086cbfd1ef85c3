"""What is asked is what TRL is told, and what trains is what was asked."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from rankleap.adapters import get_adapter, require_injected, target_modules
from rankleap.algorithms import ALGORITHMS
from rankleap.config import make_recipe
from rankleap.errors import RunError, UnknownNameError
from rankleap.training.build import trl_config

# TRL's own default sets the name that Transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def config_of(name: str, **algorithm: Any) -> Any:
    values = {
        "name": "t",
        "model": {"base": "bundled:sums"},
        "task": {"name": "sums"},
        "algorithm": {"name": name, **algorithm},
        "train": {"steps": 1, "learning_rate": 1e-4},
    }
    return trl_config(make_recipe(values, "test"), Path("unused"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_trl_is_told_the_loss_by_name_and_never_left_to_its_default(name: str) -> None:
    assert config_of(name).loss_type == name


@pytest.mark.parametrize(
    ("name", "scale", "high"), [("grpo", "group", None), ("dapo", "group", 0.28), ("dr_grpo", "none", None)]
)
def test_each_paper_has_its_own_scaling_and_clip(name: str, scale: str, high: float | None) -> None:
    told = config_of(name)
    assert (told.scale_rewards, told.epsilon, told.epsilon_high) == (scale, 0.2, high)
    assert config_of(name, epsilon_high=0.3).epsilon_high == 0.3


def test_rollouts_are_sampled_from_the_whole_distribution() -> None:
    told = config_of("grpo")
    assert (told.top_p, told.top_k, told.temperature, told.beta) == (1.0, 0, 1.0, 0.0)


def test_plain_lora_where_dora_was_asked_is_refused(make_model: Any) -> None:
    model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    assert require_injected(model, get_adapter("lora"), ("q_proj",)) > 0
    with pytest.raises(RunError, match="asked for dora"):
        require_injected(model, get_adapter("dora"), ("q_proj",))
    with pytest.raises(RunError, match="asked for lora on k_proj"):
        require_injected(model, get_adapter("lora"), ("k_proj",))


def test_a_model_without_an_adapter_is_refused_where_one_was_asked(make_model: Any) -> None:
    with pytest.raises(RunError, match="asked for lora"):
        require_injected(make_model(), get_adapter("lora"), ("q_proj",))
    assert require_injected(make_model(), get_adapter("full"), ()) == sum(p.numel() for p in make_model().parameters())


def test_every_linear_layer_but_the_head_is_adapted_by_default(make_model: Any) -> None:
    chosen = target_modules(make_model(tie_word_embeddings=False), ())
    assert set(chosen) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_unknown_adapter_gets_the_closest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'dora'"):
        get_adapter("doraa")
