"""A workflow within another, killed at every boundary of both: it is begun once, its end is told, it is undone once."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain

from tests.crash_points.scenarios import EVERY, START, Try, effects, slow


@slow
@pytest.mark.byrd_crash_points(skip=START, every=EVERY, pairs=6)
def test_a_workflow_within_another(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.get(timeout=0) == (4 if run.workflow == "crash.inner" else 6)

    report = attempt(lambda: chain(app.inner.s(1), app.add.s(2)), check=check)
    assert any("parent_told" in boundary for boundary in report.boundaries)


@slow
@pytest.mark.byrd_crash_points(skip=START, every=5 * EVERY, pairs=4)
def test_a_workflow_within_another_is_undone(app: Any, attempt: Try) -> None:
    """The inner run is rolled back once, before what came before it."""

    def check(run: Any) -> None:
        inner = run.workflow == "crash.stay"
        assert run.status == ("cancelled" if inner else "failed")
        assert effects(app) == [("CAR car", 1), ("HOTEL hotel", 1)]
        assert [step.compensates for step in run.steps() if step.kind == "compensation"] == ([0] if inner else [1, 0])

    report = attempt(lambda: chain(app.reserve.s("hotel"), app.stay.si("car"), app.fail.s()), check=check)
    assert any("SET finished_at = NULL" in boundary for boundary in report.boundaries)
