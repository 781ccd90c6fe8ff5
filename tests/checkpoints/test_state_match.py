"""Whether states are their parameters': by random numbers whose answer is known, whatever their sizes and shapes."""

import math

import pytest
import torch
from torch import Tensor

from explaind_track.checkpoints.state_match import match_states

SHAPES = {"attention": (40, 40), "mlp": (64, 40), "norm": (40,)}


def states(layers: int, seed: int, drift: float = 0.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Second moments with rows, columns and sizes of their own, and gradients of these. drift: of the sizes since."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    second, gradients = {}, {}
    for name in (f"layers.{layer}.{kind}" for layer in range(layers) for kind in SHAPES):
        shape = SHAPES[name.rpartition(".")[2]]
        logs = noise() + sum(noise(size).reshape(-1, *[1] * (len(shape) - 1 - axis)) for axis, size in enumerate(shape))
        second[name] = torch.as_tensor(logs).exp() * 1e-6
        gradients[name] = second[name].sqrt() * noise(*shape) * math.exp(drift * float(noise()))
    return second, gradients


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_right_states_are_never_called_anothers(seed: int, drift: float) -> None:
    """Also where whole tensors are larger or smaller by now than they were on average."""
    match = match_states(*states(6, seed, drift))
    assert match.misplaced == {}
    assert match.chance == 0.001


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_two_that_were_exchanged_are_named(kind: str) -> None:
    second, gradients = states(6, 0)
    one, other = f"layers.1.{kind}", f"layers.4.{kind}"
    match = match_states({**second, one: second[other], other: second[one]}, gradients)
    assert match.misplaced == {one: other, other: one}


def test_states_in_another_order_fit_no_better_than_in_any() -> None:
    second, gradients = states(6, 0)
    names = list(second)
    moved = dict(zip(names, [*names[3:], *names[:3]], strict=True))  # by a layer
    match = match_states({name: second[moved[name]] for name in names}, gradients)
    assert match.chance > 0.05
    matrices = [name for name in names if not name.endswith("norm")]
    assert len(matrices) / 2 < sum(name in match.misplaced for name in matrices)


def test_a_model_without_equal_shapes_leaves_nothing_to_compare() -> None:
    match = match_states(
        {"weight": torch.rand(5, 3), "bias": torch.rand(5)}, {"weight": torch.rand(5, 3), "bias": torch.rand(5)}
    )
    assert math.isnan(match.chance)
    assert (match.misplaced, match.undecided, match.suspected) == ({}, 0, ())
