"""What the scenarios share: how one is tried, and what is looked at afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection

from byrd.store.rows import query
from byrd.testing import CrashReport

APP = "tests.apps.crash"
#: What has nothing to do with the workflow: what a worker does at its start, and its keeper's rounds, are the same for
#: all.  Only in the chain's test it dies there.
START = r"keeper|alembic|pg_catalog|byrd\.workers SET heartbeat|INTO byrd\.workers|LISTEN|idle_in_transaction"
#: The longer scenarios try each third boundary, unless BYRD_CRASH_EVERY says otherwise: all of them take an hour.
EVERY = int(os.environ.get("BYRD_CRASH_EVERY", "3"))
slow = pytest.mark.timeout(1200)
Try = Callable[..., CrashReport]


def value(wanted: Any) -> Callable[[Any], None]:
    """Check that a run has this value."""

    def check(run: Any) -> None:
        assert run.get(timeout=0) == wanted

    return check


def sees_each_kind(report: CrashReport) -> None:
    """Check that no boundary goes unseen, SQLAlchemy, Celery or kombu having changed, say."""
    assert all(report.kinds[kind] > 0 for kind in ("statements", "commits", "publishes", "acknowledgements"))


def effects(app: Any) -> list[tuple[str, int]]:
    """Return what the tasks have left in the table."""
    found: list[tuple[str, int]] = app.engine.runtime.store.run(_effects)
    return found


def _effects(conn: Connection) -> list[tuple[str, int]]:
    return [tuple(row) for row in query(conn, "SELECT name, n FROM effects ORDER BY name, n")]
