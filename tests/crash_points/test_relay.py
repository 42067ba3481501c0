"""A message that is lost: the relay that makes it good dies at every boundary of its own, and another takes over."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from celery import chain

from byrd.engine import Run
from byrd.testing import CrashPoints
from tests.cluster import Cluster
from tests.crash_points.scenarios import slow, value

#: What a relay takes, looks at and publishes; and so all else, which is left out.
_RELAY = r"(the (commit of )?)?(publish|flush|WITH (RECURSIVE|due|late|oldest)|SELECT id, attempt)"
OTHERS = rf"^(?!worker's sweeper: (before|after) {_RELAY})"


@slow
@pytest.mark.parametrize("kind", ["it is needed", "others may take it"])
@pytest.mark.byrd_crash_points(skip=OTHERS)
def test_a_message_that_is_lost(app: Any, byrd_crash_points: CrashPoints, cluster: Cluster, kind: str) -> None:
    keys = itertools.count()
    key = [""]

    def reset() -> None:
        key[0] = f"key-{next(keys)}"

    def scenario() -> Run:
        """Submit, and have the message lost, for so long that the relay looks at once."""
        first = app.add.s(1, 1)
        if kind == "it is needed":
            first.set(time_limit=600)
        run: Run = app.engine.submit(chain(first, app.add.s(1)), key=key[0])
        with cluster.redis() as redis:
            redis.delete("celery")
        cluster.rows("UPDATE byrd.steps SET wake_at = now() WHERE status = 'ready'")
        return run

    report = byrd_crash_points(app.engine, scenario, reset=reset, check=value(3))
    took = "WITH late AS" if kind == "it is needed" else "WITH oldest AS"
    tried = [name for name in report.boundaries if name.startswith("worker's sweeper: ")]
    for what in (f"before {took}", f"after the commit of {took}", "before the publish of", "after the publish of"):
        assert any(name.startswith(f"worker's sweeper: {what}") for name in tried), f"{what}: {tried}"
    assert report.tried > 10
