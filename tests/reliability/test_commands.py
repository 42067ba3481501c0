"""Commands of operators that meet completion, failure, recovery, replacement and each other, on real workers."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import chain

from byrd.engine import Run
from byrd.errors import IllegalTransitionError
from byrd.testing.invariants import check_database
from tests.cluster import Cluster, Worker, wait_until

APP = "tests.apps.commands"
LEASE = 3.0  # of that app
FINAL = {"succeeded", "failed", "cancelled"}
#: What the canvases of the app give, in order.
VALUES = [7, 10, 7, 7, 7, 7, 2]


def wait_status(run: Run, *wanted: str, timeout: float = 60) -> None:
    wait_until(lambda: run.status in wanted, timeout=timeout, what=lambda: f"{wanted}: {run.status}, {run.why()}")


def rolled_back(cluster: Cluster, run: Run) -> bool:
    return bool(cluster.rows("SELECT 1 FROM byrd.steps WHERE run_id = %s AND kind = 'compensation' LIMIT 1", run.id))


def given(run: Run, command: str) -> bool:
    """Give a command; tell whether the run's status allowed it."""
    try:
        if command == "undo":
            run.cancel(compensate=True)
        else:
            getattr(run, command)()
    except IllegalTransitionError:
        return False
    return True


# ------------------------------------------------------------------------------------------------- the storm


class Storm:
    """Operators who give random commands to random runs, and one who looks whether the tables are in order."""

    def __init__(self, cluster: Cluster, runs: list[Run], *, operators: int = 4) -> None:
        self._cluster, self._runs = cluster, runs
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(operators + 1)
        self._futures = [self._pool.submit(self._operate, seed) for seed in range(operators)]
        self._futures.append(self._pool.submit(self._look))

    def end(self) -> Counter[str]:
        """Stop; return how often each command was carried out, and raise what any of them met."""
        self._stop.set()
        self._pool.shutdown()
        found: Counter[str] = Counter()
        for future in self._futures:
            found += future.result()
        return found

    def _operate(self, seed: int) -> Counter[str]:
        moments, done = random.Random(seed), Counter[str]()
        while not self._stop.wait(moments.random() * 0.05):
            command = moments.choice(["pause", "resume", "cancel", "undo", "retry", "retry", "pause", "resume"])
            done[command] += given(moments.choice(self._runs), command)
        return done

    def _look(self) -> Counter[str]:
        looks = Counter[str]()
        while not self._stop.wait(0.3):
            check_database(self._cluster.database_url)
            looks["looks"] += 1
        return looks


@pytest.mark.parametrize("fault", ["none", "worker killed", "redis flushed"])
def test_a_storm_of_commands(cluster: Cluster, tmp_path: Path, fault: str) -> None:
    app, well = cluster.app(APP), tmp_path / "well"
    env = {"TEST_WELL": str(well)}
    doomed = cluster.worker(APP, concurrency=2, env=env)
    cluster.worker(APP, pool="threads", concurrency=4, env=env)
    runs = [app.engine.submit(canvas) for _ in range(8) for canvas in app.canvases()]
    storm = Storm(cluster, runs)
    ends = "SELECT count(*) FROM byrd.events WHERE event IN ('succeeded','failed','cancelled')"
    wait_until(lambda: cluster.rows(ends)[0][0] > 20, timeout=90)
    if fault == "worker killed":
        doomed.kill()
        cluster.worker(APP, concurrency=2, env=env)
    elif fault == "redis flushed":
        with cluster.redis() as client:
            client.flushall()
    before = cluster.rows(ends)[0][0]
    wait_until(lambda: cluster.rows(ends)[0][0] > before + 100, timeout=150)
    done = storm.end()
    print(f"commands carried out: {dict(done)}")  # noqa: T201 - a figure
    assert all(done[command] for command in ("pause", "resume", "cancel", "retry", "looks"))
    well.touch()
    for run in runs:  # now every one is brought to its end
        given(run, "resume")
    for index, run in enumerate(runs):
        wait_status(run, *FINAL)
        for _ in range(3):  # an attempt that was cancelled may have seen that all was not well
            if run.status == "succeeded" or rolled_back(cluster, run):
                break
            assert given(run, "retry"), run.why()
            wait_status(run, *FINAL)
        assert run.status == "succeeded" or rolled_back(cluster, run), (run.why(), run.steps(), run.history())
        if run.status == "succeeded":
            assert run.get(timeout=10) == VALUES[index % len(VALUES)]
        else:
            assert {step.status for step in run.steps() if step.kind == "compensation"} == {"succeeded"}
    check_database(cluster.database_url)


# ------------------------------------------------------------------------------------------------- at the same time as


def let_pass(moment: float) -> None:
    wait_until(lambda: time.monotonic() > moment)


def hold(cluster: Cluster, go: Path, count: int, *, after: Any = None) -> tuple[Worker, list[Run]]:
    """Have a worker run the first steps of so many runs, until the file is there."""
    app = cluster.app(APP)
    worker = cluster.worker(APP, pool="threads", concurrency=count)
    runs = [app.engine.submit(chain(app.wait_for_file.s(str(go), n), app.echo.s())) for n in range(count)]
    wait_until(lambda: all(run.steps()[0].status == "running" for run in runs), timeout=60)
    return worker, runs


def test_runs_paused_as_their_worker_dies_stay_paused_and_go_on_when_resumed(cluster: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    doomed, runs = hold(cluster, go, 12)
    cluster.worker(APP, pool="threads", concurrency=12)
    doomed.kill()
    died, paused = time.monotonic(), []
    for number, run in enumerate(runs):  # one after the other, from before its lease ends to after its recovery
        let_pass(died + number * (LEASE + 4) / 12)
        assert given(run, "pause")
        paused.append(run)
    go.touch()
    # Those that another worker has begun again go on to their end; the others were given back, and wait.
    wait_until(lambda: not cluster.rows("SELECT 1 FROM byrd.steps WHERE status = 'running'"), timeout=60)
    assert {run.status for run in runs} == {"paused"}
    check_database(cluster.database_url)
    assert any(run.steps()[0].status == "ready" for run in runs)
    for run in runs:
        run.resume()
    assert [run.get(timeout=60) for run in runs] == list(range(12))
    assert {run.steps()[0].attempt for run in runs} == {2}
    check_database(cluster.database_url)


def test_runs_cancelled_as_recovery_takes_their_steps_back_end_as_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    doomed, runs = hold(cluster, go, 12)
    cluster.worker(APP, pool="threads", concurrency=12)
    doomed.kill()
    died = time.monotonic()
    for number, run in enumerate(runs):
        let_pass(died + number * (LEASE + 4) / 12)
        assert given(run, "cancel")
    go.touch()  # the steps of some run again by now, and have no checkpoint
    for run in runs:
        wait_status(run, "cancelled")
    assert {run.steps()[1].status for run in runs} == {"cancelled"}
    assert {run.steps()[0].status for run in runs} <= {"cancelled", "succeeded"}
    check_database(cluster.database_url)


def test_a_run_retried_while_its_old_attempt_is_a_zombie(cluster: Cluster, tmp_path: Path) -> None:
    """Cancelled, given up, retried, and running again: then the first worker wakes up, and may write nothing."""
    app, go = cluster.app(APP), tmp_path / "go"
    zombie, [run] = hold(cluster, go, 1)
    zombie.sigstop()
    try:
        cluster.worker(APP, concurrency=1)
        run.cancel()
        wait_status(run, "cancelled")
        run.retry()
        wait_until(lambda: run.steps()[0].status == "running", timeout=60)
        assert run.steps()[0].attempt == 2
    finally:
        zombie.sigcont()
    go.touch()
    assert run.get(timeout=60) == 0
    zombie.wait_for_log("attempt 1 (may not write|does not own|stopped)")
    assert run.wait(timeout=30) == "succeeded"
    outcomes = cluster.rows("SELECT a.attempt, a.outcome FROM byrd.attempts a")
    assert outcomes in ([(1, "preempted")], [(1, "cancelled")])
    assert app.engine.submit(app.echo.s(1)).get(timeout=60) == 1
    assert zombie.running
    check_database(cluster.database_url)


@pytest.mark.parametrize(
    "commands", [("cancel", "retry"), ("pause", "cancel"), ("pause", "resume"), ("cancel", "undo")]
)
def test_the_same_command_from_many_at_once_is_carried_out_once(
    cluster: Cluster, tmp_path: Path, commands: tuple[str, str]
) -> None:
    """Of twenty who give two commands at once to each run, the order decides; no command is half carried out."""
    app = cluster.app(APP)
    cluster.worker(APP, concurrency=2, env={"TEST_WELL": str(tmp_path / "well")})
    runs = [app.engine.submit(chain(app.reserve.si(), app.work.si(), app.work.si(label=7))) for _ in range(10)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda at: given(runs[at // 8], commands[at % 2]), range(80)))
    assert any(results)
    for run in runs:
        given(run, "resume")
        wait_status(run, *FINAL)
        while run.status != "succeeded" and not rolled_back(cluster, run):
            run.retry()
            wait_status(run, *FINAL)
    check_database(cluster.database_url)
