"""The tasks of :mod:`tests.apps.basic` in an app that knows nothing of Byrd."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery

app = Celery("stranger", broker=os.environ["BYRD_BROKER_URL"])


@app.task(name="tests.apps.basic.note")
def note(path: str, text: str) -> str:
    """Append a line to a file."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")
    return text


@app.task(name="tests.apps.delivery.note")
def note_with_seconds(path: str, text: str, seconds: float = 0.0) -> str:
    """Append a line to a file."""
    return str(note.run(path, text))


@app.task(name="tests.apps.delivery.anything")
def anything(*args: object, path: str = "", **kwargs: object) -> None:
    """Take whatever it is given, and append it to a file."""
    with Path(path or os.environ["TEST_NOTES"]).open("a", encoding="utf-8") as file:
        file.write(f"{args} {kwargs}\n")
