"""The arguments of a Tracker, looked at before anything is made: kinds, bounds, and names that would share a key."""

import math
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from explaind_track.core.checks import (
    require_callable,
    require_instance,
    require_int,
    require_known,
    require_mapping,
    require_one_of,
    require_package,
    shown,
)
from explaind_track.core.queries import Query
from explaind_track.core.step import PARTS, SHARES
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.path_integral import require_quadrature
from explaind_track.record import history
from explaind_track.record.row_writers import RowWriter

SECTION_OF_SAMPLES = "samples"
TAKEN_BY_SECTIONS = {*history.SECTIONS, SECTION_OF_SAMPLES, history.MAPS, history.SHARE}
TAKEN_FROM_QUERIES = {*TAKEN_BY_SECTIONS, "nodes", "nonfinite"}
"""`residual/nodes` and `residual/nonfinite` stand beside each query's `residual/<query>`."""

TRACKERS_ALONE = {
    *(history.KERNEL, history.REGULARIZATION, history.PAST, history.OUTSIDE),
    *(history.DIFFERENCE, history.RESIDUAL),
}
"""Sections of rows that a training loop's metrics are not in."""

TAKEN_FROM_LOSSES = {*TAKEN_BY_SECTIONS, *PARTS, *SHARES}


def check_questions(queries: Any, auxiliary: Any, sample_loss: SampleLoss | None, scores: str | None) -> None:
    """What is asked of each step, and the names of it. Raises TypeError and ValueError."""
    if isinstance(queries, Query):
        raise TypeError("queries= is a mapping of queries by their names: write {'test': Query.outputs(…)}")
    require_mapping("queries=", queries, "{'test': Query.outputs(x_test, y_test)}")
    for name, query in queries.items():
        require_instance(f"queries[{name!r}]", query, Query, "write one such as Query.outputs(x_test, y_test)")
    losses = [name for name, query in queries.items() if query.is_loss]
    first_loss = {history.LOSS}.intersection(losses[:1])  # whose section has this name whatever the query's
    _refuse_names("a query", queries, TAKEN_FROM_QUERIES - first_loss)

    if auxiliary is not None:
        require_mapping("auxiliary=", auxiliary, "{'l1': lambda model: 1e-4 * norm(model)}")
        for name, loss in auxiliary.items():
            require_callable(f"auxiliary[{name!r}]", loss, "model → scalar")
        _refuse_names("an auxiliary loss", auxiliary, TAKEN_FROM_LOSSES | {*queries})

    if sample_loss is not None:
        require_callable("sample_loss=", sample_loss, "(model, batch) → unreduced losses (N,)")
    if scores is not None:
        require_known("query", scores, queries)


def check_groups_shown(groups: Iterable[str]) -> None:
    """Raises ValueError for groups whose names rows cannot show."""
    _refuse_names("a group", groups, {history.TOTAL})


def _refuse_names(what: str, names: Iterable[str], taken: set[str]) -> None:
    """Raises ValueError for names that are empty, hold a separator of keys, or are taken."""
    for name in names:
        if not name or "/" in name or ":" in name:
            raise ValueError(
                f"{what} cannot be called {name!r}: its name is a piece of the keys of rows and tensors, such as "
                "'kernel/decoder', so it is not empty and holds neither '/' nor ':'"
            )
        if name in taken:
            raise ValueError(
                f"{what} cannot be called {name!r}: rows have something else of that name, and one of the two would be "
                f"overwritten. Names that are taken: {', '.join(sorted(taken))}"
            )


def check_outputs(
    run: Any,
    trajectory: str | PathLike[str] | None,
    render: Callable[[int], Any] | None,
    on_nonfinite: str,
    has_queries: bool,
    writers: Any,
) -> None:
    """Where the results go. Raises TypeError and ValueError."""
    if not has_queries and trajectory is None:
        raise ValueError(
            "a Tracker needs at least one query, such as {'test': Query.outputs(x_test, y_test)}, or a trajectory= to "
            "record, to be explained afterwards"
        )
    if isinstance(run, str | int | PathLike | Mapping | ModuleType):
        raise TypeError(
            f"run= is a run of W&B, not {shown(run)}: open one by explaind_track.open_run('my-project') or wandb.init"
        )
    if trajectory is not None and not isinstance(trajectory, str | PathLike):
        raise TypeError(f"trajectory= is the path of a directory, not {shown(trajectory)}")
    if render is not None:
        require_callable("render=", render, "from a sample's index to its image")
    if not isinstance(writers, list | tuple) or not all(isinstance(writer, RowWriter) for writer in writers):
        raise TypeError(
            f"writers= is a list of objects with a method write(step, row), such as [CSVWriter('rows.csv')], not "
            f"{shown(writers)}"
        )
    require_one_of("on_nonfinite=", on_nonfinite, ("raise", "mark"))


def check_choices(quadrature: Any, record: str, keep_before: str) -> None:
    """What is one of a few. Raises TypeError and ValueError."""
    require_quadrature(quadrature)
    require_one_of("record=", record, ("gradients", "batches"))
    require_one_of("keep_before=", keep_before, ("device", "host"))


def check_numbers(
    every: int,
    samples_every: int | None,
    map_queries: int,
    maps_every: int | None,
    keyframe_every: int,
    memory: int,
    resume: bool | int,
) -> tuple[int, int | None, int, int | None, int, int, bool | int]:
    """The settings that are whole numbers, as Python's. Raises TypeError and ValueError."""
    every = require_int("every=", every, 1)
    if samples_every is not None:
        samples_every = require_int("samples_every= (None: no tables)", samples_every, 1)
    map_queries = require_int("map_queries=", map_queries, 0)
    if map_queries:
        require_package("matplotlib", "plots", "map_queries= draws pictures, which")
    if maps_every is not None:
        maps_every = require_int("maps_every= (None: no maps)", maps_every, 1)
        require_package("matplotlib", "plots", "maps_every= draws pictures, which")
    keyframe_every = require_int("keyframe_every=", keyframe_every, 1)
    memory = require_int("memory= (bytes)", memory, 1)
    if not isinstance(resume, bool):
        resume = require_int("resume= (True, or the number of a step)", resume, 0)
    return every, samples_every, map_queries, maps_every, keyframe_every, memory, resume


def check_model(model: Any, optimizer: Any) -> None:
    """Raises TypeError for what is no module or no optimizer, and ValueError for a module without parameters."""
    require_instance("model", model, nn.Module, "pass the module that is trained")
    if next(iter(model.parameters()), None) is None:
        raise ValueError("the model has no parameters: there is nothing that training could move")
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer is one of torch.optim, not {shown(optimizer)}: Tracker(model, optimizer, …)")


def plain_metrics(metrics: Any) -> dict[str, Any]:
    """Metrics as rows hold them, with Python's numbers for NumPy's and tensors'.

    Raises TypeError for what a row cannot hold, ValueError for keys that are the Tracker's.
    """
    require_mapping("tracker.log()'s argument", metrics, "{'test/accuracy': 0.9}")
    for key in metrics:
        if key == history.AXIS or history.section_of(key) in TRACKERS_ALONE or key.startswith(history.SECONDS):
            raise ValueError(
                f"tracker.log() was given {key!r}, which is a key of the Tracker's own numbers: choose another, such "
                f"as 'own/{key.rpartition('/')[2]}'"
            )
    return {key: _plain_metric(key, value) for key, value in metrics.items()}


def _plain_metric(key: str, value: Any) -> int | float | str:
    """A number (of 64 bits, if it is whole) or a word. Raises TypeError for anything else."""
    is_array = isinstance(value, Tensor | np.ndarray | np.generic)
    if is_array and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = float(value)
    if not isinstance(value, int | float | str):
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise TypeError(
            f"{key!r} is {found}, and a row holds single numbers and words; log anything else to W&B alone, by run.log"
        )
    return value
