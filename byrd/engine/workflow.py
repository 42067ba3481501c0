"""A workflow: a named function that returns a canvas."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from byrd.policies import Retry

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

    def __repr__(self) -> str:
        return f"<Workflow {self.name!r}>"
