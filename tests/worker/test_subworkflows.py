"""Workflows within workflows: their values, failures and ends, whatever dies meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import chain, group

import byrd
from byrd.errors import IllegalTransitionError, SubWorkflowError
from byrd.store import children, reading
from byrd.worker.keeper import Settings, Sweeper
from tests.cluster import Cluster, wait_until
from tests.invariants import check_database

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
    if not compensate:
        assert run.wait(timeout=10) == "cancelled"
    assert child.status == "cancelling"
    assert run.status == ("compensating" if compensate else "cancelled")  # it undoes the inner run first
    go.touch()
    assert run.wait(timeout=30) == "cancelled"
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


def test_a_retry_takes_up_a_run_that_is_still_being_cancelled(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    """It ends as cancelled only after the retry, which was for it, too."""
    cluster.worker(APP)
    go, noted = tmp_path / "go", tmp_path / "noted"
    run = nested.engine.submit(chain(nested.add.s(1, 1), nested.long.si(str(go), str(noted))))
    child = child_of(cluster, nested, run)
    wait_until(lambda: cluster.rows("SELECT 1 FROM byrd.steps WHERE task LIKE '%hold' AND status = 'running'"))
    wait_until(lambda: run.steps()[1].status == "ready")
    run.cancel()
    assert run.wait(timeout=10) == "cancelled"
    run.retry()
    parked = "SELECT 1 FROM byrd.steps WHERE task = 'byrd.workflow' AND status = 'ready' AND run_at = 'infinity'"
    wait_until(lambda: cluster.rows(parked), what="step that waits for the run that it began before")
    assert child.status == "cancelling"
    go.touch()
    assert run.get(timeout=30) == "held"
    assert child_of(cluster, nested, run).id == child.id
    assert [event["event"] for event in child.history() if event["event"] == "retried"] == ["retried"]


def test_one_that_passed_its_pivot_is_not_begun_anew(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    """A saga in it had undone itself before; but what was paid was paid."""
    cluster.worker(APP)
    path, go = tmp_path / "made", tmp_path / "go"
    run = nested.engine.submit(nested.half.si(str(path), str(go), "/nowhere/at/all", pays=True))
    child = child_of(cluster, nested, run)
    wait_until(lambda: {"paying", "-part"} <= set(made(path)))
    go.touch()
    assert run.wait(timeout=30) == "failed"
    assert child.status == "failed"
    run.retry()
    with pytest.raises(ValueError, match="is missing"):
        run.get(timeout=30)
    assert run.wait(timeout=30) == "failed"
    assert child_of(cluster, nested, run).id == child.id
    assert sorted(made(path)) == ["-part", "paid", "part", "paying"]


def test_one_that_was_undone_in_part_is_not_begun_anew_before_all_is(
    cluster: Cluster, nested: Any, tmp_path: Path
) -> None:
    cluster.worker(APP)
    path, go, needed = tmp_path / "made", tmp_path / "go", tmp_path / "needed"
    run = nested.engine.submit(nested.half.si(str(path), str(go), str(needed), pays=False))
    child = child_of(cluster, nested, run)
    wait_until(lambda: {"kept", "-part"} <= set(made(path)))
    run.cancel()
    go.touch()
    assert child.wait(timeout=30) == "cancelled"
    run.retry()
    with pytest.raises(SubWorkflowError, match="was cancelled"):
        run.get(timeout=30)
    assert run.wait(timeout=30) == "failed"
    # That failure is the outer run's: all that is left of the inner one is undone as a part of it.
    assert child.status == "cancelled"
    assert sorted(made(path)) == ["-kept", "-part", "kept", "part"]
    with pytest.raises(IllegalTransitionError, match="was rolled back"):
        run.retry()


def test_a_step_that_is_revoked_leaves_no_run_behind(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    run = nested.engine.submit(nested.long.si(str(tmp_path / "go"), str(tmp_path / "noted")))
    child = child_of(cluster, nested, run)
    [step] = run.steps()
    wait_until(lambda: run.steps()[0].status == "ready")
    wait_until(lambda: cluster.rows("SELECT 1 FROM byrd.steps WHERE task LIKE '%hold' AND status = 'running'"))
    nested.app.control.revoke(step.id)
    wait_until(lambda: child.status == "cancelling")
    assert run.status == "compensating"
    (tmp_path / "go").touch()
    assert run.wait(timeout=30) == "failed"
    assert child.status == "cancelled"
    assert lines(tmp_path / "noted") == 1, "what it had done is undone"


def test_one_with_nothing_to_undo_is_not_waited_for(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    run = nested.engine.submit(nested.holding.si(str(tmp_path / "go")))
    child = child_of(cluster, nested, run)
    wait_until(lambda: run.steps()[0].status == "ready")
    nested.app.control.revoke(run.steps()[0].id)
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
    assert store.run(children.tell_parents) == (1, [])
    assert store.run(children.tell_parents) == (0, [])
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


# -- undone as a part of the run around it ---------------------------------------------------------


def made(path: Path) -> list[str]:
    """What was made, and undone, in order."""
    return path.read_text().split() if path.exists() else []


def test_a_rollback_undoes_workflows_within_that_had_succeeded(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    cluster.worker(APP, concurrency=1)
    path = str(tmp_path / "made")
    canvas = chain(
        nested.make.si(path, "first"), nested.tour.si(path, "t"), nested.inner.si(1, 2), nested.paid.si(path, "kept"),
        nested.make.si(path, "last"), nested.need.si(str(tmp_path / "nothing")),
    )  # fmt: skip
    run = nested.engine.submit(canvas)
    assert run.wait(timeout=60) == "failed"
    # The inner run that passed its pivot keeps what it has done; what undoes the others waits for their rollbacks.
    assert made(tmp_path / "made") == [
        "first", "t0", "t1", "t2", "kept", "paid", "last", "-last", "-t2", "-t1", "-t0", "-first",
    ]  # fmt: skip
    assert {step.compensates for step in run.steps() if step.kind == "compensation"} == {0, 1, 4}
    assert {name: status for _, name, status in children_of(cluster, run)} == {
        "nested.tour": "cancelled", "nested.inner": "succeeded", "nested.paid": "succeeded",
    }  # fmt: skip
    [asked] = [e for e in child_of_workflow(nested, "nested.tour").history() if e["event"] == "rollback_requested"]
    assert asked["detail"]["by"] == f"run {run.id}"
    assert "is missing" in asked["detail"]["reason"]
    check_database(cluster.database_url)


def child_of_workflow(nested: Any, workflow: str) -> Any:
    [found] = nested.engine.list(workflow=workflow)
    return nested.engine.get(found.id)


def test_a_run_that_only_has_workflows_within_is_rolled_back_on_purpose(
    cluster: Cluster, nested: Any, tmp_path: Path
) -> None:
    cluster.worker(APP)
    path = str(tmp_path / "made")
    run = nested.engine.submit(group(nested.trip.si(path, "a"), nested.inner.si(1, 2)))
    assert run.wait(timeout=30) == "succeeded"
    with pytest.raises(IllegalTransitionError, match="nothing to undo"):
        child_of_workflow(nested, "nested.inner").rollback()
    run.rollback(reason="no more wanted", by="ann")
    assert run.wait(timeout=30) == "cancelled"
    assert made(tmp_path / "made") == ["a1", "a2", "-a2", "-a1"]
    with pytest.raises(IllegalTransitionError, match="nothing to undo"):
        child_of_workflow(nested, "nested.trip").rollback()


def test_one_that_is_rolled_back_by_itself_after_its_step_has_ended_is_not_undone_again(
    cluster: Cluster, nested: Any, tmp_path: Path
) -> None:
    """The outer run keeps the value, and goes on; what it undoes later is the rest."""
    cluster.worker(APP)
    path, go = str(tmp_path / "made"), tmp_path / "go"
    run = nested.engine.submit(
        chain(nested.make.si(path, "first"), nested.trip.si(path, "a"), nested.hold.si(str(go)), nested.need.si("/no"))
    )
    wait_until(lambda: any(step.task == f"{APP}.hold" and step.status == "running" for step in run.steps()))
    trip = child_of_workflow(nested, "nested.trip")
    trip.rollback(reason="not this one", by="ann")
    assert trip.wait(timeout=30) == "cancelled"
    assert made(tmp_path / "made") == ["first", "a1", "a2", "-a2", "-a1"]
    assert run.status == "running"
    go.touch()
    assert run.wait(timeout=30) == "failed"
    assert made(tmp_path / "made") == ["first", "a1", "a2", "-a2", "-a1", "-first"]
    check_database(cluster.database_url)


def test_one_that_is_rolled_back_by_itself_while_it_is_paused_fails_its_step(
    cluster: Cluster, nested: Any, tmp_path: Path
) -> None:
    cluster.worker(APP)
    path, go = str(tmp_path / "made"), tmp_path / "go"
    run = nested.engine.submit(chain(nested.make.si(path, "first"), nested.stay.si(path, str(go))))
    wait_until(lambda: "stay" in made(tmp_path / "made"))
    child = child_of_workflow(nested, "nested.stay")
    child.pause()
    child.rollback(reason="not this one", by="ann")
    go.touch()
    with pytest.raises(SubWorkflowError, match="was cancelled"):
        run.get(timeout=30)
    assert run.wait(timeout=30) == "failed"
    assert made(tmp_path / "made") == ["first", "stay", "-stay", "-first"]
    check_database(cluster.database_url)


def test_a_saga_that_fails_stops_and_undoes_the_workflows_in_it(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    cluster.worker(APP, concurrency=2)
    path, go, needed = str(tmp_path / "made"), tmp_path / "go", tmp_path / "needed"
    inside = group(nested.stay.si(path, str(go)), chain(nested.hold.si(str(needed)), nested.need.si("/nowhere/at/all")))
    run = nested.engine.submit(chain(nested.make.si(path, "kept"), byrd.saga(inside).on_error(nested.note.si(path))))
    wait_until(lambda: "stay" in made(tmp_path / "made"))
    needed.touch()
    child = child_of_workflow(nested, "nested.stay")
    wait_until(lambda: child.status == "cancelling")
    assert run.status == "running"
    go.touch()
    assert run.wait(timeout=30) == "failed"
    assert child.status == "cancelled"
    assert [line for line in made(tmp_path / "made") if "-" not in line[1:]] == ["kept", "stay", "-stay", "-kept"]


def test_workers_die_while_a_workflow_within_is_undone(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    path = tmp_path / "made"
    hold = tmp_path / "made.hold"
    hold.touch()
    worker = cluster.worker(APP, concurrency=1)
    run = nested.engine.submit(chain(nested.trip.si(str(path), "a"), nested.need.si(str(tmp_path / "nothing"))))
    child = child_of(cluster, nested, run)
    wait_until(lambda: child.status == "compensating")
    wait_until(lambda: any("waits for run" in said and "is compensating" in said for said in run.why()))
    running = "SELECT 1 FROM byrd.steps WHERE kind = 'compensation' AND status = 'running'"
    wait_until(lambda: cluster.rows(running), what="the compensation in the inner run")
    worker.kill()
    hold.unlink()
    cluster.worker(APP, concurrency=1)
    assert run.wait(timeout=60) == "failed"
    assert child.status == "cancelled"
    assert made(path) == ["a1", "a2", "-a2", "-a1"]
    check_database(cluster.database_url)


@pytest.mark.parametrize("who", ["outer", "inner"])
def test_a_rollback_is_stuck_where_one_within_it_is(cluster: Cluster, nested: Any, tmp_path: Path, who: str) -> None:
    cluster.worker(APP, concurrency=1)
    path, needed = str(tmp_path / "made"), tmp_path / "needed"
    run = nested.engine.submit(
        chain(nested.make.si(path, "first"), nested.trip.si(path, "a", str(needed)), nested.need.si("/nowhere/at/all"))
    )
    child = child_of(cluster, nested, run)
    wait_until(lambda: run.status == "rollback_stuck")
    assert child.status == "rollback_stuck"
    assert made(tmp_path / "made") == ["first", "a1", "a2", "-a2"]
    assert f"see `byrd why {child.id[:8]}`" in run.why()[0]
    run.retry()  # it is stuck there as before
    wait_until(lambda: len([e for e in run.history() if e["event"] == "rollback_stuck"]) == 2)
    assert len([e for e in child.history() if e["event"] == "rollback_stuck"]) == 2
    needed.touch()
    (run if who == "outer" else child).retry()
    wait_until(lambda: run.status == "failed", what="the outer run to go on")
    assert child.status == "cancelled"
    assert made(tmp_path / "made") == ["first", "a1", "a2", "-a2", "-a1", "-first"]
    check_database(cluster.database_url)


def test_one_that_is_let_be_is_let_be(cluster: Cluster, nested: Any, tmp_path: Path) -> None:
    cluster.worker(APP, concurrency=1)
    path = str(tmp_path / "made")
    run = nested.engine.submit(
        chain(nested.make.si(path, "first"), nested.trip.si(path, "a", "/nowhere"), nested.need.si("/nowhere/at/all"))
    )
    wait_until(lambda: run.status == "rollback_stuck")
    [stuck] = [step for step in run.steps() if step.kind == "compensation" and step.status == "failed"]
    run.skip(stuck.no, reason="a1 may stay")
    assert run.wait(timeout=30) == "failed"
    assert made(tmp_path / "made") == ["first", "a1", "a2", "-a2", "-first"]
    child = child_of(cluster, nested, run)
    assert child.status == "rollback_stuck"
    [stuck] = [step for step in child.steps() if step.kind == "compensation" and step.status == "failed"]
    child.done_by_hand(stuck.no, note="done")
    assert child.wait(timeout=30) == "cancelled"
    assert run.status == "failed"
    check_database(cluster.database_url)
