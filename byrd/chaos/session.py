"""A session of chaos: load, faults, drain, audit; whatever happens, what was stopped is started again."""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from byrd.chaos import faults as the
from byrd.chaos import ledger, tasks
from byrd.chaos.audit import audit
from byrd.chaos.facts import broken, open_runs
from byrd.chaos.faults import Fault, Field, Kind, Meddler
from byrd.chaos.report import Report
from byrd.chaos.submitter import Submission, Submitter
from byrd.chaos.targets import CommandServer, OwnWorkers, Server, check_local, named_workers
from byrd.engine import Byrd
from byrd.engine.words import count
from byrd.errors import ConfigurationError
from byrd.store import Store, WorkerRow, sweeps
from byrd.store.invariants import Broken
from byrd.store.rows import query
from byrd.worker.bootstep import settings_of

log = logging.getLogger(__name__)

#: After a fault, what it hit is waited for so long before the next.
_RECOVERY_SECONDS = 30.0
#: Workers of our own have to be up by then.
_START_SECONDS = 60.0
_Inject = Callable[[Field], list[Fault]]


@dataclass(frozen=True, slots=True)
class Options:
    """What may be touched, for how long, and how hard."""

    seconds: float = 60.0
    every: float = 2.0
    drain: float = 60.0
    outage: float = 3.0
    open_runs: int = 12
    #: Do not wait for recovery between two faults.
    overlap: bool = False
    seed: int = 0
    #: Workers of chaos's own, and workers that are named: node names (with * and ?), process ids, pid files.
    workers: int = 0
    concurrency: int = 2
    kill_workers: Sequence[str] = ()
    pause_workers: bool = False
    redis: tuple[str, str] | None = None
    postgres: tuple[str, str] | None = None
    flush_redis: bool = False
    drop: float = 0.0
    duplicate: float = 0.0
    #: Servers and workers are chaos's own: they may all be touched, and the database may be given a trigger.
    embedded: bool = False

    def check(self) -> None:
        """Raise :class:`ConfigurationError` unless something may be touched."""
        if not self.targets():
            raise ConfigurationError(
                "nothing may be touched, so nothing can be tried: name it, for example --workers 2, --kill-worker "
                "'celery@staging-*', --flush-redis, --stop-redis CMD --start-redis CMD, --drop 0.01; or --embedded, "
                "which has servers and workers of its own"
            )
        if self.drop + self.duplicate > 1:
            raise ConfigurationError("--drop and --duplicate together cannot be more than 1, which is every message")
        if self.pause_workers and not (self.workers or self.kill_workers):
            raise ConfigurationError("--pause-workers: which? Name them with --kill-worker, or start some (--workers)")

    def targets(self) -> list[str]:
        """Say what may be touched, one line each."""
        lines = []
        if self.workers:
            lines.append(f"{self.workers} workers of its own, {self.concurrency} processes each: started and killed")
        lines += [f"workers {name}: killed, with their pools, and told to stop" for name in self.kill_workers]
        if self.pause_workers:
            lines.append("these workers are also frozen (SIGSTOP) for longer than their lease")
        if self.embedded:
            lines.append("Redis and Postgres, embedded: stopped and crashed")
        lines += _server_lines("Redis", self.redis) + _server_lines("Postgres", self.postgres)
        if self.flush_redis:
            lines.append("Redis: the broker's database is flushed (FLUSHDB), whatever else is in it")
        if self.drop or self.duplicate:
            lines.append(f"messages in {tasks.QUEUE}: {self.drop:.1%} dropped, {self.duplicate:.1%} duplicated")
        return lines


def _server_lines(name: str, commands: tuple[str, str] | None) -> list[str]:
    return [f"{name}: stopped with `{commands[0]}`, started with `{commands[1]}`"] if commands else []


class Session:
    """One session on one engine.  ``say`` is told what happens, a line at a time."""

    def __init__(
        self,
        engine: Byrd,
        options: Options,
        *,
        own: OwnWorkers | None = None,
        redis_server: Server | None = None,
        postgres_server: Server | None = None,
        say: Callable[[str], None] = log.info,
    ) -> None:
        options.check()
        self._engine, self._options, self._own, self._say = engine, options, own, say
        self._redis_server = redis_server or (CommandServer(*options.redis) if options.redis else None)
        self._postgres_server = postgres_server or (CommandServer(*options.postgres) if options.postgres else None)
        self._told = threading.Event()
        self._name = f"chaos-{secrets.token_hex(4)}"
        self._faults: list[Fault] = []
        self._troubles: list[str] = []
        #: What broke an invariant before the session.
        self._known: frozenset[Broken] = frozenset()
        #: For the audit and for aiming: it waits through the outages that are made here.
        self._store = Store(engine.runtime.store.url, patience=120.0)

    def stop(self) -> None:
        """End the faults and the load soon; then drain and audit as ever."""
        self._told.set()

    def run(self) -> Report:
        """Run the session to its end; return what was found."""
        options, began = self._options, datetime.now(UTC)
        try:
            shapes = self._prepare()
            field = self._field()
            with self._workers(field):
                started = time.monotonic()
                submissions, meddler = self._storm(field, shapes)
                stormed, interrupted = time.monotonic(), self._told.is_set()
                self._drain(submissions)
                drained = time.monotonic()
                counts = Counter(str(fault.kind) for fault in self._faults)
                counts[Kind.MESSAGES_DUPLICATED] += meddler.duplicated
                found = audit(
                    self._store,
                    submissions,
                    self._faults,
                    why=self._why,
                    alone=options.embedded,
                    known=self._known,
                )
            report = Report(
                seed=options.seed,
                began=began,
                seconds=stormed - started,
                drain_seconds=drained - stormed,
                targets=options.targets(),
                faults=tuple(self._faults),
                counts={kind: number for kind, number in counts.items() if number},
                audit=found,
                troubles=(*self._troubles, *field.died),
                interrupted=interrupted,
            )
            if not report.failures:
                self._store.run(ledger.forget, [s.run_id for s in submissions if s.run_id])
            return report
        finally:
            self._store.close()

    # -- before ----------------------------------------------------------------------------------

    def _prepare(self) -> list[tasks.Shape]:
        """Give this process the load, and the database chaos's tables."""
        engine = self._engine
        engine.check_live()
        tasks.register(engine.app)
        shapes = tasks.shapes(engine.app)
        for shape in shapes:
            if shape.workflow not in engine.workflows:
                engine.workflow(shape.workflow)(shape.build)
        self._store.run(ledger.create, watch=self._options.embedded)
        self._known = frozenset(self._store.run(broken))
        return shapes

    def _field(self) -> Field:
        options = self._options
        now: datetime = self._store.run(_clock)
        return Field(
            store=self._store,
            own=self._own,
            named=options.kill_workers,
            redis=self._redis(),
            redis_server=self._redis_server,
            postgres_server=self._postgres_server,
            lease_seconds=settings_of(self._engine.app).lease_seconds,
            outage_seconds=options.outage,
            overlap=options.overlap,
            random=random.Random(options.seed),  # noqa: S311 - no secret, and the seed gives the same order again
            told=self._told,
            skew=now - datetime.now(UTC),
        )

    def _redis(self) -> Any:
        """Return a client of the broker, with all that the app's settings say of it; None where none is needed."""
        options = self._options
        if not (options.flush_redis or options.drop or options.duplicate or self._redis_server):
            return None
        connection = self._engine.app.connection_for_write()
        if connection.transport.driver_type != "redis":
            raise ConfigurationError(
                f"the broker is {connection.transport.driver_type}; flushing it, stopping it, and meddling with its "
                "messages are only for Redis"
            )
        return connection.default_channel.client

    @contextlib.contextmanager
    def _workers(self, field: Field) -> Iterator[None]:
        """Have the workers: our own, and those that are there."""
        if self._own is None:
            for row in named_workers(self._options.kill_workers, self._store.run(sweeps.list_workers)):
                check_local(row)
            self._await_workers(0.0)
            yield
            return
        self._say(f"Starting {len(self._own)} workers; their logs are in {self._own.folder}")
        try:
            self._own.start()
            self._await_workers(_START_SECONDS)
            yield
        finally:
            self._own.stop()

    def _await_workers(self, seconds: float) -> None:
        """Wait for live workers that know the load and consume its queue; raise if there are none."""
        deadline = time.monotonic() + seconds
        wanted = len(self._own) if self._own else 1
        while self._up() < wanted:
            if time.monotonic() >= deadline:
                where = f"; their logs are in {self._own.folder}" if self._own else ""
                raise ConfigurationError(
                    f"no live worker has the tasks of the load and consumes its queue{where}. Start one with "
                    f"`celery -A <app> worker -I byrd.chaos.load -Q celery,{tasks.QUEUE}`, or let chaos start its own: "
                    "--workers 2"
                )
            time.sleep(0.1)
        named = self._options.kill_workers
        if named and not named_workers(named, self._store.run(sweeps.list_workers)):
            raise ConfigurationError(f"no live worker is {' or '.join(named)}; `byrd workers` lists them")

    def _up(self) -> int:
        """Return how many live workers can run the load; of our own, if we have some."""
        rows = _able(self._store.run(sweeps.list_workers))
        return len(rows) if self._own is None else sum(row.pid in self._own.pids() for row in rows)

    # -- the storm -------------------------------------------------------------------------------

    def _storm(self, field: Field, shapes: Sequence[tasks.Shape]) -> tuple[list[Submission], Meddler]:
        """Load and faults, for the time that was asked, and until each kind of fault was injected once."""
        options = self._options
        submitter = Submitter(self._engine, shapes, name=self._name, at_most=options.open_runs, seed=options.seed)
        meddler = Meddler(field, drop=options.drop, duplicate=options.duplicate, seed=options.seed)
        submitter.start()
        if options.drop or options.duplicate:
            meddler.start()
        try:
            self._inject(field, time.monotonic() + options.seconds)
        finally:
            meddler.stop()
            submitter.stop()
            self._faults += meddler.faults
        if submitter.error is not None:
            self._troubles.append(f"the load ended early: {type(submitter.error).__name__}: {submitter.error}")
        return submitter.submissions, meddler

    def _inject(self, field: Field, until: float) -> None:
        """Inject one fault after another, each after the one before it has been recovered from, and a pause."""
        kinds, first = self._kinds(), True
        while not self._told.is_set() and (first or time.monotonic() < until):
            deck = list(kinds)
            field.random.shuffle(deck)
            for inject in deck:
                if not first and time.monotonic() >= until:
                    return
                if self._told.wait(self._options.every):
                    return
                self._check_own(field)
                self._one(field, inject)
            if not kinds:
                self._told.wait(max(0.0, until - time.monotonic()))
            first = False
        self._check_own(field)

    def _one(self, field: Field, inject: _Inject) -> None:
        found = inject(field)
        self._faults += found
        if not found and not self._told.is_set():
            self._say(f"nothing to hit for `{inject.__doc__}`: no worker that may be touched is alive")
        for fault in found:
            self._say(f"{fault.what}{self._aftermath(field, fault)}")
        if found and self._own is not None and not field.overlap:
            # A worker that still starts would make the next fault's figures its own.
            field.wait_for(lambda: self._up() >= len(self._own or ()), _START_SECONDS)

    def _aftermath(self, field: Field, fault: Fault) -> str:
        """Wait until what was hit has gone on; say so."""
        hit = f": {count(fault.hit, 'step')} hit" if fault.hit else ""
        if field.overlap:
            return hit
        began = time.monotonic()
        recovered = field.wait_for(lambda: self._store.run(_recovered, fault), _RECOVERY_SECONDS)
        after = f"went on {time.monotonic() - began:.1f} s later" if recovered else "has not gone on yet"
        return f"{hit}; {after}" if hit else f": {after}"

    def _check_own(self, field: Field) -> None:
        """Start workers of our own that ended by themselves, which none should."""
        if self._own is None:
            return
        while (name := self._own.dead()) is not None:
            field.died.append(f"worker {name} ended by itself; its log is in {self._own.folder}")
            self._say(field.died[-1])
            self._own.start()

    def _kinds(self) -> list[_Inject]:
        options = self._options
        found: list[_Inject] = []
        if self._own is not None or options.kill_workers:
            found += [the.kill_worker, the.kill_child, the.stop_worker]
            found += [the.freeze_worker] if options.pause_workers else []
        found += [the.flush_redis] if options.flush_redis else []
        found += [the.restart_redis] if self._redis_server else []
        found += [the.restart_postgres] if self._postgres_server else []
        return found

    # -- after -----------------------------------------------------------------------------------

    def _drain(self, submissions: Sequence[Submission]) -> None:
        """Wait until all runs have ended, for a bounded time."""
        self._say(f"No more faults; waiting for the runs that are open, at most {self._options.drain:.0f} s")
        deadline = time.monotonic() + self._options.drain
        while self._store.run(open_runs, submissions) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _why(self, run_id: str) -> list[str]:
        return self._engine.get(run_id).why()


def _able(rows: Sequence[WorkerRow]) -> list[WorkerRow]:
    """Return the live workers that can run the load."""
    return [
        row
        for row in rows
        if row.alive and not row.stopping and tasks.QUEUE in row.queues and f"{tasks.PREFIX}walk" in row.tasks
    ]


def _clock(conn: Connection) -> datetime:
    found: datetime = query(conn, "SELECT clock_timestamp()").scalar_one()
    return found


def _recovered(conn: Connection, fault: Fault) -> bool:
    """Tell whether what a fault hit has gone on: each attempt is followed by another, or its step is done."""
    if fault.kind in the.ON_SERVERS:
        started = query(
            conn,
            """SELECT 1 FROM byrd_chaos.effects e JOIN byrd.steps s ON s.id = e.step_id
                WHERE e.at > %(at)s AND s.started_at > %(at)s LIMIT 1""",
            {"at": fault.at},
        )
        return started.first() is not None
    waiting = query(
        conn,
        """SELECT 1 FROM unnest(%(steps)s::text[], %(attempts)s::int[]) AS hit(step_id, attempt)
             JOIN byrd.steps s ON s.id = hit.step_id AND s.attempt = hit.attempt
            WHERE s.status = 'running' OR s.status = 'ready' AND s.run_at <= clock_timestamp() LIMIT 1""",
        {"steps": [step for step, _ in fault.hits], "attempts": [attempt for _, attempt in fault.hits]},
    )
    return waiting.first() is None
