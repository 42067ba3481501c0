"""`byrd metrics`: printed once, served, and what it says when it cannot."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import chain, group
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

import byrd
from byrd.cli import metrics
from byrd.embedded import EmbeddedPostgres
from byrd.errors import StoreUnavailableError
from tests.cli.conftest import APP, Cli, call
from tests.cluster import ROOT, Cluster, wait_until

BYRD = [sys.executable, "-c", "from byrd.cli import main; main()"]
GAUGES = {
    "byrd_runs", "byrd_rollbacks_stuck", "byrd_steps", "byrd_queue_steps_due", "byrd_queue_oldest_due_age_seconds",
    "byrd_workers", "byrd_worker_processes", "byrd_workers_lost", "byrd_notices_undelivered",
}  # fmt: skip


def figures(text: str) -> dict[str, float]:
    """The samples of a page that Prometheus's own parser reads, as ``name{value of its label}``."""
    families = list(parse(text))
    assert {family.name for family in families} == GAUGES
    assert all(family.type == "gauge" and family.documentation for family in families)
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_it_prints_the_figures_once(cluster: Cluster, byrd_cli: Cli) -> None:
    shop = cluster.app(APP)
    shop.engine.submit(group(shop.price.s(1), shop.price.s(2)))
    shop.engine.submit(shop.price.s(1).set(queue='a "queue"\\ with\nit all: ü'))
    shop.engine.submit(chain(byrd.sleep(3600), shop.price.s(1)))
    shop.engine.submit(shop.price.s(1)).pause()
    answer = byrd_cli("metrics")
    assert (answer.status, answer.err) == (0, "")
    found = figures(answer.out)
    for queue in ("celery", 'a "queue"\\ with\nit all: ü'):
        assert 0 <= found.pop(f"byrd_queue_oldest_due_age_seconds{{{queue}}}") < 300
    assert found == {
        "byrd_runs{running}": 3, "byrd_runs{paused}": 1, "byrd_runs{cancelling}": 0, "byrd_runs{compensating}": 0,
        "byrd_runs{rollback_stuck}": 0, "byrd_rollbacks_stuck": 0, "byrd_steps{due}": 3, "byrd_steps{later}": 1,
        "byrd_steps{running}": 0, "byrd_steps{waiting}": 1, "byrd_queue_steps_due{celery}": 2,
        'byrd_queue_steps_due{a "queue"\\ with\nit all: ü}': 1, "byrd_workers": 0, "byrd_worker_processes": 0,
        "byrd_workers_lost": 0, "byrd_notices_undelivered": 0,
    }  # fmt: skip

    told = byrd_cli("metrics", "--json").json
    assert told["queues"]["celery"].pop("oldest_due_seconds") >= 0
    assert told["queues"]["celery"] == {"steps_due": 2}
    del told["at"], told["queues"]
    assert told == {
        "runs": {"running": 3, "paused": 1, "cancelling": 0, "compensating": 0, "rollback_stuck": 0},
        "rollbacks_stuck": 0, "steps": {"due": 3, "later": 1, "running": 0, "waiting": 1}, "workers": 0,
        "worker_processes": 0, "workers_lost": 0, "notices_undelivered": 0,
    }  # fmt: skip
    assert shop.engine.metrics().runs == told["runs"]


def get(url: str, **headers: str) -> tuple[int, str, str]:
    """Return status, content type and text of a page."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            body = answer.read()
            if answer.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            return answer.status, answer.headers["Content-Type"], body.decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.headers["Content-Type"], exc.read().decode()


def test_it_serves_them_through_an_outage_of_postgres(
    own_postgres: EmbeddedPostgres, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BYRD_DATABASE_URL", own_postgres.url)
    monkeypatch.setenv("BYRD_BROKER_URL", "redis://127.0.0.1:1/0")  # it is not asked
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    log = elsewhere / "log"
    own_postgres.kill()  # it starts before Postgres does, too
    with log.open("wb") as file:
        server = subprocess.Popen([*BYRD, "metrics", "--serve", "0", "--json"], stdout=file)
    try:
        wait_until(lambda: log.read_text().endswith("\n"), timeout=120, what="the server's first line")
        url = json.loads(log.read_text())["url"]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", url)
        for _ in range(2):
            status, kind, text = get(url)
            assert (status, kind) == (503, "text/plain; charset=utf-8")
            assert re.fullmatch(r"Postgres at 127\.0\.0\.1:\d+ does not answer: .*\n", text)
            own_postgres.start()
            status, kind, text = get(url)
            assert (status, kind.partition(";")[0]) == (200, "text/plain"), text
            assert figures(text)["byrd_runs{running}"] == 0
            own_postgres.kill()
        own_postgres.start()
        as_openmetrics = "application/openmetrics-text; version=1.0.0"
        _, kind, text = get(url, Accept=as_openmetrics, **{"Accept-Encoding": "gzip"})
        assert kind.startswith(as_openmetrics)
        assert {family.name for family in parse_openmetrics(text)} == GAUGES  # type: ignore[no-untyped-call]
        _, _, text = get(f"{url}?name[]=byrd_rollbacks_stuck")
        assert [line for line in text.splitlines() if not line.startswith("#")] == ["byrd_rollbacks_stuck 0.0"]
        assert get(url.removesuffix("metrics")) == (
            404,
            "text/plain; charset=utf-8",
            "The figures are at /metrics.\n",
        )
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(30)
    assert status == 0
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()] == ["started", "stopped"]


def test_scrapes_take_turns_and_do_not_queue_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As threads that wait for a Postgres that is frozen, one for each scrape, would."""
    monkeypatch.setattr(metrics, "_TURN_SECONDS", 0.05)
    entered, go = threading.Event(), threading.Event()
    found: Any = object()

    def slow() -> Any:
        entered.set()
        assert go.wait(60)
        return found

    read = metrics._one_at_a_time(slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(read)
        assert entered.wait(60)
        with pytest.raises(StoreUnavailableError, match="the scrape before this one"):
            read()
        go.set()
        assert first.result(60) is found
    assert read() is found


def test_postgres_is_away(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYRD_DATABASE_URL", "postgresql://byrd@127.0.0.1:1/byrd")
    answer = call("metrics")
    assert (answer.status, answer.out) == (1, "")
    assert answer.err.startswith("Error: Postgres at 127.0.0.1:1 does not answer: ")
    assert call("metrics", "--json").json["error"]["type"] == "StoreUnavailableError"


@pytest.mark.parametrize(
    "address", ["", "http", "localhost", ":9464", "host:", "1:2:3", "::1:9464", "[::1]", "[]:1", "65536", "-1", "a b:1"]
)
def test_what_is_no_address_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("BYRD_DATABASE_URL", "postgresql://byrd@127.0.0.1:1/byrd")
    error = call("metrics", "--json", f"--serve={address}").json["error"]
    assert error["type"] == "ConfigurationError"
    assert error["message"].startswith(f"--serve {address!r} is no [HOST:]PORT such as 9464")


def test_where_it_cannot_listen_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYRD_DATABASE_URL", "postgresql://byrd@127.0.0.1:1/byrd")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = call("metrics", "--serve", str(port))
    assert answer.status == 1
    assert answer.err == (
        f"Error: cannot listen on 127.0.0.1, port {port}: Address already in use; choose another for --serve\n"
    )
    answer = call("metrics", "--serve", "no-such-host.invalid:1")
    assert answer.status == 1
    assert answer.err.startswith("Error: cannot listen on no-such-host.invalid, port 1: ")


def test_without_prometheus_client_json_is_left(
    cluster: Cluster, byrd_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.app(APP)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for options in ([], ["--serve", "0"]):
        answer = byrd_cli("metrics", *options)
        assert (answer.status, answer.out) == (1, "")
        assert 'not installed here: pip install "byrd[metrics]"' in answer.err
    assert byrd_cli("metrics", "--json").json["rollbacks_stuck"] == 0
