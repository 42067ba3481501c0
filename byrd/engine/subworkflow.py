"""A workflow as a step of another: the step begins a run of its own, waits for its end, and has its value.

Its compensation has that run rolled back, and waits for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery import Task

from byrd.engine.run import Run
from byrd.errors import StepHandedBack, SubWorkflowError
from byrd.model import RunStatus
from byrd.store import children
from byrd.task.attempt import Attempt, Compensation, attempt_of
from byrd.task.durable import adopt_task
from byrd.task.saga import PATIENCE
from byrd.waits import SUBWORKFLOW, UNDO_SUBWORKFLOW, WORKFLOW_NAME

if TYPE_CHECKING:
    from byrd.engine.engine import Byrd


def add_task(engine: Byrd) -> None:
    """Register the task that stands for each workflow in a canvas, and the one that undoes it."""

    @engine.app.task(name=SUBWORKFLOW, bind=True, shared=False, typing=False)
    def run_workflow(self: Task, *args: Any, **kwargs: Any) -> Any:
        """Run a workflow, and return its value."""
        attempt = attempt_of(self.request)
        name = kwargs.pop(WORKFLOW_NAME, None)
        if attempt is None:
            raise SubWorkflowError(f"workflow {name!r} is a step of a run here: submit the canvas with engine.submit")
        return _step(engine, attempt, str(name), args, kwargs)

    options = {**PATIENCE, "dont_autoretry_for": (SubWorkflowError,)}

    @engine.app.task(name=UNDO_SUBWORKFLOW, bind=True, shared=False, typing=False, **options)
    def undo_workflow(self: Task, *_args: Any, **_kwargs: Any) -> None:
        """Have the run of a workflow rolled back."""
        attempt = attempt_of(self.request)
        if attempt is None or attempt.undoes is None:
            raise SubWorkflowError(f"{UNDO_SUBWORKFLOW} is a step of a rollback: it cannot be called")
        _undo(engine, attempt, attempt.undoes)

    if engine.app.finalized:
        for name in (SUBWORKFLOW, UNDO_SUBWORKFLOW):
            adopt_task(engine.app.tasks[name])


def _step(engine: Byrd, attempt: Attempt, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    store = engine.runtime.patient_store
    child = store.run(children.of_step, attempt.step_id)
    if child is not None and child.status in (RunStatus.FAILED, RunStatus.CANCELLED):
        engine.runtime.publisher.publish(store.run(children.try_again, attempt.step_id, attempt.number))
        child = store.run(children.of_step, attempt.step_id)
    if child is None:
        new = engine.new_run(name, args, dict(kwargs), key=attempt.step_id, parent_step=attempt.step_id)
        _, wakeups = store.run(children.begin, attempt.step_id, attempt.number, new)
        engine.runtime.publisher.publish(wakeups)
    elif child.status == RunStatus.CANCELLED:
        raise SubWorkflowError(f"run {child.id} of workflow {name!r}, which this step waits for, was cancelled")
    elif RunStatus(child.status).final:
        return Run(engine, child.id).get(timeout=0)
    attempt.give_way(children.await_end)
    raise StepHandedBack(f"step {attempt.step_id}: waits for its run of workflow {name!r}")


def _undo(engine: Byrd, attempt: Attempt, undoes: Compensation) -> None:
    child, wakeups = engine.runtime.patient_store.run(
        children.undo, attempt.step_id, attempt.number, reason=undoes.reason
    )
    engine.runtime.publisher.publish(wakeups)
    if child is None or RunStatus(child.status).final:
        return
    if child.status == RunStatus.ROLLBACK_STUCK:
        short = child.id[:8]
        raise SubWorkflowError(
            f"the rollback of run {short} of workflow {child.workflow!r} is stuck: see `byrd why {short}`; "
            "this one goes on when that one is done"
        )
    attempt.give_way(children.await_end)
    raise StepHandedBack(f"step {attempt.step_id}: waits for the rollback of run {child.id}")
