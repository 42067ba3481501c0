"""What an operator sees of rollbacks, and does about them, on the command line."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import chain, group

import byrd
from byrd.store.rows import query
from tests.cli.conftest import Cli, call
from tests.cluster import Cluster, wait_until

APP = "tests.apps.sagas"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def sagas(module_cluster: Cluster, files: Path) -> Any:
    app = module_cluster.app(APP)
    module_cluster.rows(app.TABLE)
    module_cluster.worker(APP, env={"SAGA_FILES": str(files)})
    return app


def stuck(sagas: Any, files: Path, name: str) -> tuple[Any, int]:
    """Return a run that is stuck, and the number of the compensation."""
    (files / f"{name}.stuck").touch()
    run = sagas.engine.submit(chain(sagas.do.si("first"), byrd.saga(sagas.do.si(name), sagas.fail.si())))
    assert run.wait(timeout=60) == "rollback_stuck"
    return run, next(s.no for s in run.steps() if s.kind == "compensation")


@pytest.fixture
def cli(module_cluster: Cluster, sagas: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Call ``byrd -A tests.apps.sagas``."""
    monkeypatch.setenv("BYRD_DATABASE_URL", module_cluster.database_url)
    monkeypatch.setenv("BYRD_BROKER_URL", module_cluster.broker_url)
    monkeypatch.setitem(sys.modules, APP, sagas)
    return lambda *args: call("-A", f"{APP}:app", *args)


def test_skip(sagas: Any, files: Path, cli: Cli) -> None:
    run, no = stuck(sagas, files, "skipped")
    assert "\nbyrd_rollbacks_stuck 1.0\n" in cli("metrics").out
    assert run.id[:8] in cli("runs", "--status", "rollback_stuck").out
    told = cli("why", run.id).out
    assert f"`byrd skip {run.id[:8]} {no} --reason ...`" in told
    assert f"`byrd done-by-hand {run.id[:8]} {no} --note ...`" in told
    assert cli("skip", run.id, str(no)).status == 2
    answer = cli("skip", run.id[:8], str(no), "--reason", "the hotel is gone")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith(f"Run {run.id[:8]} is running; `byrd show")
    assert run.wait(timeout=30) == "failed"
    assert "\nbyrd_rollbacks_stuck 0.0\n" in cli("metrics").out
    [found] = [h for h in run.history() if h["event"] == "compensation_skipped"]
    assert found["detail"]["reason"] == "the hotel is gone"
    assert found["detail"]["by"].endswith(f"@{socket.gethostname()}")


def test_done_by_hand_and_json(sagas: Any, files: Path, cli: Cli) -> None:
    run, no = stuck(sagas, files, "mine")
    refused = cli("done-by-hand", run.id, "0", "--note", "so")
    assert refused.status == 1
    assert "step 0 of run" in refused.err
    assert "is no compensation" in refused.err
    [done] = cli("done-by-hand", run.id, str(no), "--note", "I called them", "--json").json["runs"]
    assert (done["run"], done["status"]) == (run.id, "running")
    assert run.wait(timeout=30) == "failed"
    steps = {step["no"]: step for step in cli("show", run.id, "--json").json["steps"]}
    assert (steps[no]["status"], steps[no]["kind"], steps[no]["saga"], steps[no]["rank"]) == (
        "succeeded", "compensation", 1, 1,
    )  # fmt: skip


def test_rollback(sagas: Any, cli: Cli) -> None:
    run = sagas.engine.submit(chain(sagas.do.si("a"), byrd.saga(sagas.do.si("b"), sagas.do.si("c"))))
    assert run.wait(timeout=30) == "succeeded"
    answer = cli("rollback", run.id, "--reason", "the wrong customer")
    assert answer.out.startswith(f"Run {run.id[:8]} is compensating; ")
    assert run.wait(timeout=30) == "cancelled"
    assert cli("rollback", run.id).status == 1
    assert re.search(r"✔ 1 saga", cli("show", run.id).out)
    undone = [s["compensates"] for s in cli("show", run.id, "--json").json["steps"] if s["kind"] == "compensation"]
    assert undone == [3, 2, 0]
    assert "It was cancelled at" in cli("why", run.id).out


def test_a_run_past_its_pivot(sagas: Any, files: Path, cli: Cli) -> None:
    run = sagas.engine.submit(chain(sagas.do.si("a"), sagas.pay.si()))
    assert run.wait(timeout=30) == "succeeded"
    assert "pivot" in cli("show", run.id).out
    assert cli("show", run.id, "--json").json["pivot"] == 1
    refused = cli("rollback", run.id)
    assert "step 1, its pivot, has succeeded" in refused.err


def test_a_saga_that_undoes_itself_is_told(sagas: Any, files: Path, cli: Cli) -> None:
    (files / "slow.stuck").touch()
    slow = byrd.saga(sagas.slow_undo.si("slow"), sagas.fail.si())
    run = sagas.engine.submit(group(slow, sagas.until.si("slow.go")))
    undoing = r"Step 0 \(byrd\.saga\) has failed, and undoes what it had done since .*: 0 of 1 compensation done"
    wait_until(lambda: re.search(undoing, cli("why", run.id).out))
    assert "failed, is being undone since" in cli("show", run.id).out
    (files / "slow.stuck").unlink()
    (files / "slow.go").touch()
    assert run.wait(timeout=30) == "failed"


def test_the_doctor_counts_what_is_stuck(sagas: Any, files: Path, cli: Cli) -> None:
    for number in range(6):
        stuck(sagas, files, f"many{number}")
    sagas.engine.runtime.store.run(
        query, "UPDATE byrd.notices SET error = 'nobody there' WHERE id = (SELECT max(id) FROM byrd.notices)"
    )
    checks = [c for c in cli("doctor", "--json").json["checks"] if c["name"] == "rollbacks"]
    assert re.match(r"6 rollbacks stuck: \w{8}(, \w{8}){4}, \.\.\.", checks[0]["what"])
    assert checks[1]["what"] == "1 notice of a stuck rollback not delivered: nobody there"
