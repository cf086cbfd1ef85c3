"""Opens a PEFT adapter as *effective* deltas against its true base, never through a merged model.

    LoRA      ΔW = s·B·A, s = α/r                             (2106.09685)
    rsLoRA    the same with s = α/√r                           (2312.03732)
    DoRA      ΔW = m ∘ (W₀ + s·B·A) / ‖W₀ + s·B·A‖ - W₀        (2402.09353, Eq. 5), row norms of PyTorch's M × N weight

LoRA's delta stays a product; DoRA's is dense, since rescaling the rows of W₀ is not low-rank.
Shapes: M outputs, N inputs, R rank.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankleap.checkpoints.delta import Delta, LowRank, dense, require_finite
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.source import SafetensorsSource, TensorSource
from rankleap.errors import CheckpointError
from rankleap.files import read_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# Each of these changes what lora_A and lora_B mean, or adds tensors that are not read here.
_UNREAD = (
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
_PARTS = (("full",), ("lora_A", "lora_B"), ("lora_A", "lora_B", "lora_magnitude_vector"))


class AdapterCheckpoint:
    """The adapter of one step; ``shapes`` lists the base weights that it changes."""

    kind = "adapter"

    def __init__(
        self, directory: Path, *, config: dict[str, Any] | None = None, source: TensorSource | None = None
    ) -> None:
        """Read the config and the header; raises ``CheckpointError`` for what is missing, truncated or unsupported.

        Layouts that keep an adapter elsewhere than in PEFT's own files give its ``config`` and ``source``.
        """
        self.directory = directory
        self.config: dict[str, Any] = read_json(directory / CONFIG) if config is None else config
        _require_supported(self.config, directory)
        self.source = source or SafetensorsSource({directory / WEIGHTS: []})
        self._keys: dict[str, dict[str, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        sizes = self.source.shapes
        for key in sizes:
            name, part = _split_key(key)
            self._keys.setdefault(name, {})[part] = key
        for name, parts in self._keys.items():
            if not any(set(parts) == {*needed} for needed in _PARTS):
                raise CheckpointError(
                    f"{self.directory} holds {', '.join(sorted(parts))} of {name}; needed lora_A and lora_B, "
                    "with lora_magnitude_vector for DoRA, or the whole tensor"
                )
            if "full" in parts:
                self.shapes[name] = sizes[parts["full"]]
                continue
            left, right = sizes[parts["lora_B"]], sizes[parts["lora_A"]]
            if len(right) != 2 or left[1:] != right[:1]:
                raise CheckpointError(
                    f"{self.directory}: lora_B {left} and lora_A {right} of {name} are no matrices that multiply; "
                    "if training was sharded, gather the weights before saving"
                )
            self.shapes[name] = (left[0], right[1])

    @property
    def base(self) -> str | None:
        """The base that the adapter's own config names."""
        return self.config.get("base_model_name_or_path")

    def scale(self, name: str) -> float:
        """S of one weight, with ``rank_pattern`` and ``alpha_pattern`` applied."""
        module = name.removesuffix(".weight")
        rank = _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def delta(self, name: str, base: FullCheckpoint) -> Delta:
        """The effective delta of one base weight in float32."""
        parts = self._read(name)
        # A whole tensor (modules_to_save) takes the place of the base's.
        if "full" in parts:
            delta: Delta = parts["full"] - base.weight(name)
        else:
            delta = LowRank(self.scale(name) * parts["lora_B"], parts["lora_A"])
            if "lora_magnitude_vector" in parts:
                delta = _dora(base.weight(name), delta, parts["lora_magnitude_vector"])
        return require_finite(delta, name, str(self.directory))

    def weight(self, name: str, base: FullCheckpoint) -> Tensor:
        """The effective weight in float32."""
        return base.weight(name) + dense(self.delta(name, base))

    def size_bytes(self) -> int:
        """Bytes of the adapter's files."""
        return self.source.size_bytes()

    def _read(self, name: str) -> dict[str, Tensor]:
        return {part: self.source.read(key).float() for part, key in self._keys[name].items()}


def _dora(base_MN: Tensor, update: LowRank, magnitude_M: Tensor) -> Tensor:
    direction_MN = base_MN + dense(update)
    return magnitude_M[:, None] * direction_MN / torch.linalg.vector_norm(direction_MN, dim=1, keepdim=True) - base_MN


def _split_key(key: str) -> tuple[str, str]:
    """Base weight and part: ``lora_A``, ``lora_B``, ``lora_magnitude_vector``, or ``full`` (``modules_to_save``, biases)."""
    name = key.removeprefix(_PREFIX)
    module, found, part = name.partition(".lora_")
    return (f"{module}.weight", f"lora_{part.removesuffix('.weight')}") if found else (name, "full")


def _by_pattern(pattern: dict[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that is the module's name, or a whole-word end of it, as a regular expression."""
    return next((value for key, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)


def _require_supported(config: dict[str, Any], directory: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{directory} holds a {kind} adapter; rankleap reads LORA ones (LoRA, rsLoRA, DoRA)")
    start = config.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal"):
        raise CheckpointError(
            f"{directory} was initialised with {start!r}, which changes the base, so its delta is not s·B·A; "
            "save it converted to plain LoRA (PEFT: path_initial_model_for_weight_conversion) and read that"
        )
    if unread := [key for key in _UNREAD if config.get(key)]:
        raise CheckpointError(
            f"{directory} was trained with {', '.join(unread)}, so its delta is not s·B·A; rankleap reads LoRA, rsLoRA and DoRA"
        )
