"""A thread beside a worker's pool that does one thing again and again."""

from __future__ import annotations

import logging
import threading

from sqlalchemy.exc import DBAPIError

from byrd.errors import NotLiveError

log = logging.getLogger(__name__)


class Loop:
    """A daemon thread that calls ``tick`` again and again, and outlives what goes wrong in it."""

    def __init__(self, name: str) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._failures = 0

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Ask the thread to end, and wait for it a while."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def tick(self) -> float:
        """Do one round; return the seconds until the next."""
        raise NotImplementedError

    def rest(self, seconds: float) -> None:
        """Wait until the next round."""
        self._stop.wait(seconds)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                pause = self.tick()
                self._failures = 0
            except (NotLiveError, DBAPIError, OSError) as exc:
                self._failures += 1
                pause = min(1.0, 0.1 * 2**self._failures)
                if self._failures in (1, 10) or self._failures % 100 == 0:
                    log.warning("%s: %s; trying again", self._thread.name, exc)
            except Exception:
                log.exception("%s failed; trying again", self._thread.name)
                pause = 1.0
            self.rest(pause)
