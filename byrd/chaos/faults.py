"""What is done to workers, Redis, Postgres and messages; each fault says which attempts it hit, and when."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from random import Random
from typing import Any, TypeVar

from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from byrd.chaos.targets import OwnWorkers, Server, children_of, is_local, named_workers, signal_tree
from byrd.chaos.tasks import PREFIX, QUEUE
from byrd.errors import NotLiveError
from byrd.store import Store, WorkerRow, sweeps
from byrd.store.rows import query

#: For so long a fault looks for something to hit: a worker that lives, a step that runs.
_AIM_SECONDS = 30.0
_BUSY_SECONDS = 5.0
#: How often messages are looked at.
_MESSAGE_SECONDS = 0.1
#: A frozen worker sleeps for its lease and this much longer.
_OVERSLEEP_SECONDS = 3.0

T = TypeVar("T")
Hit = tuple[str, int]
"""A step, and the number of the attempt at it that was hit."""


class Kind(StrEnum):
    """The kinds of faults."""

    WORKER_KILLED = "worker_killed"
    CHILD_KILLED = "child_killed"
    WORKER_STOPPED = "worker_stopped"
    WORKER_FROZEN = "worker_frozen"
    REDIS_FLUSHED = "redis_flushed"
    REDIS_RESTARTED = "redis_restarted"
    POSTGRES_RESTARTED = "postgres_restarted"
    MESSAGES_DROPPED = "messages_dropped"
    MESSAGES_DUPLICATED = "messages_duplicated"


#: What ends attempts: an attempt that was cut short by one of these has a reason to be repeated.
ON_WORKERS = frozenset({Kind.WORKER_KILLED, Kind.CHILD_KILLED, Kind.WORKER_STOPPED, Kind.WORKER_FROZEN})
#: After these the next start of any step counts, from the moment at which the server answered again.
ON_SERVERS = frozenset({Kind.REDIS_RESTARTED, Kind.POSTGRES_RESTARTED})


@dataclass(frozen=True, slots=True)
class Victim:
    """A worker that was hit: one life of it, for its name outlives it."""

    hostname: str
    worker_id: str
    #: Its pool process, where that alone was hit.
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that was injected.  ``at``, by Postgres's clock: the fault; or when the server answered again."""

    kind: Kind
    what: str
    at: datetime
    #: What ran on the worker, what waited for the server, or whose message was lost.
    hits: tuple[Hit, ...] = ()
    victim: Victim | None = None
    #: When a server went away.
    since: datetime | None = None
    #: When a frozen worker woke; what it has claimed after that was not hit.
    until: datetime | None = None
    #: What was under way when Postgres went away.
    running: tuple[Hit, ...] = ()

    @property
    def hit(self) -> int:
        """How many steps it hit."""
        return len(self.hits) + len(self.running)


@dataclass(slots=True)
class Field:
    """What may be touched, and how to reach it."""

    store: Store
    own: OwnWorkers | None
    named: Sequence[str]
    #: A client of the broker, where the broker is Redis.
    redis: Any
    redis_server: Server | None
    postgres_server: Server | None
    lease_seconds: float
    outage_seconds: float
    #: A fault may come before what the one before it hit has gone on.
    overlap: bool
    random: Random
    #: Set when the session is to end.
    told: threading.Event
    #: Postgres's clock minus this one's.
    skew: timedelta = timedelta()
    #: Workers of our own that ended by themselves.
    died: list[str] = field(default_factory=list)
    #: Chooses among what is there, which depends on time: that must not change what ``random`` gives.
    chance: Random = field(default_factory=Random)

    def now(self) -> datetime:
        """Return the time by Postgres's clock, whether it answers or not."""
        return datetime.now(UTC) + self.skew

    def victims(self) -> list[WorkerRow]:
        """Return the live workers that may be touched, in any order; those that stop already come last."""
        rows = self.store.run(sweeps.list_workers)
        pids = self.own.pids() if self.own else set()
        found = [row for row in rows if row.alive and row.pid in pids and row.hostname.startswith("chaos-")]
        # One that has just ended has its lease for a while.
        found += [row for row in named_workers(self.named, [row for row in rows if row not in found]) if is_local(row)]
        self.chance.shuffle(found)
        return sorted(found, key=lambda row: row.stopping)

    def aim(self) -> WorkerRow | None:
        """Return a worker to hit, one that runs something if there is one soon; None when there is none for long."""
        busy = self.hunt(lambda: next((row for row in self.victims() if row.running), None), _BUSY_SECONDS)
        return busy or self.hunt(lambda: next(iter(self.victims()), None), _AIM_SECONDS)

    def hunt(self, find: Callable[[], T | None], seconds: float) -> T | None:
        """Look for something to hit until it is found, the time is over, or there is nothing left that may be hit."""
        found: list[T | None] = []

        def look() -> bool:
            found.append(find())
            return found[-1] is not None or self._nobody_is_left()

        self.wait_for(look, seconds)
        return found[-1]

    def _nobody_is_left(self) -> bool:
        """Tell whether there is no worker to hit, and none will come: a process id belongs to one worker only."""
        return not self.own and all(name.isdigit() for name in self.named) and not self.victims()

    def wait_for(self, condition: Callable[[], T], seconds: float) -> T:
        """Ask until the answer is true, the time is over, or the session is to end; return the last answer."""
        deadline = time.monotonic() + seconds
        while True:
            found = condition()
            if found or time.monotonic() > deadline or self.told.wait(0.05):
                return found


# -- workers ---------------------------------------------------------------------------------------


def kill_worker(on: Field) -> list[Fault]:
    """SIGKILL a worker and its pool."""
    row = on.aim()
    if row is None:
        return []
    at = on.now()
    signal_tree(row.pid, signal.SIGKILL)
    return [_killed(on, row, at)]


def _victim(row: WorkerRow, pid: int | None = None) -> Victim:
    return Victim(row.hostname, row.id, pid)


def _killed(on: Field, row: WorkerRow, at: datetime, *, when: str = "") -> Fault:
    """Say what the death of a worker hit; start it again if it is our own."""
    hits = on.store.run(_running, row.id)
    if on.own and on.own.owns(row.pid):
        on.own.wait_gone(row.pid)
        on.own.start()
    return Fault(Kind.WORKER_KILLED, f"SIGKILL to {row.hostname}, process {row.pid}{when}", at, hits, _victim(row))


def kill_child(on: Field) -> list[Fault]:
    """SIGKILL a pool process that runs a step of the load."""

    def aim() -> tuple[WorkerRow, int] | None:
        for row in on.victims():
            pids = on.store.run(_busy_pids, row.id)
            alive = sorted(set(pids) & set(children_of(row.pid)))
            if alive:
                return row, on.chance.choice(alive)
        return None

    found = on.hunt(aim, _AIM_SECONDS)
    if found is None:
        return []
    row, pid = found
    at = on.now()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    hits = on.store.run(_running, row.id, pid)
    return [Fault(Kind.CHILD_KILLED, f"SIGKILL to process {pid} of {row.hostname}", at, hits, _victim(row, pid))]


def stop_worker(on: Field) -> list[Fault]:
    """SIGTERM a worker: a warm shutdown, as in a deploy."""
    row = on.aim()
    if row is None:
        return []
    at, hits = on.now(), on.store.run(_running, row.id)
    with suppress(ProcessLookupError):
        os.kill(row.pid, signal.SIGTERM)
    if on.own and on.own.owns(row.pid):
        on.own.wait_gone(row.pid)
        on.own.start()
    return [Fault(Kind.WORKER_STOPPED, f"SIGTERM to {row.hostname}, process {row.pid}", at, hits, _victim(row))]


def freeze_worker(on: Field) -> list[Fault]:
    """SIGSTOP a worker for longer than its lease, then let it go on."""
    row = on.aim()
    if row is None:
        return []
    at, frozen = on.now(), [row.pid]
    try:
        frozen = signal_tree(row.pid, signal.SIGSTOP)
        hits = on.store.run(_running, row.id)
        on.told.wait(on.lease_seconds + _OVERSLEEP_SECONDS)
    finally:  # its pool, too, if somebody has killed the main process meanwhile
        signal_tree(row.pid, signal.SIGCONT, also=frozen)
    what = f"SIGSTOP, then SIGCONT, to {row.hostname}"
    return [Fault(Kind.WORKER_FROZEN, what, at, hits, _victim(row), until=on.now())]


def _running(conn: Connection, worker_id: str, pid: int | None = None) -> tuple[Hit, ...]:
    rows = query(
        conn,
        """SELECT s.id, s.attempt FROM byrd.steps s WHERE s.status = 'running' AND s.worker_id = %(worker)s
              AND (%(pid)s::int IS NULL OR s.pid = %(pid)s)""",
        {"worker": worker_id, "pid": pid},
    )
    return tuple((row.id, row.attempt) for row in rows)


def _busy_pids(conn: Connection, worker_id: str) -> list[int]:
    rows = query(
        conn,
        """SELECT DISTINCT s.pid FROM byrd.steps s WHERE s.status = 'running' AND s.worker_id = %(worker)s
              AND starts_with(s.task, %(prefix)s) AND s.pid IS NOT NULL""",
        {"worker": worker_id, "prefix": PREFIX},
    )
    return [row.pid for row in rows]


# -- servers ---------------------------------------------------------------------------------------


def flush_redis(on: Field) -> list[Fault]:
    """Empty the broker's database."""
    with on.redis.pipeline(transaction=True) as pipe:
        pipe.lrange(QUEUE, 0, -1)
        pipe.flushdb()
        at = on.now()
        messages = pipe.execute()[0]
    return [Fault(Kind.REDIS_FLUSHED, f"{len(messages)} messages of the load flushed", at, hits_of(messages))]


def restart_redis(on: Field) -> list[Fault]:
    """Stop Redis, wait a little, start it."""
    outage = _outage(on, on.redis_server, hard=True)
    on.wait_for(lambda: _answers(on.redis.ping), 60.0)
    at, hits = on.now(), on.store.run(_ready)
    what = f"Redis was away for {outage.seconds:.1f} s"
    return [Fault(Kind.REDIS_RESTARTED, what, at, hits, since=outage.since), *outage.deaths(on)]


def restart_postgres(on: Field) -> list[Fault]:
    """Stop Postgres, wait a little, start it."""
    hard = on.random.random() < 0.5  # a shutdown in order, or a crash
    waiting, running = on.store.run(_at_stake)  # nobody can ask while it is away
    outage = _outage(on, on.postgres_server, hard=hard)
    on.wait_for(lambda: _answers(lambda: on.store.run(sweeps.postgres_uptime)), 60.0)
    what = f"Postgres {'crashed' if hard else 'stopped'}, and was away for {outage.seconds:.1f} s"
    fault = Fault(Kind.POSTGRES_RESTARTED, what, on.now(), waiting, since=outage.since, running=running)
    return [fault, *outage.deaths(on)]


@dataclass(frozen=True, slots=True)
class _Outage:
    """When and for how long a server was away, and the worker that was killed meanwhile, if one was."""

    since: datetime
    seconds: float
    killed: tuple[WorkerRow, datetime] | None

    def deaths(self, on: Field) -> list[Fault]:
        """Return the fault that hit a worker during the outage."""
        return [_killed(on, *self.killed, when=" during the outage")] if self.killed else []


def _outage(on: Field, server: Server | None, *, hard: bool) -> _Outage:
    """Take a server away for a time; where faults may overlap, kill a worker meanwhile, every second time."""
    if server is None:
        raise AssertionError("a fault for a server that may not be touched")
    victims = on.victims() if on.overlap and on.random.random() < 0.5 else []
    seconds, killed = on.random.uniform(0.2, 1.0) * on.outage_seconds, None
    began, since = time.monotonic(), on.now()
    try:
        server.stop(hard=hard)
        on.told.wait(seconds / 2)
        if victims and is_local(victims[0]) and not on.told.is_set():
            killed = (victims[0], on.now())
            signal_tree(victims[0].pid, signal.SIGKILL)
        on.told.wait(seconds / 2)
    finally:
        server.start()
    return _Outage(since, time.monotonic() - began, killed)


def _answers(call: Callable[[], object]) -> bool:
    try:
        call()
    except (OSError, BrokerError, NotLiveError, DBAPIError):
        return False
    except Exception as exc:
        if type(exc).__module__.startswith("redis"):
            return False
        raise
    return True


def _ready(conn: Connection) -> tuple[Hit, ...]:
    return _at_stake(conn)[0]


def _at_stake(conn: Connection) -> tuple[tuple[Hit, ...], tuple[Hit, ...]]:
    """Return the steps of the load that are due and wait to be started, and those that are running."""
    rows = query(
        conn,
        """SELECT s.id, s.attempt, s.status FROM byrd.steps s WHERE starts_with(s.task, %(prefix)s)
              AND (s.status = 'running'
                   OR s.status = 'ready' AND s.wake_at < 'infinity' AND s.run_at <= clock_timestamp())""",
        {"prefix": PREFIX},
    ).all()
    waiting = tuple((row.id, row.attempt) for row in rows if row.status == "ready")
    return waiting, tuple((row.id, row.attempt) for row in rows if row.status == "running")


# -- messages --------------------------------------------------------------------------------------


def hits_of(messages: Iterable[bytes]) -> tuple[Hit, ...]:
    """Return the steps that messages of the load would wake, with their last attempts."""
    found = []
    for raw in messages:
        with suppress(ValueError, KeyError, TypeError):
            header = json.loads(raw)["headers"]["byrd"]
            found.append((str(header["step"]), int(header["attempt"])))
    return tuple(found)


class Meddler(threading.Thread):
    """Drops and duplicates messages of the load, from outside, while it runs."""

    def __init__(self, on: Field, *, drop: float, duplicate: float, seed: int) -> None:
        super().__init__(name="byrd-chaos-messages", daemon=True)
        self._on, self._drop, self._duplicate = on, drop, duplicate
        self._random = Random(seed)  # noqa: S311 - no secret
        self._told = threading.Event()
        self._seen: set[bytes] = set()
        self.faults: list[Fault] = []
        self.duplicated = self.dropped = 0

    def stop(self) -> None:
        """Leave the messages alone."""
        self._told.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        while not self._told.wait(_MESSAGE_SECONDS):
            _answers(self._meddle)

    def _meddle(self) -> None:
        queued: set[bytes] = set(self._on.redis.lrange(QUEUE, 0, -1))
        fresh = queued - self._seen
        self._seen = queued
        for raw in sorted(fresh):
            dice = self._random.random()
            if dice < self._drop:
                at = self._on.now()
                if self._on.redis.lrem(QUEUE, 1, raw):
                    self.dropped += 1
                    self.faults.append(Fault(Kind.MESSAGES_DROPPED, "a message dropped", at, hits_of([raw])))
            elif dice < self._drop + self._duplicate:
                self._on.redis.lpush(QUEUE, raw)
                self.duplicated += 1
