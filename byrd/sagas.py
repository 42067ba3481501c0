"""Sagas as parts of a canvas: ordinary signatures, of a task that no worker ever runs.  Pure.

A compiled plan has a step of kind *saga* for each: its value is that of the canvas inside it, and it fails only once
what that canvas had completed is undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from celery import Celery, Task, chain
from celery.canvas import Signature

from byrd.errors import CanvasError, SagaOutsideRunError

SAGA = "byrd.saga"
#: What the task ``byrd.saga`` is given: the canvas.
_BODY = "canvas"


class _NotDone:
    """What a task's ``confirm`` returns, or False, when the effect did not take place; there is one."""

    def __repr__(self) -> str:
        return "byrd.NOT_DONE"

    def __bool__(self) -> bool:
        return False


NOT_DONE: Final = _NotDone()


def saga(*parts: Any) -> Signature:
    """Return a canvas part whose completed steps are undone when one of its steps fails for good.

    ``byrd.saga(book_hotel.s("Rome"), group(book_car.s(), book_flight.s()))``: several parts are a chain.  It has the
    canvas's value, and may stand wherever a signature may, in chains, groups and chords, and in other sagas.  When a
    step in it fails, what has not started there never will, what runs is told to stop, the completed saga steps are
    undone, and then the part fails with that step's error.  When it succeeded and what is around it fails, it is
    undone as a part of that.

    Raises :class:`CanvasError` for no parts, and for what is no canvas.
    """
    if not parts:
        raise CanvasError("byrd.saga takes the parts of a canvas: one, or several that follow each other")
    for part in parts:
        if not isinstance(part, Signature) and not (isinstance(part, Mapping) and "task" in part):
            raise CanvasError(
                f"byrd.saga: {part!r:.80} is no part of a canvas: give it signatures, chains, groups, ..."
            )
    signatures = [part if isinstance(part, Signature) else Signature.from_dict(dict(part)) for part in parts]
    return Signature(SAGA, kwargs={_BODY: signatures[0] if len(signatures) == 1 else chain(*signatures)})


def is_saga(sig: Signature) -> bool:
    """Tell whether a signature is a saga: its clones are known by the task's name only."""
    return bool(sig.task == SAGA)


def body_of(sig: Signature) -> Any:
    """Return the canvas inside a saga; it may have been through JSON, or written by hand."""
    body = sig.kwargs.get(_BODY)
    if unknown := sorted(sig.kwargs.keys() - {_BODY}):
        raise CanvasError(f"{SAGA} takes no argument {unknown[0]!r}")
    if body is None:
        raise CanvasError(f"a {SAGA} without a canvas cannot be submitted; make it with byrd.saga(...)")
    return body


def add_task(app: Celery) -> None:
    """Register the task, so that Celery knows it by name; it says that it must not be called as one."""
    app.task(_refuse, name=SAGA, base=_SagaPart, bind=True, shared=False, typing=False)


class _SagaPart(Task):
    """A task that exists in name only."""

    abstract = True

    def apply_async(self, *args: Any, **options: Any) -> Any:
        """Refuse what the caller can still put right; within a canvas that runs already the task itself fails."""
        if self.app.current_worker_task is None:
            raise _outside()
        return super().apply_async(*args, **options)


def _refuse(_self: Task, *_args: Any, **_kwargs: Any) -> None:
    raise _outside()


def _outside() -> SagaOutsideRunError:
    return SagaOutsideRunError(
        f"{SAGA} is a part of a run: submit the canvas with engine.submit(...) instead of calling it"
    )
