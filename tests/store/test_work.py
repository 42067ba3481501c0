"""``byrd.work``: what it records and claims, and what it leaves alone."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy.exc import DBAPIError

from byrd.errors import StaleAttempt
from byrd.store import Claim, runs, steps, sweeps, work
from byrd.store.work import Done, Work, is_unusual
from tests.store.world import ERROR, World, sig


def tasks(found: Work) -> list[str]:
    """Return the tasks of what was claimed."""
    return [claim.task for claim in found.claims]


def woken(found: Work) -> list[str]:
    """Return the tasks of what is to be published."""
    return sorted(wakeup.task for wakeup in found.wakeups)


# ------------------------------------------------------------------------------------------------- claims


def test_a_chain_needs_one_statement_a_step(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b"), sig("c")), shared=True)
    found = world.work(own=world.step(run, "a"), most=1)
    for name in ("a", "b", "c"):
        assert tasks(found) == [name]
        world.check()
        found = world.work(found.claims, most=1)
    assert found == Work()
    assert world.run(run).status == "succeeded"
    assert [step.attempt for step in world.steps(run)] == [1, 1, 1]


def test_the_step_of_the_message_comes_first(world: World) -> None:
    first = world.submit(group(sig("a"), sig("b")), shared=True)
    second = world.submit(sig("own"), shared=True)
    found = world.work(own=world.step(second, "own"), most=3, others=True)
    assert tasks(found)[0] == "own"
    assert sorted(tasks(found)[1:]) == ["a", "b"]
    assert {step.status for step in world.steps(first) if step.task} == {"running"}


@pytest.mark.parametrize("most", [0, 1, 2, 5, 9])
def test_at_most_so_many_are_claimed_whatever_they_are(world: World, most: int) -> None:
    chords = [world.submit(chain(sig(f"a{n}"), group(sig(f"b{n}"), sig(f"c{n}"))), shared=True) for n in range(2)]
    world.submit(group(sig("x"), sig("y")), shared=True)
    own = world.step(world.submit(sig("own"), shared=True), "own")
    claims = [world.claim(run, 0) for run in chords]
    found = world.work(claims, own=own, most=most, others=True)
    assert len(found.claims) == min(most, 7)
    running = world.sql("SELECT count(*) AS n FROM byrd.steps WHERE status = 'running'")
    assert running[0].n == len(found.claims)
    left = {"b0", "c0", "b1", "c1"} - set(tasks(found))
    assert set(woken(found)) == left, "what became ready is claimed or published"
    assert found.own_is_ready == ("own" not in tasks(found))


def test_others_are_claimed_when_asked_for_the_longest_waiting_first(world: World) -> None:
    for name in ("late", "early"):
        world.submit(sig(name), shared=True)
    world.sql("UPDATE byrd.steps SET wake_at = wake_at - interval '1 s' WHERE task = 'early' RETURNING 1")
    assert tasks(world.work(most=2)) == []
    assert tasks(world.work(most=1, others=True)) == ["early"]


NOT_SHARED: dict[str, tuple[Callable[[], Any], str]] = {
    "solo": (lambda: sig("b", priority=3), "true"),
    "preempted": (lambda: sig("b"), "preemptions = 1"),
    "delayed": (lambda: sig("b").set(countdown=60), "true"),
    "of another time": (lambda: sig("b").set(eta="2040-01-01T00:00:00"), "true"),
    "of another queue": (lambda: sig("b", queue="elsewhere"), "true"),
}


@pytest.mark.parametrize("name", NOT_SHARED)
@pytest.mark.parametrize("how", ["next", "others"])
def test_what_is_not_for_whoever_is_awake(world: World, name: str, how: str) -> None:
    make, change = NOT_SHARED[name]
    run = world.submit(chain(sig("a"), make()), shared=True)
    if change == "preemptions = 1":
        world.sql("UPDATE byrd.steps SET preemptions = 1 WHERE task = 'b' RETURNING 1")
    claim = world.claim(run, "a")
    found = world.work([claim], most=5, others=how == "others")
    assert found.claims == []
    if how == "others":
        found.wakeups += world.work(most=5, others=True).wakeups
    assert world.step(run, "b").status == "ready"
    assert woken(found) == ["b"], "it is to be published, if it is due"
    assert world.work(peek=True).wakeups == []


def test_a_task_that_the_worker_does_not_share(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b")), shared=True)
    world.sql("UPDATE byrd.workers SET shares = ARRAY['a'] RETURNING 1")
    found = world.work(own=world.step(run, "a"), most=5, others=True)
    assert tasks(found) == ["a"]
    found = world.work(found.claims, most=5, others=True)
    assert (tasks(found), woken(found)) == ([], ["b"])
    own = world.work(own=world.step(run, "b"), most=5, others=True)
    assert (own.claims, own.own_is_ready) == ([], True), "its message runs it in the ordinary way"


def test_a_step_with_a_limit_that_becomes_ready_is_to_line_up(world: World) -> None:
    run = world.submit(chain(sig("a"), group(sig("b"), sig("c"))), shared=True)
    world.sql("UPDATE byrd.steps SET limit_name = 'l', limit_key = 'k', solo = true WHERE task = 'b' RETURNING 1")
    found = world.work([world.claim(run, "a")], most=5)
    assert tasks(found) == ["c"]
    assert [(wakeup.task, wakeup.limited) for wakeup in found.wakeups] == [("b", True)]


@pytest.mark.parametrize("which", ["task", "attempt", "step"])
def test_a_message_that_does_not_fit_its_step(world: World, which: str) -> None:
    run = world.submit(sig("a"), shared=True)
    world.sql("UPDATE byrd.workers SET shares = ARRAY['a', 'other'] RETURNING 1")
    step = world.step(run, "a")
    wrong = {
        "task": lambda: world.store.run_alone(_work_of(world, step.id, 0, "other")),
        "attempt": lambda: world.store.run_alone(_work_of(world, step.id, 1, "a")),
        "step": lambda: world.store.run_alone(_work_of(world, "nobody", 0, "a")),
    }
    found = wrong[which]()
    assert found.claims == []
    assert found.own_is_ready == (which == "task")
    assert world.step(run, "a").status == "ready"


def _work_of(world: World, step_id: str, attempt: int, task: str) -> Callable[..., Work]:
    own = work.Own(step_id, attempt, task)
    return lambda conn: work.work(conn, worker_id=world.worker_id, pid=1, token=str(uuid.uuid4()), own=own, most=3)


@pytest.mark.parametrize("how", ["next", "own", "others", "peek"])
def test_a_step_that_was_revoked_while_it_waited_is_not_run(world: World, how: str) -> None:
    """It finds, when it is ready, that it is too late: by its own message, which is sent whatever else there is."""
    run = world.submit(chain(sig("a"), sig("b"), sig("c")), shared=True)
    claim = world.claim(run, "a")
    world.do(steps.revoke_waiting, world.step(run, "b").id)
    if how == "next":
        found = world.work([claim], most=5)
    else:
        world.settle(claim)
        own = world.step(run, "b")
        wanted: dict[str, Any] = {"own": {"own": own}, "others": {"others": True}, "peek": {"peek": True}}
        found = world.work(most=0 if how == "peek" else 5, **wanted[how])
    assert found.claims == []
    assert world.step(run, "b").status == "ready"
    assert found.own_is_ready == (how == "own")
    assert [wakeup.solo for wakeup in found.wakeups] == ([True] if how == "next" else [])
    assert world.try_claim(world.step(run, "b").id, 0) is None
    world.do(steps.expire, world.step(run, "b").id)
    assert world.statuses(run)["b"] == "cancelled"


# ------------------------------------------------------------------------------------------------- runs and workers


def test_a_paused_run_gets_its_results_and_starts_nothing(world: World) -> None:
    run = world.submit(group(chain(sig("a"), sig("b")), sig("c")), shared=True)
    claim = world.claim(run, "a")
    world.do(runs.pause, run)
    found = world.work([claim], own=world.step(run, "c"), most=5, others=True, peek=True)
    assert (found.claims, found.refused) == ([], {})
    assert world.statuses(run)["a"] == "succeeded"
    assert world.step(run, "b").status == "ready"
    world.check()
    world.do(runs.resume, run)
    assert sorted(tasks(world.work(most=5, others=True))) == ["b", "c"]


def test_a_paused_run_whose_last_step_is_recorded_has_succeeded(world: World) -> None:
    run = world.submit(sig("a"), shared=True)
    claim = world.claim(run, "a")
    world.do(runs.pause, run)
    world.work([claim])
    assert world.run(run).status == "succeeded"


def test_a_run_that_is_being_cancelled_is_refused_at_its_last_step_and_changes_nothing(world: World) -> None:
    run = world.submit(chain(group(sig("a"), sig("b")), sig("c")), shared=True)
    other = world.submit(sig("x"), shared=True)
    claims = [world.claim(run, "a"), world.claim(run, "b"), world.claim(other, "x")]
    world.do(runs.cancel, run)
    assert world.work(claims[:1], most=5, others=True).claims == []
    assert world.run(run).status == "cancelling"
    assert_refused(world, claims[1:])
    for claim in claims[1:]:
        world.settle(claim)
    assert [world.run(each).status for each in (run, other)] == ["cancelled", "succeeded"]


UNUSUAL: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty group": (lambda: chain(sig("a"), chord([], sig("b"))), ""),
    "a failed member": (lambda: chord([sig("bad"), sig("a")], sig("b")), "bad"),
    "a failed callback": (lambda: sig("x", link=[sig("bad"), sig("a")]), "x bad"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_refused_and_changes_nothing(world: World, name: str) -> None:
    make, before = UNUSUAL[name]
    world.failing = {"bad"}
    run = world.submit(make(), shared=True)
    for task in before.split():
        world.settle(world.claim(run, task))
    other = world.submit(chain(sig("y"), sig("z")), shared=True)
    assert_refused(world, [world.claim(other, "y"), world.claim(run, "a")])
    world.do(steps.preempt, world.worker_id, reason="gone")
    assert world.drive(run).status == ("succeeded" if name == "an empty group" else "failed")


def test_members_of_two_groups_of_one_run_are_refused_and_change_nothing(world: World) -> None:
    """The outer group, which ends by both, would say that it waits, and the run's end would be nobody's business."""
    run = world.submit(group(chain(sig("a"), group(sig("b"), sig("c"))), sig("d")), shared=True)
    for task in "ab":
        world.settle(world.claim(run, task))
    last = [world.claim(run, task) for task in "cd"]
    assert_refused(world, last)
    for claim in last:
        world.work([claim])
    assert world.run(run).status == "succeeded"


def assert_refused(world: World, claims: list[Claim]) -> None:
    before = world.rows()
    with pytest.raises(DBAPIError) as caught:
        world.work(claims, most=5, others=True)
    assert is_unusual(caught.value)
    assert world.rows() == before


@pytest.mark.parametrize("state", ["lost its lease", "stops", "is gone"])
def test_a_worker_that_may_claim_nothing_still_records(world: World, state: str) -> None:
    run = world.submit(group(chain(sig("a"), sig("b")), sig("c")), shared=True)
    claim = world.claim(run, "a")
    match state:
        case "lost its lease":
            world.end_lease(world.worker_id)
        case "stops":
            world.do(sweeps.stop_worker, world.worker_id)
        case "is gone":
            world.sql("DELETE FROM byrd.workers RETURNING 1")
    found = world.work([claim], own=world.step(run, "c"), most=5, others=True, peek=True)
    assert (found.claims, found.refused) == ([], {})
    assert woken(found) == ["b"]
    assert found.own_is_ready
    assert world.statuses(run)["a"] == "succeeded"
    assert world.step(run, "c").status == "ready"


# ------------------------------------------------------------------------------------------------- fences


def test_a_stale_attempt_is_reported_and_the_others_are_recorded(world: World) -> None:
    run = world.submit(chain(chord([sig(name) for name in "abcdef"], sig("body")), sig("end")), shared=True)
    claims = {name: world.claim(run, name) for name in "abcdef"}
    a, b, c, d, e = (claims[name] for name in "abcde")
    world.do(steps.hand_back, a.id, a.attempt)
    world.do(steps.hand_back, b.id, b.attempt)
    again = world.claim(run, "b")
    world.do(steps.fail, c.id, c.attempt, ERROR)
    world.settle(d)
    gone = Claim(**{**_fields(e), "id": "no such step"})
    found = world.work([*claims.values(), gone], most=5)
    assert {step: str(why).partition("; ")[2] for step, why in found.refused.items()} == {
        a.id: "it is ready, attempt 1",
        b.id: "it is running, attempt 2",
        c.id: "it is failed, attempt 1",
        "no such step": "",
    }
    assert all(isinstance(why, StaleAttempt) for why in found.refused.values())
    assert {name: world.step(run, name).status for name in "abcdef"} == {
        "a": "ready", "b": "running", "c": "failed", "d": "succeeded", "e": "succeeded", "f": "succeeded",
    }  # fmt: skip
    world.check()
    world.settle(again)
    assert world.drive(run).status == "failed"


def _fields(claim: Claim) -> dict[str, Any]:
    return {name: getattr(claim, name) for name in Claim.__dataclass_fields__}


def test_a_result_that_was_recorded_before_is_neither_refused_nor_written_over(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b")), shared=True)
    claim = world.claim(run, "a")
    world.settle(claim)
    before = world.rows()
    assert world.work([Done(claim, '"other"')]) == Work()
    assert world.rows() == before


def test_the_same_step_twice_in_a_batch_counts_once(world: World) -> None:
    run = world.submit(chord([sig("a"), sig("b")], sig("c")), shared=True)
    claim = world.claim(run, "a")
    world.work([claim, claim])
    assert [step.waiting for step in world.steps(run) if step.kind == "join"] == [1]


def test_a_call_whose_answer_was_lost_finds_what_it_did(world: World) -> None:
    chords = [world.submit(chain(sig(f"a{n}"), group(sig(f"b{n}"), sig(f"c{n}"))), shared=True) for n in (1, 2)]
    world.submit(sig("x"), shared=True)
    token = str(uuid.uuid4())
    done = [world.claim(run, 0) for run in chords]
    first = world.work(done, most=3, others=True, token=token)
    assert len(first.claims) == 3
    before = world.rows()
    again = world.work(done, most=0, token=token)
    assert (again.claims, again.refused) == (first.claims, {})
    assert world.rows() == before
    more = world.work(done, most=3, others=True, token=token)  # with the same arguments, as the store tries again
    assert set(first.claims) <= set(more.claims)
    assert (len(more.claims), more.refused) == (5, {})
    assert {claim.attempt for claim in more.claims} == {1}


def test_the_last_call_of_a_run_twice(world: World) -> None:
    run = world.submit(sig("a"), shared=True)
    claim, token = world.claim(run, "a"), str(uuid.uuid4())
    world.work([claim], token=token)
    before = world.rows()
    assert world.work([claim], token=token) == Work()
    assert world.rows() == before
    assert len(world.sql("SELECT 1 FROM byrd.events WHERE event = 'succeeded'")) == 1


def test_a_claim_is_that_of_the_process_and_recovered_with_it(world: World) -> None:
    run = world.submit(group(sig("a"), sig("b"), sig("c")), shared=True)
    found = world.work(most=2, others=True, pid=7)
    kept = world.work(most=1, others=True, pid=8)
    wakeups = world.do(steps.preempt, world.worker_id, pid=7, reason="gone")
    assert sorted(wakeup.id for wakeup in wakeups) == sorted(claim.id for claim in found.claims)
    assert set(world.work(found.claims).refused) == {claim.id for claim in found.claims}
    assert world.work(kept.claims).refused == {}
    assert world.work(most=3, others=True).claims == [], "a suspect runs by its own message only"
    assert world.drive(run).status == "succeeded"


# ------------------------------------------------------------------------------------------------- waking others


def test_peek_shows_what_is_left_to_others_by_a_call_that_takes_its_own_step_only(world: World) -> None:
    run = world.submit(group(sig("a"), sig("b")), shared=True)
    found = world.work(own=world.step(run, "a"), most=5, others=False, peek=True)
    assert (tasks(found), woken(found)) == (["a"], ["b"])
    assert world.work(own=world.step(run, "b"), most=5, others=True, peek=True).wakeups == []


def test_peek_shows_one_ready_step_of_each_queue_and_claims_nothing(world: World) -> None:
    world.sql("UPDATE byrd.workers SET queues = ARRAY['work', 'elsewhere', 'empty'] RETURNING 1")
    world.submit(group(sig("a"), sig("b"), sig("c", queue="elsewhere"), sig("d", queue="unheard")), shared=True)
    before = world.rows()
    found = world.work(peek=True)
    assert found.claims == []
    assert sorted(wakeup.queue for wakeup in found.wakeups) == ["elsewhere", "work"]
    assert world.rows() == before
    assert all(wakeup.due and not wakeup.solo for wakeup in found.wakeups)


def test_peek_is_not_needed_where_something_became_ready(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b")), shared=True)
    world.submit(sig("x"), shared=True)
    assert woken(world.work([world.claim(run, "a")], peek=True)) == ["b"]


def test_peek_is_needed_of_the_other_queues_where_something_became_ready_in_one(world: World) -> None:
    world.sql("UPDATE byrd.workers SET queues = ARRAY['work', 'elsewhere'] RETURNING 1")
    run = world.submit(chain(sig("a"), sig("b")), shared=True)
    world.submit(group(sig("x"), sig("y", queue="elsewhere")), shared=True)
    assert sorted(woken(world.work([world.claim(run, "a")], peek=True))) == ["b", "y"]


def test_peek_is_needed_where_what_became_ready_is_not_shared_any_more(world: World) -> None:
    """Its task has got a rate limit since: Celery's main process may keep its message for a while."""
    run = world.submit(chain(sig("a"), sig("b")), shared=True)
    world.submit(sig("x"), shared=True)
    world.sql("UPDATE byrd.workers SET shares = ARRAY['a', 'x'] RETURNING 1")
    assert sorted(woken(world.work([world.claim(run, "a")], peek=True))) == ["b", "x"]


@pytest.mark.parametrize("ready", [{"queue": "elsewhere"}, {"countdown": 60}, {"priority": 3}])
def test_peek_is_needed_where_what_became_ready_tells_nobody_of_this_queue(world: World, ready: dict[str, Any]) -> None:
    run = world.submit(chain(sig("a"), sig("b", **ready)), shared=True)
    world.submit(sig("x"), shared=True)
    assert sorted(woken(world.work([world.claim(run, "a")], peek=True))) == ["b", "x"]


def test_a_result_is_kept_to_the_letter(world: World) -> None:
    run = world.submit(chain(chord([sig("a"), sig("b")], sig("c")), sig("d")), shared=True)
    values = ['{"q": "\\" \\\\ \\n ü €"}', '"{1,NULL,\\"x\\"}"']
    claims = [world.claim(run, name) for name in ("a", "b")]
    found = world.work([Done(claim, value) for claim, value in zip(claims, values, strict=True)], most=1)
    [claim] = found.claims
    assert claim.input == f"[{values[0]},{values[1]}]"
    assert json.loads(claim.input or "") == [json.loads(value) for value in values]
