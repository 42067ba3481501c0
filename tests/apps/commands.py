"""Steps of every kind, slow enough for an operator's command to hit them in the middle."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task, chain, chord, group

import byrd

app = Celery("commands")
app.conf.update(
    byrd_lease_seconds=float(os.environ.get("TEST_LEASE_SECONDS", "3")),
    task_allow_error_cb_on_chord_header=True,
    byrd_max_preemptions=20,
)
engine = byrd.Byrd(app)


@app.task
def work(*args: Any, label: Any = None) -> Any:
    """Take a few milliseconds."""
    time.sleep(random.random() * 0.03)
    return label if label is not None else len(args)


@app.task(bind=True, max_retries=3)
def shaky(self: Task, *_args: Any) -> int:
    """Ask for one retry."""
    time.sleep(random.random() * 0.02)
    if self.request.retries < 1:
        raise self.retry(countdown=random.random() * 0.1)
    return int(self.request.retries)


@app.task(bind=True)
def swapped(self: Task, *_args: Any) -> Any:
    """Be replaced by a chord."""
    return self.replace(chord([work.si(label=1), work.si(label=2)], total.s()))


@app.task
def total(values: list[Any]) -> Any:
    """The sum of a list."""
    return sum(values)


@app.task
def failing(*_args: Any) -> int:
    """Raise ValueError, unless the file that the environment names is there."""
    time.sleep(random.random() * 0.02)
    if not Path(os.environ["TEST_WELL"]).exists():
        raise ValueError("not well")
    return 1


@app.task(base=byrd.SagaTask)
def reserve(*_args: Any) -> str:
    """Do what can be undone."""
    time.sleep(random.random() * 0.02)
    return "reserved"


@reserve.compensation
def release(*_args: Any) -> None:
    """Undo it."""
    time.sleep(random.random() * 0.02)


@app.task
def echo(value: Any = None) -> Any:
    """The value itself."""
    return value


@app.task
def wait_for_file(path: str, value: Any = None) -> Any:
    """Run until the file exists."""
    while not Path(path).exists():
        time.sleep(0.02)
    return value


def canvases() -> list[Any]:
    """Return one canvas of each kind; the last two fail until all is well."""
    return [
        chain(work.si(label=1), shaky.si(), work.s(label=7)),
        chord([work.si(label=n) for n in range(5)], total.s()),
        chain(group(work.si(label=1), swapped.si(), shaky.si()), total.s(), work.si(label=7)),
        chain(swapped.si(), work.si(label=7)),
        chain(reserve.si(), work.si(), reserve.si(), work.si(label=7)),
        chain(work.si(), failing.si(), work.si(label=7)).on_error(work.si()),
        chord([work.si(label=1), failing.si()], total.s()),
    ]
