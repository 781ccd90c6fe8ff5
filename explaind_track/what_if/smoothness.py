"""How far a run's derivative can be trusted: what it predicts of runs without some samples, beside what they do."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import nn
from tqdm.auto import tqdm

from explaind_track.core import distributed
from explaind_track.core.checks import require_int, require_number
from explaind_track.core.influence import Influence
from explaind_track.core.queries import Query
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.targets import fitted_query
from explaind_track.explanation.sample_axis import Array, Data
from explaind_track.record.trajectory import Trajectory
from explaind_track.what_if.changes import Change, Reweighted
from explaind_track.what_if.counterfactual import counterfactual
from explaind_track.what_if.recomputed import with_gradients
from explaind_track.what_if.rerun import targets_at
from explaind_track.what_if.retraining import Retraining
from explaind_track.what_if.step_gradients import AuxiliaryLosses

KEEP = ("query", "output", "sample")


def smoothness(
    trajectory: Trajectory,
    model: nn.Module,
    query: Query,
    *,
    sample_loss: SampleLoss,
    data: Data | None = None,
    effects: Influence | None = None,
    fractions: Sequence[float] = (0.01, 0.05),
    sets: int = 20,
    seed: int = 0,
    auxiliary: AuxiliaryLosses | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Measures how far a counterfactual can be trusted: trains again without random sets of samples, and compares what
    that does to the targets with what the derivative predicts, −Σ effect over the samples left out.

    The derivative is exact, but of one point. Where training is smooth (GELU or tanh, average pooling, small steps, no
    tiny ε) it predicts runs without a few percent of the samples: `lds` near 1 at both fractions. Where it is not (ReLU
    and max pooling with large rates, Adam with ε = 1e-8), each of many kinks sends the run elsewhere, and it holds in a
    tiny neighbourhood only: `lds` near 0 already at the smaller one, as any method of one run then gives. An `lds`
    that falls from the smaller fraction to the larger one, or an `error` that grows in proportion to it, tells of
    curvature: believe the ranking of samples, and not sums over many of them.

    Args:
        trajectory: The record.
        model: The module that was trained, in the mode that it was trained in; its own values are not touched.
        query: Whose targets are looked at; several of them, for an interval that tells something.
        sample_loss: `(model, batch)` → unreduced losses (N,).
        data: From an index tensor (N,) to the batch that `sample_loss` takes.
        effects: What `counterfactual` gave with keep=("query", "output", "sample") for all samples; None: computed.
        fractions: Of the samples that are left out: two scales, or as many as wanted.
        sets: How many random sets for each; the cost is that of training so often.
        seed: Of the random sets.
        auxiliary: The auxiliary losses of the run, as the Tracker was given them.
        progress: False: show no bar.

    Returns:
        By fraction: `lds`, the rank correlation (Spearman) over the sets of predicted and actual changes, averaged over
        the targets (the linear datamodeling score), and `lds_error`, its standard error (jackknife over the sets):
        lds ± 1.96 lds_error holds 95%; `correlation`, the same of the changes themselves (Pearson); `error`,
        ‖predicted − actual‖ / ‖actual‖. And `predicted` and `actual` (fraction, set, query, output), and `left_out`
        (fraction, set, sample).

    Raises:
        TypeError, ValueError: As `counterfactual` does; for fractions that are none, fewer than 4 sets, and effects
            that were not kept over these axes.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Query, Tracker, Trajectory, smoothness
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
        ...     for _ in range(3):
        ...         with tracker.step():
        ...             optimizer.zero_grad()
        ...             tracker.batch((x, y), index=range(8))
        ...             loss(model, (x, y)).mean().backward()
        ...             optimizer.step()
        ...     tracker.finish()
        ...     found = smoothness(
        ...         Trajectory.open(directory), model, Query.loss(x[:2], y[:2]), sample_loss=loss,
        ...         data=lambda index: (x[index], y[index]), fractions=(0.125, 0.25), sets=6, progress=False,
        ...     )
        >>> bool((found["lds"] > 0.9).all()), bool((found["error"] < 0.2).all())
        (True, True)
    """
    sets, seed = require_int("sets=", sets, 4), require_int("seed=", seed, 0)
    for fraction in fractions:
        if not 0 < require_number("fractions=: each", fraction) < 1:
            raise ValueError(f"fractions= are between 0 and 1, not {fraction}")

    trajectory = with_gradients(trajectory, model, sample_loss, data, auxiliary)

    # what is predicted
    options: dict[str, Any] = {"sample_loss": sample_loss, "data": data, "auxiliary": auxiliary}
    if effects is None:
        effects = counterfactual(trajectory, model, query, keep=KEEP, progress=progress, **options)
    effect = effects.data["effect"]
    if effect.dims != KEEP:
        raise ValueError(f"effects= are those kept over {KEEP}, not over {effect.dims}")
    left_out = np.stack([list(_random_sets(effect.sizes["sample"], f, sets, seed)) for f in fractions])
    predicted = -np.einsum("fsk,qok->fsqo", left_out, effect.values)

    # what happens
    query, samples = fitted_query(model, query), effect["sample"].values
    actual = np.zeros_like(predicted)
    with tqdm(total=1 + left_out[:, :, 0].size, desc="without some", unit="run", disable=not progress) as bar:

        def end(change: Sequence[Change]) -> Array:
            training = Retraining(trajectory, model, sample_loss, data, auxiliary or {}, change, start=0)
            for _ in training.steps(len(trajectory)):
                pass
            bar.update()
            return targets_at(model, query, training.state).numpy()

        whole = end(())
        for place in distributed.share(list(np.ndindex(*left_out.shape[:2]))):
            actual[place] = end([Reweighted.without(samples[left_out[place]])]) - whole
    distributed.add_up(actual)

    compared = [_compare(*pair) for pair in zip(predicted, actual, strict=True)]
    found: dict[str, Any] = {name: ("fraction", [one[name] for one in compared]) for name in compared[0]}
    cells = ("fraction", "set", "query", "output")
    found |= {"predicted": (cells, predicted), "actual": (cells, actual)}
    found["left_out"] = (("fraction", "set", "sample"), left_out)
    return xr.Dataset(found, {"fraction": list(fractions), "sample": samples})


def _random_sets(samples: int, fraction: float, count: int, seed: int) -> Iterator[Array]:
    """Random sets of this fraction of the samples, at least one sample: masks (samples,)."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, round(fraction * samples))
    for _ in range(count):
        mask = np.zeros(samples, dtype=bool)
        mask[torch.randperm(samples, generator=generator)[:size].numpy()] = True
        yield mask


def _compare(predicted: Array, actual: Array) -> dict[str, float]:
    """The scores of one fraction, from changes (set, query, output)."""
    one, other = (values.reshape(len(values), -1) for values in (predicted, actual))
    count = len(one)

    # the jackknife: how much the score moves as each set is left out
    without = np.array([_rank_correlation(np.delete(one, s, 0), np.delete(other, s, 0)) for s in range(count)])
    spread = (count - 1) / count * np.square(without - without.mean()).sum()
    return {
        "lds": _rank_correlation(one, other),
        "lds_error": float(spread**0.5),
        "correlation": _correlation(one, other),
        "error": float(np.linalg.norm(one - other) / max(float(np.linalg.norm(other)), 1e-300)),
    }


def _rank_correlation(one: Array, other: Array) -> float:
    """Spearman's ρ over the rows, averaged over the columns."""
    return _correlation(*(pd.DataFrame(values).rank() for values in (one, other)))


def _correlation(one: Any, other: Any) -> float:
    """Pearson's r over the rows, averaged over the columns; 0 for a column that does not vary."""
    return float(pd.DataFrame(one).corrwith(pd.DataFrame(other)).fillna(0).mean())
