"""Clocks that are stepped while everything runs: Postgres's own, a worker's, beat's.

A clock is stepped for real as far as the process can see: a library that the test compiles is preloaded into it, and
shifts what the system says of the time of day (:file:`clock.c`).
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from celery import chain, chord, group

from byrd import embedded, store
from byrd.engine import Run
from tests.beat.conftest import (
    BEAT,
    Start,
    call_migrate,
    django_on,
    django_project,
    libpq_url,
    schedules_template,
    schedules_url,
    start,
)
from tests.cluster import Cluster, ClusterFactory, wait_until
from tests.invariants import check_database
from tests.reliability.test_beat import due_times, fired, once_at, schedule, soon, started

__all__ = ["django_project", "schedules_template", "schedules_url", "start"]  # fixtures

APP = "tests.apps.basic"
LEASE = 3.0  # of that app
HOUR = 3600.0


class Clock:
    """The time of day of the processes that have it in their environment."""

    def __init__(self, library: Path, file: Path) -> None:
        self._file = file
        file.write_bytes(struct.pack("d", 0.0))
        file.chmod(0o644)
        self.env = {"LD_PRELOAD": str(library), "TEST_CLOCK_FILE": str(file)}

    def step(self, seconds: float) -> None:
        """Set it that far from the true time, at once, and in all its processes."""
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("d", seconds))


@pytest.fixture(scope="module")
def library() -> Iterator[Path]:
    """The compiled shim, in a folder that a server's own user can read."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("stepping a process's clock needs a C compiler, and Linux")
    folder = Path(tempfile.mkdtemp(prefix="byrd-clock-", dir="/tmp"))
    try:
        folder.chmod(0o755)
        target = folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        built = subprocess.run(
            [compiler, "-shared", "-fPIC", "-O2", "-o", target, source, "-ldl", "-lm"],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if built.returncode != 0:
            pytest.skip(f"the C compiler cannot build the clock: {built.stderr[-300:]}")
        target.chmod(0o755)
        yield target
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def clock(library: Path) -> Clock:
    """A clock that is right so far."""
    handle, name = tempfile.mkstemp(dir=library.parent)
    os.close(handle)
    return Clock(library, Path(name))


class SteppedPostgres(embedded.EmbeddedPostgres):
    """A Postgres that goes by the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(in_memory=True)
        self._env = [f"{name}={value}" for name, value in clock.env.items()]

    def _command(self, port: int) -> Sequence[str | Path]:
        return ["/usr/bin/env", *self._env, *super()._command(port)]


@pytest.fixture
def stepped_postgres(clock: Clock) -> Iterator[SteppedPostgres]:
    """A migrated Postgres that goes by the clock, and nobody else does."""
    with SteppedPostgres(clock) as server:
        store.migrate(server.url)
        clock.step(7200)
        assert 7100 < skew(server.url) < 7300  # or all of these tests would be vain
        clock.step(0)
        yield server


@pytest.fixture
def stepped(stepped_postgres: SteppedPostgres, cluster_on: ClusterFactory, broker_url: str) -> Iterator[Cluster]:
    """A cluster on that Postgres; in the end its tables are in order."""
    made = cluster_on(database_url=stepped_postgres.url, broker_url=broker_url)
    yield made
    check_database(made.database_url)


def skew(url: str) -> float:
    """Return how far Postgres's clock is ahead of the true one."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT extract(epoch FROM clock_timestamp())")
        return float(cursor.fetchone()[0]) - time.time()


def wait_running(run: Run) -> None:
    wait_until(lambda: run.steps()[0].status == "running", what=lambda: f"a running step: {run.why()}")


def let_pass(seconds: float) -> None:
    """Let true time pass."""
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > seconds, timeout=seconds + 30)


def canvas(app: Any) -> Any:
    return chain(app.add.s(1, 1), group(app.flaky.s(1), app.add.s(1), app.echo.s()), app.echo.si(7))


# ------------------------------------------------------------------------------------------------- Postgres's clock


@pytest.mark.parametrize("hours", [1, -1], ids=["forward", "back"])
def test_postgres_clock_steps_while_workers_run(stepped: Cluster, clock: Clock, tmp_path: Path, hours: int) -> None:
    """Nobody who lives is given up for it, and what is under way goes on at once."""
    app, go = stepped.app(APP), tmp_path / "go"
    workers = [stepped.worker(APP), stepped.worker(APP)]
    held = [app.engine.submit(app.wait_for_file.s(str(go), n) | app.add.s(1)) for n in range(2)]
    for run in held:
        wait_running(run)
    let_pass(LEASE + 2)  # recovery is awake
    runs = [app.engine.submit(canvas(app)) for _ in range(30)]
    clock.step(hours * HOUR)
    runs += [app.engine.submit(canvas(app)) for _ in range(30)]
    began = time.monotonic()
    assert [run.get(timeout=60) for run in runs] == [7] * len(runs)
    took = time.monotonic() - began
    let_pass(max(0.0, 3 * LEASE - took))
    assert stepped.rows("SELECT max(preemptions), max(attempt) FROM byrd.steps WHERE status = 'running'") == [(0, 1)]
    go.touch()
    assert [run.get(timeout=60) for run in held] == [1, 2]
    assert all(worker.running for worker in workers)
    assert any("clock was stepped by" in worker.log_text() for worker in workers)


def test_a_worker_that_dies_as_the_clock_goes_back_is_given_up_within_two_leases(
    stepped: Cluster, clock: Clock, tmp_path: Path
) -> None:
    """Its lease would last an hour more by the new time."""
    app, go = stepped.app(APP), tmp_path / "go"
    doomed = stepped.worker(APP, concurrency=1)
    run = app.engine.submit(app.wait_for_file.s(str(go), 1) | app.add.s(1))
    wait_running(run)
    stepped.worker(APP, concurrency=1)
    let_pass(LEASE + 2)
    doomed.kill()
    clock.step(-HOUR)
    go.touch()
    began = time.monotonic()
    assert run.get(timeout=60) == 2
    took = time.monotonic() - began
    print(f"given up, and run again, {took:.1f} s after the clock went back")  # noqa: T201 - a figure
    assert took < 8 * LEASE
    assert [step.attempt for step in run.steps()] == [2, 1]


def test_what_waits_when_the_clock_goes_back_waits_no_longer_for_it(stepped: Cluster, clock: Clock) -> None:
    """Ready with its message lost, ready in a delay, waiting for a retry: none of them for an hour more."""
    app = stepped.app(APP)
    stepped.worker(APP, queues=["celery"])
    lost = app.engine.submit(app.add.s(1, 1).set(queue="later"))
    delayed = app.engine.submit(app.add.s(2, 2).set(countdown=8))
    hours = app.engine.submit(app.add.s(3, 3).set(countdown=600))
    eta = datetime.now(UTC) + timedelta(seconds=20)
    at = app.engine.submit(app.add.s(4, 4).set(eta=eta))
    paused = app.engine.submit(app.add.s(5, 5).set(queue="later"))
    paused.pause()
    with stepped.redis() as client:
        client.delete("later")
    let_pass(LEASE + 2)
    clock.step(-HOUR)
    stepped.worker(APP, queues=["later"])
    assert lost.get(timeout=40) == 2
    assert delayed.get(timeout=40) == 4
    paused.resume()
    assert paused.get(timeout=40) == 10
    [(left,)] = stepped.rows(
        "SELECT extract(epoch FROM run_at - clock_timestamp()) FROM byrd.steps WHERE run_id = %s", hours.id
    )
    assert 400 < left < 600
    assert at.steps()[0].run_at == eta  # a time of day stays one
    assert at.status == "running"
    hours.cancel()
    clock.step(0)  # the hour has passed: its time is now
    assert at.get(timeout=60) == 8


def test_a_clock_that_goes_forward_and_back_again_leaves_nothing_behind(stepped: Cluster, clock: Clock) -> None:
    """What was ready in the wrong hour would else wait for it."""
    app = stepped.app(APP)
    workers = [stepped.worker(APP), stepped.worker(APP)]
    let_pass(LEASE + 2)
    runs = []
    for hours in (1, 0, 1, 0):
        clock.step(hours * HOUR)
        runs += [app.engine.submit(canvas(app)) for _ in range(15)]
        runs += [app.engine.submit(app.add.s(3, 4).set(countdown=1)) for _ in range(15)]
        let_pass(LEASE)  # long enough to be seen by somebody: a heartbeat is enough
    assert [run.get(timeout=60) for run in runs] == [7] * len(runs)
    assert stepped.rows("SELECT coalesce(sum(preemptions), 0) FROM byrd.steps") == [(0,)]
    assert all(worker.running for worker in workers)


def test_a_clock_that_went_back_while_no_worker_was_there(stepped: Cluster, clock: Clock, tmp_path: Path) -> None:
    """Nobody saw it, so those that start look for themselves."""
    app, go = stepped.app(APP), tmp_path / "go"
    doomed = stepped.worker(APP, concurrency=1)
    held = app.engine.submit(app.wait_for_file.s(str(go), 1))
    wait_running(held)
    ready = app.engine.submit(app.add.s(1, 1))
    doomed.kill()
    with stepped.redis() as client:
        client.flushdb()
    clock.step(-HOUR)
    go.touch()
    stepped.worker(APP)
    assert ready.get(timeout=40) == 2
    assert held.get(timeout=40) == 1


def test_compensations_run_in_reverse_order_though_the_clock_went_back_between_the_steps(
    stepped: Cluster, clock: Clock, tmp_path: Path
) -> None:
    app, notes = stepped.app("tests.apps.clock"), tmp_path / "notes"
    stepped.worker("tests.apps.clock")
    steps = [app.reserve.si(str(notes), name) for name in ("a", "b", "c", "d")]
    gates = [app.wait_for_file.si(str(tmp_path / name)) for name in ("one", "two")]
    run = app.engine.submit(
        chain(steps[0], gates[0], chord([steps[1], app.echo.si(1)], steps[2]), gates[1], steps[3], app.fail.si())
    )
    wait_until(lambda: "+a" in lines(notes))
    clock.step(-HOUR)
    (tmp_path / "one").touch()
    wait_until(lambda: "+c" in lines(notes), timeout=40)
    clock.step(-2 * HOUR)
    (tmp_path / "two").touch()
    assert run.wait(timeout=60) == "failed"
    assert lines(notes) == ["+a", "+b", "+c", "+d", "-d", "-c", "-b", "-a"]
    assert run.why()  # times that run backwards can be told of, too


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# ------------------------------------------------------------------------------------------------- a worker's clock


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_workers_clock_steps_while_it_works(cluster: Cluster, clock: Clock, tmp_path: Path, pool: str) -> None:
    """Leases, delays, retries and deadlines go by Postgres's clock; a worker's own is for its log."""
    app, go = cluster.app(APP), tmp_path / "go"
    worker = cluster.worker(APP, pool=pool, env=clock.env)
    held = app.engine.submit(app.wait_for_file.s(str(go), 1) | app.add.s(1), timeout=120)
    wait_running(held)
    runs = []
    for hours in (2, -2, 24, 0):
        clock.step(hours * HOUR)
        runs += [app.engine.submit(canvas(app), timeout=120) for _ in range(8)]
        runs += [app.engine.submit(app.add.s(3, 4).set(countdown=1, expires=120)) for _ in range(8)]
        let_pass(LEASE / 2)
    assert [run.get(timeout=60) for run in runs] == [7] * len(runs)
    let_pass(LEASE)
    go.touch()
    assert held.get(timeout=30) == 2
    assert cluster.rows("SELECT max(preemptions) FROM byrd.steps") == [(0,)]
    assert worker.running
    check_database(cluster.database_url)


# ------------------------------------------------------------------------------------------------- beat


def check_pace(found: list[datetime], every: float) -> None:
    """Each due time is a point of the schedule's grid, none is there twice, and none comes before its time."""
    assert len(found) == len(set(found))
    assert all(moment.timestamp() % every == 0 for moment in found)


@pytest.mark.parametrize("hours", [1, -1, 30 * 24], ids=["forward", "back", "a month forward"])
def test_beats_clock_steps(schedules_url: str, start: Start, clock: Clock, hours: int) -> None:
    """Schedules go by Postgres's clock: a beat whose machine has another fires nothing early, late, or twice."""
    often, rare = schedule("often", every=2), schedule("rare", every=20)
    one = started(start(*BEAT, **clock.env))
    fired(schedules_url, often, 2)
    clock.step(hours * HOUR)
    began = datetime.now(UTC)
    fired(schedules_url, often, len(due_times(schedules_url, often)) + 3)
    fired(schedules_url, rare, len(due_times(schedules_url, rare)) + 1, seconds=45)
    clock.step(0)
    fired(schedules_url, often, len(due_times(schedules_url, often)) + 3)
    fired(schedules_url, rare, len(due_times(schedules_url, rare)) + 1, seconds=45)
    check_pace(due_times(schedules_url, often), 2)
    now = datetime.now(UTC)
    assert all(began - timedelta(minutes=2) < moment <= now for moment in due_times(schedules_url, often))
    assert one.popen.poll() is None
    check_database(schedules_url)


def test_two_beats_of_which_one_is_an_hour_ahead(schedules_url: str, start: Start, clock: Clock) -> None:
    clock.step(HOUR)
    often, daily = schedule("often", every=2), once_at("daily", soon(600))
    beats = [started(start(*BEAT, **clock.env)), started(start(*BEAT))]
    fired(schedules_url, often, 6)
    assert due_times(schedules_url, daily) == []  # it is due in ten minutes
    check_pace(due_times(schedules_url, often), 2)
    often.refresh_from_db()
    assert often.total_run_count == len(due_times(schedules_url, often))
    assert [one.stop() for one in beats] == [0, 0]


@pytest.mark.parametrize("hours", [1, -1], ids=["forward", "back"])
def test_postgres_clock_steps_while_a_beat_runs(
    stepped_postgres: SteppedPostgres, schedules_url: str, start: Start, clock: Clock, hours: int
) -> None:
    """Forward: the latest due time of the hour that was jumped over is fired.  Back: no schedule falls silent."""
    url = libpq_url(stepped_postgres.url)
    with django_on(url):
        call_migrate()
        often, rare = schedule("often", every=2), schedule("rare", every=20)
        daily = once_at("daily", soon(1800))
        one = started(start(*BEAT, BYRD_DATABASE_URL=url))
        fired(url, often, 2)
        clock.step(hours * HOUR)
        for task, seconds in ((often, 30), (rare, 60)):
            fired(url, task, len(due_times(url, task)) + 2, seconds=seconds)
        assert due_times(url, daily) == ([daily.start_time] if hours > 0 else [])
        clock.step(0)  # and right again: what was fired for the wrong hour is not fired again when that hour comes
        for task, seconds in ((often, 30), (rare, 60)):
            fired(url, task, len(due_times(url, task)) + 2, seconds=seconds)
        if hours > 0:
            assert "a clock was wrong" in one.text()
        for task, every in ((often, 2), (rare, 20)):
            check_pace(due_times(url, task), every)
        assert due_times(url, daily) == ([daily.start_time] if hours > 0 else [])
        assert one.popen.poll() is None
    check_database(url)
