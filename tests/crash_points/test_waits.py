"""Sleeps and waits for signals, killed at every boundary: those of the relay that ends them, and of who signals."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, group

import byrd
from byrd.testing import CrashPoints
from tests.crash_points.scenarios import START, Try, slow, value


def canvas_of(app: Any) -> Any:
    """A signal that comes while somebody waits for it, and one that is kept."""
    waiting = chain(byrd.wait_for("now"), byrd.sleep(0.05), byrd.wait_for("kept", timeout=60), app.add.s(1))
    sending = chain(app.signal_itself.si("kept", 2), byrd.sleep(0.05), app.signal_itself.si("now", 1))
    return chain(group(waiting, sending, byrd.wait_for("never", timeout=0.05, default=7)), app.last.s())


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=8)
def test_waits(app: Any, attempt: Try) -> None:
    report = attempt(lambda: canvas_of(app), check=value([3, "sent", 7]))
    assert any("UPDATE byrd.signals" in name for name in report.boundaries)


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
