"""A saved workspace and a saved report at W&B, with our panels in the order they are read in. Needs wandb-workspaces
(the extra `workspace`)."""

from typing import TYPE_CHECKING, Any

from explaind_track.core.checks import require_package
from explaind_track.record.history import (
    AXIS,
    DIFFERENCE,
    DOMAIN_MAP,
    KERNEL,
    LAYER_TYPE_MAP,
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
    SHARE,
    TOTAL,
)
from explaind_track.record.layer_types import LAYER, TYPE
from explaind_track.wandb_io.summary import MEAN

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

NAME = "explaind_track"


def other_than(*words: str) -> str:
    """A regular expression for all strings without a slash but these, without lookahead, which not every engine has."""
    letters = sorted({word[0] for word in words if word})
    branches = [f"[^/{''.join(letters)}][^/]*"]
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
        {"title": "shares of the groups in it", "metric_regex": f"^{KERNEL}/{GROUP}", "plot_type": "pct-area"},
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
    "By layer and type": (
        {"title": "what the training samples did to the loss, by type", "metric_regex": f"^{LOSS}/{KERNEL}/{TYPE}/.+$"},
        {"title": "the same by layer", "metric_regex": f"^{LOSS}/{KERNEL}/{LAYER}/.+$"},
        {"title": "what weight decay did to it, by type", "metric_regex": f"^{LOSS}/{REGULARIZATION}/{TYPE}/.+$"},
        {"title": "the same by layer", "metric_regex": f"^{LOSS}/{REGULARIZATION}/{LAYER}/.+$"},
    ),
    "Shares and domains": (
        {
            "title": "shares of the step's gradients, of momentum and of weight decay",
            "metric_regex": f"^{LOSS}/{SHARE}/[^/]+$",
            "plot_type": "stacked-area",
        },
        {"title": "change of each loss", "metric_regex": "^[^/]+/change$"},
    ),
    "How far to trust it, and its cost": (
        {"title": "residual", "metric_regex": f"^{RESIDUAL}/{other_than('nodes', 'nonfinite')}$", "log_y": True},
        {"title": "numbers that are not finite", "metric_regex": f"^{NONFINITE}$"},
        {"title": "seconds for each step", "metric_regex": f"^{SECONDS}.*", "plot_type": "stacked-area"},
    ),
}


DESCRIPTIONS = {
    "Predictions": "What the query's predictions are worth after each step.",
    "Kernel against weight decay": (
        "How much training samples (kernel) and weight decay (reg) changed the predictions in each step. Where D is "
        "above zero, samples did more in the same direction. The points are runs, by their means over the steps."
    ),
    "Importance by group": "Through which parts of the model the change went; the shares add up to all of it.",
    "Change of the loss": "Below zero, the loss of the query fell by it.",
    "By layer and type": 'Of runs with groups="layer.type": sums over the layers, and over the types.',
    "Shares and domains": (
        "How large the gradients of the step, those of earlier steps and weight decay are among what changed the loss; "
        "and of several losses, how each changed."
    ),
    "How far to trust it, and its cost": (
        "The residual is what the split leaves over of a step's change: under 0.05, parts are good to some percent. "
        "Above 0.5 an alert says so: pass Tracker(quadrature=Quadrature(tolerance=0.01))."
    ),
    "Maps": "What the steps since the last map did: to losses by layer and type, and to several losses by group.",
    "Samples": "The training samples that changed the query's loss most, in the steps that made a table.",
}
"""What the sections say, for the report; docs/panels.md says it of each panel."""


def make_workspace(entity: str, project: str) -> "ws.Workspace":
    """The workspace, not saved yet: line plots over the training step, and the media of samples."""
    require_package("wandb_workspaces", "workspace", "a workspace at W&B")
    import wandb_workspaces.workspaces as ws

    axis = ws.SectionPanelSettings(x_axis=AXIS)
    sections = [
        ws.Section(name=name, is_open=True, panels=panels, panel_settings=axis) for name, panels in _panels().items()
    ]
    settings = ws.WorkspaceSettings(x_axis=AXIS)
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)


def make_saved_report(entity: str, project: str) -> "wr.Report":
    """The same panels as a report, not saved yet, with words to each section: of all runs of the project."""
    require_package("wandb_workspaces", "workspace", "a report at W&B")
    import wandb_workspaces.reports.v2.interface as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for name, panels in _panels().items():
        size = wr.Layout(w=24 if len(panels) == 1 else 12, h=8)
        for place, panel in enumerate(panels):
            panel.layout = wr.Layout(x=place % 2 * 12, y=place // 2 * 8, w=size.w, h=size.h)
        runs = wr.Runset(entity=entity, project=project)
        blocks += [wr.H2(name), wr.P(DESCRIPTIONS[name]), wr.PanelGrid(runsets=[runs], panels=panels)]

    return wr.Report(
        entity=entity, project=project, title=f"{NAME}: {project}", blocks=blocks, width="fluid",
        description="What each training step did to the queries, through which part of the model, and why.",
    )  # fmt: skip


def _panels() -> dict[str, list[Any]]:
    """The panels of each section."""
    from wandb_workspaces.reports.v2.interface import LinePlot, MediaBrowser, ScatterPlot, SummaryMetric

    panels: dict[str, list[Any]] = {
        name: [LinePlot(x=AXIS, **panel) for panel in given] for name, given in SECTIONS.items()
    }
    kernel, decay = (SummaryMetric(f"{part}/{TOTAL}{MEAN}") for part in (KERNEL, REGULARIZATION))
    panels["Kernel against weight decay"] += [ScatterPlot(title="runs, by both", x=decay, y=kernel)]
    media = {"Maps": [LAYER_TYPE_MAP, DOMAIN_MAP], "Samples": [SAMPLES, SAMPLE_MAP, QUERY_COSINES]}
    return {**panels, **{name: [MediaBrowser(media_keys=keys)] for name, keys in media.items()}}


def save_workspace(project: str) -> tuple[str, str]:
    """Saves both at W&B as new ones of `entity/project`; returns the addresses of workspace and report.

    Raises ValueError for another name.
    """
    entity, slash, name = project.partition("/")
    if not slash or not name:
        raise ValueError(f"a workspace belongs to ENTITY/PROJECT, not to {project!r}")
    report = make_saved_report(entity, name)
    report.save()  # first, since it needs a project with runs
    return str(make_workspace(entity, name).save().url), str(report.url)
