"""The cases, and how much of each is run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from benchmarks.peers.protocol import Shape


class Kind(StrEnum):
    """How a case is measured."""

    SUBMIT = "submit"
    DRAIN = "drain"
    SATURATE = "saturate"
    LATENCY = "latency"
    LOAD = "load"
    CHECKPOINTS = "checkpoints"
    MEMORY = "memory"
    COLD_START = "cold start"
    RESIDENT = "resident"


ONE_STEP = Shape("chain", 1)


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is measured.

    ``group``: what ``--cases`` calls it.  ``first``: how many canvases are run first, to find how many a turn takes;
    ``least``: the fewest that a turn runs.  ``value``: the mode of submitting, or the canvases a second of a load.
    ``once``: takes long, so the peers run it in the first round only.  ``quick``: part of ``--quick``.
    """

    name: str
    title: str
    group: str
    kind: Kind
    shape: Shape = ONE_STEP
    first: int = 0
    least: int = 1
    value: str | float | None = None
    once: bool = False
    quick: bool = False


LOADS = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)

#: In the order in which an engine runs them: submitting comes before its workers are started, draining starts them.
CASES: tuple[Case, ...] = (
    Case("submit", "submit, one by one", "submit", Kind.SUBMIT, value="one", quick=True),
    Case("submit-batch", "submit, 100 at a time", "submit", Kind.SUBMIT, value="batch", quick=True),
    Case(
        "submit-transaction",
        "submit in the caller's transaction",
        "submit",
        Kind.SUBMIT,
        value="transaction",
        quick=True,
    ),
    Case("one-step", "one-step runs, submitted before", "one-step", Kind.DRAIN, quick=True),
    Case("cold-start", "from a worker's start to its first end", "workers", Kind.COLD_START, quick=True),
    Case("chain-10", "chains of 10", "chains", Kind.SATURATE, Shape("chain", 10), first=20, least=20, quick=True),
    Case("chain-3", "chains of 3", "chains", Kind.SATURATE, Shape("chain", 3), first=30, least=30),
    Case("chain-1", "chains of 1", "chains", Kind.SATURATE, Shape("chain", 1), first=50, least=50),
    Case("chord-10", "chords of 10", "chords", Kind.SATURATE, Shape("chord", 10), first=10, least=10),
    Case("chord-100", "chords of 100", "chords", Kind.SATURATE, Shape("chord", 100), first=2, least=3, quick=True),
    Case("chord-1000", "chords of 1,000", "chords", Kind.SATURATE, Shape("chord", 1000), first=1, quick=True),
    Case("chord-10000", "chords of 10,000", "chords", Kind.SATURATE, Shape("chord", 10_000), once=True),
    Case("mix", "a mix, 5 ms of work a step", "mix", Kind.SATURATE, Shape("mix", 0, 5.0), first=10, least=20),
    Case("low-1", "one step, idle system", "low", Kind.LATENCY, Shape("chain", 1), first=50, least=50, quick=True),
    Case("low-3", "chain of 3, idle system", "low", Kind.LATENCY, Shape("chain", 3), first=30, least=30),
    Case("low-10", "chain of 10, idle system", "low", Kind.LATENCY, Shape("chain", 10), first=20, least=20, quick=True),
    *(
        Case(
            f"load-{rate:g}",
            f"{rate:g} chains of 3 a second",
            "load",
            Kind.LOAD,
            Shape("chain", 3),
            value=rate,
            once=True,
        )
        for rate in LOADS
    ),
    Case("checkpoints", "loop over 100,000 items", "checkpoints", Kind.CHECKPOINTS, quick=True),
    Case("resident", "memory of the workers", "workers", Kind.RESIDENT, quick=True),
    Case("memory", "memory over 50,000 steps", "memory", Kind.MEMORY, Shape("chain", 10), once=True),
)
GROUPS: tuple[str, ...] = (*dict.fromkeys(case.group for case in CASES), "processes", "tables")
#: What growth over processes and over tables is measured with.
GROWTH_CASES = ("one-step", "chain-10")
PROCESSES = (1, 2, 4, 8)
FINISHED = (0, 100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run: ``seconds`` a turn at saturation, ``submits`` a turn, ``part`` of an engine's drain."""

    seconds: float
    submits: int
    part: float
    load_seconds: float
    rounds: int


FULL = Scale(seconds=3.0, submits=1500, part=1.0, load_seconds=4.0, rounds=3)
QUICK = Scale(seconds=1.0, submits=300, part=0.25, load_seconds=1.0, rounds=2)
