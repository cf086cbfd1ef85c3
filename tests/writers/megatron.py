"""A Hugging Face model's weights as Megatron-core names and fuses them, after Megatron's documentation.

Megatron's own writer does not run here: it needs a GPU. What its torch_dist format puts on disk is a torch Distributed
Checkpoint, so torch's own writer saves these tensors.
"""

from io import BytesIO

import torch
from torch import Tensor
from transformers import PreTrainedModel

_LAYER = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
_TOP = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "lm_head.weight": "output_layer.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
}
PADDED = 96
"""Rows of the embedding: Megatron rounds the vocabulary up to a multiple of 128 × TP or so."""


def megatron_state(model: PreTrainedModel, stacked: bool = False) -> dict[str, object]:
    """Weights, and what lies beside them: optimizer state and Transformer Engine's objects.

    ``stacked``: one tensor for all layers, as Megatron saves equal layers, else one for each.
    """
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    state = {_TOP[name]: weight for name, weight in weights.items() if name in _TOP}
    for name in {"embedding.word_embeddings.weight", "output_layer.weight"} & state.keys():
        state[name] = torch.cat([state[name], torch.full((PADDED - len(state[name]), state[name].shape[1]), 7.0)])
    layers = [_layer(weights, f"model.layers.{index}.", model) for index in range(model.config.num_hidden_layers)]
    if stacked:
        state |= {f"decoder.layers.{name}": torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    else:
        state |= {
            f"decoder.layers.{i}.{name}": weight for i, layer in enumerate(layers) for name, weight in layer.items()
        }
    return {
        **state,
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(3),
        "chained_0.optimizer.state.exp_avg.embedding.word_embeddings.weight": torch.ones(3),
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2": BytesIO(b"Transformer Engine"),
        "rng_state/shard_0_1": BytesIO(b"random"),
    }


def _layer(weights: dict[str, Tensor], prefix: str, model: PreTrainedModel) -> dict[str, Tensor]:
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    state = {_LAYER[name]: weight for name, weight in own.items() if name in _LAYER}
    state["mlp.linear_fc1.weight"] = torch.cat([own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]])
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in own:
            state[f"self_attention.linear_qkv.{kind}"] = _fused(
                [own[f"self_attn.{x}_proj.{kind}"] for x in "qkv"], model
            )
    return state


def _fused(parts: list[Tensor], model: PreTrainedModel) -> Tensor:
    """Group by group: the group's query heads, its key head, its value head."""
    groups = model.config.num_key_value_heads
    size = len(parts[1]) // groups
    return torch.cat([part.unflatten(0, (groups, -1, size)) for part in parts], dim=1).flatten(0, 2)
