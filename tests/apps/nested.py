"""Workflows within workflows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from celery import Celery, Task, chain, group

import byrd

app = Celery("nested")
app.conf.byrd_lease_seconds = 3.0
engine = byrd.Byrd(app)


@app.task
def add(x: int, y: int) -> int:
    """x + y."""
    return x + y


@app.task
def total(values: list[int]) -> int:
    """The sum."""
    return sum(values)


@app.task
def need(path: str, value: Any = None) -> Any:
    """Raise ValueError unless the file is there."""
    if not Path(path).exists():
        raise ValueError(f"{path} is missing")
    return value


@app.task
def read(path: str, text: str) -> None:
    """Run until the file has the text in it."""
    while not Path(path).exists() or text not in Path(path).read_text():
        time.sleep(0.02)


@app.task
def hold(path: str, value: Any = None) -> Any:
    """Run until the file is there."""
    while not Path(path).exists():
        time.sleep(0.02)
    return value


@app.task(bind=True)
def note(self: Task, path: str, value: Any = None) -> Any:
    """Add a line to a file."""
    with Path(path).open("a") as file:
        file.write(f"{self.request.id}\n")
    return value


@app.task(base=byrd.SagaTask)
def book(path: str) -> str:
    """Book something."""
    return path


@book.compensation
def unbook(booked: str, path: str) -> None:
    """Add a line to a file."""
    with Path(path).open("a") as file:
        file.write(f"{booked}\n")


@app.task(base=byrd.SagaTask)
def make(path: str, name: str, *, undo_needs: str = "") -> str:
    """Make something, on record in a file."""
    _line(path, name)
    return name


@make.compensation(max_retries=0)
def unmake(made: str | None, path: str, name: str, *, undo_needs: str = "") -> None:
    """Undo it, unless a file that is needed for that is missing."""
    if undo_needs and not Path(undo_needs).exists():
        raise ValueError(f"{undo_needs} is missing")
    while Path(f"{path}.hold").exists():
        time.sleep(0.02)
    _line(path, f"-{name}")


@app.task(base=byrd.SagaTask, pivot=True, compensation=None)
def pay(path: str) -> None:
    """Pay, for good."""
    _line(path, "paid")


@app.task(base=byrd.SagaTask, pivot=True, compensation=None)
def pay_slowly(path: str, go: str) -> None:
    """Begin to pay, which takes until a file is there."""
    _line(path, "paying")
    while not Path(go).exists():
        time.sleep(0.02)
    _line(path, "paid")


def _line(path: str, text: str) -> None:
    with Path(path).open("a") as file:
        file.write(f"{text}\n")


@engine.workflow("nested.trip")
def trip(path: str, name: str, undo_needs: str = "") -> Any:
    """Two things, one after the other."""
    return chain(make.si(path, f"{name}1", undo_needs=undo_needs), make.si(path, f"{name}2"))


@engine.workflow("nested.tour")
def tour(path: str, name: str) -> Any:
    """A thing, and a workflow with two."""
    return chain(make.si(path, f"{name}0"), trip.si(path, name))


@engine.workflow("nested.paid")
def paid(path: str, name: str) -> Any:
    """A thing, and the point of no return."""
    return chain(make.si(path, name), pay.si(path))


@engine.workflow("nested.holding")
def holding(go: str) -> Any:
    """A step that takes until a file is there."""
    return hold.si(go)


@engine.workflow("nested.stay")
def stay(path: str, go: str) -> Any:
    """A thing, and a step that takes until a file is there."""
    return chain(make.si(path, "stay"), hold.si(go))


@engine.workflow("nested.half")
def half(path: str, go: str, needed: str, *, pays: bool) -> Any:
    """A part that undoes itself unless a file is there, beside one that does not, and takes until a file is there."""
    goes_on = pay_slowly.si(path, go) if pays else chain(make.si(path, "kept"), hold.si(go))
    begun = "paying" if pays else "kept"
    return group(goes_on, byrd.saga(read.si(path, begun), make.si(path, "part"), need.si(needed)))


@engine.workflow("nested.inner")
def inner(x: int, y: int) -> Any:
    """x + y + 1."""
    return chain(add.s(x, y), add.s(1))


@engine.workflow("nested.outer")
def outer(x: int) -> Any:
    """2 (x + 2) + 1, by way of two runs, and what these two have to do with a third."""
    return chain(add.s(x, 0), group(inner.s(1), middle.s()), total.s(), add.s(1))


@engine.workflow("nested.middle")
def middle(x: int) -> Any:
    """x + 2, by way of a run."""
    return inner.s(x, 1)


@engine.workflow("nested.fragile")
def fragile(noted: str, needed: str) -> Any:
    """A step that is noted, and one that needs a file."""
    return chain(note.si(noted), need.si(needed, "well"))


@engine.workflow("nested.long")
def long(go: str, noted: str) -> Any:
    """A booking, and a step that takes until a file is there."""
    return chain(book.si(noted), hold.si(go, "held"))
