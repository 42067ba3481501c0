"""A tiny driver of the store: submits plans, and plays the worker that claims, completes and fails their steps."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from celery import Celery, signature
from sqlalchemy import Connection

from byrd.canvas import Plan, compile_canvas
from byrd.errors import StaleAttempt
from byrd.model import StepKind
from byrd.store import Claim, RunRow, StepRow, Store, Wakeup, plans, runs, steps, sweeps, waits
from byrd.store.rows import query
from tests.invariants import check_invariants

app = Celery("store-tests", set_as_current=False)
#: A step whose task has this word in its name can be undone.
SAGA = "saga"
ERROR = json.dumps({"exc_type": "ValueError", "exc_module": "builtins", "exc_message": ["no"]})


def sig(name: str, *args: Any, **options: Any) -> Any:
    """Return the signature of a task that exists in name only."""
    return signature(name, args=args, options=options, app=app)


def plan_of(canvas: Any) -> Plan:
    """Compile a canvas as the engine does, with queues and compensations."""
    plan = compile_canvas(canvas, app)
    return Plan(
        tuple(step if step.kind in (StepKind.JOIN, StepKind.WAIT) else _frozen(step) for step in plan.steps),
        plan.output,
    )


def _frozen(step: Any) -> Any:
    undo = json.dumps({"task": f"undo_{step.task}", "queue": "work", "options": "{}"})
    return replace(step, queue="work", compensation=undo if SAGA in step.task else None)


class World:
    """A store with one registered worker, whose tasks succeed unless ``failing`` names them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.failing: set[str] = set()
        #: The tasks in the order in which they were run.
        self.ran: list[str] = []
        self.worker_id = self.add_worker()

    # -- what people do --------------------------------------------------------------------------

    def submit(self, canvas: Any, *, key: str | None = None, deadline: float | None = None) -> str:
        """Submit a canvas; return the run's id."""
        run_id, _ = self.do(submit, str(uuid.uuid4()), plan_of(canvas), key=key, deadline=deadline)
        return str(run_id)

    def do(self, statement: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a statement in a transaction of its own."""
        return self.store.run(statement, *args, **kwargs)

    def sql(self, text: str, **params: Any) -> list[Any]:
        """Run SQL of the test's own; return the rows."""

        def statement(conn: Connection) -> list[Any]:
            found = query(conn, text, params)
            return list(found.all()) if found.returns_rows else []

        return self.store.run(statement)

    # -- what workers do -------------------------------------------------------------------------

    def add_worker(self, *, lease_seconds: float = 3600.0) -> str:
        """Register a worker; return its id."""
        worker_id = str(uuid.uuid4())
        self.heartbeat(worker_id, lease_seconds=lease_seconds)
        return worker_id

    def heartbeat(self, worker_id: str, *, lease_seconds: float = 3600.0) -> None:
        """Prolong a worker's lease."""
        self.do(
            sweeps.heartbeat,
            worker_id,
            lease_seconds=lease_seconds,
            hostname="w@host",
            pid=1,
            pool="solo",
            concurrency=1,
            queues=["work"],
            tasks=[],
            version="0",
        )

    def end_lease(self, worker_id: str) -> None:
        """Let a worker's lease run out."""
        self.sql(
            "UPDATE byrd.workers SET lease_until = now() - interval '1 second' WHERE id = %(id)s RETURNING 1",
            id=worker_id,
        )

    def claim(self, run_id: str, no: int | str, *, worker_id: str | None = None, pid: int = 1) -> Claim:
        """Claim a step that must be claimable."""
        step = self.step(run_id, no)
        found = self.try_claim(step.id, step.attempt, worker_id=worker_id, pid=pid)
        assert found is not None, f"nothing to claim: {step}"
        return found

    def try_claim(self, step_id: str, attempt: int, *, worker_id: str | None = None, pid: int = 1) -> Claim | None:
        """Claim a step; None when there is nothing to claim."""
        step: StepRow | None = self.do(runs.get_step, step_id)
        found: Claim | None = self.do(
            steps.claim,
            step_id,
            attempt,
            task=(step.task if step else None) or "",
            worker_id=worker_id or self.worker_id,
            pid=pid,
            token=str(uuid.uuid4()),
        )
        return found

    def settle(self, claim: Claim) -> list[Wakeup]:
        """End an attempt: the task returns its name, or raises."""
        self.ran.append(claim.task)
        if claim.task in self.failing:
            return list(self.do(steps.fail, claim.id, claim.attempt, ERROR))
        return list(self.do(steps.complete, claim.id, claim.attempt, json.dumps(claim.task)))

    def end_waits(self) -> list[Wakeup]:
        """End the waits whose time or signal has come."""
        wakeups, busy, _ = self.do(waits.end_due)
        assert not busy
        return list(wakeups)

    def wake(self, run_id: str, no: int | str) -> None:
        """Let the time of a wait come now."""
        self.sql(
            """UPDATE byrd.steps SET run_at = now(), wake_at = now() WHERE id = %(id)s AND status = 'waiting'
               RETURNING 1""",
            id=self.step(run_id, no).id,
        )

    def drive(self, run_id: str, *, until: Iterable[str] = (), check: bool = True) -> RunRow:
        """Run ready steps, the lowest number first, until none is left or each task of ``until`` has been run."""
        wanted = set(until)
        while True:
            ready = [step for step in self.steps(run_id) if step.status == "ready"]
            if not ready and self.end_waits() is not None and self._goes_on(run_id):
                continue
            if not ready or (wanted and wanted <= set(self.ran)):
                return self.run(run_id)
            found = self.try_claim(ready[0].id, ready[0].attempt)
            if found is None:
                return self.run(run_id)
            self.settle(found)
            if check:
                self.check()

    def _goes_on(self, run_id: str) -> bool:
        """Tell whether a step of the run is ready, or a wait is over."""
        sql = """SELECT 1 FROM byrd.steps WHERE run_id = %(run)s AND (status = 'ready' AND wake_at < 'infinity'
                    OR status = 'waiting' AND wake_at <= clock_timestamp())"""
        return bool(self.sql(sql, run=run_id))

    # -- what one sees ---------------------------------------------------------------------------

    def run(self, run_id: str) -> RunRow:
        """Return the run as it stands."""
        row: RunRow = self.do(runs.get, run_id)
        return row

    def steps(self, run_id: str) -> list[StepRow]:
        """Return the run's steps."""
        found: list[StepRow] = self.do(runs.list_steps, run_id)
        return found

    def step(self, run_id: str, no: int | str) -> StepRow:
        """Return a step by its number, or by its task's name when only one has it."""
        [found] = [step for step in self.steps(run_id) if no in (step.no, step.task)]
        return found

    def statuses(self, run_id: str) -> dict[str, str]:
        """Return the steps' statuses by task; joins go by ``join`` and their number."""
        return {step.task or f"join{step.no}": step.status for step in self.steps(run_id)}

    def result(self, run_id: str) -> Any:
        """Return the run's value."""
        result = self.step(run_id, self.run(run_id).output).result
        return None if result is None else json.loads(result)

    def rows(self) -> dict[str, list[Any]]:
        """Return every row of every table, to compare before and after; the clock of leases excepted."""
        tables = ("runs", "steps", "checkpoints", "failed_items", "attempts", "events", "signals")
        return {table: self.sql(f"SELECT * FROM byrd.{table} t ORDER BY t::text") for table in tables}

    def check(self) -> None:
        """Check all invariants."""
        self.do(check_invariants)

    def stale(self, statement: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """Tell whether the store refuses the statement as one of an attempt that owns the step no more."""
        try:
            self.do(statement, *args, **kwargs)
        except StaleAttempt:
            return True
        return False


def submit(
    conn: Connection, run_id: str, plan: Plan, *, key: str | None = None, deadline: float | None = None
) -> tuple[str, list[Wakeup]]:
    """Write a run of the plan."""
    return plans.submit(
        conn, run_id, plan, workflow="test", title="test", key=key, args=None, deadline_seconds=deadline
    )
