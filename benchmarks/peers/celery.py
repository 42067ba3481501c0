"""Plain Celery: who drives a canvas are Celery's own messages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import redis
from celery import Celery, chain, chord
from celery.result import GroupResult
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import ProgrammingError

from benchmarks.peers.drive import main
from benchmarks.peers.protocol import Config, Peer, Shape, spin

#: How many canvases have ended, counted by the workers in a Redis database of its own.
ENDED = "benchmarks:ended"
#: The Redis databases for messages, results and the count.
BROKER, RESULTS, COUNTS = 0, 1, 2
_FETCH_SECONDS = 120.0


def make_app(config: Config) -> Celery:
    """Return the app.  Each setting that is not here is Celery's default."""
    app = Celery(config.engine, broker=config.redis_database(BROKER), set_as_current=False)
    app.conf.broker_connection_retry_on_startup = True
    add_tasks(app)
    if config.options["results"] == "redis":
        app.conf.result_backend = config.redis_database(RESULTS)
    elif config.options["results"] == "postgres":
        url = make_url(config.postgres_url).set(drivername="postgresql+psycopg2")
        app.conf.result_backend = "db+" + url.render_as_string(hide_password=False)
    if config.options.get("acks_late"):
        app.conf.task_acks_late = True
        app.conf.worker_prefetch_multiplier = 1
    return app


def add_tasks(app: Celery) -> None:
    """Register the steps."""

    @app.task(name="benchmarks.step", shared=False)
    def step(value: int, work_ms: float = 0.0) -> int:
        spin(work_ms)
        return value

    @app.task(name="benchmarks.last", shared=False)
    def last(value: int | list[int], work_ms: float = 0.0) -> int:
        spin(work_ms)
        return value if isinstance(value, int) else sum(value)


class CeleryPeer(Peer):
    """Plain Celery, whose options say where results go and how its worker runs."""

    shapes = frozenset({"one", "chain", "chord", "mix"})
    modes = frozenset({"one", "batch"})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.app = self.make_app()
        self.app.set_current()
        self._counts = redis.Redis.from_url(config.redis_database(COUNTS))
        self._results = redis.Redis.from_url(config.redis_database(RESULTS))
        self._database = create_engine(make_url(config.postgres_url).set(drivername="postgresql+psycopg2"))
        self._by_results = False
        self._before = 0

    def make_app(self) -> Celery:
        """Return the app of the client."""
        return make_app(self.config)

    @property
    def version(self) -> str:
        """Celery's version."""
        return importlib.metadata.version("celery")

    def prepare(self) -> None:
        """Celery makes its table with the first result."""

    def launch(self, processes: int) -> None:
        """Start one worker with so many pool processes, or as many workers without a pool."""
        if self.config.options.get("pool") == "solo":
            for number in range(processes):
                self._spawn_worker(f"worker{number}", "solo", 1)
        else:
            self._spawn_worker("worker", "prefork", processes)

    def _spawn_worker(self, name: str, pool: str, concurrency: int) -> None:
        self.spawn(
            "-m", "celery", "-A", "benchmarks.peers.celery_worker", "worker", "--loglevel", "WARNING",
            "--pool", pool, "--concurrency", str(concurrency), "--hostname", f"{name}@%h",
        )  # fmt: skip

    def canvas(self, shape: Shape, number: int, *, counted: bool) -> Any:
        """Return the ``number``-th canvas; ``counted``: its last step tells :meth:`ended`."""
        step, last = self.app.tasks["benchmarks.step"], self.app.tasks["benchmarks.last"]
        kwargs = {"work_ms": shape.work_ms} if shape.work_ms else {}
        if shape.kind == "chord":
            return chord([step.s(number, **kwargs) for _ in range(shape.size)], last.s(**kwargs))
        if shape.size == 1:
            return (last if counted else step).s(number, **kwargs)
        return chain(
            step.s(number, **kwargs), *(step.s(**kwargs) for _ in range(shape.size - 2)), last.s(**kwargs)
        )  # fmt: skip

    def submit(self, shape: Shape, number: int) -> Any:
        """Call ``apply_async``."""
        return self.canvas(shape.of(number), number, counted=shape.key != "one").apply_async()

    def submit_batch(self, shape: Shape, numbers: Sequence[int]) -> list[Any]:
        """Publish in one batch of kombu's."""
        with self.app.producer_pool.acquire(block=True) as producer, producer.batch(len(numbers)):
            return [self.canvas(shape, number, counted=False).apply_async(producer=producer) for number in numbers]

    def reset(self, shape: Shape) -> None:
        """Count from now on."""
        self._by_results = shape.key == "one"
        self._counts.delete(ENDED)
        self._before = self._stored() if self._by_results else 0

    def ended(self) -> int:
        """Count the results of one-step runs; else ask what the last steps of longer canvases have counted.

        They count when Celery sends ``task_postrun``, which is after the result was stored.
        """
        return self._stored() - self._before if self._by_results else int(self._counts.get(ENDED) or 0)

    def _stored(self) -> int:
        if self.config.options["results"] == "redis":
            return int(self._results.dbsize())
        try:
            with self._database.connect() as conn:
                return int(conn.execute(text("SELECT count(*) FROM celery_taskmeta")).scalar_one())
        except ProgrammingError:
            return 0  # there is no table yet

    def wait(self, handle: Any, shape: Shape) -> Any:
        """Call ``get``."""
        value = handle.get(timeout=_FETCH_SECONDS)
        members = getattr(handle, "parent", None)
        if isinstance(members, GroupResult):  # the client listens for a chord's members until they were fetched
            members.get(timeout=_FETCH_SECONDS)
        return value

    def values(self, handles: Sequence[Any], shape: Shape) -> list[Any]:
        """Read the stored results, without the client's way of waiting for them."""
        metas = [self.app.backend.get_task_meta(handle.id, cache=False) for handle in handles]
        return [meta["result"] if meta["status"] == "SUCCESS" else meta for meta in metas]

    def end_times(self, handles: Sequence[Any]) -> list[float] | None:
        """Return when the last results were stored."""
        dates = [handle.date_done for handle in handles]
        return [date.timestamp() for date in dates]


if __name__ == "__main__":
    main(CeleryPeer)
