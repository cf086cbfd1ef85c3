"""torch.distributed.checkpoint writes: one process, and two with FSDP2 or tensor parallelism; accelerate's own FSDP saving.

prime-rl, NeMo-RL, torchtitan and SkyRL call ``torch.distributed.checkpoint.save`` with a nested state dict; theirs are written
here by the same call with the same nesting. Megatron's own writer needs a GPU; its tensors, sharded as it shards them, go
through torch's.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, save_fsdp_model
from torch import Tensor, distributed, multiprocessing
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from writers.huggingface import moved_adapter, moved_model, weights_of
from writers.megatron import megatron_state

RANKS = 2
UNEVEN = torch.arange(35.0).reshape(5, 7)
"""Neither its rows nor its columns can be shared alike by two."""


def save(state: Mapping[str, object], folder: Path) -> None:
    """One process saves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(dict(state), checkpoint_id=folder, no_dist=True)


def write_dcp(directory: Path, base: Path) -> tuple[str, dict[str, Tensor]]:
    """A full model as accelerate's FSDP lays it out, saved by one process."""
    model = moved_model(base)
    save({"model": model.state_dict()}, directory / "pytorch_model_fsdp_0")
    return "pytorch_model_fsdp_0/__0_0.distcp", weights_of(model)


def write_megatron(directory: Path, base: Path) -> tuple[str, dict[str, Tensor]]:
    """A model as verl lays it out with Megatron, saved by one process."""
    model = moved_model(base)
    save(megatron_state(model), directory / "actor/dist_ckpt")
    model.config.save_pretrained(directory / "actor/huggingface")
    return "actor/dist_ckpt/__0_0.distcp", weights_of(model)


def write_by_two(directory: Path, base: Path) -> None:
    """Two gloo processes save the moved model, or adapter, in each way into a folder of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    multiprocessing.spawn(_rank, args=(directory, base), nprocs=RANKS)


def _rank(rank: int, directory: Path, base: Path) -> None:
    # Accelerate asks for an address, though the processes meet at a file.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{directory / 'rendezvous'}", rank=rank, world_size=RANKS)
    PartialState(cpu=True)
    _save_full(directory, base)
    _save_adapter(directory, base)
    _save_parallel(directory, base)
    distributed.destroy_process_group()


def _save_full(directory: Path, base: Path) -> None:
    model = _sharded(
        moved_model(base),
    )
    save_fsdp_model(_plugin(), PartialState(), model, str(directory / "accelerate"))
    state, optimizers = get_state_dict(model, [torch.optim.AdamW(model.parameters())])
    progress = {"step": 7, "total_tokens": torch.tensor(9)}
    app = {"model": state, "optimizers": optimizers, "scheduler": {"last_epoch": 7}, "progress": progress}
    dcp.save({"app": app}, checkpoint_id=directory / "prime-rl" / "trainer")
    dcp.save(state, checkpoint_id=directory / "nemo-rl" / "policy" / "weights" / "model")


def _save_adapter(directory: Path, base: Path) -> None:
    model = _sharded(
        moved_adapter(base),
    )
    save_fsdp_model(_plugin(), PartialState(), model, str(directory / "adapter"))
    save_fsdp_model(_plugin(), PartialState(), model, str(directory / "adapter-only"), adapter_only=True)


def _save_parallel(directory: Path, base: Path) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    model = moved_model(base)
    columns = ("o_proj.weight", "down_proj.weight")
    placed = {
        name: distribute_tensor(weight, mesh, [Shard(int(name.endswith(columns))) if weight.ndim > 1 else Replicate()])
        for name, weight in model.state_dict().items()
    }
    dcp.save(placed, checkpoint_id=directory / "tensor-parallel")
    stacked = {
        # Behind the layers, rows of what makes heads and columns of what takes them, as Megatron's tensor parallelism does.
        name: distribute_tensor(
            weight, mesh, [Shard(weight.ndim - 1 if "linear_proj" in name or "fc2" in name else weight.ndim > 2)]
        )
        for name, weight in megatron_state(model, stacked=True).items()
        if isinstance(weight, Tensor)
    }
    dcp.save(stacked, checkpoint_id=directory / "megatron")
    uneven = {f"model.norm.{dim}": distribute_tensor(UNEVEN, mesh, [Shard(dim)]) for dim in (0, 1)}
    dcp.save(uneven, checkpoint_id=directory / "uneven")


def _plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")


def _sharded(model: torch.nn.Module) -> torch.nn.Module:
    """FSDP2 shards each layer, then the rest."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, module in model.named_modules():
        if name.endswith(".layers"):
            for layer in module.children():
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
