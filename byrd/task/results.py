"""Where results go: a mixin on the app's own result backend.

For a step, Celery's tracer calls the same methods as for any task, at the same moments; they record the
outcome in the step's transaction.  Reading by a step's id reads the step.  Everything else is the
backend's own business.
"""

from __future__ import annotations

import time
from typing import Any

from billiard.exceptions import TimeLimitExceeded
from celery import Celery, states
from celery.exceptions import TimeoutError as CeleryTimeoutError
from kombu.exceptions import EncodeError
from kombu.utils.json import dumps
from sqlalchemy.exc import DBAPIError

from byrd.errors import NotLiveError
from byrd.policies import names_of
from byrd.store import StepRow, Store, reading, steps, timeouts
from byrd.store.database import first_line
from byrd.task.attempt import attempt_of, header_of, text_of
from byrd.task.runtime import runtime_of
from byrd.task.values import loads

_STATES = {
    "pending": states.PENDING,
    "ready": states.PENDING,
    "running": states.STARTED,
    "waiting": states.PENDING,
    "succeeded": states.SUCCESS,
    "failed": states.FAILURE,
    "skipped": states.FAILURE,
    "cancelled": states.REVOKED,
}

#: An error is for people to read; what is longer is shortened.
_MOST_ERROR_BYTES = 2**20


class DurableResults:
    """Mixed in before the class of the app's result backend."""

    app: Celery

    # -- recording -------------------------------------------------------------------------------

    def mark_as_done(self, task_id: str, result: Any, request: Any = None, *args: Any, **kwargs: Any) -> None:
        """Record success; for a step, in Postgres, together with what it makes ready."""
        attempt = attempt_of(request)
        if attempt is None:
            super().mark_as_done(task_id, result, request, *args, **kwargs)  # type: ignore[misc]
        elif attempt.retry_with is not None:  # self.retry(throw=False): the retry counts, not the value
            attempt.retry(None)
        else:
            try:
                attempt.complete(self._encoded(result))
            except DBAPIError as exc:
                # What Postgres refuses for good: with this result, a group's are together larger than it can hold, say.
                raise EncodeError(f"the result cannot be recorded: {first_line(exc)}") from exc

    def mark_as_failure(
        self, task_id: str, exc: BaseException, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> None:
        """Record failure."""
        attempt, header = attempt_of(request), header_of(request)
        if attempt is not None:
            if not attempt.closed:
                attempt.fail(self.encoded_error(exc, traceback))
        elif header is not None and isinstance(exc, TimeLimitExceeded):
            limit = timeouts.CeleryLimit(_seconds_of(exc), self.encoded_error(exc, traceback), names_of(type(exc)))
            self._in_main_process(request, timeouts.time_out, header, celery=limit)
        elif header is not None:
            self._in_main_process(request, steps.fail, header, self.encoded_error(exc, traceback))
        else:
            super().mark_as_failure(task_id, exc, traceback=traceback, request=request, **kwargs)  # type: ignore[misc]

    def mark_as_retry(self, task_id: str, exc: Any, traceback: Any = None, request: Any = None, **kwargs: Any) -> None:
        """Record that the task asked for another try."""
        attempt, header = attempt_of(request), header_of(request)
        if attempt is not None:
            attempt.retry(self.encoded_error(exc, traceback) if exc is not None else None)
        elif header is not None:  # cancelled by the worker, which is about to stop or has lost the broker
            self._in_main_process(request, steps.hand_back, header)
        else:
            super().mark_as_retry(task_id, exc, traceback=traceback, request=request, **kwargs)  # type: ignore[misc]

    def mark_as_revoked(self, task_id: str, reason: str = "", request: Any = None, *args: Any, **kwargs: Any) -> None:
        """Record that the task was revoked, before it started or while it ran."""
        header = header_of(request)
        if header is None:
            super().mark_as_revoked(task_id, reason, request, *args, **kwargs)  # type: ignore[misc]
            return
        runtime = runtime_of(self.app)
        # Only a terminated process was running the step; a message that is revoked may be a duplicate.
        attempt = header["attempt"] + 1 if reason == "terminated" else None
        owner, pid = runtime.worker_id, getattr(request, "worker_pid", None)
        runtime.later(steps.revoke, header["step"], str(reason), attempt=attempt, owner=owner, pid=pid)

    def store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        """Store a state.  That a step has started is known already; a state of the user's own goes to the backend."""
        if attempt_of(kwargs.get("request")) is not None and state == states.STARTED:
            return result
        return super().store_result(task_id, result, state, *args, **kwargs)  # type: ignore[misc]

    def _in_main_process(self, request: Any, transition: Any, header: Any, *args: Any, **kwargs: Any) -> None:
        """Have an outcome recorded for a pool process that cannot: it was killed by a time limit, say."""
        runtime, pid = runtime_of(self.app), getattr(request, "worker_pid", None)
        # Another process of this worker may run the step, without its message.
        step = (header["step"], header["attempt"] + 1)
        runtime.later(transition, *step, *args, owner=runtime.worker_id, pid=pid, **kwargs)

    def _encoded(self, result: Any) -> str:
        try:
            text: str = dumps(self.prepare_value(result))  # type: ignore[attr-defined]
        except Exception as exc:
            # Whatever: a __json__() of the user's own, too, may raise it.
            raise EncodeError(f"the result cannot be held by JSON: {text_of(exc)}") from exc
        if too_large := runtime_of(self.app).too_large(len(text)):
            raise EncodeError(f"the result is {too_large}")
        return text

    def encoded_error(self, exc: BaseException, traceback: Any = None) -> str:
        """Return an exception as JSON: its type, its arguments, its traceback."""
        try:
            found = dict(self.prepare_exception(exc, "json"))  # type: ignore[attr-defined]
            found["traceback"] = str(traceback) if traceback else None
            text: str = dumps(found)
        except Exception as bad:  # noqa: BLE001 - the error's own methods may raise anything
            text = _short_error(
                exc, f"{_shortened(text_of(exc))} (it cannot be held by JSON: {text_of(bad)})", traceback
            )
        if len(text) > _MOST_ERROR_BYTES:
            text = _short_error(exc, _shortened(text_of(exc)), traceback)
        return text

    # -- reading ---------------------------------------------------------------------------------

    def get_task_meta(self, task_id: str, cache: bool = True) -> dict[str, Any]:  # noqa: FBT001, FBT002 - Celery's own signature
        """Return the state and result of a task; a step's from its row."""
        step = self._step(task_id)
        if step is None:
            meta: dict[str, Any] = super().get_task_meta(task_id, cache=cache)  # type: ignore[misc]
            return meta
        return self._step_meta(step, cache=cache)

    def wait_for_pending(self, result: Any, timeout: float | None = None, interval: float = 0.5, **options: Any) -> Any:
        """Wait for a result; a step's by asking Postgres, whatever the backend listens to."""
        if self._step(result.id) is None:
            return super().wait_for_pending(result, timeout=timeout, interval=interval, **options)  # type: ignore[misc]
        on_interval = options.get("on_interval")
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = 0.01
        while True:
            meta = self.get_task_meta(result.id)
            if meta["status"] in states.READY_STATES:
                break
            if on_interval:
                on_interval()
            if deadline is not None and time.monotonic() >= deadline:
                raise CeleryTimeoutError("The operation timed out.")
            time.sleep(pause)
            pause = min(interval, pause * 1.5, 0.25)
        result._maybe_set_cache(meta)
        return result.maybe_throw(propagate=options.get("propagate", True), callback=options.get("callback"))

    def _step(self, task_id: str) -> StepRow | None:
        store: Store = runtime_of(self.app).store
        try:
            return store.run(reading.get_step, str(task_id))
        except NotLiveError:
            return None  # the backend may know, and says so if it does not

    def _step_meta(self, step: StepRow, *, cache: bool) -> dict[str, Any]:
        status = _STATES[step.status]
        if step.status == "ready" and step.retries:
            status = states.RETRY
        meta: dict[str, Any] = {
            "task_id": step.id, "status": status, "result": None, "traceback": None, "children": [],
            "date_done": step.finished_at, "name": step.task, "retries": step.retries, "queue": step.queue,
            "group_id": None,
        }  # fmt: skip
        if step.status == "succeeded":
            meta["result"] = loads(step.result or "null")
        elif status in states.PROPAGATE_STATES:
            _, _, _, error, _, _ = runtime_of(self.app).store.run(reading.outcome, step.run_id, step.no)
            meta["result"], meta["traceback"] = self.decoded_error(error)
        elif status in (states.STARTED, states.PENDING):
            own: dict[str, Any] = super().get_task_meta(step.id, cache=cache)  # type: ignore[misc]
            if own.get("status") not in (states.PENDING, states.STARTED):  # update_state(): a progress bar, say
                meta.update(status=own["status"], result=own["result"])
        return meta

    def decoded_error(self, error: str | None) -> tuple[Any, str | None]:
        """Return the exception and the traceback of an error in its JSON form."""
        if error is None:
            return None, None
        found = loads(error)
        return self.exception_to_python(found), found.get("traceback")  # type: ignore[attr-defined]


def _seconds_of(limit: TimeLimitExceeded) -> float:
    found = limit.args[0] if limit.args else None
    return float(found) if isinstance(found, int | float) else 0.0


def _short_error(exc: BaseException, message: str, traceback: Any) -> str:
    kind = type(exc)
    found = {"exc_type": kind.__name__, "exc_message": [message], "exc_module": kind.__module__}
    text: str = dumps({**found, "traceback": _shortened(str(traceback)) if traceback else None})
    return text


def _shortened(text: str) -> str:
    """Return a text of which the middle is left out when it is very long."""
    half = _MOST_ERROR_BYTES // 32
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]} [... {left_out:,} characters ...] {text[-half:]}"


def install(app: Celery) -> None:
    """Make the app's result backend, whichever it is, see durable steps."""
    make = app._get_backend

    def make_durable() -> Any:
        backend = make()
        plain = type(backend)
        if not issubclass(plain, DurableResults):
            backend.__class__ = type(f"Durable{plain.__name__}", (DurableResults, plain), {})
        return backend

    app._get_backend = make_durable
    app._backend_cache = None
    app._local.__dict__.pop("backend", None)
