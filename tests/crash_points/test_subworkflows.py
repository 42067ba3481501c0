"""A workflow within another, killed at every boundary of both: it is begun once, and its step is told of its end."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain

from tests.crash_points.scenarios import EVERY, START, Try, slow


@slow
@pytest.mark.byrd_crash_points(skip=START, every=EVERY)
def test_a_workflow_within_another(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.get(timeout=0) == (4 if run.workflow == "crash.inner" else 6)

    report = attempt(lambda: chain(app.inner.s(1), app.add.s(2)), check=check)
    assert any("parent_told" in boundary for boundary in report.boundaries)
