"""What befalls any run in random interleavings: commands, attempts and their ends, batches, and workers that die."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from byrd.errors import StaleAttempt
from byrd.store import Claim, progress, runs, sagas, steps, sweeps, termination, timeouts, waits, work
from byrd.store.rows import query
from byrd.store.work import Done, Own, Work
from tests.store.interleavings import TAKING, WHOLE, Change, Interleavings, Op, move
from tests.store.sessions import Statement
from tests.store.world import ERROR

#: What mostly is asked of a run with such a status; now and then it is anything.
COMMANDS = {
    "running": ("pause", "cancel", "compensate", "terminate"), "cancelling": ("terminate",) * 4,
    "paused": ("resume",) * 4, "failed": ("retry_run",) * 4, "cancelled": ("retry_run", "roll_back") * 2,
    "succeeded": ("roll_back",) * 4, "rollback_stuck": ("retry_run", "retry_run", "skip_undo", "done_by_hand"),
}  # fmt: skip
ENDS = (*["complete"] * 4, *["fail"] * 3, "retry", "hand_back", "put_back", "ignore", "revoke", "time_out")
#: Policies with which an attempt is over time as soon as it runs, and so is a start that nobody has made.
TIMED = (
    '{"byrd_timeouts": {"start_to_close": 1e-6}}',
    '{"byrd_timeouts": {"start_to_close": 1e-6}, "byrd_retry": {"first": 0}}',
    '{"byrd_timeouts": {"heartbeat": 1e-6}}',
)
#: Runs that have succeeded, and have done what can be undone.
ENDED_WELL = """SELECT r.id FROM byrd.runs r WHERE r.status = 'succeeded' AND r.pivot IS NULL AND EXISTS
                 (SELECT 1 FROM byrd.steps s WHERE s.run_id = r.id AND s.status = 'succeeded'
                     AND s.compensation IS NOT NULL) ORDER BY r.id"""
DOOMED = """SELECT s.id FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
             WHERE s.status = 'running' AND r.status = 'cancelling' AND r.terminate_at <= clock_timestamp()"""
READY = "SELECT id, attempt, task, run_id::text FROM byrd.steps WHERE status = 'ready' ORDER BY task, no, ready_at"
ALIVE = "SELECT id::text FROM byrd.workers WHERE lease_until > clock_timestamp()"
#: Workers that stop, or have lost their lease, and are still on record.
GONE = """SELECT id::text, started_at FROM byrd.workers WHERE stopping OR lease_until < clock_timestamp()
           ORDER BY started_at"""
#: Waits that are open, in runs that are.
WAITS = """SELECT s.id, s.run_id::text, s.signal FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
            WHERE r.finished_at IS NULL AND s.signal IS NOT NULL AND s.status IN ('pending','waiting')
            ORDER BY s.signal, r.created_at, s.no"""
#: Compensations that an operator may have an opinion on.
UNDOING = """SELECT no FROM byrd.steps WHERE run_id = %(id)s AND kind = 'compensation'
              AND status IN ('ready','failed','cancelled') ORDER BY no"""
#: Steps whose attempts are told to stop at their next checkpoint.
TOLD = """SELECT s.id FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id JOIN byrd.workers w ON w.id = s.worker_id
           WHERE s.status = 'running' AND (r.status IN ('cancelling', 'paused') OR w.stopping OR EXISTS
             (SELECT 1 FROM byrd.steps g WHERE g.run_id = s.run_id AND g.no = s.saga
                 AND g.status NOT IN ('pending', 'succeeded')))"""


class Traffic(Interleavings):
    """Moves that are the same for all plans."""

    runs: dict[str, Any]

    # -- what people do --------------------------------------------------------------------------

    @move(whole=WHOLE)
    def command(self, data: st.DataObject, whole: bool) -> None:
        run_id = data.draw(st.sampled_from(self.open_runs * 3 + list(self.runs)))
        self.command_one(data, run_id, whole=whole)

    def command_one(self, data: st.DataObject, run_id: str, *, whole: bool, names: Sequence[str] = ()) -> None:
        status = query(self.monitor, "SELECT status FROM byrd.runs WHERE id = %(id)s", {"id": run_id}).scalar()
        always = ("cancel", "pause", "resume", "retry_run")
        name = data.draw(st.sampled_from(names or [*COMMANDS.get(status or "", ()), *always]))
        token = str(uuid.uuid4())
        undoing = query(self.monitor, UNDOING, {"id": run_id}).scalars().all()
        no = data.draw(st.sampled_from(undoing)) if undoing else 0
        functions: dict[str, Statement] = {
            "cancel": lambda conn: runs.cancel(conn, run_id, token=token),
            "compensate": lambda conn: runs.cancel(conn, run_id, compensate=True, token=token),
            "terminate": lambda conn: termination.cancel(conn, run_id, grace=0.0, token=token),
            "pause": lambda conn: runs.pause(conn, run_id, token=token),
            "resume": lambda conn: runs.resume(conn, run_id, token=token),
            "retry_run": lambda conn: runs.retry(conn, run_id, token=token),
            "roll_back": lambda conn: runs.roll_back(conn, run_id, token=token),
            "skip_undo": lambda conn: sagas.skip(conn, run_id, no, reason="so", token=token),
            "done_by_hand": lambda conn: sagas.done_by_hand(conn, run_id, no, note="so", token=token),
        }
        told = "cancel" if name in ("compensate", "terminate") else name
        self.start(Op(told, _if_there(functions[name], run_id)), whole=whole)

    @move(whole=WHOLE)
    def undo_on_purpose(self, data: st.DataObject, whole: bool) -> None:
        """Roll back a run that has ended, and did something that can be undone."""
        row = self.pick(data, ENDED_WELL)
        if row is not None:
            run_id, token = str(row.id), str(uuid.uuid4())
            self.start(Op("roll_back", lambda conn: runs.roll_back(conn, run_id, token=token)), whole=whole)

    @move(whole=WHOLE)
    def end_overdue_runs(self, data: st.DataObject, whole: bool) -> None:
        row = self.pick(data, "SELECT id FROM byrd.runs WHERE status IN ('running','paused') ORDER BY created_at")
        if row is None:
            return
        self.quietly(
            """UPDATE byrd.runs SET deadline = now() - interval '1 s' WHERE id IN
                 (SELECT id FROM byrd.runs WHERE id = %(id)s FOR UPDATE SKIP LOCKED)""",
            id=row.id,
        )
        self.start(Op("end_overdue_runs", lambda conn: sweeps.end_overdue_runs(conn, ERROR)), whole=whole)

    # -- what workers do -------------------------------------------------------------------------

    @move(worker=st.integers(0, 1), late=st.integers(0, 5), whole=WHOLE)
    def claim(self, data: st.DataObject, worker: int, late: int, whole: bool) -> None:
        row = self.pick(data, READY)
        if row is not None:
            gone = self.pick(data, GONE) if late > 3 else None
            self.claim_one(row, worker, row.attempt - (late == 3), gone=gone, whole=whole)

    def claim_one(self, row: Any, worker: int, attempt: int, *, whole: bool, gone: Any = None) -> None:
        token, worker_id = str(uuid.uuid4()), gone.id if gone else self.workers[worker]

        def claim(conn: Connection) -> Claim | None:
            return steps.claim(conn, row.id, attempt, task=row.task, worker_id=worker_id, pid=worker, token=token)

        def committed(result: Claim | None, _changes: list[Change]) -> None:
            if result is not None:
                assert result.attempt == attempt + 1
                # Unless a heartbeat was under way, and has come through since.
                assert gone is None or gone not in query(self.monitor, GONE).all(), "a worker that is gone has claimed"
                self.owners[result.id] = (result.attempt, worker_id)
                self.claims.append(result)

        self.start(Op("claim", claim, committed), whole=whole)

    @move(lambda self: self.claims, how=st.sampled_from(ENDS), whole=WHOLE)
    def end_attempt(self, data: st.DataObject, how: str, whole: bool) -> None:
        self.end_one(self.draw_claim(data), how, whole=whole)

    def end_one(self, claim: Claim, how: str, *, whole: bool) -> None:
        if how == "time_out":
            self.quietly(
                """UPDATE byrd.steps SET options = %(o)s WHERE id IN
                     (SELECT id FROM byrd.steps WHERE id = %(id)s AND status = 'running' FOR UPDATE SKIP LOCKED)""",
                o=TIMED[claim.attempt % 3], id=claim.id,
            )  # fmt: skip
        value = json.dumps(self.value_of(claim))
        args = {"complete": [value], "fail": [ERROR], "retry": [ERROR], "ignore": [ERROR]}.get(how, [])

        def end(conn: Connection) -> Any:
            if how == "revoke":
                return steps.revoke(conn, claim.id, "revoked", attempt=claim.attempt)
            if how == "time_out":
                return timeouts.time_out(conn, claim.id, claim.attempt, max_preemptions=1)
            if how == "put_back":
                row = query(conn, "SELECT worker_id, pid FROM byrd.steps WHERE id = %(id)s", {"id": claim.id}).first()
                where = {"worker_id": row.worker_id, "pid": row.pid} if row else {"worker_id": None, "pid": 0}
                return steps.put_back(conn, claim.id, claim.attempt, **where)
            return getattr(steps, how)(conn, claim.id, claim.attempt, *args)

        self.start(Op(how, end, self.ended(claim, how)), whole=whole)

    @move(worker=st.integers(0, 1), most=st.integers(0, 3), others=st.booleans(), whole=WHOLE)
    def slice(self, data: st.DataObject, worker: int, most: int, others: bool, whole: bool) -> None:
        """Record some results, claim what follows, and others: all in one statement, of whichever runs."""
        drawn = data.draw(st.lists(st.sampled_from(self.claims), max_size=4, unique=True)) if self.claims else []
        joins: dict[str, int] = {}  # no two joins of one run
        ends = [c for c in drawn if c.join_no is None or joins.setdefault(c.run_id, c.join_no) == c.join_no]
        ends = list({c.id: c for c in ends if self.just_returns(c)}.values())  # nor a step twice
        row = self.pick(data, READY) if others else None
        self.quietly(
            """UPDATE byrd.workers SET shares = (SELECT array_agg(DISTINCT task) FROM byrd.steps) WHERE id IN
                 (SELECT id FROM byrd.workers WHERE id = %(id)s FOR NO KEY UPDATE SKIP LOCKED)""",
            id=self.workers[worker],
        )
        worker_id, token = self.workers[worker], str(uuid.uuid4())

        def act(conn: Connection) -> Work:
            try:
                return work.work(
                    conn, worker_id=worker_id, pid=worker, token=token, most=most, others=others,
                    done=[Done(claim, json.dumps(self.value_of(claim))) for claim in ends],
                    own=Own(row.id, row.attempt, row.task) if row else None,
                )  # fmt: skip
            except DBAPIError as exc:
                if work.is_unusual(exc):
                    raise StaleAttempt("it is to be done one by one") from exc
                raise

        def committed(found: Work, changes: list[Change]) -> None:
            # It is told, too, of what its process was said to run; that may have ended before this commit.
            taken = {c.step_id for c in changes if c.new == "running"}
            new = [c for c in found.claims if c.id in taken]
            assert all(c in new or c.attempt <= self.owners.get(c.id, (c.attempt,))[0] for c in found.claims)
            assert len(new) <= most
            ended = {c.step_id for c in changes if c.old == "running"}
            for claim in ends:
                owns = self.owners.get(claim.id, (0,))[0] == claim.attempt
                assert owns == (claim.id in ended), f"attempt {claim.attempt} of {claim.id}, owner or not: {changes}"
                assert not (owns and claim.id in found.refused)
            for claim in new:
                self.owners[claim.id] = (claim.attempt, worker_id)
                self.claims.append(claim)

        self.start(Op("slice", act, committed), whole=whole)

    @move(lambda self: self.owned(), how=st.sampled_from(["hand_back", "retry"]))
    def claim_again(self, data: st.DataObject, how: str) -> None:
        """Give a step to a later attempt; the one before is still there."""
        claim = data.draw(st.sampled_from(self.owned()))
        self.end_one(claim, how, whole=True)
        row = query(self.monitor, f"SELECT * FROM ({READY}) ready WHERE id = %(id)s", {"id": claim.id}).first()
        if row is not None:
            self.claim_one(row, 1, row.attempt, whole=True)

    @move(lambda self: self.claims, whole=WHOLE)
    def obey(self, data: st.DataObject, whole: bool) -> None:
        """Look, at a checkpoint, whether to stop, and do so."""
        ids = {row.id for row in query(self.monitor, TOLD)}
        told = [claim for claim in self.claims if claim.id in ids]
        claim = data.draw(st.sampled_from(told)) if told else self.draw_claim(data)
        stop = progress.stop_reason(self.monitor, claim.id, claim.attempt)
        name = {"StepCancelled": "abandon", "StepHandedBack": "hand_back"}.get(type(stop).__name__)
        if name is not None:
            self.start(
                Op(name, lambda conn: getattr(steps, name)(conn, claim.id, claim.attempt), self.ended(claim, name)),
                whole=whole,
            )

    @move(lambda self: self.claims, whole=WHOLE)
    def end_by_force(self, data: st.DataObject, whole: bool) -> None:
        """End an attempt whose run is cancelled with terminate, or another one."""
        ids = {row.id for row in query(self.monitor, DOOMED)}
        doomed = [claim for claim in self.claims if claim.id in ids]
        claim = data.draw(st.sampled_from(doomed)) if doomed else self.draw_claim(data)
        if not doomed and whole and claim in self.owned():
            cancel = _if_there(lambda conn: termination.cancel(conn, claim.run_id, grace=0.0), claim.run_id)
            self.start(Op("cancel", cancel), whole=True)
            if not self.free():
                return
        row = query(
            self.monitor, "SELECT worker_id::text, pid FROM byrd.steps WHERE id = %(id)s", {"id": claim.id}
        ).first()
        if row is None or row.worker_id is None:
            return
        one, worker_id = termination.Doomed(claim.id, claim.attempt, row.pid), row.worker_id

        def end(conn: Connection) -> Any:
            return termination.terminate(conn, one, worker_id=worker_id, ended=True)

        self.start(Op("terminate", end, self.ended(claim, "terminate")), whole=whole)

    @move(how=st.sampled_from(["revoke", "expire"]), whole=WHOLE)
    def drop_ready(self, data: st.DataObject, how: str, whole: bool) -> None:
        row = self.pick(data, READY)
        if row is None:
            return
        if how == "expire":
            self.quietly(
                """UPDATE byrd.steps SET expires_at = now() - interval '1 s' WHERE id IN
                     (SELECT id FROM byrd.steps WHERE id = %(id)s AND attempt = 0 AND kind <> 'compensation'
                        FOR UPDATE SKIP LOCKED)""",
                id=row.id,
            )
            self.start(Op(how, lambda conn: steps.expire(conn, row.id)), whole=whole)
        else:
            self.start(Op(how, lambda conn: steps.revoke(conn, row.id, "revoked")), whole=whole)

    @move(one=st.booleans(), whole=WHOLE)
    def end_waits(self, data: st.DataObject, one: bool, whole: bool) -> None:
        row = self.pick(data, WAITS) if one else None
        if row is None:
            self.start(Op("end_waits", waits.end_due), whole=whole)
        else:
            self.start(Op("end_waits", lambda conn: waits.end_due_of(conn, row.run_id)), whole=whole)

    # -- what the workers' threads do --------------------------------------------------------------

    @move(
        worker=st.integers(0, 1),
        name=st.sampled_from(["heartbeat", *["stop_worker"] * 2, *TAKING]),
        most=st.sampled_from([0, 1000]),
        whole=WHOLE,
    )
    def worker_does(self, worker: int, name: str, most: int, data: st.DataObject, whole: bool) -> None:
        worker_id = self.workers[worker]
        claim = self.draw_claim(data) if self.claims else None
        step = (claim.id, claim.attempt) if claim else ("", 1)

        def preempt(**which: Any) -> Statement:
            return lambda conn: steps.preempt(conn, worker_id, reason="gone", max_preemptions=most, **which)

        functions: dict[str, Statement] = {
            "heartbeat": lambda conn: _heartbeat(conn, worker_id),
            "stop_worker": lambda conn: sweeps.stop_worker(conn, worker_id),
            "release_worker": lambda conn: sweeps.release_worker(conn, worker_id, reason="stopped"),
            "recover": lambda conn: sweeps.recover(conn, max_preemptions=most),
            "preempt": preempt(),
            "preempt_process": preempt(pid=worker),
            "preempt_step": preempt(step=step),
        }
        if name == "recover":
            self.quietly(
                """UPDATE byrd.workers SET lease_until = now() - interval '1 s' WHERE id IN
                     (SELECT id FROM byrd.workers WHERE id = %(id)s FOR UPDATE SKIP LOCKED)""",
                id=worker_id,
            )

        def committed(_result: Any, changes: list[Change]) -> None:
            taken = {change.worker_id for change in changes if change.step_id and change.old == "running"}
            alive = {row.id for row in query(self.monitor, ALIVE)} if name == "recover" else taken - {worker_id}
            assert not taken & alive, f"{name} took steps of other workers: {changes}"

        self.start(Op(name, functions[name], committed), whole=whole)
        if name in ("recover", "release_worker", "stop_worker"):
            self.workers[worker] = self.world.add_worker()

    @move(
        lambda self: len(self.idle()) > 1 and self.owners,
        hows=st.tuples(st.sampled_from(ENDS), st.sampled_from(ENDS)),
        turns=st.lists(st.booleans(), max_size=16),
    )
    def collide(self, data: st.DataObject, hows: tuple[str, str], turns: list[bool]) -> None:
        """End two attempts of one run side by side, or one while somebody gives a command; then commit both."""
        owned = self.owned()
        first = data.draw(st.sampled_from(owned))
        kin = self.kin(first.run_id)
        others = [c for c in owned if c.run_id in kin and c is not first]
        pair = self.idle()[:2]
        self.end_one(first, hows[0], whole=False)
        if others and turns[:1] != [True]:
            self.end_one(data.draw(st.sampled_from(others)), hows[1], whole=False)
        else:
            self.command_one(data, data.draw(st.sampled_from(kin)) if kin[1:] else first.run_id, whole=False)
        self.take_turns(pair, turns)

    # -- what depends on the plans -----------------------------------------------------------------

    def value_of(self, claim: Claim) -> Any:
        """Return what the task of an attempt returns."""
        return claim.task

    def just_returns(self, claim: Claim) -> bool:
        """Tell whether an attempt may end by a result that is recorded with others."""
        return claim.kind in ("task", "callback")

    def kin(self, run_id: str) -> list[str]:
        """Return the runs that end together with a run."""
        return [run_id]


def _if_there(function: Statement, run_id: str) -> Statement:
    """Skip a command on a run whose submission is not committed."""

    def act(conn: Connection) -> Any:
        if query(conn, "SELECT 1 FROM byrd.runs WHERE id = %(id)s", {"id": run_id}).first() is None:
            raise StaleAttempt("there is no such run yet")
        return function(conn)

    return act


def _heartbeat(conn: Connection, worker_id: str) -> None:
    sweeps.heartbeat(
        conn, worker_id, lease_seconds=3600, hostname="w@host", pid=1, pool="solo", concurrency=1, queues=["work"],
        tasks=[], version="0",
    )  # fmt: skip
