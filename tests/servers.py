"""Fixtures with real Postgres and Redis servers: shared ones, and private ones that a test may kill.

``BYRD_DATABASE_URL`` (a role that may create databases) and ``BYRD_BROKER_URL`` (a Redis database that may be flushed)
replace the shared embedded servers by running ones.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import psycopg2
import pytest
import redis
from psycopg2 import sql
from sqlalchemy import make_url

from byrd import embedded

_REDIS_DATABASES = 16


class Server(Protocol):
    """A server that answers at its URL."""

    @property
    def url(self) -> str: ...


@dataclass(frozen=True)
class ExternalServer:
    """A server that somebody else runs."""

    url: str


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """The Postgres of the whole session: tests share it and must not stop it."""
    if url := os.environ.get("BYRD_DATABASE_URL"):
        yield ExternalServer(url)
        return
    with embedded.postgres(in_memory=True) as server:
        yield server


@pytest.fixture(scope="session")
def broker_server() -> Iterator[Server]:
    """The Redis of the whole session: tests share it and must not stop it."""
    if url := os.environ.get("BYRD_BROKER_URL"):
        yield ExternalServer(url)
        return
    with embedded.valkey(persistence=False) as server:
        yield server


@pytest.fixture(scope="session")
def database_template(postgres_server: Server) -> Iterator[str]:
    """The name of a migrated database to clone; it takes no connections, as a template must have none."""
    from byrd import store

    name = f"byrd_template_{secrets.token_hex(4)}"
    execute(postgres_server, "CREATE DATABASE {}", name)
    try:
        store.migrate(url_of(postgres_server, name))
        execute(postgres_server, "ALTER DATABASE {} ALLOW_CONNECTIONS false", name)
        execute(
            postgres_server, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", value=name
        )
        yield name
    finally:
        execute(postgres_server, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture
def database_url(postgres_server: Server, database_template: str) -> Iterator[str]:
    """A fresh, migrated database on the shared Postgres."""
    name = f"byrd_test_{secrets.token_hex(4)}"
    execute(postgres_server, "CREATE DATABASE {} TEMPLATE {}", name, database_template)
    try:
        yield url_of(postgres_server, name)
    finally:
        execute(postgres_server, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture(scope="session")
def redis_databases() -> Iterator[int]:
    """Database numbers in turn, so that what a test left behind does not write into the next one's."""
    return itertools.cycle(range(_REDIS_DATABASES))


@pytest.fixture
def broker_url(broker_server: Server, redis_databases: Iterator[int]) -> str:
    """An empty database on the shared Redis."""
    url = broker_server.url
    if not isinstance(broker_server, ExternalServer):
        url = f"{url.rpartition('/')[0]}/{next(redis_databases)}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def own_postgres() -> Iterator[embedded.EmbeddedPostgres]:
    """A private, migrated Postgres that the test may kill and restart."""
    from byrd import store

    with embedded.postgres(in_memory=True) as server:
        store.migrate(server.url)
        yield server


@pytest.fixture
def own_broker() -> Iterator[embedded.EmbeddedValkey]:
    """A private Valkey that the test may kill, restart and flush."""
    with embedded.valkey() as server:
        yield server


def url_of(server: Server, database: str) -> str:
    """Return the URL of another database on the same Postgres, in the form that libpq takes."""
    url = make_url(server.url).set(drivername="postgresql", database=database)
    return url.render_as_string(hide_password=False)


def execute(server: Server, statement: str, *names: str, value: str | None = None) -> None:
    """Execute a statement outside a transaction, its ``{}`` replaced by quoted names."""
    maintenance = make_url(server.url).database or "postgres"
    with closing(psycopg2.connect(url_of(server, maintenance))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql.SQL(statement).format(*map(sql.Identifier, names)), value and (value,))
