"""Knows when this process is at a boundary, and kills it at the one that it is told.

A boundary is the moment before or after an SQL statement, a commit, a publish or an acknowledgement.  They are seen
from outside: SQLAlchemy's events, Celery's signals, and kombu's methods, wrapped in a process made for that.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from celery.signals import after_task_publish, before_task_publish
from kombu.message import Message
from kombu.messaging import Producer
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import Pool

#: Threads that look again and again: which of their rounds is which nobody can tell, so each boundary counts once.
_BACKGROUND = {"byrd-keeper": "keeper", "byrd-sweeper": "sweeper"}
_OWN, _LAST, _COMMITTED = "byrd_own", "byrd_last", "byrd_committed"


class Kind(StrEnum):
    """What a boundary is before or after."""

    STATEMENT = "statements"
    COMMIT = "commits"
    PUBLISH = "publishes"
    ACKNOWLEDGEMENT = "acknowledgements"
    #: What :func:`boundary` was put around.
    OWN = "own"


@dataclass(frozen=True, slots=True)
class Orders:
    """What a process is to do at its boundaries.

    ``role``: what it is, "worker" say.  ``record``: the file that gets a line for each boundary reached: its kind, a
    tab, its name.  ``kill_at``: the boundary at which to die.  ``spent``: a file that exists once one process has died,
    so that no second one does.
    """

    role: str
    record: Path
    kill_at: str | None
    spent: Path


class Probe:
    """Names and records the boundaries of this process."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._pid = os.getpid()
        self._reached: Counter[str] = Counter()

    def reach(self, what: str, kind: Kind) -> None:
        """Record a boundary, and die there if this is the one."""
        actor, background = self._actor()
        name = f"{actor}: {what}"
        self._reached[name] += 1
        times = self._reached[name]
        if background and times > 1:
            return
        if times > 1:
            name += f" (no. {times})"
        # Opened anew: a pool that is forked closes descriptors that it takes for its own, and what gets such a number
        # next, a connection to Postgres say, must not get this line.
        with self._orders.record.open("a") as record:
            record.write(f"{kind}\t{name}\n")
        if name == self._orders.kill_at and self._first():
            os.kill(os.getpid(), signal.SIGKILL)

    def _actor(self) -> tuple[str, bool]:
        thread = threading.current_thread()
        if thread.name in _BACKGROUND:
            return f"{self._orders.role}'s {_BACKGROUND[thread.name]}", True
        if os.getpid() != self._pid:
            return f"{self._orders.role}'s pool process", False
        if thread is threading.main_thread():
            return self._orders.role, False
        return f"{self._orders.role}'s thread {re.sub(r'[-_ ]*[0-9]+', '', thread.name)}", False

    def _first(self) -> bool:
        try:
            os.close(os.open(self._orders.spent, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        return True


_probe: Probe | None = None


def reach(what: str, kind: Kind) -> None:
    """Say that this process is at a boundary."""
    if _probe is not None:
        _probe.reach(what, kind)


@contextmanager
def boundary(what: str) -> Iterator[None]:
    """Make the moments before and after a block boundaries, too: for what Byrd does not see, such as a web request.

    Outside of a trial it does nothing.
    """
    reach(f"before {what}", Kind.OWN)
    yield
    reach(f"after {what}", Kind.OWN)


def install(orders: Orders) -> None:
    """Watch this process from now on.  There is no way back: it is a process of its own."""
    global _probe  # noqa: PLW0603 - one process, one probe
    _probe = Probe(orders)
    _watch_sql()
    _watch_broker()


# -- SQL -------------------------------------------------------------------------------------------


def _watch_sql() -> None:
    event.listen(Engine, "before_cursor_execute", _before_statement)
    event.listen(Engine, "after_cursor_execute", _after_statement)
    event.listen(Engine, "commit", _before_commit)
    event.listen(Pool, "reset", _after_transaction)
    event.listen(Pool, "connect", _connected)
    event.listen(Pool, "checkout", _refuse_inherited)


def _before_statement(conn: Connection, _cursor: Any, statement: str, *_: Any) -> None:
    _tell_committed(conn.info)
    reach(f"before {_title(statement)}", Kind.STATEMENT)


def _after_statement(conn: Connection, cursor: Any, statement: str, *_: Any) -> None:
    rows = "" if cursor.rowcount != 0 else ", which found nothing"
    conn.info[_LAST] = f"{_title(statement)}{rows}"
    reach(f"after {conn.info[_LAST]}", Kind.STATEMENT)


def _before_commit(conn: Connection) -> None:
    last = conn.info.get(_LAST, "nothing")
    conn.info[_COMMITTED] = f"the commit of {last}"
    reach(f"before {conn.info[_COMMITTED]}", Kind.COMMIT)


def _after_transaction(_dbapi_connection: Any, record: Any, _state: Any) -> None:
    _tell_committed(record.info)


def _tell_committed(info: dict[Any, Any]) -> None:
    # SQLAlchemy has an event before the commit only; this is the next thing that it does with the connection.
    committed = info.pop(_COMMITTED, None)
    if committed is not None:
        reach(f"after {committed}", Kind.COMMIT)


def _connected(_dbapi_connection: Any, record: Any) -> None:
    record.info[_OWN] = True


def _refuse_inherited(_dbapi_connection: Any, record: Any, proxy: Any) -> None:
    """A connection that was open before the fork is its parent's: two processes cannot talk on one."""
    if _OWN not in record.info:
        record.dbapi_connection = proxy.dbapi_connection = None
        raise DisconnectionError("this connection belongs to the process that forked this one")


def _title(statement: str) -> str:
    """Return a statement's beginning, and what tells it from others that begin alike."""
    text = re.sub(r"\s+", " ", re.sub(r"--[^\n]*|/\*.*?\*/", " ", statement, flags=re.DOTALL)).strip()
    if len(text) <= 72:
        return text
    return f"{text[:66]}… {hashlib.sha256(text.encode()).hexdigest()[:4]}"


# -- the broker ------------------------------------------------------------------------------------


def _watch_broker() -> None:
    before_task_publish.connect(_before_publish)
    after_task_publish.connect(_after_publish)
    _wrap_ack()
    if hasattr(Producer, "batch"):
        _wrap_batch()


def _before_publish(sender: Any = None, **_: Any) -> None:
    reach(f"before the publish of {sender}", Kind.PUBLISH)


def _after_publish(sender: Any = None, **_: Any) -> None:
    reach(f"after the publish of {sender}", Kind.PUBLISH)


def _wrap_ack() -> None:
    ack: Callable[..., Any] = Message.ack

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        what = f"the acknowledgement of {(self.headers or {}).get('task', 'a message')}"
        reach(f"before {what}", Kind.ACKNOWLEDGEMENT)
        done = ack(self, *args, **kwargs)
        reach(f"after {what}", Kind.ACKNOWLEDGEMENT)
        return done

    setattr(Message, "ack", watched)  # noqa: B010 - kombu has no event for it


def _wrap_batch() -> None:
    """Messages of a batch (kombu 5.7) leave together, at its end."""
    batch: Callable[..., Any] = Producer.batch

    @contextmanager
    def watched(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with batch(self, *args, **kwargs) as messages:
            yield messages
            reach("before the flush of a batch of messages", Kind.PUBLISH)
        reach("after the flush of a batch of messages", Kind.PUBLISH)

    setattr(Producer, "batch", watched)  # noqa: B010 - nor for this
