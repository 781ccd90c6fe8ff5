"""Similarities against the cosine of explicitly built tensors of influences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from cases import Case
from helpers import cases, check, lasting, of_samples
from jobs import make_job, sample_loss

from explaind_track import Quadrature, Trajectory
from explaind_track.analysis import sample_cosine, similarity


def of_case(case: Case, **options: Any) -> xr.DataArray:
    options = {"quadrature": Quadrature.fixed(1), "progress": False, **case.sample_options(), **options}
    return similarity(lasting(case), case.make(9), case.query(), groups=case.resolved_groups(), **options)


def cosines(tensors: torch.Tensor) -> torch.Tensor:
    """Of the rows' flattened influences, (X, …) → (X, X)."""
    flat = tensors.flatten(1)
    sizes = flat.norm(dim=1)
    return flat @ flat.T / (sizes[:, None] * sizes)


@cases("adamw", "adamw-weighted", "adamw-maximize", "sgd-nesterov-decay", "sgd-dampening-decay-late", "adamw-thawed",
       "normalized-adamw", "tied-adamw", "attention-nesterov-loss", "target-logit", "target-projection")  # fmt: skip
def test_similarity_is_the_cosine_of_the_influence_tensors(case: Case) -> None:
    oracle, groups = case.reference(1), case.resolved_groups()
    psi = oracle.psi()  # N D M X O
    for options in ({}, {"memory": 1}, {"window": (1, 3)}, {"samples": [1, 2, 5]}):
        found = of_case(case, **options)
        first, last = options.get("window", (0, len(psi)))
        own = psi[first:last][:, :, options.get("samples", list(range(7)))]
        for group, names in groups.items():
            terms = torch.cat([own[:, oracle.places[name]] for name in names], 1)
            check(found.sel(group=group), cosines(terms.movedim(3, 0)), 1.0)


def test_similarity_of_a_record_is_a_kernel(tmp_path: Path) -> None:
    job = make_job("sgd")
    tracker = job.tracker(trajectory=tmp_path / "t", keyframe_every=4)
    job.run(tracker, 9)
    tracker.finish()
    options: dict[str, Any] = {"sample_loss": sample_loss, "data": lambda index: (job.x[index], job.y[index])}
    trajectory = Trajectory.open(tmp_path / "t")
    found = similarity(trajectory, job.model, job.queries["query"], window=(3, 8), progress=False, **options)
    assert found.dims == ("group", "query", "other")
    for matrix in found.values:
        np.testing.assert_allclose(matrix, matrix.T)
        np.testing.assert_allclose(np.diagonal(matrix), 1.0)
        assert np.linalg.eigvalsh(matrix).min() > -1e-12
    with pytest.raises(ValueError, match="reduced to its mean"):
        similarity(trajectory, job.model, job.queries["loss"], **options)


@cases("adamw-weighted", "sgd-nesterov-decay")
def test_sample_cosines_are_those_of_the_rows(case: Case) -> None:
    influence = of_samples(case, ("group", "query", "sample"))["influence"]
    found = sample_cosine(influence)
    for group in influence["group"].values:
        rows = torch.from_numpy(influence.sel(group=group).transpose("query", "sample").values)
        check(found.sel(group=group), cosines(rows), 1.0)
    with pytest.raises(ValueError, match="need the axes query and sample"):
        sample_cosine(influence.sum("sample"))
