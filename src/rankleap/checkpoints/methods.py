"""Every adapter method that is read: the parts that PEFT stores of one weight, and the effective delta that they mean.

    LoRA     s·B·A, s = α/r; rsLoRA: s = α/√r                    (2106.09685, 2312.03732); LoRA+ and LoRA-FA store the same
    DoRA     m ∘ (W₀ + s·B·A) / ‖W₀ + s·B·A‖ - W₀                (2402.09353, Eq. 5), norms of the rows of PyTorch's weight
    AdaLoRA  α/(r₀ + 1e-5) · B·diag(E)·A                         (2303.10512), r₀ the rank before any was pruned
    MiSS     Dᵀ·[I I … I], D of r rows                           (2409.15371); "mini": D repeated over the outputs;
             "bat": W₀·D + D for each r × r tile, not low-rank
    VeRA     diag(b)·B·diag(d)·A, B and A random and shared      (2310.11454)
    IA³      W₀ times l - 1 by rows, the bias too, or by columns (2205.05638)
    PiSSA    s·(B·A - B₀·A₀), where the base lost s·B₀·A₀ first  (2404.02948); MiLoRA, OLoRA … alike (2406.09044, 2406.01775)

The base is the true one, as it was before any such initialisation. A product stays a product; all of it is float32.
LN tuning and ``modules_to_save`` store whole tensors, which take the place of the base's.
Shapes: M outputs, N inputs, R rank, K triplets, T tiles of R outputs.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rankleap.checkpoints.delta import Delta, LowRank, dense
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.errors import CheckpointError

Config = Mapping[str, Any]
Shape = tuple[int, ...]
ANY = -1
"""A side of a weight that its adapter does not store; the base knows it."""
BASE_IS_KEPT = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""LoRA initialisations that leave the base as it was."""
BASE_IS_LOWERED = ("pissa", "milora", "olora", "corda", "lora_ga")
"""Those that take s·B₀·A₀ out of it. Of any other, such as LoftQ, no file of the adapter tells what base is left."""
RECOMPUTED = ("pissa", "milora")
"""Those whose s·B₀·A₀ follows from the base."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """One weight that an adapter changes: what is stored of it, in float32, and which rows of its delta are asked for."""

    name: str
    parts: Mapping[str, Tensor]
    config: Config
    base: FullCheckpoint
    rows: slice
    start: Callable[[], LowRank] | None
    """s·B₀·A₀ that the initialisation took out of the base, if it did."""
    names: tuple[str, ...]
    """Every weight that the adapter changes."""


@dataclass(frozen=True, slots=True)
class Form:
    """One way in which a weight is stored: the parts with a letter for each side (P: a rank that may be 0), and its delta."""

    sides: dict[str, str]
    delta: Callable[[Adapted], Delta]
    bias: bool = False
    """Whether it changes the bias beside the weight as well, if the base has one."""
    shape: Callable[[dict[str, int]], Shape] = lambda side: (side.get("M", ANY), side.get("N", ANY))

    def fit(self, sizes: Mapping[str, Shape]) -> Shape | None:
        """The weight's shape, or ``None`` where parts are empty or do not fit together, as shards that were not gathered."""
        side = {"1": 1}
        for part, letters in self.sides.items():
            found = zip(letters, sizes[part], strict=False)
            if len(sizes[part]) != len(letters) or any(side.setdefault(letter, n) != n for letter, n in found):
                return None
        return self.shape(side) if all(side[letter] for letter in side if letter != "P") else None


def lora_scale(config: Config, name: str) -> float:
    """S of one LoRA weight, with ``rank_pattern`` and ``alpha_pattern`` applied."""
    module = name.rpartition(".")[0]
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(pattern: dict[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that is the module's name, or a whole-word end of it, as a regular expression."""
    return next((value for key, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)


def _lora(of: Adapted) -> LowRank:
    product = LowRank(lora_scale(of.config, of.name) * of.parts["lora_B"][of.rows], of.parts["lora_A"])
    if of.start is None:
        return product
    start = of.start()
    # (L - L₀)·R + L₀·(R - R₀): both are as small as the delta, where LR - L₀R₀ would cancel to float32's noise.
    left_MR = start.left_MR[of.rows]
    return LowRank(
        torch.cat([product.left_MR - left_MR, left_MR], dim=1),
        torch.cat([product.right_RN, product.right_RN - start.right_RN]),
    )


def _dora(of: Adapted) -> Tensor:
    base_MN = of.base.weight(of.name, of.rows)
    direction_MN = base_MN + dense(_lora(of))
    factor_M = of.parts["lora_magnitude_vector"][of.rows] / torch.linalg.vector_norm(direction_MN, dim=1)
    return direction_MN.mul_(factor_M[:, None]).sub_(base_MN)


def _embedding(of: Adapted) -> LowRank:
    # An embedding's weight lies the other way round than a linear layer's.
    left_MR = lora_scale(of.config, of.name) * of.parts["lora_embedding_A"].T
    return LowRank(left_MR[of.rows], of.parts["lora_embedding_B"].T)


def _bias(of: Adapted) -> Tensor:
    return lora_scale(of.config, of.name) * of.parts["lora_B.bias"][of.rows]


def _adalora(of: Adapted) -> LowRank:
    # Pruning shortens what is saved, yet neither training nor PEFT's reload rescales by the rank that is left.
    factor = of.config["lora_alpha"] / (of.config["init_r"] + 1e-5)
    return LowRank(factor * of.parts["lora_B"][of.rows], of.parts["lora_E"] * of.parts["lora_A"])


def _miss(of: Adapted) -> LowRank:
    block_RM, (rows, columns) = of.parts["miss_block"], of.base.shapes[of.name]
    rank, width = block_RM.shape
    # "mini" stores fewer columns than there are outputs.
    left_MR = block_RM.T.repeat(rows // width, 1)
    return LowRank(left_MR[of.rows], torch.eye(rank).repeat(1, -(-columns // rank))[:, :columns])


def _bat(of: Adapted) -> Tensor:
    rank = of.parts["miss_block"].shape[1]
    # Whole tiles around the rows that are asked for.
    tiles = slice(of.rows.start // rank, -(-of.rows.stop // rank))
    block_TRR = of.parts["miss_block"][tiles]
    base_MN = of.base.weight(of.name, slice(tiles.start * rank, tiles.stop * rank))
    # The tiles along the inputs all meet the same block, so they are more rows of one product.
    moved = (base_MN.reshape(len(block_TRR), -1, rank) @ block_TRR).view(len(block_TRR), rank, -1, rank)
    first = of.rows.start - tiles.start * rank
    return (moved + block_TRR[:, :, None]).view(base_MN.shape)[first : first + of.rows.stop - of.rows.start]


def _vera(of: Adapted) -> LowRank:
    right_RN, left_MR = (of.parts["vera_A"], of.parts["vera_B"]) if "vera_A" in of.parts else _redrawn(of)
    right_RN = of.parts["vera_lambda_d"][:, None] * right_RN[:, : of.base.shapes[of.name][1]]
    return LowRank(of.parts["vera_lambda_b"][of.rows, None] * left_MR[of.rows], right_RN)


def _redrawn(of: Adapted) -> tuple[Tensor, Tensor]:
    if of.base.dtypes[of.name] != "F32":
        raise CheckpointError(
            f"VeRA's projections were not saved (save_projection=False), and on a base in {of.base.dtypes[of.name]} "
            "nothing tells to which precision they were rounded; save them (save_projection=True)"
        )
    # As wide as the widest of the adapted weights; each uses a corner.
    rows, columns = (max(of.base.shapes[name][side] for name in of.names) for side in (0, 1))
    return _projections(len(of.parts["vera_lambda_d"]), rows, columns, of.config["projection_prng_key"])


@lru_cache(maxsize=1)
def _projections(rank: int, rows: int, columns: int, key: int) -> tuple[Tensor, Tensor]:
    """``vera_A`` and ``vera_B`` as PEFT draws them: Kaiming-uniform, A first, both from one generator."""
    generator = torch.Generator().manual_seed(key)
    right_RN, left_MR = torch.empty(rank, columns), torch.empty(rows, rank)
    for drawn in (right_RN, left_MR):
        # Not √(6/fan): the product of roots differs in its last bit.
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(drawn.shape[1]))
        drawn.uniform_(-bound, bound, generator=generator)
    return right_RN, left_MR


def _ia3(of: Adapted) -> Tensor:
    base_MN, factor = of.base.weight(of.name, of.rows), of.parts["ia3_l"] - 1.0
    # One factor for each output (and its bias), or one for each input where the layer is feed-forward.
    factor = factor[of.rows] if factor.shape[1] == 1 else factor
    return (factor.flatten() if base_MN.ndim == 1 else factor) * base_MN


_LORA = {"lora_A": "RN", "lora_B": "MR"}
_VERA = {"vera_lambda_b": "M", "vera_lambda_d": "R"}
_DORA = Form({**_LORA, "lora_magnitude_vector": "M"}, _dora)
METHODS: dict[str, tuple[Form, ...]] = {
    "LORA": (
        Form(_LORA, _lora),
        _DORA,
        Form({"lora_embedding_A": "RM", "lora_embedding_B": "NR"}, _embedding),
        Form({"lora_B.bias": "M"}, _bias, shape=lambda side: (side["M"],)),
    ),
    # Alone: what is left of a DoRA without its magnitudes would look like LoRA.
    "LORA with DoRA": (_DORA,),
    "ADALORA": (Form({"lora_A": "PN", "lora_B": "MP", "lora_E": "P1"}, _adalora),),
    "MISS": (Form({"miss_block": "RM"}, _miss),),
    "MISS mini": (Form({"miss_block": "RK"}, _miss),),
    "MISS bat": (Form({"miss_block": "TRR"}, _bat, shape=lambda side: (side["T"] * side["R"], ANY)),),
    "VERA": (Form({**_VERA, "vera_A": "RX", "vera_B": "YR"}, _vera),),
    "VERA without projections": (Form(_VERA, _vera),),
    "IA3": (Form({"ia3_l": "M1"}, _ia3, bias=True), Form({"ia3_l": "1N"}, _ia3)),
    "LN_TUNING": (),
}
"""By PEFT type and variant; any of them may also hold whole tensors."""


def method_of(config: Config) -> str:
    """The key that ``METHODS`` has, or would have."""
    kind, variant = str(config.get("peft_type")), config.get("init_weights")
    if kind == "LORA" and config.get("use_dora"):
        return f"{kind} with DoRA"
    if kind == "VERA" and not config.get("save_projection", True):
        return f"{kind} without projections"
    return f"{kind} {variant}" if kind == "MISS" and isinstance(variant, str) else kind


# As many as a 32B model has linear layers: each checkpoint needs the same, and one SVD takes up to minutes.
@lru_cache(maxsize=512)
def recomputed_start(base: FullCheckpoint, name: str, kind: str, rank: int) -> LowRank:
    """s·B₀·A₀ as PiSSA or MiLoRA took it out of the base: the largest or the smallest triplets of the weight."""
    left_MK, sigma_K, right_KN = torch.linalg.svd(base.weight(name), full_matrices=False)
    kept = slice(rank) if kind == "pissa" else slice(-rank, None)
    # A copy, for a view would keep all K triplets in memory.
    return LowRank(left_MK[:, kept] * sigma_K[kept], right_KN[kept].clone())
