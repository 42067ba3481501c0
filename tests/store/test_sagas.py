"""Sagas in the store: nested ones, pivots, parallel undo, what may have taken effect, and what an operator does."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy.exc import DBAPIError

import byrd
from byrd.canvas import Plan, compile_canvas
from byrd.errors import CanvasError, IllegalTransitionError, StepCancelled
from byrd.model import StepKind
from byrd.store import Claim, Store, growth, plans, progress, reading, runs, sagas, steps, sweeps, timeouts, undo, waits
from byrd.store.rows import query
from tests.store.world import ERROR, World, app, plan_of, sig


@pytest.fixture
def world(store: Store) -> Any:
    """A driver whose tables must be right at the end."""
    found = World(store)
    yield found
    found.check()


def undone(world: World) -> list[str]:
    """Return the compensations that were run, in order."""
    return [name for name in world.ran if name.startswith("undo_")]


def break_off(world: World, claim: Claim, how: str) -> None:
    """End an attempt that may have taken effect: its worker is lost, or hands it back."""
    if how == "lost":
        world.do(steps.preempt, world.worker_id, reason="gone")
    else:
        world.do(steps.hand_back, claim.id, claim.attempt)


def events(world: World, run: str) -> list[str]:
    return [row.event for row in world.sql("SELECT event FROM byrd.events WHERE run_id = %(r)s ORDER BY id", r=run)]


# ------------------------------------------------------------------------------------------------- the plan


def test_a_saga_is_a_step_whose_steps_know_it() -> None:
    plan = compile_canvas(chain(sig("a"), byrd.saga(sig("b"), sig("c")), sig("d")), app)
    assert [(s.no, s.kind, s.after, s.input, s.into, s.saga) for s in plan.steps] == [
        (0, StepKind.TASK, None, None, None, None),
        (1, StepKind.SAGA, 0, None, None, None),
        (2, StepKind.TASK, 0, 0, None, 1),
        (3, StepKind.TASK, 2, 2, 1, 1),
        (4, StepKind.TASK, 1, 1, None, None),
    ]
    assert plan.output == 4


def test_sagas_nest_and_stand_anywhere() -> None:
    canvas = byrd.saga(sig("a"), chord([byrd.saga(sig("b")), sig("c")], byrd.saga(sig("d"))))
    plan = compile_canvas(canvas, app)
    inside = {s.task: s.saga for s in plan.steps if s.kind is StepKind.TASK}
    kinds = {s.no: s.saga for s in plan.steps if s.kind is StepKind.SAGA}
    assert inside["a"] == inside["c"] == 0
    assert kinds[inside["b"] or -1] == 0
    assert kinds[inside["d"] or -1] == 0
    assert plan.output == 0


def test_a_saga_goes_through_json() -> None:
    written = json.loads(json.dumps(chain(sig("a"), byrd.saga(sig("b"), group(sig("c"), sig("d"))))))
    plan, again = (
        compile_canvas(written, app),
        compile_canvas(chain(sig("a"), byrd.saga(sig("b"), group(sig("c"), sig("d")))), app),
    )
    assert [(s.kind, s.after, s.saga) for s in plan.steps] == [(s.kind, s.after, s.saga) for s in again.steps]


def test_callbacks_belong_to_a_saga_and_errbacks_do_not() -> None:
    plan = compile_canvas(byrd.saga(sig("a", link=sig("told"), link_error=sig("oops"))), app)
    assert {s.task: s.saga for s in plan.steps} == {"byrd.saga": None, "a": 0, "told": 0, "oops": None}


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (byrd.saga, "takes the parts"),
        (lambda: byrd.saga(1), "no part of a canvas"),
        (lambda: sig("a", link_error=byrd.saga(sig("b"))), "an errback cannot be a saga"),
        (lambda: sig("byrd.saga"), "without a canvas"),
    ],
    ids=["empty", "a number", "an errback", "by hand"],
)
def test_what_is_no_saga_is_refused(build: Any, says: str) -> None:
    with pytest.raises(CanvasError, match=says):
        compile_canvas(build(), app)


def test_items_that_are_not_undone_are_not_read_for_the_plan_of_a_rollback(world: World) -> None:
    """There may be millions of them."""
    run = world.submit(chain(sig("saga_a"), sig("b"), sig("saga_c"), sig("d")))
    for task in ("saga_a", "b", "saga_c"):
        world.settle(world.claim(run, task))
    with world.store.engine.connect() as conn:  # rolled back: it has no each that these are items of
        query(
            conn,
            """INSERT INTO byrd.steps (id, run_id, no, kind, task, queue, options, join_no, join_pos, status, result,
                                       finished_at, compensation)
               SELECT gen_random_uuid()::text, %(run)s, 100 + g, 'item', 'item', 'work', '{}', 1, g, 'succeeded', '1',
                      now(), CASE g WHEN 7 THEN '{"task": "undo_item"}' END FROM generate_series(1, 20000) g""",
            {"run": run},
        )
        tracemalloc.start()
        try:
            assert undo.plan(conn, run) == 3
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        sql = "SELECT compensates, rank FROM byrd.steps WHERE run_id = %(run)s AND rank > 0 ORDER BY rank"
        ranks = query(conn, sql, {"run": run}).all()
    assert [tuple(row) for row in ranks] == [(2, 1), (107, 2), (0, 3)]
    assert peak < 2**20, peak


# ------------------------------------------------------------------------------------------------- nested sagas


def test_a_saga_that_succeeds_has_the_value_of_its_canvas(world: World) -> None:
    run = world.submit(chain(sig("a"), byrd.saga(sig("saga_b"), sig("c")), sig("d")))
    assert world.drive(run).status == "succeeded"
    assert world.step(run, "byrd.saga").result == '"c"'
    assert world.ran == ["a", "saga_b", "c", "d"]


def test_one_that_fails_undoes_itself_and_then_fails(world: World) -> None:
    world.failing = {"bad"}
    inner = byrd.saga(sig("saga_b"), sig("saga_c"), sig("bad"))
    run = world.submit(chain(sig("saga_a"), inner.on_error(sig("oops")), sig("d")))
    row = world.drive(run)
    assert (row.status, row.error) == ("failed", ERROR)
    # The errback of the saga comes when it has undone itself, and before the run's own rollback.
    assert world.ran == ["saga_a", "saga_b", "saga_c", "bad", "undo_saga_c", "undo_saga_b", "oops", "undo_saga_a"]
    assert world.step(run, "byrd.saga").error == ERROR
    assert world.statuses(run)["d"] == "skipped"


def test_one_that_succeeded_is_undone_as_a_part_of_what_is_around_it(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(byrd.saga(sig("saga_a"), byrd.saga(sig("saga_b"), sig("saga_c")), sig("saga_d"), sig("bad")))
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_d", "undo_saga_c", "undo_saga_b", "undo_saga_a"]
    assert {s.saga for s in world.steps(run) if s.kind == "compensation"} == {0}


def test_each_saga_that_fails_undoes_what_is_its_own_once(world: World) -> None:
    world.failing = {"bad"}
    innermost = byrd.saga(sig("saga_c"), sig("bad"))
    run = world.submit(chain(sig("saga_a"), byrd.saga(sig("saga_b"), innermost)))
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_c", "undo_saga_b", "undo_saga_a"]
    assert len({s.saga for s in world.steps(run) if s.kind == "compensation"}) == 3


def test_members_beside_a_saga_that_fails_go_on(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(group(byrd.saga(sig("saga_a"), sig("bad")), chain(sig("saga_x"), sig("y"))) | sig("after"))
    for name in ("saga_a", "bad"):
        world.settle(world.claim(run, name))
    world.end_waits()
    assert world.run(run).status == "running"
    world.settle(world.claim(run, "undo_saga_a"))
    world.end_waits()
    assert world.statuses(run)["byrd.saga"] == "failed"
    assert world.drive(run).status == "failed"
    assert world.ran[3:] == ["saga_x", "y", "undo_saga_x"]


def test_what_has_not_started_in_a_saga_that_fails_never_does(world: World) -> None:
    world.failing = {"bad"}
    inner = byrd.saga(group(sig("bad"), chain(sig("saga_x"), sig("y"))), byrd.saga(sig("z")), byrd.wait_for("ok"))
    run = world.submit(inner)
    world.settle(world.claim(run, "bad"))
    world.end_waits()
    assert world.run(run).status == "failed"
    assert world.statuses(run)["saga_x"] == "cancelled"
    assert world.ran == ["bad"]


def test_what_runs_in_a_saga_that_fails_is_told_to_stop_and_awaited(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(byrd.saga(group(sig("bad"), sig("saga_x"), sig("saga_y"))))
    x, y = world.claim(run, "saga_x"), world.claim(run, "saga_y")
    assert world.do(progress.stop_reason, x.id, x.attempt) is None
    world.settle(world.claim(run, "bad"))
    assert isinstance(world.do(progress.stop_reason, x.id, x.attempt), StepCancelled)
    world.end_waits()
    assert world.run(run).status == "running"
    world.settle(x)
    world.end_waits()
    assert world.step(run, "byrd.saga").status == "waiting"
    world.do(steps.abandon, y.id, y.attempt)
    world.end_waits()
    # The one that was stopped may have done something: nobody knows.
    assert {s.compensates for s in world.steps(run) if s.kind == "compensation"} == {x.no, y.no}
    assert world.drive(run).status == "failed"
    assert sorted(undone(world)) == ["undo_saga_x", "undo_saga_y"]


@pytest.mark.parametrize(("timeout", "status"), [("heartbeat", "cancelled"), ("start_to_close", "failed")])
def test_a_step_that_hangs_in_a_saga_that_fails_is_fenced_and_undone(world: World, timeout: str, status: str) -> None:
    world.failing = {"bad"}
    run = world.submit(chain(byrd.saga(group(sig("bad"), chain(sig("saga_a"), sig("saga_b")))), sig("after")))
    world.settle(world.claim(run, "saga_a"))
    hangs = world.claim(run, "saga_b")
    options = json.dumps({"byrd_timeouts": {timeout: 1e-6}})
    world.sql("UPDATE byrd.steps SET options = %(o)s WHERE id = %(id)s", o=options, id=hangs.id)
    world.settle(world.claim(run, "bad"))
    world.end_waits()
    assert world.step(run, "byrd.saga").status == "waiting"
    assert not undone(world), "it may still be at work"
    world.do(timeouts.time_out, hangs.id, hangs.attempt)
    world.check()
    world.end_waits()
    assert world.step(run, "saga_b").status == status
    assert world.stale(steps.complete, hangs.id, hangs.attempt, "1")
    assert world.stale(progress.remember, hangs.id, hangs.attempt, "step:x", "1")
    assert world.do(undo.compensated_call, world.step(run, "undo_saga_b").id).result is None
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_b", "undo_saga_a"]
    assert world.step(run, "byrd.saga").error == ERROR


def test_a_step_that_comes_back_ready_in_a_saga_that_failed_is_cancelled_and_undone(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(byrd.saga(group(sig("bad"), sig("saga_x"))))
    world.claim(run, "saga_x")
    world.settle(world.claim(run, "bad"))
    world.end_waits()
    world.do(steps.preempt, world.worker_id, reason="gone")
    step = world.step(run, "saga_x")
    assert step.status == "ready"
    assert world.try_claim(step.id, step.attempt) is None
    world.end_waits()
    assert world.step(run, "saga_x").status == "cancelled"
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_x"]


def test_a_step_replaced_in_a_saga_leaves_its_canvas_there(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(chain(byrd.saga(sig("saga_a"), sig("x"), sig("bad")), sig("d")))
    world.settle(world.claim(run, "saga_a"))
    claim = world.claim(run, "x")
    world.do(growth.replace, claim.id, claim.attempt, plan_of(chain(sig("saga_new"), sig("more"))))
    assert world.step(run, "saga_new").saga == world.step(run, "saga_a").saga
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_new", "undo_saga_a"]


def test_nothing_is_put_in_the_place_of_a_step_whose_saga_has_failed(world: World) -> None:
    run = world.submit(byrd.saga(group(sig("bad"), sig("x"))))
    world.failing = {"bad"}
    claim = world.claim(run, "x")
    world.settle(world.claim(run, "bad"))
    with pytest.raises(StepCancelled, match="its saga has failed"):
        world.do(growth.replace, claim.id, claim.attempt, plan_of(sig("new")))
    world.settle(claim)
    assert world.drive(run).status == "failed"


def test_an_empty_group_in_a_saga(world: World) -> None:
    run = world.submit(byrd.saga(group([], app=app)))
    assert world.drive(run).status == "succeeded"
    assert world.result(run) == []


def test_a_run_that_is_cancelled_lets_a_saga_finish_its_rollback(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(group(byrd.saga(sig("saga_a"), sig("bad")), chain(sig("saga_x"), sig("y"))))
    for name in ("saga_a", "saga_x", "bad"):
        world.settle(world.claim(run, name))
    world.end_waits()
    world.do(runs.cancel, run)
    assert world.run(run).status == "cancelling"
    assert world.drive(run).status == "cancelled"
    assert undone(world) == ["undo_saga_a"]


def test_a_pause_holds_a_rollback_and_a_resume_goes_on_with_it(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(byrd.saga(sig("saga_a"), sig("saga_b"), sig("bad")))
    world.drive(run, until=["bad"])
    world.do(runs.pause, run)
    assert world.drive(run).status == "paused"
    world.check()
    world.do(runs.resume, run)
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_b", "undo_saga_a"]


def test_celerys_revoke_of_a_saga_changes_nothing(world: World) -> None:
    """It is no task; while it waits for its undoing, nobody else would see to the end of that."""
    world.failing = {"bad"}
    run = world.submit(chain(byrd.saga(sig("saga_a"), sig("bad")), sig("c")))
    saga = world.step(run, "byrd.saga")
    for names in ((), ("saga_a", "bad")):
        for name in names:
            world.settle(world.claim(run, name))
        world.end_waits()
        before = world.rows()
        assert world.do(steps.revoke_waiting, saga.id) == []
        assert world.rows() == before
    assert world.step(run, "byrd.saga").status == "waiting"
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_a"]
    assert world.step(run, "byrd.saga").error == ERROR


def test_a_run_with_a_saga_that_failed_without_undoing_anything_can_be_retried(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(chain(sig("a"), byrd.saga(sig("b"), sig("bad"))))
    assert world.drive(run).status == "failed"
    world.failing = set()
    world.do(runs.retry, run)
    assert world.drive(run).status == "succeeded"
    assert world.ran == ["a", "b", "bad", "bad"]


# ------------------------------------------------------------------------------------------------- parallel undo


def ranks(world: World, run: str) -> dict[str, int | None]:
    return {s.task or "": s.rank for s in world.steps(run) if s.kind == "compensation"}


def test_members_of_a_group_are_undone_side_by_side(world: World) -> None:
    world.failing = {"bad"}
    members = group(sig("saga_b"), chain(sig("saga_c1"), sig("saga_c2")), sig("x"))
    run = world.submit(chain(sig("saga_a"), members, sig("saga_d"), sig("bad")))
    world.drive(run, until=["bad"])
    assert ranks(world, run) == {
        "undo_saga_d": 1, "undo_saga_b": 2, "undo_saga_c2": 2, "undo_saga_c1": 3, "undo_saga_a": 4,
    }  # fmt: skip
    world.settle(world.claim(run, "undo_saga_d"))
    b, c2 = world.claim(run, "undo_saga_b"), world.claim(run, "undo_saga_c2")
    world.settle(b)
    assert world.statuses(run)["undo_saga_c1"] == "pending"
    world.settle(c2)
    assert world.statuses(run)["undo_saga_c1"] == "ready"
    assert world.drive(run).status == "failed"


def test_two_that_end_at_once_release_what_follows_once(store: Store, world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(chain(sig("saga_a"), group(sig("saga_b"), sig("saga_c")), sig("bad")))
    world.drive(run, until=["bad"])
    first, second = world.claim(run, "undo_saga_b"), world.claim(run, "undo_saga_c")
    with store.engine.begin() as one:
        steps.complete(one, first.id, first.attempt, "null")
        other = store.engine.connect()
        other.exec_driver_sql("SET LOCAL lock_timeout = '200ms'")
        with pytest.raises(DBAPIError, match="timeout"):
            steps.complete(other, second.id, second.attempt, "null")
        other.close()
    assert world.statuses(run)["undo_saga_a"] == "pending"
    world.settle(second)
    assert world.statuses(run)["undo_saga_a"] == "ready"
    world.drive(run)


def test_what_took_a_steps_place_is_undone_before_what_came_before_it(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(chain(sig("saga_a"), sig("x"), sig("bad")))
    world.settle(world.claim(run, "saga_a"))
    claim = world.claim(run, "x")
    world.do(growth.replace, claim.id, claim.attempt, plan_of(group(sig("saga_n1"), chain(sig("p"), sig("saga_n2")))))
    world.drive(run, until=["bad"])
    assert ranks(world, run) == {"undo_saga_n1": 1, "undo_saga_n2": 1, "undo_saga_a": 2}
    world.drive(run)


def test_ranks_of_a_long_chain_take_no_time_to_speak_of() -> None:
    edges = [(no, no - 1 if no else None, None) for no in range(20_000)]
    found = undo._ranks(edges, range(0, 20_000, 2))
    assert (found[0], found[19_998]) == (10_000, 1)


# ------------------------------------------------------------------------------------------------- marks


def fail_for_good(world: World, run: str, name: str) -> int:
    """Fail a step until it is not tried again; return how often it was."""
    tries = 0
    while world.step(run, name).status in ("ready", "running"):
        world.sql("UPDATE byrd.steps SET run_at = now(), wake_at = now() WHERE status = 'ready'")
        claim = world.claim(run, name)
        world.do(steps.fail, claim.id, claim.attempt, ERROR)
        tries += 1
        world.check()
    return tries


def test_after_a_pivot_nothing_is_rolled_back(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), sig("pivot"), sig("bad"), sig("after")))
    world.drive(run, until=["pivot"])
    assert world.run(run).pivot == 1
    assert fail_for_good(world, run, "bad") == steps.PATIENCE + 1
    assert world.run(run).status == "failed"
    assert not [s for s in world.steps(run) if s.kind == "compensation"]
    # An operator can go on, and the patience is as long as before.
    world.do(runs.retry, run)
    assert fail_for_good(world, run, "bad") == steps.PATIENCE + 1
    world.do(runs.retry, run)
    assert world.drive(run).status == "succeeded"


def test_pauses_after_a_pivot_grow(world: World) -> None:
    run = world.submit(chain(sig("pivot"), sig("bad")))
    world.drive(run, until=["pivot"])
    pauses = []
    for _ in range(steps.PATIENCE):
        claim = world.claim(run, "bad")
        world.do(steps.fail, claim.id, claim.attempt, ERROR)
        [row] = world.sql("SELECT extract(epoch FROM run_at - clock_timestamp()) AS pause FROM byrd.steps WHERE no = 1")
        pauses.append(round(row.pause))
        world.sql("UPDATE byrd.steps SET run_at = now(), wake_at = now() WHERE no = 1")
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    world.failing = set()
    assert world.drive(run).status == "succeeded"


def test_before_its_pivot_a_run_is_rolled_back(world: World) -> None:
    world.failing = {"pivot"}
    run = world.submit(chain(sig("saga_a"), sig("pivot"), sig("after")))
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_a"]


def test_a_pivot_inside_a_saga_holds_for_the_whole_run(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), byrd.saga(sig("saga_b"), sig("pivot"), sig("bad"))))
    world.drive(run, until=["pivot"])
    fail_for_good(world, run, "bad")
    world.end_waits()
    assert world.run(run).status == "failed"
    assert world.step(run, "byrd.saga").status == "failed"
    assert not [s for s in world.steps(run) if s.kind == "compensation"]
    world.do(runs.retry, run)
    assert world.drive(run).status == "succeeded"


def test_a_pivot_that_succeeds_last_of_all_still_counts(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(group(chain(sig("saga_a"), sig("pivot")), sig("bad")))
    world.settle(world.claim(run, "saga_a"))
    pivot = world.claim(run, "pivot")
    world.settle(world.claim(run, "bad"))
    world.settle(pivot)
    assert world.run(run).status == "failed"
    assert not undone(world)


def beside(world: World, *, saga: str) -> str:
    """Return a run in which a step beside a pivot, or a saga beside it, has failed before the pivot starts."""
    world.failing = {"bad"}
    pays: Any = chain(sig("saga_a"), sig("pivot", link_error=sig("oops")), sig("after"))
    fails = sig("bad")
    if saga == "pivot's":
        pays = byrd.saga(pays)
    elif saga == "other's":
        fails = byrd.saga(sig("saga_x"), fails)
    run = world.submit(group(pays, fails))
    for name in ("saga_a", *(["saga_x"] if saga == "other's" else []), "bad"):
        world.settle(world.claim(run, name))
    return run


@pytest.mark.parametrize("saga", ["none", "pivot's", "other's"])
def test_a_pivot_that_has_not_started_when_a_step_fails_never_does(world: World, saga: str) -> None:
    """Its success would keep what the others had done from being undone: paid, and half of it booked."""
    run = beside(world, saga=saga)
    pivot = world.step(run, "pivot")
    assert pivot.status == "ready"
    assert world.try_claim(pivot.id, pivot.attempt) is None
    stopped = world.step(run, "pivot")
    assert (stopped.status, stopped.error) == ("cancelled", ERROR)
    assert "pivot_stopped" in events(world, run)
    row = world.drive(run)
    assert (row.status, row.error, row.pivot) == ("failed", ERROR, None)
    assert "undo_saga_a" in undone(world)
    assert not {"pivot", "after", "oops"} & set(world.ran)


def test_a_pivot_is_stopped_once_and_no_other_step_is(world: World) -> None:
    run = beside(world, saga="none")
    before = world.rows()
    for name in ("saga_a", "bad", "after"):
        assert world.do(sagas.stop_pivot, world.step(run, name).id) == []
    assert world.rows() == before
    pivot = world.step(run, "pivot").id
    [undo_a] = world.do(sagas.stop_pivot, pivot)
    assert undo_a.task == "undo_saga_a"
    before = world.rows()
    assert world.do(sagas.stop_pivot, pivot) == []
    assert world.rows() == before


def test_after_a_retry_of_the_run_the_pivot_that_was_stopped_starts(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(group(chain(sig("a"), sig("pivot")), sig("bad")))
    for name in ("a", "bad"):
        world.settle(world.claim(run, name))
    assert world.drive(run).status == "failed"
    assert "pivot" not in world.ran
    world.failing = set()
    world.do(runs.retry, run)
    assert world.drive(run).status == "succeeded"
    assert world.result(run) == ["pivot", "bad"]


def test_a_pivot_that_is_paused_is_stopped_when_its_run_is_resumed(world: World) -> None:
    run = beside(world, saga="none")
    pivot = world.step(run, "pivot")
    world.do(runs.pause, run)
    assert world.try_claim(pivot.id, pivot.attempt) is None
    assert world.step(run, "pivot").status == "ready"
    world.do(runs.resume, run)
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_a"]


@pytest.mark.parametrize("how", ["lost", "handed back"])
def test_a_pivot_that_may_have_taken_effect_goes_on_whatever_fails(world: World, how: str) -> None:
    """Stopped, it would leave behind what it has perhaps done: nothing undoes it."""
    world.failing = {"bad"}
    run = world.submit(group(chain(sig("saga_a"), sig("pivot")), sig("bad")))
    world.settle(world.claim(run, "saga_a"))
    claim = world.claim(run, "pivot")
    break_off(world, claim, how)
    world.settle(world.claim(run, "bad"))
    assert world.drive(run).status == "failed"
    assert not undone(world)
    assert "pivot" in world.ran


def test_a_pivot_that_only_raised_so_far_is_not_tried_again(world: World) -> None:
    run = world.submit(group(chain(sig("saga_a"), sig("pivot")), sig("bad")))
    world.failing = {"bad"}
    world.settle(world.claim(run, "saga_a"))
    claim = world.claim(run, "pivot")
    world.do(steps.retry, claim.id, claim.attempt, ERROR)
    world.settle(world.claim(run, "bad"))
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_a"]


def test_a_pivot_starts_beside_a_retriable_step_that_fails_or_after_another_pivot(world: World) -> None:
    run = world.submit(group(chain(sig("saga_a"), sig("pivot")), sig("retriable")))
    world.settle(world.claim(run, "saga_a"))
    fail_for_good(world, run, "retriable")
    assert world.drive(run).status == "failed"
    assert "pivot" in world.ran
    run = world.submit(group(chain(sig("saga_a"), sig("pivot1"), sig("pivot2")), sig("bad")))
    for name in ("saga_a", "pivot1"):
        world.settle(world.claim(run, name))
    fail_for_good(world, run, "bad")
    assert world.drive(run).status == "failed"
    assert world.step(run, "pivot2").status == "succeeded"
    assert not undone(world)


def test_a_pivot_that_succeeds_after_a_cancel_with_compensation_still_counts(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), sig("pivot"), sig("after")))
    world.drive(run, until=["saga_a"])
    claim = world.claim(run, "pivot")
    world.do(runs.cancel, run, compensate=True)
    assert world.run(run).status == "cancelling"
    world.do(steps.complete, claim.id, claim.attempt, "1")
    assert (world.run(run).status, world.run(run).pivot) == ("cancelled", 1)
    assert undone(world) == []
    world.do(runs.retry, run)
    assert world.drive(run).status == "succeeded"


def test_a_run_past_its_pivot_is_not_compensated_by_a_command_or_its_deadline(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), sig("pivot"), sig("b")), deadline=3600)
    world.drive(run, until=["pivot"])
    for command in (lambda conn: runs.cancel(conn, run, compensate=True), lambda conn: runs.roll_back(conn, run)):
        with pytest.raises(IllegalTransitionError, match="step 1, its pivot"):
            world.do(command)
    world.sql("UPDATE byrd.runs SET deadline = now() - interval '1 s'")
    world.do(sweeps.end_overdue_runs, ERROR)
    assert world.run(run).status == "failed"
    assert not undone(world)


def test_a_retriable_step_causes_no_rollback(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), sig("retriable"), sig("after")))
    world.settle(world.claim(run, "saga_a"))
    assert fail_for_good(world, run, "retriable") == steps.PATIENCE + 1
    assert world.run(run).status == "failed"
    world.do(runs.retry, run)
    assert world.drive(run).status == "succeeded"
    assert not undone(world)


def test_a_retriable_step_in_a_saga_causes_no_rollback_around_it(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), byrd.saga(sig("saga_b"), group(sig("retriable"), sig("saga_c")), sig("d"))))
    for name in ("saga_a", "saga_b", "saga_c"):
        world.settle(world.claim(run, name))
    fail_for_good(world, run, "retriable")
    world.end_waits()
    assert (world.run(run).status, world.step(run, "byrd.saga").status) == ("failed", "failed")
    assert not [s for s in world.steps(run) if s.kind == "compensation"]
    world.do(runs.retry, run)
    assert world.drive(run).status == "succeeded"


def test_a_callback_that_is_told_to_stop_after_a_retriable_step_failed_causes_no_rollback_either(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), byrd.saga(chain(sig("saga_b", link=sig("saga_c")), sig("retriable")))))
    for name in ("saga_a", "saga_b"):
        world.settle(world.claim(run, name))
    callback = world.claim(run, "saga_c")
    fail_for_good(world, run, "retriable")
    world.end_waits()
    assert isinstance(world.do(progress.stop_reason, callback.id, callback.attempt), StepCancelled)
    world.do(steps.abandon, callback.id, callback.attempt)
    world.end_waits()
    assert (world.run(run).status, world.step(run, "byrd.saga").status) == ("failed", "failed")
    assert not [s for s in world.steps(run) if s.kind == "compensation"]
    world.do(runs.retry, run)
    assert world.drive(run).status == "succeeded"


def test_another_step_that_fails_beside_a_retriable_one_does(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(group(sig("saga_a"), sig("retriable"), sig("bad")))
    fail_for_good(world, run, "retriable")
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_a"]


# ------------------------------------------------------------------------------------------------- unknown outcomes


@pytest.mark.parametrize("how", ["lost", "timed out", "soft", "terminated"])
def test_a_step_that_may_have_taken_effect_is_undone(world: World, how: str) -> None:
    run = world.submit(chain(sig("saga_a"), sig("saga_b"), sig("c")))
    world.settle(world.claim(run, "saga_a"))
    claim = world.claim(run, "saga_b")
    if how == "lost":
        world.do(steps.preempt, world.worker_id, reason="gone", max_preemptions=0)
    elif how == "terminated":
        world.do(steps.revoke, claim.id, "terminated", attempt=claim.attempt)
    else:
        name = "TimeLimitExceeded" if how == "timed out" else "SoftTimeLimitExceeded"
        error = json.dumps({"exc_type": name, "exc_module": "billiard.exceptions", "exc_message": [1]})
        world.do(steps.fail, claim.id, claim.attempt, error)
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_b", "undo_saga_a"]


@pytest.mark.parametrize("how", ["lost", "handed back"])
def test_a_step_that_was_broken_off_once_and_then_raised_is_undone_too(world: World, how: str) -> None:
    world.failing = {"saga_b"}
    run = world.submit(chain(sig("saga_a"), sig("saga_b")))
    world.settle(world.claim(run, "saga_a"))
    claim = world.claim(run, "saga_b")
    break_off(world, claim, how)
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_b", "undo_saga_a"]


def roll_back_what_is_paused(world: World, run: str, give_back: Callable[[], Any]) -> None:
    world.do(runs.pause, run)
    give_back()
    world.do(runs.roll_back, run, reason="wrong")


def roll_back_what_was_cancelled(world: World, run: str, give_back: Callable[[], Any]) -> None:
    give_back()
    world.do(runs.cancel, run)
    world.check()
    world.do(runs.roll_back, run, reason="wrong")


def cancel_it(world: World, run: str, give_back: Callable[[], Any]) -> None:
    give_back()
    world.do(runs.cancel, run, compensate=True)


def cancel_it_before(world: World, run: str, give_back: Callable[[], Any]) -> None:
    world.do(runs.cancel, run, compensate=True)
    give_back()


def miss_the_deadline(world: World, run: str, give_back: Callable[[], Any]) -> None:
    give_back()
    world.sql("UPDATE byrd.runs SET deadline = now() - interval '1 s'")
    world.do(sweeps.end_overdue_runs, ERROR)


@pytest.mark.parametrize(
    ("stop", "status"),
    [
        (roll_back_what_is_paused, "cancelled"), (roll_back_what_was_cancelled, "cancelled"), (cancel_it, "cancelled"),
        (cancel_it_before, "cancelled"), (miss_the_deadline, "failed"),
    ],
)  # fmt: skip
def test_a_step_that_was_handed_back_is_undone(world: World, stop: Callable[..., None], status: str) -> None:
    """It stopped at a checkpoint, or in a cold shutdown, and nobody has called it again: it may have done something."""
    run = world.submit(chain(sig("saga_b"), sig("c")), deadline=3600)
    claim = world.claim(run, "saga_b")
    stop(world, run, lambda: world.do(steps.hand_back, claim.id, claim.attempt))
    assert world.step(run, "saga_b").status == "cancelled"
    found = world.do(undo.compensated_call, world.step(run, "undo_saga_b").id)
    assert (found.status, found.result) == ("cancelled", None)
    assert world.drive(run).status == status
    assert undone(world) == ["undo_saga_b"]


def test_a_step_that_was_handed_back_in_a_saga_that_fails_is_undone(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(byrd.saga(group(sig("bad"), chain(sig("saga_a"), sig("saga_b")))))
    world.settle(world.claim(run, "saga_a"))
    claim = world.claim(run, "saga_b")
    world.do(steps.hand_back, claim.id, claim.attempt)
    world.settle(world.claim(run, "bad"))
    world.end_waits()
    assert world.step(run, "saga_b").status == "cancelled"
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_b", "undo_saga_a"]


@pytest.mark.parametrize("how", ["asleep", "awaits a signal"])
def test_a_step_that_gave_its_slot_back_is_undone(world: World, how: str) -> None:
    run = world.submit(chain(sig("saga_b"), sig("c")))
    claim = world.claim(run, "saga_b")
    if how == "asleep":
        world.do(waits.nap, claim.id, claim.attempt, "step:sleep x", seconds=3600, until=None)
    else:
        world.do(waits.give_way, claim.id, claim.attempt, "ok", "step:wait ok", timeout=None)
    world.do(runs.cancel, run, compensate=True)
    assert world.drive(run).status == "cancelled"
    assert undone(world) == ["undo_saga_b"]


@pytest.mark.parametrize("how", ["never claimed", "put back", "retried"])
def test_a_step_that_has_not_begun_or_that_raised_is_not_undone(world: World, how: str) -> None:
    run = world.submit(chain(sig("saga_a"), sig("saga_b")))
    world.settle(world.claim(run, "saga_a"))
    if how == "put back":
        claim = world.claim(run, "saga_b")
        world.do(steps.put_back, claim.id, claim.attempt, worker_id=world.worker_id, pid=1)
    elif how == "retried":
        claim = world.claim(run, "saga_b")
        world.do(steps.retry, claim.id, claim.attempt, ERROR, delay=300)
    world.do(runs.cancel, run, compensate=True)
    assert world.drive(run).status == "cancelled"
    assert undone(world) == ["undo_saga_a"]


def test_a_step_that_raised_or_ignored_is_not_undone(world: World) -> None:
    world.failing = {"saga_b"}
    run = world.submit(group(sig("saga_a"), sig("saga_b"), sig("saga_c")))
    claim = world.claim(run, "saga_c")
    error = json.dumps({"exc_type": "Ignore", "exc_module": "celery.exceptions", "exc_message": []})
    world.do(steps.ignore, claim.id, claim.attempt, error)
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_a"]


def test_a_step_that_replaced_itself_by_what_failed_is_not_undone_but_what_took_its_place_is(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(chain(sig("saga_a"), sig("saga_b")))
    world.settle(world.claim(run, "saga_a"))
    claim = world.claim(run, "saga_b")
    world.do(growth.replace, claim.id, claim.attempt, plan_of(chain(sig("saga_n"), sig("bad"))))
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_n", "undo_saga_a"]


# ------------------------------------------------------------------------------------------------- stuck


def stuck(world: World, canvas: Any, *failing: str) -> str:
    """Return a run that is stuck at the compensation of saga_b."""
    world.failing = {"bad", "undo_saga_b", *failing}
    run = world.submit(canvas)
    assert world.drive(run).status == "rollback_stuck"
    return run


def whole_run() -> Any:
    return chain(sig("saga_a"), sig("saga_b"), sig("bad"))


def inner() -> Any:
    return chain(sig("saga_x"), byrd.saga(whole_run()), sig("after"))


@pytest.mark.parametrize("canvas", [whole_run, inner], ids=["run", "saga"])
@pytest.mark.parametrize("how", ["retry", "skip", "by hand"])
def test_an_operator_ends_a_rollback_that_is_stuck(world: World, canvas: Any, how: str) -> None:
    run = stuck(world, canvas())
    no = world.step(run, "undo_saga_b").no
    if how == "retry":
        world.failing -= {"undo_saga_b"}
        world.do(runs.retry, run, by="ann")
    elif how == "skip":
        world.do(sagas.skip, run, no, reason="the hotel is gone", by="ann")
    else:
        world.do(sagas.done_by_hand, run, no, note="I called them", by="ann")
    world.check()
    assert world.drive(run).status == "failed"
    status = {"retry": "succeeded", "skip": "skipped", "by hand": "succeeded"}[how]
    assert world.step(run, no).status == status
    assert undone(world)[-1] == ("undo_saga_a" if canvas is whole_run else "undo_saga_x")
    event = {"retry": "rollback_retried", "skip": "compensation_skipped", "by hand": "done_by_hand"}[how]
    [found] = [h for h in world.do(reading.history, run) if h["event"] == event]
    assert found["detail"]["by"] == "ann"
    if how != "retry":
        assert found["step_no"] == no
        assert {"the hotel is gone", "I called them"} & set(found["detail"].values())


def test_a_stuck_saga_holds_the_rest_of_its_run(world: World) -> None:
    world.failing = {"bad", "undo_saga_b"}
    run = world.submit(group(byrd.saga(sig("saga_b"), sig("bad")), chain(sig("x"), sig("y"))))
    for name in ("saga_b", "bad", "x"):
        world.settle(world.claim(run, name))
    world.end_waits()
    world.settle(world.claim(run, "undo_saga_b"))
    assert world.run(run).status == "rollback_stuck"
    step = world.step(run, "y")
    assert world.try_claim(step.id, step.attempt) is None
    world.check()
    world.do(sagas.skip, run, world.step(run, "undo_saga_b").no, reason="so")
    assert world.run(run).status == "running"
    assert world.drive(run).status == "failed"
    assert "y" in world.ran


@pytest.mark.parametrize("how", ["retry", "skip"])
def test_a_run_that_was_paused_when_a_saga_got_stuck_is_paused_again(world: World, how: str) -> None:
    world.failing = {"bad", "undo_saga_b"}
    run = world.submit(group(byrd.saga(sig("saga_a"), sig("saga_b"), sig("bad")), chain(sig("x"), sig("y"))))
    for name in ("saga_a", "saga_b", "bad"):
        world.settle(world.claim(run, name))
    world.end_waits()
    x, undo_b = world.claim(run, "x"), world.claim(run, "undo_saga_b")
    world.do(runs.pause, run)
    world.settle(undo_b)
    assert world.run(run).status == "rollback_stuck"
    world.settle(x)
    world.failing = set()
    if how == "retry":
        world.do(runs.retry, run)
    else:
        world.do(sagas.skip, run, undo_b.no, reason="so")
    assert world.run(run).status == "paused"
    assert world.do(sweeps.seconds_until_due, at_most=9.0) == 9.0, "a paused run costs the relay nothing"
    world.check()
    before = len(world.ran)
    assert world.drive(run).status == "paused"
    assert len(world.ran) == before
    world.do(runs.resume, run)
    assert world.drive(run).status == "failed"
    assert sorted(world.ran[before:]) == sorted(["y", "undo_saga_a", *["undo_saga_b"] * (how == "retry")])


def test_a_run_that_was_resumed_or_retried_since_its_pause_goes_on_after_a_stuck_saga(world: World) -> None:
    world.failing = {"early"}
    run = world.submit(chain(sig("early"), byrd.saga(sig("saga_b"), sig("bad"))))
    world.do(runs.pause, run)
    world.do(runs.resume, run)
    claim = world.claim(run, "early")
    world.do(runs.pause, run)
    world.settle(claim)
    assert world.run(run).status == "failed"
    world.failing = {"bad", "undo_saga_b"}
    world.do(runs.retry, run)
    assert world.drive(run).status == "rollback_stuck"
    world.failing = {"bad"}
    world.do(runs.retry, run)
    assert world.run(run).status == "running"
    assert world.drive(run).status == "failed"


def test_two_that_are_stuck_need_an_operator_each(world: World) -> None:
    world.failing = {"bad", "undo_saga_a", "undo_saga_b"}
    run = world.submit(group(sig("saga_a"), sig("saga_b"), sig("bad")))
    for name in ("saga_a", "saga_b", "bad"):
        world.settle(world.claim(run, name))
    claims = [world.claim(run, "undo_saga_a"), world.claim(run, "undo_saga_b")]
    for claim in claims:
        world.settle(claim)
    assert events(world, run).count("rollback_stuck") == 2
    assert len(world.sql("SELECT 1 FROM byrd.notices")) == 2
    world.do(sagas.skip, run, claims[0].no, reason="so")
    assert world.run(run).status == "rollback_stuck"
    world.do(sagas.done_by_hand, run, claims[1].no, note="so")
    assert world.run(run).status == "failed"


def test_one_that_waits_for_its_next_try_may_be_skipped(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(whole_run())
    world.drive(run, until=["bad"])
    claim = world.claim(run, "undo_saga_b")
    world.do(steps.retry, claim.id, claim.attempt, ERROR, delay=300)
    world.do(sagas.skip, run, claim.no, reason="no time")
    assert world.drive(run).status == "failed"
    assert undone(world) == ["undo_saga_a"]


def test_a_command_is_carried_out_once(world: World) -> None:
    run = stuck(world, whole_run())
    token = "5d9bd5c8-9a2e-4a4e-9f6a-000000000001"
    no = world.step(run, "undo_saga_b").no
    for _ in range(2):
        world.do(sagas.skip, run, no, reason="so", token=token)
    assert events(world, run).count("compensation_skipped") == 1
    world.drive(run)


def test_what_may_not_be_skipped_is_refused_by_name(world: World) -> None:
    run = stuck(world, whole_run())
    before = world.rows()
    for no, says in (
        (0, "no compensation; it is undone by step 4"),
        (2, "no compensation"),
        (99, "no step 99"),
        (4, "is pending"),
    ):
        with pytest.raises(IllegalTransitionError, match=says):
            world.do(sagas.skip, run, no, reason="so")
    assert world.rows() == before


# ------------------------------------------------------------------------------------------------- on purpose


def test_a_run_that_has_succeeded_is_rolled_back_on_purpose(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), byrd.saga(sig("saga_b")), sig("c")))
    assert world.drive(run).status == "succeeded"
    world.do(runs.roll_back, run, reason="wrong customer", by="ann")
    assert world.run(run).status == "compensating"
    world.check()
    assert world.drive(run).status == "cancelled"
    assert undone(world) == ["undo_saga_b", "undo_saga_a"]
    [asked] = [h for h in world.do(reading.history, run) if h["event"] == "rollback_requested"]
    assert asked["detail"] == {"by": "ann", "reason": "wrong customer"}
    with pytest.raises(IllegalTransitionError, match="nothing to undo"):
        world.do(runs.roll_back, run)
    with pytest.raises(IllegalTransitionError, match="rolled back"):
        world.do(runs.retry, run)


def test_a_run_that_is_paused_is_rolled_back_on_purpose(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), sig("b")))
    world.drive(run, until=["saga_a"])
    world.do(runs.pause, run)
    world.do(runs.roll_back, run, reason="wrong", by="ann")
    assert world.drive(run).status == "cancelled"
    assert undone(world) == ["undo_saga_a"]
    [started] = [h for h in world.do(reading.history, run) if h["event"] == "rollback_started"]
    assert started["detail"]["reason"] == "wrong"


def test_a_run_that_goes_on_or_has_nothing_to_undo_is_not(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), sig("b")))
    with pytest.raises(IllegalTransitionError, match="pause it first"):
        world.do(runs.roll_back, run)
    plain = world.submit(sig("a"))
    world.drive(plain)
    with pytest.raises(IllegalTransitionError, match="nothing to undo"):
        world.do(runs.roll_back, plain)


def test_a_run_that_is_paused_with_nothing_to_undo_is_not(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("saga_b")))
    world.drive(run, until=["a"])
    world.do(runs.pause, run)
    before = world.rows()
    with pytest.raises(IllegalTransitionError, match="nothing to undo: no step with a compensation has completed, or"):
        world.do(runs.roll_back, run)
    assert world.rows() == before
    world.do(runs.resume, run)
    assert world.drive(run).status == "succeeded"


def test_a_run_that_is_paused_while_what_can_be_undone_runs_is_rolled_back(world: World) -> None:
    run = world.submit(sig("saga_a"))
    claim = world.claim(run, "saga_a")
    world.do(runs.pause, run)
    world.do(runs.roll_back, run)
    assert world.run(run).status == "cancelling"
    world.settle(claim)
    assert world.drive(run).status == "cancelled"
    assert undone(world) == ["undo_saga_a"]


def test_plans_with_sagas_are_written_in_one_statement_or_one_by_one(world: World) -> None:
    canvas = chain(byrd.saga(sig("a")), byrd.saga(sig("b")))
    plan: Plan = plan_of(canvas)
    new = plans.NewRun("00000000-0000-0000-0000-00000000000a", plan)
    assert new.plain
    world.do(plans.submit_many, [new])
    assert world.drive(new.id).status == "succeeded"
