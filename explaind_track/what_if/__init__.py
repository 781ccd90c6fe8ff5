"""What would have been: runs trained again with something changed, and the exact derivative of a run."""

from explaind_track.what_if.changes import Change, Frozen, Reweighted, Settings, SwitchedOff, Transplanted
from explaind_track.what_if.counterfactual import plan_counterfactual
from explaind_track.what_if.optimizer_steps import differentiable_step

__all__ = [
    "Change",
    "Frozen",
    "Reweighted",
    "Settings",
    "SwitchedOff",
    "Transplanted",
    "differentiable_step",
    "plan_counterfactual",
]
