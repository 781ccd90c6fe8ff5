"""Queries: what is explained. Inputs, and a differentiable target on the model's output for them (Cor. 3.3)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from explaind_track.core.checks import as_tensor, plain_number, require_instance, require_int
from explaind_track.core.first_batch import class_losses, first_batch
from explaind_track.core.query_base import Inputs, QueryBase, whole_output
from explaind_track.core.tokens import TokenText, token_labels, token_losses


@dataclass(frozen=True, repr=False)
class Query(QueryBase):
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
        return cls(x, lambda output, _: whole_output(output), (y,), is_classified=True)

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
    def tokens(
        cls,
        inputs: Inputs,
        labels: Tensor | None = None,
        *,
        tokenizer: Any = None,
        next_token: bool = True,
    ) -> "Query":
        """The loss of every token, (X, L), in nats: what a language model's loss is made of.

        Explained with the axis "token", which holds the tokens that count, one input behind the other, by their text.
        `mean()` and `sum()` are over all of these tokens: one number, a language model's loss.

        Args:
            inputs: Token ids (X, T), or the model's keyword arguments with `input_ids`, and `labels` if these are
                others.
            labels: (X, T), not shifted; −100 where no loss counts. None: those of the inputs, or the ids themselves
                without padding.
            tokenizer: Tells the tokens' text: of transformers or tokenizers, or a function from ids to text. None: they
                go by their ids.
            next_token: Whether scores at a token are of the next one, as in causal models; False: of that token itself,
                as in masked and encoder-decoder models, which need labels.

        Raises:
            ValueError: There are no labels, or all of them are ignored.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> model = torch.nn.Embedding(5, 5)  # scores of the next token, by the last alone
            >>> query = Query.tokens(torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([[0, 1, 2], [3, 4, -100]]))
            >>> query(model).shape, query(model)[1, 1].item()  # the last label is ignored
            (torch.Size([2, 2]), 0.0)
            >>> len(query.mean()), torch.allclose(query.mean()(model).mean(), query(model).sum() / 3)
            (1, True)
        """
        called_with, wanted = token_labels(inputs, labels, next_token)
        text = TokenText((lambda ids: " ".join(map(str, ids))) if tokenizer is None else tokenizer)
        return cls(called_with, token_losses, (wanted,), is_loss=True, token_text=text)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        collator: Callable[[list[Any]], Any],
        rows: int = 64,
        *,
        tokenizer: Any = None,
        next_token: bool = True,
    ) -> "Query":
        """The mean loss of a dataset's first rows, batched as training batches them: one number.

        Where there is a label for each token, it is the mean over the tokens that count, as of a language model's own
        loss, and `tokenizer` and `next_token` are those of `Query.tokens`; where there is one for each row, the mean of
        the cross-entropies.

        Args:
            dataset: With rows by number or one after the other, as a data loader takes it.
            collator: From a list of rows to a batch, a mapping of the model's keyword arguments and `labels`: that of
                the data loader, such as `DataCollatorForLanguageModeling(tokenizer, mlm=False)`.
            rows: The first so many; all, where there are fewer.
            tokenizer: See `tokens`.
            next_token: See `tokens`.

        Raises:
            TypeError: The dataset has no rows, or the batch is no mapping.
            ValueError: There is no row, or labels are missing, of other shapes, or all ignored.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> dataset = [{"input": torch.tensor([0, 1, 2])}, {"input": torch.tensor([3, 4])}]
            >>> def collate(rows):
            ...     ids = [row["input"] for row in rows]
            ...     padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
            ...     return {"input": padded.clamp(min=0), "labels": padded}
            >>> query = Query.from_dataset(dataset, collate)
            >>> len(query), query.labels[0].tolist()
            (1, [[1, 2], [4, -100]])
        """
        batch = first_batch(dataset, collator, require_int("rows=", rows, 1))
        labels = batch["labels"]
        if labels.ndim == 2:
            return cls.tokens(batch, tokenizer=tokenizer, next_token=next_token).mean()

        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return cls.loss(inputs, labels, class_losses).mean()

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
        return self._reduced("mean")

    def sum(self) -> "Query":
        """The sum of the targets over the inputs: one query with O outputs.

        Example:
            >>> import torch
            >>> from explaind_track import Query
            >>> query = Query.outputs(torch.ones(5, 4)).sum()
            >>> query.size, len(query)
            (5, 1)
        """
        return self._reduced("sum")

    def _reduced(self, reduction: Literal["mean", "sum"]) -> "Query":
        if self.token_text is None:
            return replace(self, reduction=reduction)
        # of a mean over inputs, so that each token has the same share whatever input it is in
        share = self.size / int(self.counted.sum()) if reduction == "mean" else 1.0

        def of_inputs(output: Any, labels: Tensor) -> Tensor:
            return token_losses(output, labels).sum(1, keepdim=True) * share

        return replace(self, target=of_inputs, reduction=reduction, token_text=None)


def require_query(query: Any) -> None:
    """Raises TypeError for what is no Query."""
    require_instance("the query", query, Query, "write Query.outputs(x), Query.loss(x, y) or another of its kinds")
