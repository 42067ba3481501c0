"""What an operator does with limits: sees who waits, and sets them otherwise than the code declares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from byrd.errors import LimitError, LimitKeyError
from byrd.limits import checked_count, checked_key, checked_name, spacing
from byrd.store import Store, limits
from byrd.store.limits import KEEP, Keep, LimitRow, Place
from byrd.task.limited import limits_of

if TYPE_CHECKING:
    from byrd.engine.engine import Byrd

_LONGEST_SECONDS = 1e8


class Limits:
    """The limits of the cluster: ``engine.limits``.  What is set here holds at once, for all workers."""

    def __init__(self, engine: Byrd) -> None:
        self._engine = engine

    def list(self, name: str | None = None, *, limit: int = 100) -> Sequence[LimitRow]:
        """Return the limits, each with its keys that are in use, those with most waiting first."""
        self._engine.check_live()
        return self._store.run(limits.list_limits, name=name, limit=limit)

    def set(
        self,
        name: str,
        *,
        rate: str | Keep | None = KEEP,
        burst: int | Keep = KEEP,
        concurrency: int | Keep | None = KEEP,
        by: str | None = None,
    ) -> LimitRow:
        """Set a limit otherwise than the code declares it, until it is reset; what is not given stays as it is.

        None takes a limit away; a ``concurrency`` of 0 lets nothing start.  ``by``: who does it, for the others.

        Raises :class:`LimitError` for what cannot be a limit, and :class:`LimitNotFoundError`.
        """
        if isinstance(rate, Keep) and isinstance(burst, Keep) and isinstance(concurrency, Keep):
            raise LimitError("set a rate, a burst or a concurrency")
        if isinstance(rate, str):
            spacing(rate)
        if not isinstance(burst, Keep):
            checked_count(burst, "burst")
        if not isinstance(concurrency, Keep) and concurrency is not None:
            checked_count(concurrency, "concurrency", least=0)
        self._know(name)
        self._store.run(limits.change, name, rate=rate, burst=burst, concurrency=concurrency, by=by)
        return self.list(name, limit=1)[0]

    def reset(self, name: str) -> LimitRow:
        """Let a limit be as the code declares it; raise :class:`LimitNotFoundError` when there is none."""
        self._know(name)
        self._store.run(limits.reset, name)
        return self.list(name, limit=1)[0]

    def park(self, name: str, key: str | int = "", *, seconds: float) -> None:
        """Let no step of a key start for so long; what runs goes on.  A longer pause that there is stays.

        Raises :class:`LimitNotFoundError`, and :class:`LimitKeyError` for what cannot be a key.
        """
        if not 0 <= seconds <= _LONGEST_SECONDS:
            raise LimitError(f"seconds={seconds!r} is no number of seconds")
        self._know(name)
        self._store.run(limits.park, _place(name, key), seconds)

    def unpark(self, name: str, key: str | int = "") -> bool:
        """Let the steps of a key start again; tell whether it was parked."""
        self._know(name)
        return self._store.run(limits.unpark, _place(name, key))

    @property
    def _store(self) -> Store:
        return self._engine.runtime.store

    def _know(self, name: str) -> None:
        """Have the limit on record, if this app declares it: no worker may have been started yet."""
        self._engine.check_live()
        if mine := [found for found in limits_of(self._engine.app) if found.name == checked_name(name)]:
            self._store.run(limits.declare, mine)


def _place(name: str, key: str | int) -> Place:
    found = checked_key(name, key)
    if found is None:
        raise LimitKeyError(f"the limit {name!r} has no key None")
    return Place(name, found)
