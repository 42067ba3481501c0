"""Ends the attempts of this worker that take too long, or give no sign of life."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import time

from byrd.store import Store, Wakeup, sweeps, timeouts
from byrd.store.timeouts import Overdue
from byrd.task.runtime import Runtime

log = logging.getLogger(__name__)

#: So often a worker looks at its attempts.
LOOK_SECONDS = 0.5
#: A worker that was kept from looking for so long was frozen, or without Postgres: so may have been its pool processes.
_UNWELL_SECONDS = 2.0


class OverdueWatch:
    """Looks, on behalf of the keeper, at the attempts of a worker whose time may be over."""

    def __init__(self, runtime: Runtime, store: Store, worker_id: str, *, max_preemptions: int) -> None:
        self.runtime, self.store, self.worker_id = runtime, store, worker_id
        self._max_preemptions = max_preemptions
        self._next_look = 0.0
        #: When this worker last found that it had been kept from looking, and when it last looked.
        self._unwell_at = -timeouts.ALWAYS
        self._looked_at = time.monotonic()
        #: What the recorder has been told of.
        self._told: set[Overdue] = set()

    def look(self) -> None:
        """Have what is over time ended by the recorder: a step's run may have to be waited for."""
        now = time.monotonic()
        if now < self._next_look:
            return
        if now - self._looked_at > _UNWELL_SECONDS:
            self._unwell_at = now
        well = now - self._unwell_at
        overdue = self.store.run(timeouts.overdue_attempts, self.worker_id, well_seconds=well)
        self._looked_at, self._next_look = now, time.monotonic() + LOOK_SECONDS
        for one in set(overdue) - self._told:
            self._told.add(one)
            self.runtime.chores.append(functools.partial(self._end, one, well))

    def _end(self, one: Overdue, well_seconds: float) -> list[Wakeup]:
        """Fence an attempt, and end its process, which may never come back by itself; other pools have none to end."""
        store = self.runtime.store
        wakeups = store.run(
            timeouts.time_out,
            one.step_id,
            one.attempt,
            well_seconds=well_seconds,
            owner=self.worker_id,
            pid=one.pid,
            max_preemptions=self._max_preemptions,
        )
        running = store.run(sweeps.running_here, self.worker_id, one.step_id)
        gone = running is None or (running.attempt != one.attempt and running.pid != one.pid)
        # It may have come back meanwhile: then its process is at work for another.
        if gone and one.pid != os.getpid() and self.runtime.is_running(one.pid, one.step_id):
            log.warning("step %s took too long: its pool process %d is ended", one.step_id, one.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        self._told.discard(one)
        return wakeups
