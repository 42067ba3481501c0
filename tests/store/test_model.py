"""Random plans, workers, crashes and commands against a small model of what must come of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import chain, chord, group
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import byrd
from byrd.errors import IllegalTransitionError, StaleAttempt
from byrd.model import RUN_TRANSITIONS, sources
from byrd.store import Claim, Store, runs, steps, sweeps, waits
from byrd.store.rows import query
from tests.store.world import ERROR, World, sig

#: Set to explore for longer than the test run can wait.
EXAMPLES = int(os.environ.get("BYRD_MODEL_EXAMPLES", "6"))

# A canvas as a tree: ("task", links, errbacks), ("wait",), ("chain", parts), ("group", members),
# ("chord", members, body).
TASKS = st.one_of(*[st.tuples(st.just("task"), st.integers(0, 1), st.integers(0, 1))] * 4, st.tuples(st.just("wait")))


def _member(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    # Celery flattens a group that is a member of a group: a chain around it keeps its list.
    return st.one_of(TASKS, st.tuples(st.just("chain"), st.tuples(TASKS, inner)))


TREES = st.recursive(
    TASKS,
    lambda inner: st.one_of(
        st.tuples(st.just("chain"), st.lists(inner, min_size=2, max_size=3)),
        st.tuples(st.just("group"), st.lists(_member(inner), min_size=2, max_size=3)),
        st.tuples(st.just("chord"), st.lists(_member(inner), min_size=2, max_size=3), inner),
    ),
    max_leaves=6,
)


class Builder:
    """Makes a canvas of a tree, and the value that it must have."""

    def __init__(self) -> None:
        self.count = 0

    def name(self, prefix: str = "t") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def build(self, tree: Any) -> tuple[Any, Any]:
        match tree:
            case ("task", links, errbacks):
                name = self.name()
                made = sig(name)
                for _ in range(links):
                    made.link(sig(self.name("link")))
                for _ in range(errbacks):
                    made.link_error(sig(self.name("errback")))
                return made, name
            case ("wait",):
                # Its value is the same, whether the signal comes or its time.
                name = self.name("signal")
                return byrd.wait_for(name, timeout=0, default=name), name
            case ("chain", parts):
                built = [self.build(part) for part in parts]
                return chain(*[made for made, _ in built]), built[-1][1]
            case ("group", members):
                built = [self.build(member) for member in members]
                return group([made for made, _ in built]), [value for _, value in built]
            case ("chord", members, body):
                built = [self.build(member) for member in members]
                made, value = self.build(body)
                return chord([made for made, _ in built], made), value
        raise AssertionError(tree)


@dataclass
class ModelRun:
    """What must become of a run."""

    value: Any
    failed: bool = False
    cancelled: bool = False


@dataclass
class Model:
    """Which attempt owns which step, and what each run must come to."""

    runs: dict[str, ModelRun] = field(default_factory=dict)
    owners: dict[str, tuple[int, str]] = field(default_factory=dict)


COMMANDS: dict[str, Callable[..., Any]] = {
    "cancel": runs.cancel,
    "pause": runs.pause,
    "resume": runs.resume,
    "retry_run": runs.retry,
}


class StoreMachine(RuleBasedStateMachine):
    """Random traffic on the store."""

    store: Store

    def __init__(self) -> None:
        super().__init__()
        for table in ("runs", "workers"):
            self.store.run(query, f"DELETE FROM byrd.{table}")
        self.world = World(self.store)
        self.workers = [self.world.worker_id, self.world.add_worker()]
        self.model = Model()
        self.claims: list[Claim] = []

    # -- what people do --------------------------------------------------------------------------

    @precondition(lambda self: len(self.model.runs) < 3)
    @rule(tree=TREES)
    def submit(self, tree: Any) -> None:
        canvas, value = Builder().build(tree)
        self.model.runs[self.world.submit(canvas)] = ModelRun(value)

    @precondition(lambda self: self.model.runs)
    @rule(data=st.data(), name=st.sampled_from(list(COMMANDS)))
    def command(self, data: st.DataObject, name: str) -> None:
        run_id = data.draw(st.sampled_from(list(self.model.runs)))
        run = self.model.runs[run_id]
        allowed = self.world.run(run_id).status in sources(RUN_TRANSITIONS, name)
        if not allowed:
            with pytest.raises(IllegalTransitionError):
                self.world.do(COMMANDS[name], run_id)
            return
        self.world.do(COMMANDS[name], run_id)
        if name == "cancel":
            run.cancelled = True
        if name == "retry_run":
            run.failed = run.cancelled = False

    # -- what workers do -------------------------------------------------------------------------

    @precondition(lambda self: self.model.runs)
    @rule(data=st.data(), worker=st.integers(0, 1), late=st.booleans())
    def claim(self, data: st.DataObject, worker: int, late: bool) -> None:
        ready = self.world.sql(
            """SELECT s.id, s.attempt, r.status, s.run_at <= clock_timestamp() AS due
               FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
                WHERE s.status = 'ready' ORDER BY r.created_at, s.no"""
        )
        if not ready:
            return
        row = data.draw(st.sampled_from(ready))
        found = self.world.try_claim(row.id, row.attempt - late, worker_id=self.workers[worker])
        assert (found is not None) == (row.status == "running" and row.due and not late)
        if found is not None:
            assert row.id not in self.model.owners
            self.model.owners[row.id] = (found.attempt, self.workers[worker])
            self.claims.append(found)

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), how=st.sampled_from(["complete", "complete", "fail", "retry", "hand_back", "abandon"]))
    def end(self, data: st.DataObject, how: str) -> None:
        claim = data.draw(st.sampled_from(self.claims))
        run = self.model.runs[claim.run_id]
        if how == "abandon" and self.world.run(claim.run_id).status != "cancelling":
            return  # only a cancelled run's checkpoints do so
        args = {"complete": [json.dumps(claim.task)], "fail": [ERROR], "retry": [ERROR]}.get(how, [])
        owner = self.model.owners.get(claim.id)
        if owner is None or owner[0] != claim.attempt:
            before = self.world.rows()
            with suppress(StaleAttempt):
                self.world.do(getattr(steps, how), claim.id, claim.attempt, *args)
            assert self.world.rows() == before, "an attempt that owns nothing may write nothing"
            return
        self.world.do(getattr(steps, how), claim.id, claim.attempt, *args)
        del self.model.owners[claim.id]
        if how == "fail" and claim.kind != "errback":
            run.failed = True

    @rule(worker=st.integers(0, 1))
    def lose_worker(self, worker: int) -> None:
        lost = self.workers[worker]
        self.world.end_lease(lost)
        self.world.do(sweeps.recover, max_preemptions=1000)
        self.model.owners = {step: owner for step, owner in self.model.owners.items() if owner[1] != lost}
        self.workers[worker] = self.world.add_worker()

    @precondition(lambda self: self.model.runs)
    @rule(data=st.data())
    def signal(self, data: st.DataObject) -> None:
        rows = self.world.sql(
            """SELECT s.run_id::text, s.signal FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
                WHERE s.signal IS NOT NULL ORDER BY r.created_at, s.no"""
        )
        if not rows:
            return
        row = data.draw(st.sampled_from(rows))
        status, before = self.world.run(row.run_id).status, self.world.rows()
        try:
            self.world.do(waits.signal, row.run_id, row.signal, json.dumps(row.signal))
        except IllegalTransitionError:
            assert status not in ("running", "paused")
            assert self.world.rows() == before

    @rule()
    def end_waits(self) -> None:
        self.world.end_waits()
        assert not self.world.sql(
            """SELECT 1 FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id AND r.status = 'running'
                WHERE s.status = 'waiting' AND s.run_at <= now() - interval '1 s'"""
        )

    @rule()
    def relay(self) -> None:
        self.world.sql(
            "UPDATE byrd.steps SET wake_at = now() - interval '1 s' WHERE status = 'ready' AND wake_at < 'infinity'"
        )
        self.world.do(sweeps.take_due)
        for queue in self.world.do(sweeps.overdue_queues):
            self.world.do(sweeps.look_again, self.world.do(sweeps.late_steps, queue, limit=1), [])
            self.world.do(sweeps.take_overdue, queue, resend=1)

    # -- what must be ----------------------------------------------------------------------------

    @invariant()
    def tables_are_right(self) -> None:
        self.world.check()

    @invariant()
    def running_steps_are_the_owned_ones(self) -> None:
        running = self.world.sql("SELECT id, attempt FROM byrd.steps WHERE status = 'running'")
        assert {row.id: row.attempt for row in running} == {k: attempt for k, (attempt, _) in self.model.owners.items()}

    def teardown(self) -> None:
        for worker in (0, 1):
            self.lose_worker(worker)
        self.world.worker_id = self.workers[0]
        for run_id, run in self.model.runs.items():
            if self.world.run(run_id).status == "paused":
                self.world.do(runs.resume, run_id)
            row = self.world.drive(run_id, check=False)
            expected = "cancelled" if run.cancelled else "failed" if run.failed else "succeeded"
            assert row.status == expected
            if expected == "succeeded":
                assert self.world.result(run_id) == run.value
        self.world.check()


def test_whatever_happens_the_store_does_what_the_model_says(store: Store) -> None:
    run_state_machine_as_test(
        type("Machine", (StoreMachine,), {"store": store}),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            derandomize=EXAMPLES < 100,  # the same ones in every test run; others when one explores
        ),
    )
