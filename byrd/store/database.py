"""The connection pool, and transactions that outlive deadlocks and outages of Postgres."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from typing import Any, Concatenate, Never, ParamSpec, TypeVar

from psycopg2 import errors as pg_errors
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError, NoSuchTableError, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from byrd.errors import NotMigratedError, StoreUnavailableError
from byrd.store.migrate import current_revision, head_revision, normalise_url

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

#: Lost the race, not the transaction's fault: the same statements are right a moment later.
_RACES = (pg_errors.DeadlockDetected, pg_errors.SerializationFailure, pg_errors.LockNotAvailable)
#: Postgres is starting, stopping, full of connections, or gone: it may be back soon.
_OUTAGES = (
    pg_errors.AdminShutdown,
    pg_errors.CrashShutdown,
    pg_errors.CannotConnectNow,
    pg_errors.TooManyConnections,
    pg_errors.ConnectionException,
    pg_errors.ConnectionFailure,
    pg_errors.ReadOnlySqlTransaction,
    pg_errors.IdleInTransactionSessionTimeout,
)
#: Class 53, insufficient resources (disk full, out of memory), and a statement time-out: they may pass, too.
_CANCELED = "57014"
#: A statement was cancelled or took too long, a lock was not to be had in time, a configured limit is reached.
_EXCEEDS = frozenset({_CANCELED, "55P03", "53400"})
#: However little patience there is, a race that was lost is run again so often.
_MOST_RACES = 10
#: Transactions of the user's own that fail in this way more often ask for too much, rather than are unlucky.
MOST_EXCESSES = 5
_MISSING = (pg_errors.UndefinedTable, pg_errors.UndefinedColumn, pg_errors.InvalidSchemaName, NoSuchTableError)

#: A peer that is silent for ten seconds is gone: a cable is cut, a host is off.  Linux would wait for a quarter of an
#: hour, or for two.  Both ends look, for what a broken connection has locked stays locked until the server notices.
_CONNECT = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
_SESSION = """
SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3; SET tcp_user_timeout = '10s'
"""
#: A process that is frozen between two statements holds its locks no longer than this, a stricter database apart.
_OUR_SESSION = f"""{_SESSION};
SELECT set_config('idle_in_transaction_session_timeout', '10s', false)
 WHERE current_setting('idle_in_transaction_session_timeout') = '0'
"""


class _Pools:
    """The connections of this process to one database, and the engines that give them out.

    Those for transactions, and those for single statements, each of which is one by itself: to switch a connection
    between the two costs as much as a statement.
    """

    def __init__(self, url: URL, size: int, *, for_users: bool) -> None:
        self._url, self._size, self._for_users = url, size, for_users
        self._engines: dict[bool, Engine] = {}
        self._pid = 0

    def engine(self, *, alone: bool) -> Engine:
        """Return the engine of this process: a forked child gets its own, for connections cannot be shared."""
        if self._pid != os.getpid():
            for inherited in self._engines.values():
                inherited.dispose(close=False)
            self._engines, self._pid = {}, os.getpid()
        if alone not in self._engines:
            # Byrd's own statements look again after they have waited for a lock; at a higher level they would see the
            # past.
            level = "AUTOCOMMIT" if alone else "READ COMMITTED"
            engine = create_engine(
                self._url,
                pool_size=self._size,
                max_overflow=20,
                pool_timeout=30,
                connect_args={**_CONNECT, "application_name": "byrd", "options": "-c timezone=UTC"},
                **({} if self._for_users else {"isolation_level": level}),
            )
            event.listen(engine, "connect", self._prepare)
            self._engines[alone] = engine
        return self._engines[alone]

    def dispose(self) -> None:
        """Close the idle connections; new ones are made when they are needed."""
        if self._pid == os.getpid():
            for engine in list(self._engines.values()):
                engine.dispose()

    def _prepare(self, raw: Any, _record: object) -> None:
        before, raw.autocommit = raw.autocommit, True
        with raw.cursor() as cursor:
            cursor.execute(_SESSION if self._for_users else _OUR_SESSION)
        raw.autocommit = before


class Store:
    """A pool of connections to Byrd's database.

    ``patience``: for how many seconds a transaction is tried again while Postgres is away; after that it
    raises :class:`StoreUnavailableError`.  A worker passes infinity: what it has done must be recorded.
    ``for_users``: its transactions hold statements of the user's own, so they may take long, and have the isolation
    that the database gives them.
    """

    def __init__(
        self, database_url: str | URL, *, patience: float = 10.0, pool_size: int = 5, for_users: bool = False
    ) -> None:
        self.url = normalise_url(database_url)
        self.patience = patience
        self._for_users = for_users
        self._pools = _Pools(self.url, pool_size, for_users=for_users)

    def with_patience(self, patience: float) -> Store:
        """Return a store on the same connections that has another patience."""
        other = copy(self)
        other.patience = patience
        return other

    @property
    def engine(self) -> Engine:
        """The SQLAlchemy engine of this process."""
        return self._pools.engine(alone=False)

    def run(self, statement: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``statement(connection, ...)`` in one transaction; try again after a race or an outage.

        So each statement must be right when it is run twice: its guard refuses the second time, or it finds
        what its first run had committed before the answer was lost.
        """
        return self._run(self._begin, statement, *args, **kwargs)

    def run_alone(self, statement: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a ``statement(connection, ...)`` of one SQL statement, which is a transaction by itself."""
        return self._run(self._connect, statement, *args, **kwargs)

    def _begin(self) -> AbstractContextManager[Connection]:
        return self.engine.begin()

    def _connect(self) -> AbstractContextManager[Connection]:
        return self._pools.engine(alone=True).connect()

    def _run(
        self,
        connect: Callable[[], AbstractContextManager[Connection]],
        statement: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        tries = excesses = 0
        deadline = time.monotonic() + self.patience
        while True:
            try:
                with connect() as conn:
                    return statement(conn, *args, **kwargs)
            except (DBAPIError, PoolTimeoutError) as exc:
                tries += 1
                excesses += exceeds_limit(exc)
                if self._for_users and excesses > MOST_EXCESSES:
                    raise
                self._wait_or_raise(exc, tries, deadline)

    def close(self) -> None:
        """Close the pool's idle connections."""
        self._pools.dispose()

    def disconnect(self) -> None:
        """Close the idle connections; new ones are made when they are needed."""
        self._pools.dispose()

    def check_live(self) -> None:
        """Raise :class:`NotMigratedError` unless the database has the tables that this Byrd works with."""
        found, wanted = self.run(current_revision), head_revision()
        if found is None:
            raise NotMigratedError("Byrd's tables are missing in this database; run `byrd migrate`")
        if found < wanted:
            raise NotMigratedError(
                f"Byrd's tables are at version {found}, this Byrd needs {wanted}; run `byrd migrate`"
            )

    def _wait_or_raise(self, exc: SQLAlchemyError, tries: int, deadline: float) -> None:
        cause = getattr(exc, "orig", None)
        race = is_race(exc)
        if isinstance(cause, _MISSING) and isinstance(exc, ProgrammingError):
            raise NotMigratedError(f"{first_line(exc)}; run `byrd migrate`") from exc
        if not (race or is_outage(exc)):
            raise exc
        if isinstance(cause, pg_errors.ReadOnlySqlTransaction):
            self.disconnect()  # this server has become a standby, perhaps: connect anew to whoever is the primary
        if time.monotonic() > deadline and not (race and tries < _MOST_RACES):
            _unavailable(self.url, exc)
        if not race and (tries == 1 or tries % 20 == 0):
            log.warning("Postgres does not answer (try %d): %s", tries, first_line(exc))
        longest = 0.05 if race else 1.0
        time.sleep(random.uniform(0.01, min(longest, 0.02 * 2 ** min(tries, 8))))  # noqa: S311 - jitter


def is_race(exc: BaseException) -> bool:
    """Tell whether a transaction has lost against another: the same may be right a moment later."""
    return isinstance(getattr(exc, "orig", None), _RACES)


def exceeds_limit(exc: BaseException) -> bool:
    """Tell whether a transaction took, or waited for, more than the database lets it: again it may be luckier."""
    return isinstance(exc, DBAPIError) and getattr(exc.orig, "pgcode", None) in _EXCEEDS


def is_outage(exc: BaseException) -> bool:
    """Tell whether ``exc`` says that Postgres cannot serve for now, rather than that a statement is wrong."""
    if isinstance(exc, PoolTimeoutError):
        return True
    if not isinstance(exc, DBAPIError):
        return False
    if exc.connection_invalidated or isinstance(exc.orig, _OUTAGES):
        return True
    code = getattr(exc.orig, "pgcode", None) or ""
    if code.startswith("53") or code == _CANCELED:
        return True
    # psycopg2 gives a refused or broken connection no SQLSTATE.
    return isinstance(exc, OperationalError) and getattr(exc.orig, "pgcode", None) is None


def _unavailable(url: URL, exc: SQLAlchemyError) -> Never:
    where = f"{url.host or 'localhost'}:{url.port or 5432}"
    raise StoreUnavailableError(f"Postgres at {where} does not answer: {first_line(exc)}") from exc


def first_line(exc: SQLAlchemyError) -> str:
    """Return what the driver said, in one line, without the statement."""
    return (str(getattr(exc, "orig", exc)).strip().splitlines() or [""])[0]
