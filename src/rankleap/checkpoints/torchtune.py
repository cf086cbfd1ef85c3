"""Opens the adapter that torchtune saves beside the merged weights, put right where its copy for PEFT is wrong.

torchtune turns pairs of neighbouring rows of a query or key head, Transformers pairs of rows half a head apart, so rows must
change places between them; of Qwen alone torchtune keeps Transformers' order. Its copy for PEFT (as of 0.6.1) reorders ``lora_B``
of every model, Qwen's too, and DoRA's magnitudes of none. Queries and keys are therefore read from its own file.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rankleap.checkpoints import adapter
from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.pickled import torch_files
from rankleap.checkpoints.source import Stored, TensorSource
from rankleap.errors import CheckpointError
from rankleap.files import read_json

OWN = "adapter_model.pt"
"""The adapter with torchtune's own names and rows."""
MODEL = "config.json"
_MAGNITUDE = "lora_magnitude_vector"
_TURNED = re.compile(rf".*\.(layers\.\d+)\.self_attn\.([qk])_proj\.(lora_B\.weight|{_MAGNITUDE})")
_OWN_PARTS = {"lora_B.weight": "lora_b.weight", _MAGNITUDE: "magnitude"}


class _Turned(NamedTuple):
    own: Stored
    order: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """As torchtune's."""
        return self.own.shape

    @property
    def dtype(self) -> torch.dtype | str:
        """As torchtune's."""
        return self.own.dtype

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor as Transformers orders its rows."""
        return self.own.read()[self.order[rows or slice(None)]]


def _turned(copy: TensorSource, directory: Path, trust_pickle: bool) -> TensorSource:
    """An adapter in PEFT's form, with some tensors from torchtune's file, their rows in Transformers' order."""
    own, turned = torch_files([directory / OWN], trust_pickle), dict(copy.tensors)
    for match in filter(None, map(_TURNED.fullmatch, copy.shapes)):
        layer, side, part = match.groups()
        name, shape = f"{layer}.attn.{side}_proj.{_OWN_PARTS[part]}", copy.shapes[match[0]]
        if own.shapes.get(name) != shape:
            found = own.shapes.get(name, "none")
            raise CheckpointError(f"{directory / OWN} needs {name} of {shape}, found {found}; leave this step out")
        turned[match[0]] = _Turned(own.tensors[name], _order(directory, side, shape[0]))
    return TensorSource(turned, copy.size_bytes)


def _order(directory: Path, side: str, rows: int) -> Tensor:
    """For each row of Transformers' queries or keys the row of torchtune's."""
    model = read_json(directory / MODEL)
    if str(model.get("model_type")).startswith("qwen"):
        return torch.arange(rows)
    key = {"q": "num_attention_heads", "k": "num_key_value_heads"}[side]
    heads = model.get(key)
    if not heads or rows % (2 * heads):
        raise CheckpointError(
            f"{directory / MODEL} says {key} is {heads}, which does not fit the adapter's {rows} rows"
        )
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def find(directory: Path) -> Path | None:
    """The directory itself if torchtune wrote an adapter there."""
    return directory if (directory / OWN).exists() and (directory / adapter.CONFIG).exists() else None


def open_checkpoint(directory: Path, trust_pickle: bool = False) -> AdapterCheckpoint:
    """The adapter alone; the weights that it is merged into already are left aside."""
    copy = AdapterCheckpoint(directory, trust_pickle=trust_pickle)
    # torchtune does not say that it is DoRA.
    config = copy.config | {"use_dora": any(key.endswith(_MAGNITUDE) for key in copy.source.shapes)}
    return AdapterCheckpoint(directory, config=config, source=_turned(copy.source, directory, trust_pickle))
