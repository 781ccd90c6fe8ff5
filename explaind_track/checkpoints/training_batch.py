"""The batch of training data that a checkpoint's step is taken on: its gradient, and those of its parts."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.modules import buffers_of, parameters_of
from explaind_track.core.rng import random_state, replayed_random_state
from explaind_track.core.step import Batch
from explaind_track.core.tensors import Tensors, cuts, tree_map, tree_rows, tree_slice
from explaind_track.engine.batch_losses import SampleLoss
from explaind_track.engine.streaming import inner_product, streamed


class TrainingBatch:
    """Samples with their weights, which go through the model some at a time, in training mode."""

    def __init__(self, data: Any, loss: SampleLoss, microbatch: int, clip: float | None) -> None:
        """data: a batch whose losses are averaged, or a `Batch` with weights. microbatch: how many samples at a time.
        clip: the norm that the gradient is clipped to."""
        if isinstance(data, Batch):
            self._data, self.size = data.data, data.size
            self._weights = data.weights(torch.zeros(0, dtype=torch.float64))
        else:
            self._data, self.size = data, tree_rows(data)
            self._weights = torch.full((self.size,), 1 / self.size, dtype=torch.float64)
        self.loss, self._microbatch, self._clip = loss, microbatch, clip
        self._random_state: Mapping[str, Tensor] = {}
        self._scale = 1.0

    @property
    def settings(self) -> tuple[int, float | None]:
        """How the samples go through the model: micro-batch and clipping."""
        return self._microbatch, self._clip

    def backward(self, model: nn.Module, again: bool = False) -> float:
        """Puts the gradient `Σ_k w_k ∇L_k`, clipped as in training, into the parameters. again: with the random numbers
        of the last time. Returns its norm before clipping."""
        model.zero_grad()
        device = next(model.parameters()).device
        if not again:
            self._random_state = random_state(device)
        with _training(model), replayed_random_state(self._random_state) if again else nullcontext():
            for rows, losses in self._losses(model, device):
                (losses * self._weights[rows].to(losses)).sum().backward()

        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise ValueError(
                f"the gradient of the training batch is {norm}: loss= gives numbers that are not finite (as the mean "
                "over a sample without labels is) for some of train=, or the checkpoint's weights do"
            )
        self._scale = 1.0 if self._clip is None else min(1.0, self._clip / (norm + 1e-6))  # as torch has it
        if self._scale < 1:
            for gradient in gradients:
                gradient.mul_(self._scale)
        return norm

    def products(self, model: nn.Module, directions: Tensors, sources: Tensor, count: int) -> Tensor:
        """`Σ_{k of the source} w_k ⟨direction, ∇L_k⟩` of each source and parameter, (sources, parameters): with the
        random numbers of the last `backward`, and scaled as it was.

        directions: by parameter. sources: the source of each sample, (N,), from 0 to `count`.
        """
        parameters = parameters_of(model)
        device = next(iter(parameters.values())).device
        places = {name: place for place, name in enumerate(parameters)}
        products = torch.zeros(count, len(places), dtype=torch.float64)

        with _training(model), replayed_random_state(self._random_state):
            for rows, losses in self._losses(model, device):
                weighted, present = losses * self._weights[rows].to(losses), sources[rows].unique().tolist()
                for source in present:

                    def take(name: str, gradient: Tensor, source: int = source) -> None:
                        product = inner_product(gradient.reshape(-1), directions[name].reshape(-1))
                        products[source, places[name]] += product.cpu()

                    with streamed({name: parameters[name] for name in directions}, take):
                        share = weighted[(sources[rows] == source).to(device)].sum()
                        share.backward(retain_graph=source != present[-1])
        model.zero_grad()  # of parameters that there is no direction for
        return products * self._scale

    def _losses(self, model: nn.Module, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        for rows in cuts(0, self.size, self._microbatch):
            piece = tree_map(lambda tensor: tensor.to(device), tree_slice(self._data, rows.start, rows.stop))
            losses, count = self.loss(model, piece), rows.stop - rows.start
            if not isinstance(losses, Tensor) or losses.shape != (count,):
                shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise ValueError(
                    f"loss= must return the unreduced losses of its {count} samples, ({count},), not {shape}; use "
                    'reduction="none", and a mean over all but the first axis'
                )
            yield rows, losses


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The model in training mode; its modes and its buffers are as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = {name: value.clone() for name, value in buffers_of(model).items()}
    try:
        model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for name, value in buffers_of(model).items():
                value.copy_(buffers[name])
