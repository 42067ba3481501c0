"""Runs the processes of a Procfile together: their logs in one stream, one end for all.

Why not honcho, which does this too: it signals whole process groups, and so kills the pool of a Celery worker that it
asks to stop, and after five seconds everything.  Here a process is asked first, and its children only when it is gone.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from byrd.errors import ConfigurationError

#: How long processes and their children have to end when they are asked to; then they are killed.
STOP_SECONDS = 15.0
_ENTRY = re.compile(r"^([A-Za-z0-9_-]+):\s*(.+)$")
#: What makes more than one command of a line: then a shell has to stay.
_COMPOUND = re.compile(r"[;&|\n]|^\s*[({!]|^\s*exec\s")
_ASSIGNED = re.compile(r"^\s*[A-Za-z_]\w*=")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a Procfile."""

    name: str
    command: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line that a process wrote."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A process has ended; ``status`` as a shell gives it: 128 and more are signals."""

    name: str
    status: int


@dataclass(frozen=True, slots=True)
class Stopping:
    """These processes were asked to stop."""

    names: list[str]


Event = Line | Ended | Stopping


def read_procfile(path: Path) -> list[Entry]:
    """Return the entries of a Procfile; raise :class:`ConfigurationError` for one that cannot be used."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be read ({exc.strerror}); name another one with --procfile") from None
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _ENTRY.match(line.strip())
        if match is None:
            raise ConfigurationError(f"{path}, line {number}: expected `name: command`, found {line.strip()!r}")
        entries.append(Entry(*match.groups()))
    if not entries:
        raise ConfigurationError(f"{path} names no processes")
    return entries


def chosen(entries: Sequence[Entry], only: Sequence[str]) -> list[Entry]:
    """Return the entries with these names, or all."""
    unknown = set(only) - {entry.name for entry in entries}
    if unknown:
        known = ", ".join(entry.name for entry in entries)
        raise ConfigurationError(f"the Procfile has no {', '.join(sorted(unknown))}; it has {known}")
    return [entry for entry in entries if not only or entry.name in only]


class Processes:
    """The running processes of a Procfile."""

    def __init__(self, entries: Sequence[Entry], env: Mapping[str, str], tell: Callable[[Event], None]) -> None:
        self._entries, self._env, self._tell = list(entries), dict(env), tell
        self._events: queue.Queue[Event] = queue.Queue()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._threads: list[threading.Thread] = []
        self._asked = 0

    def run(self) -> int:
        """Run all until one ends, or until Ctrl-C; end the others; return the exit status.

        That is 0 after Ctrl-C (or SIGTERM, or SIGHUP), else the status of the process that ended by itself.
        """
        with self._interrupted():
            try:
                for entry in self._entries:
                    self._start(entry)
                first = self._first_end()
                self._stop_all()
            finally:
                self._kill_all()
        return first

    def _start(self, entry: Entry) -> None:
        # A session of its own: Ctrl-C in the terminal reaches us alone, and we ask each process to stop.
        process = subprocess.Popen(
            ["/bin/sh", "-c", _replacing_the_shell(entry.command)],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._running[entry.name] = process
        self._threads.append(threading.Thread(target=self._follow, args=(entry.name, process), daemon=True))
        self._threads[-1].start()

    def _follow(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Pass on what a process writes, in a thread, until its output is closed and it has ended."""
        stream = process.stdout
        if stream is not None:
            for raw in stream:
                self._events.put(Line(name, raw.decode(errors="replace").rstrip("\r\n")))
        status = process.wait()
        self._events.put(Ended(name, status if status >= 0 else 128 - status))

    def _first_end(self) -> int:
        while not self._asked:
            for event in self._arrived(0.2):
                self._tell(event)
                if isinstance(event, Ended):
                    return event.status
            # A daemonised child may keep the pipe open: then the thread does not see the end.
            for name, process in self._running.items():
                status = process.poll()
                if status is not None and self._events.empty():
                    self._tell(Ended(name, status if status >= 0 else 128 - status))
                    return status if status >= 0 else 128 - status
        return 0

    def _stop_all(self) -> None:
        """Ask each process to stop, then the children that it left; another Ctrl-C ends the waiting."""
        asked, deadline = self._asked, time.monotonic() + STOP_SECONDS
        running = {name: process for name, process in self._running.items() if process.poll() is None}
        self._tell(Stopping(list(running)))
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        self._wait_while(self._alive, asked, deadline)
        if not self._alive():
            for group in self._groups():
                _signal_group(group, signal.SIGTERM)
            self._wait_while(self._groups, asked, deadline)

    def _wait_while(self, condition: Callable[[], object], asked: int, deadline: float) -> None:
        while condition() and self._asked == asked and time.monotonic() < deadline:
            for event in self._arrived(0.05):
                self._tell(event)

    def _kill_all(self) -> None:
        """End what is left, and pass on its last words."""
        for group in self._groups():
            _signal_group(group, signal.SIGKILL)
        for process in self._running.values():
            process.wait()
        for thread in self._threads:
            thread.join(1.0)
        for event in self._arrived(0.0):
            self._tell(event)

    def _groups(self) -> list[int]:
        """Return the process groups in which something is left."""
        return [process.pid for process in self._running.values() if _group_exists(process.pid)]

    def _alive(self) -> bool:
        return any(process.poll() is None for process in self._running.values())

    def _arrived(self, timeout: float) -> Iterator[Event]:
        """Yield the events that are there, waiting up to ``timeout`` seconds for the first."""
        with contextlib.suppress(queue.Empty):
            yield self._events.get(timeout=timeout)
            while True:
                yield self._events.get_nowait()

    @contextlib.contextmanager
    def _interrupted(self) -> Iterator[None]:
        def ask(_number: int, _frame: FrameType | None) -> None:
            self._asked += 1

        before = {number: signal.signal(number, ask) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _replacing_the_shell(command: str) -> str:
    """Let a simple command take the shell's place, so that it gets the signals meant for it."""
    if _COMPOUND.search(command):
        return command
    return f"exec env {command}" if _ASSIGNED.match(command) else f"exec {command}"


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
