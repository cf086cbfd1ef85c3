"""DeepSpeed's partitions: files that it wrote itself, and every stage, number of ranks and damage by a writer of its layout."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rankleap.checkpoints import open_checkpoint, open_run
from rankleap.checkpoints.deepspeed import zero_files
from rankleap.checkpoints.layouts import layout_of
from rankleap.errors import CheckpointError
from writers.deepspeed import MODEL, OPTIMIZER, write_zero

MakeModel = Callable[..., PreTrainedModel]
WeightsOf = Callable[[torch.nn.Module], dict[str, Tensor]]
DATA = Path(__file__).parent.parent / "data"


class Command:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran",)


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """ZeRO-2 on three ranks."""
    write_zero(tmp_path / "global_step20", make_model(), stage=2)
    return tmp_path / "global_step20"


def change(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a file holds; for an optimizer's, its state."""
    saved = torch.load(path)
    change(saved.get("optimizer_state_dict", saved))
    torch.save(saved, path)


@pytest.mark.parametrize("stage", [2, 3])
def test_files_of_deepspeed_itself_are_read_as_the_model_that_was_live(stage: int) -> None:
    checkpoint = open_checkpoint(DATA / f"deepspeed-zero{stage}" / "checkpoint-2")
    expected = load_file(DATA / f"deepspeed-zero{stage}" / "weights.safetensors")
    assert checkpoint.kind == "full"
    assert checkpoint.shapes == {name: tuple(weight.shape) for name, weight in expected.items()}
    for name, weight in expected.items():
        assert checkpoint.dtypes[name] == ("BF16" if "up_proj" in name else "F32")
        assert torch.equal(checkpoint.tensor(name), weight)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 7), slice(8, None), slice(4, 4), slice(5, 99)])
def test_rows_are_those_of_the_whole_wherever_partitions_end(stage: int, rows: slice) -> None:
    source = zero_files(DATA / f"deepspeed-zero{stage}" / "checkpoint-2" / "global_step2")
    for name in source.shapes:
        assert torch.equal(source.read(name, rows), source.read(name)[rows])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (2, 2), (2, 5), (3, 1), (3, 2), (3, 5)])
def test_masters_are_exact_on_any_number_of_ranks(
    make_model: MakeModel, weights_of: WeightsOf, tmp_path: Path, stage: int, ranks: int, tied: bool
) -> None:
    model = make_model(vocab_size=63, intermediate_size=47, tie_word_embeddings=tied)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").requires_grad_(False)
    write_zero(tmp_path / "global_step20", model, stage, ranks)
    source, expected = zero_files(tmp_path / "global_step20"), weights_of(model)
    assert source.shapes == {name: tuple(weight.shape) for name, weight in expected.items()}
    assert ("lm_head.weight" in source.shapes) != tied
    for name, weight in expected.items():
        stored = weight.bfloat16() if name == "model.layers.1.mlp.up_proj.weight" else weight
        assert torch.equal(source.read(name), stored)


@pytest.mark.parametrize("alignment", [5, 16])
def test_gaps_between_aligned_weights_are_left_out(
    make_model: MakeModel, weights_of: WeightsOf, tmp_path: Path, alignment: int
) -> None:
    model = make_model(hidden_size=24, vocab_size=63, intermediate_size=47)
    write_zero(tmp_path / "global_step20", model, stage=2, alignment=alignment)
    source = zero_files(tmp_path / "global_step20")
    assert all(torch.equal(source.read(name), weight) for name, weight in weights_of(model).items())


def test_padding_at_the_end_may_be_saved_too(make_model: MakeModel, weights_of: WeightsOf, tmp_path: Path) -> None:
    model = make_model(hidden_size=24, vocab_size=63)
    write_zero(tmp_path / "global_step20", model, stage=1, ranks=8)
    # As bf16 with float32 gradients saves it, without a word about the stage.
    key, first = "single_partition_of_fp32_groups", tmp_path / "global_step20" / f"bf16_zero_pp_rank_0_{OPTIMIZER}"
    sizes = [part.numel() for part in torch.load(first)["optimizer_state_dict"][key]]
    padded = []
    for path in first.parent.glob(f"*{OPTIMIZER}"):

        def keep_padding(state: dict[str, Any]) -> None:
            del state["zero_stage"]
            missing = [size - part.numel() for size, part in zip(sizes, state[key], strict=True)]
            padded.extend(missing)
            state[key] = [pad(part, (0, gap)) for gap, part in zip(missing, state[key], strict=True)]

        change(path, keep_padding)
    assert sum(padded) > 0
    source = zero_files(first.parent)
    assert all(torch.equal(source.read(name), weight) for name, weight in weights_of(model).items())


@pytest.mark.parametrize("stage", [2, 3])
def test_reading_rows_touches_only_the_ranks_that_hold_them(make_model: MakeModel, tmp_path: Path, stage: int) -> None:
    write_zero(tmp_path / "global_step20", make_model(), stage, ranks=2)
    source = zero_files(tmp_path / "global_step20")
    whole = source.read("model.embed_tokens.weight").clone()
    last = tmp_path / "global_step20" / f"bf16_zero_pp_rank_1_{OPTIMIZER}"
    last.unlink()
    assert torch.equal(source.read("model.embed_tokens.weight", slice(2, 9)), whole[2:9])
    with pytest.raises(CheckpointError, match=last.name):
        source.read("lm_head.weight")


def test_masters_come_before_the_export_beside_them(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    write_zero(tmp_path / "global_step20", model.float(), stage=2)
    assert open_checkpoint(tmp_path).dtypes["lm_head.weight"] == "F32"


def test_an_adapter_comes_before_the_partitions_it_was_trained_in(
    make_model: MakeModel, lora_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(lora_run / "checkpoint-10", tmp_path / "checkpoint-10")
    write_zero(tmp_path / "checkpoint-10" / "global_step10", make_model(), stage=2)
    assert open_checkpoint(tmp_path / "checkpoint-10").kind == "adapter"


def test_openrlhfs_actor_is_a_run(make_model: MakeModel, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_zero(tmp_path / "_actor" / f"global_step{step}", make_model(), stage=2)
    (tmp_path / "_actor" / "latest").write_text("global_step20")
    run = open_run(tmp_path)
    assert run.steps == [10, 20]
    assert "global_step30" in run.skipped
    assert run.layout.name == "DeepSpeed ZeRO"
    # Given as if it were one checkpoint, the folder of steps is the step that it says is its newest, as for DeepSpeed.
    assert layout_of(tmp_path / "_actor")[1].name == "global_step20"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_rank_is_named(make_model: MakeModel, tmp_path: Path, stage: int) -> None:
    write_zero(tmp_path / "global_step20", make_model(), stage)
    for rank in (0, 1, 2):
        lost = tmp_path / "global_step20" / f"bf16_zero_pp_rank_{rank}_{OPTIMIZER}"
        content = lost.read_bytes()
        lost.unlink()
        with pytest.raises(CheckpointError, match=rf"incomplete without {lost.name}"):
            zero_files(lost.parent)
        lost.write_bytes(content)


def test_a_rank_of_another_save_is_named(folder: Path) -> None:
    shutil.copy(folder / f"bf16_zero_pp_rank_0_{OPTIMIZER}", folder / f"zero_pp_rank_3_{OPTIMIZER}")
    with pytest.raises(CheckpointError, match=rf"bf16_zero_pp_rank_0_{OPTIMIZER} .* \[3, 3\] ranks.* 4 are here"):
        zero_files(folder)


def test_ranks_that_disagree_about_their_number_are_refused(folder: Path) -> None:
    last = folder / f"bf16_zero_pp_rank_2_{OPTIMIZER}"
    change(last, lambda state: state.update(partition_count=[3, 1]))
    with pytest.raises(CheckpointError, match=rf"{last.name} was written by \[3, 1\] ranks"):
        zero_files(folder)


@pytest.mark.parametrize("more", [-7, 7])
@pytest.mark.parametrize(("stage", "key"), [(2, "single_partition_of_fp32_groups"), (3, "fp32_flat_groups")])
def test_partitions_that_do_not_fit_the_parameters_are_refused(
    make_model: MakeModel, tmp_path: Path, stage: int, key: str, more: int
) -> None:
    write_zero(tmp_path / "global_step20", make_model(), stage)
    last = tmp_path / "global_step20" / f"bf16_zero_pp_rank_2_{OPTIMIZER}"
    change(last, lambda state: state.update({key: [pad(part, (0, more)) for part in state[key]]}))
    with pytest.raises(CheckpointError, match="global_step20 is damaged: its partitions hold"):
        zero_files(tmp_path / "global_step20")


def test_fragments_that_do_not_fit_a_frozen_parameter_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.get_parameter("lm_head.weight").requires_grad_(False)
    write_zero(tmp_path / "global_step20", model, stage=3)
    path = tmp_path / "global_step20" / f"zero_pp_rank_1_{MODEL}"
    change(path, lambda state: state["frozen_param_fragments"].update({"lm_head.weight": torch.ones(5)}))
    with pytest.raises(CheckpointError, match="global_step20 is damaged: its partitions hold"):
        zero_files(tmp_path / "global_step20")


@pytest.mark.parametrize(
    ("stage", "name"), [(2, MODEL), (3, f"zero_pp_rank_0_{MODEL}"), (3, f"zero_pp_rank_2_{MODEL}")]
)
def test_a_missing_model_file_is_named(make_model: MakeModel, tmp_path: Path, stage: int, name: str) -> None:
    model = make_model()
    model.get_parameter("lm_head.weight").requires_grad_(False)
    write_zero(tmp_path / "global_step20", model, stage)
    (tmp_path / "global_step20" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"/{name} does not exist"):
        zero_files(tmp_path / "global_step20")


def test_the_running_weights_are_read_where_no_optimizer_was_saved(
    make_model: MakeModel, weights_of: WeightsOf, folder: Path
) -> None:
    for path in folder.glob(f"*{OPTIMIZER}"):
        path.unlink()
    with pytest.raises(CheckpointError, match="incomplete or still being written"):
        zero_files(folder)
    (folder.parent / "latest").write_text("global_step20")
    source, expected = zero_files(folder), weights_of(make_model())
    assert source.shapes.keys() == expected.keys()
    assert set(source.dtypes.values()) == {"BF16"}
    assert torch.equal(source.read("lm_head.weight"), expected["lm_head.weight"].bfloat16())


def test_a_tied_weight_counts_once_where_no_stage_says_what_is_shared(make_model: MakeModel, folder: Path) -> None:
    shutil.rmtree(folder)
    write_zero(folder, make_model(tie_word_embeddings=True), stage=2)
    (folder.parent / "latest").write_text("global_step20")
    for path in folder.glob(f"*{OPTIMIZER}"):
        path.unlink()
    change(folder / MODEL, lambda state: state.update(shared_params=None, param_shapes=None))
    names = zero_files(folder).shapes
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_a_tied_weight_counts_once_where_both_names_are_stored(make_model: MakeModel, folder: Path) -> None:
    shutil.rmtree(folder)
    write_zero(folder, make_model(tie_word_embeddings=True), stage=2)
    change(folder / MODEL, lambda state: state["module"].update({"lm_head.weight": torch.ones(64, 32)}))
    assert "lm_head.weight" not in zero_files(folder).shapes


def test_zero_3_without_its_optimizer_has_no_weights(make_model: MakeModel, tmp_path: Path) -> None:
    write_zero(tmp_path / "global_step20", make_model(), stage=3)
    for path in (tmp_path / "global_step20").glob(f"*{OPTIMIZER}"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: ZeRO-3 keeps the weights in .*_optim_states\.pt"):
        zero_files(tmp_path / "global_step20")


def test_a_model_split_by_tensors_is_refused(folder: Path) -> None:
    shutil.copy(folder / MODEL, folder / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match=r"mp_rank_01_model_states\.pt is a part of a model split"):
        zero_files(folder)


def test_an_adapter_without_its_config_is_refused_by_name(folder: Path) -> None:
    lora = "base_model.model.lm_head.lora_A.default.weight"
    change(folder / MODEL, lambda state: state["module"].update({lora: torch.ones(2, 2)}))
    with pytest.raises(CheckpointError, match=rf"{lora} and no adapter_config\.json"):
        zero_files(folder)


def test_a_file_that_is_not_deepspeeds_is_told_by_what_it_lacks(folder: Path) -> None:
    torch.save({"step": 1}, folder / MODEL)
    with pytest.raises(CheckpointError, match=rf"{MODEL} has no \w+, so DeepSpeed did not write it"):
        zero_files(folder)


def test_a_planted_command_does_not_run_and_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change(folder / f"bf16_zero_pp_rank_1_{OPTIMIZER}", lambda state: state.update(loss_scaler=Command()))
    with pytest.raises(CheckpointError, match=r"rank_1_.* names posix\.system.*--trust-pickle"):
        zero_files(folder)
    assert not Path("ran").exists()
    zero_files(folder, trust_pickle=True)
    assert Path("ran").exists()
