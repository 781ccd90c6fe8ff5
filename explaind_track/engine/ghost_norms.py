"""Norms of single samples' gradients from one ordinary backward pass (the ghost norm: Goodfellow 2015; Li et al. 2022).

The gradient of a sample in a layer follows from what the layer was given and what came back to it, a_t and δ_t at each
place t of the sample: a linear layer's is Σ_t δ_t a_tᵀ. Its norm takes no gradient of each sample in memory, and the
sum over the samples is that of the backward pass itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from explaind_track.core.tensors import Tensors, cuts, upcast

BLOCK_BYTES = 2**25
"""What the layers' inputs, cut into the places of a convolution, may take at a time."""


class GhostNorms:
    """Watches the layers of a model whose samples' norms can be had so: all those with trained parameters."""

    def __init__(self, model: nn.Module, trained: Tensors) -> None:
        """trained: the parameters whose gradients count.

        Raises NotImplementedError for a model with a trained parameter elsewhere, or in two places.
        """
        self._layers: dict[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {}
        owners: dict[int, str] = {}
        names = dict(model.named_parameters(remove_duplicate=False))
        for name, module in model.named_modules():
            own = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)]
            own = [key for key in own if names[key].requires_grad]
            if not own:
                continue
            squares = LAYERS.get(type(module))
            again = any(id(names[key]) in owners for key in own)
            if squares is None or again or not _is_plain(module):
                raise NotImplementedError(f"the gradients of {', '.join(own)} are no plain layer's of its own")
            owners.update({id(names[key]): key for key in own})
            self._layers[module] = squares
        if not set(trained) <= set(owners.values()):
            raise NotImplementedError("some trained parameters belong to no layer of the model")

    @contextmanager
    def watching(self, samples: int) -> Iterator["Squares"]:
        """Within, a forward and a backward pass; then its `Squares` are complete."""
        squares = Squares(self._layers, samples)
        handles = [layer.register_forward_hook(squares.note) for layer in self._layers]
        try:
            yield squares
        finally:
            for handle in handles:
                handle.remove()


class Squares:
    """The squared norms of the samples' gradients, as a backward pass comes by the layers."""

    def __init__(self, layers: dict[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]], samples: int) -> None:
        self._layers, self._samples = layers, samples
        self._met: set[nn.Module] = set()
        self._total: Tensor | None = None

    def note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A layer is run. Raises NotImplementedError where its gradient is no sum over the places of each sample."""
        if layer in self._met or len(inputs) != 1 or len(inputs[0]) != self._samples or not output.requires_grad:
            raise NotImplementedError("a layer runs twice in a pass, or on something else than one row for each sample")
        self._met.add(layer)
        given = inputs[0].detach()

        def returned(gradient: Tensor) -> None:
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                a = upcast(given) if given.is_floating_point() else given
                found = self._layers[layer](layer, a, upcast(gradient))
                self._total = found if self._total is None else self._total + found

        output.register_hook(returned)

    def total(self) -> Tensor:
        """‖∇(w_k L_k)‖², (N,). Raises NotImplementedError where a layer was not run."""
        if self._total is None or len(self._met) != len(self._layers):
            raise NotImplementedError("a layer of the model is not run as a module")
        return self._total


def _is_plain(module: nn.Module) -> bool:
    """Whether the layer does nothing beside its own operation, with parameters that are its own tensors."""
    if not {"weight", "bias"} >= {name for name, _ in module.named_parameters()}:
        return False  # such as the two that a normalised weight is made of
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return True


def _linear(layer: nn.Module, a: Tensor, delta: Tensor) -> Tensor:
    a, delta = (value.reshape(len(value), -1, value.shape[-1]) for value in (a, delta))
    squares = _of_products(a, delta) if layer.weight.requires_grad else delta.new_zeros(len(delta))
    return squares + _of_bias(layer, delta)


def _convolution(layer: nn.Module, a: Tensor, delta: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    delta = rearrange(delta, "n o h w -> n (h w) o")
    squares = delta.new_zeros(len(delta))
    if layer.weight.requires_grad:
        per_sample = delta.shape[1] * layer.weight[0].numel() * delta.element_size()
        for rows in cuts(0, len(a), max(1, BLOCK_BYTES // per_sample)):
            patches = F.unfold(a[rows], layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
            squares[rows] = _of_products(rearrange(patches, "n i t -> n t i"), delta[rows])
    return squares + _of_bias(layer, delta)


def _embedding(layer: nn.Module, a: Tensor, delta: Tensor) -> Tensor:
    assert isinstance(layer, nn.Embedding)
    index, delta = a.reshape(len(a), -1), delta.reshape(len(delta), -1, delta.shape[-1])
    if layer.padding_idx is not None:
        delta = delta * (index != layer.padding_idx)[..., None]

    # ‖Σ_{t: word v} δ_t‖² summed over the words: Σ_{t,u} 1[same word] ⟨δ_t, δ_u⟩
    products = einsum(delta, delta, "n t d, n u d -> n t u")
    return reduce(products * (index[:, :, None] == index[:, None, :]), "n t u -> n", "sum")


def _layer_norm(layer: nn.Module, a: Tensor, delta: Tensor) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)
    squares = delta.new_zeros(len(delta))
    if layer.weight is not None and layer.weight.requires_grad:
        normal = F.layer_norm(a, layer.normalized_shape, None, None, layer.eps)
        squares += _summed(delta * normal, layer.weight.ndim).square().sum(1)  # Σ_t δ_t x̂_t
    if layer.bias is not None and layer.bias.requires_grad:
        squares += _summed(delta, layer.bias.ndim).square().sum(1)
    return squares


def _of_bias(layer: nn.Module, delta: Tensor) -> Tensor:
    """‖Σ_t δ_t‖², (N,); 0 without a trained bias."""
    if layer.bias is None or not layer.bias.requires_grad:
        return delta.new_zeros(len(delta))
    return delta.sum(1).square().sum(1)


def _of_products(a: Tensor, delta: Tensor) -> Tensor:
    """‖Σ_t δ_t a_tᵀ‖² for a (N, T, i) and δ (N, T, o), in the way that takes less."""
    _, places, inputs = a.shape
    outputs = delta.shape[2]
    if places == 1:
        return a.square().sum((1, 2)) * delta.square().sum((1, 2))
    if places * (inputs + outputs) < inputs * outputs:
        # Σ_{t,u} ⟨a_t, a_u⟩ ⟨δ_t, δ_u⟩
        return ((a @ a.mT) * (delta @ delta.mT)).sum((1, 2))
    return (delta.mT @ a).square().sum((1, 2))


def _summed(values: Tensor, last: int) -> Tensor:
    """The sum over all axes but the first and the last few, flat: (N, D)."""
    return values.reshape(len(values), -1, values.shape[values.ndim - last :].numel()).sum(1)


LAYERS: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
}
"""By layer: from the layer, its input and the gradient of its output to the squared norms of the samples' gradients."""
