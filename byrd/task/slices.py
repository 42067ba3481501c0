"""What one wake-up lets a pool process do: work for a slice of time at whatever is ready.

Celery's main process costs about a millisecond for each message, and Postgres about one for each commit.  So a process
that is awake goes on with what its step made ready, and with other ready steps of its worker's queues; and steps that
take less than a few milliseconds are claimed, and recorded, several at once.  What one statement records and claims is
in :mod:`byrd.store.work`.

A crash repeats what was not recorded yet, which is what finished in the last few milliseconds: the fence and the
history are the same as ever.  A step that takes longer than that is recorded by itself, before its hooks are called,
and holds up nobody: a thread records what had finished before it, and gives back what was claimed with it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from kombu.exceptions import EncodeError
from sqlalchemy.exc import DBAPIError

from byrd.errors import StaleAttempt
from byrd.store import Claim, Wakeup, steps, work
from byrd.store.database import first_line
from byrd.store.work import Done, Own, Work
from byrd.task.attempt import Attempt
from byrd.task.runtime import Runtime

log = logging.getLogger(__name__)

#: A result waits no longer than this for others to be recorded with.
HOLD_SECONDS = 0.01
#: So much work, by the pace of late, is claimed at once, and no more steps than this.
_BATCH_SECONDS = 0.01
_MOST_AT_ONCE = 32
_MOST_STEPS = 2000


class Slice:
    """The work of one process for one wake-up."""

    def __init__(self, runtime: Runtime, run: Callable[[Attempt], Any]) -> None:
        self.runtime, self._run = runtime, run
        self._pid = os.getpid()
        self._pace = pace_of(runtime)
        #: Held while a list below is changed, and by the watch while it does something about them.
        self._lock = threading.Lock()
        self._waiting: deque[Claim] = deque()
        self._done: list[Done] = []
        #: When the task that is running was called; None between two of them.
        self._called_at: float | None = None
        self._held_since = 0.0
        self._ends_at = time.monotonic() + runtime.slice_seconds
        self._steps = 0
        self._over = False

    def work(self, own: Own) -> tuple[bool, Any]:
        """Run what is ready, the step of the message first; tell whether that is to be claimed in the ordinary way.

        The second value is that step's outcome, or None when it was not run here.
        """
        outcome = None
        own_is_ready = self._exchange((), own=own)
        watch = _watch()
        watch.slice = self
        watch.on.set()
        try:
            while (claim := self._next()) is not None:
                attempt = Attempt(self.runtime, claim, slice=self)
                got = self._run(attempt)
                self._called_at = None
                if claim.id == own.step_id:
                    outcome = got
        finally:
            watch.on.clear()
            watch.slice = None
        return own_is_ready, outcome

    def _next(self) -> Claim | None:
        with self._lock:
            due = not self._waiting or (self._done and time.monotonic() - self._held_since > HOLD_SECONDS)
        if due and (not self._over or self._done):
            self._flush(claim=not self._waiting)
        with self._lock:
            if not self._waiting:
                return None
            self._steps += 1
            self._called_at = time.monotonic()
            return self._waiting.popleft()

    def completed(self, claim: Claim, result: str) -> None:
        """Record a result: now, or a few milliseconds later with others.

        Raises :class:`StaleAttempt` when it is recorded now, and refused.
        """
        with self._lock:
            now = time.monotonic()
            took = now - (self._called_at or now)
            self._called_at = None
            if not self._done:
                self._held_since = now
            self._done.append(Done(claim, result))
            hold = bool(self._waiting) and took < HOLD_SECONDS and now - self._held_since < HOLD_SECONDS
        if not hold:
            self._flush(claim=not self._waiting, current=claim.id)

    def look(self) -> None:
        """Called by the watch: see that a step that takes its time holds up neither results nor other steps."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            called_at = self._called_at
            if called_at is None or time.monotonic() - called_at < HOLD_SECONDS or os.getpid() != self._pid:
                return
            done, self._done = self._done, []
            waiting = list(self._waiting)
            self._waiting.clear()
            if done:
                wakeups, _ = self._record(done, None)
                self.runtime.publisher.publish(wakeups)
            for claim in waiting:
                self._give_back(claim)
            if waiting:
                self._pace.slow_down()
        finally:
            self._lock.release()

    def _give_back(self, claim: Claim) -> None:
        store = self.runtime.patient_store
        try:
            self.runtime.publisher.publish(store.run(steps.hand_back, claim.id, claim.attempt))
        except StaleAttempt as exc:
            log.info("nothing to give back: %s", exc)

    # -- recording -------------------------------------------------------------------------------

    def _flush(self, *, claim: bool, current: str | None = None) -> None:
        """Record what is done, and claim what is next."""
        if claim:
            self._pace.ended()
        with self._lock:
            done, self._done = self._done, []
        try:
            self._exchange(done, claim=claim, current=current)
        except (StaleAttempt, DBAPIError):  # all that could be recorded is
            raise
        except BaseException:
            with self._lock:  # recorded or not, the same outcome may be recorded twice
                self._done = done + self._done
            raise

    def _exchange(
        self, done: Sequence[Done], *, own: Own | None = None, claim: bool = True, current: str | None = None
    ) -> bool:
        now = time.monotonic()
        room = claim and now < self._ends_at and self._steps < _MOST_STEPS and not self._over
        if claim:
            self._over = True  # unless something is claimed
        later: list[Done] = []
        first: list[Done] = []
        joins: dict[str, int | None] = {}
        for one in done:  # no two groups of one run at once
            run_id, join_no = one.claim.run_id, one.claim.join_no
            if join_no is not None and joins.setdefault(run_id, join_no) != join_no:
                later.append(one)
            else:
                first.append(one)
        wakeups: list[Wakeup] = []
        stale: dict[str, StaleAttempt] = {}
        if later:
            wakeups, stale = self._record(later, current)
        if room:
            found = self._call(first, current, own=own, most=self._pace.steps_at_once, others=True)
        elif first or claim:
            found = self._call(first, current, peek=claim)
        else:
            found = Work()
        with self._lock:
            self._waiting.extend(found.claims)
            if found.claims:
                self._over = False
        self.runtime.publisher.publish([*wakeups, *found.wakeups])
        if claim:
            self._pace.began(len(found.claims))
        for step_id, why in {**stale, **found.stale}.items():
            if step_id != current:
                log.info("not recorded: %s", why)
        if current is not None and (mine := {**stale, **found.stale}.get(current)) is not None:
            raise mine
        return found.own_is_ready

    def _record(self, done: list[Done], current: str | None) -> tuple[list[Wakeup], dict[str, StaleAttempt]]:
        """Record what is done, and claim nothing."""
        found = self._call(done, current)
        return found.wakeups, found.stale

    def _call(self, done: list[Done], current: str | None, **wanted: Any) -> Work:
        runtime = self.runtime
        identity: dict[str, Any] = {"worker_id": runtime.worker_id, "pid": self._pid}
        try:
            return runtime.patient_store.run_alone(
                work.work, done=done, token=str(uuid.uuid4()), **identity, **wanted
            )
        except DBAPIError as exc:
            if not done:
                raise
            if not work.is_unusual(exc):
                log.debug("recording one by one: %s", first_line(exc))
        wakeups: list[Wakeup] = []
        stale: dict[str, StaleAttempt] = {}
        for claim, result in done:
            try:
                wakeups += runtime.patient_store.run(steps.complete, claim.id, claim.attempt, result)
            except StaleAttempt as exc:
                stale[claim.id] = exc
            except DBAPIError as exc:
                # What Postgres refuses for good: with this result, a group's are together larger than it can hold, say.
                if claim.id == current:
                    runtime.publisher.publish(wakeups)
                    raise
                error = runtime.app.backend.encoded_error(
                    EncodeError(f"the result cannot be recorded: {first_line(exc)}")
                )
                wakeups += runtime.patient_store.run(steps.fail, claim.id, claim.attempt, error)
        if not wanted:
            return Work([], wakeups, stale)
        found = runtime.patient_store.run_alone(work.work, token=str(uuid.uuid4()), **identity, **wanted)
        return Work(found.claims, [*wakeups, *found.wakeups], stale, found.own_is_ready)


class Pace:
    """How long the steps of this process have taken of late, and so how many to claim at once."""

    def __init__(self) -> None:
        self.steps_at_once = 1
        self._began_at, self._steps = 0.0, 0

    def began(self, steps: int) -> None:
        """So many steps were claimed, and begin."""
        self._began_at, self._steps = time.monotonic(), steps

    def ended(self) -> None:
        """They have ended."""
        if self._steps:
            each = (time.monotonic() - self._began_at) / self._steps
            fitting = int(_BATCH_SECONDS / max(each, 1e-6))
            self.steps_at_once = max(1, min(fitting, 2 * self.steps_at_once, _MOST_AT_ONCE))
            self._steps = 0

    def slow_down(self) -> None:
        """A step took longer than those before it: claim one at a time again."""
        self.steps_at_once, self._steps = 1, 0


class _Watch(threading.Thread):
    """Looks, while a slice is under way, whether one of its steps takes its time."""

    def __init__(self) -> None:
        super().__init__(name="byrd-watch", daemon=True)
        self.on = threading.Event()
        self.slice: Slice | None = None
        self.pid = os.getpid()

    def run(self) -> None:
        while True:
            self.on.wait()
            time.sleep(2 * HOLD_SECONDS)
            current = self.slice
            if current is not None:
                try:
                    current.look()
                except Exception:
                    log.exception("a slice could not be looked after; recovery will see to its steps")


_watching: _Watch | None = None
_paces: dict[int, Pace] = {}


def pace_of(runtime: Runtime) -> Pace:
    """Return this process's pace."""
    return _paces.setdefault(id(runtime), Pace())


def _watch() -> _Watch:
    global _watching  # noqa: PLW0603 - one process, one watch
    if _watching is None or _watching.pid != os.getpid():
        _watching = _Watch()
        _watching.start()
    return _watching
