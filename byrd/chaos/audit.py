"""What became of all that was submitted: read from the tables, judged by what submit and the canvases promise."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from byrd.chaos import facts as tables
from byrd.chaos.facts import FINAL, Facts
from byrd.chaos.faults import ON_SERVERS, ON_WORKERS, Fault, Kind
from byrd.chaos.repeats import GIVEN_BACK, Repeats
from byrd.chaos.report import Audit, Finding, Recovery, recovery_of
from byrd.chaos.submitter import Submission
from byrd.chaos.tasks import ITEMS
from byrd.engine.words import error_text
from byrd.store import Store
from byrd.store.invariants import Broken

#: The steps that waited for a server are told apart from the first start after it answered again.
WAITING = "_each_waiting_step"
#: From Postgres's answer to the moment at which what had been running when it went away has its outcome on record.
RECORDED = "_until_recorded"
#: From a fault on a worker to the moment at which its steps are ready again: what comes then depends on the queue.
READY = "_until_ready"


def audit(
    store: Store,
    submissions: Sequence[Submission],
    faults: Sequence[Fault],
    *,
    why: Callable[[str], list[str]],
    alone: bool = False,
    known: Collection[Broken] = (),
) -> Audit:
    """Judge the session.

    ``why`` says what a run waits for.  ``alone``: nobody else can have touched the workers.  ``known``: what broke an
    invariant before the session began.
    """
    found = store.run(tables.ids_by_key, [s for s in submissions if s.run_id is None])
    runs = {run_id: s for s in submissions if (run_id := s.run_id or found.get(s.key)) is not None}
    facts = store.run(tables.read, list(runs))
    lost, stuck = _unfinished(runs, facts, why)
    repeats = Repeats(facts, faults, alone=alone)
    return Audit(
        unsure=len(found),
        submitted=len(runs),
        finished=sum(run.status in FINAL for run in facts.runs.values()),
        statuses=Counter(run.status for run in facts.runs.values()),
        steps=len(facts.steps),
        completions=sum(step.status == "succeeded" for step in facts.steps.values()),
        effects=sum(sum(effects.values()) for effects in facts.effects.values()),
        repeated=repeats.reasons,
        lost=lost,
        stuck=stuck,
        wrong=[*_wrong_ends(runs, facts), *_never_ran(facts), *_stale(facts), *facts.late],
        twice=facts.twice,
        unexplained=repeats.unexplained,
        unprovoked=repeats.unprovoked,
        broken=[_broken(row) for row in store.run(tables.broken) if row not in known],
        recoveries=_recoveries(facts, faults),
    )


# -- judging ---------------------------------------------------------------------------------------


def _unfinished(
    runs: Mapping[str, Submission], facts: Facts, why: Callable[[str], list[str]]
) -> tuple[list[Finding], list[Finding]]:
    """Return the runs that are lost, and those of them that are there, but have not ended."""
    lost, stuck = [], []
    for run_id, submission in runs.items():
        run = facts.runs.get(run_id)
        if run is None:
            lost.append(Finding(run_id, None, f"submit(key={submission.key}) returned it; it is not in the table"))
        elif run.status not in FINAL:
            stuck.append(Finding(run_id, None, f"{run.status}: {' '.join(why(run_id))}"))
    return [*lost, *stuck], stuck


def _wrong_ends(runs: Mapping[str, Submission], facts: Facts) -> Iterable[Finding]:
    """Yield the runs whose end is not what their canvas gives."""
    for run_id, run in facts.runs.items():
        if run.status not in FINAL:
            continue
        shape, number = runs[run_id].shape, runs[run_id].number
        if shape.expected is None:
            if (run.status, run.undone) != ("failed", shape.undone):
                yield Finding(run_id, None, f"{shape.name}: {run.status}, {run.undone} of {shape.undone} steps undone")
            continue
        wanted = shape.expected(number)
        if run.status != "succeeded":
            yield Finding(run_id, None, f"{shape.name}: {run.status}, with {error_text(run.error)}")
        elif _parsed(run.result).get("value") != wanted:
            yield Finding(run_id, None, f"{shape.name}: its result is {run.result}, and its value should be {wanted}")


def _never_ran(facts: Facts) -> Iterable[Finding]:
    """Yield the steps that succeeded, though what they do was not done."""
    for step_id, step in facts.steps.items():
        if step.status != "succeeded":
            continue
        if step.attempt not in facts.effects.get(step_id, {}):
            yield Finding(step.run_id, step_id, f"attempt {step.attempt} succeeded without its effect")
        if step.task.endswith(".walk") and facts.items.get(step_id, (0, 0))[1] != ITEMS:
            yield Finding(step.run_id, step_id, f"{facts.items.get(step_id, (0, 0))[1]} of {ITEMS} items are committed")


def _stale(facts: Facts) -> Iterable[Finding]:
    """Yield the steps whose result was not given by the attempt that had the step, but by one before it.

    All attempts come to the same value, and only one is recorded, so that nothing else would tell.
    """
    for step_id, step in facts.steps.items():
        if step.status != "succeeded" or step.replaced:
            continue
        by = _parsed(step.result).get("attempt")
        if by is None:
            what = f"its result, {step.result}, does not say which attempt gave it: do the workers run this version?"
            yield Finding(step.run_id, step_id, what)
        elif by != step.attempt:
            what = f"its result was recorded by attempt {by}, which was stale: attempt {step.attempt} had the step"
            yield Finding(step.run_id, step_id, what)


def _parsed(result: str | None) -> Mapping[str, Any]:
    """Return what a task of the load has returned; nothing for what none of them returns."""
    found = json.loads(result) if result is not None else None
    return found if isinstance(found, dict) else {}


def _broken(row: Broken) -> Finding:
    return Finding(row.run_id, None if row.no is None else str(row.no), f"{row.rule}: {row.detail}")


# -- how long it took ------------------------------------------------------------------------------


def _recoveries(facts: Facts, faults: Sequence[Fault]) -> dict[str, Recovery]:
    """Return, for each kind of fault, how long it took until what it hit ran again."""
    starts = sorted(facts.starts.values())
    counts: Counter[str] = Counter()
    seconds: dict[str, list[float]] = {}

    def add(kind: str, found: Iterable[float]) -> None:
        counts[kind] += 1
        seconds.setdefault(kind, []).extend(found)

    for fault in faults:
        if fault.kind not in ON_SERVERS:
            add(fault.kind, _restarts(facts, fault))
        else:
            after = bisect_right(starts, fault.at)
            add(fault.kind, [(starts[after] - fault.at).total_seconds()] if after < len(starts) else [])
            add(fault.kind + WAITING, _restarts(facts, fault))
        if fault.kind is Kind.POSTGRES_RESTARTED:
            recorded = (facts.recorded(hit) for hit in fault.running)
            # What was recorded before the server answered again had made it before the server went away.
            add(fault.kind + RECORDED, ((at - fault.at).total_seconds() for at in recorded if at and at > fault.at))
        if fault.kind in ON_WORKERS:
            ends = (facts.ends[hit] for hit in fault.hits if hit in facts.ends)
            gone = (max(0.0, (end.at - fault.at).total_seconds()) for end in ends if end.outcome in GIVEN_BACK)
            add(fault.kind + READY, gone)
    return {kind: recovery_of(counts[kind], found) for kind, found in seconds.items()}


def _restarts(facts: Facts, fault: Fault) -> list[float]:
    """Return how long after the fault each attempt that it hit was followed by the next."""
    found = []
    for step_id, attempt in fault.hits:
        if fault.kind in ON_WORKERS:
            end = facts.ends.get((step_id, attempt))
            if end is None or end.outcome not in GIVEN_BACK:
                continue  # it had ended before the fault could reach it
        start = facts.starts.get((step_id, attempt + 1))
        if start is not None and start > fault.at:
            found.append((start - fault.at).total_seconds())
    return found
