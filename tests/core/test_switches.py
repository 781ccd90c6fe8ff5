"""Torch's own switches, where something interrupts a pass."""

import pytest
import torch

from explaind_track.core.switches import SWITCHES, keeping_switches


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_no_switch_turned(error: type[BaseException]) -> None:
    """As by Ctrl-C between the body of a `with` and its end: nobody else turns them back."""
    before = [read() for read, _ in SWITCHES]
    with pytest.raises(error), keeping_switches():
        for _, turn in SWITCHES:
            turn(False)
        raise error
    assert [read() for read, _ in SWITCHES] == before


def test_what_a_loop_turns_stays_turned() -> None:
    with keeping_switches():
        torch.set_grad_enabled(False)
    assert not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
