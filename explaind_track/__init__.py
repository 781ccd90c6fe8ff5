"""Exact influences of parameters, training samples and steps on a model's predictions, while it trains and after."""

from explaind_track.artifacts import log_result
from explaind_track.explain import explain, plan_explanation
from explaind_track.explainer import Explainer
from explaind_track.groups import resolve_groups
from explaind_track.influence import Influence
from explaind_track.kernel_view import kernel_view
from explaind_track.panels import how_to_look, open_run
from explaind_track.path import Quadrature
from explaind_track.pruning import evaluate_pruning, prune_masks, pruned
from explaind_track.queries import Query
from explaind_track.rankings import accuracy_curve, extrapolate_first_moment, sparse_prediction, step_scores
from explaind_track.rules import Rule, update_rule
from explaind_track.scores import parameter_scores
from explaind_track.similarity import sample_cosine, similarity
from explaind_track.step import Batch, State, Step, Update
from explaind_track.stepper import Stepper, UnexplainedUpdate
from explaind_track.storage import TrajectoryError
from explaind_track.tracker import NonFiniteError, Tracker
from explaind_track.trajectory import Trajectory

__all__ = [
    "Batch",
    "Explainer",
    "Influence",
    "NonFiniteError",
    "Quadrature",
    "Query",
    "Rule",
    "State",
    "Step",
    "Stepper",
    "Tracker",
    "Trajectory",
    "TrajectoryError",
    "UnexplainedUpdate",
    "Update",
    "accuracy_curve",
    "evaluate_pruning",
    "explain",
    "extrapolate_first_moment",
    "how_to_look",
    "kernel_view",
    "log_result",
    "open_run",
    "parameter_scores",
    "plan_explanation",
    "prune_masks",
    "pruned",
    "resolve_groups",
    "sample_cosine",
    "similarity",
    "sparse_prediction",
    "step_scores",
    "update_rule",
]
