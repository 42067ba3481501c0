"""SagaTask: what was done is undone, in reverse order, whatever is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, group

import byrd
from byrd.errors import ConfigurationError, IllegalTransitionError
from tests.cluster import Cluster, wait_until

APP = "tests.apps.progress"


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def shared(module_cluster: Cluster, notes: Path) -> Any:
    module_cluster.worker(APP, env={"NOTES": str(notes)})
    return module_cluster.app(APP)


def noted(notes: Path, name: str) -> list[Any]:
    path = notes / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_saga_that_succeeds_undoes_nothing(shared: Any, notes: Path) -> None:
    run = shared.engine.submit(chain(shared.reserve.s("well", "hotel"), shared.charge.s("well", 5)))
    assert run.get(timeout=30) == 5
    assert run.wait(timeout=10) == "succeeded"
    assert noted(notes, "well") == [["reserve", "hotel"], ["charge", 5]]


def test_failure_undoes_in_reverse_order(shared: Any, notes: Path) -> None:
    canvas = chain(
        shared.reserve.s("ill", "hotel"), shared.charge.s("ill", 5), shared.reserve.si("ill", "car"), shared.fail.s()
    )
    run = shared.engine.submit(canvas)
    with pytest.raises(ValueError, match="no"):
        run.get(timeout=30)
    assert run.wait(timeout=30) == "failed"
    assert noted(notes, "ill") == [
        ["reserve", "hotel"],
        ["charge", 5],
        ["reserve", "car"],
        ["release", "car", "CAR"],
        ["refund", 5, 5, {"reservation": "HOTEL"}],
        ["release", "hotel", "HOTEL"],
    ]
    undone = [s for s in run.steps() if s.kind == "compensation"]
    assert [s.status for s in undone] == ["succeeded"] * 3
    assert [s.compensates for s in undone] == [2, 1, 0]
    assert "rollback_started" in [h["event"] for h in run.history()]
    with pytest.raises(IllegalTransitionError, match="rolled back"):
        run.retry()


def test_members_of_a_group_are_undone(shared: Any, notes: Path) -> None:
    run = shared.engine.submit(group(shared.reserve.s("group", str(n)) for n in range(4)) | shared.fail.s())
    assert run.wait(timeout=30) == "failed"
    assert sorted(f[1] for f in noted(notes, "group") if f[0] == "release") == ["0", "1", "2", "3"]


def test_cancel_with_compensation(shared: Any, notes: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    run = shared.engine.submit(chain(shared.reserve.s("cancel", "hotel"), shared.until.si(str(go)), shared.plain.si(1)))
    wait_until(lambda: run.steps()[1].status == "running")
    run.cancel(compensate=True)
    assert run.status == "cancelling"
    go.touch()
    assert run.wait(timeout=30) == "cancelled"
    assert noted(notes, "cancel")[-1] == ["release", "hotel", "HOTEL"]


def test_cancel_without_compensation_undoes_nothing(shared: Any, notes: Path, tmp_path: Path) -> None:
    run = shared.engine.submit(chain(shared.reserve.s("keep", "hotel"), shared.plain.si(1).set(countdown=600)))
    wait_until(lambda: run.steps()[0].status == "succeeded")
    run.cancel()
    assert run.wait(timeout=30) == "cancelled"
    assert noted(notes, "keep") == [["reserve", "hotel"]]


def test_a_compensation_that_keeps_failing_is_stuck_and_can_be_retried(shared: Any, notes: Path) -> None:
    (notes / "stuck.broken").touch()
    canvas = chain(shared.reserve.s("stuck", "hotel"), shared.charge.s("stuck", 7), shared.fail.s())
    run = shared.engine.submit(canvas)
    assert run.wait(timeout=60) == "rollback_stuck"
    assert [f[0] for f in noted(notes, "stuck")].count("refund") == 4
    assert run in shared.engine.list(status="rollback_stuck")
    (notes / "stuck.broken").unlink()
    run.retry()
    assert run.wait(timeout=30) == "failed"
    assert noted(notes, "stuck")[-1] == ["release", "hotel", "HOTEL"]


@pytest.mark.parametrize(
    ("options", "retries"),
    [
        ({}, 10),
        ({"max_retries": 20}, 40),
        ({"max_retries": None}, 10),
        ({"autoretry_for": (OSError,), "retry_kwargs": {"max_retries": 8}}, 16),
        ({"byrd_retry": byrd.Retry(max_attempts=31)}, 60),
        ({"byrd_retry": byrd.Retry(max_attempts=None, budget=60)}, 10),
    ],
)
def test_a_compensation_is_more_patient_than_its_task(options: dict[str, Any], retries: int) -> None:
    app = Celery("patience", set_as_current=False)

    @app.task(base=byrd.SagaTask, shared=False, **options)
    def reserve() -> None: ...

    @reserve.compensation
    def release(_: Any) -> None: ...

    @app.task(base=byrd.SagaTask, shared=False, **options)
    def other() -> None: ...

    @other.compensation(max_retries=1)
    def undo_other(_: Any) -> None: ...

    assert (release.max_retries, undo_other.max_retries) == (retries, 1)
    app.close()


def test_one_compensation_per_task(shared: Any) -> None:
    with pytest.raises(ConfigurationError, match="compensation already"):
        shared.reserve.compensation(lambda result: None)


def test_a_rollback_outlives_its_worker(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    worker = cluster.worker(APP, env={"NOTES": str(tmp_path)}, concurrency=1)
    (tmp_path / "dying.broken").touch()
    run = app.engine.submit(chain(app.reserve.s("dying", "hotel"), app.charge.s("dying", 3), app.fail.s()))
    wait_until(lambda: ["refund", 3, 3, {"reservation": "HOTEL"}] in noted(tmp_path, "dying"))
    worker.kill()
    (tmp_path / "dying.broken").unlink()
    with cluster.redis() as client:
        client.flushall()
    cluster.worker(APP, env={"NOTES": str(tmp_path)}, concurrency=1)
    status = run.wait(timeout=60)
    if status == "rollback_stuck":  # the worker had used up the retries before it died
        run.retry()
        status = run.wait(timeout=60)
    assert status == "failed"
    assert noted(tmp_path, "dying")[-1] == ["release", "hotel", "HOTEL"]
    assert [s.status for s in run.steps() if s.kind == "compensation"] == ["succeeded", "succeeded"]
