"""Cancel with terminate: what does not stop by itself is ended, its neighbours go on, and the wish outlives all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain, group

from byrd.engine import Run
from byrd.errors import ArgumentError, IllegalTransitionError
from byrd.store import termination
from tests.cluster import Cluster, Worker, wait_until
from tests.invariants import check_database
from tests.notes import lines

APP = "tests.apps.stubborn"


@pytest.fixture
def app(cluster: Cluster) -> Iterator[Any]:
    yield cluster.app(APP)
    check_database(cluster.database_url)


def start(cluster: Cluster, notes: Path, **options: Any) -> Worker:
    return cluster.worker(APP, env={"NOTES": str(notes)}, **options)


def wait_noted(notes: Path, name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = wait_until(lambda: lines(notes, name), what=f"a note {name!r}")
    return found[0]


def events(run: Run, name: str) -> list[dict[str, Any]]:
    return [line["detail"] for line in run.history() if line["event"] == name]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_task_that_ignores_everything_is_ended(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=2)
    run = app.engine.submit(chain(app.stubborn.s("one"), app.tick.si(1)))
    other = app.engine.submit(app.stubborn.s("other"))
    wait_until(lambda: len(lines(notes, "stubborn")) == 2, what="both to run")
    pids = {line["name"]: line["pid"] for line in lines(notes, "stubborn")}
    run.cancel(terminate=True, grace=1.0, by="ann")
    assert run.status == "cancelling"
    [waits, _] = run.why()
    assert "what has not stopped by" in waits
    assert "is ended then, as ann wants it" in waits
    assert run.wait(timeout=30) == "cancelled"
    wait_until(lambda: not is_alive(pids["one"]), what="its process to be gone")
    assert [step.status for step in run.steps()] == ["cancelled", "cancelled"]
    assert events(run, "terminate_requested") == [{"grace": 1.0, "by": "ann"}]
    [ended] = events(run, "terminated")
    assert ended == {"worker": "worker1@localhost", "process": pids["one"], "ended": True, "by": "ann"}
    [attempt] = [line for line in run.history() if line["event"] == "cancelled" and line["attempt"] == 1]
    assert attempt["detail"]["exc_message"] == ["terminated"]
    assert "by ann; 1 step that did not stop in time was ended" in run.why()[0]
    (notes / "other.go").touch()
    assert other.get(timeout=30) == "other", "its neighbour goes on"
    assert other.steps()[0].attempt == 1
    assert app.engine.submit(app.tick.s(7)).get(timeout=30) == 7, "the pool is whole again"


def test_neighbours_in_the_same_slice_are_not_lost(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=1)
    for run in app.engine.submit_many(app.tick.s(n) for n in range(300)):
        assert run.wait(timeout=60) == "succeeded"
    doomed, *others = app.engine.submit_many([app.stubborn.s("slice"), *(app.tick.s(n) for n in range(300, 340))])
    members = app.engine.submit(group(app.tick.s(n) for n in range(340, 380)))
    wait_noted(notes, "stubborn")
    doomed.cancel(terminate=True, grace=0)
    assert doomed.wait(timeout=30) == "cancelled"
    assert [run.get(timeout=60) for run in others] == list(range(300, 340))
    assert members.get(timeout=60) == list(range(340, 380))
    assert set(Counter(line["n"] for line in lines(notes, "tick")).values()) == {1}, "nothing is run twice"


def test_a_plain_task_may_tidy_up(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=1)
    run = app.engine.submit(app.tidy.s("house"))
    pid = wait_noted(notes, "tidy")["pid"]
    run.cancel(terminate=True, grace=0)
    assert run.wait(timeout=30) == "cancelled"
    assert lines(notes, "tidied") == [{"pid": pid, "name": "house"}]
    assert [found["ended"] for found in events(run, "terminated")] == [True]


def test_what_stops_in_the_grace_time_is_not_ended(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=1)
    run = app.engine.submit(app.careful.s("x"))
    pid = wait_noted(notes, "careful")["pid"]
    run.cancel(terminate=True)
    assert run.wait(timeout=30) == "cancelled"
    assert not events(run, "terminated")
    assert is_alive(pid)
    assert "ended" not in run.why()[0]


def test_a_cancel_that_takes_too_long_is_hurried(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=1)
    run = app.engine.submit(app.stubborn.s("late"))
    wait_noted(notes, "stubborn")
    run.cancel(by="ann")
    assert "`byrd cancel " in run.why()[0]
    run.cancel(terminate=True, grace=600, by="bob")
    with pytest.raises(IllegalTransitionError, match="without compensation"):
        run.cancel(terminate=True, compensate=True)
    with pytest.raises(IllegalTransitionError):
        run.cancel()
    run.cancel(terminate=True, grace=0, by="eve")
    assert run.wait(timeout=30) == "cancelled"
    assert [found["by"] for found in events(run, "terminate_requested")] == ["bob", "eve"]
    assert [found["by"] for found in events(run, "terminated")] == ["eve"]
    run.retry()
    assert run.info.terminate_at is None
    (notes / "late.go").touch()
    assert run.get(timeout=30) == "late"


def test_nothing_is_undone_before_the_process_is_gone(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=2)
    run = app.engine.submit(chain(app.book.s("hotel"), app.stubborn.si("trip")))
    wait_noted(notes, "stubborn")
    run.cancel(terminate=True, grace=0, compensate=True)
    assert run.wait(timeout=30) == "cancelled"
    assert [(line["name"], line["alive"]) for line in lines(notes, "unbook")] == [("hotel", [])]


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_a_pool_that_cannot_end_anything_shuts_the_step_out(app: Any, cluster: Cluster, notes: Path, pool: str) -> None:
    start(cluster, notes, pool=pool, concurrency=1 if pool == "solo" else 2)
    run = app.engine.submit(chain(app.book.s("room"), app.stubborn.si("held"), app.tick.si(1)))
    wait_noted(notes, "stubborn")
    run.cancel(terminate=True, grace=0.5)
    run_is_over = lambda: run.steps()[1].status == "cancelled"  # noqa: E731
    wait_until(run_is_over, what="the step to be shut out")
    assert run.wait(timeout=30) == "cancelled"
    assert [found["ended"] for found in events(run, "terminated")] == [False]
    assert "could not be ended, for its pool has no process to end: it may still be at work" in run.why()[0]
    assert not lines(notes, "came back")
    (notes / "held.go").touch()
    wait_noted(notes, "came back")
    assert app.engine.submit(app.tick.s(7)).get(timeout=30) == 7
    assert [step.status for step in run.steps()] == ["succeeded", "cancelled", "cancelled"]


@pytest.mark.parametrize("compensate", [False, True])
def test_the_worker_is_killed_in_between(app: Any, cluster: Cluster, notes: Path, compensate: bool) -> None:
    first = start(cluster, notes, concurrency=2)
    run = app.engine.submit(chain(app.book.s("hotel"), app.stubborn.si("doomed")))
    wait_noted(notes, "stubborn")
    run.cancel(terminate=True, grace=1.0, compensate=compensate)
    first.kill()
    start(cluster, notes, concurrency=2)
    assert run.wait(timeout=60) == "cancelled"
    assert len(lines(notes, "stubborn")) == 1
    assert len(lines(notes, "unbook")) == compensate


def test_a_workflow_within_is_ended_too(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=2)
    run = app.engine.submit(chain(app.inner.si("within"), app.tick.si(1)))
    wait_noted(notes, "stubborn")
    run.cancel(terminate=True, grace=0, by="ann")
    assert run.wait(timeout=30) == "cancelled"
    [child] = app.engine.list(workflow="stubborn.inner")
    assert child.wait(timeout=30) == "cancelled"
    assert [(found["ended"], found["by"]) for found in events(child, "terminated")] == [(True, f"run {run.id}")]


def test_a_grace_that_is_no_time(app: Any, cluster: Cluster) -> None:
    run = app.engine.submit(app.tick.s(1))
    for grace in (-1, float("nan"), 1e300):
        with pytest.raises(ArgumentError, match="no number of seconds"):
            run.cancel(terminate=True, grace=grace)
    with pytest.raises(ArgumentError, match="give both"):
        run.cancel(grace=1)
    assert run.status == "running"
    run.cancel(terminate=True, grace=600)
    assert run.status == "cancelled", "nothing of it ran"


def test_the_grace_time_is_that_of_the_last_cancel(app: Any) -> None:
    run = app.engine.submit(app.tick.s(1))
    store = app.engine.runtime.store
    assert store.run(termination.grace_of, run.id) is None
    run.cancel(terminate=True, grace=2.5)
    assert (run.status, run.info.terminate_at) == ("cancelled", None), "nothing of it ran"
    assert store.run(termination.grace_of, run.id) == 2.5
    run.retry()
    assert store.run(termination.grace_of, run.id) is None
