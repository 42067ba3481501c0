"""What Byrd's statements cost in tables full of runs that have ended or wait: ``python -m benchmarks.scale``.

The tables are filled by a few INSERT ... SELECT statements.  The statements measured are not copies: they are recorded
while a real keeper, sweeper and engine send them, then explained with their own parameters, and rolled back.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
import redis
from celery import Celery, chain, group
from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, event
from sqlalchemy.engine import Engine

import byrd
from byrd import embedded
from byrd.store import Claim, Counts, Store, insight, migrate, progress, steps, sweeps
from byrd.store.rows import query
from byrd.worker import Keeper, Settings, Sweeper

FINISHED, WAITING = 1_000_000, 100_000
#: Who sends the statements of an idle worker.
IDLE = ("keeper", "sweeper")
#: The tables that grow with the number of runs.
LARGE = frozenset({"runs", "steps", "checkpoints", "failed_items", "attempts", "events"})
#: A queue that nobody consumes; one in whose line steps wait that whoever is awake may take, but nobody does; one that
#: loses half of its messages; and one whose steps have become due.
UNHEARD, LINE, LOSSY, DUE = "unheard", "line", "lossy", "due"
#: What a relay does to rows: a part of each statement by which it may be known.
RELAYED = (
    "WITH due AS MATERIALIZED ( SELECT d.id",
    "overdue AS",
    "AS l (id, wake_at)",
    "unsent AS",
    "oldest AS",
    "SET solo = true",
)
#: How often what waits in the lossy queue was sent.
_LOSSY_SENDS = 3
_TABLES = "('byrd.runs'::regclass, 'byrd.steps'::regclass, 'byrd.events'::regclass, 'byrd.attempts'::regclass)"


# -- filling ---------------------------------------------------------------------------------------


def fill(engine: byrd.Byrd, *, finished: int = FINISHED, waiting: int = WAITING) -> None:
    """Fill empty tables: ``finished`` runs that have ended, and ``waiting`` that wait in each way there is.

    The broker must be empty, too: it gets a message for each step in the queue that nobody consumes, so that the relay
    misses none of those.
    """
    sweeper = Sweeper(engine.runtime, Settings())
    sweeper.tick()  # so that the broker is known to have lost nothing
    sweeper.stop()
    store = engine.runtime.store
    store.run(_fill, finished=finished, waiting=waiting)
    sent = store.run(_count_unheard)
    with redis.Redis.from_url(engine.app.conf.broker_url) as client:
        for begin in range(0, sent, 1000):
            client.rpush(UNHEARD, *["{}"] * min(1000, sent - begin))
    lose(engine)
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        query(
            conn,
            """VACUUM (ANALYZE) byrd.runs, byrd.steps, byrd.events, byrd.attempts, byrd.checkpoints, byrd.workers,
                                byrd.limit_keys""",
        )


def lose(engine: byrd.Byrd) -> None:
    """Let what the relay has looked at be due again, just as it was, and the broker have no message of half of it."""
    ids = engine.runtime.store.run(_lose)
    with redis.Redis.from_url(engine.app.conf.broker_url) as client:
        client.delete(LINE, LOSSY, DUE)
        for step_id in ids[::2]:
            client.rpush(LOSSY, f'{{"step": "{step_id}", "no": 0, "attempt": 0}}')


def _count_unheard(conn: Connection) -> int:
    sql = "SELECT count(*) FROM byrd.steps WHERE queue = %(queue)s AND status = 'ready'"
    return int(query(conn, sql, {"queue": UNHEARD}).scalar_one())


def _lose(conn: Connection) -> list[str]:
    for queue, sends in ((LOSSY, _LOSSY_SENDS), (DUE, 0)):
        query(
            conn,
            """UPDATE byrd.steps SET wake_at = ready_at + interval '1 min', sends = %(sends)s
                WHERE queue = %(queue)s AND status = 'ready'""",
            {"queue": queue, "sends": sends},
        )
    found = query(conn, "SELECT id FROM byrd.steps WHERE queue = %(queue)s AND status = 'ready'", {"queue": LOSSY})
    return [row.id for row in found]


def _fill(conn: Connection, *, finished: int, waiting: int) -> None:
    # An index is built many times faster than it is kept up to date row by row.
    query(conn, "SET LOCAL maintenance_work_mem = '256MB'")
    query(conn, "SET LOCAL session_replication_role = replica")
    with _without_indexes(conn):
        for statement in (
            _WORKERS, _RUNS, _WAITING_RUNS, _STEPS, _WAITING_STEPS, _LIMITS, _EVENTS, _ATTEMPTS, _CHECKPOINTS,
        ):  # fmt: skip
            query(conn, statement, {"finished": finished, "waiting": waiting})


@contextmanager
def _without_indexes(conn: Connection) -> Iterator[None]:
    """Drop all keys and indexes, and make them again as they were."""
    keys = query(
        conn,
        f"""SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) || CASE contype WHEN 'f'
                   THEN ' NOT VALID' ELSE '' END FROM pg_constraint
             WHERE connamespace = 'byrd'::regnamespace AND contype IN ('p','u','f')
               AND (conrelid IN {_TABLES} OR confrelid IN {_TABLES}) ORDER BY contype = 'f' DESC, conname""",
    ).all()
    indexes = query(
        conn,
        f"""SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index
             WHERE indrelid IN {_TABLES} AND NOT EXISTS
                   (SELECT 1 FROM pg_constraint c WHERE c.conindid = indexrelid AND c.contype IN ('p','u'))""",
    ).all()
    for table, name, _ in keys:
        query(conn, f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    for name, _ in indexes:
        query(conn, f"DROP INDEX {name}")
    yield
    for _, definition in indexes:
        query(conn, definition.replace("%", "%%"))
    for table, name, definition in reversed(keys):
        query(conn, f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}")


_WORKERS = """
INSERT INTO byrd.workers (id, hostname, pid, pool, concurrency, queues, tasks, shares, version, lease_until)
SELECT md5('w' || n)::uuid, 'worker' || n || '@host', n, 'prefork', 8, '{celery,line}', '{scale.step,scale.rare}',
       '{scale.step}', '0', now() + interval '1 day' FROM generate_series(1, 50) n
"""
_RUNS = """
INSERT INTO byrd.runs (id, workflow, title, key, args, status, output, error, created_at, finished_at, deadline)
SELECT md5('r' || n)::uuid, 'shop.' || n %% 20, 'shop', CASE WHEN n %% 2 = 0 THEN 'key-' || n END, '{}',
       CASE n %% 40 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'succeeded' END, 0,
       CASE WHEN n %% 40 < 2 THEN '{}' END, at, at, CASE WHEN n %% 4 = 0 THEN at + interval '1 hour' END
  FROM generate_series(1, %(finished)s) n, LATERAL (SELECT now() - n * interval '10 s' AS at) x
"""
#: n %% 20: 0 sleeps, 1 is to be started by a time, up to 3 is delayed, up to 7 in the line, up to 13 in a queue that
#: nobody consumes, up to 16 paused, else waits for a retry.  Of the first 8,000, those with 12 are in the queue that
#: loses messages, and a few with 3 are due.
_WAITING_RUNS = """
INSERT INTO byrd.runs (id, workflow, title, status, output, created_at, deadline)
SELECT md5('o' || n)::uuid, 'shop.' || n %% 20, 'shop', CASE WHEN n %% 20 BETWEEN 14 AND 16 THEN 'paused'
       ELSE 'running' END, 1, now() - n * interval '10 ms', CASE WHEN n %% 4 = 0 THEN now() + interval '9 days' END
  FROM generate_series(1, %(waiting)s) n
"""
_STEPS = """
INSERT INTO byrd.steps (id, run_id, no, kind, task, queue, args, status, attempt, sends, run_at, wake_at, ready_at,
                        started_at, finished_at, result, error)
SELECT md5('s' || n)::uuid::text, md5('r' || n)::uuid, 0, 'task', 'scale.step', 'celery', '[1]',
       CASE n %% 40 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'succeeded' END, 1, 1, at, at, at, at, at,
       CASE WHEN n %% 40 >= 2 THEN '42' END, CASE WHEN n %% 40 < 2 THEN '{}' END
  FROM generate_series(1, %(finished)s) n, LATERAL (SELECT now() - n * interval '10 s' AS at) x
"""
_WAITING_STEPS = """
INSERT INTO byrd.steps (id, run_id, no, kind, task, queue, solo, after, input, status, attempt, retries, sends, run_at,
                        wake_at, ready_at, options, start_by, timeout_at)
SELECT md5('o' || n || '-' || no)::uuid::text, md5('o' || n)::uuid, no,
       CASE WHEN no = 0 AND kind = 'asleep' THEN 'wait' ELSE 'task' END,
       CASE WHEN kind = 'line' AND n %% 40 > 20 THEN 'scale.rare' WHEN no = 0 AND kind = 'asleep' THEN 'byrd.sleep'
       ELSE 'scale.step' END,
       CASE WHEN kind IN ('unheard', 'line', 'lossy', 'due') THEN kind ELSE 'celery' END, kind <> 'line',
       nullif(no - 1, -1), nullif(no - 1, -1),
       CASE WHEN no > 0 THEN 'pending' WHEN kind = 'asleep' THEN 'waiting' ELSE 'ready' END,
       (no = 0 AND kind = 'retry')::int, (no = 0 AND kind = 'retry')::int,
       CASE WHEN no > 0 THEN 0 ELSE CASE kind WHEN 'unheard' THEN 9 WHEN 'lossy' THEN 3 WHEN 'line' THEN 1 ELSE 0
       END END,
       CASE WHEN no = 0 THEN CASE WHEN kind IN ('delayed', 'retry', 'asleep', 'timed') THEN now() + n * interval '1 min'
                                  ELSE now() - interval '2 hours' END END,
       CASE WHEN no = 0 THEN CASE kind WHEN 'unheard' THEN now() + random() * interval '30 s'
                                       WHEN 'line' THEN now() - interval '2 hours' + n * interval '10 ms'
                                       WHEN 'lossy' THEN now() WHEN 'due' THEN now()
                                       WHEN 'paused' THEN 'infinity' ELSE now() + n * interval '1 min' END END,
       CASE WHEN no = 0 THEN now() - interval '2 hours' END,
       CASE WHEN no = 0 AND kind = 'timed' THEN '{"byrd_timeouts": {"schedule_to_start": 3600}}' ELSE '{}' END,
       by_then, by_then
  FROM generate_series(1, %(waiting)s) n, generate_series(0, 1) no,
       LATERAL (SELECT CASE WHEN n %% 20 = 3 AND n <= 400 THEN 'due' WHEN n %% 20 = 12 AND n <= 8000 THEN 'lossy'
                            WHEN n %% 20 = 0 THEN 'asleep' WHEN n %% 20 = 1 THEN 'timed'
                            WHEN n %% 20 <= 3 THEN 'delayed' WHEN n %% 20 <= 7 THEN 'line'
                            WHEN n %% 20 <= 13 THEN 'unheard' WHEN n %% 20 <= 16 THEN 'paused' ELSE 'retry'
                       END AS kind) x,
       LATERAL (SELECT CASE WHEN no = 0 AND kind = 'timed' THEN now() + n * interval '1 min' + interval '1 hour'
                       END AS by_then) y
"""
_LIMITS = """
WITH declared AS (INSERT INTO byrd.limits (name, rate, every) VALUES ('host', '1/h', 3600) RETURNING name)
INSERT INTO byrd.limit_keys (name, key, tat, next_at)
SELECT name, 'host-' || n, now() + n * interval '1 min', now() + n * interval '1 min'
  FROM declared, generate_series(1, %(waiting)s / 20) n
"""
_EVENTS = """
INSERT INTO byrd.events (run_id, at, event, token)
SELECT md5('r' || n)::uuid, now() - n * interval '10 s', e, NULL FROM generate_series(1, %(finished)s) n,
       unnest(ARRAY['submitted', 'succeeded']) e
UNION ALL
SELECT md5('o' || n)::uuid, now() - n * interval '10 ms', e, CASE WHEN e = 'paused' THEN md5('t' || n)::uuid END
  FROM generate_series(1, %(waiting)s) n, unnest(ARRAY['submitted', 'paused']) e
 WHERE e = 'submitted' OR n %% 20 BETWEEN 14 AND 16
"""
_ATTEMPTS = """
INSERT INTO byrd.attempts (step_id, attempt, outcome, error, worker, started_at, ended_at)
SELECT md5('s' || n)::uuid::text, 1, CASE n %% 40 WHEN 0 THEN 'failed' ELSE 'cancelled' END, '{}', 'w@host', now(),
       now() FROM generate_series(1, %(finished)s) n WHERE n %% 40 < 2
UNION ALL
SELECT md5('o' || n || '-0')::uuid::text, 1, 'retried', '{}', 'w@host', now(), now()
  FROM generate_series(1, %(waiting)s) n WHERE n %% 20 > 16
"""
_CHECKPOINTS = """
INSERT INTO byrd.checkpoints (step_id, name, attempt, cursor, completed)
SELECT md5('s' || n)::uuid::text, 'items', 1, '7', 7 FROM generate_series(1, %(finished)s) n WHERE n %% 10 = 0
UNION ALL
SELECT md5('o' || n || '-0')::uuid::text, 'items', 1, '7', 7 FROM generate_series(1, %(waiting)s) n WHERE n %% 20 > 16
"""


# -- recording and explaining ------------------------------------------------------------------------


@dataclass(slots=True)
class Statement:
    """A statement as somebody sent it: ``by`` says who, ``milliseconds`` what the quickest of its executions took.

    ``params`` are those of the execution that returned or wrote the most ``rows``, the first of them.
    """

    by: str
    sql: str
    params: Any
    milliseconds: float
    rows: int

    @property
    def title(self) -> str:
        """Its first words."""
        return " ".join(self.sql.split())[:90]


@dataclass(slots=True)
class Recorder:
    """Notes all statements that are sent while it listens, once for each sender and text."""

    found: dict[tuple[str, str], Statement] = field(default_factory=dict)
    _by: str = ""

    @contextmanager
    def of(self, by: str) -> Iterator[None]:
        """Note what is sent in this block as sent ``by`` somebody."""
        self._by, began = by, 0.0

        def before(*_: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def after(_conn: Any, cursor: Any, sql: str, params: Any, _context: Any, _many: Any) -> None:
            took = (time.perf_counter() - began) * 1000
            known = self.found.get((by, sql))
            if known is None or cursor.rowcount > known.rows:
                known = self.found[by, sql] = Statement(
                    by, sql, params, known.milliseconds if known else took, cursor.rowcount
                )
            known.milliseconds = min(took, known.milliseconds)

        event.listen(Engine, "before_cursor_execute", before)
        event.listen(Engine, "after_cursor_execute", after)
        try:
            yield
        finally:
            event.remove(Engine, "before_cursor_execute", before)
            event.remove(Engine, "after_cursor_execute", after)

    def lacks(self, by: str, parts: Sequence[str]) -> list[str]:
        """Return those of the parts of statements that were not sent ``by`` somebody."""
        texts = [" ".join(found.sql.split()) for found in self.statements(by)]
        return [part for part in parts if not any(part in text for text in texts)]

    def statements(self, by: str | None = None) -> list[Statement]:
        """Return what was noted, in order."""
        return [found for found in self.found.values() if by in (None, found.by)]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a statement costs: milliseconds at best, blocks of 8 KB read, and the large tables read from end to end.

    The blocks of a statement that writes are not counted if it cannot be run again, nor the rows that it ``moves``.
    """

    milliseconds: float
    blocks: int | None
    scans: frozenset[str]
    plan: str
    moves: int | None


def cost(store: Store, statement: Statement, *, times: int = 5) -> Cost | None:
    """Explain a statement, by running it again where that can be taken back; None for one that has no plan."""
    if not re.match(r"\s*(SELECT|UPDATE|INSERT|DELETE|WITH)", statement.sql):
        return None
    text = "\n".join(str(row[0]) for row in _explain(store, statement, "COSTS"))
    [[[planned]]] = _explain(store, statement, "FORMAT JSON")
    milliseconds, blocks, moves = statement.milliseconds, None, None
    if statement.by in IDLE or re.match(r"\s*SELECT", statement.sql):
        options = "ANALYZE, BUFFERS, FORMAT JSON"
        runs = [found for [[[found]]] in (_explain(store, statement, options) for _ in range(times))]
        milliseconds = min(found["Execution Time"] for found in runs)
        blocks = min(found["Plan"]["Shared Hit Blocks"] + found["Plan"]["Shared Read Blocks"] for found in runs)
        moves = max((_moved(node) for found in runs for node in _nodes(found["Plan"])), default=0)
    scans = frozenset(name for node in _nodes(planned["Plan"]) if (name := _scanned(node)))
    return Cost(milliseconds, blocks, scans, text, moves)


def _explain(store: Store, statement: Statement, options: str) -> list[Any]:
    with store.engine.connect() as conn, conn.begin() as transaction:
        found = query(conn, f"EXPLAIN ({options}) {statement.sql}", statement.params).all()
        transaction.rollback()
    return list(found)


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)


def _moved(node: dict[str, Any]) -> int:
    if node["Node Type"] != "ModifyTable":
        return 0
    return sum(round(child["Actual Rows"]) for child in node["Plans"] if child["Parent Relationship"] == "Outer")


def _scanned(node: dict[str, Any]) -> str | None:
    name = node.get("Relation Name")
    return name if node["Node Type"].endswith("Seq Scan") and name in LARGE else None


# -- what is measured --------------------------------------------------------------------------------


def make_engine(database_url: str, broker_url: str) -> byrd.Byrd:
    """Return the engine of an app with one task."""
    app = Celery("scale", broker=broker_url, set_as_current=False)
    app.conf.broker_connection_retry_on_startup = True
    engine = byrd.Byrd(app, database_url=database_url)

    @app.task(name="scale.step", shared=False)
    def step(value: int) -> int:
        return value

    app.finalize()
    return engine


def record_idle_worker(engine: byrd.Byrd, recorder: Recorder, *, seconds: float = 3.0) -> None:
    """Note what the two threads of a worker send while there is nothing for it to do."""
    settings = Settings(lease_seconds=1.0)  # after which recovery begins to look
    runtime = engine.runtime
    runtime.become_worker(str(uuid.uuid4()))
    keeper = Keeper(
        runtime, settings, worker_id=runtime.worker_id, hostname="idle@host", pool="prefork", concurrency=2,
        queues=lambda: ["celery"],
    )  # fmt: skip
    sweeper = Sweeper(runtime, settings)
    try:
        with recorder.of("start"):
            while "byrd.runs" not in str(recorder.found):  # when recovery looks for deadlines, it has looked at all
                keeper.tick()
                sweeper.tick()
        lose(engine)
        ending, latest = time.monotonic() + seconds, time.monotonic() + 10 * seconds
        while time.monotonic() < ending or (recorder.lacks("sweeper", RELAYED) and time.monotonic() < latest):
            with recorder.of("keeper"):
                keeper.tick()
            with recorder.of("sweeper"):
                pause = sweeper.tick()
            again = runtime.store.run(_sent_again)
            with recorder.of("sweeper"):
                runtime.store.run(sweeps.not_sent, again)  # as if the broker had refused some of it
            time.sleep(min(0.1, pause))
    finally:
        sweeper.stop()
        keeper.store.close()
    lose(engine)


def _sent_again(conn: Connection) -> list[str]:
    found = query(
        conn,
        "SELECT id FROM byrd.steps WHERE queue = %(queue)s AND status = 'ready' AND sends > %(sends)s LIMIT 25",
        {"queue": LOSSY, "sends": _LOSSY_SENDS},
    )
    return [row.id for row in found]


def record_work(engine: byrd.Byrd, recorder: Recorder) -> None:
    """Note what submitting, running and ending a few steps sends, each way in which they can end."""
    store, worker = engine.runtime.store, engine.runtime.worker_id
    step = engine.app.tasks["scale.step"]

    # Long enough for what follows.
    store.run(
        query, "UPDATE byrd.workers SET lease_until = now() + interval '1 hour' WHERE id = %(id)s", {"id": worker}
    )

    def claimed(run: byrd.Run, no: int) -> Claim:
        found = run.steps()[no]
        token = str(uuid.uuid4())
        claim = store.run(steps.claim, found.id, found.attempt, task="scale.step", worker_id=worker, pid=1, token=token)
        assert claim is not None
        return claim

    ends: dict[str, Callable[[Claim], Any]] = {
        "complete": lambda c: store.run(steps.complete, c.id, c.attempt, "1"),
        "fail": lambda c: store.run(steps.fail, c.id, c.attempt, _ERROR),
        "retry": lambda c: store.run(steps.retry, c.id, c.attempt, _ERROR),
        "hand back": lambda c: store.run(steps.hand_back, c.id, c.attempt),
        "checkpoint": lambda c: (
            store.run(progress.save, c.id, c.attempt, "x", Counts("1", 1, 0, done=False)),
            store.run(progress.stop_reason, c.id, c.attempt),
        ),
        "preempt": lambda _: store.run(steps.preempt, worker, pid=1, reason="gone"),
    }
    for name, end in ends.items():
        with recorder.of("submit"):
            run = engine.submit(chain(group(step.s(1), step.s(2)), step.s()), timeout=3600)
        with recorder.of("claim"):
            claim = claimed(run, 0)
        with recorder.of(name):
            end(claim)
        with recorder.of("cancel"):
            run.cancel()
    run = engine.submit(chain(step.s(1), step.s()))
    for name in ("pause", "resume", "cancel", "retry"):
        with recorder.of(name):
            getattr(run, name)()
    with recorder.of("end of a lease"):
        claimed(run, 0)
        store.run(
            query, "UPDATE byrd.workers SET lease_until = now() - interval '1 s' WHERE id = %(id)s", {"id": worker}
        )
        store.run(sweeps.recover)


def record_questions(engine: byrd.Byrd, recorder: Recorder) -> None:
    """Note what people's questions send."""
    store = engine.runtime.store
    with recorder.of("byrd runs"):
        for status in (None, "failed", "paused", ["running", "paused"], "rollback_stuck"):
            for workflow in (None, "shop.3", "nobody's"):
                found = engine.list(status=status, workflow=workflow)
                store.run(insight.tallies, [run.id for run in found])
    waiting = [run for status in ("running", "paused", "failed") for run in engine.list(status=status, limit=20)]
    with recorder.of("byrd why"):
        for run in waiting:
            engine.get(run.id[:8]).why()
    with recorder.of("byrd show"):
        store.run(insight.snapshot, waiting[0].id)
        waiting[0].history()


_ERROR = '{"exc_type": "ValueError", "exc_module": "builtins", "exc_message": ["no"]}'


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--finished", type=click.IntRange(0), default=FINISHED, show_default=True, help="Runs that have ended.")
@click.option("--waiting", type=click.IntRange(0), default=WAITING, show_default=True, help="Runs that wait.")
def main(finished: int, waiting: int) -> None:
    """Measure what each statement of an idle worker costs, then those of work and of questions."""
    console = Console()
    with embedded.postgres(in_memory=True) as postgres, embedded.valkey(persistence=False) as broker:
        migrate(postgres.url)
        engine = make_engine(postgres.url, broker.url)
        store = engine.runtime.store
        began = time.monotonic()
        with console.status(f"filling the tables: {finished:,} runs that have ended, {waiting:,} that wait"):
            fill(engine, finished=finished, waiting=waiting)
        console.print(
            f"{finished:,} runs that have ended, {waiting:,} that wait; filled in {time.monotonic() - began:.0f} s"
        )
        recorder = Recorder()
        record_idle_worker(engine, recorder)
        record_work(engine, recorder)
        record_questions(engine, recorder)
        table = Table("who", "statement", "ms", "8 KB blocks", "rows moved", "reads all of", box=None)
        for statement in recorder.statements():
            found = cost(store, statement)
            if found is None:
                table.add_row(statement.by, statement.title, f"{statement.milliseconds:.2f}", "", "", "")
            else:
                blocks = "" if found.blocks is None else f"{found.blocks:,}"
                moves = f"{found.moves:,}" if found.moves else ""
                figures = f"{found.milliseconds:.2f}", blocks, moves, ", ".join(sorted(found.scans))
                table.add_row(statement.by, statement.title, *figures)
        console.print(table)
        engine.close()


if __name__ == "__main__":
    main()
