"""What is written loads in Transformers and PEFT and holds exactly what was given."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankleap.checkpoints import FullCheckpoint, LowRank, dense
from rankleap.checkpoints.write import write_adapter, write_full
from rankleap.errors import NotFiniteError

MakeModel = Callable[..., PreTrainedModel]
WeightsOf = Callable[[torch.nn.Module], dict[str, Tensor]]


def scaled(base: FullCheckpoint, by: float) -> Iterator[tuple[str, Tensor]]:
    return ((name, by * base.weight(name)) for name in base.shapes)


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("tied", [False, True])
def test_a_full_checkpoint_round_trips_through_transformers(
    make_model: MakeModel, weights_of: WeightsOf, tmp_path: Path, tied: bool, shard_bytes: int
) -> None:
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = FullCheckpoint(tmp_path / "base")
    write_full(tmp_path / "new", scaled(base, 1.25), base, base.directory, shard_bytes)
    shards = sorted((tmp_path / "new").glob("*.safetensors"))
    assert len(shards) == {1: len(base.shapes), 1 << 30: 1}.get(shard_bytes, len(shards))
    assert (len(shards) > 1) == (shard_bytes < 1 << 30)
    if shard_bytes == 20_000:
        assert all(path.stat().st_size < 24_000 for path in shards)
    loaded = weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "new"))
    assert loaded.keys() == base.shapes.keys()
    again = FullCheckpoint(tmp_path / "new")
    for name, weight in scaled(base, 1.25):
        assert torch.equal(loaded[name], weight)
        assert torch.equal(again.weight(name), weight)


def test_sharded_reading_and_writing_agree_with_transformers(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base = FullCheckpoint(tmp_path / "base")
    write_full(tmp_path / "new", scaled(base, 1.0), base, base.directory, 20_000)
    assert FullCheckpoint(tmp_path / "new").fingerprint() == base.fingerprint()


def test_float32_loses_nothing_and_bf16_says_how_much(
    make_model: MakeModel, base_directory: Path, tmp_path: Path
) -> None:
    base = FullCheckpoint(base_directory)
    assert write_full(tmp_path / "exact", scaled(base, 1.001), base, base_directory) == 0
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = FullCheckpoint(tmp_path / "half")
    loss = write_full(tmp_path / "rounded", scaled(half, 1.001), half, half.directory)
    stored = FullCheckpoint(tmp_path / "rounded")
    assert set(stored.dtypes.values()) == {"BF16"}
    missed = sum(float((stored.weight(n) - 1.001 * half.weight(n)).norm()) ** 2 for n in half.shapes)
    moved = sum(float((0.001 * half.weight(n)).norm()) ** 2 for n in half.shapes)
    assert loss == pytest.approx(math.sqrt(missed / moved), rel=1e-3)
    assert loss > 0.5  # a step of 0.1 % is below bf16's resolution


def test_unchanged_weights_lose_nothing(base_directory: Path, tmp_path: Path) -> None:
    base = FullCheckpoint(base_directory)
    assert write_full(tmp_path / "same", scaled(base, 1.0), base, base_directory) == 0


def test_side_files_come_along_but_not_the_old_index_or_manifest(make_model: MakeModel, tmp_path: Path) -> None:
    source = tmp_path / "base"
    make_model().save_pretrained(source, max_shard_size="20KB")
    for name in (
        "manifest.json",
        "trainer_state.json",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "optimizer.pt",
    ):
        (source / name).write_text("{}")
    base = FullCheckpoint(source)
    write_full(tmp_path / "new", scaled(base, 1.0), base, source)
    written = {path.name for path in (tmp_path / "new").iterdir()}
    brought = {"config.json", "generation_config.json", "tokenizer.json", "merges.txt", "chat_template.jinja"}
    assert written == {"model.safetensors", *brought}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(base_directory: Path, tmp_path: Path, bad: float) -> None:
    base = FullCheckpoint(base_directory)
    weights = ((name, weight * (bad if "norm" in name else 1)) for name, weight in scaled(base, 1.0))
    with pytest.raises(NotFiniteError, match=r"norm\.weight of the new checkpoint has NaN"):
        write_full(tmp_path / "new", weights, base, base_directory)


@pytest.mark.parametrize("rank", [3, 5])
def test_an_adapter_adds_exactly_its_products_in_peft(
    base_directory: Path, weights_of: WeightsOf, tmp_path: Path, rank: int
) -> None:
    base, generator = FullCheckpoint(base_directory), torch.Generator().manual_seed(0)
    chosen = {name: shape for name, shape in base.shapes.items() if "layers" in name and len(shape) == 2}
    products = {
        name: LowRank(torch.randn(shape[0], r, generator=generator), torch.randn(r, shape[1], generator=generator))
        for (name, shape), r in zip(chosen.items(), [1, 2, 3] * len(chosen), strict=False)
    }
    write_adapter(tmp_path, products, rank, str(base_directory), base_directory)
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    merged = weights_of(PeftModel.from_pretrained(model, str(tmp_path)).merge_and_unload())
    for name in base.shapes:
        expected = base.weight(name) + dense(products[name]) if name in products else base.weight(name)
        torch.testing.assert_close(merged[name], expected, atol=1e-5, rtol=0)
