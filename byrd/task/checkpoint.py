"""CheckpointTask: a step that saves its progress and resumes where it was.

A checkpoint is a cursor with counts.  It is written once per batch, under the fence, in one transaction with
the writes of the user's own that belong to the batch, so after any crash the two agree.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Self, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded
from celery._state import _task_stack
from celery.exceptions import Ignore, Reject, Retry
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from byrd import waits as byrd_waits
from byrd.errors import CheckpointError, SignalTimeoutError, StaleAttempt, StepHandedBack
from byrd.store import Counts, progress, steps, waits
from byrd.store.database import MOST_EXCESSES, exceeds_limit, is_outage, is_race
from byrd.store.progress import FailedItem
from byrd.task.attempt import Attempt, encoded, text_of, to_json
from byrd.task.compound import CompoundTask
from byrd.task.limited import wants_pause
from byrd.task.values import loads

log = logging.getLogger(__name__)
T = TypeVar("T")
Cursor = Any
Item = Any
Enumerator = Callable[[Cursor], Iterable[tuple[Cursor, Item]]]

#: While a task waits (for its interval, for an item's next try) it looks this often whether it should stop.
_LOOK_SECONDS = 0.5
#: A batch that ends so soon after the last checkpoint is saved with the next one.
_HOLD_SECONDS = 0.05
#: Of an item's error, which is for people to read.
_MOST_ERROR_CHARACTERS = 10_000
#: Not an item's failure but the whole task's business.
_NOT_AN_ITEMS = (SoftTimeLimitExceeded, Retry, Ignore, Reject)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an iteration is: the last cursor, items completed, items given up on; ``done`` at the end."""

    cursor: Cursor
    completed: int
    failed: int
    done: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """An item that was processed: what ``save`` gets of it."""

    cursor: Cursor
    item: Item
    value: Any


@dataclass(frozen=True, slots=True)
class _Try:
    """An item about to be processed, for the ``tries``-th time."""

    cursor: Cursor
    item: Item
    tries: int


@dataclass(frozen=True, slots=True)
class _Iteration:
    """The settings of one call of ``iterate``."""

    name: str
    process: Callable[[Item], Any]
    save: Callable[[Connection, list[Outcome]], None] | None
    batch_size: int
    parallelism: int
    min_interval: float
    timeout: float | None
    item_retries: int
    item_retry_delay: float

    @property
    def plain(self) -> bool:
        """True when items are processed one after the other, for their effects only."""
        return self.save is None and self.parallelism == 1 and self.timeout is None

    @property
    def alone(self) -> bool:
        """True when each batch has a checkpoint of its own, however little time it took."""
        return self.save is not None or self.min_interval > 0


@dataclass(slots=True)
class _OpenTransaction:
    conn: Connection
    #: Checkpoints to be saved right before the commit: until then nothing of the step is locked.
    checkpoints: dict[str, Counts] = field(default_factory=dict)


_transaction: ContextVar[_OpenTransaction | None] = ContextVar("byrd_transaction", default=None)


class CheckpointTask(CompoundTask):
    """Base of tasks that resume where they were; use with ``@app.task(bind=True, base=byrd.CheckpointTask)``."""

    abstract = True

    def iterate(
        self,
        enumerator: Enumerator,
        process: Callable[[Item], Any],
        *,
        save: Callable[[Connection, list[Outcome]], None] | None = None,
        name: str = "items",
        batch_size: int = 100,
        parallelism: int = 1,
        min_interval: float = 0.0,
        timeout: float | None = None,
        item_retries: int = 2,
        item_retry_delay: float = 1.0,
    ) -> Progress:
        """Process all items that ``enumerator`` yields, in batches, with a checkpoint after each.

        Without ``save``, batches that take no time share a checkpoint; none is held back for longer than 100 ms.

        ``enumerator(cursor)`` yields (cursor, item) pairs, JSON values, for the items strictly after ``cursor``;
        it gets None at the very start, and the last saved cursor when the step resumes.
        ``process(item)`` is called in up to ``parallelism`` threads.  An exception fails that item alone: it is
        recorded, tried again up to ``item_retries`` times with ``item_retry_delay`` seconds (doubled each time)
        between, then quarantined (:meth:`quarantined`); the others go on.  But :class:`LimitedError` of a task that has
        a limit ends the attempt, and the next one goes on with the item.
        ``save(conn, outcomes)`` is called in the transaction that saves the checkpoint, with the batch's successes:
        what it writes on ``conn`` is committed exactly once.
        ``min_interval``: seconds at least between the starts of two batches.  ``timeout``: seconds for one batch;
        items that take longer have failed (their threads cannot be stopped, so give your I/O time-outs as well).

        Stops at a checkpoint when the run is cancelled or paused, or the worker shuts down.
        """
        settings = _Iteration(
            name, process, save, batch_size, parallelism, min_interval, timeout, item_retries, item_retry_delay
        )
        _check(settings)
        attempt = self._attempt()
        counts = attempt.runtime.patient_store.run(progress.load, attempt.step_id, name) or Counts(None, 0, 0, False)
        if not counts.done:
            with _Pool(self, settings) as pool:
                counts = self._first_tries(attempt, settings, pool, counts, enumerator)
                counts = self._further_tries(attempt, settings, pool, counts)
            counts = self._commit(attempt, settings, counts, counts._replace(done=True), [], [])
        return _progress(counts)

    def step(self, name: str, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call ``fn`` once in the step's life: its value (JSON) is recorded, and returned by later attempts."""
        attempt = self._attempt()
        store = attempt.runtime.patient_store
        key = f"step:{name}"
        found = store.run(progress.remembered, attempt.step_id, key)
        if found is None:
            found = encoded(attempt, fn(*args, **kwargs), f"the value of sub-step {name!r}")
            store.run(progress.remember, attempt.step_id, attempt.number, key, found)
        value: T = loads(found)
        return value

    def sleep(self, name: str, seconds: float | timedelta | None = None, *, until: datetime | None = None) -> None:
        """Give the slot back for a while, once in the step's life; then the task is called again, and goes on here.

        Like that of :meth:`step`, ``name`` tells this sleep from others.  Raises :class:`CanvasError` for what is no
        time, :class:`CheckpointError` within a :meth:`transaction`.
        """
        said = byrd_waits.wait_of(byrd_waits.sleep(seconds, until=until))
        attempt, key = self._idle_attempt(), f"step:sleep {name}"
        if attempt.runtime.patient_store.run(progress.remembered, attempt.step_id, key) is None:
            attempt.give_way(waits.nap, key, seconds=said.seconds, until=said.until)
            raise StepHandedBack(f"step {attempt.step_id}: asleep ({name})")

    def wait_for(
        self,
        signal: str,
        *,
        of: str | None = None,
        timeout: float | timedelta | None = None,
        default: Any = byrd_waits.NOT_GIVEN,
        name: str | None = None,
    ) -> Any:
        """Return the payload of a signal; until it comes, the slot is given back, and then the task is called again.

        Once it has come it is remembered by ``name``, which is the signal's unless the task waits for it twice.
        ``of``: who is to send it, as in :func:`byrd.wait_for`.
        ``timeout``: seconds, after which ``default`` is the value, or :class:`SignalTimeoutError` is raised.
        """
        said = byrd_waits.wait_of(byrd_waits.wait_for(signal, of=of, timeout=timeout, default=default))
        attempt, key = self._idle_attempt(), f"step:wait_for {name or signal}"
        store = attempt.runtime.patient_store
        taken = store.run(waits.take, attempt.step_id, attempt.number, signal, key, timeout=said.seconds)
        text = taken.payload
        if text is None and taken.late:
            given = said.default is not byrd_waits.NOT_GIVEN
            text = encoded(attempt, said.default, f"the default of {signal!r}") if given else None
            store.run(waits.settle, attempt.step_id, attempt.number, key, text)
            if text is None:
                missing = f"the signal {signal!r}{byrd_waits.of_whom(said.of)}"
                raise SignalTimeoutError(f"{missing} did not come within {said.seconds:g} s")
        if text is None:
            attempt.give_way(waits.give_way, signal, key, timeout=said.seconds, of=said.of)
            raise StepHandedBack(f"step {attempt.step_id}: waits for the signal {signal!r}")
        return loads(text)

    def checkpoint(
        self, cursor: Cursor = None, *, completed: int = 0, failed: int = 0, name: str = "checkpoint"
    ) -> None:
        """Save a cursor and counts by hand; inside ``with self.transaction()`` they commit with it.

        Raises what stops the step here, when its run is cancelled or paused, or its worker shuts down.
        """
        attempt = self._attempt()
        counts = Counts(encoded(attempt, cursor, "the cursor"), completed, failed, False)
        open_one = _transaction.get()
        if open_one is not None:
            open_one.checkpoints[name] = counts
            return
        _save(attempt, name, counts)

    def progress(self, name: str = "checkpoint") -> Progress | None:
        """Return the last checkpoint of that name (``"items"`` for :meth:`iterate`), or None at the first attempt."""
        attempt = self._attempt()
        counts = attempt.runtime.patient_store.run(progress.load, attempt.step_id, name)
        return _progress(counts) if counts is not None else None

    def quarantined(self, name: str | None = None) -> list[tuple[Item, str]]:
        """Return the items that were given up on, each with its last error."""
        attempt = self._attempt()
        found = attempt.runtime.patient_store.run(progress.quarantined, attempt.step_id, name)
        return [(loads(item.item), item.error) for item in found]

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a fenced transaction on Byrd's database: its writes count only if this attempt owns the step.

        A :meth:`checkpoint` in it commits with it.  If Postgres goes away in the middle, or the transaction loses
        against another (a deadlock, a serialization error), nothing is committed or all is, and the step goes on from
        its last checkpoint.  So it does when a statement exceeds a time-out of the database's, or finds a lock taken
        (NOWAIT), up to the fifth attempt at the step; after that the database's error is raised.
        """
        attempt = self._attempt()
        if _transaction.get() is not None:
            raise CheckpointError(f"step {attempt.step_id}: a transaction is open already; use the connection it gave")
        try:
            with attempt.runtime.user_store.engine.begin() as conn:
                current = _OpenTransaction(conn)
                token = _transaction.set(current)
                try:
                    yield conn
                finally:
                    _transaction.reset(token)
                # The fence comes last: whoever must end this attempt meanwhile need not wait for the user's code.
                steps.check_owner(conn, attempt.step_id, attempt.number)
                for name, counts in current.checkpoints.items():
                    progress.save(conn, attempt.step_id, attempt.number, name, counts)
        except (DBAPIError, PoolTimeoutError) as exc:
            if exceeds_limit(exc) and attempt.number > MOST_EXCESSES:
                raise  # not for ever: it asks for too much, and is for the task's own retries to see to
            if is_outage(exc):
                raise StepHandedBack(f"step {attempt.step_id}: Postgres went away in a transaction") from exc
            if is_race(exc):
                raise StepHandedBack(f"step {attempt.step_id}: its transaction lost against another") from exc
            raise
        if current.checkpoints:
            _stop_if_asked(attempt)

    # -- batches ---------------------------------------------------------------------------------

    def _idle_attempt(self) -> Attempt:
        attempt = self._attempt()
        if _transaction.get() is not None:
            raise CheckpointError(f"step {attempt.step_id}: a task cannot wait in a transaction; commit it first")
        return attempt

    def _first_tries(
        self, attempt: Attempt, settings: _Iteration, pool: _Pool, counts: Counts, enumerator: Enumerator
    ) -> Counts:
        cursor = loads(counts.cursor) if counts.cursor is not None else None
        held, saved_at, behind = _Held(attempt, settings.name), time.monotonic(), False
        batch: list[tuple[Cursor, Item]] = []
        try:
            for whole in _batches(enumerator(cursor), settings.batch_size):
                pool.keep_interval(attempt)
                if not settings.plain:
                    done, failed = pool.run([_Try(cursor, item, 1) for cursor, item in whole])
                else:
                    done, failed = [], pool.failures(whole)
                batch = whole[: pool.reached]
                after = counts._replace(completed=counts.completed + len(batch) - len(failed))
                if batch and (settings.alone or failed or time.monotonic() - saved_at > _HOLD_SECONDS):
                    held.drop()
                    after = after._replace(cursor=encoded(attempt, batch[-1][0], "the cursor"))
                    counts = self._commit(attempt, settings, counts, after, done, failed)
                    saved_at, behind = time.monotonic(), False
                elif batch:  # with the next one
                    counts, behind = after, True
                    held.hold(counts, batch[-1][0])
                if pool.pause is not None:
                    raise pool.pause
            if behind:
                counts = counts._replace(cursor=encoded(attempt, batch[-1][0], "the cursor"))
        except BaseException:
            with contextlib.suppress(CheckpointError):  # of two errors the first
                held.save()
            raise
        finally:
            held.close()
        return counts

    def _further_tries(self, attempt: Attempt, settings: _Iteration, pool: _Pool, counts: Counts) -> Counts:
        store = attempt.runtime.patient_store
        while waiting := store.run(progress.to_retry, attempt.step_id, settings.name, limit=settings.batch_size):
            due = [item for item, seconds in waiting if seconds <= 0]
            if not due:
                _pause(attempt, waiting[0][1])
                continue
            pool.keep_interval(attempt)
            done, failed = pool.run([_Try(loads(i.cursor), loads(i.item), i.tries + 1) for i in due])
            after = counts._replace(completed=counts.completed + len(done))
            counts = self._commit(attempt, settings, counts, after, done, failed)
            if pool.pause is not None:
                raise pool.pause
        return counts

    def _commit(
        self,
        attempt: Attempt,
        settings: _Iteration,
        before: Counts,
        after: Counts,
        done: list[tuple[_Try, Any]],
        failed: list[tuple[_Try, BaseException]],
    ) -> Counts:
        """Save one batch: counts, failed items and the user's own writes, in one transaction."""
        items = [_failed_item(attempt, settings, tried, exc) for tried, exc in failed]
        after = after._replace(failed=before.failed + sum(item.quarantined for item in items))
        recovered = [to_json(tried.cursor) for tried, _ in done if tried.tries > 1]
        outcomes = [Outcome(tried.cursor, tried.item, value) for tried, value in done]

        if settings.save is None and not items and not recovered:
            _save(attempt, settings.name, after)
            return after

        def transition(conn: Connection) -> None:
            found = progress.load(conn, attempt.step_id, settings.name)
            if found == after and found != before:
                return  # committed before: the answer was lost on its way
            if settings.save is not None and outcomes:
                settings.save(conn, outcomes)
            # The fence comes last: whoever must end this attempt meanwhile need not wait for the user's code.
            steps.check_owner(conn, attempt.step_id, attempt.number)
            progress.save(conn, attempt.step_id, attempt.number, settings.name, after)
            progress.put_failed(conn, attempt.step_id, settings.name, items)
            if recovered:
                progress.drop_failed(conn, attempt.step_id, settings.name, recovered)

        attempt.runtime.user_store.run(transition)
        _stop_if_asked(attempt)
        return after


class _Held:
    """A checkpoint that is to be saved with the next one; or by itself, if that is long in coming.

    A thread sees to that: the task's own may be in the middle of an item that takes an hour.
    """

    def __init__(self, attempt: Attempt, name: str) -> None:
        self._attempt, self._name = attempt, name
        self._lock = threading.Lock()
        #: The counts, and the cursor: it is encoded only if it is saved.
        self._last: tuple[Counts, Cursor] | None = None
        self._held, self._closed = threading.Event(), False
        self._thread: threading.Thread | None = None

    def hold(self, counts: Counts, cursor: Cursor) -> None:
        """Hold this one, which comes after that which is held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="byrd-checkpoint", daemon=True)
            self._thread.start()
        with self._lock:
            self._last = counts, cursor
        if not self._held.is_set():
            self._held.set()

    def drop(self) -> None:
        """A later one is about to be saved."""
        with self._lock:
            self._last = None

    def save(self) -> None:
        """Save the one that is held, if any."""
        with self._lock:
            last, self._last = self._last, None
            if last is not None:
                attempt = self._attempt
                store = attempt.runtime.patient_store
                counts = last[0]._replace(cursor=encoded(attempt, last[1], "the cursor"))
                with contextlib.suppress(StaleAttempt):  # its task will learn so
                    store.run_alone(progress.save, attempt.step_id, attempt.number, self._name, counts)

    def close(self) -> None:
        """End the thread: what is held still is not saved."""
        self.drop()
        self._closed = True
        self._held.set()

    def _watch(self) -> None:
        while not self._closed:
            self._held.wait()
            self._held.clear()
            while (held := self._last) is not None:
                time.sleep(_HOLD_SECONDS)
                if held is not self._last:
                    continue  # the task goes on, and will save one soon
                try:
                    self.save()
                except Exception:
                    log.exception("step %s: a checkpoint could not be saved yet", self._attempt.step_id)


class _Pool:
    """The threads that process a batch; they see the task's request as its own thread does."""

    def __init__(self, task: CheckpointTask, settings: _Iteration) -> None:
        self.settings = settings
        self._task = task
        self._request = task.request_stack.top
        self._threads: ThreadPoolExecutor | None = None
        self._next_start = 0.0
        #: What an item has raised that ends the attempt, if one has; and how many of the last batch come before it.
        self.pause: BaseException | None = None
        self.reached = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def keep_interval(self, attempt: Attempt) -> None:
        """Wait until ``min_interval`` has passed since the start of the last batch."""
        _pause(attempt, self._next_start - time.monotonic())
        self._next_start = time.monotonic() + self.settings.min_interval

    def run(self, batch: Sequence[_Try]) -> tuple[list[tuple[_Try, Any]], list[tuple[_Try, BaseException]]]:
        """Process a batch; return what succeeded with its values, and what failed with its errors."""
        if self.settings.parallelism == 1 and self.settings.timeout is None:
            return self._sorted((tried, _caught(self.settings.process, tried.item)) for tried in batch)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.settings.parallelism, thread_name_prefix="byrd-items")
        futures = [(tried, self._threads.submit(self._call, tried.item)) for tried in batch]
        _, late = wait([future for _, future in futures], timeout=self.settings.timeout)
        if late:
            # Their threads may hang for long: leave them, and go on with new ones.
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None
        return self._sorted((tried, self._result(future)) for tried, future in futures)

    def _call(self, item: Item) -> tuple[bool, Any]:
        self._task.request_stack.push(self._request)
        _task_stack.push(self._task)
        try:
            good, value = (False, self.pause) if self.pause is not None else _caught(self.settings.process, item)
            if not good and wants_pause(self._task, value):
                self.pause = value
            return good, value
        finally:
            _task_stack.pop()
            self._task.request_stack.pop()

    def _result(self, future: Future[tuple[bool, Any]]) -> tuple[bool, Any]:
        if future.done() and not future.cancelled():
            return future.result()
        return False, TimeoutError(f"not done when the batch's time-out of {self.settings.timeout} s was over")

    def _sorted(
        self, results: Iterable[tuple[_Try, tuple[bool, Any]]]
    ) -> tuple[list[tuple[_Try, Any]], list[tuple[_Try, BaseException]]]:
        done: list[tuple[_Try, Any]] = []
        failed: list[tuple[_Try, BaseException]] = []
        for tried, (good, value) in results:
            if not good and wants_pause(self._task, value):
                self.pause = value
                break
            (done if good else failed).append((tried, value))
        self.reached = len(done) + len(failed)
        return done, failed

    def failures(self, batch: list[tuple[Cursor, Item]]) -> list[tuple[_Try, BaseException]]:
        """Process a batch whose values nobody wants, one item after the other; return what failed."""
        failed: list[tuple[_Try, BaseException]] = []
        process, rest, self.reached = self.settings.process, iter(batch), len(batch)
        for cursor, item in rest:
            try:
                process(item)
            except _NOT_AN_ITEMS:
                raise
            except Exception as exc:  # noqa: BLE001 - any error is the item's, and is recorded
                if wants_pause(self._task, exc):
                    self.pause, self.reached = exc, len(batch) - 1 - len(list(rest))
                    break
                failed.append((_Try(cursor, item, 1), exc))
        return failed


def _caught(process: Callable[[Item], Any], item: Item) -> tuple[bool, Any]:
    try:
        return True, process(item)
    except _NOT_AN_ITEMS:
        raise
    except Exception as exc:  # noqa: BLE001 - any error is the item's, and is recorded
        return False, exc


def _failed_item(attempt: Attempt, settings: _Iteration, tried: _Try, exc: BaseException) -> FailedItem:
    return FailedItem(
        cursor=to_json(tried.cursor),
        item=encoded(attempt, tried.item, "a failed item"),
        tries=tried.tries,
        error=_storable(f"{type(exc).__name__}: {text_of(exc)}")[:_MOST_ERROR_CHARACTERS],
        quarantined=tried.tries > settings.item_retries,
        retry_in=settings.item_retry_delay * 2 ** (tried.tries - 1),
    )


def _storable(text: str) -> str:
    """Return a text that Postgres takes: without NUL, and without the lone surrogates of undecodable file names."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode("utf-8")


def _batches(pairs: Iterable[tuple[Cursor, Item]], size: int) -> Iterator[list[tuple[Cursor, Item]]]:
    iterator = iter(pairs)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _pause(attempt: Attempt, seconds: float) -> None:
    """Sleep, looking from time to time whether the step should stop."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK_SECONDS))
        if left > _LOOK_SECONDS:
            attempt.beat()  # it is alive, however long it has to wait
            _stop_if_asked(attempt)


def _save(attempt: Attempt, name: str, counts: Counts) -> None:
    """Save a checkpoint; raise what stops the step there."""
    store = attempt.runtime.patient_store
    reason = store.run_alone(progress.save_and_look, attempt.step_id, attempt.number, name, counts)
    if reason is not None:
        raise reason


def _stop_if_asked(attempt: Attempt) -> None:
    reason = attempt.runtime.patient_store.run(progress.stop_reason, attempt.step_id, attempt.number)
    if reason is not None:
        raise reason


def _progress(counts: Counts) -> Progress:
    return Progress(
        loads(counts.cursor) if counts.cursor is not None else None, counts.completed, counts.failed, counts.done
    )


def _check(settings: _Iteration) -> None:
    wrong = None
    if settings.batch_size < 1:
        wrong = f"batch_size={settings.batch_size} must be at least 1"
    elif settings.parallelism < 1:
        wrong = f"parallelism={settings.parallelism} must be at least 1"
    elif settings.item_retries < 0 or settings.item_retry_delay < 0 or settings.min_interval < 0:
        wrong = "item_retries, item_retry_delay and min_interval cannot be negative"
    elif settings.timeout is not None and settings.timeout <= 0:
        wrong = f"timeout={settings.timeout} must be more than 0 seconds, or None"
    if wrong:
        raise CheckpointError(f"iterate({settings.name!r}): {wrong}")
