"""A migrated database with schedules in it, Django in this process on it, and real processes of Celery and of the web."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psycopg2
import pytest

ROOT = Path(__file__).resolve().parents[2]
APP = "tests.beat.shop"

_T = TypeVar("_T")


@pytest.fixture(scope="session")
def django_project(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Django, set up in this process with the settings of beat/."""
    import django
    from django.conf import settings

    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("DJANGO_SETTINGS_MODULE", "beat.settings")
        environ.setenv("BYRD_DATABASE_URL", "postgresql://nobody@localhost/replaced-by-each-test")
        environ.setenv("BYRD_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        environ.setenv("BYRD_APP", APP)
        django.setup()
        assert settings.BYRD_APP == APP


@pytest.fixture
def schedules_url(database_url: str, broker_url: str, django_project: None, monkeypatch: Any) -> Iterator[str]:
    """The database of the test, with Django's tables too, and Django in this process on it."""
    from django.core.management import call_command
    from django.db import connection, connections

    from beat.environment import database

    monkeypatch.setenv("BYRD_DATABASE_URL", database_url)
    monkeypatch.setenv("BYRD_BROKER_URL", broker_url)
    connections.close_all()
    connection.settings_dict.update(database({"BYRD_DATABASE_URL": database_url}))
    call_command("migrate", verbosity=0, interactive=False)
    yield database_url
    connections.close_all()


@dataclass
class Process:
    """A process of the deployment, and where it writes its log."""

    popen: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int:
        self.popen.terminate()
        return self.popen.wait(30)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


Start = Callable[..., Process]


@pytest.fixture
def start(schedules_url: str, broker_url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts ``python -m ...`` on the test's database and broker; what still runs at the end is killed."""
    processes: list[Process] = []

    def start(*module: str, **environ: str) -> Process:
        log = tmp_path / f"{len(processes)}-{'-'.join(module[:4]).replace('/', '_')}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=ROOT,
                env=_environ(schedules_url, broker_url, tmp_path, environ),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        processes.append(Process(popen, log))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


@pytest.fixture
def beat(start: Start) -> Callable[[], Process]:
    """Starts a beat."""
    return lambda: start("celery", "-A", APP, "beat", "--scheduler=beat.scheduler:ByrdScheduler", "--loglevel=INFO")


def _environ(database_url: str, broker_url: str, state: Path, more: Mapping[str, str]) -> dict[str, str]:
    return {
        **os.environ,
        "BYRD_DATABASE_URL": database_url,
        "BYRD_BROKER_URL": broker_url,
        "BYRD_STATE_DIR": str(state),
        "BYRD_APP": APP,
        "PYTHONUNBUFFERED": "1",
        **more,
    }


@contextmanager
def cursor(database_url: str) -> Iterator[Any]:
    """A cursor on a connection of its own that commits each statement."""
    connection = psycopg2.connect(database_url)
    connection.autocommit = True
    try:
        with connection.cursor() as found:
            yield found
    finally:
        connection.close()


def rows(database_url: str, statement: str, *parameters: Any) -> list[Any]:
    """What a query finds; the only column's values, if it has one."""
    with cursor(database_url) as found:
        found.execute(statement, parameters)
        return [row[0] if len(row) == 1 else row for row in found.fetchall()]


def wait_until(condition: Callable[[], _T], what: str, seconds: float = 30.0) -> _T:
    """Wait for a condition to be true, and return its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"waited {seconds:.0f} s in vain until {what}")
