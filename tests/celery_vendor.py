"""A vendor for pytest-celery whose "containers" are processes of this machine: no Docker engine is needed.

Its nodes ask little of a container: to be ready, to tell its logs, to be killed and restarted.  The fixtures that put
these nodes in the place of the stock ones are in ``tests/smoke/conftest.py``.
"""

from __future__ import annotations

import shlex
import signal as signals
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest_celery

from byrd.embedded import EmbeddedValkey
from tests.cluster import START_SECONDS, Worker

#: Where pytest-celery has the module that tells of a worker's processes.
_CONTENT = Path(pytest_celery.__file__).parent / "vendors" / "worker" / "content"


class WorkerProcess:
    """A worker of the tests' cluster, for :class:`pytest_celery.CeleryTestWorker`."""

    #: The part of the node's name behind the ``@``.
    id = "localhost"

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.worker.name

    @property
    def status(self) -> str:
        """Docker's word for whether it runs."""
        return "running" if self.worker.running else "exited"

    def ready(self) -> bool:
        """Wait until it consumes."""
        self.worker.wait_for_log(r" ready\.", timeout=START_SECONDS)
        return True

    def logs(self) -> str:
        """Return all that it has logged."""
        return self.worker.log_text()

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send the signal; SIGKILL to its pool too, as the end of a container would."""
        number = signals.Signals[signal] if isinstance(signal, str) else signals.Signals(signal)
        if number == signals.SIGKILL:
            self.worker.kill()
        else:
            self.worker.stop(signal=number)

    def restart(self, timeout: float = START_SECONDS) -> None:
        """Stop it if it runs, and start it anew."""
        if self.worker.running:
            self.worker.stop(timeout)
        self.worker.restart()

    def reload(self) -> None:
        """Nothing is cached."""

    def teardown(self) -> None:
        """Leave it to the cluster that it is of."""

    def worker_name(self) -> str:
        """Return the part of the node's name before the ``@``."""
        return self.worker.name

    def exec_run(self, command: str) -> tuple[int, bytes]:
        """Run a command where the worker runs."""
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        done = subprocess.run(words, cwd=_CONTENT, capture_output=True, check=False)
        return done.returncode, done.stdout or done.stderr


class BrokerProcess:
    """An embedded Valkey, for :class:`pytest_celery.RedisTestBroker`."""

    id = name = "valkey"

    def __init__(self, server: EmbeddedValkey) -> None:
        self.server = server

    @property
    def celeryconfig(self) -> dict[str, Any]:
        """What an app needs to find it."""
        return {"url": self.server.url, "host_url": self.server.url, "port": self.server.port}

    @property
    def status(self) -> str:
        """Docker's word for whether it runs."""
        return "running" if self.server.running else "exited"

    def ready(self) -> bool:
        """Tell whether it answers, which it does once it was started."""
        return self.server.running

    def logs(self) -> str:
        """Return all that it has logged."""
        return self.server.log_file.read_text(errors="replace")

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Kill it, or stop it by any other signal."""
        if signal in ("SIGKILL", signals.SIGKILL):
            self.server.kill()
        else:
            self.server.stop()

    def restart(self, timeout: float = START_SECONDS) -> None:
        """Start it anew, on the same port, with what its append-only file holds."""
        self.server.restart()

    def reload(self) -> None:
        """Nothing is cached."""

    def teardown(self) -> None:
        """Leave it to the fixture that it is of."""
