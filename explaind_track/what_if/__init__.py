"""What would have been: runs trained again with something changed, and the exact derivative of a run."""

from explaind_track.what_if.changes import Change, Frozen, Reweighted, Settings, SwitchedOff, Transplanted

__all__ = ["Change", "Frozen", "Reweighted", "Settings", "SwitchedOff", "Transplanted"]
