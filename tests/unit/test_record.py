"""Factors of a run, written and read back: exact where the rank suffices, never half-written, never of two bases."""

import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from rankleap.checkpoints import Delta, DeltaRows, FullCheckpoint, LowRank, dense, open_run
from rankleap.errors import BaseMismatchError, CheckpointError, DiskSpaceError, NotFiniteError, TrajectoryError
from rankleap.files import read_json
from rankleap.lowrank import Workspace, factorise
from rankleap.trajectory import (
    RecordedTrajectory,
    Recording,
    Trajectory,
    open_recording,
    record_step,
    recording_of,
    unseparated,
)
from rankleap.trajectory.path import read_factors, step_file
from rankleap.trajectory.record import parts_of


def deltas_at(trajectory: Trajectory, step: int) -> Iterator[tuple[str, Delta]]:
    return ((name, trajectory.delta(name, step)) for name in trajectory.shapes)


def record(run: Path, base: Path, out: Path, rank: int) -> tuple[Recording, Trajectory]:
    recording, trajectory = recording_of(open_run(run), str(base), out, rank)
    for step in trajectory.steps:
        recording.add(step, deltas_at(trajectory, step))
    return recording, trajectory


def test_a_lora_run_recorded_at_its_own_rank_is_exact(lora_run: Path, base_directory: Path, tmp_path: Path) -> None:
    _, exact = record(lora_run, base_directory, tmp_path, rank=4)
    recorded = RecordedTrajectory(tmp_path)
    assert recorded.steps == exact.steps
    assert recorded.shapes == exact.shapes
    for name in exact.shapes:
        for step in exact.steps:
            read, expected = recorded.delta(name, step), dense(exact.delta(name, step))
            assert isinstance(read, LowRank)
            torch.testing.assert_close(dense(read), expected, atol=1e-6, rtol=0)


def test_a_full_run_keeps_the_best_of_each_matrix_and_vectors_whole(
    run_directory: Path, base_directory: Path, tmp_path: Path
) -> None:
    recording, exact = record(run_directory, base_directory, tmp_path, rank=3)
    recorded = RecordedTrajectory(tmp_path)
    for name, shape in exact.shapes.items():
        read, expected = recorded.delta(name, 40), dense(exact.delta(name, 40))
        if len(shape) == 1:
            assert torch.equal(dense(read), expected)
            continue
        left, sigma, right = torch.linalg.svd(expected)
        best = (left[:, :3] * sigma[:3]) @ right[:3]
        torch.testing.assert_close(dense(read), best, atol=1e-5, rtol=0)
    assert all(path.stat().st_size < recording.size_bytes() + 14_000 for path in tmp_path.glob("step-*"))


def test_the_certificate_and_the_norms_are_kept(run_directory: Path, base_directory: Path, tmp_path: Path) -> None:
    _, exact = record(run_directory, base_directory, tmp_path, rank=2)
    name = "model.layers.1.mlp.down_proj.weight"
    kept, factors = read_factors(step_file(tmp_path, 40), name), factorise(exact.delta(name, 40), 2)
    assert torch.equal(kept["residual"], factors.residual_R)
    assert torch.equal(kept["sigma"], factors.sigma_R)
    assert kept["norms"].tolist() == pytest.approx([factors.norm, factors.nuclear])
    assert factors.norm == pytest.approx(float(dense(exact.delta(name, 40)).norm()), rel=1e-5)


def test_what_did_not_move_is_left_out_and_read_as_zero(base_directory: Path, tmp_path: Path) -> None:
    base = FullCheckpoint(base_directory)
    recording = open_recording(tmp_path, str(base_directory), base, 2, base.shapes)
    moved = "model.layers.0.mlp.up_proj.weight"
    recording.add(5, ((n, torch.ones(s) if n == moved else torch.zeros(s)) for n, s in base.shapes.items()))
    recorded = RecordedTrajectory(tmp_path)
    for name, shape in base.shapes.items():
        delta = recorded.delta(name, 5)
        assert tuple(delta.shape) == shape
        assert isinstance(delta, LowRank) == (len(shape) == 2)
        torch.testing.assert_close(dense(delta), torch.full(shape, float(name == moved)))
    assert step_file(tmp_path, 5).stat().st_size < 10_000


def test_the_index_names_a_step_only_once_its_file_is_whole(base_directory: Path, tmp_path: Path) -> None:
    base = FullCheckpoint(base_directory)
    recording = open_recording(tmp_path, "b", base, 2, base.shapes)
    recording.add(10, ((name, torch.ones(shape)) for name, shape in base.shapes.items()))

    def breaks() -> Iterator[tuple[str, Delta]]:
        yield "model.norm.weight", torch.ones(32)
        raise NotFiniteError("the second tensor")

    for step in (10, 20):
        with pytest.raises(NotFiniteError):
            recording.add(step, breaks())
    assert recording.steps() == [10]
    assert {path.name for path in tmp_path.iterdir()} == {"index.json", "step-000010.safetensors"}
    assert dense(RecordedTrajectory(tmp_path).delta("lm_head.weight", 10)).any()


def test_a_step_recorded_again_is_replaced_and_any_order_will_do(base_directory: Path, tmp_path: Path) -> None:
    base = FullCheckpoint(base_directory)
    recording = open_recording(tmp_path, "b", base, 2, ["model.norm.weight"])
    for step, value in ((20, 1.0), (10, 2.0), (20, 3.0)):
        recording.add(step, [("model.norm.weight", torch.full((32,), value))])
    recorded = RecordedTrajectory(tmp_path)
    assert recorded.steps == (10, 20)
    assert [float(dense(delta)[0]) for delta in recorded.deltas("model.norm.weight")] == [2.0, 3.0]


def test_a_resumed_run_forgets_the_steps_that_it_will_take_again(base_directory: Path, tmp_path: Path) -> None:
    base = FullCheckpoint(base_directory)
    recording = open_recording(tmp_path, "b", base, 2, ["model.norm.weight"])
    recording.keep_until(0)
    assert list(tmp_path.iterdir()) == []
    for step in (10, 20, 30):
        recording.add(step, [("model.norm.weight", torch.full((32,), float(step)))])
    recording.keep_until(20)
    assert recording.steps() == [10, 20]
    assert RecordedTrajectory(tmp_path).steps == (10, 20)
    recording.keep_until(15)
    recording.add(20, [("model.norm.weight", torch.ones(32))])
    assert float(dense(RecordedTrajectory(tmp_path).delta("model.norm.weight", 20))[0]) == 1.0


def test_the_past_of_a_recording(lora_run: Path, base_directory: Path, tmp_path: Path) -> None:
    record(lora_run, base_directory, tmp_path, rank=1)
    recorded = RecordedTrajectory(tmp_path)
    assert recorded.until(25).steps == (10, 20)
    with pytest.raises(TrajectoryError, match="no checkpoint up to step 5"):
        recorded.until(5)


def test_one_directory_holds_one_base_one_rank_and_one_set_of_tensors(
    lora_run: Path, base_directory: Path, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    recording, exact = record(lora_run, base_directory, tmp_path / "t", rank=2)
    before = step_file(tmp_path / "t", 20).read_bytes()
    base = FullCheckpoint(base_directory)
    make_model(seed=7).save_pretrained(tmp_path / "other")
    other = FullCheckpoint(tmp_path / "other")
    names = list(exact.shapes)
    for said, another in {
        "recorded with fingerprint": open_recording(tmp_path / "t", "b", other, 2, names),
        "recorded with rank 2, now it is 3": open_recording(tmp_path / "t", "b", base, 3, names),
        "recorded with other tensors": open_recording(tmp_path / "t", "b", base, 2, names[1:]),
    }.items():
        with pytest.raises(TrajectoryError, match=said):
            another.steps()
        with pytest.raises(TrajectoryError, match=said):
            another.add(20, [(names[1], torch.ones(exact.shapes[names[1]]))])
    assert recording.steps() == [10, 20, 30, 40]
    assert step_file(tmp_path / "t", 20).read_bytes() == before


def test_another_base_of_the_same_shapes_is_refused(
    lora_run: Path, base_directory: Path, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    record(lora_run, base_directory, tmp_path / "t", rank=2)
    recorded = RecordedTrajectory(tmp_path / "t")
    recorded.require_base(FullCheckpoint(base_directory))
    make_model(seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(
        BaseMismatchError, match=rf"was recorded since {base_directory}, whose weights are not those of"
    ):
        recorded.require_base(FullCheckpoint(tmp_path / "other"))
    make_model(intermediate_size=40).save_pretrained(tmp_path / "smaller")
    with pytest.raises(BaseMismatchError, match="in the checkpoint"):
        recorded.require_base(FullCheckpoint(tmp_path / "smaller"))


def test_a_damaged_step_is_named(lora_run: Path, base_directory: Path, tmp_path: Path) -> None:
    _, exact = record(lora_run, base_directory, tmp_path, rank=2)
    step_file(tmp_path, 20).write_bytes(b"half")
    recorded = RecordedTrajectory(tmp_path)
    name = next(iter(exact.shapes))
    assert dense(recorded.delta(name, 10)).any()
    with pytest.raises(CheckpointError, match=r"step-000020\.safetensors is truncated or damaged"):
        recorded.delta(name, 20)


def test_a_disk_that_is_too_small_is_said_before_writing(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "t", "b", "f", rank=4, shapes={"w": (10**9, 10**9)})
    assert recording.size_bytes() > 4 * 4 * 2 * 10**9
    with pytest.raises(DiskSpaceError):
        Recording(tmp_path / "t", "b", "f", rank=10**6, shapes={"w": (10**9, 10**9)}).add(10, [])
    assert not (tmp_path / "t").exists()


def test_the_index_says_what_it_was_made_from(lora_run: Path, base_directory: Path, tmp_path: Path) -> None:
    record(lora_run, base_directory, tmp_path, rank=2)
    index = read_json(tmp_path / "index.json")
    assert (index["format"], index["base"], index["rank"]) == (1, str(base_directory), 2)
    assert index["fingerprint"] == FullCheckpoint(base_directory).fingerprint()


def moe_checkpoint(directory: Path, scale: float) -> FullCheckpoint:
    """One fused tensor of three experts, the second of which never moves, and a router."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    start_EMN, drift_EMN = (torch.randn(3, 20, 12, generator=generator) for _ in range(2))
    drift_EMN[1] = 0
    tensors = {
        "experts.down_proj": start_EMN + scale * drift_EMN,
        "router.weight": torch.randn(3, 12, generator=generator),
    }
    save_file(tensors, directory / "model.safetensors")
    return FullCheckpoint(directory)


def test_fused_experts_are_recorded_each_on_its_own(tmp_path: Path) -> None:
    base = moe_checkpoint(tmp_path / "base", 0.0)
    for step in (1, 2):
        moe_checkpoint(tmp_path / "run" / f"checkpoint-{step}", float(step))
    recording, exact = recording_of(open_run(tmp_path / "run"), str(base.directory), tmp_path / "t", 12)
    for step in (1, 2):
        record_step(recording, exact, step)
    recorded = RecordedTrajectory(tmp_path / "t")
    for step in (1, 2):
        delta = recorded.delta("experts.down_proj", step)
        assert isinstance(delta, LowRank)
        assert delta.shape == (3, 20, 12)
        torch.testing.assert_close(dense(delta), exact.delta("experts.down_proj", step), atol=1e-5, rtol=0)
    assert dense(recorded.delta("router.weight", 2)).any() == False  # noqa: E712
    gram_TT = recorded.gram("experts.down_proj")
    torch.testing.assert_close(gram_TT, exact.gram("experts.down_proj"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_steps_are_recorded_the_same_by_however_many_workers(
    run_directory: Path, base_directory: Path, tmp_path: Path, workers: int
) -> None:
    _, exact = record(run_directory, base_directory, tmp_path / "one", rank=2)
    recording, path = recording_of(open_run(run_directory), str(base_directory), tmp_path / "many", 2)
    record_step(recording, path, 10, workers)
    one, many = RecordedTrajectory(tmp_path / "one"), RecordedTrajectory(tmp_path / "many")
    assert many.steps == (10,)
    for name in exact.shapes:
        torch.testing.assert_close(dense(many.delta(name, 10)), dense(one.delta(name, 10)), atol=1e-6, rtol=0)


def test_a_direction_that_is_one_of_several_is_told(base_directory: Path, tmp_path: Path) -> None:
    base = FullCheckpoint(base_directory)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    recording = open_recording(tmp_path, "b", base, 1, names)
    clear = torch.outer(torch.arange(48.0), torch.arange(32.0))
    recording.add(10, [(names[0], torch.eye(48, 32)), (names[1], clear)])
    assert unseparated(recording, 10) == names[:1]


def test_a_disk_that_fills_up_while_writing_loses_nothing(base_directory: Path, tmp_path: Path) -> None:
    base = FullCheckpoint(base_directory)
    recording = open_recording(tmp_path, "b", base, 2, ["model.norm.weight"])
    recording.add(10, [("model.norm.weight", torch.ones(32))])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        with pytest.raises(DiskSpaceError, match=r"cannot write .*step-000020\.safetensors"):
            recording.add(20, [("model.norm.weight", torch.ones(32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert RecordedTrajectory(tmp_path).steps == (10,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "step-000010.safetensors"]


def test_a_step_starts_from_the_directions_of_the_step_before(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 400, generator=generator)
    sides = (torch.nn.functional.normalize(torch.randn(side, generator=generator), dim=0) for side in (500, 400))
    delta = noise + 1.1 * (500**0.5 + 400**0.5) * torch.outer(*sides)
    reads: list[int] = []

    def rows(expert: int | None, out: torch.Tensor | None) -> Iterator[torch.Tensor]:
        reads.append(1)
        yield from delta.split(100)

    again = Workspace(limit_bytes=0)  # each pass reads, so that passes can be counted
    cold = parts_of("w", DeltaRows(delta.shape, rows), 1, None, again)
    passes = len(reads)
    save_file(cold, tmp_path / "before.safetensors")
    parts_of("w", DeltaRows(delta.shape, rows), 1, tmp_path / "before.safetensors", again)
    assert len(reads) - passes < 0.8 * passes
