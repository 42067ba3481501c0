"""What a worker's main process records of a message is for its own attempts only: the message may be a duplicate."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import Connection

from byrd.errors import StaleAttempt
from byrd.store import steps
from tests.store.world import World, sig


@pytest.mark.parametrize("name", ["fail", "hand_back"])
def test_another_workers_message_ends_nothing(world: World, name: str) -> None:
    run = world.submit(sig("a"))
    claim = world.claim(run, "a")
    stranger = str(uuid.uuid4())

    def end(conn: Connection, owner: str) -> object:
        if name == "fail":
            return steps.fail(conn, claim.id, claim.attempt, '{"exc_type": "ValueError"}', owner=owner)
        return steps.hand_back(conn, claim.id, claim.attempt, owner=owner)

    with pytest.raises(StaleAttempt):
        world.do(end, stranger)
    assert world.statuses(run) == {"a": "running"}
    world.do(end, world.worker_id)
    assert world.statuses(run)["a"] != "running"


def test_another_workers_revoke_ends_nothing_that_runs(world: World) -> None:
    run = world.submit(sig("a"))
    claim = world.claim(run, "a")
    world.do(steps.revoke, claim.id, "terminated", attempt=claim.attempt, owner=str(uuid.uuid4()))
    assert world.statuses(run) == {"a": "running"}
