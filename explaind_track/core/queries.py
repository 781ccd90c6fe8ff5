"""Queries: what is explained. Inputs, and a differentiable target on the model's output for them (Cor. 3.3)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explaind_track.core.checks import as_tensor, plain_number, require_instance
from explaind_track.core.summary import Summarized, Summary
from explaind_track.core.tensors import (
    explained_type,
    tree_has_entries,
    tree_map,
    tree_rows,
    tree_slice,
    tree_tensors,
    tree_with,
    upcast,
)

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What the model is called with: one tensor, several positional arguments, or keyword arguments."""


def _array_as_tensor(leaf: Any) -> Any:
    is_numeric = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf"
    return torch.from_numpy(leaf.copy()) if is_numeric else leaf


def _shape_and_type(tensor: Tensor) -> tuple[str, str]:
    return " × ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch.")


def _identity(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returns a {type(output).__name__}, not a tensor: say which part of it to explain with "
            "Query.function(x, lambda output: output.logits)"
        )
    return output


@dataclass(frozen=True, repr=False)
class Query(Summarized):
    """X inputs and the target `h(f_θ(x))` on them, O numbers for each (Cor. 3.3).

    Made by the constructors below; `mean()` and `sum()` turn the targets of all inputs into one. A query called with a
    model gives its targets.

    Example:
        >>> import torch
        >>> from explaind_track import Query
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
        >>> Query.outputs(x)(model).shape, Query.loss(x, y)(model).shape, Query.margin(x, y)(model).shape
        (torch.Size([5, 3]), torch.Size([5, 1]), torch.Size([5, 1]))
        >>> len(Query.outputs(x)), len(Query.outputs(x).mean())
        (5, 1)
    """

    inputs: Inputs
    target: Callable[..., Tensor] = _identity
    """`target(output, *labels)` → (X, …); what follows the first axis is flattened to O."""
    labels: tuple[Tensor, ...] = ()
    """What the target takes beside the output, (X, …) each."""
    module: str | None = None
    """Name of the submodule whose output is explained; None: the model's."""
    reduction: Literal["mean", "sum"] | None = None
    is_loss: bool = False
    """Panels show a loss by its signed change, and need one to rank training samples by."""
    is_classified: bool = False
    """The output scores classes and `labels[0]` holds the right ones: panels show loss and accuracy."""

    def __post_init__(self) -> None:
        """Arrays of NumPy and lists of labels become tensors. Raises ValueError and TypeError for what is none."""
        arrays = tree_map(lambda tensor: tensor, self.inputs, _array_as_tensor)
        object.__setattr__(self, "inputs", arrays)
        object.__setattr__(self, "labels", tuple(as_tensor("a query's labels", one) for one in self.labels))
        try:
            tree_rows((self.inputs, self.labels))
        except ValueError as error:
            raise ValueError(f"a query's inputs and labels: {error}") from None

    @classmethod
    def outputs(cls, x: Inputs, y: Tensor | None = None) -> "Query":
        """Every output of the model, (X, O).

        Args:
            x: The inputs, with X rows.
            y: The right classes (X,), if the outputs score classes: panels then show loss and accuracy beside.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> Query.outputs(torch.ones(5, 4))(torch.nn.Linear(4, 3)).shape
            torch.Size([5, 3])
        """
        if y is None:
            return cls(x)
        return cls(x, lambda output, _: _identity(output), (y,), is_classified=True)

    @classmethod
    def loss(cls, x: Inputs, y: Tensor, loss: Callable[[Any, Tensor], Tensor] | None = None) -> "Query":
        """The loss of every input, (X, 1).

        Args:
            x: The inputs, with X rows.
            y: The labels (X, …).
            loss: `(output, y)` → (X,), unreduced; cross-entropy if not given, which is the same on logits and on
                log-probabilities.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> x, y = torch.ones(5, 4), torch.zeros(5, 1)
            >>> query = Query.loss(x, y, lambda output, y: (output - y).square().mean(1))
            >>> query(torch.nn.Linear(4, 1)).shape, query.is_loss
            (torch.Size([5, 1]), True)
        """
        return cls(x, loss or (lambda output, y: F.cross_entropy(output, y, reduction="none")), (y,), is_loss=True)

    @classmethod
    def logit(cls, x: Inputs, index: int | Tensor) -> "Query":
        """One output of each input, (X, 1).

        Args:
            x: The inputs, with X rows.
            index: Which output: a number for all inputs, or (X,) int64 for each.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
            >>> Query.logit(scores, torch.tensor([1, 0]))(torch.nn.Identity())
            tensor([[2.],
                    [3.]])
        """
        index = plain_number(index)
        if isinstance(index, int):
            return cls(x, lambda output: output[:, index, None])
        return cls(x, lambda output, index: output.gather(1, index[:, None]), (index,))

    @classmethod
    def margin(cls, x: Inputs, y: Tensor, other: Tensor | None = None) -> "Query":
        """One output minus another, (X, 1).

        Args:
            x: The inputs, with X rows.
            y: The output that is subtracted from, (X,) int64.
            other: The output that is subtracted, (X,) int64; the largest of the others if not given.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> scores = torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 0.0]])
            >>> Query.margin(scores, torch.tensor([2, 0]))(torch.nn.Identity())
            tensor([[ 3.],
                    [-1.]])
        """
        if other is not None:
            return cls(x, lambda f, y, o: f.gather(1, y[:, None]) - f.gather(1, o[:, None]), (y, other))

        def against_best(output: Tensor, y: Tensor) -> Tensor:
            rest = output.scatter(1, y[:, None], float("-inf"))
            return output.gather(1, y[:, None]) - rest.amax(1, keepdim=True)

        return cls(x, against_best, (y,))

    @classmethod
    def projection(cls, x: Inputs, matrix: Tensor) -> "Query":
        """`A f(x)`, (X, P).

        Args:
            x: The inputs, with X rows.
            matrix: A, (P, O).

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
            >>> Query.projection(scores, torch.tensor([[1.0, 1.0]]))(torch.nn.Identity())
            tensor([[3.],
                    [7.]])
        """
        given = as_tensor("matrix", matrix)
        return cls(x, lambda output: output @ given.to(output).T)

    @classmethod
    def entropy(cls, x: Inputs) -> "Query":
        """The entropy of softmax(output) in nats, (X, 1).

        Args:
            x: The inputs, with X rows.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> round(Query.entropy(torch.zeros(1, 2))(torch.nn.Identity()).item(), 4)  # log 2
            0.6931
        """

        def entropy(output: Tensor) -> Tensor:
            logarithm = output.log_softmax(-1)
            return -(logarithm.exp() * logarithm).sum(-1, keepdim=True)

        return cls(x, entropy)

    @classmethod
    def function(cls, x: Inputs, function: Callable[..., Tensor], *labels: Tensor) -> "Query":
        """Any differentiable function of the output that treats its rows one by one.

        Args:
            x: The inputs, with X rows.
            function: `(output, *labels)` → (X, …), flattened to (X, O).
            labels: What it takes beside the output, (X, …) each.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> query = Query.function(torch.ones(5, 4), lambda output: output[:, :2].sin())
            >>> query(torch.nn.Linear(4, 3)).shape
            torch.Size([5, 2])
        """
        return cls(x, function, labels)

    @classmethod
    def activation(cls, x: Inputs, module: str) -> "Query":
        """The activations of a submodule (Cor. 3.3 (ii)), flattened to (X, O).

        Args:
            x: The inputs of the whole model, with X rows.
            module: The submodule's name, as in `model.named_modules()`; it has to run once in a forward pass.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
            >>> Query.activation(torch.ones(5, 4), "1")(model).shape
            torch.Size([5, 8])
        """
        return cls(x, module=module)

    def mean(self) -> "Query":
        """The mean of the targets over the inputs: one query with O outputs.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> query = Query.loss(torch.ones(5, 4), torch.zeros(5, dtype=torch.long)).mean()
            >>> query.size, len(query)
            (5, 1)
        """
        return replace(self, reduction="mean")

    def sum(self) -> "Query":
        """The sum of the targets over the inputs: one query with O outputs.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> query = Query.outputs(torch.ones(5, 4)).sum()
            >>> query.size, len(query)
            (5, 1)
        """
        return replace(self, reduction="sum")

    @property
    def size(self) -> int:
        """The number of inputs."""
        return tree_rows(self.inputs)

    def _summary(self) -> Summary:
        target = "loss" if self.is_loss else f"activations of {self.module}" if self.module else "outputs"
        if self.target is not _identity and not (self.is_loss or self.is_classified):
            target = f"a function of the {target}"
        rows = [["inputs", *_shape_and_type(one)] for one in tree_tensors(self.inputs)]
        rows += [["labels", *_shape_and_type(one)] for one in self.labels]
        reduced = f", their {self.reduction}" if self.reduction else ""
        return Summary(f"Query: {target} of {self.size} inputs{reduced}", ["", "shape", "type"], rows)

    def __len__(self) -> int:
        """X, the number of targets along the query axis: the number of inputs, or 1 after `mean` or `sum`."""
        return 1 if self.reduction else self.size

    def rows(self, start: int, stop: int, device: torch.device) -> "Query":
        """The same query for the inputs `[start:stop]` alone, on `device`; bfloat16 and float16 in float32.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> len(Query.outputs(torch.ones(5, 4)).rows(1, 3, torch.device("cpu")))
            2
        """
        inputs, labels = tree_map(
            lambda rows: upcast(rows.to(device)), tree_slice((self.inputs, self.labels), start, stop)
        )
        return replace(self, inputs=inputs, labels=labels)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of inputs and labels, each with a row for each input, as `vmap` takes them.

        Raises:
            RuntimeError: Inputs hold other things for each row, such as words.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> [tuple(tensor.shape) for tensor in Query.loss(torch.ones(5, 4), torch.zeros(5)).tensors]
            [(5, 4), (5,)]
        """
        if tree_has_entries((self.inputs, self.labels)):
            raise RuntimeError("the query's inputs hold words or other things that are no tensors for each row")
        return tree_tensors((self.inputs, self.labels))

    def single(self, tensors: Iterable[Tensor]) -> "Query":
        """The same query for one input, of which the `tensors` are given without their row axis (as `vmap` does)."""
        inputs, labels = tree_with((self.inputs, self.labels), (tensor.unsqueeze(0) for tensor in tensors))
        return replace(self, inputs=inputs, labels=labels)

    def in_precision_of(self, parameter: Tensor) -> "Query":
        """The same query, its inputs' real numbers in the precision that the parameter is explained in; labels stay."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(explained_type(parameter.dtype)) if tensor.is_floating_point() else tensor

        return replace(self, inputs=tree_map(cast, self.inputs))

    def output(self, model: nn.Module) -> Any:
        """The output of the model, or of the submodule that is explained.

        Raises:
            ValueError: The model has no such submodule, or does not run it exactly once.
        """
        if self.module is None:
            return self._call(model)
        try:
            submodule = model.get_submodule(self.module)
        except AttributeError:
            names = ", ".join(name for name, _ in model.named_modules() if name)
            raise ValueError(f"the model has no submodule '{self.module}'; it has {names}") from None

        kept: list[Any] = []
        handle = submodule.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            self._call(model)
        finally:
            handle.remove()
        if len(kept) != 1:
            raise ValueError(
                f"the submodule '{self.module}' ran {len(kept)} times in one forward pass; an activation query needs "
                "one that runs once"
            )
        return kept[0]

    def _call(self, model: nn.Module) -> Any:
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs)
        return model(*self.inputs) if isinstance(self.inputs, tuple) else model(self.inputs)

    def __call__(self, model: nn.Module, output: Any = None) -> Tensor:
        """The targets of all inputs, (X, O), before any reduction.

        Args:
            model: The model.
            output: Its output for these inputs, if that is known already.

        Returns:
            The targets; in float32 where the model says them in bfloat16 or float16.

        Raises:
            ValueError: The target does not return one row for each input.
        """
        value = self.target(self.output(model) if output is None else output, *self.labels)
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != self.size:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"a query's target must return a tensor with one row for each of its {self.size} inputs, not {shape}; "
                "for a scalar over all inputs return the rows and use Query.mean() or Query.sum()"
            )
        return upcast(value.reshape(self.size, -1))


def require_query(query: Any) -> None:
    """Raises TypeError for what is no Query."""
    require_instance("the query", query, Query, "write Query.outputs(x), Query.loss(x, y) or another of its kinds")
