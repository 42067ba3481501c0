"""The load: small tasks that leave an effect behind each time they run, and canvases of every kind made of them.

They touch nothing but the tables of :mod:`byrd.chaos.ledger`.  Workers get them from :mod:`byrd.chaos.load`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from celery import Celery, Task, chain, chord, group
from sqlalchemy import Connection

from byrd.chaos import ledger
from byrd.errors import ConfigurationError
from byrd.task import CheckpointTask, Outcome, SagaTask
from byrd.task.attempt import attempt_of

#: The queue of the load alone: what chaos does to messages it does there.
QUEUE = "byrd-chaos"
PREFIX = "byrd.chaos."
#: A step of the load works for up to this long, so that faults find it at work.
_LONGEST_SECONDS = 0.12
_ITEMS, _BATCH = 30, 3
_STUMBLES = 2


class RefusedError(Exception):
    """What the last step of each saga raises."""


# -- the tasks -------------------------------------------------------------------------------------


def touch(self: Task, value: int) -> int:
    """Work a little; return the next number."""
    _leave_effect(self)
    _work(value)
    return value + 1


def gather(self: Task, values: list[Any]) -> int:
    """Add up what a group returns, whatever its nesting."""
    _leave_effect(self)
    return sum(_flat(values))


def stumble(self: Task, value: int) -> int:
    """Ask for another try, twice."""
    _leave_effect(self)
    _work(value)
    if self.request.retries < _STUMBLES:
        raise self.retry(countdown=0.1, max_retries=_STUMBLES)
    return value + 1


def grow(self: Task, value: int) -> Any:
    """Put a chain in its own place."""
    _leave_effect(self)
    step = self.app.tasks[f"{PREFIX}touch"]
    raise self.replace(chain(step.s(value), step.s()))


def walk(self: CheckpointTask, value: int) -> int:
    """Write items in batches, each in one transaction with its checkpoint."""
    attempt = attempt_of(self.request)
    if attempt is None:
        raise ConfigurationError(f"{self.name} is a part of `byrd chaos`, and no task to be called by itself")
    _leave_effect(self)

    def items(cursor: int | None) -> Iterator[tuple[int, int]]:
        return ((n, n) for n in range(0 if cursor is None else cursor + 1, _ITEMS))

    def process(item: int) -> int:
        time.sleep(_LONGEST_SECONDS / _BATCH)
        return item

    def save(conn: Connection, outcomes: list[Outcome]) -> None:
        ledger.record_items(conn, attempt.run_id, attempt.step_id, attempt.number, [o.item for o in outcomes])

    done = self.iterate(items, process, save=save, batch_size=_BATCH)
    return value + done.completed


def reserve(self: Task, value: int) -> int:
    """Do what can be undone."""
    _leave_effect(self)
    _work(value)
    return value + 1


def release(self: Task, result: int, *_: Any) -> int:
    """Undo it."""
    _leave_effect(self)
    _work(result)
    return result


def refuse(self: Task, value: int) -> None:
    """Fail, so that what was reserved is released."""
    _leave_effect(self)
    raise RefusedError(f"{value} is refused, as it should be")


def register(app: Celery) -> None:
    """Give the app the tasks of the load, and the route to their queue, once."""
    if f"{PREFIX}touch" in app.tasks:
        return
    routes = app.conf.task_routes or ()
    others = routes if isinstance(routes, list | tuple) else (routes,)
    app.conf.task_routes = ({f"{PREFIX}*": {"queue": QUEUE}}, *others)
    app.amqp.flush_routes()
    app.amqp.router = app.amqp.Router()

    def task(fun: Callable[..., Any], **options: Any) -> Any:
        name = PREFIX + fun.__name__
        return app.task(fun, name=name, bind=True, shared=False, lazy=False, ignore_result=False, **options)

    for plain in (touch, gather, stumble, grow, refuse):
        task(plain)
    task(walk, base=CheckpointTask)
    task(reserve, base=SagaTask).compensation(release, bind=True, retry_backoff=1, retry_backoff_max=2)


def _leave_effect(task: Task) -> None:
    """Write an effect, for good, at the start of each attempt; wait for Postgres as long as it takes."""
    attempt = attempt_of(task.request)
    if attempt is None:
        raise ConfigurationError(f"{task.name} is a part of `byrd chaos`, and no task to be called by itself")
    store = attempt.runtime.user_store
    store.run(ledger.record_effect, ledger.new_effect(), attempt.run_id, attempt.step_id, attempt.number)


def _work(value: int) -> None:
    time.sleep(_LONGEST_SECONDS * (value * 7919 % 100) / 100)


def _flat(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value


# -- the canvases ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """A canvas of the load: how to build it from a number, and what must come of it."""

    name: str
    build: Callable[[int], Any]
    #: The result that the run must have; None for a run that must fail, and roll back.
    expected: Callable[[int], int] | None
    #: How many compensations must have succeeded.
    undone: int = 0

    @property
    def workflow(self) -> str:
        """The name under which its runs are listed."""
        return PREFIX + self.name


def shapes(app: Celery) -> list[Shape]:
    """Return the canvases of the load, made of the tasks of this app."""
    tasks = {
        name: app.tasks[PREFIX + name] for name in ("touch", "gather", "stumble", "grow", "walk", "reserve", "refuse")
    }
    step, total, reserving = tasks["touch"], tasks["gather"], tasks["reserve"]

    def nested(n: int) -> Any:
        inner = chord([step.s(), step.s(), step.s()], total.s())
        return chain(step.s(n), group(chain(step.s(), step.s()), inner, step.s()), total.s(), step.s())

    return [
        Shape("chain", lambda n: chain(step.s(n), step.s(), step.s()), lambda n: n + 3),
        Shape("chord", lambda n: chord([step.s(n + i) for i in range(5)], total.s()), lambda n: 5 * n + 15),
        Shape("nested", nested, lambda n: (n + 3) + 3 * (n + 2) + (n + 2) + 1),
        Shape("retries", lambda n: chain(tasks["stumble"].s(n), step.s()), lambda n: n + 2),
        Shape("replace", lambda n: chain(tasks["grow"].s(n), step.s()), lambda n: n + 3),
        Shape("checkpoints", lambda n: chain(tasks["walk"].s(n), step.s()), lambda n: n + _ITEMS + 1),
        Shape("rollback", lambda n: chain(reserving.s(n), reserving.s(), tasks["refuse"].s()), None, undone=2),
    ]


#: How many items each step of a ``checkpoints`` run writes.
ITEMS = _ITEMS
