"""Sampler and trainer give one probability to a token, unless something lies between them, which is then told."""

import logging
from pathlib import Path
from typing import Any

import pytest

from rankleap.files import read_jsonl
from rankleap.training import train
from recipes import tiny

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def gaps(out: Path, **changes: Any) -> list[float | None]:
    recipe = tiny(train__agreement_every=2, train__save_every=10, **changes)
    return [row.get("logp_gap") for row in read_jsonl(train(recipe, out) / "metrics.jsonl")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter__method": "lora", "train__micro_batch": 8},
        {"algorithm__name": "dapo"},
        {"algorithm__name": "ppo", "train__temperature": 0.7},
    ],
)
def test_in_float32_they_agree_to_rounding(changes: dict[str, Any], tmp_path: Path) -> None:
    first, between, second = gaps(tmp_path / "run", **changes)
    assert between is None
    # Exactly zero would mean that both came from one forward pass.
    assert first and second and max(first, second) < 1e-5


def test_dropout_in_the_trainer_parts_them_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hot = {"adapter__method": "lora", "adapter__dropout": 0.9, "train__learning_rate": 0.05, "train__steps": 5}
    with caplog.at_level(logging.WARNING, "rankleap.algorithms.sampling"):
        _, _, third, _, fifth = gaps(tmp_path / "run", **hot)
    assert third and fifth and min(third, fifth) > 1e-3
    assert [record.levelname for record in caplog.records if "part by" in record.message] == ["WARNING"]


def test_watching_changes_nothing_of_the_run(tmp_path: Path) -> None:
    losses = []
    for every in (0, 1):
        recipe = tiny(train__agreement_every=every, adapter__method="lora", adapter__dropout=0.5)
        rows = read_jsonl(train(recipe, tmp_path / str(every)) / "metrics.jsonl")
        losses.append([(row["loss"], row["grad_norm"], row["reward"]) for row in rows])
    assert losses[0] == losses[1]


def test_no_comparison_is_asked_for_by_zero(tmp_path: Path) -> None:
    recipe = tiny(train__agreement_every=0, train__steps=1)
    assert "logp_gap" not in read_jsonl(train(recipe, tmp_path / "run") / "metrics.jsonl")[0]
