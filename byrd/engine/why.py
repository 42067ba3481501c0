"""Says in plain sentences what a run waits for, or how it ended: what ``byrd why`` prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from byrd.engine.why_message import Messages
from byrd.engine.words import ago, count, error_text, moment, shortened, since, span
from byrd.items import EACH
from byrd.model import RunStatus, StepKind, StepStatus
from byrd.policies import retry_of, timeouts_of
from byrd.store import Store, children, insight, items, limits, termination
from byrd.store.insight import OpenStep, Standing
from byrd.store.limits import Place, Turn
from byrd.waits import SUBWORKFLOW, UNDO_SUBWORKFLOW, of_whom
from byrd.worker.bootstep import settings_of

if TYPE_CHECKING:
    from byrd.engine.engine import Byrd

#: Steps that wait for the same thing are told one by one up to this number, and together above it.
_ONE_BY_ONE = 3
#: A step that lost its worker this often may be what kills it.
_SUSPECT = 2


@dataclass(frozen=True, slots=True)
class _Case:
    """The run in question, and whom to ask about it."""

    engine: Byrd
    standing: Standing
    messages: Messages

    @property
    def store(self) -> Store:
        return self.engine.runtime.store

    @property
    def paused(self) -> bool:
        return self.standing.run.status == RunStatus.PAUSED

    @property
    def short(self) -> str:
        return self.standing.run.id[:8]


def explain(engine: Byrd, run_id: str, *, ask_broker: bool = True) -> list[str]:
    """Return one sentence for each thing that the run waits for, or what is to say of its end.

    ``ask_broker``: say what is in its queues, which may take seconds when it hangs.
    Raises :class:`RunNotFoundError` when there is no such run.
    """
    standing = engine.runtime.store.run(insight.standing, run_id)
    case = _Case(engine, standing, Messages(engine, standing, ask_broker=ask_broker))
    if standing.run.finished_at is not None:
        return _ended(case)
    status = RunStatus(standing.run.status)
    if status is RunStatus.ROLLBACK_STUCK:
        return [_stuck(case)]
    sentences = [said for said in (_overdue(case, status), _of_run(case, status)) if said]
    if status is RunStatus.PAUSED:
        sentences += _told([_held(case, step, paused=True) for step in standing.open_steps if _runs(step)])
        waiting = [step for step in standing.open_steps if step.status == StepStatus.WAITING]
        sentences += _told([
            _undoing(case, step) if step.kind == StepKind.SAGA else _waits(case, step) for step in waiting
        ])  # fmt: skip
        return sentences
    reasons = [_reason(case, step) for step in standing.open_steps]
    sentences += _told(reasons, more=standing.open_count - len(standing.open_steps))
    if not reasons:
        sentences.append(
            "None of its steps is ready, running or waiting, which should never be: please report it, with the output "
            f"of `byrd show {case.short} --json`; `byrd pause` and then `byrd resume` let it go on."
        )
    return sentences


# -- the run ---------------------------------------------------------------------------------------


def _ended(case: _Case) -> list[str]:
    run, now, events = case.standing.run, case.standing.now, case.standing.events
    when = moment(run.finished_at, now)
    took = span(((run.finished_at or now) - run.created_at).total_seconds())
    if run.status == RunStatus.SUCCEEDED:
        return [f"It succeeded at {when}, {took} after it was submitted."]
    undone, _ = case.store.run(insight.compensations, run.id)
    if run.status == RunStatus.CANCELLED:
        asked = events.get("cancel_requested")
        first = f"It was cancelled at {when}{f' by {asked.by}' if asked and asked.by else ''}{_terminated(case)}."
    elif run.outcome == "failed" and run.deadline is not None and "cancel_requested" in events:
        first = f"It failed at {when}: its deadline, {moment(run.deadline, now)}, had passed, so it was stopped."
    else:
        first = f"It failed at {when}: {_failure(case)}."
    if undone:
        return [first, f"{count(undone, 'completed step was', 'completed steps were')} undone; submit it anew."]
    again = f"`byrd retry {case.short}` keeps what succeeded and tries the rest again."
    if run.pivot is not None:
        return [first, f"Nothing was undone, for its pivot, step {run.pivot}, had succeeded.", again]
    return [first, again]


def _until_terminated(case: _Case) -> str:
    """Say when what still runs is ended, and by whom that is wanted."""
    until, now, events = case.standing.run.terminate_at, case.standing.now, case.standing.events
    if until is None:
        return f"; `byrd cancel {case.short} --terminate` ends it"
    asked = events.get("terminate_requested")
    by = f", as {asked.by} wants it" if asked and asked.by else ""
    if until > now:
        return f"; what has not stopped by {moment(until, now)} ({ago(until, now)}) is ended then{by}"
    return f"; since {moment(until, now)} its worker is to end it{by}"


def _terminated(case: _Case) -> str:
    """Say what did not stop by itself."""
    if "terminated" not in case.standing.events:
        return ""
    ended, shut_out = case.store.run(termination.ended_of, case.standing.run.id)
    said = (
        [f"{count(ended, 'step')} that did not stop in time {'was' if ended == 1 else 'were'} ended"] if ended else []
    )
    if shut_out:
        said.append(
            f"{count(shut_out, 'step')} could not be ended, for {'its' if shut_out == 1 else 'their'} pool has no "
            f"process to end: {'it' if shut_out == 1 else 'they'} may still be at work, but can record nothing"
        )
    return f"; {', and '.join(said)}" if said else ""


def _failure(case: _Case) -> str:
    run = case.standing.run
    failed = case.store.run(insight.failure_of, run.id)
    if failed is None:
        return error_text(run.error)
    tries = f" in attempt {failed.attempt}" if failed.attempt > 1 else ""
    return f"step {failed.no} ({failed.task}) ended with {error_text(failed.error)}{tries}"


def _stuck(case: _Case) -> str:
    run, now = case.standing.run, case.standing.now
    failed = case.store.run(insight.failure_of, run.id, compensation=True)
    done, total = case.store.run(insight.compensations, run.id)
    if failed is None:  # retried by an operator between the two questions
        return f"Its rollback was stuck, and goes on now: {done} of {count(total, 'compensation')} done."
    return (
        f"Its rollback is stuck since {moment(failed.finished_at, now)} at step {failed.no} ({failed.task}), "
        f"which undoes step {failed.compensates}: {error_text(failed.error)}, in attempt {failed.attempt}; "
        f"{done} of {count(total, 'compensation')} done. Remove the cause, then `byrd retry {case.short}`; or "
        f"`byrd skip {case.short} {failed.no} --reason ...`, or undo it yourself, and "
        f"`byrd done-by-hand {case.short} {failed.no} --note ...`."
    )


def _overdue(case: _Case, status: RunStatus) -> str | None:
    """Say so when the run's deadline has passed, and nobody has stopped it yet."""
    deadline, now = case.standing.run.deadline, case.standing.now
    if deadline is None or deadline > now or status not in (RunStatus.RUNNING, RunStatus.PAUSED):
        return None
    helped = any(worker.alive for worker in case.standing.workers)
    then = "recovery is about to stop it" if helped else "a worker, or `byrd relay`, stops it once one is started"
    return f"Its deadline passed at {since(deadline, now)}: {then}."


def _of_run(case: _Case, status: RunStatus) -> str | None:
    """Say what the status itself explains: a run that is simply running needs no word."""

    def when(event: str) -> str:
        found = case.standing.events.get(event)
        if found is None:
            return "some time"
        return since(found.at, case.standing.now) + (f", by {found.by}" if found.by else "")

    if status is RunStatus.PAUSED:
        return f"It is paused since {when('paused')}: nothing more starts until `byrd resume {case.short}`."
    if status is RunStatus.CANCELLING:
        late = " because its deadline had passed" if case.standing.run.outcome == "failed" else ""
        return (
            f"It is being cancelled since {when('cancel_requested')}{late}, and waits for what still runs to reach its "
            f"next checkpoint, or its end{_until_terminated(case)}."
        )
    if status is RunStatus.COMPENSATING:
        done, total = case.store.run(insight.compensations, case.standing.run.id)
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
        sentences.append(f"{count(more, 'more step is', 'more steps are')} ready, running or waiting.")
    return sentences


def _subject(step: OpenStep) -> str:
    what = f", which undoes step {step.compensates}" if step.kind == StepKind.COMPENSATION else ""
    return f"Step {step.no} ({step.task}{what})" + ("," if what else "")


def _reason(case: _Case, step: OpenStep) -> _Reason:
    if _runs(step):
        return _held(case, step)
    if step.kind == StepKind.SAGA:
        return _undoing(case, step)
    if step.status == StepStatus.WAITING or (step.signal is not None and not step.due):
        return _waits(case, step)
    if step.limit_no is not None and (step.limit_slot is None or not step.due):
        return _limited(case, step)
    if not step.due:
        special = {SUBWORKFLOW: _delegated, UNDO_SUBWORKFLOW: _delegated, EACH: _over_items}
        return special.get(step.task or "", _delayed)(case, step)
    return _due(case, step)


def _runs(step: OpenStep) -> bool:
    return step.status == "running"


def _held(case: _Case, step: OpenStep, *, paused: bool = False) -> _Reason:
    now = case.standing.now
    if step.worker is None or step.lease_until is None or step.lease_until <= now:
        return _lost(case, step)
    progress = ""
    if step.checkpoint_at is not None:
        failed = f" and {step.failed:,} failed" if step.failed else ""
        progress = f"; its last checkpoint, {ago(step.checkpoint_at, now)}, has {step.completed:,} done{failed}"
    if step.stopping:
        progress += "; the worker is shutting down, and gives it back at its next checkpoint unless it ends before"
    elif paused:
        progress += "; it stops at its next checkpoint, or goes on to its end"
    progress += _ends(case, step) + _suspect(case, step)
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


def _suspect(case: _Case, step: OpenStep) -> str:
    """Say of a step that lost its worker again and again when it is given up: it may be what kills the worker."""
    if step.preemptions < _SUSPECT:
        return ""
    left = settings_of(case.engine.app).max_preemptions + 1 - step.preemptions
    again = "once more" if left <= 1 else f"{left} times more"
    why = ""
    if step.last_outcome == "preempted" and step.last_ended_at is not None:
        why = f" (the last time at {moment(step.last_ended_at, case.standing.now)}: {_loss(step)})"
    return f"; it lost its worker {step.preemptions} times{why}, and fails with StepLostError if it does {again}"


def _loss(step: OpenStep) -> str:
    return error_text(step.last_error).partition(": ")[2] or f"worker {step.last_worker} is gone"


def _lost(case: _Case, step: OpenStep) -> _Reason:
    ended = f" at {moment(step.lease_until, case.standing.now)}" if step.lease_until else ""
    helped = any(worker.alive for worker in case.standing.workers)
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


def _delayed(case: _Case, step: OpenStep) -> _Reason:
    when = f"{moment(step.run_at, case.standing.now)}"
    if step.run_at is not None and step.run_at.year < 9999:
        when += f" ({ago(step.run_at, case.standing.now)})"
    if step.last_outcome in ("retried", "failed"):  # failed: where nothing is rolled back, that is not the end of it
        why = error_text(step.last_error) if step.last_error else "it asked for a retry"
        again = f"is tried again{_which_attempt(case, step)}"
        return _Reason(
            step,
            ("retry", why),
            lambda many: f"{'are tried again, the first' if many else again} at {when}, after {why}",
        )
    return _Reason(
        step, ("delayed",), lambda many: f"{'are delayed, the first' if many else 'is delayed'} until {when}"
    )


def _delegated(case: _Case, step: OpenStep) -> _Reason:
    """A step that waits for the run of a workflow."""
    child = case.store.run(children.of_number, case.standing.run.id, step.no)
    if child is None:
        return _delayed(case, step)
    short = child.id[:8]
    how = child.status.replace("_", " ")
    return _Reason(
        step,
        ("delegated", child.id),
        lambda _: f"waits for run {short} of workflow {child.workflow!r}, which is {how}: see `byrd why {short}`",
    )


def _over_items(case: _Case, step: OpenStep) -> _Reason:
    """An each whose items are under way; or that is to be tried again, for it has failed."""
    found = case.store.run(items.of_number, case.standing.run.id, step.no)
    if found is None or (step.run_at is not None and step.run_at.year < 9999):
        return _delayed(case, step)
    total = f"{found.inserted:,} items so far" if found.total is None and not found.done else f"{found.all:,} items"
    failed = f", {found.failed:,} failed" if found.failed else ""
    over = f": more than the {found.tolerated:,} that may, so no other starts" if found.over else ""
    return _Reason(
        step,
        ("items", step.no),
        lambda _: f"waits for its items: {found.completed:,} of {total} done, {found.active:,} under way{failed}{over}",
    )


def _which_attempt(case: _Case, step: OpenStep) -> str:
    """Say which retry this is: of how many, where a policy says so."""
    policy = retry_of(json.loads(step.options))
    if policy is None:
        return f" (retry {step.retries})" if step.retries else ""
    most = f" of {policy.max_attempts:,}" if policy.max_attempts is not None else ""
    end = ""
    if policy.budget is not None and step.tried_since is not None:
        end = f", until {moment(step.tried_since + timedelta(seconds=policy.budget), case.standing.now)} at the latest"
    return f" (attempt {step.retries + 1:,}{most}{end})"


def _ends(case: _Case, step: OpenStep) -> str:
    """Say until when a running attempt may go on, or be silent."""
    timeouts, now, said = timeouts_of(json.loads(step.options)), case.standing.now, ""
    if timeouts is not None and timeouts.start_to_close is not None and step.started_at is not None:
        until = step.started_at + timedelta(seconds=timeouts.start_to_close)
        said += f"; it may run until {moment(until, now)} ({ago(until, now)}, its start_to_close)"
    if timeouts is not None and timeouts.heartbeat is not None and step.alive_at is not None:
        until = step.alive_at + timedelta(seconds=timeouts.heartbeat)
        said += f"; it is taken for hung at {moment(until, now)} ({ago(until, now)}) without a sign of life before"
    return said


def _starts(case: _Case, step: OpenStep) -> str:
    """Say until when a ready step is to be started."""
    if step.start_by is None:
        return ""
    until = moment(step.start_by, case.standing.now)
    return f"; it fails with ScheduleToStartTimeoutError unless it is started by {until}"


def _limited(case: _Case, step: OpenStep) -> _Reason:
    """A step that waits for its turn under its task's limit."""
    now = case.standing.now
    name = f"the limit {step.limit_name!r}" + (f" of {step.limit_key!r}" if step.limit_key else "")

    def text(many: bool) -> str:  # noqa: FBT001 - the shape of _Reason.text
        start = f"{'wait' if many else 'waits'} for {name}"
        place = Place(step.limit_name or "", step.limit_key or "")
        turn = case.store.run(limits.turn_of, place, step.limit_no or 0)
        if turn is None:
            return f"{start}, which is not on record any more"
        until = step.run_at if step.limit_slot is not None else turn.until
        end = f"{', the first' if many else ''} until {moment(until, now)} ({ago(until, now)})" if until else ""
        if not until:
            running = "the one that runs ends" if turn.running == 1 else f"one of the {turn.running:,} that run ends"
            end = f" until {running if turn.running else 'somebody lets it start'}"
        if turn.parked_until is not None:
            end += f"; it is parked until {moment(turn.parked_until, now)}"
        before = f"; {count(turn.before, 'step waits', 'steps wait')} before {'them' if many else 'it'}"
        return f"{start} ({_limit_text(turn)}){end}{before if turn.before else ''}{'' if many else _starts(case, step)}"

    return _Reason(step, ("limit", step.limit_name, step.limit_key), text)


def _limit_text(turn: Turn) -> str:
    burst = f", burst {turn.burst:,}" if turn.burst > 1 else ""
    rate = [f"{turn.rate}{burst}"] if turn.rate else []
    most = [f"at most {turn.concurrency:,} at once, {turn.running:,} in use"] if turn.concurrency is not None else []
    return ", ".join(rate + most) or "as it is now, none"


def _undoing(case: _Case, step: OpenStep) -> _Reason:
    """A saga that has failed."""
    done, total = case.store.run(insight.compensations, case.standing.run.id, saga=step.no)
    began = since(step.ready_at, case.standing.now) if step.ready_at else "a moment ago"
    so_far = f"{done} of {count(total, 'compensation')} done" if total else "what runs in it is to end first"
    if case.paused:
        so_far += f"; it goes on once the run is resumed: `byrd resume {case.short}`"
    return _Reason(
        step, ("saga", step.no), lambda _: f"has failed, and undoes what it had done since {began}: {so_far}"
    )


def _waits(case: _Case, step: OpenStep) -> _Reason:
    """A sleep, or a wait for a signal."""
    now, until = case.standing.now, step.run_at if step.run_at is not None and step.run_at.year < 9999 else None
    time = f"{moment(until, now)} ({ago(until, now)})" if until is not None else ""
    late = ""
    if step.due and not case.paused:
        helped = any(worker.alive for worker in case.standing.workers)
        late = "; it is about to end" if helped else "; a worker, or `byrd relay`, ends it once one is started"
    elif step.due:
        late = ", and ends when the run is resumed"
    if step.signal is None:
        return _Reason(
            step,
            ("asleep", bool(late)),
            lambda many: f"{'sleep, the first' if many else 'sleeps'} until {time}{late}",
        )
    began = since(step.ready_at, now) if step.ready_at else "a moment ago"
    then = f"then it goes on with its default, {shortened(step.default, 60)}" if step.default else "then it fails"
    then = then if step.kind == StepKind.WAIT else "then it goes on without it"
    end = f", until {time}: {then}{late}" if until is not None else ", for as long as it takes"
    send = f"`byrd signal {case.short} {step.signal} [JSON]` sends it"
    return _Reason(
        step,
        ("signal", step.signal, step.signal_of, bool(late)),
        lambda many: (
            f"{'wait' if many else 'waits'} for the signal {step.signal!r}{of_whom(step.signal_of)}"
            f"{', the first' if many else ''} since {began}{end}; {send}"
        ),
    )


def _due(case: _Case, step: OpenStep) -> _Reason:
    """A step whose time has come: is there a worker for it, a free slot, a message?"""
    alive = [worker for worker in case.standing.workers if worker.alive]
    live = [worker for worker in alive if not worker.stopping]
    there = [worker for worker in live if step.queue in worker.queues]
    able = [worker for worker in there if step.task.startswith("celery.") or step.task in worker.tasks]
    queue = f"queue {step.queue!r}"
    if not live:
        state = "every worker that is alive is shutting down" if alive else "no worker is alive"
        alone = f"but {state}: start one with `celery -A <app> worker`"
        return _ready(case, step, ("no worker",), lambda _: alone)
    if not there:
        consumed = ", ".join(sorted({name for worker in live for name in worker.queues}))
        unheard = (
            f"in {queue}, which no live worker consumes (they consume {consumed}): start one with "
            f"`celery -A <app> worker -Q {step.queue}`"
        )
        return _ready(case, step, ("no consumer", step.queue), lambda _: unheard)
    if not able:
        unknown = (
            f"but no live worker on {queue} has the task {step.task} registered: deploy the code that defines it, "
            "or import its module in the app"
        )
        return _ready(case, step, ("unknown task", step.queue), lambda _: unknown)
    slots = sum(worker.concurrency for worker in able)
    if slots and sum(worker.running for worker in able) >= slots:

        def slot(_many: bool) -> str:  # noqa: FBT001 - the shape of _Reason.text
            before = case.messages.before(step)
            return f"for a free slot in {queue}{', behind ' + before if before else ''}: {_all_busy(slots)}"

        return _ready(case, step, ("slot", step.queue), slot, verb="wait")
    key = ("message", *case.messages.alike(step))
    return _ready(case, step, key, lambda many: case.messages.told(step, many=many))


def _all_busy(slots: int) -> str:
    return f"all {slots:,} are busy" if slots > 1 else "the only one is busy"


def _ready(
    case: _Case, step: OpenStep, key: tuple[object, ...], why: Callable[[bool], str], *, verb: str = "be"
) -> _Reason:
    now = case.standing.now
    ready = f" since {since(step.ready_at, now)}" if step.ready_at else ""
    after = _suspect(case, step)
    if not after and step.last_outcome == "preempted" and step.last_ended_at is not None:
        after = f"; it lost its worker at {moment(step.last_ended_at, now)} ({_loss(step)})"
    elif step.last_outcome == "retried" and step.last_error:
        after += f"; its attempt {step.attempt} ended with {error_text(step.last_error)}"
    if step.expires_at is not None:
        after += f"; it expires at {moment(step.expires_at, now)}"
    after += _starts(case, step)

    def text(many: bool) -> str:  # noqa: FBT001 - the shape of _Reason.text
        if verb == "wait":
            start = f"{'wait' if many else 'waits'}{ready} {why(many)}"
        else:
            start = f"{'are' if many else 'is'} ready{ready} {why(many)}"
        return start if many else start + after

    return _Reason(step, key, text)
