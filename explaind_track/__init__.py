"""Exact influences of parameters, training samples and steps on a model's predictions, while it trains and after.

The names are in groups: *track* a run, say what to *ask* of it, *explain* it, and *extend* all this to other optimizers
and loops. What can be made of influences is in `explaind_track.analysis`, what may be changed in a rerun in
`explaind_track.what_if`, and what is raised in `explaind_track.errors`.
"""

from importlib.metadata import version

from explaind_track import analysis, errors, what_if
from explaind_track.analysis.step_audit import audit
from explaind_track.checkpoints.checkpoint import Checkpoint
from explaind_track.checkpoints.explain_checkpoints import explain_checkpoints
from explaind_track.checkpoints.series import CheckpointSeries
from explaind_track.core.groups import resolve_groups
from explaind_track.core.influence import Influence
from explaind_track.core.observer import StepObserver
from explaind_track.core.queries import Query
from explaind_track.core.rules import Rule, update_rule
from explaind_track.core.step import Batch, State, Step
from explaind_track.core.tokens import TokenText
from explaind_track.core.update import Update
from explaind_track.engine.path_integral import Quadrature
from explaind_track.explanation.explain import explain, plan_explanation
from explaind_track.explanation.explainer import Explainer
from explaind_track.explanation.task import Task
from explaind_track.record.results import open_influence
from explaind_track.record.row_writers import CSVWriter, TensorBoardWriter
from explaind_track.record.trajectory import Trajectory
from explaind_track.tracking.tracker import Tracker
from explaind_track.wandb_io.artifacts import log_rerun, log_result
from explaind_track.wandb_io.run import open_run, where_to_look
from explaind_track.what_if.counterfactual import counterfactual
from explaind_track.what_if.recomputed import with_gradients
from explaind_track.what_if.rerun import Rerun, rerun
from explaind_track.what_if.smoothness import smoothness

__version__ = version("explaind_track")

__all__ = [  # noqa: RUF022 (by use)
    # track: watch a run while it trains
    "Tracker",
    "open_run",
    "where_to_look",
    "log_result",
    "log_rerun",
    "CSVWriter",
    "TensorBoardWriter",
    # ask: what is explained, how finely, and by which parts of the model
    "Query",
    "TokenText",
    "Quadrature",
    "resolve_groups",
    # explain: take a recorded run apart
    "Trajectory",
    "Task",
    "explain",
    "plan_explanation",
    "Influence",
    "open_influence",
    "audit",
    # explain a run that nobody watched, from its checkpoints
    "CheckpointSeries",
    "explain_checkpoints",
    "Checkpoint",
    # what if: the derivative of a run, and a run trained again with something changed
    "counterfactual",
    "smoothness",
    "rerun",
    "with_gradients",
    "Rerun",
    # extend: optimizers and loops of one's own
    "update_rule",
    "Rule",
    "StepObserver",
    "Explainer",
    "Step",
    "State",
    "Batch",
    "Update",
    # namespaces
    "analysis",
    "what_if",
    "errors",
]
