"""A thread that makes calls to W&B, so that training waits for none of them."""

import queue
import threading
from collections.abc import Callable


class Sender:
    """Makes calls one after the other in a thread of its own, since some of W&B's SDK wait for the server: `run.log` of
    a table asks it about the table's artifact, again and again for 19 s where there is no answer."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="panels", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], object]) -> None:
        self._calls.put(call)

    def close(self, seconds: float) -> None:
        """Waits until all calls are made, or gives up those that are left."""
        self._calls.put(None)
        self._thread.join(seconds)
        self._given_up.set()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None and not self._given_up.is_set():
            call()
