"""States of runs and steps, and the one table of legal transitions.

Pure: no I/O, no Celery.  The database's CHECK constraints, the guards of the SQL statements in
:mod:`byrd.store` and the state diagrams in the documentation all come from the tables below;
``tests/store/test_transitions.py`` tries every transition from every state against them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

#: Version of the message headers that a wake-up carries.  A worker that reads another version leaves the
#: step for a worker that knows it.
PROTOCOL_VERSION = 1


class RunStatus(StrEnum):
    """Where a run stands."""

    RUNNING = "running"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    COMPENSATING = "compensating"
    ROLLBACK_STUCK = "rollback_stuck"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """True once the run has ended; only ``retry`` leaves such a status."""
        return self in FINAL_RUN


class StepStatus(StrEnum):
    """Where a step stands."""

    PENDING = "pending"
    READY = "ready"
    RUNNING = "running"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """True once the step has an outcome; only a retry of its run leaves such a status."""
        return self in FINAL_STEP


class StepKind(StrEnum):
    """What a step is for.

    Three kinds call no task: a join gathers the values of a group, a wait lets time pass, or a signal come, and a saga
    has the value of the canvas inside it, or fails once that is undone.  An item is one call of an each's task: what
    its failure means is for the each to say.
    """

    TASK = "task"
    ITEM = "item"
    JOIN = "join"
    WAIT = "wait"
    SAGA = "saga"
    CALLBACK = "callback"
    ERRBACK = "errback"
    COMPENSATION = "compensation"


class Mark(StrEnum):
    """What a step is to the sagas around it.

    Once a pivot has succeeded, its run goes forward only.  A step that is retriable causes no rollback when it fails.
    """

    PIVOT = "pivot"
    RETRIABLE = "retriable"


class Outcome(StrEnum):
    """How an attempt at a step ended, when it did not end in success."""

    FAILED = "failed"
    RETRIED = "retried"
    PREEMPTED = "preempted"
    HANDED_BACK = "handed_back"
    REPLACED = "replaced"
    CANCELLED = "cancelled"


FINAL_RUN = frozenset({RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED})
FINAL_STEP = frozenset({StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED, StepStatus.CANCELLED})
OPEN_STEP = frozenset({StepStatus.PENDING, StepStatus.READY, StepStatus.RUNNING, StepStatus.WAITING})


@dataclass(frozen=True, slots=True)
class Transition:
    """A legal change of status: ``name`` is the store's statement, ``sources`` where it may start."""

    name: str
    sources: frozenset[str]
    targets: frozenset[str]
    why: str


def _step(name: str, sources: str, targets: str, why: str) -> Transition:
    return Transition(
        name,
        frozenset(StepStatus(s) for s in sources.split()),
        frozenset(StepStatus(t) for t in targets.split()),
        why,
    )


def _run(name: str, sources: str, targets: str, why: str) -> Transition:
    return Transition(
        name,
        frozenset(RunStatus(s) for s in sources.split()),
        frozenset(RunStatus(t) for t in targets.split()),
        why,
    )


STEP_TRANSITIONS: tuple[Transition, ...] = (
    _step("release", "pending", "ready", "its predecessor is done"),
    _step("claim", "ready", "running", "a worker takes it; the attempt number rises"),
    _step("run_on", "pending", "running", "its predecessor is done, and whoever recorded that takes it at once"),
    _step("put_off", "running", "ready", "its limit allows no more now: it was claimed in this very transaction"),
    _step("complete", "running", "succeeded", "its task returned; the result is recorded"),
    _step("fail", "running", "failed", "its task raised, and may not try again"),
    _step("retry", "running", "ready", "its task asked for another try, at a time"),
    _step(
        "time_out", "running", "ready failed", "it took too long, or gave no sign of life; ready if it may try again"
    ),
    _step("miss_start", "ready", "failed", "it was not started in time"),
    _step("persist", "running", "ready", "its task raised, where nothing may be rolled back: it is tried again later"),
    _step("preempt", "running", "ready failed", "its worker is gone; failed once it was preempted too often"),
    _step("put_back", "running", "ready", "it was claimed along with others, and one of these takes its time"),
    _step("hand_back", "running", "ready", "its worker shuts down, or its run is paused: it goes on later"),
    _step("replace", "running", "pending", "its task replaced itself by a canvas, whose value it will have"),
    _step("begin_wait", "pending", "waiting", "its predecessor is done, and it is a sleep or waits for a signal"),
    _step(
        "end_wait", "waiting", "succeeded failed", "its time or its signal has come; failed when no signal came in time"
    ),
    _step("revoke", "ready running waiting", "cancelled", "Celery's revoke, or it expired before it started"),
    _step(
        "abandon",
        "running",
        "cancelled",
        "its run is being cancelled, or its saga has failed, and it stopped at a checkpoint",
    ),
    _step("terminate", "running", "cancelled", "its run is cancelled with terminate, and it did not stop in time"),
    _step("ignore", "running", "cancelled", "its task raised Ignore"),
    _step("expire", "ready waiting", "cancelled", "its time to start was over"),
    _step("stop_pivot", "ready", "cancelled", "it is a pivot, and a step of its run has failed before it started"),
    _step("finish_join", "pending", "succeeded failed", "all that it waits for is done"),
    _step("fail_saga", "pending", "waiting", "a step of the saga failed: what it had done is about to be undone"),
    _step("end_saga", "waiting", "failed", "what the saga had done is undone, or must not be"),
    _step("fail_body", "pending", "failed", "a member of the group that it waits for failed (ChordError)"),
    _step("skip", "pending", "skipped", "what it waits for failed, or too many other items of its each"),
    _step("cancel_step", "pending ready waiting", "cancelled", "its run is cancelled, or its saga or each has failed"),
    _step("skip_undo", "ready failed cancelled", "skipped", "an operator lets a compensation be, for a reason"),
    _step("done_by_hand", "ready failed cancelled", "succeeded", "an operator has done what a compensation should do"),
    _step("reopen", "failed skipped cancelled", "pending", "its run is retried"),
    _step("recall", "succeeded", "pending", "its run is retried, and it is an errback: a new failure calls it anew"),
)

RUN_TRANSITIONS: tuple[Transition, ...] = (
    _run("finish", "running paused", "succeeded failed compensating", "no step is open any more"),
    _run("pause", "running", "paused", "an operator asked"),
    _run("resume", "paused", "running", "an operator asked"),
    _run("cancel", "running paused", "cancelling", "an operator asked, or its deadline passed"),
    _run("finish_cancel", "cancelling", "cancelled failed compensating", "its last running step has stopped"),
    _run("finish_rollback", "compensating", "failed cancelled", "every compensation is done"),
    _run("roll_back", "succeeded failed cancelled", "compensating", "an operator asked"),
    _run(
        "stick",
        "running paused cancelling compensating rollback_stuck",
        "rollback_stuck",
        "a compensation, of the run's own rollback or that of a saga in it, used up its retries",
    ),
    _run(
        "retry_rollback",
        "rollback_stuck",
        "running paused cancelling compensating",
        "an operator had the compensation tried again, skipped it, or did by hand what it should do",
    ),
    _run("retry_run", "failed cancelled", "running", "an operator asked to try again what did not succeed"),
)


def sources(transitions: tuple[Transition, ...], name: str) -> frozenset[str]:
    """Return the states from which the transition called ``name`` may start."""
    for transition in transitions:
        if transition.name == name:
            return transition.sources
    raise KeyError(name)


def state_diagram(transitions: tuple[Transition, ...], *, initial: str) -> str:
    """Draw ``transitions`` as a Mermaid state diagram (what the documentation shows)."""
    lines = ["stateDiagram-v2", f"    [*] --> {initial}"]
    edges: dict[tuple[str, str], list[str]] = {}
    for transition in transitions:
        for source in sorted(transition.sources):
            for target in sorted(transition.targets):
                edges.setdefault((source, target), []).append(transition.name)
    lines += [f"    {source} --> {target}: {', '.join(names)}" for (source, target), names in edges.items()]
    return "\n".join(lines)
