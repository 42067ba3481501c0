"""The figures to reach: ratios within one run, medians, with the same number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.engines import BYRD, CELERY, FLOOR
from benchmarks.samples import Sample, Selector, Spread, ratio


@dataclass(frozen=True, slots=True)
class Figure:
    """A ratio that is to be at least, or at most, so much."""

    label: str
    against: str
    top: Selector
    bottom: Selector
    bound: float
    at_most: bool = False

    def measured(self, samples: Sequence[Sample]) -> Spread | None:
        """Return the ratio; None if either side was not measured."""
        return ratio(samples, self.top, self.bottom)

    def reached(self, found: Spread) -> bool:
        """Tell whether the median is good enough."""
        return found.median <= self.bound if self.at_most else found.median >= self.bound


def _against(label: str, case: str, engine: str, title: str, bound: float) -> Figure:
    return Figure(label, title, Selector(BYRD, case), Selector(engine, case), bound)


_CHAINS = "chains of 10, saturated"
_DRAIN = "one-step runs, drained"
FIGURES: tuple[Figure, ...] = (
    _against(_CHAINS, "chain-10", CELERY, "Celery, Redis results", 4),
    _against(_CHAINS, "chain-10", "celery-postgres", "Celery, Postgres results", 7),
    _against(_CHAINS, "chain-10", "dbos", "DBOS queue", 5),
    _against(_CHAINS, "chain-10", "absurd", "absurd, as it comes", 2),
    _against(_CHAINS, "chain-10", FLOOR, "raw SQL floor", 0.8),
    _against("chord of 100", "chord-100", CELERY, "Celery, Redis results", 3),
    _against("chord of 1,000", "chord-1000", CELERY, "Celery, Redis results", 3),
    _against(_DRAIN, "one-step", "oban", "oban-py", 0.5),
    _against(_DRAIN, "one-step", CELERY, "Celery, results kept", 3),
    _against("submit, one by one", "submit", CELERY, "Celery apply_async", 0.8),
    _against("submit in batches", "submit-batch", CELERY, "Celery Producer.batch", 0.8),
    Figure(
        "one step, idle: p50", "Celery delay().get()",
        Selector(BYRD, "low-1", "p50_ms"), Selector(CELERY, "low-1", "p50_ms"), 1.5, at_most=True,
    ),
    Figure(
        "chord of 10,000: time a step", "chord of 100",
        Selector(BYRD, "chord-10000", "ms_per_step"), Selector(BYRD, "chord-100", "ms_per_step"), 1.2, at_most=True,
    ),
    Figure(
        "1,000,000 finished runs: chains of 10", "none",
        Selector(BYRD, "chain-10", finished=1_000_000), Selector(BYRD, "chain-10"), 0.9,
    ),
    Figure(
        "1,000,000 finished runs: one-step runs", "none",
        Selector(BYRD, "one-step", finished=1_000_000), Selector(BYRD, "one-step"), 0.9,
    ),
    Figure(
        "100,000 items, a checkpoint each 100: time", "one checkpoint",
        Selector(BYRD, "checkpoints", "checkpoints_seconds"), Selector(BYRD, "checkpoints", "one_seconds"), 1.1,
        at_most=True,
    ),
    Figure(
        "a pool process after 50,000 steps: MB", "after 5,000",
        Selector(BYRD, "memory", "later_mb"), Selector(BYRD, "memory", "early_mb"), 1.1, at_most=True,
    ),
)  # fmt: skip
