"""A run directory: its steps in order, what is no checkpoint left out with a reason, its base found."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import PreTrainedModel

from rankleap.checkpoints import (
    AdapterCheckpoint,
    FullCheckpoint,
    base_of,
    bundled_bases,
    effective_weights,
    open_checkpoint,
    open_run,
    resolve_base,
)
from rankleap.errors import BaseMismatchError, CheckpointError, UnknownNameError
from rankleap.trajectory import run_trajectory


@pytest.fixture
def run(run_directory: Path, tmp_path: Path) -> Path:
    """A copy of the run that may be damaged."""
    return Path(shutil.copytree(run_directory, tmp_path / "run"))


def test_steps_come_in_the_order_of_their_numbers(run: Path) -> None:
    (run / "checkpoint-40").rename(run / "checkpoint-100")
    (run / "checkpoint-10").rename(run / "global_step_9")
    (run / "checkpoint-20").rename(run / "step-000020")
    opened = open_run(run)
    assert opened.steps == [9, 20, 30, 100]
    assert {checkpoint.kind for checkpoint in opened.checkpoints.values()} == {"full"}
    assert opened.skipped == {}


def test_checkpoints_may_lie_one_level_down(run_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(run_directory, tmp_path / "checkpoints")
    assert open_run(tmp_path).steps == [10, 20, 30, 40]


def test_what_only_looks_like_a_checkpoint_is_left_alone(run: Path) -> None:
    for name in ("ref", "tmp_checkpoint-50", "checkpoint-60-old", ".checkpoint-70.1a2b.aside", "runs"):
        shutil.copytree(run / "checkpoint-10", run / name)
    (run / "checkpoint-80").write_text("a file")
    opened = open_run(run)
    assert opened.steps == [10, 20, 30, 40]
    assert opened.skipped == {"tmp_checkpoint-50": "still being written, by its name"}


def test_the_reference_adapter_inside_a_checkpoint_is_no_checkpoint(
    save_adapter: Callable[..., PeftModel], tmp_path: Path
) -> None:
    save_adapter(tmp_path / "checkpoint-10")
    save_adapter(tmp_path / "checkpoint-10" / "ref", seed=1)
    opened = open_run(tmp_path)
    assert opened.steps == [10]
    assert opened.checkpoints[10].directory.name == "checkpoint-10"


def test_an_incomplete_checkpoint_is_skipped_with_its_reason(run: Path) -> None:
    (run / "checkpoint-20" / "model.safetensors").unlink()
    (run / "checkpoint-30" / "model.safetensors").write_bytes(b"half")
    (run / "checkpoint-50").mkdir()
    opened = open_run(run)
    assert opened.steps == [10, 40]
    assert "is no checkpoint that rankleap knows: found config.json" in opened.skipped["checkpoint-20"]
    assert "model.safetensors is truncated or damaged" in opened.skipped["checkpoint-30"]
    assert "found nothing" in opened.skipped["checkpoint-50"]


def test_a_step_that_is_there_twice_is_taken_once_and_said(run: Path) -> None:
    shutil.copytree(run / "checkpoint-20", run / "step_20")
    opened = open_run(run)
    assert opened.steps == [10, 20, 30, 40]
    assert opened.checkpoints[20].directory.name == "checkpoint-20"
    assert opened.skipped == {"step_20": "step 20 is here twice, checkpoint-20 was taken"}


def test_a_run_of_nothing_but_incomplete_steps_gives_every_reason(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*\n  checkpoint-10: .*found nothing"):
        open_run(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_run(tmp_path / "none")


def test_full_checkpoints_and_adapters_do_not_mix(run: Path, save_adapter: Callable[..., PeftModel]) -> None:
    save_adapter(run / "checkpoint-50")
    with pytest.raises(CheckpointError, match="mixes Hugging Face full and PEFT adapter checkpoints"):
        open_run(run)


def test_an_unknown_directory_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(CheckpointError, match=r"found weights\.gguf.*needed one of: .*model\.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "none")


def test_a_run_of_ours_names_its_base(run: Path, base_directory: Path) -> None:
    (run / "config.json").write_text(json.dumps({"model": {"base": str(base_directory)}}))
    name, base = base_of(open_run(run), None)
    assert (name, base.directory) == (str(base_directory), base_directory)


def test_adapters_name_their_base_also_beside_a_models_own_config(
    lora_run: Path, base_directory: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(lora_run, tmp_path / "run"))
    assert open_run(run).base_name() == str(base_directory)
    (run / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert open_run(run).base_name() == str(base_directory)


def test_a_run_that_names_no_base_asks_for_one(run: Path) -> None:
    with pytest.raises(CheckpointError, match="does not name its base; give it with --base"):
        base_of(open_run(run), None)


def test_a_bundled_base_opens_by_name() -> None:
    assert {"sums", "backward"} <= set(bundled_bases())
    for name in bundled_bases():
        assert FullCheckpoint(resolve_base(f"bundled:{name}")).shapes
    with pytest.raises(UnknownNameError, match="bundled base 'sum' does not exist; did you mean 'sums'"):
        resolve_base("bundled:sum")


@pytest.mark.parametrize("name", ["nobody/such-a-model", "not a name//at all"])
def test_a_base_that_is_nowhere_says_where_it_was_sought(name: str) -> None:
    with pytest.raises(CheckpointError, match="is no directory and could not be fetched from the Hub"):
        resolve_base(name)


def test_an_adapter_leaves_the_weights_that_it_does_not_hold(lora_run: Path, base_directory: Path) -> None:
    base, checkpoint = FullCheckpoint(base_directory), AdapterCheckpoint(lora_run / "checkpoint-20")
    weights = dict(effective_weights(checkpoint, base))
    assert weights.keys() == base.shapes.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, base.weight(name)) == (name not in checkpoint.shapes)


def write_tokens(directory: Path, tokens: dict[str, int]) -> None:
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": tokens}}))


def test_a_base_of_another_tokenizer_is_refused(run: Path, base_directory: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_directory, tmp_path / "base"))
    write_tokens(base, {"a": 0, "b": 1})
    write_tokens(run / "checkpoint-40", {"a": 0, "b": 1, "added": 2})
    assert base_of(open_run(run), str(base))[1].directory == base
    write_tokens(run / "checkpoint-40", {"b": 0, "a": 1})
    with pytest.raises(BaseMismatchError, match=r"2 of 2 tokens differ, such as 'a' \(0 in the base, 1 here\)"):
        base_of(open_run(run), str(base))


def test_a_directory_whose_name_and_state_disagree_is_left_out(run: Path) -> None:
    (run / "checkpoint-20" / "trainer_state.json").write_text('{"global_step": 20}')
    (run / "checkpoint-30" / "trainer_state.json").write_text('{"global_step": 25}')
    opened = open_run(run)
    assert opened.steps == [10, 20, 40]
    assert "its name says step 30, its trainer_state.json says 25" in opened.skipped["checkpoint-30"]


def test_a_step_without_a_name_is_told_by_its_state(run: Path) -> None:
    (run / "checkpoint-40" / "trainer_state.json").write_text('{"global_step": 40}')
    (run / "checkpoint-40").rename(run / "final")
    assert open_run(run).steps == [10, 20, 30, 40]


@pytest.mark.parametrize("name", ["iter_0000020", "epoch_19", "0020", "step20", "global_step20", "global_step20_hf"])
def test_every_trainers_names_tell_the_step(run: Path, name: str) -> None:
    (run / "checkpoint-20").rename(run / name)
    assert open_run(run).steps == [10, 20, 30, 40]


def test_one_checkpoint_given_itself_is_a_run_of_one_step(run: Path) -> None:
    assert open_run(run / "checkpoint-30").steps == [30]


@pytest.mark.parametrize(
    ("file", "content"),
    [("latest_checkpointed_iteration.txt", "30"), ("latest", "global_step30"), ("latest_ckpt_global_step.txt", "30\n")],
)
def test_steps_beyond_the_runs_own_mark_are_still_being_written(run: Path, file: str, content: str) -> None:
    (run / file).write_text(content)
    opened = open_run(run)
    assert opened.steps == [10, 20, 30]
    assert "30 is its newest complete step" in opened.skipped["checkpoint-40"]


def test_where_some_steps_are_marked_stable_the_others_are_not(run: Path) -> None:
    for step in (10, 20):
        (run / f"checkpoint-{step}" / "STABLE").touch()
    opened = open_run(run)
    assert opened.steps == [10, 20]
    assert "has the marker" in opened.skipped["checkpoint-30"] or "marker STABLE" in opened.skipped["checkpoint-30"]


def test_a_second_place_with_steps_is_told_and_left(run: Path, run_directory: Path) -> None:
    shutil.copytree(run_directory / "checkpoint-10", run / "broadcasts" / "step_5")
    opened = open_run(run)
    assert opened.steps == [5]
    assert "4 more step directories" in next(iter(opened.skipped.values()))


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything, so it steps down for a while."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


def test_what_this_user_may_not_read_is_said(run: Path) -> None:
    for path in (run, *run.parents[:3], *run.rglob("*")):
        path.chmod(0o755)
    (run / "checkpoint-20").chmod(0o000)
    (run / "checkpoint-30" / "model.safetensors").chmod(0o000)
    with as_nobody():
        opened = open_run(run)
    assert opened.steps == [10, 40]
    assert all("may not be read" in opened.skipped[name] for name in ("checkpoint-20", "checkpoint-30"))
    run.chmod(0o000)
    with as_nobody(), pytest.raises(CheckpointError, match="may not be read by this user"):
        open_run(run)
    run.chmod(0o755)


@given(position=st.integers(0, 2000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_header_is_told_or_harmless(run_directory: Path, position: int, bit: int) -> None:
    content = bytearray((run_directory / "checkpoint-10" / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[position % header] ^= 1 << bit
    base = FullCheckpoint(run_directory / "checkpoint-20")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "model.safetensors").write_bytes(content)
        try:
            run_trajectory(open_run(Path(directory)), base)
        except CheckpointError as error:
            assert directory in str(error)


def test_a_base_whose_weights_are_not_those_that_the_run_names_is_refused(
    lora_run: Path, base_directory: Path, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    opened = open_run(lora_run)
    assert opened.base_name() == str(base_directory)
    copy = shutil.copytree(base_directory, tmp_path / "copy")
    assert base_of(opened, str(copy))[0] == str(copy)
    make_model(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="whose weights are not those of"):
        base_of(opened, str(tmp_path / "other"))
