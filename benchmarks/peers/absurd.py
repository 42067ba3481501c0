"""absurd: tasks with steps, in Postgres functions.  Its SQL is read from the file that the user names."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg
from absurd_sdk import Absurd

from benchmarks.peers.drive import main
from benchmarks.peers.protocol import Config, Peer, Shape

_QUEUE = "canvases"
_WAIT_SECONDS = 120.0


class AbsurdPeer(Peer):
    """absurd, whose workers are processes with one connection each, as they come."""

    shapes = frozenset({"one", "chain"})
    modes = frozenset({"one", "batch", "transaction"})

    @property
    def version(self) -> str:
        """The client package's version."""
        return importlib.metadata.version("absurd-sdk")

    def prepare(self) -> None:
        """Run its SQL, and make the queue."""
        url = self.config.postgres_url
        self._eye = psycopg.connect(url, autocommit=True)
        self._eye.execute(Path(self.config.options["sql"]).read_bytes())
        self._client = Absurd(url, queue_name=_QUEUE)
        self._client.create_queue()
        _register(self._client)
        self._callers = psycopg.connect(url)
        self._within = Absurd(self._callers, queue_name=_QUEUE)
        _register(self._within)
        self._before = 0

    def launch(self, processes: int) -> None:
        """Start the processes."""
        for _ in range(processes):
            self.spawn("-m", "benchmarks.peers.absurd", "worker")

    def submit(self, shape: Shape, number: int) -> Any:
        """Spawn a task."""
        return _spawn(self._client, shape, number)

    def submit_batch(self, shape: Shape, numbers: Sequence[int]) -> list[Any]:
        """Spawn all in one transaction: there is no call for many."""
        with self._callers.transaction():
            return [_spawn(self._within, shape, number) for number in numbers]

    def submit_within(self, shape: Shape, number: int) -> Any:
        """Join a transaction that does nothing else."""
        with self._callers.transaction():
            return _spawn(self._within, shape, number)

    def reset(self, shape: Shape) -> None:
        """Count from now on."""
        self._before = self._completed()

    def ended(self) -> int:
        """Count the tasks that Postgres holds as completed."""
        return self._completed() - self._before

    def _completed(self) -> int:
        [[count]] = self._eye.execute(f"SELECT count(*) FROM absurd.t_{_QUEUE} WHERE state = 'completed'").fetchall()
        return int(count)

    def wait(self, handle: Any, shape: Shape) -> Any:
        """Call ``await_task_result``."""
        return self._client.await_task_result(handle, timeout=_WAIT_SECONDS).result


def _register(client: Absurd) -> None:
    @client.register_task("chain")
    def chain(params: Any, context: Any) -> Any:
        value = params["value"]
        for number in range(params["size"]):
            value = context.step(f"step{number}", lambda value=value: value)
        return value


def _spawn(client: Absurd, shape: Shape, number: int) -> Any:
    return client.spawn("chain", {"value": number, "size": shape.size})["task_id"]


def work(config: Config) -> None:
    """Run tasks until the process is ended."""
    client = Absurd(config.postgres_url, queue_name=_QUEUE)
    _register(client)
    client.start_worker(worker_id=str(os.getpid()))


if __name__ == "__main__":
    main(AbsurdPeer, work)
