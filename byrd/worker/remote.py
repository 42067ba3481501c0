"""Celery's remote control of a worker, where it concerns steps that run without a message of their own."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from celery.app.control import TERM_SIGNAME
from celery.platforms import signals
from celery.utils.functional import maybe_list
from celery.worker.control import Panel
from celery.worker.state import active_requests

from byrd.store import Wakeup, steps, sweeps
from byrd.task.runtime import Runtime, runtime_of

log = logging.getLogger(__name__)

#: Commands that change which steps a slice of this worker may take.
_CHANGES = ("rate_limit", "time_limit", "add_consumer", "cancel_consumer", "pool_restart")


def attend(changed: Callable[[], None]) -> None:
    """Follow the commands that this worker's main process gets; ``changed`` is called after those that matter."""
    for name in _CHANGES:
        _after(name, lambda _state, *_args, **_options: changed())
    _after("revoke", _terminate)


def end_soon(runtime: Runtime, step_ids: Sequence[str], signal: Any) -> None:
    """Have steps ended that this worker runs, and the processes in which they are run just then."""
    runtime.chores.append(functools.partial(_end, runtime, step_ids, signals.signum(signal or TERM_SIGNAME)))


def _after(name: str, then: Callable[..., None]) -> None:
    plain = getattr(Panel.data[name], "byrd_plain", Panel.data[name])

    @functools.wraps(plain)
    def command(state: Any, *args: Any, **options: Any) -> Any:
        answer = plain(state, *args, **options)
        then(state, *args, **options)
        return answer

    command.byrd_plain = plain  # type: ignore[attr-defined]
    Panel.data[name] = command


def _terminate(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **_options: Any) -> None:  # noqa: FBT001, FBT002 - Celery's
    """End revoked steps that run without their message: Celery looks among those only."""
    if not terminate:
        return
    known = {request.id for request in active_requests}
    wanted = [str(one) for one in maybe_list(task_id) or [] if one not in known]
    if wanted:
        end_soon(runtime_of(state.app), wanted, signal)


def _end(runtime: Runtime, step_ids: Sequence[str], signum: int) -> list[Wakeup]:
    wakeups: list[Wakeup] = []
    for step_id in step_ids:
        running = runtime.store.run(sweeps.running_here, runtime.worker_id, step_id)
        if running is None:
            continue
        wakeups += runtime.store.run(
            steps.revoke, step_id, "terminated", attempt=running.attempt, owner=runtime.worker_id, pid=running.pid
        )
        # It may be over, or about to be run in a while: then its process is at work for another.
        if running.pid != os.getpid() and runtime.is_running(running.pid, step_id):
            log.warning("step %s was revoked: its pool process %d is ended", step_id, running.pid)
            os.kill(running.pid, signum)
    return wakeups
