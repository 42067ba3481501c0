"""SagaTask: a step that can be undone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from celery import Task

from byrd.errors import ConfigurationError
from byrd.policies import RETRY, Retry
from byrd.sagas import NOT_DONE
from byrd.task.attempt import Attempt, Compensation, attempt_of, current_attempt
from byrd.task.durable import DurableTask

#: A compensation is more patient than the step that it undoes: the world should end up whole.
PATIENCE: dict[str, Any] = {
    "max_retries": 10,
    "retry_backoff": True,
    "retry_backoff_max": 300,
    "autoretry_for": (Exception,),
}
Function = TypeVar("Function", bound=Callable[..., Any])


class SagaTask(DurableTask):
    """Base of tasks that name their compensation::

        @app.task(base=byrd.SagaTask)
        def reserve(room): ...

        @reserve.compensation
        def release(reservation, room): ...

    When a run fails, or a :func:`byrd.saga` in it, or it is cancelled with ``compensate=True``, the compensations of
    its completed saga steps run, the later of two that followed one another first, each with the step's recorded result
    and its arguments.  A compensation is a Celery task of its own, ``<task>.compensation``, and a step of the run:
    retried (ten times with growing pauses, unless its options say otherwise), recorded, shown.

    A task with nothing to undo says ``compensation=None`` where it is declared.  ``pivot=True``: once it has succeeded,
    nothing in its run is rolled back any more.  ``retriable=True``: its own failure causes no rollback.
    """

    abstract = True
    #: The Celery task that undoes this one.
    compensation_task: Task | None = None
    #: Asks the outside world whether the effect took place.
    confirm_function: Callable[..., Any] | None = None
    #: Once it has succeeded, its run goes forward only.
    pivot = False
    #: When it fails, nothing is rolled back because of it.
    retriable = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse what contradicts itself."""
        super().__init_subclass__(**options)
        if cls.pivot and cls.retriable:
            raise ConfigurationError(
                f"{cls.name or cls.__qualname__} is marked pivot and retriable: a pivot that fails is what a rollback "
                "is for; what follows it is tried again without the mark"
            )

    def compensation(self, fun: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Name the function that undoes this task: called with the step's result, then with the step's arguments.

        ``options`` are Celery task options: ``max_retries``, ``queue``, ``time_limit``, ...; or Byrd's own: a retry
        policy, ``byrd_retry``, takes the place of the ten retries (of twice those of this task, if that is more).  A
        Celery task will do as well, with its own.  Of a step that may have taken effect, but was never recorded, the
        result is None, unless :meth:`confirm` knows better.
        """
        if fun is None:
            return lambda fun: self.compensation(fun, **options)
        if self.compensation_task is not None:
            raise ConfigurationError(f"{self.name} has a compensation already: {self.compensation_task.name}")
        known = fun if isinstance(fun, Task) else None
        patience = {} if options.get(RETRY) is not None else {**PATIENCE, "max_retries": _retries(self)}
        settings = {**patience, "name": f"{self.name}.compensation", **options}
        # Retries come from autoretry_for, which takes its limit from retry_kwargs or the task's max_retries.
        task = known if known is not None else self.app.task(fun, shared=False, **settings)
        _wrap(task, functools.partial(_undo, self.app))
        type(self).compensation_task = task
        return task

    def confirm(self, fun: Function) -> Function:
        """Name the function that asks the outside world whether the effect of a call took place.

        It is called with the call's idempotency key (the step's id, ``self.request.id`` in each attempt), then with the
        arguments of the task: before the task is called again, when an attempt at the step has ended without being
        recorded as a success, and before such a step is undone.  It returns what the task would have returned, which is
        recorded in its place; or :data:`byrd.NOT_DONE`, or False, which says the same: the effect did not take place.
        Any other value, None and True included, says that it did.
        """
        if self.confirm_function is not None:
            raise ConfigurationError(f"{self.name} has a confirm already: {self.confirm_function!r}")
        _wrap(self, functools.partial(_do, fun))
        type(self).confirm_function = staticmethod(fun)
        return fun


def current_compensation() -> Compensation | None:
    """Return what the compensation that this thread runs undoes, and why; None where none is run."""
    attempt = current_attempt()
    return attempt.undoes if attempt is not None else None


def _retries(task: Any) -> int:
    """Return how often the compensation of a task is retried, unless its options say so.

    More often than the task itself; but where that has no limit, somebody is to learn that the rollback is stuck.
    """
    policy = getattr(task, RETRY, None)
    if isinstance(policy, Retry):
        most = policy.max_attempts - 1 if policy.max_attempts is not None else None
    else:
        most = (getattr(task, "retry_kwargs", None) or {}).get("max_retries", task.max_retries)
    return max(int(PATIENCE["max_retries"]), 2 * (most or 0))


def _wrap(task: Any, around: Callable[..., Any]) -> None:
    """Have the task's function called by ``around(attempt, function, args, kwargs)``, once, where it is a step."""
    # Where Celery retries some errors by itself, it calls this one inside.
    name = "_orig_run" if hasattr(task, "_orig_run") else "run"
    plain = getattr(task, name)

    @functools.wraps(plain)
    def run(*args: Any, **kwargs: Any) -> Any:
        attempt = attempt_of(task.request)
        return plain(*args, **kwargs) if attempt is None else around(attempt, plain, args, kwargs)

    setattr(task, name, run)


def _do(confirm: Callable[..., Any], attempt: Attempt, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a task, unless an earlier attempt had its effect already."""
    if attempt.number > 1 and attempt.undoes is None:
        found = confirm(attempt.step_id, *args, **kwargs)
        if _took_effect(found):
            return found
    return plain(*args, **kwargs)


def _undo(app: Any, attempt: Attempt, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a compensation, unless there is nothing to undo."""
    undoes = attempt.undoes
    if undoes is None or undoes.known:
        return plain(*args, **kwargs)
    # A task that this worker does not know is a KeyError: to be tried again by one that does, not to be guessed.
    confirm = getattr(app.tasks[undoes.task], "confirm_function", None)
    if confirm is None:
        return plain(*args, **kwargs)
    found = confirm(undoes.step_id, *args[1:], **kwargs)
    if not _took_effect(found):
        return None
    attempt.undoes = replace(undoes, known=True)
    return plain(found, *args[1:], **kwargs)


def _took_effect(found: Any) -> bool:
    """Tell what a ``confirm`` has said.  Many a one ends in ``return client.exists(key)``: False is meant as no."""
    return found is not NOT_DONE and found is not False
