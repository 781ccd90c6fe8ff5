"""Tables of training samples: labels, predictions and losses, and those that look mislabelled."""

import warnings
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track.core.checks import require_callable
from explaind_track.core.modules import buffers_of, parameters_of
from explaind_track.core.queries import Query
from explaind_track.core.step import Batch, State
from explaind_track.core.tensors import tree_map, tree_rows
from explaind_track.core.tokens import TokenText, logits_of
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.functional import Functional, evaluation
from explaind_track.engine.path_integral import Quadrature
from explaind_track.engine.predictions import (
    SampleTokens,
    inputs_and_labels,
    labels_and_predictions,
    tokens_and_predictions,
)
from explaind_track.errors import LoggingWarning
from explaind_track.explanation.explain import explain
from explaind_track.explanation.sample_axis import Data, choose_indices
from explaind_track.explanation.step_source import StepSource, Window
from explaind_track.record.trajectory import Trajectory

CHUNK = 512
"""So many samples' own losses are explained at a time."""

SAME_LOSS = 1e-3
"""The relative miss up to which two losses are the same."""


def describe_samples(
    model: nn.Module,
    samples: Iterable[int | str],
    data: Data,
    sample_loss: SampleLoss | None = None,
    *,
    tokenizer: Any = None,
) -> pd.DataFrame:
    """Labels, predictions and losses of training samples, by the model as it is, in eval mode.

    Args:
        model: The module; `model.load_state_dict(trajectory.state_dict(step))` sets it to any step of a run.
        samples: Their indices, or names.
        data: From an index tensor (N,), or the list of names, to the batch that `sample_loss` takes.
        sample_loss: `(model, batch)` → unreduced losses (N,); None: no losses.
        tokenizer: See `TokenText`; of samples with `input_ids`, tells their text and what the model takes for it.

    Raises:
        ValueError: For `data` that gives another number of samples.

    Returns:
        Indexed by sample, with the columns `label` and `prediction` where batches are `(inputs, …, classes)`, or a
        mapping with "labels", and the model scores classes; with a tokenizer `text`, as `prediction` the likeliest
        tokens, and `label` where labels are others; and `loss`. Joins what `Influence.top` gives:
        `influence.top().join(describe_samples(…), on="sample")`.

    Example:
        >>> import torch
        >>> from explaind_track.analysis import describe_samples
        >>> model, x, y = torch.nn.Linear(3, 3), torch.eye(3), torch.tensor([0, 1, 0])
        >>> _ = model.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
        >>> describe_samples(model, [0, 2], lambda index: (x[index], y[index]))
                label  prediction
        sample
        0           0           0
        2           0           2
    """
    names = list(samples)
    index: Any = names if names and isinstance(names[0], str) else torch.tensor(names, dtype=torch.int64)
    device = next(iter(parameters_of(model).values())).device
    content = tree_map(lambda tensor: tensor.to(device), data(index))
    if tree_rows(content) != len(names):
        raise ValueError(f"data(index) gave {tree_rows(content)} samples for {len(names)} indices")

    batch, state = Batch(len(names), 1.0, None, content, {}), State(parameters_of(model), buffers_of(model))
    labels, predictions = labels_and_predictions(Functional(model), state, batch)
    columns: dict[str, Any] = {"sample": names}
    for name, values in (("label", labels), ("prediction", predictions)):
        if bool((values >= 0).any()):
            columns[name] = values.tolist()
    if tokenizer is not None:
        columns |= text_columns(TokenText(tokenizer), tokens_and_predictions(Functional(model), state, batch))
    if sample_loss is not None:
        with torch.no_grad(), evaluation(model):
            columns["loss"] = sample_loss(model, content).tolist()
    return pd.DataFrame(columns).set_index("sample")


def text_columns(text: TokenText, tokens: Sequence[SampleTokens]) -> dict[str, list[Any]]:
    """The columns that tell samples by their text: `text`, the `label` where labels are others, and the `prediction`,
    the likeliest tokens by the model. None where there are no tokens, of which a LoggingWarning tells."""
    if not tokens:
        warnings.warn(
            "the text of samples is known of batches that are mappings with 'input_ids' (samples, tokens), and these "
            "are others: give their text by a function, Tracker(render=…), or leave the tokenizer out",
            LoggingWarning,
            stacklevel=3,
        )
        return {}

    columns = {"text": [text(one.ids) for one in tokens]}
    if any(one.labels for one in tokens):
        columns["label"] = [text(one.labels) for one in tokens]
    if any(one.predictions for one in tokens):
        columns["prediction"] = [text(one.predictions) for one in tokens]
    return columns


def find_mislabelled(
    trajectory: Trajectory,
    model: nn.Module,
    *,
    sample_loss: SampleLoss,
    data: Data,
    samples: Iterable[int | str] | None = None,
    window: Window | None = None,
    quadrature: Quadrature | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Ranks a classifier's training samples by how much of the fall of their loss is their own doing.

    A sample that others resemble is learned from them; one with a wrong label has to be learned by heart. So the rank
    is by a sample's influence Ψ on its own loss, summed over the run: how much that loss fell because of the sample's
    own gradients. Whoever looks for wrong labels reads from the top. It is a ranking, and no verdict: rare and hard
    samples stand high as well.

    Args:
        trajectory: The run.
        model: The module that was trained; its own values do not matter, and are not touched.
        sample_loss: `(model, batch)` → unreduced cross-entropies (N,), as in training.
        data: From an index tensor (N,), or the list of names, to the batch: `(inputs, …, classes)`, or a mapping with
            the classes under "labels".
        samples: The indices or names asked for; None: all that the run saw. Each takes a pass over the run with one
            vector of the parameters' size, many at a time.
        window: `(first, last)`, steps first ≤ s < last; None: all.
        quadrature: As in `explain`; one node for each step if not given, which is enough for a ranking.
        progress: Show a bar.

    Returns:
        With the columns `sample`, `own_influence`, `label`, `prediction` and `loss` after the run; the most suspicious
        first.

    Raises:
        ValueError: For batches of another form, and a `sample_loss` that is no cross-entropy of the model's scores.

    Example:
        >>> import tempfile, torch
        >>> from explaind_track import Tracker, Trajectory
        >>> from explaind_track.analysis import find_mislabelled
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(40, 5), torch.arange(40) % 2
        >>> x[:, 0] += 4 * y
        >>> y[7] = 0  # it is a 1
        >>> model = torch.nn.Linear(5, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tracker = Tracker(model, optimizer, queries={}, trajectory=directory)
        ...     for _ in range(20):
        ...         with tracker.step():
        ...             optimizer.zero_grad()
        ...             tracker.batch((x, y), index=torch.arange(40))
        ...             loss(model, (x, y)).mean().backward()
        ...             optimizer.step()
        ...     tracker.finish()
        ...     data = lambda index: (x[index], y[index])
        ...     found = find_mislabelled(
        ...         Trajectory.open(directory), model, sample_loss=loss, data=data, progress=False
        ...     )
        >>> found[["sample", "label", "prediction"]].head(1).values.tolist()
        [[7, 0, 1]]
    """
    require_callable("sample_loss=", sample_loss, "(model, batch) → unreduced losses (N,)")
    names = list(choose_indices(StepSource.of(trajectory, model, window).repeatable(), data, samples).values())
    _own_losses(data(_index(names[:1])))  # refuses, before any work, what has no classes
    final = deepcopy(model)
    final.load_state_dict(trajectory.state_dict(len(trajectory)))
    described = describe_samples(final, names, data, sample_loss)

    own: list[float] = []
    for start in range(0, len(names), CHUNK):
        some = names[start : start + CHUNK]
        query = _own_losses(data(_index(some)))
        if start == 0:
            _require_same_loss(query, final, described["loss"].iloc[: len(some)])
        influence = explain(
            trajectory, model, query, keep=("query", "sample"), sample_loss=sample_loss, data=data, samples=some,
            window=window, quadrature=quadrature or Quadrature.fixed(1), progress=progress,
        )  # fmt: skip
        own += influence.data["influence"].values.diagonal().tolist()

    described.insert(0, "own_influence", own)
    return described.reset_index().sort_values("own_influence", ascending=False, ignore_index=True, kind="stable")


def _index(names: Sequence[int | str]) -> Any:
    return list(names) if isinstance(names[0], str) else torch.tensor(names)


def _own_losses(batch: Any) -> Query:
    """The cross-entropies of a batch's samples. Raises ValueError for one that has no classes."""
    found = inputs_and_labels(batch)
    if found is None:
        raise ValueError(
            "data(index) is expected to give (inputs, …, classes), or a mapping with the classes under 'labels': whole "
            "numbers (N,). For other losses, explain(…, keep=('query', 'sample')) with a query of the samples' losses"
        )

    def loss(output: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(output), y, reduction="none")

    return Query.loss(*found, loss)


def _require_same_loss(query: Query, model: nn.Module, losses: pd.Series) -> None:
    """Raises ValueError unless the query's losses are those of `sample_loss`."""
    with torch.no_grad(), evaluation(model):
        found = query(model).flatten().double().cpu()
    expected = torch.tensor(losses.to_numpy(), dtype=torch.float64)
    if not torch.allclose(found, expected, rtol=SAME_LOSS, atol=SAME_LOSS):
        raise ValueError(
            "sample_loss= is expected to be the cross-entropy of the model's scores, and gives other losses: of the "
            f"first sample {float(expected[0]):.4g}, where the cross-entropy is {float(found[0]):.4g}. For other "
            "losses, explain(…, keep=('query', 'sample')) with a query of the samples' losses"
        )
