"""Exact influences of parameters, training samples and steps on a model's predictions, while it trains and after."""

from explaind_track.explain import Explainer, explain
from explaind_track.groups import resolve_groups
from explaind_track.influence import Influence
from explaind_track.path import Quadrature
from explaind_track.queries import Query
from explaind_track.rules import Rule, update_rule
from explaind_track.step import Batch, State, Step, Stepper, UnexplainedUpdate, Update

__all__ = [
    "Batch",
    "Explainer",
    "Influence",
    "Quadrature",
    "Query",
    "Rule",
    "State",
    "Step",
    "Stepper",
    "UnexplainedUpdate",
    "Update",
    "explain",
    "resolve_groups",
    "update_rule",
]
