"""What was measured: samples, their selection and their spread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Self

PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn.

    ``metrics``: ``per_second`` (steps, or runs where a run is one step), and others whose names end in their units.
    """

    engine: str
    case: str
    round: int
    metrics: dict[str, float]
    processes: int = PROCESSES
    finished: int = 0
    latencies_ms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Trouble:
    """A case that an engine did not get through."""

    engine: str
    case: str
    message: str


@dataclass(slots=True)
class Outcome:
    """Everything that a comparison found out; ``unavailable``: why an engine is not in it."""

    samples: list[Sample] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Selector:
    """A metric of one engine's case."""

    engine: str
    case: str
    metric: str = "per_second"
    processes: int = PROCESSES
    finished: int = 0

    def of(self, samples: Iterable[Sample]) -> dict[int, float]:
        """Return the metric by the round in which it was measured."""
        wanted = (self.engine, self.case, self.processes, self.finished)
        return {
            sample.round: sample.metrics[self.metric]
            for sample in samples
            if (sample.engine, sample.case, sample.processes, sample.finished) == wanted
            and self.metric in sample.metrics
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several measurements, and how far they lie apart."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """Summarise values; None if there are none."""
        found = list(values)
        return cls(median(found), min(found), max(found)) if found else None


def ratio(samples: Sequence[Sample], top: Selector, bottom: Selector) -> Spread | None:
    """Return one metric by another, each pair from the same round, because a machine's speed drifts."""
    upper, lower = top.of(samples), bottom.of(samples)
    return Spread.of(upper[number] / lower[number] for number in upper.keys() & lower.keys() if lower[number])


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile of at least one value."""
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
