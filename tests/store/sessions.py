"""Sessions whose transactions stay open, and stop before each statement, until a test lets them go on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError

from byrd.store import Store
from byrd.store.rows import query

Statement = Callable[[Connection], Any]
_LONGEST_SECONDS = 60.0

_here = threading.local()


class Session:
    """One connection, in a thread of its own.

    ``state``: ``idle``; ``running`` (perhaps it waits for another's lock); ``gate`` (before a statement); ``done`` (the
    function has returned ``result``, its transaction is open); ``refused`` (it raised ``error``: rolled back).
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._orders: queue.Queue[Statement | None] = queue.Queue()
        self._permits = threading.Semaphore(0)
        self._changed = threading.Condition()
        self.state = "idle"
        self.gated = False
        self.pid = 0
        self.result: Any = None
        self.error: BaseException | None = None
        self._conn: Connection | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    # -- what a test asks ------------------------------------------------------------------------

    def begin(self, function: Statement, *, op: str, gated: bool) -> None:
        """Start ``function`` in a transaction; ``gated``: it stops before each of its statements."""
        assert self.state == "idle"
        self.result = self.error = None

        def act(conn: Connection) -> None:
            query(conn, "SELECT set_config('test.op', %(op)s, true)", {"op": op})
            self.gated = gated
            try:
                self.result = function(conn)
            finally:
                self.gated = False

        self._order(act, then="done")

    def go_on(self) -> None:
        """Let it execute the statement before which it stands."""
        assert self.state == "gate"
        self._set("running")
        self._permits.release()

    def end(self, *, commit: bool) -> bool:
        """End the transaction; tell whether it is committed."""
        assert self.state == "done"
        self._order(lambda conn: conn.commit() if commit else conn.rollback(), then="idle")
        self._wait(lambda: self.state in ("idle", "refused"))
        committed = commit and self.state == "idle"
        self.state = "idle"
        return committed

    def kill(self, monitor: Connection) -> None:
        """End the server's side of the connection, as a crash does; the thread finds out."""
        self._wait(lambda: self.pid != 0 or self.state == "refused")
        query(monitor, "SELECT pg_terminate_backend(%(pid)s)", {"pid": self.pid})
        if self.state == "gate":
            self.gated = False
            self.go_on()
        if self.state == "done":
            self._order(lambda conn: query(conn, "SELECT 1"), then="done")
        self._wait(lambda: self.state in ("done", "refused"))
        assert self.state == "refused", "a killed session goes on"
        self.state = "idle"

    def settle(self, monitor: Connection) -> None:
        """Wait until it has stopped, or waits for another session."""
        deadline = time.monotonic() + _LONGEST_SECONDS
        while self.state == "running":
            with self._changed:
                self._changed.wait_for(lambda: self.state != "running", timeout=0.004)
            if self.state == "running" and _waits(monitor, self.pid):
                return
            assert time.monotonic() < deadline, "a session neither stops nor waits"

    def close(self) -> None:
        """End the thread."""
        if self.state == "gate":
            self.gated = False
            self.go_on()
        self._orders.put(None)
        self._thread.join(_LONGEST_SECONDS)

    # -- its thread ------------------------------------------------------------------------------

    def _order(self, function: Statement, *, then: str) -> None:
        def act(conn: Connection) -> None:
            function(conn)
            self._set(then)

        self._set("running")
        self._orders.put(act)

    def _work(self) -> None:
        _here.session = self
        while (order := self._orders.get()) is not None:
            if self._conn is None:
                self._conn = self._store.engine.connect()
                self.pid = self._conn.connection.driver_connection.info.backend_pid  # type: ignore[union-attr]
                self._set(self.state)
            try:
                order(self._conn)
            except BaseException as exc:  # noqa: BLE001 - what refuses is the test's to judge
                self.error = exc
                self._roll_back()
                self._set("refused")
        if self._conn is not None:
            self._roll_back()
            if self._conn is not None:
                self._conn.close()

    def _roll_back(self) -> None:
        assert self._conn is not None
        try:
            self._conn.rollback()
            if self._conn.invalidated:
                raise ConnectionError
        except (DBAPIError, ConnectionError):
            self._conn.invalidate()
            self._conn.close()
            self._conn, self.pid = None, 0  # which may soon be another's

    def stand(self) -> None:
        """Called in its thread, before a statement."""
        if self.gated:
            self._set("gate")
            self._permits.acquire()

    def _set(self, state: str) -> None:
        with self._changed:
            self.state = state
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=_LONGEST_SECONDS), f"still {self.state}"


def gates(store: Store) -> Callable[[], None]:
    """Make the sessions of a store stop before their statements; return what undoes it."""

    def stand(*_: Any) -> None:
        session = getattr(_here, "session", None)
        if session is not None:
            session.stand()

    engine = store.engine
    event.listen(engine, "before_cursor_execute", stand)
    return lambda: event.remove(engine, "before_cursor_execute", stand)


@contextmanager
def apart() -> Iterator[None]:
    """Let the session of this thread not stop meanwhile: what it does on another connection is one piece."""
    session: Session = _here.session
    gated, session.gated = session.gated, False
    try:
        yield
    finally:
        session.gated = gated


def _waits(monitor: Connection, pid: int) -> bool:
    """Tell whether a backend waits for a lock that another holds."""
    return bool(query(monitor, "SELECT cardinality(pg_blocking_pids(%(pid)s)) > 0", {"pid": pid}).scalar())
