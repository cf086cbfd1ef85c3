"""Writes as DeepSpeed 0.19.8 does (``runtime/engine.py``, ``runtime/zero/``), for any model and number of ranks.

DeepSpeed needs a compiler to install, so the tests do without it; files that it wrote itself, with the names of its own classes
in their pickles, are in ``tests/data``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

from writers.huggingface import moved_model, weights_of

MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "mp_rank_00_optim_states.pt"

Groups = list[dict[str, Parameter]]


def write_step(directory: Path, base: Path) -> tuple[str, dict[str, Tensor]]:
    """Trainer's step directory of a ZeRO-2 run on three ranks."""
    model = moved_model(base)
    write_zero(directory / "global_step20", model, stage=2)
    (directory / "latest").write_text("global_step20")
    return f"global_step20/bf16_zero_pp_rank_1_{OPTIMIZER}", weights_of(model)


def write_zero(folder: Path, model: torch.nn.Module, stage: int, ranks: int = 3, alignment: int = 1) -> None:
    """One step's folder: masters are the model's weights as they are, what runs and what is frozen is bf16.

    ``alignment`` is that of each weight in ZeRO-2's vectors, in numbers (its option ``parameter_alignment``).
    """
    folder.mkdir(parents=True)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups: Groups = [
        {name: weight for name, weight in trained.items() if weight.ndim > 1},
        {name: weight for name, weight in trained.items() if weight.ndim == 1},
    ]
    for rank, masters in enumerate(_sharded(groups, ranks) if stage == 3 else _split(groups, ranks, alignment)):
        state = _optimizer_state(masters, stage, ranks, len(groups))
        if alignment > 1:
            state["optimizer_state_dict"]["param_alignment_paddings"] = [_gaps(group, alignment) for group in groups]
        torch.save(state, folder / f"bf16_zero_pp_rank_{rank}_{OPTIMIZER}")
    for rank in range(ranks if stage == 3 else 1):
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        torch.save(_model_state(model, groups, stage, rank, ranks), folder / f"{prefix}{MODEL}")


def _split(groups: Groups, ranks: int, alignment: int) -> list[list[Tensor]]:
    """ZeRO-1/2: a group is one vector, padded to twice the ranks and cut into equal parts; the last is saved without padding."""
    vectors = [
        torch.cat([pad(weight.detach().flatten(), (0, gap)) for weight, gap in zip(group.values(), gaps, strict=True)])
        for group in groups
        for gaps in [_gaps(group, alignment)]
    ]
    sizes = [_padded(vector, 2 * ranks).numel() // ranks for vector in vectors]
    return [
        [vector[rank * size :][:size].clone() for vector, size in zip(vectors, sizes, strict=True)]
        for rank in range(ranks)
    ]


def _gaps(group: dict[str, Parameter], alignment: int) -> list[int]:
    *all_but_last, _ = (-weight.numel() % alignment for weight in group.values())
    return [*all_but_last, 0]


def _sharded(groups: Groups, ranks: int) -> list[list[Tensor]]:
    """ZeRO-3: each weight is padded and cut, and a rank's group is the vector of its pieces."""
    return [
        [torch.cat([_piece(weight, rank, ranks) for weight in group.values()]) for group in groups]
        for rank in range(ranks)
    ]


def _piece(weight: Tensor, rank: int, ranks: int) -> Tensor:
    return _padded(weight.detach().flatten(), ranks).chunk(ranks)[rank].clone()


def _padded(vector: Tensor, multiple: int) -> Tensor:
    return pad(vector, (0, -vector.numel() % multiple))


def _optimizer_state(masters: Sequence[Tensor], stage: int, ranks: int, groups: int) -> dict[str, Any]:
    moments = {
        "state": {i: {"step": torch.tensor(20.0), "exp_avg": torch.ones_like(part)} for i, part in enumerate(masters)}
    }
    state: dict[str, Any] = {"zero_stage": stage, "overflow": False}
    if stage == 3:
        state |= {"partition_count": ranks, "optimizer_state_dict": moments, "fp32_flat_groups": list(masters)}
    else:
        state |= {"partition_count": [ranks] * groups, "base_optimizer_state": moments}
        state |= {"single_partition_of_fp32_groups": list(masters), "clip_grad": 1.0}
    return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}


def _model_state(model: torch.nn.Module, groups: Groups, stage: int, rank: int, ranks: int) -> dict[str, Any]:
    # One bf16 tensor for each weight, so that tied ones share theirs.
    running = {weight: weight.detach().bfloat16() for weight in model.parameters()}
    module = dict(model.named_parameters(remove_duplicate=False))
    own_names = {weight: name for name, weight in model.named_parameters()}
    frozen = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    return {
        "module": {name: running[weight] if stage < 3 else torch.empty(0) for name, weight in module.items()}
        | {"buffer": torch.ones(3)},
        "buffer_names": ["buffer"],
        "param_shapes": [{name: weight.shape for name, weight in group.items()} for group in groups],
        "frozen_param_shapes": {name: weight.shape for name, weight in frozen.items()},
        "frozen_param_fragments": {
            name: _piece(running[weight], rank, ranks) if stage == 3 else running[weight]
            for name, weight in frozen.items()
        },
        "shared_params": {name: own_names[weight] for name, weight in module.items() if own_names[weight] != name},
        "global_steps": 20,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": "0.19.8",
    }
