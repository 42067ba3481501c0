"""Each construct of Celery's canvas by itself; docs/canvas.md has a row for each of these tests.

``give`` and ``fail`` run a canvas on Byrd, on a worker of plain Celery and in Celery's eager mode, which have to agree
unless the test says what else Celery gives.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery import chain, chord, group
from celery.canvas import StampingVisitor, _chain
from celery.exceptions import TaskRevokedError

from byrd import errors
from tests.canvas.conftest import ThreeWays
from tests.cluster import wait_until

T = SimpleNamespace
pytestmark = pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header:PendingDeprecationWarning")


# -- tasks, chains ---------------------------------------------------------------------------------


def test_task(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: t.call.s(1, "a", label="x"), ["x", 1, "a"])


def test_arguments_at_submit(three_ways: ThreeWays) -> None:
    run = three_ways.engine.submit(three_ways.byrd.tasks.call.s("own"), 1, 2, label="x")
    assert run.get(timeout=30) == ["x", 1, 2, "own"]
    assert three_ways.plain.tasks.call.s("own").apply_async((1, 2), {"label": "x"}).get(timeout=30) == run.get()


def test_dictionary(three_ways: ThreeWays) -> None:
    canvas = json.loads(json.dumps(three_ways.byrd.tasks.call.s(1) | three_ways.byrd.tasks.call.s(2)))
    assert three_ways.engine.submit(canvas).get(timeout=30) == [None, [None, 1], 2]


def test_chain(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: chain(t.call.s(1), t.call.s(2), t.call.s(3)), [None, [None, [None, 1], 2], 3])


def test_pipe(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: t.call.s(1) | (t.call.s(2) | t.call.s(3)), [None, [None, [None, 1], 2], 3])


def test_immutable(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: t.call.s(1) | t.call.si(2) | t.call.s(3), [None, [None, 2], 3])


def test_chain_that_is_not_folded(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: _chain(t.call.s(1), _chain(t.call.s(2), t.call.s(3))), [None, [None, [None, 1], 2], 3])


def test_failing_chain(three_ways: ThreeWays) -> None:
    run = three_ways.fail(lambda t: t.call.s(1) | t.fail.s(label=7) | t.call.s(2), "ValueError(7,)")
    assert [step.status for step in run.steps()] == ["succeeded", "failed", "skipped"]


# -- groups ----------------------------------------------------------------------------------------


def test_group(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: group(t.call.s(i) for i in range(5)), [[None, i] for i in range(5)])


def test_group_gets_what_comes_before(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: t.call.s(0) | group(t.call.s(1), t.call.si(2)), [[None, [None, 0], 1], [None, 2]])


def test_empty_group(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: group(app=t.call.app), [])


def test_empty_group_in_a_chain(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: _chain(t.call.s(1), group(app=t.call.app), t.call.s(2)), [None, [None, 1], 2])


def test_group_of_one_in_a_chain(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: _chain(t.call.s(0), group([t.call.s(1)])), [None, [None, 0], 1], eagerly=[[None, [None, 0], 1]]
    )


def test_group_of_one_chain_that_ends_in_a_group(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: group([t.call.s(0) | group(t.call.s(1), t.call.s(2))]),
        [[None, [None, 0], 1], [None, [None, 0], 2]],
    )


def test_nested_groups(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: chord([group(t.call.s(1), t.call.s(2)), t.call.s(3)], t.call.s()),
        [None, [[None, 1], [None, 2], [None, 3]]],
        worker=[None, [[None, 2], [None, 1], [None, 3]]],
    )


def test_failing_group(three_ways: ThreeWays) -> None:
    run = three_ways.fail(lambda t: group(t.call.s(1), t.fail.s(label=1), t.fail.s(label=2)), "ValueError(1,)")
    run.wait(timeout=30)
    assert [step.status for step in run.steps()] == ["succeeded", "failed", "failed", "failed"]


# -- chords ----------------------------------------------------------------------------------------


def test_chord(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: chord([t.call.s(1), t.call.s(2)], t.call.s("b")), [None, [[None, 1], [None, 2]], "b"])


def test_chord_without_header(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: chord([], t.call.s("b"), app=t.call.app), [None, [], "b"])


def test_chord_with_immutable_body(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: chord([t.call.s(1)], t.call.si("b")), [None, "b"])


def test_chord_whose_body_is_a_chain(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: chord([t.call.s(1), t.call.s(2)], t.call.s("b") | t.call.s("c")),
        [None, [None, [[None, 1], [None, 2]], "b"], "c"],
    )


def test_chord_whose_body_is_a_group(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: chord([t.call.s(1), t.call.s(2)], group(t.call.s("b"), t.call.s("c"))),
        [[None, [[None, 1], [None, 2]], "b"], [None, [[None, 1], [None, 2]], "c"]],
    )


def test_chord_whose_body_is_a_chord(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: chord([t.call.s(1)], chord([t.call.s(2), t.call.si(3)], t.call.s("b"))),
        [None, [[None, [[None, 1]], 2], [None, 3]], "b"],
    )


def test_chord_in_a_chord(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: chord([chord([t.call.s(1)], t.call.s(2)), t.call.s(3)], t.call.s()),
        [None, [[None, [[None, 1]], 2], [None, 3]]],
    )


def test_chord_followed_by_tasks(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: chord([t.call.s(1)], t.call.s("b")) | t.call.s("c") | t.call.s("d"),
        [None, [None, [None, [[None, 1]], "b"], "c"], "d"],
    )


def test_group_followed_by_a_task(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: t.call.s(0) | group(t.call.s(1), t.call.s(2)) | t.call.s("b"),
        [None, [[None, [None, 0], 1], [None, [None, 0], 2]], "b"],
    )


def test_group_followed_by_a_group(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: group(t.call.s(1), t.call.s(2)) | group(t.call.s(3), t.call.s(4)),
        [[None, [[None, 1], [None, 2]], 3], [None, [[None, 1], [None, 2]], 4]],
    )


def test_chain_of_groups_and_tasks(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: chain(
            group(t.call.s(1), t.call.s(2)), t.call.s("b"), group(t.call.s(3), t.call.si(4)), t.call.s("c")
        ),
        [None, [[None, [None, [[None, 1], [None, 2]], "b"], 3], [None, 4]], "c"],
    )


def test_failing_chord(three_ways: ThreeWays) -> None:
    run = three_ways.fail(lambda t: chord([t.call.s(1), t.fail.s(label=7)], t.call.s()), "ValueError(7,)")
    body = run.steps()[-1]
    assert body.status == "failed"
    assert "ChordError" in str(body.error)


# -- chunks, map, starmap --------------------------------------------------------------------------


def test_map(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: t.one.map([1, "a"]), [["one", 1], ["one", "a"]])


def test_starmap(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: t.call.starmap([(1, 2), (3,)]) | t.call.s("b"), [None, [[None, 1, 2], [None, 3]], "b"])


def test_chunks(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: t.call.chunks([(i,) for i in range(5)], 2),
        [[[None, 0], [None, 1]], [[None, 2], [None, 3]], [[None, 4]]],
    )


def test_chunks_as_a_group(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: t.call.chunks([(i,) for i in range(3)], 2).group() | t.call.s("b"),
        [None, [[[None, 0], [None, 1]], [[None, 2]]], "b"],
    )


def test_chunks_within_a_canvas(three_ways: ThreeWays) -> None:
    tasks = three_ways.byrd.tasks
    run = three_ways.engine.submit(tasks.call.s(0) | tasks.call.chunks([(1,), (2,), (3,)], 2) | tasks.call.s("b"))
    assert run.get(timeout=30) == [None, [[[None, 1], [None, 2]], [[None, 3]]], "b"]


# -- callbacks and errbacks ------------------------------------------------------------------------


def test_link(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    def made(t: T) -> Any:
        canvas = t.call.s(1)
        canvas.link(t.log.s("given", label="a", key=request.node.name))
        canvas.link(t.log.si("alone", label="b", key=request.node.name))
        return canvas

    run = three_ways.give(made, [None, 1])
    assert three_ways.notes(run, request.node.name) == [["a", [None, 1], "given"], ["b", "alone"]]


def test_link_of_a_chain(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    def made(t: T) -> Any:
        canvas = t.call.s(1) | t.call.s(2)
        canvas.link(t.log.s(label="a", key=request.node.name) | t.log.si(label="b", key=request.node.name))
        return canvas

    run = three_ways.give(made, [None, [None, 1], 2])
    assert three_ways.notes(run, request.node.name) == [["a", [None, [None, 1], 2]], ["b"]]


def test_link_of_a_group(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    def made(t: T) -> Any:
        canvas = group(t.call.s(1), t.call.s(2))
        canvas.link(t.log.s(label="a", key=request.node.name))
        return canvas

    run = three_ways.give(made, [[None, 1], [None, 2]])
    assert three_ways.notes(run, request.node.name) == [["a"]]


def test_link_of_a_chain_that_ends_in_a_group(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    def made(t: T) -> Any:
        canvas = t.call.si(1) | group(t.call.si(2), t.call.si(3))
        canvas.link(t.log.s(label="a", key=request.node.name))
        return canvas

    run = three_ways.give(made, [[None, 2], [None, 3]])
    assert three_ways.notes(run, request.node.name) == [["a", [None, 2]], ["a", [None, 3]]]


def test_link_of_a_chord(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    def made(t: T) -> Any:
        canvas = chord([t.call.s(1)], t.call.s())
        canvas.link(t.log.s(label="a", key=request.node.name))
        return canvas

    run = three_ways.give(made, [None, [[None, 1]]])
    assert three_ways.notes(run, request.node.name) == [["a", [None, [[None, 1]]]]]


def test_failing_link(three_ways: ThreeWays) -> None:
    def made(t: T) -> Any:
        canvas = t.call.s(1)
        canvas.link(t.fail.si(label=7))
        return canvas

    run = three_ways.give(made, [None, 1])
    assert run.wait(timeout=30) == "failed"


def test_link_error_of_the_old_style(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    run = three_ways.fail(
        lambda t: t.fail.s(label=7).on_error(t.log_error.s(label="a", key=request.node.name)), "ValueError(7,)"
    )
    assert three_ways.notes(run, request.node.name) == [["a", "old style", True]]


def test_link_error_of_the_new_style(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    run = three_ways.fail(
        lambda t: t.fail.s(label=7).on_error(t.log_failure.s(label="a", key=request.node.name)), "ValueError(7,)"
    )
    assert three_ways.notes(run, request.node.name) == [["a", "new style", "ValueError"]]


def test_link_error_of_a_chain(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    def made(t: T) -> Any:
        errback = t.log_failure.s(label="a", key=request.node.name)
        return (t.call.s(1) | t.fail.s(label=7) | t.call.s(2)).on_error(errback)

    run = three_ways.fail(made, "ValueError(7,)")
    assert three_ways.notes(run, request.node.name) == [["a", "new style", "ValueError"]]


def test_link_error_of_a_group(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    def made(t: T) -> Any:
        canvas = group(t.fail.s(label=1), t.call.s(2), t.fail.s(label=3))
        canvas.link_error(t.log_failure.s(label="a", key=request.node.name))
        return canvas

    run = three_ways.fail(made, "ValueError(1,)")
    assert three_ways.notes(run, request.node.name) == [["a", "new style", "ValueError"]] * 2


def test_link_error_of_a_chord(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    def made(t: T) -> Any:
        canvas = chord([t.call.s(1), t.fail.s(label=7)], t.call.s())
        canvas.link_error(t.log_failure.s(label="a", key=request.node.name))
        return canvas

    run = three_ways.fail(made, "ValueError(7,)")
    # task_allow_error_cb_on_chord_header: of the header's task that failed, and of the body that it kept from running.
    assert [note[2] for note in three_ways.notes(run, request.node.name)] == ["ChordError", "ValueError"]


def test_link_error_of_a_chord_whose_body_is_a_group(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    def made(t: T) -> Any:
        errback = t.log_failure.s(label="a", key=request.node.name)
        return chord([t.fail.s(label=7)], group(t.call.s(1).on_error(errback), t.call.s(2).on_error(errback)))

    run = three_ways.fail(made, "ValueError(7,)")
    assert three_ways.notes(run, request.node.name) == [["a", "new style", "ValueError"]] * 2


def test_link_error_of_a_body_that_is_a_chain(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    def made(t: T) -> Any:
        body = t.call.s(1).on_error(t.log_failure.s(label="a", key=request.node.name)) | t.call.s(2)
        return chord([t.fail.s(label=7)], body)

    run = three_ways.fail(made, "ValueError(7,)")
    assert three_ways.notes(run, request.node.name, worker=0) == [["a", "new style", "ChordError"]]


# -- options ---------------------------------------------------------------------------------------


def test_countdown(three_ways: ThreeWays) -> None:
    run = three_ways.give(lambda t: t.call.s(1) | t.call.s(2).set(countdown=0.5), [None, [None, 1], 2])
    first, second = run.steps()
    assert first.finished_at is not None
    assert second.started_at is not None
    assert second.started_at - first.finished_at >= timedelta(seconds=0.5)


def test_eta(three_ways: ThreeWays) -> None:
    eta = datetime.now(UTC) + timedelta(seconds=1)
    run = three_ways.give(lambda t: t.call.s(1).set(eta=eta), [None, 1])
    assert (run.steps()[0].started_at or eta) >= eta


def test_expires(three_ways: ThreeWays) -> None:
    tasks = three_ways.byrd.tasks
    late = tasks.call.s(2).set(countdown=0.5, expires=datetime.now(UTC) + timedelta(seconds=0.2))
    run = three_ways.engine.submit(tasks.call.s(1) | late | tasks.call.s(3))
    with pytest.raises(TaskRevokedError):
        run.get(timeout=30)
    assert [step.status for step in run.steps()] == ["succeeded", "cancelled", "skipped"]


@pytest.mark.parametrize("options", [{"queue": "other"}, {"routing_key": "other", "exchange": "other"}])
def test_queue_and_routing_key(three_ways: ThreeWays, options: dict[str, Any]) -> None:
    tasks = three_ways.byrd.tasks
    if "routing_key" in options:
        three_ways.byrd.app.amqp.queues.add("other", exchange="other", routing_key="other")
    run = three_ways.engine.submit(tasks.call.s(1) | tasks.call.s(2).set(**options))
    assert run.get(timeout=30) == [None, [None, 1], 2]
    steps = run.steps()
    assert steps[0].queue == "celery"
    if "queue" in options:
        assert steps[1].queue == "other"


def test_message_options(three_ways: ThreeWays) -> None:
    """Priority, time limits and headers reach the task as they do in Celery."""

    def made(t: T) -> Any:
        return t.info.s(1).set(priority=3, time_limit=50, soft_time_limit=40, headers={"X-Tenant": "acme"})

    run = three_ways.engine.submit(made(three_ways.byrd.tasks))
    theirs = made(three_ways.plain.tasks).apply_async().get(timeout=30)
    assert run.get(timeout=30) == theirs
    assert theirs["headers"] == {"X-Tenant": "acme"}
    assert theirs["timelimit"] == [50, 40]
    assert theirs["priority"] == 3


def test_options_of_a_group_are_its_members(three_ways: ThreeWays) -> None:
    run = three_ways.engine.submit(group(three_ways.byrd.tasks.call.s(i) for i in range(2)).set(queue="other"))
    assert run.get(timeout=30) == [[None, 0], [None, 1]]
    assert [step.queue for step in run.steps()] == ["other", "other", None]


def test_options_of_a_chord(three_ways: ThreeWays) -> None:
    tasks = three_ways.byrd.tasks
    run = three_ways.engine.submit(chord([tasks.call.s(1)], tasks.call.s()).set(queue="other", countdown=0.2))
    assert run.get(timeout=30) == [None, [[None, 1]]]
    header, _, body = run.steps()
    assert (header.queue, body.queue) == ("other", "other")
    rows = three_ways.cluster.rows("SELECT no, countdown FROM byrd.steps WHERE run_id = %s ORDER BY no", run.id)
    assert rows == [(header.no, 0.2), (1, None), (body.no, None)]


def test_retry_options_are_no_part_of_the_plan(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: t.call.s(1).set(retry=True, retry_policy={"max_retries": 3}), [None, 1])


def test_ignore_result(three_ways: ThreeWays) -> None:
    tasks = three_ways.byrd.tasks
    assert three_ways.engine.submit(tasks.call.s(1).set(ignore_result=True)).get(timeout=30) is None
    # What follows gets the value all the same, as in Celery.
    three_ways.give(lambda t: t.call.s(1).set(ignore_result=True) | t.call.s(2), [None, [None, 1], 2])


class _Stamps(StampingVisitor):
    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"tenant": "acme"}


def test_stamps(three_ways: ThreeWays) -> None:
    def made(t: T) -> Any:
        canvas = t.info.s(1) | group(t.info.s(2), t.info.s(3))
        canvas.stamp(_Stamps())
        return canvas

    ours = three_ways.engine.submit(made(three_ways.byrd.tasks)).get(timeout=30)
    theirs = made(three_ways.plain.tasks).apply_async().get(timeout=30)
    assert [member["stamps"] for member in ours] == [member["stamps"] for member in theirs]
    assert ours[0]["stamps"] == {"tenant": "acme"}


def test_task_id(three_ways: ThreeWays) -> None:
    run = three_ways.engine.submit(three_ways.byrd.tasks.call.s(1).set(task_id="my-own-id"))
    assert run.get(timeout=30) == [None, 1]
    assert three_ways.byrd.app.AsyncResult("my-own-id").get(timeout=30) == [None, 1]
    with pytest.raises(errors.DuplicateStepError):
        three_ways.engine.submit(three_ways.byrd.tasks.call.s(1).set(task_id="my-own-id"))


# -- at run time -----------------------------------------------------------------------------------


def _task(*args: Any) -> dict[str, Any]:
    return {"kind": "task", "args": list(args)}


_NOTHING = {"kind": "group", "members": []}
_GROUP = {"kind": "group", "members": [_task(1), _task(2)]}
_CHORD = {"kind": "chord", "header": [_task(1), _task(2)], "body": _task("b")}
_REPLACED = [
    pytest.param(_task(1), [None, 1], id="task"),
    pytest.param({"kind": "chain", "parts": [_task(1), _task(2)], "how": "|"}, [None, [None, 1], 2], id="chain"),
    pytest.param(_GROUP, [[None, 1], [None, 2]], id="group"),
    pytest.param(_CHORD, [None, [[None, 1], [None, 2]], "b"], id="chord"),
    pytest.param(
        {"kind": "chain", "parts": [_task(1), _NOTHING], "how": "raw"}, [], id="chain that ends in an empty group"
    ),
    pytest.param({"kind": "swap", "to": _GROUP}, [[None, 1], [None, 2]], id="replaced again"),
]


@pytest.mark.parametrize(("to", "value"), _REPLACED)
def test_replace(three_ways: ThreeWays, to: Any, value: Any) -> None:
    three_ways.give(lambda t: chain(t.call.s(0), t.swap.si(to=to), t.call.s("after")), [None, value, "after"])


def test_replace_in_a_chord(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: chord([t.swap.s(to=_CHORD), t.call.s(3)], t.swap.si(to=_GROUP) | t.call.s("after")),
        [None, [[None, 1], [None, 2]], "after"],
    )


def test_replace_keeps_callbacks(three_ways: ThreeWays, request: pytest.FixtureRequest) -> None:
    def made(t: T) -> Any:
        canvas = t.swap.s(to=_CHORD)
        canvas.link(t.log.s(label="a", key=request.node.name))
        return canvas

    run = three_ways.give(made, [None, [[None, 1], [None, 2]], "b"])
    assert three_ways.notes(run, request.node.name) == [["a", [None, [[None, 1], [None, 2]], "b"]]]


def test_failing_replace(three_ways: ThreeWays) -> None:
    failing = {"kind": "chain", "parts": [_task(1), {"kind": "fail", "label": 7}], "how": "|"}
    three_ways.fail(lambda t: t.swap.s(to=failing) | t.call.s("after"), "ValueError(7,)")


def test_add_to_chord(three_ways: ThreeWays) -> None:
    three_ways.give(
        lambda t: chord([t.grow.s(1, add=_task("new")), t.call.s(2)], t.ordered.s()),
        [None, [[None, "new"], [None, 1], [None, 2]]],
        eagerly="ValueError",
    )


def test_retry(three_ways: ThreeWays) -> None:
    run = three_ways.give(lambda t: t.retry.s("a", failures=2) | t.call.s(1), [None, [None, 2, "a"], 1])
    assert [entry["event"] for entry in run.history()].count("retried") == 2


def test_retry_with_new_arguments(three_ways: ThreeWays) -> None:
    three_ways.give(lambda t: t.call.s(1) | t.again.s(2), ["new", [None, 1], 2])


def test_retries_used_up(three_ways: ThreeWays) -> None:
    run = three_ways.fail(lambda t: t.give_up.s(label=7) | t.call.s(1), "ValueError(7,)")
    run.wait(timeout=30)
    assert run.steps()[0].attempt == 3


def test_request_of_a_member(three_ways: ThreeWays) -> None:
    """What a task is told of its place."""
    tasks = three_ways.byrd.tasks
    first, second = three_ways.engine.submit(tasks.call.s(0) | group(tasks.info.s(1), tasks.info.s(2))).get(timeout=30)
    assert (first["in_group"], first["group_index"], first["has_parent"]) == (True, 0, True)
    assert (second["in_group"], second["group_index"], second["has_parent"]) == (True, 1, True)


# -- what cannot be compiled -----------------------------------------------------------------------

_REFUSED = [
    pytest.param(lambda t: t.call, errors.CanvasError, "is a task", id="a task"),
    pytest.param(lambda t: 42, errors.CanvasError, "cannot compile int", id="something else"),
    pytest.param(lambda t: chain([]), errors.CanvasError, "empty chain", id="an empty chain"),
    pytest.param(lambda t: chord([t.call.s(1)]), errors.CanvasError, "without a body", id="a chord without a body"),
    pytest.param(lambda t: t.call.s(object()), errors.ArgumentError, "JSON", id="not JSON"),
    pytest.param(lambda t: t.call.s("a\0b"), errors.ArgumentError, "NUL", id="NUL"),
    pytest.param(lambda t: t.one.s(1, 2), errors.ArgumentError, "takes 1 positional", id="arguments"),
    pytest.param(lambda t: t.call.s(1).set(countdown="soon"), errors.ArgumentError, "countdown", id="countdown"),
    pytest.param(lambda t: t.call.app.signature("no.such.task"), errors.UnknownTaskError, "no.such.task", id="unknown"),
]


@pytest.mark.parametrize(("make", "error", "message"), _REFUSED)
def test_refused(three_ways: ThreeWays, make: Any, error: type[Exception], message: str) -> None:
    runs = three_ways.cluster.rows("SELECT count(*) FROM byrd.runs")
    with pytest.raises(error, match=message):
        three_ways.engine.submit(make(three_ways.byrd.tasks))
    assert three_ways.cluster.rows("SELECT count(*) FROM byrd.runs") == runs


def test_no_step_is_left_behind(three_ways: ThreeWays) -> None:
    """The last test of this module: whatever the others ran, nothing is open any more."""
    sql = "SELECT s.* FROM byrd.steps s WHERE s.status IN ('pending', 'ready', 'running')"
    wait_until(lambda: not three_ways.cluster.rows(sql), what="end of all steps")
