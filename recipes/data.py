"""The paper's data sets (Appendix E)."""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

HUB = {"mnist": "ylecun/mnist", "cifar2": "uoft-cs/cifar10"}
"""The source of the images, unless there is a local copy."""

CIFAR2 = ("cat", "dog")
"""The classes of CIFAR-10 that make CIFAR-2."""


@dataclass(frozen=True)
class Split:
    """Inputs and labels of the training and the test set."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def training_batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the training samples of these indices, (N,)."""
        return self.x_train[index], self.y_train[index]

    def to(self, device: str) -> "Split":
        """The same on another device."""
        return Split(*(tensor.to(device) for tensor in vars(self).values()))


def modulo_addition(modulus: int, train: int, test: int, seed: int, diagonal: bool = False) -> Split:
    """`[a] [+] [b] [=]` → `(a + b) mod modulus` (E.2): tokens (N, 4) and labels (N,).

    The pairs are those with a > b, 113 · 112 / 2 = 6328 for 113, as many as the paper counts; with the diagonal those
    with a ≥ b, 6441, as in the authors' script.
    """
    a, b = torch.tril_indices(modulus, modulus, offset=0 if diagonal else -1)
    if train + test > len(a):
        raise ValueError(f"modulo {modulus} has {len(a)} pairs, too few for train={train} and test={test}")
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
    a, b = a[order], b[order]

    x = torch.stack([a, torch.full_like(a, modulus), b, torch.full_like(b, modulus + 1)], dim=1)
    y = (a + b) % modulus
    return Split(x[:train], y[:train], x[train : train + test], y[train : train + test])


def sums_of(x: Tensor) -> np.ndarray:
    """A + b of tokens (N, 4), (N,)."""
    sums: np.ndarray = (x[:, 0] + x[:, 2]).numpy()
    return sums


def image_data(name: str, path: str | None, train: int, test: int) -> Split:
    """Images (N, channels, side, side), each channel standardised over the training images, and labels (N,).

    name: "mnist", "cifar2" (through `datasets`, from `path` or from the hub), or scikit-learn's bundled "digits".
    Exits with a sentence for data that cannot be had; ValueError if there are fewer samples than asked for.
    """
    if name == "digits":
        parts = _digits(train)
    elif name in HUB:
        dataset = _load_dataset(name, path)
        parts = [_images(dataset[split]) for split in ("train", "test")]
    else:
        sys.exit(f"there is no data '{name}': data.name is mnist, cifar2 or digits")

    (x_train, y_train), (x_test, y_test) = parts
    if train > len(y_train) or test > len(y_test):
        raise ValueError(f"{name} has {len(y_train)} and {len(y_test)} samples, too few for train={train}, test={test}")

    x_train, x_test = x_train[:train], x_test[:test]
    mean, deviation = x_train.mean((0, 2, 3), keepdim=True), x_train.std((0, 2, 3), keepdim=True)
    return Split((x_train - mean) / deviation, y_train[:train], (x_test - mean) / deviation, y_test[:test])


def _digits(train: int) -> list[tuple[Tensor, Tensor]]:
    """Scikit-learn's 8 × 8 digits in [0, 1], in a random order: `train` of them, and the others."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.from_numpy(digits.images).float()[:, None] / 16, torch.from_numpy(digits.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return [(x[:train], y[:train]), (x[train:], y[train:])]


def _load_dataset(name: str, path: str | None) -> Any:
    """A local copy, or the hub's; exits with a sentence if there is none to be had."""
    from datasets import load_dataset

    try:
        return load_dataset(path or HUB[name])
    except (OSError, ValueError) as error:  # without network, not on the hub, not a directory of images
        where = f"data.path={path}" if path else f"{HUB[name]} on the Hugging Face hub"
        reason = str(error).splitlines()[0]
        sys.exit(
            f"could not load {name} from {where}: {reason}\nTo go on, connect to the network, or say where a copy is "
            "(data.path=DIRECTORY with train and test parquet files), or use data.name=digits, which needs neither"
        )


def _images(dataset: Any) -> tuple[Tensor, Tensor]:
    """The images of a split in [0, 1], (N, channels, side, side), and labels (N,); of CIFAR-10, those of CIFAR-2."""
    names = dataset.features["label"].names
    if len(names) == 10 and set(CIFAR2) <= set(names):
        kept = [names.index(name) for name in CIFAR2]
        dataset = dataset.filter(lambda label: label in kept, input_columns="label")
    else:
        kept = list(range(len(names)))

    column = next(name for name in dataset.column_names if name != "label")
    x = torch.from_numpy(np.stack([np.asarray(image) for image in dataset[column]])).float() / 255
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor([kept.index(label) for label in dataset["label"]])
