"""Tells the pool process that waits for an offer that it is needed."""

from __future__ import annotations

import threading

from byrd.task.runtime import Runtime
from byrd.worker.loop import Loop


class Crier(Loop):
    """Has the process of this worker that waits for an offer cease, when woken: Celery's event loop must not wait."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__("byrd-crier")
        self.runtime = runtime
        self._woken = threading.Event()

    def wake(self) -> None:
        """Begin the next round now."""
        self._woken.set()

    def stop(self, timeout: float = 5.0) -> None:
        self._stop.set()
        self.wake()
        super().stop(timeout)

    def tick(self) -> float:
        self._woken.clear()
        if self.runtime.idle.waits():
            self.runtime.publisher.cease_to_wait(self.runtime.worker_id)
        return 0.0

    def rest(self, seconds: float) -> None:
        """Wait until woken, however long that is."""
        self._woken.wait()
