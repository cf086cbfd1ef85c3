"""Every leap on disk: it loads where it belongs, and differs from its origin by exactly the forecast."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, dense, load_weights, open_run
from rankleap.files import read_json
from rankleap.leap import Leap, leap_weights, write_leap, write_leap_adapter
from rankleap.predictors import PREDICTORS, get_predictor
from rankleap.trajectory import RecordedTrajectory, Trajectory, recording_of, run_trajectory

WeightsOf = Callable[[torch.nn.Module], dict[str, Tensor]]
SCORES = {10: 0.2, 20: 0.3, 30: 0.45, 40: 0.5}
each_predictor = pytest.mark.parametrize("name", PREDICTORS)


@pytest.fixture(scope="module")
def base(base_directory: Path) -> FullCheckpoint:
    return FullCheckpoint(base_directory)


@pytest.fixture(scope="module", params=["full", "lora", "recorded"])
def trajectory(
    request: pytest.FixtureRequest,
    run_directory: Path,
    lora_run: Path,
    base: FullCheckpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trajectory:
    run = open_run(lora_run if request.param == "lora" else run_directory)
    if request.param != "recorded":
        return run_trajectory(run, base)
    recording, exact = recording_of(run, str(base.directory), tmp_path_factory.mktemp("recorded"), 3)
    for step in exact.steps:
        recording.add(step, ((name, exact.delta(name, step)) for name in exact.shapes))
    return RecordedTrajectory(recording.directory)


@each_predictor
def test_a_full_leap_loads_in_transformers_and_is_base_plus_forecast_to_the_bit(
    name: str, trajectory: Trajectory, base: FullCheckpoint, weights_of: WeightsOf, tmp_path: Path
) -> None:
    leap = Leap(get_predictor(name, scores=SCORES).fit(trajectory), coefficient=1.5)
    out = write_leap(leap, base, tmp_path / "leap", {"gate": {"accepted": True}})
    loaded = weights_of(AutoModelForCausalLM.from_pretrained(out))
    assert loaded.keys() == base.shapes.keys()
    for tensor, weight in loaded.items():
        start = base.weight(tensor)
        expected = start + dense(leap.delta(tensor)) if tensor in trajectory.shapes else start
        assert torch.equal(weight, expected), tensor


@pytest.mark.parametrize("name", ["window", "relex"])  # one of each origin
def test_a_full_leap_with_coefficient_zero_is_its_origin(
    name: str, trajectory: Trajectory, base: FullCheckpoint, tmp_path: Path
) -> None:
    leap = Leap(get_predictor(name, scores=SCORES).fit(trajectory), coefficient=0.0)
    written = FullCheckpoint(write_leap(leap, base, tmp_path / "leap", {}))
    for tensor in base.shapes:
        moved = tensor in trajectory.shapes and leap.forecast.origin == "last"
        origin = base.weight(tensor) + (dense(trajectory.delta(tensor, trajectory.steps[-1])) if moved else 0)
        assert torch.equal(written.weight(tensor), origin)


def test_the_live_model_and_the_written_leap_are_the_same(
    trajectory: Trajectory, base: FullCheckpoint, weights_of: WeightsOf, tmp_path: Path
) -> None:
    leap = Leap(get_predictor("window").fit(trajectory), coefficient=0.7)
    model = LlamaForCausalLM.from_pretrained(base.directory)
    load_weights(model, leap_weights(leap, base))
    written = FullCheckpoint(write_leap(leap, base, tmp_path / "leap", {}))
    for tensor, weight in weights_of(model).items():
        assert torch.equal(weight, written.weight(tensor))


@pytest.mark.parametrize(("name", "rank"), [*((name, 2) for name in PREDICTORS), ("window", 64)])
def test_an_adapter_leap_loads_in_peft_and_is_the_best_of_its_rank(
    name: str, rank: int, trajectory: Trajectory, base: FullCheckpoint, weights_of: WeightsOf, tmp_path: Path
) -> None:
    leap = Leap(get_predictor(name, scores=SCORES).fit(trajectory), coefficient=1.5)
    out = write_leap_adapter(leap, base, tmp_path / "leap", {}, rank=rank, base_name=str(base.directory))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.directory), str(out))
    merged, held = weights_of(model.merge_and_unload()), AdapterCheckpoint(out)
    kept = total = 0.0
    for tensor in base.shapes:
        delta = dense(leap.delta(tensor)) if tensor in trajectory.shapes else torch.zeros(base.shapes[tensor])
        best = torch.zeros_like(delta)
        if tensor in held.shapes:
            left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
            best = (left[:, :rank] * sigma[:rank]) @ right[:rank]
        torch.testing.assert_close(merged[tensor], base.weight(tensor) + best, atol=2e-5, rtol=0)
        kept, total = kept + float(best.double().square().sum()), total + float(delta.double().square().sum())
    linear = {t for t, shape in trajectory.shapes.items() if "layers" in t and len(shape) == 2}
    assert set(held.shapes) == linear
    assert read_json(out / "manifest.json")["energy_kept"] == pytest.approx(kept / total, rel=1e-4)
