"""Processes that are forked from the test's own, to be killed: its app, fixtures and closures are at hand there."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import platform
import signal
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from billiard.util import _run_after_forkers
from celery import Celery
from celery.concurrency import get_implementation
from celery.signals import worker_ready

from byrd.store import head_revision
from byrd.testing import probe

_PR_SET_PDEATHSIG = 1


class Forked:
    """A process that runs ``target`` and ends; what it returns (JSON) is its :attr:`answer`."""

    def __init__(self, target: Callable[[], Any], *, orders: probe.Orders, log: Path) -> None:
        self.role, self.log = orders.role, log
        self._status: int | None = None
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of forking beside other threads, pytest-xdist's say; none of them is needed there.
            warnings.simplefilter("ignore", DeprecationWarning)
            gc.freeze()  # or the child's first collection would copy all of the parent's memory
            self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            _live(target, orders, log, writer)
        os.close(writer)
        self._reader = reader

    @property
    def killed(self) -> bool:
        """True when it has ended by SIGKILL."""
        return self.poll() == -signal.SIGKILL

    def poll(self) -> int | None:
        """Return its exit status, negative for a signal; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float) -> int:
        """Wait for its end.  Raises ``AssertionError`` after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"the {self.role} did not end within {timeout:.0f} s:\n{self.tail()}")
            time.sleep(0.005)
        return status

    @property
    def answer(self) -> Any:
        """What ``target`` returned; to be read once, after its end."""
        with os.fdopen(self._reader, "rb") as pipe:
            text = pipe.read()
        self._reader = -1
        if not text:
            raise AssertionError(f"the {self.role} ended without an answer:\n{self.tail()}")
        answer = json.loads(text)
        if "error" in answer:
            raise AssertionError(f"the {self.role} raised:\n{answer['error']}")
        return answer["value"]

    def end(self) -> None:
        """Kill what is left of it and of its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)  # one that was forked a moment ago has no group of its own yet
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1

    def tail(self, lines: int = 40) -> str:
        """Return the end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def _live(target: Callable[[], Any], orders: probe.Orders, log: Path, writer: int) -> None:
    """Be the child: never return."""
    status = 1
    try:
        os.setsid()
        _die_with_parent()
        _leave_pytest(log)
        _leave_connections()
        probe.install(orders)
        _run_after_forkers()  # Celery's and kombu's connections are the parent's
        answer: dict[str, Any]
        try:
            answer = {"value": target()}
            status = 0
        except Exception:  # noqa: BLE001 - the parent reports it
            answer = {"error": traceback.format_exc()}
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
    except BaseException:  # noqa: BLE001 - a forked child must not run on into its parent's code
        traceback.print_exc()
    finally:
        os._exit(status)


def _die_with_parent() -> None:
    """Linux ends a worker whose test is gone; elsewhere it goes on until somebody ends it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _leave_connections() -> None:
    """Have no part in connections that were open before the fork: two processes cannot talk on one.

    Whoever would try is told at once.  kombu for one, which closes its channels after a fork, would wait on the
    parent's connection for an answer that only the parent gets, if the test's app has listened for replies before.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in [int(path.name) for path in Path("/dev/fd").iterdir()]:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.dup2(nothing, descriptor)
    os.close(nothing)


def _leave_pytest(log: Path) -> None:
    """Write to the log, treat warnings and signals as a fresh process does."""
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    empty = os.open(os.devnull, os.O_RDONLY)
    for source, descriptor in ((empty, 0), (target, 1), (target, 2)):
        os.dup2(source, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    for handler in list(logging.getLogger().handlers):
        logging.getLogger().removeHandler(handler)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)


def warm_up(app: Celery, pool: str) -> None:
    """Do, before the fork, what each worker would do after it: imports, mostly."""
    for name in (
        "billiard.pool",
        "byrd.worker.request",
        "celery.app.log",
        "celery.apps.worker",
        "celery.events",
        "celery.worker.autoscale",
        "celery.worker.components",
        "celery.worker.consumer",
        "celery.worker.consumer.delayed_delivery",
        "celery.worker.strategy",
    ):
        importlib.import_module(name)
    get_implementation(pool)
    head_revision()
    platform.platform()  # for the banner, by running a program
    _ = app.backend


def run_worker(
    app: Celery, *, pool: str, concurrency: int, queues: list[str], settings: dict[str, Any], ready: Path
) -> None:
    """Be a Celery worker, until killed.  ``ready``: a file to make once it takes messages."""
    app.conf.update(settings)
    worker_ready.connect(lambda **_: ready.touch(), weak=False)
    worker = app.Worker(
        hostname=f"crash-{os.getpid()}@localhost",
        pool=pool,
        concurrency=concurrency,
        queues=queues,
        loglevel="INFO",
        without_mingle=True,
        without_gossip=True,
        without_heartbeat=True,
    )
    worker.start()
