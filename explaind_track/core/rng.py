"""The state of the random generators: read, set, and put back after what was drawn from it once more."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a forward pass on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state[str(device)] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Sets the generators to a state that `random_state` gave."""
    for name, value in state.items():
        if name == "cpu":
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, torch.device(name))


@contextmanager
def replayed_random_state(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Draws the random numbers again that were drawn from `state` on, then goes on as if nothing had been drawn."""
    devices = [torch.device(name) for name in state if name != "cpu"]
    with torch.random.fork_rng(devices):
        set_random_state(state)
        yield
