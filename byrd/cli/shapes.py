"""What ``--json`` prints: plain values with keys that stay the same from version to version."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from byrd.engine.doctor import Check
from byrd.engine.words import error_fields
from byrd.store import Counts, RunRow, StepRow, WorkerRow
from byrd.store.insight import Items, Snapshot, Tally
from byrd.store.limits import LimitRow
from byrd.store.metrics import Metrics
from byrd.store.waits import Awaited


def run_shape(
    run: RunRow, tally: Tally | None, items: Items | None = None, *, now: datetime | None = None
) -> dict[str, Any]:
    """Return a run, with its steps counted, and what its checkpoints have counted."""
    ended = run.finished_at or now
    return {
        "id": run.id,
        "workflow": run.workflow,
        "title": run.title,
        "key": run.key,
        "status": run.status,
        "created_at": run.created_at,
        "finished_at": run.finished_at,
        "deadline": run.deadline,
        "terminate_at": run.terminate_at,
        "pivot": run.pivot,
        "duration_seconds": (ended - run.created_at).total_seconds() if ended else None,
        "error": error_fields(run.error),
        "items": items._asdict() if items is not None else None,
        "step_counts": (tally or Tally(0, 0, 0, 0))._asdict(),
    }


def snapshot_shape(snapshot: Snapshot, tally: Tally | None) -> dict[str, Any]:
    """Return a run with its steps."""
    attempts: dict[int, list[dict[str, Any]]] = {}
    for found in snapshot.attempts:
        attempts.setdefault(found["no"], []).append({
            "attempt": found["attempt"],
            "outcome": found["outcome"],
            "error": error_fields(found["error"]),
            "worker": found["worker"],
            "started_at": found["started_at"],
            "ended_at": found["ended_at"],
        })  # fmt: skip
    steps = [
        {
            **_step_shape(step),
            "worker": snapshot.holders.get(step.worker_id or ""),
            "checkpoints": [_checkpoint_shape(name, counts) for name, counts in snapshot.checkpoints.get(step.no, [])],
            "ended_attempts": attempts.get(step.no, []),
        }
        for step in snapshot.steps
    ]
    return {**run_shape(snapshot.run, tally, _items(snapshot), now=snapshot.now), "steps": steps}


def _items(snapshot: Snapshot) -> Items | None:
    counted = [
        counts
        for found in snapshot.checkpoints.values()
        for name, counts in found
        if not name.startswith(("step:", "wait:"))
    ]
    return Items(sum(c.completed for c in counted), sum(c.failed for c in counted)) if counted else None


def worker_shape(worker: WorkerRow) -> dict[str, Any]:
    """Return a worker and its lease."""
    return {
        "id": worker.id,
        "hostname": worker.hostname,
        "pid": worker.pid,
        "pool": worker.pool,
        "concurrency": worker.concurrency,
        "queues": worker.queues,
        "tasks": worker.tasks,
        "version": worker.version,
        "alive": worker.alive,
        "stopping": worker.stopping,
        "running_steps": worker.running,
        "started_at": worker.started_at,
        "heartbeat_at": worker.heartbeat_at,
        "lease_until": worker.lease_until,
    }


def awaited_shape(step: Awaited) -> dict[str, Any]:
    """Return a step that waits for a signal."""
    return {
        "run": step.run_id,
        "workflow": step.workflow,
        "title": step.title,
        "run_status": step.run_status,
        "step": step.step_no,
        "signal": step.signal,
        "of": step.of,
        "since": step.since,
        "until": step.until,
        "has_default": step.default is not None,
        "default": json.loads(step.default) if step.default is not None else None,
    }


def limit_shape(row: LimitRow) -> dict[str, Any]:
    """Return one key of a limit."""
    return {
        "name": row.name,
        "key": row.key,
        "rate": row.rate,
        "burst": row.burst,
        "concurrency": row.concurrency,
        "running": row.running,
        "waiting": row.waiting,
        "until": row.until,
        "parked_until": row.parked_until,
        "declared": {
            "rate": row.declared_rate,
            "burst": row.declared_burst,
            "concurrency": row.declared_concurrency,
        },
        "set_by": row.set_by,
        "set_at": row.set_at,
    }


def checks_shape(checks: Sequence[Check]) -> dict[str, Any]:
    """Return what the doctor found."""
    levels = [str(check.level) for check in checks]
    return {
        "problems": levels.count("problem"),
        "warnings": levels.count("warning"),
        "checks": [{"name": c.name, "level": str(c.level), "what": c.what, "do": c.do or None} for c in checks],
    }


def _step_shape(step: StepRow) -> dict[str, Any]:
    took = (step.finished_at - step.started_at).total_seconds() if step.started_at and step.finished_at else None
    return {
        "no": step.no,
        "id": step.id,
        "kind": step.kind,
        "task": step.task,
        "queue": step.queue,
        "signal": step.signal,
        "signal_of": step.signal_of,
        "status": step.status,
        "after": step.after,
        "on_failure": step.on_failure,
        "group": step.join_no,
        "position": step.join_pos,
        "compensates": step.compensates,
        "saga": step.saga,
        "mark": step.mark if step.kind != "saga" else None,
        "rank": step.rank,
        "replaced": step.replaced,
        "attempt": step.attempt,
        "retries": step.retries,
        "preemptions": step.preemptions,
        "run_at": None if step.run_at is None or step.run_at.year >= 9999 else step.run_at,
        "ready_at": step.ready_at,
        "started_at": step.started_at,
        "finished_at": step.finished_at,
        "duration_seconds": took,
        "result": json.loads(step.result) if step.result is not None else None,
        "error": error_fields(step.error),
    }


def _checkpoint_shape(name: str, counts: Counts) -> dict[str, Any]:
    cursor = json.loads(counts.cursor) if counts.cursor is not None else None
    return {
        "name": name,
        "cursor": cursor,
        "completed": counts.completed,
        "failed": counts.failed,
        "done": counts.done,
    }


def metrics_shape(found: Metrics) -> dict[str, Any]:
    """Return the figures of now."""
    return {
        "at": found.at,
        "runs": found.runs,
        "rollbacks_stuck": found.rollbacks_stuck,
        "steps": found.steps,
        "queues": {name: queue._asdict() for name, queue in found.queues.items()},
        "workers": found.workers,
        "worker_processes": found.worker_processes,
        "workers_lost": found.workers_lost,
        "notices_undelivered": found.notices_undelivered,
    }
