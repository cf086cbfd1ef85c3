"""verl's way to save under FSDP: every rank writes its own shards of the state dict with ``torch.save``.

The ranks are real processes (gloo, CPU) and the shards FSDP's own; which files lie where follows verl's
``FSDPCheckpointManager``. Run as a program, this starts the ranks.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

LORA_META = "lora_train_meta.json"


class Tiny(nn.Module):
    """Sizes that do not divide among the ranks, one of them 1, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(7, 4)
        self.mlp = nn.Linear(4, 6)
        self.score = nn.Linear(4, 1)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def fsdp2(mesh_shape: tuple[int, ...], **settings: Any) -> dict[str, Any]:
    """Shards of ``fully_shard``."""
    model = Tiny()
    for module in (model.mlp, model):
        fully_shard(module, mesh=_mesh(mesh_shape), **settings)
    return model.state_dict()


def fsdp1(mesh_shape: tuple[int, ...] | None) -> dict[str, Any]:
    """Shards of ``FullyShardedDataParallel``: of DTensors on a mesh as verl does, else ShardedTensors."""
    hybrid = mesh_shape is not None and len(mesh_shape) == 2
    model = FullyShardedDataParallel(
        Tiny(),
        device_id=torch.device("cpu"),
        device_mesh=_mesh(mesh_shape) if mesh_shape else None,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD,
    )
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        return model.state_dict()


TINY: dict[str, Callable[[], dict[str, Any]]] = {
    "fsdp2": lambda: fsdp2((4,)),
    "fsdp2-columns": lambda: fsdp2(
        (4,), shard_placement_fn=lambda weight: Shard(weight.shape[-1] == 4 and weight.ndim - 1)
    ),
    "fsdp2-hybrid": lambda: fsdp2((2, 2)),
    "fsdp1": lambda: fsdp1((4,)),
    "fsdp1-hybrid": lambda: fsdp1((2, 2)),
    "fsdp1-no-mesh": lambda: fsdp1(None),
}
"""State dicts of ``Tiny`` on four ranks."""
STRANGE: dict[str, Callable[[], Any]] = {
    "plain": lambda: torch.arange(6.0).view(3, 2),
    "replicated": lambda: distribute_tensor(torch.arange(6.0).view(3, 2), _mesh((4,)), [Replicate()]),
    "empty": lambda: distribute_tensor(torch.empty(0, 3), _mesh((4,)), [Shard(0)]),
    "partial": lambda: DTensor.from_local(torch.ones(3, 2), _mesh((4,)), [Partial()]),
    "both-sides": lambda: distribute_tensor(torch.ones(4, 4), _mesh((2, 2)), [Shard(0), Shard(1)]),
    "outer": lambda: distribute_tensor(torch.ones(4, 4), _mesh((2, 2)), [Shard(0), Replicate()]),
}
"""Other things that a rank may hold, by the folder and name that they are saved under."""


def write_tiny(directory: Path) -> None:
    """Every entry of ``TINY`` and ``STRANGE`` in a folder of its own."""
    for name in (*TINY, *STRANGE):
        (directory / name).mkdir()
    _run_ranks(4, "tiny", directory)


def write_verl(directory: Path, base: Path) -> tuple[str, dict[str, Tensor]]:
    """A full model on two ranks."""
    from writers.huggingface import moved_model, weights_of

    _run_ranks(2, "full", directory, base)
    return "actor/model_world_size_2_rank_1.pt", weights_of(moved_model(base))


def write_verl_lora(directory: Path, base: Path) -> dict[str, Tensor]:
    """A LoRA adapter within its base on two ranks; gives the weights of the merged model."""
    from writers.huggingface import moved_adapter, weights_of

    _run_ranks(2, "lora", directory, base)
    return weights_of(moved_adapter(base, _lora_config()).merge_and_unload())


def _run_ranks(world: int, *arguments: object) -> None:
    # By its path, for as a module it would import every other writer first; -P keeps their names from hiding packages.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", __file__, *map(str, (world, f"{folder}/store", *arguments))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _mesh(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("fsdp",) if len(shape) == 1 else ("ddp", "fsdp"))


def _save(state: dict[str, Any], directory: Path) -> None:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.save(state, directory / f"model_world_size_{world}_rank_{rank}.pt")


def _lora_config() -> Any:
    from peft import LoraConfig

    targets = ["q_proj", "down_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=targets, modules_to_save=["lm_head"])


def _save_actor(kind: str, directory: Path, base: Path) -> None:
    from writers.huggingface import moved_adapter, moved_model

    model = moved_model(base) if kind == "full" else moved_adapter(base, _lora_config())
    layers = [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
    for module in (*layers, model):
        fully_shard(module, mesh=_mesh((distributed.get_world_size(),)))
    actor = directory / "actor"
    actor.mkdir(exist_ok=True)
    _save(model.state_dict(), actor)
    if distributed.get_rank() == 0:
        model.config.save_pretrained(actor / "huggingface")
        (actor / "fsdp_config.json").write_text(
            json.dumps({"FSDP_version": 2, "world_size": distributed.get_world_size()})
        )
        if kind == "lora":
            meta = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"}
            (actor / LORA_META).write_text(json.dumps(meta))


def _be_rank(rank: int, world: int, store: str, kind: str, *places: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    if kind == "tiny":
        for name, state_dict in TINY.items():
            _save(state_dict(), places[0] / name)
        for name, tensor in STRANGE.items():
            _save({name: tensor()}, places[0] / name)
    else:
        _save_actor(kind, *places)
    distributed.barrier()
    distributed.destroy_process_group()


def _be_ranks(world: str, store: str, kind: str, *places: str) -> None:
    if kind != "tiny":
        import writers.huggingface  # noqa: F401
    # Forked, so that the imports, which take longest, are made once.
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_be_rank, args=(rank, int(world), store, kind, *map(Path, places)))
        for rank in range(int(world))
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


if __name__ == "__main__":
    _be_ranks(*sys.argv[1:])
