"""Steps that change their plan, killed at every boundary."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain

from tests.crash_points.scenarios import START, Try, slow, value


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=8)
def test_a_retry(app: Any, attempt: Try) -> None:
    attempt(lambda: chain(app.flaky.s(1, 4), app.add.s(1)), check=value(5))


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=8)
def test_replace(app: Any, attempt: Try) -> None:
    attempt(lambda: chain(app.expand.s(1), app.add.s(1)), check=value(13))
