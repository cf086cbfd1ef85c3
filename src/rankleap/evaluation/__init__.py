"""Reads a model and problems, samples and grades answers, gives metrics with intervals and paired comparisons.

What needs torch is imported from its own file: ``evaluate``, ``sampler``.
"""

from rankleap.evaluation.metrics import avg_at_k, paired_difference, pass_at_k, smallest_resolvable_difference
from rankleap.evaluation.result import Evaluation, Sampling, compare, read_samples, read_scores, write_evaluation

__all__ = [
    "Evaluation",
    "Sampling",
    "avg_at_k",
    "compare",
    "paired_difference",
    "pass_at_k",
    "read_samples",
    "read_scores",
    "smallest_resolvable_difference",
    "write_evaluation",
]
