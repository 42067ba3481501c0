"""Commands for many runs at once: a job of its own, that goes through the runs which match a filter."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict

from celery import Celery
from sqlalchemy import Connection

from byrd.engine.run import checked_grace
from byrd.errors import ArgumentError
from byrd.model import RUN_TRANSITIONS, RunStatus, sources
from byrd.store import Wakeup, bulk, progress, runs, termination
from byrd.store.bulk import BULK, Act, Filter
from byrd.task import CheckpointTask

if TYPE_CHECKING:
    from byrd.engine.engine import Byrd

#: What may be asked for, and the transitions behind it.
ACTIONS = {
    "cancel": ("cancel",),
    "pause": ("pause",),
    "resume": ("resume",),
    "retry": ("retry_run", "retry_rollback"),
}
#: What is cancelled or rolled back was left so on purpose: only who names that status retries it.
_USUAL = {"retry": ("failed",)}
#: A batch has its runs to itself, so it is to be over soon: about so long, and never with more runs than this.
_BATCH_SECONDS = 0.15
_MOST_AT_ONCE = 50
_LONGEST_SECONDS = 1e9
_NUL = "\0"


class Wanted(TypedDict, total=False):
    """What :meth:`Byrd.bulk` is asked for: see there."""

    workflow: str | None
    status: str | Iterable[str] | None
    older_than: float | timedelta | None
    newer_than: float | timedelta | None
    error: str | None
    everything: bool
    compensate: bool
    terminate: bool
    grace: float | None
    by: str | None


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done to which runs, checked; all of it JSON values."""

    action: str
    status: list[str]
    workflow: str | None = None
    older_than: float | None = None
    newer_than: float | None = None
    error: str | None = None
    compensate: bool = False
    terminate: bool = False
    grace: float | None = None
    by: str | None = None

    def filter_at(self, now: datetime) -> Filter:
        """Return the filter of an order that is given at this time."""
        return Filter(
            statuses=tuple(self.status),
            before=now - timedelta(seconds=self.older_than or 0.0),
            after=now - timedelta(seconds=self.newer_than) if self.newer_than is not None else None,
            workflow=self.workflow,
            error=self.error,
        )

    def act(self, by: str) -> Act:
        """Return what is done to each run."""
        if self.action == "cancel" and self.terminate:
            return functools.partial(
                termination.cancel, grace=checked_grace(self.grace), compensate=self.compensate, by=by
            )
        if self.action == "cancel":
            return functools.partial(runs.cancel, compensate=self.compensate, by=by)
        if self.action == "pause":
            return functools.partial(_pause, by=by)
        return functools.partial(runs.resume if self.action == "resume" else runs.retry, by=by)


def _pause(conn: Connection, run_id: str, *, by: str) -> list[Wakeup]:
    runs.pause(conn, run_id, by=by)
    return []


def order(
    action: str,
    *,
    workflow: str | None = None,
    status: str | Iterable[str] | None = None,
    older_than: float | timedelta | None = None,
    newer_than: float | timedelta | None = None,
    error: str | None = None,
    everything: bool = False,
    compensate: bool = False,
    terminate: bool = False,
    grace: float | None = None,
    by: str | None = None,
) -> Order:
    """Check what :meth:`Byrd.bulk` is asked for; raise :class:`ArgumentError` for what cannot be."""
    if action not in ACTIONS:
        raise ArgumentError(f"{action!r} is nothing that can be done in bulk; there are {', '.join(ACTIONS)}")
    wanted = [status] if isinstance(status, str) else list(status) if status is not None else None
    given = (workflow, wanted, older_than, newer_than, error)
    if all(one is None for one in given) and not everything:
        raise ArgumentError(
            f"bulk {action} without a filter would {action} everything; give a workflow, a status, an age or an error, "
            "or say that everything is meant (everything=True, --all)"
        )
    for name, text in (("workflow", workflow), ("error", error)):
        if text is not None and (not text or _NUL in text):
            raise ArgumentError(f"{name}={text!r} must be a text that is not empty and has no NUL character")
    if workflow == BULK:
        raise ArgumentError(f"bulk jobs are left alone by each other; {action} them by their ids")
    if action != "cancel" and (compensate or terminate or grace is not None):
        raise ArgumentError(f"compensate, terminate and grace are of cancel, not of {action}")
    if grace is not None and not terminate:
        raise ArgumentError("grace is the time until a cancel with terminate=True ends what runs; give both")
    checked_grace(grace)
    return Order(
        action=action,
        status=_statuses(action, wanted, terminate=terminate),
        workflow=workflow,
        older_than=_age("older_than", older_than),
        newer_than=_age("newer_than", newer_than),
        error=error,
        compensate=compensate,
        terminate=terminate,
        grace=grace,
        by=by,
    )


def _statuses(action: str, wanted: list[str] | None, *, terminate: bool) -> list[str]:
    """Return the statuses of the runs that are acted on."""
    allowed = {str(status) for name in ACTIONS[action] for status in sources(RUN_TRANSITIONS, name)}
    if terminate:
        allowed.add(str(RunStatus.CANCELLING))
    if wanted is None:
        return sorted(_USUAL.get(action, allowed))
    if wrong := [one for one in wanted if one not in allowed]:
        raise ArgumentError(f"{action} acts on runs that are {' or '.join(sorted(allowed))}, not on {wrong[0]!r}")
    if not wanted:
        raise ArgumentError("status=[] matches no run")
    return sorted(set(wanted))


def _age(name: str, age: float | timedelta | None) -> float | None:
    if age is None:
        return None
    seconds = age.total_seconds() if isinstance(age, timedelta) else age
    if not 0 <= seconds <= _LONGEST_SECONDS:  # nor is it NaN
        raise ArgumentError(f"{name}={age!r} is no number of seconds")
    return float(seconds)


def matches(engine: Byrd, wanted: Order) -> int:
    """Return how many runs an order would be about if it was given now."""
    return engine.runtime.store.run(_count_now, wanted)


def _count_now(conn: Connection, wanted: Order) -> int:
    return bulk.count(conn, wanted.filter_at(bulk.now(conn)))


def add_task(app: Celery) -> None:
    """Register the task of the jobs."""

    @app.task(name=BULK, shared=False, bind=True, base=CheckpointTask)
    def bulk_job(self: CheckpointTask, **given: Any) -> dict[str, Any]:
        """Go through the runs that match, and act on each; return the counts."""
        return _work(self, Order(**given))


def signature(app: Celery, action: str, **given: Any) -> Any:
    """Return the canvas of a job: what the workflow ``byrd.bulk`` is."""
    return app.tasks[BULK].s(**asdict(order(action, **given)))


def _work(task: CheckpointTask, wanted: Order) -> dict[str, Any]:
    attempt = task._attempt()
    store, step = attempt.runtime.patient_store, (attempt.step_id, attempt.number)
    found = wanted.filter_at(store.run(bulk.submitted_at, attempt.run_id))
    act = wanted.act(f"{wanted.by or 'somebody'} (bulk {attempt.run_id[:8]})")
    size = 10
    while True:
        began = time.monotonic()
        so_far, wakeups = store.run(bulk.next_batch, *step, found, act, limit=size)
        attempt.runtime.publisher.publish(wakeups)
        if so_far.complete:
            break
        took = max(time.monotonic() - began, 0.001)
        size = max(1, min(_MOST_AT_ONCE, 2 * size, int(size * _BATCH_SECONDS / took)))
        reason = store.run(progress.stop_reason, *step)
        if reason is not None:
            raise reason
    matched = max(so_far.matched, so_far.done + so_far.refused)
    return {"action": wanted.action, "matched": matched, "done": so_far.done, "skipped": matched - so_far.done}
