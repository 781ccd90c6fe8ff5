"""A saved workspace at W&B with our panels in the order they are read in. Needs wandb-workspaces (`workspace`)."""

from typing import TYPE_CHECKING, Any

from explaind_track.core.checks import require_package
from explaind_track.record.history import (
    AXIS,
    DIFFERENCE,
    KERNEL,
    LOSS,
    NONFINITE,
    OUTSIDE,
    PAST,
    QUERY_COSINES,
    REGULARIZATION,
    RESIDUAL,
    SAMPLE_MAP,
    SAMPLES,
    SECONDS,
    TOTAL,
)

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as ws

NAME = "explaind_track"


def other_than(*words: str) -> str:
    """A regular expression for all strings but these, without lookahead, which not every engine has."""
    letters = sorted({word[0] for word in words if word})
    branches = [f"[^{''.join(letters)}].*" if letters else ".+"]
    branches += [letter + other_than(*(word[1:] for word in words if word.startswith(letter))) for letter in letters]
    return f"({'|'.join(branches)}){'' if '' in words else '?'}"


PARTS = "|".join((KERNEL, REGULARIZATION, PAST, OUTSIDE))
GROUP = f"{other_than(TOTAL)}$"

# Patterns of keys, not their list: groups are each run's own, and a project may hold runs of many models. The names in
# front of a slash belong to the first query; what other queries own has their name before it.
SECTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "Predictions": (
        {"title": "loss", "metric_regex": "^[^/]+/loss$"},
        {"title": "accuracy", "metric_regex": "^[^/]+/accuracy$"},
    ),
    "Kernel against weight decay": (
        {"title": "importance of all groups together", "metric_regex": f"^({PARTS})/{TOTAL}$"},
        {"title": "kernel minus regularization (D), by group", "metric_regex": f"^{DIFFERENCE}/{GROUP}"},
    ),
    "Importance by group": (
        {
            "title": "of the training samples (kernel)",
            "metric_regex": f"^{KERNEL}/{GROUP}",
            "plot_type": "stacked-area",
        },
        {"title": "of weight decay", "metric_regex": f"^{REGULARIZATION}/{GROUP}", "plot_type": "stacked-area"},
    ),
    "Change of the loss": (
        {"title": "through the training samples", "metric_regex": f"^{LOSS}/{KERNEL}/{GROUP}"},
        {"title": "through weight decay", "metric_regex": f"^{LOSS}/{REGULARIZATION}/{GROUP}"},
        {
            "title": "in all, and through each part",
            "metric_regex": f"^{LOSS}/(change|({PARTS}|momentum)/{TOTAL})$",
        },
    ),
    "How far to trust it, and its cost": (
        {"title": "residual", "metric_regex": f"^{RESIDUAL}/{other_than('nodes', 'nonfinite')}$", "log_y": True},
        {"title": "numbers that are not finite", "metric_regex": f"^{NONFINITE}$"},
        {"title": "seconds for each step", "metric_regex": f"^{SECONDS}.*", "plot_type": "stacked-area"},
    ),
}


def make_workspace(entity: str, project: str) -> "ws.Workspace":
    """The workspace, not saved yet: line plots over the training step, and the media of samples."""
    require_package("wandb_workspaces", "workspace", "a workspace at W&B")
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2.interface import LinePlot, MediaBrowser

    axis = ws.SectionPanelSettings(x_axis=AXIS)
    panels: dict[str, list[Any]] = {
        name: [LinePlot(x=AXIS, **panel) for panel in given] for name, given in SECTIONS.items()
    }
    panels["Samples"] = [MediaBrowser(media_keys=[SAMPLES, SAMPLE_MAP, QUERY_COSINES])]
    sections = [
        ws.Section(name=name, is_open=True, panels=drawn, panel_settings=axis) for name, drawn in panels.items()
    ]
    settings = ws.WorkspaceSettings(x_axis=AXIS)
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)


def save_workspace(project: str) -> str:
    """Saves it at W&B as a new view of `entity/project`; returns its address. ValueError for another name."""
    entity, slash, name = project.partition("/")
    if not slash or not name:
        raise ValueError(f"a workspace belongs to ENTITY/PROJECT, not to {project!r}")
    saved = make_workspace(entity, name).save()
    return str(saved.url)
