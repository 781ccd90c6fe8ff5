"""One training step recomputed the slow and plain way: deep copies of the model, ordinary autograd, and one backward
pass for each number. No swapped parameters, no `vmap`, no forward mode, and no line of this package, so that its
numbers can be compared with the engine's, which has all of these.

    Ψ(part, Θ_g, x)_j = Σ_t w_t ⟨∇_θ f_{θ(t)}(x)_j, part restricted to Θ_g⟩,   θ(t) = θ_s + t (θ_{s+1} − θ_s)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Target = Callable[[nn.Module], Tensor]
"""`target(model)` → the explained numbers, (X, O)."""

LOW_PRECISION = (torch.bfloat16, torch.float16)


def copy_at(model: nn.Module, parameters: Tensors, buffers: Tensors, training: bool) -> nn.Module:
    """A deep copy of the model with these values, in float32 where they are of less precision.

    training: keeps the modes of the model's modules; else all of them are put into eval mode.
    """
    copy = deepcopy(model)
    copy.zero_grad()

    if any(value.dtype in LOW_PRECISION for value in copy.parameters()):
        copy.float()
    if not training:
        copy.eval()

    own = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
    with torch.no_grad():
        for name, value in (*parameters.items(), *buffers.items()):
            own[name].copy_(value)
    for parameter in copy.parameters():
        parameter.requires_grad_()
    return copy


def gradients(copy: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """The gradient of one number by parameter, in float64; 0 where it does not depend on it."""
    copy.zero_grad()
    if value.requires_grad:
        value.backward(retain_graph=True)
    return {
        name: torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.detach().double()
        for name, p in copy.named_parameters()
    }


def through_shortening(copy: nn.Module, given: Tensors, slopes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients by the parameters that the copy was given, where its forward pass has then shortened rows of some
    in place, which ordinary autograd does not see: `nn.Embedding(max_norm=m)`, w → w · m / ‖w‖."""
    names = {id(parameter): name for name, parameter in copy.named_parameters()}
    for module in copy.modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.max_norm is None:
            continue
        name = names[id(module.weight)]
        rows = given[name].detach().to(module.weight).requires_grad_()

        norms = torch.linalg.vector_norm(rows, module.norm_type, dim=1, keepdim=True)
        is_shortened = (module.weight != rows).any(1, keepdim=True)
        short = torch.where(is_shortened, rows * module.max_norm / (norms + 1e-7), rows)
        slopes[name] = torch.autograd.grad(short, rows, slopes[name].to(rows))[0].double()
    return slopes


def quadrature(nodes: int) -> list[tuple[float, float]]:
    """Gauss–Legendre nodes and weights on [0, 1], in one panel."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return [(float(point + 1) / 2, float(weight) / 2) for point, weight in zip(points, weights, strict=True)]


def group_sums(
    model: nn.Module,
    before: Tensors,
    after: Tensors,
    buffers: Tensors,
    parts: Sequence[Tensors],
    groups: Mapping[str, Sequence[str]],
    target: Target,
    cells: Sequence[tuple[int, int]],
    nodes: Sequence[tuple[float, float]],
) -> Tensor:
    """Ψ of every part and group for some of the targets, (P, G, C), float64.

    before, after: the parameters at both ends of the step, by name.
    parts: what the step is made of, each by parameter.
    cells: which targets (x, j) are recomputed, C of them.
    nodes: (t, weight) of the quadrature.
    """
    sums = torch.zeros(len(parts), len(groups), len(cells), dtype=torch.float64)
    for time, weight in nodes:
        between = {name: torch.lerp(value, after[name], time) for name, value in before.items()}
        copy = copy_at(model, between, buffers, training=False)
        values = target(copy)

        for cell, place in enumerate(cells):
            slope = through_shortening(copy, between, gradients(copy, values[place]))
            for part, direction in enumerate(parts):
                for group, names in enumerate(groups.values()):
                    products = [(slope[n] * direction[n].double()).sum() for n in names if n in direction]
                    sums[part, group, cell] += weight * sum(products, torch.zeros(())).cpu()
    return sums


def target_gradient(
    model: nn.Module,
    before: Tensors,
    after: Tensors,
    buffers: Tensors,
    target: Target,
    nodes: Sequence[tuple[float, float]],
) -> dict[str, Tensor]:
    """∫₀¹ ∇_θ Σ_x Σ_j f_{θ(t)}(x)_j dt by parameter, float64."""
    total: dict[str, Tensor] = {}
    for time, weight in nodes:
        between = {name: torch.lerp(value, after[name], time) for name, value in before.items()}
        copy = copy_at(model, between, buffers, training=False)
        slopes = gradients(copy, target(copy).sum())
        for name, slope in through_shortening(copy, between, slopes).items():
            total[name] = total.get(name, 0.0) + weight * slope
    return total


def predictions(model: nn.Module, parameters: Tensors, buffers: Tensors, target: Target) -> Tensor:
    """f(x)_j of all targets, (X, O)."""
    with torch.no_grad():
        return target(copy_at(model, parameters, buffers, training=False)).double()


@contextmanager
def random_numbers_of(state: Tensors) -> Iterator[None]:
    """Draws what training drew from these generator states on, and then goes on as if nothing had been drawn."""
    devices = [torch.device(name) for name in state if name != "cpu"]
    with torch.random.fork_rng(devices):
        for name, value in state.items():
            if name == "cpu":
                torch.set_rng_state(value)
            else:
                torch.cuda.set_rng_state(value, torch.device(name))
        yield


def sample_gradient(
    model: nn.Module,
    parameters: Tensors,
    buffers: Tensors,
    sample_loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    weight: Tensor,
    random_state: Tensors,
) -> tuple[dict[str, Tensor], Tensor]:
    """`Σ_k weight_k ∇L_k` of a batch that is run as training ran it, by parameter (float64), and its losses (N,).

    weight: (N,); that of a single sample has one entry that is not 0.
    """
    copy = copy_at(model, parameters, buffers, training=True)
    with random_numbers_of(random_state):
        losses = sample_loss(copy, batch)
        slope = gradients(copy, (losses * weight.to(losses)).sum())
    return slope, losses.detach()
