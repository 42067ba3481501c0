"""What is on record of runs of ``tests.apps.random_sagas``: Byrd's tables, and the effects in the outside world."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from byrd.items import EACH
from tests.cluster import Cluster

_EACH = "each of "


class Event(NamedTuple):
    """A line of a run's history."""

    id: int
    what: str
    step_no: int | None
    at: datetime
    detail: dict[str, Any]


class Effect(NamedTuple):
    """What a task has done in the outside world."""

    id: int
    what: str
    key: str
    detail: str


@dataclass(frozen=True)
class Step:
    """A step as it ended.

    ``name``: that of the leaf that it stands for.  ``outcomes``: those of its attempts that did not end in success.
    """

    id: str
    no: int
    kind: str
    status: str
    saga: int | None
    compensates: int | None
    cause: int | None
    attempt: int
    started_at: datetime | None
    ready_at: datetime | None
    finished_at: datetime | None
    result: str | None
    name: str | None
    outcomes: list[str]

    @property
    def broken_off(self) -> int:
        """How many attempts ended so that they may have taken effect."""
        return sum(outcome in ("preempted", "handed_back", "cancelled", "out of time") for outcome in self.outcomes)

    @property
    def may_have_taken_effect(self) -> bool:
        return self.status == "succeeded" or (self.status in ("failed", "cancelled", "skipped") and self.broken_off > 0)


@dataclass
class RunRecord:
    """A run, with the steps by their numbers; ``named``: those that stand for leaves of its canvas."""

    id: str
    status: str
    pivot: int | None
    workflow: str | None
    parent_step: str | None
    steps: dict[int, Step] = field(default_factory=dict)
    named: dict[str, Step] = field(default_factory=dict)
    undos: dict[int, Step] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    effects: dict[str, list[Effect]] = field(default_factory=lambda: defaultdict(list))

    def since_retry(self) -> list[Event]:
        """Return the events since the run was last retried."""
        last = max((event.id for event in self.events if event.what == "retried"), default=0)
        return [event for event in self.events if event.id > last]

    def had(self, *names: str) -> bool:
        """Tell whether one of these events happened, ever."""
        return any(event.what in names for event in self.events)

    def last(self, name: str) -> Event | None:
        """Return the last such event since the run was last retried."""
        return next((event for event in reversed(self.since_retry()) if event.what == name), None)


class Records:
    """All runs of a database."""

    def __init__(self, cluster: Cluster) -> None:
        self.runs = {
            row[0]: RunRecord(*row)
            for row in cluster.rows("SELECT id::text, status, pivot, workflow, parent_step FROM byrd.runs")
        }
        self.children = {run.parent_step: run.id for run in self.runs.values() if run.parent_step is not None}
        #: The runs that have steps of the workflow within that has this name, each begun anew after the one before.
        self.generations: dict[str, set[str]] = defaultdict(set)
        self.mended = {row[0] for row in cluster.rows("SELECT name FROM mended")}
        self._load_steps(cluster)
        for run_id, *event, detail in cluster.rows(
            "SELECT run_id::text, id, event, step_no, at, detail FROM byrd.events ORDER BY id"
        ):
            number, what, step_no, at = event
            self.runs[run_id].events.append(Event(number, what, step_no, at, json.loads(detail or "{}")))
        for run_id, name, *effect in cluster.rows("SELECT run, name, id, what, key, detail FROM effects ORDER BY id"):
            self.runs[run_id].effects[name].append(Effect(*effect))

    def _load_steps(self, cluster: Cluster) -> None:
        outcomes: dict[str, list[str]] = defaultdict(list)
        for step_id, outcome in cluster.rows(
            """SELECT step_id, CASE error::json->>'exc_type' WHEN 'SoftTimeLimitExceeded' THEN 'out of time'
                                  ELSE outcome END
                 FROM byrd.attempts ORDER BY step_id, attempt"""
        ):
            outcomes[step_id].append(outcome)
        columns = [name for name in Step.__dataclass_fields__ if name not in ("name", "outcomes")]
        for run_id, task, args, kwargs, signal, *values in cluster.rows(
            f"SELECT run_id::text, task, args, kwargs, signal, {', '.join(columns)} FROM byrd.steps"
        ):
            row = dict(zip(columns, values, strict=True))
            name = _name_of(row["kind"], task, args, kwargs, signal)
            step = Step(**row, name=name, outcomes=outcomes[row["id"]])
            run = self.runs[run_id]
            run.steps[step.no] = step
            if step.compensates is not None:
                assert step.compensates not in run.undos, "a step has two compensations"
                run.undos[step.compensates] = step
            if name is not None:
                assert name not in run.named, f"{name} is there twice"
                run.named[name] = step
                if "/" in name:
                    self.generations[name.removeprefix(_EACH).rpartition("/")[0]].add(run_id)


def each_name(items: list[dict[str, Any]]) -> str:
    """Return what the step of an each is known by: its first item."""
    return f"{_EACH}{items[0]['name']}"


def _name_of(kind: str, task: str, args: str, kwargs: str, signal: str | None) -> str | None:
    """Return the name of the leaf that a step stands for, if it stands for one."""
    if kind == "wait":
        return signal.partition(":")[2] if signal is not None else None
    if kind not in ("task", "item"):
        return None
    if task == EACH:
        return each_name(json.loads(kwargs)["items"])
    return str(json.loads(args)[0]["name"])
