"""A checkpoint task, killed at every boundary: what it commits is there once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.crash_points.scenarios import START, Try, effects, slow


@slow
@pytest.mark.byrd_crash_points(skip=START, pairs=8)
def test_a_checkpoint_task_with_transactions(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.get(timeout=0) == 10
        assert effects(app) == [("count", -1), ("count", 0), ("count", 1), ("count", 2)]

    attempt(lambda: app.count_up.s("count", 3), check=check)
