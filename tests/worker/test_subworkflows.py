"""Workflows within workflows: their values, failures and ends, whatever dies meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import chain, group

from byrd.errors import SubWorkflowError
from byrd.store import children, reading
from byrd.worker.keeper import Settings, Sweeper
from tests.cluster import Cluster, wait_until

APP = "tests.apps.nested"


@pytest.fixture
def nested(cluster: Cluster) -> Any:
    return cluster.app(APP)


def children_of(cluster: Cluster, run: Any) -> list[tuple[str, str, str]]:
    return cluster.rows(
        f"""SELECT c.id::text, c.workflow, c.status FROM byrd.runs c JOIN byrd.steps s ON s.id = c.parent_step
            WHERE s.run_id = '{run.id}' ORDER BY s.no"""
    )


def child_of(cluster: Cluster, nested: Any, run: Any) -> Any:
    [(run_id, _, _)] = wait_until(lambda: children_of(cluster, run), what="run of the inner workflow")
    return nested.engine.get(run_id)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_three_levels_in_a_worker_with_one_process(cluster: Cluster, nested: Any) -> None:
    cluster.worker(APP, concurrency=1)
    run = nested.outer.submit(5)
    assert run.get(timeout=30) == 15
    assert [row[1:] for row in children_of(cluster, run)] == [
        ("nested.inner", "succeeded"),
        ("nested.middle", "succeeded"),
    ]
    assert len(nested.engine.list(limit=10)) == 4
    for path in ("nested.inner", "nested.middle"):
        assert {found.status for found in nested.engine.list(workflow=path)} == {"succeeded"}


def test_fifty_at_once(cluster: Cluster, nested: Any) -> None:
    cluster.worker(APP, concurrency=2)
    run = nested.engine.submit(group(nested.inner.s(n, n) for n in range(50)))
    assert run.get(timeout=60) == [2 * n + 1 for n in range(50)]
    assert cluster.rows("SELECT count(*) FROM byrd.runs WHERE parent_step IS NOT NULL AND parent_told") == [(50,)]


def test_a_failure_is_passed_on_and_a_retry_keeps_what_succeeded(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    noted, needed = tmp_path / "noted", tmp_path / "needed"
    run = nested.engine.submit(chain(nested.add.s(1, 1), nested.fragile.si(str(noted), str(needed))))
    with pytest.raises(ValueError, match="needed is missing"):
        run.get(timeout=30)
    assert run.wait(timeout=30) == "failed"
    child = child_of(cluster, nested, run)
    assert child.status == "failed"
    run.retry()
    with pytest.raises(ValueError, match="needed is missing"):
        run.get(timeout=30)
    wait_until(lambda: run.status == "failed")
    needed.touch()
    run.retry()
    assert run.get(timeout=30) == "well"
    assert child_of(cluster, nested, run).id == child.id
    assert lines(noted) == 1, "it had succeeded"
    assert [event["event"] for event in child.history() if event["event"] == "retried"] == ["retried"] * 2


@pytest.mark.parametrize("compensate", [False, True])
def test_a_cancel_is_passed_on(cluster: Cluster, nested: Any, tmp_path: Path, *, compensate: bool) -> None:
    cluster.worker(APP)
    go, noted = tmp_path / "go", tmp_path / "noted"
    run = nested.engine.submit(chain(nested.add.s(1, 1), nested.long.si(str(go), str(noted))))
    child = child_of(cluster, nested, run)
    wait_until(lambda: cluster.rows("SELECT 1 FROM byrd.steps WHERE task LIKE '%hold' AND status = 'running'"))
    run.cancel(compensate=compensate, by="ann")
    assert run.wait(timeout=10) == "cancelled"
    assert child.status == "cancelling"
    go.touch()
    assert child.wait(timeout=30) == "cancelled"
    assert lines(noted) == int(compensate)
    assert f"run {run.id}" in str(child.history())


def test_one_that_is_cancelled_by_itself_fails_its_step(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    run = nested.engine.submit(nested.long.si(str(tmp_path / "go"), str(tmp_path / "noted")))
    child = child_of(cluster, nested, run)
    wait_until(lambda: "waits for run" in " ".join(run.why()), what=lambda: f"sentence that says so, but {run.why()}")
    assert f"waits for run {child.id[:8]} of workflow 'nested.long', which is running" in run.why()[0]
    child.cancel()
    (tmp_path / "go").touch()
    with pytest.raises(SubWorkflowError, match="was cancelled"):
        run.get(timeout=30)


def test_one_that_was_rolled_back_is_begun_anew(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    run = nested.engine.submit(nested.long.si(str(tmp_path / "go"), str(tmp_path / "noted")))
    child = child_of(cluster, nested, run)
    wait_until(lambda: cluster.rows("SELECT 1 FROM byrd.steps WHERE task LIKE '%hold' AND status = 'running'"))
    child.cancel(compensate=True)
    (tmp_path / "go").touch()
    assert child.wait(timeout=30) == "cancelled"
    wait_until(lambda: run.status == "failed")
    run.retry()
    assert run.get(timeout=30) == "held"
    assert child_of(cluster, nested, run).id != child.id


def test_a_step_that_is_revoked_leaves_no_run_behind(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    run = nested.engine.submit(nested.long.si(str(tmp_path / "go"), str(tmp_path / "noted")))
    child = child_of(cluster, nested, run)
    [step] = run.steps()
    wait_until(lambda: run.steps()[0].status == "ready")
    nested.app.control.revoke(step.id)
    assert run.wait(timeout=30) == "failed"
    wait_until(lambda: child.status == "cancelling")
    (tmp_path / "go").touch()
    assert child.wait(timeout=30) == "cancelled"


def test_workers_die_on_both_levels(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = cluster.worker(APP, concurrency=4)  # the runs that began first hold a process each
    run = nested.engine.submit(
        chain(group(nested.long.si(str(go), str(tmp_path / f"{n}")) for n in range(3)), nested.note.si(str(go), "end"))
    )
    wait_until(lambda: len(children_of(cluster, run)) == 3)
    first.kill()
    go.touch()
    cluster.worker(APP)
    assert run.get(timeout=60) == "end"
    assert cluster.rows("SELECT count(*) FROM byrd.runs") == [(4,)]


def test_a_pause_of_the_outer_run_holds_what_comes_after(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    run = nested.engine.submit(chain(nested.long.si(str(tmp_path / "go"), str(tmp_path / "n")), nested.note.si("", 1)))
    child = child_of(cluster, nested, run)
    wait_until(lambda: run.steps()[0].status == "ready")
    run.pause()
    (tmp_path / "go").touch()
    assert child.wait(timeout=30) == "succeeded"
    wait_until(lambda: cluster.rows("SELECT 1 FROM byrd.runs WHERE parent_told"))
    assert run.steps()[0].status == "ready"
    run.resume()
    wait_until(lambda: run.steps()[0].status == "succeeded")


def test_the_end_of_a_run_is_told_twice(cluster: Cluster, nested: Any) -> None:
    """Whoever tells a step may die before that is on record."""
    run = nested.engine.submit(nested.inner.si(1, 2))
    store = nested.engine.runtime.store
    cluster.worker(APP)
    assert run.get(timeout=30) == 4
    before = cluster.rows("SELECT * FROM byrd.steps ORDER BY id")
    cluster.rows("UPDATE byrd.runs SET parent_told = false WHERE parent_step IS NOT NULL RETURNING 1")
    assert store.run(children.tell_parents) == 1
    assert store.run(children.tell_parents) == 0
    assert cluster.rows("SELECT * FROM byrd.steps ORDER BY id") == before


def test_called_outside_a_run(nested: Any) -> None:
    with pytest.raises(SubWorkflowError, match=r"submit the canvas with engine\.submit"):
        nested.inner.s(1, 2).apply(throw=True).get()


def test_abandoned_runs_are_found_by_an_index(cluster: Cluster, nested: Any) -> None:
    run = nested.engine.submit(nested.inner.si(1, 2))
    store = nested.engine.runtime.store
    assert store.run(children.abandoned) == []
    cluster.worker(APP)
    run.get(timeout=30)
    child = child_of(cluster, nested, run)
    cluster.rows(f"UPDATE byrd.runs SET status = 'running', finished_at = NULL WHERE id = '{child.id}' RETURNING 1")
    assert store.run(children.abandoned) == [(child.id, run.id)]
    sweeper = Sweeper(nested.engine.runtime, Settings())
    try:
        sweeper.stop_abandoned()
    finally:
        sweeper.stop()
    assert store.run(reading.get, child.id).status == "cancelled"
