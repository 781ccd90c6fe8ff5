"""Influence: labelled arrays of summed influences, and the sums of the paper's §4 by their names."""

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr

from explaind_track.core import influence_file, influence_views
from explaind_track.core.faithfulness import faithfulness
from explaind_track.core.step import SHARES
from explaind_track.core.summary import Summarized, Summary

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

AXES = ("step", "group", "query", "output", "token")
"""What an influence can be kept over; the axes that are not kept are summed over. The tokens of a `Query.tokens` stand
in the place of query and output: those that count, one input behind the other."""


@dataclass(frozen=True, repr=False)
class Influence(Summarized):
    """Influences of a training run on one query's targets, summed over all axes but those kept.

    `data` holds, each over `part` and those of step, group, query and output that are kept:

    - `influence` (part, step, group, query, output): Ψ, signed; subtracted from the prediction (paper's sign);
    - `importance` (part, step, group, query): Ψ̄ = Σ_x Σ_j |Ψ|, summed over all outputs and the queries that are not
      kept, after the signed sum over the steps and groups that are not;
    - `total_importance` (part, step, query): the same with the groups summed (signed) as well;
    - `rounding`, `buffers`, `change` (step, query, output): the influence of float rounding on the parameters, the
      change that the model's buffers made, and f(θ_{s+1}) − f(θ_s);
    - `residual` (step): ‖remainder‖₂ / ‖change‖₂ over queries × outputs, and `residual_floor` (step), below which
      float arithmetic does not let it go; where steps are summed, both of the summed terms;
    - `nodes` (step): the quadrature nodes taken; the largest where steps are summed;
    - `remainder` (step, query, output): change + ΣΨ, signed, as it was before any closing;
    - `initial`, `final` (query, output): the prediction before and after, if both axes are kept;
    - `input`, `place` (token): where a token stands, if the tokens of a `Query.tokens` are kept: the axis `token`, with
      their text as labels, takes the place of query and output, and padding and ignored labels are not on it.

    Parts are `kernel`, `regularization` (and `past`, and `outside`: what something other than the optimizer did to the
    weights since the step before); `momentum` is a share of the kernel, in no sum.

    Example:
        >>> import torch
        >>> from explaind_track import Query, StepObserver, explain
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(2, 3), torch.randn(9, 2), torch.arange(9) % 3
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> observer = StepObserver(optimizer, dict(model.named_parameters()))
        >>> def training():
        ...     for number in range(4):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(model(x), y).backward()
        ...         observer.before(buffers={})
        ...         optimizer.step()
        ...         yield observer.after(number, buffers={})
        >>> groups = {"weights": "weight", "biases": "bias"}
        >>> influence = explain(
        ...     training(), model, Query.outputs(x), groups=groups, keep=("step", "group"), progress=False
        ... )
        >>> influence.kept, influence.data["influence"].dims
        (('step', 'group'), ('part', 'step', 'group'))
        >>> bool(influence.residual.max() < 1e-4)
        True
    """

    data: xr.Dataset

    def importance(self) -> xr.DataArray:
        """Ψ̄ and Ψ̄^reg: absolute influence, summed over outputs and the queries that are not kept (§4).

        Returns:
            (part, …): over step, group and query where they are kept.

        Example:
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> labels = {"part": ["kernel", "regularization"], "group": ["body", "head"]}
            >>> data = xr.Dataset({"importance": (("part", "group"), [[3.0, 1.0], [0.5, 0.25]])}, labels)
            >>> Influence(data).importance().sel(part="kernel", group="head").item()
            1.0
        """
        return self.data["importance"]

    def total_importance(self) -> xr.DataArray:
        """The importance of all groups together: their signed influences are summed first.

        Returns:
            (part, …): over step and query where they are kept.

        Example:
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> data = xr.Dataset({"total_importance": ("part", [2.5, 0.5])}, {"part": ["kernel", "regularization"]})
            >>> Influence(data).total_importance().sel(part="kernel").item()
            2.5
        """
        return self.data["total_importance"]

    def relative_regularization(self) -> xr.DataArray:
        """D(Θ) = Σ_θ (Ψ − Ψ^reg): signed kernel minus signed regularization influence (§4).

        Returns:
            Over the kept axes.

        Example:
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> labels = {"part": ["kernel", "regularization"], "group": ["body", "head"]}
            >>> data = xr.Dataset({"influence": (("part", "group"), [[3.0, -1.0], [0.5, 0.5]])}, labels)
            >>> Influence(data).relative_regularization().values
            array([ 2.5, -1.5])
        """
        influence = self.data["influence"]
        kernel, decay = influence.sel(part="kernel"), influence.sel(part="regularization")
        return (kernel - decay).drop_vars("part", errors="ignore").rename("relative_regularization")

    @property
    def residual(self) -> xr.DataArray:
        """‖remainder‖₂ / ‖change‖₂ of every step (step), or of the steps' sum: how exact the split is.

        Example:
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> data = xr.Dataset({"residual": ("step", [1e-6, 3e-7])}, {"step": [0, 1]})
            >>> Influence(data).residual.max().item()
            1e-06
        """
        return self.data["residual"]

    def total(self) -> xr.DataArray:
        """Everything that was subtracted from the prediction: all parts (no shares), groups and the rounding.

        Returns:
            Over those of step, query and output that are kept.

        Example:
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> influence = (("part", "output"), [[3.0, -1.0], [0.5, 0.5], [2.0, -0.5]])
            >>> labels = {"part": ["kernel", "regularization", "momentum"]}
            >>> data = xr.Dataset({"influence": influence, "rounding": ("output", [0.0, 0.25])}, labels)
            >>> Influence(data).total().values  # without the momentum, which is a share of the kernel
            array([ 3.5 , -0.25])
        """
        influence = self.data["influence"]
        whole = influence.sel(part=[name for name in influence["part"].values if name not in SHARES])
        axes = [axis for axis in ("part", "group") if axis in whole.dims]
        return (whole.sum(axes) + self.data["rounding"]).rename("total")

    def prediction(self) -> xr.DataArray:
        """The path-kernel prediction f_{θ_0} − ΣΨ − ΣΨ^reg (Thm. 3.1), with what buffers did added.

        Returns:
            (query, output).

        Raises:
            ValueError: Query and output were not both kept.

        Example:
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> cells = ("query", "output")
            >>> influence = (("part", *cells), [[[-1.0, 1.0]], [[0.5, 0.0]]])
            >>> data = xr.Dataset(
            ...     {"influence": influence, "initial": (cells, [[0.0, 2.0]])}
            ...     | {name: (cells, [[0.0, 0.0]]) for name in ("rounding", "buffers")},
            ...     {"part": ["kernel", "regularization"]},
            ... )
            >>> Influence(data).prediction().values
            array([[0.5, 1. ]])
        """
        if "initial" not in self.data:
            raise ValueError(f"the prediction needs keep=('query', 'output', …), this influence kept {self.kept}")
        total, buffers = self.total(), self.data["buffers"]
        if "step" in total.dims:
            total, buffers = total.sum("step"), buffers.sum("step")
        return (self.data["initial"] - total + buffers).rename("prediction")

    def faithfulness(self) -> dict[str, float]:
        """How well the path-kernel prediction stands for the model (Table 1), for outputs that score classes.

        Returns:
            `agreement`, the fraction of queries with the same decision, and `kl`, the mean KL(model ‖ path kernel) in
            nats.

        Raises:
            ValueError: Query and output were not both kept.

        Example:
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> cells = ("query", "output")
            >>> influence = (("part", *cells), [[[-1.0, 1.0], [0.0, -3.0]]])
            >>> data = xr.Dataset(
            ...     {"influence": influence, "final": (cells, [[1.0, -1.0], [0.0, 3.0]])}
            ...     | {name: (cells, [[0.0, 0.0], [0.0, 0.0]]) for name in ("initial", "rounding", "buffers")},
            ...     {"part": ["kernel"]},
            ... )
            >>> Influence(data).faithfulness()
            {'agreement': 1.0, 'kl': 0.0}
        """
        prediction = torch.from_numpy(self.prediction().values)
        return faithfulness(torch.from_numpy(self.data["final"].values), prediction)

    def top(self, count: int = 10, **where: Any) -> "pd.DataFrame":
        """The training samples that lowered the target most, and those that raised it most.

        Args:
            count: How many of each, at most.
            where: Labels on other axes that are kept, such as `query=3` or `group="head"`; axes that are not named are
                summed over.

        Returns:
            With the columns `effect` ("lowered" or "raised"; of a loss, "helpful" or "harmful"), `sample`, and
            `change`: −Ψ, what the sample added to the target in the target's own unit.

        Raises:
            ValueError: Samples were not kept, or `where` names an axis or a label that there is not.

        Example:
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> influence = (("query", "sample"), [[3.0, -1.0, 0.5], [0.0, 2.0, -4.0]])
            >>> influence = Influence(xr.Dataset({"influence": influence}, {"sample": [7, 8, 9]}))
            >>> influence.top(1, query=1)
                effect  sample  change
            0  lowered       8    -2.0
            1   raised       9     4.0
        """
        return influence_views.most_influential(self.data, count, where)

    def to_pandas(self) -> "pd.DataFrame":
        """The influences as rows, one for each number: columns by the kept axes, `influence` Ψ, and `importance` Ψ̄.

        Returns:
            The importance where it is kept over the same axes. `data` itself is xarray's, with methods of its own.

        Example:
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> labels = {"part": ["kernel", "regularization"], "group": ["body", "head"]}
            >>> data = xr.Dataset({"influence": (("part", "group"), [[3.0, -1.0], [0.5, 0.25]])}, labels)
            >>> Influence(data).to_pandas().query("group == 'head'")
                         part group  influence
            1          kernel  head      -1.00
            3  regularization  head       0.25
        """
        return influence_views.frame(self.data)

    def plot(self) -> "Figure":
        """Draws it by the axes it has: lines over steps, bars over one other axis, a heat map over two; of tokens,
        their text, coloured by the change of their losses, in all and by group.

        Importance, or where outputs or samples are kept the influence with its sign; a panel for each part. The first
        steps, in which an optimizer moves a model by far more than in all others, may lie off the scale. Needs the
        extra `plots`.

        Raises:
            ValueError: More than two axes are kept beside the part.
            ModuleNotFoundError: matplotlib is not installed.

        Example:
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> labels = {"part": ["kernel", "regularization"], "group": ["body", "head"]}
            >>> data = xr.Dataset({"influence": (("part", "group"), [[3.0, -1.0], [0.5, 0.5]])}, labels)
            >>> Influence(data).plot().axes[0].get_xlabel()
            'group'
        """
        return influence_views.figure(self.data)

    def _summary(self) -> Summary:
        return influence_views.summary(self.data)

    def _repr_html_(self) -> str:
        return super()._repr_html_() + influence_views.markup(self.data)

    @property
    def kept(self) -> tuple[str, ...]:
        """Those of step, group, query, output and token that were not summed over."""
        return tuple(axis for axis in AXES if axis in self.data["influence"].dims)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes one safetensors file; labels and attributes go into its JSON header (see `core.influence_file`).

        Args:
            path: The file, which is written over.

        Example:
            >>> import tempfile
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> influence = Influence(xr.Dataset({"influence": ("part", [2.0, 1.0])}, {"part": ["kernel", "past"]}))
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     influence.save(f"{directory}/influence.safetensors")
            ...     Influence.load(f"{directory}/influence.safetensors").data.equals(influence.data)
            True
        """
        influence_file.write(self.data, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Influence":
        """Reads what `save` wrote; see `open_influence` for results that lie elsewhere.

        Args:
            path: The file.

        Raises:
            ValueError: The file is no influence, is of another format, or was altered.

        Example:
            >>> import tempfile
            >>> import xarray as xr
            >>> from explaind_track import Influence
            >>> influence = Influence(xr.Dataset({"influence": ("part", [2.0, 1.0])}, {"part": ["kernel", "past"]}))
            >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            ...     influence.save(file.name)
            ...     Influence.load(file.name).data["influence"].sel(part="kernel").item()
            2.0
        """
        return cls(influence_file.read(path))
