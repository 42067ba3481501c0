"""A task that does three things, or none, and tells in a file what it did."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery

import byrd
from byrd.task import compound

app = Celery("compound")
app.conf.byrd_lease_seconds = 2.0
engine = byrd.Byrd(app)
compound.PATIENCE = int(os.environ.get("TEST_COMPOUND_PATIENCE", str(compound.PATIENCE)))


def note(path: str, what: str) -> None:
    """Add a line."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{what}\n")


@app.task(bind=True, base=byrd.CheckpointTask)
def three(self: byrd.CheckpointTask, path: str, *, fails: str = "", dies: str = "", stuck: int = 0) -> list[str]:
    """Do a, b and c.

    ``fails``: what raises, or "end".  ``dies``: what kills its worker once it has had its effect, the first time.
    ``stuck``: so often the undo of b fails.
    """

    def die_once(what: str) -> None:
        mark = Path(f"{path}.{what}")
        if dies == what and not mark.exists():
            mark.touch()
            os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)
            time.sleep(60)

    def act(what: str) -> str:
        if fails == what:
            raise ValueError(f"{what} is not to be had")
        note(path, what)
        die_once(what)
        return what.upper()

    def undo(done: str, what: str) -> None:
        tries = Path(f"{path}.tries")
        if what == "b" and stuck:
            note(str(tries), "try")
            if len(tries.read_text().splitlines()) <= stuck:
                raise ConnectionError("not now")
        note(path, f"undo {done}")
        die_once(f"undo {what}")

    with self.compound() as op:
        done = [op.do(what, act, what, undo=undo) for what in "abc"]
        if fails == "end":
            raise ValueError("after all")
    return done


@app.task(bind=True, base=byrd.CheckpointTask)
def halting(self: byrd.CheckpointTask, path: str) -> list[str]:
    """Do a; stand at checkpoints until there is a file; then do b."""

    def act(what: str) -> str:
        note(path, what)
        return what.upper()

    def undo(done: str, _what: str) -> None:
        note(path, f"undo {done}")

    with self.compound() as op:
        a = op.do("a", act, "a", undo=undo)
        for number in range(3000):
            if Path(f"{path}.go").exists():
                break
            self.checkpoint(cursor=number)
            time.sleep(0.02)
        return [a, op.do("b", act, "b", undo=undo)]


@app.task(bind=True, base=byrd.CheckpointTask)
def twice(self: byrd.CheckpointTask) -> Any:
    """Give two operations one name."""
    with self.compound() as op:
        op.do("a", int, undo=print)
        op.do("a", int, undo=print)
