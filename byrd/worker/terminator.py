"""Ends what this worker still runs of runs that are cancelled with terminate, once their grace time is over."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from byrd.store import Store, Wakeup, termination
from byrd.store.termination import Doomed
from byrd.task.runtime import Runtime

log = logging.getLogger(__name__)

#: So often a worker looks for what it is to end.
LOOK_SECONDS = 0.5
#: A process that does not end by SIGTERM, for its task catches everything, is killed after this time.
TERM_SECONDS = 1.0
#: One that has left its task, or was killed, is gone in milliseconds, unless its task has come to its end after all.
_GONE_SECONDS = 0.5
#: A process that says so often that it does not run the step, though nobody has recorded an end, never will.
_DENIALS = 4


class Terminator:
    """Looks on behalf of the keeper, and has the recorder end what it finds.

    The process is ended first and the step's end recorded then, so that nothing is undone while its task still works.
    ``children``: the processes of the pool; a pool of threads or greenlets has none, and what runs there is only shut
    out of its run.
    """

    def __init__(
        self,
        runtime: Runtime,
        store: Store,
        worker_id: str,
        *,
        children: Callable[[], Sequence[int]],
        has_exited: Callable[[int], bool],
    ) -> None:
        self.runtime, self.store, self.worker_id = runtime, store, worker_id
        self._children, self._has_exited = children, has_exited
        self._next_look = 0.0
        #: What the recorder was told of.
        self._told: set[Doomed] = set()
        self._denied: Counter[Doomed] = Counter()

    def look(self) -> None:
        """Have what is due ended."""
        if time.monotonic() < self._next_look:
            return
        found = set(self.store.run(termination.due, self.worker_id))
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._denied = Counter({one: n for one, n in self._denied.items() if one in found})
        new = found - self._told
        if new:
            self._told |= new
            self.runtime.chores.append(functools.partial(self._end, sorted(new)))

    def _end(self, doomed: Sequence[Doomed]) -> list[Wakeup]:
        """End the processes, then record what has ended."""
        try:
            children = set(self._children())
            mine = {one for one in doomed if one.pid in children and self.runtime.is_running(one.pid, one.step_id)}
            self._signal(mine, signal.SIGTERM)
            self._wait(TERM_SECONDS, lambda: any(self._still_runs(one) for one in mine))
            self._signal({one for one in mine if self._still_runs(one)}, signal.SIGKILL)
            self._wait(_GONE_SECONDS, lambda: not all(self._has_exited(one.pid) for one in mine))
            wakeups: list[Wakeup] = []
            for one in doomed:
                ended = self._has_exited(one.pid)
                if not ended and one.pid in children and not self._still_runs(one) and not self._denied_too_often(one):
                    continue  # it is about to begin, or its end to be recorded
                wakeups += self.runtime.store.run(termination.terminate, one, worker_id=self.worker_id, ended=ended)
                if not ended:
                    log.warning("step %s cannot be ended here, and is shut out of its run instead", one.step_id)
            return wakeups
        finally:
            self._told -= set(doomed)

    def _denied_too_often(self, one: Doomed) -> bool:
        self._denied[one] += 1
        return self._denied[one] >= _DENIALS

    def _still_runs(self, one: Doomed) -> bool:
        return not self._has_exited(one.pid) and self.runtime.is_running(one.pid, one.step_id)

    @staticmethod
    def _wait(seconds: float, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and condition():
            time.sleep(0.01)

    def _signal(self, doomed: Iterable[Doomed], signum: signal.Signals) -> None:
        for one in doomed:
            log.warning("step %s is cancelled: %s for its pool process %d", one.step_id, signum.name, one.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signum)
