"""The statements of workflows within others: whoever commands the inner run, its step hears of its end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

from byrd.errors import IllegalTransitionError
from byrd.store import bulk, children, runs, steps, sweeps
from byrd.store.bulk import Filter
from byrd.store.rows import query
from tests.store.parts import inner, new_run
from tests.store.sessions import Session, Statement, gates
from tests.store.test_races import interleave
from tests.store.world import ERROR, World, sig

CHILD = "00000000-0000-0000-0000-000000000001"


@pytest.fixture
def outer(world: World) -> str:
    """A run with another within it."""
    return within_another(world)


def within_another(world: World) -> str:
    """Let a run begin another; return the outer one, whose step waits."""
    run = world.submit(inner("x"))
    claim = world.claim(run, 0)
    world.do(children.begin, claim.id, claim.attempt, new_run(CHILD, sig("a"), "x", of=claim.id))
    world.do(children.await_end, claim.id, claim.attempt)
    return run


def fail(world: World) -> None:
    """Let the inner run fail."""
    claim = world.claim(CHILD, "a")
    world.do(steps.fail, claim.id, claim.attempt, ERROR)
    assert world.run(CHILD).status == "failed"


def test_an_end_is_told_again_after_a_retry_of_the_inner_run_alone(world: World, outer: str) -> None:
    """Its step had been told that it failed, but had not looked: it waits on, for the end of that retry."""
    fail(world)
    assert world.do(children.tell_parents) == (1, [])
    world.do(runs.retry, CHILD)
    claim = world.claim(outer, 0)
    world.do(children.await_end, claim.id, claim.attempt)
    world.settle(world.claim(CHILD, "a"))
    assert world.do(children.tell_parents) == (1, [])
    assert world.claim(outer, 0).attempt == 3


@pytest.mark.parametrize("command", [None, runs.pause])
def test_a_step_gives_way_again_when_its_answer_was_lost_and_the_end_has_come(
    world: World, outer: str, command: Callable[..., Any] | None
) -> None:
    step = world.step(outer, 0)
    world.settle(world.claim(CHILD, "a"))
    if command is not None:
        world.do(command, outer)
    world.do(children.await_end, step.id, step.attempt)
    world.do(children.tell_parents)
    if command is not None:
        assert world.try_claim(step.id, step.attempt) is None
        world.do(runs.resume, outer)
    assert world.claim(outer, 0).attempt == 2


def test_an_end_is_not_told_of_by_whoever_has_heard_of_the_one_before_only(world: World, outer: str) -> None:
    """While one process tells of an end, stopped between two statements, there may be another one."""
    fail(world)
    undo, session = gates(world.store), Session(world.store)
    with world.store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as monitor:
        session.begin(children.tell_parents, op="", gated=True)
        session.settle(monitor)
        session.go_on()
        session.settle(monitor)  # it has read of the failure
        world.do(children.tell_parents)
        claim = world.claim(outer, 0)
        session.go_on()
        session.settle(monitor)  # the step runs, so there is nobody to tell
        world.do(steps.retry, claim.id, claim.attempt, ERROR)
        claim = world.claim(outer, 0)
        world.do(children.try_again, claim.id, claim.attempt)
        world.do(children.await_end, claim.id, claim.attempt)
        world.settle(world.claim(CHILD, "a"))
        session.go_on()
        session.settle(monitor)
        assert session.end(commit=True)
    session.close()
    undo()
    assert world.do(children.tell_parents) == (1, [])
    assert world.claim(outer, 0).attempt == claim.attempt + 1


def test_an_inner_run_whose_step_has_ended_cannot_be_retried_alone(world: World, outer: str) -> None:
    """Nobody would take what it comes to, and it would be cancelled at once."""
    fail(world)
    world.do(children.tell_parents)
    claim = world.claim(outer, 0)
    world.do(steps.fail, claim.id, claim.attempt, ERROR)
    with pytest.raises(IllegalTransitionError, match=f"is the work of step 0 of run {outer}, which has ended: retry"):
        world.do(runs.retry, CHILD)
    world.do(runs.retry, outer)
    claim = world.claim(outer, 0)
    world.do(children.try_again, claim.id, claim.attempt)
    assert world.run(CHILD).status == "running"


def ended_in_bulk(world: World) -> Statement:
    run = world.submit(sig("job"))
    world.sql("UPDATE byrd.runs SET workflow = 'byrd.bulk' WHERE id = %(id)s RETURNING 1", id=run)
    job, found = world.claim(run, "job"), Filter(("running",), datetime.now(UTC) + timedelta(days=1))
    act = partial(runs.cancel, by="bulk")
    return lambda conn: bulk.next_batch(conn, job.id, job.attempt, found, act, limit=9)


def ended_in_time(world: World) -> Statement:
    world.sql("UPDATE byrd.runs SET deadline = now() - interval '1 s' RETURNING 1")
    return lambda conn: sweeps.end_overdue_runs(conn, ERROR)


@pytest.mark.parametrize("both", [ended_in_bulk, ended_in_time], ids=lambda one: one.__name__)
def test_whoever_ends_both_runs_and_whoever_ends_the_outer_one_take_turns(
    world: World, both: Callable[[World], Statement]
) -> None:
    """The inner run's id comes first: whoever took them from the outside in would have each wait for the other."""
    at, more = 1, True
    while more:
        run = within_another(world)
        more = interleave(world.store, lambda conn, run=run: runs.cancel(conn, run), both(world), at=at)  # type: ignore[misc]
        assert {world.run(run).status, world.run(CHILD).status} <= {"cancelled", "failed"}
        world.do(query, "DELETE FROM byrd.runs")
        at += 1
    assert at > 3
