"""Who consumes a queue, by which the publisher knows how many wake-ups are enough."""

from __future__ import annotations

from byrd.store import sweeps
from tests.store.world import World


def test_who_consumes_a_queue(world: World) -> None:
    assert world.do(sweeps.consumers, "nobody's") == (0, True, 0)
    world.add_worker()
    world.add_worker(lease_seconds=-1)
    world.sql("UPDATE byrd.workers SET queues = ARRAY['work'], concurrency = 3, shares = ARRAY['a'] RETURNING 1")
    found = world.do(sweeps.consumers, "work")
    assert found == (6, True, 2)
    assert (found.processes, found.workers) == (6, 2)
    stopping = world.add_worker()
    world.sql(
        "UPDATE byrd.workers SET queues = ARRAY['work'], shares = '{}' WHERE id = %(id)s RETURNING 1", id=stopping
    )
    assert not world.do(sweeps.consumers, "work").all_share
    world.sql("UPDATE byrd.workers SET stopping = true WHERE id = %(id)s RETURNING 1", id=stopping)
    assert world.do(sweeps.consumers, "work") == found
