"""What becomes of a run, driven through the store alone: its end, cancel, pause, retry, rollback, deadlines."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from celery import chain, chord, group

import byrd
from byrd.errors import IllegalTransitionError, RunNotFoundError, StaleAttempt, StepCancelled
from byrd.store import Claim, each, growth, plans, reading, runs, steps, sweeps, undo
from byrd.store.rows import query
from tests.store.world import ERROR, World, plan_of, sig, submit

# ------------------------------------------------------------------------------------------------- to the end


def test_a_chain_passes_its_values_on_and_succeeds(world: World) -> None:
    run = world.submit(chain(sig("a", 1), sig("b", 2), sig("c")))
    assert world.statuses(run) == {"a": "ready", "b": "pending", "c": "pending"}
    claim = world.claim(run, "a")
    assert (claim.args, claim.input, claim.parent_id) == ("[1]", None, None)
    assert [wakeup.task for wakeup in world.settle(claim)] == ["b"]
    claim = world.claim(run, "b")
    assert (claim.args, claim.input, claim.parent_id) == ("[2]", '"a"', world.step(run, "a").id)
    world.settle(claim)
    assert world.drive(run).status == "succeeded"
    assert world.result(run) == "c"


def test_a_groups_value_is_in_its_order_whoever_ends_first(world: World) -> None:
    run = world.submit(chord([sig("a"), sig("b"), sig("c")], sig("body")))
    for name in ("c", "a", "b"):
        assert world.statuses(run)["body"] == "pending"
        world.settle(world.claim(run, name))
        world.check()
    assert world.claim(run, "body").input == '["a","b","c"]'


ENDINGS: dict[str, Callable[[], Any]] = {
    "empty group": lambda: group([]),
    "group of one": lambda: group(sig("a")),
    "empty chord": lambda: chord([], sig("body")),
    "diamonds": lambda: chain(sig("a"), group([sig("b"), sig("c")]), group([sig("d"), sig("e")]), sig("f")),
    "nested": lambda: group(
        chain(sig("a"), group(sig("b"), sig("c"))), chord([sig("d"), sig("e")], group(sig("f"), sig("g")))
    ),
    "links": lambda: sig("a", link=sig("called"), link_error=sig("not_called")),
    "uncalled group": lambda: sig("a", link_error=group(sig("not_called"), sig("not_called"))),
    "uncalled chord": lambda: sig("a", link_error=chord([sig("b"), group(sig("c"), sig("d"))], sig("not_called"))),
    "uncalled nest": lambda: sig(
        "a",
        link_error=chain(sig("not_called"), group(chain(sig("c"), group(sig("d"), sig("e"))), sig("f"))),
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_canvas_reaches_its_end(world: World, name: str) -> None:
    run = world.submit(ENDINGS[name]())
    assert world.drive(run).status == "succeeded"
    assert "not_called" not in world.ran
    world.check()


def test_a_failure_skips_what_waited_for_it_and_calls_errbacks(world: World) -> None:
    world.failing = {"b"}
    errback = chain(sig("oops"), sig("and_then"))
    run = world.submit(chain(sig("a"), sig("b", link_error=errback), sig("c", link=sig("never")), sig("d")))
    row = world.drive(run)
    assert (row.status, row.error) == ("failed", ERROR)
    assert world.ran == ["a", "b", "oops", "and_then"]
    assert {name for name, status in world.statuses(run).items() if status == "skipped"} == {"c", "never", "d"}
    assert world.do(reading.outcome, run)[:4] == (row.output, "skipped", None, ERROR)


def test_an_errback_gets_the_error_and_its_own_failure_changes_nothing(world: World) -> None:
    world.failing = {"a", "oops"}
    run = world.submit(sig("a", link_error=group(sig("oops"), sig("fine"))))
    world.settle(world.claim(run, "a"))
    claim = world.claim(run, "oops")
    assert (claim.on_failure, claim.after_error, claim.parent_task) == (True, ERROR, "a")
    world.settle(claim)
    assert world.drive(run).status == "failed"
    assert world.statuses(run)["fine"] == "succeeded"


def test_a_failed_member_fails_the_chords_body_once_all_members_are_done(world: World) -> None:
    world.failing = {"b"}
    body = sig("body", link_error=sig("oops"))
    run = world.submit(chain(chord([sig("a"), sig("b"), sig("c")], body), sig("after")))
    world.settle(world.claim(run, "b"))
    assert world.statuses(run)["body"] == "pending"
    row = world.drive(run)
    assert row.status == "failed"
    assert world.ran == ["b", "a", "c", "oops"]
    error = json.loads(row.error or "")
    assert error["exc_type"] == "ChordError"
    assert error["exc_message"] == [f"Dependency {world.step(run, 'b').id} raised ValueError('no')"]
    assert world.statuses(run) == {
        "a": "succeeded", "b": "failed", "c": "succeeded", "join3": "failed", "body": "failed", "oops": "succeeded",
        "after": "skipped",
    }  # fmt: skip


def test_a_failure_deep_in_a_group_reaches_the_outer_body(world: World) -> None:
    world.failing = {"c"}
    inner = chain(sig("b"), group(sig("c"), sig("d")), sig("e"))
    run = world.submit(chain(group(sig("a"), inner), sig("body")))
    assert world.drive(run).status == "failed"
    assert "body" not in world.ran
    assert "e" not in world.ran


def test_two_callbacks_that_end_last_end_the_run(world: World) -> None:
    run = world.submit(sig("a", link=[sig("x"), sig("y")]))
    world.settle(world.claim(run, "a"))
    world.settle(world.claim(run, "x"))
    assert world.run(run).status == "running"
    world.settle(world.claim(run, "y"))
    assert world.run(run).status == "succeeded"


def test_a_countdown_and_an_expiry_are_kept_by_the_database(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b", countdown=600, expires=900)))
    [wakeup] = world.settle(world.claim(run, "a"))
    assert not wakeup.due
    step = world.step(run, "b")
    assert world.try_claim(step.id, 0) is None
    assert world.sql("SELECT expires_at - ready_at > '890s' AS ok FROM byrd.steps WHERE id = %(id)s", id=step.id)[0].ok
    world.sql("UPDATE byrd.steps SET run_at = now(), expires_at = now() - interval '1s' WHERE id = %(id)s", id=step.id)
    assert world.try_claim(step.id, 0) is None
    world.do(steps.expire, step.id)
    assert world.statuses(run)["b"] == "cancelled"
    row = world.run(run)
    assert row.status == "failed"
    assert json.loads(row.error or "")["exc_message"] == ["expired"]
    world.do(steps.expire, step.id)


def test_what_has_not_expired_stays(world: World) -> None:
    run = world.submit(sig("a", expires=900))
    before = world.rows()
    assert world.do(steps.expire, world.step(run, "a").id) == []
    assert world.rows() == before


# ------------------------------------------------------------------------------------------------- keys


def test_a_key_makes_one_run_of_a_workflow(world: World) -> None:
    first = world.submit(sig("a"), key="k")
    assert world.submit(chain(sig("a"), sig("b")), key="k") == first
    assert len(world.steps(first)) == 1
    other, wakeups = world.do(
        plans.submit, str(uuid.uuid4()), plan_of(sig("a")), workflow="other", title="", key="k", args=None,
        deadline_seconds=None,
    )  # fmt: skip
    assert other != first
    assert len(wakeups) == 1


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("options", [{}, {"priority": 3}])
def test_a_run_of_one_step_is_written_as_among_others(world: World, options: dict[str, Any], *, told: bool) -> None:
    """It has a statement of its own: what that writes and returns is what the one for many runs does."""
    canvas = sig("a", 1, "x").set(**options)
    news = [
        plans.NewRun(
            str(uuid.uuid4()), plan_of(canvas, shared=True), workflow="w", title="a(1)", key=f"k{n}", args="[1]",
            deadline_seconds=60.0, parent_step=f"p{n}",
        )
        for n in range(3)
    ]  # fmt: skip
    found = [world.do(plans.submit_many, part, told=told) for part in (news[:1], news[1:])]
    assert [ids for ids, _ in found] == [[news[0].id], [new.id for new in news[1:]]]
    wakeups = [wakeup for _, published in found for wakeup in published]
    assert len(wakeups) == (3 if told else 0)
    assert len({wakeup._replace(id="", run_id="") for wakeup in wakeups}) == int(told)
    written = [
        world.sql(
            """SELECT to_jsonb(r) - ARRAY['id','key','parent_step','created_at','deadline'] AS run,
                      to_jsonb(s) - ARRAY['id','run_id','ready_at','run_at','wake_at'] AS step, e.event, e.detail,
                      s.id = %(step)s AS same, r.key, r.parent_step, r.deadline - r.created_at AS left_over,
                      s.ready_at = s.run_at AS at_once, s.wake_at - s.run_at AS sent_again
                 FROM byrd.runs r JOIN byrd.steps s ON s.run_id = r.id JOIN byrd.events e ON e.run_id = r.id
                WHERE r.id = %(run)s::uuid""",
            run=new.id, step=new.plan.steps[0].id,
        )
        for new in news
    ]  # fmt: skip
    for n, [row] in enumerate(written):
        assert (row.run, row.step, row.event, row.detail) == (written[1][0][:4])
        assert (row.same, row.key, row.parent_step, row.at_once) == (True, f"k{n}", f"p{n}", True)
        assert row.left_over.total_seconds() == pytest.approx(60, abs=1)
        assert row.sent_again.total_seconds() == (2 if told else 0)
    again = replace(news[0], id=str(uuid.uuid4()), parent_step=None)
    assert world.do(plans.submit_many, [again], told=told) == ([news[0].id], [])
    assert world.do(plans.submit_many, news[:1], told=told) == ([news[0].id], []), "its answer was lost"


def test_a_run_that_nobody_knows(world: World) -> None:
    for statement in (reading.get, runs.pause, runs.resume, runs.cancel, runs.retry):
        with pytest.raises(RunNotFoundError):
            world.do(statement, str(uuid.uuid4()))


# ------------------------------------------------------------------------------------------------- attempts


def test_a_stale_attempt_can_write_nothing(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b")))
    old = world.claim(run, "a")
    world.do(steps.preempt, world.worker_id, reason="gone")
    new = world.claim(run, "a")
    assert (old.attempt, new.attempt, new.preemptions) == (1, 2, 1)
    before = world.rows()
    plan = plan_of(sig("x"))
    for statement, args in (
        (steps.complete, ['"stale"']),
        (steps.fail, [ERROR]),
        (steps.retry, [ERROR]),
        (steps.hand_back, []),
        (steps.ignore, [ERROR]),
        (steps.abandon, []),
        (growth.replace, [plan]),
        (growth.extend_join, [plan]),
        (steps.check_owner, []),
    ):
        assert world.stale(statement, old.id, old.attempt, *args), statement
        assert world.rows() == before, statement


def test_a_stale_attempt_at_an_each_adds_no_items(world: World) -> None:
    run = world.submit(chain(byrd.each(sig("item"), over=[1, 2, 3], limit=1, tolerate=0.5), sig("b")))
    old = world.claim(run, "byrd.each")
    begin: dict[str, Any] = {"limit": 1, "tolerate": 0.5, "total": 3}
    world.do(each.look, old.id, old.attempt, **begin)
    page = [*plan_of(sig("item")).steps, *plan_of(sig("item")).steps]

    def try_all() -> None:
        before = world.rows()
        for statement, args, options in (
            (each.look, [], begin),
            (each.insert, [page], {"inserted": 0, "at": None, "done": True}),
            (each.reopen, [], {"most": 5}),
            (each.park, [], {}),
            (each.finish, [], {"results": True}),
        ):
            assert world.stale(statement, old.id, old.attempt, *args, **options), statement
            assert world.rows() == before, statement

    world.do(steps.preempt, world.worker_id, reason="gone")
    try_all()  # nobody has it
    new = world.claim(run, "byrd.each")
    try_all()
    _, given = world.do(each.insert, new.id, new.attempt, page, inserted=0, at=None, done=True)
    assert [wakeup.task for wakeup in given] == ["item"]
    try_all()
    world.do(each.park, new.id, new.attempt)
    try_all()


def test_a_retry_waits_and_may_change_the_call(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b", 1)))
    world.settle(world.claim(run, "a"))
    claim = world.claim(run, "b")
    assert not world.do(steps.retry, claim.id, claim.attempt, ERROR, delay=60.0)
    assert world.try_claim(claim.id, 1) is None
    world.sql("UPDATE byrd.steps SET run_at = now(), wake_at = now() WHERE id = %(id)s", id=claim.id)
    claim = world.claim(run, "b")
    assert (claim.retries, claim.args, claim.input) == (1, "[1]", '"a"')
    [wakeup] = world.do(steps.retry, claim.id, 2, ERROR, args="[7]", kwargs='{"k": 1}', queue="other", options="{}")
    assert (wakeup.queue, wakeup.retries, wakeup.attempt, wakeup.due) == ("other", 2, 2, True)
    claim = world.claim(run, "b")
    assert (claim.args, claim.kwargs, claim.input) == ("[7]", '{"k": 1}', None)
    world.settle(claim)
    assert world.run(run).status == "succeeded"
    assert [(a["attempt"], a["outcome"]) for a in world.do(reading.attempts, run)] == [(1, "retried"), (2, "retried")]


def test_a_step_that_keeps_losing_its_worker_is_failed(world: World) -> None:
    run = world.submit(sig("a", link_error=sig("oops")))
    for _ in range(2):
        world.claim(run, "a")
        assert len(world.do(steps.preempt, world.worker_id, reason="killed", max_preemptions=2)) == 1
    world.claim(run, "a")
    [wakeup] = world.do(steps.preempt, world.worker_id, reason="killed", max_preemptions=2)
    assert wakeup.task == "oops"
    step = world.step(run, "a")
    assert (step.status, step.preemptions) == ("failed", 3)
    error = json.loads(step.error or "")
    assert (error["exc_type"], error["exc_message"]) == ("StepLostError", ["lost its worker 3 times; the last: killed"])
    assert world.drive(run).status == "failed"


def test_only_the_steps_of_the_lost_process_are_given_back(world: World) -> None:
    run = world.submit(group(sig("a"), sig("b")))
    world.claim(run, "a", pid=11)
    world.claim(run, "b", pid=22)
    assert [w.task for w in world.do(steps.preempt, world.worker_id, pid=22, reason="killed")] == ["b"]
    assert world.statuses(run)["a"] == "running"
    world.do(steps.preempt, world.worker_id, reason="killed")


def test_an_ignored_step_calls_no_errback(world: World) -> None:
    run = world.submit(chain(sig("a", link_error=sig("oops")), sig("b")))
    claim = world.claim(run, "a")
    world.do(steps.ignore, claim.id, claim.attempt, ERROR)
    assert world.run(run).status == "failed"
    assert world.statuses(run) == {"a": "cancelled", "oops": "skipped", "b": "skipped"}


def test_a_revoked_step_calls_its_errback(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b", link_error=sig("oops"))))
    world.settle(world.claim(run, "a"))
    [wakeup] = world.do(steps.revoke, world.step(run, "b").id, "revoked")
    assert wakeup.task == "oops"
    assert world.drive(run).status == "failed"


# ------------------------------------------------------------------------------------------------- growing plans


def test_a_replaced_steps_value_is_the_canvass(world: World) -> None:
    run = world.submit(chain(group(sig("a"), sig("b")), sig("c")))
    claim = world.claim(run, "a")
    new = chain(sig("x"), group(sig("y"), sig("z")))
    assert [w.task for w in world.do(growth.replace, claim.id, claim.attempt, plan_of(new))] == ["x"]
    assert world.step(run, "a").status == "pending"
    assert world.drive(run).status == "succeeded"
    assert world.step(run, "a").result == '["y","z"]'
    [c] = [s for s in world.steps(run) if s.task == "c"]
    assert world.sql("SELECT i.result FROM byrd.steps i WHERE run_id = %(r)s AND no = %(n)s", r=run, n=c.after)[
        0
    ].result == ('[["y","z"],"b"]')


def test_a_replacement_may_be_replaced_and_may_be_empty(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b")))
    claim = world.claim(run, "a")
    world.do(growth.replace, claim.id, claim.attempt, plan_of(sig("x")))
    claim = world.claim(run, "x")
    [wakeup] = world.do(growth.replace, claim.id, claim.attempt, plan_of(group([])))
    assert wakeup.task == "b"
    assert world.step(run, "a").result == "[]"
    assert world.drive(run).status == "succeeded"


def test_a_replacement_that_fails_fails_the_step(world: World) -> None:
    world.failing = {"x"}
    run = world.submit(chain(sig("a", link_error=sig("oops")), sig("b")))
    claim = world.claim(run, "a")
    world.do(growth.replace, claim.id, claim.attempt, plan_of(sig("x")))
    assert world.drive(run).status == "failed"
    assert (world.step(run, "a").error, world.ran) == (ERROR, ["x", "oops"])


def test_a_chord_grows(world: World) -> None:
    run = world.submit(chord([sig("a"), sig("b")], sig("body")))
    claim = world.claim(run, "a")
    world.settle(world.claim(run, "b"))
    assert [
        w.task for w in world.do(growth.extend_join, claim.id, claim.attempt, plan_of(chain(sig("x"), sig("y"))))
    ] == ["x"]
    world.settle(claim)
    assert world.statuses(run)["body"] == "pending"
    world.drive(run, until=["y"])
    assert world.claim(run, "body").input == '["a","b","y"]'


def test_a_chord_grows_by_a_step_that_took_a_members_place(world: World) -> None:
    run = world.submit(chord([sig("t"), sig("u")], sig("body")))
    for task, new in (("t", chain(sig("w"), sig("v"))), ("v", sig("x"))):
        claim = world.claim(run, task)
        world.do(growth.replace, claim.id, claim.attempt, plan_of(new))
        if task == "t":
            world.settle(world.claim(run, "w"))
    claim = world.claim(run, "x")
    world.do(growth.extend_join, claim.id, claim.attempt, plan_of(sig("y")))
    world.check()
    world.settle(claim)
    world.settle(world.claim(run, "y"))
    assert world.statuses(run)["body"] == "pending"
    world.settle(world.claim(run, "u"))
    assert world.claim(run, "body").input == '["x","u","y"]'


def test_a_step_outside_of_any_group_has_no_chord_to_grow(world: World) -> None:
    run = world.submit(chain(sig("t"), sig("u")))
    claim = world.claim(run, "t")
    world.do(growth.replace, claim.id, claim.attempt, plan_of(sig("x")))
    claim = world.claim(run, "x")
    before = world.rows()
    with pytest.raises(ValueError, match="Current task is not member of any chord"):
        world.do(growth.extend_join, claim.id, claim.attempt, plan_of(sig("y")))
    assert world.rows() == before
    world.settle(claim)
    assert world.drive(run).status == "succeeded"


def test_a_cancelled_run_grows_no_more(world: World) -> None:
    run = world.submit(chord([sig("a"), sig("b")], sig("body")))
    claim = world.claim(run, "a")
    world.do(runs.cancel, run)
    for statement in (growth.replace, growth.extend_join):
        with pytest.raises(StepCancelled):
            world.do(statement, claim.id, claim.attempt, plan_of(sig("x")))
    world.do(steps.abandon, claim.id, claim.attempt)
    assert world.run(run).status == "cancelled"


def test_a_compensation_can_not_be_replaced(world: World) -> None:
    world.failing = {"b"}
    run = world.submit(chain(sig("saga_a"), sig("b")))
    world.drive(run, until=["b"])
    claim = world.claim(run, "undo_saga_a")
    with pytest.raises(IllegalTransitionError, match="compensation"):
        world.do(growth.replace, claim.id, claim.attempt, plan_of(sig("x")))


# ------------------------------------------------------------------------------------------------- cancel, pause


def test_cancel_stops_what_waits_and_waits_for_what_runs(world: World) -> None:
    run = world.submit(chain(group(sig("a"), sig("b"), sig("c")), sig("d", link_error=sig("oops"))))
    claim = world.claim(run, "a")
    world.settle(world.claim(run, "b"))
    assert world.do(runs.cancel, run) == []
    assert world.run(run).status == "cancelling"
    world.check()
    assert world.settle(claim) == []
    row = world.run(run)
    assert (row.status, json.loads(row.error or "")["exc_type"]) == ("cancelled", "TaskRevokedError")
    assert world.statuses(run) == {
        "a": "succeeded", "b": "succeeded", "c": "cancelled", "join3": "cancelled", "d": "cancelled",
        "oops": "cancelled",
    }  # fmt: skip


@pytest.mark.parametrize("end", ["complete", "fail", "retry", "hand_back", "abandon", "ignore", "revoke", "preempt"])
def test_however_its_last_step_ends_a_cancelled_run_ends(world: World, end: str) -> None:
    run = world.submit(chain(group(sig("a"), sig("b")), sig("c")))
    claim = world.claim(run, "a")
    world.do(runs.cancel, run)
    match end:
        case "preempt":
            world.do(steps.preempt, world.worker_id, reason="gone")
        case "revoke":
            world.do(steps.revoke, claim.id, "revoked", attempt=claim.attempt)
        case "hand_back" | "abandon":
            world.do(getattr(steps, end), claim.id, claim.attempt)
        case _:
            world.do(getattr(steps, end), claim.id, claim.attempt, ERROR)
    assert world.run(run).status == "cancelled"
    assert world.step(run, "a").status == {"complete": "succeeded", "fail": "failed"}.get(end, "cancelled")


def test_cancel_before_anything_ran_ends_at_once(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b")))
    world.do(runs.cancel, run)
    assert world.run(run).status == "cancelled"
    with pytest.raises(IllegalTransitionError, match="is cancelled: cancel needs it to be paused, running"):
        world.do(runs.cancel, run)


def test_a_paused_run_starts_nothing_and_costs_the_relay_nothing(world: World) -> None:
    run = world.submit(group(sig("a"), sig("b"), sig("c", countdown=5), chain(sig("d"), sig("e", countdown=5))))
    a, d = world.claim(run, "a"), world.claim(run, "d")
    world.do(runs.pause, run)
    b = world.step(run, "b")
    assert world.try_claim(b.id, 0) is None
    assert world.do(steps.retry, a.id, a.attempt, ERROR, delay=60.0) == []
    world.settle(d)  # what follows is released, and parked by the relay
    world.sql("UPDATE byrd.steps SET wake_at = now() WHERE status = 'ready' AND wake_at < 'infinity'")
    world.sql("UPDATE byrd.steps SET run_at = now() WHERE status = 'ready' AND task <> 'c'")
    assert world.do(sweeps.take_due) == []
    assert world.do(sweeps.seconds_until_due, at_most=9.0) == 9.0
    [row] = world.sql("SELECT bool_and(wake_at = 'infinity') AS parked FROM byrd.steps WHERE status = 'ready'")
    assert row.parked
    wakeups = world.do(runs.resume, run)
    assert {w.task: w.due for w in wakeups} == {"a": True, "b": True, "c": False, "e": True}
    world.sql("UPDATE byrd.steps SET run_at = now() WHERE status = 'ready'")
    assert world.drive(run).status == "succeeded"


def test_a_step_handed_back_in_a_paused_run_goes_on_after_it(world: World) -> None:
    run = world.submit(sig("a"))
    claim = world.claim(run, "a")
    world.do(runs.pause, run)
    assert world.do(steps.hand_back, claim.id, claim.attempt) == []
    [wakeup] = world.do(runs.resume, run)
    assert (wakeup.due, wakeup.attempt) == (True, 1)
    assert world.drive(run).status == "succeeded"


def test_a_paused_run_whose_last_step_ends_is_over(world: World) -> None:
    run = world.submit(sig("a"))
    claim = world.claim(run, "a")
    world.do(runs.pause, run)
    world.settle(claim)
    assert world.run(run).status == "succeeded"


def test_a_paused_run_can_be_cancelled(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b")))
    world.do(runs.pause, run)
    world.do(runs.cancel, run)
    assert world.run(run).status == "cancelled"


# ------------------------------------------------------------------------------------------------- retry of a run

CANVASES: dict[str, Callable[[], Any]] = {
    "chain": lambda: chain(sig("a"), sig("bad"), sig("c")),
    "diamond": lambda: chain(sig("a"), group(sig("b"), sig("bad"), chain(sig("c"), sig("d"))), sig("e")),
    "nested": lambda: chain(group(sig("a"), chain(sig("b"), group(sig("bad"), sig("c")), sig("d"))), sig("e")),
    "body": lambda: chain(chord([sig("a"), sig("b")], sig("bad")), group(sig("c"), sig("d"))),
    "callback": lambda: sig("a", link=[sig("bad"), sig("b")]),
    "errback": lambda: chain(sig("a"), sig("bad", link_error=chain(sig("oops"), sig("oops2"))), sig("b")),
    "errback group": lambda: chain(sig("a"), sig("bad", link_error=group(sig("oops"), sig("oops2"))), sig("b")),
    "chord errback": lambda: chord([sig("a"), sig("bad")], sig("b", link_error=chord([sig("x"), sig("y")], sig("z")))),
}


@pytest.mark.parametrize("name", CANVASES)
def test_a_failed_run_is_retried_from_where_it_failed(world: World, name: str) -> None:
    world.failing = {"bad"}
    run = world.submit(CANVASES[name]())
    assert world.drive(run).status == "failed"
    done = {step.no for step in world.steps(run) if step.status == "succeeded" and step.kind != "errback"}
    called = [task for task in world.ran if task.startswith("oops")]
    for _ in range(2):  # fails again: its errbacks are called again
        world.ran.clear()
        world.do(runs.retry, run)
        world.check()
        assert world.drive(run).status == "failed"
        assert [task for task in world.ran if task.startswith("oops")] == called
    world.failing.clear()
    world.ran.clear()
    world.do(runs.retry, run)
    row = world.drive(run)
    assert (row.status, row.error) == ("succeeded", None)
    assert "bad" in world.ran
    assert not {world.step(run, no).task for no in done} & set(world.ran)
    assert not any(task.startswith("oops") for task in world.ran)


@pytest.mark.parametrize("name", CANVASES)
@pytest.mark.parametrize("ran", [0, 1, 2, 3])
def test_a_cancelled_run_is_retried_from_where_it_was(world: World, name: str, ran: int) -> None:
    run = world.submit(CANVASES[name]())
    running = None
    for _ in range(ran):
        ready = [step for step in world.steps(run) if step.status == "ready"]
        if running is None and ready:
            running = world.claim(run, ready[0].no)  # it completes while its run is being cancelled
            continue
        if ready:
            world.settle(world.claim(run, ready[-1].no))
    if world.run(run).status == "succeeded":
        return
    world.do(runs.cancel, run)
    if running is not None:
        world.settle(running)
    assert world.run(run).status == "cancelled"
    world.check()
    world.do(runs.retry, run)
    world.check()
    assert world.drive(run).status == "succeeded"
    assert len(world.ran) == len(set(world.ran))


def test_a_run_with_replaced_steps_is_retried(world: World) -> None:
    world.failing = {"y"}
    run = world.submit(chain(group(sig("a"), sig("b")), sig("c")))
    claim = world.claim(run, "a")
    world.do(growth.replace, claim.id, claim.attempt, plan_of(chain(sig("x"), group(sig("y"), sig("z")))))
    assert world.drive(run).status == "failed"
    world.failing.clear()
    world.ran.clear()
    world.do(runs.retry, run)
    assert world.drive(run).status == "succeeded"
    assert world.ran == ["y", "c"]
    assert world.step(run, "a").result == '["y","z"]'


def test_a_join_that_waited_for_nothing_when_its_run_was_cancelled_ends_in_the_retry(world: World) -> None:
    run = world.submit(chain(group(sig("a"), sig("b")), sig("c")))
    a, b = world.claim(run, "a"), world.claim(run, "b")
    world.do(runs.cancel, run)
    world.settle(a)
    world.settle(b)
    assert world.run(run).status == "cancelled"
    [wakeup] = world.do(runs.retry, run)
    assert wakeup.task == "c"
    assert world.drive(run).status == "succeeded"


def test_an_errback_that_is_called_again_starts_from_its_beginning(world: World) -> None:
    world.failing = {"a"}
    run = world.submit(sig("a", link_error=sig("oops")))
    world.drive(run)
    world.sql(
        "INSERT INTO byrd.checkpoints (step_id, name, attempt, done) VALUES (%(id)s, 'items', 1, true)",
        id=world.step(run, "oops").id,
    )
    world.do(runs.retry, run)
    assert world.sql("SELECT 1 FROM byrd.checkpoints") == []
    world.drive(run)
    assert world.ran == ["a", "oops", "a", "oops"]


@pytest.mark.parametrize("status", ["running", "paused", "succeeded", "cancelling"])
def test_only_an_ended_run_that_did_not_succeed_is_retried(world: World, status: str) -> None:
    run = world.submit(chain(sig("a"), sig("b")))
    if status == "succeeded":
        world.drive(run)
    if status == "paused":
        world.do(runs.pause, run)
    if status == "cancelling":
        world.claim(run, "a")
        world.do(runs.cancel, run)
    with pytest.raises(IllegalTransitionError, match="retry needs it to be cancelled, failed"):
        world.do(runs.retry, run)


# ------------------------------------------------------------------------------------------------- sagas


def test_a_failed_saga_is_undone_in_reverse_order_of_completion(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(chain(group(sig("saga_a"), sig("saga_b"), sig("c")), sig("saga_d"), sig("bad")))
    for name in ("saga_b", "c", "saga_a"):
        world.settle(world.claim(run, name))
    world.drive(run, until=["bad"])
    assert world.run(run).status == "compensating"
    row = world.drive(run)
    assert (row.status, row.error) == ("failed", ERROR)
    assert world.ran[5:] == ["undo_saga_d", "undo_saga_a", "undo_saga_b"]
    with pytest.raises(IllegalTransitionError, match="rolled back"):
        world.do(runs.retry, run)


def test_a_compensation_is_called_with_the_result_and_the_call(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(chain(sig("a"), sig("saga_b", 7), sig("bad")))
    world.drive(run, until=["bad"])
    claim = world.claim(run, "undo_saga_b")
    assert claim.compensates == world.step(run, "saga_b").no
    undone = world.do(undo.compensated_call, claim.id)
    assert (undone.result, undone.input, undone.args, undone.kwargs) == ('"saga_b"', '"a"', "[7]", "{}")
    assert (undone.status, undone.failed_task, undone.error) == ("succeeded", "bad", ERROR)


@pytest.mark.parametrize("compensate", [True, False])
def test_a_cancelled_saga_is_undone_when_asked(world: World, compensate: bool) -> None:
    run = world.submit(chain(sig("saga_a"), sig("saga_b"), sig("c")))
    world.drive(run, until=["saga_a"])
    claim = world.claim(run, "saga_b")
    world.do(runs.cancel, run, compensate=compensate)
    world.settle(claim)  # it completed after all: it is undone too
    assert world.drive(run).status == "cancelled"
    assert world.ran[2:] == (["undo_saga_b", "undo_saga_a"] if compensate else [])


@pytest.mark.parametrize("end", ["fail", "revoke", "ignore", "preempt"])
def test_a_rollback_that_is_stuck_goes_on_where_it_was(world: World, end: str) -> None:
    world.failing = {"bad"}
    run = world.submit(chain(sig("saga_a"), sig("saga_b"), sig("saga_c"), sig("bad")))
    world.drive(run, until=["undo_saga_c"])
    claim = world.claim(run, "undo_saga_b")
    match end:
        case "preempt":
            world.do(steps.preempt, world.worker_id, reason="gone", max_preemptions=0)
        case "revoke":
            world.do(steps.revoke, claim.id, "revoked", attempt=claim.attempt)
        case _:
            world.do(getattr(steps, end), claim.id, claim.attempt, ERROR)
    assert world.run(run).status == "rollback_stuck"
    assert world.run(run).finished_at is None
    world.check()
    [wakeup] = world.do(runs.retry, run)
    assert wakeup.task == "undo_saga_b"
    world.check()
    assert world.drive(run).status == "failed"
    assert world.ran == ["saga_a", "saga_b", "saga_c", "bad", "undo_saga_c", "undo_saga_b", "undo_saga_a"]


def test_a_compensation_is_retried_and_survives_a_crash(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(chain(sig("saga_a"), sig("saga_b"), sig("bad")))
    world.drive(run, until=["bad"])
    claim = world.claim(run, "undo_saga_b")
    assert len(world.do(steps.retry, claim.id, claim.attempt, ERROR)) == 1
    world.claim(run, "undo_saga_b")
    assert len(world.do(steps.preempt, world.worker_id, reason="gone")) == 1
    assert world.drive(run).status == "failed"
    step = world.step(run, "undo_saga_b")
    assert (step.attempt, step.retries, step.preemptions) == (3, 1, 1)


def test_errbacks_run_before_the_rollback(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(chain(sig("saga_a"), sig("bad", link_error=sig("oops"))))
    world.drive(run)
    assert world.ran == ["saga_a", "bad", "oops", "undo_saga_a"]


# ------------------------------------------------------------------------------------------------- deadlines


def pass_deadline(world: World, run: str) -> None:
    world.sql("UPDATE byrd.runs SET deadline = now() - interval '1 second' WHERE id = %(run)s RETURNING 1", run=run)


def test_a_run_past_its_deadline_fails_with_its_own_error(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), sig("b"), sig("c")), deadline=100)
    late = world.submit(sig("a"), deadline=100)
    world.drive(run, until=["saga_a"])
    claim = world.claim(run, "b")
    assert world.do(sweeps.end_overdue_runs, ERROR) == []
    assert world.run(run).status == "running"
    pass_deadline(world, run)
    world.do(sweeps.end_overdue_runs, ERROR)
    assert (world.run(run).status, world.run(late).status) == ("cancelling", "running")
    world.do(steps.abandon, claim.id, claim.attempt)
    row = world.drive(run)
    assert (row.status, row.error) == ("failed", ERROR)
    assert world.ran[-1] == "undo_saga_a"


def test_each_retry_gets_the_whole_time_again(world: World) -> None:
    world.failing = {"a"}
    run = world.submit(sig("a"), deadline=1000)
    world.drive(run)
    for _ in range(3):
        world.sql(
            """WITH old AS (UPDATE byrd.runs SET created_at = created_at - interval '1 day',
                                   deadline = deadline - interval '1 day' WHERE id = %(run)s)
               UPDATE byrd.events SET at = at - interval '1 day' WHERE run_id = %(run)s""",
            run=run,
        )
        world.do(runs.retry, run)
        [row] = world.sql("SELECT extract(epoch FROM deadline - clock_timestamp()) AS left FROM byrd.runs")
        assert 900 < row.left <= 1000
        world.drive(run)


# ------------------------------------------------------------------------------------------------- an answer is lost

PLAN = plan_of(chain(sig("x"), sig("y")))


REPEATED: dict[str, Callable[[World, Claim], Any]] = {
    "complete": lambda w, c: w.do(steps.complete, c.id, c.attempt, '"a"'),
    "fail": lambda w, c: w.do(steps.fail, c.id, c.attempt, ERROR),
    "retry": lambda w, c: w.do(steps.retry, c.id, c.attempt, ERROR),
    "retry later": lambda w, c: w.do(steps.retry, c.id, c.attempt, ERROR, delay=60.0),
    "hand_back": lambda w, c: w.do(steps.hand_back, c.id, c.attempt),
    "ignore": lambda w, c: w.do(steps.ignore, c.id, c.attempt, ERROR),
    "abandon": lambda w, c: w.do(steps.abandon, c.id, c.attempt),
    "revoke": lambda w, c: w.do(steps.revoke, c.id, "revoked", attempt=c.attempt),
    "replace": lambda w, c: w.do(growth.replace, c.id, c.attempt, PLAN),
    "extend_join": lambda w, c: w.do(growth.extend_join, c.id, c.attempt, PLAN),
    "preempt": lambda w, c: w.do(steps.preempt, w.worker_id, reason="gone"),
    "release_worker": lambda w, c: w.do(sweeps.release_worker, w.worker_id, reason="gone"),
}


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("run_status", ["running", "paused", "cancelling"])
def test_a_step_transition_whose_answer_was_lost_is_right_when_run_again(
    world: World, name: str, run_status: str
) -> None:
    run = world.submit(chain(group(sig("a", link_error=sig("oops")), sig("b")), sig("c")))
    claim = world.claim(run, "a")
    if run_status != "running":
        world.do(runs.pause if run_status == "paused" else runs.cancel, run)
    try:
        REPEATED[name](world, claim)
    except StepCancelled:
        return  # refused both times
    world.check()
    before = world.rows()
    REPEATED[name](world, claim)
    assert world.rows() == before


def test_an_outcome_stays_recorded_when_the_step_has_gone_on(world: World) -> None:
    run = world.submit(sig("a"))
    claim = world.claim(run, "a")
    world.do(steps.retry, claim.id, claim.attempt, ERROR)
    again = world.claim(run, "a")
    world.do(steps.retry, claim.id, claim.attempt, ERROR)  # the answer to the first was lost for long
    assert world.stale(steps.fail, claim.id, claim.attempt, ERROR)
    world.settle(again)


def test_a_claim_whose_answer_was_lost_is_found_again(world: World) -> None:
    run = world.submit(sig("a"))
    step, token = world.step(run, "a"), str(uuid.uuid4())
    first = world.do(steps.claim, step.id, 0, task="a", worker_id=world.worker_id, pid=1, token=token)
    assert first is not None
    assert world.do(steps.claim, step.id, 0, task="a", worker_id=world.worker_id, pid=1, token=token) == first
    assert world.try_claim(step.id, 0) is None
    assert world.try_claim(step.id, 1) is None


def test_a_submit_whose_answer_was_lost_makes_one_run(world: World) -> None:
    run_id, plan = str(uuid.uuid4()), plan_of(chain(sig("a"), sig("b")))
    for key in (None, "k"):
        run_id = str(uuid.uuid4())
        plan = plan_of(chain(sig("a"), sig("b")))
        world.do(submit, run_id, plan, key=key)
        before = world.rows()
        assert world.do(submit, run_id, plan, key=key) == (run_id, [])
        assert world.rows() == before


@pytest.mark.parametrize("command", [runs.pause, runs.cancel])
def test_a_command_given_twice_is_refused_and_changes_nothing(world: World, command: Callable[..., Any]) -> None:
    run = world.submit(group(sig("a"), sig("b")))
    world.claim(run, "a")
    world.do(command, run)
    before = world.rows()
    with pytest.raises(IllegalTransitionError):
        world.do(command, run)
    assert world.rows() == before


def test_a_refused_transition_rolls_back_what_the_caller_did_in_it(world: World) -> None:
    run = world.submit(sig("a"))
    claim = world.claim(run, "a")

    def mark_and_fence(conn: Any) -> None:
        query(conn, "UPDATE byrd.runs SET title = 'changed'")
        steps.check_owner(conn, claim.id, claim.attempt + 1)

    with pytest.raises(StaleAttempt):
        world.do(mark_and_fence)
    assert world.run(run).title == "test"
