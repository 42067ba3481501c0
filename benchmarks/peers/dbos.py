"""DBOS: workflows on a queue, in Postgres."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
from collections.abc import Sequence
from typing import Any

import psycopg
from dbos import DBOS, DBOSClient
from sqlalchemy import create_engine

from benchmarks.peers.drive import main
from benchmarks.peers.protocol import Config, Peer, Shape, spin

_APPLICATION, _QUEUE, _VERSION = "benchmarks", "canvases", "1"
#: A workflow's threads in a process, how many of the queue's workflows a process takes at most, and how often it looks
#: for them; how often a client looks for a result.  Seconds.
_THREADS, _TAKEN, _POLL, _RESULT_POLL = 8, 32, 0.1, 0.01


@DBOS.step()
def step(value: int, work_ms: float) -> int:
    """Return what it got."""
    spin(work_ms)
    return value


@DBOS.step()
async def member(value: int, work_ms: float) -> int:
    """Return what it got; the steps of a fan-out have to be coroutines to be awaited together."""
    spin(work_ms)
    return value


@DBOS.workflow(name="chain")
def chain(value: int, size: int, work_ms: float) -> int:
    """Run steps one after the other."""
    for _ in range(size):
        value = int(step(value, work_ms))
    return value


@DBOS.workflow(name="chord")
async def chord(value: int, size: int, work_ms: float) -> int:
    """Run steps side by side, then one that gets their sum."""
    members = await asyncio.gather(*(member(value, work_ms) for _ in range(size)))
    return int(await member(sum(members), work_ms))


class DbosPeer(Peer):
    """DBOS, whose workers are processes with threads."""

    shapes = frozenset({"one", "chain", "chord", "mix"})
    modes = frozenset({"one", "batch", "transaction"})

    @property
    def version(self) -> str:
        """The package's version."""
        return importlib.metadata.version("dbos")

    def prepare(self) -> None:
        """Migrate, and make the queue."""
        url = self.config.postgres_url
        DBOS.migrate(url)
        self._client = DBOSClient(system_database_url=url, application_name=_APPLICATION)
        self._client.register_queue(_QUEUE, worker_concurrency=_TAKEN, polling_interval_sec=_POLL)
        self._callers = create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1))
        self._eye = psycopg.connect(url, autocommit=True)
        self._before = 0

    def launch(self, processes: int) -> None:
        """Start the processes."""
        for number in range(processes):
            self.spawn("-m", "benchmarks.peers.dbos", "worker", str(number))

    def submit(self, shape: Shape, number: int) -> Any:
        """Enqueue a workflow."""
        return self._client.enqueue(*_call(shape.of(number), number))

    def submit_batch(self, shape: Shape, numbers: Sequence[int]) -> list[Any]:
        """Enqueue all in one transaction: there is no call for many."""
        with self._callers.begin() as conn:
            return [self._client.enqueue_in_transaction(conn, *_call(shape, number)) for number in numbers]

    def submit_within(self, shape: Shape, number: int) -> Any:
        """Join a transaction that does nothing else."""
        with self._callers.begin() as conn:
            return self._client.enqueue_in_transaction(conn, *_call(shape, number))

    def reset(self, shape: Shape) -> None:
        """Count from now on."""
        self._before = self._succeeded()

    def ended(self) -> int:
        """Count the workflows that Postgres holds as succeeded."""
        return self._succeeded() - self._before

    def _succeeded(self) -> int:
        [[count]] = self._eye.execute("SELECT count(*) FROM dbos.workflow_status WHERE status = 'SUCCESS'").fetchall()
        return int(count)

    def wait(self, handle: Any, shape: Shape) -> Any:
        """Call ``get_result``, which looks much less often by default."""
        return handle.get_result(polling_interval_sec=_RESULT_POLL)

    def end_times(self, handles: Sequence[Any]) -> list[float] | None:
        """Return when the workflows completed."""
        ids = [handle.workflow_id for handle in handles]
        found = dict(
            self._eye.execute(
                "SELECT workflow_uuid, completed_at FROM dbos.workflow_status WHERE workflow_uuid = ANY(%s)", (ids,)
            ).fetchall()
        )
        return [found[each] / 1000 for each in ids]


def _call(shape: Shape, number: int) -> tuple[Any, ...]:
    options = {"workflow_name": shape.kind, "queue_name": _QUEUE, "app_version": _VERSION}
    return options, number, shape.size, shape.work_ms


def work(config: Config) -> None:
    """Run workflows until the process is ended."""
    DBOS(
        config={
            "name": _APPLICATION,
            "system_database_url": config.postgres_url,
            "application_version": _VERSION,
            "executor_id": str(os.getpid()),
            "max_executor_threads": _THREADS,
            "log_level": "WARNING",
            "run_migrations": False,
        }
    )
    DBOS.launch()
    signal.pause()


if __name__ == "__main__":
    main(DbosPeer, work)
