"""Compiling alone: the shape of plans, what is refused, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.canvas import _chain
from kombu.utils.json import dumps, loads

import byrd
from byrd.canvas import Plan, compile_canvas
from byrd.errors import ArgumentError, CanvasError
from byrd.model import StepKind
from tests.apps.canvas import define


@pytest.fixture(scope="module")
def app() -> Iterator[Celery]:
    with Celery("compile", set_as_current=False) as found:
        found.finalize()
        yield found


@pytest.fixture(scope="module")
def t(app: Celery) -> SimpleNamespace:
    return define(app, lambda key, entry: None)


def edges(plan: Plan) -> int:
    """How many edges a plan has: what follows a step, and what goes into a join."""
    return sum((step.after is not None) + (step.into is not None) for step in plan.steps)


# -- waits -----------------------------------------------------------------------------------------


def test_whom_a_wait_names_survives_json(app: Celery) -> None:
    canvas = chain(byrd.wait_for("ok", of="finance"), byrd.sleep(1), byrd.wait_for("ok", of="x" * 200, timeout=5))
    for found in (canvas, dict(canvas), loads(dumps(canvas)), canvas.clone(), copy.deepcopy(canvas)):
        plan = compile_canvas(found, app)
        assert [(step.signal, step.signal_of) for step in plan.steps] == [
            ("ok", "finance"), (None, None), ("ok", "x" * 200),
        ]  # fmt: skip
    assert byrd.wait_for("ok").kwargs == {"signal": "ok"}


# -- size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 100, 1000])
def test_a_group_after_a_group_is_linear(app: Celery, t: SimpleNamespace, size: int) -> None:
    canvas = group(t.call.s(i) for i in range(size)) | group(t.call.s(i) for i in range(size))
    plan = compile_canvas(canvas, app)
    assert len(plan.steps) == 2 * size + 2
    assert edges(plan) == 3 * size + 1


def test_a_chain_of_groups_is_linear(app: Celery, t: SimpleNamespace) -> None:
    def size(groups: int) -> int:
        parts = [part for i in range(groups) for part in (group(t.call.s(i), t.call.s(i), t.call.s(i)), t.call.s())]
        return len(compile_canvas(chain(*parts), app).steps)

    assert size(40) == 40 * 5
    assert size(20) == 20 * 5


def test_a_long_chain_compiles(app: Celery, t: SimpleNamespace) -> None:
    plan = compile_canvas(_chain(*[t.call.s(i) for i in range(5000)]), app)
    assert [step.after for step in plan.steps] == [None, *range(4999)]


# -- shape -----------------------------------------------------------------------------------------


def test_a_chord(app: Celery, t: SimpleNamespace) -> None:
    first, second, join, body = compile_canvas(chord([t.call.s(1), t.call.s(2)], t.call.s(3)), app).steps
    assert [step.kind for step in (first, second, join, body)] == [
        StepKind.TASK, StepKind.TASK, StepKind.JOIN, StepKind.TASK,
    ]  # fmt: skip
    assert (first.into, first.position, second.into, second.position) == (join.no, 0, join.no, 1)
    assert join.members == 2
    assert (body.after, body.input) == (join.no, join.no)


def test_an_immutable_step_waits_and_takes_nothing(app: Celery, t: SimpleNamespace) -> None:
    _, second = compile_canvas(t.call.s(1) | t.call.si(2), app).steps
    assert (second.after, second.input, second.args) == (0, None, "[2]")


def test_callbacks_and_errbacks_are_steps_of_their_own(app: Celery, t: SimpleNamespace) -> None:
    canvas = t.call.s(1).on_error(t.log_failure.s(key="x"))
    canvas.link(t.log.s(key="x"))
    plan = compile_canvas(canvas, app)
    task, callback, errback = plan.steps
    assert plan.output == task.no
    assert (callback.kind, callback.after, callback.on_failure) == (StepKind.CALLBACK, task.no, False)
    assert (errback.kind, errback.after, errback.on_failure) == (StepKind.ERRBACK, task.no, True)


def test_options_become_the_plans_own_words(app: Celery, t: SimpleNamespace) -> None:
    canvas = t.call.s(1).set(countdown=2, expires=60, queue="other", priority=3, task_id="own", root_id="gone")
    (step,) = compile_canvas(canvas, app).steps
    assert (step.id, step.countdown, step.expires_in) == ("own", 2.0, 60.0)
    assert step.options == {"queue": "other", "priority": 3}


# -- nothing else changes --------------------------------------------------------------------------


def test_a_lazy_group_can_be_compiled_and_sent_again(app: Celery, t: SimpleNamespace) -> None:
    canvas = group(t.call.s(i) for i in range(3))
    first, second = compile_canvas(canvas, app), compile_canvas(canvas, app)
    assert [step.args for step in first.steps] == [step.args for step in second.steps] == ["[0]", "[1]", "[2]", "[]"]
    assert {step.id for step in first.steps}.isdisjoint(step.id for step in second.steps)


def test_a_dictionary_is_left_as_it_was(app: Celery, t: SimpleNamespace) -> None:
    canvas = dict(chord([t.call.s(1), group(t.call.s(2))], t.call.s(3) | t.call.s(4)))
    plain: dict[str, Any] = copy.deepcopy(canvas)
    before = dumps(plain)
    compile_canvas(plain, app)
    assert dumps(plain) == before


# -- what is refused -------------------------------------------------------------------------------


def deep(t: SimpleNamespace, depth: int) -> Any:
    """A body in a body in a body, put together by hand: Celery cannot nest so deeply itself."""
    canvas = t.call.s(1)
    for _ in range(depth):
        outer = chord([t.call.s(2)])
        outer.kwargs["body"] = canvas
        canvas = outer
    return canvas


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda t: chain([]), "an empty chain has no value", id="empty chain"),
        pytest.param(lambda t: chord([t.call.s(1)]), "a chord without a body", id="chord without body"),
        pytest.param(lambda t: t.call, "canvas.call is a task, not a canvas", id="task"),
        pytest.param(lambda t: "canvas.call", "cannot compile str", id="text"),
        pytest.param(lambda t: deep(t, 2000), "nested too deeply", id="too deep"),
        pytest.param(
            lambda t: t.call.s(1).set(task_id="a") | t.call.s(2).set(task_id="a"), "'a' is used twice", id="id twice"
        ),
    ],
)
def test_canvases_that_cannot_be_compiled(app: Celery, t: SimpleNamespace, make: Any, message: str) -> None:
    with pytest.raises(CanvasError, match=message):
        compile_canvas(make(t), app)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda t: t.call.s(object()), "arguments cannot be held by JSON", id="object"),
        pytest.param(lambda t: t.call.s(x=object()), "keyword arguments cannot be held by JSON", id="keyword"),
        pytest.param(lambda t: t.call.s({"k": ["\0"]}), "arguments contain a NUL", id="NUL"),
        pytest.param(lambda t: t.call.s(x="a\0"), "keyword arguments contain a NUL", id="NUL in a keyword"),
        pytest.param(lambda t: t.call.s().set(countdown="soon"), "countdown='soon'", id="countdown"),
        pytest.param(lambda t: t.call.s().set(countdown=float("inf")), "out of range", id="endless countdown"),
        pytest.param(lambda t: t.call.s().set(eta="tomorrow"), "not an ISO 8601", id="eta"),
        pytest.param(lambda t: t.call.s().set(expires=object()), "expires=", id="expires"),
    ],
)
def test_arguments_that_are_refused(app: Celery, t: SimpleNamespace, make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        compile_canvas(make(t), app)
    with pytest.raises(ArgumentError, match=message):
        compile_canvas(group([t.call.s(1), t.call.s(2) | make(t)]), app)


def test_text_that_only_looks_like_a_nul_is_taken(app: Celery, t: SimpleNamespace) -> None:
    (step,) = compile_canvas(t.call.s("\\u0000"), app).steps
    assert step.args == '["\\\\u0000"]'
