"""Samples completions with Transformers' ``generate``, in process, without a trace in the model that is sampled.

Guarantee: the same seed gives the same completions. The model may be in the middle of its training: its train/eval
flags, its ``generation_config`` and the random state are put back, its cache and checkpointing settings never touched.
The distribution is the model's own at this temperature and top-p: ``generate`` reads whatever is left unsaid from the
model's ``generation_config`` (top-k, min-p, a repetition penalty, suppressed tokens), so that one is taken aside.

Forward KL is how far a model has moved from its base on what the base itself would say (RL's Razor, 2509.04259):

    KL(base ‖ model) = E_{y ~ base} Σ_t Σ_v p_base(v | y_<t) · [log p_base(v | y_<t) − log p_model(v | y_<t)]

Given completions sampled from the base, each token contributes its sum over the whole vocabulary, which has far less
variance than the log-ratio of the one token that was drawn. The estimate is per token; problems are the clusters.
Softmax is float32 whatever the weights are; sums are float64.

Prompts are tokenized as TRL tokenizes plain text, sorted by length, and padded on the left.
Shapes: B rows of a batch, W their width, L new tokens, N completion tokens of a batch, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn.functional import kl_div
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rankleap.errors import InputError, NotFiniteError
from rankleap.evaluation.metrics import ratio_of_sums
from rankleap.evaluation.result import Sampling
from rankleap.records import Estimate

Row = tuple[list[int], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion; ``truncated`` if it met no end-of-sequence token."""

    text: str
    token_ids: tuple[int, ...]
    """With the end-of-sequence token, which ``text`` leaves out."""
    truncated: bool

    @property
    def tokens(self) -> int:
        """How many tokens were sampled."""
        return len(self.token_ids)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    count: int,
    sampling: Sampling,
    seed: int,
) -> list[list[Completion]]:
    """Return ``count`` completions of each prompt, in the order of the prompts; ``model`` may be a PEFT model."""
    if count < 1:
        raise InputError(f"sampling needs at least 1 completion of each prompt, got {count}")
    prompt_ids = tokenize(tokenizer, prompts)
    # Like lengths share a batch, so little is padding; the longest come first, so memory runs out at once or never.
    longest_first = sorted(range(len(prompts)), key=lambda p: -len(prompt_ids[p]))
    rows = [p for p in longest_first for _ in range(count)]
    config = _generation_config(model, tokenizer, sampling)
    completions: list[list[Completion]] = [[] for _ in prompts]
    with evaluation_mode(model), _plain_defaults(model), _seeded(model.device, seed), torch.no_grad():
        for start in range(0, len(rows), sampling.batch_size):
            batch = rows[start : start + sampling.batch_size]
            found = _generate(model, tokenizer, [prompt_ids[p] for p in batch], config)
            for p, completion in zip(batch, found, strict=True):
                completions[p].append(completion)
    return completions


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


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt, special tokens included; refuse a prompt that has none."""
    prompt_ids: list[list[int]] = tokenizer(list(prompts))["input_ids"] if prompts else []
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if not ids:
            raise InputError(f"prompt {prompt!r} has no tokens; a model needs at least one to continue")
    return prompt_ids


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in eval mode (no dropout, no gradient checkpointing), and each module back as it was."""
    # Each flag by itself: a model in training may hold modules that stay in eval, a frozen dropout for one.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]], config: GenerationConfig
) -> list[Completion]:
    width = max(map(len, prompt_ids))
    # On the left, so that every row continues from the last column.
    input_BW = torch.tensor([[config.pad_token_id] * (width - len(ids)) + ids for ids in prompt_ids])
    # Said, not inferred from the padding token, which may be the end token as well.
    mask_BW = torch.arange(width) >= torch.tensor([[width - len(ids)] for ids in prompt_ids])
    generate = cast(Callable[..., torch.Tensor], model.generate)
    output = generate(
        input_ids=input_BW.to(model.device), attention_mask=mask_BW.long().to(model.device), generation_config=config
    )
    new_BL = output[:, width:].cpu()
    # Rows that ended early go on as padding, which may be the same token: the first end counts.
    ended_BL = torch.isin(new_BL, torch.tensor(config.eos_token_id))
    # An argmax gives the first of equal maxima, and the end token itself counts as sampled.
    lengths = torch.where(ended_BL.any(1), ended_BL.int().argmax(1) + 1, new_BL.shape[1]).tolist()
    token_ids = [ids[:length] for ids, length in zip(new_BL.tolist(), lengths, strict=True)]
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    ended = ended_BL.any(1).tolist()
    return [Completion(text, tuple(ids), not end) for text, ids, end in zip(texts, token_ids, ended, strict=True)]


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> GenerationConfig:
    """Everything that ``generate`` is to do; a sequence ends where the tokenizer or the model's own config says so."""
    declared = _transformer(model).generation_config
    end = declared.eos_token_id if declared is not None else None
    # Chat models may name several ends in their config and only one in the tokenizer.
    known = [tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])]
    ends = sorted({token for token in known if isinstance(token, int)})
    if not ends:
        raise InputError("neither the tokenizer nor the generation config names an end-of-sequence token; set one")
    pad = tokenizer.pad_token_id
    # top_k must be said: left out, it means 50.
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        # Greedy decoding complains about a temperature that it would not use, so it is given none.
        do_sample=sampling.temperature > 0,
        **(chosen if sampling.temperature > 0 else {}),
        max_new_tokens=sampling.max_new_tokens,
        # A trainer turns the cache off in the model's config, and sampling without it is quadratic.
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=pad if isinstance(pad, int) else ends[0],
    )


def _transformer(model: torch.nn.Module) -> PreTrainedModel:
    """Return the Transformers model inside a PEFT model, or the model itself."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


@contextmanager
def _plain_defaults(model: torch.nn.Module) -> Iterator[None]:
    """Take the model's own generation config aside."""
    transformer = _transformer(model)
    declared = transformer.generation_config
    transformer.generation_config = GenerationConfig()
    try:
        yield
    finally:
        transformer.generation_config = declared


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the generator of this device alone (``torch.manual_seed`` reaches every GPU), and put its state back."""
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"sampling needs a model on a CPU or CUDA device, got {device}; move it with model.to('cpu')")
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


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
