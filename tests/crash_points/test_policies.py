"""Retries by policy, and the ends of attempts and steps that take too long, killed at every boundary."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain

import byrd
from byrd.errors import ScheduleToStartTimeoutError
from byrd.store import limits
from byrd.task.limited import limits_of
from tests.crash_points.scenarios import EVERY, START, Try, slow, value

#: All but what the thread does that ends an attempt, or a step: each of these executions takes its time.
BUT_THE_RECORDER = r"^(?!.*recorder)"
BUT_THE_SWEEPER = r"^(?!.*sweeper.*(timeout_at|SET status))"


@slow
@pytest.mark.byrd_crash_points(skip=START, every=EVERY, pairs=6)
def test_retries_by_a_policy(app: Any, attempt: Try) -> None:
    attempt(lambda: chain(app.unlucky.s(2, 1), app.add.s(1)), check=value(2))


@slow
@pytest.mark.byrd_crash_points(skip=BUT_THE_SWEEPER)
def test_a_step_that_nobody_starts(app: Any, attempt: Try) -> None:
    """For its limit lets nothing start."""
    app.engine.runtime.store.run(limits.declare, limits_of(app.app))
    app.engine.limits.set("one", concurrency=0)
    unheard = app.one_at_a_time.si("a", 1).set(byrd_timeouts=byrd.Timeouts(schedule_to_start=0.2))

    def check(run: Any) -> None:
        with pytest.raises(ScheduleToStartTimeoutError):
            run.get(timeout=0)

    report = attempt(lambda: chain(app.add.s(1, 1), unheard), check=check, least=8)
    assert any("timeout_at" in boundary for boundary in report.boundaries)


@slow
@pytest.mark.byrd_crash_points(skip=BUT_THE_RECORDER)
@pytest.mark.parametrize("which", ["start_to_close", "heartbeat"])
def test_an_attempt_that_is_ended(app: Any, attempt: Try, which: str) -> None:
    sig = app.takes_long.s(1).set(byrd_timeouts=byrd.Timeouts(**{which: 0.5}))
    attempt(lambda: chain(sig, app.add.s(1)), check=value(2), least=8)
