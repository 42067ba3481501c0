"""A chain in a pool of processes, each of which is killed at its boundaries."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain

from tests.crash_points.scenarios import START, Try, sees_each_kind, slow, value


@slow
@pytest.mark.byrd_crash_points(pool="prefork", skip=START, pairs=6)
def test_a_chain_in_pool_processes(app: Any, attempt: Try) -> None:
    report = attempt(lambda: chain(app.add.s(1, 1), app.add.s(1)), check=value(3))
    assert any("pool process" in name for name in report.boundaries)
    sees_each_kind(report)
