"""The plugin, as a stranger uses it: it finds what is not safe, names the boundary, and says how many it tried."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from byrd.testing import CrashPoints, crash
from byrd.testing.probe import Orders
from byrd.testing.process import Forked, run_worker
from tests.cluster import Cluster

#: Enough to show how it works: from the claim of the step to its completion.
_ELSEWHERE = r"submitter|keeper|sweeper|alembic|pg_catalog|byrd\.workers"
#: All but one.
_MOST = r"^(?!submitter: before the publish)"

SHOP = """
    from celery import Celery
    from sqlalchemy import create_engine, text
    import byrd, os
    from byrd.testing import boundary

    app = Celery("shop")
    engine = byrd.Byrd(app)
    database = create_engine(engine.runtime.store.url)

    @app.task
    def safe(n):
        return n + 1

    @app.task
    def careless(n):
        with database.begin() as conn:
            conn.execute(text("INSERT INTO parcels VALUES (:n)"), {"n": n})
        return n

    @app.task
    def count():
        with database.begin() as conn:
            conn.execute(text("INSERT INTO parcels VALUES (1)"))
        with boundary("the count"):
            with database.begin() as conn:
                return conn.execute(text("SELECT count(*) FROM parcels")).scalar()

    @app.task
    def random():
        return os.urandom(4).hex()
"""
HEAD = """
    import pytest
    from sqlalchemy import text
    from shop import careless, count, database, engine, random, safe

    def empty():
        with database.begin() as conn:
            conn.execute(text("DELETE FROM parcels"))

    def one_parcel(run):
        with database.begin() as conn:
            assert conn.execute(text("SELECT count(*) FROM parcels")).scalar() == 1, "shipped twice"
"""


class Project:
    """A stranger's folder."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.env = folder, cluster.env
        (folder / "shop.py").write_text(textwrap.dedent(SHOP))

    def run(self, test: str, *options: str) -> tuple[int, str]:
        """Run one test; return the exit status and what was printed."""
        (self.folder / "test_shop.py").write_text(textwrap.dedent(HEAD) + textwrap.dedent(test))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:celery", "-q", *options],
            cwd=self.folder,
            env={**self.env, "PYTHONPATH": os.pathsep.join([str(self.folder), self.env["PYTHONPATH"]])},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path) -> Project:
    cluster.rows("CREATE TABLE parcels (n int)")
    return Project(tmp_path, cluster)


def test_the_marker_takes_a_test_as_a_scenario(project: Project) -> None:
    status, printed = project.run(f"""
        @pytest.fixture
        def number():
            return 1

        @pytest.mark.byrd_crash_points(engine, skip=r"{_ELSEWHERE}")
        def test_it(number):
            return safe.s(number)

        @pytest.fixture
        def byrd_engine():
            return engine

        @pytest.mark.byrd_crash_points(skip=r"{_MOST}")
        def test_own_engine():
            return safe.s(1)
    """)
    assert status == 0, printed
    assert "crash points" in printed
    assert re.search(
        r"test_shop.py::test_it: \d+ boundaries \(\d+ statements, \d+ commits, \d+ publishes, \d+ acknowledgements\), "
        r"killed at \d+, \d+ left out; \d+ s\n",
        printed,
    )
    assert re.search(r"test_own_engine: .*, killed at 1,", printed)


def test_a_test_that_kills_nothing_fails(project: Project) -> None:
    status, printed = project.run("""
        import unittest

        @pytest.mark.byrd_crash_points
        def test_no_call(byrd_crash_points):
            pass

        @pytest.mark.byrd_crash_points(engine)
        def test_no_run():
            pass

        @pytest.mark.byrd_crash_points(engine, skip=".")
        def test_all_left_out():
            return safe.s(1)

        class TestMethod(unittest.TestCase):
            @pytest.mark.byrd_crash_points(engine)
            def test_it(self):
                pass

        @pytest.mark.byrd_crash_points(engine)
        def test_skipped(byrd_crash_points):
            pytest.skip("it is allowed to be")

        @pytest.mark.byrd_crash_points
        def test_no_engine():
            return safe.s(1)

        def test_not_marked(byrd_crash_points):
            pass
    """)
    assert status == 1
    assert "5 failed, 1 passed, 1 skipped" in printed
    assert printed.count("it is marked with byrd_crash_points, but nothing was killed") >= 2
    assert "no engine: say byrd_crash_points(engine), or define a fixture byrd_engine" in printed
    assert "the scenario left no run in the database" in printed
    assert "skip='.' leaves out every boundary; there are:\nE" in printed


def test_an_effect_that_is_repeated_is_found(project: Project) -> None:
    status, printed = project.run(f"""
        @pytest.mark.byrd_crash_points(skip=r"{_ELSEWHERE}")
        def test_it(byrd_crash_points):
            byrd_crash_points(engine, lambda: careless.s(1), reset=empty, check=one_parcel)
    """)
    assert status == 1, printed
    assert "killed at 'worker: after the commit of INSERT INTO parcels VALUES" in printed
    assert "shipped twice" in printed
    assert "--byrd-crash-point=" in printed


def test_one_boundary_alone(project: Project) -> None:
    test = """
        @pytest.mark.byrd_crash_points
        def test_it(byrd_crash_points):
            byrd_crash_points(engine, lambda: careless.s(1), reset=empty, check=one_parcel)
    """
    status, printed = project.run(test, "--byrd-crash-point=worker: before INSERT INTO parcels VALUES (%(n)s)")
    assert status == 0, printed
    assert "killed at 1," in printed
    status, printed = project.run(test, "--byrd-crash-point=nowhere")
    assert status == 1
    assert "there is no boundary 'nowhere'" in printed


def test_another_outcome_is_found_unless_it_may_differ(project: Project) -> None:
    status, printed = project.run("""
        only = pytest.mark.byrd_crash_points(skip=r"^(?!.*before the count)")

        @only
        def test_value(byrd_crash_points):
            byrd_crash_points(engine, lambda: count.s(), reset=empty)

        @only
        def test_status(byrd_crash_points):
            byrd_crash_points(engine, lambda: count.s(), reset=empty, same=lambda run: str(run.status))

        @only
        def test_random(byrd_crash_points):
            byrd_crash_points(engine, lambda: random.s())
    """)
    assert status == 1
    assert "2 failed, 1 passed" in printed
    assert "killed at 'worker: before the count': the outcome is not that of an execution without a fault" in printed
    assert re.search(r"test_status: .* acknowledgements, 2 of your own\), killed at 1,", printed)
    assert "two executions without a fault came to different ends; same= can say" in printed


@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_a_run_that_never_ends_is_named_with_its_reason(
    cluster: Cluster, byrd_crash_points: CrashPoints, pool: str
) -> None:
    app: Any = cluster.app("tests.apps.crash")
    byrd_crash_points.timeout, byrd_crash_points.pool = 3.0, pool
    with pytest.raises(AssertionError, match=r"after 3 s still open: (?s:.)* is delayed until"):
        byrd_crash_points(app.engine, lambda: app.engine.submit(app.add.s(1, 1).set(countdown=600)))


def test_a_process_can_be_ended_before_it_has_done_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a worker may not have come to its first line when its trial is over."""
    begin = os.setsid

    def begin_late() -> None:
        time.sleep(10)
        begin()

    monkeypatch.setattr(os, "setsid", begin_late)
    orders = Orders("worker", tmp_path / "record", None, tmp_path / "spent")
    process = Forked(lambda: time.sleep(60), orders=orders, log=tmp_path / "log")
    started = time.monotonic()
    process.end()
    assert process.killed
    assert time.monotonic() - started < 8
    assert not orders.record.exists()


def test_it_leaves_no_process_behind(cluster: Cluster, byrd_crash_points: CrashPoints) -> None:
    app: Any = cluster.app("tests.apps.crash")
    byrd_crash_points.skip = _MOST
    before = set(psutil.Process().children())
    report = byrd_crash_points(app.engine, lambda: app.engine.submit(app.add.s(1, 1)))
    assert report.tried == 1
    assert set(psutil.Process().children()) == before


def test_a_worker_that_is_slow_to_start_is_waited_for(
    cluster: Cluster, byrd_crash_points: CrashPoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its run has ended before: the boundaries of what it does with the run's message count."""
    app: Any = cluster.app("tests.apps.crash")

    def run_late(*args: Any, **options: Any) -> None:
        time.sleep(1)
        run_worker(*args, **options)

    def submit_and_cancel() -> Any:
        run = app.engine.submit(app.add.s(1, 1))
        run.cancel()
        return run

    monkeypatch.setattr(crash, "run_worker", run_late)
    byrd_crash_points.only = "submitter: before SELECT to_regclass('byrd.alembic_version')"
    report = byrd_crash_points(app.engine, submit_and_cancel)
    assert report.kinds["acknowledgements"] == 2


def test_connections_that_the_test_has_used_before_do_no_harm(cluster: Cluster, byrd_crash_points: CrashPoints) -> None:
    """After a fork, kombu would wait for an answer on a channel that has been listened on."""
    app: Any = cluster.app("tests.apps.crash")
    assert app.app.control.inspect(timeout=0.2).ping() is None
    byrd_crash_points.only = "submitter: before SELECT to_regclass('byrd.alembic_version')"
    byrd_crash_points.timeout = 20
    report = byrd_crash_points(app.engine, lambda: app.engine.submit(app.add.s(1, 1)))
    assert report.tried == 1
    assert report.seconds < 20  # five for each process that waits
