"""A leap is written whole or not at all, and says what it is made of."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from rankleap.checkpoints import AdapterCheckpoint, Delta, FullCheckpoint, LowRank, dense, load_weights, open_run
from rankleap.errors import BaseMismatchError, CheckpointError, InputError, NotFiniteError
from rankleap.files import read_json
from rankleap.leap import Leap, leap_weights, norm_ratio, open_source, write_leap, write_leap_adapter
from rankleap.predictors import get_predictor, read_forecast
from rankleap.trajectory import CheckpointTrajectory, RecordedTrajectory, Trajectory, recording_of, run_trajectory

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def base(base_directory: Path) -> FullCheckpoint:
    return FullCheckpoint(base_directory)


@pytest.fixture
def trajectory(run_directory: Path, base: FullCheckpoint) -> CheckpointTrajectory:
    return run_trajectory(open_run(run_directory), base)


def leap_of(trajectory: Trajectory, coefficient: float = 1.0, method: str = "window") -> Leap:
    return Leap(get_predictor(method).fit(trajectory), coefficient)


def path_of(memory_trajectory: Any, **deltas: Delta) -> Trajectory:
    """A straight path to each delta in two steps."""
    halves = {
        name: LowRank(d.left_MR / 2, d.right_RN) if isinstance(d, LowRank) else d / 2 for name, d in deltas.items()
    }
    return memory_trajectory((10, 20), {name: [halves[name], delta] for name, delta in deltas.items()})


@pytest.mark.parametrize("coefficient", [float("nan"), float("inf")])
def test_a_leap_that_is_not_finite_is_refused_by_name_and_nothing_is_left(
    trajectory: CheckpointTrajectory, base: FullCheckpoint, tmp_path: Path, coefficient: float
) -> None:
    leap = leap_of(trajectory, coefficient)
    with pytest.raises(NotFiniteError, match=r"weight of the new checkpoint has NaN or infinity; nothing was written"):
        write_leap(leap, base, tmp_path / "leap", {})
    with pytest.raises(NotFiniteError, match=r"weight of the new adapter has NaN or infinity; nothing was written"):
        write_leap_adapter(leap, base, tmp_path / "adapter", {}, rank=4, base_name="b")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_leap_leaves_the_one_before_it(
    trajectory: CheckpointTrajectory, base: FullCheckpoint, tmp_path: Path
) -> None:
    write_leap(leap_of(trajectory), base, tmp_path / "leap", {})
    before = FullCheckpoint(tmp_path / "leap").fingerprint()
    with pytest.raises(NotFiniteError):
        write_leap(leap_of(trajectory, math.nan), base, tmp_path / "leap", {})
    assert FullCheckpoint(tmp_path / "leap").fingerprint() == before
    assert [path.name for path in tmp_path.iterdir()] == ["leap"]


def test_the_manifest_says_how_the_leap_came_about(
    trajectory: CheckpointTrajectory, base: FullCheckpoint, tmp_path: Path
) -> None:
    leap = Leap(get_predictor("window").fit(trajectory), 0.5, step=100)
    write_leap(leap, base, tmp_path / "leap", {"gate": {"accepted": True}, "base": "b"})
    manifest = read_json(tmp_path / "leap" / "manifest.json")
    assert manifest["made_by"] == "leap"
    assert manifest["rounding_loss"] == 0
    assert (manifest["gate"], manifest["base"]) == ({"accepted": True}, "b")
    facts = ("method", "origin", "coefficient", "from_step", "target_step")
    assert [manifest["leap"][fact] for fact in facts] == ["window", "last", 0.5, 40, 100]
    again = read_forecast(manifest["leap"]["forecast"], trajectory)
    assert torch.equal(dense(again.delta(UP, 100, 0.5)), dense(leap.delta(UP)))


def test_a_leap_is_named_after_its_step_and_coefficient(trajectory: CheckpointTrajectory) -> None:
    assert leap_of(trajectory, 1.5).directory_name() == "step-000040-c1.50"


def test_a_leap_from_an_adapter_run_leaves_all_else_to_the_base(lora_run: Path, base: FullCheckpoint) -> None:
    trajectory = run_trajectory(open_run(lora_run), base)
    for name, weight in leap_weights(leap_of(trajectory), base):
        assert torch.equal(weight, base.weight(name)) == (name not in trajectory.shapes)


@pytest.mark.parametrize(("coefficient", "expected"), [(0.0, 1.0), (1.0, 1.5), (2.0, 2.0), (-1.0, 0.5)])
def test_the_norm_ratio_is_over_all_tensors(memory_trajectory: Any, coefficient: float, expected: float) -> None:
    deltas: dict[str, Delta] = {
        "a": torch.ones(3, 2),
        "b": LowRank(torch.ones(4, 1), torch.ones(1, 2)),
        "c": torch.ones(5),
    }
    assert norm_ratio(leap_of(path_of(memory_trajectory, **deltas), coefficient)) == pytest.approx(expected)


def test_the_norm_ratio_of_a_run_that_stands_still(memory_trajectory: Any) -> None:
    assert norm_ratio(leap_of(memory_trajectory((10, 20), {"w": [torch.zeros(2), torch.zeros(2)]}))) == 1
    assert norm_ratio(leap_of(memory_trajectory((10, 20), {"w": [torch.ones(2), torch.zeros(2)]}))) == math.inf


def test_an_adapter_counts_what_it_cannot_hold(memory_trajectory: Any, base: FullCheckpoint, tmp_path: Path) -> None:
    held, wide = torch.diag(torch.tensor([3.0, 1.0, 0.0])), torch.zeros(48, 32)
    wide[:3, :3] = held
    deltas: dict[str, Delta] = {
        UP: wide,
        "model.embed_tokens.weight": torch.full((64, 32), 1 / 64),
        "lm_head.weight": torch.full((64, 32), 1 / 64),
        "model.norm.weight": torch.full((32,), 1 / 8),
    }
    leap = leap_of(path_of(memory_trajectory, **deltas), 0.0)
    write_leap_adapter(leap, base, tmp_path / "a", {}, rank=1, base_name="b")
    assert set(AdapterCheckpoint(tmp_path / "a").shapes) == {UP}
    lost = 1 + 2 * 0.5 + 0.5
    assert read_json(tmp_path / "a" / "manifest.json")["energy_kept"] == pytest.approx(9 / (9 + lost))


def test_an_adapter_leaves_out_what_did_not_move(memory_trajectory: Any, base: FullCheckpoint, tmp_path: Path) -> None:
    still = "model.layers.1.mlp.up_proj.weight"
    for empty in (LowRank(torch.zeros(48, 0), torch.zeros(0, 32)), torch.zeros(48, 32)):
        leap = leap_of(path_of(memory_trajectory, **{UP: torch.ones(48, 32), still: empty}))
        write_leap_adapter(leap, base, tmp_path / "a", {}, rank=4, base_name="b")
        assert set(AdapterCheckpoint(tmp_path / "a").shapes) == {UP}


def test_a_leap_that_an_adapter_cannot_hold_at_all_is_refused(
    memory_trajectory: Any, base: FullCheckpoint, tmp_path: Path
) -> None:
    path = path_of(memory_trajectory, **{"model.norm.weight": torch.ones(32), UP: torch.zeros(48, 32)})
    with pytest.raises(InputError, match="moves no matrix of a linear layer"):
        write_leap_adapter(leap_of(path), base, tmp_path / "a", {}, rank=4, base_name="b")
    assert list(tmp_path.iterdir()) == []


def test_a_source_is_exact_where_there_are_checkpoints(lora_run: Path, base_directory: Path) -> None:
    source = open_source(lora_run, None)
    assert isinstance(source.trajectory, CheckpointTrajectory)
    assert source.base_name == str(base_directory)
    assert open_source(lora_run, None, until=25).trajectory.steps == (10, 20)


def test_a_source_without_checkpoints_is_its_recording(
    lora_run: Path, base_directory: Path, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    recording, exact = recording_of(open_run(lora_run), None, tmp_path / "run" / "trajectory", 4)
    for step in exact.steps:
        recording.add(step, ((name, exact.delta(name, step)) for name in exact.shapes))
    for directory in (tmp_path / "run", tmp_path / "run" / "trajectory"):
        source = open_source(directory, None, until=30)
        assert isinstance(source.trajectory, RecordedTrajectory)
        assert source.trajectory.steps == (10, 20, 30)
        assert source.base.directory == base_directory
    make_model(seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="name the right base"):
        open_source(tmp_path / "run", str(tmp_path / "other"))


def test_damaged_checkpoints_are_not_passed_over_for_a_recording(lora_run: Path, tmp_path: Path) -> None:
    shutil.copytree(lora_run, tmp_path / "checkpoints")
    recording, exact = recording_of(open_run(tmp_path), None, tmp_path / "trajectory", 4)
    recording.add(10, ((name, exact.delta(name, 10)) for name in exact.shapes))
    for weights in (tmp_path / "checkpoints").rglob("*.safetensors"):
        weights.write_bytes(b"half")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_source(tmp_path, None)


def test_a_weight_that_the_live_model_lacks_is_named(base: FullCheckpoint, base_directory: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base_directory)
    with pytest.raises(CheckpointError, match=r"layers\.0\.experts\.0\.weight"):
        load_weights(model, [("layers.0.experts.0.weight", torch.ones(2))])


def test_an_adapter_leap_goes_on_from_where_the_adapters_were(
    lora_run: Path, base: FullCheckpoint, weights_of: Callable[[torch.nn.Module], dict[str, Tensor]], tmp_path: Path
) -> None:
    trajectory = run_trajectory(open_run(lora_run), base)
    leap = leap_of(trajectory, 0.0)
    write_leap_adapter(leap, base, tmp_path / "a", {}, rank=4, base_name=str(base.directory))
    live = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base.directory), str(lora_run / "checkpoint-40"))
    merged = weights_of(live.merge_and_unload())
    written = AdapterCheckpoint(tmp_path / "a")
    for name in written.shapes:
        torch.testing.assert_close(written.weight(name, base), merged[name], atol=1e-6, rtol=0)
