"""A chain, killed at every boundary, a worker's start and the loss of the broker's messages among them."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain

from tests.cluster import Cluster
from tests.crash_points.scenarios import APP, Try, sees_each_kind, slow, value


@slow
@pytest.mark.byrd_crash_points(pairs=24)
def test_a_chain(app: Any, attempt: Try, cluster: Cluster) -> None:
    def flush() -> None:
        with cluster.redis() as redis:
            redis.flushdb()

    cluster.worker(APP).stop()  # from now on a broker that holds nothing has lost something
    report = attempt(lambda: chain(app.add.s(1, 1), app.add.s(1)), check=value(3), before=flush)
    assert any("INTO byrd.brokers" in name for name in report.boundaries)
    assert report.skipped == 0
    sees_each_kind(report)
