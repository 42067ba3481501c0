"""An each, killed at every boundary: each item once, none lost, and the one that fails counted once."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain

import byrd
from tests.crash_points.scenarios import EVERY, START, Try, slow, value


@slow
@pytest.mark.byrd_crash_points(skip=START, every=2 * EVERY, pairs=6)
def test_a_task_for_each_item(app: Any, attempt: Try) -> None:
    # With a priority each item has a message of its own: a kill costs one attempt, not all that a slice has claimed.
    item = app.odd_only.s().set(priority=3)
    each = byrd.each(item, over=app.two_at_a_time.s(), limit=2, tolerate=1)
    report = attempt(lambda: chain(each, app.last.s()), check=value([1, 3, None, 5]))
    assert any("byrd.checkpoints" in boundary for boundary in report.boundaries)
