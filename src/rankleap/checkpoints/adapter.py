"""Opens a PEFT adapter of any method as *effective* deltas against its true base, never through a merged model.

``methods.py`` has what each method stores and means. Here is the rest of the file: its config and keys, what is refused,
and the initial adapter that PiSSA and its kin are measured from.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankleap.checkpoints import methods
from rankleap.checkpoints.delta import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    Delta,
    DeltaRows,
    LowRank,
    dense,
    require_finite,
    row_slices,
)
from rankleap.checkpoints.full import FullCheckpoint, require_same_shapes
from rankleap.checkpoints.methods import METHODS, Adapted, Form, Shape, method_of
from rankleap.checkpoints.pickled import torch_files
from rankleap.checkpoints.source import TensorSource, safetensors_files
from rankleap.errors import CheckpointError
from rankleap.files import read_json

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
CONFIG = "adapter_config.json"
START_FOLDERS = ("pissa_init", "initial", "leaps/start")
"""Where an adapter is kept as it was before the first step; the first is LLaMA-Factory's, the last our own."""
_NAMES = {
    "LORA": "LoRA",
    "ADALORA": "AdaLoRA",
    "MISS": "MiSS",
    "VERA": "VeRA",
    "IA3": "IA³",
    "LN_TUNING": "LN tuning",
    "pissa": "PiSSA",
    "milora": "MiLoRA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "eva": "EVA",
    "mica": "MiCA",
}
# Each of these changes what the stored tensors mean, or adds some that are not read here.
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
_NUMBERS = {"LORA": ("r", "lora_alpha"), "ADALORA": ("init_r", "lora_alpha")}
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.(lora_\w+|miss_block|vera_lambda_\w|ia3_l)(?:\.weight)?(\.bias)?")
_SHARED = re.compile(r"base_model\.(vera_[AB])")
# PEFT's names for an adapter in memory, and for what it wraps.
_WRAPPED = re.compile(r"\.(default|base_layer|modules_to_save|ln_tuning_layers)(?=\.|$)")
_FROZEN = re.compile(r".+\.(base_layer\.weight|original_module\..+)")


class AdapterCheckpoint:
    """The adapter of one step; ``shapes`` are of the weights that it stores, ``methods.ANY`` where only the base knows."""

    kind = "adapter"

    def __init__(
        self,
        directory: Path,
        *,
        config: dict[str, Any] | None = None,
        source: TensorSource | None = None,
        trust_pickle: bool = False,
    ) -> None:
        """Read the config and the header; raises ``CheckpointError`` for what is missing, truncated or unsupported.

        Layouts that keep an adapter elsewhere than in PEFT's own files give its ``config`` and ``source``.
        """
        self.directory = directory
        self.config: dict[str, Any] = read_json(directory / CONFIG) if config is None else config
        _require_supported(self.config, directory)
        self.source = source or _open_weights(directory, trust_pickle)
        self._keys = _keys_by_weight(self.source)
        self._forms: dict[str, Form | None] = {}
        self.shapes: dict[str, Shape] = {}
        for name in self._keys:
            self._forms[name], self.shapes[name] = self._form_of(name)
        self._lowers_base = _lowers_base(self.config, directory)
        self._start = self._open_start(trust_pickle) if self._lowers_base else None

    @property
    def base(self) -> str | None:
        """The base that the adapter's own config names."""
        return self.config.get("base_model_name_or_path")

    @property
    def settings(self) -> dict[str, Any]:
        """The method by its name, and the rank, alpha and target modules, where it has them."""
        kind, start = self.config["peft_type"], str(self.config.get("init_lora_weights")).partition("_niter_")[0]
        variants = [_NAMES[start]] if kind == "LORA" and start in _NAMES else []
        variants += [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if self.config.get(key)]
        rank = self.config.get("init_r" if kind == "ADALORA" else "r")
        targets = self.config.get("target_modules")
        found = {"rank": rank, "alpha": self.config.get("lora_alpha"), "target_modules": targets}
        method = " ".join(variants) or method_of(self.config).replace(kind, _NAMES[kind])
        return {"method": method, **{key: value for key, value in found.items() if value is not None}}

    def shapes_on(self, base: FullCheckpoint) -> dict[str, Shape]:
        """Every weight of this base that changes, with its whole shape; raises ``BaseMismatchError`` for another base."""
        found: dict[str, Shape] = {}
        for name, shape in self.shapes.items():
            there, form = base.shapes.get(name, ()), self._forms[name]
            if len(shape) == len(there):
                shape = tuple(side if known == methods.ANY else known for known, side in zip(shape, there, strict=True))
            found[name] = shape
            # Not in ``shapes``: only the base tells whether there is one.
            if form and form.bias and (bias := _beside(name, "bias")) in base.shapes:
                found[bias] = shape[:1]
        require_same_shapes(found, base, self.directory)
        return found

    def delta(self, name: str, base: FullCheckpoint, rows: slice | None = None) -> Delta:
        """The effective delta of one base weight in float32, or some of its rows (step 1)."""
        # A bias that is scaled with its weight has nothing stored of its own.
        weight = name if name in self._keys else _beside(name, "weight")
        keys, form = self._keys[weight], self._forms[weight]
        if form is None:
            delta: Delta = self.source.read(keys["full"], rows).float() - base.weight(name, rows)
        else:
            first, last, _ = (rows or slice(None)).indices(base.shapes[name][0])
            start = partial(self._start_of, name, base) if self._lowers_base and "lora_A" in keys else None
            names = tuple(other for other, form in self._forms.items() if form)
            delta = form.delta(Adapted(name, self._read(weight), self.config, base, slice(first, last), start, names))
        return require_finite(delta, name, str(self.directory))

    def lazy_delta(self, name: str, base: FullCheckpoint) -> Delta | DeltaRows:
        """A product as it is, a dense delta in row blocks that are made as they are read."""
        if isinstance(self.delta(name, base, slice(0, 1)), LowRank):
            return self.delta(name, base)
        shape = torch.Size(base.shapes[name])

        def read(expert: int | None, out: Tensor | None) -> Iterator[Tensor]:
            for rows in row_slices(shape, CHUNK_BYTES):
                chunk = dense(self.delta(name, base, rows))
                if out is not None:
                    chunk = out[rows].copy_(chunk)
                yield from (chunk[part] for part in row_slices(chunk.shape, BLOCK_BYTES))

        return DeltaRows(shape, read, self.source.is_local and base.source.is_local)

    def weight(self, name: str, base: FullCheckpoint, rows: slice | None = None) -> Tensor:
        """The effective weight in float32, or some of its rows."""
        return base.weight(name, rows) + dense(self.delta(name, base, rows))

    def size_bytes(self) -> int:
        """Bytes of the adapter's files."""
        return self.source.size_bytes

    def _sizes(self, name: str) -> dict[str, Shape]:
        return {part: self.source.shapes[key] for part, key in self._keys.get(name, {}).items()}

    def _form_of(self, name: str) -> tuple[Form | None, Shape]:
        sizes, forms = self._sizes(name), METHODS[method_of(self.config)]
        if set(sizes) == {"full"}:
            return None, sizes["full"]
        for form in forms:
            if set(form.sides) == set(sizes) and (shape := form.fit(sizes)):
                return form, shape
        held = ", ".join(f"{part} {size}" for part, size in sizes.items())
        ways = [" + ".join(f"{part} [{' '.join(sides)}]" for part, sides in form.sides.items()) for form in forms]
        raise CheckpointError(
            f"{self.directory} holds {held} of {name}; needed {', or '.join([*ways, 'the whole tensor'])}; "
            "if training was sharded, gather the weights before saving"
        )

    def _open_start(self, trust_pickle: bool) -> "AdapterCheckpoint | None":
        """The initial adapter, if it was kept; raises ``CheckpointError`` if it is another run's, or needed and not there."""
        here, kind = self.directory.absolute(), self.config["init_lora_weights"]
        places = (place / folder for place in (here, *here.parents[:2]) for folder in START_FOLDERS)
        place = next((place for place in places if (place / CONFIG).exists()), None)
        if place is None:
            if kind in methods.RECOMPUTED:
                return None
            raise CheckpointError(
                f"{here} was initialised with {kind!r}, which changes the base, and its initial adapter was not kept; "
                f"put it beside the checkpoint as {START_FOLDERS[0]}/, or save this one converted to plain LoRA "
                "(PEFT: path_initial_model_for_weight_conversion)"
            )
        # Its own config may say anything of the initialisation, for PEFT rewrites it when it converts.
        start = AdapterCheckpoint(place, config={**self.config, "init_lora_weights": True}, trust_pickle=trust_pickle)
        if other := [name for name, form in self._forms.items() if form and start._sizes(name) != self._sizes(name)]:
            raise CheckpointError(f"{place} is not the start of {here}: {other[0]} has another shape; move it away")
        return start

    def _start_of(self, name: str, base: FullCheckpoint) -> LowRank:
        """s·B₀·A₀ of one weight."""
        if self._start is None:
            rank = self._sizes(name)["lora_A"][0]
            return methods.recomputed_start(base, name, self.config["init_lora_weights"], rank)
        parts = self._start._read(name)
        return LowRank(methods.lora_scale(self.config, name) * parts["lora_B"], parts["lora_A"])

    def _read(self, name: str) -> dict[str, Tensor]:
        return {part: self.source.read(key).float() for part, key in self._keys[name].items()}


def _beside(name: str, kind: str) -> str:
    return f"{name.rpartition('.')[0]}.{kind}"


def _open_weights(directory: Path, trust_pickle: bool) -> TensorSource:
    if (directory / PICKLED).exists() and not (directory / WEIGHTS).exists():
        return torch_files([directory / PICKLED], trust_pickle)
    return safetensors_files([directory / WEIGHTS])


def _keys_by_weight(source: TensorSource) -> dict[str, dict[str, str]]:
    """The file's key of each part of each base weight; ``full`` is a whole tensor (``modules_to_save``, biases)."""
    found: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    for key in source.shapes:
        name = _WRAPPED.sub("", key.removeprefix(_PREFIX))
        if _FROZEN.fullmatch(key):
            continue
        if match := _SHARED.fullmatch(name):
            shared[match[1]] = key
        elif match := _PART.fullmatch(name):
            module, part, bias = match.groups(default="")
            found.setdefault(f"{module}{bias or '.weight'}", {})[part + bias] = key
        else:
            found.setdefault(name, {})["full"] = key
    for parts in found.values():
        parts |= shared if "vera_lambda_b" in parts else {}
    return found


def _require_supported(config: dict[str, Any], directory: Path) -> None:
    if method_of(config) not in METHODS:
        raise CheckpointError(
            f"{directory} holds a {method_of(config)} adapter; those that are read: {', '.join(METHODS)}"
        )
    if unread := [key for key in _UNREAD if config.get(key)]:
        raise CheckpointError(
            f"{directory} was trained with {', '.join(unread)}, which is not read; train without, or merge it"
        )
    if wrong := [key for key in _NUMBERS.get(config["peft_type"], ()) if not (config.get(key) or 0) > 0]:
        # Old versions of verl's merger write an alpha of 0, with which every delta would be zero.
        raise CheckpointError(
            f"{directory / CONFIG} has no {' and '.join(wrong)} above 0; write there what the adapter was trained with"
        )


def _lowers_base(config: dict[str, Any], directory: Path) -> bool:
    """Whether s·B₀·A₀ was taken out of the base; raises ``CheckpointError`` if it was changed in another way."""
    start = config.get("init_lora_weights", True)
    if config["peft_type"] != "LORA" or start in methods.BASE_IS_KEPT:
        return False
    if str(start).partition("_niter_")[0] not in methods.BASE_IS_LOWERED:
        raise CheckpointError(
            f"{directory} was initialised with {start!r}, whose base no file of the adapter tells; merge it and read that"
        )
    return True
