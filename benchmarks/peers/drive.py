"""The client's process of a peer: measures what it is asked to, in lines of JSON on stdin and stdout.

How each kind of case is measured is written here, once for all peers; ``benchmarks/README.md`` tells it to readers.
Only the standard library is imported here.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from benchmarks.peers.protocol import Config, Peer, Shape

#: How often the ends are counted, in seconds; a count that takes long is made less often, to take a tenth of the time.
_LOOK_SECONDS = 0.02
_LOOK_SHARE = 10
#: How long nothing may end before the peer is said to hang, in seconds.
_STILL_SECONDS = 90.0
#: A drain is timed from the moment when this part of the runs has ended: by then all processes have started.
_STARTED = 0.1
#: Between two canvases at low load, in seconds: enough for everything to be idle again.
_PAUSE_SECONDS = (0.005, 0.03)
_BATCH = 100


class WrongResultError(Exception):
    """A canvas has another value than it must have."""


class Client:
    """Answers requests about one peer."""

    def __init__(self, peer: Peer, told: TextIO) -> None:
        self.peer = peer
        self._told = told
        self._waiting: list[tuple[Shape, list[Any]]] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out a request."""
        arguments = dict(request)
        operation: Callable[..., dict[str, Any]] = getattr(self, f"do_{arguments.pop('do')}")
        if "shape" in arguments:
            arguments["shape"] = Shape(**arguments["shape"])
        return operation(**arguments)

    def do_prepare(self) -> dict[str, Any]:
        """Make the tables, and say what the peer is and can."""
        self.peer.prepare()
        return {
            "version": self.peer.version,
            "shapes": sorted(self.peer.shapes),
            "modes": sorted(self.peer.modes),
        }

    def do_grow(self, finished: int) -> dict[str, Any]:
        """Fill the tables."""
        self.peer.grow(finished)
        return {}

    def do_submit(self, mode: str, count: int) -> dict[str, Any]:
        """Submit one-step runs while no worker is there; :meth:`do_drain` has them run."""
        shape = Shape("chain")
        if not self._waiting:
            self.peer.reset(shape)
        begin = sum(len(handles) for _, handles in self._waiting)
        numbers = range(begin, begin + count)
        self._event("begin")
        started = time.perf_counter()
        if mode == "batch":
            handles = [
                handle
                for first in range(0, count, _BATCH)
                for handle in self.peer.submit_batch(shape, numbers[first : first + _BATCH])
            ]
        else:
            submit = self.peer.submit_within if mode == "transaction" else self.peer.submit
            handles = [submit(shape, number) for number in numbers]
        seconds = time.perf_counter() - started
        self._event("end")
        self._waiting.append((shape, handles))
        return {"seconds": seconds, "runs": count}

    def do_drain(self, processes: int) -> dict[str, Any]:
        """Start the workers, and time how they run what was submitted before.

        ``cold_start_seconds`` is from the start of the workers to the first end; ``seconds`` from the moment when a
        tenth has ended until all have, and ``runs`` are those in between.
        """
        handles = [handle for _, some in self._waiting for handle in some]
        launched = time.perf_counter()
        self.peer.launch(processes)
        first = self._await(1)
        cold = time.perf_counter() - launched
        first = max(first, self._await(max(1, int(len(handles) * _STARTED))))
        self._event("begin")
        started = time.perf_counter()
        self._await(len(handles))
        seconds = time.perf_counter() - started
        self._event("end")
        self._verify(Shape("chain"), handles)
        self._waiting.clear()
        return {"cold_start_seconds": cold, "seconds": seconds, "runs": len(handles) - first}

    def do_saturate(self, shape: Shape, count: int) -> dict[str, Any]:
        """Submit canvases one after the other to running workers; time from the first submit to the last end."""
        self.peer.reset(shape)
        self._event("begin")
        started = time.perf_counter()
        handles = [self.peer.submit(shape, number) for number in range(count)]
        submitted = time.perf_counter()
        self._await(count)
        ended = time.perf_counter()
        self._event("end")
        self._verify(shape, handles)
        return {"submit_seconds": submitted - started, "seconds": ended - started, "steps": shape.steps(count)}

    def do_latency(self, shape: Shape, count: int) -> dict[str, Any]:
        """Submit a canvas and wait for its value, again and again; the system is idle in between."""
        taken, pause = [], random.Random(1)
        for number in range(count):
            time.sleep(pause.uniform(*_PAUSE_SECONDS))
            started = time.perf_counter()
            value = self.peer.wait(self.peer.submit(shape, number), shape)
            taken.append(time.perf_counter() - started)
            self._compare(value, shape, number)
        return {"latencies": taken}

    def do_load(self, shape: Shape, rate: float, seconds: float) -> dict[str, Any]:
        """Submit canvases at a rate; time from the moment when each was due to its end, as the peer recorded it.

        No ``latencies`` when the peer records no such times, or can be submitted to at half of the rate at most.
        """
        self.peer.reset(shape)
        count = max(1, int(rate * seconds))
        begin, handles, due = time.time(), [], []
        for number in range(count):
            due.append(begin + number / rate)
            time.sleep(max(0.0, due[-1] - time.time()))
            handles.append(self.peer.submit(shape, number))
        submitted = time.time() - begin
        self._await(count)
        ends = self.peer.end_times(handles)
        self._verify(shape, handles)
        if ends is None or submitted > 2 * seconds:
            return {"latencies": None}
        return {"latencies": [max(0.0, end - was_due) for end, was_due in zip(ends, due, strict=True)]}

    def do_checkpoints(self, items: int, every: int) -> dict[str, Any]:
        """Run a loop with and without checkpoints."""
        return {"loops": self.peer.checkpoints(items, every)}

    def _await(self, count: int) -> int:
        """Wait until so many canvases have ended."""
        still_since, last = time.monotonic(), -1
        while True:
            began = time.perf_counter()
            ended = self.peer.ended()
            took = time.perf_counter() - began
            if ended >= count:
                return ended
            self.peer.check()
            now = time.monotonic()
            if ended != last:
                still_since, last = now, ended
            elif now - still_since > _STILL_SECONDS:
                raise RuntimeError(f"{ended} of {count} canvases have ended, and no more for {_STILL_SECONDS:g} s")
            time.sleep(max(_LOOK_SECONDS, took * _LOOK_SHARE))

    def _verify(self, shape: Shape, handles: Sequence[Any]) -> None:
        for number, value in enumerate(self.peer.values(handles, shape)):
            self._compare(value, shape, number)

    def _compare(self, value: Any, shape: Shape, number: int) -> None:
        if value != shape.value(number):
            raise WrongResultError(f"number {number} of {shape} gave {value!r}, not {shape.value(number)}")

    def _event(self, name: str) -> None:
        """Tell that the clock is about to start, or has stopped, and wait until the benchmark has read its meters."""
        self._tell({"event": name})
        sys.stdin.readline()

    def _tell(self, message: dict[str, Any]) -> None:
        self._told.write(json.dumps(message) + "\n")
        self._told.flush()

    def serve(self) -> None:
        """Answer requests until there are no more."""
        for line in sys.stdin:
            try:
                answer = self.answer(json.loads(line))
                gc.collect()  # Celery's results are cycles that talk to Redis when they go: not in the next case
                self._tell(answer)
            except Exception as error:  # noqa: BLE001 - whatever went wrong is the answer
                traceback.print_exc()
                wrong = isinstance(error, WrongResultError)
                self._tell({"error": f"{type(error).__name__}: {error}", "wrong": wrong})


def main(make: Callable[[Config], Peer], work: Callable[[Config], None] | None = None) -> None:
    """Be a client, or with the argument ``worker`` a worker."""
    config = Config.from_environment()
    if sys.argv[1:2] == ["worker"]:
        if work is None:
            raise SystemExit(f"{config.engine} has workers of its own")
        work(config)
        return
    told = os.fdopen(os.dup(1), "w")  # what libraries print must not get between the lines
    os.dup2(2, 1)
    peer = make(config)
    try:
        Client(peer, told).serve()
    finally:
        peer.stop()
