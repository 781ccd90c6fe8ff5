"""What has to be done before the process goes: at its end, after an exception, on Ctrl-C and on SIGTERM."""

import atexit
import signal
import sys
import threading
from collections.abc import Callable


def before_exit(action: Callable[[], None]) -> Callable[[], None]:
    """Runs `action` when the process ends in any way that lets it; returns how to call that off.

    SIGTERM, which would end the process at once, is turned into an ordinary exit if nobody else handles it.
    """
    atexit.register(action)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return lambda: atexit.unregister(action)
