"""The app of the endurance run: steps that end in each way, and hold on to nothing."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, Task, chain, chord, group
from celery.signals import task_postrun

import byrd

app = Celery("endurance")
engine = byrd.Byrd(app)

#: To see that a leak is noticed: so many bytes are kept of each step, in the process that runs it.
LEAK = int(os.environ.get("ENDURANCE_LEAK", "0"))
_kept: list[bytes] = []

if LEAK:

    @task_postrun.connect(weak=False)
    def leak(**_: Any) -> None:
        """Keep something."""
        _kept.append(os.urandom(LEAK))


@app.task(shared=False)
def step(*_: Any) -> dict[str, Any]:
    """Return something of a usual size."""
    return {"value": 1, "text": "x" * 200}


@app.task(shared=False)
def last(values: Any = None) -> int:
    """Take a group's values."""
    return len(values or ())


@app.task(shared=False, bind=True, max_retries=3)
def again(self: Task, value: Any = 0) -> Any:
    """Be tried twice."""
    if self.request.retries < 1:
        raise self.retry(countdown=0, exc=ConnectionError("not yet"))
    return value


@app.task(shared=False)
def refuse(*_: Any) -> None:
    """Raise."""
    raise ValueError("x" * 200)


@app.task(shared=False, bind=True)
def replaced(self: Task) -> Any:
    """Put a chain in its place."""
    raise self.replace(step.s() | step.s())


@app.task(shared=False, bind=True, base=byrd.CheckpointTask)
def walk(self: Any, number: int) -> int:
    """Go over numbers with checkpoints."""

    def numbers(cursor: int | None) -> Any:
        return ((n, n) for n in range(0 if cursor is None else cursor + 1, number))

    return int(self.iterate(numbers, lambda n: n, batch_size=5).completed)


@app.task(shared=False)
def mourn(*_: Any) -> str:
    """An errback."""
    return "sorry"


@app.task(shared=False)
def pages(most: int, cursor: int | None = None) -> tuple[list[int], int | None]:
    """Enumerate 0 to most - 1, 500 at a time."""
    first = cursor or 0
    after = min(most, first + 500)
    return list(range(first, after)), after if after < most else None


def over(items: int) -> Any:
    """One each over so many items, whose values nobody needs as a list."""
    return byrd.each(step.s(), over=pages.s(items), limit=64, results=False)


def canvases() -> list[Any]:
    """One canvas of each kind: 40 attempts at steps, two of which fail."""
    return [
        chain(step.s(), step.s(), again.s(), step.s(), step.s()),
        chord([step.s(n) for n in range(8)], last.s()),
        chain(group(step.s() | again.s() for _ in range(3)), last.s()),
        chain(step.s(), refuse.s(), step.s()).on_error(mourn.s()),
        chain(replaced.s(), step.s()),
        walk.s(20),
    ]
