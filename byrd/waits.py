"""Sleeps and waits for signals as parts of a canvas: ordinary signatures, of two tasks that no worker ever runs.  Pure.

A compiled plan has a step of kind *wait* for each: it is ended by its time or its signal, in Postgres, and holds no
worker and no message meanwhile.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from celery import Celery, Task
from celery.canvas import Signature

from byrd.errors import CanvasError, WaitOutsideRunError

SLEEP = "byrd.sleep"
WAIT_FOR = "byrd.wait_for"
#: The task that stands for a workflow in a canvas, and gives its slot back while its run is under way.
SUBWORKFLOW = "byrd.workflow"
#: Among the keyword arguments of that task, which are the workflow's own otherwise.
WORKFLOW_NAME = "byrd_workflow"
#: The task that has such a run rolled back: the compensation of the step.
UNDO_SUBWORKFLOW = "byrd.workflow.compensation"
#: What a signal may be called; ``byrd.signal`` in the database says the same.
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,200}")
_MOST_SECONDS = 1e9
_MOST_OF = 200
#: What is in no name of a person: control characters, halves of surrogate pairs, ends of lines and paragraphs.
_NOT_IN_OF = frozenset({"Cc", "Cs", "Zl", "Zp"})


class _NotGiven:
    """Tells no default from ``default=None``."""

    def __repr__(self) -> str:
        return "(none)"


NOT_GIVEN: Final = _NotGiven()


def sleep(seconds: float | timedelta | None = None, *, until: datetime | None = None) -> Signature:
    """Return a canvas part that lets time pass, and hands on the value that it is given.

    ``chain(a.s(), byrd.sleep(60), b.s())``: a minute after ``a`` has succeeded, ``b`` is called with its value.
    ``seconds``: from the moment when the sleep begins.  ``until``: a time of day; one that is past is no sleep at all,
    one without a time zone is UTC.  One of the two.

    Raises :class:`CanvasError` for what is no time.
    """
    if (seconds is None) == (until is None):
        raise CanvasError("byrd.sleep takes a number of seconds, or until=: one of the two")
    if until is None:
        return Signature(SLEEP, kwargs={"seconds": _seconds(seconds, "byrd.sleep")})
    return Signature(SLEEP, kwargs={"until": _moment(until).isoformat()})


def wait_for(
    signal: str,
    *,
    of: str | None = None,
    timeout: float | timedelta | None = None,
    default: Any = NOT_GIVEN,
) -> Signature:
    """Return a canvas part that waits for a signal, and has its payload as its value.

    The value of what comes before is not handed on: whoever needs both asks a :class:`CheckpointTask`, or takes them
    from a group.  A signal that came before the wait began was kept for it.
    ``of``: who is to answer, a person, a role or a system, in 1 to 200 characters.  It is for lists and sentences, such
    as those of ``byrd waiting``: whoever sends the signal ends the wait.
    ``timeout``: seconds from the moment when the wait begins; None waits as long as the run may take.
    ``default``: the value when no signal came in time; without one the step fails with :class:`SignalTimeoutError`.

    Raises :class:`CanvasError` for what is no name of a signal, names nobody, or is no time.
    """
    kwargs: dict[str, Any] = {"signal": checked_name(signal)}
    if of is not None:
        kwargs["of"] = checked_of(of)
    if timeout is not None:
        kwargs["timeout"] = _seconds(timeout, f"byrd.wait_for({signal!r}), timeout")
    if default is not NOT_GIVEN:
        if timeout is None:
            raise CanvasError(f"byrd.wait_for({signal!r}): a default needs a timeout, after which it is the value")
        kwargs["default"] = default
    return Signature(WAIT_FOR, kwargs=kwargs)


def checked_name(name: Any) -> str:
    """Return the name of a signal; raise :class:`CanvasError` for what cannot be one."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CanvasError(f"the name of a signal is 1 to 200 letters, digits or any of . : - / _, not {name!r:.80}")
    return name


def checked_pattern(pattern: Any) -> str:
    """Return the name of a signal, or the beginning of one with a ``*`` after it; raise :class:`CanvasError`."""
    if pattern != "*":
        checked_name(pattern.removesuffix("*") if isinstance(pattern, str) else pattern)
    return str(pattern)


def checked_of(of: Any) -> str:
    """Return who is to answer; raise :class:`CanvasError` for what names nobody."""
    if not isinstance(of, str) or not of.strip() or len(of) > _MOST_OF:
        raise CanvasError(f"of= says who is to answer, in 1 to {_MOST_OF} characters, not {of!r:.80}")
    if wrong := next((char for char in of if unicodedata.category(char) in _NOT_IN_OF), None):
        raise CanvasError(f"of= says who is to answer, in printable characters: {wrong!r} in {of!r:.80} is none")
    return "".join(of)  # a plain string, of a member of an enum too


def of_whom(of: str | None) -> str:
    """Return what is said after the name of a signal: " of finance", or nothing when nobody is named."""
    return f" of {of}" if of is not None else ""


@dataclass(frozen=True, slots=True)
class Wait:
    """What a part of a canvas waits for: a time (``seconds`` or ``until``), or ``signal``, for no longer than that.

    ``of``: who is to send the signal, if that is said.
    """

    seconds: float | None = None
    until: datetime | None = None
    signal: str | None = None
    of: str | None = None
    default: Any = NOT_GIVEN


def is_wait(sig: Signature) -> bool:
    """Tell whether a signature is a sleep, or waits for a signal: its clones are known by the task's name only."""
    return sig.task in (SLEEP, WAIT_FOR)


def wait_of(sig: Signature) -> Wait:
    """Return what a signature says; it may have been through JSON, or written by hand."""
    said: Mapping[str, Any] = sig.kwargs
    allowed = {"seconds", "until"} if sig.task == SLEEP else {"signal", "of", "timeout", "default"}
    if unknown := sorted(said.keys() - allowed):
        raise CanvasError(f"{sig.task} takes no argument {unknown[0]!r}")
    made = sleep(said.get("seconds"), until=_parsed(said.get("until"))) if sig.task == SLEEP else _wait_for(said)
    told = made.kwargs
    return Wait(
        seconds=told.get("seconds", told.get("timeout")),
        until=_parsed(told.get("until")),
        signal=told.get("signal"),
        of=told.get("of"),
        default=told.get("default", NOT_GIVEN),
    )


def _wait_for(said: Mapping[str, Any]) -> Signature:
    return wait_for(
        said.get("signal", ""),
        of=said.get("of"),
        timeout=said.get("timeout"),
        default=said.get("default", NOT_GIVEN),
    )


def add_tasks(app: Celery) -> None:
    """Register the two tasks, so that Celery knows them by name; each says that it must not be called as one."""
    for name in (SLEEP, WAIT_FOR):
        app.task(_refuse, name=name, base=_WaitTask, bind=True, shared=False, typing=False)


class _WaitTask(Task):
    """A task that exists in name only."""

    abstract = True

    def apply_async(self, *args: Any, **options: Any) -> Any:
        """Refuse what the caller can still put right; within a canvas that runs already the task itself fails."""
        if self.app.current_worker_task is None:
            raise _outside(self.name)
        return super().apply_async(*args, **options)


def _refuse(self: Task, *_args: Any, **_kwargs: Any) -> None:
    raise _outside(self.name)


def _outside(name: str) -> WaitOutsideRunError:
    return WaitOutsideRunError(
        f"{name} waits in Postgres, as a step of a run: submit the canvas with engine.submit(...) instead of calling it"
    )


def _seconds(value: Any, what: str) -> float:
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CanvasError(f"{what}: {value!r} is no number of seconds")
    if not 0 <= value < _MOST_SECONDS:
        raise CanvasError(f"{what}: {value!r} seconds are out of range (0 to {_MOST_SECONDS:,.0f})")
    return float(value)


def _moment(value: Any) -> datetime:
    if not isinstance(value, datetime):
        raise CanvasError(f"byrd.sleep: until={value!r} is no datetime")
    # A moment without a time zone is UTC, as that of Celery's eta.
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        raise CanvasError(f"byrd.sleep: until={value!r} is no ISO 8601 date and time") from None
