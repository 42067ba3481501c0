"""The plugin, as a stranger uses it: it finds what is not safe, names the boundary, and says how many it tried."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from byrd.testing import CrashPoints
from tests.cluster import Cluster

#: Enough to show how it works: from the claim of the step to its completion.
_ELSEWHERE = r"submitter|keeper|sweeper|alembic|pg_catalog|byrd\.workers"

SHOP = """
    from celery import Celery
    from sqlalchemy import create_engine, text
    import byrd, os

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
    def random():
        return os.urandom(4).hex()
"""
HEAD = """
    import pytest
    from sqlalchemy import text
    from shop import careless, database, engine, random, safe

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
            env={**self.env, "PYTHONPATH": str(self.folder)},
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
    """)
    assert status == 0, printed
    assert "crash points" in printed
    assert "test_shop.py::test_it: " in printed
    assert "boundaries, killed at" in printed


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
    skip = f"{_ELSEWHERE}|UPDATE|SELECT|INSERT"
    test = """
        @pytest.mark.byrd_crash_points(skip=r"{skip}")
        def test_it(byrd_crash_points):
            byrd_crash_points(engine, lambda: random.s(), same={same})
    """
    status, printed = project.run(test.format(skip=skip, same="None"))
    assert status == 1
    assert "the outcome is not that of an execution without a fault" in printed
    status, printed = project.run(test.format(skip=skip, same="lambda run: str(run.status)"))
    assert status == 0, printed


@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_a_run_that_never_ends_is_named_with_its_reason(
    cluster: Cluster, byrd_crash_points: CrashPoints, pool: str
) -> None:
    app: Any = cluster.app("tests.apps.crash")
    byrd_crash_points.timeout, byrd_crash_points.pool = 3.0, pool
    with pytest.raises(AssertionError, match=r"after 3 s still open: (?s:.)* is delayed until"):
        byrd_crash_points(app.engine, lambda: app.engine.submit(app.add.s(1, 1).set(countdown=600)))


def test_it_leaves_no_process_behind(cluster: Cluster, byrd_crash_points: CrashPoints) -> None:
    app: Any = cluster.app("tests.apps.crash")
    byrd_crash_points.skip = "."
    before = set(psutil.Process().children())
    report = byrd_crash_points(app.engine, lambda: app.engine.submit(app.add.s(1, 1)))
    assert report.tried == 0
    assert set(psutil.Process().children()) == before
