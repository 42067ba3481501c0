"""How a worker's main process treats a message that names a step."""

from __future__ import annotations

import functools
import logging
from typing import Any

from billiard.exceptions import WorkerLostError
from celery.exceptions import Ignore, InvalidTaskError, Retry
from celery.worker import state
from celery.worker.request import Request

from byrd.store import steps
from byrd.task.attempt import readable_header
from byrd.task.publisher import SHARED
from byrd.task.reports import reports_of, send_reports
from byrd.task.runtime import runtime_of
from byrd.worker import remote
from byrd.worker.messages import check_request

log = logging.getLogger(__name__)


class DurableRequest(Request):
    """A message of a step is acknowledged once a pool process has it, whatever ``acks_late`` says: the step is in
    Postgres, and a message that waited for its acknowledgement would only come back as a duplicate.
    """

    def __init__(self, message: Any, *args: Any, headers: Any = None, **options: Any) -> None:
        check_request(message.headers if headers is None else headers)
        try:
            super().__init__(message, *args, headers=headers, **options)
        except (TypeError, ValueError) as exc:  # its body is no list of three, say
            raise InvalidTaskError(f"the message of a task cannot be read: {exc!r}") from exc
        if self.durable:  # when a step may start, Postgres knows; no message of ours says it
            self._eta = self._expires = None
            self._keep_to_itself()

    def __init_subclass__(cls, **options: Any) -> None:
        """Celery makes a class of its own for each task, whose ``on_success`` calls none of ours."""
        super().__init_subclass__(**options)
        plain = cls.on_success

        @functools.wraps(plain)
        def on_success(self: DurableRequest, failed__retval__runtime: Any, **kwargs: Any) -> None:
            if self.durable:  # what else ran in the same slice is reported with it
                send_reports(self._eventer, reports_of(failed__retval__runtime))
            plain(self, failed__retval__runtime, **kwargs)

        cls.on_success = on_success
        to_pool = cls.execute_using_pool

        @functools.wraps(to_pool)
        def execute_using_pool(self: DurableRequest, pool: Any, **kwargs: Any) -> Any:
            # As worker_disable_prefetch counts them, but for processes that autoscaling may still start.
            runtime_of(self._app).note_free(free=len(state.reserved_requests) < pool.num_processes)
            return to_pool(self, pool, **kwargs)

        cls.execute_using_pool = execute_using_pool

    @property
    def durable(self) -> bool:
        """True when the message names a step of a run."""
        return self._request_dict.get("byrd") is not None

    def _keep_to_itself(self) -> None:
        """Have the message run its own step only when Celery limits its time: others must not be ended by that."""
        header = self._request_dict["byrd"]
        limited = any(self.time_limits or ()) or self.task.time_limit or self.task.soft_time_limit
        if limited and isinstance(header, dict):
            self._request_dict["byrd"] = {key: value for key, value in header.items() if key != SHARED}

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """End the process that runs the step: not always the one that has the message, which may run another by now."""
        header = readable_header(self._request_dict.get("byrd"))
        if header is None or not header.get(SHARED):
            super().terminate(pool, signal)
            return
        remote.end_soon(runtime_of(self._app), [header["step"]], signal)
        self._announce_revoked("terminated", True, signal, False)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A pool process has taken the message."""
        super().on_accepted(pid, time_accepted)
        if self.durable:
            self.acknowledge()

    def execute(self, loglevel: Any = None, logfile: Any = None) -> Any:
        """Run in this process."""
        if self.durable:
            self.acknowledge()
        return super().execute(loglevel, logfile)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:  # noqa: FBT001, FBT002 - Celery's
        """End the task because the worker stops and does not want to wait; a step is handed back, to be retried.

        Nobody can end what runs in a thread: that is waited for.  Without this, Celery's refusal to try would end the
        worker with its other steps, or be raised in the very task, in a solo pool.
        """
        try:
            super().cancel(pool, signal, emit_retry=emit_retry or self.durable)
        except NotImplementedError:
            log.warning("%s[%s] cannot be ended in this pool, so the worker waits for it", self.name, self.id)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:  # noqa: FBT001, FBT002
        """The task raised, or its pool process is gone: then its steps become ready again at once."""
        exc = exc_info.exception
        exc = getattr(exc, "exc", exc) if type(exc).__name__ == "ExceptionWithTraceback" else exc
        if self.durable and isinstance(exc, WorkerLostError | SystemExit | KeyboardInterrupt):
            self._done()
            log.warning("the pool process %s is gone while it ran %s[%s]: %s", self.worker_pid, self.name, self.id, exc)
            self._give_back(f"pool process {self.worker_pid}: {exc}")
            if send_failed_event:
                self.send_event("task-retried", exception=repr(exc), traceback="")
            return
        if self.durable and isinstance(exc, MemoryError):
            self._done()  # Celery would end the whole worker, with the steps that run beside this one
            if send_failed_event:
                self.send_event("task-failed", exception=repr(exc), traceback=exc_info.traceback)
        else:
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        if self.durable and not isinstance(exc, Ignore | Retry):
            # A failure is recorded by the pool process, before this: if even that failed, the step would run for ever.
            self._give_back("its outcome could not be recorded")

    def _done(self) -> None:
        state.task_ready(self)
        self.acknowledge()

    def _give_back(self, reason: str) -> None:
        """Have this attempt given back, unless it is recorded; in a pool of threads, others run in the same process."""
        runtime, header = runtime_of(self._app), readable_header(self._request_dict.get("byrd"))
        if header is not None:
            attempt = (header["step"], header["attempt"] + 1)
            runtime.later(
                steps.preempt,
                runtime.worker_id,
                step=attempt,
                pid=self.worker_pid,  # another process of this worker may run the step, without its message
                reason=reason,
                max_preemptions=runtime.max_preemptions,
            )
