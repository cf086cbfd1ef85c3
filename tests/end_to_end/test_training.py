"""Real runs of a bundled base: what is recorded, what is resumed, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from killed import KillBefore
from rankleap.checkpoints import FullCheckpoint, base_of, dense, open_checkpoint, open_run, resolve_base
from rankleap.config import Recipe, make_recipe
from rankleap.errors import BaseMismatchError, InputError, RecipeError
from rankleap.files import read_json, read_jsonl
from rankleap.training import TrajectoryRecorder, plan, train
from rankleap.trajectory import RecordedTrajectory, recording_of, run_trajectory
from recipes import changed

STEPS = 8


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "t",
        "model": {"base": "bundled:sums"},
        "task": {"name": "sums", "train_problems": 64, "validation_problems": 64, "test_problems": 8},
        "adapter": {"rank": 4, "alpha": 8},
        "train": {
            "steps": STEPS,
            "learning_rate": 1e-4,
            "prompts_per_step": 8,
            "completions_per_prompt": 8,
            "max_completion_tokens": 16,
            "save_every": 2,
            "threads": 1,
        },
        "leap": {
            "methods": ["weight-linear"],
            "coefficients": [1.0, 2.0],
            "every": 4,
            "samples": 4,
            "confidence": 0.5,
            "max_norm_ratio": 100,
        },
    }
    return changed(values, **changes)


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["reward"]) for row in read_jsonl(out / "metrics.jsonl")]


@pytest.fixture(scope="module", params=["full", "lora", "dora"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A whole run with leaps, of each adapter."""
    chosen = recipe(adapter__method=request.param)
    return chosen, train(chosen, tmp_path_factory.mktemp(request.param) / "run", source="the recipe's own text")


def test_a_run_holds_everything_that_was_promised(finished: tuple[Recipe, Path]) -> None:
    chosen, out = finished
    assert (out / "recipe.toml").read_text() == "the recipe's own text"
    assert make_recipe(read_json(out / "config.json"), "") == chosen
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert open_run(out).steps == [2, 4, 6, 8]
    assert [row["step"] for row in read_jsonl(out / "leaps" / "decisions.jsonl")] == [4, 8]
    assert read_json(out / "manifest.json")["seed"] == 0


def test_the_recorder_and_the_checkpoints_give_the_same_factors(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    _, out = finished
    recorded = RecordedTrajectory(out / "trajectory")
    recording, exact = recording_of(open_run(out), None, tmp_path / "again", 4)
    for step in exact.steps:
        recording.add(step, ((name, exact.delta(name, step)) for name in exact.shapes))
    again = RecordedTrajectory(tmp_path / "again")
    assert recorded.steps == again.steps == (2, 4, 6, 8)
    assert set(recorded.shapes) == set(again.shapes)
    for name in recorded.shapes:
        torch.testing.assert_close(dense(recorded.delta(name, 6)), dense(again.delta(name, 6)), atol=1e-6, rtol=1e-4)


def test_a_lora_run_is_recorded_exactly(tmp_path: Path) -> None:
    out = train(recipe(adapter__method="lora", train__steps=4, leap=None), tmp_path / "run")
    run = open_run(out)
    exact, recorded = run_trajectory(run, base_of(run, None)[1]), RecordedTrajectory(out / "trajectory")
    for name in exact.shapes:
        torch.testing.assert_close(dense(recorded.delta(name, 4)), dense(exact.delta(name, 4)), atol=1e-7, rtol=1e-4)


def test_a_killed_run_resumes_to_the_same_numbers(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    chosen, whole = finished
    with pytest.raises(KeyboardInterrupt):
        train(chosen, tmp_path / "run", callbacks=[KillBefore(5)])
    train(chosen, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)
    taken = [
        [(d["step"], d["accepted"], d["coefficient"]) for d in read_jsonl(o / "leaps" / "decisions.jsonl")]
        for o in (whole, tmp_path / "run")
    ]
    assert taken[0] == taken[1]
    last = [open_checkpoint(o / "checkpoints" / f"checkpoint-{STEPS}") for o in (whole, tmp_path / "run")]
    base = FullCheckpoint(resolve_base("bundled:sums"))
    for name in last[0].shapes:
        assert torch.equal(dense(last[0].delta(name, base)), dense(last[1].delta(name, base)))


def test_a_run_that_only_writes_its_leaps_resumes_on_its_own_path(tmp_path: Path) -> None:
    chosen = recipe(leap__proceed_from="origin", leap__every=2, leap__windows=[2])
    whole = train(chosen, tmp_path / "whole")
    assert any(row["accepted"] for row in read_jsonl(whole / "leaps" / "decisions.jsonl"))
    assert not any(row["taken"] for row in read_jsonl(whole / "leaps" / "decisions.jsonl"))
    accepted = next(row["step"] for row in read_jsonl(whole / "leaps" / "decisions.jsonl") if row["accepted"])
    with pytest.raises(KeyboardInterrupt):
        train(chosen, tmp_path / "run", callbacks=[KillBefore(min(accepted, STEPS - 1))])
    train(chosen, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)


def test_a_kill_between_checkpoint_and_leap_makes_the_leap_again(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    chosen, whole = finished
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "leaps" / "decisions.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n")
    train(chosen, tmp_path / "run")
    again = json.loads(path.read_text().splitlines()[1])
    assert {**again, "wall_s": 0} == {**json.loads(second), "wall_s": 0}


def test_a_half_written_checkpoint_is_taken_again(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    chosen, whole = finished
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").write_text('{"global_')
    train(chosen, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)


def test_training_goes_on_from_an_accepted_leap_and_else_from_the_checkpoint(finished: tuple[Recipe, Path]) -> None:
    chosen, out = finished
    decision = read_jsonl(out / "leaps" / "decisions.jsonl")[0]
    assert decision["accepted"] or chosen.adapter.method != "full", "twelve steps for four are a plain gain here"
    start = out / "checkpoints" / "checkpoint-4"
    left = out / decision["directory"] if decision["accepted"] else start
    base = FullCheckpoint(resolve_base("bundled:sums"))
    origin, after = open_checkpoint(left), open_checkpoint(out / "checkpoints" / "checkpoint-6")
    moved = [torch.dist(dense(after.delta(n, base)), dense(origin.delta(n, base))) for n in after.shapes]
    stayed = [
        torch.dist(dense(after.delta(n, base)), dense(open_checkpoint(start).delta(n, base))) for n in after.shapes
    ]
    assert sum(moved) <= sum(stayed)
    assert decision["accepted"] == (sum(moved) < sum(stayed))


@pytest.mark.parametrize("finished", ["full"], indirect=True)
def test_a_leap_of_a_full_run_loads_in_transformers(finished: tuple[Recipe, Path]) -> None:
    _, out = finished
    row = read_jsonl(out / "leaps" / "decisions.jsonl")[0]
    model = AutoModelForCausalLM.from_pretrained(out / row["directory"])
    stored = FullCheckpoint(out / row["directory"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored.weight(name))


class FirstMoments(TrainerCallback):
    """What Adam holds before the step that follows the leap."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 4:
            self.state = {i: {**one} for i, one in kwargs["optimizer"].state_dict()["state"].items()}
            self.state = {i: {k: v.clone() for k, v in one.items()} for i, one in self.state.items()}


@pytest.mark.parametrize("finished", ["full"], indirect=True)
@pytest.mark.parametrize("optimizer_state", ["rescale", "reset"])
def test_adams_moments_after_a_leap_are_what_was_asked_also_after_a_kill(
    finished: tuple[Recipe, Path], optimizer_state: str, tmp_path: Path
) -> None:
    # The budget and the shrinks are those of the looks to come; with 64 completions, halving has two rungs.
    chosen = recipe(adapter__method="full", leap__optimizer_state=optimizer_state, leap__shrinks=1, leap__budget=64)
    held = FirstMoments()
    whole = train(chosen, tmp_path / "whole", callbacks=[held])
    decision = read_jsonl(whole / "leaps" / "decisions.jsonl")[0]
    assert decision["taken"] and decision["ahead"] > 0
    assert decision["samples_spent"] <= 64 + 3 * 32 * 4
    before = torch.load(whole / "checkpoints" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert held.state.keys() == (before.keys() if optimizer_state == "rescale" else set())
    for index, moments in held.state.items():
        torch.testing.assert_close(moments["exp_avg"], before[index]["exp_avg"] * 0.9 ** decision["ahead"])
        assert torch.equal(moments["exp_avg_sq"], before[index]["exp_avg_sq"])
    with pytest.raises(KeyboardInterrupt):
        train(chosen, tmp_path / "run", callbacks=[KillBefore(5)])
    train(chosen, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)
    carried = losses(finished[1])
    assert losses(whole)[:4] == carried[:4] and losses(whole)[5:] != carried[5:]


def test_a_limit_on_forward_kl_is_measured_and_kept(tmp_path: Path) -> None:
    out = train(recipe(train__steps=4, leap__max_kl=1e-9), tmp_path / "run")
    decision = read_jsonl(out / "leaps" / "decisions.jsonl")[0]
    assert not decision["accepted"]
    assert decision["kl"] > 1e-9
    assert any("forward KL" in reason for reason in decision["reasons"])


def test_old_leaps_are_let_go_with_old_checkpoints(tmp_path: Path) -> None:
    settings = {"train__keep_checkpoints": 2, "leap__every": 2, "leap__windows": [2], "leap__coefficients": [0.5]}
    out = train(recipe(**settings), tmp_path / "run")
    accepted = [row["directory"] for row in read_jsonl(out / "leaps" / "decisions.jsonl") if row["accepted"]]
    there = [directory for directory in accepted if (out / directory).exists()]
    assert there == accepted[-2:]
    assert open_run(out).steps == [6, 8]


def test_another_recipe_in_the_same_directory_is_refused_by_the_key_that_differs(finished: tuple[Recipe, Path]) -> None:
    chosen, out = finished
    other = chosen.model_copy(update={"train": chosen.train.model_copy(update={"learning_rate": 2e-3})})
    with pytest.raises(InputError, match=r"differs in train\.learning_rate"):
        train(other, out)
    # A section that is there on one side alone.
    with pytest.raises(InputError, match=r"differs in .*leap\.every"):
        train(chosen.model_copy(update={"leap": None}), out)


def test_a_recipe_that_cannot_run_lists_every_reason_and_writes_nothing(tmp_path: Path) -> None:
    wrong = recipe(task__name="sumz", adapter__method="lorra", algorithm={"name": "grop"}, leap__every=3)
    with pytest.raises(RecipeError) as caught:
        train(wrong, tmp_path / "run")
    for part in ("did you mean 'sums'", "did you mean 'lora'", "did you mean 'grpo'", "leap.every: 3 is no multiple"):
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_leaps_that_need_accuracies_are_refused_where_nobody_measures_any(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'alpharl' regresses on accuracies.*alpharl-step"):
        train(recipe(leap__methods=["alpharl"]), tmp_path / "run")


def test_target_modules_that_match_nothing_are_refused_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"qq_proj match no linear layer.*q_proj"):
        train(recipe(adapter={"method": "lora", "target_modules": ["qq_proj"]}), tmp_path / "run")


def test_a_plan_counts_what_trains_and_measures_a_step(tmp_path: Path) -> None:
    made = plan(recipe(adapter__method="lora"), tmp_path)
    base = FullCheckpoint(resolve_base("bundled:sums"))
    adapted = [shape for name, shape in base.shapes.items() if name.rpartition(".")[0].endswith("_proj")]
    assert made.trainable == sum(4 * (rows + columns) for rows, columns in adapted)
    assert made.completions == STEPS * 64
    assert made.step_s is not None and made.step_s > 0


def test_the_recorder_refuses_a_model_of_another_shape(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(resolve_base("bundled:sums"))
    model.resize_token_embeddings(model.config.vocab_size + 8)
    recorder = TrajectoryRecorder(tmp_path, "bundled:sums")
    with pytest.raises(BaseMismatchError, match="embed_tokens"):
        recorder.on_train_begin(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), model=model)


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_small_moves_of_an_adapter_that_was_taken_out_of_the_base_are_recorded_as_they_are(
    method: str, tmp_path: Path
) -> None:
    out = train(
        recipe(adapter__method=method, train__learning_rate=1e-6, train__steps=2, leap=None, record={"rank": 8}),
        tmp_path / "run",
    )
    recorded, exact = (
        RecordedTrajectory(out / "trajectory"),
        run_trajectory(open_run(out), base_of(open_run(out), None)[1]),
    )
    for name in exact.shapes:
        delta = dense(exact.delta(name, 2))
        assert 0 < float(delta.norm()) < 1e-2
        torch.testing.assert_close(dense(recorded.delta(name, 2)), delta, atol=0.02 * float(delta.norm()), rtol=0)
