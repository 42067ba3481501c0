"""Worker processes that are killed, stopped, frozen or starved: what each does to the steps that run there."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import termios
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import group
from celery.exceptions import TimeLimitExceeded

from byrd.engine import Run
from tests.cluster import Cluster, Worker, wait_until
from tests.invariants import check_database

APP = "tests.apps.rough"


def lines(path: Path) -> list[Any]:
    """Return what tasks noted."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def history(cluster: Cluster, run: Run) -> list[tuple[int, int, str]]:
    """Return how the attempts of a run's steps ended that did not succeed: (step, attempt, outcome)."""
    return [
        (no, attempt, outcome)
        for no, attempt, outcome in cluster.rows(
            """SELECT s.no, a.attempt, a.outcome FROM byrd.attempts a JOIN byrd.steps s ON s.id = a.step_id
               WHERE s.run_id = %s ORDER BY s.no, a.attempt""",
            run.id,
        )
    ]


def running(*runs: Run) -> bool:
    """Tell whether a step of each run is running."""
    return all(any(step.status == "running" for step in run.steps()) for run in runs)


def pid_of(run: Run) -> int:
    """Return the process that runs the run's step."""
    [pid] = [step.pid for step in run.steps() if step.status == "running"]
    assert pid is not None
    return pid


def ended(worker: Worker, timeout: float = 60) -> int | None:
    """Wait until the main process has ended; return its exit status."""
    wait_until(lambda: not worker.running, timeout=timeout, what=lambda: f"end of {worker.name}:\n{worker.log_tail()}")
    return worker.exit_status


def alive(process: psutil.Process) -> bool:
    """Tell whether a process has not ended; one that nobody has waited for has."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# -- death -----------------------------------------------------------------------------------------


def test_a_killed_worker_s_steps_go_on_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    doomed = cluster.worker(APP, concurrency=2)
    go = tmp_path / "go"
    runs = [app.engine.submit(app.wait_for_file.s(str(go), n) | app.add.s(1)) for n in range(2)]
    wait_until(lambda: running(*runs))
    other = cluster.worker(APP)
    doomed.kill()
    killed = time.monotonic()
    wait_until(lambda: all(run.steps()[0].attempt == 2 for run in runs), timeout=60)
    assert time.monotonic() - killed < 30
    other.wait_for_log("the lease of worker worker1@localhost ran out: its running steps are ready again")
    go.touch()
    assert [run.get(timeout=30) for run in runs] == [1, 2]
    assert [history(cluster, run) for run in runs] == [[(0, 1, "preempted")]] * 2
    check_database(cluster.database_url)


def test_a_killed_main_process_takes_its_pool_along(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    doomed = cluster.worker(APP, concurrency=2)
    go = tmp_path / "go"
    run = app.engine.submit(app.wait_for_file.s(str(go), 1) | app.add.s(1))
    wait_until(lambda: running(run))
    children = [psutil.Process(pid) for pid in doomed.pids()]
    doomed.kill_main()
    wait_until(lambda: not any(map(alive, children)), what="end of the pool")
    go.touch()
    assert "was held by worker worker1@localhost, whose lease ended" in wait_until(
        lambda: next((why for why in run.why() if "was held" in why), None)
    )
    cluster.worker(APP)
    assert run.get(timeout=60) == 2
    assert history(cluster, run) == [(0, 1, "preempted")]
    check_database(cluster.database_url)


def test_orphans_finish_what_they_run_while_it_is_theirs(cluster: Cluster, tmp_path: Path) -> None:
    """Where pool processes outlive the main process, they may record until another worker has their step; then exit."""
    app = cluster.app(APP)
    doomed = cluster.worker(APP, concurrency=2)
    soon, late = tmp_path / "soon", tmp_path / "late"
    first = app.engine.submit(app.orphan.s(str(soon), 1) | app.add.s(1))
    second = app.engine.submit(app.orphan.s(str(late), 1) | app.add.s(1))
    wait_until(lambda: running(first, second) and all(Path(f"{path}.begun").exists() for path in (soon, late)))
    orphans = [psutil.Process(pid) for pid in doomed.pids()]
    doomed.kill_main()
    soon.touch()
    wait_until(lambda: first.steps()[0].status == "succeeded")
    cluster.worker(APP)
    wait_until(lambda: second.steps()[0].attempt == 2, timeout=60)
    late.touch()
    assert [run.get(timeout=30) for run in (first, second)] == [2, 2]
    assert (history(cluster, first), history(cluster, second)) == ([], [(0, 1, "preempted")])
    wait_until(lambda: not any(map(alive, orphans)), what="end of the orphans")
    wait_until(lambda: "attempt 1 may not write" in doomed.log_text() or "does not own" in doomed.log_text())
    check_database(cluster.database_url)


def test_a_killed_pool_process_costs_its_own_step_only(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    worker = cluster.worker(APP, concurrency=2)
    go = tmp_path / "go"
    victim, bystander = (app.engine.submit(app.wait_for_file.s(str(go), n) | app.add.s(1)) for n in range(2))
    wait_until(lambda: running(victim, bystander))
    os.kill(pid_of(victim), signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: victim.steps()[0].attempt == 2)
    assert time.monotonic() - killed < 5
    go.touch()
    assert [run.get(timeout=30) for run in (victim, bystander)] == [1, 2]
    assert (history(cluster, victim), history(cluster, bystander)) == ([(0, 1, "preempted")], [])
    assert worker.running
    check_database(cluster.database_url)


def test_a_killed_pool_process_gives_back_what_it_ran_without_a_message(cluster: Cluster, tmp_path: Path) -> None:
    """The pool replaces it at once, and Celery says which message it had; the step that it ran on to is another."""
    app = cluster.app(APP)
    cluster.worker(APP, concurrency=1, env={"TEST_LEASE_SECONDS": "90"})  # the next heartbeat is in half a minute
    go = tmp_path / "go"
    run = app.engine.submit(app.add.s(1, 1) | app.wait_for_file.si(str(go), 5) | app.add.s(1))
    wait_until(lambda: run.steps()[1].status == "running")
    pid = run.steps()[1].pid
    assert pid is not None
    time.sleep(0.3)  # a look at the processes, at least
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: run.steps()[1].attempt == 2)
    assert time.monotonic() - killed < 8
    go.touch()
    assert run.get(timeout=30) == 6
    check_database(cluster.database_url)


# -- stopping --------------------------------------------------------------------------------------

POOLS = ["prefork", "threads", "solo", "gevent"]


@pytest.mark.parametrize("pool", POOLS)
def test_a_checkpoint_task_hands_back_when_its_worker_is_told_to_stop(
    cluster: Cluster, tmp_path: Path, pool: str
) -> None:
    """SIGTERM: the step goes on elsewhere from its last checkpoint, within a moment, and repeats nothing."""
    app = cluster.app(APP)
    first = cluster.worker(APP, pool=pool, concurrency=1)
    notes = tmp_path / "notes"
    run = app.engine.submit(app.count_up.s(str(notes), 200, 0.1))
    wait_until(lambda: len(lines(notes)) > 5)
    cluster.worker(APP, concurrency=1)
    os.kill(first.pid, signal.SIGTERM)
    told = time.time()
    assert run.get(timeout=60) == {"cursor": 199, "completed": 200, "failed": 0}
    assert ended(first) == 0
    seen = lines(notes)
    assert [n for n, _, _ in seen] == list(range(200))  # in order, each once
    moved = next(i for i, (_, pid, _) in enumerate(seen) if pid != seen[0][1])
    assert seen[moved][2] - told < 6
    assert history(cluster, run) == [(0, 1, "handed_back")]
    assert run.steps()[0].preemptions == 0
    check_database(cluster.database_url)


@pytest.mark.parametrize("pool", POOLS)
def test_a_plain_task_is_finished_before_its_worker_stops(cluster: Cluster, tmp_path: Path, pool: str) -> None:
    """SIGTERM, however often: what runs ends well, what is ready waits for other workers."""
    app = cluster.app(APP)
    worker = cluster.worker(APP, pool=pool, concurrency=1)
    notes = tmp_path / "notes"
    run = app.engine.submit(app.sleep.s(4, 1, str(notes)) | app.add.s(1))
    wait_until(lambda: lines(notes))
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(0.5)
    os.kill(worker.pid, signal.SIGTERM)
    assert ended(worker) == 0
    assert [step.status for step in run.steps()] == ["succeeded", "ready"]
    assert "no worker is alive" in run.why()[0]
    cluster.worker(APP, concurrency=1)
    assert run.get(timeout=60) == 2
    assert (len(lines(notes)), history(cluster, run)) == (1, [])
    check_database(cluster.database_url)


def unread(pid: int) -> int:
    """Return how many bytes wait in the pipes of a process."""
    found = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        if path.readlink().name.startswith("pipe:"):
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            found += int.from_bytes(fcntl.ioctl(reader, termios.FIONREAD, bytes(4)), sys.byteorder)
            os.close(reader)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the pipes of a process are looked at in /proc")
def test_a_message_that_a_process_has_just_been_handed_does_not_hold_up_a_shutdown(cluster: Cluster) -> None:
    """Plain Celery 5.7 forgets it, and ends half a minute later, when its process has waited in vain to be heard."""
    app = cluster.app(APP)
    worker = cluster.worker(APP, concurrency=1)
    [child] = worker.pids()
    os.kill(child, signal.SIGSTOP)
    before = unread(child)
    run = app.engine.submit(app.add.s(1, 1))
    [step] = run.steps()
    worker.wait_for_log(rf"{step.id}\] received")
    wait_until(lambda: unread(child) > before + 4)  # its length comes first
    handed = unread(child)
    os.kill(worker.pid, signal.SIGTERM)
    wait_until(lambda: unread(child) > handed)  # the consumer is closed, and the process told to end
    os.kill(child, signal.SIGCONT)
    assert ended(worker, timeout=15) == 0
    assert [step.status for step in run.steps()] == ["ready"]  # it was told not to start anything any more
    check_database(cluster.database_url)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_sigkill_after_the_grace_time(cluster: Cluster, tmp_path: Path, pool: str) -> None:
    """What Docker and Kubernetes do: SIGTERM, and SIGKILL for what is not done in time."""
    app = cluster.app(APP)
    worker = cluster.worker(APP, pool=pool, concurrency=2)
    notes, go = tmp_path / "notes", tmp_path / "go"
    short = app.engine.submit(app.sleep.s(2, 1) | app.add.s(1))
    long = app.engine.submit(app.wait_for_file.s(str(go), 2, str(notes)) | app.add.s(1))
    wait_until(lambda: running(short, long))
    os.kill(worker.pid, signal.SIGTERM)
    wait_until(lambda: short.steps()[0].status == "succeeded")
    assert "the worker is shutting down" in wait_until(
        lambda: next((why for why in long.why() if "shutting" in why), None)
    )
    worker.kill()
    go.touch()
    cluster.worker(APP)
    assert [run.get(timeout=60) for run in (short, long)] == [2, 3]
    assert (history(cluster, short), history(cluster, long)) == ([], [(0, 1, "preempted")])
    assert len(lines(notes)) == 2
    check_database(cluster.database_url)


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_a_cold_shutdown_gives_back_what_runs(cluster: Cluster, tmp_path: Path, pool: str) -> None:
    """SIGQUIT: nothing is waited for, and the steps go on elsewhere at once, though the lease would last for long."""
    app = cluster.app(APP)
    worker = cluster.worker(APP, pool=pool, concurrency=1, env={"TEST_LEASE_SECONDS": "60"})
    go = tmp_path / "go"
    run = app.engine.submit(app.wait_for_file.s(str(go), 1) | app.add.s(1))
    wait_until(lambda: running(run))
    cluster.worker(APP, env={"TEST_LEASE_SECONDS": "60"})
    os.kill(worker.pid, signal.SIGQUIT)
    wait_until(lambda: run.steps()[0].attempt == 2)
    go.touch()
    assert run.get(timeout=30) == 2
    ended(worker)
    assert history(cluster, run) == [(0, 1, "handed_back")]
    check_database(cluster.database_url)


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_cold_shutdown_waits_for_what_runs_in_a_thread(cluster: Cluster, tmp_path: Path, pool: str) -> None:
    """Nobody can end a thread: SIGQUIT is no warmer than SIGTERM there."""
    app = cluster.app(APP)
    worker = cluster.worker(APP, pool=pool, concurrency=1)
    go = tmp_path / "go"
    run = app.engine.submit(app.wait_for_file.s(str(go), 1) | app.add.s(1))
    wait_until(lambda: running(run))
    os.kill(worker.pid, signal.SIGQUIT)
    worker.wait_for_log("cannot be ended in this pool")
    go.touch()
    ended(worker)
    assert [step.status for step in run.steps()] == ["succeeded", "ready"]
    cluster.worker(APP)
    assert run.get(timeout=30) == 2
    assert history(cluster, run) == []
    check_database(cluster.database_url)


def test_ctrl_c_twice_is_a_cold_shutdown(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    worker = cluster.worker(APP, concurrency=1)
    go = tmp_path / "go"
    run = app.engine.submit(app.wait_for_file.s(str(go), 1) | app.add.s(1))
    wait_until(lambda: running(run))
    for said in ("Hitting Ctrl\\+C again will initiate cold shutdown", "Cold shutdown|again will terminate all"):
        os.killpg(worker.pid, signal.SIGINT)  # a terminal sends it to the pool, too
        worker.wait_for_log(said)
    ended(worker)
    assert run.steps()[0].status == "ready"
    go.touch()
    cluster.worker(APP)
    assert run.get(timeout=30) == 2
    assert history(cluster, run) == [(0, 1, "handed_back")]
    check_database(cluster.database_url)


# -- frozen ----------------------------------------------------------------------------------------

#: What a zombie may try to write, and which of its runs ends how without it.
WRITES = [
    "result", "error", "retry", "replace", "ignore", "reject", "checkpoint", "transaction", "memoised sub-step",
    "batch", "quarantine",
]  # fmt: skip


def test_each_write_of_a_zombie_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """SIGSTOP past the lease, SIGCONT: by then others own the steps, and it learns so at its next write, and stops."""
    app = cluster.app(APP)
    cluster.rows("CREATE TABLE zombies (name text)")
    folder = str(tmp_path)
    zombie = cluster.worker(APP, concurrency=len(WRITES) + 2)
    runs = {write: app.engine.submit(app.zombie.s(write, folder) | app.echo.s()) for write in WRITES}
    runs["chord"] = app.engine.submit(group(app.zombie.s("chord", folder), app.echo.s("member")) | app.echo.s())
    runs["compensation"] = app.engine.submit(app.reserve.s(folder) | app.raises.si("BaseException"))
    wait_until(lambda: all(lines(tmp_path / write) for write in runs), timeout=60)
    zombie.sigstop()
    try:
        cluster.worker(APP, concurrency=len(runs), pool="threads")
        wait_until(lambda: all(len(lines(tmp_path / write)) == 2 for write in runs), timeout=60)
    finally:
        zombie.sigcont()
    (tmp_path / "write").touch()
    wait_until(lambda: refusals(zombie) >= len(runs), timeout=60, what=lambda: f"refusals:\n{zombie.log_tail(200)}")
    assert cluster.rows("SELECT * FROM zombies") == []
    assert cluster.rows("SELECT * FROM byrd.checkpoints") == []
    assert cluster.rows("SELECT * FROM byrd.failed_items") == []
    assert lines(tmp_path / "written") == []
    (tmp_path / "end").touch()
    for write in WRITES:
        assert runs[write].get(timeout=60) == "alive", write
        assert history(cluster, runs[write]) == [(0, 1, "preempted")], write
    assert runs["chord"].get(timeout=30) == ["alive", "member"]
    assert runs["compensation"].wait(timeout=30) == "failed"
    assert [(no, 2, "preempted") for no, _, _ in history(cluster, runs["compensation"]) if no == 2]
    assert zombie.running
    assert app.engine.submit(app.add.s(1, 2)).get(timeout=30) == 3
    check_database(cluster.database_url)


def refusals(worker: Worker) -> int:
    """Count what a worker was told that it may not write."""
    return sum("attempt 1, stopped: step" in line for line in worker.log_text().splitlines())


def test_one_frozen_pool_process(cluster: Cluster, tmp_path: Path) -> None:
    """Nobody can tell it from one that works hard: its time limit ends it, and its step only."""
    app = cluster.app(APP)
    worker = cluster.worker(APP, concurrency=2)
    go = tmp_path / "go"
    frozen = app.engine.submit(app.wait_for_file.s(str(go), 1).set(time_limit=8))
    bystander = app.engine.submit(app.wait_for_file.s(str(go), 2))
    wait_until(lambda: running(frozen, bystander))
    os.kill(pid_of(frozen), signal.SIGSTOP)
    try:
        assert f"is held by worker worker1@localhost (process {pid_of(frozen)})" in frozen.why()[0]
        with pytest.raises(TimeLimitExceeded):
            frozen.get(timeout=60)
        go.touch()
        assert bystander.get(timeout=30) == 2
        assert app.engine.submit(app.add.s(1, 2)).get(timeout=30) == 3
    finally:
        worker.sigcont()
    assert history(cluster, bystander) == []
    check_database(cluster.database_url)


def test_a_frozen_main_process_with_live_children(cluster: Cluster, tmp_path: Path) -> None:
    """Its children go on; what they record before another worker has their step counts, and nothing after it."""
    app = cluster.app(APP)
    frozen = cluster.worker(APP, concurrency=2)
    soon, late = tmp_path / "soon", tmp_path / "late"
    first = app.engine.submit(app.wait_for_file.s(str(soon), 1) | app.add.s(1))
    second = app.engine.submit(app.wait_for_file.s(str(late), 2) | app.add.s(1))
    wait_until(lambda: running(first, second))
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        soon.touch()
        wait_until(lambda: first.steps()[0].status == "succeeded")
        cluster.worker(APP)
        wait_until(lambda: second.steps()[0].attempt == 2, timeout=60)
        late.touch()
        assert [run.get(timeout=30) for run in (first, second)] == [2, 3]
        wait_until(lambda: refusals(frozen) == 1 or "attempt 1 may not write" in frozen.log_text())
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
    assert (history(cluster, first), history(cluster, second)) == ([], [(0, 1, "preempted")])
    cluster.wait_registered(frozen)
    assert [app.engine.submit(app.add.s(n, 2)).get(timeout=30) for n in range(4)] == [2, 3, 4, 5]
    check_database(cluster.database_url)


# -- time limits -----------------------------------------------------------------------------------


def test_time_limits(cluster: Cluster) -> None:
    app = cluster.app(APP)
    worker = cluster.worker(APP, concurrency=2)
    bystander = app.engine.submit(app.sleep.s(8, 1) | app.add.s(1))
    soft, hard = app.engine.submit(app.soft.s(30)), app.engine.submit(app.hard.s(30))
    assert soft.get(timeout=60) == "soft"
    with pytest.raises(TimeLimitExceeded):
        hard.get(timeout=60)
    assert bystander.get(timeout=60) == 2
    assert "TimeLimitExceeded" in hard.why()[0]
    assert (history(cluster, bystander), history(cluster, hard)) == ([], [(0, 1, "failed")])
    worker.wait_for_log("Hard time limit")
    check_database(cluster.database_url)


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_pools_without_time_limits(cluster: Cluster, pool: str) -> None:
    """Celery has none for threads: the step takes what it takes."""
    app = cluster.app(APP)
    cluster.worker(APP, pool=pool, concurrency=1)
    runs = [app.engine.submit(app.soft.s(2)), app.engine.submit(app.hard.s(2))]
    assert [run.get(timeout=60) for run in runs] == ["no limit"] * 2
    check_database(cluster.database_url)
