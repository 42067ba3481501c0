"""A run, as app code sees it."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any

from celery.exceptions import TimeoutError as CeleryTimeoutError
from sqlalchemy.exc import DBAPIError

from byrd.errors import ArgumentError, ByrdError
from byrd.model import FINAL_STEP, RunStatus
from byrd.store import RunRow, StepRow, Store, Wakeup, reading, runs, sagas, termination, waits
from byrd.task.attempt import text_of, to_json
from byrd.task.values import loads
from byrd.waits import checked_name

if TYPE_CHECKING:
    from byrd.engine.engine import Byrd

log = logging.getLogger(__name__)

_LONGEST_PAUSE = 0.25
#: How long what runs may take to stop by itself before a cancel with terminate ends it.
GRACE_SECONDS = 5.0
_LONGEST_GRACE = 1e8


class Run:
    """One execution of a canvas.  It holds only the id: each question is answered by Postgres, now."""

    def __init__(self, engine: Byrd, run_id: str, row: RunRow | None = None) -> None:
        self.engine = engine
        self.id = run_id
        self._row = row

    # -- questions -------------------------------------------------------------------------------

    @property
    def info(self) -> RunRow:
        """Everything that the run's row says, read now."""
        self._row = self._store.run(reading.get, self.id)
        return self._row

    @property
    def status(self) -> RunStatus:
        """Where the run stands, read now."""
        return RunStatus(self.info.status)

    @property
    def workflow(self) -> str | None:
        """The workflow's name, or None for a run of a bare canvas."""
        row = self._row or self.info
        return row.workflow

    def get(self, timeout: float | None = None, *, propagate: bool = True) -> Any:
        """Wait for the canvas's value, and return what ``AsyncResult.get()`` or ``GroupResult.get()`` would.

        Raises the exception of the step that failed (``propagate=False`` returns it instead),
        ``TaskRevokedError`` when the run was cancelled, and ``celery.exceptions.TimeoutError`` after ``timeout``
        seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pauses = _pauses()
        while True:
            no, status, result, error, run_status, ignored = self._store.run_alone(reading.outcome, self.id)
            if status in FINAL_STEP:
                break
            if deadline is not None and time.monotonic() >= deadline:
                raise self._timed_out(run_status, timeout)
            pause = next(pauses)
            time.sleep(pause if deadline is None else max(0.0, min(pause, deadline - time.monotonic())))
        if status == "succeeded":
            return None if ignored or result is None else loads(result)
        error = self._store.run(reading.root_error, self.id, no) or error
        exc, _ = self.engine.app.backend.decoded_error(error)
        if not isinstance(exc, BaseException):
            exc = RuntimeError(f"run {self.id} ended as {run_status} without an error on record")
        if propagate:
            raise exc
        return exc

    def wait(self, timeout: float | None = None) -> RunStatus:
        """Wait until the run has ended, or cannot go on without an operator; return its status.

        Unlike :meth:`get` it waits for callbacks, errbacks and compensations too, and raises for none of them.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pauses = _pauses()
        while True:
            status = self.status
            if status.final or status is RunStatus.ROLLBACK_STUCK:
                return status
            if deadline is not None and time.monotonic() >= deadline:
                raise self._timed_out(status, timeout)
            time.sleep(next(pauses))

    def steps(self) -> list[StepRow]:
        """Return the run's steps, in the plan's order, as they stand now."""
        return self._store.run(reading.list_steps, self.id)

    def history(self) -> list[dict[str, Any]]:
        """Return what happened to the run, in order: its own events, and each attempt at each step."""
        return self._store.run(reading.history, self.id)

    def why(self) -> list[str]:
        """Return one sentence for each thing that the run waits for, or one that says how it ended."""
        from byrd.engine.why import explain

        return explain(self.engine, self.id)

    # -- commands: ``by`` names who gives them, for the history and `byrd why` ---------------------

    def cancel(
        self, *, compensate: bool = False, terminate: bool = False, grace: float | None = None, by: str | None = None
    ) -> None:
        """Stop the run: what has not started never will, what runs stops at its next checkpoint.

        ``compensate``: then undo its completed saga steps.
        ``terminate``: what still runs after ``grace`` seconds (:data:`GRACE_SECONDS` unless it is given) is ended, with
        the pool process that it runs in; where there is none (threads, gevent, solo) it is shut out of the run, which
        does not wait for it any more.  It may be asked for later, too, of a run that is being cancelled already.
        """
        if not terminate:
            if grace is not None:
                raise ArgumentError("grace is the time until a cancel with terminate=True ends what runs; give both")
            self._publish(self._store.run(runs.cancel, self.id, compensate=compensate, by=by, token=_token()))
            return
        seconds = checked_grace(grace)
        self._publish(
            self._store.run(termination.cancel, self.id, grace=seconds, compensate=compensate, by=by, token=_token())
        )

    def pause(self, *, by: str | None = None) -> None:
        """Let nothing more start until :meth:`resume`."""
        self._store.run(runs.pause, self.id, by=by, token=_token())

    def resume(self, *, by: str | None = None) -> None:
        """Go on after :meth:`pause`."""
        self._publish(self._store.run(runs.resume, self.id, by=by, token=_token()))

    def retry(self, *, by: str | None = None) -> None:
        """Try again what did not succeed in a failed or cancelled run, or the compensations that are stuck."""
        self._publish(self._store.run(runs.retry, self.id, by=by, token=_token()))

    def rollback(self, *, reason: str | None = None, by: str | None = None) -> None:
        """Undo, on purpose, the completed saga steps of a run that has ended or is paused; it ends as cancelled.

        Raises :class:`IllegalTransitionError` for a run that goes on, that has passed its pivot, or that has nothing to
        undo.
        """
        self._publish(self._store.run(runs.roll_back, self.id, reason=reason, by=by, token=_token()))

    def skip(self, step: int, *, reason: str, by: str | None = None) -> None:
        """Let a compensation be, by its number: what it should undo stays as it is, and the rollback goes on.

        Raises :class:`ArgumentError` without a reason, and :class:`IllegalTransitionError` for what is no compensation,
        or one that is done, runs, or is not due yet.
        """
        text = _words("reason", reason)
        self._publish(self._store.run(sagas.skip, self.id, step, reason=text, by=by, token=_token()))

    def done_by_hand(self, step: int, *, note: str, by: str | None = None) -> None:
        """Record that somebody has done what a compensation should do, by its number; the rollback goes on.

        Raises as :meth:`skip`.
        """
        text = _words("note", note)
        self._publish(self._store.run(sagas.done_by_hand, self.id, step, note=text, by=by, token=_token()))

    def signal(self, name: str, payload: Any = None, *, by: str | None = None) -> None:
        """Send the run a signal: the step that waits for it, now or later, has ``payload`` (a JSON value) as its value.

        Signals of one name are delivered in the order in which they were sent, each to one wait.
        Raises :class:`ArgumentError` for a payload that JSON cannot hold or that is too large, :class:`CanvasError` for
        what is no name of a signal, and :class:`IllegalTransitionError` for a run that has ended.
        """
        checked_name(name)
        text = _payload_json(name, payload)
        if too_large := self.engine.runtime.too_large(len(text)):
            raise ArgumentError(f"the payload of signal {name!r} is {too_large}")
        self._publish(self._store.run(waits.signal, self.id, name, text, by=by, token=_token()))

    @property
    def _store(self) -> Store:
        return self.engine.runtime.store

    def _timed_out(self, status: str, timeout: float | None) -> CeleryTimeoutError:
        from byrd.engine.why import explain

        said = f"run {self.id} is {status} after {timeout} s"
        try:
            reasons = explain(self.engine, self.id, ask_broker=False)
        except (ByrdError, DBAPIError) as exc:  # what is asked besides must not hide that time is up
            log.debug("run %s: why it takes so long cannot be told: %r", self.id, exc)
            reasons = []
        return CeleryTimeoutError(f"{said}: {' '.join(reasons)}" if reasons else f"{said}; `byrd why {self.id}`")

    def _publish(self, wakeups: list[Wakeup]) -> None:
        self.engine.runtime.publisher.publish(wakeups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<Run {self.id}>"


def checked_grace(grace: float | None) -> float:
    """Return for how many seconds a cancel with terminate waits; raise :class:`ArgumentError` for what is no time."""
    seconds = GRACE_SECONDS if grace is None else grace
    if not 0 <= seconds <= _LONGEST_GRACE:  # nor is it NaN
        raise ArgumentError(f"grace={grace!r} is no number of seconds")
    return float(seconds)


def _pauses() -> Iterator[float]:
    """Yield how long to wait before each question: quick at first, for most runs are short, then slower and slower."""
    yield 0.004  # before that there is nothing to see
    yield from repeat(0.001, 20)
    pause = 0.002
    while True:
        yield pause
        pause = min(_LONGEST_PAUSE, pause * 1.4)


def _words(name: str, text: Any) -> str:
    """Return what is to be read in the history; raise :class:`ArgumentError` where nothing is said."""
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ArgumentError(f"{name}={text!r} must be a text that is not empty: it is what others will read")
    return text.strip()


def _payload_json(name: str, payload: Any) -> str:
    try:
        text = to_json(payload)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise ArgumentError(f"the payload of signal {name!r} cannot be held by JSON: {text_of(exc)}") from None
    if "\\u0000" in text:
        raise ArgumentError(f"the payload of signal {name!r} contains a NUL character; remove it")
    return text


def _token() -> str:
    """Return what tells one command from all others: a transaction may be run again after its commit."""
    return str(uuid.uuid4())
