"""Every boundary of every kind of workflow: killed there, the run comes to the same end.

What a worker does at its start, and its keeper's rounds, are the same for all: only in the chain's test it dies there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy import Connection

from byrd.store.rows import query
from byrd.testing import CrashPoints, CrashReport
from tests.cluster import Cluster

APP = "tests.apps.crash"
#: What has nothing to do with the workflow.
_START = r"keeper|alembic|pg_catalog|byrd\.workers SET heartbeat|INTO byrd\.workers|LISTEN|idle_in_transaction"
slow = pytest.mark.timeout(1200)
Try = Callable[..., CrashReport]


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

    def run(canvas: Callable[[], Any], *, before: Callable[[], object] = tuple, **options: Any) -> CrashReport:
        def prepare() -> None:
            before()
            reset()

        report = byrd_crash_points(
            app.engine, lambda: app.engine.submit(canvas(), key=f"key-{key[0]}"), reset=prepare, **options
        )
        assert report.tried > 20
        assert len(report.unreached) < len(report.boundaries) / 10, report.unreached
        assert report.pairs_tried >= byrd_crash_points.pairs / 2
        return report

    return run


def _clear(conn: Connection) -> None:
    query(conn, "TRUNCATE effects")


def value(wanted: Any) -> Callable[[Any], None]:
    """Check that a run has this value."""

    def check(run: Any) -> None:
        assert run.get(timeout=0) == wanted

    return check


def sees_each_kind(report: CrashReport) -> None:
    """Check that no boundary goes unseen, SQLAlchemy, Celery or kombu having changed, say."""
    assert all(report.kinds[kind] > 0 for kind in ("statements", "commits", "publishes", "acknowledgements"))


def effects(app: Any) -> list[tuple[str, int]]:
    """Return what the tasks have left in the table."""
    found: list[tuple[str, int]] = app.engine.runtime.store.run(_effects)
    return found


def _effects(conn: Connection) -> list[tuple[str, int]]:
    return [tuple(row) for row in query(conn, "SELECT name, n FROM effects ORDER BY name, n")]


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


@slow
@pytest.mark.byrd_crash_points(pool="prefork", skip=_START)
def test_a_chain_in_pool_processes(app: Any, attempt: Try) -> None:
    report = attempt(lambda: chain(app.add.s(1, 1), app.add.s(1)), check=value(3))
    assert any("pool process" in name for name in report.boundaries)
    sees_each_kind(report)


@slow
@pytest.mark.byrd_crash_points(skip=_START, pairs=8)
def test_a_chord(app: Any, attempt: Try) -> None:
    report = attempt(lambda: chord([app.add.s(1, 1), app.add.s(2, 2)], app.total.s()), check=value(6))
    assert any("the flush of a batch" in name for name in report.boundaries)


@slow
@pytest.mark.byrd_crash_points(skip=_START)
def test_nested_canvases(app: Any, attempt: Try) -> None:
    attempt(
        lambda: chain(group(app.add.s(1, 1), chord([app.add.s(1, 2)], app.total.s())), app.total.s()), check=value(5)
    )


@slow
@pytest.mark.byrd_crash_points(skip=_START, pairs=8)
def test_a_retry(app: Any, attempt: Try) -> None:
    attempt(lambda: chain(app.flaky.s(1, 4), app.add.s(1)), check=value(5))


@slow
@pytest.mark.byrd_crash_points(skip=_START, pairs=8)
def test_replace(app: Any, attempt: Try) -> None:
    attempt(lambda: chain(app.expand.s(1), app.add.s(1)), check=value(13))


@slow
@pytest.mark.byrd_crash_points(skip=_START, pairs=8)
def test_a_checkpoint_task_with_transactions(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.get(timeout=0) == 10
        assert effects(app) == [("count", -1), ("count", 0), ("count", 1), ("count", 2)]

    attempt(lambda: app.count_up.s("count", 3), check=check)


@slow
@pytest.mark.byrd_crash_points(skip=_START)
def test_a_saga_that_succeeds(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.get(timeout=0) == "CAR"
        assert effects(app) == []

    attempt(lambda: chain(app.reserve.s("hotel"), app.reserve.si("car")), check=check)


@slow
@pytest.mark.byrd_crash_points(skip=_START, pairs=24)
def test_a_rollback(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.status == "failed"
        assert effects(app) == [("CAR car", 1), ("HOTEL hotel", 1)]

    attempt(lambda: chain(app.reserve.s("hotel"), app.reserve.si("car"), app.fail.s()), check=check)


@slow
@pytest.mark.byrd_crash_points(skip=_START, pairs=8)
def test_cancel(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.status == "cancelled"
        assert effects(app) == [("HOTEL hotel", 1)]

    canvas = lambda: chain(app.reserve.s("hotel"), app.cancel_itself.si(), app.add.si(1, 1))  # noqa: E731
    # Killed within the step that cancels, this step is cancelled with its run, instead of done.
    attempt(canvas, check=check, same=lambda run: str(run.status))


@slow
@pytest.mark.byrd_crash_points(skip=f"{_START}|sweeper")
def test_who_cancels_dies(app: Any, byrd_crash_points: CrashPoints) -> None:
    keys = iter(range(10_000))
    key = [""]

    def submit_and_cancel() -> Any:
        run = app.engine.submit(chain(app.add.s(1, 1), app.add.s(1)), key=key[0])
        if not run.status.final:
            run.cancel()
        return run

    def reset() -> None:
        key[0] = f"key-{next(keys)}"

    report = byrd_crash_points(app.engine, submit_and_cancel, reset=reset, same=lambda run: str(run.status))
    assert any("submitter: before the commit of" in name for name in report.boundaries)
    assert report.tried > 20
