"""`byrd limits`: what it lists, what it changes, what it refuses."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import APP, Cli
from tests.cluster import Cluster, wait_until

DECLARED = {"rate": "1/h", "burst": 2, "concurrency": 1}


@pytest.fixture(scope="module")
def shop(module_cluster: Cluster) -> Any:
    module_cluster.worker(APP)
    return module_cluster.app(APP)


def test_it_lists_who_runs_and_who_waits(shop: Any, shared_cli: Cli, tmp_path: Path) -> None:
    path = str(tmp_path / "go")
    runs = [shop.engine.submit(shop.visit.s("example.org", path)) for _ in range(3)]
    wait_until(lambda: [(row.running, row.waiting) for row in shop.engine.limits.list("hosts")] == [(1, 2)])
    head, line = shared_cli("limits").out.splitlines()
    assert re.split(" {2,}", head.strip()) == [
        "limit",
        "key",
        "rate",
        "at once",
        "running",
        "waiting",
        "until",
        "set by",
    ]
    assert re.match(r"hosts +example\.org +1/h \(burst 2\) +1 +1 +2 +- +-", line)
    [found] = shared_cli("limits", "list", "hosts", "--json").json["limits"]
    assert found == {
        "name": "hosts", "key": "example.org", "rate": "1/h", "burst": 2, "concurrency": 1, "running": 1, "waiting": 2,
        "until": None, "parked_until": None, "declared": DECLARED, "set_by": None, "set_at": None,
    }  # fmt: skip

    answer = shared_cli("limits", "set", "hosts", "--rate", "none", "--concurrency", "2")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out == (
        "The limit hosts is now at most 2 at once, for all workers; `byrd limits reset hosts` undoes it.\n"
    )
    wait_until(lambda: [(row.running, row.waiting) for row in shop.engine.limits.list("hosts")] == [(2, 1)])
    [found] = shared_cli("limits", "--json").json["limits"]
    assert (found["rate"], found["concurrency"], found["declared"]) == (None, 2, DECLARED)
    assert found["set_by"].endswith(f"@{socket.gethostname()}")
    Path(path).touch()
    assert [run.get(timeout=30) for run in runs] == ["example.org"] * 3
    answer = shared_cli("limits", "reset", "hosts")
    assert answer.out == "The limit hosts is as the code declares it: 1/h, burst 2, at most 1 at once.\n"
    assert shared_cli("limits", "list", "nobody").out == "No task that a worker has declared is limited by that name.\n"


def test_a_key_is_parked(shop: Any, shared_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    answer = shared_cli("limits", "park", "hosts", "example.com", "--for", "3600")
    assert answer.out.startswith("Nothing of 'example.com' under the limit hosts starts until ")
    run = shop.engine.submit(shop.visit.s("example.com", str(tmp_path / "go")))
    wait_until(lambda: any("it is parked until" in reason for reason in run.why()))
    [line] = [line for line in shared_cli("limits").out.splitlines() if "example.com" in line]
    assert re.search(r"\(in (60|59) min.*\), parked", line) or re.search(r"\(in 1 h.*\), parked", line)
    answer = shared_cli("limits", "unpark", "hosts", "example.com")
    assert answer.out == "The steps of 'example.com' under the limit hosts start again.\n"
    assert run.get(timeout=30) == "example.com"


@pytest.mark.parametrize(
    ("args", "status", "error"),
    [
        (("set", "hosts", "--rate", "fast"), 1, "LimitError"),
        (("set", "hosts", "--concurrency", "-1"), 1, "LimitError"),
        (("set", "hosts", "--concurrency", "many"), 1, "LimitError"),
        (("set", "hosts", "--burst", "0"), 1, "LimitError"),
        (("set", "hosts"), 1, "LimitError"),
        (("set", "nobody", "--rate", "1/s"), 1, "LimitNotFoundError"),
        (("reset", "nobody"), 1, "LimitNotFoundError"),
        (("park", "nobody", "k", "--for", "1"), 1, "LimitNotFoundError"),
        (("park", "hosts", "k", "--for", "-1"), 1, "LimitError"),
        (("park", "hosts", "x" * 501, "--for", "1"), 1, "LimitKeyError"),
        (("park", "hosts", "k"), 2, "UsageError"),
        (("set",), 2, "UsageError"),
        (("set", "hosts", "key", "--rate", "1/s"), 2, "UsageError"),
        (("list", "hosts", "--rate", "1/s"), 2, "UsageError"),
        (("remove", "hosts"), 2, "UsageError"),
    ],
)
def test_what_is_refused(shop: Any, shared_cli: Cli, args: tuple[str, ...], status: int, error: str) -> None:
    answer = shared_cli("limits", *args, "--json")
    assert (answer.status, answer.json["error"]["type"]) == (status, error)
    [row] = shop.engine.limits.list("hosts")
    assert (row.rate, row.burst, row.concurrency, row.set_at) == ("1/h", 2, 1, None)


def test_a_limit_can_be_set_before_any_worker_is_there(cluster: Cluster, byrd_cli: Cli) -> None:
    cluster.app(APP)
    assert byrd_cli("limits").out == "No task that a worker has declared is limited.\n"
    answer = byrd_cli("limits", "set", "hosts", "--concurrency", "0", "--json")
    assert (answer.json["concurrency"], answer.json["declared"]) == (0, DECLARED)
