"""Commands whose answer was lost, and lists of runs that stay quick in a large table."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, group
from sqlalchemy import event

from byrd.errors import IllegalTransitionError
from byrd.store import reading, runs
from tests.store.world import World, sig

# ------------------------------------------------------------------------------------------------- an answer is lost


def going_on(world: World) -> str:
    run = world.submit(chain(group(sig("saga_a"), sig("b")), sig("bad")))
    world.claim(run, "b")
    return run


def paused(world: World) -> str:
    run = going_on(world)
    world.do(runs.pause, run)
    return run


def failed(world: World) -> str:
    world.failing = {"bad"}
    run = world.submit(chain(sig("a"), sig("bad")))
    world.drive(run)
    return run


def stuck(world: World) -> str:
    world.failing = {"bad", "undo_saga_a"}
    run = world.submit(chain(sig("saga_a"), sig("bad")))
    world.drive(run)
    return run


def ending(world: World) -> str:
    return world.submit(sig("a"))  # cancel ends it at once


COMMANDS: list[tuple[Callable[..., Any], Callable[[World], str], str]] = [
    (runs.pause, going_on, "paused"),
    (runs.resume, paused, "running"),
    (runs.cancel, going_on, "cancelling"),
    (runs.cancel, paused, "cancelling"),
    (runs.cancel, ending, "cancelled"),
    (runs.retry, failed, "running"),
    (runs.retry, stuck, "compensating"),
]


@pytest.mark.parametrize(("command", "prepare", "status"), COMMANDS)
def test_a_command_whose_answer_was_lost_is_right_when_run_again(
    world: World, command: Callable[..., Any], prepare: Callable[[World], str], status: str
) -> None:
    run = prepare(world)
    token = str(uuid.uuid4())
    world.do(command, run, token=token)
    assert world.run(run).status == status
    before = world.rows()
    world.do(command, run, token=token)
    assert world.rows() == before
    with pytest.raises(IllegalTransitionError):
        world.do(command, run, token=str(uuid.uuid4()))
    assert world.rows() == before


def test_a_retry_whose_answer_was_lost_is_not_another_retry(world: World) -> None:
    run, token = failed(world), str(uuid.uuid4())
    world.do(runs.retry, run, token=token)
    assert world.drive(run).status == "failed"  # meanwhile
    world.do(runs.retry, run, token=token)
    assert world.run(run).status == "failed"


# ------------------------------------------------------------------------------------------------- lists


def explain(world: World, **wanted: Any) -> list[dict[str, Any]]:
    """Return the nodes of Postgres's plan for the very statement of a list of runs."""
    seen: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        seen.append((statement, parameters))

    event.listen(world.store.engine, "before_cursor_execute", note)
    try:
        world.do(reading.list_runs, **wanted)
    finally:
        event.remove(world.store.engine, "before_cursor_execute", note)
    [(statement, parameters)] = seen
    [row] = world.sql(f"EXPLAIN (FORMAT JSON) {statement}", **parameters)
    found = row[0] if isinstance(row[0], list) else json.loads(row[0])
    nodes, rest = [], [found[0]["Plan"]]
    while rest:
        nodes.append(rest.pop())
        rest += nodes[-1].get("Plans", [])
    return nodes


@pytest.mark.parametrize(
    ("wanted", "indexes"),
    [
        ({}, ["runs_created"]),
        ({"workflow": "rare"}, ["runs_workflow"]),
        ({"statuses": ["failed"]}, ["runs_status"]),
        ({"statuses": ["failed", "cancelled"]}, ["runs_status", "runs_status"]),
        ({"statuses": ["failed"], "workflow": "rare"}, ["runs_status", "runs_workflow"]),
    ],
)
def test_the_newest_runs_are_found_by_an_index(world: World, wanted: dict[str, Any], indexes: list[str]) -> None:
    world.sql(
        """INSERT INTO byrd.runs (id, workflow, output, status, created_at, finished_at, error)
           SELECT gen_random_uuid(), CASE WHEN n %% 5000 = 0 THEN 'rare' ELSE 'often' END, 0,
                  CASE WHEN n %% 4000 = 0 THEN 'failed' ELSE 'succeeded' END, now() - n * interval '1 second',
                  now(), '{}'
             FROM generate_series(1, 20000) n"""
    )
    world.sql("ANALYZE byrd.runs")
    try:
        nodes = explain(world, **wanted)
    finally:
        world.sql("DELETE FROM byrd.runs")
        world.sql("ANALYZE byrd.runs")
    assert not any(node["Node Type"] == "Seq Scan" for node in nodes)
    assert sorted(node["Index Name"] for node in nodes if "Index Name" in node) == indexes


def test_the_newest_runs_come_first_whatever_their_status(world: World) -> None:
    made = [world.submit(sig("a")) for _ in range(6)]
    for run in made[::2]:
        world.do(runs.cancel, run)
    newest = list(reversed(made))

    def ids(**wanted: Any) -> list[str]:
        return [row.id for row in world.do(reading.list_runs, **wanted)]

    assert ids() == newest
    assert ids(limit=2) == newest[:2]
    assert ids(statuses=["cancelled"]) == newest[1::2]
    assert ids(statuses=["cancelled"], limit=2) == newest[1::2][:2]
    assert ids(statuses=["cancelled", "running", "cancelled"]) == newest
    assert ids(statuses=["running", "cancelled"], workflow="test", limit=4) == newest[:4]
    assert ids(statuses=[]) == []
    assert ids(workflow="other") == ids(workflow="other", statuses=["running"]) == []
