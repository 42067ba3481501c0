"""Processes that stand by while one of them copes: none is kept from work for longer, whatever becomes of that one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain

from byrd.task.standby import Standby
from tests.cluster import Cluster, Worker, wait_until
from tests.invariants import check_database
from tests.notes import lines

APP = "tests.apps.slices"


@pytest.fixture
def app(cluster: Cluster) -> Iterator[Any]:
    yield cluster.app(APP)
    check_database(cluster.database_url)


def start(cluster: Cluster, notes: Path, *, concurrency: int = 2, **settings: float) -> Worker:
    """Start a worker; ``true``, ``stand_by``, ``slice``: its times in seconds, where they are not the usual ones."""
    env = {"NOTES": str(notes)} | {f"TEST_{name.upper()}_SECONDS": str(value) for name, value in settings.items()}
    worker = cluster.worker(APP, concurrency=concurrency, env=env)
    assert cluster.app(APP).engine.submit(cluster.app(APP).tick.s(0)).get(timeout=60) == 0
    return worker


def pretend(app: Any, notes: Path, *, once: bool = False) -> int:
    """Have one process say, until ``enough``, that it copes; return its process id."""
    app.cope.apply_async((str(notes / "enough"), once))
    copes: list[dict[str, Any]] = wait_until(lambda: lines(notes, "copes"), timeout=30)
    return int(copes[0]["pid"])


def enough(notes: Path) -> None:
    (notes / "enough").touch()


def ran_at(notes: Path, run: Any) -> float:
    return float(next(line["at"] for line in lines(notes, "ran") if line["id"] == run.steps()[0].id))


def in_a_fork(*calls: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        for call in calls:
            call()
        os._exit(0)
    os.waitpid(pid, 0)


# ------------------------------------------------------------------------------------------------- what is said


def test_others_know_that_a_process_copes_and_that_it_does_not_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byrd.task.standby._TRUE_SECONDS", 60.0)
    standby = Standby()
    assert not standby.another_copes()
    in_a_fork(lambda: standby.say(copes=True))
    assert standby.another_copes()
    in_a_fork(lambda: standby.say(copes=False))  # it is not for others to take it back
    assert standby.another_copes()
    in_a_fork(lambda: standby.say(copes=True), lambda: standby.say(copes=False))
    assert not standby.another_copes()


def test_what_a_process_says_of_itself_does_not_keep_it() -> None:
    standby = Standby()
    standby.say(copes=True)
    assert standby.copes()
    assert not standby.another_copes()


def test_what_was_said_is_true_for_a_moment_only() -> None:
    standby = Standby()
    in_a_fork(lambda: standby.say(copes=True))
    wait_until(lambda: not standby.another_copes(), timeout=5)


# ------------------------------------------------------------------------------------------------- on a worker


def test_short_steps_let_others_stand_by_and_long_ones_do_not(cluster: Cluster, app: Any, notes: Path) -> None:
    start(cluster, notes, concurrency=1)
    for run in app.engine.submit_many(app.tick.s(n) for n in range(300)):  # it learns that they are short
        assert run.wait(timeout=60) == "succeeded"

    def said(steps: list[Any]) -> list[bool]:
        run = app.engine.submit(chain(*steps))
        run.get(timeout=60)
        return [json.loads(step.result) for step in run.steps() if step.task == app.does_cope.name]

    short = said([app.does_cope.si() for _ in range(30)])
    assert sum(short) > 15
    long = said([step for _ in range(5) for step in (app.nap.si(0.06), app.does_cope.si())])
    assert not any(long)


def has_run(notes: Path, run: Any) -> bool:
    return any(line["id"] == run.steps()[0].id for line in lines(notes, "ran"))


def test_a_step_waits_while_another_process_copes(cluster: Cluster, app: Any, notes: Path) -> None:
    start(cluster, notes, slice=30, stand_by=30, true=2)
    pretend(app, notes)
    run = app.engine.submit(app.tick.s(1))
    time.sleep(0.5)
    assert not has_run(notes, run)
    enough(notes)
    assert run.get(timeout=30) == 1
    [_, ended] = lines(notes, "copes")
    assert ended["at"] <= ran_at(notes, run) < ended["at"] + 5


@pytest.mark.parametrize("settings", [{"slice": 0.2, "stand_by": 30}, {"slice": 30}])
def test_no_step_waits_for_longer_than_its_slice_takes_nor_than_a_moment(
    cluster: Cluster, app: Any, notes: Path, settings: dict[str, float]
) -> None:
    start(cluster, notes, concurrency=2, true=30, **settings)
    pretend(app, notes)
    began = time.time()
    run = app.engine.submit(app.tick.s(1))
    assert run.get(timeout=30) == 1
    assert ran_at(notes, run) < began + 10
    assert len(lines(notes, "copes")) == 1, "it says so still"
    enough(notes)


@pytest.mark.parametrize("fault", ["killed", "frozen", "busy"])
def test_a_process_that_copes_no_more_without_saying_so(cluster: Cluster, app: Any, notes: Path, fault: str) -> None:
    start(cluster, notes, slice=30, stand_by=30, true=2)
    pid = pretend(app, notes, once=fault == "busy")
    run = app.engine.submit(app.tick.s(1))
    time.sleep(0.2)
    assert not has_run(notes, run)
    if fault != "busy":
        os.kill(pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    gone = time.time()
    try:
        assert run.get(timeout=30) == 1
    finally:
        if fault == "frozen":
            os.kill(pid, signal.SIGCONT)
        enough(notes)
    assert ran_at(notes, run) < gone + 10


def test_a_worker_that_is_told_to_stop_waits_for_none_that_stands_by(cluster: Cluster, app: Any, notes: Path) -> None:
    worker = start(cluster, notes, slice=60, stand_by=60, true=60)
    pretend(app, notes, once=True)
    run = app.engine.submit(app.tick.s(1))
    time.sleep(0.3)
    assert not has_run(notes, run)
    enough(notes)
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began < 20
    start(cluster, notes)
    assert run.get(timeout=60) == 1
    assert len([line for line in lines(notes, "ran") if line["id"] == run.steps()[0].id]) == 1
