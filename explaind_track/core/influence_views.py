"""Views of an influence: its summary, its rows for pandas, its figure, and the samples that did most."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from explaind_track.core import colored_text
from explaind_track.core.checks import require_int, require_package, shown
from explaind_track.core.step import SHARES
from explaind_track.core.summary import Summary, curve, sizes_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 3
"""The samples that a summary names, of each kind."""

MOST_BARS = 40

EARLY_STEPS = 10
"""An optimizer's first steps move a model by far more than all others do: they do not set a figure's scale."""


def summary(data: xr.Dataset) -> Summary:
    """The sizes, and what each group did; of samples, those that did most."""
    influence = data["influence"]
    sizes = sizes_in_words({str(axis): size for axis, size in influence.sizes.items()})
    title = f"Influence: {sizes}"
    if "sample" in influence.dims:
        top = most_influential(data, FEW, {})
        return Summary(f"{title}; the samples that did most", list(top.columns), top.values.tolist())

    if "token" in influence.dims:
        rows = colored_text.most_changed(data, FEW)
        return Summary(f"{title}; the tokens that it helped and harmed most", colored_text.COLUMNS, rows)

    if "residual" in data:
        title += f"; residual at most {float(data['residual'].max()):.2g}"
    if "importance" not in data or "part" not in influence.dims:
        return Summary(title)
    return Summary(title, *_table_of_groups(data["importance"]))


def markup(data: xr.Dataset) -> str:
    """HTML that stands below the summary in notebooks: of tokens, their coloured text."""
    return colored_text.html(colored_text.texts_of(data)) if "token" in data["influence"].dims else ""


def _table_of_groups(importance: xr.DataArray) -> tuple[list[str], list[list[Any]]]:
    """The importance of each part through each group, with the kernel's over the steps."""
    parts = [str(name) for name in importance["part"].values]
    over_steps = "step" in importance.dims and importance.sizes["step"] > 1
    sign = "Σ " if over_steps else ""
    columns = ["group", *(f"{sign}Ψ̄ {part}" for part in parts), *(["over the steps"] if over_steps else [])]

    rows: list[list[Any]] = []
    groups = importance["group"].values if "group" in importance.dims else ["all"]
    for group in groups:
        own = importance.sel(group=group) if "group" in importance.dims else importance
        row: list[Any] = [str(group), *(float(own.sel(part=part).sum()) for part in parts)]
        if over_steps:
            first = own.isel(part=0)
            row.append(curve(first.sum([axis for axis in first.dims if axis != "step"]).values.tolist()))
        rows.append(row)
    return columns, rows


def most_influential(data: xr.Dataset, count: int, where: Mapping[str, Any]) -> pd.DataFrame:
    """See `Influence.top`."""
    count = require_int("count", count, 1)
    influence = data["influence"]
    if "sample" not in influence.dims:
        kept = ", ".join(map(str, influence.dims))
        raise ValueError(
            f"this influence keeps {kept}, and no samples: explain(…, keep=('sample',), sample_loss=…, data=…) has them"
        )

    for axis, label in where.items():
        influence = _at(influence, axis, label)
    change = -influence.sum([axis for axis in influence.dims if axis != "sample"])
    order = np.argsort(change.values, kind="stable")
    lowered = [place for place in order[:count] if change.values[place] < 0]
    raised = [place for place in order[::-1][:count] if change.values[place] > 0]

    words = ("helpful", "harmful") if data.attrs.get("is_loss") else ("lowered", "raised")
    effect = [words[0]] * len(lowered) + [words[1]] * len(raised)
    places = np.array([*lowered, *raised], dtype=np.int64)
    labels = change["sample"].values if "sample" in change.coords else np.arange(change.sizes["sample"])
    return pd.DataFrame({"effect": effect, "sample": labels[places], "change": change.values[places]})


def _at(influence: xr.DataArray, axis: str, label: Any) -> xr.DataArray:
    """The influence at one label of an axis, or at one place of an axis without labels."""
    axes = [str(name) for name in influence.dims if name != "sample"]
    if axis not in axes:
        raise ValueError(f"there is no axis {axis!r} to choose from; beside the samples there are: {', '.join(axes)}")
    try:
        return influence.sel({axis: label})
    except (KeyError, IndexError):
        has_labels = axis in influence.coords
        known = influence[axis].values.tolist() if has_labels else f"0 to {influence.sizes[axis] - 1}"
        raise ValueError(f"{axis}={shown(label)} is none of {shown(known)}") from None


def frame(data: xr.Dataset) -> pd.DataFrame:
    """See `Influence.to_pandas`."""
    influence = data["influence"]
    if not influence.dims:
        return pd.DataFrame({"influence": [float(influence)]})
    numbered = {axis: np.arange(size) for axis, size in influence.sizes.items() if axis not in influence.coords}
    labelled = influence.assign_coords(numbered)
    rows = labelled.reset_coords(drop=True).to_dataframe("influence").reset_index()
    importance = data.get("importance")
    if importance is not None and set(importance.dims) == set(influence.dims):
        rows["importance"] = importance.transpose(*influence.dims).values.reshape(-1)
    return rows


# ------------------------------------------------------------------------------------------------------------- figure


def figure(data: xr.Dataset) -> "Figure":
    """See `Influence.plot`."""
    if "token" in data["influence"].dims:
        texts = colored_text.texts_of(data)
        text = _figure(*colored_text.text_size(texts), layout=None)
        colored_text.draw(text.add_axes((0, 0, 1, 1)), texts)
        return text

    values, name = _drawn(data)
    axes = [str(axis) for axis in values.dims if axis != "part" and values.sizes[axis] > 1]
    if len(axes) > 2:
        raise ValueError(
            f"a figure has two axes beside the part, and this influence keeps {', '.join(axes)}: explain it with fewer "
            "in keep=, or choose from it, as in Influence(influence.data.isel(query=0)).plot()"
        )
    values = values.squeeze([axis for axis in values.dims if axis != "part" and values.sizes[axis] == 1], drop=True)
    parts = [str(part) for part in values["part"].values] if "part" in values.dims else [""]
    parts = [part for part in parts if part not in SHARES] or parts

    if len(axes) < 2 and "step" not in axes:
        drawn = _figure(7, 3.5)
        _bars(drawn.subplots(), values, axes, parts, name)
        return drawn
    drawn = _figure(5.5 * len(parts), 3.8)
    for axis, part in zip(drawn.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        one = values.sel(part=part) if part else values
        if "step" in axes and _fits_lines(one, axes):
            _lines(axis, one, [name for name in axes if name != "step"], name)
        else:
            _heat_map(axis, one, axes, name)
        axis.set_title(part or "kernel")
    return drawn


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    """An empty figure, in inches, which a notebook shows without pyplot."""
    require_package("matplotlib", "plots", "a figure")
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png")
            return content.getvalue()

    return ShownFigure(figsize=(width, height), layout=layout)


def _drawn(data: xr.Dataset) -> tuple[xr.DataArray, str]:
    """What is drawn, and its name: the influence with its sign where outputs or samples are kept, else importance."""
    influence = data["influence"]
    if "importance" in data and not {"output", "sample"} & set(influence.dims):
        return data["importance"], "importance Ψ̄"
    return influence, "influence Ψ"


def _fits_lines(values: xr.DataArray, axes: list[str]) -> bool:
    return all(values.sizes[axis] <= 12 for axis in axes if axis != "step")


def _labels(values: xr.DataArray, axis: str) -> list[str]:
    return [str(label) for label in (values[axis].values if axis in values.coords else range(values.sizes[axis]))]


def _lines(axis: "Axes", values: xr.DataArray, along: list[str], name: str) -> None:
    """A line over the steps for each label of the other axis."""
    steps = values["step"].values if "step" in values.coords else np.arange(values.sizes["step"])
    styles = ("-", "--", ":", "-.")
    for place, label in enumerate(_labels(values, along[0]) if along else [name]):
        one = values.isel({along[0]: place}) if along else values
        axis.plot(steps, one.values, styles[place % len(styles)], label=label, linewidth=1)
    if len(steps) > 2 * EARLY_STEPS:
        late = values.isel(step=slice(EARLY_STEPS, None)).values
        low, high = min(0.0, float(late.min())), float(late.max())
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) or None)
    axis.set_xlabel("training step")
    axis.set_ylabel(name)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.2)


def _bars(axis: "Axes", values: xr.DataArray, axes: list[str], parts: list[str], name: str) -> None:
    """Bars for each label, one for each part; of very many labels, those with the largest."""
    along = axes[0] if axes else None
    if along is None:
        axis.bar(parts, [float(values.sel(part=part) if "part" in values.dims else values) for part in parts])
        axis.set_ylabel(name)
        return

    size = abs(values).sum([other for other in values.dims if other != along]).values
    places = np.sort(np.argsort(size)[::-1][:MOST_BARS])
    labels, width = _labels(values, along), 0.8 / len(parts)
    for number, part in enumerate(parts):
        one = (values.sel(part=part) if "part" in values.dims else values).values
        axis.bar(np.arange(len(places)) + number * width, one[places], width, label=part or None)
    axis.set_xticks(np.arange(len(places)) + 0.4 - width / 2, [labels[place] for place in places], rotation=60)
    axis.set_xlabel(along if len(places) == len(labels) else f"{along} (the {len(places)} largest of {len(labels)})")
    axis.set_ylabel(name)
    if parts != [""]:
        axis.legend(fontsize=8)


def _heat_map(axis: "Axes", values: xr.DataArray, axes: list[str], name: str) -> None:
    """The second axis upwards, the first to the right, steps always to the right."""
    down, right = sorted(axes, key="step".__eq__)
    table = values.transpose(down, right).values
    limit = float(abs(table).max()) or 1.0
    signed = bool((table < 0).any())
    colors, low = ("RdBu_r", -limit) if signed else ("viridis", 0.0)
    image = axis.imshow(table, colors, vmin=low, vmax=limit, aspect="auto", interpolation="nearest")
    for along, ticks in ((right, axis.set_xticks), (down, axis.set_yticks)):
        labels = _labels(values, along)
        every = max(1, len(labels) // 12)
        ticks(range(0, len(labels), every), labels[::every])
    axis.set_xlabel(right)
    axis.set_ylabel(down)
    axis.figure.colorbar(image, label=name)
