"""An app with one task for each thing of Celery's that must go on working in a step.

Tasks note what they see in files of the folder ``NOTES``, which the test reads.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NoReturn

from celery import Celery, Task, shared_task, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

import byrd
from tests.apps import orders

app = Celery("features")
NOTES = Path(os.environ.get("NOTES", "/nonexistent"))


def note(name: str, **facts: Any) -> None:
    """Append a line of JSON to a file of the test's."""
    with (NOTES / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts, default=str) + "\n")


@app.task
def before_byrd(x: int) -> int:
    """Registered before the engine."""
    return x + 1


engine = byrd.Byrd(app)


@app.task
def after_byrd(x: int) -> int:
    """Registered after the engine."""
    return x + 10


@shared_task(name="features.shared")
def shared(x: int) -> int:
    """A task of a library."""
    return x + 100


class Counting(Task):
    """A base class of the user's own."""

    abstract = True
    factor = 3

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Wrap each call."""
        return self.run(*args, **kwargs) * self.factor

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Hook."""
        note("hooks", hook="before_start", id=task_id, args=args)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        """Hook."""
        note("hooks", hook="on_success", id=task_id, retval=retval)

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Hook."""
        note("hooks", hook="on_retry", id=task_id, exc=repr(exc))

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Hook."""
        note("hooks", hook="on_failure", id=task_id, exc=repr(exc))

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Hook."""
        note("hooks", hook="after_return", id=task_id, status=status)


@app.task(base=Counting, bind=True, max_retries=1)
def counted(self: Task, x: int, failures: int = 0) -> int:
    """Through a custom base; fails as often as it is told."""
    if self.request.retries < failures:
        raise self.retry(exc=ValueError("again"), countdown=0)
    return x


@app.task(bind=True)
def request(self: Task, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return what ``self.request`` says."""
    found = self.request
    return {
        "id": found.id,
        "retries": found.retries,
        "root_id": found.root_id,
        "parent_id": found.parent_id,
        "args": list(found.args),
        "kwargs": found.kwargs,
        "headers": found.headers,
        "stamps": found.stamps,
        "group": found.group,
        "group_index": found.group_index,
        "hostname": found.hostname,
        "called_directly": found.called_directly,
        "is_eager": found.is_eager,
        "timelimit": found.timelimit,
        "queue": (found.delivery_info or {}).get("routing_key"),
        "pid": os.getpid(),
    }


@app.task(bind=True, autoretry_for=(KeyError,), retry_backoff=False, default_retry_delay=0.01, max_retries=4)
def autoretried(self: Task, failures: int) -> int:
    """Raise KeyError this many times."""
    if self.request.retries < failures:
        raise KeyError(self.request.retries)
    return int(self.request.retries)


@app.task(bind=True, max_retries=3)
def retried_with(self: Task, x: int, y: int = 0) -> list[Any]:
    """Retry with other arguments, then return them."""
    if self.request.retries == 0:
        raise self.retry(args=(x + 1,), kwargs={"y": 7}, countdown=0)
    return [x, y, self.request.retries]


@app.task(bind=True, max_retries=1)
def exhausted(self: Task) -> NoReturn:
    """Retry more often than allowed."""
    try:
        raise LookupError("never there")
    except LookupError as exc:
        raise self.retry(exc=exc, countdown=0) from exc


@app.task(throws=(ValueError,))
def expected() -> NoReturn:
    """Raise an error that is expected."""
    raise ValueError("expected")


@app.task(bind=True, soft_time_limit=1, time_limit=30)
def soft(self: Task) -> str:
    """Be stopped by the soft time limit, and end well."""
    try:
        time.sleep(20)
    except SoftTimeLimitExceeded:
        return "soft"
    return "not stopped"


@app.task(time_limit=1)
def hard() -> None:
    """Be killed by the hard time limit."""
    time.sleep(30)


@app.task(ignore_result=True)
def ignoring(x: int) -> int:
    """Its result is of no interest, but its successor gets it."""
    return x * 2


@app.task
def ignored() -> NoReturn:
    """End without an outcome."""
    raise Ignore("nothing to do")


@app.task(bind=True)
def rejected(self: Task, requeue: bool, path: str) -> str:
    """Reject the message the first time."""
    marker = Path(path)
    if marker.exists() and requeue:
        return "second time"
    marker.touch()
    raise Reject("not now", requeue=requeue)


order = app.task(pydantic=True)(orders.order)


@app.task
def unjsonable() -> Any:
    """Return what JSON cannot hold."""
    return object()


@app.task(bind=True)
def progressing(self: Task, path: str) -> str:
    """Show a state of the user's own until the file is there."""
    self.update_state(state="PROGRESS", meta={"done": 3})
    while not Path(path).exists():
        time.sleep(0.02)
    return "done"


@app.task(bind=True)
def once(self: Task, name: str, seconds: float = 0.0, value: Any = None) -> Any:
    """Note each execution, take some time, return the value."""
    note(name, attempt=self.request.byrd.number, pid=os.getpid(), at=time.time())
    time.sleep(seconds)
    return value


@app.task
def gather(values: list[Any]) -> list[Any]:
    """Return the list."""
    return values


@app.task
def child_killer(path: str) -> str:
    """Kill its own pool process, unless the file says that it did so before."""
    marker = Path(path)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), 9)
    return "survived"


@app.task
def slow_killer(path: str, seconds: float) -> str:
    """Kill its own pool process after a while, unless the file says that it did so before."""
    if not Path(path).exists():
        time.sleep(seconds)
    return str(child_killer.run(path))


@app.task
def poison() -> None:
    """Kill its own pool process each time."""
    os._exit(1)


@signals.task_prerun.connect(weak=False)
def _prerun(task: Any = None, task_id: str | None = None, args: Any = None, **_: Any) -> None:
    if NOTES.exists():
        note("signals", signal="prerun", task=task.name, id=task_id, args=args)


@signals.task_postrun.connect(weak=False)
def _postrun(task: Any = None, task_id: str | None = None, state: str | None = None, **_: Any) -> None:
    if NOTES.exists():
        note("signals", signal="postrun", task=task.name, id=task_id, state=state)


@signals.task_success.connect(weak=False)
def _success(sender: Any = None, result: Any = None, **_: Any) -> None:
    if NOTES.exists():
        note("signals", signal="success", task=sender.name)


@signals.task_failure.connect(weak=False)
def _failure(sender: Any = None, exception: Any = None, **_: Any) -> None:
    if NOTES.exists():
        note("signals", signal="failure", task=sender.name, exc=repr(exception))


@signals.task_retry.connect(weak=False)
def _retry(sender: Any = None, **_: Any) -> None:
    if NOTES.exists():
        note("signals", signal="retry", task=sender.name)


@app.task
def leaving() -> None:
    """Leave the process, or try to."""
    raise SystemExit(3)


@app.task(bind=True)
def retried_then_ignored(self: Task) -> str:
    """Ask for a retry without raising it, then give up the message."""
    if self.request.retries == 0:
        self.retry(countdown=0, throw=False)
        raise Ignore
    return "retried"


@app.task(bind=True)
def replacing(self: Task, x: int) -> Any:
    """Replace itself."""
    return self.replace(before_byrd.s(x))


@app.task
def other(*args: Any) -> str:
    """A task that is not the step's."""
    note("other", args=args)
    return "other"
