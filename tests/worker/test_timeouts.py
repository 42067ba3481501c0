"""Time-outs of steps on real workers and pools: what is ended, by whom, and what comes of it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from celery import chain, group

import byrd
from byrd.errors import HeartbeatTimeoutError, ScheduleToStartTimeoutError, StartToCloseTimeoutError
from tests.cluster import Cluster, wait_until
from tests.invariants import check_database

APP = "tests.apps.policies"


@pytest.fixture
def notes(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tasks leave what they see."""
    monkeypatch.setenv("NOTES", str(tmp_path))
    return tmp_path


@pytest.fixture
def app(cluster: Cluster, notes: Path) -> Any:
    return cluster.app(APP)


def noted(notes: Path, name: str) -> list[dict[str, Any]]:
    path = notes / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- start to close --------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_an_attempt_that_runs_for_too_long_is_ended(cluster: Cluster, app: Any, notes: Path, pool: str) -> None:
    """In a pool of processes the process is; elsewhere the attempt can write nothing any more."""
    seconds = 60 if pool in ("prefork", "gevent") else 4  # a thread comes back by itself only
    cluster.worker(APP, pool=pool, concurrency=1 if pool == "solo" else 2)
    run = app.engine.submit(chain(app.limited.s("late", seconds), app.echo.s()))
    with pytest.raises(StartToCloseTimeoutError, match="attempt 1 ran for longer than 1 s"):
        run.get(timeout=30)
    assert "StartToCloseTimeoutError: attempt 1 ran for longer than 1 s" in run.why()[0]
    [first] = noted(notes, "late")
    if pool == "prefork":
        wait_until(lambda: not alive(first["pid"]), timeout=10)
    elif pool != "gevent":
        wait_until(lambda: noted(notes, "late.done"))
    assert app.engine.submit(app.echo.s(7)).get(timeout=30) == 7  # the worker goes on
    assert run.status == "failed"
    check_database(cluster.database_url)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_under_a_policy_it_is_tried_again(cluster: Cluster, app: Any, notes: Path, pool: str) -> None:
    cluster.worker(APP, pool=pool)
    seconds = 60 if pool == "prefork" else 4
    run = app.engine.submit(chain(app.limited_and_retried.s("late", seconds), app.echo.s()))
    assert run.get(timeout=30) == 2
    [retried] = [row for row in run.history() if row["event"] == "retried"]
    assert "StartToCloseTimeoutError" in str(retried)
    assert run.steps()[0].retries == 1
    if pool == "threads":  # what it returned, late, is nothing
        wait_until(lambda: len(noted(notes, "late.done")) == 2)
        assert run.get(timeout=1) == 2
    check_database(cluster.database_url)


def test_celerys_time_limit_is_tried_again_too(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    run = app.engine.submit(app.celery_limited.s("late"))
    assert run.get(timeout=30) == 2
    assert "TimeLimitExceeded" in str([row for row in run.history() if row["event"] == "retried"])


def test_the_time_out_of_a_signature(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    short, longer = byrd.Timeouts(start_to_close=1), byrd.Timeouts(start_to_close=30)
    with pytest.raises(StartToCloseTimeoutError):
        app.engine.submit(app.slow.s("late").set(byrd_timeouts=short)).get(timeout=30)
    assert app.engine.submit(app.limited.s("late", 2).set(byrd_timeouts=longer)).get(timeout=30) == 1
    assert app.engine.submit(app.limited.s("late", 2).set(byrd_timeouts=None)).get(timeout=30) == 1


def test_a_worker_that_dies_before_the_time_is_over_costs_an_attempt_only(
    cluster: Cluster, app: Any, notes: Path
) -> None:
    doomed = cluster.worker(APP)
    run = app.engine.submit(app.slow.s("late", 60, 1).set(byrd_timeouts=byrd.Timeouts(start_to_close=20)))
    wait_until(lambda: noted(notes, "late"))
    doomed.kill()
    cluster.worker(APP)
    assert run.get(timeout=30) == 2
    assert [row["event"] for row in run.history()].count("preempted") == 1


# -- schedule to start -----------------------------------------------------------------------------


def test_a_step_that_nobody_starts_fails(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    timeouts = byrd.Timeouts(schedule_to_start=1.5)
    nobodys = app.echo.s().set(queue="nobody", byrd_timeouts=timeouts)
    nobodys.link_error(app.echo.si("told"))
    run = app.engine.submit(chain(app.echo.s(1), nobodys))
    wait_until(lambda: any("ScheduleToStartTimeoutError" in reason for reason in run.why()), timeout=5)
    with pytest.raises(ScheduleToStartTimeoutError, match=r"nobody has started it within 1\.5 s"):
        run.get(timeout=30)
    assert run.wait(timeout=30) == "failed"
    assert run.steps()[1].attempt == 0
    assert [(step.status, step.result) for step in run.steps() if step.kind == "errback"] == [("succeeded", '"told"')]
    assert "ScheduleToStartTimeoutError: nobody has started it within 1.5 s" in run.why()[0]
    check_database(cluster.database_url)


def test_a_step_behind_others_is_started_in_time_or_never(cluster: Cluster, app: Any, notes: Path) -> None:
    cluster.worker(APP, concurrency=1)
    patient, hasty = byrd.Timeouts(schedule_to_start=60), byrd.Timeouts(schedule_to_start=1)
    first = app.engine.submit(app.slow.s("slow", 4, 1))
    wait_until(lambda: noted(notes, "slow"))
    runs = [app.engine.submit(app.echo.s(7).set(byrd_timeouts=timeouts)) for timeouts in (patient, hasty)]
    assert runs[0].get(timeout=30) == 7
    assert runs[1].wait(timeout=30) == "failed"
    assert first.get(timeout=30) == 1


# -- heartbeat -------------------------------------------------------------------------------------


def test_a_hung_process_is_killed_and_the_task_goes_on_from_its_checkpoint(
    cluster: Cluster, app: Any, notes: Path
) -> None:
    cluster.worker(APP)
    run = app.engine.submit(app.counting.s("count", 8, hang_at=5))
    assert run.get(timeout=40) == [8, 2]
    [first, second] = noted(notes, "count")
    assert first["pid"] != second["pid"]
    assert not alive(first["pid"])
    done = [row["item"] for row in noted(notes, "count.items")]
    assert done in ([0, 1, 2, 3, 4, 5, 5, 6, 7], [0, 1, 2, 3, 4, 5, 4, 5, 6, 7])
    [lost] = [row for row in run.history() if row["event"] == "preempted"]
    assert "HeartbeatTimeoutError" in str(lost)
    assert run.steps()[0].preemptions == 1
    check_database(cluster.database_url)


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_where_no_process_can_be_killed_another_attempt_is_made(
    cluster: Cluster, app: Any, notes: Path, pool: str
) -> None:
    for _ in range(2):
        cluster.worker(APP, pool=pool, concurrency=1 if pool == "solo" else 2)
    run = app.engine.submit(app.counting.s("count", 4, hang_at=2))
    assert run.get(timeout=40) == [4, 2]
    check_database(cluster.database_url)


def test_a_task_that_hangs_each_time_fails_in_the_end(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    policy = byrd.Retry(max_attempts=2, first=0.1)
    run = app.engine.submit(app.counting.s("count", 4, hang_at=1, attempts=99).set(byrd_retry=policy))
    with pytest.raises(HeartbeatTimeoutError, match=r"attempt 2 gave no sign of life for 1\.5 s"):
        run.get(timeout=40)
    assert run.steps()[0].retries == 1


def test_a_frozen_process_gives_no_sign_of_life(cluster: Cluster, app: Any, notes: Path) -> None:
    cluster.worker(APP)
    run = app.engine.submit(app.counting.s("count", 10))
    wait_until(lambda: len(noted(notes, "count.items")) > 2)
    [first] = noted(notes, "count")
    os.kill(first["pid"], signal.SIGSTOP)
    assert run.get(timeout=40) == [10, 2]
    wait_until(lambda: not alive(first["pid"]))


def test_a_task_that_says_that_it_is_alive_takes_its_time(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    beating, patient = app.engine.submit(app.beating.s(5)), app.engine.submit(app.patient.s())
    assert beating.get(timeout=30) == 1
    assert patient.get(timeout=30) == 1
    assert app.beating.s(0.1).apply().get() == 0  # outside a run it is nothing
    # Not each call is a statement: at most one in a quarter of the time that the task has.
    [(beats,)] = cluster.rows("SELECT count(*) FROM byrd.checkpoints WHERE name = 'beat:'")
    assert beats == 2  # one row of each step


def test_it_stops_where_it_says_so_when_its_run_is_cancelled(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    run = app.engine.submit(app.beating.s(60))
    wait_until(lambda: run.steps()[0].status == "running")
    run.cancel()
    assert run.wait(timeout=15) == "cancelled"


def test_a_worker_that_was_frozen_itself_gives_its_steps_time(cluster: Cluster, app: Any, notes: Path) -> None:
    """Nobody could have given a sign of life, nor heard of it: a suspended virtual machine, say."""
    worker = cluster.worker(APP, env={"TEST_LEASE_SECONDS": "20"})
    run = app.engine.submit(app.counting.s("count", 20))
    wait_until(lambda: len(noted(notes, "count.items")) > 2)
    worker.sigstop()
    time.sleep(5)
    worker.sigcont()
    assert run.get(timeout=40) == [20, 1]


# -- what why says ---------------------------------------------------------------------------------

TIME = r"(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d"


def test_why_says_until_when(cluster: Cluster, app: Any, notes: Path) -> None:
    timeouts = byrd.Timeouts(start_to_close=100, schedule_to_start=200, heartbeat=50)
    run = app.engine.submit(app.slow.s("slow", 6, 1).set(byrd_timeouts=timeouts))
    [reason] = run.why()
    assert re.search(rf"; it fails with ScheduleToStartTimeoutError unless it is started by {TIME}\.$", reason), reason
    cluster.worker(APP)
    wait_until(lambda: noted(notes, "slow"))
    [reason] = run.why()
    assert re.search(rf"; it may run until {TIME} \(in 1 min (39|40) s, its start_to_close\)", reason), reason
    assert re.search(rf"; it is taken for hung at {TIME} \(in (49|50) s\) without a sign of life before", reason), (
        reason
    )
    assert run.get(timeout=30) == 1


def test_why_says_which_attempt_of_how_many(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    policy = byrd.Retry(max_attempts=7, first=100, jitter=False)
    run = app.engine.submit(app.plain.s(9), retry=policy)
    wait_until(lambda: any("is tried again" in reason for reason in run.why()))
    [reason] = run.why()
    said = rf"is tried again \(attempt 2 of 7\) at {TIME} \(in .*\), after ValueError: no\."
    assert re.search(said, reason), reason
    endless = byrd.Retry(max_attempts=None, budget=3600, first=100)
    run = app.engine.submit(app.plain.s(9), retry=endless)
    wait_until(lambda: any("is tried again" in reason for reason in run.why()))
    assert re.search(rf"\(attempt 2, until {TIME} at the latest\) at {TIME}", run.why()[0]), run.why()


# -- together --------------------------------------------------------------------------------------


def test_a_group_some_of_whose_members_are_hung(cluster: Cluster, app: Any) -> None:
    for _ in range(2):
        cluster.worker(APP)
    members = [app.counting.s(f"count{n}", 3, hang_at=1 if n % 3 == 0 else -1) for n in range(6)]
    run = app.engine.submit(group(members))
    assert run.get(timeout=60) == [[3, 2 if n % 3 == 0 else 1] for n in range(6)]
    check_database(cluster.database_url)
