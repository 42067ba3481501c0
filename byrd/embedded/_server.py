"""What both servers share: the data folder and its locks, the port, starting until ready, stopping, restarting."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import tempfile
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from byrd.embedded._cache import flock_within
from byrd.embedded._process import HOST, ServerProcess, free_port
from byrd.embedded._user import ServerUser, give, reaches, server_user
from byrd.errors import EmbeddedServerError

_START_SECONDS = 60.0
_EARLIER_SERVER_SECONDS = 40.0  # the guard's patience with a server, and a little more
_MAX_LOG_BYTES = 10_000_000
_PORT_ATTEMPTS = 20
_MEMORY_DIR = Path("/dev/shm")  # noqa: S108 - mkdtemp makes it safe
_MIN_MEMORY_BYTES = 2**30


class EmbeddedServer(ABC):
    """A server in a data folder. In it: ``<kind>/`` the data, ``<kind>.lock`` and ``<kind>.log``.

    Use it in a ``with`` block, or call `close()` when done. One that was never closed stops when this process ends.
    A child made by ``os.fork()`` may use the address, but starts and stops nothing.
    """

    kind: ClassVar[str]
    label: ClassVar[str]
    _stop_signal: ClassVar[signal.Signals]

    def __init__(self, data_dir: Path | None, *, port: int | None, in_memory: bool = False) -> None:
        if in_memory and data_dir is not None:
            raise EmbeddedServerError("Only temporary data can be held in memory: leave data_dir out.")
        self._given_dir = data_dir.absolute() if data_dir else None
        self._dir: Path | None = None
        self._in_memory = in_memory
        self._given_port = port
        self._port = port
        self._user: ServerUser | None = None
        self._lock: int | None = None
        self._process: ServerProcess | None = None
        self._inherited = False
        _servers.add(self)

    def __repr__(self) -> str:
        state = f"pid {self.pid} on port {self.port}" if self.running else "not running"
        return f"<{type(self).__name__}: {state}>"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    @abstractmethod
    def url(self) -> str:
        """The address that clients use; the same for every start of this object."""

    @property
    def port(self) -> int:
        if self._port is None:
            raise EmbeddedServerError(f"{self.label} has no port before its first start: call start().")
        return self._port

    @property
    def pid(self) -> int:
        if self._process is None or not self.running:
            raise EmbeddedServerError(f"{self.label} is not running: call start().")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.exit_status is None

    @property
    def data_dir(self) -> Path:
        """The folder that was given, or the temporary one."""
        if self._dir is None:
            raise EmbeddedServerError(f"{self.label} has no data folder before its first start: call start().")
        return self._dir

    @property
    def log_file(self) -> Path:
        return self.data_dir / f"{self.kind}.log"

    def start(self) -> Self:
        """Start the server, if it does not run, and return when it answers."""
        if self._inherited:
            raise EmbeddedServerError(f"This {self.label} belongs to the parent process, which alone may start it.")
        if self.running:
            return self
        first_start = self._lock is None
        try:
            self._claim_data_dir()
            os.close(self._open_log())  # waits for what is left of an earlier server before its data is touched
            self._prepare()
            self._launch()
        except BaseException as error:
            if first_start:
                self.close()
            else:
                self.kill()
            if isinstance(error, OSError):
                raise EmbeddedServerError(f"{self.label} could not be started: {error}.") from error
            raise
        return self

    def stop(self) -> None:
        """Stop the server in order and keep its data."""
        self._stop((self._stop_signal, 30.0))

    def kill(self) -> None:
        """SIGKILL the server and its children; the data stays as a power cut of the server would leave it."""
        if self._process is not None and self.running and not self._inherited:
            self._process.kill()

    def restart(self) -> Self:
        """Stop the server and start it again on the same port."""
        self.stop()
        return self.start()

    def close(self) -> None:
        """Stop the server for good: give up the data folder, and delete it if it is a temporary one."""
        if self._inherited:
            return
        self.stop()
        if self._dir is not None and self._given_dir is None:
            shutil.rmtree(self._dir, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        self._dir, self._lock, self._port = None, None, self._given_port

    @property
    def _store(self) -> Path:
        return self.data_dir / self.kind

    @abstractmethod
    def _prepare(self) -> None:
        """Make the data folder ready for a start."""

    @abstractmethod
    def _command(self, port: int) -> Sequence[str | Path]:
        """The server's command line."""

    @abstractmethod
    def _answers(self, pid: int, port: int) -> bool:
        """Tell whether the server on `port` is ready, and is the process that we started."""

    def _stop(self, *steps: tuple[signal.Signals, float]) -> None:
        if self._process is not None and self.running and not self._inherited and not self._process.stop(*steps):
            self._process.kill()

    def _claim_data_dir(self) -> None:
        if self._lock is not None:
            return
        if self._given_dir is None:
            self._user = server_user()
            self._dir = _temporary_dir(self.kind, self._user, in_memory=self._in_memory)
        else:
            self._user = server_user(self._given_dir / self.kind)
            self._given_dir.mkdir(mode=0o711 if self._user else 0o700, parents=True, exist_ok=True)
            self._dir = self._given_dir
        if not reaches(self._user, self._dir):
            raise EmbeddedServerError(
                f"As root, {self.label} runs as user {self._user.name if self._user else ''}, who cannot enter "
                f"{self._dir}: choose a data folder outside of private homes, or run as an ordinary user."
            )
        lock = os.open(self._dir / f"{self.kind}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        if not flock_within(lock, 0):
            owner = os.pread(lock, 20, 0).decode() or "unknown"
            os.close(lock)
            raise EmbeddedServerError(
                f"The {self.label} in {self._dir} belongs to another process (pid {owner}): stop that one first, or "
                "choose another data folder."
            )
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        self._lock = lock

    def _launch(self) -> None:
        for _ in range(_PORT_ATTEMPTS):
            port = self._port or free_port()
            if self._launch_on(port):
                self._port = port
                return
            if self._port is not None:
                raise EmbeddedServerError(
                    f"{self.label} cannot listen on {HOST}:{port}, which another program uses: stop that program, or "
                    "choose another port."
                )
        raise EmbeddedServerError(f"{self.label} found {_PORT_ATTEMPTS} ports taken, one after the other.")

    def _launch_on(self, port: int) -> bool:
        log = self._open_log()
        try:
            log_start = os.fstat(log).st_size
            self._process = ServerProcess(
                self._command(port),
                log=log,
                folder=self._store,
                user=self._user,
                stop_signal=self._stop_signal,
                remove=self._dir if self._given_dir is None else None,
            )
        finally:
            os.close(log)
        return self._is_ready(self._process, port, log_start)

    def _open_log(self) -> int:
        """Open the log, locked. The server inherits lock and file as its output, so that both last as long as it does.

        So a lock that cannot be had means that an earlier server, or a child of it, has not ended yet.
        """
        log = os.open(self.log_file, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600)
        try:
            if not flock_within(log, _EARLIER_SERVER_SECONDS):
                raise EmbeddedServerError(
                    f"An earlier {self.label} still runs in {self._dir}: stop the processes that hold {self.log_file}."
                )
            if os.fstat(log).st_size > _MAX_LOG_BYTES:
                os.ftruncate(log, 0)
        except BaseException:
            os.close(log)
            raise
        return log

    def _is_ready(self, process: ServerProcess, port: int, log_start: int) -> bool:
        """Wait until the server answers; False if it ended because its port was taken."""
        deadline = time.monotonic() + _START_SECONDS
        while process.exit_status is None:
            if self._answers(process.pid, port):
                return True
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"{self.label} was not ready within {_START_SECONDS:g} seconds. {self._log_since(log_start)}"
                )
            time.sleep(0.01)
        said = self._log_since(log_start)
        if "Address already in use" in said:
            return False
        raise EmbeddedServerError(f"{self.label} ended while it started (exit status {process.exit_status}). {said}")

    def _log_since(self, offset: int) -> str:
        with self.log_file.open("rb") as log:
            log.seek(offset)
            text = log.read().decode(errors="replace").strip()
        return f"Its log says:\n{text[-3000:]}"

    def _let_go(self) -> None:
        """In a forked child: hold nothing that would keep the server or its lock when the parent is gone."""
        self._inherited = True
        if self._process is not None:
            self._process.cut_leash()
        if self._lock is not None:
            os.close(self._lock)


def reachable_data_dir(preferred: Path) -> Path:
    """Return `preferred`, or, where root's servers could not reach it (a private home), its stand-in in /var/lib."""
    preferred = preferred.absolute()
    nearest = next(folder for folder in (preferred, *preferred.parents) if folder.is_dir())
    if reaches(server_user(), nearest):
        return preferred
    digest = hashlib.sha256(os.fsencode(preferred)).hexdigest()[:12]
    return Path("/var/lib/byrd") / f"{preferred.parent.name}-{digest}"


def _temporary_dir(kind: str, user: ServerUser | None, *, in_memory: bool) -> Path:
    parents = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]  # noqa: S108 - mkdtemp makes it safe
    if in_memory and _MEMORY_DIR.is_dir() and shutil.disk_usage(_MEMORY_DIR).free >= _MIN_MEMORY_BYTES:
        parents.insert(0, _MEMORY_DIR)
    for parent in parents:
        if os.access(parent, os.W_OK | os.X_OK) and reaches(user, parent):
            folder = Path(tempfile.mkdtemp(prefix=f"byrd-{kind}-", dir=parent))
            give(folder, user)  # so that the guard, who runs as that user, can remove it
            return folder
    raise EmbeddedServerError(f"{user.name if user else 'This user'} can enter no folder for temporary files.")


_servers: weakref.WeakSet[EmbeddedServer] = weakref.WeakSet()


def _let_go_of_all() -> None:
    for server in list(_servers):
        with contextlib.suppress(OSError):
            server._let_go()  # noqa: SLF001 - the fork hook belongs to the class


os.register_at_fork(after_in_child=_let_go_of_all)
