"""Several processes on gloo train what one trains: DDP, and FSDP2, which accelerate keeps for GPUs unless told otherwise."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

import sharded
from rankleap.checkpoints import FullCheckpoint, dense, open_checkpoint, resolve_base
from rankleap.errors import RecipeError
from rankleap.files import read_json, read_jsonl
from rankleap.training import train
from rankleap.training.build import trl_config
from rankleap.trajectory import RecordedTrajectory
from recipes import tiny

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
COSTS = ("_s", "_bytes")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def launch(config: str, *module: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    done = subprocess.run(
        [*accelerate, "--num_processes", "2", "--main_process_port", str(port), "-m", *module],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("alone")
    for method in sharded.METHODS:
        sharded.same_completions(out, method)
    return {method: read_json(out / f"{method}.json") for method in sharded.METHODS}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("together") / request.param
    out.mkdir()
    launch(request.param, "sharded", str(out))
    return out


@pytest.mark.parametrize("method", sharded.METHODS)
def test_two_processes_have_one_s_losses_gradients_and_rewards(
    together: Path, alone: dict[str, Any], method: str
) -> None:
    here, one = read_json(together / f"{method}.json"), alone[method]
    assert here["kind"] == {"ddp": "DistributedType.MULTI_CPU", "fsdp2": "DistributedType.FSDP"}[together.name]
    assert [row["reward"] for row in here["rows"]] == [row["reward"] for row in one["rows"]]
    assert len(one["rows"]) == sharded.STEPS and abs(one["rows"][1]["loss"]) > 1e-3
    for row, expected in zip(here["rows"], one["rows"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("method", sharded.METHODS)
def test_a_run_is_written_once_and_taken_up_again_exactly(together: Path, method: str) -> None:
    first, again = read_jsonl(together / method / "first.jsonl"), read_jsonl(together / method / "metrics.jsonl")
    assert [row["step"] for row in again] == list(range(1, sharded.STEPS + 1))
    for row, expected in zip(again, first, strict=True):
        assert {k: row[k] for k in row if not k.endswith(COSTS)} == {
            k: expected[k] for k in expected if not k.endswith(COSTS)
        }
    # A shard is no model that could be loaded again and compared.
    assert bool(read_json(together / method / "manifest.json")["round_trip"]) == (together.name == "ddp")


@pytest.mark.parametrize("method", sharded.METHODS)
def test_recorded_factors_are_those_of_the_checkpoint(together: Path, method: str) -> None:
    run, base = together / method, FullCheckpoint(resolve_base("bundled:sums"))
    saved = open_checkpoint(run / "checkpoints" / f"checkpoint-{sharded.STEPS}")
    name = "model.layers.0.self_attn.q_proj.weight"
    recorded_MN = dense(RecordedTrajectory(run / "trajectory").delta(name, sharded.STEPS))
    sigma = torch.linalg.svdvals(dense(saved.delta(name, base)))[:4]
    assert sigma[0] > 0
    torch.testing.assert_close(torch.linalg.svdvals(recorded_MN)[:4], sigma, rtol=1e-3, atol=1e-6)


def test_every_accelerate_config_is_one_that_accelerate_reads() -> None:
    kinds = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.glob("*.yaml")}
    found = {name: str(config.distributed_type).rpartition(".")[2] for name, config in kinds.items()}
    assert found == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert {name: kinds[name].deepspeed_config["zero_stage"] for name in ("zero2", "zero3")} == {"zero2": 2, "zero3": 3}
    fsdp = kinds["fsdp2"].fsdp_config
    assert (fsdp["fsdp_version"], fsdp["fsdp_state_dict_type"]) == (2, "SHARDED_STATE_DICT")


@pytest.mark.parametrize(("count", "micro", "expected"), [(1, None, (32, 1)), (2, None, (16, 1)), (4, 16, (4, 2))])
def test_processes_share_out_the_step(count: int, micro: int | None, expected: tuple[int, int], tmp_path: Path) -> None:
    config = trl_config(tiny(train__micro_batch=micro), tmp_path, count)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(
    ("count", "changes", "said"),
    [
        ("3", {}, "4 prompts cannot be shared out among 3 processes"),
        ("16", {"train__prompts_per_step": 16, "train__micro_batch": 8}, "8 completions cannot be shared out among 16"),
        ("2", {"leap": {"every": 1}}, "leap: not in 2 processes"),
        ("2", {"rollout": {"engine": "vllm-colocate", "tensor_parallel": 4}}, "4 must divide the 2 processes"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_its_numbers(
    count: str, changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(RecipeError, match=said):
        train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
