"""Priorities on a real worker: in the broker, among those who wait for a limit, and what cannot be one."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery, group

import byrd
from byrd.errors import ArgumentError
from tests.cluster import Cluster, wait_until

APP = "tests.apps.limited"


@pytest.fixture
def limited(cluster: Cluster) -> Any:
    app = cluster.app(APP)
    cluster.rows(app.WITNESS)
    return app


def values(cluster: Cluster, what: str) -> list[str]:
    """What the calls were called with, in the order in which they began."""
    return [row[0] for row in cluster.rows("SELECT value FROM witness WHERE what = %s ORDER BY at", what)]


def test_steps_that_wait_in_the_broker_start_by_their_priority(cluster: Cluster, limited: Any) -> None:
    late = limited.engine.submit(group(limited.free.s(n).set(priority=9) for n in range(20)))
    middle = limited.engine.submit(limited.free.s("middle").set(priority=6))
    first = limited.engine.submit(group(limited.free.s(f"first {n}").set(priority=0) for n in range(3)))
    plain = limited.engine.submit(limited.free.s("plain"))  # as 0
    cluster.worker(APP, concurrency=1)
    assert first.get(timeout=60) == [f"first {n}" for n in range(3)]
    assert (plain.get(timeout=60), middle.get(timeout=60), late.get(timeout=60)) == ("plain", "middle", [*range(20)])
    began = values(cluster, "free")
    places = {value: began.index(value) for value in began}
    assert max(places[value] for value in ("first 0", "first 1", "first 2", "plain")) < 8, began
    assert places["middle"] < 10, began


def test_those_who_wait_for_a_limit_are_served_by_their_priority(cluster: Cluster, limited: Any) -> None:
    cluster.worker(APP)
    name = f"{APP}.serve"
    limited.engine.limits.set(name, concurrency=0)

    def line_up(canvas: Any) -> Any:
        before = waiting()
        run = limited.engine.submit(canvas)
        wait_until(lambda: waiting() == before + len(run.steps()))
        return run

    def waiting() -> int:
        sql = "SELECT count(*) FROM byrd.steps WHERE status = 'ready' AND limit_no IS NOT NULL AND limit_slot IS NULL"
        return int(cluster.rows(sql)[0][0])

    runs = [line_up(limited.serve.s("a", f"9 {n}").set(priority=9)) for n in range(3)]
    runs += [line_up(limited.serve.s("a", "3").set(priority=3)), line_up(limited.serve.s("a", "none"))]
    [said] = runs[3].why()
    assert said.endswith("; 1 step waits before it.")
    [said] = runs[2].why()
    assert said.endswith("; 4 steps wait before it.")
    limited.engine.limits.reset(name)
    assert [run.get(timeout=60) for run in runs] == ["a"] * 5
    assert values(cluster, "serve a") == ["none", "3", "9 0", "9 1", "9 2"]


def test_what_is_no_priority_is_refused_and_nothing_is_written(cluster: Cluster, limited: Any) -> None:
    said = r"priority=.* is not a whole number from 0, which is served first, to 9"
    for priority in (10, -1, 2.5, True, "high", "", [1]):
        with pytest.raises(ArgumentError, match=said):
            limited.engine.submit(limited.echo.s(1).set(priority=priority))
    assert cluster.rows("SELECT count(*) FROM byrd.runs") == [(0,)]


def test_a_priority_comes_from_the_signature_the_task_or_a_setting(cluster: Cluster) -> None:
    app = Celery("plain", set_as_current=False)
    app.conf.task_default_priority = "4"  # as the environment says it
    engine = byrd.Byrd(app, database_url=cluster.database_url)

    def priority_of(sig: Any) -> Any:
        [step] = engine.runtime.plan(sig).steps
        return step.options.get("priority"), step.solo

    def call() -> None:
        """A task."""

    own = app.task(name="own", priority=7, shared=False)(call)
    usual = app.task(name="usual", shared=False)(call)
    assert priority_of(own.s()) == (7, True)
    assert priority_of(own.s().set(priority=2)) == (2, True)
    assert priority_of(own.s().set(priority=None)) == (None, False)
    assert priority_of(usual.s()) == (4, True)
    wrong = app.task(name="wrong", priority=11, shared=False)(call)
    with pytest.raises(ArgumentError, match="wrong: priority=11"):
        priority_of(wrong.s())
    engine.close()
