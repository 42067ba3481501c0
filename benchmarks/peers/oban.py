"""oban-py: single jobs in Postgres; its workflows are in the edition that is paid for."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import orjson
import psycopg
import uvloop
from oban import Oban
from oban.schema import install
from psycopg.types.json import set_json_dumps, set_json_loads

from benchmarks.peers.drive import main
from benchmarks.peers.oban_jobs import Step
from benchmarks.peers.protocol import Config, Peer, Shape

#: Jobs that a process runs at a time.
_LIMIT = 100
_WAIT_SECONDS, _LOOK_SECONDS = 120.0, 0.002


class ObanPeer(Peer):
    """oban-py, whose workers are processes of its own command."""

    shapes = frozenset({"one"})
    modes = frozenset({"one", "batch", "transaction"})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        set_json_dumps(orjson.dumps)
        set_json_loads(orjson.loads)
        self._loop = uvloop.new_event_loop()  # as its command does

    def _do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(coroutine)

    @property
    def version(self) -> str:
        """The package's version."""
        return importlib.metadata.version("oban")

    def prepare(self) -> None:
        """Install the tables."""
        url = self.config.postgres_url

        async def connect() -> tuple[Oban, psycopg.AsyncConnection[Any]]:
            pool = await Oban.create_pool(url)
            await install(pool)
            return Oban(pool=pool), await psycopg.AsyncConnection.connect(url)

        self._oban, self._callers = self._do(connect())
        self._eye = psycopg.connect(url, autocommit=True)
        self._since = 0

    def launch(self, processes: int) -> None:
        """Start the processes."""
        for _ in range(processes):
            self.spawn(
                "-m", "oban", "start", "--dsn", self.config.postgres_url, "--queues", f"default:{_LIMIT}",
                "--log-level", "WARNING",
            )  # fmt: skip

    def submit(self, shape: Shape, number: int) -> Any:
        """Enqueue a job."""
        return self._do(self._oban.enqueue(_job(number))).id

    def submit_batch(self, shape: Shape, numbers: Sequence[int]) -> list[Any]:
        """Enqueue many jobs in one call."""
        return [job.id for job in self._do(self._oban.enqueue_many(_job(n) for n in numbers))]

    def submit_within(self, shape: Shape, number: int) -> Any:
        """Join a transaction that does nothing else."""

        async def enqueue() -> Any:
            async with self._callers.transaction():
                return await self._oban.enqueue(_job(number), conn=self._callers)

        return self._do(enqueue()).id

    def reset(self, shape: Shape) -> None:
        """Count the jobs that are made from now on."""
        [[self._since]] = self._eye.execute("SELECT coalesce(max(id), 0) FROM oban_jobs").fetchall()

    def ended(self) -> int:
        """Count the jobs that Postgres holds as completed."""
        [[count]] = self._eye.execute(
            "SELECT count(*) FROM oban_jobs WHERE id > %s AND state = 'completed'", (self._since,)
        ).fetchall()
        return int(count)

    def wait(self, handle: Any, shape: Shape) -> Any:
        """Look until the job is completed: there is no call that waits."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline:
            [value] = self.values([handle], shape)
            if value is not None:
                return value
            time.sleep(_LOOK_SECONDS)
        raise TimeoutError(f"job {handle} is not completed")

    def values(self, handles: Sequence[Any], shape: Shape) -> list[Any]:
        """Return the arguments of the jobs that were completed at the first attempt: results are not kept."""
        found = dict(
            self._eye.execute(
                "SELECT id, (args->>'value')::int FROM oban_jobs"
                " WHERE id = ANY(%s) AND state = 'completed' AND attempt = 1",
                (list(handles),),
            ).fetchall()
        )
        return [found.get(handle) for handle in handles]


def _job(number: int) -> Any:
    step: Any = Step  # the decorator adds the method
    return step.new({"value": number})


if __name__ == "__main__":
    main(ObanPeer)
