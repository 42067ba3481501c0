"""What became of all that was submitted: read from the tables, judged by what submit and the canvases promise."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from byrd.chaos.faults import ON_SERVERS, ON_WORKERS, Fault, Hit, Kind
from byrd.chaos.report import Audit, Finding, Recovery, recovery_of
from byrd.chaos.submitter import Submission
from byrd.chaos.tasks import ITEMS
from byrd.engine.words import error_text
from byrd.store import Store
from byrd.store.rows import query

_FINAL = frozenset({"succeeded", "failed", "cancelled"})
#: Ends of attempts after which the step may run again.
_GIVEN_BACK = frozenset({"preempted", "handed_back"})
#: A fault on a worker explains what the worker lost up to so long afterwards.
_REACH = timedelta(minutes=2)
#: The waiting steps at the moment at which Redis answered again are told apart from the first start after it.
WAITING = "_each_waiting_step"
#: From a fault on a worker to the moment at which its steps are ready again: what comes then depends on the queue.
READY = "_until_ready"


@dataclass(frozen=True, slots=True)
class _Run:
    id: str
    status: str
    result: str | None
    error: str | None
    undone: int


@dataclass(frozen=True, slots=True)
class _End:
    outcome: str
    error: str | None
    worker: str | None
    at: datetime


@dataclass(slots=True)
class _Facts:
    """What the tables say of the session's runs."""

    runs: dict[str, _Run] = field(default_factory=dict)
    #: The run of each step, the number of its last attempt, its status.
    steps: dict[str, Any] = field(default_factory=dict)
    starts: dict[Hit, datetime] = field(default_factory=dict)
    ends: dict[Hit, _End] = field(default_factory=dict)
    #: How many effects each attempt left.
    effects: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    twice: list[Finding] = field(default_factory=list)
    items: dict[str, tuple[int, int]] = field(default_factory=dict)


def audit(
    store: Store, submissions: Sequence[Submission], faults: Sequence[Fault], *, why: Callable[[str], list[str]]
) -> Audit:
    """Judge the session.  ``why`` says what a run waits for."""
    found = store.run(_ids_by_key, [s for s in submissions if s.run_id is None])
    runs = {run_id: s for s in submissions if (run_id := s.run_id or found.get(s.key)) is not None}
    facts = store.run(_read, list(runs))
    lost, stuck = _unfinished(runs, facts, why)
    repeats = _Repeats(facts, faults)
    return Audit(
        unsure=len(found),
        submitted=len(runs),
        finished=sum(run.status in _FINAL for run in facts.runs.values()),
        statuses=Counter(run.status for run in facts.runs.values()),
        steps=len(facts.steps),
        completions=sum(step.status == "succeeded" for step in facts.steps.values()),
        effects=sum(sum(effects.values()) for effects in facts.effects.values()),
        repeated=repeats.reasons,
        lost=lost,
        stuck=stuck,
        wrong=[*_wrong_ends(runs, facts), *_never_ran(facts)],
        twice=facts.twice,
        unexplained=repeats.unexplained,
        unprovoked=repeats.unprovoked,
        recoveries=_recoveries(facts, faults),
    )


# -- reading ---------------------------------------------------------------------------------------


def _ids_by_key(conn: Connection, unsure: Sequence[Submission]) -> dict[str, str]:
    rows = query(
        conn,
        "SELECT id, key FROM byrd.runs WHERE coalesce(workflow, '') = ANY(%(workflows)s) AND key = ANY(%(keys)s)",
        {"workflows": sorted({s.shape.workflow for s in unsure}), "keys": [s.key for s in unsure]},
    )
    return {row.key: str(row.id) for row in rows}


def open_runs(conn: Connection, submissions: Sequence[Submission]) -> int:
    """Return how many of the session's runs have not ended yet."""
    ids = [s.run_id for s in submissions if s.run_id] + list(
        _ids_by_key(conn, [s for s in submissions if s.run_id is None]).values()
    )
    found = query(
        conn,
        "SELECT count(*) FROM byrd.runs WHERE id = ANY(%(runs)s::uuid[]) AND NOT status = ANY(%(final)s)",
        {"runs": ids, "final": sorted(_FINAL)},
    )
    return int(found.scalar_one())


def _read(conn: Connection, run_ids: list[str]) -> _Facts:
    query(conn, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    facts, params = _Facts(), {"runs": run_ids}
    for row in query(
        conn,
        """SELECT r.id, r.status, o.result, r.error, (SELECT count(*) FROM byrd.steps c WHERE c.run_id = r.id
                    AND c.kind = 'compensation' AND c.status = 'succeeded') AS undone
             FROM byrd.runs r LEFT JOIN byrd.steps o ON o.run_id = r.id AND o.no = r.output
            WHERE r.id = ANY(%(runs)s::uuid[])""",
        params,
    ):
        facts.runs[str(row.id)] = _Run(str(row.id), row.status, row.result, row.error, int(row.undone))
    for row in query(
        conn,
        """SELECT id, run_id::text, task, attempt, status, replaced, started_at FROM byrd.steps
            WHERE run_id = ANY(%(runs)s::uuid[]) AND kind <> 'join'""",
        params,
    ):
        facts.steps[row.id] = row
        if row.started_at is not None:
            facts.starts[row.id, row.attempt] = row.started_at
    for row in query(
        conn,
        """SELECT a.* FROM byrd.attempts a JOIN byrd.steps s ON s.id = a.step_id
            WHERE s.run_id = ANY(%(runs)s::uuid[])""",
        params,
    ):
        facts.ends[row.step_id, row.attempt] = _End(row.outcome, row.error, row.worker, row.ended_at)
        if row.started_at is not None:
            facts.starts[row.step_id, row.attempt] = row.started_at
    for row in query(
        conn,
        """SELECT step_id, attempt, count(*) AS effects FROM byrd_chaos.effects
            WHERE run_id = ANY(%(runs)s::uuid[]) GROUP BY step_id, attempt ORDER BY step_id, attempt""",
        params,
    ):
        facts.effects[row.step_id][row.attempt] = row.effects
    for row in query(
        conn,
        """SELECT step_id, count(*) AS written, count(DISTINCT item) AS items FROM byrd_chaos.items
            WHERE run_id = ANY(%(runs)s::uuid[]) GROUP BY step_id""",
        params,
    ):
        facts.items[row.step_id] = (row.written, row.items)
    facts.twice = [Finding(str(row.run_id), row.step_id, row.what) for row in query(conn, _TWICE, params)]
    return facts


_TWICE = """
SELECT run_id, step_id, count(*) || ' completions were recorded' AS what FROM byrd_chaos.completions
 WHERE run_id = ANY(%(runs)s::uuid[]) GROUP BY run_id, step_id HAVING count(*) > 1
UNION ALL
SELECT s.run_id, s.id, 'attempt ' || a.attempt || ' ended as ' || a.outcome || ', and completed the step'
  FROM byrd.steps s
  JOIN byrd.attempts a ON a.step_id = s.id AND a.attempt >= s.attempt
 WHERE s.run_id = ANY(%(runs)s::uuid[]) AND s.status = 'succeeded' AND NOT s.replaced
UNION ALL
SELECT e.run_id, NULL, count(*) || ' ends of the run were recorded' FROM byrd.events e
 WHERE e.run_id = ANY(%(runs)s::uuid[]) AND e.event IN ('succeeded', 'failed', 'cancelled')
 GROUP BY e.run_id HAVING count(*) > 1
UNION ALL
SELECT i.run_id, i.step_id, 'item ' || i.item || ' was committed ' || count(*) || ' times' FROM byrd_chaos.items i
 WHERE i.run_id = ANY(%(runs)s::uuid[]) GROUP BY i.run_id, i.step_id, i.item HAVING count(*) > 1
"""


# -- judging ---------------------------------------------------------------------------------------


def _unfinished(
    runs: Mapping[str, Submission], facts: _Facts, why: Callable[[str], list[str]]
) -> tuple[list[Finding], list[Finding]]:
    """Return the runs that are lost, and those of them that are there, but have not ended."""
    lost, stuck = [], []
    for run_id, submission in runs.items():
        run = facts.runs.get(run_id)
        if run is None:
            lost.append(Finding(run_id, None, f"submit(key={submission.key}) returned it; it is not in the table"))
        elif run.status not in _FINAL:
            stuck.append(Finding(run_id, None, f"{run.status}: {' '.join(why(run_id))}"))
    return [*lost, *stuck], stuck


def _wrong_ends(runs: Mapping[str, Submission], facts: _Facts) -> Iterable[Finding]:
    """Yield the runs whose end is not what their canvas gives."""
    for run_id, run in facts.runs.items():
        if run.status not in _FINAL:
            continue
        shape, number = runs[run_id].shape, runs[run_id].number
        if shape.expected is None:
            if (run.status, run.undone) != ("failed", shape.undone):
                yield Finding(run_id, None, f"{shape.name}: {run.status}, {run.undone} of {shape.undone} steps undone")
            continue
        wanted = shape.expected(number)
        if run.status != "succeeded":
            yield Finding(run_id, None, f"{shape.name}: {run.status}, with {error_text(run.error)}")
        elif run.result is None or json.loads(run.result) != wanted:
            yield Finding(run_id, None, f"{shape.name}: its result is {run.result}, and should be {wanted}")


def _never_ran(facts: _Facts) -> Iterable[Finding]:
    """Yield the steps that succeeded, though what they do was not done."""
    for step_id, step in facts.steps.items():
        if step.status != "succeeded":
            continue
        if step.attempt not in facts.effects.get(step_id, {}):
            yield Finding(step.run_id, step_id, f"attempt {step.attempt} succeeded without its effect")
        if step.task.endswith(".walk") and facts.items.get(step_id, (0, 0))[1] != ITEMS:
            yield Finding(step.run_id, step_id, f"{facts.items.get(step_id, (0, 0))[1]} of {ITEMS} items are committed")


class _Repeats:
    """Finds the reason of each repeated effect: how the attempt before it ended, and by which fault."""

    def __init__(self, facts: _Facts, faults: Sequence[Fault]) -> None:
        self._facts = facts
        self._faults: dict[str, list[Fault]] = defaultdict(list)
        for fault in sorted(faults, key=lambda fault: fault.at):
            if fault.kind in ON_WORKERS and fault.worker is not None:
                self._faults[fault.worker].append(fault)
        self.reasons: Counter[str] = Counter()
        self.unexplained: list[Finding] = []
        self.unprovoked: list[Finding] = []
        for step_id, effects in facts.effects.items():
            self._explain(step_id, effects)
        for (step_id, attempt), end in facts.ends.items():
            if end.outcome == "preempted" and self._cause(end) is None:
                what = f"attempt {attempt}: {error_text(end.error)}"
                self.unprovoked.append(Finding(facts.steps[step_id].run_id, step_id, what))

    def _explain(self, step_id: str, effects: Mapping[int, int]) -> None:
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
            elif attempt < last and (end is None or end.outcome not in {*_GIVEN_BACK, "retried"}):
                how = f"ended as {end.outcome}" if end else "has no end on record"
                self.unexplained.append(
                    Finding(run_id, step_id, f"attempt {attempt} {how}, and attempt {last} left an effect too")
                )
            elif attempt < last and end is not None:
                self.reasons[self._cause(end) or end.outcome] += 1

    def _cause(self, end: _End) -> str | None:
        """Return the kind of the fault that ended an attempt; None if it was not one of ours."""
        if end.outcome not in _GIVEN_BACK:
            return None
        for fault in reversed(self._faults.get(end.worker or "", [])):
            if fault.at - timedelta(seconds=1) <= end.at <= fault.at + _REACH:
                return fault.kind
        return None


# -- how long it took ------------------------------------------------------------------------------


def _recoveries(facts: _Facts, faults: Sequence[Fault]) -> dict[str, Recovery]:
    """Return, for each kind of fault, how long it took until what it hit ran again."""
    starts = sorted(facts.starts.values())
    seconds: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()
    for fault in faults:
        counts[fault.kind] += 1
        found = seconds.setdefault(fault.kind, [])
        if fault.kind in ON_SERVERS:
            after = bisect_right(starts, fault.at)
            found += [(starts[after] - fault.at).total_seconds()] if after < len(starts) else []
        if fault.kind is Kind.REDIS_RESTARTED:
            counts[fault.kind + WAITING] += 1
            found = seconds.setdefault(fault.kind + WAITING, [])
        if fault.kind is not Kind.POSTGRES_RESTARTED:
            found += _restarts(facts, fault)
        if fault.kind in ON_WORKERS:
            counts[fault.kind + READY] += 1
            ends = [facts.ends[hit] for hit in fault.hits if hit in facts.ends]
            seconds.setdefault(fault.kind + READY, []).extend(
                max(0.0, (end.at - fault.at).total_seconds()) for end in ends if end.outcome in _GIVEN_BACK
            )
    return {kind: recovery_of(counts[kind], found) for kind, found in seconds.items()}


def _restarts(facts: _Facts, fault: Fault) -> list[float]:
    """Return how long after the fault each attempt that it hit was followed by the next."""
    found = []
    for step_id, attempt in fault.hits:
        if fault.kind in ON_WORKERS:
            end = facts.ends.get((step_id, attempt))
            if end is None or end.outcome not in _GIVEN_BACK:
                continue  # it had ended before the fault could reach it
        start = facts.starts.get((step_id, attempt + 1))
        if start is not None and start > fault.at:
            found.append((start - fault.at).total_seconds())
    return found
