"""Writes a checkpoint in each layout, with the trainer's own writer where it runs here; docs/formats.md says where not.

``WRITERS[layout](directory, base)`` writes one step directory of a model that moved away from the base in ``base`` (a
Hugging Face directory) and gives the file to damage, relative to ``directory``, and the weights that the model had.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from writers import deepspeed, torchtune
from writers.dcp import write_dcp, write_megatron
from writers.huggingface import write_adapter, write_full
from writers.torch_files import write_bin, write_model_state
from writers.verl import write_verl

Writer = Callable[[Path, Path], tuple[str, dict[str, Tensor]]]

WRITERS: dict[str, Writer] = {
    "megatron": write_megatron,
    "dcp": write_dcp,
    "torchtune": torchtune.write_epoch,
    "peft": write_adapter,
    "deepspeed": deepspeed.write_step,
    "hf": write_full,
    "verl": write_verl,
    "hf-bin": write_bin,
    "torch": write_model_state,
}
