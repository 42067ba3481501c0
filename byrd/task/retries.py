"""What a retry policy is to a worker: an error of the task that becomes a retry, where Celery's tracer sees to it."""

from __future__ import annotations

from typing import Any

from celery import Task, states
from celery.app.trace import TraceInfo, build_tracer
from celery.exceptions import Retry as CeleryRetry
from kombu.exceptions import EncodeError

from byrd import policies
from byrd.store import timeouts
from byrd.task.attempt import Attempt, RetryRequest, attempt_of
from byrd.task.values import loads

#: No attempt makes these better: the result of the task cannot be recorded.
_FOR_GOOD = (EncodeError,)


def tracer_of(task: Task, attempt: Attempt) -> Any:
    """Return the tracer for a step that has a retry policy; None for one that has none."""
    if policies.RETRY not in attempt.claim.options:  # JSON: most steps pay for no more than this
        return None
    found = task.__dict__.get("_retrying_tracer")
    if found is None:
        app = task.app
        found = build_tracer(task.name, task, app.loader, Info=_Info, app=app)
        task.__dict__["_retrying_tracer"] = found
    return found


class _Info(TraceInfo):
    """What Celery's tracer does about an error: a retry, as of ``self.retry``, when the step's policy says so."""

    state: str
    retval: Any

    def handle_error_state(self, task: Task, req: Any, eager: bool = False, call_errbacks: bool = True) -> Any:  # noqa: FBT001, FBT002 - Celery's
        attempt, exc = attempt_of(req), self.retval
        if self.state == states.FAILURE and attempt is not None and not isinstance(exc, _FOR_GOOD):
            again = asked_for(attempt, exc)
            if again is not None:
                try:
                    raise again from exc
                except CeleryRetry as reason:
                    self.state, self.retval = states.RETRY, reason
                    return super().handle_error_state(task, req, eager=eager, call_errbacks=False)
        return super().handle_error_state(task, req, eager=eager, call_errbacks=call_errbacks)


def asked_for(attempt: Attempt, exc: BaseException) -> CeleryRetry | None:
    """Have an error of the task become a retry, if the step's policy says so; return what is to be raised then."""
    pause = _pause(attempt, exc)
    if pause is None:
        return None
    attempt.retry_with = RetryRequest(countdown=pause)
    return CeleryRetry(exc=exc, when=pause)


def _pause(attempt: Attempt, exc: BaseException) -> float | None:
    """Return how long the step is to wait for its next attempt; None when there is to be none."""
    policy = policies.retry_of(loads(attempt.claim.options))
    if policy is None or attempt.closed or attempt.gave_up:
        return None
    store = attempt.runtime.patient_store
    elapsed = 0.0 if policy.budget is None else store.run(timeouts.tried_seconds, attempt.step_id)
    return policy.pause(
        policies.names_of(type(exc)), attempt.claim.retries + 1, elapsed=elapsed, own=policies.own_pause(exc)
    )
