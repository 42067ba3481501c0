"""A tiny driver of the store: submits plans, and plays the worker that claims, completes and fails their steps."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from celery import Celery, signature
from sqlalchemy import Connection

from byrd.canvas import Plan, Step, compile_canvas, item_of
from byrd.errors import StaleAttempt
from byrd.items import Each
from byrd.model import StepKind
from byrd.store import Claim, RunRow, StepRow, Store, Wakeup, plans, reading, sagas, steps, sweeps, waits, work
from byrd.store.rows import query
from byrd.store.work import Done, Own, Work
from tests.invariants import check_invariants

app = Celery("store-tests", set_as_current=False)
#: A step whose task has this word in its name can be undone.
SAGA = "saga"
#: The columns of a claim, without what is known of other steps.
CLAIM = """s.id, s.run_id, s.no, s.kind, s.task, s.attempt, s.retries, s.preemptions, s.args, s.kwargs, s.options,
    s.group_id, s.join_no, s.join_pos, NULL AS parent_id, NULL AS parent_task, s.on_failure, s.input AS input_no,
    NULL AS input, NULL AS after_error, s.compensates, s.queue"""
ERROR = json.dumps({"exc_type": "ValueError", "exc_module": "builtins", "exc_message": ["no"]})


def sig(name: str, *args: Any, **options: Any) -> Any:
    """Return the signature of a task that exists in name only."""
    return signature(name, args=args, options=options, app=app)


def plan_of(canvas: Any, *, shared: bool = False) -> Plan:
    """Compile a canvas as the engine does, with queues and compensations.

    ``shared``: whoever is awake may run a step, unless it has a priority, may expire, or is an errback's.
    """
    plan = compile_canvas(canvas, app)
    frozen = (
        step if step.kind in (StepKind.JOIN, StepKind.WAIT, StepKind.SAGA) else _frozen(step, shared=shared)
        for step in plan.steps
    )
    return Plan(tuple(frozen), plan.output)


def item_step(spec: Each, item: Any) -> Step:
    """Return the step of one item of an each, as the engine makes it."""
    step, _ = item_of(spec, app)
    return replace(_frozen(step, shared=True), id=str(uuid.uuid4()), args=json.dumps([item]))  # type: ignore[no-any-return]


def _frozen(step: Any, *, shared: bool) -> Any:
    undo = json.dumps({"task": f"undo_{step.task}", "queue": "work", "options": "{}"})
    mark = next((mark for mark in ("pivot", "retriable") if mark in step.task), None)
    own = "priority" in step.options or step.expires_in is not None or step.kind is StepKind.ERRBACK
    own = own or step.saga is not None or mark is not None
    queue = step.options.get("queue", "work")
    return replace(
        step, queue=queue, compensation=undo if SAGA in step.task else None, solo=own or step.on_failure or not shared,
        mark=mark,
    )  # fmt: skip


class World:
    """A store with one registered worker, whose tasks succeed unless ``failing`` names them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.failing: set[str] = set()
        #: The tasks in the order in which they were run.
        self.ran: list[str] = []
        self.worker_id = self.add_worker()

    # -- what people do --------------------------------------------------------------------------

    def submit(
        self, canvas: Any, *, key: str | None = None, deadline: float | None = None, shared: bool = False
    ) -> str:
        """Submit a canvas; return the run's id."""
        plan = plan_of(canvas, shared=shared)
        run_id, _ = self.do(submit, str(uuid.uuid4()), plan, key=key, deadline=deadline)
        if shared:
            self.share_all()
        return str(run_id)

    def share_all(self) -> None:
        """Let the workers run the steps of all tasks that there are without messages."""
        self.sql("UPDATE byrd.workers SET shares = (SELECT array_agg(DISTINCT task) FROM byrd.steps) RETURNING 1")

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
        step: StepRow | None = self.do(reading.get_step, step_id)
        found: Claim | None = self.do(
            steps.claim,
            step_id,
            attempt,
            task=(step.task if step else None) or "",
            worker_id=worker_id or self.worker_id,
            pid=pid,
            token=str(uuid.uuid4()),
        )
        if found is None:
            self.do(sagas.stop_pivot, step_id)
        return found

    def work(
        self,
        done: Iterable[Claim | Done] = (),
        *,
        own: Claim | StepRow | None = None,
        most: int = 0,
        others: bool = False,
        peek: bool = False,
        worker_id: str | None = None,
        pid: int = 1,
        token: str | None = None,
    ) -> Work:
        """Record in one statement that tasks have returned their names, and claim."""
        return self.store.run_alone(
            work.work,
            worker_id=worker_id or self.worker_id,
            pid=pid,
            token=token or str(uuid.uuid4()),
            done=[c if isinstance(c, Done) else Done(c, json.dumps(c.task)) for c in done],
            own=Own(own.id, own.attempt, own.task or "") if own is not None else None,
            most=most,
            others=others,
            peek=peek,
        )

    def claim_of(self, step_id: str, attempt: int) -> Claim:
        """Return what an attempt would know of a step, whether it has claimed it or not."""
        [row] = self.sql(f"SELECT {CLAIM} FROM byrd.steps s WHERE id = %(id)s", id=step_id)
        return Claim(**{**row._mapping, "run_id": str(row.run_id), "attempt": attempt})

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
            if found is None and self.step(run_id, ready[0].no).status == "ready":
                return self.run(run_id)
            if found is None:
                continue
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
        row: RunRow = self.do(reading.get, run_id)
        return row

    def steps(self, run_id: str) -> list[StepRow]:
        """Return the run's steps."""
        found: list[StepRow] = self.do(reading.list_steps, run_id)
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
        tables = ("runs", "steps", "checkpoints", "failed_items", "attempts", "events", "signals", "notices")
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


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the nodes of a plan as EXPLAIN tells it in JSON."""
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes(inner)
