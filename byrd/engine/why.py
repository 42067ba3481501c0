"""Says in plain sentences what a run waits for, or how it ended: what ``byrd why`` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from byrd.engine.words import ago, count, error_text, moment, since, span
from byrd.model import RunStatus, StepKind
from byrd.store import Store, insight
from byrd.store.insight import OpenStep, Standing

if TYPE_CHECKING:
    from byrd.engine.engine import Byrd

#: Steps that wait for the same thing are told one by one up to this number, and together above it.
_ONE_BY_ONE = 3
#: A message that was published is usually taken at once; after this time it is worth a word.
_TAKEN_SECONDS = 1.0


def explain(engine: Byrd, run_id: str) -> list[str]:
    """Return one sentence for each thing that the run waits for, or what is to say of its end.

    Raises :class:`RunNotFoundError` when there is no such run.
    """
    store = engine.runtime.store
    standing = store.run(insight.standing, run_id)
    if standing.run.finished_at is not None:
        return _ended(store, standing)
    status = RunStatus(standing.run.status)
    if status is RunStatus.ROLLBACK_STUCK:
        return [_stuck(store, standing)]
    said = _of_run(store, standing, status)
    sentences = [said] if said else []
    if status is RunStatus.PAUSED:
        sentences += _told([_held(step, standing, paused=True) for step in standing.open_steps if _runs(step)])
        return sentences
    reasons = [_reason(store, step, standing) for step in standing.open_steps]
    sentences += _told(reasons, more=standing.open_count - len(standing.open_steps))
    if not reasons:
        sentences.append(
            f"None of its steps is ready or running, which should never be: please report it, with the output of "
            f"`byrd show {_short(standing)} --json`."
        )
    return sentences


# -- the run ---------------------------------------------------------------------------------------


def _ended(store: Store, standing: Standing) -> list[str]:
    run, now = standing.run, standing.now
    when = moment(run.finished_at, now)
    took = span(((run.finished_at or now) - run.created_at).total_seconds())
    if run.status == RunStatus.SUCCEEDED:
        return [f"It succeeded at {when}, {took} after it was submitted."]
    undone, _ = store.run(insight.compensations, run.id)
    if run.status == RunStatus.CANCELLED:
        first = f"It was cancelled at {when}."
    elif run.outcome == "failed" and run.deadline is not None and "cancel_requested" in standing.events:
        first = f"It failed at {when}: its deadline, {moment(run.deadline, now)}, had passed, so it was stopped."
    else:
        first = f"It failed at {when}: {_failure(store, standing)}."
    if undone:
        return [first, f"{count(undone, 'completed step was', 'completed steps were')} undone; submit it anew."]
    return [first, f"`byrd retry {_short(standing)}` keeps what succeeded and tries the rest again."]


def _failure(store: Store, standing: Standing) -> str:
    failed = store.run(insight.failure_of, standing.run.id)
    if failed is None:
        return error_text(standing.run.error)
    tries = f" in attempt {failed.attempt}" if failed.attempt > 1 else ""
    return f"step {failed.no} ({failed.task}) ended with {error_text(failed.error)}{tries}"


def _stuck(store: Store, standing: Standing) -> str:
    failed = store.run(insight.failure_of, standing.run.id, compensation=True)
    done, total = store.run(insight.compensations, standing.run.id)
    if failed is None:  # retried by an operator between the two questions
        return f"Its rollback was stuck, and goes on now: {done} of {count(total, 'compensation')} done."
    return (
        f"Its rollback is stuck since {moment(failed.finished_at, standing.now)} at step {failed.no} ({failed.task}), "
        f"which undoes step {failed.compensates}: {error_text(failed.error)}, in attempt {failed.attempt}; "
        f"{done} of {count(total, 'compensation')} done. Remove the cause, then `byrd retry {_short(standing)}`."
    )


def _of_run(store: Store, standing: Standing, status: RunStatus) -> str | None:
    """Say what the status itself explains: a run that is simply running needs no word."""

    def when(event: str) -> str:
        return since(standing.events[event], standing.now) if event in standing.events else "some time"

    if status is RunStatus.PAUSED:
        return f"It is paused since {when('paused')}: nothing more starts until `byrd resume {_short(standing)}`."
    if status is RunStatus.CANCELLING:
        return (
            f"It is being cancelled since {when('cancel_requested')}, and waits for what still runs to reach its next "
            "checkpoint, or its end."
        )
    if status is RunStatus.COMPENSATING:
        done, total = store.run(insight.compensations, standing.run.id)
        return (
            f"It is being rolled back since {when('rollback_started')}: {done} of {count(total, 'compensation')} done."
        )
    return None


# -- its steps -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reason:
    """Why a step waits.  ``text(many)`` is what follows "Step 3 (shop.price)", or "40 steps of shop.price"."""

    step: OpenStep
    key: tuple[object, ...]
    text: Callable[[bool], str]


def _told(reasons: list[_Reason], *, more: int = 0) -> list[str]:
    """Turn reasons into sentences; steps that wait for the same thing share one."""
    alike: dict[tuple[object, ...], list[_Reason]] = {}
    for reason in reasons:
        alike.setdefault((reason.step.task, *reason.key), []).append(reason)
    sentences = []
    for found in alike.values():
        if len(found) > _ONE_BY_ONE:
            step = found[0].step
            subject = f"{count(len(found), 'step')} of {step.task} (no. {step.no} to {found[-1].step.no})"
            sentences.append(f"{subject} {found[0].text(True)}.")
        else:
            sentences += [f"{_subject(reason.step)} {reason.text(False)}." for reason in found]
    if more > 0:
        sentences.append(f"{count(more, 'more step is', 'more steps are')} ready or running.")
    return sentences


def _subject(step: OpenStep) -> str:
    what = f", which undoes step {step.compensates}" if step.kind == StepKind.COMPENSATION else ""
    return f"Step {step.no} ({step.task}{what})" + ("," if what else "")


def _reason(store: Store, step: OpenStep, standing: Standing) -> _Reason:
    if _runs(step):
        return _held(step, standing)
    if not step.due:
        return _delayed(step, standing)
    return _due(store, step, standing)


def _runs(step: OpenStep) -> bool:
    return step.status == "running"


def _held(step: OpenStep, standing: Standing, *, paused: bool = False) -> _Reason:
    now = standing.now
    if step.worker is None or step.lease_until is None or step.lease_until <= now:
        return _lost(step, standing)
    progress = ""
    if step.checkpoint_at is not None:
        failed = f" and {step.failed:,} failed" if step.failed else ""
        progress = f"; its last checkpoint, {ago(step.checkpoint_at, now)}, has {step.completed:,} done{failed}"
    if step.stopping:
        progress += "; the worker is shutting down, and gives it back at its next checkpoint unless it ends before"
    elif paused:
        progress += "; it stops at its next checkpoint, or goes on to its end"
    started = since(step.started_at, now) if step.started_at else "a moment ago"
    attempt = f", attempt {step.attempt}" if step.attempt > 1 else ""
    until = moment(step.lease_until, now)

    def text(many: bool) -> str:  # noqa: FBT001 - the shape of _Reason.text
        if many:
            return f"are held by worker {step.worker}, the first since {started}, lease until {until}"
        return (
            f"is held by worker {step.worker} (process {step.pid}) since {started}{attempt}, lease until "
            f"{until}{progress}"
        )

    return _Reason(step, ("held", step.worker, step.stopping), text)


def _lost(step: OpenStep, standing: Standing) -> _Reason:
    ended = f" at {moment(step.lease_until, standing.now)}" if step.lease_until else ""
    helped = any(worker.alive for worker in standing.workers)
    then = "recovery is about to make ready" if helped else "starting a worker, or `byrd relay`, will make ready"
    name = step.worker or "that is not registered any more"
    return _Reason(
        step,
        ("lost", step.worker),
        lambda many: (
            f"{'were' if many else 'was'} held by worker {name}, whose lease ended{ended}: {then} "
            f"{'them' if many else 'it'} again"
        ),
    )


def _delayed(step: OpenStep, standing: Standing) -> _Reason:
    when = f"{moment(step.run_at, standing.now)}"
    if step.run_at is not None and step.run_at.year < 9999:
        when += f" ({ago(step.run_at, standing.now)})"
    if step.retries and step.last_outcome == "retried":
        why = error_text(step.last_error) if step.last_error else "it asked for a retry"
        return _Reason(
            step,
            ("retry", why),
            lambda many: (
                f"{'are tried again, the first' if many else f'is tried again (retry {step.retries})'} at {when}, "
                f"after {why}"
            ),
        )
    return _Reason(
        step, ("delayed",), lambda many: f"{'are delayed, the first' if many else 'is delayed'} until {when}"
    )


def _due(store: Store, step: OpenStep, standing: Standing) -> _Reason:
    """A step whose time has come: is there a worker for it, a free slot, a message?"""
    live = [worker for worker in standing.workers if worker.alive and not worker.stopping]
    there = [worker for worker in live if step.queue in worker.queues]
    able = [worker for worker in there if step.task.startswith("celery.") or step.task in worker.tasks]
    queue = f"queue {step.queue!r}"
    if not live:
        alone = "but no worker is alive: start one with `celery -A <app> worker`"
        return _ready(step, standing, ("no worker",), lambda: alone)
    if not there:
        consumed = ", ".join(sorted({name for worker in live for name in worker.queues}))
        unheard = (
            f"in {queue}, which no live worker consumes (they consume {consumed}): start one with "
            f"`celery -A <app> worker -Q {step.queue}`"
        )
        return _ready(step, standing, ("no consumer", step.queue), lambda: unheard)
    if not able:
        unknown = (
            f"but no live worker on {queue} has the task {step.task} registered: deploy the code that defines it, "
            "or import its module in the app"
        )
        return _ready(step, standing, ("unknown task", step.queue), lambda: unknown)
    slots = sum(worker.concurrency for worker in able)
    if slots and sum(worker.running for worker in able) >= slots:

        def slot() -> str:
            before = _before(store, step)
            return f"for a free slot in {queue}{', behind ' + before if before else ''}: {_all_busy(slots)}"

        return _ready(step, standing, ("slot", step.queue), slot, verb="wait")
    key = ("message", step.queue, step.sends > 1)
    return _ready(step, standing, key, lambda: _message(step, standing.now, _before(store, step)))


def _before(store: Store, step: OpenStep) -> str:
    """Count the steps before it in its queue: a query, so it is asked for those steps only that are told of."""
    found = store.run(insight.steps_before, step.queue, step.ready_at) if step.ready_at else 0
    return count(found, "step") if found else ""


def _all_busy(slots: int) -> str:
    return f"all {slots:,} are busy" if slots > 1 else "the only one is busy"


def _message(step: OpenStep, now: datetime, before: str) -> str:
    behind = f"; {before} became ready before it" if before else ""
    if step.sends == 0 or step.wake_at is None:
        return f"and about to be published to queue {step.queue!r}{behind}"
    at = f"at {moment(step.wake_at, now)}" if step.wake_at > now else "now"
    if step.sends == 1:
        waited = (now - step.ready_at).total_seconds() if step.ready_at else 0.0
        taken = "not taken yet" if waited >= _TAKEN_SECONDS else "about to be taken"
        return f"and its message is in queue {step.queue!r}, {taken}; should it be lost, it is sent again {at}{behind}"
    return (
        f"and its message was sent {step.sends:,} times to queue {step.queue!r} without being taken: it was lost, or "
        f"waits behind other messages; it is sent again {at}{behind}"
    )


def _ready(
    step: OpenStep, standing: Standing, key: tuple[object, ...], why: Callable[[], str], *, verb: str = "be"
) -> _Reason:
    now = standing.now
    ready = f" since {since(step.ready_at, now)}" if step.ready_at else ""
    after = ""
    if step.last_outcome == "preempted" and step.last_ended_at is not None:
        lost = error_text(step.last_error).partition(": ")[2] or f"worker {step.last_worker} is gone"
        after = f"; it lost its worker at {moment(step.last_ended_at, now)} ({lost})"
    elif step.last_outcome == "retried" and step.last_error:
        after = f"; its attempt {step.attempt} ended with {error_text(step.last_error)}"
    if step.expires_at is not None:
        after += f"; it expires at {moment(step.expires_at, now)}"

    def text(many: bool) -> str:  # noqa: FBT001 - the shape of _Reason.text
        if verb == "wait":
            start = f"{'wait' if many else 'waits'}{ready} {why()}"
        else:
            start = f"{'are' if many else 'is'} ready{ready} {why()}"
        return start if many else start + after

    return _Reason(step, key, text)


def _short(standing: Standing) -> str:
    return standing.run.id[:8]
