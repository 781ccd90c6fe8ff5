"""The panels of single training samples: a table of the most influential ones, and maps of what they changed."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from explaind_track.analysis.sample_tables import text_columns
from explaind_track.core.tables import inert
from explaind_track.core.tokens import TokenText
from explaind_track.engine.sample_influence import SampleInfluence
from explaind_track.record.media import Table, is_sound
from explaind_track.tracking.rendering import rendered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLE_ROWS = 20

LETTERS = 24
"""Of a sample's text, so many stand beside a map."""


def most_influential(samples: SampleInfluence) -> Tensor:
    """The places of the samples with the largest influences, the largest first."""
    return samples.influence.abs().argsort(descending=True)[:SAMPLE_ROWS]


def sample_table(
    samples: SampleInfluence,
    norms: Mapping[int, float],
    ids: Mapping[int, str],
    render: Callable[[Any], Any] | None = None,
) -> Table:
    """The training samples that changed the query's loss most through this step's gradient.

    norms: of their gradients, by index; ids: the samples' names, by index, where these are words; render: from a
    sample's index or name to its picture, or to words about it; a `TokenText` shows the samples' own tokens.
    """
    order = most_influential(samples)
    names = [ids.get(index, index) for index in samples.index[order].tolist()]
    columns: dict[str, list[Any]] = {
        "sample": names,
        "change of the query's loss": (-samples.influence[order]).tolist(),  # through the gradient of this step alone
        "weight": samples.weight[order].tolist(),
        "loss": samples.loss[order].tolist(),
        "gradient norm": [norms.get(index) for index in samples.index[order].tolist()],
    }
    for name, values in (("label", samples.label), ("prediction", samples.prediction)):
        if bool((values >= 0).any()):
            columns[name] = [value if value >= 0 else None for value in values[order].tolist()]
    if isinstance(render, TokenText):
        columns |= text_columns(render, [samples.tokens[place] for place in order.tolist()] if samples.tokens else ())
    elif render is not None:
        cells = rendered(render, names)
        kinds = {"audio" if is_sound(cell) else "image" for cell in cells if isinstance(cell, bytes)}
        columns[kinds.pop() if len(kinds) == 1 else "rendered"] = cells
    return Table(list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def names_of(
    samples: SampleInfluence, order: Tensor, ids: Mapping[int, str], render: Callable[[Any], Any] | None
) -> list[str]:
    """What a map calls samples; where their text is known, it begins so."""
    names = [str(ids.get(index, index)) for index in samples.index[order].tolist()]
    if not isinstance(render, TokenText) or not samples.tokens:
        return names
    texts = (inert(render(samples.tokens[place].ids)).replace("\n", " ") for place in order.tolist())
    return [f"{name}: {text[:LETTERS]}" for name, text in zip(names, texts, strict=True)]


def sample_map(rows: Tensor, names: Sequence[int | str]) -> bytes:
    """A PNG of how much the step's most influential samples changed the losses of single queries.

    rows: the changes (queries, samples); names: the samples'.
    """
    from explaind_track.analysis import plots

    return _png(plots.sample_map(rows.numpy(), names))


def cosine_map(rows: Tensor) -> bytes:
    """A PNG of how alike the step's samples changed the losses of two queries.

    rows: the changes (queries, samples), whose cosines are drawn.
    """
    from explaind_track.analysis import plots

    unit = torch.nn.functional.normalize(rows, dim=1)
    return _png(plots.cosine_map((unit @ unit.T).numpy()))


def _png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
