"""The threads beside a worker's pool: one keeps the lease, one records, one sweeps (relay and recovery).

Each of its own, because neither a run that somebody has to himself nor a broker that hangs may cost the lease.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from byrd.errors import IllegalTransitionError, NotLiveError, StaleAttempt
from byrd.store import Store, Wakeup, children, limits, runs, steps, sweeps, termination, timeouts, waits
from byrd.store.database import exceeds_limit, is_outage, is_race
from byrd.store.flow import RESEND_SECONDS
from byrd.store.rows import CHANNEL
from byrd.task.publisher import MOST_READ
from byrd.task.runtime import Runtime
from byrd.worker.clock import ServerClock
from byrd.worker.loop import Loop
from byrd.worker.notifier import Notifier
from byrd.worker.overdue import OverdueWatch
from byrd.worker.terminator import Terminator

log = logging.getLogger(__name__)

#: How often a worker looks whether one of its pool processes has died.
CHILD_SECONDS = 0.25
#: So many batches of waits are ended, or of places given, before the sweeper does something else.
_ROUNDS = 10
#: So often keys of limits that nobody uses any more are looked for.
_FORGET_SECONDS = 60.0
#: If nobody takes the steps that others were woken for, they are woken again at ever longer intervals up to this.
_LONGEST_PAUSE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _Woken:
    """Steps for which somebody was woken, and when that may be done again, in monotonic seconds."""

    ids: frozenset[str]
    pause: float
    until: float


_NOBODY = _Woken(frozenset(), 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Settings:
    """``lease_seconds``: how long a worker may be silent before its steps are given to others.

    ``sweep_seconds``: how often the relay and recovery look.  ``max_preemptions``: how often a step may lose its
    worker before it is failed.
    """

    lease_seconds: float = 6.0
    sweep_seconds: float = 0.5
    max_preemptions: int = steps.MAX_PREEMPTIONS

    @property
    def heartbeat_seconds(self) -> float:
        """Three heartbeats to a lease: two may be lost."""
        return self.lease_seconds / 3


class Recorder(Loop):
    """Records what this worker's main process knows of its steps, in that order; it may have to wait for a run."""

    def __init__(self, runtime: Runtime, publish_soon: Callable[[], None]) -> None:
        super().__init__("byrd-recorder")
        self.runtime = runtime
        self._publish_soon = publish_soon

    def tick(self) -> float:
        self.record()
        if self.runtime.outbox:
            self._publish_soon()
        return CHILD_SECONDS

    def finish(self) -> None:
        """End the thread, and record what it has left, if Postgres is there."""
        self.stop()
        if not self._thread.is_alive():
            with contextlib.suppress(NotLiveError, DBAPIError):
                self.record()

    def record(self) -> None:
        """Do all chores."""
        chores = self.runtime.chores
        while chores:
            chore = chores.popleft()
            try:
                self.runtime.outbox.extend(chore())
            except StaleAttempt as exc:
                log.info("nothing to record: %s", exc)
            except Exception as exc:
                if isinstance(exc, NotLiveError) or is_outage(exc) or is_race(exc):
                    chores.appendleft(chore)  # Postgres is away: this one comes first again
                    raise
                log.exception("an outcome could not be recorded; recovery will see to its step")


class Keeper(Loop):
    """Keeps this worker's lease, and has the steps of pool processes that have died given back."""

    def __init__(
        self,
        runtime: Runtime,
        settings: Settings,
        *,
        worker_id: str,
        hostname: str,
        pool: str,
        concurrency: int,
        queues: Callable[[], Sequence[str]],
        children: Callable[[], Sequence[int]] = lambda: (),
        shares: Callable[[], Sequence[str]] = lambda: (),
        listened: Callable[[], bool] = lambda: False,
        busy: Callable[[], set[int] | None] = lambda: None,
        publish_soon: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__("byrd-keeper")
        #: Set by remote control: what others may know of this worker has changed.
        self.changed = False
        #: Set by a signal handler, which must not wait for Postgres.
        self.told_to_stop = False
        self.runtime, self.settings, self.worker_id = runtime, settings, worker_id
        self._identity: dict[str, Any] = {
            "hostname": hostname,
            "pid": os.getpid(),
            "pool": pool,
            "concurrency": concurrency,
            "version": version("byrd"),
        }
        self._queues, self._children, self._shares = queues, children, shares
        self._listened, self._busy = listened, busy
        #: What runs in processes that were seen to run nothing.
        self._unclaimed: set[tuple[int, str, int]] = set()
        self._next_heartbeat = 0.0
        #: The pool's processes as they were the last time, and those of them that were seen to be gone.
        self._seen: set[int] = set()
        self._gone: set[int] = set()
        self._recorder = Recorder(runtime, publish_soon)
        # The engine's own connections may all be in use, by a pool of threads that submit, say.
        self.store = Store(runtime.store.url, pool_size=1)
        self._terminator = Terminator(runtime, self.store, worker_id, children=children, has_exited=has_exited)
        self._overdue = OverdueWatch(runtime, self.store, worker_id, max_preemptions=settings.max_preemptions)

    def start(self) -> None:
        super().start()
        self._recorder.start()

    def heartbeat(self) -> None:
        """Prolong the lease, registering the worker when it is not known (yet, or any more)."""
        self.store.run(
            sweeps.heartbeat,
            self.worker_id,
            lease_seconds=self.settings.lease_seconds,
            queues=list(self._queues()),
            tasks=sorted(name for name in self.runtime.app.tasks if not name.startswith("celery.")),
            shares=list(self._shares()),
            **self._identity,
        )

    def tick(self) -> float:
        if self.told_to_stop:
            self.store.run(sweeps.stop_worker, self.worker_id)
            self.told_to_stop = False
        self.runtime.listened = self._listened()
        # Those of the last time, too: the pool may have replaced one since it died.
        seen, before = set(self._children()), self._seen
        gone = {pid for pid in seen | before if has_exited(pid)}
        unknown, self._gone, self._seen = gone - self._gone, gone, seen
        if self.changed or time.monotonic() >= self._next_heartbeat:
            self.changed = False
            self._next_heartbeat = time.monotonic() + self.settings.heartbeat_seconds
            self.heartbeat()
            # Those whose steps somebody was just writing, and processes that the pool has replaced meanwhile.
            unknown |= {pid for pid in self.store.run(sweeps.running_pids, self.worker_id) if has_exited(pid)}
            self._look_for_unclaimed()
        for pid in unknown:
            # After what is known of its step, that it ran into its time limit, say.
            self.runtime.later(
                steps.preempt,
                self.worker_id,
                pid=pid,
                reason=f"pool process {pid} is gone",
                max_preemptions=self.settings.max_preemptions,
            )
        self._terminator.look()
        self._overdue.look()
        return CHILD_SECONDS

    def _look_for_unclaimed(self) -> None:
        """Have steps given back that a call claimed whose answer was lost, for a process that has nothing to do since.

        One that has something finds them by itself.
        """
        busy = self._busy()
        if busy is None:
            self._unclaimed = set()
            return
        idle = {one for one in self.store.run(sweeps.running_attempts, self.worker_id) if one[0] not in busy}
        for pid, step_id, attempt in idle & self._unclaimed:
            self.runtime.later(
                steps.preempt,
                self.worker_id,
                pid=pid,
                step=(step_id, attempt),
                reason="it was claimed for a process that never heard of it",
                max_preemptions=self.settings.max_preemptions,
            )
        self._unclaimed = idle

    def stopping(self) -> None:
        """Let the checkpoints of this worker's steps hand back; keep the lease while the pool drains."""
        self._try(sweeps.stop_worker, self.worker_id)

    def release(self, reason: str) -> None:
        """End the lease: what still runs here is given to others at once."""
        self.stop()
        self._recorder.finish()
        wakeups = self._try(
            sweeps.release_worker, self.worker_id, reason=reason, max_preemptions=self.settings.max_preemptions
        )
        self.store.close()
        self.runtime.publisher.publish([*self.runtime.outbox, *(wakeups or [])])

    def _try(self, statement: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return self.store.run(statement, *args, **kwargs)
        except (NotLiveError, DBAPIError) as exc:
            log.warning("Postgres could not be told that this worker stops (%s); its lease will run out instead", exc)
            return None


class Sweeper(Loop):
    """Relay and recovery: publishes ready steps that nobody has been told of, and finds work whose owner is gone.

    Any number may run: advisory locks let one at a time publish what has become due, and one recover.  What is looked
    at again is locked step by step, and no two take the same.
    """

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        super().__init__("byrd-sweeper")
        self.runtime, self.settings = runtime, settings
        # Without patience: this one has to notice each outage, however short, before it gives anybody up.
        self.store = Store(runtime.store.url, patience=0.0, pool_size=2)
        self._notifier = Notifier(runtime)
        self._listening: Connection | None = None
        self._bell, self._rope = socket.socketpair()
        self._rope.setblocking(False)
        self._well_since = self._last_tick = time.monotonic()
        self._last_recovery = self._last_look = 0.0
        self._last_forgetting = time.monotonic()
        self._clock = ServerClock()
        self._clock_went_back: bool | None = None  # nobody may have been there to see it
        self._knows_broker = False
        #: Whether wake-ups enough for all that waits are in the broker; then nobody need look again soon.
        self._enough = False
        #: For which steps of a queue, that need no messages of their own, somebody was woken last.
        self._woken: dict[str, _Woken] = {}
        # Several databases may share a Redis.
        where = f"{self.store.url.host}:{self.store.url.port}/{self.store.url.database}"
        self._mark = f"byrd.relay.{hashlib.sha256(where.encode()).hexdigest()[:16]}"

    def start(self) -> None:
        super().start()
        self._notifier.start()

    def tick(self) -> float:
        now, before = time.monotonic(), self._last_tick
        self._last_tick = now
        if now - before > self.settings.lease_seconds + self.settings.sweep_seconds:
            self._well_since = now  # this process was frozen, and so may have been the others, with their machine
        try:
            self._listen()
            try:
                self.recover()
                self.follow_children()
                self.end_waits()
                self.give_places()
            finally:  # what recovery cannot do, for it takes too long, say, must not hold up what is ready
                self.relay()
            self._last_tick = time.monotonic()  # a broker that hangs is no frozen process
            return self.store.run(
                sweeps.seconds_until_due, at_most=self.settings.sweep_seconds, shared=not self._enough
            )
        except (NotLiveError, DBAPIError) as exc:
            if not exceeds_limit(exc):
                # The others could not reach Postgres either, perhaps: give them time for a heartbeat.
                self._well_since = time.monotonic()
            self._unlisten()
            raise

    def rest(self, seconds: float) -> None:
        connection = self._listening
        if connection is None or seconds <= 0:
            super().rest(seconds if seconds > 0 else 0.02)
            return
        raw: Any = connection.connection.driver_connection
        try:
            heard = select.select([raw, self._bell], [], [], seconds)[0]
            if raw in heard:
                raw.poll()
                raw.notifies.clear()
            if self._bell in heard:
                self._bell.recv(4096)
        except Exception:  # noqa: BLE001 - a broken connection: the next round finds out
            self._unlisten()
            super().rest(0.1)

    def wake(self) -> None:
        """Begin the next round now: there is something to publish."""
        with contextlib.suppress(OSError):  # it has been rung often enough, or the worker is gone
            self._rope.send(b"!")

    def stop(self, timeout: float = 5.0) -> None:
        super().stop(timeout)
        self._notifier.stop(timeout)
        self._unlisten()
        self._bell.close()
        self._rope.close()
        self.store.close()

    def relay(self) -> int:
        """Publish what is due; return how many wake-ups went out."""
        store, publisher = self.store, self.runtime.publisher
        outbox = self.runtime.outbox
        self._look_for_losses()
        publisher.publish([outbox.popleft() for _ in range(len(outbox))])
        due = store.run(sweeps.take_due)
        publisher.publish(due, offer=False)  # what was offered before may have been lost
        sent = len(due)
        self._enough = False
        shared: set[str] = set()
        for solo in (True, False):
            for queue, overdue in store.run(sweeps.overdue_queues, solo=solo).items():
                # Each wake-up in the broker will find one of the ready steps; only what is missing there was lost.
                depth = publisher.depth(queue)
                if depth is None:
                    return sent  # the broker is away: it would be for the other queues, too
                room = None if solo else publisher.room(queue)
                if room is None:
                    lost = self._lost(queue, overdue, depth, solo=solo)
                    sent += len(lost) if self._sent_again(lost) else 0
                else:
                    shared.add(queue)
                    sent += self._wake_for(queue, min(overdue, room))
        self._woken = {queue: woken for queue, woken in self._woken.items() if queue in shared}
        return sent

    def _lost(self, queue: str, overdue: int, depth: int, *, solo: bool) -> list[Wakeup]:
        """Return what is to be sent again of a queue whose steps have each a message of their own."""
        store = self.store
        late = store.run(sweeps.late_steps, queue, solo=solo, limit=overdue)
        attempts = {step_id: found.attempt for step_id, found in late.items()}
        if depth <= MOST_READ and (missing := self.runtime.publisher.missing(queue, attempts)) is not None:
            return store.run(sweeps.look_again, late, missing)
        waiting = store.run(sweeps.sent_and_waiting, queue, solo=solo, at_most=depth + overdue)
        # No more than were counted: what is overdue only since then would be put off, as if its message were there.
        return store.run(sweeps.take_overdue, queue, solo=solo, resend=max(0, waiting - depth), limit=overdue)

    def _wake_for(self, queue: str, most: int) -> int:
        """See that somebody wakes up for what is overdue in a queue whose steps need no messages of their own."""
        self._enough = True  # they stay overdue until somebody takes them
        now, last = time.monotonic(), self._woken.get(queue, _NOBODY)
        if now < last.until:
            return 0
        self.store.run(sweeps.make_solo, queue)
        again: list[Wakeup] = self.store.run(sweeps.take_oldest, queue, limit=most) if most else []
        if not again or not self._sent_again(again):
            self._woken[queue] = replace(last, until=now + self.settings.sweep_seconds)
            return 0
        ids = frozenset(wakeup.id for wakeup in again)
        # Where others are taken it is not in vain.
        pause = min(_LONGEST_PAUSE_SECONDS, 2 * last.pause) if ids <= last.ids else RESEND_SECONDS
        self._woken[queue] = _Woken(ids, pause, now + pause)
        return len(again)

    def _sent_again(self, wakeups: list[Wakeup]) -> bool:
        """Publish what was taken to be sent again; if the broker does not take it, it was not sent."""
        if self.runtime.publisher.publish(wakeups, offer=False):
            return True
        self.store.run(sweeps.not_sent, [wakeup.id for wakeup in wakeups])
        return False

    def _look_for_losses(self) -> None:
        """Notice that Redis lost everything: else each step would wait until it is looked at again, up to 5 min."""
        if time.monotonic() - self._last_look < self.settings.sweep_seconds:
            return
        self._last_look = time.monotonic()
        publisher = self.runtime.publisher
        marked = publisher.is_marked(self._mark)
        if marked is None or (marked and self._knows_broker):
            return
        # A broker that is new has lost nothing.  It is marked last: whoever dies before that leaves it to the others,
        # and to look twice costs a few messages only.
        if not marked and self.store.run(sweeps.knows_broker, self._mark):
            self._woken.clear()
            if lost := self.store.run(sweeps.doubt_all):
                log.warning("the broker has lost its messages; %d steps that wait are looked at again", lost)
        self.store.run(sweeps.know_broker, self._mark)
        self._knows_broker = True
        if not marked:
            publisher.is_marked(self._mark, leave=True)

    def recover(self) -> None:
        """Give the steps of workers whose lease is over to others, end what is over time: runs, and steps to start."""
        store, lease = self.store, self.settings.lease_seconds
        if time.monotonic() - self._last_recovery < min(1.0, lease / 4):
            return
        self._last_recovery = time.monotonic()
        self._look_at_the_clock()
        # While Postgres was away nobody could prolong a lease: that alone makes no worker dead.
        if time.monotonic() - self._well_since < lease:
            return
        lost, wakeups = store.run(sweeps.recover, max_preemptions=self.settings.max_preemptions)
        for hostname in lost:
            log.warning("the lease of worker %s ran out: its running steps are ready again", hostname)
        error = json.dumps({"exc_type": "RunTimeoutError", "exc_module": "byrd.errors", "exc_message": [_DEADLINE]})
        wakeups += store.run(sweeps.end_overdue_runs, error)
        for step_id in store.run(timeouts.unstarted):
            wakeups += store.run(steps.miss_start, step_id)
        self.runtime.publisher.publish(wakeups)
        self.stop_abandoned()

    def end_waits(self) -> None:
        """End the sleeps that are over, and what has its signal or has waited for it too long."""
        for _ in range(_ROUNDS):
            wakeups, busy, more = self.store.run(waits.end_due)
            self.runtime.publisher.publish(wakeups)
            for run_id in busy:
                self.runtime.publisher.publish(self.store.run(waits.end_due_of, run_id))
            if not more:
                return

    def follow_children(self) -> None:
        """Tell steps that wait for a run of their own when that has ended, or is undone."""
        for _ in range(_ROUNDS):
            told, unstuck = self.store.run(children.tell_parents)
            for one in unstuck:
                self.runtime.publisher.publish(self.store.run(children.go_on, one))
            if told < children.BATCH:
                return

    def stop_abandoned(self) -> None:
        """Cancel runs whose step has ended without them: it was revoked, say, or lost too many workers."""
        for child, outer in self.store.run(children.abandoned):
            by, grace = f"run {outer}", self.store.run(termination.grace_of, outer)
            with contextlib.suppress(IllegalTransitionError):  # it has ended meanwhile
                if grace is None:
                    wakeups = self.store.run(runs.cancel, child, by=by)
                else:
                    wakeups = self.store.run(termination.cancel, child, grace=grace, by=by)
                self.runtime.publisher.publish(wakeups)

    def give_places(self) -> None:
        """Tell those who wait for a limit when they may start, a little before it."""
        for _ in range(_ROUNDS):
            if self.store.run(limits.give_due) < limits.BATCH:
                break
        if time.monotonic() - self._last_forgetting > _FORGET_SECONDS:
            self._last_forgetting = time.monotonic()
            self.store.run(limits.forget_idle)

    def _look_at_the_clock(self) -> None:
        """Leases go by Postgres's clock.  Once it was stepped, or restarted, everybody gets time for a heartbeat."""
        change = self._clock.look(lambda: self.store.run(sweeps.clock))
        if change.stepped:
            log.warning("Postgres's clock was stepped by %+.0f s; leases and delays follow it", change.stepped)
        if change.stepped or change.restarted:
            self._well_since = time.monotonic()
        if self._clock_went_back is None:
            self._clock_went_back = self.store.run(sweeps.is_behind_history)
        self._clock_went_back |= change.behind
        if self._clock_went_back and self.store.run(sweeps.follow_clock_back):
            self._clock_went_back = False

    def _listen(self) -> None:
        if self._listening is not None or _is_green():
            return
        connection = self.store.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.exec_driver_sql(f"LISTEN {CHANNEL}")
        self._listening = connection

    def _unlisten(self) -> None:
        connection, self._listening = self._listening, None
        if connection is not None:
            connection.invalidate()
            connection.close()


_DEADLINE = "the run did not end before its deadline"


def has_exited(pid: int) -> bool:
    """Tell whether a process of this worker is gone; one that waits to be reaped by its pool is."""
    if pid == os.getpid():
        return False
    try:
        if hasattr(os, "waitid"):
            # WNOWAIT: look, but leave the reaping to the pool.
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        os.kill(pid, 0)
    except (ChildProcessError, ProcessLookupError):
        return True
    except PermissionError:
        return False
    return False


def _is_green() -> bool:
    """A gevent worker's select() must be gevent's, and psycopg2's wait goes through a callback: just poll there."""
    return getattr(select, "__name__", "") != "select" or "gevent" in getattr(select.select, "__module__", "")
