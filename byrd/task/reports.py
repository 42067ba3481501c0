"""Celery's events for the steps of a slice: its pool process reports them, and the main process, which has them sent.

Celery's main process sees messages only, and sends the events of each.  So a process that has run other steps besides
its message's own adds to the outcome what became of them, while anybody listens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from celery import states
from kombu.utils.encoding import safe_repr

from byrd.task.attempt import Attempt


class Report(NamedTuple):
    """One step that was run: times in seconds since 1970, or long.  ``outcome`` is a representation of its value."""

    id: str
    task: str
    run_id: str
    no: int
    parent_id: str | None
    retries: int
    began_at: float
    seconds: float
    state: str
    outcome: str
    traceback: str


_EVENTS = {
    states.SUCCESS: "task-succeeded",
    states.FAILURE: "task-failed",
    states.RETRY: "task-retried",
    states.REJECTED: "task-rejected",
}


class _Reported(str):
    """The representation of a value that Celery sends from a pool process, with what else that process has to say."""

    __slots__ = ("reports",)
    reports: list[Report]


def report_of(attempt: Attempt, outcome: Any, began_at: float) -> Report:
    """Return what is to be told of an attempt that Celery's tracer has run."""
    claim, info = attempt.claim, outcome.info
    state, value, traceback = states.SUCCESS, outcome.retstr, ""
    if info is not None:
        state, value = info.state, safe_repr(getattr(info.retval, "exc", None) or info.retval)
        traceback = str(getattr(outcome.retval, "traceback", ""))
    return Report(
        claim.id, claim.task, claim.run_id, claim.no, claim.parent_id, claim.retries, began_at, outcome.runtime or 0.0,
        state, value or "", traceback,
    )  # fmt: skip


def with_reports(outcome: Any, reports: list[Report] | None) -> Any:
    """Add reports to the outcome of a message."""
    if not reports:
        return outcome
    if outcome.info is None:
        told = _Reported(outcome.retstr)
        told.reports = reports
        return outcome._replace(retstr=told)
    outcome.retval.byrd_reports = reports  # its ExceptionInfo, which is sent in place of a representation
    return outcome


def reports_of(sent: Any) -> list[Report]:
    """Return the reports in what a pool process has sent."""
    _, value, _ = sent
    found = value.reports if isinstance(value, _Reported) else getattr(value, "byrd_reports", [])
    return [Report(*report) for report in found]


def send_reports(eventer: Any, reports: list[Report]) -> None:
    """Send the events of steps that had no message of their own."""
    if not reports or eventer is None or not eventer.enabled:
        return
    for report in reports:
        eventer.send(
            "task-received", uuid=report.id, name=report.task, args=f"run {report.run_id}, step {report.no}",
            kwargs="", root_id=report.run_id, parent_id=report.parent_id, retries=report.retries, eta=None,
            expires=None, timestamp=report.began_at,
        )  # fmt: skip
        eventer.send("task-started", uuid=report.id, timestamp=report.began_at)
        ended = {"uuid": report.id, "timestamp": report.began_at + report.seconds}
        if report.state == states.SUCCESS:
            eventer.send("task-succeeded", result=report.outcome, runtime=report.seconds, **ended)
        elif report.state in _EVENTS:
            eventer.send(_EVENTS[report.state], exception=report.outcome, traceback=report.traceback, **ended)
