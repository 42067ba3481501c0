"""Two connections at once, in both orders: one holds its transaction open until the other waits for it, or has ended.

Nothing sleeps: ``pg_blocking_pids`` tells when the second one waits.  The first then commits, or rolls back.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy import Connection, event

from byrd import store as byrd_store
from byrd.errors import IllegalTransitionError, StaleAttempt, StepCancelled
from byrd.store import Claim, Store, growth, runs, steps, sweeps
from byrd.store.rows import query
from tests.servers import Server, execute, url_of
from tests.store.world import ERROR, World, plan_of, sig, submit

Statement = Callable[[Connection], Any]
#: How a statement may refuse because the other one was first.
REFUSED = (StaleAttempt, IllegalTransitionError, StepCancelled)


@dataclass
class Outcome:
    """What became of the two statements: a value, or the error with which it refused."""

    first: Any
    second: Any
    waited: bool

    def refused(self) -> list[type[BaseException]]:
        """Return the errors of those that refused."""
        return [type(value) for value in (self.first, self.second) if isinstance(value, BaseException)]


def race(store: Store, first: Statement, second: Statement, *, commit: bool) -> Outcome:
    """Run ``second`` while the transaction of ``first`` is open, until it waits or has ended; then end the first."""
    pids: queue.Queue[int] = queue.Queue()

    def run_second() -> Any:
        with store.engine.begin() as conn:
            pids.put(query(conn, "SELECT pg_backend_pid()").scalar_one())
            return refusal_or(second, conn)

    with ThreadPoolExecutor(1) as pool, store.engine.connect() as conn, store.engine.connect() as observer:
        observer.execution_options(isolation_level="AUTOCOMMIT")
        transaction = conn.begin()
        value = refusal_or(first, conn)
        future = pool.submit(run_second)
        pid = pids.get(timeout=30)
        waited = False
        try:
            while not (wait([future], timeout=0.002).done or waited):
                waited = is_blocked(observer, pid)
        finally:
            if commit and not isinstance(value, BaseException):
                transaction.commit()
            else:
                transaction.rollback()
        return Outcome(value, future.result(timeout=60), waited)


def interleave(store: Store, first: Statement, second: Statement, *, at: int) -> bool:
    """Run ``second`` while ``first`` stands before its SQL statement number ``at``, then let both end.

    Returns whether ``first`` had that many statements; if not, it stood before its commit.
    """
    reached, go = threading.Event(), threading.Event()
    pids: queue.Queue[int] = queue.Queue()
    stood: list[bool] = []

    def stand(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "SAVEPOINT" in statement:
            return
        stand_at[0] -= 1
        if stand_at[0] == 0:
            stood.append(True)
            reached.set()
            assert go.wait(60)

    stand_at = [at]

    def run_first() -> Any:
        with store.engine.begin() as conn:
            event.listen(conn, "before_cursor_execute", stand)
            value = refusal_or(first, conn)
            reached.set()
            assert go.wait(60)
            return value

    def run_second() -> Any:
        with store.engine.begin() as conn:
            pids.put(query(conn, "SELECT pg_backend_pid()").scalar_one())
            return refusal_or(second, conn)

    with ThreadPoolExecutor(2) as pool, store.engine.connect() as observer:
        observer.execution_options(isolation_level="AUTOCOMMIT")
        one = pool.submit(run_first)
        try:
            assert reached.wait(60) or one.exception()
            two = pool.submit(run_second)
            pid = pids.get(timeout=30)
            while not (wait([two], timeout=0.002).done or is_blocked(observer, pid)):
                pass
        finally:
            go.set()
        one.result(timeout=60)
        two.result(timeout=60)
    return bool(stood)


def is_blocked(observer: Connection, pid: int) -> bool:
    """Tell whether a backend waits for another one's lock."""
    sql = "SELECT cardinality(pg_blocking_pids(%(pid)s)) > 0"
    return bool(query(observer, sql, {"pid": pid}).scalar_one())


def refusal_or(statement: Statement, conn: Connection) -> Any:
    """Run a statement in a savepoint of its own, and return its refusal as a value."""
    savepoint = conn.begin_nested()
    try:
        value = statement(conn)
    except REFUSED as refusal:
        savepoint.rollback()
        return refusal
    savepoint.commit()
    return value


def close_all(world: World) -> None:
    """Let every worker die and another do what is left: each run must come to an end."""
    world.check()
    for row in world.sql("SELECT id FROM byrd.runs WHERE status = 'paused'"):
        world.do(runs.resume, str(row.id))
    world.sql("UPDATE byrd.workers SET lease_until = now() - interval '1 s'")
    world.do(sweeps.recover)
    world.sql("UPDATE byrd.workers SET lease_until = now() + interval '1 hour', stopping = false")
    world.worker_id = world.add_worker()
    for row in world.sql("SELECT id FROM byrd.runs WHERE finished_at IS NULL"):
        assert world.drive(str(row.id), check=False).status in ("succeeded", "failed", "cancelled")
    world.check()


# ------------------------------------------------------------------------------------------------- the pairs


def claim_of(world: World, run: str, name: str, *, worker_id: str | None = None) -> Statement:
    step = world.step(run, name)
    worker = worker_id or world.worker_id

    def statement(conn: Connection) -> Claim | None:
        return steps.claim(conn, step.id, step.attempt, task=name, worker_id=worker, pid=1, token=str(uuid.uuid4()))

    return statement


def completion_of(world: World, run: str, name: str) -> Statement:
    claim = world.claim(run, name)
    return lambda conn: steps.complete(conn, claim.id, claim.attempt, f'"{name}"')


def failure_of(world: World, run: str, name: str) -> Statement:
    claim = world.claim(run, name)
    return lambda conn: steps.fail(conn, claim.id, claim.attempt, ERROR)


def ended(world: World, *names: str) -> tuple[str, list[Statement]]:
    """A chord of a, b and c with these members running and the others done."""
    run = world.submit(chain(chord([sig("a"), sig("b"), sig("c")], sig("body")), sig("after")))
    for name in {"a", "b", "c"} - set(names):
        world.settle(world.claim(run, name))
    ends = [completion_of(world, run, name) for name in names]
    return run, ends


def claim_claim(world: World) -> tuple[Statement, Statement]:
    run = world.submit(sig("a"))
    return claim_of(world, run, "a"), claim_of(world, run, "a")


def claim_cancel(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(sig("a"), sig("b")))
    return claim_of(world, run, "a"), lambda conn: runs.cancel(conn, run)


def claim_pause(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(sig("a"), sig("b")))
    return claim_of(world, run, "a"), lambda conn: runs.pause(conn, run)


def claim_expire(world: World) -> tuple[Statement, Statement]:
    run = world.submit(sig("a", expires=60))
    world.sql("UPDATE byrd.steps SET expires_at = clock_timestamp() + interval '1 hour'")
    claim = claim_of(world, run, "a")

    def expire(conn: Connection) -> Any:
        query(conn, "UPDATE byrd.steps SET expires_at = clock_timestamp() - interval '1 s' WHERE status = 'ready'")
        return steps.expire(conn, world.step(run, "a").id)

    return claim, expire


def claim_relay(world: World) -> tuple[Statement, Statement]:
    run = world.submit(sig("a"))
    world.sql("UPDATE byrd.steps SET wake_at = now() - interval '1 s', sends = 0")
    return claim_of(world, run, "a"), sweeps.take_due


def claim_recover(world: World) -> tuple[Statement, Statement]:
    """The lease runs out between the claim and its commit."""
    run = world.submit(sig("a"))
    claim = claim_of(world, run, "a")

    def recover(conn: Connection) -> Any:
        query(conn, "SET LOCAL lock_timeout = '0'")
        return sweeps.recover(conn)

    world.sql("UPDATE byrd.workers SET lease_until = clock_timestamp() + interval '1 hour'")
    return claim, recover


def claim_release_worker(world: World) -> tuple[Statement, Statement]:
    run = world.submit(sig("a"))
    worker = world.add_worker()
    return claim_of(world, run, "a", worker_id=worker), lambda conn: sweeps.release_worker(conn, worker, reason="stops")


def complete_preempt(world: World) -> tuple[Statement, Statement]:
    _, [end] = ended(world, "a")
    return end, lambda conn: steps.preempt(conn, world.worker_id, reason="gone")


def complete_recover(world: World) -> tuple[Statement, Statement]:
    _, [end] = ended(world, "a")
    world.end_lease(world.worker_id)
    return end, sweeps.recover


def complete_release_worker(world: World) -> tuple[Statement, Statement]:
    _, [end] = ended(world, "a")
    return end, lambda conn: sweeps.release_worker(conn, world.worker_id, reason="stops")


def complete_cancel(world: World) -> tuple[Statement, Statement]:
    run, [end] = ended(world, "a")
    return end, lambda conn: runs.cancel(conn, run)


def complete_last_cancel(world: World) -> tuple[Statement, Statement]:
    """The one goes from the join to the run, the other from the run to the join."""
    run = world.submit(group(sig("a"), sig("b")))
    world.settle(world.claim(run, "b"))
    return completion_of(world, run, "a"), lambda conn: runs.cancel(conn, run)


def complete_pause(world: World) -> tuple[Statement, Statement]:
    run, [end] = ended(world, "a")
    return end, lambda conn: runs.pause(conn, run)


def complete_resume(world: World) -> tuple[Statement, Statement]:
    run, [end] = ended(world, "a")
    world.do(runs.pause, run)
    return end, lambda conn: runs.resume(conn, run)


def complete_complete(world: World) -> tuple[Statement, Statement]:
    _, [a, b] = ended(world, "a", "b")
    return a, b


def same_complete_twice(world: World) -> tuple[Statement, Statement]:
    _, [end] = ended(world, "a")
    return end, end


def complete_fail(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chord([sig("x"), sig("y")], sig("z", link_error=sig("oops"))))
    return completion_of(world, run, "x"), failure_of(world, run, "y")


def last_callbacks(world: World) -> tuple[Statement, Statement]:
    run = world.submit(sig("a", link=[sig("x"), sig("y")]))
    world.settle(world.claim(run, "a"))
    return completion_of(world, run, "x"), completion_of(world, run, "y")


def complete_and_fail_last(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(sig("saga_a", link=[sig("x"), sig("y")])))
    world.settle(world.claim(run, "saga_a"))
    return completion_of(world, run, "x"), failure_of(world, run, "y")


def step_retry_cancel(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(sig("a"), sig("b")))
    claim = world.claim(run, "a")
    return lambda conn: steps.retry(conn, claim.id, claim.attempt, ERROR), lambda conn: runs.cancel(conn, run)


def hand_back_pause(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(sig("a"), sig("b")))
    claim = world.claim(run, "a")
    return lambda conn: steps.hand_back(conn, claim.id, claim.attempt), lambda conn: runs.pause(conn, run)


def replace_cancel(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(group(sig("a"), sig("b")), sig("c")))
    claim = world.claim(run, "a")
    plan = plan_of(chain(sig("x"), sig("y")))
    return lambda conn: growth.replace(conn, claim.id, claim.attempt, plan), lambda conn: runs.cancel(conn, run)


def extend_cancel(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(group(sig("a"), sig("b")), sig("c")))
    claim = world.claim(run, "a")
    plan = plan_of(chain(sig("x"), sig("y")))
    return lambda conn: growth.extend_join(conn, claim.id, claim.attempt, plan), lambda conn: runs.cancel(conn, run)


def replace_complete(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(group(sig("a"), sig("b")), sig("c")))
    claim = world.claim(run, "a")
    plan = plan_of(group(sig("x"), sig("y")))
    return lambda conn: growth.replace(conn, claim.id, claim.attempt, plan), completion_of(world, run, "b")


def extend_extend(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(group(sig("a"), sig("b")), sig("c")))

    def extension(name: str) -> Statement:
        claim, plan = world.claim(run, name), plan_of(chain(sig(f"{name}1"), sig(f"{name}2")))
        return lambda conn: growth.extend_join(conn, claim.id, claim.attempt, plan)

    return extension("a"), extension("b")


def replace_preempt(world: World) -> tuple[Statement, Statement]:
    run = world.submit(chain(sig("a"), sig("b")))
    claim = world.claim(run, "a")
    plan = plan_of(sig("x"))
    return (
        lambda conn: growth.replace(conn, claim.id, claim.attempt, plan),
        lambda conn: steps.preempt(conn, world.worker_id, reason="gone"),
    )


def submit_submit(world: World) -> tuple[Statement, Statement]:
    def submission() -> Statement:
        run, plan = str(uuid.uuid4()), plan_of(chain(sig("a"), sig("b")))
        return lambda conn: submit(conn, run, plan, key="k")

    return submission(), submission()


def recover_recover(world: World) -> tuple[Statement, Statement]:
    ended(world, "a", "b")
    world.end_lease(world.worker_id)
    return sweeps.recover, sweeps.recover


def recover_heartbeat(world: World) -> tuple[Statement, Statement]:
    ended(world, "a", "b")
    world.end_lease(world.worker_id)

    def heartbeat(conn: Connection) -> None:
        sweeps.heartbeat(
            conn, world.worker_id, lease_seconds=60.0, hostname="w", pid=1, pool="solo", concurrency=1, queues=[],
            tasks=[], version="0",
        )  # fmt: skip

    return sweeps.recover, heartbeat


def poisoned(world: World) -> tuple[Statement, Statement]:
    """Two workers are given up at once, and each has a step that is failed for it: their joins and runs are shared."""
    other = world.add_worker()
    for name in ("p", "q"):
        run = world.submit(chord([sig("a"), sig("b")], sig("body")))
        world.claim(run, "a", worker_id=world.worker_id if name == "p" else other)
        world.claim(run, "b", worker_id=other if name == "p" else world.worker_id)
    one, two = (
        lambda conn, w=w: steps.preempt(conn, w, reason="gone", max_preemptions=0) for w in (world.worker_id, other)
    )
    return one, two


def overdue_complete(world: World) -> tuple[Statement, Statement]:
    _, [end] = ended(world, "a")
    world.sql("UPDATE byrd.runs SET deadline = now() - interval '1 s'")
    return lambda conn: sweeps.end_overdue_runs(conn, ERROR), end


def run_retry_twice(world: World) -> tuple[Statement, Statement]:
    world.failing = {"a"}
    run = world.submit(chain(sig("a"), sig("b")))
    world.drive(run)
    world.failing.clear()
    return lambda conn: runs.retry(conn, run), lambda conn: runs.retry(conn, run)


def cancel_pause(world: World) -> tuple[Statement, Statement]:
    run, _ = ended(world, "a")
    return lambda conn: runs.cancel(conn, run), lambda conn: runs.pause(conn, run)


def resume_relay(world: World) -> tuple[Statement, Statement]:
    run = world.submit(sig("a"))
    world.do(runs.pause, run)
    world.sql("UPDATE byrd.steps SET wake_at = now() - interval '1 s', sends = 1")
    return lambda conn: runs.resume(conn, run), lambda conn: sweeps.take_overdue(conn, "work", resend=1)


def relay_relay(world: World) -> tuple[Statement, Statement]:
    world.submit(sig("a"))
    world.sql("UPDATE byrd.steps SET wake_at = now() - interval '1 s', sends = 0")
    return sweeps.take_due, sweeps.take_due


def relay_cancel(world: World) -> tuple[Statement, Statement]:
    run = world.submit(sig("a"))
    world.sql("UPDATE byrd.steps SET wake_at = now() - interval '1 s', sends = 0")
    return sweeps.take_due, lambda conn: runs.cancel(conn, run)


def overdue(world: World, *, shared: bool = False) -> str:
    """Three steps whose messages nobody has taken in time."""
    run = world.submit(group(sig("a"), sig("b"), sig("c")), shared=shared)
    world.sql("UPDATE byrd.steps SET wake_at = now() - interval '1 s' WHERE status = 'ready'")
    return run


def look_look(world: World) -> tuple[Statement, Statement]:
    """Two relays have both seen that the same messages are missing."""
    overdue(world)
    late = world.do(sweeps.late_steps, "work")
    look: Statement = lambda conn: sweeps.look_again(conn, late, list(late))  # noqa: E731 - twice the same
    return look, look


def look_claim(world: World) -> tuple[Statement, Statement]:
    """The message was missing because a worker had just taken it."""
    run = overdue(world)
    late = world.do(sweeps.late_steps, "work")
    return claim_of(world, run, "a"), lambda conn: sweeps.look_again(conn, late, list(late))


def look_not_sent(world: World) -> tuple[Statement, Statement]:
    """The broker has refused what one relay wanted to send, and another looks again."""
    overdue(world)
    late = world.do(sweeps.late_steps, "work")
    world.do(sweeps.look_again, late, list(late))
    world.sql("UPDATE byrd.steps SET wake_at = now() - interval '1 s' WHERE status = 'ready'")
    late = world.do(sweeps.late_steps, "work")
    return lambda conn: sweeps.not_sent(conn, list(late)), lambda conn: sweeps.look_again(conn, late, list(late))


def resend_resend(world: World) -> tuple[Statement, Statement]:
    overdue(world)
    return (lambda conn: sweeps.take_overdue(conn, "work", resend=2, limit=2),) * 2


def wake_wake(world: World) -> tuple[Statement, Statement]:
    overdue(world, shared=True)
    return (lambda conn: sweeps.take_oldest(conn, "work", limit=2),) * 2


PAIRS = {
    pair.__name__: pair
    for pair in (
        claim_claim, claim_cancel, claim_pause, claim_expire, claim_relay, claim_recover, claim_release_worker,
        complete_preempt, complete_recover, complete_release_worker, complete_cancel,
        complete_last_cancel, complete_pause, complete_resume, complete_complete, same_complete_twice, complete_fail,
        last_callbacks, complete_and_fail_last,
        step_retry_cancel, hand_back_pause, replace_cancel, extend_cancel, replace_complete, extend_extend,
        replace_preempt, submit_submit, recover_recover, recover_heartbeat, poisoned, overdue_complete,
        run_retry_twice, cancel_pause, resume_relay, relay_relay, relay_cancel, look_look, look_claim, look_not_sent,
        resend_resend, wake_wake,
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
    close_all(world)


#: Where one of the two holds some of its locks and still wants others: how two might wait for one another.
TANGLED = (
    complete_cancel, complete_last_cancel, complete_complete, last_callbacks, complete_and_fail_last, complete_preempt,
    step_retry_cancel, replace_cancel, extend_extend, replace_preempt, overdue_complete,
)  # fmt: skip


@pytest.mark.parametrize("swapped", [False, True], ids=["in order", "swapped"])
@pytest.mark.parametrize("pair", [pair.__name__ for pair in TANGLED])
def test_wherever_the_first_stands_the_tables_are_right_and_each_run_ends(
    world: World, pair: str, swapped: bool
) -> None:
    """They neither wait for one another (which Postgres would make an error) nor go wrong."""
    at = 1
    while True:
        one, two = PAIRS[pair](world)
        more = interleave(world.store, *((two, one) if swapped else (one, two)), at=at)
        close_all(world)
        if not more:
            break
        for table in ("runs", "workers"):
            world.do(query, f"DELETE FROM byrd.{table}")
        world.worker_id = world.add_worker()
        world.failing.clear()
        at += 1
    assert at > 2


# ------------------------------------------------------------------------------------------------- who wins


@pytest.fixture
def shared(world: World) -> Iterator[World]:
    """The world, whose runs must all come to an end after the test."""
    yield world
    close_all(world)


def test_one_of_two_claims_gets_the_step(shared: World) -> None:
    outcome = race(shared.store, *claim_claim(shared), commit=True)
    assert outcome.waited
    assert isinstance(outcome.first, Claim)
    assert outcome.second is None
    [step] = shared.sql("SELECT attempt FROM byrd.steps")
    assert step.attempt == 1


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize("pair", [relay_relay, look_look, resend_resend, wake_wake])
def test_of_two_relays_at_once_none_sends_what_the_other_does(
    shared: World, pair: Callable[[World], tuple[Statement, Statement]], commit: bool
) -> None:
    """Nor does one wait for the other; what was to be sent by one that died before its commit is still due."""
    outcome = race(shared.store, *pair(shared), commit=commit)
    assert not outcome.waited
    first, second = ({wakeup.id for wakeup in found} for found in (outcome.first, outcome.second))
    assert first
    assert not first & second
    assert bool(second) == (pair in (resend_resend, wake_wake)), "of three steps, each takes no more than two"
    sends = {row.id: row.sends for row in shared.sql("SELECT id, sends FROM byrd.steps WHERE status = 'ready'")}
    before = 0 if pair is relay_relay else 1
    assert sends == {step: before + (step in second or (commit and step in first)) for step in sends}
    if not commit:
        due = "SELECT id FROM byrd.steps WHERE status = 'ready' AND wake_at <= clock_timestamp()"
        assert first <= {row.id for row in shared.sql(due)}


def test_nothing_is_claimed_once_a_pause_has_committed(shared: World) -> None:
    claim, pause = claim_pause(shared)
    outcome = race(shared.store, pause, claim, commit=True)
    assert outcome.waited
    assert outcome.second is None


def test_of_the_two_last_members_the_second_finishes_the_join(shared: World) -> None:
    outcome = race(shared.store, *complete_complete(shared), commit=True)
    assert outcome.waited
    assert outcome.first == []
    assert [wakeup.task for wakeup in outcome.second] == ["body"]


def test_of_the_two_last_callbacks_the_second_finishes_the_run(shared: World) -> None:
    outcome = race(shared.store, *last_callbacks(shared), commit=True)
    assert outcome.waited
    assert [row.status for row in shared.sql("SELECT status FROM byrd.runs")] == ["succeeded"]


def test_a_step_that_completes_while_it_is_given_up_stays_completed(shared: World) -> None:
    outcome = race(shared.store, *complete_preempt(shared), commit=True)
    assert not outcome.waited, "recovery waits for nobody"
    assert outcome.second == []
    assert shared.sql("SELECT status FROM byrd.steps WHERE task = 'a'")[0].status == "succeeded"


def test_a_step_that_is_given_up_while_it_completes_is_not_completed(shared: World) -> None:
    complete, preempt = complete_preempt(shared)
    outcome = race(shared.store, preempt, complete, commit=True)
    assert outcome.waited
    assert outcome.refused() == [StaleAttempt]
    assert shared.sql("SELECT status FROM byrd.steps WHERE task = 'a'")[0].status == "ready"


def test_a_step_that_completes_before_the_cancel_is_recorded_and_what_follows_is_not_started(shared: World) -> None:
    outcome = race(shared.store, *complete_cancel(shared), commit=True)
    assert outcome.waited
    rows = {row.task: row.status for row in shared.sql("SELECT task, status FROM byrd.steps")}
    assert (rows["a"], rows["body"]) == ("succeeded", "cancelled")
    assert shared.sql("SELECT status FROM byrd.runs")[0].status == "cancelled"


def test_a_claim_is_not_lost_by_recovery_that_gives_its_worker_up_meanwhile(shared: World) -> None:
    claim, recover = claim_release_worker(shared)
    outcome = race(shared.store, claim, recover, commit=True)
    assert outcome.waited
    assert [wakeup.task for wakeup in outcome.second] == ["a"]
    outcome = race(shared.store, *reversed(claim_release_worker(shared)), commit=True)
    assert outcome.second is None


def test_recovery_leaves_a_worker_that_is_claiming(shared: World) -> None:
    claim, recover = claim_recover(shared)

    def claim_and_lose_the_lease(conn: Connection) -> Any:
        found = claim(conn)
        query(conn, "UPDATE byrd.workers SET lease_until = clock_timestamp() - interval '1 s'")
        return found

    outcome = race(shared.store, claim_and_lose_the_lease, recover, commit=True)
    assert not outcome.waited
    assert outcome.second == ([], [])
    lost, wakeups = shared.do(sweeps.recover)
    assert (lost, [wakeup.task for wakeup in wakeups]) == (["w@host"], ["a"])


def test_two_submits_with_one_key_make_one_run(shared: World) -> None:
    outcome = race(shared.store, *submit_submit(shared), commit=True)
    assert outcome.waited
    (first, sent), (second, sent_again) = outcome.first, outcome.second
    assert first == second
    assert (len(sent), sent_again) == (1, [])
    assert len(shared.sql("SELECT 1 FROM byrd.runs")) == 1


def test_a_submit_whose_key_holder_rolled_back_makes_the_run(shared: World) -> None:
    outcome = race(shared.store, *submit_submit(shared), commit=False)
    assert outcome.waited
    assert outcome.first[0] != outcome.second[0]
    assert [str(row.id) for row in shared.sql("SELECT id FROM byrd.runs")] == [outcome.second[0]]


def test_one_recovery_at_a_time(shared: World) -> None:
    outcome = race(shared.store, *recover_recover(shared), commit=True)
    assert not outcome.waited
    assert len(outcome.first[1]) == 2
    assert outcome.second == ([], [])


def test_one_relay_at_a_time(shared: World) -> None:
    outcome = race(shared.store, *relay_relay(shared), commit=True)
    assert not outcome.waited
    assert (len(outcome.first), outcome.second) == (1, [])


@pytest.mark.parametrize("change", ["replace", "extend"])
def test_a_plan_does_not_grow_in_a_run_that_is_cancelled_meanwhile(shared: World, change: str) -> None:
    grow, cancel = (replace_cancel if change == "replace" else extend_cancel)(shared)
    outcome = race(shared.store, cancel, grow, commit=True)
    assert outcome.waited
    assert outcome.refused() == [StepCancelled]
    assert shared.sql("SELECT 1 FROM byrd.steps WHERE task = 'x'") == []


def test_a_cancel_gets_its_turn_in_a_run_that_is_never_idle(shared: World) -> None:
    """A cancel that waits lets nobody else in: it would starve otherwise where many steps end at once."""
    run = shared.submit(chord([sig("a"), sig("b"), sig("c")], sig("body")))
    ends = [completion_of(shared, run, name) for name in ("a", "b", "c")]
    cancelled = threading.Event()

    def cancel(conn: Connection) -> Any:
        runs.cancel(conn, run)
        cancelled.set()

    def complete_while_cancel_waits(conn: Connection) -> Any:
        return ends[1](conn), cancelled.is_set()

    with ThreadPoolExecutor(2) as pool, shared.store.engine.connect() as conn:
        transaction = conn.begin()
        ends[0](conn)
        waiting = pool.submit(shared.do, cancel)
        wait_for_blocked(shared, 1)
        later = pool.submit(shared.do, complete_while_cancel_waits)
        wait_for_blocked(shared, 2)
        transaction.commit()
        waiting.result(timeout=60)
        _, after_cancel = later.result(timeout=60)
        assert after_cancel


def wait_for_blocked(world: World, count: int) -> None:
    """Wait until ``count`` backends wait for a lock."""
    sql = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0"
    while len(world.sql(sql)) < count:
        pass


def test_a_heartbeat_that_comes_too_late_registers_the_worker_again(shared: World) -> None:
    outcome = race(shared.store, *recover_heartbeat(shared), commit=True)
    assert outcome.waited
    [worker] = shared.do(sweeps.list_workers)
    assert (worker.alive, worker.running) == (True, 0)


def test_two_migrations_at_once(postgres_server: Server) -> None:
    name = f"byrd_migrations_{uuid.uuid4().hex[:8]}"
    execute(postgres_server, "CREATE DATABASE {}", name)
    url = url_of(postgres_server, name)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: byrd_store.migrate(url), range(4)))
        assert set(found) == {byrd_store.head_revision()}
        fresh = Store(url)
        fresh.check_live()
        fresh.close()
    finally:
        execute(postgres_server, "DROP DATABASE {} WITH (FORCE)", name)
