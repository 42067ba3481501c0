"""Sleeps and waits for signals: what the statements of the store do with them."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

import byrd
from byrd.errors import IllegalTransitionError, RunNotFoundError
from byrd.store import growth, locks, reading, runs, sagas, steps, sweeps, waits
from byrd.store.rows import query
from tests.store.test_races import race
from tests.store.world import World, nodes, plan_of, sig


def send(world: World, run: str, name: str, payload: Any = None, **options: Any) -> list[Any]:
    return list(world.do(waits.signal, run, name, json.dumps(payload), **options))


def settle(world: World, run: str, *tasks: str) -> None:
    for task in tasks:
        world.settle(world.claim(run, task))


def events(world: World, run: str) -> list[tuple[str, Any]]:
    return [(row["event"], row["step_no"]) for row in world.do(reading.history, run)]


# -- sleeps ----------------------------------------------------------------------------------------


def test_a_sleep_holds_no_message_and_hands_on_its_value(world: World) -> None:
    run = world.submit(chain(sig("a"), byrd.sleep(60), sig("b")))
    assert world.settle(world.claim(run, "a")) == []
    step = world.step(run, "byrd.sleep")
    assert (step.status, step.attempt, step.queue, step.sends) == ("waiting", 0, None, 0)
    assert step.run_at is not None
    assert step.ready_at is not None
    assert step.run_at - step.ready_at == timedelta(seconds=60)
    assert world.end_waits() == []
    world.check()
    world.wake(run, "byrd.sleep")
    [ready] = world.end_waits()
    assert (ready.task, ready.due) == ("b", True)
    assert world.claim(run, "b").input == '"a"'
    assert world.end_waits() == []


def test_a_sleep_alone_is_a_run(world: World) -> None:
    run = world.submit(byrd.sleep(0))
    assert world.step(run, 0).status == "waiting"
    assert world.end_waits() == []
    assert world.run(run).status == "succeeded"
    assert world.result(run) is None


def test_a_sleep_hands_on_what_it_is_given(world: World) -> None:
    run = world.submit(byrd.sleep(0).clone(args=({"n": 1},)))
    world.end_waits()
    assert world.result(run) == {"n": 1}


def test_an_immutable_sleep_hands_on_nothing(world: World) -> None:
    run = world.submit(chain(sig("a"), byrd.sleep(0).set(immutable=True)))
    settle(world, run, "a")
    world.end_waits()
    assert world.result(run) is None


def test_a_sleep_until_a_time(world: World) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    run = world.submit(chain(byrd.sleep(until=later), byrd.sleep(until=datetime(2020, 1, 1))))  # noqa: DTZ001 - so may users
    assert world.step(run, 0).run_at == later
    assert world.end_waits() == []
    world.wake(run, 0)
    world.end_waits()
    assert world.step(run, 1).run_at == datetime(2020, 1, 1, tzinfo=UTC)
    world.end_waits()
    assert world.run(run).status == "succeeded"


def test_sleeps_in_a_group_are_joined(world: World) -> None:
    run = world.submit(chain(sig("a"), group(byrd.sleep(0), chain(byrd.sleep(0), sig("b")), byrd.sleep(60)), sig("c")))
    settle(world, run, "a")
    assert [w.task for w in world.end_waits()] == ["b"]
    settle(world, run, "b")
    assert world.step(run, "c").status == "pending"
    world.sql("UPDATE byrd.steps SET run_at = now(), wake_at = now() WHERE status = 'waiting' RETURNING 1")
    assert [w.task for w in world.end_waits()] == ["c"]
    assert json.loads(world.claim(run, "c").input or "") == ["a", "b", "a"]


def test_a_chord_whose_body_is_a_sleep_hands_on_the_list(world: World) -> None:
    run = world.submit(chain(chord([sig("a"), sig("b")], byrd.sleep(0)), sig("c")))
    settle(world, run, "a", "b")
    world.end_waits()
    assert json.loads(world.claim(run, "c").input or "") == ["a", "b"]


def test_callbacks_hang_on_a_sleep(world: World) -> None:
    run = world.submit(chain(sig("a"), byrd.sleep(0).set(link=sig("told"))))
    settle(world, run, "a")
    assert [w.task for w in world.end_waits()] == ["told"]
    assert world.claim(run, "told").input == '"a"'


def test_a_sleep_in_an_errback_hands_on_the_id_of_the_failed_step(world: World) -> None:
    run = world.submit(sig("a", link_error=chain(byrd.sleep(0), sig("alert"))))
    world.failing = {"a"}
    settle(world, run, "a")
    assert world.run(run).status == "running"
    world.end_waits()
    assert json.loads(world.claim(run, "alert").input or "") == world.step(run, "a").id


def test_a_delay_comes_before_the_sleep(world: World) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=100)
    run = world.submit(
        group(byrd.sleep(60).set(countdown=5), byrd.sleep(60).set(eta=soon), byrd.sleep(until=soon).set(countdown=500))
    )
    [first, second, third] = [s for s in world.steps(run) if s.task]
    assert first.ready_at is not None
    assert first.run_at == first.ready_at + timedelta(seconds=65)
    assert second.run_at == soon + timedelta(seconds=60)
    assert third.run_at == soon


# -- signals ---------------------------------------------------------------------------------------


def test_a_signal_ends_its_wait_in_its_own_transaction(world: World) -> None:
    run = world.submit(chain(sig("a"), byrd.wait_for("ok"), sig("b")))
    settle(world, run, "a")
    step = world.step(run, 1)
    assert (step.status, step.signal, step.run_at) == ("waiting", "ok", None)
    [ready] = send(world, run, "ok", {"by": "ann"}, by="ann@desk")
    assert ready.task == "b"
    assert json.loads(world.claim(run, "b").input or "") == {"by": "ann"}
    history = world.do(reading.history, run)
    [sent] = [row for row in history if row["event"] == "signalled"]
    assert sent["detail"] == {"signal": "ok", "id": sent["detail"]["id"], "by": "ann@desk", "payload": {"by": "ann"}}
    [delivered] = [row for row in history if row["event"] == "signal_delivered"]
    assert (delivered["step_no"], delivered["detail"]["id"]) == (1, sent["detail"]["id"])


def test_a_signal_that_comes_early_is_kept(world: World) -> None:
    run = world.submit(chain(sig("a"), byrd.wait_for("ok", timeout=60), sig("b")))
    assert send(world, run, "ok", 1) == []
    assert send(world, run, "other", 2) == []
    world.check()
    settle(world, run, "a")
    assert [w.task for w in world.end_waits()] == ["b"]
    assert world.step(run, 1).result == "1"


def test_each_signal_is_delivered_once_and_in_order(world: World) -> None:
    run = world.submit(chain(byrd.wait_for("n"), byrd.wait_for("n"), byrd.wait_for("n")))
    for number in (1, 2):
        send(world, run, "n", number)
    world.end_waits()
    assert [s.result for s in world.steps(run)] == ["1", "2", None]
    send(world, run, "n", 3)
    assert world.run(run).status == "succeeded"
    assert [s.result for s in world.steps(run)] == ["1", "2", "3"]
    assert [row.step_no for row in world.sql("SELECT step_no FROM byrd.signals ORDER BY id")] == [0, 1, 2]


def test_of_two_waits_the_first_has_the_signal_and_the_other_waits_on(world: World) -> None:
    run = world.submit(group(byrd.wait_for("ok"), byrd.wait_for("ok"), byrd.wait_for("no")))
    send(world, run, "ok", "x")
    assert [s.result for s in world.steps(run) if s.task] == ['"x"', None, None]
    world.check()
    send(world, run, "ok", "y")
    send(world, run, "no", "z")
    assert world.result(run) == ["x", "y", "z"]


def test_the_same_command_signals_once(world: World) -> None:
    run, token = world.submit(chain(byrd.wait_for("ok"), byrd.wait_for("ok"))), str(uuid.uuid4())
    for _ in range(2):
        send(world, run, "ok", token=token)
    assert [s.status for s in world.steps(run)] == ["succeeded", "waiting"]


def test_a_timeout_fails_the_step_by_name(world: World) -> None:
    run = world.submit(chain(byrd.wait_for("ok", timeout=1.5).on_error(sig("alert")), sig("b")))
    world.sql(
        """UPDATE byrd.steps SET run_at = now(), ready_at = now() - interval '1.5 s', wake_at = now()
            WHERE status = 'waiting' RETURNING 1"""
    )
    assert [w.task for w in world.end_waits()] == ["alert"]
    assert world.statuses(run)["b"] == "skipped"
    settle(world, run, "alert")
    row = world.run(run)
    assert row.status == "failed"
    error = json.loads(row.error or "")
    assert (error["exc_type"], error["exc_module"]) == ("SignalTimeoutError", "byrd.errors")
    assert error["exc_message"] == ["the signal 'ok' did not come within 1.5 s"]
    with pytest.raises(IllegalTransitionError, match="is failed"):
        send(world, run, "ok")


@pytest.mark.parametrize("default", [None, {"ok": False}])
def test_a_default_is_the_value_after_the_timeout(world: World, default: Any) -> None:
    run = world.submit(chain(sig("a"), byrd.wait_for("ok", timeout=60, default=default)))
    settle(world, run, "a")
    world.wake(run, 1)
    world.end_waits()
    assert world.run(run).status == "succeeded"
    assert world.result(run) == default


def test_a_signal_that_was_sent_before_the_timeout_was_recorded_counts(world: World) -> None:
    run = world.submit(byrd.wait_for("ok", timeout=60))
    world.wake(run, 0)
    send(world, run, "ok", 7)
    assert world.result(run) == 7


def test_signals_by_sql(world: World) -> None:
    run = world.submit(chain(byrd.wait_for("ok"), sig("b")))
    world.sql("""SELECT byrd.signal(%(run)s, 'ok', '{"n": 1}')""", run=run)
    assert [w.task for w in world.end_waits()] == ["b"]
    assert json.loads(world.claim(run, "b").input or "") == {"n": 1}
    [sent] = [row for row in world.do(reading.history, run) if row["event"] == "signalled"]
    assert sent["detail"]["by"] == world.sql("SELECT session_user::text AS who")[0].who
    world.sql("SELECT byrd.signal(%(run)s, 'later')", run=run)
    assert world.sql("SELECT payload FROM byrd.signals WHERE name = 'later'")[0].payload == "null"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("byrd.signal(%(run)s, 'ok', 'no json')", "invalid input syntax for type json"),
        ("byrd.signal(%(run)s, 'not ok')", "the name of a signal"),
        ("byrd.signal(%(run)s, NULL)", "the name of a signal"),
        ("byrd.signal(gen_random_uuid(), 'ok')", "no run has the id"),
    ],
)
def test_sql_refuses_what_is_no_signal(world: World, call: str, words: str) -> None:
    run = world.submit(byrd.wait_for("ok"))
    before = world.rows()
    with pytest.raises(DBAPIError, match=words):
        world.sql(f"SELECT {call}", run=run)
    assert world.rows() == before


def test_a_run_that_has_ended_or_is_unknown_takes_no_signal(world: World) -> None:
    run = world.submit(byrd.wait_for("ok"))
    world.do(runs.cancel, run)
    before = world.rows()
    with pytest.raises(IllegalTransitionError, match="is cancelled: a signal needs a run that has not ended"):
        send(world, run, "ok")
    with pytest.raises(DBAPIError, match="is cancelled: a signal needs a run that has not ended"):
        world.sql("SELECT byrd.signal(%(run)s, 'ok')", run=run)
    with pytest.raises(RunNotFoundError):
        send(world, str(uuid.uuid4()), "ok")
    assert world.rows() == before


def compensating(world: World) -> str:
    run = world.submit(chain(group(sig("saga_a"), sig("saga_b")), sig("bad")))
    world.drive(run, until=["bad"])
    return run


def cancelling(world: World) -> str:
    run = world.submit(group(byrd.saga(sig("saga_a"), sig("bad")), sig("c")))
    settle(world, run, "saga_a", "bad")
    world.end_waits()
    world.do(runs.cancel, run)
    return run


@pytest.mark.parametrize("sql", [True, False], ids=["sql", "code"])
@pytest.mark.parametrize("status", ["compensating", "cancelling", "rollback_stuck"])
def test_a_compensation_that_waits_takes_its_signal(world: World, status: str, sql: bool) -> None:
    world.failing = {"bad", "undo_saga_b"}
    run = cancelling(world) if status == "cancelling" else compensating(world)
    claim = world.claim(run, "undo_saga_a")
    world.do(waits.give_way, claim.id, claim.attempt, "ok", "step:wait ok", timeout=None)
    if status == "rollback_stuck":
        settle(world, run, "undo_saga_b")
    assert world.run(run).status == status
    assert [found.step_no for found in world.do(waits.list_awaited)] == [claim.no]
    if sql:
        world.sql("SELECT byrd.signal(%(run)s, 'ok', '1')", run=run)
    else:
        send(world, run, "ok", 1)
    world.check()
    if status == "rollback_stuck":
        assert world.do(sweeps.take_due) == []
        woken = world.do(sagas.skip, run, world.step(run, "undo_saga_b").no, reason="so")
    else:
        woken = world.do(sweeps.take_due)
    assert [w.id for w in woken] == [claim.id]
    claim = world.claim(run, "undo_saga_a")
    assert world.do(waits.take, claim.id, claim.attempt, "ok", "step:wait ok", timeout=None).payload == "1"
    world.settle(claim)
    world.failing = {"bad"}
    assert world.drive(run).status == ("cancelled" if status == "cancelling" else "failed")


def test_a_wait_beside_a_saga_that_is_stuck_takes_its_signal(world: World) -> None:
    world.failing = {"bad", "undo_saga_b"}
    run = world.submit(group(byrd.saga(sig("saga_b"), sig("bad")), chain(byrd.wait_for("ok"), sig("c"))))
    settle(world, run, "saga_b", "bad")
    world.end_waits()
    settle(world, run, "undo_saga_b")
    assert world.run(run).status == "rollback_stuck"
    send(world, run, "ok", 1)
    world.check()
    assert world.step(run, "byrd.wait_for").status == "succeeded"
    step = world.step(run, "c")
    assert world.try_claim(step.id, step.attempt) is None
    world.do(sagas.skip, run, world.step(run, "undo_saga_b").no, reason="so")
    assert world.drive(run).status == "failed"
    assert "c" in world.ran


# -- commands on runs that wait ----------------------------------------------------------------------


def test_time_passes_in_a_paused_run_but_ends_nothing(world: World) -> None:
    run = world.submit(chain(byrd.sleep(60), sig("b")))
    world.do(runs.pause, run)
    world.wake(run, 0)
    assert world.end_waits() == []
    assert world.step(run, 0).status == "waiting"
    assert world.do(sweeps.seconds_until_due, at_most=9.0) == 9.0, "a paused run costs the relay nothing"
    world.do(runs.resume, run)
    assert world.do(sweeps.seconds_until_due, at_most=9.0) == 0.0
    assert [w.task for w in world.end_waits()] == ["b"]


def test_a_paused_run_takes_signals_and_goes_on_when_it_is_resumed(world: World) -> None:
    run = world.submit(group(chain(byrd.wait_for("ok"), sig("b")), byrd.wait_for("sql")))
    world.do(runs.pause, run)
    send(world, run, "ok", 1)
    world.sql("SELECT byrd.signal(%(run)s, 'sql', '2')", run=run)
    world.end_waits()
    assert world.try_claim(world.step(run, "b").id, 0) is None
    world.do(runs.resume, run)
    settle(world, run, "b")
    assert world.result(run) == ["b", 2]


def test_a_wait_that_has_timed_out_while_its_run_was_paused_fails_at_the_resume(world: World) -> None:
    run = world.submit(byrd.wait_for("ok", timeout=60))
    world.do(runs.pause, run)
    world.wake(run, 0)
    world.end_waits()
    world.do(runs.resume, run)
    world.end_waits()
    assert world.run(run).status == "failed"


def test_cancel_ends_waits(world: World) -> None:
    run = world.submit(group(byrd.sleep(60), byrd.wait_for("ok"), sig("a")))
    world.do(runs.cancel, run)
    assert world.run(run).status == "cancelled"
    assert {s.status for s in world.steps(run)} == {"cancelled"}


def test_a_deadline_ends_waits(world: World) -> None:
    run = world.submit(byrd.wait_for("ok"), deadline=0.0)
    world.do(sweeps.end_overdue_runs, '{"exc_type": "RunTimeoutError"}')
    assert world.run(run).status == "failed"


def test_a_retry_waits_anew_and_keeps_what_was_delivered(world: World) -> None:
    run = world.submit(chain(byrd.wait_for("first"), byrd.wait_for("ok", timeout=60), sig("b")))
    send(world, run, "first", 1)
    world.wake(run, 1)
    world.end_waits()
    assert world.run(run).status == "failed"
    world.do(runs.retry, run)
    step = world.step(run, 1)
    assert (step.status, world.step(run, 0).result) == ("waiting", "1")
    assert step.run_at is not None
    assert step.ready_at is not None
    assert step.run_at - step.ready_at == timedelta(seconds=60)
    world.check()
    send(world, run, "ok", 2)
    settle(world, run, "b")
    assert world.run(run).status == "succeeded"


def test_a_kept_signal_outlives_the_end_and_a_retry(world: World) -> None:
    world.failing = {"a"}
    run = world.submit(chain(sig("a"), byrd.wait_for("ok")))
    send(world, run, "ok", 5)
    settle(world, run, "a")
    assert world.run(run).status == "failed"
    world.failing = set()
    world.do(runs.retry, run)
    settle(world, run, "a")
    world.end_waits()
    assert world.result(run) == 5


def test_a_wait_can_be_revoked(world: World) -> None:
    run = world.submit(chain(byrd.sleep(60), byrd.wait_for("ok")))
    later = world.step(run, 1)
    world.do(steps.revoke_waiting, later.id)
    world.wake(run, 0)
    world.end_waits()
    assert world.step(run, 1).status == "waiting"
    world.end_waits()
    assert world.step(run, 1).status == "cancelled"
    assert json.loads(world.run(run).error or "")["exc_message"] == ["revoked"]
    run = world.submit(byrd.sleep(60))
    world.do(steps.revoke_waiting, world.step(run, 0).id)
    assert world.run(run).status == "failed"


def test_a_wait_that_begins_too_late_expires(world: World) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    run = world.submit(chain(sig("a"), byrd.wait_for("ok").set(expires=past)))
    send(world, run, "ok")
    settle(world, run, "a")
    world.end_waits()
    assert world.step(run, 1).status == "cancelled"
    assert world.sql("SELECT 1 FROM byrd.signals WHERE delivered_at IS NULL")


def test_a_task_may_replace_itself_by_a_canvas_that_waits(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b")))
    claim = world.claim(run, "a")
    assert world.do(growth.replace, claim.id, claim.attempt, plan_of(chain(byrd.sleep(60), byrd.wait_for("ok")))) == []
    world.wake(run, "byrd.sleep")
    world.end_waits()
    world.check()
    send(world, run, "ok", "value")
    assert world.claim(run, "b").input == '"value"'


def test_a_saga_with_a_wait_that_times_out_rolls_back(world: World) -> None:
    run = world.submit(chain(sig("saga_a"), byrd.wait_for("ok", timeout=60), sig("b")))
    settle(world, run, "saga_a")
    world.wake(run, 1)
    [undo] = world.end_waits()
    assert undo.task == "undo_saga_a"
    assert send(world, run, "ok") == []  # too late: its wait has failed
    settle(world, run, "undo_saga_a")
    assert world.run(run).status == "failed"


# -- the relay ---------------------------------------------------------------------------------------


def test_a_thousand_waits_are_ended_in_batches(world: World) -> None:
    run = world.submit(group(byrd.sleep(0) for _ in range(250)))
    others = [world.submit(chain(byrd.sleep(0), sig("b"))) for _ in range(30)]
    rounds = 0
    while world.sql("SELECT 1 FROM byrd.steps WHERE status = 'waiting'"):
        world.end_waits()
        world.check()
        rounds += 1
    assert rounds <= 8
    assert len(world.result(run)) == 250
    assert {world.step(other, "b").status for other in others} == {"ready"}


def test_the_relay_sleeps_until_the_first_wait_is_over(world: World) -> None:
    world.submit(byrd.wait_for("ok"))
    assert world.do(sweeps.seconds_until_due, at_most=9.0) == 9.0
    world.submit(byrd.sleep(5))
    assert 4.0 < world.do(sweeps.seconds_until_due, at_most=9.0) <= 5.0


def test_a_clock_that_was_set_back_makes_no_sleep_longer(world: World) -> None:
    until = datetime.now(UTC) + timedelta(hours=5)
    run = world.submit(group(byrd.sleep(60), byrd.sleep(until=until), byrd.wait_for("ok"), byrd.wait_for("sql")))
    world.sql("SELECT byrd.signal(%(run)s, 'sql')", run=run)
    world.sql(
        """UPDATE byrd.steps SET ready_at = ready_at + interval '1 hour',
                  wake_at = CASE WHEN eta IS NULL THEN wake_at + interval '1 hour' ELSE wake_at END,
                  run_at = CASE WHEN eta IS NULL THEN run_at + interval '1 hour' ELSE run_at END RETURNING 1"""
    )
    world.do(sweeps.follow_clock_back)
    found = {(s.task, s.signal): s for s in world.steps(run) if s.kind == "wait"}
    [by_seconds, by_time] = [s for s in world.steps(run) if s.task == "byrd.sleep"]
    assert by_seconds.run_at is not None
    assert by_seconds.run_at < datetime.now(UTC) + timedelta(seconds=61)
    assert by_seconds.wake_at == by_seconds.run_at
    assert by_time.run_at == until
    assert found["byrd.wait_for", "ok"].run_at is None
    world.end_waits()
    assert [s.status for s in world.steps(run) if s.signal] == ["waiting", "succeeded"]


def test_a_busy_run_is_left_for_later_and_then_waited_for(world: World) -> None:
    run = world.submit(group(byrd.sleep(0), sig("a")))
    claim = world.claim(run, "a")
    with world.store.engine.begin() as other:
        steps.complete(other, claim.id, claim.attempt, "1")
        assert world.do(waits.end_due) == ([], [run], False)
    world.do(waits.end_due_of, run)
    assert world.result(run) == [None, 1]


def test_one_process_at_a_time_ends_waits(world: World) -> None:
    world.submit(byrd.sleep(0))
    with world.store.engine.begin() as other:
        assert locks.alone(other, locks.WAITS)
        assert world.do(waits.end_due) == ([], [], False)
    world.end_waits()


@pytest.mark.parametrize("ended", ["preempted", "handed back by its worker", "done", "cancelled"])
def test_an_attempt_that_lost_its_step_neither_sleeps_nor_takes_a_signal(world: World, ended: str) -> None:
    """A mark of its own would tell the next attempt that its sleep is over."""
    run = world.submit(chain(sig("a"), sig("b")))
    old = world.claim(run, "a")
    send(world, run, "go", 1)
    if ended == "preempted":
        world.do(steps.preempt, world.worker_id, reason="gone")
        assert world.claim(run, "a").attempt == 2
    elif ended == "done":
        world.settle(old)
    elif ended == "cancelled":
        world.do(runs.cancel, run)
        world.do(steps.abandon, old.id, old.attempt)
    else:
        world.do(steps.hand_back, old.id, old.attempt, owner=world.worker_id, pid=1)
    before = world.rows()
    for statement, args, options in (
        (waits.nap, ["step:sleep x"], {"seconds": 60, "until": None}),
        (waits.take, ["go", "step:wait_for go"], {"timeout": None}),
        (waits.take, ["never", "step:wait_for never"], {"timeout": 0}),
        (waits.settle, ["step:wait_for go", "2"], {}),
        (waits.give_way, ["never", "step:wait_for never"], {"timeout": None}),
        (waits.give_way, ["never", "step:wait_for never"], {"timeout": 5.0}),
    ):
        assert world.stale(statement, old.id, old.attempt, *args, **options), statement
        assert world.rows() == before, statement


def test_a_task_that_gave_its_slot_back_may_say_so_again(world: World) -> None:
    """Postgres's answer may have been lost."""
    run = world.submit(chain(sig("a"), sig("b")))
    first = world.claim(run, "a")
    world.do(waits.nap, first.id, first.attempt, "step:sleep x", seconds=0, until=None)
    before = world.rows()
    assert world.do(waits.nap, first.id, first.attempt, "step:sleep x", seconds=0, until=None) == []
    assert world.rows() == before
    second = world.claim(run, "a")
    world.do(waits.give_way, second.id, second.attempt, "go", "step:wait_for go", timeout=60)
    before = world.rows()
    world.do(waits.give_way, second.id, second.attempt, "go", "step:wait_for go", timeout=60)
    after = world.rows()
    assert {name: after[name] for name in after if name != "steps"} == {n: before[n] for n in before if n != "steps"}
    send(world, run, "go", 1)
    third = world.claim(run, "a")
    assert third.attempt == 3
    assert world.do(waits.take, third.id, third.attempt, "go", "step:wait_for go", timeout=60).payload == "1"
    world.settle(third)


def test_a_signal_and_a_wait_that_begin_at_once_find_each_other(world: World) -> None:
    run = world.submit(chain(sig("a"), byrd.wait_for("ok"), sig("b")))
    claim = world.claim(run, "a")
    outcome = race(
        world.store,
        lambda conn: steps.complete(conn, claim.id, claim.attempt, "1"),
        lambda conn: waits.signal(conn, run, "ok", "2"),
        commit=True,
    )
    assert outcome.waited
    assert world.claim(run, "b").input == "2"
    run = world.submit(chain(sig("a"), byrd.wait_for("ok"), sig("b")))
    claim = world.claim(run, "a")
    outcome = race(
        world.store,
        lambda conn: waits.signal(conn, run, "ok", "2"),
        lambda conn: steps.complete(conn, claim.id, claim.attempt, "1"),
        commit=True,
    )
    assert outcome.waited
    world.end_waits()
    assert world.claim(run, "b").input == "2"


def test_a_hundred_thousand_waits_cost_the_relay_one_look_at_an_index(world: World) -> None:
    run = world.submit(byrd.wait_for("ok"))
    world.sql(
        """INSERT INTO byrd.steps (id, run_id, no, kind, task, status, signal, run_at, wake_at, ready_at)
           SELECT 'w' || n, %(run)s, n, 'wait', 'byrd.sleep', 'waiting', CASE WHEN n %% 2 = 0 THEN 's' || n END,
                  CASE WHEN n %% 2 = 1 THEN now() + interval '1 h' END,
                  CASE WHEN n %% 2 = 1 THEN now() + interval '1 h' ELSE 'infinity' END, now() - n * interval '1 s'
             FROM generate_series(1, 100000) n""",
        run=run,
    )
    world.sql("ANALYZE byrd.steps")
    sent: list[tuple[str, Any]] = []
    note = lambda _conn, _cursor, sql, params, *_: sent.append((sql, params))  # noqa: E731
    event.listen(world.store.engine, "before_cursor_execute", note)
    try:
        assert world.do(waits.end_due) == ([], [], False)
        assert world.do(sweeps.seconds_until_due, at_most=9.0) == 9.0
        world.do(waits.list_awaited)
    finally:
        event.remove(world.store.engine, "before_cursor_execute", note)
    assert len(sent) == 3
    # The table has 2,000 blocks; what other tests have left in the indexes is in these, too.
    for (sql, params), blocks in zip(sent, (10, 40, 200), strict=True):

        def explain(conn: Any, sql: str = sql, params: Any = params) -> Any:
            return query(conn, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", params).scalar_one()

        [plan] = world.do(explain)
        scanned = [node["Relation Name"] for node in nodes(plan["Plan"]) if node["Node Type"] == "Seq Scan"]
        assert "steps" not in scanned  # of runs there is only one
        assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < blocks, plan
    world.sql("DELETE FROM byrd.runs WHERE id = %(run)s", run=run)


def test_what_awaits_whom(world: World) -> None:
    first = world.submit(byrd.wait_for("ok", timeout=60, default={"ok": 1}))
    second = world.submit(group(byrd.wait_for("ok"), byrd.wait_for("other"), byrd.sleep(60)))
    found = world.do(waits.list_awaited)
    assert [(w.run_id, w.step_no, w.signal) for w in found] == [
        (first, 0, "ok"),
        (second, 0, "ok"),
        (second, 1, "other"),
    ]
    assert found[0].until is not None
    assert found[0].until - found[0].since == timedelta(seconds=60)
    assert (found[0].default, found[0].workflow, found[1].until, found[1].default) == ('{"ok": 1}', "test", None, None)
    assert [w.step_no for w in world.do(waits.list_awaited, signal="other")] == [1]
    assert world.do(waits.list_awaited, workflow="nothing") == []
    assert len(world.do(waits.list_awaited, limit=2)) == 2
    assert {w.of for w in found} == {None}


def awaited(world: World, **wanted: Any) -> list[tuple[str, str | None]]:
    """Return the signals that are awaited, each with who is to send it."""
    return [(w.signal, w.of) for w in world.do(waits.list_awaited, **wanted)]


def test_whom_a_wait_names_is_listed(world: World) -> None:
    odd = """Ann O'Neill \\ "the boss", 100 % {of} sales: 人事部"""
    world.submit(
        group(
            byrd.wait_for("approval", of="finance"),
            byrd.wait_for("approval", of=odd, timeout=60),
            byrd.wait_for("go", of="finance"),
            byrd.wait_for("go"),
        )
    )
    assert awaited(world) == [("approval", "finance"), ("approval", odd), ("go", "finance"), ("go", None)]
    assert awaited(world, of="finance") == [("approval", "finance"), ("go", "finance")]
    assert awaited(world, of="finance", signal="go") == [("go", "finance")]
    assert awaited(world, of=odd) == [("approval", odd)]
    assert awaited(world, of="fin%") == []
    assert awaited(world, of="finance", limit=1) == [("approval", "finance")]
    world.check()


def test_signals_are_listed_by_the_beginning_of_their_names(world: World) -> None:
    names = ["approval:finance", "approval:legal", "approval", "approvals", "a_b", "axb", "A_b"]
    world.submit(group(byrd.wait_for(name) for name in names))

    def found(signal: str) -> list[str]:
        return [name for name, _ in awaited(world, signal=signal)]

    assert found("approval:*") == ["approval:finance", "approval:legal"]
    assert found("approval*") == names[:4]
    assert found("approval") == ["approval"]
    assert found("a_*") == ["a_b"], "an underscore is a letter as any other"
    assert found("*") == names
    assert found("nothing*") == []


def test_whom_a_wait_names_does_not_say_who_may_answer(world: World) -> None:
    """A signal goes to the wait of its name that began first, as ever."""
    run = world.submit(group(byrd.wait_for("ok", of="ann"), byrd.wait_for("ok", of="bea")))
    send(world, run, "ok", 1, by="bea")
    assert awaited(world) == [("ok", "bea")]
    send(world, run, "ok", 2)
    assert awaited(world) == []
    assert world.result(run) == [1, 2]


def test_whom_a_wait_names_outlives_a_pause_and_a_retry(world: World) -> None:
    run = world.submit(chain(sig("a"), byrd.wait_for("ok", of="finance", timeout=1.5), sig("b")))
    assert awaited(world) == [], "the wait has not begun"
    settle(world, run, "a")
    world.do(runs.pause, run)
    assert awaited(world) == [("ok", "finance")]
    world.do(runs.resume, run)
    assert awaited(world) == [("ok", "finance")]
    world.sql(
        """UPDATE byrd.steps SET run_at = now(), ready_at = now() - interval '1.5 s', wake_at = now()
            WHERE status = 'waiting' RETURNING 1"""
    )
    world.end_waits()
    assert json.loads(world.run(run).error or "")["exc_message"] == [
        "the signal 'ok' of finance did not come within 1.5 s"
    ]
    assert awaited(world) == []
    world.do(runs.retry, run)
    assert awaited(world) == [("ok", "finance")]
    world.do(runs.cancel, run)
    assert awaited(world) == []


def test_whom_a_wait_names_in_what_comes_in_a_tasks_place(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b")))
    claim = world.claim(run, "a")
    world.do(growth.replace, claim.id, claim.attempt, plan_of(byrd.wait_for("ok", of="finance")))
    assert awaited(world) == [("ok", "finance")]


def test_whom_a_task_names_is_listed_until_it_has_its_signal(world: World) -> None:
    run = world.submit(sig("a"))
    first = world.claim(run, "a")
    world.do(waits.give_way, first.id, first.attempt, "go", "step:wait_for go", timeout=None, of="finance")
    assert awaited(world, of="finance") == [("go", "finance")]
    world.check()
    send(world, run, "go", 1)
    second = world.claim(run, "a")
    assert awaited(world) == []
    assert world.do(waits.take, second.id, second.attempt, "go", "step:wait_for go", timeout=None).payload == "1"
    assert (world.step(run, "a").signal, world.step(run, "a").signal_of) == (None, None)
    # The next wait of the task is another one's, or nobody's.
    world.do(waits.give_way, second.id, second.attempt, "more", "step:wait_for more", timeout=60, of="ann")
    assert awaited(world) == [("more", "ann")]
    # Its worker dies before the signal is taken.
    send(world, run, "more", 2)
    third = world.claim(run, "a")
    world.do(steps.preempt, world.worker_id, reason="gone")
    fourth = world.claim(run, "a")
    assert fourth.attempt == third.attempt + 1
    world.do(waits.take, fourth.id, fourth.attempt, "more", "step:wait_for more", timeout=60)
    world.do(waits.give_way, fourth.id, fourth.attempt, "last", "step:wait_for last", timeout=60, of="bea")
    assert awaited(world) == [("last", "bea")]
    # The next attempt, of other code say, waits for something else.
    send(world, run, "last", 3)
    fifth = world.claim(run, "a")
    world.do(waits.give_way, fifth.id, fifth.attempt, "other", "step:wait_for other", timeout=None)
    assert awaited(world) == [("other", None)]
    world.do(runs.cancel, run)
    assert awaited(world) == []
