"""submit, runs, show, cancel, pause, resume, retry: for people and for programs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from byrd.cli.draw import drawing
from byrd.store.insight import snapshot
from tests.cli.conftest import APP, Cli, call
from tests.cluster import ROOT, Cluster, wait_until


@pytest.fixture(scope="module")
def worker(module_cluster: Cluster) -> Any:
    return module_cluster.worker(APP, concurrency=2)


@pytest.fixture
def shop(module_cluster: Cluster) -> Any:
    return module_cluster.app(APP)


def submitted(cli: Cli, *args: str) -> str:
    answer = cli("submit", *args, "--json")
    assert answer.status == 0, answer
    return str(answer.json["run"])


def running(cli: Cli, run: str) -> None:
    """Wait until a step of the run is running."""
    wait_until(lambda: [s for s in cli("show", run, "--json").json["steps"] if s["status"] == "running"])


# -- submit ----------------------------------------------------------------------------------------


def test_submit_waits_and_prints_the_result(worker: Any, shared_cli: Cli) -> None:
    answer = shared_cli("submit", "shop.order", "3", "--kwarg", "factor=-1", "--wait")
    assert (answer.status, json.loads(answer.out)) == (0, "sold for -3"), answer
    found = shared_cli("submit", "shop.order", "3", "--wait", "--json").json
    assert (found["status"], found["result"], found["workflow"]) == ("succeeded", "sold for 6", "shop.order")
    assert found["step_counts"] == {"total": 5, "done": 5, "running": 0, "failed": 0}


def test_submit_takes_a_task_and_negative_numbers(worker: Any, shared_cli: Cli, shop: Any) -> None:
    answer = shared_cli("submit", shop.price.name, "-2", "--wait")
    assert (answer.status, answer.out.strip()) == (0, "-4"), answer


def test_submit_with_a_key_finds_the_first_run(worker: Any, shared_cli: Cli) -> None:
    first = submitted(shared_cli, "shop.order", "1", "--key", "order-1")
    assert submitted(shared_cli, "shop.order", "2", "--key", "order-1") == first
    assert shared_cli("submit", "shop.order", "1", "--key", "order-1").out.startswith(f"Submitted {first}")


def test_a_failed_run_is_an_exit_status(worker: Any, shared_cli: Cli) -> None:
    answer = shared_cli("submit", "shop.sale", "--wait")
    assert (answer.status, answer.out) == (1, "")
    assert "✘ failed: ValueError: [bold red]no[/] <b>money</b> left" in answer.err
    found = shared_cli("submit", "shop.sale", "--wait", "--json")
    assert (found.status, found.json["status"]) == (1, "failed")
    assert found.json["error"] == {"type": "ValueError", "message": "[bold red]no[/] <b>money</b> left"}


@pytest.mark.parametrize(
    "args, kind, words",
    [
        (["submit", "nothing"], "UnknownWorkflowError", "no workflow is called 'nothing'"),
        (["submit", "shop.order", "three"], "ArgumentError", "quote it: '\"three\"'"),
        (["submit", "shop.order", "-k", "factor"], "ArgumentError", "name=value"),
        (["submit", "shop.order", "1", "-k", "key=1"], "ArgumentError", "--key"),
        (["show", "ffffffff"], "RunNotFoundError", "no run has the id ffffffff"),
        (["show", "0---"], "RunNotFoundError", "no run has the id 0---"),
        (["show", "f" * 36], "RunNotFoundError", "no run has the id ffff"),
        (["show", "[red]x"], "RunNotFoundError", "no run has the id [red]x"),
        (["why", "ffffffff"], "RunNotFoundError", "no run has the id ffffffff"),
        (["cancel", "ffffffff"], "RunNotFoundError", "no run has the id ffffffff"),
    ],
)
def test_errors_are_one_line_or_json(shared_cli: Cli, args: list[str], kind: str, words: str) -> None:
    answer = shared_cli(*args)
    assert answer.status == 1
    assert answer.out == ""
    assert answer.err.startswith("Error: ")
    assert words in answer.err
    assert len(answer.err.splitlines()) == 1
    for_programs = shared_cli(*args, "--json")
    assert for_programs.status == 1
    assert for_programs.json["error"]["type"] == kind
    assert words in for_programs.json["error"]["message"]


def test_misuse_is_json_too(shared_cli: Cli) -> None:
    answer = shared_cli("runs", "--limit", "many", "--json")
    assert answer.status == 2
    assert answer.json["error"]["type"] == "UsageError"


# -- runs ------------------------------------------------------------------------------------------


def test_runs_lists_and_filters(worker: Any, shared_cli: Cli) -> None:
    run = shared_cli("submit", "shop.order", "2", "--key", "k [red]1", "--wait", "--json").json["run"]
    lines = shared_cli("runs", "--workflow", "shop.order", "--limit", "1").out.splitlines()
    assert lines[0].split() == ["run", "workflow", "status", "steps", "submitted", "took", "key"]
    assert lines[1].split()[:5] == [run[:8], "shop.order", "✔", "succeeded", "4"]
    assert lines[1].rstrip().endswith("k [red]1")
    found = shared_cli("runs", "--status", "succeeded", "--limit", "1", "--json").json["runs"]
    assert [(r["id"], r["key"], r["step_counts"]["done"]) for r in found] == [(run, "k [red]1", 4)]
    assert found[0]["created_at"].endswith("Z")
    assert shared_cli("runs", "--status", "paused").out == "No runs like that.\n"


def test_reading_needs_no_app(worker: Any, shared_cli: Cli) -> None:
    run = submitted(shared_cli, "shop.order", "1")
    assert run in [found["id"] for found in call("runs", "--json").json["runs"]]
    assert call("show", run, "--json").json["id"] == run
    assert call("why", run).status == 0
    refused = call("cancel", run)
    assert (refused.status, refused.err) == (
        1,
        "Error: which Celery app? Name the module that has it: `byrd -A shop.app ...`, or set BYRD_APP=shop.app\n",
    )


def test_the_app_may_be_named_after_the_command_or_by_the_environment(
    shared_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("submit", "-A", APP, "nothing").err.startswith("Error: no workflow is called 'nothing'")
    monkeypatch.setenv("BYRD_APP", APP)
    assert call("submit", "nothing").err.startswith("Error: no workflow is called 'nothing'")


@pytest.mark.parametrize(
    "name, words",
    [
        ("no_such_module", "there is no module 'no_such_module' here"),
        ("json", "json has no Celery app in it"),
        ("json:dumps", "json:dumps is no Celery app but a function"),
        ("broken", "ZeroDivisionError: division by zero"),
        ("tests.cli.plain", "the app 'plain' (tests.cli.plain) has no engine: call byrd.Byrd(app)"),
    ],
)
def test_an_app_that_cannot_be_used(shared_cli: Cli, elsewhere: Path, name: str, words: str) -> None:
    (elsewhere / "broken.py").write_text("1 / 0\n")
    answer = call("-A", name, "runs")
    assert answer.status == 1
    assert words in answer.err
    assert "Traceback" not in answer.err


def test_celery_has_the_commands_too(worker: Any, shared_cli: Cli, module_cluster: Cluster) -> None:
    run = submitted(shared_cli, "shop.order", "1")
    command = [sys.executable, "-m", "celery", "-A", APP, "byrd", "runs", "--json"]
    done = subprocess.run(command, env=module_cluster.env, cwd=ROOT, check=True, capture_output=True, timeout=60)
    assert run in [found["id"] for found in json.loads(done.stdout)["runs"]]


# -- show ------------------------------------------------------------------------------------------

SALE = """\
✔ 0 shop.price → 10
✔ 4 group of 2
├── ✔ chain of 2
│   ├── ✔ 1 shop.price → 10
│   └── ✔ 2 shop.price → 30
│       └── on success
│           └── ✔ 9 shop.cheer → "sold for 30"
└── ✔ 3 shop.price → 4
✔ 5 shop.total → 34
✘ 6 shop.refuse
├── ValueError: [bold red]no[/] <b>money</b> left
└── on failure
    └── ✔ 7 shop.mourn → "[bold red]no[/] <b>money</b> left"
– 8 shop.cheer skipped"""


def test_show_draws_chains_groups_callbacks_errbacks(worker: Any, shared_cli: Cli, shop: Any) -> None:
    run = shared_cli("submit", "shop.sale", "--wait", "--json").json["run"]
    wait_until(lambda: shared_cli("show", run, "--json").json["finished_at"])
    answer = shared_cli("show", run[:13])
    head, _, tree = answer.out.partition("\n\n")
    assert head.splitlines()[0].startswith("✘ failed  shop.sale")
    assert run in head
    assert "done, 1 failed, 1 skipped" in head
    assert shape(tree) == shape(SALE)


def shape(tree: str) -> list[str]:
    """A tree's lines without the steps' numbers and durations."""
    found = []
    for line in tree.rstrip().splitlines():
        plain = re.sub(r"(?<=[✔✘–] )\d+ ", "", line.replace("tests.cli.shop", "shop"))
        plain = re.sub(r"  [\d.]+ (ms|s|min( \d+ s)?)(?=  |$)", "", plain.rstrip())
        found.append(re.sub(r"(?<=\S)  +", " ", plain).rstrip())
    return found


def test_show_for_programs_has_everything(worker: Any, shared_cli: Cli) -> None:
    run = shared_cli("submit", "shop.sale", "--wait", "--json").json["run"]
    found = wait_until(lambda: (f := shared_cli("show", run, "--json").json)["finished_at"] and f)
    steps = {step["no"]: step for step in found["steps"]}
    failed = next(step for step in steps.values() if step["status"] == "failed")
    assert failed["task"] == "tests.cli.shop.refuse"
    assert failed["ended_attempts"][0]["outcome"] == "failed"
    assert failed["error"]["type"] == "ValueError"
    first = next(step for step in steps.values() if step["after"] is None)
    assert (first["result"], first["kind"], first["attempt"], first["checkpoints"]) == (10, "task", 1, [])
    assert first["duration_seconds"] >= 0


def test_show_has_checkpoints_and_follows(worker: Any, shared_cli: Cli, shop: Any, tmp_path: Path) -> None:
    go = tmp_path / "go"
    run = submitted(shared_cli, shop.walk.name, "5", json.dumps(str(go)))
    wait_until(lambda: [c for c in checkpoints(shared_cli, run) if c["name"] == "items" and c["cursor"] == 3])
    drawn = shared_cli("show", run).out
    assert "on worker1@localhost" in drawn
    assert "items: 3 done, 1 failed, at 3" in drawn
    assert "sub-steps done: log in" in drawn
    assert "worker1@localhost" in shared_cli("why", run).out
    assert "its last checkpoint" in shared_cli("why", run).out
    go.touch()
    assert "✔ succeeded" in shared_cli("show", run, "--watch").out
    lines = shared_cli("show", run, "--watch", "--json").out.splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["succeeded"]
    assert "items: 4 done, 1 failed, complete" in shared_cli("show", run).out


def checkpoints(cli: Cli, run: str) -> list[dict[str, Any]]:
    return [c for step in cli("show", run, "--json").json["steps"] for c in step["checkpoints"]]


@pytest.mark.parametrize("width", [80, 140])
def test_a_large_run_fits_the_terminal(cluster: Cluster, width: int) -> None:
    shop = cluster.app(APP)
    long = shop.price.s("x" * 500).set(queue="nobody")
    run = shop.engine.submit(shop.order(1000) | long)
    drawn = shop.engine.runtime.store.run(snapshot, run.id)
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(drawing(drawn))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < 30
    assert any("group of 1,000" in line for line in lines)


def test_a_large_group_is_summed_up(cluster: Cluster, byrd_cli: Cli) -> None:
    shop = cluster.app(APP)
    run = shop.engine.submit(shop.order(30))
    assert "└── ○ 30 ready" in byrd_cli("show", run.id).out
    assert byrd_cli("show", run.id, "--all").out.count("shop.price") == 30
    found = byrd_cli("show", run.id, "--json").json
    assert len(found["steps"]) == 33


# -- operations ------------------------------------------------------------------------------------


def test_pause_resume_cancel_retry(worker: Any, shared_cli: Cli, shop: Any, tmp_path: Path) -> None:
    run = submitted(shared_cli, shop.price.name, "1")
    shop.engine.get(run).wait(timeout=30)
    path = json.dumps(str(tmp_path / "go"))
    run = submitted(shared_cli, shop.hold.name, path)
    running(shared_cli, run)
    short = run[:8]
    assert shared_cli("pause", short).out == f"Run {short} is paused; `byrd resume {short}` lets it go on.\n"
    resumed = shared_cli("resume", run, "--json").json["runs"]
    assert [(r["run"], r["status"]) for r in resumed] == [(run, "running")]
    assert "is being cancelled and waits for its running steps" in shared_cli("cancel", short).out
    assert "It is being cancelled since" in shared_cli("why", short).out
    (tmp_path / "go").touch()
    shop.engine.get(run).wait(timeout=30)
    again = shared_cli("cancel", short)
    assert (again.status, again.out) == (1, "")
    assert again.err.startswith(f"Error: run {run} is ")


def test_retry_runs_again_what_failed(worker: Any, shared_cli: Cli, shop: Any) -> None:
    run = shared_cli("submit", shop.refuse.name, "--wait", "--json").json["run"]
    assert shared_cli("retry", run).out.startswith(f"Run {run[:8]} is running again; ")
    shop.engine.get(run).wait(timeout=30)
    assert shared_cli("retry", run, "--json").json["runs"][0]["status"] == "running"
    shop.engine.get(run).wait(timeout=30)
    assert max(step["attempt"] for step in shared_cli("show", run, "--json").json["steps"]) == 3


def test_several_runs_at_once_or_none(shared_cli: Cli, shop: Any) -> None:
    first, second = (shop.engine.submit(shop.price.s(1).set(queue="nobody")) for _ in range(2))
    refused = shared_cli("cancel", first.id, "ffffffff")
    assert refused.status == 1
    assert first.status == "running"
    done = shared_cli("cancel", first.id, second.id[:8])
    assert done.out.count("is cancelled; `byrd retry") == 2
