"""What each step earned and cost: a row of ``metrics.jsonl``.

    wall_s      seconds of training until the end of the step, with all that followed it; a resume carries them on
    rollout_s   sampling      reward_s   judging      save_s, record_s, leap_s   what followed the step
    update_s    all the rest: log-probabilities, loss, gradients, optimizer, and the start of the run

The six add up to what ``wall_s`` grew by. A row is written when the trainer logs, and again with what followed once that is
done: a kill in between loses these seconds and never the row.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankleap.files import append_jsonl, read_jsonl, write_jsonl
from rankleap.training.sync import DRIFT

METRICS = {
    "reward": "reward",
    "reward_std": "reward_std",
    # Share of groups whose rewards are all equal: they give no gradient.
    "frac_reward_zero_std": "no_signal",
    # Shares of completions: no reward was given; the task's grader failed, or found no answer.
    "skipped": "skipped",
    "grader_failures": "grader_failures",
    "unparsable": "unparsable",
    "resampled": "resampled",
    # Between sampler and trainer, nats a token: mean and largest, every ``train.agreement_every`` steps.
    "logp_gap": "logp_gap",
    "logp_gap_max": "logp_gap_max",
    "loss": "loss",
    "value_loss": "value_loss",
    "grad_norm": "grad_norm",
    "kl": "kl",
    "entropy": "entropy",
    "learning_rate": "learning_rate",
    # How far the last sync to vLLM had moved the frozen base before it was put back.
    DRIFT: DRIFT,
    "num_tokens": "tokens",
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "truncated",
}
"""Columns of ``metrics.jsonl`` by the trainer's names for them; ``rewards/NAME`` is the mean of each reward."""
INSIDE = ("rollout_s", "reward_s")
"""Phases that the trainer itself clocks, in ``algorithms.sampling``."""
PHASES: tuple[str, ...] = (*INSIDE, "update_s", "save_s", "record_s", "leap_s")


@dataclass
class MetricsLog(TrainerCallback):
    """Appends each step's row to ``path``."""

    path: Path
    _row: dict[str, Any] | None = field(default=None, init=False)
    _spent_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0), init=False)
    _wall_s: float = field(default=0.0, init=False)
    _since_s: float = field(default=0.0, init=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keep what lies before the step that training starts from; a leap that is made up for belongs to its last row."""
        kept = [row for row in read_jsonl(self.path) if row["step"] <= state.global_step] if self.path.exists() else []
        write_jsonl(self.path, kept)
        self._row, self._wall_s = (kept[-1], kept[-1]["wall_s"]) if kept else (None, 0.0)
        self._since_s = time.perf_counter()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Append a row; the trainer's closing summary, which has no loss of a step, is left out."""
        logs = kwargs.get("logs")
        if isinstance(logs, dict) and "loss" in logs:
            row = {ours: logs[theirs] for theirs, ours in METRICS.items() if theirs in logs}
            row |= {
                key.removesuffix("/mean"): logs[key] for key in logs if key[:8] == "rewards/" and key[-5:] == "/mean"
            }
            if "no_signal" in row:
                settings: Any = args
                groups = settings.generation_batch_size / settings.num_generations
                row["no_signal_prompts"] = round(row["no_signal"] * groups)
            self.lap("update_s")
            for phase in INSIDE:
                self._spent_s[phase] = logs.get(phase, 0.0)
                self._spent_s["update_s"] -= logs.get(phase, 0.0)
            self._row = self._with_spent({"step": state.global_step, "wall_s": 0.0, **row})
            append_jsonl(self.path, self._row)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """All since the row was the save; this callback stands before those that work at a save."""
        self.lap("save_s")

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Write what followed the last step into its row."""
        if self._row and any(self._spent_s.values()):
            self._row = self._with_spent(self._row)
            write_jsonl(self.path, [*read_jsonl(self.path)[:-1], self._row])

    def on_train_end(self, *_: object, **__: object) -> None:
        """As before a step."""
        self.on_step_begin()

    def lap(self, phase: str) -> None:
        """Give the seconds since the last lap to ``phase``."""
        now_s = time.perf_counter()
        self._spent_s[phase] += now_s - self._since_s
        self._since_s = now_s

    def _with_spent(self, row: dict[str, Any]) -> dict[str, Any]:
        spent_s, self._spent_s = self._spent_s, dict.fromkeys(PHASES, 0.0)
        self._wall_s += sum(spent_s.values())
        seconds = {phase: round(row.get(phase, 0.0) + spent_s[phase], 4) for phase in PHASES}
        return {**row, "wall_s": round(self._wall_s, 3), **seconds, "peak_memory_bytes": peak_memory_bytes()}


@dataclass
class Lap(TrainerCallback):
    """Stands behind a callback and gives its seconds to ``phase``."""

    metrics: MetricsLog
    phase: str

    def on_train_begin(self, *_: object, **__: object) -> None:
        """What was prepared, or made up for after a kill."""
        self.metrics.lap(self.phase)

    def on_save(self, *_: object, **__: object) -> None:
        """What was done at a save."""
        self.metrics.lap(self.phase)


def peak_memory_bytes() -> int:
    """The most that this process has held so far: of the GPU's memory, or of the machine's where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    # Kilobytes but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
