"""Writes a plan: the run and all its steps, in the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from byrd.canvas import Plan, Step
from byrd.model import StepKind
from byrd.store import flow, runs
from byrd.store.rows import CHANNEL, Wakeup, array_of, query, rows_of


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run to be written.  ``args`` is what its workflow was called with (JSON); ``deadline_seconds`` from now."""

    id: str
    plan: Plan
    workflow: str | None = None
    title: str = ""
    key: str | None = None
    args: str | None = None
    deadline_seconds: float | None = None
    #: Of a sub-workflow: the step that it is the work of.
    parent_step: str | None = None

    @property
    def plain(self) -> bool:
        """True when :func:`submit_many` knows how to begin it."""
        return all(
            (step.kind in _PLAIN and (step.after is not None or (step.countdown is None and step.eta is None)))
            or (step.kind is StepKind.JOIN and step.members > 0)
            or step.kind is StepKind.SAGA
            or (step.kind is StepKind.WAIT and step.after is not None)
            for step in self.plan.steps
        )


_PLAIN = frozenset({StepKind.TASK, StepKind.CALLBACK, StepKind.ERRBACK})


def submit_many(conn: Connection, new: Sequence[NewRun], *, told: bool = True) -> tuple[list[str], list[Wakeup]]:
    """Write plain runs with their steps, in one statement; return their ids, and the steps to publish.

    With a ``key`` that a run of the same workflow has already, nothing is written for it and that run's id is returned:
    the unique index decides, so two submits at once make one run.  Right when it is run twice: the ids are the
    caller's own.  Unless the caller is ``told`` what to publish, the relay does it, once this transaction is committed.
    """
    single = _single(new)
    if single is not None:
        [(written,)] = _executor(told=told)(conn, _WRITE_RUN, {**single, "told": told})
        existing = set() if written else {new[0].id}
    else:
        existing = _write_runs(conn, new, told=told)
    ids = [_existing(conn, run.id, run.workflow, run.key) if run.id in existing else run.id for run in new]
    if not told:
        query(conn, f"NOTIFY {CHANNEL}")
        return ids, []
    wakeups = [
        _first_wakeup(run.id, step)
        for run in new
        if run.id not in existing
        for step in run.plan.steps
        if step.after is None and step.kind not in (StepKind.JOIN, StepKind.SAGA)
    ]
    return ids, wakeups


def _single(new: Sequence[NewRun]) -> dict[str, Any] | None:
    """Return what ``byrd.write_run`` is called with; None for what is not for it."""
    if len(new) != 1 or len(new[0].plan.steps) != 1:
        return None
    [run] = new
    step = dict(zip(_COLUMNS, _row(run.plan.steps[0]), strict=True))
    if any(step[name] != value for name, value in _OF_SINGLE.items()):
        return None
    return {
        "run": run.id, "workflow": run.workflow, "title": run.title, "key": run.key, "call": run.args,
        "deadline": run.deadline_seconds, "parent": run.parent_step, **step,
    }  # fmt: skip


def _executor(*, told: bool) -> Callable[..., Any]:
    """Return what runs a statement: the connection is Byrd's own, or the caller's."""
    return rows_of if told else query


def _write_runs(conn: Connection, new: Sequence[NewRun], *, told: bool) -> set[str]:
    """Write runs; return the ids of those that were there, or whose keys were."""
    steps = [(run, step) for run in new for step in run.plan.steps]
    columns = zip(*(_row(step) for _, step in steps), strict=True)
    arrays = {name: _array(column, _DEFAULTS.get(name)) for name, column in zip(_COLUMNS, columns, strict=True)}
    taken = _executor(told=told)(
        conn,
        _WRITE_RUNS,
        {
            "run_ids": _array([run.id for run in new]),
            "workflows": _array([run.workflow for run in new]),
            "titles": _array([run.title for run in new], _NEVER),
            "keys": _array([run.key for run in new]),
            "run_args": _array([run.args for run in new]),
            "outputs": _array([run.plan.output for run in new]),
            "deadlines": _array([run.deadline_seconds for run in new]),
            "parents": _array([run.parent_step for run in new]),
            "step_runs": _array([run.id for run, _ in steps]),
            "told": told,
            **arrays,
        },
    )
    return {str(row[0]) for row in taken}


def write(conn: Connection, new: Sequence[NewRun], *, told: bool = True) -> tuple[list[str], list[Wakeup]]:
    """Write runs, whatever their plans; as :func:`submit_many` otherwise."""
    if all(run.plain for run in new):
        return submit_many(conn, new, told=told)
    ids: list[str] = []
    wakeups: list[Wakeup] = []
    for run in new:
        written, ready = submit(
            conn, run.id, run.plan, workflow=run.workflow, title=run.title, key=run.key, args=run.args,
            deadline_seconds=run.deadline_seconds, parent_step=run.parent_step,
        )  # fmt: skip
        if written == run.id and not told:
            leave_to_relay(conn, run.id)
        ids.append(written)
        wakeups += ready
    return ids, wakeups if told else []


def _first_wakeup(run_id: str, step: Step) -> Wakeup:
    return Wakeup(
        step.id, run_id, step.no, step.kind.value, step.task or "", step.queue or "", 0, 0, options_json(step),
        step.group_id, step.position, None, due=True, solo=step.solo, limited=step.limit_key is not None,
    )  # fmt: skip


def submit(
    conn: Connection,
    run_id: str,
    plan: Plan,
    *,
    workflow: str | None,
    title: str,
    key: str | None,
    args: str | None,
    deadline_seconds: float | None,
    parent_step: str | None = None,
) -> tuple[str, list[Wakeup]]:
    """Write a run with its steps; return its id and the steps to publish.

    With a ``key`` that a run of this workflow has already, nothing is written and that run's id is returned:
    the unique index decides, so two submits at once make one run.  Right when it is run twice: the run's own
    id is made by the caller.
    """
    row = query(
        conn,
        """INSERT INTO byrd.runs (id, workflow, title, key, args, output, parent_step, deadline)
           VALUES (%(id)s, %(workflow)s, %(title)s, %(key)s, %(args)s, %(output)s, %(parent)s,
                   clock_timestamp() + %(deadline)s * interval '1 second')
           ON CONFLICT DO NOTHING RETURNING id""",
        {
            "id": run_id, "workflow": workflow, "title": title, "key": key, "args": args, "output": plan.output,
            "deadline": deadline_seconds, "parent": parent_step,
        },
    ).first()  # fmt: skip
    if row is None:
        return _existing(conn, run_id, workflow, key), []
    insert_steps(conn, run_id, plan.steps)
    runs.record(conn, run_id, "submitted", {"steps": len(plan.steps)})
    return run_id, start(conn, run_id, plan.steps)


def leave_to_relay(conn: Connection, run_id: str) -> None:
    """Mark the run's ready steps as never published: the relay does it, once this transaction has committed.

    Postgres tells the relay of the commit, and of nothing else: a NOTIFY is part of its transaction.
    """
    query(
        conn,
        "UPDATE byrd.steps SET sends = 0, wake_at = run_at WHERE run_id = %(run)s AND status = 'ready' AND attempt = 0",
        {"run": run_id},
    )
    query(conn, f"NOTIFY {CHANNEL}")


def start(conn: Connection, run_id: str, planned: Sequence[Step]) -> list[Wakeup]:
    """Make ready the steps that wait for nothing, and finish the groups that are empty."""
    wakeups = flow.release(conn, run_id, [s.no for s in planned if s.after is None])
    for step in planned:
        if step.after is None and step.kind is StepKind.JOIN and step.members == 0:
            row = query(
                conn,
                """UPDATE byrd.steps SET status = 'succeeded', result = '[]', finished_at = clock_timestamp()
                   WHERE run_id = %(run)s AND no = %(no)s AND status = 'pending' RETURNING join_no""",
                {"run": run_id, "no": step.no},
            ).first()
            if row is not None:
                wakeups += runs.advance(conn, run_id, step.no, row.join_no, succeeded=True)
    return wakeups


def renumbered(plan: Plan, first_no: int) -> Plan:
    """Return the plan with its numbers shifted, so that its first step has ``first_no``."""
    shift = first_no - min(step.no for step in plan.steps)

    def shifted(no: int | None) -> int | None:
        return None if no is None else no + shift

    moved = (
        replace(
            s, no=s.no + shift, after=shifted(s.after), input=shifted(s.input), into=shifted(s.into),
            saga=shifted(s.saga),
        )
        for s in plan.steps
    )  # fmt: skip
    return Plan(tuple(moved), plan.output + shift)


def insert_steps(conn: Connection, run_id: str, planned: Sequence[Step]) -> None:
    """Insert steps, all pending: one statement, with one array for each column."""
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for step in planned:
        for name, value in zip(_COLUMNS, _row(step), strict=True):
            columns[name].append(value)
    arrays = ", ".join(f"%({name})s::{kind}[]" for name, kind in _COLUMNS.items())
    names = ", ".join(_COLUMNS)
    query(
        conn,
        f"INSERT INTO byrd.steps (run_id, {names}) SELECT %(run)s, * FROM unnest({arrays}) AS planned ({names})",
        {"run": run_id, **columns},
    )


_COLUMNS = {
    "id": "text", "no": "int", "kind": "text", "task": "text", "queue": "text", "args": "text", "kwargs": "text",
    "options": "text", "compensation": "text", "after": "int", "on_failure": "bool", "input": "int", "join_no": "int",
    "join_pos": "int", "waiting": "int", "group_id": "text", "countdown": "float8", "eta": "timestamptz",
    "expires_in": "float8", "expires_at": "timestamptz", "solo": "bool", "signal": "text", "signal_of": "text",
    "fallback": "text", "limit_name": "text", "limit_key": "text", "saga": "int", "mark": "text",
}  # fmt: skip
#: What ``byrd.write_runs`` puts in place of NULL.
_DEFAULTS = {"kind": "task", "args": "[]", "kwargs": "{}", "options": "{}", "on_failure": False, "waiting": 0,
             "solo": False}  # fmt: skip
_NEVER = object()
#: What the only step of a run has where ``byrd.write_run`` can write it.
_OF_SINGLE = {name: _DEFAULTS.get(name) for name in _COLUMNS if name not in
              ("id", "task", "queue", "args", "kwargs", "options", "solo")} | {"no": 0}  # fmt: skip
_WRITE_RUN = """SELECT byrd.write_run(%(run)s, %(workflow)s, %(title)s, %(key)s, %(call)s, %(deadline)s, %(parent)s,
    %(id)s, %(task)s, %(queue)s, %(args)s, %(kwargs)s, %(options)s, %(solo)s, %(told)s)"""
_WRITE_RUNS = f"""SELECT * FROM byrd.write_runs(%(run_ids)s, %(workflows)s, %(titles)s, %(keys)s, %(run_args)s,
    %(outputs)s, %(deadlines)s, %(parents)s, %(step_runs)s,
    {", ".join(f"%({name})s" for name in _COLUMNS)}, %(told)s)"""


def _array(column: Sequence[Any], default: Any = None) -> str | None:
    """Return a column as Postgres writes arrays; None where each value is the default."""
    if default is not _NEVER and column.count(default) == len(column):
        return None
    return array_of(column)


def options_json(step: Step) -> str:
    """Return the step's options as its row holds them."""
    return json.dumps(dict(step.options)) if step.options else "{}"


def _row(step: Step) -> tuple[Any, ...]:
    return (
        step.id, step.no, step.kind.value, step.task, step.queue, step.args, step.kwargs, options_json(step),
        step.compensation, step.after, step.on_failure, step.input, step.into, step.position, step.members,
        step.group_id, step.countdown, step.eta, step.expires_in, step.expires_at, step.solo, step.signal,
        step.signal_of, step.fallback, step.limit_name, step.limit_key, step.saga, step.mark,
    )  # fmt: skip


def _existing(conn: Connection, run_id: str, workflow: str | None, key: str | None) -> str:
    row = query(
        conn,
        """SELECT id FROM byrd.runs WHERE id = %(id)s
           UNION ALL
           SELECT id FROM byrd.runs WHERE coalesce(workflow, '') = coalesce(%(workflow)s, '') AND key = %(key)s""",
        {"id": run_id, "workflow": workflow, "key": key},
    ).first()
    if row is None:  # the other submit was rolled back, or its run deleted, in between: the caller tries again
        raise RunVanishedError(run_id)
    return str(row.id)


class RunVanishedError(Exception):
    """The run that held the key went away between two statements; submit again."""
