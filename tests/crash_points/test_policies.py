"""Retries by policy, and the ends of attempts and steps that take too long, killed at every boundary."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain

import byrd
from byrd.errors import ScheduleToStartTimeoutError
from tests.crash_points.scenarios import START, Try, slow, value

#: All but what the thread does that records the end of an attempt: a step that sleeps takes its time at each boundary.
BUT_THE_RECORDER = r"^(?!.*byrd-recorder)"


@slow
@pytest.mark.byrd_crash_points(skip=START)
def test_retries_by_a_policy(app: Any, attempt: Try) -> None:
    report = attempt(lambda: chain(app.unlucky.s(2, 1), app.add.s(1)), check=value(2))
    assert any("tried_since" in boundary for boundary in report.boundaries)


@slow
@pytest.mark.byrd_crash_points(skip=START)
def test_a_step_that_nobody_starts(app: Any, attempt: Try) -> None:
    unheard = app.add.s(1).set(queue="nobody", byrd_timeouts=byrd.Timeouts(schedule_to_start=0.2))

    def check(run: Any) -> None:
        with pytest.raises(ScheduleToStartTimeoutError):
            run.get(timeout=0)

    report = attempt(lambda: chain(app.add.s(1, 1), unheard), check=check)
    assert any("ScheduleToStartTimeoutError" in boundary or "timeout_at" in boundary for boundary in report.boundaries)


@slow
@pytest.mark.byrd_crash_points(skip=BUT_THE_RECORDER)
@pytest.mark.parametrize("task", ["takes_long", "hangs"])
def test_an_attempt_that_is_ended(app: Any, attempt: Try, task: str) -> None:
    timeouts = byrd.Timeouts(start_to_close=0.5) if task == "takes_long" else byrd.Timeouts(heartbeat=0.5)
    sig = getattr(app, task).s(1).set(byrd_timeouts=timeouts)
    attempt(lambda: chain(sig, app.add.s(1)), check=value(2))
