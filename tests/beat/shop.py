"""The Celery app whose workflows the tests schedule."""

from __future__ import annotations

from typing import Any

from celery import Celery

import byrd

app = Celery("tests.beat.shop")
app.config_from_object("celeryconfig")
engine = byrd.Byrd(app)


@app.task
def note(label: str) -> str:
    return label


@app.task
def fail(label: str) -> None:
    raise RuntimeError(f"{label} was bound to fail")


@engine.workflow("shop.tick")
def tick(label: str = "tick", *, loud: bool = False) -> Any:
    return note.s(label.upper() if loud else label)


@engine.workflow("shop.report")
def report(day: str) -> Any:
    return note.s(day) | fail.s()
