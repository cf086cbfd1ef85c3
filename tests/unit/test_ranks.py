"""Shards that FSDP saved rank by rank, as verl, EasyR1 and SkyRL do."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rankleap.checkpoints import AdapterCheckpoint, FullCheckpoint, effective_weights, open_checkpoint
from rankleap.checkpoints.layouts import layout_of
from rankleap.checkpoints.pickled import torch_files
from rankleap.checkpoints.ranks import rank_files
from rankleap.errors import CheckpointError
from writers.verl import LORA_META, TINY, Tiny, write_tiny, write_verl_lora


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny(directory)
    return directory


@pytest.fixture(scope="module")
def lora(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("lora-ranks")
    return directory, write_verl_lora(directory, base_directory)


@pytest.fixture
def damaged(tiny: Path, tmp_path: Path) -> Callable[[str], Path]:
    """``damaged(name)``: a copy that a test may damage."""
    return lambda name: Path(shutil.copytree(tiny / name, tmp_path / name))


def rank_file(directory: Path, rank: int) -> Path:
    return directory / f"model_world_size_4_rank_{rank}.pt"


@pytest.mark.parametrize("kind", TINY)
def test_the_shards_are_put_together_to_the_model(tiny: Path, kind: str) -> None:
    checkpoint = open_checkpoint(tiny / kind)
    assert isinstance(checkpoint, FullCheckpoint)
    expected = {name: weight.detach() for name, weight in Tiny().named_parameters()}
    # FSDP1 saves the tied head as a copy and FSDP2 as a view; either way it is counted once.
    assert checkpoint.shapes == {name: tuple(weight.shape) for name, weight in expected.items()}
    assert set(checkpoint.dtypes.values()) == {"F32"}
    assert checkpoint.size_bytes() == sum(rank_file(tiny / kind, rank).stat().st_size for rank in range(4))
    for name, weight in expected.items():
        assert torch.equal(checkpoint.tensor(name), weight)
        for first in range(len(weight) + 1):
            for stop in range(first, len(weight) + 2):
                assert torch.equal(checkpoint.tensor(name, slice(first, stop)), weight[first:stop])
        assert torch.equal(checkpoint.tensor(name, slice(-1, None)), weight[-1:])


@pytest.mark.parametrize(("kind", "shape"), [("plain", (3, 2)), ("replicated", (3, 2)), ("empty", (0, 3))])
def test_what_every_rank_has_whole_is_read_once(tiny: Path, kind: str, shape: tuple[int, ...]) -> None:
    source = rank_files(tiny / kind)
    assert source.shapes == {kind: shape}
    assert torch.equal(source.read(kind), torch.arange(6.0).view(3, 2)[: shape[0]].reshape(shape))


@pytest.mark.parametrize(
    ("kind", "placed"), [("partial", "Partial"), ("both-sides", "Shard, Shard"), ("outer", "Shard, Repl")]
)
def test_another_placement_is_refused_by_its_name(tiny: Path, kind: str, placed: str) -> None:
    with pytest.raises(CheckpointError, match=f"{kind} in .* is placed as {placed}"):
        rank_files(tiny / kind)


def test_only_the_ranks_that_hold_the_rows_are_read(damaged: Callable[[str], Path]) -> None:
    directory = damaged("fsdp2")
    source = rank_files(directory)
    for rank in (0, 2, 3):
        rank_file(directory, rank).unlink()
    expected = Tiny().embed_tokens.weight.detach()
    assert torch.equal(source.read("embed_tokens.weight", slice(2, 4)), expected[2:4])
    with pytest.raises(CheckpointError, match=r"rank_2\.pt does not exist"):
        source.read("embed_tokens.weight", slice(3, 5))


def test_a_missing_rank_is_named(damaged: Callable[[str], Path]) -> None:
    directory = damaged("fsdp2")
    rank_file(directory, 2).unlink()
    with pytest.raises(CheckpointError, match=r"lacks model_world_size_4_rank_2\.pt; the checkpoint is incomplete"):
        open_checkpoint(directory)


def test_of_two_saves_in_one_directory_the_one_that_the_config_names_is_read(damaged: Callable[[str], Path]) -> None:
    directory = damaged("fsdp2")
    torch.save({"old": torch.ones(2)}, directory / "model_world_size_1_rank_0.pt")
    with pytest.raises(CheckpointError, match="1 and of 4 ranks"):
        open_checkpoint(directory)
    (directory / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 4}))
    assert "mlp.weight" in open_checkpoint(directory).shapes
    (directory / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    assert list(open_checkpoint(directory).shapes) == ["old"]


@pytest.mark.parametrize(
    ("other", "message"),
    [("fsdp2-hybrid", "have .* of 7 entries along dimension 0"), ("plain", "differ in .*mlp.bias")],
)
def test_ranks_of_different_saves_are_refused(
    damaged: Callable[[str], Path], tiny: Path, other: str, message: str
) -> None:
    directory = damaged("fsdp2")
    shutil.copy(rank_file(tiny / other, 3), rank_file(directory, 3))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory)


def test_a_rank_of_another_model_is_refused(damaged: Callable[[str], Path]) -> None:
    directory = damaged("plain")
    torch.save({"plain": torch.ones(9)}, rank_file(directory, 1))
    with pytest.raises(CheckpointError, match=r"plain in .* has another shape on some rank"):
        open_checkpoint(directory)


def test_one_rank_alone_is_no_model(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight in .* is a DTensor, one rank's part"):
        torch_files([rank_file(tiny / "fsdp1", 0)])


def test_a_call_that_was_planted_in_one_rank_never_runs(damaged: Callable[[str], Path], tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    directory = damaged("plain")
    torch.save({"plain": torch.ones(3, 2), "extra": Planted()}, rank_file(directory, 3))
    with pytest.raises(CheckpointError, match=r"rank_3\.pt names posix\.system.*--trust-pickle"):
        open_checkpoint(directory)
    assert not (tmp_path / "ran").exists()
    assert open_checkpoint(directory, trust_pickle=True).shapes == {"plain": (3, 2)}
    assert (tmp_path / "ran").exists()


def test_shards_are_read_before_the_export_beside_them(damaged: Callable[[str], Path], tmp_path: Path) -> None:
    directory = damaged("fsdp2")
    (directory / "model.safetensors").write_bytes(b"")
    assert layout_of(directory)[0].name.startswith("FSDP rank files")
    for place in ("actor", "policy"):
        step = tmp_path / place / "global_step_1"
        shutil.copytree(directory, step / place)
        assert layout_of(step)[1] == step / place


def test_lora_within_the_shards_is_an_adapter(lora: tuple[Path, dict[str, Tensor]], base_directory: Path) -> None:
    directory, expected = lora
    checkpoint, base = open_checkpoint(directory), FullCheckpoint(base_directory)
    assert isinstance(checkpoint, AdapterCheckpoint)
    assert checkpoint.config == {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"}
    # Two layers of q_proj and down_proj, and the head that was trained whole; the base within the shards is left out.
    assert len(checkpoint.shapes) == 5
    assert not any("base_layer" in name or "original_module" in name for name in checkpoint.source.shapes)
    for name, weight in effective_weights(checkpoint, base):
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)
    assert open_checkpoint(directory / "actor").shapes == checkpoint.shapes


@pytest.mark.parametrize("meta", [None, {"r": 4, "lora_alpha": 0}, {"lora_alpha": 12}])
def test_lora_without_its_scale_says_what_to_add(
    lora: tuple[Path, dict[str, Tensor]], tmp_path: Path, meta: dict[str, int] | None
) -> None:
    actor = shutil.copytree(lora[0] / "actor", tmp_path / "actor")
    (actor / LORA_META).unlink()
    if meta is not None:
        (actor / LORA_META).write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r'needs r and lora_alpha.*lora_train_meta.json, such as \{"r"'):
        open_checkpoint(actor)


def test_the_scale_is_found_where_verl_kept_it_before(lora: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    # Below `policy`, for in `actor` the adapter's own file is read.
    policy = shutil.copytree(lora[0] / "actor", tmp_path / "policy")
    (policy / "lora_adapter").mkdir()
    (policy / LORA_META).rename(policy / "lora_adapter" / "adapter_config.json")
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, AdapterCheckpoint)
    assert checkpoint.config["lora_alpha"] == 12
