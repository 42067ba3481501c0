"""Databases with the tables of schedules, Django in this process on them, and real processes of the deployment."""

from __future__ import annotations

import os
import secrets
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
from sqlalchemy import make_url

from tests.servers import Server, execute, url_of

ROOT = Path(__file__).resolve().parents[2]
APP = "tests.beat.shop"
BEAT = ("celery", "-A", APP, "beat", "--scheduler=beat.scheduler:ByrdScheduler", "--loglevel=INFO")

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


@pytest.fixture(scope="session")
def schedules_template(postgres_server: Server, database_template: str, django_project: None) -> Iterator[str]:
    """The name of a database to clone, with Byrd's tables and Django's."""
    name = f"byrd_beat_template_{secrets.token_hex(4)}"
    execute(postgres_server, "CREATE DATABASE {} TEMPLATE {}", name, database_template)
    try:
        with django_on(url_of(postgres_server, name)):
            call_migrate()
        yield name
    finally:
        execute(postgres_server, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture
def schedules_url(
    postgres_server: Server, schedules_template: str, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A fresh database with Byrd's tables and Django's; Django in this process is on it."""
    name = f"byrd_beat_{secrets.token_hex(4)}"
    execute(postgres_server, "CREATE DATABASE {} TEMPLATE {}", name, schedules_template)
    url = url_of(postgres_server, name)
    monkeypatch.setenv("BYRD_DATABASE_URL", url)
    monkeypatch.setenv("BYRD_BROKER_URL", broker_url)
    try:
        with django_on(url):
            yield url
    finally:
        execute(postgres_server, "DROP DATABASE {} WITH (FORCE)", name)


@contextmanager
def django_on(url: str) -> Iterator[None]:
    from django.db import connection, connections

    from beat.environment import database

    before = dict(connection.settings_dict)
    connections.close_all()
    connection.settings_dict.update(database({"BYRD_DATABASE_URL": url}))
    try:
        yield
    finally:
        connections.close_all()
        connection.settings_dict.update(before)


def call_migrate() -> None:
    """Bring the tables of beat/ to the database that Django in this process is on."""
    from django.core.management import call_command

    call_command("migrate", verbosity=0, interactive=False)


def libpq_url(url: str) -> str:
    """The URL in the form that libpq takes too."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


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
    return lambda: start(*BEAT)


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
