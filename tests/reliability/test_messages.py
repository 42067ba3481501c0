"""Messages that are duplicated, late, reordered, forged or garbage: none runs anything that Postgres does not say."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from celery import chain

from byrd.engine import Run
from byrd.model import PROTOCOL_VERSION
from byrd.store import locks
from tests.cluster import ROOT, Cluster, Worker, wait_until
from tests.invariants import check_database

APP = "tests.apps.basic"
QUEUE = "celery"


def queued(cluster: Cluster) -> list[bytes]:
    with cluster.redis() as client:
        return list(client.lrange(QUEUE, 0, -1))


def put(cluster: Cluster, *messages: bytes | str) -> None:
    """Put messages into the queue, in the order in which they will be taken."""
    with cluster.redis() as client:
        for message in messages:
            client.lpush(QUEUE, message)


@contextmanager
def only_message(cluster: Cluster, run: Run) -> Iterator[bytes]:
    """Take the message of a run's first step from the queue, and let no relay send another.

    The step is due, so each message that names it rightly would start it.
    """
    [message] = queued(cluster)
    with cluster.redis() as client:
        client.delete(QUEUE)
    cluster.rows("UPDATE byrd.steps SET wake_at = now() + interval '1 hour' WHERE status = 'ready' AND id = %s",
                 run.steps()[0].id)  # fmt: skip
    with closing(psycopg2.connect(cluster.database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", (locks.RELAY,))
        yield message


def wait_refused(worker: Worker, why: str, times: int = 1) -> None:
    """Wait until the worker has said so often why it does nothing about a message."""
    wait_until(
        lambda: len(re.findall(why, worker.log_text())) == times,
        what=lambda: f"{times} times {why!r} in the log:\n{worker.log_tail()}",
    )


def wait_taken(cluster: Cluster) -> None:
    """Wait until the queue is empty, and a run that was submitted after all that was in it has ended."""
    wait_until(lambda: not queued(cluster), what="an empty queue")
    assert cluster.app(APP).engine.submit(cluster.app(APP).echo.s("last")).get(timeout=60) == "last"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def status_of(cluster: Cluster, run: Run) -> list[tuple[Any, ...]]:
    """Return all that a message could have changed."""
    return cluster.rows(
        "SELECT no, status, attempt, retries, preemptions, result, error FROM byrd.steps WHERE run_id = %s ORDER BY no",
        run.id,
    )


def test_every_message_comes_three_times_late_and_in_another_order(cluster: Cluster, tmp_path: Path) -> None:
    app, notes = cluster.app(APP), tmp_path / "notes"
    runs = [
        app.engine.submit(chain(app.note.s(str(notes), f"first {n}"), app.note.si(str(notes), f"second {n}")))
        for n in range(50)
    ]
    first = queued(cluster)
    assert 1 < len(first) < len(runs)  # enough to wake whoever comes
    shuffled = first * 2
    random.Random(7).shuffle(shuffled)
    with cluster.redis() as client:
        client.delete(QUEUE)
    put(cluster, *shuffled)
    cluster.worker(APP)
    for run in runs:
        run.get(timeout=60)
    before = [status_of(cluster, run) for run in runs]
    random.Random(8).shuffle(first)
    put(cluster, *first)  # when their runs are over
    wait_taken(cluster)
    assert [status_of(cluster, run) for run in runs] == before
    wanted = [f"{which} {n}" for which in ("first", "second") for n in range(len(runs))]
    assert sorted(lines(notes)) == sorted(wanted)
    check_database(cluster.database_url)


def test_a_message_of_an_earlier_attempt_starts_no_later_one(cluster: Cluster, tmp_path: Path) -> None:
    """A step that is ready for its retry, or runs in its second attempt, is not moved by its first one's message."""
    app, go = cluster.app("tests.apps.delivery"), tmp_path / "go"
    run = app.engine.submit(app.second_time.s(str(go), "done"))
    [step] = run.steps()
    ready = (
        "SELECT 1 FROM byrd.steps WHERE id = %s AND status = 'ready' AND attempt = 1 AND run_at <= clock_timestamp()"
    )
    with only_message(cluster, run) as message:
        worker = cluster.worker("tests.apps.delivery")
        put(cluster, message)
        wait_until(lambda: cluster.rows(ready, step.id), what="a step that is ready for its retry")
        before = status_of(cluster, run)
        put(cluster, message, _renamed(message, step.id, attempt=2))
        wait_refused(worker, f"step {step.id} is not ready for attempt 0")
        wait_refused(worker, f"step {step.id} is not ready for attempt 2")
        assert status_of(cluster, run) == before
        second = _renamed(message, step.id, attempt=1)
        put(cluster, second)
        wait_until(lambda: run.steps()[0].status == "running")
        put(cluster, message, second)
        wait_refused(worker, f"step {step.id} is not ready for attempt 0", times=2)
        wait_refused(worker, f"step {step.id} is not ready for attempt 1")
        [step] = run.steps()
        assert (step.status, step.attempt) == ("running", 2)
        go.touch()
        assert run.get(timeout=30) == "done"
    held = app.engine.submit(app.add.s(1, 2).set(countdown=3))
    [step] = held.steps()
    put(cluster, _renamed(message, step.id, attempt=0))
    wait_refused(worker, f"step {step.id} is not ready for attempt 0")
    [step] = held.steps()
    assert (step.status, step.attempt) == ("ready", 0)  # its time has not come, whatever a message says
    assert held.get(timeout=30) == 3
    assert run.steps()[0].attempt == 2
    check_database(cluster.database_url)


# ------------------------------------------------------------------------------------------------- forgeries


def _message(
    task: str,
    byrd: Any,
    *,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    body: Any = None,
    headers: Mapping[str, Any] | None = None,
) -> str:
    """A message as kombu's Redis transport lays it down, with whatever is asked for in it."""
    content = json.dumps([list(args), dict(kwargs or {}), {}] if body is None else body)
    found = {
        "lang": "py", "task": task, "id": "00000000-aaaa-bbbb-cccc-000000000000", "root_id": None, "parent_id": None,
        "byrd": byrd, **(headers or {}),
    }  # fmt: skip
    properties = {
        "correlation_id": "x", "delivery_mode": 2, "priority": 0, "body_encoding": "base64",
        "delivery_tag": os.urandom(8).hex(), "delivery_info": {"exchange": "", "routing_key": QUEUE},
    }  # fmt: skip
    return json.dumps(
        {
            "body": base64.b64encode(content.encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": found,
            "properties": properties,
        }
    )


def _renamed(message: bytes, step_id: str, *, attempt: int) -> str:
    """The same message for another step, or attempt."""
    found = json.loads(message)
    found["headers"]["byrd"].update(step=step_id, attempt=attempt)
    found["properties"]["delivery_tag"] = os.urandom(8).hex()
    return json.dumps(found)


def forged_headers(run: Run, step_id: str) -> dict[str, dict[str, Any]]:
    """Return headers that no publisher of ours ever wrote, by what a worker says of them."""
    good = {"v": PROTOCOL_VERSION, "run": run.id, "step": step_id, "no": 0, "attempt": 0}
    without = {name: {k: v for k, v in good.items() if k != name} for name in ("v", "step", "attempt")}
    return {
        "a message of protocol version": {
            "no version": without["v"],
            "an older version": {**good, "v": PROTOCOL_VERSION - 1},
            "a newer version": {**good, "v": PROTOCOL_VERSION + 1},
            "a version that is no number": {**good, "v": [PROTOCOL_VERSION]},
        },
        "is not ready for attempt": {
            "an unknown step": {**good, "step": "0" * 36},
            "an attempt to come": {**good, "attempt": 1},
            "a step of a megabyte": {**good, "step": "x" * 2**20},
            "SQL": {**good, "step": "'; DROP TABLE byrd.steps CASCADE; --"},
        },
        "whose header names no step": {
            "no step": without["step"],
            "no attempt": without["attempt"],
            "a text": "byrd",
            "a list": [1, 2, 3],
            "a number": 7,
            "an attempt that is a text": {**good, "attempt": "first"},
            "an attempt below zero": {**good, "attempt": -1},
            "an attempt beyond all numbers": {**good, "attempt": 2**80},
            "an attempt that is not finite": {**good, "attempt": float("inf")},
            "an attempt that is a list": {**good, "attempt": [0]},
            "a step that is a list": {**good, "step": [step_id]},
            "a step with a NUL": {**good, "step": f"{step_id}\0"},
            "half of a surrogate pair": {**good, "step": "\ud800"},
        },
    }


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_forged_headers_run_nothing_and_end_no_worker(cluster: Cluster, tmp_path: Path, pool: str) -> None:
    """The step is due, and its own message is kept back: a forgery that was taken for it would start it."""
    app, notes = cluster.app(APP), tmp_path / "notes"
    victim = app.engine.submit(app.note.s(str(notes), "real"))
    [step] = victim.steps()
    with only_message(cluster, victim) as message:
        worker = cluster.worker(APP, pool=pool)
        before, pids = status_of(cluster, victim), worker.pids()
        forged = forged_headers(victim, step.id)
        for why, headers in forged.items():
            put(cluster, *[_message(f"{APP}.note", header, args=(str(notes), "forged")) for header in headers.values()])
            wait_refused(worker, why, times=len(headers))
            assert status_of(cluster, victim) == before
        assert (step.status, step.attempt) == ("ready", 0)
        put(cluster, _message(f"{APP}.echo", json.loads(message)["headers"]["byrd"]))  # a task of another name
        wait_refused(worker, f"step {step.id} is not ready for attempt 0")
        assert status_of(cluster, victim) == before
        assert lines(notes) == []
        assert worker.running
        assert worker.pids() == pids
        put(cluster, message)
        assert victim.get(timeout=30) == "real"
    assert lines(notes) == ["real"]
    assert victim.steps()[0].attempt == 1
    check_database(cluster.database_url)


def test_a_message_cannot_change_what_a_step_runs_with(cluster: Cluster, tmp_path: Path) -> None:
    """The run, the task, its arguments and successors come from Postgres; a message says which step, no more."""
    app, notes, go = cluster.app(APP), tmp_path / "notes", tmp_path / "go"
    run = app.engine.submit(chain(app.note.s(str(notes), "real"), app.echo.s()))
    [message] = queued(cluster)
    header = json.loads(message)["headers"]["byrd"]
    lying = {**header, "run": app.engine.submit(app.echo.s("another")).id, "no": 7}
    with cluster.redis() as client:
        client.delete(QUEUE)
    link = app.note.si(str(notes), "callback")
    smuggled: dict[str, Any] = {"args": (str(notes), "forged"), "kwargs": {"text": "forged"}}
    embed = [[str(notes), "forged"], {}, {"callbacks": [dict(link)], "chain": [dict(link)], "errbacks": [dict(link)]}]
    put(
        cluster,
        _message("tests.apps.basic.wait_for_file", header, args=(str(go), "forged")),  # a task of another name
        _message("tests.apps.basic.fail", header),
        _message("tests.apps.basic.note", lying, **smuggled, headers={"retries": 99, "ignore_result": True}),
        _message("tests.apps.basic.note", lying, body=embed),
    )
    worker = cluster.worker(APP)
    assert run.get(timeout=30) == "real"
    wait_taken(cluster)
    assert lines(notes) == ["real"]
    assert run.steps()[0].retries == 0
    assert worker.running
    check_database(cluster.database_url)


def test_a_message_can_neither_delay_a_step_nor_let_it_expire(cluster: Cluster, tmp_path: Path) -> None:
    app, notes = cluster.app(APP), tmp_path / "notes"
    runs = [app.engine.submit(app.note.s(str(notes), n)) for n in range(2)]
    taken = [json.loads(message)["headers"]["byrd"] for message in reversed(queued(cluster))]
    with cluster.redis() as client:
        client.delete(QUEUE)
    past, future = "2001-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"
    put(cluster, *[_message("tests.apps.basic.note", taken[0], headers={"expires": past})])
    put(cluster, *[_message("tests.apps.basic.note", taken[1], headers={"eta": future})])
    worker = cluster.worker(APP)
    assert [run.get(timeout=30) for run in runs] == [0, 1]
    with cluster.redis() as client:
        wait_until(lambda: client.hlen("unacked") == 0, what="no message that is kept for later")
    assert worker.running
    check_database(cluster.database_url)


UNREADABLE = {
    "no JSON": b"garbage",
    "no text": b"\xff\xfe\x00\x01",
    "empty": b"",
    "a number": b"7",
    "a list": b"[1, 2]",
    "no properties": b"{}",
    "no delivery tag": b'{"properties": {}}',
    "half a message": b'{"body": "W10=", "headers": {"task": "tests.apps.ba',
    "properties that are a list": b'{"properties": []}',
    "a body that is no base64": b'{"body": "%%%", "properties": {"body_encoding": "base64", "delivery_tag": "1"}}',
}


def malformed(step_header: Mapping[str, Any]) -> dict[str, str]:
    """Return messages that kombu can read and Celery cannot."""
    good = dict(step_header)
    task = "tests.apps.basic.note"
    found = {
        "a body that is no list": _message(task, good, body={"a": 1}),
        "a body of one": _message(task, good, body=[1]),
        "a body of five": _message(task, good, body=[1, 2, 3, 4, 5]),
        "a body that is null": _message(task, good, body=[None, None, None]),
        "time limits that are a text": _message(task, good, headers={"timelimit": "soon"}),
        "an eta that is no time": _message(task, good, headers={"eta": "tomorrow"}),
        "an eta that is a list": _message(task, good, headers={"eta": [1]}),
        "an unknown task": _message("nobody.knows", good),
        "a task that is a list": _message(task, good, headers={"task": [task]}),
        "an id that is a list": _message(task, good, headers={"id": ["x"]}),
        "stamps that are a text": _message(task, good, headers={"stamped_headers": "x", "stamps": 5}),
        "headers that are a list": json.dumps({**json.loads(_message(task, good)), "headers": [1]}),
        "no headers": json.dumps({**json.loads(_message(task, good)), "headers": None}),
        "another content type": json.dumps(
            {**json.loads(_message(task, good)), "content-type": "application/x-pickle"}
        ),
        "pickle": json.dumps({**json.loads(_message(task, good)), "content-type": "application/x-python-serialize"}),
    }
    without_id = json.loads(_message(task, good))
    del without_id["headers"]["id"]
    return {**found, "no id": json.dumps(without_id)}


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_garbage_in_the_queue_ends_no_worker(cluster: Cluster, tmp_path: Path, pool: str) -> None:
    app, notes = cluster.app(APP), tmp_path / "notes"
    victim = app.engine.submit(app.note.s(str(notes), "real").set(countdown=600))
    [step] = victim.steps()
    header = {"v": PROTOCOL_VERSION, "run": victim.id, "step": step.id, "no": 0, "attempt": 0}
    worker = cluster.worker(APP, pool=pool)
    pid, before = worker.pid, status_of(cluster, victim)
    put(cluster, *UNREADABLE.values())
    put(cluster, *malformed(header).values())
    wait_taken(cluster)
    assert (worker.running, worker.pid) == (True, pid), worker.log_tail()
    assert status_of(cluster, victim) == before
    assert lines(notes) == []
    check_database(cluster.database_url)


def test_a_message_of_50_megabytes(cluster: Cluster, tmp_path: Path) -> None:
    app, notes = cluster.app(APP), tmp_path / "notes"
    run = app.engine.submit(app.note.s(str(notes), "real"))
    [message] = queued(cluster)
    header = json.loads(message)["headers"]["byrd"]
    with cluster.redis() as client:
        client.delete(QUEUE)
    put(cluster, _message("tests.apps.basic.note", header, args=(str(notes), "x" * 50_000_000)))
    worker = cluster.worker(APP)
    assert run.get(timeout=60) == "real"
    assert lines(notes) == ["real"]
    assert worker.running
    check_database(cluster.database_url)


def test_messages_of_runs_that_were_deleted(cluster: Cluster, tmp_path: Path) -> None:
    """Deleted before its step starts, and while it runs: the step's outcome is refused, and the worker goes on."""
    app, go, notes = cluster.app(APP), tmp_path / "go", tmp_path / "notes"
    gone = app.engine.submit(app.note.s(str(notes), "gone"))
    cluster.rows("DELETE FROM byrd.runs WHERE id = %s", gone.id)
    worker = cluster.worker(APP)
    wait_taken(cluster)
    assert lines(notes) == []
    running = app.engine.submit(chain(app.wait_for_file.s(str(go)), app.note.si(str(notes), "gone")))
    wait_until(lambda: running.steps()[0].status == "running")
    cluster.rows("DELETE FROM byrd.runs WHERE id = %s", running.id)
    go.touch()
    worker.wait_for_log("does not exist any more")
    wait_taken(cluster)
    assert lines(notes) == []
    assert worker.running
    check_database(cluster.database_url)


# ------------------------------------------------------------------------------------------------- strangers


@pytest.mark.parametrize("task", ["note", "anything"])
def test_a_worker_without_byrd_runs_no_step_of_any_task(cluster: Cluster, tmp_path: Path, task: str) -> None:
    """Not even of a task that takes every argument: the message itself is no call."""
    app, notes = cluster.app("tests.apps.delivery"), tmp_path / "notes"
    stranger = cluster.worker("tests.apps.stranger", env={"TEST_NOTES": str(notes)})
    canvas = app.note.s(str(notes), "mine") if task == "note" else app.anything.s("mine", path=str(notes))
    run = app.engine.submit(canvas)
    stranger.wait_for_log("keyword arguments is not a mapping")
    assert lines(notes) == []
    stranger.kill()
    cluster.worker("tests.apps.delivery")
    run.get(timeout=60)
    assert len(lines(notes)) == 1
    assert "mine" in lines(notes)[0]
    check_database(cluster.database_url)


# ------------------------------------------------------------------------------------------------- dying submitters

_DIES_BETWEEN = """
import os, signal, sys
from celery.signals import before_task_publish
import tests.apps.basic as shop
before_task_publish.connect(lambda **_: os.kill(os.getpid(), signal.SIGKILL), weak=False)
shop.engine.submit(shop.add.s(1, 2) | shop.add.s(3), key="mine")
"""
_DIES_AFTER_ITS_COMMIT = """
import os, signal
from sqlalchemy import text
import tests.apps.basic as shop
with shop.engine.runtime.store.engine.connect() as conn:
    conn.execute(text("CREATE TABLE orders (id int)"))
    conn.execute(text("INSERT INTO orders VALUES (1)"))
    shop.engine.submit(shop.add.s(1, 2) | shop.add.s(3), key="mine", connection=conn)
    conn.commit()
    os.kill(os.getpid(), signal.SIGKILL)
"""
_DIES_BEFORE_ITS_COMMIT = _DIES_AFTER_ITS_COMMIT.replace("    conn.commit()\n", "")
_SUBMITS = """
import tests.apps.basic as shop
shop.engine.submit(shop.add.s(1, 2) | shop.add.s(3), key="mine")
"""


def run_script(cluster: Cluster, script: str) -> int:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=cluster.env, check=False, timeout=120)
    return done.returncode


@pytest.mark.parametrize("script", [_DIES_BETWEEN, _DIES_AFTER_ITS_COMMIT], ids=["submit", "connection"])
@pytest.mark.parametrize("up", [True, False], ids=["workers up", "no worker yet"])
def test_a_submitter_killed_between_its_commit_and_the_publish(cluster: Cluster, script: str, up: bool) -> None:
    app = cluster.app(APP)
    if up:
        cluster.worker(APP)
    assert run_script(cluster, script) == -signal.SIGKILL
    if not up:
        assert queued(cluster) == []  # nothing was published, indeed
        cluster.worker(APP)
    [run] = app.engine.list()
    assert run.get(timeout=30) == 6
    assert app.engine.submit(app.echo.s(0), key="mine").id == run.id
    check_database(cluster.database_url)


def test_a_submitter_killed_before_its_commit_leaves_nothing(cluster: Cluster) -> None:
    app = cluster.app(APP)
    cluster.worker(APP)
    assert run_script(cluster, _DIES_BEFORE_ITS_COMMIT) == -signal.SIGKILL
    assert cluster.rows("SELECT to_regclass('orders')") == [(None,)]
    assert app.engine.list() == []
    assert app.engine.submit(app.echo.s("anew"), key="mine").get(timeout=30) == "anew"
    check_database(cluster.database_url)


def test_a_submitter_killed_in_the_middle_of_its_transaction_leaves_nothing(cluster: Cluster) -> None:
    """It has written the run and waits for the lock that its steps need: a moment before its commit."""
    app = cluster.app(APP)
    waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'byrd.steps'::regclass"
    engine = app.engine.runtime.user_store.engine  # whose transactions may be idle for longer
    with engine.begin() as blocker:
        blocker.exec_driver_sql("LOCK TABLE byrd.steps IN SHARE MODE")
        process = subprocess.Popen([sys.executable, "-c", _SUBMITS], cwd=ROOT, env=cluster.env)
        wait_until(lambda: cluster.rows(waits), timeout=60, what="a submitter in the middle of its transaction")
        process.kill()
        process.wait()
    wait_until(lambda: not cluster.rows(waits))
    assert cluster.rows("SELECT count(*) FROM byrd.runs") == [(0,)]
    assert cluster.rows("SELECT count(*) FROM byrd.events") == [(0,)]
    cluster.worker(APP)
    assert app.engine.submit(app.echo.s("anew"), key="mine").get(timeout=30) == "anew"
    check_database(cluster.database_url)


def test_a_group_published_while_its_submitter_dies(cluster: Cluster) -> None:
    """Killed after some of its messages: those steps run from them, the others from the relay's."""
    app = cluster.app(APP)
    script = """
import itertools, os, signal
from celery import group
from celery.signals import after_task_publish
import tests.apps.basic as shop
count = itertools.count(1)
after_task_publish.connect(lambda **_: next(count) == 7 and os.kill(os.getpid(), signal.SIGKILL), weak=False)
shop.engine.submit(group(shop.echo.s(n) for n in range(20)))
"""
    assert run_script(cluster, script) == -signal.SIGKILL
    [run] = app.engine.list()
    cluster.worker(APP)
    assert run.get(timeout=60) == list(range(20))
    assert {step.attempt for step in run.steps() if step.task} == {1}
    check_database(cluster.database_url)
