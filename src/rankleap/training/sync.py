"""Keeps an adapted base what it was: merging the adapter for vLLM and taking it out again rounds W, and the errors add up.

    W' = (W + ΔW) - ΔW     in bfloat16 W' differs from W by a rounding of W + ΔW; after every sync it is another ΔW

After each sync the copies taken before training (on the CPU) go back, so that policy = pristine base + adapter holds exactly.
"""

from collections.abc import Callable

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

DRIFT = "base_drift"
"""Name in the trainer's log: the largest over matrices of ‖W' - W‖ / ‖W‖ that a sync left behind, before it was undone."""


class PristineBase:
    """Copies of the weights that an adapter merges into, made when it is constructed."""

    def __init__(self, model: PeftModel) -> None:
        layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
        self._kept: list[tuple[nn.Parameter, Tensor]] = [
            # A layer's own parameters only: what lies deeper belongs to adapters.
            (weight, weight.detach().to("cpu", copy=True))
            for layer in layers
            for weight in layer.get_base_layer().parameters(recurse=False)
        ]

    @torch.no_grad()
    def restore(self) -> float:
        """Put every weight back; return the largest relative difference that there was."""
        largest = 0.0
        for weight, kept in self._kept:
            there = kept.to(weight.device)
            # In float32: the difference of two bfloat16 norms would be rounded away.
            off, norm = (weight.float() - there.float()).norm(), there.float().norm()
            largest = max(largest, float(off / norm.clamp(min=torch.finfo(torch.float32).tiny)))
            weight.copy_(there)
        return largest


def restored_after(sync: Callable[[], None], base: PristineBase, report: Callable[[float], None]) -> Callable[[], None]:
    """``sync`` with the base put back behind it, and the drift that it had left reported."""

    def sync_and_restore() -> None:
        sync()
        report(base.restore())

    return sync_and_restore
