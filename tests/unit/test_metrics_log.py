"""Rows of a run: where the seconds of each step went, and that a kill costs none of them."""

import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from killed import KillBefore
from rankleap.config import Recipe
from rankleap.files import append_jsonl, read_jsonl
from rankleap.training import read_decisions, train
from rankleap.training.metrics import PHASES, Lap, MetricsLog
from scripted import recipe_of

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
ROUNDING_S = 0.5e-3 * 2 + 0.5e-4 * len(PHASES)
"""Two of ``wall_s``, and one of each phase."""


def leaping(name: str = "grpo", **algorithm: Any) -> Recipe:
    sizes = {"steps": 4, "save_every": 2, "max_completion_tokens": 16}
    recipe = recipe_of(name, 3, 4, sizes, **algorithm)
    leap = {"methods": ["weight-linear"], "every": 4, "samples": 1, "confidence": 0.5, "max_norm_ratio": 100}
    return Recipe.model_validate({**recipe.model_dump(), "leap": leap})


def rows_of(out: Path) -> list[dict[str, Any]]:
    return read_jsonl(out / "metrics.jsonl")


def require_accounts(rows: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for before, row in zip([{"wall_s": 0.0}, *rows], rows, strict=False):
        assert all(row[phase] >= 0 for phase in PHASES)
        assert sum(row[phase] for phase in PHASES) == pytest.approx(row["wall_s"] - before["wall_s"], abs=ROUNDING_S)
        assert row["peak_memory_bytes"] > 1e7
        # A leap is looked for after the last step alone; the first row has the start of the run too.
        assert [bool(row["save_s"]), bool(row["record_s"])] == [row["step"] % 2 == 0] * 2 or row["step"] == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(leaping(), tmp_path_factory.mktemp("whole") / "run")


def test_phases_add_up_to_the_wall_of_each_step_with_what_followed_it(whole: Path) -> None:
    rows = rows_of(whole)
    require_accounts(rows)
    assert all(row["rollout_s"] > 0 and row["reward_s"] > 0 and row["update_s"] > 0 for row in rows)
    decision = read_decisions(whole)[0]
    assert rows[3]["leap_s"] >= decision["wall_s"] - 1e-3 > 0 == rows[2]["leap_s"]
    assert rows[0]["rewards/task"] == pytest.approx(rows[0]["reward"])
    assert [row["no_signal_prompts"] for row in rows] == [round(3 * row["no_signal"]) for row in rows]
    assert all(row["grader_failures"] == 0 <= row["unparsable"] <= 1 for row in rows)


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_carries_its_seconds_on(whole: Path, step: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(leaping(), tmp_path / "run", callbacks=[KillBefore(step)])
    kept = rows_of(tmp_path / "run")[1]
    train(leaping(), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    require_accounts(rows)
    assert rows[1]["wall_s"] >= kept["wall_s"] and rows[1]["save_s"] == kept["save_s"]
    columns = ("loss", "reward", "tokens", "unparsable", "no_signal_prompts", "skipped")
    assert [[row[c] for c in columns] for row in rows] == [[row[c] for c in columns] for row in rows_of(whole)]


def test_a_leap_that_is_made_up_for_belongs_to_the_step_it_followed(tmp_path: Path) -> None:
    out = train(leaping(), tmp_path / "run")
    (out / "leaps" / "decisions.jsonl").unlink()
    before = rows_of(out)
    train(leaping(), out)
    after = rows_of(out)
    require_accounts(after)
    assert after[:3] == before[:3]
    assert after[3]["leap_s"] > before[3]["leap_s"] and after[3]["wall_s"] > before[3]["wall_s"]


def test_all_draws_of_a_step_are_counted_and_no_rollout_is_none(tmp_path: Path) -> None:
    rows = rows_of(train(leaping("grpo", iterations=2, dynamic_sampling=True), tmp_path / "run"))
    require_accounts(rows)
    assert [bool(row["rollout_s"]) for row in rows] == [True, False, True, False]
    rows = rows_of(train(leaping("sft"), tmp_path / "sft"))
    require_accounts(rows)
    assert {row["rollout_s"] + row["reward_s"] for row in rows} == {0.0}


def test_a_row_is_on_disk_before_what_follows_it(tmp_path: Path) -> None:
    args: Any = TrainingArguments(str(tmp_path), use_cpu=True)
    args.generation_batch_size, args.num_generations = 12, 4
    state, control, log = TrainerState(global_step=1), TrainerControl(), MetricsLog(tmp_path / "metrics.jsonl")
    # Of a run that was killed further on.
    append_jsonl(log.path, {"step": 1, "wall_s": 9.0})
    log.on_train_begin(args, TrainerState(global_step=0), control)
    logs = {"loss": 0.5, "rollout_s": 0.0, "rewards/a/mean": None, "rewards/a/std": 0.0, "frac_reward_zero_std": 2 / 3}
    log.on_log(args, state, control, logs=logs)
    written = rows_of(tmp_path)
    assert [(row["step"], row["loss"], row["rewards/a"], row["no_signal_prompts"]) for row in written] == [
        (1, 0.5, None, 2)
    ]
    for phase in (log, Lap(log, "leap_s")):
        time.sleep(2e-3)
        phase.on_save(args, state, control)
    assert rows_of(tmp_path) == written
    log.on_train_end(args, state, control)
    (row,) = rows_of(tmp_path)
    assert row["save_s"] >= 2e-3 <= row["leap_s"] and row["record_s"] == 0.0
    log.on_log(args, state, control, logs={"train_runtime": 1.0})
    assert rows_of(tmp_path) == [row]
