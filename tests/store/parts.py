"""What the attempts at parts of a canvas do that take more than one transaction, as the engine's tasks do it.

An each, a workflow within another and what undoes it, a bulk job, and a checkpoint task that sleeps and waits: what
such an attempt does next goes by what the store has told it last.  Whether it still owns its step, it does not know.
"""

from __future__ import annotations

import functools
import json
import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from celery import chain, group, signature
from sqlalchemy import Connection

import byrd
from byrd.items import EACH, Each, each_of
from byrd.store import Claim, bulk, children, each, plans, progress, runs, steps, termination, waits
from byrd.store.bulk import BULK, Act, Filter
from byrd.store.children import Child
from byrd.store.items import FLOOR, Items
from byrd.store.rows import Wakeup, query
from byrd.waits import SUBWORKFLOW, UNDO_SUBWORKFLOW, WORKFLOW_NAME
from tests.store.sessions import Statement
from tests.store.world import ERROR, app, item_step, plan_of, sig

#: A checkpoint task that sleeps and waits; its argument says what it does, one after another.
NAPPER = "napper"
#: So many items come at a time.
PAGE = 2
#: Longer than any example takes.
LONG = 1e6
ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class Part:
    """What an attempt does next: a transition that is called ``name``, and what it is to the part.

    ``then`` is called with its result once it is committed, if the attempt owned its step.
    """

    name: str
    what: str
    function: Statement
    then: Callable[[Any], None] = lambda _result: None
    #: Tells it from others that the attempt does by the same name.
    tag: str = ""


@dataclass(frozen=True)
class Known:
    """What an attempt has done last, and what it was told."""

    what: str = ""
    tag: str = ""
    result: Any = None


# -- the canvases ------------------------------------------------------------------------------------


def inner(name: str) -> Any:
    """Return the signature of a workflow as a part of a canvas."""
    return signature(SUBWORKFLOW, kwargs={WORKFLOW_NAME: name}, app=app, immutable=True)


def items(number: int) -> list[str]:
    """Return the items of an each."""
    return [f"i{n}" for n in range(number)]


def each_over(number: int, *, pages: bool, task: str = "item", **said: Any) -> Any:
    """Return an each over so many items, that come from an enumerator if they come in ``pages``."""
    over = sig("pages", number) if pages else items(number)
    return byrd.each(sig(task), over=over, **said)


#: The workflows that others are made of.
WITHIN: dict[str, Callable[[], Any]] = {
    "plain": lambda: chain(sig("a"), sig("b")),
    "undoable": lambda: chain(sig("saga1"), sig("x")),
    "pair": lambda: group(sig("saga2"), sig("y")),
    "forward": lambda: chain(sig("saga3"), sig("pivot"), sig("rest")),
    "deep": lambda: chain(sig("saga4"), inner("undoable")),
    "over_items": lambda: chain(each_over(3, pages=False, limit=2, tolerate=1), sig("last")),
    "waiting": lambda: byrd.wait_for("ok", timeout=0, default=None),
}


def nap(name: str, seconds: float) -> list[Any]:
    """Return what a checkpoint task is told to do: to sleep."""
    return ["sleep", f"step:sleep {name}", seconds]


def wait(signal: str, name: str, *, timeout: float | None, default: Any = None) -> list[Any]:
    """Return what a checkpoint task is told to do: to wait for a signal; without a default it fails when none comes."""
    return ["wait", f"step:wait_for {name}", signal, timeout, default]


def task_of(name: str, **kwargs: Any) -> Any:
    """Return the signature of a task with keyword arguments."""
    return signature(name, kwargs=kwargs, app=app, immutable=True)


# -- what they do ------------------------------------------------------------------------------------


def each_part(conn: Connection, claim: Claim, known: Known) -> Part:
    """Bring the next items into the run; give way while they last, and end with them."""
    spec, step = each_of(json.loads(claim.kwargs)), (claim.id, claim.attempt)
    found: Items | None = known.result if known.what == "each.look" else known.result[0] if known.result else None
    if found is None:
        total = None if spec.pages is not None else len(spec.items or [])
        look = functools.partial(each.look, limit=spec.limit, tolerate=spec.tolerate, total=total)
        return Part("each", "each.look", lambda conn: look(conn, *step))
    if found.hungry and found.reopen is not None:
        return Part("each", "each.reopen", lambda conn: each.reopen(conn, *step, most=PAGE))
    if found.hungry:
        return _page(claim, spec, found)
    if found.ended and found.over:
        return Part(
            "fail", "each.fail", lambda conn: steps.fail(conn, *step, ERROR),
            lambda _: check_failed(conn, claim, spec, done=found.done),
        )  # fmt: skip
    if found.ended:
        return Part(
            "complete", "each.finish", lambda conn: each.finish(conn, *step, results=spec.results),
            lambda _: check_finished(conn, claim, spec),
        )  # fmt: skip
    return Part("hand_back", "each.park", lambda conn: each.park(conn, *step))


def _page(claim: Claim, spec: Each, found: Items) -> Part:
    wanted = all_items(spec)
    begin = found.inserted if spec.pages is None else found.at or 0
    page = wanted[begin : begin + PAGE]
    end = begin + len(page)
    at = None if spec.pages is None or end >= len(wanted) else end

    def insert(conn: Connection) -> tuple[Items, list[Wakeup]]:
        made = [item_step(spec, item) for item in page]
        return each.insert(conn, claim.id, claim.attempt, made, inserted=found.inserted, at=at, done=end >= len(wanted))

    return Part("each", "each.insert", insert)


def all_items(spec: Each) -> list[str]:
    """Return all items of an each."""
    return spec.items if spec.items is not None else items(spec.pages["args"][0])


def tolerated(spec: Each, number: int) -> int:
    """Return how many of so many items may fail."""
    return spec.tolerate if isinstance(spec.tolerate, int) else math.floor(spec.tolerate * number + 1e-9)


_ITEMS = """SELECT status, result, args::json ->> 0 AS item, cause FROM byrd.steps
             WHERE run_id = %(run)s AND join_no = %(no)s AND kind = 'item' ORDER BY join_pos"""


def check_finished(conn: Connection, claim: Claim, spec: Each) -> None:
    """An each that has succeeded has the values of all its items in order, and no more failures than it may have."""
    rows = query(conn, _ITEMS, {"run": claim.run_id, "no": claim.no}).all()
    wanted = all_items(spec)
    assert [row.item for row in rows] == wanted
    assert {row.status for row in rows} <= {"succeeded", "failed", "cancelled"}
    failed = sum(row.status != "succeeded" for row in rows)
    assert failed <= tolerated(spec, len(wanted)), f"{failed} items have failed"
    values = [f"v-{row.item}" if row.status == "succeeded" else None for row in rows]
    found = query(conn, "SELECT result FROM byrd.steps WHERE id = %(id)s", {"id": claim.id}).scalar_one()
    assert json.loads(found) == (values if spec.results else {"items": len(wanted), "failed": failed})


def check_failed(conn: Connection, claim: Claim, spec: Each, *, done: bool) -> None:
    """An each fails only when more of its items have failed than it tolerates; then none of them goes on."""
    rows = query(conn, _ITEMS, {"run": claim.run_id, "no": claim.no}).all()
    failed = sum(row.status in ("failed", "cancelled") and row.cause is None for row in rows)
    number = len(all_items(spec)) if spec.pages is None or done else max(len(rows), FLOOR)
    assert failed > tolerated(spec, number), f"{failed} items have failed"
    assert all(row.status in (*ENDED, "skipped") for row in rows)


def inner_part(conn: Connection, claim: Claim, known: Known, new: plans.NewRun) -> Part:
    """Begin a run, which is ``new``, wait for its end, and end as it has."""
    step, child = (claim.id, claim.attempt), children.of_step(conn, claim.id)
    if child is not None and child.status in ("failed", "cancelled") and known.what != "inner.try_again":
        return Part("retry_run", "inner.try_again", lambda conn: children.try_again(conn, *step))
    if child is None:
        return Part("submit", "inner.begin", lambda conn: children.begin(conn, *step, new))
    if child.status == "succeeded":
        value = _value_of(conn, child)
        return Part("complete", "inner.complete", lambda conn: steps.complete(conn, *step, value), tag=child.id)
    if child.status in ENDED:
        error = child.error if child.status == "failed" and child.error else ERROR
        return Part("fail", f"inner.{child.status}", lambda conn: steps.fail(conn, *step, error), tag=child.id)
    return Part("hand_back", "inner.await", lambda conn: children.await_end(conn, *step))


def _value_of(conn: Connection, child: Child) -> str:
    sql = """SELECT coalesce(s.result, 'null') FROM byrd.runs r JOIN byrd.steps s ON s.run_id = r.id AND s.no = r.output
              WHERE r.id = %(id)s"""
    return str(query(conn, sql, {"id": child.id}).scalar_one())


def undo_part(_conn: Connection, claim: Claim, known: Known) -> Part:
    """Have a run rolled back, and wait for that."""
    step = claim.id, claim.attempt
    if known.what != "undo":
        return Part("roll_back", "undo", lambda conn: children.undo(conn, *step, reason="so"))
    child: Child | None = known.result[0]
    if child is None or child.status in ENDED:
        return Part("complete", "undo.complete", lambda conn: steps.complete(conn, *step, "null"))
    if child.status == "rollback_stuck":
        return Part("fail", "undo.fail", lambda conn: steps.fail(conn, *step, ERROR))
    return Part("hand_back", "undo.await", lambda conn: children.await_end(conn, *step))


# -- bulk jobs ---------------------------------------------------------------------------------------

#: What a job does to runs, by the name of the transition; on which; and how their histories tell it.
ACTIONS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "cancel": ("cancel", ("paused", "running"), ("cancel_requested",)),
    "compensate": ("cancel", ("paused", "running"), ("cancel_requested",)),
    "terminate": ("cancel", ("cancelling", "paused", "running"), ("terminate_requested",)),
    "pause": ("pause", ("running",), ("paused",)),
    "resume": ("resume", ("paused",), ("resumed",)),
    "retry": ("retry_run", ("failed",), ("retried", "rollback_retried")),
    "retry_all": ("retry_run", ("cancelled", "failed", "rollback_stuck"), ("retried", "rollback_retried")),
}


def job(action: str, limit: int) -> Any:
    """Return the canvas of a job that acts on so many runs at a time."""
    return task_of(BULK, action=action, limit=limit)


def _pause(conn: Connection, run_id: str, *, by: str) -> list[Wakeup]:
    runs.pause(conn, run_id, by=by)
    return []


def _act(action: str, by: str) -> Act:
    return {
        "cancel": functools.partial(runs.cancel, by=by),
        "compensate": functools.partial(runs.cancel, compensate=True, by=by),
        "terminate": functools.partial(termination.cancel, grace=0.0, by=by),
        "pause": functools.partial(_pause, by=by),
        "resume": functools.partial(runs.resume, by=by),
    }.get(action, functools.partial(runs.retry, by=by))


def bulk_part(conn: Connection, claim: Claim, known: Known) -> Part:
    """Act on the next runs that match; end with the counts."""
    said, step = json.loads(claim.kwargs), (claim.id, claim.attempt)
    so_far: bulk.Progress | None = known.result[0] if known.what == "bulk" else None
    if so_far is not None and so_far.complete:
        counts = json.dumps({"done": so_far.done, "skipped": so_far.refused})
        return Part("complete", "bulk.complete", lambda conn: steps.complete(conn, *step, counts))
    name, statuses, events = ACTIONS[said["action"]]
    by = f"bulk {claim.run_id}"
    found, act = Filter(statuses, bulk.submitted_at(conn, claim.run_id)), _act(said["action"], by)

    def check(result: tuple[bulk.Progress, list[Wakeup]]) -> None:
        row = query(
            conn,
            """SELECT count(*) AS all, count(DISTINCT run_id) AS runs FROM byrd.events
                WHERE event = ANY(%(events)s) AND detail::json ->> 'by' = %(by)s""",
            {"events": list(events), "by": by},
        ).one()
        assert (row.all, row.runs) == (result[0].done,) * 2, f"{result[0]}, but {row} are on record"

    return Part(name, "bulk", lambda conn: bulk.next_batch(conn, *step, found, act, limit=said["limit"]), check)


# -- a checkpoint task that sleeps and waits ---------------------------------------------------------


def napper_part(conn: Connection, claim: Claim, known: Known) -> Part:
    """Sleep, and wait for signals, as it is told; return what came."""
    step, told = (claim.id, claim.attempt), json.loads(claim.args)[0]
    for kind, key, *said in told:
        if progress.remembered(conn, claim.id, key) is not None:
            continue
        if kind == "wait":
            return _wait_part(claim, known, key, *said)
        return _nap_part(claim, key, *said)
    values = [progress.remembered(conn, claim.id, key) for kind, key, *_ in told if kind == "wait"]
    return Part("complete", "nap.complete", lambda conn: steps.complete(conn, *step, f"[{','.join(map(str, values))}]"))


def _nap_part(claim: Claim, key: str, seconds: float) -> Part:
    sleep = functools.partial(waits.nap, key=key, seconds=seconds, until=None)
    tag = "long" if seconds >= LONG else ""
    return Part("hand_back", "nap", lambda conn: sleep(conn, claim.id, claim.attempt), tag=tag)


def _wait_part(claim: Claim, known: Known, key: str, signal: str, timeout: float | None, default: Any) -> Part:
    step = claim.id, claim.attempt
    if known.what == "settle" and known.tag == key:
        return Part("fail", "wait.fail", lambda conn: steps.fail(conn, *step, ERROR))
    if known.what != "take" or known.tag != key:
        return Part("take", "take", lambda conn: waits.take(conn, *step, signal, key, timeout=timeout), tag=key)
    if known.result.late:
        value = None if default is None else json.dumps(default)
        return Part("settle", "settle", lambda conn: waits.settle(conn, *step, key, value), tag=key)
    return Part(
        "hand_back", "give_way", lambda conn: waits.give_way(conn, *step, signal, key, timeout=timeout),
        tag=signal if timeout is None or timeout >= LONG else "",
    )  # fmt: skip


def new_run(run_id: str, canvas: Any, workflow: str, *, key: str | None = None, of: str | None = None) -> plans.NewRun:
    """Return a run that is to be written; ``of``: the step that it is the work of."""
    plan = plan_of(canvas, shared=True)
    return plans.NewRun(run_id, plan, workflow, workflow, key or of, parent_step=of)


PARTS = {EACH: each_part, UNDO_SUBWORKFLOW: undo_part, BULK: bulk_part, NAPPER: napper_part}
#: The tasks of which it takes more than one transaction to run them.
TASKS = frozenset({*PARTS, SUBWORKFLOW})


def new_id(number: int) -> str:
    """Return the id of a run, the same in each execution of an example; ids are in no order, as those of uuid4."""
    return str(uuid.UUID(int=number * 7919 % 10007))
