"""`byrd cancel`, `retry`, `pause` and `resume` of many runs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli.conftest import APP, Cli
from tests.cluster import Cluster


@pytest.fixture
def shop(cluster: Cluster) -> Any:
    return cluster.app(APP)


def test_a_job_is_counted_submitted_followed_and_listed(cluster: Cluster, shop: Any, byrd_cli: Cli) -> None:
    runs = [shop.engine.submit("shop.approval") for _ in range(3)] + [shop.engine.submit(shop.price.s(1))]
    dry = byrd_cli("pause", "--workflow", "shop.approval", "--dry-run")
    assert dry.out == "3 runs match; without --dry-run, `byrd pause` is for them.\n"
    assert byrd_cli("pause", "--all", "--dry-run", "--json").json == {"action": "pause", "matched": 4}
    assert byrd_cli("pause", "--older-than", "2h", "--dry-run", "--json").json["matched"] == 0
    assert byrd_cli("pause", "--newer-than", "2h", "--dry-run", "--json").json["matched"] == 4
    told = byrd_cli("pause", "--workflow", "shop.approval")
    [job] = shop.engine.list(workflow="byrd.bulk")
    assert told.out == f"Submitted {job.id}, which is to pause 3 runs; `byrd show {job.id[:8]} --watch` follows it.\n"
    cluster.worker(APP, concurrency=1)
    assert job.get(timeout=30)["done"] == 3
    assert "by " in runs[0].why()[0]
    assert "runs: 3 done, complete" in byrd_cli("show", job.id).out
    listed = byrd_cli("runs", "--workflow", "byrd.bulk")
    assert [line.split()[3:6] for line in listed.out.splitlines()] == [
        ["steps", "items", "submitted"],
        ["succeeded", "1", "3"],
    ]
    assert byrd_cli("runs", "--workflow", "byrd.bulk", "--json").json["runs"][0]["items"] == {
        "completed": 3,
        "failed": 0,
    }
    assert byrd_cli("show", job.id, "--json").json["items"] == {"completed": 3, "failed": 0}
    waited = byrd_cli("resume", "--status", "paused", "--wait", "--json")
    assert (waited.status, waited.json["result"]["done"]) == (0, 3), waited
    waited = byrd_cli("cancel", "--all", "--terminate", "--grace", "0", "--wait")
    assert "which is to cancel 3 runs." in waited.out
    assert '"done": 3' in waited.out
    assert [run.status for run in runs] == ["cancelled"] * 3 + ["succeeded"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["cancel"], "which runs? `byrd cancel RUN...`, or a filter"),
        (["retry", "--wait"], "which runs? `byrd retry RUN...`, or a filter"),
        (["pause", "1234abcd", "--all"], "--all is for `byrd pause` without RUN"),
        (["pause", "1234abcd", "--dry-run"], "--dry-run is for `byrd pause` without RUN"),
        (["pause", "--older-than", "2 fortnights"], "'2 fortnights' is no time: write 90s, 30m, 2h, 7d or 4w"),
    ],
)
def test_misuse(shop: Any, byrd_cli: Cli, args: list[str], words: str) -> None:
    answer = byrd_cli(*args, "--json")
    assert (answer.status, answer.json["error"]["type"]) == (2, "UsageError")
    assert words in answer.json["error"]["message"]


def test_what_the_engine_refuses(shop: Any, byrd_cli: Cli) -> None:
    answer = byrd_cli("resume", "--status", "failed", "--json")
    assert (answer.status, answer.json["error"]["type"]) == (1, "ArgumentError")
    answer = byrd_cli("cancel", "--all", "--grace", "3")
    assert (answer.status, "give both" in answer.err) == (1, True)


def test_one_run_is_hurried(cluster: Cluster, shop: Any, byrd_cli: Cli) -> None:
    run = shop.engine.submit(shop.price.s(1))
    assert byrd_cli("cancel", run.id, "--terminate", "--grace", "1").out.startswith(f"Run {run.id[:8]} is cancelled")
    assert [e["detail"]["grace"] for e in run.history() if e["event"] == "terminate_requested"] == [1.0]
