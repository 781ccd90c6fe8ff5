"""The paper's data sets (Appendix E)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Inputs and labels of the training and the test set."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def to(self, device: str) -> "Split":
        return Split(*(tensor.to(device) for tensor in vars(self).values()))


def modulo_addition(modulus: int, train: int, test: int, seed: int) -> Split:
    """`[a] [+] [b] [=]` → `(a + b) mod modulus` (E.2): tokens (N, 4) and labels (N,).

    The pairs are those with a > b, 113 · 112 / 2 = 6328 for 113, as many as the paper counts.
    """
    a, b = torch.tril_indices(modulus, modulus, offset=-1)
    if train + test > len(a):
        raise ValueError(f"modulo {modulus} has {len(a)} pairs, too few for train={train} and test={test}")
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
    a, b = a[order], b[order]
    x = torch.stack([a, torch.full_like(a, modulus), b, torch.full_like(b, modulus + 1)], dim=1)
    y = (a + b) % modulus
    return Split(x[:train], y[:train], x[train : train + test], y[train : train + test])
