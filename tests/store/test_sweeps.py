"""What the relay and recovery look for, and what each look costs: work that is due, never all that there ever was."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy import Connection, event

from byrd.store import Store, Wakeup, reading, runs, steps, sweeps
from byrd.store.flow import RESEND_SECONDS
from byrd.store.rows import query
from tests.store.world import ERROR, World, sig


def pass_time(world: World, seconds: float) -> None:
    """Let ``seconds`` pass for all that waits for its time."""
    world.sql(
        """UPDATE byrd.steps SET run_at = run_at - %(by)s * interval '1 s', wake_at = wake_at - %(by)s * interval '1 s'
           WHERE status = 'ready' AND wake_at < 'infinity'""",
        by=seconds,
    )


def sent(world: World, run_id: str) -> dict[str | None, int]:
    return {step.task: step.sends for step in world.steps(run_id) if step.status == "ready"}


# ------------------------------------------------------------------------------------------------- the relay


def test_a_step_is_published_when_its_time_comes_and_once(world: World) -> None:
    run = world.submit(group(sig("now"), sig("later", countdown=30), sig("much_later", countdown=90)))
    assert sent(world, run) == {"now": 1, "later": 0, "much_later": 0}
    assert world.do(sweeps.take_due) == []
    assert 20 < world.do(sweeps.seconds_until_due, at_most=1000.0) + 29 < 40
    pass_time(world, 31)
    [wakeup] = world.do(sweeps.take_due)
    assert (wakeup.task, wakeup.due, wakeup.attempt) == ("later", True, 0)
    assert world.do(sweeps.take_due) == []
    assert sent(world, run) == {"now": 1, "later": 1, "much_later": 0}


def test_the_relay_takes_the_oldest_first_and_no_more_than_asked(world: World) -> None:
    world.submit(group(*[sig(f"t{n}", countdown=n) for n in (1, 2, 3, 4)]))
    pass_time(world, 10)
    assert {w.task for w in world.do(sweeps.take_due, limit=3)} == {"t1", "t2", "t3"}
    assert [w.task for w in world.do(sweeps.take_due, limit=3)] == ["t4"]


def test_a_wakeup_that_nobody_answers_is_sent_again_and_again_less_often(world: World) -> None:
    run = world.submit(sig("a"))
    assert world.do(sweeps.overdue_queues) == {}
    pauses = []
    for _ in range(10):
        pass_time(world, 1000)
        assert world.do(sweeps.overdue_queues) == {"work": 1}
        assert world.do(sweeps.sent_and_waiting, "work", at_most=10) == 1
        [wakeup] = world.do(sweeps.take_overdue, "work", resend=1)
        assert (wakeup.task, wakeup.attempt) == ("a", 0)
        pauses.append(round(world.do(sweeps.seconds_until_due, at_most=1000.0)))
    assert pauses == [round(min(300, RESEND_SECONDS * 2**n)) for n in range(1, 11)]
    assert world.drive(run).status == "succeeded"


def test_only_what_the_broker_lost_is_sent_again_the_rest_is_looked_at_later(world: World) -> None:
    run = world.submit(group(*[sig(f"t{n}") for n in range(5)]))
    pass_time(world, 1000)
    assert world.do(sweeps.overdue_queues) == {"work": 5}
    assert len(world.do(sweeps.take_overdue, "work", resend=2)) == 2
    assert sorted(sent(world, run).values()) == [1, 1, 1, 2, 2]
    assert world.do(sweeps.overdue_queues) == {}


def test_what_is_overdue_only_since_it_was_counted_is_left_for_the_next_look(world: World) -> None:
    run = world.submit(group(*[sig(f"t{n}") for n in range(5)]))
    pass_time(world, 1000)
    assert len(world.do(sweeps.take_overdue, "work", resend=2, limit=2)) == 2
    assert world.do(sweeps.overdue_queues) == {"work": 3}
    assert len(world.do(sweeps.take_overdue, "work", resend=3, limit=3)) == 3
    assert sorted(sent(world, run).values()) == [2] * 5


def test_after_the_broker_lost_all_each_message_is_sent_again_however_full_the_queue_is(world: World) -> None:
    run = world.submit(group(*[sig(f"t{n}") for n in range(5)]))
    assert world.do(sweeps.overdue_queues) == {}
    assert world.do(sweeps.doubt_all) == 5
    assert len(world.do(sweeps.take_overdue, "work", resend=0, limit=2)) == 2
    assert world.do(sweeps.overdue_queues) == {"work": 3}
    assert len(world.do(sweeps.take_overdue, "work", resend=0)) == 3
    assert sorted(sent(world, run).values()) == [2] * 5


def test_only_those_are_sent_again_whose_messages_are_missing(world: World) -> None:
    run = world.submit(group(*[sig(f"t{n}") for n in range(4)]))
    assert world.do(sweeps.late_steps, "work") == {}
    pass_time(world, 20)
    world.sql("UPDATE byrd.steps SET ready_at = now() - interval '20 s' RETURNING 1")
    world.claim(run, "t3")
    late = world.do(sweeps.late_steps, "work")
    assert {step_id: found.attempt for step_id, found in late.items()} == {
        world.step(run, f"t{n}").id: 0 for n in range(3)
    }
    assert len(world.do(sweeps.late_steps, "work", limit=2)) == 2
    world.claim(run, "t2")  # since then
    t0, t1 = (world.step(run, name).id for name in ("t0", "t1"))
    assert [wakeup.id for wakeup in world.do(sweeps.look_again, late, [t1, world.step(run, "t2").id])] == [t1]
    assert sent(world, run) == {"t0": 1, "t1": 2}
    assert world.do(sweeps.look_again, late, list(late)) == [], "the others have just been looked at"
    pauses = world.sql("SELECT id, extract(epoch FROM wake_at - now()) AS pause FROM byrd.steps WHERE status = 'ready'")
    assert {row.id: round(row.pause) for row in pauses} == {t0: 10, t1: round(RESEND_SECONDS * 2)}


def test_a_step_that_waits_long_is_looked_at_ever_less_often(world: World) -> None:
    world.submit(sig("a"))
    looks = []
    for age in (2, 4, 20, 50, 10_000):
        pass_time(world, 1000)
        # Ready for long, for it had to wait for its time: that is no age.
        world.sql(
            """UPDATE byrd.steps SET ready_at = now() - interval '1 day', run_at = now() - %(age)s * interval '1 s'
               RETURNING 1""",
            age=age,
        )
        assert world.do(sweeps.look_again, world.do(sweeps.late_steps, "work"), []) == []
        looks.append(round(world.do(sweeps.seconds_until_due, at_most=1000.0)))
    assert looks == [4, 4, 10, 25, 30]


def test_what_the_broker_did_not_take_was_not_sent(world: World) -> None:
    run = world.submit(group(sig("a"), sig("b")))
    shared = world.submit(sig("c"), shared=True)
    ids = [step.id for each in (run, shared) for step in world.steps(each) if step.task]
    world.do(sweeps.not_sent, ids)  # sent once, by whoever submitted them
    assert {**sent(world, run), **sent(world, shared)} == {"a": 1, "b": 1, "c": 1}
    pass_time(world, 1000)
    a, b, _ = ids
    world.do(sweeps.look_again, world.do(sweeps.late_steps, "work"), [a, b])
    world.do(sweeps.take_oldest, "work", limit=5)
    world.claim(run, "b")
    world.do(sweeps.not_sent, ids)
    assert {**sent(world, run), **sent(world, shared)} == {"a": 1, "c": 1}
    assert world.do(sweeps.overdue_queues, solo=False) == {"work": 1}, "it has kept its place"
    assert 1 < world.do(sweeps.seconds_until_due, at_most=9.0, shared=False) <= RESEND_SECONDS
    assert world.step(run, "b").status == "running"
    assert world.sql("SELECT 1 FROM byrd.steps WHERE coalesce(sent_at, lost_at) IS NOT NULL AND status = 'ready'") == []


def test_a_relay_that_was_held_up_says_nothing_of_what_has_changed_since(world: World) -> None:
    """Frozen between its look at the broker and its word, it knows what is not so any more."""
    run = world.submit(group(sig("a"), sig("b")))
    pass_time(world, 20)
    late = world.do(sweeps.late_steps, "work")
    a, b = (world.step(run, name).id for name in ("a", "b"))
    assert [wakeup.id for wakeup in world.do(sweeps.look_again, late, [a])] == [a]  # another relay, meanwhile
    claim = world.claim(run, "b")
    assert [wakeup.id for wakeup in world.do(steps.retry, claim.id, claim.attempt, ERROR)] == [b]
    pass_time(world, 1000)
    assert world.do(sweeps.look_again, late, [a, b]) == []
    assert sent(world, run) == {"a": 2, "b": 1}
    assert world.do(sweeps.overdue_queues) == {"work": 2}, "both are still to be looked at"


def look_again(world: World, *, solo: bool = True) -> list[Wakeup]:
    """Look at all that is late as if no message were there."""
    late = world.do(sweeps.late_steps, "work", solo=solo)
    return list(world.do(sweeps.look_again, late, list(late)))


#: What a relay may have committed when it dies, and for how long the step is left alone then.
TAKEN: dict[str, tuple[Callable[[World], list[Wakeup]], float]] = {
    "take_due": (lambda world: world.do(sweeps.take_due), RESEND_SECONDS),
    "look_again": (look_again, 2 * RESEND_SECONDS),
    "take_overdue": (lambda world: world.do(sweeps.take_overdue, "work", resend=1), 2 * RESEND_SECONDS),
    "take_oldest": (lambda world: world.do(sweeps.take_oldest, "work", limit=1), 0.0),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_a_relay_took_and_never_published_is_soon_looked_at_by_another(world: World, name: str) -> None:
    take, pause = TAKEN[name]
    run = world.submit(sig("a"), shared=name == "take_oldest")
    if name == "take_due":
        world.sql("UPDATE byrd.steps SET sends = 0 RETURNING 1")
    pass_time(world, 1000)
    [taken] = take(world)  # it is committed, and its relay is dead
    assert world.do(sweeps.seconds_until_due, at_most=1000.0) <= pause
    pass_time(world, pause)
    assert [wakeup.id for wakeup in look_again(world, solo=name != "take_oldest")] == [taken.id]
    assert world.drive(run).status == "succeeded"


def test_only_what_was_looked_for_and_not_found_was_lost(world: World) -> None:
    """Not what was sent again for its age, for the length of the queue, or to wake whoever may take it."""

    def lost(run: str) -> list[str]:
        rows = world.sql("SELECT task FROM byrd.steps WHERE run_id = %(run)s AND lost_at = sent_at", run=run)
        return sorted(row.task for row in rows)

    run, shared = world.submit(group(*[sig(f"t{n}") for n in range(4)])), world.submit(sig("shared"), shared=True)
    pass_time(world, 1000)
    late = world.do(sweeps.late_steps, "work")
    world.do(sweeps.look_again, late, [world.step(run, "t1").id])
    world.do(sweeps.take_oldest, "work", limit=1)
    assert (lost(run), lost(shared)) == (["t1"], [])
    pass_time(world, 1000)
    assert len(world.do(sweeps.take_overdue, "work", resend=4)) == 4
    assert lost(run) == []
    world.sql("UPDATE byrd.steps SET lost_at = NULL, sent_at = NULL RETURNING 1")
    pass_time(world, 1000)
    world.sql("UPDATE byrd.steps SET ready_at = ready_at - interval '1 hour' RETURNING 1")
    assert len(world.do(sweeps.take_overdue, "work", resend=0)) == 4
    assert lost(run) == []
    assert world.do(sweeps.doubt_all) == 4  # the whole broker was lost, and so was the message of each
    assert len(world.do(sweeps.take_overdue, "work", resend=0)) == 4
    assert lost(run) == ["t0", "t1", "t2", "t3"]


def test_a_step_that_somebody_holds_does_not_hide_those_behind_it(world: World) -> None:
    run = world.submit(group(sig("a"), sig("b")))
    pass_time(world, 1000)
    a, b = (world.step(run, name).id for name in ("a", "b"))
    with world.store.engine.begin() as conn:
        query(conn, "SELECT 1 FROM byrd.steps WHERE id = %(id)s FOR UPDATE", {"id": a})
        assert list(world.do(sweeps.late_steps, "work", limit=1)) == [b]


def test_what_is_missing_of_a_paused_run_is_parked(world: World) -> None:
    run = world.submit(sig("a"))
    world.sql("UPDATE byrd.runs SET status = 'paused' RETURNING 1")
    pass_time(world, 1000)
    assert world.do(sweeps.look_again, world.do(sweeps.late_steps, "work"), [world.step(run, "a").id]) == []
    assert world.do(sweeps.late_steps, "work") == {}


# ------------------------------------------------------------------------------- what whoever is awake may take


def claimed(world: World, most: int) -> list[str]:
    """Return what somebody who is awake is given next."""
    return [claim.task for claim in world.work(most=most, others=True).claims]


def test_what_others_are_woken_for_again_keeps_its_place_in_the_line(world: World) -> None:
    for name in ("first", "second", "third"):
        world.submit(sig(name), shared=True)
    pass_time(world, 1000)
    run = world.submit(sig("late"), shared=True)
    for _ in range(3):
        assert {wakeup.task for wakeup in world.do(sweeps.take_oldest, "work", limit=2)} == {"first", "second"}
    assert world.sql("SELECT sum(sends) AS n FROM byrd.steps")[0].n == 4 + 3 * 2
    assert world.do(sweeps.overdue_queues, solo=False) == {"work": 3}
    assert [task for _ in range(4) for task in claimed(world, 1)] == ["first", "second", "third", "late"]
    assert world.step(run, "late").sends == 1


def test_others_are_not_woken_for_a_run_that_is_paused(world: World) -> None:
    world.submit(sig("a"), shared=True)
    world.sql("UPDATE byrd.runs SET status = 'paused' RETURNING 1")  # as a step released a moment after the pause
    pass_time(world, 1000)
    assert world.do(sweeps.take_oldest, "work", limit=5) == []
    assert world.do(sweeps.overdue_queues, solo=False) == {}


@pytest.mark.parametrize(
    ("workers", "own_messages"),
    [
        ("shares = ARRAY['a']", ["b"]),
        ("shares = ARRAY['a', 'b']", []),
        ("shares = ARRAY['a'], stopping = true", []),  # whoever comes may share it
        ("shares = ARRAY['a'], queues = ARRAY['other']", []),
        ("shares = ARRAY['a'], lease_until = now() - interval '1 s'", []),
    ],
)
def test_what_no_worker_shares_gets_a_message_of_its_own(world: World, workers: str, own_messages: list[str]) -> None:
    for name in ("a", "b"):
        world.submit(sig(name), shared=True)
    world.sql(f"UPDATE byrd.workers SET {workers} RETURNING 1")
    world.do(sweeps.make_solo, "work")
    assert not any(world.sql("SELECT 1 FROM byrd.steps WHERE solo")), "they have not waited long"
    pass_time(world, 20)
    world.do(sweeps.make_solo, "work")
    assert [row.task for row in world.sql("SELECT task FROM byrd.steps WHERE solo")] == own_messages


def test_how_often_a_step_is_sent_grows_with_the_logarithm_of_its_age(world: World) -> None:
    run = world.submit(sig("a"))
    world.sql("UPDATE byrd.steps SET ready_at = ready_at - interval '30 days' RETURNING 1")
    for _ in range(50):
        pass_time(world, 1000)
        world.do(sweeps.take_overdue, "work", resend=0)
    assert sent(world, run) == {"a": 19}  # 15 s * 2 ** 17 is less than 30 days


def test_queues_are_counted_apart(world: World) -> None:
    run = world.submit(group(sig("a"), sig("b")))
    world.sql("UPDATE byrd.steps SET queue = 'other' WHERE task = 'b'")
    pass_time(world, 1000)
    assert world.do(sweeps.overdue_queues) == {"work": 1, "other": 1}
    assert [w.task for w in world.do(sweeps.take_overdue, "other", resend=10)] == ["b"]
    assert sent(world, run) == {"a": 1, "b": 2}


def test_a_claimed_step_is_not_sent_again(world: World) -> None:
    run = world.submit(sig("a"))
    pass_time(world, 1000)
    world.claim(run, "a")
    assert world.do(sweeps.overdue_queues) == {}
    assert world.do(sweeps.take_overdue, "work", resend=10) == []
    assert world.do(sweeps.seconds_until_due, at_most=7.0) == 7.0


def test_what_a_worker_would_refuse_is_parked_and_woken_by_a_resume(world: World) -> None:
    run = world.submit(group(sig("a"), sig("b", countdown=5)))
    world.sql("UPDATE byrd.runs SET status = 'paused' RETURNING 1")  # as a step released a moment after the pause
    pass_time(world, 1000)
    assert world.do(sweeps.overdue_queues) == {"work": 1}
    assert world.do(sweeps.take_overdue, "work", resend=10) == []
    assert world.do(sweeps.take_due) == []
    assert world.do(sweeps.seconds_until_due, at_most=7.0) == 7.0
    assert world.do(sweeps.sent_and_waiting, "work", at_most=10) == 0
    assert sent(world, run) == {"a": 1, "b": 0}
    assert {w.task for w in world.do(runs.resume, run) if w.due} == {"a", "b"}


# ------------------------------------------------------------------------------------------------- leases


def test_a_lease_lasts_as_long_as_its_heartbeat(world: World) -> None:
    worker = world.add_worker(lease_seconds=60)
    run = world.submit(chain(sig("a"), sig("b")))
    world.settle(world.claim(run, "a", worker_id=worker))
    world.end_lease(worker)
    step = world.step(run, "b")
    assert world.try_claim(step.id, 0, worker_id=worker) is None
    assert [w.alive for w in world.do(sweeps.list_workers) if w.id == worker] == [False]
    world.heartbeat(worker)
    assert world.try_claim(step.id, 0, worker_id=worker) is not None
    assert world.do(sweeps.running_pids, worker) == [1]


def test_a_worker_that_stops_claims_nothing_and_keeps_what_it_runs(world: World) -> None:
    run = world.submit(group(sig("a"), sig("b")))
    claim = world.claim(run, "a")
    world.do(sweeps.stop_worker, world.worker_id)
    assert world.try_claim(world.step(run, "b").id, 0) is None
    assert world.do(sweeps.recover) == ([], [])
    world.settle(claim)
    world.do(sweeps.release_worker, world.worker_id, reason="stopped")
    assert world.do(sweeps.list_workers) == []
    world.worker_id = world.add_worker()
    assert world.drive(run).status == "succeeded"


def test_an_unknown_worker_claims_nothing(world: World) -> None:
    run = world.submit(sig("a"))
    assert world.try_claim(world.step(run, "a").id, 0, worker_id="00000000-0000-0000-0000-000000000000") is None


# ------------------------------------------------------------------------------------------------- recovery


def test_recovery_gives_the_steps_of_a_lost_worker_to_others(world: World) -> None:
    lost = world.add_worker()
    run = world.submit(chain(chord([sig("a"), sig("b"), sig("c")], sig("d"))))
    old = world.claim(run, "a", worker_id=lost)
    world.claim(run, "b", worker_id=lost)
    mine = world.claim(run, "c")
    assert world.do(sweeps.recover) == ([], [])
    world.end_lease(lost)
    hostnames, wakeups = world.do(sweeps.recover)
    assert hostnames == ["w@host"]
    assert [(w.task, w.attempt) for w in wakeups] == [("a", 1), ("b", 1)]
    assert [w.id for w in world.do(sweeps.list_workers)] == [world.worker_id]
    assert world.do(sweeps.recover) == ([], [])
    assert world.stale(steps.complete, old.id, old.attempt, '"late"')
    world.settle(mine)
    assert world.drive(run).status == "succeeded"
    [first, _] = world.do(reading.attempts, run)
    assert (first["outcome"], first["worker"], first["attempt"]) == ("preempted", "w@host", 1)
    assert "the lease of worker w@host ran out" in first["error"]


def test_recovery_leaves_what_it_does_not_finish_for_the_next_time(world: World) -> None:
    run = world.submit(group(*[sig(f"t{n}") for n in range(3)]))
    for n in range(3):
        world.claim(run, f"t{n}")
    assert len(world.do(steps.preempt, world.worker_id, reason="gone", limit=2)) == 2
    world.end_lease(world.worker_id)
    assert len(world.do(sweeps.recover)[1]) == 1


def test_recovery_finds_the_steps_of_a_worker_whose_row_was_deleted(world: World) -> None:
    run = world.submit(sig("a"))
    world.claim(run, "a")
    world.sql("DELETE FROM byrd.workers RETURNING 1")
    assert [w.task for w in world.do(sweeps.recover)[1]] == ["a"]


def test_a_cancelled_step_of_a_lost_worker_ends_with_its_run(world: World) -> None:
    run = world.submit(chain(sig("a"), sig("b")))
    world.claim(run, "a")
    world.do(runs.cancel, run)
    world.end_lease(world.worker_id)
    assert world.do(sweeps.recover)[1] == []
    assert world.run(run).status == "cancelled"


def test_what_failed_for_good_is_advanced_by_recovery(world: World) -> None:
    run = world.submit(chain(chord([sig("a"), sig("b")], sig("c", link_error=sig("oops")))))
    world.settle(world.claim(run, "a"))
    world.claim(run, "b")
    world.end_lease(world.worker_id)
    assert [w.task for w in world.do(sweeps.recover, max_preemptions=0)[1]] == ["oops"]
    world.worker_id = world.add_worker()
    assert world.drive(run).status == "failed"


def test_a_worker_whose_steps_are_being_written_stays_on_record(world: World) -> None:
    run = world.submit(sig("a"))
    claim = world.claim(run, "a")
    with world.store.engine.begin() as conn:
        steps.check_owner(conn, claim.id, claim.attempt)  # a checkpoint's transaction is open
        assert world.do(sweeps.release_worker, world.worker_id, reason="stops") == []
        assert len(world.do(sweeps.list_workers)) == 1
    assert [w.task for w in world.do(sweeps.recover)[1]] == ["a"]
    assert world.do(sweeps.list_workers) == []


def test_sweepers_hold_their_lock_no_longer_than_a_stopped_process_may(world: World) -> None:
    with world.store.engine.begin() as conn:
        sweeps.recover(conn)
        assert query(conn, "SHOW idle_in_transaction_session_timeout").scalar() == "5s"
        assert world.do(sweeps.recover) == ([], [])
        assert world.do(sweeps.end_overdue_runs, ERROR) == []


# ------------------------------------------------------------------------------------------------- what they cost

FINISHED = 100_000


@pytest.fixture
def old_store(database_url: str) -> Iterator[Store]:
    """A store with a hundred thousand finished steps, and a few that are not."""
    store = Store(database_url)
    store.run(_fill)
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        query(conn, "VACUUM ANALYZE byrd.steps")
        query(conn, "VACUUM ANALYZE byrd.runs")
    yield store
    store.close()


def _fill(conn: Connection) -> None:
    query(
        conn,
        """INSERT INTO byrd.runs (id, output, status, finished_at, deadline, created_at)
           SELECT gen_random_uuid(), 9, 'succeeded', now(), now(), now() - n * interval '1 s'
             FROM generate_series(1, %(runs)s) n""",
        {"runs": FINISHED // 10},
    )
    query(
        conn,
        """INSERT INTO byrd.steps (id, run_id, no, kind, task, queue, status, attempt, finished_at, result, run_at,
                                   wake_at, after)
           SELECT gen_random_uuid()::text, r.id, n, 'task', 't', 'work', 'succeeded', 1, now(), 'null', now(), now(),
                  nullif(n - 1, -1)
             FROM byrd.runs r, generate_series(0, 9) n""",
    )


def statements_of(store: Store, act: Callable[[Connection], Any]) -> list[tuple[str, Any]]:
    """Return the statements that ``act`` sends, with their parameters."""
    seen: list[tuple[str, Any]] = []

    def note(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        seen.append((statement, parameters))

    event.listen(store.engine, "before_cursor_execute", note)
    try:
        store.run(act)
    finally:
        event.remove(store.engine, "before_cursor_execute", note)
    return [(sql, params) for sql, params in seen if re.match(r"\s*(SELECT|UPDATE|INSERT|DELETE|WITH)", sql)]


def scanned(store: Store, sql: str, params: Any) -> str:
    """Return the plan of a statement, if it reads the table of steps or runs from end to end."""

    def explain(conn: Connection) -> list[str]:
        return [row[0] for row in query(conn, f"EXPLAIN {sql}", params)]

    plan = "\n".join(store.run(explain))
    return f"{sql}\n{plan}" if re.search(r"Seq Scan on (steps|runs)\b", plan) else ""


def test_no_sweep_reads_what_is_finished(old_store: Store) -> None:
    world = World(old_store)
    run = world.submit(group(sig("a"), chain(sig("b"), sig("c")), sig("d", countdown=5)), deadline=0.001)
    other = world.submit(chain(chord([sig("x"), sig("y")], sig("z", link_error=sig("oops")))))
    a, x = world.claim(run, "a"), world.claim(other, "x")
    late = sweeps.Late(0, datetime.now(UTC))
    acts: dict[str, Callable[[Connection], Any]] = {
        "take_due": sweeps.take_due,
        "overdue_queues": sweeps.overdue_queues,
        "sent_and_waiting": lambda conn: sweeps.sent_and_waiting(conn, "work", at_most=100),
        "take_overdue": lambda conn: sweeps.take_overdue(conn, "work", resend=10),
        "late_steps": lambda conn: sweeps.late_steps(conn, "work"),
        "look_again": lambda conn: sweeps.look_again(conn, dict.fromkeys([a.id, x.id], late), [a.id]),
        "not_sent": lambda conn: sweeps.not_sent(conn, [a.id, x.id]),
        "take_oldest": lambda conn: sweeps.take_oldest(conn, "work", limit=10),
        "make_solo": lambda conn: sweeps.make_solo(conn, "work"),
        "seconds_until_due": lambda conn: sweeps.seconds_until_due(conn, at_most=1.0),
        "heartbeat": lambda conn: world.heartbeat(world.worker_id),
        "running_pids": lambda conn: sweeps.running_pids(conn, world.worker_id),
        "list_workers": sweeps.list_workers,
        "claim": lambda conn: steps.claim(
            conn, world.step(other, "y").id, 0, task="y", worker_id=world.worker_id, pid=1, token=a.id
        ),
        "fail": lambda conn: steps.fail(conn, x.id, x.attempt, ERROR),
        "end_overdue_runs": lambda conn: sweeps.end_overdue_runs(conn, ERROR),
        "complete": lambda conn: steps.complete(conn, a.id, a.attempt, "1"),
        "list_runs": lambda conn: reading.list_runs(conn, limit=10),
        "recover": sweeps.recover,
    }
    found = []
    for name, act in acts.items():
        if name == "recover":
            world.end_lease(world.worker_id)
        for sql, params in statements_of(old_store, act):
            if plan := scanned(old_store, sql, params):
                found.append(f"{name}: {plan}")
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("why", ["it stops", "its lease is over"])
def test_a_message_that_comes_to_a_worker_which_may_not_claim_is_sent_again(world: World, why: str) -> None:
    """A queue that others keep busy, or that is empty, would not tell that it is missing."""
    run = world.submit(sig("a"))
    step = world.step(run, "a")
    assert world.do(sweeps.take_due) == []
    if why == "it stops":
        world.do(sweeps.stop_worker, world.worker_id)
    else:
        world.end_lease(world.worker_id)
    assert world.try_claim(step.id, step.attempt) is None
    assert world.do(sweeps.seconds_until_due, at_most=100.0) <= steps.SEND_AGAIN_SECONDS
    pass_time(world, 1)
    assert [wakeup.id for wakeup in world.do(sweeps.take_due)] == [step.id]
    world.worker_id = world.add_worker()
    assert world.drive(run).status == "succeeded"


def test_a_refused_claim_moves_no_step_that_is_not_due(world: World) -> None:
    run = world.submit(sig("a", countdown=60))
    step = world.step(run, "a")
    assert world.try_claim(step.id, step.attempt) is None
    assert world.step(run, "a").wake_at == step.wake_at


def test_one_attempt_is_given_back_even_while_somebody_writes_its_step(world: World) -> None:
    """There is no next time for it, as there is for all steps of a worker or of a process."""
    run = world.submit(sig("a"))
    claim = world.claim(run, "a")
    with world.store.engine.connect() as other:
        query(other, "SELECT 1 FROM byrd.steps WHERE id = %(id)s FOR UPDATE", {"id": claim.id})
        assert world.do(steps.preempt, world.worker_id, reason="gone") == []
        with ThreadPoolExecutor(1) as threads:
            waits = threads.submit(
                world.do, steps.preempt, world.worker_id, step=(claim.id, claim.attempt), reason="gone"
            )
            with pytest.raises(TimeoutError):
                waits.result(timeout=0.3)
            other.rollback()
            assert [wakeup.id for wakeup in waits.result(timeout=30)] == [claim.id]
    assert world.step(run, "a").status == "ready"


def test_a_clock_that_was_set_back_while_nobody_looked_is_told_by_the_history(world: World) -> None:
    assert not world.do(sweeps.is_behind_history)
    world.submit(sig("a"))
    assert not world.do(sweeps.is_behind_history)
    world.sql("UPDATE byrd.events SET at = now() + interval '1 hour' RETURNING 1")
    assert world.do(sweeps.is_behind_history)


@pytest.mark.parametrize("status", ["paused", "cancelling", "compensating", "rollback_stuck"])
def test_a_step_of_a_run_that_does_not_run_is_not_claimed(world: World, status: str) -> None:
    """A step may be released a moment after its run was stopped; nobody has parked or cancelled it by then."""
    run = world.submit(sig("a"))
    step = world.step(run, "a")
    world.sql("UPDATE byrd.runs SET status = %(status)s RETURNING 1", status=status)
    assert world.try_claim(step.id, step.attempt) is None
    assert world.step(run, "a").status == "ready"
    world.sql("UPDATE byrd.runs SET status = 'running' RETURNING 1")
