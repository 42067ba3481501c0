"""Deploys: the tables are migrated while runs are in flight, and workers of two versions of Byrd run side by side.

The newer version is real: a copy of this one with one more migration, or with another version of the messages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import chain, group
from sqlalchemy import make_url

import byrd
from byrd import store
from byrd.engine import Run
from byrd.errors import NotMigratedError
from byrd.model import PROTOCOL_VERSION
from tests.cluster import ROOT, Cluster, wait_until
from tests.invariants import check_database
from tests.reliability.test_messages import only_message, put

APP = "tests.apps.delivery"

_MIGRATION = '''"""What a later version needs.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column and an index, as a compatible change does."""
    op.execute("ALTER TABLE byrd.steps ADD COLUMN colour text")
    op.execute("ALTER TABLE byrd.runs ADD COLUMN colour text DEFAULT 'grey'")
    op.execute("CREATE INDEX runs_colour ON byrd.runs (colour) WHERE finished_at IS NULL")


def downgrade() -> None:
    """Remove them."""
'''


@dataclass(frozen=True)
class Version:
    """A version of Byrd, in a folder of its own."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to import this one rather than the one under test."""
        return {"PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]), "PYTHONSAFEPATH": "1"}

    def run(self, cluster: Cluster, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Python's in this version."""
        return subprocess.run(
            [sys.executable, *command], cwd=self.folder, env={**cluster.env, **self.env}, check=False,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip


def copy_of_byrd(folder: Path) -> Version:
    shutil.copytree(Path(byrd.__file__).parent, folder / "byrd", ignore=shutil.ignore_patterns("__pycache__"))
    return Version(folder)


@pytest.fixture
def newer(tmp_path: Path) -> Version:
    """A version with one more migration."""
    version = copy_of_byrd(tmp_path / "newer")
    versions = version.folder / "byrd" / "store" / "migrations" / "versions"
    (versions / "0002_colour.py").write_text(_MIGRATION)
    return version


@pytest.fixture
def other_messages(tmp_path: Path) -> Version:
    """A version that speaks another version of the messages."""
    version = copy_of_byrd(tmp_path / "other")
    model = version.folder / "byrd" / "model.py"
    text, changed = re.subn(r"(?m)^PROTOCOL_VERSION = (\d+)$", "PROTOCOL_VERSION = 99", model.read_text())
    assert changed == 1
    model.write_text(text)
    return version


def load(app: Any, count: int, notes: Path) -> list[Run]:
    return [
        app.engine.submit(chain(app.note.s(str(notes), n, 0.01), group(app.add.s(1), app.add.s(2)), app.gather.s()))
        for n in range(count)
    ]


def check_load(runs: list[Run]) -> None:
    assert [run.get(timeout=90) for run in runs] == [[n + 1, n + 2] for n in range(len(runs))]


def finished(cluster: Cluster) -> int:
    return int(cluster.rows("SELECT count(*) FROM byrd.runs WHERE finished_at IS NOT NULL")[0][0])


def test_migrating_again_from_many_processes_while_runs_are_in_flight(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    cluster.worker(APP)
    runs = load(app, 80, tmp_path / "notes")
    wait_until(lambda: finished(cluster) > 5)
    command = [sys.executable, "-m", "byrd.cli", "migrate"]
    if not (ROOT / "byrd" / "cli" / "__main__.py").exists():
        command = [sys.executable, "-c", "from byrd.cli import main; main()", "migrate"]
    processes = [subprocess.Popen(command, cwd=ROOT, env=cluster.env) for _ in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    check_load(runs)
    check_database(cluster.database_url)


def test_an_upgrade_while_workers_of_the_old_version_run(cluster: Cluster, tmp_path: Path, newer: Version) -> None:
    """Old workers go on on the new tables, new ones join them, and the old ones leave: nothing is lost or repeated."""
    app, notes = cluster.app(APP), tmp_path / "notes"
    old = cluster.worker(APP, env={"TEST_PREFETCH": ""})
    runs = load(app, 60, notes)
    wait_until(lambda: finished(cluster) > 5)
    done: list[subprocess.CompletedProcess[str]] = []
    threads = [
        threading.Thread(
            target=lambda: done.append(newer.run(cluster, "-c", "from byrd.cli import main; main()", "migrate"))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.returncode for one in done] == [0] * 3, done
    assert cluster.rows("SELECT version_num FROM byrd.alembic_version") == [("0002",)]
    later = load(app, 20, notes)  # submitted by the old version
    cluster.worker(APP, env=newer.env)
    check_load(runs)
    check_load(later)
    assert old.running
    again = cluster.worker(APP)  # an old worker starts on the new tables: a rollback of the deploy
    old.stop()
    check_load(load(app, 10, notes))
    assert again.running
    assert cluster.rows("SELECT max(attempt), sum(preemptions) FROM byrd.steps WHERE task IS NOT NULL") == [(1, 0)]
    found = {run.get(timeout=30) for run in [app.engine.submit(app.where.s()) for _ in range(20)]}
    assert {Path(file).parent.parent for file in found} <= {ROOT, newer.folder}
    check_database(cluster.database_url)


def test_a_newer_byrd_refuses_tables_that_are_not_migrated_yet(cluster: Cluster, newer: Version) -> None:
    """Its workers do not start, its submits write nothing; the old ones are not disturbed."""
    app = cluster.app(APP)
    cluster.worker(APP)
    script = "import tests.apps.delivery as shop; shop.engine.submit(shop.add.s(1))"
    submitted = newer.run(cluster, "-c", script)
    assert "NotMigratedError" in submitted.stderr
    assert "at version 0001, this Byrd needs 0002; run `byrd migrate`" in submitted.stderr
    refused = cluster.worker(APP, env=newer.env, wait=False)
    wait_until(lambda: not refused.running, timeout=60)
    assert refused.exit_status != 0
    assert "this Byrd needs 0002; run `byrd migrate`" in refused.log_text()
    assert app.engine.submit(app.add.s(1)).get(timeout=30) == 2
    assert cluster.rows("SELECT count(*) FROM byrd.runs") == [(1,)]
    assert newer.run(cluster, "-c", "from byrd.cli import main; main()", "migrate").returncode == 0
    refused.restart()
    assert app.engine.submit(app.add.s(2)).get(timeout=30) == 3
    check_database(cluster.database_url)


def test_an_older_byrd_leaves_newer_tables_as_they_are(cluster: Cluster, newer: Version) -> None:
    """`byrd migrate` of an older version says so, and changes nothing."""
    app = cluster.app(APP)
    assert newer.run(cluster, "-c", "from byrd.cli import main; main()", "migrate").returncode == 0
    old = subprocess.run(
        [sys.executable, "-c", "from byrd.cli import main; main()", "migrate"], cwd=ROOT, env=cluster.env, check=False,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = old.stdout + old.stderr
    assert "Traceback" not in said
    assert "0002" in said
    assert cluster.rows("SELECT version_num FROM byrd.alembic_version") == [("0002",)]
    cluster.worker(APP)
    assert app.engine.submit(app.add.s(1)).get(timeout=30) == 2


@pytest.mark.parametrize("newest", [False, True], ids=["of this version", "of the other"])
def test_a_message_is_taken_by_workers_of_its_own_version(
    cluster: Cluster, other_messages: Version, *, newest: bool
) -> None:
    """The relay is kept from sending it again in a worker's own words: there is this one message."""
    app, versions = cluster.app(APP), [Version(ROOT), other_messages]
    sender, stranger = reversed(versions) if newest else versions
    script = "import tests.apps.delivery as shop; shop.engine.submit(shop.where.s())"
    assert sender.run(cluster, "-c", script).returncode == 0
    [run] = app.engine.list()
    with only_message(cluster, run) as message:
        wrong = cluster.worker(APP, env=stranger.env)
        put(cluster, message)
        says, knows = (99, PROTOCOL_VERSION) if newest else (PROTOCOL_VERSION, 99)
        wrong.wait_for_log(f"protocol version {says}, this worker knows {knows}")
        [step] = run.steps()
        assert (step.status, step.attempt) == ("ready", 0)
        wrong.stop()
        cluster.worker(APP, env=sender.env)
        put(cluster, message)
        assert Path(run.get(timeout=30)).parent.parent == sender.folder
    check_database(cluster.database_url)


def test_workers_of_two_versions_of_the_messages(cluster: Cluster, tmp_path: Path, other_messages: Version) -> None:
    """Each has the other's steps sent again, in the words of whoever relays, until one of its own comes."""
    app, notes = cluster.app(APP), tmp_path / "notes"
    stranger = cluster.worker(APP, env=other_messages.env)
    run = app.engine.submit(app.where.s())
    stranger.wait_for_log(f"protocol version {PROTOCOL_VERSION}, this worker knows 99")
    assert Path(run.get(timeout=60)).parent.parent == other_messages.folder  # sent again by the stranger's relay
    cluster.worker(APP)
    check_load(load(app, 20, notes))
    stranger.stop()
    check_load(load(app, 20, notes))
    assert cluster.rows("SELECT max(attempt) FROM byrd.steps WHERE task IS NOT NULL") == [(1,)]
    check_database(cluster.database_url)


def test_a_database_without_tables_is_named(postgres_server: Any, broker_url: str) -> None:
    bare = store.Store(make_url(postgres_server.url).set(database="template1").render_as_string(hide_password=False))
    try:
        with pytest.raises(NotMigratedError, match="run `byrd migrate`"):
            bare.check_live()
    finally:
        bare.close()
