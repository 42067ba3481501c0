"""What a peer is asked to run, and what it has to offer for it.

Only the standard library is imported here: each peer runs in an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

ROOT = Path(__file__).resolve().parents[2]
#: How a client and its workers learn which peer they are, and where the servers listen.
VARIABLE = "BENCHMARKS_PEER"
#: How long a worker has to end by itself, in seconds.
_STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A canvas: ``kind`` is chain, chord or mix; ``size`` a chain's length or a chord's width.

    ``work_ms``: milliseconds of CPU time that each step uses up.  Each step returns what it got, and a chord's body
    the sum of what it got, so that a lost or doubled value shows in the canvas's value.
    """

    kind: str
    size: int = 1
    work_ms: float = 0.0

    @property
    def key(self) -> str:
        """What a peer has to offer to run it."""
        return "one" if (self.kind, self.size) == ("chain", 1) else self.kind

    def of(self, number: int) -> Shape:
        """Return the shape of the ``number``-th canvas: of a mix it is one of ten."""
        return MIX[number % len(MIX)].working(self.work_ms) if self.kind == "mix" else self

    def working(self, work_ms: float) -> Shape:
        """Return the same canvas with so much work a step."""
        return Shape(self.kind, self.size, work_ms)

    def steps(self, count: int) -> int:
        """Return the steps in the first ``count`` canvases; a chord's body is a step."""
        if self.kind == "mix":
            return sum(self.of(number).steps(1) for number in range(count))
        return count * (self.size + 1 if self.kind == "chord" else self.size)

    def value(self, number: int) -> int:
        """Return the value of the ``number``-th canvas."""
        shape = self.of(number)
        return number * shape.size if shape.kind == "chord" else number


#: Ten canvases of the realistic mix, 35 steps: jobs, short and long chains, a fan-out.
MIX = (
    *(Shape("chain", 1) for _ in range(5)),
    *(Shape("chain", 3) for _ in range(3)),
    Shape("chain", 10),
    Shape("chord", 10),
)


@dataclass(frozen=True, slots=True)
class Config:
    """One engine, with a Postgres database and a Redis server that nobody else uses meanwhile."""

    engine: str
    postgres_url: str
    redis_url: str
    options: dict[str, Any]

    @classmethod
    def from_environment(cls) -> Self:
        """Return what this process was started with."""
        return cls(**json.loads(os.environ[VARIABLE]))

    def environment(self) -> dict[str, str]:
        """Return what :meth:`from_environment` reads."""
        return {VARIABLE: json.dumps(asdict(self))}

    def redis_database(self, number: int) -> str:
        """Return the URL of one of the Redis server's databases."""
        return f"{self.redis_url.rpartition('/')[0]}/{number}"


class Peer(ABC):
    """The client's side of an engine, and what starts its workers."""

    #: The keys of the shapes that it runs, and how it can be submitted to: one, batch, transaction.
    shapes: ClassVar[frozenset[str]]
    modes: frozenset[str] = frozenset({"one"})

    def __init__(self, config: Config) -> None:
        self.config = config
        self._workers: list[subprocess.Popen[bytes]] = []

    @property
    @abstractmethod
    def version(self) -> str:
        """The engine's version."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the tables."""

    @abstractmethod
    def launch(self, processes: int) -> None:
        """Start the workers, with so many processes that run steps; do not wait until they do."""

    @abstractmethod
    def submit(self, shape: Shape, number: int) -> Any:
        """Start a canvas; return what :meth:`wait` knows it by."""

    @abstractmethod
    def reset(self, shape: Shape) -> None:
        """Begin to count ends anew; nothing is running."""

    @abstractmethod
    def ended(self) -> int:
        """Return how many canvases have ended since the last :meth:`reset`, as the workers have recorded it."""

    @abstractmethod
    def wait(self, handle: Any, shape: Shape) -> Any:
        """Wait for a canvas's value in the way in which a program would."""

    def values(self, handles: Sequence[Any], shape: Shape) -> list[Any]:
        """Return the values of canvases that have ended."""
        return [self.wait(handle, shape.of(number)) for number, handle in enumerate(handles)]

    def submit_batch(self, shape: Shape, numbers: Sequence[int]) -> list[Any]:
        """Start several canvases in the quickest way that there is."""
        return [self.submit(shape, number) for number in numbers]

    def submit_within(self, shape: Shape, number: int) -> Any:
        """Start a canvas in a transaction of the caller's own, and commit that."""
        raise NotImplementedError

    def end_times(self, handles: Sequence[Any]) -> list[float] | None:
        """Return when each canvas ended, in seconds since the epoch, as recorded; None if that is not known."""
        return None

    def grow(self, finished: int) -> None:
        """Fill the tables with so many runs that have ended."""
        raise NotImplementedError

    def checkpoints(self, items: int, every: int) -> dict[str, float]:
        """Run a loop over so many items in each of several ways; return the seconds of each, by its name."""
        raise NotImplementedError

    def spawn(self, *command: str) -> None:
        """Start a worker; what it says goes where the client's errors go."""
        environment = {**os.environ, **self.config.environment()}
        self._workers.append(
            subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr
            )
        )

    def check(self) -> None:
        """Raise an error when a worker has gone."""
        for worker in self._workers:
            if worker.poll() is not None:
                raise RuntimeError(f"a worker ended with exit status {worker.returncode}")

    def stop(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for worker in self._workers:
            try:
                worker.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self._workers.clear()


def spin(work_ms: float) -> None:
    """Use up so many milliseconds of this thread's CPU time."""
    if work_ms:
        end = time.thread_time() + work_ms / 1000
        while time.thread_time() < end:
            pass
