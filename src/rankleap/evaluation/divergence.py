"""How far a model has moved from its base on what the base itself would say: forward KL (RL's Razor, 2509.04259).

    KL(base ‖ model) = E_{y ~ base} Σ_t Σ_v p_base(v | y_<t) · [log p_base(v | y_<t) − log p_model(v | y_<t)]

Given completions sampled from the base, each token contributes its sum over the whole vocabulary, which has far less
variance than the log-ratio of the one token that was drawn. The estimate is per token; problems are the clusters.
Softmax is float32 whatever the weights are; sums are float64.

Shapes: B rows of a batch, W their width, N completion tokens of a batch, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankleap.errors import InputError, NotFiniteError
from rankleap.evaluation.metrics import ratio_of_sums
from rankleap.evaluation.sampler import Completion, evaluation_mode, tokenize
from rankleap.records import Estimate

Row = tuple[list[int], tuple[int, ...]]


def forward_kl(
    base_model: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[Sequence[Completion]],
    batch_size: int = 64,
) -> Estimate:
    """KL(base ‖ model) in nats per token over ``completions``, those that ``sample`` drew from the base per prompt."""
    if len(prompts) != len(completions):
        raise InputError(f"forward KL needs completions of each prompt, got {len(completions)} for {len(prompts)}")
    problems = zip(tokenize(tokenizer, prompts), completions, strict=True)
    rows = [(p, (ids, drawn.token_ids)) for p, (ids, group) in enumerate(problems) for drawn in group]
    # Like lengths share a batch, so little is padding.
    rows.sort(key=lambda row: -len(row[1][0]) - len(row[1][1]))
    sums, counts = torch.zeros(2, len(prompts), dtype=torch.float64)
    with evaluation_mode(base_model), evaluation_mode(model), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            owners, batch = zip(*rows[start : start + batch_size], strict=True)
            owner_N = torch.tensor(owners).repeat_interleave(torch.tensor([len(row[1]) for row in batch]))
            kl_N = _token_kl(base_model, model, batch)
            sums.index_add_(0, owner_N, kl_N)
            counts.index_add_(0, owner_N, torch.ones_like(kl_N))
    if not sums.isfinite().all():
        raise NotFiniteError("forward KL is not finite: a model gives NaN or infinite logits; look at its weights")
    return ratio_of_sums(sums.numpy(), counts.numpy())


def _token_kl(base_model: PreTrainedModel, model: PreTrainedModel, batch: Sequence[Row]) -> torch.Tensor:
    """KL at every completion token of a batch, row after row, on the CPU."""
    width = max(len(prompt) + len(drawn) for prompt, drawn in batch)
    # Padding on the right: a causal model never looks at it, and positions count from 0 without being told.
    tokens_BW = torch.tensor([[*prompt, *drawn] + [0] * (width - len(prompt) - len(drawn)) for prompt, drawn in batch])
    first_B1 = torch.tensor([[len(prompt) - 1] for prompt, _ in batch])
    count_B1 = torch.tensor([[len(drawn)] for _, drawn in batch])
    place_BW = torch.arange(width) - first_B1  # the logits at place i speak of completion token i
    # The last drawn token is attended to, but its own logits speak of nothing that was drawn.
    chosen_BW = (place_BW >= 0) & (place_BW < count_B1)
    mask_BW = (place_BW <= count_B1).long()
    # Only the rows of interest go through the softmax: over a large vocabulary the rest is most of the memory.
    base_NV, model_NV = (
        each(input_ids=tokens_BW.to(each.device), attention_mask=mask_BW.to(each.device))
        .logits[chosen_BW.to(each.device)]
        .float()
        .log_softmax(-1)
        .to(base_model.device)
        for each in (base_model, model)
    )
    return kl_div(model_NV, base_NV, reduction="none", log_target=True).sum(-1).double().cpu()
