"""Byrd: who drives a canvas is Postgres."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg2
from celery import Celery
from sqlalchemy import create_engine, make_url, text

from benchmarks.peers import celery as plain
from benchmarks.peers.drive import main
from benchmarks.peers.protocol import Config, Shape
from byrd import Byrd, CheckpointTask
from byrd.store import migrate

_FETCH_SECONDS = 120.0


def make_app(config: Config) -> Celery:
    """Return the app of plain Celery's tasks, adopted; each setting that is not here is Byrd's default."""
    app = plain.make_app(config)
    Byrd(app, database_url=config.postgres_url)
    _add_loops(app)
    return app


def _items(items: int, cursor: int | None) -> Iterator[tuple[int, int]]:
    for number in range(0 if cursor is None else cursor + 1, items):
        yield number, number


def _process(item: int) -> int:
    return item


def _add_loops(app: Celery) -> None:
    """Register loops over no-op items; each returns the seconds that it took."""

    @app.task(name="benchmarks.iterate", shared=False, bind=True, base=CheckpointTask)
    def iterate(self: CheckpointTask, items: int, every: int) -> float:
        started = time.perf_counter()
        done = self.iterate(lambda cursor: _items(items, cursor), _process, batch_size=every)
        if done.completed != items:
            raise ValueError(f"{done.completed} of {items} items were completed")
        return time.perf_counter() - started

    @app.task(name="benchmarks.bare_loop", shared=False)
    def bare_loop(items: int) -> float:
        started = time.perf_counter()
        for _, item in _items(items, None):
            _process(item)
        return time.perf_counter() - started


class ByrdPeer(plain.CeleryPeer):
    """Byrd, on a Celery worker."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.engine: Byrd = self.app.byrd
        batch = {"batch"} if hasattr(self.engine, "submit_many") else set()
        self.modes = frozenset({"one", "transaction"} | batch)
        self._callers = create_engine(make_url(config.postgres_url).set(drivername="postgresql+psycopg2"))
        self._since: Any = None

    def make_app(self) -> Celery:
        """Return the app of the client."""
        return make_app(self.config)

    @property
    def version(self) -> str:
        """Byrd's version."""
        return importlib.metadata.version("byrd")

    def prepare(self) -> None:
        """Migrate."""
        migrate(self.config.postgres_url)
        self._eye = psycopg2.connect(self.config.postgres_url)
        self._eye.autocommit = True

    def submit(self, shape: Shape, number: int) -> Any:
        """Call ``engine.submit``."""
        return self.engine.submit(self.canvas(shape.of(number), number, counted=False))

    def submit_batch(self, shape: Shape, numbers: Sequence[int]) -> list[Any]:
        """Call ``engine.submit_many``."""
        many: Any = getattr(self.engine, "submit_many")  # noqa: B009 - not every version has it
        return list(many([self.canvas(shape, number, counted=False) for number in numbers]))

    def submit_within(self, shape: Shape, number: int) -> Any:
        """Join a transaction that does nothing else."""
        with self._callers.begin() as conn:
            return self.engine.submit(self.canvas(shape, number, counted=False), connection=conn)

    def reset(self, shape: Shape) -> None:
        """Count the runs that are made from now on."""
        [[self._since]] = self._look("SELECT clock_timestamp()")

    def ended(self) -> int:
        """Count the runs that Postgres holds as ended."""
        [[ended]] = self._look(
            "SELECT count(*) FROM byrd.runs WHERE created_at >= %s AND finished_at IS NOT NULL", self._since
        )
        return int(ended)

    def wait(self, handle: Any, shape: Shape) -> Any:
        """Call ``run.get``."""
        return handle.get(timeout=_FETCH_SECONDS)

    def values(self, handles: Sequence[Any], shape: Shape) -> list[Any]:
        """Ask each run."""
        return [self.wait(handle, shape) for handle in handles]

    def end_times(self, handles: Sequence[Any]) -> list[float] | None:
        """Return when the runs ended."""
        found = dict(
            self._look(
                "SELECT id::text, extract(epoch FROM finished_at)::float FROM byrd.runs WHERE created_at >= %s",
                self._since,
            )
        )
        return [found[handle.id] for handle in handles]

    def grow(self, finished: int) -> None:
        """Fill the tables as :mod:`benchmarks.scale` does, and have Postgres write to its disk what is left of that."""
        from benchmarks.scale import fill

        fill(self.engine, finished=finished, waiting=0)
        with self._callers.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(text("DELETE FROM byrd.workers"))  # the filling's own, which nobody is
            conn.execute(text("CHECKPOINT"))

    def checkpoints(self, items: int, every: int) -> dict[str, float]:
        """Run the loop with checkpoints, with one at its end only, and as a plain task without any."""
        iterate, bare = self.app.tasks["benchmarks.iterate"], self.app.tasks["benchmarks.bare_loop"]
        loops = {"checkpoints": iterate.s(items, every), "one": iterate.s(items, items), "none": bare.s(items)}
        return {name: self.engine.submit(loop).get(timeout=_FETCH_SECONDS) for name, loop in loops.items()}

    def _look(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._eye.cursor() as cursor:
            cursor.execute(sql, values)
            return list(cursor.fetchall())


if __name__ == "__main__":
    main(ByrdPeer)
