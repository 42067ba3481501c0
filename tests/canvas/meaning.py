"""What a plan means: its value when each step is simply called in turn.

This is the plan alone, without store, broker or worker, so that hypothesis can try and shrink many canvases in seconds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.exceptions import ChordError

from byrd.canvas import Plan, Step, compile_canvas
from byrd.model import StepKind
from tests.apps.canvas import swapped


@dataclass(frozen=True)
class _End:
    """How a step ended; ``skipped`` steps bear the error that they were skipped for."""

    value: Any = None
    error: BaseException | None = None
    skipped: bool = False


def value_of(plan: Plan, app: Celery) -> Any:
    """Return the value of the plan's output, or raise the error that kept it from one."""
    ends: dict[int, _End] = {}
    for step in plan.steps:
        ends[step.no] = _end(step, plan, ends, app)
    output = ends[plan.output]
    error = output.error
    while isinstance(error, ChordError) and error.__cause__ is not None:
        error = error.__cause__  # the error that it tells of
    if error is not None:
        raise error
    return output.value


def _end(step: Step, plan: Plan, ends: dict[int, _End], app: Celery) -> _End:
    before = ends[step.after] if step.after is not None else _End()
    if step.on_failure != (before.error is not None) or (step.on_failure and before.skipped):
        after_join = step.after is not None and plan.steps[step.after].kind is StepKind.JOIN
        if after_join and not before.skipped and not step.on_failure and step.kind is not StepKind.JOIN:
            error = ChordError()
            error.__cause__ = before.error
            return _End(error=error)
        return _End(error=before.error, skipped=True)
    if step.kind is StepKind.JOIN:
        return _joined(step, plan, ends)
    if step.kind is StepKind.ERRBACK:
        return _End()
    try:
        return _End(value=_called(step, ends, app))
    except Exception as exc:  # noqa: BLE001 - whatever a task raises
        return _End(error=exc)


def _joined(join: Step, plan: Plan, ends: dict[int, _End]) -> _End:
    members = sorted((step for step in plan.steps if step.into == join.no), key=lambda step: step.position or 0)
    assert [step.position for step in members] == list(range(join.members))
    bad = next((ends[step.no].error for step in members if ends[step.no].error is not None), None)
    return _End(error=bad) if bad is not None else _End(value=[ends[step.no].value for step in members])


def _called(step: Step, ends: dict[int, _End], app: Celery) -> Any:
    args, kwargs = json.loads(step.args), json.loads(step.kwargs)
    if step.input is not None:
        args.insert(0, ends[step.input].value)
    if step.task == "canvas.swap":  # eager Celery would replace it by itself
        canvas = swapped(app, args, label=kwargs["label"], to=kwargs["to"])
        return value_of(compile_canvas(canvas, app, inner=True), app)
    return app.tasks[step.task].apply(args, kwargs).get()
