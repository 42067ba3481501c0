"""The tasks of the canvas tests, given to any app: to one with Byrd, to a plain one, to an eager one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import redis
from celery import Celery, Task

from tests.canvas.recipes import Recipe, build

#: Notes that a callback or an errback of the canvas ``key`` was called, and with what.
Write = Callable[[str, list[Any]], None]


def define(app: Celery, write: Write) -> SimpleNamespace:  # noqa: C901 - a list of tasks
    """Give the app its tasks."""

    @app.task(name="canvas.call", shared=False)
    def call(*args: Any, label: Any = None) -> list[Any]:
        return [label, *args]

    @app.task(name="canvas.one", shared=False)
    def one(arg: Any) -> list[Any]:
        return ["one", arg]

    @app.task(name="canvas.fail", shared=False)
    def fail(*args: Any, label: Any = None) -> None:
        raise ValueError(label)

    @app.task(name="canvas.retry", shared=False, bind=True, max_retries=None)
    def retry(self: Task, *args: Any, label: Any = None, failures: int) -> list[Any]:
        if self.request.retries < failures:
            raise self.retry(countdown=0)
        return [label, self.request.retries, *args]

    @app.task(name="canvas.swap", shared=False, bind=True)
    def swap(self: Task, *args: Any, label: Any = None, to: Recipe) -> Any:
        return self.replace(swapped(self.app, args, label=label, to=to))

    @app.task(name="canvas.grow", shared=False, bind=True)
    def grow(self: Task, *args: Any, label: Any = None, add: Recipe) -> list[Any]:
        self.add_to_chord(build(add, self.app))
        return [label, *args]

    @app.task(name="canvas.ordered", shared=False)
    def ordered(values: list[Any], label: Any = None) -> list[Any]:
        return [label, sorted(values, key=json.dumps)]

    @app.task(name="canvas.give_up", shared=False, bind=True, max_retries=2)
    def give_up(self: Task, label: Any = None) -> None:
        raise self.retry(exc=ValueError(label), countdown=0)

    @app.task(name="canvas.again", shared=False, bind=True)
    def again(self: Task, *args: Any) -> list[Any]:
        """Retry with other arguments."""
        if self.request.retries == 0:
            raise self.retry(args=["new", *args], countdown=0)
        return list(args)

    @app.task(name="canvas.info", shared=False, bind=True)
    def info(self: Task, *args: Any) -> dict[str, Any]:
        """What the task is told about itself."""
        request = self.request
        return {
            "args": list(args),
            "headers": request.headers,
            "stamps": request.stamps,
            "timelimit": request.timelimit,
            "priority": request.delivery_info["priority"],
            "in_group": request.group is not None,
            "group_index": request.group_index,
            "has_parent": request.parent_id is not None,
        }

    @app.task(name="canvas.log", shared=False)
    def log(*args: Any, label: Any = None, key: str) -> None:
        write(key, [label, *args])

    @app.task(name="canvas.log_error", shared=False)
    def log_error(task_id: str, *, label: Any = None, key: str) -> None:
        write(key, [label, "old style", isinstance(task_id, str)])

    @app.task(name="canvas.log_failure", shared=False)
    def log_failure(request: Any, exc: Any, traceback: Any, *, label: Any = None, key: str) -> None:
        write(key, [label, "new style", type(exc).__name__])

    return SimpleNamespace(
        **{name.removeprefix("canvas."): task for name, task in app.tasks.items() if "canvas." in name}
    )


def swapped(app: Celery, args: Sequence[Any], *, label: Any, to: Recipe) -> Any:
    """Return what a ``swap`` replaces itself by: a canvas that shows what the task was given."""
    canvas = build(to, app)
    return app.tasks["canvas.call"].si(*args, label=label) | canvas if args else canvas


def writer(app: Celery, url: str) -> Write:
    """Return a :data:`Write` that keeps its notes in Redis, for the test to read."""

    def write(key: str, entry: list[Any]) -> None:
        with redis.Redis.from_url(url) as client:
            client.rpush(f"log:{app.main}:{key}", json.dumps(entry))

    return write
