"""The link to a peer's client process: requests out, answers and the marks of its clock in."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.peers.protocol import ROOT, Config
from benchmarks.servers import Cpu, Memory, Servers

_ANSWER_SECONDS = 600.0
_END_SECONDS = 20.0


class Client:
    """A peer's client, running."""

    def __init__(self, process: subprocess.Popen[bytes], servers: Servers, log: Path) -> None:
        self._process = process
        self._servers = servers
        self._log = log
        self._heard = b""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have the peer do something; return its answer, with the CPU seconds that passed while its clock ran."""
        self._say(json.dumps({"do": do, **arguments}))
        deadline = time.monotonic() + _ANSWER_SECONDS
        cpu: dict[str, float] | None = None
        before: Cpu | None = None
        while True:
            answer: dict[str, Any] = json.loads(self._line(deadline))
            if "event" in answer:
                now = Cpu.read(self._process.pid, self._servers)
                if answer["event"] == "begin":
                    before = now
                elif before is not None:
                    cpu = now.since(before)
                self._say("")
            elif "error" in answer:
                raise self._error(answer["error"])
            else:
                return {**answer, "cpu": cpu} if cpu else answer

    def memory(self) -> Memory:
        """Look at the workers' memory."""
        return Memory.read(self._process.pid)

    def _say(self, line: str) -> None:
        if self._process.stdin is None:
            raise AssertionError("it was opened as a pipe")
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error("its client has ended") from None

    def _line(self, deadline: float) -> bytes:
        if self._process.stdout is None:
            raise AssertionError("it was opened as a pipe")
        output = self._process.stdout.fileno()
        while b"\n" not in self._heard:
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._error(f"there was no answer for {_ANSWER_SECONDS:g} s")
            more = os.read(output, 1 << 16)
            if not more:
                raise self._error("its client has ended")
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def _error(self, message: str) -> BenchmarkError:
        said = self._log.read_text(errors="replace").strip()[-2000:]
        return BenchmarkError(f"{message}. Its log ends with:\n{said or '(nothing)'}")


@contextmanager
def client(python: Sequence[str], module: str, config: Config, servers: Servers, log: Path) -> Iterator[Client]:
    """Start a peer's client; end it, and all processes that it started, at the end of the block."""
    # Byrd's own variables would send an engine elsewhere than to the servers of this run.
    own = {name: value for name, value in os.environ.items() if not name.startswith("BYRD_")}
    environment = {**own, "PYTHONPATH": str(ROOT), **config.environment()}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*python, "-m", f"benchmarks.peers.{module}"], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield Client(process, servers, log)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the client's input, which ends it and its workers; kill what is still there after that."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its session: the workers too
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
