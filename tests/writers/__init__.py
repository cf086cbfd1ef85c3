"""Writes a checkpoint in each layout, with the trainer's own writer where it runs here; docs/formats.md says where not.

``WRITERS[layout](directory, base)`` writes one step directory of a model that moved away from the base in ``base`` (a
Hugging Face directory) and gives the file to damage, relative to ``directory``, and the weights that the model had.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from writers.huggingface import write_adapter, write_full

Writer = Callable[[Path, Path], tuple[str, dict[str, Tensor]]]

WRITERS: dict[str, Writer] = {
    "peft": write_adapter,
    "hf": write_full,
}
