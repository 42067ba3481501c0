"""Small workflows whose every boundary a test can afford to be killed at; effects go to the table ``effects``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from celery import Celery, Task
from sqlalchemy import Connection, text

import byrd

app = Celery("crash")
engine = byrd.Byrd(app)


@app.task
def add(x: Any, y: Any) -> Any:
    """x + y."""
    return x + y


@app.task
def last(value: Any) -> Any:
    """The value itself."""
    return value


@app.task(byrd_limit=byrd.Limit("100/s", burst=2, concurrency=1, key="key", name="one"))
def one_at_a_time(key: str, value: int) -> int:
    """The value itself, one at a time for each key."""
    return value


@engine.workflow("crash.inner")
def inner(x: Any) -> Any:
    """x + 3, in a run of its own."""
    return add.s(x, 3)


@app.task
def two_at_a_time(cursor: Any = None) -> Any:
    """Four items, in two pages."""
    return ([1, 3], 1) if cursor is None else ([4, 5], None)


@app.task
def odd_only(x: int) -> int:
    """The item, if it is odd."""
    if x % 2 == 0:
        raise ValueError(f"{x} is even")
    return x


@app.task
def total(values: list[Any]) -> Any:
    """The sum of a list."""
    return sum(values)


@app.task
def fail(*_: Any) -> None:
    """Raise ValueError."""
    raise ValueError("no")


@app.task(bind=True, max_retries=3)
def flaky(self: Task, failures: int, value: Any) -> Any:
    """Ask for so many retries, then return the value."""
    if self.request.retries < failures:
        raise self.retry(countdown=0)
    return value


@app.task(bind=True, byrd_retry=byrd.Retry(max_attempts=5, budget=600, first=0.05, factor=1))
def unlucky(self: Task, failures: int, value: Any) -> Any:
    """Fail so often, then return the value."""
    if self.request.retries < failures:
        raise ValueError("no luck")
    return value


@app.task(bind=True, byrd_retry=byrd.Retry(first=0.05))
def takes_long(self: Task, value: Any) -> Any:
    """Take too long, and be silent, once."""
    if self.request.retries == 0:
        time.sleep(1.5)
    return value


@app.task(bind=True)
def expand(self: Task, n: int) -> Any:
    """Let a canvas take the task's place."""
    raise self.replace(add.s(n, 1) | add.s(10))


@app.task(bind=True, base=byrd.CheckpointTask)
def count_up(self: byrd.CheckpointTask, name: str, most: int) -> int:
    """Write the numbers below ``most`` to a table, in the transactions that commit the checkpoints."""

    def save(conn: Connection, outcomes: list[byrd.Outcome]) -> None:
        rows = [{"name": name, "n": outcome.item} for outcome in outcomes]
        conn.execute(text("INSERT INTO effects (name, n) VALUES (:name, :n)"), rows)

    def numbers(cursor: int | None) -> Iterator[tuple[int, int]]:
        return ((n, n) for n in range(0 if cursor is None else cursor + 1, most))

    first = self.step("first", lambda: 7)
    done = self.iterate(numbers, lambda n: n, save=save, batch_size=2)
    if self.progress("tail") is None:
        with self.transaction() as conn:
            conn.execute(text("INSERT INTO effects (name, n) VALUES (:name, -1)"), {"name": name})
            self.checkpoint(name="tail", cursor="done")
    return int(done.completed) + int(first)


@app.task(bind=True, base=byrd.CheckpointTask)
def all_or_nothing(self: byrd.CheckpointTask, *operations: str) -> list[str]:
    """Do all of it, or nothing; what is called "refused" is not to be had."""
    with self.compound() as op:
        return [op.do(what, take, what, undo=give_back) for what in operations]


@app.task(bind=True, base=byrd.CheckpointTask, byrd_retry=byrd.Retry(first=0.05))
def all_at_the_second_time(self: byrd.CheckpointTask, *operations: str) -> list[str]:
    """The last of them is not to be had at first."""

    def last(what: str) -> str:
        return take(what if self.request.retries else "refused")

    with self.compound() as op:
        return [op.do(what, last if what == operations[-1] else take, what, undo=give_back) for what in operations]


def take(what: str) -> str:
    """Do one of several operations."""
    if what == "refused":
        raise ValueError("it is not to be had")
    log(f"take {what}")
    return what.upper()


def give_back(taken: str, what: str) -> None:
    """Undo it."""
    log(f"give back {taken} for {what}")


@app.task(bind=True)
def cancel_itself_and_stay(self: Task) -> None:
    """Cancel the task's own run with terminate, and go on until the run does without it."""
    run = engine.get(self.request.root_id)
    if run.status == "running":
        run.cancel(terminate=True, grace=0, compensate=True)
    while run.status == "cancelling":
        time.sleep(0.05)


@app.task(bind=True)
def cancel_itself(self: Task) -> str:
    """Cancel the run that it is a step of, as a person may at this very moment."""
    run = engine.get(self.request.root_id)
    if run.status == "running":
        run.cancel(compensate=True)
    return "cancelled"


@app.task(bind=True)
def signal_itself(self: Task, name: str, payload: Any) -> str:
    """Send its own run a signal, as somebody may at this very moment."""
    engine.get(self.request.root_id).signal(name, payload)
    return "sent"


@app.task(bind=True, base=byrd.CheckpointTask)
def nap_and_wait(self: byrd.CheckpointTask, name: str) -> Any:
    """Give the slot back for a time, then for a signal."""
    self.sleep("nap", 0.05)
    return self.wait_for(name)


@app.task(base=byrd.SagaTask)
def reserve(what: str) -> str:
    """Do what can be undone."""
    return what.upper()


@reserve.compensation
def release(reservation: str, what: str) -> None:
    """Undo it: safe to repeat, as each compensation must be."""
    note(reservation, what)


@app.task(base=byrd.SagaTask)
def order_meal(what: str) -> str:
    """Do what can be undone only the second time."""
    return what.upper()


@order_meal.compensation(max_retries=0)
def send_back(meal: str, what: str) -> None:
    """Undo it; raise the first time, though, and write down each call."""
    with engine.runtime.user_store.engine.begin() as conn:
        before = conn.execute(text("SELECT count(*) FROM effects WHERE name = :name"), {"name": meal}).scalar_one()
        conn.execute(text("INSERT INTO effects (name, n) VALUES (:name, :n)"), {"name": meal, "n": before + 1})
    if not before:
        raise ConnectionError(f"{what} cannot be sent back")


@engine.workflow("crash.stay")
def stay(what: str) -> Any:
    """Do what can be undone, in a run of its own."""
    return reserve.s(what)


@engine.workflow("crash.asleep")
def asleep(number: int) -> Any:
    """Sleep, as somebody who is forgotten does."""
    return byrd.sleep(3600) | add.si(number, 1)


@app.task(base=byrd.SagaTask)
def buy(what: str) -> str:
    """Do what cannot be done twice: the table refuses it."""
    with engine.runtime.user_store.engine.begin() as conn:
        conn.execute(text("INSERT INTO effects (name, n) VALUES (:name, 1)"), {"name": what})
    return what.upper()


@buy.confirm
def find_bought(_key: str, what: str) -> Any:
    """Ask whether it is done."""
    with engine.runtime.user_store.engine.begin() as conn:
        done = conn.execute(text("SELECT 1 FROM effects WHERE name = :name AND n = 1"), {"name": what}).first()
    return what.upper() if done else byrd.NOT_DONE


@buy.compensation
def sell(bought: str, what: str) -> None:
    """Undo it."""
    note(bought, what)


@app.task(base=byrd.SagaTask, pivot=True, compensation=None)
def commit(value: Any) -> Any:
    """Pass the point of no return."""
    return value


@app.task
def fail_once(name: str) -> str:
    """Raise until it is on record that it did."""
    with engine.runtime.user_store.engine.begin() as conn:
        row = {"name": name}
        failed = conn.execute(text("SELECT 1 FROM effects WHERE name = :name"), row).first()
        if not failed:
            conn.execute(text("INSERT INTO effects (name, n) VALUES (:name, 1)"), row)
    if not failed:
        raise ConnectionError("it is down")
    return "up"


def note(reservation: str, what: str) -> None:
    """Leave a trace, once."""
    with engine.runtime.user_store.engine.begin() as conn:
        conn.execute(
            text("INSERT INTO effects (name, n) VALUES (:name, 1) ON CONFLICT DO NOTHING"),
            {"name": f"{reservation} {what}"},
        )


def log(what: str) -> None:
    """Leave a trace for each time, with its place among all."""
    with engine.runtime.user_store.engine.begin() as conn:
        conn.execute(text("INSERT INTO effects (name, n) SELECT :name, count(*) + 1 FROM effects"), {"name": what})


@engine.workflow("crash.order")
def order(start: int) -> Any:
    """A workflow with a name."""
    return add.s(start, 1) | add.s(1)
