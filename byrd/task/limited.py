"""What a limit is to a worker: the key of a call, the claim that asks for a place, and a task that wants a pause."""

from __future__ import annotations

import functools
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery, Task
from celery.exceptions import Retry

from byrd.errors import LimitedError, LimitKeyError
from byrd.limits import OPTION, Limit, check_declaration, key_of, limit_of
from byrd.store import Claim, limits, sagas
from byrd.store.limits import Admission, Place
from byrd.task.attempt import Attempt, RetryRequest, attempt_of, claim_step
from byrd.task.runtime import Runtime

log = logging.getLogger(__name__)
Arguments = Callable[[Task, Attempt], tuple[list[Any], dict[str, Any]]]


def adopt_limit(task: Any) -> None:
    """Check the limit that a task declares, and let it ask for a pause; raise :class:`LimitError` for what is none."""
    if getattr(task, OPTION, None) is None:
        return
    check_declaration(task, {name: limit for name, limit in _declared(task.app) if name != task.name})
    # Where Celery retries some errors by itself, it calls this one inside: LimitedError is none of them.
    name = "_orig_run" if hasattr(task, "_orig_run") else "run"
    plain = getattr(task, name)
    if not getattr(plain, "byrd_pauses", False):
        setattr(task, name, _pausing(task, plain))


def limits_of(app: Celery) -> list[Limit]:
    """Return the limits that the tasks of an app declare, each once."""
    return list({limit.name: limit for _, limit in _declared(app)}.values())


def _declared(app: Celery) -> list[tuple[str, Limit]]:
    # Not app.tasks, which would have the app finalized.
    found = [(name, limit_of(task)) for name, task in list(app._tasks.items()) if isinstance(_option(task), Limit)]
    return [(name, limit) for name, limit in found if limit is not None]


def _option(task: Any) -> Any:
    return getattr(task, OPTION, None)


def claim(runtime: Runtime, header: Mapping[str, Any], task: Task, limit: Limit, arguments: Arguments) -> Attempt | str:
    """Claim the step that a message names, if its task's limit allows it now; return what else has become of it."""
    step_id, store = header["step"], runtime.patient_store
    ready = store.run(limits.look, step_id, header["attempt"], task=task.name)
    if ready is None:
        runtime.publisher.publish(store.run(sagas.not_started, step_id))
        return f"step {step_id:.100} is not ready for attempt {header['attempt']}"
    try:
        key = key_of(limit, task.run, *arguments(task, Attempt(runtime, ready)))
    except LimitKeyError as exc:
        return _failed(runtime, header, task, exc)
    except (ValueError, RecursionError):  # they cannot be read, of which whoever runs the step makes a failure
        key = None
    if key is None:
        return claim_step(runtime, header, task=task.name, pid=os.getpid()) or f"step {step_id} was taken meanwhile"
    place = Place(limit.name or task.name, key)
    found = store.run(
        limits.admit,
        step_id,
        header["attempt"],
        limit=limit,
        place=place,
        token=str(uuid.uuid4()),
        task=task.name,
        worker_id=runtime.worker_id,
        pid=os.getpid(),
        max_preemptions=runtime.max_preemptions,
    )
    if isinstance(found, Claim):
        return Attempt(runtime, found, place=place)
    if found is Admission.WAITS:
        return f"step {step_id} waits for the limit {place.name!r} of {place.key!r}"
    runtime.publisher.publish(store.run(sagas.not_started, step_id))
    return f"step {step_id} was taken meanwhile"


def _failed(runtime: Runtime, header: Mapping[str, Any], task: Task, exc: LimitKeyError) -> str:
    attempt = claim_step(runtime, header, task=task.name, pid=os.getpid())
    if attempt is not None:
        attempt.fail(runtime.app.backend.encoded_error(exc))
    return str(exc)


# -- pauses ----------------------------------------------------------------------------------------


def wants_pause(task: Any, exc: BaseException | None) -> bool:
    """Tell whether an exception of a task's is no failure of whatever it left, but only ends this attempt."""
    return isinstance(exc, LimitedError) and _option(task) is not None


def _pausing(task: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the task's function, in which :class:`LimitedError` is a retry."""

    @functools.wraps(plain)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return plain(*args, **kwargs)
        except LimitedError as exc:
            raise _pause(task, exc) from exc

    run.byrd_pauses = True  # type: ignore[attr-defined]
    return run


def _pause(task: Task, exc: LimitedError) -> Any:
    attempt = attempt_of(task.request)
    if attempt is None:
        return task.retry(exc=exc, countdown=exc.retry_after, throw=False)
    attempt.retry_with = RetryRequest(countdown=exc.retry_after, parks=True)
    return Retry(exc=exc, when=exc.retry_after)
