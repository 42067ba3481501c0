"""The servers that all engines share, one after the other, and the meters that are read on them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Self

import psutil
import psycopg2
import redis
from psycopg2 import sql
from sqlalchemy import make_url

from byrd import embedded

_PROBE_COMMITS = 200


@dataclass(frozen=True, slots=True)
class Servers:
    """Postgres (fsync on) and Valkey (AOF, synced each second).

    ``commit_ms``: what a commit of one row takes; ``load``: how many processes wanted a CPU in the minute before.
    """

    postgres: embedded.EmbeddedPostgres
    valkey: embedded.EmbeddedValkey
    postgres_version: str
    valkey_version: str
    commit_ms: float
    load: float

    @contextmanager
    def database(self, name: str) -> Iterator[str]:
        """Make a new database, empty Valkey, and let Postgres write out what it holds; drop the database at the end."""
        identifier = sql.Identifier(name)
        self._execute(sql.SQL("CREATE DATABASE {}").format(identifier), sql.SQL("CHECKPOINT"))
        with redis.Redis.from_url(self.valkey.url) as client:
            client.flushall()
        try:
            yield make_url(self.postgres.url).set(database=name).render_as_string(hide_password=False)
        finally:
            self._execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(identifier))

    def settle(self, url: str) -> None:
        """Vacuum and analyse a database now, as autovacuum would within a minute: a comparison fills it in seconds."""
        with closing(psycopg2.connect(url)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("VACUUM (ANALYZE)")

    def _execute(self, *statements: sql.Composable) -> None:
        with closing(psycopg2.connect(self.postgres.url)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)


@contextmanager
def servers() -> Iterator[Servers]:
    """Start both; end them at the end of the block."""
    load = os.getloadavg()[0]
    with embedded.postgres() as postgres, embedded.valkey() as valkey:
        with redis.Redis.from_url(valkey.url) as client:
            valkey_version = str(client.info("server")["valkey_version"])
        version, commit_ms = _probe(postgres.url)
        yield Servers(postgres, valkey, version, valkey_version, round(commit_ms, 3), round(load, 2))


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
        version = connection.server_version
        return f"{version // 10000}.{version % 10000}", seconds / _PROBE_COMMITS * 1000


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds so far: of the client, the workers' main processes, their children, and the two servers."""

    client: float
    main: float
    children: float
    postgres: float
    valkey: float

    @classmethod
    def read(cls, client: int, servers: Servers) -> Self:
        """Read the meters of the processes below ``client`` and of the servers."""
        process = psutil.Process(client)
        workers = process.children()
        children = [child for worker in workers for child in _below(worker)]
        postgres = psutil.Process(servers.postgres.pid)
        return cls(
            _seconds(process),
            sum(map(_seconds, workers)),
            sum(map(_seconds, children)),
            _seconds(postgres, ended=True) + sum(map(_seconds, _below(postgres))),
            _seconds(psutil.Process(servers.valkey.pid)),
        )

    def since(self, before: Cpu) -> dict[str, float]:
        """Return the seconds used since, by their names."""
        return {name: getattr(self, name) - getattr(before, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of the workers' main processes, and of each of their children."""

    main: tuple[int, ...]
    children: tuple[int, ...]

    @classmethod
    def read(cls, client: int) -> Self:
        """Look at the processes below ``client``."""
        workers = psutil.Process(client).children()
        children = [child for worker in workers for child in _below(worker)]
        return cls(tuple(map(_resident, workers)), tuple(map(_resident, children)))

    @property
    def child(self) -> int:
        """The largest process that runs steps, in bytes: a child, or a worker without any."""
        return max(self.children or self.main, default=0)

    @property
    def total(self) -> int:
        """All of it, in bytes; what processes share is counted for each."""
        return sum(self.main) + sum(self.children)


def _below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []


def _seconds(process: psutil.Process, *, ended: bool = False) -> float:
    """Return user and system time; ``ended``: with that of children that have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return float(sum(process.cpu_times()[: 4 if ended else 2]))
    return 0.0


def _resident(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return int(process.memory_info().rss)
    return 0
