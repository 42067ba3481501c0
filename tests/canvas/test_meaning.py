"""Random canvases, without any server: the plan's value is what Celery's eager mode gives."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from kombu.utils.json import dumps

from byrd.canvas import compile_canvas
from tests.canvas.kitchen import Menu, canvases
from tests.canvas.meaning import value_of
from tests.canvas.outcomes import eager, outcome_of
from tests.canvas.recipes import Recipe, build, keyed

few = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def app() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("celery.app.trace"), "disabled", True)  # many tasks fail, and should
        yield importlib.import_module("tests.apps.canvas_eager")


@few
@given(canvases(Menu(countdown=0, lone=False)))
def test_a_plan_has_the_value_that_celery_gives_eagerly(app: ModuleType, recipe: Recipe) -> None:
    recipe = keyed(recipe, "meaning")
    ours = outcome_of(lambda: value_of(compile_canvas(build(recipe, app.app), app.app), app.app))
    theirs = eager(lambda: build(recipe, app.app))
    assert ours.kind == theirs.kind
    if theirs.error is None:
        assert ours.canonical == theirs.canonical


@few
@given(canvases(Menu()))
def test_compiling_changes_nothing_and_gives_the_same_plan_again(app: ModuleType, recipe: Recipe) -> None:
    canvas = build(keyed(recipe, "meaning"), app.app)
    before = dumps(canvas)
    first = compile_canvas(canvas, app.app)
    assert dumps(canvas) == before
    second = compile_canvas(canvas, app.app)
    assert [(s.kind, s.task, s.args, s.after, s.input, s.into, s.position) for s in first.steps] == [
        (s.kind, s.task, s.args, s.after, s.input, s.into, s.position) for s in second.steps
    ]


@few
@given(canvases(Menu()))
def test_a_plan_is_a_forest_whose_joins_know_their_members(app: ModuleType, recipe: Recipe) -> None:
    plan = compile_canvas(build(keyed(recipe, "meaning"), app.app), app.app)
    assert [step.no for step in plan.steps] == list(range(len(plan.steps)))
    assert len({step.id for step in plan.steps}) == len(plan.steps)
    for step in plan.steps:
        assert step.after is None or step.after < step.no
        assert step.input is None or step.input == step.after
        assert step.into is None or step.into > step.no
    for join in (step for step in plan.steps if step.task is None):
        members = [step for step in plan.steps if step.into == join.no]
        assert sorted(step.position for step in members if step.position is not None) == list(range(join.members))
