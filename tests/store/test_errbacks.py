"""What becomes of errbacks that are canvases: never called after Ignore, called anew once their run is retried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group

from byrd.store import growth, runs, steps
from byrd.store.rows import query
from tests.store.world import ERROR, World, plan_of, sig

#: Errbacks that are more than one step.
ERRBACKS: dict[str, Callable[[], Any]] = {
    "chain": lambda: chain(sig("e1"), sig("e2"), sig("e3")),
    "group": lambda: group(sig("e1"), sig("e2")),
    "empty group": lambda: group([]),
    "chord": lambda: chord([sig("e1"), sig("e2")], sig("e3")),
    "empty chord": lambda: chord([], sig("e1")),
    "nest": lambda: chain(sig("e1"), group(chain(sig("e2"), group(sig("e3"), sig("e4"))), sig("e5")), sig("e6")),
    "with its own": lambda: sig("e1", link=chain(sig("e2"), sig("e3")), link_error=chain(sig("e4"), sig("e5"))),
}


@pytest.mark.parametrize("name", ERRBACKS)
def test_no_part_of_an_ignored_steps_errback_is_called(world: World, name: str) -> None:
    run = world.submit(chain(group(sig("a", link_error=ERRBACKS[name]()), sig("b")), sig("c")))
    claim = world.claim(run, "a")
    world.do(steps.ignore, claim.id, claim.attempt, ERROR)
    world.check()
    assert world.drive(run).status == "failed"
    assert world.ran == ["b"]
    # Once more, now with a failure: the errback is whole again.
    world.failing = {"a"}
    world.do(runs.retry, run)
    assert world.drive(run).status == "failed"
    assert world.ran.count("e1") == (name != "empty group")


@pytest.mark.parametrize("name", ERRBACKS)
def test_an_errback_that_is_a_canvas_runs_to_its_end_after_each_failure(world: World, name: str) -> None:
    world.failing = {"a"}
    run = world.submit(sig("a", link_error=ERRBACKS[name]()))
    assert world.drive(run).status == "failed"
    called = list(world.ran)
    errbacks = [step.task for step in world.steps(run) if step.kind == "errback"]
    assert set(called[1:]) == set(errbacks) - ({"e4", "e5"} if name == "with its own" else set())
    world.ran.clear()
    world.do(runs.retry, run)
    world.check()
    assert world.drive(run).status == "failed"
    assert world.ran == called


def replace(world: World, run: str, task: str, canvas: Any) -> None:
    """Have the ready step of that task replace itself."""
    claim = world.claim(run, task)
    world.ran.append(task)
    world.do(growth.replace, claim.id, claim.attempt, plan_of(canvas))


def grow(world: World, run: str, task: str, canvas: Any) -> None:
    """Have the ready step of that task add to its group, and complete."""
    claim = world.claim(run, task)
    world.do(growth.extend_join, claim.id, claim.attempt, plan_of(canvas))
    world.settle(claim)


REPLACEMENT = chain(group(sig("x"), chain(sig("y"), sig("z"))), sig("body", link=sig("link"), link_error=sig("ex")))


@pytest.mark.parametrize("bad", ["none", "y", "body"])
def test_a_replaced_errback_is_called_anew_by_a_new_failure_only(world: World, bad: str) -> None:
    world.failing = {"a", bad}
    run = world.submit(chain(sig("a", link_error=chain(sig("e1"), sig("e2"))), sig("b")))
    for _ in range(2):  # it fails again: the errback begins anew, and may do otherwise
        world.settle(world.claim(run, "a"))
        replace(world, run, "e1", REPLACEMENT.clone())
        assert world.drive(run).status == "failed"
        assert ("e2" in world.ran) == (bad == "none")
        world.ran.clear()
        world.do(runs.retry, run)
        world.check()
        assert {step.task for step in world.steps(run) if step.status == "ready"} == {"a"}
    world.failing.clear()
    assert world.drive(run).status == "succeeded"
    assert world.ran == ["a", "b"]
    assert world.statuses(run) == {"a": "succeeded", "b": "succeeded", "e1": "skipped", "e2": "skipped"}


def test_an_errback_whose_replacement_was_cancelled_is_called_anew(world: World) -> None:
    world.failing = {"a"}
    run = world.submit(sig("a", link_error=sig("e1")))
    world.settle(world.claim(run, "a"))
    replace(world, run, "e1", chain(sig("x"), sig("y")))
    world.do(runs.cancel, run)
    assert world.run(run).status == "cancelled"
    world.do(runs.retry, run)
    world.check()
    assert world.drive(run).status == "failed"
    assert world.ran == ["a", "e1", "a", "e1"]


def test_a_replacement_that_was_replaced_goes_with_its_errback(world: World) -> None:
    world.failing = {"a"}
    run = world.submit(sig("a", link_error=chord([sig("e1"), sig("e2")], sig("e3"))))
    world.settle(world.claim(run, "a"))
    replace(world, run, "e1", chain(sig("x"), sig("y")))
    replace(world, run, "x", group(sig("v"), sig("w")))
    grow(world, run, "e2", chain(sig("more"), sig("most")))
    assert world.drive(run).status == "failed"
    assert world.ran[-1] == "e3"
    world.ran.clear()
    world.do(runs.retry, run)
    assert [step.task for step in world.steps(run)] == ["a", "e1", "e2", None, "e3"]
    assert world.drive(run).status == "failed"
    assert world.ran == ["a", "e1", "e2", "e3"]


def test_what_took_the_place_of_other_steps_is_kept(world: World) -> None:
    world.failing = {"bad"}
    run = world.submit(chord([sig("a"), sig("b")], sig("bad", link_error=sig("e1"))))
    replace(world, run, "a", chain(sig("x", link_error=sig("ex")), sig("y")))
    grow(world, run, "b", sig("more"))
    assert world.drive(run).status == "failed"
    kept = [step.task for step in world.steps(run)]
    world.failing.clear()
    world.ran.clear()
    world.do(runs.retry, run)
    assert world.drive(run).status == "succeeded"
    assert [step.task for step in world.steps(run)] == kept
    assert world.ran == ["bad"]
    [body] = [step for step in world.steps(run) if step.task == "bad"]
    [join] = world.sql("SELECT result FROM byrd.steps WHERE run_id = %(r)s AND no = %(n)s", r=run, n=body.after)
    assert join.result == '["y","b","more"]'


def test_the_progress_of_a_replaced_errback_is_forgotten(world: World) -> None:
    world.failing = {"a"}
    run = world.submit(sig("a", link_error=sig("e1")))
    world.settle(world.claim(run, "a"))
    replace(world, run, "e1", sig("x"))
    world.drive(run)
    for task in ("e1", "x"):
        world.do(
            query,
            "INSERT INTO byrd.checkpoints (step_id, name, attempt, done) VALUES (%(id)s, 'items', 1, true)",
            {"id": world.step(run, task).id},
        )
    world.do(runs.retry, run)
    assert world.sql("SELECT 1 FROM byrd.checkpoints") == []
