"""The statements of an each, side by side: nobody who ends an item and the each itself wait for one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Connection

import byrd
from byrd.items import each_of
from byrd.store import Claim, Store, each, steps
from byrd.store.rows import query
from tests.store.parts import items
from tests.store.test_races import Statement, interleave
from tests.store.world import ERROR, World, item_step, sig


@pytest.fixture
def world(store: Store) -> Iterator[World]:
    found = World(store)
    yield found
    found.check()


def under_way(world: World) -> str:
    """A run of an each, two of whose three items are ready, and none of which may fail."""
    run = world.submit(byrd.each(sig("item"), over=items(3), limit=2))
    claim = world.claim(run, 0)
    step = claim.id, claim.attempt
    world.do(each.look, *step, limit=2, tolerate=0, total=3)
    new = [item_step(each_of({"task": sig("item")}), item) for item in items(3)]
    world.do(each.insert, *step, new, inserted=0, at=None, done=True)
    world.do(each.park, *step)
    assert [world.step(run, no).status for no in range(4)] == ["ready", "ready", "ready", "pending"]
    return run


def revoked(world: World, run: str, no: int) -> Statement:
    return lambda conn: steps.revoke_waiting(conn, world.step(run, no).id)


def expired(world: World, run: str, no: int) -> Statement:
    step_id = world.step(run, no).id
    world.sql("UPDATE byrd.steps SET expires_at = now() WHERE id = %(id)s RETURNING 1", id=step_id)
    return lambda conn: steps.expire(conn, step_id)


def not_started(world: World, run: str, no: int) -> Statement:
    step_id = world.step(run, no).id
    options = '{"byrd_timeouts": {"schedule_to_start": 1e-6}}'
    sql = "UPDATE byrd.steps SET options = %(options)s, ready_at = now() WHERE id = %(id)s RETURNING 1"
    world.sql(sql, id=step_id, options=options)
    return lambda conn: steps.miss_start(conn, step_id)


def failed(world: World, run: str, no: int) -> Statement:
    claim = world.claim(run, no)
    return lambda conn: steps.fail(conn, claim.id, claim.attempt, ERROR)


def revoked_early(world: World, run: str, _no: int) -> Statement:
    return revoked(world, run, 3)


def each_revoked(world: World, run: str) -> Statement:
    return revoked(world, run, 0)


def too_many_failed(world: World, run: str) -> Statement:
    return failed(world, run, 2)


@pytest.mark.parametrize("swapped", [False, True], ids=["in order", "swapped"])
@pytest.mark.parametrize("ends", [each_revoked, too_many_failed], ids=lambda one: one.__name__)
@pytest.mark.parametrize("drops", [revoked, revoked_early, expired, not_started, failed], ids=lambda one: one.__name__)
def test_an_item_ends_while_its_each_ends_or_stops_the_others(
    world: World, drops: Callable[..., Statement], ends: Callable[..., Statement], swapped: bool
) -> None:
    at, more = 1, True
    while more:
        run = under_way(world)
        one, two = drops(world, run, 1), ends(world, run)
        more = interleave(world.store, *((two, one) if swapped else (one, two)), at=at)
        world.check()
        assert not {world.step(run, no).status for no in range(1, 4)} & {"pending", "ready"}
        world.do(query, "DELETE FROM byrd.runs")
        at += 1
    assert at > 3


@pytest.mark.parametrize("swapped", [False, True], ids=["in order", "swapped"])
def test_an_item_is_not_tried_again_once_its_each_has_ended(world: World, swapped: bool) -> None:
    at, more = 1, True
    while more:
        run = under_way(world)
        claim, one = world.claim(run, 1), each_revoked(world, run)

        def again(conn: Connection, claim: Claim = claim) -> Any:
            return steps.retry(conn, claim.id, claim.attempt, ERROR)

        more = interleave(world.store, *((again, one) if swapped else (one, again)), at=at)
        world.check()
        assert world.step(run, 1).status == "cancelled"
        assert world.run(run).status == "failed"
        world.do(query, "DELETE FROM byrd.runs")
        at += 1
    assert at > 3
