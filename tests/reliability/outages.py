"""What the tests of failing servers share: work that an outage strikes, and how long it is until work goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byrd.engine import Run
from tests.cluster import Cluster, Worker, wait_until
from tests.invariants import check_database

log = logging.getLogger(__name__)

APP = "tests.apps.basic"
#: What the issue asks for: from "the server answers again" to the next start of a step, with the default settings.
FIGURE_SECONDS = 5.0
#: Tests run on machines that are busy with other tests.
BOUND_SECONDS = 3 * FIGURE_SECONDS


class Struck:
    """Steps that run when the outage comes (``held``), and steps whose messages are in Redis then (``queued``).

    ``own_messages``: each of these needs its message; else a process that is awake may find it without.
    """

    def __init__(
        self,
        cluster: Cluster,
        go: Path,
        *,
        held: int = 2,
        queued: int = 20,
        queue: str = "celery",
        own_messages: bool = False,
    ) -> None:
        self.cluster, self.go = cluster, go
        app = cluster.app(APP)
        self.held = [
            app.engine.submit(app.wait_for_file.s(str(go), n).set(queue=queue) | app.add.s(1).set(queue=queue))
            for n in range(held)
        ]
        wait_until(lambda: all(run.steps()[0].status == "running" for run in self.held), what="steps that run")
        options = {"headers": {"needs": "its message"}} if own_messages else {}
        self.queued = [app.engine.submit(app.add.s(n, 1).set(queue=queue, **options)) for n in range(queued)]

    def finish(self) -> None:
        """Let the held steps end."""
        self.go.touch()

    def check(self, timeout: float = 90) -> None:
        """All runs end with the right results, and the database is in order."""
        deadline = time.monotonic() + timeout
        for runs, plus in ((self.held, 1), (self.queued, 1)):
            for n, run in enumerate(runs):
                assert run.get(timeout=max(1.0, deadline - time.monotonic())) == n + plus, run.why()
        wait_until(lambda: all(run.status == "succeeded" for run in (*self.held, *self.queued)))
        check_database(self.cluster.database_url)


def starts_after(cluster: Cluster, moment: float, runs: Sequence[Run] | None = None) -> tuple[float, float]:
    """Return how long after a moment (of ``time.time()``) the next step was started, and the last of those so far."""
    sql = """SELECT extract(epoch FROM min(started_at)), extract(epoch FROM max(started_at)) FROM byrd.steps
             WHERE started_at > to_timestamp(%s) AND (%s::uuid[] IS NULL OR run_id = ANY(%s::uuid[]))"""
    ids = None if runs is None else [run.id for run in runs]
    [(first, last)] = cluster.rows(sql, moment, ids, ids)
    assert first is not None, "no step has started since"
    return float(first) - moment, float(last) - moment


def measured(fault: str, cluster: Cluster, moment: float, runs: Sequence[Run] | None = None) -> float:
    """Log and return how long after ``moment`` the next of the steps was started."""
    first, last = starts_after(cluster, moment, runs)
    log.info("%s: next start %.2f s after the server answered again, the last %.2f s", fault, first, last)
    return first


def no_preemption(cluster: Cluster) -> None:
    """No step was taken from a worker: all of them lived."""
    assert cluster.rows("SELECT run_id, no FROM byrd.steps WHERE preemptions > 0") == []


def alive(*workers: Worker) -> None:
    """The main processes run, and the pools as they were."""
    for worker in workers:
        assert worker.running, worker.log_tail()


def submit_chains(app: Any, count: int) -> list[Run]:
    """Submit chains of four steps with the value 4, one of which takes long enough for others to interfere."""
    return [app.engine.submit(app.add.s(1, 1) | app.add.s(1) | app.linger.s() | app.add.s(1)) for _ in range(count)]


def check_chains(cluster: Cluster, runs: Sequence[Run], timeout: float = 90) -> None:
    """They have ended with the right value, each of their steps recorded once."""
    deadline = time.monotonic() + timeout
    for run in runs:
        assert run.get(timeout=max(1.0, deadline - time.monotonic())) == 4, run.why()
    wait_until(lambda: all(run.status == "succeeded" for run in runs))
    check_database(cluster.database_url)
