"""The command line as a user meets it: results, errors and exit codes."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankleap.checkpoints import FullCheckpoint, resolve_base
from rankleap.cli import main
from rankleap.config import make_recipe
from rankleap.leap import run_accuracies
from rankleap.tasks import get_task
from rankleap.training import train

RECIPE = """
name = "t"
[model]
base = "bundled:sums"
[task]
name = "sums"
train_problems = 32
[train]
steps = 6
learning_rate = 1e-4
prompts_per_step = 2
completions_per_prompt = 4
max_completion_tokens = 16
save_every = 2
threads = 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short full fine-tuning run."""
    out = tmp_path_factory.mktemp("cli") / "run"
    import tomllib

    return train(make_recipe(tomllib.loads(RECIPE), "test"), out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``rankleap``; its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return int(left.value.code or 0), shown.out, shown.err

    return call


def copy_of(run: Path, destination: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, destination))


def test_inspect_says_what_is_there(cli: Any, run: Path) -> None:
    code, out, _ = cli("inspect", run, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["steps"] == [2, 4, 6]
    assert found["layout"] == "Hugging Face full"
    assert found["base"] == "bundled:sums"


def test_trajectory_does_only_what_is_missing(cli: Any, run: Path, tmp_path: Path) -> None:
    first = cli("trajectory", run, "--out", tmp_path / "t", "--rank", 2, "--json")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("step-*")}
    second = cli("trajectory", run, "--out", tmp_path / "t", "--rank", 2, "--json")
    assert first[0] == second[0] == 0
    assert json.loads(first[1])["steps"] == json.loads(second[1])["steps"] == [2, 4, 6]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("step-*")} == written


def test_a_leap_is_shown_with_what_the_gate_said(cli: Any, run: Path, tmp_path: Path) -> None:
    arguments = (
        "--method",
        "weight-linear",
        "--coefficient",
        1.0,
        "--problems",
        8,
        "--samples",
        1,
        "--out",
        tmp_path / "l",
    )
    code, out, _ = cli("leap", run, *arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["gate"]["accepted"] == (tmp_path / "l" / "model.safetensors").exists()
    assert found["gate"]["accepted"] == (not found["gate"]["reasons"])


def test_the_gate_judges_the_adapter_that_is_written(run: Path, tmp_path: Path) -> None:
    from rankleap.checkpoints import effective_weights, open_checkpoint
    from rankleap.leap import Leap, adapter_weights, open_source, write_leap_adapter
    from rankleap.predictors import get_predictor

    source = open_source(run, None)
    leap = Leap(get_predictor("weight-linear").fit(source.trajectory), 1.0)
    out = write_leap_adapter(leap, source.base, tmp_path / "a", {}, rank=2, base_name=source.base_name)
    judged = dict(adapter_weights(leap, source.base, 2))
    for name, written in effective_weights(open_checkpoint(out), source.base):
        torch.testing.assert_close(judged[name], written, atol=1e-7, rtol=1e-5)


def test_dry_run_prints_the_plan_and_writes_nothing(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    arguments = ("--set", "adapter.method=dora", "--set", "adapter.rank=2", "--out", tmp_path / "out")
    code, out, _ = cli("train", tmp_path / "r.toml", *arguments, "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["recipe"]["adapter"]["method"] == "dora"
    assert 0 < found["plan"]["trainable"] < found["plan"]["total"]
    assert not (tmp_path / "out").exists()


def test_doctor_names_what_is_installed(cli: Any) -> None:
    code, out, _ = cli("doctor", "--json")
    assert code == 0
    assert {"sums", "backward"} <= set(json.loads(out)["bundled_bases"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["train.lerning_rate=1", "adapter.rank=0"],
            ["did you mean 'learning_rate'", "adapter.rank: should be at least 1"],
        ),
        (["task.name=sunms"], ["'sunms' does not exist", "did you mean 'sums'"]),
        (["model.base=bundled:sum"], ["did you mean 'sums'"]),
        (["model.base=no/such/base"], ["is no directory and could not be fetched", "bundled:sums"]),
        (["adapter.method=lora", "adapter.target_modules=['x_proj']"], ["x_proj match no linear layer", "q_proj"]),
        (["train.micro_batch=3"], ["3 must divide the 8 completions"]),
    ],
)
def test_a_wrong_recipe_is_refused_with_what_to_do(
    cli: Any, tmp_path: Path, overrides: list[str], said: list[str]
) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    flags = [flag for override in overrides for flag in ("--set", override)]
    code, _, err = cli("train", tmp_path / "r.toml", *flags, "--out", tmp_path / "out")
    assert code == 2
    for part in said:
        assert part in err
    assert not (tmp_path / "out").exists()


def test_a_directory_without_checkpoints_says_what_was_needed(cli: Any, tmp_path: Path) -> None:
    assert cli("inspect", tmp_path / "nothing")[0] == 2
    code, _, err = cli("trajectory", tmp_path)
    assert code == 2
    assert "checkpoint-20" in err


def test_a_truncated_checkpoint_is_skipped_by_name(cli: Any, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    weights = copy / "checkpoints" / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, out, _ = cli("inspect", copy, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["steps"] == [2, 6]
    assert "truncated" in found["skipped"]["checkpoint-4"]


def test_nan_weights_are_named_and_nothing_is_left_behind(cli: Any, run: Path, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path / "run")
    weights = copy / "checkpoints" / "checkpoint-4" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    code, _, err = cli("trajectory", copy, "--out", tmp_path / "t")
    assert code == 2
    assert "model.norm.weight has NaN or infinity" in err
    assert "checkpoint-4" in err
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["index.json", "step-000002.safetensors"]


def test_a_base_that_does_not_fit_is_refused_with_names_and_shapes(cli: Any, run: Path, tmp_path: Path) -> None:
    base = copy_of(run / "checkpoints" / "checkpoint-2", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    code, _, err = cli("leap", run, "--base", base)
    assert code == 2
    assert "model.norm.weight: (" in err
    assert "(7,) in the base" in err


FEW = ("--problems", 8, "--samples", 1)


@pytest.fixture(scope="module")
def noise(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that only trembles round its base: six checkpoints."""
    out, generator = tmp_path_factory.mktemp("noise"), torch.Generator().manual_seed(0)
    start = load_file(FullCheckpoint(resolve_base("bundled:sums")).directory / "model.safetensors")
    for step in range(10, 70, 10):
        copy_of(run / "checkpoints" / "checkpoint-2", out / f"checkpoint-{step}")
        (out / f"checkpoint-{step}" / "trainer_state.json").unlink()
        moved = {n: w + 1e-4 * torch.randn(w.shape, generator=generator) for n, w in start.items()}
        save_file(moved, out / f"checkpoint-{step}" / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_run_of_noise_is_told_not_to_leap_and_goes_to_the_gate_only_despite_that(
    cli: Any, noise: Path, tmp_path: Path
) -> None:
    asked = (
        "leap",
        noise,
        "--base",
        "bundled:sums",
        "--task",
        "sums",
        *FEW,
        "--max-tokens",
        8,
        "--out",
        tmp_path / "l",
    )
    every = [flag for method in ("window", "weight-linear", "relex", "average") for flag in ("--method", method)]
    code, out, _ = cli(*asked, *every)
    assert code == 0
    assert "do not leap: the best of 12, " in out and "Nothing was written" in out
    code, out, _ = cli(*asked, *every, "--json")
    assert code == 0
    assert "gate" not in json.loads(out) and json.loads(out)["written"] is None
    code, out, _ = cli(*asked, "--coefficient", 1.0, "--despite-backtest", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["backtest"]["refusal"] and found["gate"]
    code, out, _ = cli(*asked, "--coefficient", 1.0, "--backtest", "off", "--shrinks", 0, "--json")
    assert json.loads(out)["samples_spent"] == 8  # leap and origin on the gate half
    assert json.loads(out)["backtest"]["skills"] == []
    code, out, _ = cli(*asked, "--coefficient", 1.0, "--backtest", "accuracy", "--window", 2, "--json")
    # From the four checkpoints that have two before them, leap and origin on the choosing half.
    assert json.loads(out)["backtest"]["samples_spent"] == 4 * 2 * 4
    assert noise.exists() and not list(noise.glob("leaps"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--target", 6), "ahead of the last checkpoint, step 6; got 6"),
        (("--target", 2), "ahead of the last checkpoint, step 6; got 2"),
        (("--budget", 2), "a budget of 2 answers cannot try 3 candidates once"),
        (("--base", "bundled:backward"), "backward"),
    ],
)
def test_a_leap_that_cannot_be_is_refused_by_name(
    cli: Any, run: Path, tmp_path: Path, arguments: Any, said: str
) -> None:
    code, _, err = cli("leap", run, *FEW, "--out", tmp_path / "l", *arguments)
    assert code == 2
    assert said in err
    assert not list(tmp_path.iterdir())


def test_accuracies_come_from_validation_or_a_file_and_never_from_the_test_split(
    cli: Any, run: Path, tmp_path: Path
) -> None:
    copy, scores = copy_of(run, tmp_path / "run"), tmp_path / "scores.json"
    asked = ("leap", copy, *FEW, "--method", "alpharl", "--coefficient", 1.0, "--backtest", "off", "--json")
    evaluated = ("evaluate", "--run", copy, "--problems", 8, "-k", 2, "--json")
    code, _, err = cli(*asked)
    assert code == 2 and "alpharl" in err and "accurac" in err
    assert cli(*evaluated)[0] == 0  # on test, where it reports
    code, _, err = cli(*asked)
    assert code == 2 and "sums/test/0" in err and "need the validation problems" in err
    for split, values, said in (
        ("test", {"2": 0.1}, "got 'test'; test accuracies may not choose"),
        ("validation", [0.1], 'needs "accuracy", a number for each step'),
        ("validation", {"2": 0.2, "4": 0.2, "6": 0.2}, "alpharl"),
    ):
        scores.write_text(json.dumps({"split": split, "accuracy": values}))
        code, _, err = cli(*asked, "--scores", scores)
        assert code == 2 and said in err
    assert not (copy / "leaps").exists()
    scores.write_text(json.dumps({"split": "validation", "accuracy": {"2": 0.2, "4": 0.3, "6": 0.5}}))
    code, out, _ = cli(*asked, "--scores", scores)
    assert code == 0 and json.loads(out)["method"] == "alpharl" and "ambiguous_signs" in json.loads(out)
    import shutil

    shutil.rmtree(copy / "evaluation")
    assert cli(*evaluated, "--split", "validation")[0] == 0
    found = run_accuracies(copy, "sums", get_task("sums").problems("validation", 4), (2, 4, 6))
    samples = [json.loads(line) for line in (copy / "evaluation/sums/checkpoint-4.jsonl").read_text().splitlines()]
    assert found[4] == sum(one["score"] for one in samples[:8]) / 8  # of the choosing half alone


def test_an_adapter_is_asked_no_more_rank_than_was_recorded(cli: Any, run: Path, tmp_path: Path) -> None:
    cli("trajectory", run, "--out", tmp_path / "t" / "trajectory", "--rank", 2)
    arguments = ("leap", tmp_path / "t", "--base", "bundled:sums", "--task", "sums", *FEW, "--as", "adapter", "--out")
    code, _, err = cli(*arguments, tmp_path / "l", "--rank", 4)
    assert code == 2
    assert "rank 4 needs as many recorded triplets" in err and "has 2; ask for --rank 2" in err
    code, out, _ = cli(*arguments, tmp_path / "l", "--confidence", 0.5, "--json")
    assert code == 0
    assert (tmp_path / "l" / "adapter_model.safetensors").exists() == json.loads(out)["gate"]["accepted"]


def test_logits_are_extrapolated_from_an_earlier_checkpoint(cli: Any, run: Path, tmp_path: Path) -> None:
    late, early = (str(run / "checkpoints" / f"checkpoint-{step}") for step in (6, 2))
    asked = ("evaluate", late, "--task", "sums", "--problems", 8, "-k", 2, "--max-tokens", 8, "--json")
    plain, same = cli(*asked), cli(*asked, "--extrapolate-from", early, "--coefficient", 0)
    assert plain[0] == same[0] == 0
    (first,), (second,) = json.loads(plain[1]).values(), json.loads(same[1]).values()
    assert first["avg"] == second["avg"] and first["mean_tokens"] == second["mean_tokens"]
    code, _, err = cli(*asked, "--extrapolate-from", "bundled:backward")
    assert code == 2 and "different tokenizers" in err
    code, _, err = cli("evaluate", "--run", run, "--extrapolate-from", early)
    assert code == 2 and "goes with one MODEL" in err
    assert cli(*asked, "--extrapolate-from", early, "--out", tmp_path)[0] == 0
    assert (tmp_path / "evaluation" / "sums" / "checkpoint-6-from-checkpoint-2-c0.5.jsonl").exists()


def test_too_few_checkpoints_name_the_method_and_its_need(cli: Any, run: Path) -> None:
    code, _, err = cli("leap", run, "--method", "relex", "--until", 2, "--problems", 8)
    assert code == 2
    assert "relex needs at least 2 checkpoints, got 1" in err


def test_an_unknown_predictor_gets_the_closest_names(cli: Any, run: Path) -> None:
    code, _, err = cli("leap", run, "--method", "relexx", "--problems", 8)
    assert code == 2
    assert "did you mean 'relex'" in err


def test_a_verb_without_its_argument_is_a_usage_error(cli: Any) -> None:
    code, _, err = cli("train")
    assert code == 2
    assert "Missing argument" in err


@pytest.fixture(scope="module")
def foreign(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as torch's own distributed checkpoints, as another trainer would leave it."""
    import torch.distributed.checkpoint as dcp

    out = tmp_path_factory.mktemp("foreign")
    for step in (2, 4, 6):
        weights = load_file(run / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
        with warnings.catch_warnings():
            # Of no process group, of which there is none here.
            warnings.simplefilter("ignore")
            dcp.save({"model": weights}, checkpoint_id=out / f"step_{step}", no_dist=True)
    return out


def test_a_foreign_run_goes_all_the_way(cli: Any, run: Path, foreign: Path, tmp_path: Path) -> None:
    code, out, _ = cli("inspect", foreign, "--json")
    assert (code, json.loads(out)["layout"]) == (0, "torch distributed checkpoint")
    for source, directory in ((run, "ours"), (foreign, "theirs")):
        arguments = ("--base", "bundled:sums", "--out", tmp_path / directory, "--rank", 2, "--json")
        code, out, _ = cli("trajectory", source, *arguments)
        assert (code, json.loads(out)["steps"]) == (0, [2, 4, 6])
    for step in (2, 4, 6):
        ours, theirs = (load_file(tmp_path / name / f"step-{step:06d}.safetensors") for name in ("ours", "theirs"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key].nan_to_num(), theirs[key].nan_to_num()) for key in ours)
    scored = []
    for model in (run / "checkpoints" / "checkpoint-6", foreign / "step_6"):
        arguments = ("--task", "sums", "--base", "bundled:sums", "--problems", 8, "-k", 1, "--json")
        code, out, _ = cli("evaluate", model, *arguments)
        assert code == 0
        scored.append(next(iter(json.loads(out).values()))["avg"]["value"])
    assert scored[0] == scored[1]


def test_workers_and_spectra_are_what_was_asked(cli: Any, foreign: Path, tmp_path: Path) -> None:
    arguments = ("--base", "bundled:sums", "--workers", 2, "--spectra", "*layers.0*q_proj*", "--json")
    code, out, _ = cli("trajectory", foreign, "--out", tmp_path / "t" / "trajectory", *arguments)
    assert code == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    assert json.loads(out)["spectra"] == [name]
    spectra = load_file(tmp_path / "t" / "analysis" / "spectra.safetensors")
    step = load_file(tmp_path / "t" / "trajectory" / "step-000006.safetensors")
    torch.testing.assert_close(spectra[f"{name}|spectrum"][2, :4], step[f"{name}|sigma"], rtol=1e-4, atol=0)


def test_watch_records_and_lets_go(cli: Any, foreign: Path, tmp_path: Path) -> None:
    run = copy_of(foreign, tmp_path / "run")
    arguments = ("--base", "bundled:sums", "--once", "--settle", 0, "--delete", "--keep", 1, "--json")
    code, out, _ = cli("watch", run, *arguments)
    assert code == 0
    assert json.loads(out) == {"recorded": [2, 4, 6], "removed": [2, 4], "waiting": {}}
    assert sorted(path.name for path in run.iterdir()) == ["step_6", "trajectory"]
    assert json.loads(cli("watch", run, *arguments)[1])["recorded"] == []


def test_a_pickle_that_would_run_code_is_refused_and_named(cli: Any, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "run" / "step_1").mkdir(parents=True)
    torch.save({"w": torch.zeros(2, 2), "x": Planted()}, tmp_path / "run" / "step_1" / "pytorch_model.bin")
    code, _, error = cli("inspect", tmp_path / "run")
    assert code == 2
    assert "posix.system" in error
    assert "--trust-pickle" in error
    assert not (tmp_path / "ran").exists()
