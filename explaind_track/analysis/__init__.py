"""What follows from the influences of a run: scores and pruning, similarities, kernels, rankings of steps."""

from explaind_track.analysis.kernel_machine import kernel_machine
from explaind_track.analysis.parameter_scores import parameter_scores
from explaind_track.analysis.pruning import evaluate_pruning, prune_masks, pruned
from explaind_track.analysis.sample_tables import describe_samples, find_mislabelled
from explaind_track.analysis.similarity import sample_cosine, similarity
from explaind_track.analysis.step_audit import Audit, audit
from explaind_track.analysis.step_ranking import (
    accuracy_curve,
    extrapolate_first_moment,
    sparse_prediction,
    step_scores,
)

__all__ = [
    "Audit",
    "accuracy_curve",
    "audit",
    "describe_samples",
    "evaluate_pruning",
    "extrapolate_first_moment",
    "find_mislabelled",
    "kernel_machine",
    "parameter_scores",
    "prune_masks",
    "pruned",
    "sample_cosine",
    "similarity",
    "sparse_prediction",
    "step_scores",
]
