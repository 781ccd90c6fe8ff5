"""What may be asked of a Tracker where the parameters are in pieces, one for each process."""

from collections.abc import Mapping
from typing import Any

import torch

from explaind_track.core.queries import Query
from explaind_track.engine.path_integral import Quadrature


def check_pieces(
    optimizer: torch.optim.Optimizer,
    queries: Mapping[str, Query],
    record: str,
    quadrature: Quadrature | None,
    others: Mapping[str, Any],
) -> None:
    """Raises ValueError for what needs parameters that are whole: before any work, and in every process alike.

    others: further arguments of the Tracker, by name, that are None, 0 or empty where they are not given.
    """
    for name, query in queries.items():
        if query.reduction is None:
            raise ValueError(
                f"queries[{name!r}] has {len(query)} targets, and parameters are in pieces, which only backward passes "
                "of the model itself put together: a scalar query is needed, because each target would take one of its "
                f"own. Write .mean() or .sum() behind it, as in {{{name!r}: Query.loss(x, y).mean()}}"
            )

    if quadrature is not None and not quadrature.is_trapezoid:
        raise ValueError(
            f"quadrature={quadrature!r} puts parameters between a step's two ends into the model, and they are in "
            "pieces: leave it out, or pass Quadrature.trapezoid(), whose nodes are the step's two ends"
        )
    if isinstance(optimizer, torch.optim.Muon):
        raise ValueError(
            "Muon's step turns whole matrices, of which each process holds a piece: no piece has a share of it of its "
            "own. Use an optimizer that moves each number by itself, such as AdamW, or DistributedDataParallel"
        )
    if record != "gradients":
        raise ValueError(
            'record="batches" keeps batches to compute gradients again, which no single process can where parameters '
            "are in pieces: leave it out, and the record holds rows and keyframes"
        )
    for name, why in REFUSED.items():
        if others[name]:
            raise ValueError(
                f"{name}= {why}, and parameters are in pieces, one for each process: leave it out{INSTEAD}"
            )


REFUSED = {
    "sample_loss": "asks for gradients of single samples, for which a process needs the whole model",
    "auxiliary": "asks for the gradient of one term by itself, for which a process needs the whole model",
    "scores": "sums up an influence for every single number, for which a process would need all of them",
    "audit_every": "computes a step again on a copy of the whole model",
}
INSTEAD = " (influences of groups are exact), or train with DistributedDataParallel"
