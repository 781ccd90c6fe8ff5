"""Torch's own switches, which our passes turn for a while: the recording of gradients, the kernels of attention."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cuda, mha

SWITCHES = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (mha.get_fastpath_enabled, mha.set_fastpath_enabled),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)
"""How each is read, and how it is turned; on a machine without a GPU as well."""


@contextmanager
def keeping_switches() -> Iterator[None]:
    """Gives every switch back as it is now, where an exception or Ctrl-C ends what is within.

    Whoever turns one turns it back, by `with`. But Ctrl-C may come between the body of a `with` and its end, which is
    then never reached; so this stands around all of our passes.
    """
    found = [read() for read, _ in SWITCHES]
    try:
        yield
    except BaseException:
        for (_, turn), value in zip(SWITCHES, found, strict=True):
            turn(value)
        raise
