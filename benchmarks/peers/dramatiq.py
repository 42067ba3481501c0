"""dramatiq: messages in Redis; it is not durable, and the quickest of its kind."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import redis
from dramatiq import pipeline

from benchmarks.peers.dramatiq_actors import RESULTS, last, step
from benchmarks.peers.drive import main
from benchmarks.peers.protocol import Config, Peer, Shape

_THREADS = 8
_WAIT_MILLISECONDS = 120_000


class DramatiqPeer(Peer):
    """dramatiq, whose workers are processes of its own command."""

    # A group's callback is not given what the group's members have returned: there is no chord.
    shapes = frozenset({"one", "chain"})
    modes = frozenset({"one"})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._results = redis.Redis.from_url(config.redis_database(RESULTS))
        self._before = 0

    @property
    def version(self) -> str:
        """The package's version."""
        return importlib.metadata.version("dramatiq")

    def prepare(self) -> None:
        """There are no tables."""

    def launch(self, processes: int) -> None:
        """Start its command, which starts the processes."""
        self.spawn(
            "-m", "dramatiq", "benchmarks.peers.dramatiq_actors", "--processes", str(processes),
            "--threads", str(_THREADS), "--skip-logging",
        )  # fmt: skip

    def submit(self, shape: Shape, number: int) -> Any:
        """Send a message, or a pipeline of them."""
        if shape.size == 1:
            return last.send(number)
        steps = [step.message(number), *(step.message() for _ in range(shape.size - 2)), last.message()]
        return pipeline(steps).run()

    def reset(self, shape: Shape) -> None:
        """Count from now on."""
        self._before = int(self._results.dbsize())

    def ended(self) -> int:
        """Count the results: one is stored of each canvas."""
        return int(self._results.dbsize()) - self._before

    def wait(self, handle: Any, shape: Shape) -> Any:
        """Call ``get_result``."""
        return handle.get_result(block=True, timeout=_WAIT_MILLISECONDS)

    def values(self, handles: Sequence[Any], shape: Shape) -> list[Any]:
        """Read the stored results."""
        return [handle.get_result() for handle in handles]


if __name__ == "__main__":
    main(DramatiqPeer)
