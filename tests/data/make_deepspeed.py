"""Trains a tiny Llama with DeepSpeed itself in two processes on the CPU and keeps what it saves, as it saves it.

    pip install torch deepspeed transformers safetensors    # made with 2.13.0, 0.19.8, 5.23.0; a C++ compiler is needed
    python make_deepspeed.py

For each of ZeRO-2 and ZeRO-3 ``deepspeed-zeroN/checkpoint-2`` is what Transformers' Trainer would leave, tied embeddings and
frozen matrices included, and ``weights.safetensors`` the live model: float32 masters, or bf16 where frozen.
"""

import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LOCAL_SIZE": "2"}

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

RANKS, STEPS = 2, 2


def tiny_llama() -> LlamaForCausalLM:
    """Sizes that two ranks do not divide, so that weights lie across their partitions and ZeRO-3 pads."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "hidden_size": 9, "intermediate_size": 11, "num_hidden_layers": 2, "head_dim": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    for name, weight in model.named_parameters():
        weight.requires_grad_("up_proj" not in name)
    return model


def train(rank: int, stage: int, directory: str) -> None:
    """One rank's part of a run that saves once."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo", init_method=f"file://{directory}.rendezvous", rank=rank, world_size=RANKS)
    model = tiny_llama()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # Two groups, as Trainer makes: vectors are not decayed.
    groups = [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in trained if weight.ndim == 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        tokens = torch.randint(0, 17, (1, 6), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(f"{directory}/checkpoint-{STEPS}")
    live = {name: live_weight(weight) for name, weight in engine.module.named_parameters()}
    if rank == 0:
        save_file(live, f"{directory}/weights.safetensors")
    dist.barrier()


def live_weight(weight: Tensor) -> Tensor:
    """The float32 master, or the weight itself where it is frozen; every rank must ask."""
    if weight.requires_grad:
        return safe_get_full_fp32_param(weight).detach().clone()
    # Does nothing below ZeRO-3.
    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


if __name__ == "__main__":
    for stage in (2, 3):
        directory = (
            Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent).absolute() / f"deepspeed-zero{stage}"
        )
        directory.mkdir()
        torch.multiprocessing.spawn(train, (stage, str(directory)), nprocs=RANKS)
        Path(f"{directory}.rendezvous").unlink(missing_ok=True)
        for script in directory.glob("*/zero_to_*.py"):
            script.unlink()
