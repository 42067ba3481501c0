"""A cancellation, by a step and from outside, killed at every boundary."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain

from byrd.testing import CrashPoints
from tests.crash_points.scenarios import START, Try, effects, sees_each_kind, slow


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=8)
def test_cancel(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.status == "cancelled"
        assert effects(app) == [("HOTEL hotel", 1)]

    canvas = lambda: chain(app.reserve.s("hotel"), app.cancel_itself.si(), app.add.si(1, 1))  # noqa: E731
    # Killed within the step that cancels, this step is cancelled with its run, instead of done.
    attempt(canvas, check=check, same=lambda run: str(run.status))


@slow
@pytest.mark.byrd_crash_points(skip=f"{START}|sweeper")
def test_cancel_with_terminate(app: Any, attempt: Try) -> None:
    """Whoever is killed, the run does not wait for the task that does not stop, and the hotel is given back."""

    def check(run: Any) -> None:
        assert run.status == "cancelled"
        assert effects(app) == [("HOTEL hotel", 1)]

    canvas = lambda: chain(app.reserve.s("hotel"), app.cancel_itself_and_stay.si(), app.add.si(1, 1))  # noqa: E731
    attempt(canvas, check=check, same=lambda run: str(run.status))


@slow
@pytest.mark.byrd_crash_points(skip=f"{START}|sweeper")
def test_who_cancels_dies(app: Any, byrd_crash_points: CrashPoints) -> None:
    keys = iter(range(10_000))
    key = [""]

    def submit_and_cancel() -> Any:
        run = app.engine.submit(chain(app.add.s(1, 1), app.add.s(1)), key=key[0])
        if not run.status.final:
            run.cancel()
        return run

    def reset() -> None:
        key[0] = f"key-{next(keys)}"

    report = byrd_crash_points(app.engine, submit_and_cancel, reset=reset, same=lambda run: str(run.status))
    assert any("submitter: before the commit of" in name for name in report.boundaries)
    assert report.tried > 20
    sees_each_kind(report)
