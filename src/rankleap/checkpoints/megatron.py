"""Opens Megatron-core's torch_dist checkpoints as the Hugging Face model that they stand for: Qwen2, Qwen3 and Llama.

The files are a torch Distributed Checkpoint (``dcp.py``), whole over tensor and pipeline parallelism; the names are Megatron's,
``decoder.layers.I.…``, or ``decoder.layers.…`` with all layers stacked along a first dimension. Two matrices are fused:

    linear_qkv [G·(Q + 2)·D, N]   for each of G query groups: its Q query heads, its key head, its value head, D rows each
    linear_fc1 [2·F, N]           gate, then up

so every weight of the model is some spans of rows of one saved tensor, and is read as such. The embedding is padded for
tensor parallelism; rows beyond the model's vocabulary are cut. slime, verl, SkyRL and NeMo-RL with Megatron write it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankleap.checkpoints import dcp
from rankleap.checkpoints.dcp import Tiled, model_names, source_of, tiled
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.pickled import Record, scan_pickle
from rankleap.checkpoints.source import TensorSource
from rankleap.errors import CheckpointError
from rankleap.files import read_json

FOLDERS = ("actor/model/dist_ckpt", "actor/dist_ckpt", "model/dist_ckpt", "dist_ckpt", "policy/weights/iter_0000000")
"""Where Megatron's part lies, beside the folders of ``dcp``: verl since 2026 and before, and NeMo-RL."""
_CONFIGS = ("config.json", "huggingface/config.json", "model/huggingface/config.json")
_ARGUMENTS = "common.pt"
_CONVERTERS = (
    "convert it to Hugging Face with the trainer's own tool: slime's tools/convert_torch_dist_to_hf.py, "
    "verl's `python -m verl.model_merger merge --backend megatron`, NeMo-RL's examples/converters/convert_megatron_to_hf.py"
)
# Found as bytes, for a step directory is asked before it is opened: a name at its pickled length, not within a longer one.
_SAVED = re.compile(
    rb"(?:\x8c.|X.{4})(?:(?:model|module)\.)*(?:decoder\.layers\.|embedding\.word_embeddings\.)", re.DOTALL
)
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_FINAL = "decoder.final_layernorm.weight"
_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    _FINAL: "model.norm.weight",
}
_MODULES = {
    "input_layernorm": ("input_layernorm",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
_PARTS: dict[str, tuple[str, ...]] = {
    **{
        f"{old}.{kind}": tuple(f"{n}.{kind}" for n in new)
        for old, new in _MODULES.items()
        for kind in ("weight", "bias")
    },
    # Norms that Transformer Engine fuses with the layer that follows.
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    # The halves of linear_fc1 as Megatron saves them when each rank writes its shards alone.
    "mlp.linear_fc1.weight_w": ("mlp.gate_proj.weight",),
    "mlp.linear_fc1.weight_v": ("mlp.up_proj.weight",),
}
"""What a saved tensor of a layer holds, in the order of its rows."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What the shapes of a Megatron model do not tell."""

    queries: int
    groups: int
    size: int
    vocabulary: int | None

    def spans(self, rows: int, where: str) -> tuple[list[range], list[range], list[range]]:
        """Rows of the queries, keys and values in a fused tensor of so many rows; raises ``CheckpointError`` if they differ."""
        group = (self.queries // self.groups + 2) * self.size
        if rows != self.groups * group:
            raise CheckpointError(
                f"{where} has {rows} rows, needed {self.groups * group} for {self.queries} query heads in {self.groups} "
                f"groups of size {self.size}; {_CONVERTERS}"
            )
        keys = [range(top - 2 * self.size, top - self.size) for top in range(group, rows + 1, group)]
        values = [range(key.stop, key.stop + self.size) for key in keys]
        return [range(value.stop - group, value.stop - 2 * self.size) for value in values], keys, values


@dataclass(frozen=True, slots=True)
class Spans:
    """A weight of the model: rows of a saved tensor, or of one layer of it."""

    saved: Tiled
    layer: int | None
    rows: list[range]

    @property
    def shape(self) -> tuple[int, ...]:
        """As the model has it."""
        return (sum(map(len, self.rows)), *self.saved.shape[1 if self.layer is None else 2 :])

    @property
    def dtype(self) -> torch.dtype:
        """As it was saved."""
        return self.saved.dtype

    def read(self, rows: slice | None = None) -> Tensor:
        """Only the rows that are asked for of the fused tensor."""
        first, stop, _ = (rows or slice(None)).indices(self.shape[0])
        tops = accumulate(map(len, self.rows), initial=0)
        parts = [span[max(0, first - top) : max(0, stop - top)] for span, top in zip(self.rows, tops, strict=False)]
        asked = [part for part in parts if part] or [range(0)]
        if self.layer is None:
            pieces = [self.saved.box((part,)) for part in asked]
        else:
            pieces = [self.saved.box((range(self.layer, self.layer + 1), part))[0] for part in asked]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def megatron_files(folder: Path, trust_pickle: bool = False) -> TensorSource:
    """A Megatron model's tensors under Hugging Face's names.

    Raises ``CheckpointError`` for a tensor that has no place in the model, and for unknown heads.
    """
    tensors, heads = tiled(folder, trust_pickle), _heads(folder)
    named = {own: tensors[saved] for own, saved in model_names(tensors).items()}
    spans = {name: part for own, saved in named.items() for name, part in _weights(own, saved, heads)}
    return source_of(spans, tensors.values())


def find(directory: Path) -> Path | None:
    """The folder of a step directory that holds a Megatron model, or is about to; ``None`` when there is none."""
    for place in (directory / folder for folder in (*FOLDERS, *dcp.FOLDERS)):
        # verl may keep only the optimizer here, and the model as Hugging Face does.
        if (place / dcp.METADATA).is_file() and _SAVED.search((place / dcp.METADATA).read_bytes()):
            return place
    # No metadata yet, which are written last: opened, so that the message says so.
    unfinished = (directory / folder for folder in FOLDERS if not (directory / folder / dcp.METADATA).exists())
    return next((place for place in unfinished if any(place.glob(dcp.SHARDS))), None)


def open_checkpoint(folder: Path, trust_pickle: bool = False) -> FullCheckpoint:
    """The model that Megatron's files stand for; raises ``CheckpointError`` that names the converter if it is another."""
    return FullCheckpoint(folder, source=megatron_files(folder, trust_pickle))


def _weights(own: str, saved: Tiled, heads: Heads) -> Iterator[tuple[str, Spans]]:
    """The names in the model of what one saved tensor holds, and where; ``own`` is its name without wrappers."""
    if own in _TOP:
        cut = None if own == _FINAL else heads.vocabulary
        yield _TOP[own], Spans(saved, None, [range(saved.shape[0])[:cut]])
        return
    match = _LAYER.fullmatch(own)
    if not match or match[2] not in _PARTS:
        raise CheckpointError(f"{own} has no place in a Qwen2, Qwen3 or Llama model; {_CONVERTERS}")
    number, names = match[1], _PARTS[match[2]]
    rows = saved.shape[0 if number else 1]
    halves: dict[int, Sequence[list[range]]] = {1: ([range(rows)],), 2: ([range(rows // 2)], [range(rows // 2, rows)])}
    spans = halves[len(names)] if len(names) < 3 else heads.spans(rows, own)
    for layer in [int(number)] if number else range(saved.shape[0]):
        for name, part in zip(names, spans, strict=True):
            yield f"model.layers.{layer}.{name}", Spans(saved, None if number else layer, part)


def _heads(folder: Path) -> Heads:
    """From the model's own config in the checkpoint or above it, else from the arguments that Megatron keeps."""
    here = folder.absolute()
    for file in (place / name for place in (here, *here.parents[:4]) for name in _CONFIGS):
        # A trainer's own config may have that name too.
        if file.exists() and "num_attention_heads" in (config := read_json(file)):
            queries = config["num_attention_heads"]
            size = config.get("head_dim") or config["hidden_size"] // queries
            return Heads(queries, config.get("num_key_value_heads", queries), size, config.get("vocab_size"))
    if (folder / _ARGUMENTS).exists():
        # Nothing that it names is imported, so whatever a trainer put there does no harm.
        arguments = scan_pickle(folder / _ARGUMENTS, inert=("",)).get("args")
        if isinstance(arguments, Record) and "num_attention_heads" in arguments.state:
            return _heads_of(arguments.state)
    raise CheckpointError(
        f"{folder} does not tell how many heads share its linear_qkv; copy the model's config.json to {folder}, "
        f"or {_CONVERTERS}"
    )


def _heads_of(arguments: Mapping[str, Any]) -> Heads:
    queries = arguments["num_attention_heads"]
    groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else queries
    size = arguments.get("kv_channels") or arguments["hidden_size"] // queries
    return Heads(queries, groups or queries, size, arguments.get("vocab_size"))
