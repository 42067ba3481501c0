"""Celery's revoke, of steps: what its workers merely remember, Postgres knows, whether a worker is there or not."""

from __future__ import annotations

import logging
from typing import Any

from celery import Celery
from celery.app.control import TERM_SIGNAME

from byrd.errors import NotLiveError
from byrd.store import steps
from byrd.task.runtime import runtime_of

log = logging.getLogger(__name__)


class DurableControl:
    """Mixed in before the class of the app's remote control."""

    app: Celery

    def revoke(
        self,
        task_id: str | list[str],
        destination: list[str] | None = None,
        terminate: bool = False,  # noqa: FBT001, FBT002 - Celery's own signature
        signal: str = TERM_SIGNAME,
        **kwargs: Any,
    ) -> Any:
        """Revoke tasks: a step that has not started yet never will; the workers are told as ever."""
        if destination is None:  # else some workers are told to leave it to the others
            for step_id in [task_id] if isinstance(task_id, str) else list(task_id):
                self._record(str(step_id))
        return super().revoke(task_id, destination=destination, terminate=terminate, signal=signal, **kwargs)  # type: ignore[misc]

    def _record(self, step_id: str) -> None:
        runtime = runtime_of(self.app)
        try:
            runtime.publisher.publish(runtime.store.run(steps.revoke_waiting, step_id))
        except NotLiveError as exc:
            log.warning("the revoke of %s is known to the workers that are alive only: %s", step_id, exc)


def install(app: Celery) -> None:
    """Make the app's remote control, whichever it is, see durable steps."""
    control = app.control
    plain = type(control)
    if not issubclass(plain, DurableControl):
        control.__class__ = type(f"Durable{plain.__name__}", (DurableControl, plain), {})
