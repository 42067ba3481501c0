"""`byrd chaos`: a minute of it on embedded servers, a staging system's own workers and Redis, and what it refuses."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from byrd.chaos.faults import Kind
from byrd.chaos.targets import check_local
from byrd.chaos.tasks import QUEUE
from byrd.embedded import EmbeddedPostgres, EmbeddedValkey
from byrd.errors import ConfigurationError
from tests.cli.conftest import call
from tests.cluster import ROOT, Cluster, ClusterFactory, Worker, wait_until
from tests.invariants import check_database

APP = "tests.apps.basic"
BYRD = [sys.executable, "-c", "from byrd.cli import main; main()"]
#: What every report has, whatever happened.
KEYS = {
    "ok", "failures", "seed", "began", "seconds", "drain_seconds", "interrupted", "targets", "runs", "steps", "effects",
    "unprovoked", "invariants", "faults", "recovery", "timeline", "findings",
}  # fmt: skip


def chaos(
    *options: str, env: dict[str, str] | None = None, timeout: float = 280, cwd: Path = ROOT
) -> tuple[int, dict[str, Any], str]:
    """Run `byrd chaos --json`; return its status, its report, and what it told meanwhile."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("BYRD_DATABASE_URL")}
    ended = subprocess.run(
        [*BYRD, "chaos", "--json", *options],
        check=False, cwd=cwd, env={**(env or plain), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout), ended.stderr


def assert_clean(status: int, report: dict[str, Any], told: str) -> None:
    detail = json.dumps(report.get("findings", report), indent=1) + "\n" + told
    assert report.keys() == KEYS, detail
    assert report["failures"] == [], detail
    assert (status, report["ok"]) == (0, True)
    runs, effects = report["runs"], report["effects"]
    assert runs["submitted"] == runs["finished"] > 0
    assert runs["lost"] == runs["stuck"] == runs["wrong"] == report["steps"]["recorded_twice"] == 0
    assert effects["unexplained"] == report["invariants"]["broken"] == 0
    assert effects["repeated"] == sum(effects["reasons"].values())
    assert set(runs["statuses"]) <= {"succeeded", "failed"}


def test_a_minute_of_every_fault(tmp_path: Path) -> None:
    file = tmp_path / "reports" / "chaos.json"
    mark = f"CHAOS_TEST={secrets.token_hex(8)}"
    env = {**os.environ, **dict([mark.split("=")])}
    status, report, told = chaos("--embedded", "--for", "60s", "--every", "1s", "--report", str(file), env=env)
    assert_clean(status, report, told)
    assert set(report["faults"]) == set(Kind), told
    slow = f"a lease ran out, or a step was handed back, by no fault; is the machine overloaded ({os.getloadavg()})?"
    assert report["unprovoked"] == 0, f"{slow}\n{json.dumps(report['findings']['unprovoked'], indent=1)}\n{told}"
    assert json.loads(file.read_text()) == report
    for kind in (Kind.WORKER_KILLED, Kind.REDIS_RESTARTED, Kind.POSTGRES_RESTARTED, Kind.REDIS_FLUSHED):
        found = report["recovery"][kind]
        assert found["faults"] >= 1
        if found["steps"]:
            assert 0 <= found["p50"] <= found["p95"] <= found["max"]
    assert report["recovery"][Kind.POSTGRES_RESTARTED]["steps"] >= 1
    assert sum(fault["hit"] for fault in report["timeline"] if fault["kind"] == Kind.POSTGRES_RESTARTED) >= 1
    wait_until(
        lambda: not [process for process in psutil.process_iter() if _has(process, mark)], what="end of them all"
    )


def _has(process: psutil.Process, variable: str) -> bool:
    """Tell whether a process was started by the session, which gave it its environment."""
    name, _, value = variable.partition("=")
    try:
        return bool(process.environ().get(name) == value)
    except psutil.Error:
        return False


def test_faults_that_overlap(tmp_path: Path) -> None:
    """None waits for what the one before it hit; with this seed a worker is killed while Postgres is away."""
    status, report, told = chaos(
        "--embedded", "--overlap", "--for", "12s", "--every", "0.1s", "--outage", "1s", "--seed", "16",
        "--logs", str(tmp_path),
    )  # fmt: skip
    assert_clean(status, report, told)
    assert set(Kind) - {Kind.MESSAGES_DROPPED, Kind.MESSAGES_DUPLICATED} <= set(report["faults"]), told
    struck = [fault for fault in report["timeline"] if "during the outage" in fault["what"]]
    assert struck, told
    # In that order, whatever else has happened meanwhile.
    order = [fault["kind"] for fault in report["timeline"] if fault not in struck]
    assert order[:7] == [
        "redis_flushed", "worker_killed", "child_killed", "postgres_restarted", "redis_restarted", "worker_frozen",
        "worker_stopped",
    ]  # fmt: skip


# -- a staging system ------------------------------------------------------------------------------


@contextmanager
def kept_alive(*workers: Worker) -> Iterator[None]:
    """Start the workers again when they end, as a staging system's supervisor does."""
    told = threading.Event()

    def watch() -> None:
        while not told.wait(0.1):
            for worker in workers:
                if not worker.running:
                    worker.kill()
                    worker.start()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        told.set()
        thread.join()


def test_named_workers_and_a_redis_with_commands(
    cluster_on: ClusterFactory, database_url: str, own_broker: EmbeddedValkey
) -> None:
    cluster = cluster_on(database_url=database_url, broker_url=own_broker.url)
    workers = [cluster.worker(APP, queues=["celery", QUEUE], options=["-I", "byrd.chaos.load"]) for _ in range(2)]
    spared = cluster.worker(APP, queues=["celery"])
    with kept_alive(*workers):
        status, report, told = chaos(
            "-A", APP, "--for", "5s", "--every", "1s", "--seed", "5", "--open", "6", "--outage", "1s",
            "--kill-worker", workers[0].hostname, "--kill-worker", "worker2@*",
            "--stop-redis", f"kill -STOP {own_broker.pid}", "--start-redis", f"kill -CONT {own_broker.pid}",
            "--duplicate", "0.2", env=cluster.env,
        )  # fmt: skip
    assert_clean(status, report, told)
    assert {"worker_killed", "child_killed", "worker_stopped", "redis_restarted"} <= set(report["faults"])
    assert not {"redis_flushed", "postgres_restarted", "worker_frozen", "messages_dropped"} & set(report["faults"])
    assert spared.running
    assert not any("worker3" in one["what"] for one in report["timeline"])
    check_database(cluster.database_url)
    assert cluster.rows("SELECT count(*) FROM byrd_chaos.effects") == [(0,)]


@contextmanager
def supervised(postgres: EmbeddedPostgres, folder: Path) -> Iterator[tuple[str, str]]:
    """Have two commands that stop and start a Postgres, as a staging system's service manager does."""
    told = threading.Event()
    modes: Iterator[Literal["fast", "immediate"]] = itertools.cycle(("fast", "immediate"))
    acts: dict[str, Callable[[], object]] = {"stop": lambda: postgres.stop(next(modes)), "start": postgres.start}

    def manage() -> None:
        while not told.wait(0.05):
            for name, act in acts.items():
                if (folder / name).exists():
                    act()
                    (folder / name).unlink()

    thread = threading.Thread(target=manage)
    thread.start()
    script = folder / "manage.sh"
    script.write_text(f'touch "{folder}/$1"; while [ -e "{folder}/$1" ]; do sleep 0.05; done')
    try:
        yield f"sh {script} stop", f"sh {script} start"
    finally:
        told.set()
        thread.join()


def test_a_postgres_with_commands_and_all_that_may_be_named(
    cluster_on: ClusterFactory, own_postgres: EmbeddedPostgres, own_broker: EmbeddedValkey, tmp_path: Path
) -> None:
    cluster = cluster_on(database_url=own_postgres.url, broker_url=own_broker.url)
    workers = [cluster.worker(APP, queues=["celery", QUEUE], options=["-I", "byrd.chaos.load"]) for _ in range(2)]
    with kept_alive(*workers), supervised(own_postgres, tmp_path) as (stop, start):
        status, report, told = chaos(
            "-A", APP, "--for", "40s", "--every", "0.5s", "--seed", "7", "--open", "6", "--outage", "1s",
            "--kill-worker", "worker*@*", "--pause-workers", "--flush-redis", "--drop", "0.05", "--duplicate", "0.05",
            "--stop-postgres", stop, "--start-postgres", start, env=cluster.env,
        )  # fmt: skip
    assert_clean(status, report, told)
    assert set(report["faults"]) == set(Kind) - {Kind.REDIS_RESTARTED}, told
    assert sum(fault["hit"] for fault in report["timeline"] if fault["kind"] == Kind.POSTGRES_RESTARTED) >= 1
    check_database(cluster.database_url)


def test_faults_that_overlap_in_workers_that_are_named(cluster: Cluster) -> None:
    """A worker that was just killed is no target any more, though its lease is not over yet."""
    workers = [cluster.worker(APP, queues=["celery", QUEUE], options=["-I", "byrd.chaos.load"]) for _ in range(2)]
    with kept_alive(*workers):
        status, report, told = chaos(
            "-A", APP, "--overlap", "--for", "10s", "--every", "0.1s", "--open", "6", "--kill-worker", "worker*@*",
            env=cluster.env,
        )  # fmt: skip
    assert_clean(status, report, told)
    assert set(report["faults"]) == {"worker_killed", "child_killed", "worker_stopped"}
    check_database(cluster.database_url)


@pytest.mark.parametrize("path", ["absolute", "relative"])
def test_a_worker_that_is_named_by_its_pid_file(cluster: Cluster, tmp_path: Path, path: str) -> None:
    """Whatever process the file names by then: the worker is started again and again."""
    file = tmp_path / "worker.pid"
    options = ["-I", "byrd.chaos.load", "--pidfile", str(file)]
    named = cluster.worker(APP, queues=["celery", QUEUE], options=options)
    spared = cluster.worker(APP, queues=["celery", QUEUE], options=["-I", "byrd.chaos.load"])
    before, first = spared.pid, named.pid
    with kept_alive(named):
        status, report, told = chaos(
            "-A", APP, "--for", "3s", "--every", "0.1s", "--open", "6",
            "--kill-worker", str(file) if path == "absolute" else file.name,
            env=cluster.env, cwd=ROOT if path == "absolute" else tmp_path,
        )  # fmt: skip
    assert_clean(status, report, told)
    assert set(report["faults"]) == {"worker_killed", "child_killed", "worker_stopped"}
    assert {fault["what"].split()[2 if "to worker" in fault["what"] else -1] for fault in report["timeline"]} == {
        f"{named.hostname},", named.hostname
    }  # fmt: skip
    assert (spared.running, spared.pid) == (True, before)
    assert named.pid != first
    check_database(cluster.database_url)


def test_a_worker_that_is_named_by_its_process_id(cluster: Cluster) -> None:
    """Once that process has ended there is nothing to hit, and nobody waits for it to come back."""
    named, spared = (cluster.worker(APP, queues=["celery", QUEUE], options=["-I", "byrd.chaos.load"]) for _ in range(2))
    status, report, told = chaos(
        "-A", APP, "--for", "2s", "--every", "0.1s", "--open", "6", "--kill-worker", str(named.pid), env=cluster.env
    )
    assert_clean(status, report, told)
    assert sum(number for kind, number in report["faults"].items() if kind != "child_killed") == 1
    assert all(named.hostname in fault["what"] for fault in report["timeline"])
    assert "no worker that may be touched is alive" in told
    assert report["seconds"] < 25, told
    assert (named.running, spared.running) == (False, True)
    check_database(cluster.database_url)


def test_own_workers_of_an_app(cluster: Cluster, tmp_path: Path) -> None:
    status, report, told = chaos(
        "-A", APP, "--workers", "1", "--for", "2s", "--every", "0.5s", "--open", "4", "--flush-redis",
        "--logs", str(tmp_path / "logs"), env=cluster.env,
    )  # fmt: skip
    assert_clean(status, report, told)
    assert {"worker_killed", "child_killed", "worker_stopped", "redis_flushed"} == set(report["faults"])
    assert list((tmp_path / "logs").glob("*.log"))
    check_database(cluster.database_url)


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ((), "nothing may be touched"),
        (("--for", "10s", "--seed", "1"), "nothing may be touched"),
        (("--stop-redis", "true"), "--stop-redis and --start-redis belong together"),
        (("--start-postgres", "true"), "--stop-postgres and --start-postgres belong together"),
        (("--flush-redis", "--pause-workers"), "--pause-workers: which?"),
        (("--drop", "0.6", "--duplicate", "0.6"), "cannot be more than 1"),
        (("--embedded", "--kill-worker", "celery@*"), "--embedded has servers and workers of its own"),
        (("--embedded", "--stop-redis", "a", "--start-redis", "b"), "--embedded has servers and workers of its own"),
        (("--workers", "2"), "which Celery app?"),
        (("--flush-redis",), "which Celery app?"),
    ],
)
def test_bad_command_lines(elsewhere: Path, options: tuple[str, ...], said: str) -> None:
    answer = call("chaos", *options)
    assert (answer.status, answer.out) == (1, answer.out)
    assert said in answer.err
    as_json = call("chaos", "--json", *options)
    assert as_json.status == 1
    assert said in as_json.json["error"]["message"]


@pytest.mark.parametrize("options", [("--for", "soon"), ("--drop", "2"), ("--workers", "-1"), ("--open", "0")])
def test_options_that_are_no_numbers(elsewhere: Path, options: tuple[str, ...]) -> None:
    assert call("chaos", *options).status == 2


def test_a_dry_run_only_tells(elsewhere: Path) -> None:
    options = ("--workers", "3", "--kill-worker", "celery@stage-?", "--stop-redis", "a b", "--start-redis", "c d")
    answer = call("chaos", *options, "--dry-run", "--json")
    assert answer.status == 0
    assert answer.json["targets"] == [
        "3 workers of its own, 2 processes each: started and killed",
        "workers celery@stage-?: killed, with their pools, and told to stop",
        "Redis: stopped with `a b`, started with `c d`",
    ]
    assert "3 workers of its own" in call("chaos", *options, "--dry-run").out


def test_without_a_worker_that_knows_the_load(cluster: Cluster) -> None:
    cluster.worker(APP)  # consumes another queue, and has no such tasks
    status, report, _ = chaos("-A", APP, "--flush-redis", env=cluster.env)
    assert status == 1
    assert "no live worker has the tasks of the load" in report["error"]["message"]
    assert "-I byrd.chaos.load -Q celery,byrd-chaos" in report["error"]["message"]


def test_a_worker_that_is_not_there(cluster: Cluster) -> None:
    cluster.worker(APP, queues=[QUEUE], options=["-I", "byrd.chaos.load"])
    status, report, _ = chaos("-A", APP, "--kill-worker", "nobody@*", env=cluster.env)
    assert status == 1
    assert "no live worker is nobody@*" in report["error"]["message"]


def test_a_process_that_is_no_worker_is_not_touched(cluster: Cluster) -> None:
    cluster.worker(APP)
    [row] = cluster.app(APP).engine.workers()
    check_local(row)
    with subprocess.Popen(["sleep", "60"]) as other:
        for pid in (other.pid, 2**22 + 1):  # some other program; no process at all
            with pytest.raises(ConfigurationError, match="no Celery worker on this machine"):
                check_local(replace(row, pid=pid))
        assert other.poll() is None
        other.kill()


def test_a_command_that_fails_is_told(cluster: Cluster) -> None:
    cluster.worker(APP, queues=[QUEUE], options=["-I", "byrd.chaos.load"])
    status, report, _ = chaos(
        "-A", APP, "--stop-redis", "false", "--start-redis", "true", "--every", "0.1s", env=cluster.env
    )
    assert status == 1
    assert "`false` failed with status 1" in report["error"]["message"]
