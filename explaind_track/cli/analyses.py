"""The commands that need the training job: its model, its query, its samples."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from explaind_track.cli.common import AS_JSON, RUN, open_trajectory, report_errors, tell
from explaind_track.cli.settings import parse_settings
from explaind_track.explanation.task import Task

TASK = click.argument("task")
SETTINGS = click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")


def out_option(default: str) -> Callable[..., Any]:
    """The option `--out`, the file that the command writes."""
    return click.option("--out", type=click.Path(path_type=Path), default=default, show_default=True)


@click.command()
@RUN
@TASK
@SETTINGS
@out_option("influence.safetensors")
@AS_JSON
@report_errors
def explain(run: str, task: str, settings: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Decompose RUN's predictions, and save the influence.

    TASK is `module:function`, such as `recipes.modulo_addition:task`. The function is called with RUN and returns an
    `explaind_track.Task`: the model, the query, and if needed groups, sample_loss and data. Settings are the other
    arguments of `explaind_track.explain`, such as `keep=[step,group] window=[0,500] nodes=8 close=true`; `groups=1`
    takes the place of the task's.
    """
    from explaind_track.explanation.explain import explain as explain_run

    options = parse_settings(settings, ("keep", "parts", "window", "groups", "close"))
    job = load_task(task, run)
    options = {"groups": job.groups, **options, "progress": not as_json}
    trajectory = open_trajectory(run)
    influence = explain_run(trajectory, job.model, job.query, sample_loss=job.sample_loss, data=job.data, **options)
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
@out_option("masks.safetensors")
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

    options = parse_settings(settings, ("window", "part", "importance"))
    job, trajectory = load_task(task, run), open_trajectory(run)
    scores = parameter_scores(trajectory, job.model, job.query, **options, progress=not as_json)
    sizes = {name: value.abs() for name, value in scores.items()}
    masks = prune_masks(sizes, keep, by=by, unit=unit, exclude=exclude)
    save_file({name: mask.contiguous() for name, mask in masks.items()}, out)

    dropped, cost = sparsity(masks), {}
    if job.query.is_classified:
        job.model.load_state_dict(trajectory.state_dict(len(trajectory)))
        cost = evaluate_pruning(job.model, masks, job.query.inputs, job.query.labels[0])
    words = ", ".join(f"{name} {value:.4g}" for name, value in cost.items() if name != "sparsity")
    content = {"out": str(out), "sparsity": dropped, **cost}
    tell(as_json, content, f"{out}: {1 - dropped:.1%} of the parameters stay" + (f"; {words}" if cost else ""))


@click.command()
@RUN
@TASK
@SETTINGS
@out_option("similarity.safetensors")
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

    options = parse_settings(settings, ("window", "groups"))
    job = load_task(task, run)
    if job.sample_loss is None:
        raise ValueError(f"{task} returns a Task without sample_loss=, which similarities are made of")
    options = {"groups": job.groups, **options, "progress": not as_json}
    trajectory = open_trajectory(run)
    found = compare(trajectory, job.model, job.query, sample_loss=job.sample_loss, data=job.data, **options)

    groups = [str(name) for name in found["group"].values]
    save_file({"similarity": torch.from_numpy(found.values.copy())}, out, {"groups": json.dumps(groups)})
    content = {"out": str(out), "groups": groups, "queries": found.sizes["query"]}
    tell(as_json, content, f"{out}: {found.sizes['query']} × {found.sizes['query']} for {', '.join(groups)}")


@click.command()
@RUN
@TASK
@click.option("--step", type=click.IntRange(min=0), help="The step; the last one if not given.")
@click.option("--samples", type=click.IntRange(min=0), default=4, show_default=True, help="How many of its samples.")
@click.option("--targets", type=click.IntRange(min=1), default=4, show_default=True, help="How many of the targets.")
@AS_JSON
@report_errors
def audit(run: str, task: str, step: int | None, samples: int, targets: int, as_json: bool) -> None:
    """Recompute a step of RUN the slow and plain way, and compare.

    Deep copies of the model and ordinary autograd, a backward pass for each number. TASK as for `explain`. Exits with 1
    where the numbers differ.
    """
    from explaind_track.analysis.step_audit import audit as audit_run

    job = load_task(task, run)
    found = audit_run(
        open_trajectory(run), job.model, job.query, step=step, groups=job.groups, sample_loss=job.sample_loss,
        data=job.data, samples=samples, targets=targets,
    )  # fmt: skip
    tell(as_json, {**asdict(found), "ok": found.ok}, str(found))
    if not found.ok:
        sys.exit(1)


def load_task(name: str, run: str) -> Task:
    """The training job of a run: what the function `module:function` returns for it.

    Raises:
        ValueError: where there is no such function in reach of the current directory.
        TypeError: where it returns something else than a Task.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ValueError(f"a task is named module:function, as recipes.modulo_addition:task, not {name!r}")

    sys.path.insert(0, os.getcwd())
    try:
        make_task = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} names no function `module:function` that can be imported here: {error}") from None

    task = make_task(run)
    if not isinstance(task, Task):
        raise TypeError(
            f"{name} returned a {type(task).__name__}, where an explaind_track.Task was expected; let it return "
            "Task(model, query, groups=…, sample_loss=…, data=…), the last three if needed"
        )
    return task
