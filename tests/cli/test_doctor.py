"""`byrd doctor` on set-ups that are really broken, one by one."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
import redis
from sqlalchemy import make_url

from byrd import embedded
from tests.cli.conftest import APP, Answer, Cli, call
from tests.cluster import ROOT, Cluster, wait_until
from tests.servers import Server, execute, url_of

#: Seconds, where no worker has to answer.
QUICK = 0.1
NOWHERE = "127.0.0.1:9"  # the discard port: nobody listens there


def found(answer: Answer, name: str) -> list[tuple[str, str, str]]:
    """Level, finding and advice of each check of that name."""
    return [(c["level"], c["what"], c["do"] or "") for c in answer.json["checks"] if c["name"] == name]


@pytest.fixture
def doctor(byrd_cli: Cli) -> Callable[..., Answer]:
    """Ask the doctor about the test's own database and broker."""

    def ask(*, timeout: float = 2.0) -> Answer:
        return byrd_cli("doctor", "--json", "--timeout", str(timeout))

    return ask


@pytest.fixture
def on_servers(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Ask the doctor without an app."""

    def ask(*, database_url: str, broker_url: str) -> Answer:
        monkeypatch.setenv("BYRD_DATABASE_URL", database_url)
        monkeypatch.setenv("BYRD_BROKER_URL", broker_url)
        return call("doctor", "--json", "--timeout", str(QUICK))

    return ask


# -- a set-up that works ---------------------------------------------------------------------------


def test_a_set_up_that_works(cluster: Cluster, doctor: Callable[..., Answer], byrd_cli: Cli) -> None:
    cluster.worker(APP)
    answer = doctor()
    assert (answer.status, answer.json["problems"]) == (0, 0)
    assert found(answer, "workers") == [("ok", "1 worker with Byrd: worker1@localhost", "")]
    assert found(answer, "queues") == [("ok", "no step waits for a worker", "")]
    for name in ("app", "settings", "tables", "eviction", "persistence", "clocks", "results"):
        assert [level for level, _, _ in found(answer, name)] == ["ok"], name
    if "BYRD_DATABASE_URL" not in os.environ:
        # The tests' own Postgres may lose its data, and the doctor sees it.
        assert found(answer, "database")[0][:2] == ("warning", f"Postgres at {place(cluster)} runs with fsync = off")
    printed = byrd_cli("doctor")
    assert printed.status == 0
    assert "✔ workers     1 worker with Byrd: worker1@localhost" in printed.out
    assert cluster.database_url.partition("@")[0].rpartition(":")[2] not in printed.out


def place(cluster: Cluster) -> str:
    url = make_url(cluster.database_url)
    return f"{url.host}:{url.port}/{url.database}"


# -- Postgres --------------------------------------------------------------------------------------


def test_postgres_that_does_not_answer(on_servers: Callable[..., Answer], broker_url: str) -> None:
    answer = on_servers(database_url=f"postgresql://me:secret@{NOWHERE}/x", broker_url=broker_url)
    assert answer.status == 1
    [(level, what, do)] = found(answer, "database")
    assert level == "problem"
    assert what.startswith(f"Postgres at {NOWHERE} does not answer")
    assert "start Postgres" in do
    assert "secret" not in answer.out
    assert found(answer, "broker")[0][0] == "ok"


@pytest.fixture
def empty_database(postgres_server: Server) -> Iterator[str]:
    name = f"byrd_empty_{secrets.token_hex(4)}"
    execute(postgres_server, "CREATE DATABASE {}", name)
    yield url_of(postgres_server, name)
    execute(postgres_server, "DROP DATABASE {} WITH (FORCE)", name)


def test_tables_that_are_missing(on_servers: Callable[..., Answer], empty_database: str, broker_url: str) -> None:
    answer = on_servers(database_url=empty_database, broker_url=broker_url)
    assert answer.status == 1
    assert found(answer, "tables") == [("problem", "Byrd's tables are missing in this database", "run `byrd migrate`")]


def test_tables_of_another_version(doctor: Callable[..., Answer], cluster: Cluster) -> None:
    cluster.rows("UPDATE byrd.alembic_version SET version_num = '0000'")
    answer = doctor(timeout=QUICK)
    assert answer.status == 1
    [(level, what, do)] = found(answer, "tables")
    assert (level, do) == ("problem", "run `byrd migrate`")
    assert what.startswith("Byrd's tables are at version 0000, not ")
    cluster.rows("UPDATE byrd.alembic_version SET version_num = '9999'")
    assert found(doctor(timeout=QUICK), "tables")[0][0] == "warning"


def test_commits_that_may_be_lost_and_a_clock_that_is_wrong(doctor: Callable[..., Answer], cluster: Cluster) -> None:
    name = make_url(cluster.database_url).database
    cluster.rows(f"ALTER DATABASE {name} SET synchronous_commit = off")
    assert any("synchronous_commit = off" in what for _, what, _ in found(doctor(timeout=QUICK), "database"))
    # A clock of the database's own, an hour ahead: every session looks there first.
    cluster.rows("CREATE SCHEMA wrong")
    cluster.rows(
        "CREATE FUNCTION wrong.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS "
        "$$ SELECT pg_catalog.clock_timestamp() + interval '1 hour' $$"
    )
    cluster.rows(f"ALTER DATABASE {name} SET search_path = wrong, pg_catalog, public")
    answer = doctor(timeout=QUICK)
    assert answer.status == 1
    assert [c[:2] for c in found(answer, "clocks")] == [
        ("problem", "the clock of Postgres is 1 h ahead of this machine's")
    ]


# -- the broker ------------------------------------------------------------------------------------


def test_a_broker_that_does_not_answer(on_servers: Callable[..., Answer], database_url: str) -> None:
    answer = on_servers(database_url=database_url, broker_url=f"redis://:secret@{NOWHERE}/0")
    assert answer.status == 1
    [(level, what, do)] = found(answer, "broker")
    assert level == "problem"
    assert f"{NOWHERE}/0 does not answer" in what
    assert "BYRD_BROKER_URL" in do
    assert "secret" not in answer.out


def test_a_redis_that_evicts_or_forgets(
    on_servers: Callable[..., Answer], database_url: str, own_broker: embedded.EmbeddedValkey
) -> None:
    def ask() -> Answer:
        return on_servers(database_url=database_url, broker_url=own_broker.url)

    with redis.Redis.from_url(own_broker.url) as client:
        client.config_set("maxmemory", "64mb")
        assert found(ask(), "eviction")[0][0] == "ok"
        client.config_set("maxmemory-policy", "allkeys-lru")
        answer = ask()
        assert answer.status == 1
        [(level, what, do)] = found(answer, "eviction")
        assert (level, what) == (
            "problem",
            "Redis may evict messages: maxmemory 64 MB with maxmemory-policy allkeys-lru",
        )
        assert do.startswith("set maxmemory-policy to noeviction")
        client.config_set("maxmemory", "0")
        assert found(ask(), "eviction")[0][0] == "ok"
        client.config_set("appendonly", "no")
        assert found(ask(), "persistence")[0][:2] == ("ok", "Redis keeps nothing on disk")
        client.config_set("save", "3600 1")
        assert found(ask(), "persistence")[0][1] == "Redis only saves snapshots now and then"
        client.replicaof(*NOWHERE.split(":"))
        answer = ask()
        assert answer.status == 1
        assert found(answer, "broker")[0][1].endswith("is a replica")


# -- workers ---------------------------------------------------------------------------------------


def test_nobody_works(doctor: Callable[..., Answer], cluster: Cluster) -> None:
    assert found(doctor(timeout=QUICK), "workers") == [
        ("warning", "no worker is alive", "start one: `celery -A <app> worker`")
    ]
    shop = cluster.app(APP)
    shop.engine.submit(shop.order(3))
    answer = doctor(timeout=QUICK)
    assert answer.status == 1
    assert found(answer, "workers")[0][:2] == ("problem", "no worker is alive, and 3 steps wait")


def test_workers_without_byrd_or_on_another_broker(
    doctor: Callable[..., Answer], cluster: Cluster, broker_server: Server, redis_databases: Iterator[int]
) -> None:
    plain = cluster.worker("tests.cli.plain", name="plain", pool="solo", wait=False)
    other = f"{broker_server.url.rpartition('/')[0]}/{next(redis_databases)}"
    cluster.worker(APP, name="lonely", pool="solo", env={"BYRD_BROKER_URL": other})
    plain.wait_for_log(r" ready\.")
    answer = doctor()
    assert answer.status == 1
    assert [c[:2] for c in found(answer, "workers")] == [
        (
            "problem",
            "worker plain@localhost takes messages from queue celery and has no Byrd, or another database",
        ),
        ("warning", "worker lonely@localhost holds a lease, but does not answer on this broker"),
    ]


def test_steps_that_no_worker_takes_and_steps_of_a_lost_worker(
    doctor: Callable[..., Answer], cluster: Cluster, tmp_path: Path
) -> None:
    shop = cluster.app(APP)
    worker = cluster.worker(APP, pool="solo")
    shop.engine.submit(shop.price.s(1).set(queue="rare"))

    @shop.app.task(name="shop.new", shared=False)
    def new(value: str) -> str:
        return value

    shop.engine.submit(new.s("x"))
    shop.engine.submit("shop.trip", str(tmp_path / "never")).wait(timeout=30)
    answer = doctor()
    assert answer.status == 1
    assert [c[1] for c in found(answer, "queues")] == [
        "1 step waits in queue 'rare', which no live worker consumes",
        "1 step waits for a worker on queue 'celery' that has the task shop.new registered",
    ]
    assert found(answer, "rollbacks")[0][1].startswith("1 rollback stuck: ")

    held = shop.engine.submit(shop.hold.s(str(tmp_path / "go")))
    wait_until(lambda: [step for step in held.steps() if step.status == "running"])
    worker.kill()
    wait_until(
        lambda: [
            c
            for c in found(doctor(timeout=QUICK), "workers")
            if c[1].startswith("1 step is held by workers whose lease is")
        ]
    )


# -- settings --------------------------------------------------------------------------------------


def test_settings_that_lose_work_are_refused_with_the_app(byrd_cli: Cli, cluster: Cluster, elsewhere: Path) -> None:
    module = "import byrd\nfrom celery import Celery\napp = Celery('bad')\napp.conf.task_serializer = 'pickle'\n"
    (elsewhere / "unsafe_shop.py").write_text(f"{module}byrd.Byrd(app)\n")
    answer = call("-A", "unsafe_shop", "doctor", "--json")
    assert answer.status == 1
    assert found(answer, "app")[0][1].startswith("task_serializer = 'pickle' is not safe with Byrd")
    assert found(answer, "tables")[0][0] == "ok"
    printed = call("-A", "unsafe_shop", "doctor")
    assert printed.status == 1
    assert "✘ app" in printed.out
    assert "1 problem" in printed.out


def test_settings_that_are_not_wise(doctor: Callable[..., Answer], cluster: Cluster) -> None:
    conf = cluster.app(APP).app.conf
    conf.update(
        broker_transport_options={},
        broker_connection_max_retries=3,
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_disable_prefetch=False,
        worker_prefetch_multiplier=4,
        task_always_eager=True,
    )
    answer = doctor(timeout=QUICK)
    assert answer.status == 0
    checks = found(answer, "settings")
    assert {level for level, _, _ in checks} == {"warning"}
    assert all(do for _, _, do in checks)
    assert [re.split(r"[ :]", what)[0] for _, what, _ in checks] == [
        "broker_transport_options",
        "broker_connection_max_retries",
        "worker_cancel_long_running_tasks_on_connection_loss",
        "worker_prefetch_multiplier",
        "task_always_eager",
    ]
    conf.accept_content = ["json", "pickle"]
    answer = doctor(timeout=QUICK)
    assert answer.status == 1
    assert found(answer, "settings")[0][0] == "problem"
    conf.update(accept_content=["json"], byrd_lease_seconds=0.1)
    assert found(doctor(timeout=QUICK), "settings")[0][1].startswith("byrd_lease_seconds=0.1 must be at least 1")


@pytest.mark.parametrize(
    "backend, words",
    [
        ("redis://localhost/0", "lost with Redis, and expire after 24 h"),
        ("rpc://", "are messages, lost once read"),
        ("disabled://", "are not kept"),
        ("cache+memory://", "are kept in memory only"),
    ],
)
def test_results_that_are_lost(doctor: Callable[..., Answer], cluster: Cluster, backend: str, words: str) -> None:
    cluster.app(APP).app.conf.result_backend = backend
    [(level, what, do)] = found(doctor(timeout=QUICK), "results")
    assert level == "warning"
    assert words in what
    assert do.startswith("set result_backend to db+postgresql://")


def test_the_process_itself(cluster: Cluster, elsewhere: Path) -> None:
    """As people start it: no traceback, and the exit status."""
    env = {**cluster.env, "BYRD_DATABASE_URL": f"postgresql://{NOWHERE}/x"}
    command = [sys.executable, "-c", "from byrd.cli import main; main()", "-A", APP, "doctor"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "✘ database" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_url_that_cannot_be_read(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYRD_DATABASE_URL", "postgresql//me:secret@here")
    answer = call("doctor", "--json")
    assert answer.status == 1
    assert {check["level"] for check in answer.json["checks"]} == {"problem"}
    assert "secret" not in answer.out
    with pytest.raises(psycopg2.Error):
        psycopg2.connect("postgresql//me:secret@here")
