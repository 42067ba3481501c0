"""Procrastinate: single jobs in Postgres."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from typing import Any

import psycopg
from procrastinate import App, SyncPsycopgConnector

from benchmarks.peers.drive import main
from benchmarks.peers.procrastinate_app import CONCURRENCY, NAME
from benchmarks.peers.protocol import Peer, Shape

_WAIT_SECONDS, _LOOK_SECONDS = 120.0, 0.002


class ProcrastinatePeer(Peer):
    """Procrastinate, whose workers are processes of its own command."""

    shapes = frozenset({"one"})
    modes = frozenset({"one", "batch", "transaction"})

    @property
    def version(self) -> str:
        """The package's version."""
        return importlib.metadata.version("procrastinate")

    def prepare(self) -> None:
        """Apply the schema."""
        url = self.config.postgres_url
        self._app = App(connector=SyncPsycopgConnector(conninfo=url))
        self._app.open()
        self._app.schema_manager.apply_schema()
        self._job = self._app.configure_task(NAME)
        self._callers = psycopg.connect(url)
        self._eye = psycopg.connect(url, autocommit=True)
        self._since = 0

    def launch(self, processes: int) -> None:
        """Start the processes."""
        for _ in range(processes):
            self.spawn(
                "-m", "procrastinate", "--app", "benchmarks.peers.procrastinate_app.app", "worker",
                "--concurrency", str(CONCURRENCY),
            )  # fmt: skip

    def submit(self, shape: Shape, number: int) -> Any:
        """Defer a job."""
        return self._job.defer(value=number)

    def submit_batch(self, shape: Shape, numbers: Sequence[int]) -> list[Any]:
        """Defer many jobs in one call."""
        return list(self._job.batch_defer(*({"value": number} for number in numbers)))

    def submit_within(self, shape: Shape, number: int) -> Any:
        """Join a transaction that does nothing else."""
        with self._callers.transaction():
            return self._app.configure_task(NAME, connection=self._callers).defer(value=number)

    def reset(self, shape: Shape) -> None:
        """Count the jobs that are made from now on."""
        [[self._since]] = self._eye.execute("SELECT coalesce(max(id), 0) FROM procrastinate_jobs").fetchall()

    def ended(self) -> int:
        """Count the jobs that Postgres holds as succeeded."""
        [[count]] = self._eye.execute(
            "SELECT count(*) FROM procrastinate_jobs WHERE id > %s AND status = 'succeeded'", (self._since,)
        ).fetchall()
        return int(count)

    def wait(self, handle: Any, shape: Shape) -> Any:
        """Look until the job has succeeded: there is no call that waits."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            [value] = self.values([handle], shape)
            if value is not None:
                return value
            time.sleep(_LOOK_SECONDS)
        raise TimeoutError(f"job {handle} has not succeeded")

    def values(self, handles: Sequence[Any], shape: Shape) -> list[Any]:
        """Return the arguments of the jobs that succeeded at the first attempt: results are not kept."""
        found = dict(
            self._eye.execute(
                "SELECT id, (args->>'value')::int FROM procrastinate_jobs"
                " WHERE id = ANY(%s) AND status = 'succeeded' AND attempts = 1",
                (list(handles),),
            ).fetchall()
        )
        return [found.get(handle) for handle in handles]


if __name__ == "__main__":
    main(ProcrastinatePeer)
