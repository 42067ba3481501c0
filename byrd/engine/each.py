"""The task of an each: it brings items into its run a page at a time, and gives its slot back while they last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from celery import Task
from kombu.utils.json import loads

from byrd.canvas import Step, enumerator_of, item_of
from byrd.engine.words import error_text
from byrd.errors import EachError, EachToleranceError, StepHandedBack
from byrd.items import EACH, Each, each_of
from byrd.policies import default_of
from byrd.store import each, progress
from byrd.store.items import Items
from byrd.task.attempt import Attempt, attempt_of, encoded
from byrd.task.durable import adopt_task

if TYPE_CHECKING:
    from byrd.engine.engine import Byrd

#: So many items of a list, or that are tried again, come at a time.
PAGE = 500
#: An enumerator's page may have no more.
MOST_OF_PAGE = 10_000


def add_task(engine: Byrd) -> None:
    """Register the task that stands for each ``byrd.each`` in a canvas."""

    @engine.app.task(name=EACH, bind=True, shared=False, typing=False)
    def run_each(self: Task, *args: Any, **kwargs: Any) -> Any:
        """Bring the next items into the run; return the values of all once they have ended."""
        attempt = attempt_of(self.request)
        if attempt is None:
            raise EachError(f"{EACH} is a part of a run: submit the canvas with engine.submit(...)")
        _work(attempt, each_of(kwargs), args)

    if engine.app.finalized:
        adopt_task(engine.app.tasks[EACH])


@dataclass(frozen=True, slots=True)
class _Page:
    """Some items, and the cursor of the next page unless they are the last."""

    items: Sequence[Any]
    at: Any = None
    last: bool = False


def _work(attempt: Attempt, spec: Each, args: Sequence[Any]) -> NoReturn:
    store, step, publish = attempt.runtime.patient_store, (attempt.step_id, attempt.number), attempt.runtime.publisher
    try:
        listed = _listed(attempt, spec, args)
    except EachError as exc:
        _fail(attempt, exc)
    total = None if listed is None else len(listed)
    so_far = store.run(each.look, *step, limit=spec.limit, tolerate=spec.tolerate, total=total)
    make = _Maker(attempt, spec)
    while so_far.hungry:
        if so_far.reopen is not None:
            so_far, wakeups = store.run(each.reopen, *step, most=PAGE)
        else:
            try:
                page = _of_list(listed, so_far) if listed is not None else _enumerated(attempt, spec, args, so_far)
            except EachError as exc:
                _fail(attempt, exc)
            new = [make.step(item) for item in page.items]
            so_far, wakeups = store.run(each.insert, *step, new, inserted=so_far.inserted, at=page.at, done=page.last)
        publish.publish(wakeups)
        reason = store.run(progress.stop_reason, *step)
        if reason is not None:
            raise reason
    if so_far.ended:
        _end(attempt, spec, so_far)
    attempt.give_way(each.park)
    raise StepHandedBack(f"step {attempt.step_id}: waits for its items")


class _Maker:
    """Makes the steps of items."""

    def __init__(self, attempt: Attempt, spec: Each) -> None:
        self._runtime, self._spec = attempt.runtime, spec
        self._template = item_of(spec, attempt.runtime.app)
        self._retry = default_of(loads(attempt.claim.options))

    def step(self, item: Any) -> Step:
        """Return the step of an item."""
        return self._runtime.item(self._spec, item, self._retry, template=self._template)


def _listed(attempt: Attempt, spec: Each, args: Sequence[Any]) -> list[Any] | None:
    """Return the items, where they are a list; None where an enumerator has them."""
    if spec.pages is not None:
        return None
    found = spec.items if spec.items is not None else args[0]
    if not isinstance(found, list):
        raise EachError(
            f"step {attempt.step_id}: {EACH} goes over the list that the step before it returns, and this one returned "
            f"{found!r:.80}; return a list, or give it over=..."
        )
    return found


def _of_list(listed: list[Any], so_far: Items) -> _Page:
    end = so_far.inserted + PAGE
    return _Page(listed[so_far.inserted : end], last=end >= len(listed))


def _enumerated(attempt: Attempt, spec: Each, args: Sequence[Any], so_far: Items) -> _Page:
    """Ask the enumerator for the page where the last one ended."""
    call = enumerator_of(spec, attempt.runtime.app)
    task = attempt.runtime.task_named(call.task)
    immutable = bool(isinstance(spec.pages, Mapping) and spec.pages.get("immutable"))
    before = [] if immutable else list(args)
    found = task(*before, *loads(call.args), **{**loads(call.kwargs), "cursor": so_far.at})
    if found is None:
        return _Page([], last=True)
    if not isinstance(found, list | tuple) or len(found) != 2 or not isinstance(found[0], list | tuple):
        raise EachError(
            f"step {attempt.step_id}: the enumerator {call.task} returns (items, next_cursor), or None at the end, "
            f"not {found!r:.80}"
        )
    page, at = list(found[0]), found[1]
    if len(page) > MOST_OF_PAGE:
        raise EachError(
            f"step {attempt.step_id}: the enumerator {call.task} returned a page of {len(page):,} items; "
            f"{MOST_OF_PAGE:,} are the most, for all of a page are in memory, and in the run's tables, at once"
        )
    return _Page(page, at=loads(encoded(attempt, at, "the cursor of an enumerator")), last=at is None)


def _end(attempt: Attempt, spec: Each, so_far: Items) -> NoReturn:
    store = attempt.runtime.patient_store
    if so_far.over:
        no, error = store.run(each.first_failure, attempt.step_id)
        so_many = f"{so_far.all:,} items" + ("" if so_far.total is not None or so_far.done else " so far")
        _fail(
            attempt,
            EachToleranceError(
                f"{so_far.failed:,} of {so_many} failed, and {so_far.tolerated:,} may; the first is step {no}: "
                f"{error_text(error)}"
            ),
        )
    if spec.results and (too_large := attempt.runtime.too_large(store.run(each.size_of_values, attempt.step_id))):
        _fail(
            attempt,
            EachError(f"the values of {so_far.inserted:,} items are {too_large}; or give the each results=False"),
        )
    attempt.give_way(each.finish, results=spec.results)
    raise StepHandedBack(f"step {attempt.step_id}: its items have ended, and it with them")


def _fail(attempt: Attempt, exc: EachError) -> NoReturn:
    """Fail for good, whatever the policy says of the enumerator's errors: nothing would be different next time."""
    attempt.fail(attempt.runtime.app.backend.encoded_error(exc))
    raise StepHandedBack(f"step {attempt.step_id}: {exc}")
