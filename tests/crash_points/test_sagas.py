"""Sagas, killed at every boundary: each effect is undone once, in a rollback only."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain

from tests.crash_points.scenarios import START, Try, effects, slow


@slow
@pytest.mark.byrd_crash_points(skip=START)
def test_a_saga_that_succeeds(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.get(timeout=0) == "CAR"
        assert effects(app) == []

    attempt(lambda: chain(app.reserve.s("hotel"), app.reserve.si("car")), check=check)


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=24)
def test_a_rollback(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.status == "failed"
        assert effects(app) == [("CAR car", 1), ("HOTEL hotel", 1)]

    attempt(lambda: chain(app.reserve.s("hotel"), app.reserve.si("car"), app.fail.s()), check=check)
