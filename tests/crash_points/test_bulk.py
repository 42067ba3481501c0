"""A bulk job, killed at every boundary: each run is acted on once, and none is left out."""

from __future__ import annotations

from typing import Any

import pytest

from byrd.testing import CrashPoints
from tests.crash_points.scenarios import EVERY, START, slow

#: More than the first batch.
RUNS = 12


@slow
@pytest.mark.byrd_crash_points(skip=START, every=6 * EVERY, pairs=3)
def test_a_bulk_cancel(app: Any, byrd_crash_points: CrashPoints) -> None:
    key = [0]

    def cancel_all() -> Any:
        for number in range(RUNS):
            app.asleep.submit(number, key=f"{key[0]}-{number}")
        return app.engine.bulk("cancel", workflow="crash.asleep", key=f"job-{key[0]}", by="ann")

    def reset() -> None:
        key[0] += 1

    def check(run: Any) -> None:
        events = [event["event"] for event in run.history()]
        if run.workflow == "crash.asleep":
            assert run.status == "cancelled"
            assert events.count("cancel_requested") == 1
        else:
            assert run.get(timeout=0) == {"action": "cancel", "matched": RUNS, "done": RUNS, "skipped": 0}

    report = byrd_crash_points(app.engine, cancel_all, reset=reset, check=check)
    assert report.tried > 20 / byrd_crash_points.every
    assert report.pairs_tried >= byrd_crash_points.pairs / 2
    assert any("before the commit" in name and "worker" in name for name in report.boundaries)
