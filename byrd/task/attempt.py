"""One attempt at a step, in the process that runs it: what it may record, each thing under its fence."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import current_task
from celery.app.task import Context
from kombu.utils.json import dumps

from byrd.canvas import Plan
from byrd.errors import CheckpointError, StaleAttempt
from byrd.policies import default_of, timeouts_of
from byrd.store import Claim, Wakeup, flow, growth, limits, progress, sagas, steps
from byrd.store.limits import Place
from byrd.task.runtime import Runtime
from byrd.task.values import loads

if TYPE_CHECKING:
    from byrd.task.slices import Slice

log = logging.getLogger(__name__)

#: What Celery itself says in the headers of a message.
_KNOWN = frozenset({*Context.__dict__, "lang", "task", "argsrepr", "kwargsrepr", "compression"})
#: What the column can hold.
_MOST_ATTEMPTS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RetryRequest:
    """What ``self.retry`` asked for; None keeps what the step has.  ``args``, ``kwargs``, ``options`` are JSON.

    ``parks``: :class:`LimitedError` was raised, and asked for ``countdown`` alone.
    """

    countdown: float = 0.0
    eta: datetime | None = None
    args: str | None = None
    kwargs: str | None = None
    queue: str | None = None
    options: str | None = None
    parks: bool = False


@dataclass(frozen=True, slots=True)
class Compensation:
    """What a compensation undoes, and why.

    ``key`` is the same in each attempt at it: an idempotency key for whoever is asked to undo.  ``known``: the step's
    success is on record, or was confirmed; otherwise it may have taken effect, and its result is None.  ``reason``: why
    the saga is rolled back, in a line; ``failed_step`` and ``failed_task``: the step that failed, unless somebody asked
    for the rollback: ``by``.
    """

    key: str
    run_id: str
    step: int
    step_id: str
    task: str
    known: bool
    reason: str
    failed_step: int | None = None
    failed_task: str | None = None
    by: str | None = None


class Attempt:
    """A claimed step.  ``closed`` once its outcome is recorded; a second outcome is refused."""

    def __init__(
        self, runtime: Runtime, claim: Claim, *, in_slice: Slice | None = None, place: Place | None = None
    ) -> None:
        self.runtime = runtime
        self.claim = claim
        #: What it has of its task's limit, if that has one.
        self.place = place
        #: The slice that it is run in, if any: a result may be recorded with others'.
        self._slice = in_slice
        self.closed = False
        self._pid = os.getpid()
        #: Of a compensation: what it undoes.
        self.undoes: Compensation | None = None
        #: Set by ``self.retry``, for Celery's tracer to have it recorded.
        self.retry_with: RetryRequest | None = None
        #: ``self.retry`` has said that there is to be no further try: no policy says otherwise.
        self.gave_up = False
        self._next_beat = 0.0

    @property
    def step_id(self) -> str:
        """The step's id, which is its Celery task id."""
        return self.claim.id

    @property
    def run_id(self) -> str:
        """The id of the run."""
        return self.claim.run_id

    @property
    def number(self) -> int:
        """The attempt's number: the fence."""
        return self.claim.attempt

    def beat(self) -> None:
        """Give a sign of life, unless one was given a moment ago; raise what stops the step at a checkpoint."""
        now = time.monotonic()
        if now < self._next_beat:
            return
        timeouts = timeouts_of(loads(self.claim.options))
        self._next_beat = now + (min(1.0, timeouts.heartbeat / 4) if timeouts and timeouts.heartbeat else 1.0)
        reason = self.runtime.patient_store.run_alone(progress.beat, self.step_id, self.number)
        if reason is not None:
            raise reason

    # -- outcomes --------------------------------------------------------------------------------

    def complete(self, result: str) -> None:
        """Record the result (JSON) and publish what it makes ready."""
        if self._slice is None:
            self._close(steps.complete, result)
            return
        self._check()
        self._slice.completed(self.claim, result)
        self.closed = True

    def fail(self, error: str) -> None:
        """Record the error (JSON): the step has failed for good."""
        self._close(steps.fail, error)

    def retry(self, error: str | None) -> None:
        """Give the step back, to be tried again when and how ``self.retry`` said."""
        wanted = self.retry_with or RetryRequest()
        if wanted.parks and self.place is not None:
            self._close(limits.retry_later, error, place=self.place, delay=wanted.countdown)
            return
        self._close(
            steps.retry,
            error,
            delay=wanted.countdown,
            eta=wanted.eta,
            args=wanted.args,
            kwargs=wanted.kwargs,
            queue=wanted.queue,
            options=wanted.options,
            counted=not wanted.parks,
        )

    def hand_back(self, *, delay: float = 0.0) -> None:
        """Give the step back without blame."""
        self._close(steps.hand_back, delay=delay)

    def give_way(self, transition: Any, *args: Any, **kwargs: Any) -> None:
        """Give the step back until a time, or a signal, by a transition of the store."""
        self._close(transition, *args, **kwargs)

    def abandon(self) -> None:
        """Stop: the run is being cancelled."""
        self._close(steps.abandon)

    def drop(self, reason: str) -> None:
        """End without a result and without errbacks: the task raised Ignore."""
        self._close(steps.ignore, flow.error_json("Ignore", "celery.exceptions", [reason] if reason else []))

    def replace(self, canvas: Any) -> None:
        """Put a canvas in the step's place; its value will be the step's."""
        self._close(growth.replace, self._inner_plan(canvas))

    def extend_chord(self, canvas: Any) -> str:
        """Add a canvas to the group that the step is a member of; return the id of the step that has its value."""
        plan = self._inner_plan(canvas)
        wakeups = self.runtime.patient_store.run(growth.extend_join, self.step_id, self.number, plan)
        self.runtime.publisher.publish(wakeups)
        return next(step.id for step in plan.steps if step.no == plan.output)

    def _inner_plan(self, canvas: Any) -> Plan:
        """Compile a canvas that becomes a part of the run; its steps have the default policy that this one has."""
        return self.runtime.plan(canvas, inner=True, retry=default_of(loads(self.claim.options)))

    def _check(self) -> None:
        if self.closed:
            raise StaleAttempt(f"step {self.step_id}: attempt {self.number} has recorded its outcome already")
        if os.getpid() != self._pid:
            raise StaleAttempt(f"step {self.step_id}: a fork of attempt {self.number}'s process may record no outcome")

    def _close(self, transition: Any, *args: Any, **kwargs: Any) -> None:
        self._check()
        wakeups = self._recorded(transition, *args, **kwargs)
        self.closed = True
        self.runtime.publisher.publish(wakeups)

    def _recorded(self, transition: Any, *args: Any, **kwargs: Any) -> list[Wakeup]:
        store: Any = self.runtime.patient_store
        step = (self.step_id, self.number)
        while True:
            try:
                if self.place is None:
                    wakeups: list[Wakeup] = store.run(transition, *step, *args, **kwargs)
                else:
                    wakeups = store.run(limits.ending, transition, self.place, *step, *args, **kwargs)
                return wakeups
            except SoftTimeLimitExceeded:  # the task is done, and the same outcome may be recorded twice
                log.warning("step %s: attempt %d was being recorded at its soft time limit", self.step_id, self.number)


def claim_step(runtime: Runtime, header: Mapping[str, Any], *, task: str, pid: int) -> Attempt | None:
    """Claim the step that a message names; None when there is nothing to claim."""
    token = str(uuid.uuid4())
    step_id, attempt = header["step"], header["attempt"]
    store = runtime.patient_store
    claim = store.run(
        steps.claim,
        step_id,
        attempt,
        task=task,
        worker_id=runtime.worker_id,
        pid=pid,
        token=token,
        max_preemptions=runtime.max_preemptions,
    )
    if claim is None:
        runtime.publisher.publish(store.run(sagas.not_started, step_id))
        return None
    return Attempt(runtime, claim)


def attempt_of(request: Any) -> Attempt | None:
    """Return the attempt that a task's request belongs to, in the process that runs it."""
    found = getattr(request, "byrd", None)
    return found if isinstance(found, Attempt) else None


def header_of(request: Any) -> Mapping[str, Any] | None:
    """Return the step that a message names, in a worker's main process."""
    return readable_header(getattr(request, "byrd", None))


def readable_header(found: Any) -> Mapping[str, Any] | None:
    """Return what a message says of its step; None for what no publisher of ours has written, for anybody may write."""
    if not isinstance(found, Mapping):
        return None
    step, attempt = found.get("step"), found.get("attempt")
    if not isinstance(step, str) or type(attempt) is not int or not 0 <= attempt < _MOST_ATTEMPTS:
        return None
    return found if storable(step) else None


def storable(text: str) -> bool:
    """Tell whether Postgres can be asked about it: neither a NUL nor half of a surrogate pair is text there."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def current_attempt() -> Attempt | None:
    """Return the attempt that this thread is running, if any."""
    task = current_task._get_current_object() if current_task else None
    return attempt_of(task.request) if task is not None else None


def execution_request(
    attempt: Attempt, message: Mapping[str, Any], args: list[Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the request that the task sees: Celery's own, with the plan's facts in place of the message's."""
    claim = attempt.claim
    if message.get("id") == claim.id:
        request = dict(message)
        # Never None: Celery would then take every header that it does not know for the user's, "byrd" among them.
        headers = message.get("headers") or _custom_headers(message)
    else:
        request, headers = _without_message(attempt, message), {}
    request.update(
        byrd=attempt,
        id=claim.id,
        root_id=claim.run_id,
        parent_id=claim.parent_id,
        retries=claim.retries,
        group=claim.group_id,
        group_index=claim.join_pos,
        headers={k: v for k, v in headers.items() if k != "byrd"},
        # The plan owns what comes next: Celery's tracer must not send anything on.
        callbacks=None,
        errbacks=None,
        chain=None,
        chord=None,
        # The result is recorded in any case: successors need it.
        ignore_result=False,
        args=args,
        kwargs=kwargs,
    )
    request.pop("argsrepr", None)
    request.pop("kwargsrepr", None)
    return request


def _without_message(attempt: Attempt, woken_by: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request of a step that has no message of its own: what such a message would have said.

    Of the message that woke this process, which is another step's, only what is this worker's own is in it.
    """
    claim, queues = attempt.claim, attempt.runtime.app.amqp.queues
    queue = queues.get(claim.queue)
    if queue is None or queue.exchange.type == "direct":  # as Celery sends it
        way = {"exchange": "", "routing_key": claim.queue}
    else:
        way = {"exchange": queue.exchange.name, "routing_key": queue.routing_key}
    properties = woken_by.get("properties") or {}
    return {
        "lang": "py",
        "task": claim.task,
        "origin": woken_by.get("origin"),
        "hostname": woken_by.get("hostname"),
        "shadow": None,
        "eta": None,
        "expires": None,
        "timelimit": [None, None],
        "replaced_task_nesting": 0,
        "is_eager": False,
        "stamped_headers": None,
        "stamps": {},
        "reply_to": "",
        "correlation_id": claim.id,
        "delivery_info": {**way, "priority": 0, "redelivered": False},
        "properties": {
            "correlation_id": claim.id,
            "reply_to": "",
            "delivery_mode": properties.get("delivery_mode", 2),
            "delivery_info": way,
            "priority": 0,
            "body_encoding": properties.get("body_encoding"),
        },
    }


def _custom_headers(message: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in message.items() if k not in _KNOWN}


def to_json(value: Any) -> str:
    """Return ``value`` as JSON in Celery's dialect."""
    text: str = dumps(value)
    return text


def text_of(exc: BaseException) -> str:
    """Return an exception's text; its own ``__str__`` may raise."""
    try:
        return str(exc)
    except Exception as bad:  # noqa: BLE001 - whatever it raises
        return f"(its text cannot be had: {type(bad).__name__})"


def encoded(attempt: Attempt, value: Any, what: str) -> str:
    """Return a value as JSON, to be saved; raise :class:`CheckpointError` when it is none."""
    try:
        text = to_json(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise CheckpointError(
            f"step {attempt.step_id}: {what} must be a JSON value, for it is saved: {text_of(exc)}"
        ) from exc
    if too_large := attempt.runtime.too_large(len(text)):
        raise CheckpointError(f"step {attempt.step_id}: {what} is {too_large}")
    return text
