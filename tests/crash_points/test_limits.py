"""Steps that wait for a limit, killed at every boundary: no place is lost for good, and none is given twice."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, group

from tests.crash_points.scenarios import EVERY, START, Try, slow, value


@slow
@pytest.mark.byrd_crash_points(skip=START, every=EVERY, pairs=6)
def test_limits(app: Any, attempt: Try) -> None:
    def canvas() -> Any:
        """Steps that line up, and one that learns of its key from another's result."""
        known = [app.one_at_a_time.s("a", n) for n in (1, 2)]
        return chain(group(*known, chain(app.last.s("a"), app.one_at_a_time.s(3))), app.total.s())

    report = attempt(canvas, check=value(6))
    for name in ("byrd.admit", "byrd.line_up", "byrd.give_places"):
        assert any(name in boundary for boundary in report.boundaries), name
