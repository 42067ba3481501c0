"""``byrd.work`` and another transaction at once, in both orders: as in :mod:`tests.store.test_races`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from byrd.errors import StaleAttempt
from byrd.store import Claim, growth, runs, steps, sweeps, work
from byrd.store.rows import query
from byrd.store.work import Done, Own, Work
from tests.store.test_races import Statement, close_all, interleave, race
from tests.store.world import ERROR, World, plan_of, sig, submit


def batch(
    world: World, done: Sequence[Claim], *, own: str | None = None, most: int = 0, others: bool = False, pid: int = 1
) -> Statement:
    """Return what a slice sends; what is unusual in it is done one by one."""
    ends = [Done(claim, json.dumps(claim.task)) for claim in done]
    worker_id, token = world.worker_id, str(uuid.uuid4())
    named = Own(own, 0, "a") if own else None

    def statement(conn: Connection) -> Any:
        savepoint = conn.begin_nested()
        try:
            found = work.work(
                conn, worker_id=worker_id, pid=pid, token=token, done=ends, own=named, most=most, others=others
            )
        except DBAPIError as exc:
            savepoint.rollback()
            if not work.is_unusual(exc):
                raise
            return [one_by_one(conn, claim) for claim in done]
        savepoint.commit()
        return found

    return statement


def one_by_one(conn: Connection, claim: Claim) -> Any:
    savepoint = conn.begin_nested()
    try:
        found = steps.complete(conn, claim.id, claim.attempt, json.dumps(claim.task))
    except StaleAttempt as exc:
        savepoint.rollback()
        return exc
    savepoint.commit()
    return found


def chords(world: World) -> list[dict[str, Claim]]:
    """Two chords of three with all members running, in two runs: the one with the lower id first."""
    made = [
        world.submit(chain(chord([sig("a"), sig("b"), sig("c")], sig("body")), sig("after")), shared=True)
        for _ in range(2)
    ]
    return [{name: world.claim(run, name) for name in "abc"} for run in sorted(made)]


def members_of_one_chord(world: World) -> tuple[Statement, Statement]:
    one, _ = chords(world)
    return batch(world, [one["a"]], most=2), batch(world, [one["c"], one["b"]], most=2, pid=2)


def members_of_two_chords(world: World) -> tuple[Statement, Statement]:
    one, two = chords(world)
    return (
        batch(world, [one["a"], two["a"], one["b"]], most=3),
        batch(world, [two["c"], one["c"], two["b"]], most=3, pid=2),
    )


def ends_of_two_runs(world: World) -> tuple[Statement, Statement]:
    """Neither knows, until it has the run's row, whether it is the last."""
    made = [world.submit(sig("a", link=[sig("x"), sig("y")]), shared=True) for _ in range(2)]
    for run in made:
        world.settle(world.claim(run, "a"))
    one, two = ({name: world.claim(run, name) for name in "xy"} for run in made)
    return batch(world, [one["x"], two["x"]]), batch(world, [two["y"], one["y"]], pid=2)


def batch_complete(world: World) -> tuple[Statement, Statement]:
    one, two = chords(world)
    for name in "ab":
        world.settle(one[name])
    c = one["c"]
    return batch(world, [two["a"], two["b"], two["c"]], most=2), lambda conn: steps.complete(conn, c.id, 1, '"c"')


def batch_fail(world: World) -> tuple[Statement, Statement]:
    one, _ = chords(world)
    b = one["b"]
    return batch(world, [one["a"], one["c"]], most=2), lambda conn: steps.fail(conn, b.id, b.attempt, ERROR)


def batch_cancel(world: World) -> tuple[Statement, Statement]:
    one, two = chords(world)
    return batch(world, [*one.values(), *two.values()], most=3), lambda conn: runs.cancel(conn, two["a"].run_id)


def batch_pause(world: World) -> tuple[Statement, Statement]:
    one, two = chords(world)
    return batch(world, [*one.values(), *two.values()], most=3), lambda conn: runs.pause(conn, one["a"].run_id)


def batch_preempt(world: World) -> tuple[Statement, Statement]:
    one, two = chords(world)
    return batch(world, [*one.values(), *two.values()]), lambda conn: steps.preempt(
        conn, world.worker_id, reason="gone"
    )


def batch_recover(world: World) -> tuple[Statement, Statement]:
    one, two = chords(world)
    world.end_lease(world.worker_id)
    return batch(world, [*one.values(), *two.values()], most=2), sweeps.recover


def batch_release_worker(world: World) -> tuple[Statement, Statement]:
    one, two = chords(world)
    release = batch(world, [*one.values(), *two.values()], most=2)
    return release, lambda conn: sweeps.release_worker(conn, world.worker_id, reason="stops")


def batch_overdue(world: World) -> tuple[Statement, Statement]:
    """Both go over several runs; the deadlines are in another order than the ids."""
    one, two = chords(world)
    for claims, seconds in ((one, 1), (two, 2)):
        world.sql(
            "UPDATE byrd.runs SET deadline = now() - %(seconds)s * interval '1 s' WHERE id = %(run)s RETURNING 1",
            run=claims["a"].run_id, seconds=seconds,
        )  # fmt: skip
    return batch(world, [*one.values(), *two.values()], most=3), lambda conn: sweeps.end_overdue_runs(conn, ERROR)


def batch_poison(world: World) -> tuple[Statement, Statement]:
    """Steps of two runs are failed in one transaction, whose last steps are recorded in another."""
    made = [world.submit(sig("a", link=[sig("x"), sig("y")]), shared=True) for _ in range(2)]
    other = world.add_worker()
    ends = []
    for run in sorted(made):
        world.settle(world.claim(run, "a"))
        ends.append(world.claim(run, "x"))
        world.claim(run, "y", worker_id=other)
    return batch(world, ends), lambda conn: steps.preempt(conn, other, reason="gone", max_preemptions=0)


def batch_poison_and_join(world: World) -> tuple[Statement, Statement]:
    """The one wants a join of the second run, then the row of the first; the other the row, then the join."""
    made = sorted(world.submit(sig("a"), shared=True) for _ in range(2))
    world.do(query, "DELETE FROM byrd.runs")
    plans = [plan_of(sig("a", link=[sig("x"), sig("y")]), shared=True), plan_of(group(sig("x"), sig("y")), shared=True)]
    other = world.add_worker()
    for run, plan in zip(made, plans, strict=True):
        world.do(submit, run, plan)
    world.share_all()
    world.settle(world.claim(made[0], "a"))
    ends = [world.claim(run, "x") for run in made]
    for run in made:
        world.claim(run, "y", worker_id=other)
    return batch(world, ends), lambda conn: steps.preempt(conn, other, reason="gone", max_preemptions=0)


def batch_replace(world: World) -> tuple[Statement, Statement]:
    one, _ = chords(world)
    b, plan = one["b"], plan_of(group(sig("x"), sig("y")), shared=True)
    return batch(world, [one["a"], one["c"]], most=2), lambda conn: growth.replace(conn, b.id, b.attempt, plan)


def batch_revoke(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(sig("a"), sig("b")), shared=True)
    b = world.step(run, "b").id
    return batch(world, [world.claim(run, "a")], most=1), lambda conn: steps.revoke_waiting(conn, b)


def claims_of_others(world: World) -> tuple[Statement, Statement]:
    world.submit(group([sig(name) for name in "pqrstu"]), shared=True)
    return batch(world, [], most=4, others=True), batch(world, [], most=4, others=True, pid=2)


def own_and_others(world: World) -> tuple[Statement, Statement]:
    run = world.submit(sig("a"), shared=True)
    return batch(world, [], own=world.step(run, "a").id, most=1), batch(world, [], most=1, others=True, pid=2)


def own_claim(world: World) -> tuple[Statement, Statement]:
    run = world.submit(sig("a"), shared=True)
    own, worker_id = world.step(run, "a").id, world.worker_id
    token = str(uuid.uuid4())
    return batch(world, [], own=own, most=1), lambda conn: steps.claim(
        conn, own, 0, task="a", worker_id=worker_id, pid=2, token=token
    )


def own_cancel(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(sig("a"), sig("b")), shared=True)
    return batch(world, [], own=world.step(run, "a").id, most=1), lambda conn: runs.cancel(conn, run)


def own_pause(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(sig("a"), sig("b")), shared=True)
    return batch(world, [], own=world.step(run, "a").id, most=1), lambda conn: runs.pause(conn, run)


def others_pause(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(sig("a"), sig("b")), shared=True)
    return batch(world, [], most=1, others=True), lambda conn: runs.pause(conn, run)


def others_relay(world: World) -> tuple[Statement, Statement]:
    world.submit(group(sig("a"), sig("b")), shared=True)
    world.sql("UPDATE byrd.steps SET wake_at = now() - interval '1 s' WHERE status = 'ready' RETURNING 1")
    return batch(world, [], most=1, others=True), lambda conn: sweeps.take_overdue(conn, "work", solo=False, resend=2)


PAIRS: dict[str, Callable[[World], tuple[Statement, Statement]]] = {
    pair.__name__: pair
    for pair in (
        members_of_one_chord, members_of_two_chords, ends_of_two_runs, batch_complete, batch_fail, batch_cancel,
        batch_pause, batch_preempt, batch_recover, batch_release_worker, batch_overdue, batch_poison,
        batch_poison_and_join, batch_replace,
        claims_of_others, own_and_others, own_claim, own_cancel, own_pause, others_pause, others_relay,
    )
}  # fmt: skip


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize("swapped", [False, True], ids=["in order", "swapped"])
@pytest.mark.parametrize("pair", PAIRS)
def test_whoever_is_first_the_tables_are_right_and_each_run_ends(
    world: World, pair: str, swapped: bool, commit: bool
) -> None:
    one, two = PAIRS[pair](world)
    outcome = race(world.store, *((two, one) if swapped else (one, two)), commit=commit)
    if not commit:
        assert not isinstance(outcome.second, BaseException), "the first was undone, so nothing refuses the second"
        for found in (outcome.first, outcome.second):
            assert not isinstance(found, Work) or not found.refused
    close_all(world)


#: Where the other transaction has several statements, between which a batch may come.
TANGLED = (
    batch_complete, batch_fail, batch_cancel, batch_pause, batch_preempt, batch_recover, batch_release_worker,
    batch_overdue, batch_poison, batch_poison_and_join, batch_replace,
)  # fmt: skip


@pytest.mark.parametrize("pair", [pair.__name__ for pair in TANGLED])
def test_wherever_the_other_stands_they_do_not_lock_each_other_out(world: World, pair: str) -> None:
    at = 1
    while True:
        one, two = PAIRS[pair](world)
        more = interleave(world.store, two, one, at=at)
        close_all(world)
        if not more:
            break
        for table in ("runs", "workers"):
            world.do(query, f"DELETE FROM byrd.{table}")
        world.worker_id = world.add_worker()
        at += 1
    assert at > 2


# ------------------------------------------------------------------------------------------------- who wins


def test_of_two_batches_the_second_finishes_the_chord_and_goes_on_with_its_body(world: World) -> None:
    outcome = race(world.store, *members_of_one_chord(world), commit=True)
    assert outcome.waited
    assert outcome.first == Work()
    assert [claim.task for claim in outcome.second.claims] == ["body"]
    assert json.loads(outcome.second.claims[0].input) == ["a", "b", "c"]
    close_all(world)


def test_two_that_claim_at_once_share_what_there_is_and_neither_waits(world: World) -> None:
    outcome = race(world.store, *claims_of_others(world), commit=True)
    assert not outcome.waited
    claims = [*outcome.first.claims, *outcome.second.claims]
    assert sorted(claim.task for claim in claims) == list("pqrstu")
    close_all(world)


@pytest.mark.parametrize("pair", [own_pause, own_cancel, own_claim], ids=lambda pair: pair.__name__)
def test_nothing_is_claimed_that_was_taken_or_stopped_meanwhile(world: World, pair: Any) -> None:
    own, other = pair(world)
    outcome = race(world.store, other, own, commit=True)
    assert outcome.waited
    assert outcome.second.claims == []
    close_all(world)


def test_a_worker_that_ends_gives_back_what_its_slices_claim_just_then(world: World) -> None:
    world.submit(group(sig("a"), sig("b")), shared=True)
    claims = batch(world, [], most=2, others=True)
    release = partial(sweeps.release_worker, worker_id=world.worker_id, reason="stops")
    outcome = race(world.store, claims, release, commit=True)
    assert outcome.waited
    assert len(outcome.first.claims) == 2
    assert [row.status for row in world.sql("SELECT status FROM byrd.steps WHERE task IS NOT NULL")] == ["ready"] * 2
    assert world.sql("SELECT 1 FROM byrd.workers WHERE id = %(id)s", id=world.worker_id) == []


def test_a_worker_is_not_given_up_while_its_slices_claim(world: World) -> None:
    world.submit(group(sig("a"), sig("b")), shared=True)

    def recover(conn: Connection) -> Any:
        world.end_lease(world.worker_id)
        return sweeps.recover(conn)

    outcome = race(world.store, batch(world, [], most=2, others=True), recover, commit=True)
    assert not outcome.waited
    assert len(outcome.first.claims) == 2
    assert outcome.second == ([], [])
    names, wakeups = world.do(sweeps.recover)
    assert len(names) == 1
    assert len(wakeups) == 2
    close_all(world)


def test_a_recovery_that_passes_by_a_worker_keeps_it_from_nothing(world: World) -> None:
    world.submit(sig("a"), shared=True)
    with world.store.engine.begin() as claiming:
        claims = batch(world, [], most=2, others=True)(claiming).claims
        world.end_lease(world.worker_id)
        outcome = race(world.store, sweeps.recover, partial(sweeps.stop_worker, worker_id=world.worker_id), commit=True)
        assert not outcome.waited
        assert outcome.first == ([], [])
    assert world.settle(claims[0]) == []
    close_all(world)


def test_a_slice_claims_nothing_for_a_worker_that_was_given_up_meanwhile(world: World) -> None:
    world.submit(group(sig("a"), sig("b")), shared=True)
    release = partial(sweeps.release_worker, worker_id=world.worker_id, reason="stops")
    outcome = race(world.store, release, batch(world, [], most=2, others=True), commit=True)
    assert outcome.waited
    assert outcome.second.claims == []


def test_a_look_that_finds_nothing_writes_nothing(world: World) -> None:
    with world.store.engine.begin() as conn:
        assert batch(world, [], most=2, others=True)(conn) == Work()
        assert query(conn, "SELECT pg_current_xact_id_if_assigned() IS NULL").scalar_one()


def test_others_pass_by_a_run_that_is_being_paused(world: World) -> None:
    others, pause = others_pause(world)
    outcome = race(world.store, pause, others, commit=True)
    assert not outcome.waited
    assert outcome.second.claims == []
    close_all(world)


def test_a_step_that_is_given_up_while_its_batch_is_recorded_is_not_in_it(world: World) -> None:
    one, two = chords(world)
    a = one["a"]
    ends = batch(world, [*one.values(), *two.values()])
    outcome = race(
        world.store,
        lambda conn: steps.preempt(conn, world.worker_id, step=(a.id, a.attempt), reason="gone"),
        ends,
        commit=True,
    )
    assert outcome.waited
    assert list(outcome.second.refused) == [a.id]
    assert {row.status for row in world.sql("SELECT status FROM byrd.steps WHERE task IN ('b', 'c')")} == {"succeeded"}
    close_all(world)


def test_a_step_that_was_revoked_while_the_one_before_it_was_recorded_is_not_run(world: World) -> None:
    ends, revoke = batch_revoke(world)
    outcome = race(world.store, revoke, ends, commit=True)
    assert outcome.waited
    assert outcome.second.claims == []
    assert [wakeup.solo for wakeup in outcome.second.wakeups] == [True]
