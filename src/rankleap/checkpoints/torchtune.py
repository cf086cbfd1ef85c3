"""Opens the adapter that torchtune saves beside the merged weights, put right where its copy for PEFT is wrong.

torchtune turns pairs of neighbouring rows of a query or key head, Transformers pairs of rows half a head apart, so rows must
change places between them; of Qwen alone torchtune keeps Transformers' order. Its copy for PEFT (as of 0.6.1) reorders ``lora_B``
of every model, Qwen's too, and DoRA's magnitudes of none. Queries and keys are therefore read from its own file.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from rankleap.checkpoints import adapter
from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.pickled import TorchFilesSource
from rankleap.checkpoints.source import TensorSource
from rankleap.errors import CheckpointError
from rankleap.files import read_json

OWN = "adapter_model.pt"
"""The adapter with torchtune's own names and rows."""
MODEL = "config.json"
_MAGNITUDE = "lora_magnitude_vector"
_TURNED = re.compile(rf".*\.(layers\.\d+)\.self_attn\.([qk])_proj\.(lora_B\.weight|{_MAGNITUDE})")
_OWN_PARTS = {"lora_B.weight": "lora_b.weight", _MAGNITUDE: "magnitude"}


class _Turned(TensorSource):
    """An adapter in PEFT's form, with some tensors from torchtune's file, their rows in Transformers' order."""

    def __init__(self, copy: TensorSource, directory: Path, trust_pickle: bool) -> None:
        self.shapes, self.dtypes = copy.shapes, copy.dtypes
        self._copy, self._own = copy, TorchFilesSource([directory / OWN], trust_pickle)
        self._names: dict[str, str] = {}
        self._order: dict[str, Tensor] = {}
        for key, shape in copy.shapes.items():
            if match := _TURNED.fullmatch(key):
                layer, side, part = match.groups()
                self._names[key] = name = f"{layer}.attn.{side}_proj.{_OWN_PARTS[part]}"
                self._order[key] = _order(directory, side, shape[0])
                if self._own.shapes.get(name) != shape:
                    found = self._own.shapes.get(name, "none")
                    raise CheckpointError(
                        f"{directory / OWN} needs {name} of {shape}, found {found}; leave this step out"
                    )

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor as Transformers orders its rows."""
        if name not in self._names:
            return self._copy.read(name, rows)
        return self._own.read(self._names[name])[self._order[name][rows or slice(None)]]

    def size_bytes(self) -> int:
        """Bytes of the copy for PEFT, which holds the whole adapter."""
        return self._copy.size_bytes()


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
    return AdapterCheckpoint(directory, config=config, source=_Turned(copy.source, directory, trust_pickle))
