"""The engine on a case, what the oracle wants of it, and how the two are compared."""

from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from cases import CASES, Case
from numpy.typing import ArrayLike
from reference import Reference
from torch import Tensor

from explaind_track import Explainer, Influence, Quadrature, Step, explain
from explaind_track.core.groups import Groups

AXES = ("step", "group", "query", "output")
SAMPLE_AXES = ("step", "seen", "group", "query", "output", "sample")
PARTS = ("kernel", "momentum", "regularization")
OWN_PARTS = ("kernel", "regularization")
WARM_PARTS = ("kernel", "regularization", "past")


def cases(*names: str) -> pytest.MarkDecorator:
    """Runs a test over the cases of these names; over all if none is given."""
    assert set(names) <= {case.id for case in CASES}
    chosen = [pytest.param(case, id=case.id) for case in CASES if not names or case.id in names]
    return pytest.mark.parametrize("case", chosen)


def some_of(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Parameters for a test: all of the names, those that are not `quick` marked slow."""
    known = list(names)
    assert set(quick) <= set(known)
    return [pytest.param(name, id=name, marks=() if name in quick else pytest.mark.slow) for name in known]


def run(case: Case, *keeps: Sequence[str], first: int = 0, groups: Groups | None = None, **options: Any) -> Any:
    """An influence for each choice of kept axes. The model handed over has other weights than the trained one."""
    explainer = Explainer(case.make(9), case.query(), groups or case.resolved_groups(), keeps, **options)
    for step in case.steps(first):
        explainer.add(step)
    return explainer.results()[0] if len(keeps) == 1 else explainer.results()


def parts_of(case: Case, parts: Sequence[str] = PARTS) -> tuple[str, ...]:
    return (*parts, "auxiliary") if case.auxiliary is not None else tuple(parts)


def fixed(nodes: int, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    return {"quadrature": Quadrature.fixed(nodes), "parts": parts}


@cache
def influences(case: Case, nodes: int) -> list[Influence]:
    """With all axes kept, with step and group, and with the group alone."""
    return list(run(case, AXES, ("step", "group"), ("group",), **fixed(nodes, parts_of(case))))


def full(case: Case, nodes: int) -> Influence:
    return influences(case, nodes)[0]


def check(got: ArrayLike, wanted: ArrayLike, scale: float | None = None, tolerance: float = 1e-9) -> None:
    """Equal within 1e-9 of the largest number wanted, or of a scale that says what is large."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    scale = np.abs(wanted).max(initial=0) if scale is None else scale
    assert np.abs(got - wanted).max(initial=0) <= tolerance * scale


def wanted_influence(oracle: Reference, groups: Groups, parts: Sequence[str] = PARTS, first: int = 0) -> np.ndarray:
    """Ψ, (P, N, G, X, O), for those who watch from step `first` on."""
    found = oracle.parts(first)
    return torch.stack([oracle.over(groups, oracle.influence(found[part]))[first:] for part in parts]).numpy()


@cache
def lasting(case: Case) -> list[Step]:
    return list(case.steps(lasting=True))


def of_samples(case: Case, keep: tuple[str, ...], **options: Any) -> xr.Dataset:
    options = {"quadrature": Quadrature.fixed(1), "progress": False, **case.sample_options(), **options}
    model, steps = case.make(9), lasting(case)
    return explain(steps, model, case.query(), groups=case.resolved_groups(), keep=keep, **options).data


def wanted_samples(case: Case, samples: list[int], nodes: int = 1) -> Tensor:
    """Ψ by step, seen step, group, query, output and sample, from c_{s,i} and the rest."""
    oracle = case.reference(nodes)
    own = oracle.train[:, :, list(samples)]  # N N M D
    terms = torch.einsum("sxjd,sikd->sdixjk", oracle.test, own)
    return oracle.over(case.resolved_groups(), terms).transpose(1, 2)
