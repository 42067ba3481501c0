"""Tasks that misbehave: they end their process, block it, fork it, or return what nobody can store."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import group

from byrd.engine import Run
from byrd.errors import ArgumentError, StepLostError
from tests.cluster import Cluster, Worker, wait_until
from tests.invariants import check_database
from tests.reliability.memory import MemoryGroup, NoMemoryGroupError, memory_group
from tests.reliability.test_workers import history, lines

APP = "tests.apps.rough"


@pytest.fixture(scope="module")
def worker(module_cluster: Cluster) -> Worker:
    return module_cluster.worker(APP, concurrency=2)


@pytest.fixture
def app(module_cluster: Cluster, worker: Worker) -> Iterator[Any]:
    yield module_cluster.app(APP)
    check_database(module_cluster.database_url)
    assert worker.running


def bystander(app: Any, path: Path) -> Run:
    """Start a step in the worker's other process."""
    run: Run = app.engine.submit(app.wait_for_file.s(str(path), 1) | app.add.s(1))
    wait_until(lambda: run.steps()[0].status == "running")
    return run


# -- the end of its process ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "os._exit(0)", "os._exit(3)", "abort", "segmentation fault"])
def test_a_task_that_ends_its_pool_process(app: Any, tmp_path: Path, how: str) -> None:
    beside = bystander(app, tmp_path / "go")
    run = app.engine.submit(app.die.s(how, str(tmp_path / "notes")) | app.echo.s())
    assert run.get(timeout=60) == "survived after 2"
    (tmp_path / "go").touch()
    assert beside.get(timeout=30) == 2
    [step, _] = run.steps()
    assert (step.attempt, step.preemptions, beside.steps()[0].attempt) == (2, 1, 1)
    (_, died), (_, again) = lines(tmp_path / "notes")
    assert again - died < 5


def test_a_task_that_ends_the_pool_process_of_a_solo_worker(cluster: Cluster, tmp_path: Path) -> None:
    """There, the process is the worker: its lease has to run out."""
    app = cluster.app(APP)
    doomed = cluster.worker(APP, pool="solo")
    run = app.engine.submit(app.die.s("os._exit(3)", str(tmp_path / "notes")) | app.echo.s())
    wait_until(lambda: not doomed.running)
    cluster.worker(APP, pool="solo")
    assert run.get(timeout=60) == "survived after 2"
    assert run.steps()[0].preemptions == 1
    check_database(cluster.database_url)


def test_poison_is_stopped_and_takes_nobody_along(cluster: Cluster, tmp_path: Path) -> None:
    """A step that kills its whole worker each time, beside others: it is found out, and they come to their end.

    Its worker is started again each time, as a supervisor does.
    """
    app = cluster.app(APP)
    worker = cluster.worker(APP, pool="threads", concurrency=4, env={"TEST_LEASE_SECONDS": "1"})
    beside = [app.engine.submit(app.sleep.s(6, n) | app.add.s(1)) for n in range(2)]
    poison = app.engine.submit(app.die.s("SIGKILL to the main process", str(tmp_path / "notes"), 99, 1.0))
    deadline = time.monotonic() + 200
    while poison.status != "failed" and time.monotonic() < deadline:
        if not worker.running:
            worker.restart()
        time.sleep(0.1)
    with pytest.raises(StepLostError, match="lost its worker 6 times; the last: the lease of worker worker1@localhost"):
        poison.get(timeout=10)
    assert "StepLostError" in poison.why()[0]
    assert len(lines(tmp_path / "notes")) == 6
    if not worker.running:
        worker.restart()
    assert [run.get(timeout=60) for run in beside] == [1, 2]
    assert max(run.steps()[0].preemptions for run in beside) <= 4
    check_database(cluster.database_url)


# -- memory ----------------------------------------------------------------------------------------


def test_a_task_without_memory_fails(app: Any) -> None:
    """Its process lives, if the limit is its own: it gets a MemoryError."""
    run = app.engine.submit(app.raises.s("MemoryError"))
    with pytest.raises(MemoryError):
        run.get(timeout=60)
    assert app.engine.submit(app.add.s(1, 2)).get(timeout=30) == 3


@pytest.fixture
def little_memory() -> Iterator[MemoryGroup]:
    """A control group, to put processes into that are to have little memory."""
    with ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group())
        except NoMemoryGroupError as exc:
            pytest.skip(str(exc))
        yield group


@pytest.mark.parametrize("whose", ["its process", "its worker"])
def test_a_pool_process_that_the_kernel_kills_for_want_of_memory(
    cluster: Cluster, little_memory: MemoryGroup, tmp_path: Path, whose: str
) -> None:
    """The OOM killer takes the process that has most, and gives no reason: its step runs again, the others go on.

    The limit is that of the process, or of the whole worker, as in a container.
    """
    app = cluster.app(APP)
    worker = cluster.worker(APP, concurrency=2)
    beside = bystander(app, tmp_path / "beside")
    run = app.engine.submit(app.outgrows.s(str(tmp_path), 1024) | app.echo.s())
    wait_until(lambda: lines(tmp_path / "notes"))
    [victim] = lines(tmp_path / "notes")
    little_memory.limit(256)
    little_memory.add(*([victim] if whose == "its process" else [worker.pid, *worker.pids()]))
    (tmp_path / "go").touch()
    assert run.get(timeout=60) == 2
    assert little_memory.kills() == 1
    assert victim not in worker.pids()
    assert f"the pool process {victim} is gone while it ran" in worker.log_text()
    assert history(cluster, run) == [(0, 1, "preempted")]
    (tmp_path / "beside").touch()
    assert beside.get(timeout=30) == 2
    assert history(cluster, beside) == []
    assert worker.running
    check_database(cluster.database_url)


# -- exceptions ------------------------------------------------------------------------------------

ERRORS = {
    "SystemExit": "SystemExit",
    "KeyboardInterrupt": "KeyboardInterrupt",
    "GeneratorExit": "GeneratorExit",
    "BaseException": "Bare",
    "RecursionError": "RecursionError",
    "repr raises": "BadManners",
    "cannot be pickled": "UnpickleableExceptionWrapper",  # as in Celery's own results
    "arguments that JSON has not": "ValueError",
    "NUL and lone surrogates": "ValueError",
    "a name that is too long": "ValueError",
    "a group of errors": "ExceptionGroup",
}


@pytest.mark.parametrize("what", ERRORS)
def test_whatever_a_task_raises_fails_its_step(app: Any, what: str) -> None:
    run = app.engine.submit(app.raises.s(what) | app.echo.s())
    assert run.wait(timeout=60) == "failed"
    [step, after] = run.steps()
    assert (step.status, step.attempt, step.preemptions, after.status) == ("failed", 1, 0, "skipped")
    assert step.error is not None
    assert json.loads(step.error)["exc_type"] == ERRORS[what]
    assert ERRORS[what] in run.why()[0]
    assert type(run.get(timeout=10, propagate=False)).__name__ in (ERRORS[what], "Exception")


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what",
    ["an object", "an object without repr", "a function", "a tuple as key", "too deep", "a ring",
     "too large an integer", "a generator"],
)  # fmt: skip
def test_a_result_that_json_cannot_hold(app: Any, what: str) -> None:
    run = app.engine.submit(app.returns.s(what) | app.echo.s())
    assert run.wait(timeout=60) == "failed"
    [step, _] = run.steps()
    assert step.error is not None
    found = json.loads(step.error)
    assert (found["exc_type"], step.attempt) == ("EncodeError", 1)
    assert "cannot be held by JSON" in run.why()[0]


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("NUL", "a\0b"),
        ("lone surrogates", "\udcff"),
        ("a large integer", 10**4000),
        ("keys that are no strings", None),
        ("bytes", b"\xff\0"),
    ],
)
def test_an_unusual_result(app: Any, what: str, value: Any) -> None:
    """Recorded, and passed on, as Celery's JSON does."""
    run = app.engine.submit(app.returns.s(what) | app.echo.s())
    found = run.get(timeout=60)
    assert app.engine.submit(group(app.returns.s(what), app.echo.s(1)) | app.echo.s()).get(timeout=30) == [found, 1]
    if what == "keys that are no strings":
        assert found == {"1": "a", "null": "b", "false": "c", "1.5": "d"}
    else:
        assert found == value


def test_numbers_that_are_none(app: Any) -> None:
    nan, plus, minus = app.engine.submit(app.returns.s("NaN") | app.echo.s()).get(timeout=60)
    assert math.isnan(nan)
    assert (plus, minus) == (math.inf, -math.inf)


def test_deep_results(app: Any) -> None:
    """Near the limit of recursion, what could be written may be too deep to be read: nothing is tried twice."""
    runs = [app.engine.submit(app.nested.s(depth) | app.size.s()) for depth in (100, 500, *range(800, 1000, 5))]
    statuses = [run.wait(timeout=60) for run in runs]
    assert statuses[:2] == ["succeeded"] * 2
    assert statuses[-1] == "failed"
    for run in runs:
        assert all(step.attempt <= 1 for step in run.steps()), run.why()
    for run in (run for run, status in zip(runs, statuses, strict=True) if status == "failed"):
        assert "RecursionError" in run.why()[0] or "EncodeError" in run.why()[0]


# -- size ------------------------------------------------------------------------------------------

_MB = 2**20


def test_values_of_50_megabytes(app: Any) -> None:
    """A result and what takes it, an argument, a checkpoint and a memoised value."""
    assert app.engine.submit(app.big.s(50) | app.size.s()).get(timeout=100) == 50 * _MB
    assert len(app.engine.submit(app.big.s(50)).get(timeout=100)) == 50 * _MB
    assert app.engine.submit(app.size.s("x" * 50 * _MB)).get(timeout=100) == 50 * _MB
    assert app.engine.submit(app.big_checkpoint.s(50)).get(timeout=100) == 100 * _MB


def test_values_that_are_too_large(app: Any) -> None:
    """Refused by name, before Postgres is troubled, and not tried again."""
    run = app.engine.submit(app.big.s(300) | app.size.s())
    assert run.wait(timeout=100) == "failed"
    assert "the result is 314,572,802 bytes of JSON, more than byrd_max_value_bytes=134,217,728" in run.why()[0]
    assert run.steps()[0].attempt == 1
    with pytest.raises(ArgumentError, match=r"together 314,572,8.. bytes of JSON, more than byrd_max_value_bytes"):
        app.engine.submit(app.size.s("x" * 300 * _MB))
    with pytest.raises(ArgumentError, match="the arguments of 3 steps are together"):
        app.engine.submit(group(app.size.s("x" * 100 * _MB), app.size.s("x" * 100 * _MB)))
    run = app.engine.submit(app.big_checkpoint.s(300))
    assert run.wait(timeout=100) == "failed"
    assert "CheckpointError" in run.why()[0]
    assert "the cursor is 314,572,802 bytes of JSON" in run.why()[0]


def test_a_group_whose_results_are_together_too_large(app: Any) -> None:
    """Postgres holds no text of 1 GB: the last member fails, for it cannot be recorded with the others."""
    run = app.engine.submit(group(app.big.s(100) for _ in range(11)) | app.size.s())
    assert run.wait(timeout=250) == "failed"
    assert sorted(step.status for step in run.steps()).count("succeeded") == 10
    assert "the result cannot be recorded" in run.why()[0]
    assert all(step.attempt <= 1 for step in run.steps())


# -- what a process should not do ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["returns", "raises", "exits"])
def test_a_task_that_forks_itself_and_comes_back_twice(app: Any, worker: Worker, tmp_path: Path, how: str) -> None:
    """The pool's own process records; the other one ends, and takes no messages."""
    run = app.engine.submit(app.forks.s(str(tmp_path / "notes"), how) | app.echo.s())
    assert run.get(timeout=60) == "parent"
    [(one, _), (two, _)] = lines(tmp_path / "notes")
    assert one != two
    assert [step.attempt for step in run.steps()] == [1, 1]
    assert "came back from it, and is ended" in worker.log_text()


def test_a_task_that_takes_the_signals(app: Any, module_cluster: Cluster, worker: Worker) -> None:
    """It and what runs after it in its process still run into hard time limits, which end the process."""
    runs = [app.engine.submit(app.ignores_signals.s()) for _ in range(4)]
    deaf = {run.get(timeout=30) for run in runs}
    hard = [app.engine.submit(app.hard.s(30)) for _ in range(2)]
    assert [run.wait(timeout=60) for run in hard] == ["failed"] * 2
    wait_until(lambda: not deaf & set(worker.pids()))
    assert app.engine.submit(app.add.s(1, 2)).get(timeout=30) == 3


def test_a_task_that_closes_all_files(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    cluster.worker(APP, concurrency=2)
    beside = bystander(app, tmp_path / "go")
    run = app.engine.submit(app.closes_files.s() | app.echo.s())
    pid = run.get(timeout=60)
    (tmp_path / "go").touch()
    assert beside.get(timeout=30) == 2
    assert pid is not None
    assert [app.engine.submit(app.add.s(n, 1)).get(timeout=60) for n in range(6)] == [1, 2, 3, 4, 5, 6]
    check_database(cluster.database_url)


def test_tasks_that_leak(cluster: Cluster, tmp_path: Path) -> None:
    """A pool process that has grown too large is replaced between steps: nothing is lost or repeated."""
    app = cluster.app(APP)
    worker = cluster.worker(APP, concurrency=2, env={"TEST_MEMORY_PER_CHILD": "200000"})
    notes = tmp_path / "notes"
    runs = [app.engine.submit(app.leaks.s(40, str(notes)) | app.echo.s()) for _ in range(16)]
    pids = [run.get(timeout=120) for run in runs]
    assert sorted(pids) == sorted(lines(notes))
    assert len(set(pids)) > 3
    assert all(step.attempt == 1 for run in runs for step in run.steps())
    assert worker.running
    check_database(cluster.database_url)


def test_pool_processes_that_are_replaced_after_each_task(cluster: Cluster) -> None:
    app = cluster.app(APP)
    cluster.worker(APP, concurrency=2, env={"TEST_TASKS_PER_CHILD": "1"})
    runs = [app.engine.submit(app.leaks_threads.s(3) | app.leaks_files.si(5000)) for _ in range(6)]
    assert all(run.get(timeout=120) for run in runs)
    assert all(step.attempt == 1 for run in runs for step in run.steps())
    check_database(cluster.database_url)


# -- a rolling deployment --------------------------------------------------------------------------


def test_a_task_that_half_of_the_workers_do_not_have(cluster: Cluster) -> None:
    """A step comes to a worker that has its task; meanwhile the others tell what they were sent, and go on."""
    app = cluster.app(APP)
    old = cluster.worker(APP, env={"TEST_OLD_CODE": "1"})
    first = app.engine.submit(app.brand_new.s(0) | app.echo.s())
    old.wait_for_log("Received unregistered task")
    assert "but no live worker on queue 'celery' has the task tests.apps.rough.brand_new registered" in first.why()[0]
    cluster.worker(APP)
    runs = [app.engine.submit(app.brand_new.s(n) | app.echo.s()) for n in range(1, 20)]
    for n, run in enumerate([*runs, first], 1):
        assert run.get(timeout=120) == n % 20
    assert old.running
    check_database(cluster.database_url)
