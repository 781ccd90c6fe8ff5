"""Running means and variances of batch norms, through which a target in eval mode depends on the batches of training.

In a step of training, b ← (1 − f) b + f · statistic(x), with x the norm's input, which the parameters move. Autograd
does not know that, nor how the output in eval mode depends on b: with y = γ (x − μ)/√(v + ε) + β,

    ∂f/∂μ = −γ/√(v + ε) · ∂f/∂β        ∂f/∂v = −γ/(2 (v + ε)) · ∂f/∂γ
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from explaind_track.core.modules import parameters_of, plain_name
from explaind_track.core.step import State
from explaind_track.core.tensors import Tensors

MEAN, VARIANCE = "running_mean", "running_var"

Inputs = list[tuple[str, Tensor]]
"""The inputs of the norms that have run, with their names, in their order."""


class RunningStatistics:
    """Those of a model's batch norms that are in training mode."""

    def __init__(self, model: nn.Module) -> None:
        self._norms: dict[str, Any] = {
            plain_name(f"{name}.")[:-1]: module
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.training
            and module.running_mean is not None
        }
        parameters = parameters_of(model, aliases=True)
        ids = [id(parameter) for parameter in parameters.values()]
        self._own = {name: all(ids.count(id(p)) == 1 for p in norm.parameters()) for name, norm in self._norms.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The buffers."""
        return tuple(f"{name}.{kind}" for name in self._norms for kind in (MEAN, VARIANCE))

    @property
    def scales(self) -> tuple[str, ...]:
        """The norms' weights and biases, by which the targets have to be differentiated."""
        return tuple(
            f"{name}.{kind}" for name, norm in self._norms.items() if norm.affine for kind in ("weight", "bias")
        )

    def require_affine(self) -> None:
        """Raises ValueError for a norm whose statistics cannot be told from its weight and bias."""
        odd = [name for name, norm in self._norms.items() if not (norm.affine and self._own[name])]
        if odd:
            raise ValueError(
                f"the running statistics of '{odd[0]}' are differentiated through its weight and bias, and it has "
                "none, or shares them; use affine=True, or track_running_stats=False"
            )

    def of_targets(self, gradients: Tensors, state: State) -> dict[str, Tensor]:
        """The targets' derivatives by the buffers, (R, *shape) each, from those by weights and biases."""
        found = {}
        for name, norm in self._norms.items():
            gain, deviation = state.parameters[f"{name}.weight"], state.buffers[f"{name}.{VARIANCE}"] + norm.eps
            found[f"{name}.{MEAN}"] = -gain / deviation.sqrt() * gradients[f"{name}.bias"]
            found[f"{name}.{VARIANCE}"] = -gain / (2 * deviation) * gradients[f"{name}.weight"]
        return found

    @contextmanager
    def inputs(self) -> Iterator[Inputs]:
        """Collects the norms' inputs in the passes within, with their graphs."""
        seen: Inputs = []
        with ExitStack() as stack:
            for name, norm in self._norms.items():
                hook = norm.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
                stack.callback(hook.remove)
            yield seen

    def settled(
        self, seen: Sequence[tuple[str, Tensor]], buffers: Tensors, before: int
    ) -> dict[str, tuple[float, Tensor]]:
        """How a batch's pass moves the buffers, b ← slope · b + offset: slope and offset by name, the offset with its
        graph.

        buffers: at the beginning of the step. before: how many batches of the step have run already.
        """
        moved: dict[str, tuple[float, Tensor]] = {}
        of_each, passes = Counter(name for name, _ in seen), Counter[str]()
        for name, value in seen:
            passes[name] += 1
            norm, axes = self._norms[name], [axis for axis in range(value.ndim) if axis != 1]
            share = norm.momentum
            if share is None:  # the mean of all so far
                count = before * of_each[name] + passes[name]
                share = 1 / (int(buffers[f"{name}.num_batches_tracked"]) + count)
            for kind, statistic in ((MEAN, value.mean(axes)), (VARIANCE, value.var(axes))):
                slope, offset = moved.get(f"{name}.{kind}", (1.0, torch.zeros_like(statistic)))
                moved[f"{name}.{kind}"] = (slope * (1 - share), offset * (1 - share) + statistic * share)
        return moved


class Settling:
    """Adds up, batch by batch from the last to the first, where a step has left the buffers: the proof of the above."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, Tensor]] = {}

    def add(self, settled: Mapping[str, tuple[float, Tensor]]) -> None:
        for name, (slope, offset) in settled.items():
            later, total = self._found.get(name, (1.0, torch.zeros_like(offset)))
            self._found[name] = (later * slope, total + later * offset.detach())

    def unexplained(self, before: Tensors, after: Tensors) -> list[str]:
        """The buffers of real numbers that are elsewhere."""
        wrong = []
        for name, value in after.items():
            if not value.is_floating_point():
                continue
            slope, offset = self._found.get(name, (1.0, torch.zeros_like(value)))
            spread = after.get(f"{name.removesuffix(MEAN)}{VARIANCE}", value).abs().sqrt()  # a mean may be 0
            limit = torch.finfo(value.dtype).eps ** 0.6 * float(value.norm() + spread.norm())
            if float((slope * before[name] + offset - value).norm()) > limit:
                wrong.append(name)
        return wrong
