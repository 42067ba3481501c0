"""Fixtures with real Celery workers: processes of their own, on the servers of :mod:`tests.servers`.

A test writes ``shop = cluster.app("tests.apps.basic")`` and ``worker = cluster.worker("tests.apps.basic")``: the module
in this process and the one in the worker have the same database and broker.  All workers are gone when the test ends,
and the ends of their logs are part of its report when it fails.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from inspect import getclosurevars
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import psutil
import psycopg2
import pytest
import redis
from celery import Celery
from celery import _state as celery_state
from celery.backends.redis import RedisBackend

from tests.servers import Server, execute, url_of

ROOT = Path(__file__).resolve().parents[1]
#: How long a worker may take to start on a machine that is busy.
START_SECONDS = 60.0
_TAIL_LINES = 60
_ENV = ("BYRD_DATABASE_URL", "BYRD_BROKER_URL")
#: Ends a worker's group when the tests are gone without having ended it: the pipe breaks, or says that all is well.
_GUARD = 'read -r _ || kill -KILL "-$1"'

T = TypeVar("T")


class Worker:
    """One ``celery worker`` process with its pool, in a process group of its own."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self._command, self._env = list(command), dict(env)
        self._popen: subprocess.Popen[bytes] | None = None
        self._leash = -1

    @property
    def hostname(self) -> str:
        """The node name that Celery knows it by."""
        return f"{self.name}@localhost"

    @property
    def pid(self) -> int:
        """The process id of the main process, which is the id of the group too."""
        assert self._popen is not None, f"{self.name} was never started"
        return self._popen.pid

    @property
    def running(self) -> bool:
        """True until the main process has ended."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def exit_status(self) -> int | None:
        """The main process's exit status; None while it runs."""
        return None if self._popen is None else self._popen.poll()

    def pids(self) -> list[int]:
        """Return the process ids of the pool's children."""
        try:
            return [child.pid for child in psutil.Process(self.pid).children()]
        except psutil.NoSuchProcess:
            return []

    def start(self) -> None:
        """Start the process; :meth:`wait_for_log` tells when it is ready."""
        assert not self.running, f"{self.name} runs already"
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                self._command, cwd=ROOT, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        reader, self._leash = os.pipe()
        try:
            subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "guard", str(self.pid)], stdin=reader, start_new_session=True
            ).returncode = 0  # nobody waits for it: it ends with us
        finally:
            os.close(reader)

    def stop(self, timeout: float = 30.0, *, signal: signal.Signals = signal.SIGTERM) -> int:
        """Stop it, warmly by default: what runs is finished or handed back; return the exit status."""
        assert self._popen is not None
        self._popen.send_signal(signal)
        status = self._popen.wait(timeout)
        self._end_group()
        return status

    def kill(self) -> None:
        """Kill the main process and its pool at once (SIGKILL), as a power cut would."""
        if self._popen is not None and self._leash >= 0:
            self._end_group()
            self._popen.wait()

    def kill_main(self) -> None:
        """Kill the main process only; its pool finds out by itself."""
        assert self._popen is not None
        self._popen.kill()
        self._popen.wait()

    def sigstop(self) -> None:
        """Freeze all its processes, as a suspended virtual machine would."""
        os.killpg(self.pid, signal.SIGSTOP)

    def sigcont(self) -> None:
        """Let frozen processes go on."""
        os.killpg(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Kill what is left of it, start it anew, and wait until it is ready."""
        self.kill()
        mark = len(self.log_text())
        self.start()
        self.wait_for_log(r" ready\.", since=mark, timeout=START_SECONDS)

    def log_text(self) -> str:
        """Return everything that it has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the last lines of its log."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def wait_for_log(self, pattern: str, *, since: int = 0, timeout: float = 30.0) -> re.Match[str]:
        """Wait until its log, from the character ``since`` on, matches ``pattern``; return the match."""

        def found() -> re.Match[str] | None:
            match = re.search(pattern, self.log_text()[since:], re.MULTILINE)
            if match is None and not self.running:
                raise AssertionError(f"{self.name} ended ({self.exit_status}) before {pattern!r}:\n{self.log_tail()}")
            return match

        return wait_until(found, timeout=timeout, what=lambda: f"{pattern!r} in the log:\n{self.log_tail()}")

    def _end_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._leash >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._leash, b"\n")
            os.close(self._leash)
            self._leash = -1


class Cluster:
    """A database, a broker, and the workers and apps that a test has on them."""

    def __init__(self, *, database_url: str, broker_url: str, folder: Path) -> None:
        self.database_url, self.broker_url, self.folder = database_url, broker_url, folder
        self.workers: list[Worker] = []
        self._apps: dict[str, ModuleType] = {}
        self._names = itertools.count(1)

    def app(self, module: str) -> Any:
        """Return the module, imported anew for this cluster; its ``engine``, if any, is closed at the end."""
        if module not in self._apps:
            with self._environment(), _own_tasks(module):
                sys.modules.pop(module, None)
                self._apps[module] = imported = importlib.import_module(module)
                if isinstance(app := getattr(imported, "app", None), Celery):
                    app.finalize()
        return self._apps[module]

    def worker(
        self,
        module: str,
        *,
        concurrency: int = 2,
        pool: str = "prefork",
        queues: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        loglevel: str = "INFO",
        name: str | None = None,
        options: Sequence[str] = (),
        wait: bool = True,
    ) -> Worker:
        """Start a worker of the app in ``module``; with ``wait``, return once it consumes."""
        name = name or f"worker{next(self._names)}"
        command = [
            sys.executable, "-m", "celery", "-A", module, "worker", "-n", f"{name}@localhost", "-P", pool,
            "-c", str(concurrency), "-l", loglevel, "--without-mingle", "--without-gossip",
            *(["-Q", ",".join(queues)] if queues else []), *options,
        ]  # fmt: skip
        worker = Worker(name, command, {**self.env, **(env or {})}, self.folder / f"{name}.log")
        self.workers.append(worker)
        worker.start()
        if wait and loglevel.upper() in ("DEBUG", "INFO"):
            worker.wait_for_log(r" ready\.", timeout=START_SECONDS)
        elif wait:
            self.wait_registered(worker)
        return worker

    def wait_registered(self, worker: Worker, timeout: float = START_SECONDS) -> None:
        """Wait until the worker holds a lease."""
        sql = "SELECT 1 FROM byrd.workers WHERE hostname = %s AND pid = %s AND lease_until > clock_timestamp()"
        wait_until(
            lambda: self.rows(sql, worker.hostname, worker.pid),
            timeout=timeout,
            what=lambda: f"a lease of {worker.name}:\n{worker.log_tail()}",
        )

    @property
    def env(self) -> dict[str, str]:
        """The environment of its workers; of any other process that belongs to it."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        urls = dict(zip(_ENV, (self.database_url, self.broker_url), strict=True))
        return {**os.environ, **urls, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}

    def rows(self, sql: str, *params: Any) -> list[tuple[Any, ...]]:
        """Run a statement on the database, in a transaction of its own; return what it returns."""
        with closing(psycopg2.connect(self.database_url)) as connection, connection, connection.cursor() as cursor:
            cursor.execute(sql, params or None)
            return cursor.fetchall() if cursor.description else []

    def redis(self) -> redis.Redis:
        """Return a client of the broker; close it, or use it in a ``with`` statement."""
        return redis.Redis.from_url(self.broker_url)

    def close(self) -> None:
        """Kill all workers, close all apps."""
        for worker in self.workers:
            worker.kill()
        for name, module in self._apps.items():
            sys.modules.pop(name, None)
            if (engine := getattr(module, "engine", None)) is not None:
                engine.close()
            if (app := getattr(module, "app", None)) is not None:
                _disconnect_results(app)
                app.close()

    @contextmanager
    def _environment(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(_ENV[0], self.database_url)
            patch.setenv(_ENV[1], self.broker_url)
            yield


ClusterFactory = Callable[..., Cluster]


def _disconnect_results(app: Celery) -> None:
    """Close what a result backend in Redis leaves open; one that was never used is not made for it."""
    backend = app._backend
    if isinstance(backend, RedisBackend):
        backend.result_consumer.stop()
        backend.result_consumer._pubsub = None  # or results that are collected later would connect anew
        backend.client.connection_pool.disconnect()


@contextmanager
def _own_tasks(module: str) -> Iterator[None]:
    """Keep the tasks that a module defines out of the apps of later imports, its own second import among them."""
    # Somebody else may have imported it before, Django's admin say.
    before = {finalizer for finalizer in celery_state._on_app_finalizers if not _is_of(finalizer, module)}
    celery_state._on_app_finalizers.intersection_update(before)
    try:
        yield
    finally:
        celery_state._on_app_finalizers.intersection_update(before)


def _is_of(finalizer: Callable[..., object], module: str) -> bool:
    """Tell whether this registers a task of that module."""
    return any(getattr(held, "__module__", None) == module for held in getclosurevars(finalizer).nonlocals.values())


# -- fixtures --------------------------------------------------------------------------------------

#: The clusters that exist now, for the reports of failed tests.
_clusters: list[Cluster] = []


@contextmanager
def open_cluster(*, database_url: str, broker_url: str, folder: Path) -> Iterator[Cluster]:
    """Have a cluster, and end its processes."""
    cluster = Cluster(database_url=database_url, broker_url=broker_url, folder=folder)
    _clusters.append(cluster)
    try:
        yield cluster
    finally:
        _clusters.remove(cluster)
        cluster.close()


@pytest.fixture
def cluster_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterFactory]:
    """Make clusters on servers of the test's own: ``cluster_on(database_url=..., broker_url=...)``."""
    with contextlib.ExitStack() as stack:

        def make(*, database_url: str, broker_url: str) -> Cluster:
            folder = tmp_path_factory.mktemp("cluster")
            return stack.enter_context(open_cluster(database_url=database_url, broker_url=broker_url, folder=folder))

        yield make


@pytest.fixture
def cluster(database_url: str, broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster on a fresh database and an empty broker."""
    with open_cluster(
        database_url=database_url, broker_url=broker_url, folder=tmp_path_factory.mktemp("cluster")
    ) as found:
        yield found


@pytest.fixture(scope="module")
def module_cluster(
    postgres_server: Server,
    database_template: str,
    broker_server: Server,
    redis_databases: Iterator[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    """A cluster that the tests of one module share: for many canvases on workers that stay."""
    name = f"byrd_module_{secrets.token_hex(4)}"
    execute(postgres_server, "CREATE DATABASE {} TEMPLATE {}", name, database_template)
    broker_url = broker_server.url
    if "BYRD_BROKER_URL" not in os.environ:
        broker_url = f"{broker_url.rpartition('/')[0]}/{next(redis_databases)}"
    with redis.Redis.from_url(broker_url) as client:
        client.flushdb()
    try:
        with open_cluster(
            database_url=url_of(postgres_server, name), broker_url=broker_url, folder=tmp_path_factory.mktemp("cluster")
        ) as found:
            yield found
    finally:
        execute(postgres_server, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the ends of the workers' logs to the report of a failed test."""
    report = yield
    if report.failed:
        for cluster in _clusters:
            report.sections.extend((f"log of {worker.name}", worker.log_tail()) for worker in cluster.workers)
    return report


# -- waiting ---------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], T | None], *, timeout: float = 30.0, what: str | Callable[[], str] = "") -> T:
    """Call ``condition`` until it returns something true, and return that; fail after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.01
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() >= deadline:
            raise AssertionError(f"after {timeout} s still no {what() if callable(what) else what or condition}")
        time.sleep(pause)
        pause = min(0.2, pause * 1.3)
