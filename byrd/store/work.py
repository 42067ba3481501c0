"""The transitions of a slice, many in one statement: the function ``byrd.work``.

What it does not know (a failed member, an empty group, a run that is being stopped) it refuses before it has changed
anything, and the transitions are made one by one, by :mod:`byrd.store.steps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Connection

from byrd.errors import StaleAttempt
from byrd.store.migrations.work import UNUSUAL
from byrd.store.rows import Claim, Wakeup, array_of, rows_of


class Done(NamedTuple):
    """A step that has succeeded, and is not recorded yet; ``result`` is JSON."""

    claim: Claim
    result: str


class Own(NamedTuple):
    """The step that a message names, or that was offered, and the attempt before the one to be made."""

    step_id: str
    attempt: int
    task: str


@dataclass(slots=True)
class Work:
    """What came of it.  ``refused``: why these steps, by their ids, were not recorded.

    ``own_is_ready``: the step of the message could not be claimed here, but still may be in the ordinary way.
    """

    claims: list[Claim] = field(default_factory=list)
    wakeups: list[Wakeup] = field(default_factory=list)
    refused: dict[str, BaseException] = field(default_factory=dict)
    own_is_ready: bool = False


_WORK = """SELECT * FROM byrd.work(%(worker)s::uuid, %(pid)s::int, %(token)s::uuid, %(ids)s::text[],
    %(attempts)s::int[], %(results)s::text[], %(runs)s::uuid[], %(own)s::text, %(own_attempt)s::int, %(own_task)s::text,
    %(most)s::int, %(others)s::bool, %(peek)s::bool)"""


def work(
    conn: Connection,
    *,
    worker_id: str,
    pid: int,
    token: str,
    done: Sequence[Done] = (),
    own: Own | None = None,
    most: int = 0,
    others: bool = False,
    peek: bool = False,
) -> Work:
    """running → succeeded for what is ``done``; claim at most ``most`` steps: what follows, ``own``, and ``others``.

    Members of two groups of one run are refused as unusual.  ``peek``: if this call may leave ready steps, return one
    of each queue of this worker, for others to be woken; not of queues where one that became ready here wakes them.
    Right when it is run twice with the same ``token``: what was recorded stays so, and what was claimed is found.
    """
    rows = rows_of(
        conn,
        _WORK,
        {
            "worker": worker_id,
            "pid": pid,
            "token": token,
            "ids": array_of([d.claim.id for d in done]),
            "attempts": array_of([d.claim.attempt for d in done]),
            "results": array_of([d.result for d in done]),
            "runs": array_of(sorted({d.claim.run_id for d in done})),  # in which order they are locked
            "own": own.step_id if own else None,
            "own_attempt": own.attempt if own else None,
            "own_task": own.task if own else None,
            "most": most,
            "others": others,
            "peek": peek,
        },
    )
    found = Work()
    attempts = {d.claim.id: d.claim.attempt for d in done}
    for row in rows:
        what, *columns = row
        if what == "claim":
            found.claims.append(_claim(columns))
        elif what == "ready":
            found.wakeups.append(_wakeup(columns))
        elif what == "stale":
            found.refused[columns[0]] = _stale(columns, attempts)
        else:
            found.own_is_ready = True
    return found


def is_unusual(exc: BaseException) -> bool:
    """Tell whether the statement has refused what it does not know, and changed nothing."""
    return getattr(getattr(exc, "orig", None), "pgcode", None) == UNUSUAL


def _claim(columns: Sequence[Any]) -> Claim:
    (
        step_id, run_id, no, kind, task, queue, attempt, retries, preemptions, args, kwargs, options, group_id,
        join_no, join_pos, parent_id, input_no, value,
    ) = columns  # fmt: skip
    return Claim(
        step_id, str(run_id), no, kind, task, attempt, retries, preemptions, args, kwargs, options, group_id, join_no,
        join_pos, parent_id, None, False, input_no, value, None, None, queue,
    )  # fmt: skip


def _wakeup(columns: Sequence[Any]) -> Wakeup:
    (
        step_id, run_id, no, kind, task, queue, attempt, retries, due, solo, _kwargs, options, group_id, _join_no,
        join_pos, parent_id, *_,
    ) = columns  # fmt: skip
    return Wakeup(
        step_id, str(run_id), no, kind, task, queue, attempt, retries, options, group_id, join_pos, parent_id,
        bool(due), solo is not None, solo == "limited",
    )  # fmt: skip


def _stale(columns: Sequence[Any], attempts: Mapping[str, int]) -> StaleAttempt:
    step_id, status, now = columns[0], columns[3], columns[6]
    if status is None:
        return StaleAttempt(f"step {step_id} does not exist any more")
    return StaleAttempt(f"step {step_id}: attempt {attempts[step_id]} may not write; it is {status}, attempt {now}")
