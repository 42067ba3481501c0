"""SagaTask: a step that can be undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Task

from byrd.errors import ConfigurationError
from byrd.policies import RETRY
from byrd.task.durable import DurableTask

#: A compensation is more patient than the step that it undoes: the world should end up whole.
_PATIENCE = {"max_retries": 10, "retry_backoff": True, "retry_backoff_max": 300, "autoretry_for": (Exception,)}


class SagaTask(DurableTask):
    """Base of tasks that name their compensation::

        @app.task(base=byrd.SagaTask)
        def reserve(room): ...

        @reserve.compensation
        def release(reservation, room): ...

    When a run fails, or is cancelled with ``compensate=True``, the compensations of its completed saga steps run in
    reverse order of completion, one after another, each with the step's recorded result and its arguments.  A
    compensation is a Celery task of its own, ``<task>.compensation``, and a step of the run: retried (ten times with
    growing pauses, unless its options say otherwise), recorded, shown.
    """

    abstract = True
    #: The Celery task that undoes this one.
    compensation_task: Task | None = None

    def compensation(self, fun: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Name the function that undoes this task: called with the step's result, then with the step's arguments.

        ``options`` are Celery task options: ``max_retries``, ``queue``, ``time_limit``, ...; or Byrd's own: a retry
        policy, ``byrd_retry``, takes the place of the ten retries.
        """
        if fun is None:
            return lambda fun: self.compensation(fun, **options)
        if self.compensation_task is not None:
            raise ConfigurationError(f"{self.name} has a compensation already: {self.compensation_task.name}")
        known = fun if isinstance(fun, Task) else None
        patience = {} if options.get(RETRY) is not None else _PATIENCE
        settings = {**patience, "name": f"{self.name}.compensation", **options}
        # Retries come from autoretry_for, which takes its limit from retry_kwargs or the task's max_retries.
        task = known if known is not None else self.app.task(fun, shared=False, **settings)
        type(self).compensation_task = task
        return task
