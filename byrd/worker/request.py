"""How a worker's main process treats a message that names a step."""

from __future__ import annotations

import logging
from typing import Any

from billiard.exceptions import WorkerLostError
from celery.exceptions import Ignore, Retry
from celery.worker import state
from celery.worker.request import Request

from byrd.store import steps
from byrd.task.runtime import runtime_of

log = logging.getLogger(__name__)


class DurableRequest(Request):
    """A message of a step is acknowledged once a pool process has it, whatever ``acks_late`` says: the step is in
    Postgres, and a message that waited for its acknowledgement would only come back as a duplicate.
    """

    @property
    def durable(self) -> bool:
        """True when the message names a step of a run."""
        return "byrd" in self._request_dict

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
        """End the pool process because the worker stops and cannot wait; a step is handed back, to be retried."""
        super().cancel(pool, signal, emit_retry=emit_retry or self.durable)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:  # noqa: FBT001, FBT002
        """The task raised, or its pool process is gone: then its steps become ready again at once."""
        exc = exc_info.exception
        exc = getattr(exc, "exc", exc) if type(exc).__name__ == "ExceptionWithTraceback" else exc
        lost = isinstance(exc, WorkerLostError | SystemExit | KeyboardInterrupt)
        if not (self.durable and lost):
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
            if self.durable and not isinstance(exc, Ignore | Retry):
                self._give_back_unless_recorded()
            return
        state.task_ready(self)
        self.acknowledge()
        log.warning("the pool process %s is gone while it ran %s[%s]: %s", self.worker_pid, self.name, self.id, exc)
        if self.worker_pid is not None:
            runtime = runtime_of(self._app)
            reason = f"pool process {self.worker_pid}: {exc}"
            runtime.later(steps.preempt, runtime.worker_id, pid=self.worker_pid, reason=reason)
        if send_failed_event:
            self.send_event("task-retried", exception=repr(exc), traceback="")

    def _give_back_unless_recorded(self) -> None:
        """A failure is recorded by the pool process, before this: if even that failed, the step would run for ever."""
        runtime, header = runtime_of(self._app), self._request_dict["byrd"]
        runtime.later(
            steps.preempt,
            runtime.worker_id,
            step=(str(header["step"]), int(header["attempt"]) + 1),
            reason="its outcome could not be recorded",
        )
