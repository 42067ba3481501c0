"""Measures the engines in turns.

A turn: one client submits all canvases of a workload, one after the other, to a worker that is running and idle.  The
clock starts at the first submit and stops when the last canvas's last task has its outcome stored.  So submitting is
part of the price, and goes on while the worker works, as in a service; with everything submitted before the clock
starts, what a submission costs would be hidden, and there a durable engine and plain Celery differ.

The end is told by the worker's side, in the same way for every engine: each pool process counts the ends of canvases
in a Redis key when Celery sends ``task_postrun`` for a canvas's last task, which is after its result was stored (for
Byrd: after the transaction was committed).  That costs one round trip per canvas, not per step, and the client looks
at that one key every 5 ms.  Waiting with ``get()`` instead would measure the client: with Postgres results Celery's
asks twice a second, for one result after the other, so that chains which the worker ends in 2.8 s keep it for 10 s.

The CPU time of everything (client, worker, servers) is measured too: on a busy machine it is the steadier figure.

After the clock has stopped, every result is fetched and compared with what it must be.

Rounds are interleaved (A B C A B C), because a machine's speed drifts; ratios compare turns of the same round.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self

import psutil
import redis

from benchmarks.cluster import Contestant
from benchmarks.engines import ENDED, EngineName, Workload, canvas, expected, fetch, submitter

_TURN_SECONDS = 180.0
_LOOK_SECONDS = 0.005
_FETCH_SECONDS = 30.0
#: Enough for every pool process to have connected, and for every statement to have been planned.
_WARM_UP = {Workload.CHAINS: 10, Workload.CHORDS: 1}

BASELINE = EngineName.CELERY_REDIS


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement: seconds from the first submit to the last submit, and to the last end; CPU seconds in all."""

    submit_seconds: float
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several measurements, and how far they lie apart."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Summarise ``values``."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Result:
    """All turns of one engine at one workload.  ``ratio``: its speed by the baseline's, round by round."""

    workload: Workload
    engine: EngineName
    canvases: int
    turns: tuple[Turn, ...]
    steps_per_second: Spread
    cpu_ms_per_step: Spread
    ratio: Spread | None


def measure(
    contestants: Sequence[Contestant],
    counts: Mapping[Workload, int],
    *,
    rounds: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Measure ``rounds`` rounds, after a warm-up; ``progress`` is called after each turn."""
    for contestant in contestants:
        for workload, count in counts.items():
            run_turn(contestant, workload, min(count, _WARM_UP[workload]))
            progress()
    turns: dict[tuple[Workload, EngineName], list[Turn]] = {}
    for _ in range(rounds):
        for workload, count in counts.items():
            for contestant in contestants:
                turn = run_turn(contestant, workload, count)
                turns.setdefault((workload, contestant.engine.name), []).append(turn)
                progress()
    return [
        _result(workload, engine, counts[workload], found, turns.get((workload, BASELINE)))
        for (workload, engine), found in turns.items()
    ]


def turns_of(engines: int, workloads: int, rounds: int) -> int:
    """Return how often :func:`measure` calls ``progress``."""
    return engines * workloads * (rounds + 1)


def run_turn(contestant: Contestant, workload: Workload, count: int) -> Turn:
    """Run ``count`` canvases through one engine."""
    app = contestant.app
    app.set_current()
    submit = submitter(app)
    canvases = [canvas(app, workload, number) for number in range(count)]
    with redis.Redis.from_url(contestant.engine.redis_url) as client:
        client.delete(ENDED)
        cpu_before = _cpu_seconds()
        started = time.perf_counter()
        handles = [submit(signature) for signature in canvases]
        submitted = time.perf_counter()
        ended = 0
        while ended < count:
            time.sleep(_LOOK_SECONDS)
            ended = int(client.get(ENDED) or 0)
            contestant.check()
            if time.perf_counter() - started > _TURN_SECONDS:
                raise contestant.error(
                    f"{contestant.engine.name} ended {ended} of {count} {workload} in {_TURN_SECONDS:g} s"
                )
        seconds = time.perf_counter() - started
        cpu_seconds = _cpu_seconds() - cpu_before
    for number in range(count):
        value, right = fetch(handles[number], timeout=_FETCH_SECONDS), expected(workload, number)
        if value != right:
            raise contestant.error(
                f"{contestant.engine.name} gave {value!r}, not {right}, for number {number} of {workload}"
            )
    del handles
    gc.collect()  # Celery's results are cycles that talk to Redis when they go: not in the next turn, please
    return Turn(submitted - started, seconds, cpu_seconds)


def _cpu_seconds() -> float:
    """Return the CPU time so far of the client, the servers and the workers; those of idle engines use next to none."""
    total = 0.0
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user and system, its own and those of children that have ended
    return total


def _result(
    workload: Workload, engine: EngineName, canvases: int, turns: Sequence[Turn], baseline: Sequence[Turn] | None
) -> Result:
    steps = canvases * workload.steps
    ratios = [base.seconds / turn.seconds for turn, base in zip(turns, baseline or (), strict=False)]
    return Result(
        workload,
        engine,
        canvases,
        tuple(turns),
        Spread.of([steps / turn.seconds for turn in turns]),
        Spread.of([turn.cpu_seconds / steps * 1000 for turn in turns]),
        Spread.of(ratios) if ratios else None,
    )
