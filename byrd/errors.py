"""The error tree.  Each class's docstring says what happened; the message says to which run or step.

::

    ByrdError
    ├── ConfigurationError        Byrd cannot work with this set-up
    │   ├── UnsafeSettingError    a Celery setting would lose work
    │   ├── TaskOverrideError     a task class overrides what Byrd needs
    │   ├── LimitError            what is declared, or set, cannot be a limit
    │   ├── RetryPolicyError      what is declared cannot be a retry policy
    │   └── TimeoutPolicyError    what is declared cannot be a step's time-outs
    ├── NotLiveError              the service refuses work for now
    │   ├── NotMigratedError      the tables are missing or old
    │   ├── ShuttingDownError     this engine was closed
    │   └── StoreUnavailableError Postgres does not answer
    ├── SubmitError               what was submitted cannot be run; nothing was written
    │   ├── CanvasError           the canvas cannot be compiled to a plan
    │   ├── UnknownTaskError      a task that this app does not know
    │   ├── UnknownWorkflowError  a workflow that this app does not know
    │   ├── ArgumentError         an argument that JSON or the task cannot take
    │   ├── CompensationError     a saga step that does not say how it is undone
    │   └── DuplicateStepError    a task id that is in use already
    ├── RunNotFoundError          no run has this id
    ├── IllegalTransitionError    the run's status does not allow that
    ├── CheckpointError           a checkpoint that cannot be saved
    ├── CompoundError             operations within a task that could not be undone
    ├── SignalTimeoutError        a signal did not come in time
    ├── WaitOutsideRunError       a sleep or a wait that is no step of a run
    ├── SubWorkflowError          a workflow within a run was cancelled, is not undone, or was called outside one
    ├── SagaOutsideRunError       a saga that is no part of a run
    ├── EachError                 an each cannot go over its items, or hand on their values
    │   └── EachToleranceError    more of its items failed than it tolerates
    ├── LimitKeyError             a call has no key for the limit of its task
    ├── LimitNotFoundError        no limit has this name
    ├── LimitedError              raised by a task: the other side wants a pause
    ├── RetryLater                raised by a task: try again, after this pause
    ├── StepLostError             a step was preempted too often
    ├── StepTimeoutError          a step took too long
    │   ├── StartToCloseTimeoutError    an attempt ran for too long
    │   ├── ScheduleToStartTimeoutError a step was ready for too long without being started
    │   └── HeartbeatTimeoutError       an attempt gave no sign of life for too long
    ├── RunTimeoutError           a run did not end before its deadline
    └── EmbeddedServerError       an embedded server did not start

    ControlFlow (BaseException: no ``except Exception`` in a task swallows it)
    ├── StaleAttempt              another attempt owns the step now
    ├── StepCancelled             the run is being cancelled, or the step's saga has failed
    └── StepHandedBack            the worker is shutting down, or the run is paused
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

_LONGEST_PAUSE_SECONDS = 1e8
#: For how long a key is parked when the other side wants a pause and does not say, or not legibly, how long.
_UNKNOWN_PAUSE_SECONDS = 30.0
#: A key is parked for so long at least: its pauses cost no retry, and a host that says 0 is not to be called in a loop.
_LEAST_PARKED_SECONDS = 1.0
_SECONDS = re.compile(r"[0-9]+(\.[0-9]*)?")


class ByrdError(Exception):
    """Base of every error that Byrd raises."""


class ConfigurationError(ByrdError):
    """Byrd cannot work with this set-up."""


class UnsafeSettingError(ConfigurationError):
    """A Celery setting would lose work."""


class TaskOverrideError(ConfigurationError):
    """A task class overrides what Byrd needs."""


class LimitError(ConfigurationError):
    """What is declared, or set, cannot be a limit."""


class RetryPolicyError(ConfigurationError):
    """What is declared cannot be a retry policy."""


class TimeoutPolicyError(ConfigurationError):
    """What is declared cannot be a step's time-outs."""


class NotLiveError(ByrdError):
    """The service refuses work for now."""


class NotMigratedError(NotLiveError):
    """Byrd's tables are missing or of another version."""


class ShuttingDownError(NotLiveError):
    """This engine was closed."""


class StoreUnavailableError(NotLiveError):
    """Postgres does not answer."""


class SubmitError(ByrdError):
    """What was submitted cannot be run; nothing was written."""


class CanvasError(SubmitError):
    """The canvas cannot be compiled to a plan."""


class UnknownTaskError(SubmitError):
    """The canvas names a task that this app does not know."""


class UnknownWorkflowError(SubmitError):
    """No workflow of this name is registered in this app."""


class ArgumentError(SubmitError):
    """An argument that JSON cannot hold, or that the task cannot take."""


class CompensationError(SubmitError):
    """A saga task has no compensation, and does not say that it needs none; or a map calls it, which nothing undoes."""


class DuplicateStepError(SubmitError):
    """The canvas carries a task id that another step has already."""


class RunNotFoundError(ByrdError):
    """No run has this id."""


class IllegalTransitionError(ByrdError):
    """The run's status does not allow what was asked."""


class CheckpointError(ByrdError):
    """A checkpoint that cannot be saved."""


class CompoundError(ByrdError):
    """An operation of ``self.compound()`` could not be undone."""


class SignalTimeoutError(ByrdError):
    """The signal that a step waited for did not come in time, and no default was given."""


class WaitOutsideRunError(ByrdError):
    """``byrd.sleep`` or ``byrd.wait_for`` was called as a task, outside a run."""


class SubWorkflowError(ByrdError):
    """A workflow that is a step of another was cancelled, is not undone, or was called where there is no run."""


class SagaOutsideRunError(ByrdError):
    """``byrd.saga`` was called as a task, outside a run."""


class EachError(ByrdError):
    """``byrd.each`` cannot go over its items, or cannot hand on their values, or was called outside a run."""


class EachToleranceError(EachError):
    """More items of a ``byrd.each`` have failed than it tolerates."""


class LimitKeyError(ByrdError):
    """A call has no key for the limit of its task: the step fails without being called."""


class LimitNotFoundError(ByrdError):
    """No limit has this name."""


class LimitedError(ByrdError):
    """Raised by a task whose limit is another's, too, which wants a pause: HTTP status 429, ``Retry-After``.

    The step is tried again after ``retry_after``, which costs it no retry, and until then no other step of the same key
    starts, in whatever run.

    ``retry_after``: seconds, a timedelta, or the text of the header, which is seconds or a date, by this machine's
    clock.  None, and text that says no time, are 30 s: the pause was asked for, and the step is not to fail because of
    how.  What is less than a second, or a date that is past, is one second.  Raises ValueError for a number that is no
    pause.  The attribute is in seconds.
    """

    def __init__(self, message: str = "", *, retry_after: float | timedelta | str | None = None) -> None:
        pause = _pause_given(retry_after)
        self.retry_after: float = _UNKNOWN_PAUSE_SECONDS if pause is None else max(_LEAST_PARKED_SECONDS, pause)
        super().__init__(message or f"to be tried again after {self.retry_after:g} s")

    def __reduce__(self) -> tuple[object, ...]:
        return _limited, (str(self), self.retry_after)


def _limited(message: str, retry_after: float) -> LimitedError:
    return LimitedError(message, retry_after=retry_after)


class RetryLater(ByrdError):
    """Raised by a task that has a retry policy: try again after ``retry_after``, whatever the policy's pause.

    It counts as an attempt.  Any exception with an attribute ``retry_after`` does the same.

    ``retry_after``: as of :class:`LimitedError`, from 0; but None, and text that says no time, leave the pause to the
    policy, and are None as the attribute.
    """

    def __init__(self, retry_after: float | timedelta | str | None, message: str = "") -> None:
        self.retry_after: float | None = _pause_given(retry_after)
        # What it is made of anew, from JSON: a date would be another pause by then.
        super().__init__(self.retry_after, *([message] if message else []))

    def __str__(self) -> str:
        if len(self.args) > 1:
            return str(self.args[1])
        return "to be tried again" + ("" if self.retry_after is None else f" after {self.retry_after:g} s")


def pause_of(found: Any) -> float | None:
    """Return a pause in seconds: of a number of them, a timedelta, or the text of ``Retry-After``; None: it is none."""
    if isinstance(found, str):
        return _pause_of_header(found.strip())
    if isinstance(found, timedelta):
        found = found.total_seconds()
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= _LONGEST_PAUSE_SECONDS:
        return None  # so is NaN
    return float(found)


def _pause_given(retry_after: Any) -> float | None:
    pause = pause_of(retry_after)
    if pause is None and retry_after is not None and not isinstance(retry_after, str):
        raise ValueError(f"retry_after={retry_after!r} is no number of seconds")
    return pause


def _pause_of_header(text: str) -> float | None:
    """Return the seconds that the text of a ``Retry-After`` says: from 0, for a date that is past, to 1e8."""
    if _SECONDS.fullmatch(text):
        return min(float(text), _LONGEST_PAUSE_SECONDS)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if moment.tzinfo is None:  # asctime's form of it
        moment = moment.replace(tzinfo=UTC)
    return min(max(0.0, (moment - datetime.now(UTC)).total_seconds()), _LONGEST_PAUSE_SECONDS)


class StepLostError(ByrdError):
    """The step's worker was lost too often while it ran."""


class StepTimeoutError(ByrdError):
    """The step took too long."""


class StartToCloseTimeoutError(StepTimeoutError):
    """An attempt ran for longer than its ``start_to_close``, and was ended."""


class ScheduleToStartTimeoutError(StepTimeoutError):
    """The step was ready for longer than its ``schedule_to_start``, and nobody started it."""


class HeartbeatTimeoutError(StepTimeoutError):
    """An attempt saved no checkpoint, and gave no other sign of life, for longer than its ``heartbeat``."""


class RunTimeoutError(ByrdError):
    """The run did not end before its deadline."""


class EmbeddedServerError(ByrdError):
    """An embedded server did not start or stop as it should."""


class ControlFlow(BaseException):
    """Ends an attempt without an outcome of its own; not a failure."""


class StaleAttempt(ControlFlow):
    """Another attempt owns the step now: this one may write nothing and must stop."""


class StepCancelled(ControlFlow):
    """The run is being cancelled, or the step's saga has failed: the step stops at this checkpoint."""


class StepHandedBack(ControlFlow):
    """The worker is shutting down, or the run is paused: the step goes on later from its checkpoint."""
