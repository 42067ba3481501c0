"""Tasks that do not stop by themselves, or only when told to; they note what happens in the folder ``NOTES``."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from celery import Celery

import byrd

app = Celery("stubborn")
app.conf.update(byrd_lease_seconds=3.0, byrd_sweep_seconds=0.1, task_send_sent_event=False)
engine = byrd.Byrd(app)
NOTES = Path(os.environ.get("NOTES", "/nonexistent"))


def note(file_name: str, **facts: Any) -> None:
    """Append a line of JSON to a file of the test's, in one write."""
    if NOTES.exists():
        with (NOTES / file_name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"pid": os.getpid(), **facts}) + "\n")


@app.task
def stubborn(name: str) -> str:
    """Go on whatever happens, until a file is there."""
    note("stubborn", name=name)
    while not (NOTES / f"{name}.go").exists():
        try:  # noqa: SIM105 - as people write it
            time.sleep(1)
        except:  # noqa: E722 - that is the point
            pass
    note("came back", name=name)
    return name


@engine.workflow("stubborn.inner")
def inner(name: str) -> Any:
    """A workflow of one that does not stop."""
    return stubborn.s(name)


@app.task
def tidy(name: str) -> None:
    """Take long, and tidy up when told to end."""
    note("tidy", name=name)
    try:
        time.sleep(600)
    finally:
        note("tidied", name=name)


@app.task(bind=True, base=byrd.CheckpointTask)
def careful(self: byrd.CheckpointTask, name: str) -> None:
    """Take long, with a checkpoint ten times a second."""
    note("careful", name=name)
    for n in range(6000):
        time.sleep(0.1)
        self.checkpoint(n, completed=n)


@app.task(base=byrd.SagaTask)
def book(name: str) -> str:
    """Do something that can be undone."""
    return f"booked {name}"


@book.compensation
def unbook(booked: str, name: str) -> None:
    """Undo it, and note which of the stubborn still live."""
    alive = []
    for line in (NOTES / "stubborn").read_text().splitlines():
        pid = json.loads(line)["pid"]
        with suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                alive.append(pid)
    note("unbook", name=name, alive=alive)


@app.task
def tick(n: int) -> int:
    """Return at once."""
    note("tick", n=n)
    return n
