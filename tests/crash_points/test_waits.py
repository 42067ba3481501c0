"""Sleeps and waits for signals, killed at every boundary: those of the relay that ends them, and of who signals."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, group

import byrd
from byrd.testing import CrashPoints
from tests.crash_points.scenarios import START, Try, slow, value


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=8)
def test_a_chain_with_a_sleep_and_a_wait(app: Any, attempt: Try) -> None:
    def canvas() -> Any:
        return chain(app.signal_itself.si("go", 2), byrd.wait_for("go"), byrd.sleep(0.05), app.add.s(1))

    report = attempt(canvas, check=value(3))
    assert any("WITH waits AS" in name for name in report.boundaries), report.boundaries


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=8)
def test_a_task_that_waits(app: Any, attempt: Try) -> None:
    def canvas() -> Any:
        return group(app.nap_and_wait.si("go"), chain(byrd.sleep(0.1), app.signal_itself.si("go", 5)))

    attempt(canvas, check=value([5, "sent"]))


@slow
@pytest.mark.byrd_crash_points(skip=f"{START}|sweeper")
def test_who_signals_dies(app: Any, byrd_crash_points: CrashPoints) -> None:
    keys = iter(range(10_000))
    key = [""]

    def submit_and_signal() -> Any:
        run = app.engine.submit(chain(byrd.wait_for("go"), app.add.s(1)), key=key[0])
        if not run.status.final:
            run.signal("go", 5)
        return run

    def reset() -> None:
        key[0] = f"key-{next(keys)}"

    report = byrd_crash_points(app.engine, submit_and_signal, reset=reset, check=value(6))
    assert any("submitter: before the commit of" in name for name in report.boundaries)
    assert report.tried > 20
