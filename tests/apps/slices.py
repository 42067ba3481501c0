"""An app whose tasks note when, where and with what request they run, to see what a slice of steps does to them.

Notes are lines of JSON in files of the folder ``NOTES``, which the test reads.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NoReturn

from celery import Celery, Task, signals
from celery.exceptions import Ignore, Reject

import byrd
from byrd.task import slices, standby
from byrd.task.runtime import runtime_of

app = Celery("slices")
app.conf.update(
    byrd_lease_seconds=3.0,
    byrd_slice_seconds=float(os.environ.get("TEST_SLICE_SECONDS", "0.2")),
    byrd_max_value_bytes=20_000,
)
engine = byrd.Byrd(app)
NOTES = Path(os.environ.get("NOTES", "/nonexistent"))
if "TEST_TRUE_SECONDS" in os.environ:  # for a machine that is busy meanwhile
    standby._TRUE_SECONDS = float(os.environ["TEST_TRUE_SECONDS"])
if "TEST_STAND_BY_SECONDS" in os.environ:
    standby._MOST_SECONDS = float(os.environ["TEST_STAND_BY_SECONDS"])
if "TEST_WAIT_SECONDS" in os.environ:
    slices._WAIT_SECONDS = float(os.environ["TEST_WAIT_SECONDS"])


def note(name: str, **facts: Any) -> None:
    """Append a line of JSON to a file of the test's, in one write."""
    if NOTES.exists():
        with (NOTES / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"pid": os.getpid(), "at": time.time(), **facts}, default=str) + "\n")


class Noting(Task):
    """Notes each call, and each hook."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Note that it runs."""
        note("ran", id=self.request.id, task=self.name, args=args)
        return self.run(*args, **kwargs)

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Hook."""
        note("calls", what="before_start", id=task_id)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        """Hook."""
        note("calls", what="on_success", id=task_id, retval=retval)

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Hook."""
        note("calls", what="on_retry", id=task_id)

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Hook."""
        note("calls", what="on_failure", id=task_id, exc=repr(exc))

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Hook."""
        note("calls", what="after_return", id=task_id, status=status)


app.Task = Noting


@app.task
def tick(*values: Any) -> Any:
    """Return the last value at once."""
    return values[-1] if values else None


@app.task
def nap(seconds: float, value: Any = None) -> Any:
    """Take some time."""
    time.sleep(seconds)
    return value


@app.task
def gather(values: list[Any]) -> list[Any]:
    """Return the list."""
    return values


def _seen(request: Any) -> dict[str, Any]:
    said = {k: v for k, v in vars(request).items() if not k.startswith("_") and k != "byrd"}
    found: dict[str, Any] = json.loads(json.dumps(said, default=str))
    return found


@app.task(bind=True)
def see(self: Task, *_: Any) -> dict[str, Any]:
    """Return all that the request says."""
    return _seen(self.request)


@app.task(bind=True)
def look(self: Task, *_: Any, **__: Any) -> dict[str, Any]:
    """The same, by another task."""
    return _seen(self.request)


@app.task(bind=True, rate_limit="100/s")
def limited(self: Task, *_: Any) -> dict[str, Any]:
    """The same, by a task that Celery counts."""
    return _seen(self.request)


@app.task(bind=True, time_limit=30, soft_time_limit=20)
def timed(self: Task, *_: Any) -> dict[str, Any]:
    """The same, by a task with time limits."""
    return _seen(self.request)


@app.task
def cope(until: str, says_so_once: bool = False) -> None:
    """Say until a file is there, as a process does whose slice takes all that is ready, that no other need join in."""
    said = runtime_of(app).standby
    said.say(copes=True)
    note("copes", ended=False)
    gives_up_at = time.monotonic() + 30
    while not Path(until).exists() and time.monotonic() < gives_up_at:
        time.sleep(0.002)
        if not says_so_once:
            said.say(copes=True)
    note("copes", ended=True)
    if not says_so_once:
        said.say(copes=False)


@app.task
def does_cope(*_: Any) -> bool:
    """Tell whether this process says that it copes."""
    return runtime_of(app).standby.copes()


@app.task(bind=True, max_retries=3)
def again(self: Task, value: Any) -> Any:
    """Ask for a retry the first time."""
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return value


@app.task
def fail(*_: Any) -> NoReturn:
    """Fail."""
    raise ValueError("no")


@app.task
def ignore(*_: Any) -> NoReturn:
    """End without an outcome."""
    raise Ignore("nothing to do")


@app.task
def reject(*_: Any) -> NoReturn:
    """Reject the message."""
    raise Reject("not now", requeue=False)


@app.task(bind=True)
def grow(self: Task, value: Any) -> Any:
    """Replace itself."""
    return self.replace(tick.s(value) | tick.s())


@app.task
def large(*_: Any) -> str:
    """Return more than may be recorded."""
    return "x" * 30_000


@app.task
def unjsonable(*_: Any) -> object:
    """Return what JSON cannot hold."""
    return object()


@app.task
def leave(*_: Any) -> NoReturn:
    """Try to leave the process."""
    raise SystemExit(3)


@app.task
def die(path: str, *, parent: bool = False) -> str:
    """Kill its process, and with ``parent`` the worker's main process before, unless the file is there already."""
    marker = Path(path)
    if not marker.exists():
        marker.touch()
        if parent:
            os.kill(os.getppid(), 9)
        os.kill(os.getpid(), 9)
    return "survived"


@signals.task_received.connect(weak=False)
def _received(request: Any = None, **_: Any) -> None:
    note("received", id=request.id, task=request.name)


@signals.before_task_publish.connect(weak=False)
def _trace(headers: dict[str, Any] | None = None, **_: Any) -> None:
    """What instrumentation for tracing does: each message bears a header of its own."""
    if headers is not None:
        headers["trace"] = f"of {headers['id']}"


@signals.task_prerun.connect(weak=False)
def _prerun(task_id: str | None = None, task: Any = None, **_: Any) -> None:
    note("calls", what="prerun", id=task_id, task=task.name)


@signals.task_postrun.connect(weak=False)
def _postrun(task_id: str | None = None, state: str | None = None, **_: Any) -> None:
    note("calls", what="postrun", id=task_id, state=state)


@signals.task_success.connect(weak=False)
def _success(sender: Any = None, **_: Any) -> None:
    note("calls", what="success", id=sender.request.id)


@signals.task_failure.connect(weak=False)
def _failure(sender: Any = None, task_id: str | None = None, **_: Any) -> None:
    note("calls", what="failure", id=task_id)


@signals.task_retry.connect(weak=False)
def _retry(request: Any = None, **_: Any) -> None:
    note("calls", what="retry", id=request.id)
