"""An app whose tasks misbehave: they kill, block, fork, leak, and return what nobody can store.

Tasks note what they do in files that the test names, one line each.  Settings come from the environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from celery import Celery
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from sqlalchemy import text

import byrd

app = Celery("rough")
_SETTINGS = {
    "byrd_lease_seconds": ("TEST_LEASE_SECONDS", float),
    "byrd_sweep_seconds": ("TEST_SWEEP_SECONDS", float),
    "byrd_max_preemptions": ("TEST_MAX_PREEMPTIONS", int),
    "byrd_max_value_bytes": ("TEST_MAX_VALUE_BYTES", int),
    "worker_max_tasks_per_child": ("TEST_TASKS_PER_CHILD", int),
    "worker_max_memory_per_child": ("TEST_MEMORY_PER_CHILD", int),
    "worker_soft_shutdown_timeout": ("TEST_SOFT_SHUTDOWN", float),
}
# A shorter lease than in production: tests wait for it.
app.conf.byrd_lease_seconds = 3.0
app.conf.update({name: read(os.environ[key]) for name, (key, read) in _SETTINGS.items() if key in os.environ})
engine = byrd.Byrd(app)


def note(path: str, fact: Any) -> int:
    """Append a line of JSON to a file, whole; return how many it has."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(fact) + "\n")
    return len(Path(path).read_text().splitlines())


def wait_for(path: str) -> None:
    """Wait until the file exists."""
    while not Path(path).exists():
        time.sleep(0.02)


@app.task
def add(x: Any, y: Any) -> Any:
    """x + y."""
    return x + y


@app.task
def echo(value: Any = None) -> Any:
    """The value itself."""
    return value


@app.task
def size(value: Any) -> int:
    """How long a value is."""
    return len(value)


@app.task
def wait_for_file(path: str, value: Any = None, notes: str | None = None) -> Any:
    """Run until the file exists: a step that ends when the test says so."""
    if notes is not None:
        note(notes, [os.getpid(), time.time()])
    wait_for(path)
    return value


@app.task
def orphan(path: str, value: Any = None) -> Any:
    """Outlive the main process, as pool processes do where the kernel does not end them with it (not on Linux)."""
    ctypes.CDLL(None).prctl(1, 0)
    Path(f"{path}.begun").touch()
    wait_for(path)
    return value


@app.task
def sleep(seconds: float, value: Any = None, notes: str | None = None) -> Any:
    """Take a while."""
    if notes is not None:
        note(notes, [os.getpid(), time.time()])
    time.sleep(seconds)
    return value


if "TEST_OLD_CODE" not in os.environ:

    @app.task
    def brand_new(value: Any) -> Any:
        """What a worker of the last deployment does not have."""
        return value


# -- deaths ----------------------------------------------------------------------------------------


def _segmentation_fault() -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    ctypes.string_at(0)


_DEATHS: dict[str, Callable[[], Any]] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "os._exit(0)": lambda: os._exit(0),
    "os._exit(3)": lambda: os._exit(3),
    "abort": os.abort,
    "segmentation fault": _segmentation_fault,
    "SIGKILL to the main process": lambda: os.killpg(os.getpgid(0), signal.SIGKILL),
}


@app.task
def die(how: str, notes: str, times: int = 1, after: float = 0.0) -> str:
    """End its own process, so many times."""
    tries = note(notes, [os.getpid(), time.time()])
    if tries <= times:
        time.sleep(after)
        _DEATHS[how]()
        time.sleep(60)
    return f"survived after {tries}"


@app.task
def hog(megabytes: int, limit_megabytes: int | None = None) -> int:
    """Take more memory than it may have."""
    if limit_megabytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (_memory() + limit_megabytes * 2**20, resource.RLIM_INFINITY))
    try:
        return len(b"x" * (megabytes * 2**20))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@app.task
def outgrows(folder: str, megabytes: int) -> int:
    """Take so much memory in the first attempt, once the test has put the process where there is less."""
    tries = note(f"{folder}/notes", os.getpid())
    if tries == 1:
        wait_for(f"{folder}/go")
        hog.run(megabytes)
    return tries


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# -- exceptions ------------------------------------------------------------------------------------


class BadManners(Exception):
    """Its text and its repr raise."""

    def __str__(self) -> str:
        """Raise."""
        raise RuntimeError("no text")

    __repr__ = __str__


class Unpicklable(Exception):
    """Cannot be pickled, nor made again from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one)
        self.lock = threading.Lock()

    def __reduce__(self) -> NoReturn:
        """Raise."""
        raise TypeError("not to be pickled")


class Bare(BaseException):
    """No Exception."""


def _recurse(n: int = 0) -> int:
    return _recurse(n + 1) + 1


def _raise(exc: BaseException) -> NoReturn:
    raise exc


_ERRORS: dict[str, Callable[[], Any]] = {
    "SystemExit": lambda: sys.exit(3),
    "KeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
    "GeneratorExit": lambda: _raise(GeneratorExit()),
    "BaseException": lambda: _raise(Bare("bare")),
    "RecursionError": _recurse,
    "MemoryError": lambda: hog.run(2**16, 256),
    "repr raises": lambda: _raise(BadManners("x")),
    "cannot be pickled": lambda: _raise(Unpicklable(1, 2)),
    "arguments that JSON has not": lambda: _raise(ValueError(object(), {1, 2}, b"\xff")),
    "NUL and lone surrogates": lambda: _raise(ValueError("a\0b\udcff")),
    "a name that is too long": lambda: _raise(ValueError("x" * 5_000_000)),
    "a group of errors": lambda: _raise(ExceptionGroup("two", [ValueError(1), BadManners()])),
}


@app.task
def raises(what: str) -> None:
    """Raise something unusual."""
    _ERRORS[what]()


# -- results ---------------------------------------------------------------------------------------


class Ugly:
    """No JSON."""

    def __repr__(self) -> str:
        """Raise."""
        raise RuntimeError("no repr")


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _ring() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


_RESULTS: dict[str, Callable[[], Any]] = {
    "an object": object,
    "an object without repr": Ugly,
    "a function": lambda: _ring,
    "a tuple as key": lambda: {(1, 2): 3},
    "too deep": lambda: _nested(100_000),
    "a ring": _ring,
    "too large an integer": lambda: 10**5000,
    "a generator": lambda: (n for n in range(3)),
    "NUL": lambda: "a\0b",
    "lone surrogates": lambda: "\udcff",
    "NaN": lambda: [math.nan, math.inf, -math.inf],
    "a large integer": lambda: 10**4000,
    "keys that are no strings": lambda: {1: "a", None: "b", False: "c", 1.5: "d"},
    "bytes": lambda: b"\xff\0",
    "a set": lambda: {1},
}


@app.task
def returns(what: str) -> Any:
    """Return something unusual."""
    return _RESULTS[what]()


@app.task
def nested(depth: int) -> Any:
    """Return lists in lists."""
    return _nested(depth)


@app.task
def big(megabytes: float, letter: str = "x") -> str:
    """Return a large text."""
    return letter * int(megabytes * 2**20)


@app.task(bind=True, base=byrd.CheckpointTask)
def big_checkpoint(self: byrd.CheckpointTask, megabytes: float) -> int:
    """Save a large cursor, and memoise a large value."""
    value = "x" * int(megabytes * 2**20)
    self.checkpoint(cursor=value)
    memo = self.step("big", lambda: value)
    saved = self.progress()
    assert saved is not None
    return len(saved.cursor) + len(memo)


# -- blocking --------------------------------------------------------------------------------------


@app.task
def hold_gil(seconds: float, notes: str, times: int = 1) -> str:
    """Let no other thread of the process run, so many times."""
    if note(notes, [os.getpid(), time.time()]) <= times:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    return "let go"


@app.task
def block_loop(seconds: float, notes: str, times: int = 1) -> str:
    """Let no other greenlet run, so many times."""
    if note(notes, [os.getpid(), time.time()]) <= times:
        blocking = getattr(time.sleep, "__wrapped__", None) or ctypes.CDLL(None).usleep
        blocking(int(seconds * 1e6))
    return "let go"


@app.task(soft_time_limit=1)
def soft(seconds: float) -> str:
    """Run into the soft time limit, if the pool has one."""
    try:
        time.sleep(seconds)
    except SoftTimeLimitExceeded:
        return "soft"
    return "no limit"


@app.task(time_limit=1)
def hard(seconds: float) -> str:
    """Run into the hard time limit, if the pool has one."""
    time.sleep(seconds)
    return "no limit"


# -- what a process should not do ------------------------------------------------------------------


@app.task
def forks(notes: str, how: str = "returns") -> str:
    """Fork, and come back twice."""
    pid = os.fork()
    note(notes, [os.getpid(), pid])
    if pid == 0 and how == "raises":
        raise ValueError("in the fork")
    if pid == 0 and how == "exits":
        sys.exit(0)
    if pid:
        os.waitpid(pid, 0)
    return "child" if pid == 0 else "parent"


@app.task
def ignores_signals() -> int:
    """Take the signals from Celery."""
    for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCHLD"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    return os.getpid()


@app.task
def closes_files() -> int:
    """Close everything, as code that makes itself a daemon does."""
    os.closerange(3, 1024)
    return os.getpid()


_leaked: list[Any] = []


@app.task
def leaks(megabytes: int, notes: str) -> int:
    """Keep memory for ever."""
    _leaked.append(os.urandom(2**20) * megabytes)
    note(notes, os.getpid())
    return os.getpid()


@app.task
def leaks_files(count: int) -> int:
    """Keep files open, until there are no more to be had."""
    with contextlib.suppress(OSError):
        _leaked.extend(os.open("/dev/null", os.O_RDONLY) for _ in range(count))
    return os.getpid()


@app.task
def leaks_threads(count: int) -> int:
    """Leave threads behind that never end, nor let the process end."""
    for _ in range(count):
        threading.Thread(target=threading.Event().wait).start()
    return os.getpid()


# -- progress --------------------------------------------------------------------------------------


def numbers(count: int, cursor: int | None) -> Iterator[tuple[int, int]]:
    """The numbers after the cursor."""
    for n in range(0 if cursor is None else cursor + 1, count):
        yield n, n


@app.task(bind=True, base=byrd.CheckpointTask)
def count_up(
    self: byrd.CheckpointTask, notes: str, count: int, seconds: float, batch_size: int = 1
) -> dict[str, int | None]:
    """Process the numbers below ``count``, each noted with its process and time."""

    def process(n: int) -> int:
        time.sleep(seconds)
        note(notes, [n, os.getpid(), time.time()])
        return n

    done = self.iterate(lambda cursor: numbers(count, cursor), process, batch_size=batch_size)
    return {"cursor": done.cursor, "completed": done.completed, "failed": done.failed}


# -- writing after the lease is over ---------------------------------------------------------------


def _save(conn: Any, name: str) -> None:
    conn.execute(text("INSERT INTO zombies (name) VALUES (:name)"), {"name": name})


def _in_transaction(self: byrd.CheckpointTask) -> None:
    with self.transaction() as conn:
        _save(conn, "transaction")
        self.checkpoint(cursor="zombie")


def _bad_item(_: int) -> NoReturn:
    raise ValueError("a zombie's item")


_WRITES: dict[str, Callable[[byrd.CheckpointTask], Any]] = {
    "result": lambda self: None,
    "error": lambda self: _raise(ValueError("a zombie's")),
    "retry": lambda self: self.retry(countdown=0),
    "replace": lambda self: self.replace(echo.s("a zombie's")),
    "ignore": lambda self: _raise(Ignore("a zombie's")),
    "reject": lambda self: _raise(Reject("a zombie's", requeue=True)),
    "checkpoint": lambda self: self.checkpoint(cursor="zombie"),
    "transaction": _in_transaction,
    "memoised sub-step": lambda self: self.step("memo", lambda: "a zombie's"),
    "batch": lambda self: self.iterate(
        lambda cursor: numbers(1, cursor), lambda n: n, save=lambda conn, _: _save(conn, "batch")
    ),
    "quarantine": lambda self: self.iterate(lambda cursor: numbers(1, cursor), _bad_item, item_retries=0),
    "chord": lambda self: self.add_to_chord(echo.s("a zombie's")),
}


@app.task(bind=True, base=byrd.CheckpointTask)
def zombie(self: byrd.CheckpointTask, write: str, folder: str) -> str:
    """Write something in the first attempt, once the test says so."""
    if note(f"{folder}/{write}", os.getpid()) == 1:
        wait_for(f"{folder}/write")
        _WRITES[write](self)
        if write != "result":
            note(f"{folder}/written", write)
        return "a zombie's"
    wait_for(f"{folder}/end")
    return "alive"


@app.task(base=byrd.SagaTask)
def reserve(folder: str) -> str:
    """Reserve something."""
    return "reserved"


@reserve.compensation
def release(reservation: str, folder: str) -> str:
    """Undo it."""
    if note(f"{folder}/compensation", os.getpid()) == 1:
        wait_for(f"{folder}/write")
        return "a zombie's"
    wait_for(f"{folder}/end")
    return "alive"
