"""Several operations inside one task, of which all are done or none: each names what undoes it."""

from __future__ import annotations

from collections.abc import Callable
from traceback import format_exception
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from celery.exceptions import Ignore, Reject, Retry

from byrd.errors import CheckpointError, CompoundError
from byrd.store import progress
from byrd.task.attempt import Attempt, attempt_of, encoded, text_of
from byrd.task.durable import DurableTask
from byrd.task.values import loads

T = TypeVar("T")

#: So often an undo that fails is tried, and after pauses that grow to this.
PATIENCE = 10
_LONGEST_PAUSE_SECONDS = 300.0


class _Done(NamedTuple):
    name: str
    undo: Callable[..., Any]
    value: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Compound:
    """What ``with self.compound() as op`` gives: see :meth:`CompoundTask.compound`."""

    def __init__(self, task: Any, attempt: Attempt, name: str) -> None:
        self._task, self._attempt, self._name = task, attempt, name
        self._store = attempt.runtime.patient_store
        self._done: list[_Done] = []
        self._names: set[str] = set()
        #: Why an earlier attempt began to undo: this one goes on with that, and does nothing more.
        self._failure: str | None = None

    def do(self, name: str, fn: Callable[..., T], *args: Any, undo: Callable[..., Any], **kwargs: Any) -> T:
        """Call ``fn(*args, **kwargs)`` once in the step's life, and return its value (JSON), which is recorded.

        ``undo(value, *args, **kwargs)`` is called when a later operation, or anything else in the block, raises.
        ``name`` tells the operation from the others of its block.
        """
        if name in self._names:
            raise CheckpointError(f"step {self._attempt.step_id}: {self._name} has two operations called {name!r}")
        self._names.add(name)
        found = self._remembered(name)
        if found is None:
            if self._failure is not None:
                raise self._decoded(self._failure)
            found = encoded(self._attempt, fn(*args, **kwargs), f"the value of {name!r}")
            self._remember(name, found)
        value: T = loads(found)
        self._done.append(_Done(name, undo, value, args, kwargs))
        return value

    def __enter__(self) -> Self:
        self._failure = self._remembered("failed")
        return self

    def __exit__(self, _type: object, exc: BaseException | None, _traceback: TracebackType | None) -> None:
        if exc is None and self._failure is not None:  # the code has changed, or does not do the same each time
            exc = self._decoded(self._failure)
            self._undo()
            raise exc
        # What only ends this attempt is no failure: the next one goes on here.
        if isinstance(exc, Exception) and not isinstance(exc, Retry | Ignore | Reject):
            if self._failure is None:
                where = "".join(format_exception(exc))
                self._remember("failed", self._attempt.runtime.app.backend.encoded_error(exc, where))
            self._undo()

    def _undo(self) -> None:
        """Undo what was done, the last first; each once, as recorded."""
        for done in reversed(self._done):
            key = f"undo {done.name}"
            if self._remembered(key) is None:
                try:
                    done.undo(done.value, *done.args, **done.kwargs)
                except Exception as exc:  # noqa: BLE001 - whatever it is, the rest is not forgotten
                    self._try_again(done, exc)
                self._remember(key, "true")

    def _try_again(self, done: _Done, exc: Exception) -> None:
        tries = int(self._remembered("tries") or 0) + 1
        if tries >= PATIENCE:
            left = [one.name for one in self._done if self._remembered(f"undo {one.name}") is None]
            raise CompoundError(
                f"step {self._attempt.step_id}: {done.name!r} could not be undone in {tries} tries, the last time: "
                f"{text_of(exc)}; still done are {', '.join(map(repr, left))}: undo them by hand"
            ) from exc
        self._remember("tries", str(tries))
        pause = min(_LONGEST_PAUSE_SECONDS, 2.0 ** (tries - 1))
        retries = self._task.request.retries
        raise self._task.retry(exc=exc, countdown=pause, max_retries=retries + 1) from exc

    def _decoded(self, error: str) -> BaseException:
        found, where = self._attempt.runtime.app.backend.decoded_error(error)
        exc = found if isinstance(found, BaseException) else CompoundError(str(found))
        if where:  # or the history would show this attempt's traceback only, which says nothing of the cause
            exc.add_note(f"An earlier attempt had left the block {self._name!r} because of this:\n{where}")
        return exc

    def _remembered(self, name: str) -> str | None:
        return self._store.run(progress.remembered, self._attempt.step_id, self._key(name))

    def _remember(self, name: str, value: str) -> None:
        self._store.run(progress.remember, self._attempt.step_id, self._attempt.number, self._key(name), value)

    def _key(self, name: str) -> str:
        return f"step:{self._name}: {name}"


class CompoundTask(DurableTask):
    """Base of tasks that do several things of which all are to be done, or none."""

    abstract = True

    def compound(self, name: str = "compound") -> Compound:
        """Return a block of operations that are undone, the last first, when the block is left by an ``Exception``::

            with self.compound() as op:
                page = op.do("page", create_page, title, undo=delete_page)
                op.do("menu", add_to_menu, page, undo=remove_from_menu)

        Each operation, and each undo, is recorded when it is done, so an attempt after a crash does neither again, but
        goes on: forward, or with the undoing if that had begun.  What dies between its effect and its record is done
        once more.  An undo that fails is tried again, after growing pauses; at the tenth try that fails in the block
        the step fails with :class:`CompoundError`.  What ends the task otherwise, a cancel at a checkpoint say, undoes
        nothing.  ``name`` tells this block from others of the task.
        """
        attempt = self._attempt()
        return Compound(self, attempt, name)

    def _attempt(self) -> Attempt:
        attempt = attempt_of(self.request)
        if attempt is None:
            raise CheckpointError(
                f"{self.name} saves its progress as a step of a run: submit it with engine.submit({self.name}.s(...))"
            )
        return attempt
