"""Runs to be steered in bulk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery, chain

import byrd

app = Celery("bulk")
app.conf.update(byrd_lease_seconds=2.0, byrd_sweep_seconds=0.1)
engine = byrd.Byrd(app)
NOTES = Path(os.environ.get("NOTES", "/nonexistent"))


@app.task
def add(x: int, y: int) -> int:
    """Return the sum."""
    return x + y


@app.task
def fail(kind: str) -> None:
    """Fail, unless a file says that all is well."""
    if not (NOTES / "well").exists():
        raise {"value": ValueError, "key": KeyError}[kind](f"no «{kind}»")


@engine.workflow("bulk.later")
def later(n: int) -> Any:
    """A run that would go on in an hour."""
    return chain(add.s(n, 1).set(countdown=3600), add.s(1))


@engine.workflow("bulk.fails")
def fails(kind: str) -> Any:
    """A run that fails."""
    return fail.si(kind)
