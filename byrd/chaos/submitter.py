"""Submits the load, a bounded number of runs at a time, and remembers what ``submit`` has promised."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from byrd.chaos.tasks import Shape
from byrd.engine import Byrd
from byrd.errors import NotLiveError
from byrd.store.rows import query

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05
_FINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Submission:
    """One call of ``submit``.  ``run_id`` is None where it raised: then only the table knows whether there is a run."""

    key: str
    shape: Shape
    number: int
    at: datetime
    run_id: str | None


class Submitter(threading.Thread):
    """Keeps ``at_most`` runs open until it is told to stop."""

    def __init__(self, engine: Byrd, shapes: Sequence[Shape], *, name: str, at_most: int, seed: int) -> None:
        super().__init__(name="byrd-chaos-load", daemon=True)
        self._engine, self._shapes, self._prefix, self._at_most = engine, list(shapes), name, at_most
        self._random = random.Random(seed)  # noqa: S311 - no secret, and the seed must give the same load again
        self._told = threading.Event()
        self._open: set[str] = set()
        self.submissions: list[Submission] = []
        #: What ended the thread, if it was not told to end.
        self.error: Exception | None = None

    def stop(self) -> None:
        """Submit nothing more."""
        self._told.set()
        self.join()

    def run(self) -> None:
        try:
            while not self._told.is_set():
                self._reap()
                for _ in range(self._at_most - len(self._open)):
                    if self._told.is_set() or not self._submit():
                        break
                self._told.wait(_LOOK_SECONDS)
        except Exception as exc:  # handed to whoever reports
            log.exception("the load ended")
            self.error = exc

    def _submit(self) -> bool:
        number = len(self.submissions)
        shape = (
            self._shapes[number % len(self._shapes)]
            if number < len(self._shapes)
            else self._random.choice(self._shapes)
        )
        key = f"{self._prefix}-{number}"
        run_id = None
        try:
            run_id = self._engine.submit(shape.workflow, number, key=key).id
            self._open.add(run_id)
        except (NotLiveError, DBAPIError) as exc:
            log.info("submit(key=%s) raised, so the table says whether there is a run: %s", key, exc)
        self.submissions.append(Submission(key, shape, number, datetime.now(UTC), run_id))
        return run_id is not None

    def _reap(self) -> None:
        """Forget the runs that have ended."""
        try:
            self._open.difference_update(self._engine.runtime.store.run(_ended, list(self._open)))
        except (NotLiveError, DBAPIError):
            return  # Postgres is away: nothing can be submitted either


def _ended(conn: Connection, run_ids: Sequence[str]) -> list[str]:
    # A run that is not in the table is lost: the audit will say so, and it must not hold up the load.
    rows = query(
        conn,
        """SELECT w.id FROM unnest(%(runs)s::uuid[]) AS w(id) LEFT JOIN byrd.runs r ON r.id = w.id
            WHERE r.id IS NULL OR r.status = ANY(%(final)s)""",
        {"runs": list(run_ids), "final": list(_FINAL)},
    )
    return [str(row.id) for row in rows]
