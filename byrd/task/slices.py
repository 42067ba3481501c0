"""What one wake-up lets a pool process do: work for a slice of time at whatever is ready.

Celery's main process costs about a millisecond for each message, and Postgres about as much for each commit.  So a
process that is awake goes on with what its step made ready, and with other ready steps of its worker's queues; and
steps that take less than a few milliseconds are claimed, and recorded, several at once.  What one statement records
and claims is in :mod:`byrd.store.work`.

A crash repeats what was not recorded yet, which is what finished in the last few milliseconds; the fence and the
history are the same as ever.  A step that takes longer than that is recorded by itself, before its hooks are called,
and holds up nobody: a thread records what had finished before it, and gives back what was claimed with it.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kombu.exceptions import EncodeError
from sqlalchemy.exc import DBAPIError

from byrd.errors import StaleAttempt
from byrd.model import StepKind
from byrd.store import Claim, items, steps, sweeps, work
from byrd.store.database import first_line
from byrd.store.work import Done, Own, Work
from byrd.task.attempt import Attempt, readable_header, storable
from byrd.task.runtime import Runtime

log = logging.getLogger(__name__)

#: A result waits no longer than this for others to be recorded with.
HOLD_SECONDS = 0.01
#: A step that takes longer than this is alone: what was claimed with it is put back, for others.
_PUT_BACK_SECONDS = 0.05
#: So much work, by the pace of late, is claimed at once, and no more steps than this.
_BATCH_SECONDS = 0.01
_MOST_AT_ONCE = 32
_AFTER_ERROR_SECONDS = 1.0
#: A wake-up costs more than this many looks at what is ready, and where wake-ups come so close to each other, more work
#: is likely to come within these few milliseconds.
_LOOKS, _LOOK_AFTER_SECONDS, _CLOSE_SECONDS = 4, 0.005, 0.03
#: A process copes alone while it runs what it has claimed within so many times what the statement took that claimed it.
_EASY = 2
#: For so long at a time a process waits for offers: meanwhile it does not see that its worker stops.
_WAIT_SECONDS = 0.5
#: Steps that are offered to a process while it waits for more prolong its slice, to so many times its length.
_MOST_SLICES = 5
#: No slice runs more steps than this.
_MOST_STEPS = 2000


class Slice:
    """The work of one process for one wake-up.  ``run`` runs an attempt, and sees that its outcome is recorded."""

    def __init__(self, runtime: Runtime, run: Callable[[Attempt], Any]) -> None:
        self.runtime, self._run = runtime, run
        self._pid = os.getpid()
        self._pace = _pace()
        self._standby = runtime.standby
        #: How long the last statement took.
        self._statement_seconds = 0.0
        #: Held while what follows is changed, and by the watch while it does something about it.
        self._lock = threading.Lock()
        self._waiting: deque[Claim] = deque()
        self._done: list[Done] = []
        self._held_since = 0.0
        self._recording = False
        #: Since when the current step is run, or its hooks are; None between two of them.
        self._busy_since: float | None = None
        self._current: Claim | None = None
        began = time.monotonic()
        self._ends_at, self._ends_at_last = began + runtime.slice_seconds, began + _MOST_SLICES * runtime.slice_seconds
        #: Of which it has run steps.
        self._queues: set[str] = set()
        #: Its end is waited for: by the step of its message, which is to be claimed in the ordinary way, or by a
        #: message for one step only that is on its way, perhaps to this very process.
        self._awaited = False
        #: Wake-ups come one right after the other.
        self._close = time.monotonic() - self._pace.ended_at < _CLOSE_SECONDS
        #: How many steps were begun.
        self.steps = 0
        self._over = False

    def work(self, own: Own) -> tuple[bool, Any]:
        """Run what is ready, the step of the message first.

        Returns whether that step is still to be claimed, in the ordinary way, and its outcome if it was run here.
        """
        runtime, outcome = self.runtime, None
        watch = _watch()
        watch.begin(self)
        try:
            # Of those that stood by one goes on as if it coped, until it knows more; the others need not all join in.
            self._standby.say(copes=self._standby.stand_by(self._ends_at, unless=lambda: runtime.stopping))
            own_is_ready = self._exchange([], own=own).own_is_ready
            self._awaited |= own_is_ready
            while (claim := self._next() or self._linger()) is not None:
                got = self._run(Attempt(runtime, claim, in_slice=self))
                self._busy_since = self._current = None
                if claim.id == own.step_id:
                    outcome = got
        except Exception:
            self._abandon()
            raise
        finally:
            self._standby.say(copes=False)
            watch.end()
            self._pace.ended_at = time.monotonic()
        return own_is_ready, outcome

    def completed(self, claim: Claim, result: str) -> None:
        """Record a result: now, or a few milliseconds later with others.

        Raises :class:`StaleAttempt` when it is recorded now, and refused.
        """
        with self._lock:
            now = time.monotonic()
            if not self._done:
                self._held_since = self._busy_since or now
            self._done.append(Done(claim, result))
            hold = bool(self._waiting) and now - self._held_since < HOLD_SECONDS
        if not hold:
            self._record(current=claim.id)

    def look(self) -> None:
        """See that a step that takes its time holds up neither results nor other steps.  The watch calls it."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            busy_since = self._busy_since
            if self._recording or busy_since is None or os.getpid() != self._pid:
                return
            if time.monotonic() - busy_since < HOLD_SECONDS:
                return
            if self._done:
                self._report(self._done)
                self._done = []
            if not self._waiting or time.monotonic() - busy_since < _PUT_BACK_SECONDS:
                return
            self._pace.slow_down()
            while self._waiting:
                claim = self._waiting[-1]
                wakeups = self.runtime.patient_store.run(
                    steps.put_back, claim.id, claim.attempt, worker_id=self.runtime.worker_id, pid=self._pid
                )
                self._waiting.pop()
                self.runtime.publisher.publish(wakeups)
        finally:
            self._lock.release()

    # -- in between ------------------------------------------------------------------------------

    def _next(self) -> Claim | None:
        """Return the next step to run; None when the slice is over."""
        with self._lock:
            held_long = bool(self._done) and time.monotonic() - self._held_since >= HOLD_SECONDS
            recording = held_long or (not self._waiting and (bool(self._done) or not self._over))
        if recording:
            self._record()
        with self._lock:
            if not self._waiting:
                return None
            self.steps += 1
            self._busy_since = time.monotonic()
            self._current = self._waiting.popleft()
            if self._current.queue is not None:
                self._queues.add(self._current.queue)
            return self._current

    def _linger(self) -> Claim | None:
        """Return the next step to run, if something becomes ready soon."""
        idle = self.runtime.idle
        if not 0 < self.steps < _MOST_STEPS or self._awaited or idle.waits():
            return None
        waited = False
        while self._may_wait():
            seconds = min(_WAIT_SECONDS, self._ends_at - time.monotonic())
            if seconds < _LOOK_AFTER_SECONDS or not idle.begin(seconds):
                break
            waited = True
            self._standby.say(copes=False)
            own = _offered(self.runtime.wait_for_offer(self._queues, seconds))
            if own is not None and (claim := self._taken(own)) is not None:
                return claim
        return None if waited else self._look_again()

    def _may_wait(self) -> bool:
        """Tell whether steps may be offered to this process."""
        runtime = self.runtime
        return runtime.is_forked and not runtime.stopping and not runtime.orphaned and runtime.publisher.takes_offers()

    def _taken(self, own: Own) -> Claim | None:
        """Return the next step to run, after an offer: as after a message, this one first."""
        # Not for ever: Celery is told of the step of the message when the slice ends.
        self._ends_at = min(self._ends_at_last, time.monotonic() + self.runtime.slice_seconds)
        self._over = False
        found = self._exchange([], own=own)
        if found.own_is_ready:
            self.runtime.patient_store.run(sweeps.pass_on, own.step_id, own.attempt)
        return self._next() if found.claims else None

    def _look_again(self) -> Claim | None:
        for _ in range(_LOOKS if self._close else 0):
            if self.runtime.stopping or time.monotonic() + _LOOK_AFTER_SECONDS >= self._ends_at:
                break
            self._standby.say(copes=False)
            time.sleep(_LOOK_AFTER_SECONDS)
            self._over = False
            if self._exchange([]).claims:
                return self._next()
        return None

    def _record(self, *, current: str | None = None) -> None:
        """Record what is done; claim what is next when nothing that was claimed is left."""
        with self._lock:
            done, self._recording = self._done, True
        try:
            found = self._exchange(done, current=current)
            self._done = []  # not before: the same outcome may be recorded twice, but must not be forgotten
        finally:
            if self._busy_since is not None:  # the step's hooks come now, and what was claimed just now waits for them
                self._busy_since = time.monotonic()
            self._recording = False
        if current is not None and (refused := found.refused.get(current)) is not None:
            raise refused

    def _exchange(self, done: list[Done], *, own: Own | None = None, current: str | None = None) -> Work:
        """Tell Postgres what is done, and have it tell what is next."""
        *early, last = _apart(done)
        refused = self._report_parts(early, current)
        if self._waiting:
            found = self._call(last, current)
        else:
            self._pace.ended()
            time_left = time.monotonic() < self._ends_at and not self.runtime.stopping
            room = time_left and not self._over and self.steps < _MOST_STEPS
            if room or own is not None:  # Postgres says whether its worker still may: if not, it is sent again
                # What follows each step that is done is run on here, whatever the pace.
                most = max(self._pace.steps_at_once, len(last))
                found = self._call(last, current, own=own, most=most, others=room, peek=own is not None)
                is_easy = self._pace.is_easy(len(found.claims), most, self._statement_seconds)
                self._standby.say(copes=room and is_easy)
            else:
                self._standby.say(copes=False)
                found = self._call(last, current, peek=True)  # others are to go on where this slice ends
            with self._lock:
                self._over = not found.claims
                self._waiting.extend(found.claims)
            self._pace.began(len(found.claims))
        found.refused = refused | self._settle(found, current)
        return found

    def _report(self, done: list[Done]) -> None:
        """Tell Postgres what is done, and nothing else."""
        self._report_parts(_apart(done), None)

    def _report_parts(self, parts: Sequence[Sequence[Done]], current: str | None) -> dict[str, BaseException]:
        refused: dict[str, BaseException] = {}
        for part in parts:
            refused |= self._settle(self._call(part, current), current)
        return refused

    def _settle(self, found: Work, current: str | None) -> dict[str, BaseException]:
        """Publish what became ready, say what was refused, and return it."""
        self.runtime.publisher.publish(found.wakeups)
        if any(wakeup.solo for wakeup in found.wakeups):
            self._awaited = True
        for step_id, why in found.refused.items():
            if step_id != current:
                log.info("not recorded: %s", why)
        return found.refused

    def _abandon(self) -> None:
        """After an error that should not be: leave no step behind that this process has claimed, for it lives on."""
        with self._lock:
            done, left = self._done, [*self._waiting, *([self._current] if self._current else [])]
            self._done = []
            self._waiting.clear()
        try:
            self._report(done)
        except Exception:
            log.exception("%d results could not be recorded; their steps are given back", len(done))
            left += [one.claim for one in done]
        for claim in left:
            try:
                self._give_back(claim)
            except Exception:
                log.exception("step %s could not be given back; the next slice of this process runs it", claim.id)

    def _give_back(self, claim: Claim) -> None:
        store = self.runtime.patient_store
        try:
            # Not at once, or it would come back to where this error is at home.
            wakeups = store.run(steps.hand_back, claim.id, claim.attempt, delay=_AFTER_ERROR_SECONDS)
            self.runtime.publisher.publish(wakeups)
        except StaleAttempt as exc:
            log.info("nothing to give back: %s", exc)

    # -- recording -------------------------------------------------------------------------------

    def _call(self, done: Sequence[Done], current: str | None, **wanted: Any) -> Work:
        if not done and not wanted:
            return Work()
        if any(one.claim.kind == StepKind.ITEM for one in done):
            return self._with_items(done, current, wanted)
        try:
            return self._work(done=done, **wanted)
        except DBAPIError as exc:
            if not done:
                raise
            if not work.is_unusual(exc):
                log.warning("%d results are recorded one by one, for together: %s", len(done), first_line(exc))
        recorded = self._one_by_one(done, current)
        if wanted:
            found = self._work(**wanted)
            recorded.claims, recorded.own_is_ready = found.claims, found.own_is_ready
            recorded.wakeups += found.wakeups
        return recorded

    def _with_items(self, done: Sequence[Done], current: str | None, wanted: dict[str, Any]) -> Work:
        """Record the items of each each together, which the fast path does not know, and then the rest."""
        of_each: dict[tuple[str, int], list[Done]] = {}
        for one in done:
            if one.claim.kind == StepKind.ITEM:
                of_each.setdefault((one.claim.run_id, one.claim.join_no or 0), []).append(one)
        recorded = Work()
        for (run_id, each_no), together in of_each.items():
            given = {claim.id: (claim.attempt, result) for claim, result in together}
            try:
                kept, wakeups = self.runtime.patient_store.run(items.complete, run_id, each_no, given)
            except DBAPIError as exc:
                log.warning("%d results are recorded one by one, for together: %s", len(together), first_line(exc))
                one_by_one = self._one_by_one(together, current)
                recorded.wakeups += one_by_one.wakeups
                recorded.refused |= one_by_one.refused
                continue
            recorded.wakeups += wakeups
            for claim, _ in together:
                if claim.id not in kept:
                    recorded.refused[claim.id] = StaleAttempt(
                        f"step {claim.id}: attempt {claim.attempt} does not own it any more"
                    )
        found = self._call([one for one in done if one.claim.kind != StepKind.ITEM], current, **wanted)
        taken = {claim.id for claim in found.claims}  # of these nobody need be told
        found.wakeups = [wakeup for wakeup in recorded.wakeups if wakeup.id not in taken] + found.wakeups
        found.refused |= recorded.refused
        return found

    def _work(self, **wanted: Any) -> Work:
        runtime, token = self.runtime, str(uuid.uuid4())
        began = time.monotonic()
        found = runtime.patient_store.run_alone(
            work.work, worker_id=runtime.worker_id, pid=self._pid, token=token, **wanted
        )
        self._statement_seconds = time.monotonic() - began
        return found

    def _one_by_one(self, done: Sequence[Done], current: str | None) -> Work:
        """Record results each in a transaction of its own: what is unusual, or is refused by Postgres."""
        store = self.runtime.patient_store
        recorded = Work()
        for claim, result in done:
            try:
                recorded.wakeups += store.run(steps.complete, claim.id, claim.attempt, result)
            except StaleAttempt as exc:
                recorded.refused[claim.id] = exc
            except DBAPIError as exc:
                # What Postgres refuses for good: with this result, a group's are together larger than it can hold, say.
                recorded.refused[claim.id] = exc
                if claim.id != current:
                    bad = EncodeError(f"the result cannot be recorded: {first_line(exc)}")
                    error = self.runtime.app.backend.encoded_error(bad)
                    recorded.wakeups += store.run(steps.fail, claim.id, claim.attempt, error)
        return recorded


def _offered(found: Any) -> Own | None:
    """Return the step that was offered; None for what no publisher of ours has written, for anybody may write."""
    header = readable_header(found)
    task = header.get("task") if header is not None else None
    if header is None or not isinstance(task, str) or not storable(task):
        return None
    return Own(header["step"], header["attempt"], task)


def _apart(done: list[Done]) -> list[list[Done]]:
    """Part results so that no part has members of two groups of one run, whose joins must be taken one by one."""
    parts: list[tuple[dict[str, int], list[Done]]] = [({}, [])]
    for one in done:
        run_id, join_no = one.claim.run_id, one.claim.join_no
        if join_no is None:
            parts[-1][1].append(one)
            continue
        for joins, part in parts:
            if joins.setdefault(run_id, join_no) == join_no:
                part.append(one)
                break
        else:
            parts.append(({run_id: join_no}, [one]))
    return [part for _, part in parts]


class Pace:
    """How long the steps of this process have taken of late, and so how many to claim at once."""

    def __init__(self) -> None:
        self.steps_at_once = 1
        #: How long each of the last ones took.
        self._each = math.inf
        self._began_at, self._steps = 0.0, 0
        #: When this process's last slice ended.
        self.ended_at = 0.0

    def began(self, steps: int) -> None:
        """So many steps were claimed, and begin."""
        self._began_at, self._steps = time.monotonic(), steps

    def ended(self) -> None:
        """They have ended."""
        if self._steps:
            self._each = (time.monotonic() - self._began_at) / self._steps
            fitting = int(_BATCH_SECONDS / max(self._each, 1e-6))
            self.steps_at_once = max(1, min(fitting, 2 * self.steps_at_once, _MOST_AT_ONCE))
            self._steps = 0

    def slow_down(self) -> None:
        """A step took longer than those before it: claim one at a time again."""
        self.steps_at_once, self._steps, self._each = 1, 0, math.inf

    def is_easy(self, steps: int, most: int, statement_seconds: float) -> bool:
        """Tell whether so many steps are all that there is, and take little time beside the statement that claims."""
        return 0 < steps < most and steps * self._each <= _EASY * statement_seconds


class _Watch(threading.Thread):
    """Looks, while a slice is under way, whether one of its steps takes its time."""

    def __init__(self) -> None:
        super().__init__(name="byrd-watch", daemon=True)
        self._on = threading.Event()
        self._slice: Slice | None = None

    def begin(self, begun: Slice) -> None:
        """Watch a slice from now on."""
        self._slice = begun
        self._on.set()

    def end(self) -> None:
        """Stop watching."""
        self._on.clear()
        self._slice = None

    def run(self) -> None:
        while True:
            self._on.wait()
            time.sleep(HOLD_SECONDS)
            watched = self._slice
            try:
                if watched is not None:
                    watched.look()
            except Exception:
                log.exception("a slice could not be looked after; recovery will see to its steps")


class _OfProcess(NamedTuple):
    pid: int
    watch: _Watch
    pace: Pace


_own: _OfProcess | None = None


def _of_this_process() -> _OfProcess:
    global _own  # noqa: PLW0603 - a forked process inherits no thread, and has a pace of its own
    if _own is None or _own.pid != os.getpid():
        _own = _OfProcess(os.getpid(), _Watch(), Pace())
        _own.watch.start()
    return _own


def _watch() -> _Watch:
    return _of_this_process().watch


def _pace() -> Pace:
    return _of_this_process().pace
