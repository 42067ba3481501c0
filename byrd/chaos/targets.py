"""What may be touched: workers (of chaos's own, or named), Redis, Postgres.  Nothing else ever is."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from byrd.chaos.tasks import QUEUE
from byrd.errors import ConfigurationError
from byrd.store import WorkerRow

_COMMAND_SECONDS = 120.0
_STOP_SECONDS = 60.0
#: Ends a worker's group when this process is gone without having ended it: then the pipe breaks.
_GUARD = 'read -r _ || kill -KILL "-$1"'


class Server(Protocol):
    """Redis or Postgres: what can be stopped and started."""

    def stop(self, *, hard: bool) -> None:
        """Stop it; ``hard`` is a crash, where there is a choice."""

    def start(self) -> None:
        """Start it again."""


@dataclass(frozen=True, slots=True)
class CommandServer:
    """A server of the staging system, with the two commands that its operator named."""

    stop_command: str
    start_command: str

    def stop(self, *, hard: bool) -> None:
        """Stop it."""
        _call(self.stop_command)

    def start(self) -> None:
        """Start it again."""
        _call(self.start_command)


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A server of chaos's own."""

    stopping: Callable[[bool], None]
    starting: Callable[[], object]

    def stop(self, *, hard: bool) -> None:
        """Stop it."""
        self.stopping(hard)

    def start(self) -> None:
        """Start it again."""
        self.starting()


def _call(command: str) -> None:
    """Run a command to its end.  Ctrl-C is for us, not for it: a server that is half started would stay away."""
    try:
        process = subprocess.Popen(
            shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            said = _wait(process)
        except KeyboardInterrupt:
            _wait(process)
            raise
    except (OSError, ValueError, subprocess.TimeoutExpired) as exc:
        raise ConfigurationError(f"`{command}` could not be run: {exc}") from exc
    if process.returncode != 0:
        raise ConfigurationError(f"`{command}` failed with status {process.returncode}: {said.strip()[-500:]}")


def _wait(process: subprocess.Popen[str]) -> str:
    """Wait for a command's end; return what it has said of itself.  Kill it if it takes too long."""
    try:
        out, err = process.communicate(timeout=_COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return err or out


# -- workers of chaos's own ------------------------------------------------------------------------


class OwnWorkers:
    """Workers that chaos starts, kills and starts again, each in a process group of its own."""

    def __init__(self, app: str, count: int, *, concurrency: int, folder: Path, env: Mapping[str, str]) -> None:
        tag = secrets.token_hex(3)
        self._names = [f"chaos-{tag}-{number}@%h" for number in range(1, count + 1)]
        self._app, self._concurrency, self.folder, self._env = app, concurrency, folder, dict(env)
        self._running: dict[str, _Process] = {}

    def __len__(self) -> int:
        return len(self._names)

    def start(self) -> None:
        """Start all that do not run."""
        for name in self._names:
            found = self._running.get(name)
            if found is None or found.popen.poll() is not None:
                if found is not None:
                    found.end()
                self._running[name] = self._launch(name)

    def pids(self) -> set[int]:
        """Return the main processes that run."""
        return {found.popen.pid for found in self._running.values() if found.popen.poll() is None}

    def owns(self, pid: int) -> bool:
        """Tell whether a process is, or was, the main process of one of the workers."""
        return any(found.popen.pid == pid for found in self._running.values())

    def wait_gone(self, pid: int) -> None:
        """Wait until a worker that was told to end has ended; kill it in the end."""
        for found in self._running.values():
            if found.popen.pid == pid:
                with contextlib.suppress(subprocess.TimeoutExpired):  # then its group is killed
                    found.popen.wait(_STOP_SECONDS)
                found.end()

    def dead(self) -> str | None:
        """Return the name of a worker that ended by itself, if there is one."""
        return next((name for name, found in self._running.items() if found.popen.poll() is not None), None)

    def stop(self) -> None:
        """End all."""
        for found in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(found.popen.pid, signal.SIGCONT)
            found.popen.terminate()
        deadline = time.monotonic() + _STOP_SECONDS / 4
        for found in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                found.popen.wait(max(0.1, deadline - time.monotonic()))
            found.end()

    def _launch(self, name: str) -> _Process:
        command = [
            sys.executable, "-m", "celery", "-A", self._app, "worker", "-I", "byrd.chaos.load", "-Q", QUEUE, "-n", name,
            "-c", str(self._concurrency), "-l", "INFO", "--without-mingle", "--without-gossip",
        ]  # fmt: skip
        with (self.folder / f"{name.partition('@')[0]}.log").open("ab") as log:
            popen = subprocess.Popen(
                command, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        reader, leash = os.pipe()
        try:
            guard = ["/bin/sh", "-c", _GUARD, "guard", str(popen.pid)]
            # Nobody waits for it: it ends with us.
            subprocess.Popen(guard, stdin=reader, start_new_session=True).returncode = 0
        finally:
            os.close(reader)
        return _Process(popen, leash)


@dataclass(slots=True)
class _Process:
    popen: subprocess.Popen[bytes]
    leash: int

    def end(self) -> None:
        """Kill what is left of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        if self.leash >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(self.leash, b"\n")
            os.close(self.leash)
            self.leash = -1


# -- workers that the command line names -----------------------------------------------------------


def named_workers(names: Sequence[str], rows: Sequence[WorkerRow]) -> list[WorkerRow]:
    """Return the live workers that are named: by node name (with * and ?), by process id, or by pid file."""
    return [row for row in rows if row.alive and any(_is_named(row, name) for name in names)]


def _is_named(row: WorkerRow, name: str) -> bool:
    if name.isdigit():
        return row.pid == int(name)
    if os.sep in name or Path(name).is_file():
        try:
            return row.pid == int(Path(name).read_text(encoding="ascii").strip())
        except (OSError, ValueError):
            return False  # its worker has ended, and the next is not up yet
    return fnmatch.fnmatchcase(row.hostname, name)


def is_local(row: WorkerRow) -> bool:
    """Tell whether a worker's process is on this machine, and Celery's."""
    command = command_of(row.pid)
    return command is not None and "celery" in command


def check_local(row: WorkerRow) -> None:
    """Refuse a worker whose process is not on this machine, or is not Celery's."""
    if not is_local(row):
        raise ConfigurationError(
            f"worker {row.hostname} says that it is process {row.pid}, which is no Celery worker on this machine; run "
            "`byrd chaos` where the workers run, as a user who may signal them"
        )


def command_of(pid: int) -> str | None:
    """Return a process's command line; None when there is no such process."""
    proc = Path(f"/proc/{pid}/cmdline")
    if proc.parent.parent.joinpath("self").exists():
        try:
            return proc.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return None
    return _ps("-o", "command=", "-p", str(pid)).strip() or None


def children_of(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    listed = _ps("-A", "-o", "pid=,ppid=") if not Path("/proc/self/stat").exists() else _proc_parents()
    pairs = (line.split() for line in listed.splitlines())
    return [int(child) for child, parent in pairs if int(parent) == pid]


def _proc_parents() -> str:
    lines = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold anything.
            lines.append(f"{stat.parent.name} {stat.read_text(errors='replace').rpartition(')')[2].split()[1]}")
    return "\n".join(lines)


def _ps(*args: str) -> str:
    return subprocess.run(["ps", *args], check=False, capture_output=True, text=True).stdout  # noqa: S607 - of the system


def signal_tree(pid: int, number: signal.Signals, *, also: Sequence[int] = ()) -> list[int]:
    """Signal a worker's main process and its pool, and ``also`` others; return all of them."""
    pids = list(dict.fromkeys((pid, *children_of(pid), *also)))
    for each in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, number)
    return pids
