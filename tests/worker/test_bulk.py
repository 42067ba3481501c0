"""Bulk jobs on real workers: each run is acted on once, whatever is killed."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from celery import chain

import byrd
from byrd.engine import Run
from byrd.errors import ArgumentError
from tests.cluster import Cluster, wait_until
from tests.invariants import check_database

APP = "tests.apps.bulk"
NUMBER = int(os.environ.get("BYRD_BULK_RUNS", "500"))


@pytest.fixture
def app(cluster: Cluster) -> Iterator[Any]:
    yield cluster.app(APP)
    check_database(cluster.database_url)


def many(app: Any, number: int) -> list[Run]:
    """Submit runs of a workflow, quickly."""
    return [app.later.submit(n) for n in range(number)]


def events(cluster: Cluster, name: str) -> Counter[str]:
    """How often each run has such an event."""
    return Counter(run for (run,) in cluster.rows("SELECT run_id::text FROM byrd.events WHERE event = %s", name))


def statuses(cluster: Cluster) -> dict[str, int]:
    sql = "SELECT status, count(*) FROM byrd.runs WHERE workflow <> 'byrd.bulk' GROUP BY status"
    return dict(cluster.rows(sql))


def test_two_thousand_runs_are_paused_resumed_and_cancelled(app: Any, cluster: Cluster) -> None:
    runs = many(app, 2000)
    job = app.engine.bulk("pause", workflow="bulk.later", by="ann")
    first = cluster.worker(APP, concurrency=2)
    half_way = "SELECT 1 FROM byrd.checkpoints WHERE name = 'runs' AND completed BETWEEN 100 AND 1900"
    wait_until(lambda: cluster.rows(half_way), what="the middle of the job")
    first.kill()
    assert 0 < statuses(cluster).get("paused", 0) < 2000
    cluster.worker(APP, concurrency=2)
    assert job.get(timeout=120) == {"action": "pause", "matched": 2000, "done": 2000, "skipped": 0}
    assert (job.steps()[0].attempt, job.steps()[0].preemptions) == (2, 1)
    assert events(cluster, "paused") == {run.id: 1 for run in runs}
    [paused] = [line for line in runs[7].history() if line["event"] == "paused"]
    assert paused["detail"] == {"by": f"ann (bulk {job.id[:8]})"}
    assert f"by ann (bulk {job.id[:8]})" in runs[7].why()[0]

    for run in runs[:30]:  # some change before the job comes to them
        run.cancel()
    job = app.engine.bulk("resume", status="paused", workflow="bulk.later")
    found = job.get(timeout=120)
    assert (found["done"], found["matched"]) == (1970, 1970)
    assert statuses(cluster) == {"cancelled": 30, "running": 1970}
    job = app.engine.bulk("cancel", everything=True, terminate=True, grace=0)
    assert job.get(timeout=120)["done"] == 1970
    assert statuses(cluster) == {"cancelled": 2000}
    assert set(events(cluster, "cancel_requested").values()) == {1}
    assert [row.status for row in app.engine.list(workflow="byrd.bulk")] == ["succeeded"] * 3


@pytest.mark.timeout(120 + NUMBER // 20)
def test_a_bulk_cancel_takes_its_time_by_the_number_of_runs(app: Any, cluster: Cluster) -> None:
    """10,000 are cancelled in less than a minute on a machine that is idle; here, a bound that is generous."""
    app.engine.submit_many(chain(byrd.sleep(3600), app.add.si(1, 1)) for _ in range(NUMBER))
    cluster.worker(APP, concurrency=1)
    began = time.monotonic()
    job = app.engine.bulk("cancel", everything=True)
    assert job.get(timeout=60 + NUMBER / 25) == {"action": "cancel", "matched": NUMBER, "done": NUMBER, "skipped": 0}
    print(f"a bulk cancel of {NUMBER:,} runs took {time.monotonic() - began:.1f} s")  # noqa: T201 - a figure
    assert dict(cluster.rows("SELECT status, count(*) FROM byrd.runs GROUP BY status")) == {
        "cancelled": NUMBER, "succeeded": 1,
    }  # fmt: skip
    assert set(events(cluster, "cancel_requested").values()) == {1}


def test_runs_that_change_meanwhile_are_skipped(app: Any, cluster: Cluster) -> None:
    """The job's first batch waits for a run that somebody has to himself; what changes until then is no error."""
    runs = many(app, 5)
    with psycopg2.connect(cluster.database_url) as held, held.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(1652126308, hashtext(%s))", (max(run.id for run in runs),))
        job = app.engine.bulk("pause", workflow="bulk.later")
        cluster.worker(APP, concurrency=1)
        wait_until(
            lambda: cluster.rows("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"),
            what="the job to wait",
        )
        last = max(runs, key=lambda run: run.id)
        cursor.execute("UPDATE byrd.runs SET status = 'paused' WHERE id = %s", (last.id,))
        cursor.execute("UPDATE byrd.steps SET wake_at = 'infinity' WHERE run_id = %s AND status = 'ready'", (last.id,))
    assert job.get(timeout=60) == {"action": "pause", "matched": 5, "done": 4, "skipped": 1}
    assert events(cluster, "paused")[last.id] == 0


def test_retry_goes_by_the_error(app: Any, cluster: Cluster, tmp_path: Path) -> None:
    cluster.worker(APP, env={"NOTES": str(tmp_path)})
    runs = [app.fails.submit(kind) for kind in ("value", "key", "value")]
    assert [run.wait(timeout=30) for run in runs] == ["failed"] * 3
    (tmp_path / "well").touch()
    assert app.engine.bulk_matches("retry", everything=True) == 3
    assert app.engine.bulk_matches("retry", error="no «value»") == 2
    assert app.engine.bulk_matches("retry", error="KeyError") == 1
    assert app.engine.bulk_matches("retry", error="ValueError", older_than=3600) == 0
    assert app.engine.bulk_matches("retry", error="ValueError", newer_than=timedelta(hours=1)) == 2
    job = app.engine.bulk("retry", error="KeyError")
    assert job.get(timeout=30) == {"action": "retry", "matched": 1, "done": 1, "skipped": 0}
    assert runs[1].wait(timeout=30) == "succeeded"
    assert [run.status for run in runs] == ["failed", "succeeded", "failed"]


def test_jobs_leave_jobs_alone_and_can_be_paused_and_cancelled(app: Any, cluster: Cluster) -> None:
    many(app, 3)
    waiting = app.engine.bulk("pause", everything=True)
    stopped = app.engine.bulk("pause", everything=True)
    stopped.cancel()
    waiting.pause()
    resuming = app.engine.bulk("resume", everything=True)
    cluster.worker(APP, concurrency=1)
    assert resuming.get(timeout=30) == {"action": "resume", "matched": 0, "done": 0, "skipped": 0}
    assert waiting.status == "paused"
    waiting.resume()
    assert waiting.get(timeout=30)["done"] == 3
    assert stopped.wait(timeout=30) == "cancelled"
    cancelling = app.engine.bulk("cancel", everything=True)
    assert cancelling.get(timeout=30)["done"] == 3
    assert cancelling.status == "succeeded"


def test_a_key_makes_one_job(app: Any) -> None:
    assert app.engine.bulk("pause", everything=True, key="k") == app.engine.bulk("pause", everything=True, key="k")
    assert app.engine.workflows == ["bulk.fails", "bulk.later"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(action="stop", everything=True), "'stop' is nothing that can be done in bulk"),
        (dict(action="cancel"), "without a filter"),
        (dict(action="cancel", status="failed"), "cancel acts on runs that are paused or running, not on 'failed'"),
        (dict(action="cancel", status="cancelling"), "not on 'cancelling'"),
        (dict(action="retry", status=[]), "matches no run"),
        (dict(action="pause", workflow="byrd.bulk"), "left alone"),
        (dict(action="pause", workflow=""), "not empty"),
        (dict(action="retry", error="a\0b"), "NUL"),
        (dict(action="pause", older_than=-1), "older_than=-1 is no number of seconds"),
        (dict(action="pause", newer_than=float("nan")), "no number of seconds"),
        (dict(action="pause", everything=True, compensate=True), "of cancel, not of pause"),
        (dict(action="cancel", everything=True, grace=3), "give both"),
        (dict(action="cancel", everything=True, terminate=True, grace=-3), "no number of seconds"),
    ],
)
def test_what_cannot_be_done_is_refused(app: Any, cluster: Cluster, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        app.engine.bulk(**asked)
    with pytest.raises(ArgumentError, match=words):
        app.engine.submit("byrd.bulk", **asked)
    assert cluster.rows("SELECT count(*) FROM byrd.runs") == [(0,)]


def test_statuses_that_terminate_allows(app: Any) -> None:
    assert app.engine.bulk_matches("cancel", status="cancelling", terminate=True) == 0
