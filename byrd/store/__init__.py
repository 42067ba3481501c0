"""Everything that Byrd knows about Postgres: the tables and every SQL statement, each named for its transition.

A statement is a function that takes a connection, so that what belongs together commits together;
:class:`Store` runs them, each in a transaction of its own, and waits through an outage of Postgres.
"""

from __future__ import annotations

from byrd.store.database import Store
from byrd.store.migrate import current_revision, head_revision, migrate, migration_sql, normalise_url
from byrd.store.rows import Claim, Counts, RunRow, StepRow, Wakeup, WorkerRow

__all__ = [
    "Claim",
    "Counts",
    "RunRow",
    "StepRow",
    "Store",
    "Wakeup",
    "WorkerRow",
    "current_revision",
    "head_revision",
    "migrate",
    "migration_sql",
    "normalise_url",
]
