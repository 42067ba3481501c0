"""migrate, workers and relay."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from tests.cli.conftest import APP, Cli, call
from tests.cluster import ROOT, Cluster, wait_until
from tests.servers import Server, execute, url_of

BYRD = [sys.executable, "-c", "from byrd.cli import main; main()"]


@pytest.fixture
def empty_database(postgres_server: Server) -> Iterator[str]:
    execute(postgres_server, "CREATE DATABASE byrd_to_migrate")
    yield url_of(postgres_server, "byrd_to_migrate")
    execute(postgres_server, "DROP DATABASE byrd_to_migrate WITH (FORCE)")


def test_migrate_needs_only_the_url(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, empty_database: str) -> None:
    monkeypatch.setenv("BYRD_DATABASE_URL", empty_database)
    not_yet = call("runs")
    assert (not_yet.status, not_yet.err) == (
        1,
        "Error: Byrd's tables are missing in this database; run `byrd migrate`\n",
    )
    assert call("migrate").out == "Byrd's tables are made, at version 0001.\n"
    assert call("migrate").out == "Byrd's tables are at version 0001 already.\n"
    assert call("migrate", "--json").json == {"version": "0001", "was": "0001"}
    assert call("runs").out == "No runs yet; `byrd submit WORKFLOW` starts one.\n"
    assert call("workers").out == "No workers; `celery -A <app> worker` starts one.\n"


def test_migrate_prints_sql_that_works(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, empty_database: str) -> None:
    sql = call("migrate", "--sql").out
    assert sql.rstrip() == call("migrate", "--sql", "--json").json["sql"].rstrip()
    connection = psycopg2.connect(empty_database)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
    finally:
        connection.close()
    monkeypatch.setenv("BYRD_DATABASE_URL", empty_database)
    assert call("runs", "--json").json == {"runs": []}


def test_migrate_leaves_newer_tables_alone(byrd_cli: Cli, cluster: Cluster) -> None:
    cluster.rows("UPDATE byrd.alembic_version SET version_num = '9999'")
    answer = call("migrate", "--json")
    assert answer.status == 1
    assert "newer than this Byrd's" in answer.json["error"]["message"]


def test_workers_shows_leases(byrd_cli: Cli, cluster: Cluster, tmp_path: Path) -> None:
    shop = cluster.app(APP)
    worker = cluster.worker(APP, pool="solo", queues=["celery", "rare"])
    run = shop.engine.submit(shop.hold.s(str(tmp_path / "go")))
    wait_until(lambda: byrd_cli("workers", "--json").json["workers"][0]["running_steps"])
    [found] = byrd_cli("workers", "--json").json["workers"]
    assert (found["hostname"], found["pid"], found["pool"]) == ("worker1@localhost", worker.pid, "solo")
    assert (found["alive"], found["queues"]) == (True, ["celery", "rare"])
    line = byrd_cli("workers").out.splitlines()[1]
    assert line.startswith("worker1@localhost  ✔ until ")
    assert "celery, rare" in line
    worker.kill()
    wait_until(lambda: "✘ ended" in byrd_cli("workers").out)
    run.cancel()


def test_relay_sends_again_what_was_lost_and_stops_when_told(cluster: Cluster, tmp_path: Path) -> None:
    shop = cluster.app(APP)
    run = shop.engine.submit(shop.price.s(1))
    with cluster.redis() as redis:
        redis.flushdb()
        with (tmp_path / "relay.log").open("wb") as log:
            command = [*BYRD, "-A", APP, "relay", "--json"]
            relay = subprocess.Popen(command, env=cluster.env, cwd=ROOT, stdout=log, stderr=log)
        try:
            wait_until(lambda: redis.llen("celery"), what="a message")
        finally:
            relay.send_signal(signal.SIGTERM)
            status = relay.wait(30)
    assert status == 0
    lines = [json.loads(line) for line in (tmp_path / "relay.log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "stopped"]
    assert shop.engine.get(run.id).steps()[0].sends == 2


def test_help_names_every_command(elsewhere: Path) -> None:
    names = ["cancel", "chaos", "dev", "doctor", "done-by-hand", "limits", "metrics", "migrate", "pause", "relay"]
    names += ["resume", "retry", "rollback", "runs", "show", "signal", "skip", "submit", "waiting", "why", "workers"]
    listed = [line.split()[0] for line in call("--help").out.partition("Commands:\n")[2].splitlines()]
    assert listed == names
    for name in names:
        assert "--json" in call(name, "--help").out
