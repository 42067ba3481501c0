"""A workflow: a named function that returns a canvas."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from celery.canvas import Signature

from byrd.policies import Retry
from byrd.waits import SUBWORKFLOW, WORKFLOW_NAME

if TYPE_CHECKING:
    from byrd.engine.engine import Byrd
    from byrd.engine.run import Run

P = ParamSpec("P")
R = TypeVar("R")


class Workflow(Generic[P, R]):
    """What ``@engine.workflow("name")`` returns: call it for the canvas, ``submit`` it for a run."""

    def __init__(
        self, engine: Byrd, name: str, build: Callable[P, R], timeout: float | None, retry: Retry | None = None
    ) -> None:
        self.engine = engine
        self.name = name
        self.build = build
        self.timeout = timeout
        self.retry = retry
        self.__doc__ = build.__doc__
        self.__wrapped__ = build

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the canvas."""
        return self.build(*args, **kwargs)

    def submit(self, *args: Any, key: str | None = None, connection: Any = None, **kwargs: Any) -> Run:
        """Submit a run, as :meth:`Byrd.submit` does."""
        return self.engine.submit(self.name, *args, key=key, connection=connection, **kwargs)

    def s(self, *args: Any, **kwargs: Any) -> Signature:
        """Return the workflow as a part of a canvas: a step, which begins a run of it and has its value.

        What comes before it in a chain is its first argument.  The step holds no worker while its run is under way; if
        that fails, the step fails with its error, and if the outer run is cancelled, so is that.
        """
        return self.engine.app.signature(SUBWORKFLOW, args=args, kwargs={**kwargs, WORKFLOW_NAME: self.name})

    def si(self, *args: Any, **kwargs: Any) -> Signature:
        """The same, but what comes before it is no argument."""
        return self.s(*args, **kwargs).set(immutable=True)

    def __repr__(self) -> str:
        return f"<Workflow {self.name!r}>"
