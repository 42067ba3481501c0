"""One server process on a leash: it ends when we end it, and also when we are gone without having ended it.

Beside the server runs a shell that reads a pipe whose other end only we hold. When the pipe breaks, even by SIGKILL,
the shell stops the server. A line through the pipe lets the shell go in peace.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byrd.embedded._binaries import INSTALL_HINT
from byrd.embedded._user import ServerUser, popen_options
from byrd.errors import EmbeddedServerError

HOST = "127.0.0.1"

# Below the range from which systems take the ports of outgoing connections: while a server is down, no client can be
# given its port, nor, dialling it again and again, connect to itself.
_PORTS = range(20_000, 32_000)

# Arguments: the signal that stops the server, a folder to remove after it or '', the command. The shell becomes the
# server, so there is no moment without a guard; the guard is a grandchild, for Postgres minds children that are not its
# own.
_LEASH = """
exec 3<&0 </dev/null
(
    (
        trap '' INT HUP TERM
        read -r _ <&3 && exit
        kill -"$1" $$
        tries=0
        while kill -0 $$; do
            tries=$((tries + 1))
            [ "$tries" -eq 300 ] && kill -KILL $$
            sleep 0.1
        done
        [ -z "$2" ] || rm -rf -- "$2"
    ) >/dev/null 2>&1 &
)
exec 3<&-
shift 2
exec "$@"
"""


class ServerProcess:
    """A running server and the pipe that its guard reads."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: int,
        folder: Path,
        user: ServerUser | None,
        stop_signal: signal.Signals,
        remove: Path | None,
    ) -> None:
        import_psutil()  # kill() needs it: better missed now than then
        reader, self._leash = os.pipe()  # neither end is inherited by other programs that we start
        try:
            stop = stop_signal.name.removeprefix("SIG")
            self._popen = subprocess.Popen(
                ["/bin/sh", "-c", _LEASH, "byrd", stop, str(remove or ""), *command],
                stdin=reader,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to handle; the servers stop last
                **{**popen_options(user), "cwd": folder},
            )
        except BaseException:
            self.cut_leash()
            raise
        finally:
            os.close(reader)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_status(self) -> int | None:
        """None while the server runs."""
        status = self._popen.poll()
        if status is not None:
            self._dismiss_guard()  # its pid may be another program's before long
        return status

    def stop(self, *steps: tuple[signal.Signals, float]) -> bool:
        """Send one signal after the other, waiting the given seconds after each; tell whether the server ended."""
        for number, seconds in steps:
            self._popen.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(seconds)
                self._dismiss_guard()
                return True
        return False

    def kill(self) -> None:
        """End the server and all its children at once, as a power cut would."""
        psutil = import_psutil()
        victims = []
        with contextlib.suppress(psutil.Error):
            server = psutil.Process(self.pid)
            server.suspend()  # so that it starts no child after they were counted
            victims = server.children(recursive=True)
        self._popen.kill()
        self._popen.wait()
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        self._dismiss_guard()

    def cut_leash(self) -> None:
        """Close our end of the pipe; the guard stops the server if no other process holds it."""
        if self._leash >= 0:
            os.close(self._leash)
            self._leash = -1

    def _dismiss_guard(self) -> None:
        if self._leash >= 0:
            with contextlib.suppress(BrokenPipeError):  # the guard was killed
                os.write(self._leash, b"\n")
        self.cut_leash()


def free_port() -> int:
    """Return a loopback port that was free just now; whoever uses it has to try another if it no longer is."""
    for _ in range(200):
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
            probe.bind((HOST, port))
            return port
    raise EmbeddedServerError(f"No port between {_PORTS.start} and {_PORTS.stop - 1} is free on {HOST}.")


def works_in(pid: int, folder: Path) -> bool:
    """Tell whether process `pid` has `folder` as its working folder, as both servers have their data."""
    psutil = import_psutil()
    try:
        return Path(psutil.Process(pid).cwd()).resolve() == folder.resolve()
    except psutil.Error:  # gone, a zombie, or another user's, and those own no data of ours
        return False


def import_psutil() -> Any:
    try:
        import psutil
    except ImportError as error:
        raise EmbeddedServerError(f"The embedded servers need psutil: {INSTALL_HINT}.") from error
    return psutil
