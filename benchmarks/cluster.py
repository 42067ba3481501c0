"""The servers and workers of a comparison, all ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import redis
from celery import Celery
from psycopg2 import sql
from sqlalchemy import make_url

from benchmarks.engines import READY, Engine, EngineName
from byrd import embedded, store

POOL, CONCURRENCY = "prefork", 2
_ROOT = Path(__file__).resolve().parent.parent
_START_SECONDS = 60.0
_STOP_SECONDS = 15.0
_PROBE_COMMITS = 200


class BenchmarkError(Exception):
    """A benchmark could not be run to its end; the message says why, and ends with the worker's log."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A running engine."""

    engine: Engine
    app: Celery
    worker: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raise :class:`BenchmarkError` when the worker has gone."""
        if self.worker.poll() is not None:
            raise self.error(f"the worker of {self.engine.name} ended with exit status {self.worker.returncode}")

    def error(self, message: str) -> BenchmarkError:
        """Return an error that shows the end of the worker's log."""
        said = self.log.read_text(errors="replace").strip()[-2000:]
        return BenchmarkError(f"{message}. Its log says:\n{said or '(nothing)'}")


@dataclass(frozen=True, slots=True)
class Cluster:
    """What runs during a comparison; ``load``: how many processes wanted a CPU in the minute before it."""

    contestants: tuple[Contestant, ...]
    postgres_version: str
    redis_version: str
    commit_ms: float
    load: float


@contextmanager
def cluster(names: Sequence[EngineName]) -> Iterator[Cluster]:
    """Start Postgres (fsync on), Valkey (AOF) and one worker per engine; end them all at the end of the block."""
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="byrd-benchmarks-")))
        postgres = stack.enter_context(embedded.postgres())
        valkey = stack.enter_context(embedded.valkey())
        engines = [_engine(name, number, postgres.url, valkey.url) for number, name in enumerate(names)]
        contestants = tuple(stack.enter_context(_contestant(engine, folder)) for engine in engines)
        for contestant in contestants:
            stack.callback(contestant.worker.terminate)  # so that, at the end, none waits for another's
        for contestant in contestants:
            _wait_until_ready(contestant)
        with redis.Redis.from_url(valkey.url) as client:
            redis_version = str(client.info("server")["redis_version"])
        postgres_version, commit_ms = _probe(postgres.url)
        yield Cluster(contestants, postgres_version, redis_version, commit_ms, round(load, 2))


def _engine(name: EngineName, number: int, postgres_url: str, valkey_url: str) -> Engine:
    database = f"benchmarks_{name.replace('-', '_')}"
    with closing(psycopg2.connect(postgres_url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    url = make_url(postgres_url).set(database=database).render_as_string(hide_password=False)
    if name is EngineName.BYRD:
        store.migrate(url)
    return Engine(name, f"{valkey_url.rpartition('/')[0]}/{number}", url)


@contextmanager
def _contestant(engine: Engine, folder: Path) -> Iterator[Contestant]:
    log = folder / f"{engine.name}.log"
    command = [
        sys.executable, "-m", "celery", "-A", "benchmarks.worker", "worker", "--loglevel", "WARNING",
        "--pool", POOL, "--concurrency", str(CONCURRENCY), "--hostname", f"{engine.name}@%h",
    ]  # fmt: skip
    # Byrd's own variables would send an engine elsewhere than to the servers of this run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BYRD_")}
    with log.open("wb") as output:
        worker = subprocess.Popen(
            command, cwd=_ROOT, env={**environment, **engine.environment()}, stdin=subprocess.PIPE,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    app = engine.make_app()
    try:
        yield Contestant(engine, app, worker, log)
    finally:
        _stop(worker)
        app.close()


def _stop(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(_STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)  # its session: the pool's processes too
    worker.wait()
    if worker.stdin is not None:
        worker.stdin.close()


def _wait_until_ready(contestant: Contestant) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with redis.Redis.from_url(contestant.engine.redis_url) as client:
        while not client.exists(READY):
            contestant.check()
            if time.monotonic() > deadline:
                raise contestant.error(f"the worker of {contestant.engine.name} was not ready in {_START_SECONDS:g} s")
            time.sleep(0.05)


def _probe(postgres_url: str) -> tuple[str, float]:
    """Return Postgres' version, and the milliseconds that a commit takes on this disk: the floor under every step."""
    with closing(psycopg2.connect(postgres_url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute("CREATE TABLE probe (n int)")
        started = time.perf_counter()
        for number in range(_PROBE_COMMITS):
            cursor.execute("INSERT INTO probe VALUES (%s)", (number,))
        seconds = time.perf_counter() - started
        cursor.execute("DROP TABLE probe")
        return (
            f"{connection.server_version // 10000}.{connection.server_version % 10000}",
            seconds / _PROBE_COMMITS * 1000,
        )
