"""How a scenario is tried: each boundary once, with effects in a table of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection

from byrd.store.rows import query
from byrd.testing import CrashPoints, CrashReport
from tests.cluster import Cluster
from tests.crash_points.scenarios import APP, Try


@pytest.fixture
def app(cluster: Cluster) -> Any:
    cluster.rows("CREATE TABLE effects (name text, n int, UNIQUE (name, n))")
    return cluster.app(APP)


@pytest.fixture
def attempt(app: Any, byrd_crash_points: CrashPoints) -> Try:
    """Try each boundary of a canvas, submitted with a new key in each execution."""
    key = [0]

    def reset() -> None:
        key[0] += 1
        app.engine.runtime.store.run(_clear)

    def run(
        canvas: Callable[[], Any], *, before: Callable[[], object] = tuple, least: int = 20, **options: Any
    ) -> CrashReport:
        def prepare() -> None:
            before()
            reset()

        report = byrd_crash_points(
            app.engine, lambda: app.engine.submit(canvas(), key=f"key-{key[0]}"), reset=prepare, **options
        )
        assert report.tried > least / byrd_crash_points.every
        assert len(report.unreached) < len(report.boundaries) / 10, report.unreached
        assert report.pairs_tried >= byrd_crash_points.pairs / 2
        return report

    return run


def _clear(conn: Connection) -> None:
    query(conn, "TRUNCATE effects")
