"""The trajectory recorder: rank-k factors of the live model, written by any Hugging Face or TRL trainer.

    trainer = GRPOTrainer(..., callbacks=[TrajectoryRecorder("runs/mine/trajectory", base="Qwen/Qwen3-8B", every=20)])

MBs where checkpoints are GBs, and the same factors that ``rankleap trajectory`` computes from checkpoints afterwards:
both hand the deltas of ``checkpoints`` to ``trajectory.record``. From LoRA they are exact (s·B·A by QR); the base is read from
disk, one tensor at a time, so no second copy of the model is held.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankleap.checkpoints import AdapterCheckpoint, Delta, FullCheckpoint, resolve_base
from rankleap.checkpoints.delta import require_finite
from rankleap.checkpoints.full import as_float32, require_same_shapes
from rankleap.errors import InputError
from rankleap.trajectory import Recording, open_recording


@dataclass
class TrajectoryRecorder(TrainerCallback):
    """Records factors of the deltas since ``base`` every ``every`` steps, or at every save when ``every`` is ``None``.

    ``base`` is the model that training started from: a directory, a Hub name or ``bundled:NAME``. ``rank`` triplets are
    kept of each matrix. Raises ``BaseMismatchError`` at the start if the model is not of the base's shape.
    """

    directory: Path | str
    base: str
    rank: int = 4
    every: int | None = None
    _recording: Recording | None = field(default=None, init=False)
    _base: FullCheckpoint | None = field(default=None, init=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Open the recording; after a resume, forget the steps that will be taken again."""
        model = _live(kwargs)
        self._base = FullCheckpoint(resolve_base(self.base))
        names = list(_adapted(model, self._base)) if isinstance(model, PeftModel) else _names(model, self._base)
        # One process writes; the others only hand over their shards.
        if not state.is_world_process_zero:
            return
        self._recording = open_recording(Path(self.directory), self.base, self._base, self.rank, names)
        self._recording.keep_until(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Record when ``every`` says so."""
        if self.every and state.global_step % self.every == 0:
            self._record(state.global_step, kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Record at every save."""
        if not self.every:
            self._record(state.global_step, kwargs)

    def _record(self, step: int, kwargs: dict[str, object]) -> None:
        if self._base is None:
            return
        model = _live(kwargs)
        if self._recording is None:
            # A shard is gathered by all processes or by none, in the same order.
            _hand_over(model)
        else:
            deltas = (
                _adapter_deltas(model, self._base, Path(self.directory).parent)
                if isinstance(model, PeftModel)
                else _full_deltas(model, self._base)
            )
            self._recording.add(step, deltas)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """The model's state with the adapter's own tensors whole; of the base PEFT takes nothing."""
    prefix = str(model.base_model.prefix)
    return {name: _whole(tensor) if prefix in name else tensor for name, tensor in model.state_dict().items()}


def _hand_over(model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        _adapter_state(model)
        return
    for parameter in model.parameters():
        _whole(parameter)


def _live(kwargs: dict[str, object]) -> nn.Module:
    model = kwargs["model"]
    if not isinstance(model, nn.Module):
        raise InputError(f"TrajectoryRecorder needs the trainer's model, got {type(model).__name__}")
    return model


def _names(model: nn.Module, base: FullCheckpoint) -> list[str]:
    # A tied head is listed once, as in the base's file.
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    require_same_shapes(shapes, base, Path("the live model"))
    return list(shapes)


def _full_deltas(model: nn.Module, base: FullCheckpoint) -> Iterator[tuple[str, Delta]]:
    for name, parameter in model.named_parameters():
        yield name, require_finite(as_float32(_whole(parameter)) - base.weight(name), name, "the live model")


def _adapter_deltas(model: PeftModel, base: FullCheckpoint, run: Path) -> Iterator[tuple[str, Delta]]:
    """Deltas through PEFT's own writer, so that the live adapter and a saved one are read by the same code."""
    # In the run, where the start of an adapter that was taken out of the base is found.
    run.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run) as directory:
        model.save_pretrained(directory, state_dict=_adapter_state(model))
        # Its tensors are read one by one, so the directory has to outlive the last of them.
        adapter = AdapterCheckpoint(Path(directory))
        for name in adapter.shapes_on(base):
            yield name, adapter.delta(name, base)


def _adapted(model: PeftModel, base: FullCheckpoint) -> dict[str, tuple[int, ...]]:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, state_dict=_adapter_state(model))
        return AdapterCheckpoint(Path(directory)).shapes_on(base)
