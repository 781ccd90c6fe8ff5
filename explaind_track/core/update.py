"""The update: what one optimizer step did to one parameter, split into the parts of the paper's Theorem 3.1."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from explaind_track.core.rules import Rule
from explaind_track.core.tensors import cuts

CPU_PIECE, PIECE = 2**18, 2**24
"""Entries of a piece: on a CPU, for each of its threads, as many as stay in its cache from one operation to the next;
elsewhere, as many as make the operations long."""


@dataclass(frozen=True)
class Contribution:
    """What a part other than the kernel has put into the optimizer, each of the parameter's shape or None if 0."""

    buffer: Tensor | None
    """Its share of the momentum buffer."""
    gradient: Tensor | None = None
    """Its share of `G_s`, if it is an auxiliary loss."""

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.buffer, self.gradient) if tensor is not None]


@dataclass(frozen=True)
class Update:
    """One parameter's update `θ_s − θ_{s+1}`, and the parts it is made of; the equations are those of `rules`.

    Gradient and momentum buffer are split along with it: what no contribution has put in is the training samples'.
    All tensors have the parameter's shape.

    Example:
        >>> import torch
        >>> from explaind_track import Rule, Update
        >>> rule = Rule(buffer=None, beta=0.0, b=1.0, e=0.0, d=0.1, decoupled=0.01)  # θ ← θ − 0.1 G − 0.01 θ
        >>> before, gradient = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
        >>> after = before - 0.1 * gradient - 0.01 * before
        >>> update = Update(before, after, gradient, rule, contributions={})
        >>> update.kernel(), update.regularization()
        (tensor([ 0.3000, -0.1000]), tensor([0.0100, 0.0200]))
    """

    before: Tensor
    after: Tensor
    gradient: Tensor
    """`G_s`, with the sign that the optimizer gives it (`maximize` turns it around)."""
    rule: Rule
    contributions: Mapping[str, Contribution]
    """By part: `regularization` (coupled decay), `past` (what the optimizer had gathered before it was watched), and
    the auxiliary losses."""
    sign: float = 1.0
    """−1 where the optimizer maximizes: the samples' gradients enter with it."""
    frozen: bool = False
    """Whether it is frozen, with a kept zero for a gradient: no sample acts through that."""

    def pieces(self) -> Iterator[tuple[slice, "Update"]]:
        """The update of some of the parameter's entries after the other, each as if these were one flat parameter.

        Yields, of each piece, its place among the entries, and its update; of an update that does not go entry by
        entry, itself alone.
        """
        given = [tensor for part in self.contributions.values() for tensor in part.tensors]
        buffer = [] if self.rule.buffer is None else [self.rule.buffer]
        tensors = [self.before, self.after, self.gradient, *buffer, *given, *self.rule.scales]
        if not (self.rule.is_elementwise and all(tensor.is_contiguous() for tensor in tensors)):
            yield slice(None), self
            return

        size = CPU_PIECE * torch.get_num_threads() if self.before.device.type == "cpu" else PIECE
        for rows in cuts(0, self.before.numel(), size):
            before, after, gradient = (one.view(-1)[rows] for one in (self.before, self.after, self.gradient))
            contributions = {
                name: Contribution(
                    *(None if one is None else one.view(-1)[rows] for one in (part.buffer, part.gradient))
                )
                for name, part in self.contributions.items()
            }
            yield (
                rows,
                replace(
                    self,
                    before=before,
                    after=after,
                    gradient=gradient,
                    rule=self.rule.piece(rows),
                    contributions=contributions,
                ),
            )

    # ------------------------------------------------- the parts, which add up

    def kernel(self) -> Tensor:
        """`u_s = P (e M_s + d G_s)`: what the training samples did (Thm. 3.1, summed over the samples)."""
        return self._displacement(self._kernel_buffer(), self.kernel_gradient())

    def regularization(self) -> Tensor:
        """`r_s = P (e R_s + d λ θ_s) + γ θ_s`: what weight decay did."""
        rule = self.rule
        buffer = self.contributions.get("regularization", Contribution(None)).buffer
        result = self.before * rule.decoupled

        if rule.coupled or buffer is not None:
            fresh = None if buffer is None else buffer.clone()
            result += self._displacement(fresh, self.before * rule.coupled if rule.d else None)
        return result

    def contribution(self, name: str) -> Tensor:
        """`P (e · buffer + d · gradient)` of `past` or an auxiliary loss; 0 if this parameter has none of that name."""
        part = self.contributions.get(name, Contribution(None))
        return self._displacement(None if part.buffer is None else part.buffer.clone(), part.gradient)

    def rounding(self) -> Tensor:
        """`(θ_s − θ_{s+1})` less all other parts: what float arithmetic did."""
        rest = (self.before - self.after).sub_(self.kernel()).sub_(self.regularization())
        for name in self.contributions:
            if name != "regularization":
                rest -= self.contribution(name)
        return rest

    def momentum(self) -> Tensor:
        """`P e β M_{s−1}`: the share of the kernel part that comes from earlier steps' gradients."""
        buffer = self._kernel_buffer()
        if buffer is None:
            return torch.zeros_like(self.before)

        # β M_{s−1} = M_s − b Q G_s
        entered = self.into_buffer(self.kernel_gradient().clone())
        return self._displacement(buffer.sub_(entered), None)

    # ------------------------------- the samples' gradient, and its way through

    def kernel_gradient(self) -> Tensor:
        """`Σ_k w_k ∇L_k(θ_s)`: the gradient without the auxiliary losses'. Not to be written over."""
        gradient = self.gradient
        for part in self.contributions.values():
            if part.gradient is not None:
                gradient = gradient - part.gradient
        return gradient

    def precondition(self, direction: Tensor) -> Tensor:
        """`P · direction`, over its leading axes if it has any; may write over `direction`: pass fresh tensors."""
        return direction if self.rule.precondition is None else self.rule.precondition(direction, self._seen_gradient())

    def into_buffer(self, direction: Tensor) -> Tensor:
        """`b Q · direction`: what a gradient puts into the buffer, and the adjoint of that; may write over it."""
        if self.rule.enter is not None:
            direction = self.rule.enter(direction, self._seen_gradient())
        return direction.mul_(self.rule.b)

    def adjoint(self, direction: Tensor) -> Tensor:
        """`(b Q e + d) P · direction`: its product with `w_k ∇L_k` is the sample's influence through its own step."""
        preconditioned = self.precondition(direction.clone())
        return self.into_buffer(preconditioned * self.rule.e).add_(preconditioned, alpha=self.rule.d)

    def _seen_gradient(self) -> Tensor:
        """`G_s + λ θ_s`, as the optimizer saw the gradient."""
        return self.gradient.add(self.before, alpha=self.rule.coupled) if self.rule.coupled else self.gradient

    def _kernel_buffer(self) -> Tensor | None:
        """`M_s`, the samples' share of the momentum buffer: a fresh tensor."""
        if self.rule.buffer is None:
            return None
        buffer = self.rule.buffer.clone()
        for part in self.contributions.values():
            if part.buffer is not None:
                buffer -= part.buffer
        return buffer

    def _displacement(self, buffer: Tensor | None, gradient: Tensor | None) -> Tensor:
        """`P (e · buffer + d · gradient)`: how far they move the parameter; the buffer may be written over."""
        rule = self.rule
        total = torch.zeros_like(self.before) if buffer is None or not rule.e else buffer.mul_(rule.e)
        if gradient is not None and rule.d:
            total.add_(gradient, alpha=rule.d)
        return self.precondition(total)
