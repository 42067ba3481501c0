"""A task that lets nothing else in its process run for longer than the lease."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import Cluster, wait_until
from tests.invariants import check_database
from tests.reliability.test_workers import APP, history, lines, running

#: The lease is 3 s, recovery looks about once a second, and the other worker takes a while to start on a busy machine.
_BLOCKED_SECONDS = 18.0


def test_a_pool_process_that_holds_the_gil_costs_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """The lease is kept by the main process."""
    app = cluster.app(APP)
    cluster.worker(APP, concurrency=2)
    cluster.worker(APP, concurrency=2)
    run = app.engine.submit(app.hold_gil.s(_BLOCKED_SECONDS, str(tmp_path / "notes")) | app.echo.s())
    assert run.get(timeout=60) == "let go"
    assert history(cluster, run) == []
    assert len(lines(tmp_path / "notes")) == 1
    check_database(cluster.database_url)


@pytest.mark.parametrize(("pool", "task"), [("threads", "hold_gil"), ("solo", "hold_gil"), ("gevent", "block_loop")])
def test_a_worker_that_is_blocked_by_its_task_loses_its_lease(
    cluster: Cluster, tmp_path: Path, pool: str, task: str
) -> None:
    """Task and lease share a process there: others take over what it ran, and when it can write again it may not."""
    app = cluster.app(APP)
    blocked = cluster.worker(APP, concurrency=2, pool=pool)
    notes = tmp_path / "notes"
    run = app.engine.submit(getattr(app, task).s(_BLOCKED_SECONDS, str(notes)) | app.echo.s())
    wait_until(lambda: running(run))
    cluster.worker(APP, concurrency=2)
    assert run.get(timeout=60) == "let go"
    assert history(cluster, run) == [(0, 1, "preempted")]
    assert len(lines(notes)) == 2
    blocked.wait_for_log("attempt 1 (may not write|does not own|stopped)", timeout=60)
    # It takes its lease up again, and works.
    wait_until(lambda: cluster.rows("SELECT count(*) FROM byrd.workers WHERE lease_until > now()") == [(2,)])
    assert app.engine.submit(app.add.s(1, 2)).get(timeout=30) == 3
    assert blocked.running
    check_database(cluster.database_url)
