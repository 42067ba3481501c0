"""What only the prefork pool has: time limits, killed pool processes, terminating revokes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TimeLimitExceeded
from celery.result import AsyncResult

from byrd.errors import StepLostError
from tests.cluster import Cluster, wait_until

APP = "tests.apps.features"
#: Each test module imports the app anew, and a shared task belongs to every app that is alive.
pytestmark = pytest.mark.filterwarnings("ignore:Task name 'features.shared' is already registered")


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def prefork(module_cluster: Cluster, notes: Path) -> None:
    module_cluster.worker(APP, env={"NOTES": str(notes)}, concurrency=2)


@pytest.fixture
def app(module_cluster: Cluster) -> Any:
    return module_cluster.app(APP)


def lines(notes: Path, name: str) -> list[dict[str, Any]]:
    path = notes / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_soft_time_limit(prefork: None, app: Any) -> None:
    assert app.engine.submit(app.soft.s()).get(timeout=30) == "soft"


def test_hard_time_limit(prefork: None, app: Any, notes: Path) -> None:
    """Celery's hooks do not run where a process is killed; an errback is a step."""
    run = app.engine.submit(app.hard.s().on_error(app.once.si("after the limit")))
    with pytest.raises(TimeLimitExceeded):
        run.get(timeout=60)
    assert run.wait(timeout=30) == "failed"
    assert len(lines(notes, "after the limit")) == 1
    assert [step.status for step in run.steps()] == ["failed", "succeeded"]


def test_time_limit_of_the_signature(prefork: None, app: Any, notes: Path) -> None:
    run = app.engine.submit(app.once.s("limited", seconds=30).set(time_limit=1))
    with pytest.raises(TimeLimitExceeded):
        run.get(timeout=60)


def test_a_killed_pool_process(prefork: None, app: Any, tmp_path: Path) -> None:
    run = app.engine.submit(app.child_killer.s(str(tmp_path / "marker")))
    assert run.get(timeout=60) == "survived"
    [step] = run.steps()
    assert (step.attempt, step.preemptions, step.retries) == (2, 1, 0)


def test_poison_is_stopped(prefork: None, app: Any, notes: Path) -> None:
    run = app.engine.submit(app.poison.s().on_error(app.once.si("after the losses")))
    with pytest.raises(StepLostError):
        run.get(timeout=120)
    assert run.wait(timeout=30) == "failed"
    assert len(lines(notes, "after the losses")) == 1
    assert run.steps()[0].preemptions == 6
    assert app.engine.submit(app.before_byrd.s(1)).get(timeout=30) == 2


def test_revoke_while_it_runs(prefork: None, app: Any, notes: Path) -> None:
    run = app.engine.submit(app.once.s("revoked", seconds=60))
    [step] = run.steps()
    wait_until(lambda: lines(notes, "revoked"))
    app.app.control.revoke(step.id, terminate=True)
    assert run.wait(timeout=30) == "failed"
    assert run.steps()[0].status == "cancelled"
    assert AsyncResult(step.id, app=app.app).state == "REVOKED"


def test_revoke_before_it_starts(prefork: None, app: Any, notes: Path) -> None:
    run = app.engine.submit(app.once.s("never", seconds=0).set(countdown=2))
    [step] = run.steps()
    app.app.control.revoke(step.id, reply=True, timeout=5)
    assert run.wait(timeout=30) == "failed"
    assert run.steps()[0].status == "cancelled"
    assert lines(notes, "never") == []


def test_a_step_that_has_started_in_time_does_not_expire(prefork: None, app: Any, tmp_path: Path) -> None:
    run = app.engine.submit(app.slow_killer.s(str(tmp_path / "marker"), 1.5).set(expires=1))
    assert run.get(timeout=60) == "survived"
