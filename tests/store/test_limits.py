"""Limits in the tables: who is admitted, who waits, in which order, and what cannot leak."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import chain, group

from byrd.errors import IllegalTransitionError, LimitNotFoundError, StaleAttempt
from byrd.limits import Limit
from byrd.store import Claim, Store, Wakeup, limits, reading, runs, steps, sweeps
from byrd.store.limits import Admission, LimitRow, Place
from tests.store.world import ERROR, World, plan_of, sig, submit

API = Place("api", "k")


def seconds(when: datetime | None) -> float:
    """Return how far away a time is."""
    assert when is not None
    return (when - datetime.now(UTC)).total_seconds()


def called(priority: int | None) -> Any:
    """Return a call of the task, of a priority or none."""
    return sig("x") if priority is None else sig("x", priority=priority)


class Limited:
    """A run of ``count`` steps of one task that has a limit."""

    def __init__(
        self, world: World, limit: Limit, count: int = 1, *, place: Place = API, priorities: Sequence[int | None] = ()
    ) -> None:
        self.world, self.limit, self.place = world, limit, place
        self.run_id = world.submit(group(called(priority) for priority in priorities or [None] * count))
        self.nos = [step.no for step in world.steps(self.run_id) if step.kind == "task"]

    def ask(self, index: int = 0, *, worker_id: str | None = None, pid: int = 1) -> Claim | Admission:
        """Have a worker take the message of a step."""
        step = self.step(index)
        found: Claim | Admission = self.world.do(
            limits.admit,
            step.id,
            step.attempt,
            limit=self.limit,
            place=self.place,
            task="x",
            worker_id=worker_id or self.world.worker_id,
            pid=pid,
            token=str(uuid.uuid4()),
        )
        return found

    def start(self, index: int = 0, **options: Any) -> Claim:
        """The same of a step that must be admitted."""
        found = self.ask(index, **options)
        assert isinstance(found, Claim), found
        return found

    def step(self, index: int = 0) -> Any:
        [row] = self.world.sql(
            "SELECT * FROM byrd.steps WHERE run_id = %(run)s AND no = %(no)s", run=self.run_id, no=self.nos[index]
        )
        return row

    def given(self) -> list[int]:
        """The steps that may start, or are about to be told so."""
        return [i for i in range(len(self.nos)) if self.step(i).status == "ready" and self.step(i).limit_slot]

    def waiting(self) -> list[int]:
        """The steps that wait without a place."""
        rows = [self.step(i) for i in range(len(self.nos))]
        return [i for i, row in enumerate(rows) if row.status == "ready" and row.limit_no and not row.limit_slot]

    def end(self, claim: Claim) -> list[Wakeup]:
        """End an attempt as a worker does."""
        found: list[Wakeup] = self.world.do(limits.ending, steps.complete, self.place, claim.id, claim.attempt, "1")
        return found

    def make_due(self, index: int) -> None:
        """Let the time of a step come now, with what it has."""
        self.world.sql(
            "UPDATE byrd.steps SET run_at = now(), wake_at = now() WHERE id = %(id)s", id=self.step(index).id
        )


def turn(world: World, step: Any) -> Any:
    return world.do(limits.turn_of, API, step.limit_no)


def key_row(world: World, place: Place = API) -> Any:
    [row] = world.sql("SELECT * FROM byrd.limit_keys WHERE name = %(name)s AND key = %(key)s", **place._asdict())
    return row


# -- concurrency -----------------------------------------------------------------------------------


def test_no_more_run_at_once_than_the_limit_says(world: World) -> None:
    run = Limited(world, Limit(concurrency=2), 5)
    first, second = run.start(0), run.start(1)
    assert (first.attempt, second.attempt) == (1, 1)
    assert [run.ask(i) for i in (2, 3, 4)] == [Admission.WAITS] * 3
    assert run.waiting() == [2, 3, 4]


def test_a_step_that_waits_has_no_attempt_no_blame_and_no_history(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), 2)
    run.start(0)
    assert run.ask(1) is Admission.WAITS
    step = run.step(1)
    assert (step.attempt, step.retries, step.preemptions, step.sends, step.status) == (0, 0, 0, 0, "ready")
    assert step.worker_id is None
    assert seconds(step.run_at) > 0
    assert world.do(reading.attempts, run.run_id) == []
    assert world.do(sweeps.take_due) == []  # no message either
    assert run.ask(1) is Admission.NOTHING  # a message that came twice


def test_a_place_that_is_freed_goes_to_the_first_that_waits_at_once(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), 4)
    running = run.start(0)
    for index in (2, 1, 3):
        assert run.ask(index) is Admission.WAITS
    for index in (2, 1, 3):
        [told] = run.end(running)
        assert (told.id, told.due, told.attempt) == (run.step(index).id, True, 0)
        running = run.start(index)
    assert run.end(running) == []


def test_a_place_goes_by_priority_then_by_the_order_in_which_they_came(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), priorities=[None, 9, 3, None, 0, 3, 9])
    running = run.start(0)
    assert [run.ask(index) for index in range(1, 7)] == [Admission.WAITS] * 6
    served = []
    while told := run.end(running):
        [index] = [i for i in range(7) if run.step(i).id == told[0].id]
        served.append(index)
        running = run.start(index)
    assert served == [3, 4, 2, 5, 1, 6]


def test_one_of_a_higher_priority_waits_for_none_of_a_lower_one(world: World) -> None:
    limit = Limit("1/m")
    first = Limited(world, limit, priorities=[5, 5])
    first.start(0)
    assert first.ask(1) is Admission.WAITS
    second = Limited(world, limit, priorities=[5, 4])
    assert second.ask(0) is Admission.WAITS
    assert second.ask(1) is Admission.WAITS
    before = {run.step(i).id: turn(world, run.step(i)).before for run, i in ((first, 1), (second, 0), (second, 1))}
    assert list(before.values()) == [1, 2, 0]
    world.sql("UPDATE byrd.limit_keys SET tat = now() - interval '1 s'")
    first.make_due(1)
    assert first.ask(1) is Admission.WAITS  # there is a token again, but it is not for this one
    assert second.given() == [1]


def test_who_is_put_off_again_keeps_its_place_in_its_priority(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), priorities=[None, 9, 9, 2])
    run.start(0)
    assert [run.ask(index) for index in (1, 2, 3)] == [Admission.WAITS] * 3
    tickets = [run.step(index).limit_no for index in (1, 2, 3)]
    assert tickets[2] < tickets[0] < tickets[1]
    for index in (1, 3):
        run.make_due(index)
        assert run.ask(index) is Admission.WAITS
    assert [run.step(index).limit_no for index in (1, 2, 3)] == tickets


def test_a_header_that_is_called_priority_is_none(world: World) -> None:
    limit = Limit(concurrency=1)
    run = Limited(world, limit, 2)
    other = Limited(world, limit)
    world.sql(
        """UPDATE byrd.steps SET options = '{"headers": {"priority": "high"}}' WHERE run_id = %(run)s""",
        run=run.run_id,
    )
    run.start(0)
    assert (run.ask(1), other.ask(0)) == (Admission.WAITS, Admission.WAITS)
    assert run.step(1).limit_no < other.step(0).limit_no


@pytest.mark.parametrize(
    "end",
    [
        lambda w, c: w.do(steps.complete, c.id, c.attempt, "1"),
        lambda w, c: w.do(steps.fail, c.id, c.attempt, ERROR),
        lambda w, c: w.do(steps.retry, c.id, c.attempt, ERROR),
        lambda w, c: w.do(steps.retry, c.id, c.attempt, ERROR, delay=60),
        lambda w, c: w.do(steps.hand_back, c.id, c.attempt),
        lambda w, c: w.do(steps.ignore, c.id, c.attempt, ERROR),
        lambda w, c: w.do(steps.revoke, c.id, "terminated", attempt=c.attempt),
        lambda w, c: w.do(steps.preempt, w.worker_id, pid=c.attempt, reason="gone"),
        lambda w, c: w.do(steps.preempt, w.worker_id, step=(c.id, c.attempt), reason="gone", max_preemptions=0),
        lambda w, c: w.do(sweeps.release_worker, w.worker_id, reason="it stops"),
        lambda w, c: w.sql(
            """UPDATE byrd.steps SET status = 'succeeded', result = '1', worker_id = NULL, pid = NULL, claim = NULL,
                      limit_slot = NULL, finished_at = now() WHERE id = %(id)s""",
            id=c.id,
        ),
    ],
    ids=[
        "complete", "fail", "retry", "retry later", "hand back", "ignore", "revoke", "preempt", "give up", "release",
        "anything",
    ],
)  # fmt: skip
def test_whatever_ends_an_attempt_frees_its_place(world: World, end: Any) -> None:
    run = Limited(world, Limit(concurrency=1), 2)
    claim = run.start(0)
    assert run.ask(1) is Admission.WAITS
    end(world, claim)
    assert run.given() == [1]
    assert run.step(0).limit_slot is None
    world.worker_id = world.add_worker()
    run.start(1)
    world.sql("DELETE FROM byrd.runs")  # one of these is no transition


def test_the_place_of_a_dead_worker_is_free_with_its_lease(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), 2)
    dead = world.add_worker()
    run.start(0, worker_id=dead)
    assert run.ask(1) is Admission.WAITS
    world.do(sweeps.recover)
    assert run.given() == []
    world.end_lease(dead)
    world.do(sweeps.recover)
    assert run.given() == [1]


def test_a_run_that_is_cancelled_gives_back_what_it_was_given(world: World) -> None:
    limit = Limit(concurrency=1)
    first, second, third = (Limited(world, limit) for _ in range(3))
    running = first.start()
    assert (second.ask(), third.ask()) == (Admission.WAITS, Admission.WAITS)
    first.end(running)
    assert (second.given(), third.given()) == ([0], [])
    world.do(runs.cancel, second.run_id)
    assert third.given() == [0]


def test_those_of_a_paused_run_are_passed_over(world: World) -> None:
    limit = Limit(concurrency=1)
    first, paused, third = (Limited(world, limit) for _ in range(3))
    running = first.start()
    assert (paused.ask(), third.ask()) == (Admission.WAITS, Admission.WAITS)
    world.do(runs.pause, paused.run_id)
    first.end(running)
    assert third.given() == [0]
    running = third.start()
    world.do(runs.resume, paused.run_id)
    third.end(running)
    assert paused.given() == [0]  # it has kept its turn
    paused.start()


def test_one_that_is_resumed_when_nobody_else_is_there_has_its_turn(world: World) -> None:
    first, paused = (Limited(world, Limit(concurrency=1)) for _ in range(2))
    running = first.start()
    assert paused.ask() is Admission.WAITS
    world.do(runs.pause, paused.run_id)
    first.end(running)
    assert key_row(world).next_at is None
    world.do(runs.resume, paused.run_id)
    world.do(limits.give_due)
    assert paused.given() == [0]


def test_a_step_that_was_given_a_place_and_does_not_turn_up_loses_it(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), 3)
    running = run.start(0)
    assert (run.ask(1), run.ask(2)) == (Admission.WAITS, Admission.WAITS)
    run.end(running)
    assert run.given() == [1]
    assert 5 < seconds(key_row(world).next_at) < 11
    world.sql("UPDATE byrd.steps SET limit_slot = now() - interval '11 s' WHERE limit_slot IS NOT NULL")
    world.sql("UPDATE byrd.limit_keys SET next_at = now()")
    assert world.do(limits.give_due) == 1
    assert run.given() == [1, 2]
    running = run.start(2)
    assert run.ask(1) is Admission.WAITS  # too late, but the next one is its
    assert [told.id for told in run.end(running)] == [run.step(1).id]


def test_one_that_comes_anew_does_not_pass_those_who_wait(world: World) -> None:
    run = Limited(world, Limit(concurrency=2), 4)
    running = [run.start(0), run.start(1)]
    assert run.ask(2) is Admission.WAITS
    run.end(running[0])
    assert run.ask(3) is Admission.WAITS  # the place is kept for the one before it
    run.start(2)


def test_claims_at_the_same_time_share_the_places(world: World, store: Store) -> None:
    run = Limited(world, Limit(concurrency=3), 24)
    running: list[Claim] = []
    most: list[int] = []

    def worker(indices: range) -> None:
        for index in indices:
            while isinstance(found := run.ask(index), Admission):
                time.sleep(0.01)
            running.append(found)
            [(count,)] = world.sql("SELECT count(*) FROM byrd.steps WHERE status = 'running'")
            most.append(count)
            run.end(found)

    threads = [threading.Thread(target=worker, args=(range(i, 24, 8),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(running) == 24
    assert max(most) <= 3
    assert run.waiting() == run.given() == []


def test_places_are_counted_by_key_and_by_name(world: World) -> None:
    limit = Limit(concurrency=1)
    for place in (API, Place("api", "other"), Place("other", "k")):
        Limited(world, limit, place=place).start()
        assert Limited(world, limit, place=place).ask() is Admission.WAITS


# -- rates -----------------------------------------------------------------------------------------


def test_calls_are_spread_evenly_and_in_order(world: World) -> None:
    run = Limited(world, Limit("10/s"), 5)
    claim = run.start(0)
    began = run.step(0).started_at
    for index in (3, 1, 2, 4):
        assert run.ask(index) is Admission.WAITS
    run.end(claim)
    slots = [(run.step(i).limit_slot - began).total_seconds() for i in (3, 1, 2, 4)]
    assert slots == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)
    assert all(run.step(i).run_at == run.step(i).limit_slot == run.step(i).wake_at for i in (1, 2, 3, 4))


def test_those_far_from_their_turn_are_told_later(world: World) -> None:
    run = Limited(world, Limit("2/s"), 8)
    run.start(0)
    for index in range(1, 8):
        assert run.ask(index) is Admission.WAITS
    assert run.given() == [1, 2]  # a second's worth
    assert [seconds(run.step(i).run_at) for i in (3, 7)] == pytest.approx([1.5, 3.5], abs=0.4)
    assert world.do(sweeps.seconds_until_due, at_most=60.0) <= 0.5
    for _ in range(2):
        time.sleep(1.1)
        assert world.do(limits.give_due) == 1
        assert run.given() == [1, 2, 3]  # no more at once than that and a burst, whoever does not turn up
    for index in (1, 2):
        run.start(index)
    world.sql("UPDATE byrd.limit_keys SET next_at = now()")
    world.do(limits.give_due)
    assert run.given() == [3, 4, 5]


def test_a_burst_may_come_at_once_after_a_quiet_time(world: World) -> None:
    run = Limited(world, Limit("1/m", burst=3), 5)
    for index in range(3):
        run.start(index)
    assert run.ask(3) is Admission.WAITS
    assert 55 < seconds(run.step(3).run_at) < 61
    assert run.ask(4) is Admission.WAITS
    assert 115 < seconds(run.step(4).run_at) < 121
    world.sql("UPDATE byrd.limit_keys SET tat = tat - interval '1 minute', next_at = now()")
    world.do(limits.give_due)
    assert run.given() == [3]


def test_a_rate_and_a_concurrency_both_hold(world: World) -> None:
    run = Limited(world, Limit("2/s", concurrency=1), 3)
    claim = run.start(0)
    assert (run.ask(1), run.ask(2)) == (Admission.WAITS, Admission.WAITS)
    assert run.given() == []
    assert run.end(claim) == []  # the place is free, the token is to come
    assert run.given() == [1]
    assert 0 < seconds(run.step(1).run_at) <= 0.5
    run.make_due(1)
    run.start(1)
    assert run.given() == []


def test_what_waits_asks_for_itself_should_nobody_tell_it(world: World) -> None:
    run = Limited(world, Limit("1/h"), 2)
    run.start(0)
    assert run.ask(1) is Admission.WAITS
    world.sql("UPDATE byrd.limit_keys SET tat = NULL, next_at = NULL")  # nobody will
    run.make_due(1)
    assert [told.id for told in world.do(sweeps.take_due)] == [run.step(1).id]
    run.start(1)


# -- fairness --------------------------------------------------------------------------------------


def test_a_saturated_key_holds_up_no_other(world: World) -> None:
    limit = Limit("1/h", key="tenant")
    many = Limited(world, limit, 300, place=Place("api", "big"))
    many.start(0)
    for index in range(1, 300):
        assert many.ask(index) is Admission.WAITS
    assert len(world.do(sweeps.take_due)) == 0
    few = [Limited(world, limit, place=Place("api", f"small{i}")) for i in range(10)]
    for one in few:
        one.start()
    assert world.sql("SELECT count(*) FROM byrd.limit_keys WHERE next_at <= now()") == [(0,)]


def test_a_key_with_100_000_waiters_costs_no_more_than_one(world: World) -> None:
    limit = Limit(concurrency=1)
    run = Limited(world, limit, 3)
    running = run.start(0)
    assert (run.ask(1), run.ask(2)) == (Admission.WAITS, Admission.WAITS)
    template = run.step(2)
    world.sql(
        """INSERT INTO byrd.steps (id, run_id, no, kind, task, queue, status, run_at, wake_at, ready_at, limit_name,
                                   limit_key, limit_no, join_no, join_pos)
           SELECT gen_random_uuid()::text, run_id, 1000 + i, kind, task, queue, status, run_at, wake_at, ready_at,
                  limit_name, limit_key, nextval('byrd.limit_tickets'), NULL, NULL
             FROM byrd.steps, generate_series(1, 100000) i WHERE id = %(id)s""",
        id=template.id,
    )
    world.sql("ANALYZE byrd.steps")
    began = time.monotonic()
    [told] = run.end(running)
    assert told.id == run.step(1).id
    running = run.start(1)
    [told] = run.end(running)
    assert told.id == run.step(2).id
    other = Limited(world, limit, place=Place("api", "other"))
    other.end(other.start())
    assert time.monotonic() - began < 1.0
    world.sql("DELETE FROM byrd.runs WHERE id = %(id)s", id=run.run_id)


# -- changed at run time ---------------------------------------------------------------------------


def test_a_concurrency_that_is_raised_lets_more_start_at_once(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), 4)
    run.start(0)
    for index in (1, 2, 3):
        assert run.ask(index) is Admission.WAITS
    world.do(limits.change, "api", concurrency=3, by="ann")
    assert world.do(limits.give_due) == 1
    assert run.given() == [1, 2]


def test_a_concurrency_that_is_lowered_holds_even_for_those_with_a_place(world: World) -> None:
    run = Limited(world, Limit(concurrency=3), 4)
    claims = [run.start(i) for i in range(3)]
    assert run.ask(3) is Admission.WAITS
    run.end(claims[0])
    assert run.given() == [3]
    world.do(limits.change, "api", concurrency=2)
    assert run.ask(3) is Admission.WAITS
    run.end(claims[1])
    assert run.given() == [3]
    run.start(3)


def test_a_concurrency_of_0_stops_all_and_none_frees_all(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), 3)
    world.do(limits.declare, [Limit(concurrency=1, name="api")])
    world.do(limits.change, "api", concurrency=0)
    assert [run.ask(i) for i in range(3)] == [Admission.WAITS] * 3
    world.do(limits.change, "api", concurrency=None)
    world.do(limits.give_due)
    for index in range(3):
        run.start(index)
    world.do(limits.reset, "api")
    [row] = world.do(limits.list_limits)
    assert (row.concurrency, row.set_by, row.set_at) == (1, None, None)


def test_a_rate_that_is_raised_shortens_the_wait(world: World) -> None:
    run = Limited(world, Limit("1/h"), 3)
    run.start(0)
    assert (run.ask(1), run.ask(2)) == (Admission.WAITS, Admission.WAITS)
    assert seconds(run.step(1).run_at) > 3500
    world.do(limits.change, "api", rate="10/s")
    world.do(limits.give_due)
    assert run.given() == [1, 2]
    assert seconds(run.step(2).run_at) < 0.3
    world.do(limits.change, "api", rate=None)
    [row] = world.do(limits.list_limits)
    assert (row.rate, row.declared_rate) == (None, "1/h")


def test_a_rate_that_is_lowered_holds_for_the_next(world: World) -> None:
    run = Limited(world, Limit("1000/s"), 3)
    run.start(0)
    world.do(limits.change, "api", rate="1/h")
    time.sleep(4)  # what was used of the old rate is worth 3.6 s of the new one
    run.start(1)
    assert run.ask(2) is Admission.WAITS
    assert seconds(run.step(2).run_at) > 3500


def test_what_the_code_declares_is_followed_unless_it_is_set(world: World) -> None:
    def row() -> LimitRow:
        [found] = world.do(limits.list_limits)
        return found  # type: ignore[no-any-return]

    world.do(limits.declare, [Limit("1/s", name="api")], anew=True)
    assert (row().rate, row().concurrency, row().key) == ("1/s", None, None)
    world.do(limits.declare, [Limit("2/s", concurrency=4, name="api")])  # an engine that does not know better
    assert row().rate == "1/s"
    world.do(limits.declare, [Limit("2/s", concurrency=4, name="api")], anew=True)
    assert (row().rate, row().concurrency) == ("2/s", 4)
    world.do(limits.change, "api", rate="5/s", by="ann")
    world.do(limits.declare, [Limit("3/s", concurrency=4, name="api")], anew=True)
    assert (row().rate, row().declared_rate, row().concurrency, row().set_by) == ("5/s", "3/s", 4, "ann")
    world.do(limits.reset, "api")
    assert (row().rate, row().set_by) == ("3/s", None)


def test_a_limit_that_nobody_declares_cannot_be_set(world: World) -> None:
    with pytest.raises(LimitNotFoundError, match="no limit is called 'nobody'"):
        world.do(limits.change, "nobody", concurrency=1)
    with pytest.raises(LimitNotFoundError):
        world.do(limits.reset, "nobody")


# -- parked keys -----------------------------------------------------------------------------------


def test_a_parked_key_lets_nobody_start_until_then(world: World) -> None:
    run = Limited(world, Limit("10/s"), 4)
    claim = run.start(0)
    assert run.ask(1) is Admission.WAITS
    assert run.given() == [1]
    wakeups = world.do(limits.ending, limits.retry_later, API, claim.id, claim.attempt, ERROR, place=API, delay=30.0)
    assert wakeups == []
    step = run.step(0)
    assert (step.status, step.attempt, step.retries) == ("ready", 1, 0)
    assert 29 < seconds(step.run_at) <= 30
    assert [row["outcome"] for row in world.do(reading.attempts, run.run_id)] == ["retried"]
    time.sleep(0.15)
    assert [run.ask(i) for i in (1, 2)] == [Admission.WAITS] * 2  # though it had its place
    assert all(29 < seconds(run.step(i).run_at) < 31 for i in (1, 2))
    world.do(limits.park, API, 5.0)  # no shorter for that
    assert seconds(key_row(world).parked_until) > 25
    Limited(world, run.limit, place=Place("api", "other")).start()
    assert world.do(limits.unpark, API)
    world.do(limits.give_due)
    assert run.given() == [1, 2]
    assert not world.do(limits.unpark, API)


# -- whatever happens ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_nobody_is_forgotten_and_no_place_is_given_twice_whatever_happens(  # noqa: C901, PLR0912 - in one piece
    world: World, seed: int
) -> None:
    """A random course of everything that can happen to steps under one limit; in the end all of them have run."""
    chance = random.Random(seed)
    limit = Limit("1000/s", burst=50, concurrency=2) if seed % 2 else Limit(concurrency=2)
    world.do(limits.declare, [replace(limit, name="api")])
    lines = [Line(world, 5) for _ in range(4)]
    most, paused = 2, set()
    running: dict[str, Claim] = {}

    def ready() -> list[Any]:
        sql = "SELECT * FROM byrd.steps WHERE status = 'ready' AND run_at <= clock_timestamp() AND wake_at < 'infinity'"
        return world.sql(sql)

    def ask(step: Any) -> None:
        found = world.do(
            limits.admit, step.id, step.attempt, limit=limit, place=API, task="x", worker_id=world.worker_id,
            pid=chance.randint(1, 3), token=str(uuid.uuid4()),
        )  # fmt: skip
        if isinstance(found, Claim):
            running[found.id] = found
            [(count,)] = world.sql("SELECT count(*) FROM byrd.steps WHERE status = 'running'")
            assert count <= most

    def resume(run_id: str) -> None:
        with suppress(IllegalTransitionError):  # what ran has ended the run
            world.do(runs.resume, run_id)

    def end(how: Any, *args: Any, **options: Any) -> None:
        if running:
            claim = running.pop(chance.choice(list(running)))
            with suppress(StaleAttempt):
                world.do(limits.ending, how, API, claim.id, claim.attempt, *args, **options)

    for _ in range(150):
        line = chance.choice(lines)
        match chance.randint(0, 13):
            case 0 | 1 | 2:
                end(steps.complete, "1")
            case 3:
                end(steps.retry, ERROR)
            case 4:
                end(steps.hand_back)
            case 5:
                world.do(steps.preempt, world.worker_id, pid=chance.randint(1, 3), reason="gone", max_preemptions=99)
            case 6:
                limits.line_up_all(world.store, line.wakeups)
            case 7:
                most = chance.randint(1, 3)
                world.do(limits.change, "api", concurrency=most)
                [(count,)] = world.sql("SELECT count(*) FROM byrd.steps WHERE status = 'running'")
                most = max(most, count)  # those that run go on
            case 8 if line.run_id not in paused:
                with suppress(IllegalTransitionError):
                    world.do(runs.pause, line.run_id)
                    paused.add(line.run_id)
            case 9 if paused:
                resume(paused.pop())
            case 10:
                world.do(limits.park, API, 0.01)
            case 11:
                world.sql("UPDATE byrd.steps SET limit_slot = now() - interval '1 min' WHERE limit_slot IS NOT NULL")
            case 12:
                world.do(limits.give_due)
            case _:
                for step in ready()[:3]:
                    ask(step)
        world.check()
    for run_id in paused:
        resume(run_id)
    world.do(limits.change, "api", concurrency=2)
    most = max(2, len(running))
    for _ in range(400):
        if all(world.run(line.run_id).status == "succeeded" for line in lines):
            break
        while running:
            end(steps.complete, "1")
        world.sql("UPDATE byrd.limit_keys SET next_at = now() WHERE next_at IS NOT NULL")  # time passes
        world.do(limits.give_due)
        for step in ready():
            ask(step)
        world.do(steps.preempt, world.worker_id, reason="gone", max_preemptions=99) if chance.random() < 0.1 else None
    assert {world.run(line.run_id).status for line in lines} == {"succeeded"}


# -- crashes, clocks, housekeeping -----------------------------------------------------------------


def test_an_admission_whose_answer_was_lost_is_found_again(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), 1)
    step, token = run.step(), str(uuid.uuid4())
    asked: dict[str, Any] = {
        "limit": run.limit, "place": API, "task": "x", "worker_id": world.worker_id, "pid": 1, "token": token,
    }  # fmt: skip
    first = world.do(limits.admit, step.id, 0, **asked)
    again = world.do(limits.admit, step.id, 0, **asked)
    assert isinstance(first, Claim)
    assert again == first


def test_a_stale_attempt_frees_nothing(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), 2)
    stale = run.start(0)
    world.do(steps.preempt, world.worker_id, reason="gone")
    running = run.start(0)
    assert run.ask(1) is Admission.WAITS
    with pytest.raises(StaleAttempt):
        run.end(stale)
    assert run.given() == []
    assert [told.id for told in run.end(running)] == [run.step(1).id]


def test_a_step_expires_while_it_waits(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), 2)
    running = run.start(0)
    assert run.ask(1) is Admission.WAITS
    world.sql("UPDATE byrd.steps SET expires_at = now() - interval '1 s' WHERE id = %(id)s", id=run.step(1).id)
    run.end(running)
    assert run.ask(1) is Admission.NOTHING
    world.do(steps.expire, run.step(1).id)
    assert run.step(1).status == "cancelled"
    Limited(world, run.limit).start()


def test_a_clock_that_was_set_back_stops_no_limit(world: World) -> None:
    run = Limited(world, Limit("10/s"), 2)
    run.start(0)
    assert run.ask(1) is Admission.WAITS
    world.sql("UPDATE byrd.limit_keys SET tat = tat + interval '1 h', next_at = now() + interval '1 h'")
    assert world.do(sweeps.follow_clock_back)
    world.do(limits.give_due)
    assert run.given() == [1]
    assert key_row(world).tat is None  # a burst may pass once more
    run.make_due(1)
    run.start(1)


def test_keys_that_nobody_uses_are_forgotten(world: World) -> None:
    limit = Limit(concurrency=1)
    for name in ("idle", "busy"):
        run = Limited(world, limit, 2, place=Place("api", name))
        claim = run.start(0)
        if name == "busy":
            assert run.ask(1) is Admission.WAITS
        else:
            run.end(claim)
    world.sql("UPDATE byrd.limit_keys SET seen_at = now() - interval '2 days'")
    assert world.do(limits.forget_idle) == 1
    assert world.sql("SELECT key FROM byrd.limit_keys") == [("busy",)]


# -- lining up -------------------------------------------------------------------------------------


class Line:
    """Steps of one task whose key is known when they are submitted."""

    def __init__(self, world: World, count: int, *, priorities: Sequence[int | None] = ()) -> None:
        self.world = world
        plan = plan_of(group(called(priority) for priority in priorities or [None] * count))
        keyed = [replace(step, limit_name="api", limit_key="k") if step.kind == "task" else step for step in plan.steps]
        run_id, self.wakeups = world.do(submit, str(uuid.uuid4()), replace(plan, steps=tuple(keyed)))
        self.run_id = str(run_id)

    def rows(self) -> list[Any]:
        return self.world.sql(
            "SELECT * FROM byrd.steps WHERE run_id = %(run)s AND kind = 'task' ORDER BY no", run=self.run_id
        )


def test_steps_line_up_in_their_order_without_a_message_or_a_claim(world: World) -> None:
    world.do(limits.declare, [Limit(concurrency=2, name="api")])
    line = Line(world, 5)
    assert all(wakeup.limited for wakeup in line.wakeups)
    assert [told.no for told in limits.line_up_all(world.store, line.wakeups)] == [w.no for w in line.wakeups[:2]]
    rows = line.rows()
    assert sorted(rows, key=lambda row: row.limit_no) == sorted(rows, key=lambda row: row.no)
    assert [row.sends for row in rows] == [1, 1, 0, 0, 0]
    assert world.do(sweeps.take_due) == []
    assert limits.line_up_all(world.store, line.wakeups) == line.wakeups  # twice: then they are sent as they are


def test_steps_line_up_by_their_priorities(world: World) -> None:
    world.do(limits.declare, [Limit("1/m", name="api")])
    line = Line(world, 5, priorities=[9, None, 3, 3, 0])
    [told] = limits.line_up_all(world.store, line.wakeups)
    rows = sorted(line.rows(), key=lambda row: row.limit_no)
    assert [row.no for row in rows] == [line.wakeups[i].no for i in (1, 4, 2, 3, 0)]
    assert told.no == rows[0].no
    assert [seconds(row.run_at) for row in rows] == pytest.approx([0, 60, 120, 180, 240], abs=2)


def test_a_rate_spaces_those_who_line_up(world: World) -> None:
    world.do(limits.declare, [Limit("1/m", name="api")])
    line = Line(world, 4)
    assert len(limits.line_up_all(world.store, line.wakeups)) == 1
    assert [seconds(row.run_at) for row in line.rows()] == pytest.approx([0, 60, 120, 180], abs=2)


def test_without_a_declaration_on_record_they_are_sent_as_they_are(world: World) -> None:
    line = Line(world, 2)
    assert limits.line_up_all(world.store, line.wakeups) == line.wakeups
    assert world.do(sweeps.take_overdue, "work", resend=0) == []


def test_new_arguments_may_mean_another_key(world: World) -> None:
    run = Limited(world, Limit(concurrency=1), 2)
    claim = run.start(0)
    [again] = world.do(steps.retry, claim.id, claim.attempt, ERROR)
    assert again.limited  # it lines up again
    claim = run.start(0)
    [again] = world.do(steps.retry, claim.id, claim.attempt, ERROR, args="[1]", kwargs="{}")
    assert not again.limited


def test_the_list_shows_keys_with_what_runs_and_waits(world: World) -> None:
    limit = Limit("60/m", burst=2, concurrency=2)
    run = Limited(world, limit, 5)
    run.start(0)
    run.start(1)
    for index in (2, 3, 4):
        assert run.ask(index) is Admission.WAITS
    idle = Limited(world, limit, place=Place("api", "idle"))
    idle.end(idle.start())
    [row] = world.do(limits.list_limits)
    assert (row.name, row.key, row.rate, row.burst, row.concurrency) == ("api", "k", "60/m", 2, 2)
    assert (row.running, row.waiting, row.parked_until) == (2, 3, None)
    assert 0 < seconds(row.until) <= 1


def test_what_a_step_waits_for_is_told_by_its_ticket(world: World) -> None:
    run = Limited(world, Limit("1/m"), 3)
    run.start(0)
    assert (run.ask(1), run.ask(2)) == (Admission.WAITS, Admission.WAITS)
    found = turn(world, run.step(2))
    assert (found.rate, found.concurrency, found.running, found.before) == ("1/m", None, 1, 1)
    assert 115 < seconds(found.until) < 121


def test_a_step_whose_arguments_come_from_another_is_looked_at_before_it_is_claimed(world: World) -> None:
    run_id = world.submit(chain(sig("first"), sig("x", 2)))
    assert world.do(limits.look, world.step(run_id, "x").id, 0, task="x") is None
    world.settle(world.claim(run_id, "first"))
    found = world.do(limits.look, world.step(run_id, "x").id, 0, task="x")
    assert (found.input, found.args, found.attempt) == ('"first"', "[2]", 0)
    assert world.do(limits.look, world.step(run_id, "x").id, 0, task="other") is None
    assert world.step(run_id, "x").status == "ready"
