"""Several operations inside one task, of which all are done or none: each names what undoes it."""

from __future__ import annotations

from collections.abc import Callable
from traceback import format_exception
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from celery.exceptions import Ignore, Reject, Retry

from byrd.errors import CheckpointError, CompoundError, RetryLater
from byrd.store import progress
from byrd.task import limited, retries
from byrd.task.attempt import Attempt, attempt_of, encoded, text_of, to_json
from byrd.task.durable import DurableTask
from byrd.task.values import loads

T = TypeVar("T")

#: So often an undo that fails is tried, and after pauses that grow to this.
PATIENCE = 10
_LONGEST_PAUSE_SECONDS = 300.0
#: So many characters of a traceback are recorded, the last.
_MOST_TRACEBACK = 20_000
#: What is on record of a block besides its operations, whose names are the user's: why it is undone, and of which
#: operations; that it is undone; how many tries of an undo have failed; and how often it was begun anew.
_FAILED, _UNDONE, _TRIES, _ROUND = ":failed", ":undone", ":tries", ":round"


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
        #: How often the block was begun, a new round after each time that it was undone.
        self._round = 1
        #: Why an earlier attempt began to undo: this one goes on with that, and does nothing more.
        self._failure: BaseException | None = None
        #: The operations that had been done by then.
        self._to_undo: list[str] = []

    @property
    def key(self) -> str:
        """An idempotency key for whoever is asked to do an operation, with the operation's name, say.

        It is the same in each attempt at the step, until the block has been undone and is begun anew.
        """
        return f"{self._attempt.step_id}:{self._name}:{self._round}"

    def do(self, name: str, fn: Callable[..., T], *args: Any, undo: Callable[..., Any], **kwargs: Any) -> T:
        """Call ``fn(*args, **kwargs)`` once, and return its value (JSON), which is recorded.

        ``undo(value, *args, **kwargs)`` is called when a later operation, or anything else in the block, raises.
        ``name`` tells the operation from the others of its block.
        """
        if name in self._names:
            raise CheckpointError(f"step {self._attempt.step_id}: {self._name} has two operations called {name!r}")
        self._names.add(name)
        found = self._remembered(name)
        if found is None:
            if self._failure is not None:
                raise self._failure
            found = encoded(self._attempt, fn(*args, **kwargs), f"the value of {name!r}")
            self._remember(name, found)
        value: T = loads(found)
        self._done.append(_Done(name, undo, value, args, kwargs))
        return value

    def __enter__(self) -> Self:
        first = self._key(_ROUND)
        self._round = int(self._store.run(progress.remembered, self._attempt.step_id, first) or 1)
        failed = self._remembered(_FAILED)
        if failed is not None and self._store.run(progress.outlived, self._attempt.step_id, self._key(_UNDONE)):
            # It was undone, and then the attempt ended with that.  Not if the task has gone on another way instead, and
            # has something on record of that: then it goes there again.
            self._round += 1
            self._store.run(progress.remember, self._attempt.step_id, self._attempt.number, first, str(self._round))
            failed = None
        if failed is not None:
            error, self._to_undo = loads(failed)
            self._failure = self._decoded(error)
        return self

    def __exit__(self, _type: object, exc: BaseException | None, _traceback: TracebackType | None) -> None:
        if exc is None and self._failure is not None:  # the code has changed, or does not do the same each time
            self._undo()
            raise self._failure
        if not isinstance(exc, Exception):
            return
        if exc is not self._failure:
            if self._only_postpones(exc):
                return
            if self._failure is None:
                where = "".join(format_exception(exc))[-_MOST_TRACEBACK:]
                error = self._attempt.runtime.app.backend.encoded_error(exc, where)
                self._to_undo = [done.name for done in self._done]
                self._remember(_FAILED, to_json([error, self._to_undo]))
        self._undo()

    def _only_postpones(self, exc: Exception) -> bool:
        """Tell whether an exception is no failure, but ends this attempt: the next one goes on here."""
        if isinstance(exc, RetryLater):
            # Whether it is tried again is decided here, once: a budget may be over a moment later.
            again = retries.asked_for(self._attempt, exc)
            if again is not None:
                raise again from exc
        return isinstance(exc, Retry | Ignore | Reject) or limited.wants_pause(self._task, exc)

    def _undo(self) -> None:
        """Undo what was done, the last first; each once, as recorded."""
        for done in reversed(self._done):
            key = f":undo {done.name}"
            if self._remembered(key) is None:
                try:
                    done.undo(done.value, *done.args, **done.kwargs)
                except Exception as exc:
                    if limited.wants_pause(self._task, exc):
                        raise
                    self._try_again(done, exc)  # whatever it is, the rest is not forgotten
                self._remember(key, "true")
        if self._names.issuperset(self._to_undo):  # else something else was raised before this attempt came to them all
            self._store.run(progress.conclude, self._attempt.step_id, self._attempt.number, self._key(_UNDONE))

    def _try_again(self, done: _Done, exc: Exception) -> None:
        tries = int(self._remembered(_TRIES) or 0) + 1
        if tries >= PATIENCE:
            left = [one.name for one in self._done if self._remembered(f":undo {one.name}") is None]
            raise CompoundError(
                f"step {self._attempt.step_id}: {done.name!r} could not be undone in {tries} tries, the last time: "
                f"{text_of(exc)}; still done are {', '.join(map(repr, left))}: undo them by hand"
            ) from exc
        self._remember(_TRIES, str(tries))
        pause = min(_LONGEST_PAUSE_SECONDS, 2.0 ** (tries - 1))
        most = self._task.request.retries + 1
        raise self._task.retry(exc=exc, countdown=pause, max_retries=most) from exc

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
        anew = f" ({self._round})" if self._round > 1 else ""
        return f"step:{self._name}{anew}: {name}"


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
        the step fails with :class:`CompoundError`.  What ends the attempt otherwise undoes nothing: a cancel at a
        checkpoint, ``self.retry``, :class:`RetryLater`, :class:`LimitedError` say.  When the step is tried again after
        its failure, by whomever, a block that was undone begins anew.  ``name`` tells it from others of the task.
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
