"""Why effects were repeated: how the attempt before ended, and which fault had hit it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta

from byrd.chaos.facts import End, Facts
from byrd.chaos.faults import ON_SERVERS, ON_WORKERS, Fault, Hit, Kind
from byrd.chaos.report import Finding
from byrd.engine.words import error_text

#: Ends of attempts after which the step may run again.
GIVEN_BACK = frozenset({"preempted", "handed_back"})
#: Which faults can have ended an attempt so.  A worker hands back when it is told to stop, and when it has lost the
#: broker and is set to cancel what it runs; a transaction of a task's own, when it loses Postgres.
_ENDED_BY = {
    "preempted": ON_WORKERS,
    "handed_back": frozenset({Kind.WORKER_STOPPED, Kind.WORKER_FROZEN}) | ON_SERVERS,
}
#: The times of faults are this process's, set to Postgres's clock.
_SLACK = timedelta(seconds=1)


class Repeats:
    """Finds the reason of each repeated effect.

    ``alone``: nobody else could have stopped a worker, so that a step that was handed back without a fault is not
    explained.  Elsewhere somebody may have deployed meanwhile: it is told, as steps are that have lost their workers.
    """

    def __init__(self, facts: Facts, faults: Sequence[Fault], *, alone: bool) -> None:
        self._facts = facts
        self._faults = sorted(faults, key=lambda fault: fault.at, reverse=True)
        self.reasons: Counter[str] = Counter()
        self.unexplained: list[Finding] = []
        #: Attempts that ended by no fault of the session.
        self.unprovoked: list[Finding] = []
        judged: set[Hit] = set()
        for hit, end in facts.ends.items():
            if end.outcome in GIVEN_BACK and self._cause(hit, end) is None and not self._was_paused(hit, end):
                if end.outcome == "handed_back" and alone:
                    judged.add(hit)
                (self.unexplained if hit in judged else self.unprovoked).append(self._unprovoked(hit, end))
        for step_id, effects in facts.effects.items():
            self._explain(step_id, effects, judged)

    def _explain(self, step_id: str, effects: Mapping[int, int], judged: set[Hit]) -> None:
        step = self._facts.steps.get(step_id)
        last = max(effects)
        for attempt, written in sorted(effects.items()):
            end = self._facts.ends.get((step_id, attempt))
            run_id = step.run_id if step is not None else ""
            if written > 1:
                what = f"attempt {attempt} left {written} effects"
                self.unexplained.append(Finding(run_id, step_id, what))
            if step is None or attempt > step.attempt:
                known = "no step" if step is None else f"attempt {step.attempt} is the last on record"
                self.unexplained.append(Finding(run_id, step_id, f"attempt {attempt} left an effect, but {known}"))
            elif attempt < last and (end is None or end.outcome not in {*GIVEN_BACK, "retried"}):
                how = f"ended as {end.outcome}" if end else "has no end on record"
                self.unexplained.append(
                    Finding(run_id, step_id, f"attempt {attempt} {how}, and attempt {last} left an effect too")
                )
            elif attempt < last and end is not None and (step_id, attempt) not in judged:
                self.reasons[self._cause((step_id, attempt), end) or end.outcome] += 1

    def _unprovoked(self, hit: Hit, end: End) -> Finding:
        how = (
            error_text(end.error)
            if end.outcome == "preempted"
            else "handed back, though nobody had stopped its worker or paused its run, and no server was away"
        )
        return Finding(self._facts.steps[hit[0]].run_id, hit[0], f"attempt {hit[1]}: {how}")

    def _was_paused(self, hit: Hit, end: End) -> bool:
        paused = self._facts.pauses.get(self._facts.steps[hit[0]].run_id)
        return end.outcome == "handed_back" and paused is not None and paused <= end.at

    def _cause(self, hit: Hit, end: End) -> str | None:
        """Return the kind of the fault that ended an attempt; None if it was not one of ours."""
        kinds = _ENDED_BY.get(end.outcome, frozenset())
        return next(
            (fault.kind for fault in self._faults if fault.kind in kinds and self._struck(fault, hit, end)), None
        )

    def _struck(self, fault: Fault, hit: Hit, end: End) -> bool:
        """Tell whether an attempt ran when and where a fault struck."""
        if end.at < (fault.since or fault.at) - _SLACK:
            return False
        start, woke = self._facts.starts.get(hit, end.at), fault.until
        victim, place = fault.victim, self._facts.places.get(hit)
        if victim is None:  # a server, which was away until the time of the fault
            return start <= fault.at + _SLACK
        if place is not None:
            # A worker's name is used again after a restart; its id is not, and nothing that was killed or told to
            # stop starts anything more.
            same = place.worker_id == victim.worker_id and victim.pid in (None, place.pid)
            return same and (woke is None or start <= woke + _SLACK)
        # It was cut short before it left its effect, so only the time tells which life of the worker it belonged to.
        return hit in fault.hits or (victim.hostname == end.worker and start <= (woke or fault.at) + _SLACK)
