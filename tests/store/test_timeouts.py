"""Time-outs and retries in the store: when a step is looked at, what becomes of it, and what happens twice."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import chain, group

import byrd
from byrd.limits import Limit
from byrd.policies import freeze, names_of
from byrd.store import Counts, Store, limits, progress, reading, runs, steps, sweeps, timeouts, waits
from byrd.store.rows import query
from byrd.store.timeouts import CeleryLimit
from tests.store.world import ERROR, World, sig


def timed(name: str, *, retry: byrd.Retry | None = None, **given: float) -> Any:
    """A signature of a task with time-outs, as it is after it was frozen."""
    options: dict[str, Any] = {"byrd_timeouts": byrd.Timeouts(**given)}
    if retry is not None:
        options["byrd_retry"] = retry
    freeze(options)
    return sig(name, **options)


def column(world: World, run_id: str, no: int | str, name: str) -> Any:
    """A column of a step, a time in seconds from now."""
    step = world.step(run_id, no)
    [row] = world.sql(f"SELECT {name} AS it, now() AS now FROM byrd.steps WHERE id = %(id)s", id=step.id)
    return round((row.it - row.now).total_seconds()) if hasattr(row.it, "tzinfo") else row.it


def later(world: World, run_id: str, seconds: float) -> None:
    """Let so much time have passed for the steps of a run."""
    world.sql(
        """UPDATE byrd.steps SET started_at = started_at - %(s)s * interval '1 s', start_by = start_by - %(s)s
                  * interval '1 s', timeout_at = timeout_at - %(s)s * interval '1 s',
                  tried_since = tried_since - %(s)s * interval '1 s' WHERE run_id = %(run)s""",
        run=run_id, s=seconds,
    )  # fmt: skip
    world.sql(
        "UPDATE byrd.checkpoints SET updated_at = updated_at - %(s)s * interval '1 s'",
        s=seconds,
    )


def overdue(world: World, *, well: float = 1e9) -> list[Any]:
    return list(world.do(timeouts.overdue_attempts, world.worker_id, well_seconds=well))


def error_of(world: World, run_id: str, no: int | str) -> tuple[str, str]:
    found = json.loads(world.step(run_id, no).error or "{}")
    return found["exc_type"], found["exc_message"][0]


# -- when it is looked at --------------------------------------------------------------------------


def test_a_step_without_time_outs_is_never_looked_at(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b", headers={"byrd_timeouts": "no"})))
    for name in ("a", "b"):
        assert column(world, run, name, "timeout_at") is None
        claim = world.claim(run, name)
        assert column(world, run, name, "timeout_at") is None
        world.settle(claim)


def test_a_ready_step_is_looked_at_when_it_should_have_started(world: World) -> None:
    run = world.submit(chain(timed("a", schedule_to_start=60), timed("b", schedule_to_start=30)))
    assert (column(world, run, "a", "timeout_at"), column(world, run, "b", "timeout_at")) == (60, None)
    claim = world.claim(run, "a")
    assert column(world, run, "a", "timeout_at") is None
    world.do(steps.hand_back, claim.id, claim.attempt)
    assert column(world, run, "a", "timeout_at") == 60  # it is ready anew
    world.settle(world.claim(run, "a"))
    assert column(world, run, "b", "timeout_at") == 30
    assert column(world, run, "a", "timeout_at") is None


def test_a_delay_comes_before_the_time_to_start(world: World) -> None:
    delayed = timed("a", schedule_to_start=60)
    run = world.submit(delayed.set(countdown=100))
    assert column(world, run, "a", "timeout_at") == 160
    world.sql("UPDATE byrd.steps SET run_at = now(), wake_at = now()")
    claim = world.claim(run, "a")
    world.do(steps.retry, claim.id, claim.attempt, ERROR, delay=500)
    assert column(world, run, "a", "timeout_at") == 560


def test_in_a_slice_too(world: World) -> None:
    """What byrd.work and byrd.write_runs do is seen by the same trigger."""
    run = world.submit(chain(sig("first"), timed("a", schedule_to_start=60), timed("b", heartbeat=30)), shared=True)
    found = world.work(own=world.step(run, "first"), most=1)
    found = world.work(found.claims)
    assert column(world, run, "a", "timeout_at") == 60
    found = world.work(own=world.step(run, "a"), most=1)
    assert column(world, run, "a", "timeout_at") is None
    world.work(found.claims, most=1)
    assert world.step(run, "b").status == "running"
    assert column(world, run, "b", "timeout_at") == 30


def test_a_step_that_is_put_back_is_to_be_started_in_time(world: World) -> None:
    run = world.submit(chain(sig("first"), timed("a", schedule_to_start=60)), shared=True)
    found = world.work(own=world.step(run, "first"), most=1)
    [claim] = world.work(found.claims, most=1).claims
    assert column(world, run, "a", "timeout_at") is None
    world.do(steps.put_back, claim.id, claim.attempt, worker_id=world.worker_id, pid=1)
    assert column(world, run, "a", "timeout_at") == 60


def test_waiting_for_a_limit_is_no_start(world: World) -> None:
    run = world.submit(timed("a", schedule_to_start=60))
    world.do(limits.declare, [Limit(concurrency=1, name="none")])
    world.do(limits.change, "none", concurrency=0)
    later(world, run, 20)
    claim = world.claim(run, "a")
    [row] = world.sql("SELECT claim FROM byrd.steps WHERE id = %(id)s", id=claim.id)
    world.sql(
        "SELECT byrd.admit(%(id)s, %(claim)s::uuid, 'none', '', NULL, 0, 1, 1)", id=claim.id, claim=str(row.claim)
    )
    assert world.step(run, "a").status == "ready"
    assert column(world, run, "a", "timeout_at") == 40
    later(world, run, 50)
    for step_id in world.do(timeouts.unstarted):
        world.do(steps.miss_start, step_id)
    assert error_of(world, run, "a")[0] == "ScheduleToStartTimeoutError"
    assert world.sql("SELECT 1 FROM byrd.steps WHERE limit_slot IS NOT NULL") == []


def test_while_its_run_is_paused_nobody_has_to_start_it(world: World) -> None:
    run = world.submit(timed("a", schedule_to_start=60))
    later(world, run, 50)
    world.do(runs.pause, run)
    assert column(world, run, "a", "timeout_at") is None
    later(world, run, 50)
    assert world.do(timeouts.unstarted) == []
    world.do(steps.miss_start, world.step(run, "a").id)
    assert world.step(run, "a").status == "ready"
    world.do(runs.resume, run)
    assert column(world, run, "a", "timeout_at") == 60


def test_a_nap_of_a_task_is_no_wait_for_a_worker(world: World) -> None:
    run = world.submit(timed("a", schedule_to_start=60))
    claim = world.claim(run, "a")
    world.do(waits.give_way, claim.id, claim.attempt, "ok", "step:wait_for ok", timeout=None)
    assert column(world, run, "a", "timeout_at") is None
    world.do(waits.signal, run, "ok", "1")
    assert column(world, run, "a", "timeout_at") == 60
    claim = world.claim(run, "a")
    assert world.do(waits.take, claim.id, claim.attempt, "ok", "step:wait_for ok", timeout=None).payload == "1"
    world.do(waits.nap, claim.id, claim.attempt, "step:sleep x", seconds=1000, until=None)
    assert column(world, run, "a", "timeout_at") == 1060


# -- steps that nobody starts ----------------------------------------------------------------------


def test_a_step_that_nobody_starts_fails_and_what_follows_is_told(world: World) -> None:
    slow = timed("a", schedule_to_start=60)
    run = world.submit(chain(slow.on_error(sig("errback")), sig("b")))
    assert world.do(timeouts.unstarted) == []
    world.do(steps.miss_start, world.step(run, "a").id)  # not yet
    assert world.step(run, "a").status == "ready"
    later(world, run, 61)
    [step_id] = world.do(timeouts.unstarted)
    assert [w.task for w in world.do(steps.miss_start, step_id)] == ["errback"]
    assert world.do(steps.miss_start, step_id) == []  # twice
    assert error_of(world, run, "a") == ("ScheduleToStartTimeoutError", "nobody has started it within 60 s")
    assert world.statuses(run) == {"a": "failed", "errback": "ready", "b": "skipped"}
    world.drive(run)
    assert world.run(run).status == "failed"
    world.do(runs.retry, run)
    assert column(world, run, "a", "timeout_at") == 60  # anew
    assert world.drive(run).status == "succeeded"


def test_a_step_that_is_claimed_in_time_is_none_of_them(world: World) -> None:
    run = world.submit(timed("a", schedule_to_start=60))
    later(world, run, 61)
    [step_id] = world.do(timeouts.unstarted)
    claim = world.claim(run, "a")  # a worker was a little quicker
    assert world.do(steps.miss_start, step_id) == []
    world.settle(claim)
    assert world.run(run).status == "succeeded"


# -- attempts that take too long -------------------------------------------------------------------


def test_an_attempt_that_runs_for_too_long_fails_its_step(world: World) -> None:
    run = world.submit(chain(timed("a", start_to_close=60), sig("b")))
    claim = world.claim(run, "a")
    assert overdue(world) == []
    world.do(timeouts.time_out, claim.id, claim.attempt)
    assert world.step(run, "a").status == "running"  # not yet
    later(world, run, 61)
    assert [(o.step_id, o.attempt) for o in overdue(world)] == [(claim.id, 1)]
    world.do(timeouts.time_out, claim.id, claim.attempt, owner=world.worker_id, pid=1)
    world.do(timeouts.time_out, claim.id, claim.attempt, owner=world.worker_id, pid=1)  # twice
    assert error_of(world, run, "a") == ("StartToCloseTimeoutError", "attempt 1 ran for longer than 60 s")
    assert world.stale(steps.complete, claim.id, claim.attempt, "1")
    assert world.stale(progress.save, claim.id, claim.attempt, "x", Counts(None, 1, 0, False))
    assert world.run(run).status == "failed"
    [attempt] = world.do(reading.attempts, run)
    assert (attempt["outcome"], attempt["attempt"]) == ("failed", 1)
    assert overdue(world) == []


def test_under_a_policy_it_is_tried_again_and_counted(world: World) -> None:
    policy = byrd.Retry(max_attempts=2, first=5, jitter=False)
    run = world.submit(timed("a", start_to_close=60, retry=policy))
    claim = world.claim(run, "a")
    later(world, run, 61)
    assert world.do(timeouts.time_out, claim.id, 1) == []
    step = world.step(run, "a")
    assert (step.status, step.retries, step.attempt) == ("ready", 1, 1)
    assert 4 <= column(world, run, "a", "run_at") <= 5
    assert world.stale(steps.complete, claim.id, 1, "1")
    world.sql("UPDATE byrd.steps SET run_at = now(), wake_at = now()")
    claim = world.claim(run, "a")
    later(world, run, 61)
    world.do(timeouts.time_out, claim.id, 1)  # a late one, of the attempt before
    assert world.step(run, "a").status == "running"
    world.do(timeouts.time_out, claim.id, 2)
    assert error_of(world, run, "a") == ("StartToCloseTimeoutError", "attempt 2 ran for longer than 60 s")
    assert [a["outcome"] for a in world.do(reading.attempts, run)] == ["retried", "failed"]


@pytest.mark.parametrize("never", ["byrd.errors.StepTimeoutError", "byrd.errors.StartToCloseTimeoutError", "Exception"])
def test_a_policy_may_leave_time_outs_out(world: World, never: str) -> None:
    run = world.submit(timed("a", start_to_close=60, retry=byrd.Retry(never=(never,))))
    claim = world.claim(run, "a")
    later(world, run, 61)
    world.do(timeouts.time_out, claim.id, 1)
    assert world.step(run, "a").status == "failed"


def test_the_budget_goes_by_the_first_attempt_that_failed(world: World) -> None:
    run = world.submit(timed("a", start_to_close=60, retry=byrd.Retry(max_attempts=None, budget=100, first=0)))
    for attempt, status in ((1, "ready"), (2, "failed")):
        claim = world.claim(run, "a")
        later(world, run, 61)
        world.do(timeouts.time_out, claim.id, attempt)
        assert world.step(run, "a").status == status
    # After an operator's retry the budget is a new one.
    world.do(runs.retry, run)
    claim = world.claim(run, "a")
    assert world.do(timeouts.tried_seconds, claim.id) < 10


def test_celerys_time_limit_is_the_start_to_close_when_it_is_that_one(world: World) -> None:
    names = ("billiard.exceptions.TimeLimitExceeded", "builtins.Exception")
    for seconds, expected in ((60.0, "StartToCloseTimeoutError"), (30.0, "ValueError")):
        run = world.submit(timed("a", start_to_close=60))
        claim = world.claim(run, "a")
        world.do(timeouts.time_out, claim.id, 1, celery=CeleryLimit(seconds, ERROR, names), pid=1)
        assert error_of(world, run, "a")[0] == expected
    run = world.submit(sig("a"))
    claim = world.claim(run, "a")
    limit = CeleryLimit(30.0, ERROR, names)
    assert world.stale(timeouts.time_out, claim.id, 1, celery=limit, pid=2)  # a process that does not run it
    assert world.step(run, "a").status == "running"
    world.do(timeouts.time_out, claim.id, 1, celery=limit, pid=1, owner=world.worker_id)
    assert error_of(world, run, "a")[0] == "ValueError"


def test_the_time_limit_of_the_message_is_the_shorter_one() -> None:
    for given, expected in (({}, 60), ({"time_limit": 30}, 30), ({"time_limit": 90}, 60)):
        options: dict[str, Any] = {"byrd_timeouts": byrd.Timeouts(start_to_close=60), **given}
        freeze(options)
        assert options["time_limit"] == expected


# -- signs of life ---------------------------------------------------------------------------------


def test_a_silent_attempt_is_given_to_another_and_counted(world: World) -> None:
    run = world.submit(timed("a", heartbeat=30))
    for attempt in range(1, 7):
        claim = world.claim(run, "a")
        later(world, run, 31)
        [one] = overdue(world)
        world.do(timeouts.time_out, claim.id, one.attempt, owner=world.worker_id, pid=one.pid)
        assert world.stale(steps.complete, claim.id, attempt, "1")
        step = world.step(run, "a")
        assert (step.status, step.preemptions) == (("ready" if attempt < 6 else "failed"), attempt)
    assert error_of(world, run, "a") == ("HeartbeatTimeoutError", "attempt 6 gave no sign of life for 30 s")
    history = world.do(reading.attempts, run)
    assert [a["outcome"] for a in history] == ["preempted"] * 6
    assert all("HeartbeatTimeoutError" in a["error"] for a in history)


@pytest.mark.parametrize("where", ["after the pivot", "in a retriable step"])
@pytest.mark.parametrize("limit", ["start_to_close", "heartbeat"])
def test_where_nothing_may_be_rolled_back_it_is_tried_again(world: World, where: str, limit: str) -> None:
    """Ten times, as a step that raises is; a silent one when it has been given to as many others as it may be."""
    name = "a" if where == "after the pivot" else "a_retriable"
    given: dict[str, Any] = {limit: 30}
    run = world.submit(timed(name, **given))
    if where == "after the pivot":
        world.sql("UPDATE byrd.runs SET pivot = 7 WHERE id = %(id)s RETURNING 1", id=run)
    given_away = 1 if limit == "heartbeat" else 0
    for attempt in range(1, given_away + steps.PATIENCE + 2):
        claim = world.claim(run, name)
        later(world, run, 31)
        for _ in range(2):
            world.do(timeouts.time_out, claim.id, attempt, max_preemptions=1)
        last = attempt == given_away + steps.PATIENCE + 1
        assert world.step(run, name).status == ("failed" if last else "ready")
        if not last:
            pause = min(300, 2 ** max(0, attempt - given_away - 1)) if attempt > given_away else 0
            assert pause - 2 <= column(world, run, name, "run_at") <= pause
        world.sql("UPDATE byrd.steps SET run_at = now(), wake_at = now() WHERE status = 'ready'")
    outcomes = [attempt["outcome"] for attempt in world.do(reading.attempts, run)]
    assert outcomes[:-1] == ["preempted"] * given_away + ["failed"] * steps.PATIENCE
    assert world.run(run).status == "failed"
    assert error_of(world, run, name)[0] in ("StartToCloseTimeoutError", "HeartbeatTimeoutError")
    world.do(runs.retry, run)
    claim = world.claim(run, name)
    later(world, run, 31)
    world.do(timeouts.time_out, claim.id, claim.attempt, max_preemptions=0)
    assert world.step(run, name).status == "ready", "a retry brings new patience"


def test_under_a_policy_silence_counts_as_a_failure(world: World) -> None:
    run = world.submit(timed("a", heartbeat=30, retry=byrd.Retry(max_attempts=2, first=0)))
    for attempt, status in ((1, "ready"), (2, "failed")):
        claim = world.claim(run, "a")
        later(world, run, 31)
        world.do(timeouts.time_out, claim.id, attempt)
        step = world.step(run, "a")
        assert (step.status, step.preemptions) == (status, 0)


@pytest.mark.parametrize("kind", ["checkpoint", "beat", "sub-step"])
def test_each_sign_of_life_puts_it_off(world: World, kind: str) -> None:
    run = world.submit(timed("a", heartbeat=30))
    claim = world.claim(run, "a")
    later(world, run, 20)
    if kind == "checkpoint":
        world.do(progress.save, claim.id, 1, "items", Counts(None, 1, 0, False))
    elif kind == "beat":
        assert world.do(progress.beat, claim.id, 1) is None
    else:
        world.do(progress.remember, claim.id, 1, "step:x", "1")
    later(world, run, 20)
    assert overdue(world) == []  # it was looked at, and is again at its time
    assert column(world, run, "a", "timeout_at") == 10
    world.do(timeouts.time_out, claim.id, 1)
    assert world.step(run, "a").status == "running"
    later(world, run, 15)
    assert [o.attempt for o in overdue(world)] == [1]


def test_a_checkpoint_of_an_earlier_attempt_is_no_sign_of_life(world: World) -> None:
    run = world.submit(timed("a", heartbeat=30))
    claim = world.claim(run, "a")
    world.do(progress.save, claim.id, 1, "items", Counts(None, 1, 0, False))
    world.do(steps.hand_back, claim.id, 1)
    claim = world.claim(run, "a")
    world.sql("UPDATE byrd.checkpoints SET updated_at = now() + interval '1 h' RETURNING 1")
    later(world, run, 31)
    assert [o.attempt for o in overdue(world)] == [2]


def test_what_nobody_could_have_heard_is_no_silence(world: World) -> None:
    """Postgres was away, or the worker frozen, until five seconds ago."""
    run = world.submit(timed("a", heartbeat=30))
    claim = world.claim(run, "a")
    later(world, run, 40)
    assert overdue(world, well=5) == []
    assert column(world, run, "a", "timeout_at") == 25
    world.do(timeouts.time_out, claim.id, 1, well_seconds=5)
    assert world.step(run, "a").status == "running"
    later(world, run, 26)
    assert len(overdue(world, well=31)) == 1


def test_both_of_an_attempt_the_first_counts(world: World) -> None:
    run = world.submit(timed("a", heartbeat=30, start_to_close=50))
    claim = world.claim(run, "a")
    assert column(world, run, "a", "timeout_at") == 30
    later(world, run, 25)
    world.do(progress.beat, claim.id, 1)
    later(world, run, 10)
    assert overdue(world) == []
    assert column(world, run, "a", "timeout_at") == 15
    later(world, run, 16)
    world.do(timeouts.time_out, claim.id, 1)
    assert error_of(world, run, "a")[0] == "StartToCloseTimeoutError"


def test_a_worker_looks_at_its_own_attempts_only(world: World) -> None:
    run = world.submit(group(timed("a", heartbeat=30), timed("b", heartbeat=30)))
    other = world.add_worker()
    world.claim(run, "a")
    world.claim(run, "b", worker_id=other)
    later(world, run, 31)
    assert [o.step_id for o in overdue(world)] == [world.step(run, "a").id]


def test_in_a_run_that_is_being_cancelled_it_is_over(world: World) -> None:
    run = world.submit(timed("a", heartbeat=30))
    claim = world.claim(run, "a")
    world.do(runs.cancel, run)
    later(world, run, 31)
    world.do(timeouts.time_out, claim.id, 1)
    assert (world.step(run, "a").status, world.run(run).status) == ("cancelled", "cancelled")


def test_when_the_clock_is_set_back_an_attempt_has_its_time(world: World) -> None:
    run = world.submit(timed("a", start_to_close=60))
    world.claim(run, "a")
    later(world, run, -3600)  # an hour ahead of the clock
    assert column(world, run, "a", "timeout_at") == 3660
    world.do(sweeps.follow_clock_back)
    assert column(world, run, "a", "timeout_at") == 60
    assert column(world, run, "a", "started_at") == 0


def test_a_look_at_nothing_due_reads_an_index_only(store: Store) -> None:
    """Each worker looks twice a second: at no more than what is due."""

    def plan(conn: Any) -> str:
        query(conn, "SET LOCAL enable_seqscan = off")
        found = query(
            conn,
            """EXPLAIN SELECT id FROM byrd.steps s
                WHERE s.timeout_at <= clock_timestamp() AND s.status = 'running'
                  AND s.worker_id = '00000000-0000-0000-0000-000000000000'""",
        )
        return "\n".join(row[0] for row in found)

    assert "Seq Scan" not in store.run(plan)


def test_the_names_of_an_error_are_those_of_its_bases() -> None:
    assert names_of(byrd.errors.HeartbeatTimeoutError)[:3] == (
        "byrd.errors.HeartbeatTimeoutError",
        "byrd.errors.StepTimeoutError",
        "byrd.errors.ByrdError",
    )
