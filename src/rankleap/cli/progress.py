"""A progress bar with the reward on it, as a Transformers callback."""

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepProgress(TrainerCallback):
    """Steps done, reward smoothed over about ten steps, time left; on stderr, so that stdout stays the result."""

    def __init__(self) -> None:
        from rich.console import Console

        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._reward: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Show the bar, where a resumed run stands."""
        self._task = self._bar.add_task("…", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Move the bar."""
        logs = kwargs.get("logs")
        # The closing summary of a training has no loss.
        if isinstance(logs, dict) and "loss" in logs:
            reward = logs.get("reward")
            # None also where no completion earned one.
            now = float(self._reward or 0.0) if reward is None else float(reward)
            self._reward = now if self._reward is None else 0.9 * self._reward + 0.1 * now
            what = f"reward {self._reward:.3f}" if "reward" in logs else f"loss {float(logs['loss']):.3f}"
            self._bar.update(self._task, completed=state.global_step, description=what)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Leave the finished bar on the screen."""
        self._bar.stop()
