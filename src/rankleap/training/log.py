"""Writes ``metrics.jsonl``: one row per optimizer step, under names that do not change with TRL's.

A resumed run drops the rows after the step it resumes from, and its wall clock goes on from the last row that is kept.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankleap.files import append_jsonl, read_jsonl, write_jsonl

NAMES = {
    "reward": "reward",
    "reward_std": "reward_std",
    # Share of groups whose rewards are all equal: they give no gradient.
    "frac_reward_zero_std": "no_signal",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "kl": "kl",
    "entropy": "entropy",
    "learning_rate": "learning_rate",
    "num_tokens": "tokens",
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "truncated",
}


@dataclass
class MetricsLog(TrainerCallback):
    """Appends each step's metrics to ``path`` with ``wall_s``, the seconds of training so far."""

    path: Path
    _zero_s: float = field(default=0.0, init=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keep what lies before the step that training starts from."""
        kept = [row for row in read_jsonl(self.path) if row["step"] <= state.global_step] if self.path.exists() else []
        write_jsonl(self.path, kept)
        self._zero_s = time.perf_counter() - (kept[-1]["wall_s"] if kept else 0.0)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Append a row; the trainer's closing summary, which has no reward, is left out."""
        logs = kwargs.get("logs")
        if isinstance(logs, dict) and "reward" in logs:
            row = {ours: logs[theirs] for theirs, ours in NAMES.items() if theirs in logs}
            wall_s = round(time.perf_counter() - self._zero_s, 3)
            append_jsonl(self.path, {"step": state.global_step, "wall_s": wall_s, **row})
