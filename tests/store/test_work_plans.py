"""The statements inside ``byrd.work`` and ``byrd.outcome`` find what they want by an index in tables of any size."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy import Connection

from byrd.store import Store, reading, work
from byrd.store.rows import query
from byrd.store.work import Done, Own, Work
from tests.store.world import World, nodes, sig

FINISHED, WAITING = 20_000, 5_000
#: No node of a plan reads more rows than this for what is asked of it here.
FEW = 100
EXPLAIN = """
LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on;
SET auto_explain.log_analyze = on; SET auto_explain.log_timing = off; SET auto_explain.log_format = json;
SET auto_explain.log_level = notice; SET client_min_messages = notice
"""
#: Runs that have ended; runs that wait for a worker that hears their queue, or are paused, delayed or solo.
FILL = """
INSERT INTO byrd.runs (id, title, status, output, finished_at)
SELECT md5('r' || n)::uuid, 'old', 'succeeded', 0, now() FROM generate_series(1, %(finished)s) n;
INSERT INTO byrd.steps (id, run_id, no, kind, task, queue, args, status, attempt, finished_at, result, solo, sends)
SELECT md5('s' || n), md5('r' || n)::uuid, 0, 'task', 'old', 'work', '[]', 'succeeded', 1, now(), '1', false, 1
  FROM generate_series(1, %(finished)s) n;
INSERT INTO byrd.runs (id, title, status, output)
SELECT md5('w' || n)::uuid, 'waits', CASE n %% 5 WHEN 0 THEN 'paused' ELSE 'running' END, 0
  FROM generate_series(1, %(waiting)s) n;
INSERT INTO byrd.steps (id, run_id, no, kind, task, queue, args, status, run_at, wake_at, ready_at, solo, sends)
SELECT md5('w' || n), md5('w' || n)::uuid, 0, 'task', 'a', CASE n %% 5 WHEN 1 THEN 'unheard' ELSE 'work' END, '[]',
       'ready',
       now() + CASE n %% 5 WHEN 2 THEN interval '1 day' ELSE '0' END,
       CASE n %% 5 WHEN 0 THEN 'infinity' WHEN 2 THEN now() + interval '1 day' ELSE now() END, now(), n %% 5 = 3,
       CASE n %% 5 WHEN 2 THEN 0 ELSE 1 END
  FROM generate_series(1, %(waiting)s) n;
INSERT INTO byrd.events (run_id, event)
SELECT id, 'submitted' FROM byrd.runs UNION ALL SELECT id, 'succeeded' FROM byrd.runs WHERE status = 'succeeded'
"""


class Notices:
    """All that Postgres has said: psycopg2 keeps the last fifty only, and SQLAlchemy drops what it can iterate over."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def append(self, text: str) -> None:
        self.texts.append(text)


class Explained:
    """A connection, as a pool process has it, whose statements tell their plans."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        query(conn, EXPLAIN)
        self.notices = Notices()
        conn.connection.driver_connection.notices = self.notices  # type: ignore[union-attr]

    def work(self, world: World, **wanted: Any) -> Work:
        return work.work(self.conn, worker_id=world.worker_id, pid=1, token=str(uuid.uuid4()), **wanted)

    def plans(self) -> list[dict[str, Any]]:
        """Return the plans of the statements since the last time."""
        found = [json.loads(text[text.index("{") :]) for text in self.notices.texts if re.search(r"plan:\s*{", text)]
        self.notices.texts.clear()
        return found


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    found = Store(database_url)
    yield found
    found.close()


@pytest.fixture
def explained(store: Store) -> Iterator[Explained]:
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        yield Explained(conn)


def everything(explained: Explained, world: World) -> None:
    """Have ``byrd.work`` do each thing that it can do, and ask for the outcome."""
    canvas = chain(sig("a"), chord([chain(sig("b"), group(sig("c"), sig("d"))), sig("e")], sig("f")), sig("g"))
    canvas.tasks[0].link_error(sig("never"))
    run = world.submit(canvas, shared=True)
    first = world.step(run, "a")
    claims = explained.work(world, own=Own(first.id, 0, "a"), most=1).claims
    stale = claims[0]
    while claims:
        found = explained.work(world, done=[Done(claims[0], '"x"')], most=0, peek=True)
        claims = claims[1:]
        for wakeup in found.wakeups:
            if wakeup.run_id == run:
                claims += explained.work(world, own=Own(wakeup.id, wakeup.attempt, wakeup.task), most=1).claims
    assert world.run(run).status == "succeeded"
    assert reading.outcome(explained.conn, run)[1] == "succeeded"
    for name in ("x", "y"):
        world.submit(chain(sig(name), sig("z")), shared=True)
    found = explained.work(world, most=4, others=True)
    assert found.claims
    done = [Done(claim, '"x"') for claim in found.claims]
    while done:
        found = explained.work(world, done=done, most=len(done))
        done = [Done(claim, '"x"') for claim in found.claims]
    assert explained.work(world, done=[Done(stale, '"y"')]).refused == {}
    gone = stale.__class__(**{**{n: getattr(stale, n) for n in stale.__dataclass_fields__}, "attempt": 7})
    assert explained.work(world, done=[Done(gone, '"y"')], own=Own(first.id, 5, "a"), most=1).refused


def bad(plan: dict[str, Any]) -> list[str]:
    """Return what is wrong with a plan: it reads a table or an index from end to end, or too much of it."""
    found = []
    for node in nodes(plan["Plan"]):
        kind, name = node["Node Type"], node.get("Relation Name", "")
        read = (node.get("Actual Rows", 0) + node.get("Rows Removed by Filter", 0)) * max(
            1, node.get("Actual Loops", 1)
        )
        if name == "workers" or not name:
            continue
        if kind == "Seq Scan" or ("Index" in kind and "Index Cond" not in node) or "Bitmap" in kind or read > FEW:
            found.append(f"{kind} of {name} {node.get('Index Name', '')}: {read} rows, {plan['Query Text']:.300}")
    return found


@pytest.mark.parametrize("known", ["not analysed", "analysed"])
def test_plans_made_while_the_tables_were_tiny_are_good_when_they_are_large(
    store: Store, explained: Explained, known: str
) -> None:
    world = World(store)
    everything(explained, world)
    everything(explained, world)
    assert len(explained.plans()) > 100
    world.do(query, FILL, {"finished": FINISHED, "waiting": WAITING})
    if known == "analysed":
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            query(conn, "VACUUM (ANALYZE) byrd.runs, byrd.steps, byrd.events, byrd.workers")
    everything(explained, world)
    plans = explained.plans()
    texts = " ".join(plan["Query Text"] for plan in plans)
    for part in (
        "WITH done AS",
        "released AS",
        "string_agg",
        "FOR NO KEY UPDATE",
        "own_id",
        "SKIP LOCKED",
        "below AS",
        "SELECT ARRAY(SELECT q FROM",
        "ignore_result",
    ):
        assert part in texts, f"they did not come to {part!r}"
    wrong = [line for plan in plans for line in bad(plan)]
    assert not wrong, "\n".join(dict.fromkeys(wrong))
