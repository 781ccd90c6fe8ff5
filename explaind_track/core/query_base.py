"""What every query is: inputs, and a target on the model's output for them; cut into rows, and asked of a model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from explaind_track.core.checks import as_tensor
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
from explaind_track.core.tokens import IGNORED, TokenText

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What the model is called with: one tensor, several positional arguments, or keyword arguments."""


def _array_as_tensor(leaf: Any) -> Any:
    is_numeric = isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf"
    return torch.from_numpy(leaf.copy()) if is_numeric else leaf


def _shape_and_type(tensor: Tensor) -> tuple[str, str]:
    return " × ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch.")


def whole_output(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returns a {type(output).__name__}, not a tensor: say which part of it to explain with "
            "Query.function(x, lambda output: output.logits)"
        )
    return output


@dataclass(frozen=True, repr=False)
class QueryBase(Summarized):
    """The fields of a `Query`, and all that it does but for its constructors."""

    inputs: Inputs
    target: Callable[..., Tensor] = whole_output
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
    token_text: TokenText | None = None
    """Not None: each output is the loss of the token in its place of `labels[0]`, 0 where that is ignored; and this
    tells the token's text."""

    def __post_init__(self) -> None:
        """Arrays of NumPy and lists of labels become tensors. Raises ValueError and TypeError for what is none."""
        arrays = tree_map(lambda tensor: tensor, self.inputs, _array_as_tensor)
        object.__setattr__(self, "inputs", arrays)
        object.__setattr__(self, "labels", tuple(as_tensor("a query's labels", one) for one in self.labels))
        try:
            tree_rows((self.inputs, self.labels))
        except ValueError as error:
            raise ValueError(f"a query's inputs and labels: {error}") from None

    @property
    def size(self) -> int:
        """The number of inputs."""
        return tree_rows(self.inputs)

    @property
    def counted(self) -> Tensor:
        """Which of the outputs are losses of tokens, (X, O): not those of padding and ignored labels.

        Raises:
            ValueError: The query is not one of tokens.
        """
        if self.token_text is None:
            raise ValueError(
                "the axis 'token' is one of Query.tokens(inputs, labels, tokenizer=…), which asks for the loss of each "
                "token; this query's outputs are kept by 'output'"
            )
        return self.labels[0] != IGNORED

    def token_labels(self) -> dict[str, np.ndarray[Any, Any]]:
        """What the axis "token" says of its tokens: their text as `token`, their `input`, and their `place` among its
        scores. Raises ValueError where the query is not one of tokens."""
        counted = self.counted
        assert self.token_text is not None  # else nothing is counted
        texts = [self.token_text.of_each(ids[own]) for ids, own in zip(self.labels[0], counted, strict=True)]
        of_input, place = counted.nonzero().cpu().numpy().T
        return {"token": np.array([text for own in texts for text in own], object), "input": of_input, "place": place}

    @property
    def loss_count(self) -> int:
        """What the sum of a loss's targets is divided by to give their mean: the inputs, or the tokens that count."""
        if self.reduction == "mean":
            return 1
        return self.size if self.token_text is None else int(self.counted.sum())

    def _summary(self) -> Summary:
        loss = "loss" if self.token_text is None else "loss of each token"
        target = loss if self.is_loss else f"activations of {self.module}" if self.module else "outputs"
        if self.target is not whole_output and not (self.is_loss or self.is_classified):
            target = f"a function of the {target}"
        rows = [["inputs", *_shape_and_type(one)] for one in tree_tensors(self.inputs)]
        rows += [["labels", *_shape_and_type(one)] for one in self.labels]
        reduced = f", their {self.reduction}" if self.reduction else ""
        return Summary(f"Query: {target} of {self.size} inputs{reduced}", ["", "shape", "type"], rows)

    def __len__(self) -> int:
        """X, the number of targets along the query axis: the number of inputs, or 1 after `mean` or `sum`."""
        return 1 if self.reduction else self.size

    def rows(self, start: int, stop: int, device: torch.device) -> Self:
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

    def single(self, tensors: Iterable[Tensor]) -> Self:
        """The same query for one input, of which the `tensors` are given without their row axis (as `vmap` does)."""
        inputs, labels = tree_with((self.inputs, self.labels), (tensor.unsqueeze(0) for tensor in tensors))
        return replace(self, inputs=inputs, labels=labels)

    def in_precision_of(self, parameter: Tensor) -> Self:
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
