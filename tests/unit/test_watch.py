"""Watching: what is complete is recorded, and nothing is let go before that."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rankleap.errors import CheckpointError
from rankleap.trajectory import RecordedTrajectory
from rankleap.trajectory.record import Watch, open_recording, require_recorded, sweep

LONG_AGO = time.time() - 1000


def settled(directory: Path) -> Path:
    for path in (directory, *directory.rglob("*")):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return directory


def arrive(run: Path, step: int, directory: Path) -> Path:
    return settled(Path(shutil.copytree(run / f"checkpoint-{step}", directory / f"checkpoint-{step}")))


@pytest.fixture
def watch(base_directory: Path, tmp_path: Path) -> Watch:
    (tmp_path / "run").mkdir()
    return Watch(tmp_path / "run", tmp_path / "trajectory", str(base_directory), 2, settle_s=60, keep=None)


def test_checkpoints_are_recorded_as_they_come(watch: Watch, run_directory: Path) -> None:
    assert "no complete checkpoint" in sweep(watch).waiting[str(watch.directory)]
    for count, step in enumerate((10, 20, 30), start=1):
        arrive(run_directory, step, watch.directory)
        looked = sweep(watch)
        assert looked.recorded == [step]
        assert len(looked.steps) == count
    assert sweep(watch).recorded == []
    assert RecordedTrajectory(watch.out).steps == (10, 20, 30)
    assert len(list(watch.directory.iterdir())) == 3


def test_a_checkpoint_that_still_changes_is_waited_for(watch: Watch, run_directory: Path) -> None:
    checkpoint = arrive(run_directory, 10, watch.directory)
    (checkpoint / "optimizer.pt").write_bytes(b"being written")
    looked = sweep(watch)
    assert looked.recorded == []
    assert "needed 60 s of rest" in looked.waiting["checkpoint-10"]
    settled(checkpoint)
    assert sweep(watch).recorded == [10]


def test_only_what_is_recorded_and_not_among_the_newest_goes(watch: Watch, run_directory: Path) -> None:
    keeping = replace(watch, keep=1)
    for step in (10, 20, 30):
        arrive(run_directory, step, watch.directory)
    half = arrive(run_directory, 40, watch.directory)
    (half / "model.safetensors").write_bytes(b"half")
    looked = sweep(keeping)
    assert looked.recorded == [10, 20, 30]
    assert looked.released == [10, 20]
    assert {path.name for path in watch.directory.iterdir()} == {"checkpoint-30", "checkpoint-40"}
    assert "truncated" in looked.waiting["checkpoint-40"]
    # What has gone is still known.
    assert sweep(keeping).steps == [10, 20, 30]


def test_without_being_asked_nothing_goes(watch: Watch, run_directory: Path) -> None:
    for step in (10, 20, 30):
        arrive(run_directory, step, watch.directory)
    assert sweep(watch).released == []
    assert len(list(watch.directory.iterdir())) == 3


def test_a_step_whose_factors_cannot_be_read_keeps_its_checkpoint(watch: Watch, run_directory: Path) -> None:
    for step in (10, 20):
        arrive(run_directory, step, watch.directory)
    sweep(watch)
    (watch.out / "step-000010.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="step-000010"):
        sweep(replace(watch, keep=1))
    assert (watch.directory / "checkpoint-10" / "model.safetensors").exists()


def test_a_removal_that_was_cut_short_is_finished(watch: Watch, run_directory: Path) -> None:
    arrive(run_directory, 10, watch.directory).rename(watch.directory / ".checkpoint-10.released")
    arrive(run_directory, 20, watch.directory)
    looked = sweep(watch)
    assert looked.recorded == [20]
    assert {path.name for path in watch.directory.iterdir()} == {"checkpoint-20"}


def test_a_step_that_is_not_recorded_is_said_to_be_missing(watch: Watch, run_directory: Path) -> None:
    from rankleap.checkpoints import FullCheckpoint
    from rankleap.errors import TrajectoryError

    arrive(run_directory, 10, watch.directory)
    sweep(watch)
    base = FullCheckpoint(Path(str(watch.base)))
    recording = open_recording(watch.out, str(watch.base), base, 2, base.shapes)
    require_recorded(recording, 10)
    with pytest.raises(TrajectoryError, match="does not list step 20"):
        require_recorded(recording, 20)
