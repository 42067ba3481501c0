"""Canvases that join, killed at every boundary."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, chord, group

from tests.crash_points.scenarios import START, Try, slow, value


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=8)
def test_a_chord(app: Any, attempt: Try) -> None:
    report = attempt(lambda: chord([app.add.s(1, 1), app.add.s(2, 2)], app.total.s()), check=value(6))
    assert any("the flush of a batch" in name for name in report.boundaries)


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=6)
def test_nested_canvases(app: Any, attempt: Try) -> None:
    attempt(
        lambda: chain(group(app.add.s(1, 1), chord([app.add.s(1, 2)], app.total.s())), app.total.s()), check=value(5)
    )
