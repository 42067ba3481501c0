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


# -- what is tried again ---------------------------------------------------------------------------


class Untiring(byrd.CheckpointTask, byrd.SagaTask):
    """A checkpoint task that may be a retriable step."""

    abstract = True


def counted(path: str) -> int:
    """Count how often it was called for this file."""
    with Path(path).open("a+", encoding="utf-8") as file:
        file.write("x")
        file.seek(0)
        return len(file.read())


def kill_worker() -> None:
    """End all processes of the worker."""
    os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)
    time.sleep(60)


def in_rounds(self: Any, path: str, failures: int = 1, dies: str = "", *, saves: bool = False) -> list[str]:
    """Do a and b, which is not to be had so often; tell what was done, and in which round of the block.

    ``dies``: what kills the worker, the first time: "undone", or b.  ``saves``: there is a checkpoint before each.
    """

    def act(what: str) -> str:
        if what == "b" and counted(f"{path}.tries") <= failures:
            raise ValueError("b is not to be had")
        note(path, f"{what}{op.key.rpartition(':')[2]}")
        if dies == what and counted(f"{path}.deaths") == 1:
            kill_worker()
        return what.upper()

    def do(op: compound.Compound, what: str) -> str:
        if saves:
            self.checkpoint(cursor=what)
        return op.do(what, act, what, undo=lambda done, what: note(path, f"undo {done}"))

    try:
        with self.compound() as op:
            return [do(op, what) for what in "ab"]
    except ValueError:
        if dies == "undone" and counted(f"{path}.deaths") == 1:
            kill_worker()
        raise


SOON = byrd.Retry(max_attempts=4, first=0.05, factor=1)
by_policy = app.task(bind=True, base=byrd.CheckpointTask, byrd_retry=SOON, name="by_policy")(in_rounds)
by_celery = app.task(
    bind=True, base=byrd.CheckpointTask, autoretry_for=(ValueError,), default_retry_delay=0, name="by_celery"
)(in_rounds)
retriable = app.task(bind=True, base=Untiring, retriable=True, compensation=None, name="retriable")(in_rounds)
by_hand = app.task(bind=True, base=byrd.CheckpointTask, name="by_hand")(in_rounds)


@app.task(bind=True, base=byrd.CheckpointTask, byrd_retry=SOON)
def another_way(self: byrd.CheckpointTask, path: str) -> str:
    """Do one thing, which is not to be had at first, else another; fail once after that."""

    def act(what: str) -> str:
        note(path, what)
        if what == "one" and counted(f"{path}.tries") == 1:
            raise ValueError("one is not to be had")
        return what

    with_one = False
    try:
        with self.compound() as op:
            op.do("one", act, "one", undo=print)
            with_one = True
    except ValueError:
        self.step("another", act, "another")
    if self.request.retries == 0:
        raise ConnectionError("not now")
    return "one" if with_one else "another"


# -- what only postpones the attempt ---------------------------------------------------------------


def told_to_wait(self: Any, path: str, where: str, times: int = 1) -> list[str]:
    """Do a and b; be told so often to come back, by b or by the undo of a."""
    error = byrd.LimitedError("429", retry_after=1) if hasattr(self, "byrd_limit") else byrd.RetryLater(0.1)

    def act(what: str) -> str:
        if what == "b" and where == "b" and counted(f"{path}.tries") <= times:
            raise error
        if what == "b" and where == "undo":
            raise ValueError("b is not to be had")
        note(path, what)
        return what.upper()

    def undo(done: str, _what: str) -> None:
        if where == "undo" and counted(f"{path}.tries") <= times:
            raise error
        note(path, f"undo {done}")

    with self.compound() as op:
        return [op.do(what, act, what, undo=undo) for what in "ab"]


limited = app.task(
    bind=True, base=byrd.CheckpointTask, byrd_limit=byrd.Limit(concurrency=1, key="path"), name="limited"
)(told_to_wait)
later = app.task(bind=True, base=byrd.CheckpointTask, byrd_retry=byrd.Retry(max_attempts=3), name="later")(told_to_wait)
