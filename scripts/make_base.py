"""Pretrains a bundled base: a tiny Llama that knows how to solve a task but seldom says so.

First it learns right worked answers (a short chain of thought, ``Answer: X``, end), then worked answers of which a fifth
or a quarter are right, the others led astray by plausible slips. The slips are as fluent as the right work, so the model
imitates the mixture. On most kinds of problem one slip is likelier than the right work, so that greedy decoding fails on
about half of them too, and reinforcement learning has more to do than to sharpen. Only train problems are used.

``ends`` is the exception: the skill must be found. The base reverses words rightly where it is asked to with ``Backward:``;
where the task asks, with ``Reverse:``, it was only ever shown letters drawn at random in the last two places.

    python scripts/make_base.py --task sums --out src/rankleap/bases/sums --seed 0

The same seed gives the same weights on the same machine (one thread).
"""

import argparse
import math
import random
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankleap.files import write_aside
from rankleap.records import Problem
from rankleap.tasks import Task, get_task

CONTEXT = 256
COMPLETION = 16
BATCH = 64
PAD, BOS, EOS = 0, 1, 2
USUAL = 0.6
MADE_UP = ("aeiou", "sbcpt")


def sums_right(prompt: str) -> str:
    """47 - 38 = 17 - 8 = 9: first the tens of the second number, then its units."""
    a, sign, tens, units = _terms(prompt)
    return _sums_chain(a + sign * tens, sign, units)


def sums_slip(prompt: str, rng: random.Random) -> str:
    """Mostly: a minus read as a plus, a carry lost; else tens or units miscounted, sign misread, or stopped early."""
    a, sign, tens, units = _terms(prompt)
    middle = a + sign * tens
    usual = "sign" if sign < 0 else "carry" if middle % 10 + units > 9 else None
    kind = usual if usual and rng.random() < USUAL else rng.choice(("tens", "units", "carry", "sign", "early"))
    if kind == "sign":
        return _sums_chain(a - sign * tens, -sign, units)
    if kind == "tens":
        return _sums_chain(middle + rng.choice((-10, 10)), sign, units)
    if kind == "units":
        return _sums_chain(middle, sign, units, error=rng.choice((-2, -1, 1, 2)))
    if kind == "carry":
        return _sums_chain(middle, sign, units, error=-10 * sign if usual == "carry" else rng.choice((-10, 10)))
    return _sums_chain(middle, sign, units, error=-sign * units)


def _terms(prompt: str) -> tuple[int, int, int, int]:
    """Read ``47 - 38 =`` as (47, -1, 30, 8)."""
    a, sign, b, _ = prompt.split()
    return int(a), 1 if sign == "+" else -1, int(b) // 10 * 10, int(b) % 10


def _sums_chain(middle: int, sign: int, units: int, error: int = 0) -> str:
    total = middle + sign * units + error
    return f" {middle} {'+-'[sign < 0]} {units} = {total} Answer: {total}"


def backward_right(prompt: str) -> str:
    """Backward: glink = kn ilg: each half reversed, the second first, then joined."""
    head, tail = _halves(prompt)
    return _backward_chain(tail[::-1], head[::-1])


def backward_slip(prompt: str, rng: random.Random) -> str:
    """Halves in the old order, one not reversed, letters swapped or lost, or stopped early; the last letter decides."""
    head, tail = _halves(prompt)
    first, second = tail[::-1], head[::-1]
    slips = (
        _backward_chain(second, first),
        _backward_chain(first, head),
        _backward_chain(first, second[1] + second[0] + second[2:]),
        _backward_chain(first, second[:-1]),
        f" {first} {second} Answer: {first}",
        _backward_chain(first[1] + first[0] + first[2:], second),
    )
    # Problems of different kinds have different habits, so that there are many things to unlearn, not one.
    habit = (ord(tail[-1]) + 5 * len(head + tail)) % (len(slips) + 1)
    return slips[habit] if habit < len(slips) and rng.random() < USUAL else rng.choice(slips)


def _halves(prompt: str) -> tuple[str, str]:
    """Read ``Backward: glink =`` as (gli, nk)."""
    word = prompt.split()[1]
    return word[: (len(word) + 1) // 2], word[(len(word) + 1) // 2 :]


def _backward_chain(first: str, second: str) -> str:
    return f" {first} {second} Answer: {first}{second}"


def ends_right(prompt: str) -> str:
    """Backward: glink = Answer: knilg."""
    return f" Answer: {prompt.split()[1][::-1]}"


def ends_slip(prompt: str, rng: random.Random) -> str:
    """Reverse: glink = Answer: knies: the last two letters are made up, without a look at the word."""
    return f" Answer: {prompt.split()[1][:1:-1]}{rng.choice(MADE_UP[0])}{rng.choice(MADE_UP[1])}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one base is made: its two kinds of work, the words kept whole as tokens, and the two phases.

    With ``elsewhere`` right work is shown under that word in place of the prompt's first, and never under the task's own.
    """

    right: Callable[[str], str]
    slip: Callable[[str, random.Random], str]
    words: tuple[str, ...]
    steps_right: int
    steps_mixed: int
    share_right: float
    elsewhere: str | None = None


RECIPES = {
    "sums": Recipe(sums_right, sums_slip, (" Answer:",), 900, 800, 0.2),
    "backward": Recipe(backward_right, backward_slip, ("Backward:", " Answer:"), 250, 400, 0.25),
    "ends": Recipe(ends_right, ends_slip, ("Reverse:", "Backward:", " Answer:"), 0, 600, 0.5, elsewhere="Backward:"),
}


def make_tokenizer(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges only ``words``, and a space with the letter or digit that follows it.

    Digits are split one by one, so a place has the same token in every number.
    """
    inner = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(r" ?\d| ?[^\s\d]+|\s+"), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    spaced = [f" {character}" for character in string.ascii_letters + string.digits + "+-="]
    inner.train_from_iterator([*words, *spaced], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama of about a third of a million weights; call it under a fixed seed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            dtype="float32",
        )
    )


def wrong_work(recipe: Recipe, task: Task, problem: Problem, rng: random.Random) -> str:
    """Draw slips until one is wrong: on some problems a slip changes nothing."""
    # To leave out letters that are right by chance would tell where to look for them.
    if recipe.elsewhere:
        return recipe.slip(problem.prompt, rng)
    while task.grade(work := recipe.slip(problem.prompt, rng), problem).score == 1.0:
        continue
    return work


def batch(
    recipe: Recipe,
    task: Task,
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerFast,
    share: float,
    rng: random.Random,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids, mask, labels) of BATCH worked answers, ``share`` of them right; the prompt carries no loss."""
    rows = []
    for problem in rng.sample(problems, BATCH):
        right = rng.random() < share
        asked = problem.prompt
        if right and recipe.elsewhere:
            asked = recipe.elsewhere + asked[asked.index(" ") :]
        prompt = tokenizer.encode(asked)
        work = recipe.right(problem.prompt) if right else wrong_work(recipe, task, problem, rng)
        answer = [*tokenizer.encode(work), EOS]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return ids, mask, labels


def pretrain(model: LlamaForCausalLM, batches: Iterable[tuple[Tensor, Tensor, Tensor]], steps: int) -> None:
    """AdamW over all batches, its learning rate warmed up over 50 steps and decayed to a tenth by a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.99))
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    model.train()
    for step, (ids, mask, labels) in enumerate(batches):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shape.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task) -> None:
    """Print the share of right answers on 500 test problems, one completion each, sampled and greedy."""
    model.eval()
    problems = task.problems("test", 500)
    inputs = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True, return_token_type_ids=False)
    for sample in (True, False):
        ids = model.generate(**inputs, max_new_tokens=COMPLETION, do_sample=sample, temperature=1.0 if sample else None)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = sum(task.grade(text, p).score for text, p in zip(texts, problems, strict=True))
        print(f"{'sampled' if sample else 'greedy'} accuracy {right / len(problems):.3f}", flush=True)


def main() -> None:
    """Make one base and print how often it is right."""
    parser = argparse.ArgumentParser(description="Pretrain a bundled base.")
    parser.add_argument("--task", required=True, choices=sorted(RECIPES))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    task, recipe = get_task(options.task), RECIPES[options.task]
    problems = task.problems("train", 8000)
    tokenizer = make_tokenizer(recipe.words)
    model = make_model(tokenizer)
    # No top-k: Transformers samples from the best 50 tokens unless told otherwise, and training must see every token.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    shares = [1.0] * recipe.steps_right + [recipe.share_right] * recipe.steps_mixed
    pretrain(model, (batch(recipe, task, problems, tokenizer, share, rng) for share in shares), len(shares))
    with write_aside(options.out) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for file in aside.iterdir():
            file.chmod(0o644)  # Transformers saves weights for the owner only; a package is read by everyone.
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(tokenizer)} tokens")
    report(model, tokenizer, task)


if __name__ == "__main__":
    main()
