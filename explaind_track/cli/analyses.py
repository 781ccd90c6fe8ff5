"""The commands that need the training job: its model, its queries, its samples."""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from explaind_track.cli.common import AS_JSON, RUN, local_run, report_errors, tell
from explaind_track.record.remote import PREFIX
from explaind_track.record.trajectory import Trajectory

TASK = click.argument("task")
SETTINGS = click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")


def out(name: str) -> Callable[..., Any]:
    return click.option("--out", type=click.Path(path_type=Path), default=name, show_default=True)


@click.command()
@RUN
@TASK
@SETTINGS
@out("influence.safetensors")
@AS_JSON
@report_errors
def explain(run: str, task: str, settings: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Decompose RUN's predictions, and save the influence.

    TASK is `module:function`. The function is called with RUN and returns what belongs to the training job, by the
    names that `explaind_track.explain` has for it: `{"model": …, "query": …, "groups": …, "sample_loss": …, "data": …}`
    (the last three if needed). Settings are the others, such as `keep=[step,group] window=[0,500] nodes=8 close=true`.
    """
    from explaind_track.explanation.explain import explain as decompose

    arguments = gathered(decompose, task, run, settings, ("keep", "parts", "window", "groups", "close"))
    influence = decompose(opened(run), **arguments, progress=not as_json)
    influence.save(out)
    sizes = {str(name): size for name, size in influence.data.sizes.items()}
    residual = float(influence.residual.max())
    content = {"out": str(out), "sizes": sizes, "residual_max": residual}
    tell(as_json, content, f"{out}: {sizes}, residual at most {residual:.2g}")


@click.command()
@RUN
@TASK
@SETTINGS
@click.option("--keep", type=click.FloatRange(0, 1), required=True, help="The fraction that is kept.")
@click.option("--by", type=click.Choice(["global", "layer"]), default="global", show_default=True)
@click.option("--unit", type=click.Choice(["parameter", "filter"]), default="parameter", show_default=True)
@click.option("--exclude", multiple=True, help="A pattern of parameters that stay whole; may be given again.")
@out("masks.safetensors")
@AS_JSON
@report_errors
def prune(
    run: str, task: str, settings: tuple[str, ...], keep: float, by: Any, unit: Any, exclude: tuple[str, ...],
    out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Mask RUN's parameters of least influence, and tell the cost.

    Saves masks of those to keep, ranked by the size of their influence. TASK as for `explain`. Settings:
    `window=[0,500] part=kernel importance=true nodes=1`. The cost is told where the query has class labels, on its
    inputs, with the parameters behind the last step.
    """
    from safetensors.torch import save_file

    from explaind_track.analysis.parameter_scores import parameter_scores
    from explaind_track.analysis.pruning import evaluate_pruning, prune_masks, sparsity

    arguments = gathered(parameter_scores, task, run, settings, ("window", "part", "importance"))
    trajectory = opened(run)
    scores = parameter_scores(trajectory, **arguments, progress=not as_json)
    sizes = {name: value.abs() for name, value in scores.items()}
    masks = prune_masks(sizes, keep, by=by, unit=unit, exclude=exclude)
    save_file({name: mask.contiguous() for name, mask in masks.items()}, out)
    content: dict[str, Any] = {"out": str(out), "sparsity": sparsity(masks)}
    model, query = arguments["model"], arguments["query"]
    if query.is_classified:
        model.load_state_dict(trajectory.state_dict(len(trajectory)))
        content |= evaluate_pruning(model, masks, query.inputs, query.labels[0])
    cost = [f"{name} {value:.4g}" for name, value in content.items() if name not in ("out", "sparsity")]
    tell(as_json, content, f"{out}: {1 - content['sparsity']:.1%} of the parameters stay; " + ", ".join(cost))


@click.command()
@RUN
@TASK
@SETTINGS
@out("similarity.safetensors")
@AS_JSON
@report_errors
def similarity(run: str, task: str, settings: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Compare RUN's predictions for every two inputs.

    Saves a matrix for each group of parameters. TASK as for `explain`, with its `sample_loss` and, unless the
    trajectory holds the batches themselves, `data`. Settings: `window=[0,500] groups=1 nodes=1`.
    """
    import torch
    from safetensors.torch import save_file

    from explaind_track.analysis.similarity import similarity as compare

    arguments = gathered(compare, task, run, settings, ("window", "groups"))
    found = compare(opened(run), **arguments, progress=not as_json)
    groups = [str(name) for name in found["group"].values]
    save_file({"similarity": torch.from_numpy(found.values.copy())}, out, {"groups": json.dumps(groups)})
    content = {"out": str(out), "groups": groups, "queries": found.sizes["query"]}
    tell(as_json, content, f"{out}: {found.sizes['query']} × {found.sizes['query']} for {', '.join(groups)}")


def opened(run: str) -> Trajectory:
    return Trajectory.open(run if run.startswith(PREFIX) else local_run(run))


def load_task(task: str) -> Callable[[str], dict[str, Any]]:
    """The function that `module:function` names; ValueError if there is none."""
    module, colon, name = task.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"a task is named module:function, as recipes.modulo_addition:task, not {task!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{task!r} names no function `module:function` that can be imported here: {error}") from None
    return found  # type: ignore[no-any-return]


def gathered(
    function: Callable[..., Any], task: str, run: str, settings: tuple[str, ...], allowed: tuple[str, ...]
) -> dict[str, Any]:
    """The arguments of `function`: what the job says of those that it takes, and the settings over it."""
    given = _settings(settings, allowed)
    takes = list(inspect.signature(function).parameters.values())[1:]  # behind the trajectory
    names = [one.name for one in takes]
    job = {name: value for name, value in load_task(task)(run).items() if name in names}
    if lacking := [one.name for one in takes if one.default is one.empty and one.name not in {**job, **given}]:
        raise ValueError(f"{task} does not return {', '.join(lacking)}, which this command needs")
    return {**job, **given}


def _settings(pairs: tuple[str, ...], allowed: tuple[str, ...]) -> dict[str, Any]:
    """`key=value` as keyword arguments."""
    from omegaconf import OmegaConf

    from explaind_track.engine.path_integral import Quadrature

    given: dict[str, Any] = OmegaConf.to_container(OmegaConf.from_dotlist(list(pairs)))  # type: ignore[assignment]
    unknown = sorted(set(given) - {*allowed, "nodes", "tolerance"})
    if unknown:
        raise click.UsageError(
            f"there is no setting {', '.join(unknown)}; there are {', '.join(allowed)}, nodes, tolerance"
        )
    for name, fits, words in SHAPES:
        if name in given and not fits(given[name]):
            raise click.UsageError(f"{name}={given[name]} does not fit; it is {words}")
    nodes, tolerance = given.pop("nodes", None), given.pop("tolerance", None)
    if nodes is not None:
        given["quadrature"] = Quadrature.fixed(nodes)
    elif tolerance is not None:
        given["quadrature"] = Quadrature(tolerance=tolerance)
    if "window" in given:
        given["window"] = tuple(given["window"])
    return given


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(one, kind) for one in value)


SHAPES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("nodes", lambda value: isinstance(value, int) and value > 0, "a number of nodes, as nodes=8"),
    ("tolerance", lambda value: isinstance(value, int | float) and value > 0, "a number, as tolerance=0.01"),
    ("window", lambda value: _is_list_of(int)(value) and len(value) == 2, "first and last step, as window=[0,500]"),
    ("keep", _is_list_of(str), "a list of axes, as keep=[step,group]"),
)
"""Settings whose value can be told to be wrong before anything is read."""
