"""Steps that run in a slice, without messages of their own: to the task, and to whoever looks, all is as ever."""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group

from byrd.engine import Run
from tests.cluster import Cluster, Worker, wait_until
from tests.invariants import check_database

APP = "tests.apps.slices"


class Notes:
    """What the tasks have noted since the test began."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lines(self, name: str, **wanted: Any) -> list[dict[str, Any]]:
        path = self.folder / name
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [fact for fact in found if all(fact.get(k) == v for k, v in wanted.items())]

    def received(self, *runs: Run) -> set[str]:
        """Return the steps of these runs that a worker has got a message for."""
        return {line["id"] for line in self.lines("received")} & {step.id for run in runs for step in run.steps()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture
def notes(folder: Path) -> Notes:
    for path in folder.iterdir():
        path.unlink()
    return Notes(folder)


@pytest.fixture(scope="module")
def worker(module_cluster: Cluster, folder: Path) -> Worker:
    """One process, so that what is ready at once is run in one slice; and one whose steps have each a message."""
    module_cluster.worker(
        APP, concurrency=1, queues=["plain"], env={"NOTES": str(folder), "TEST_SLICE_SECONDS": "0"}, options=["-E"]
    )
    return module_cluster.worker(
        APP, concurrency=1, queues=["celery", "second"], env={"NOTES": str(folder)}, options=["-E"]
    )


@pytest.fixture
def app(module_cluster: Cluster, worker: Worker) -> Iterator[Any]:
    yield module_cluster.app(APP)
    check_database(module_cluster.database_url)


def ended(runs: list[Run]) -> list[str]:
    return [run.wait(timeout=60) for run in runs]


def all_on(queue: str, canvas: Any) -> Any:
    """Give each part of a canvas to a queue."""
    for part in getattr(canvas, "tasks", [canvas]):
        (all_on if hasattr(part, "tasks") else lambda q, s: s.set(queue=q))(queue, part)
    if hasattr(canvas, "body"):
        all_on(queue, canvas.body)
    return canvas


# ------------------------------------------------------------------------------------------------- messages


def test_far_fewer_messages_than_steps(app: Any, notes: Notes) -> None:
    runs = app.engine.submit_many(
        chain(app.tick.s(n), app.tick.s(), group(app.tick.s(), app.tick.s())) for n in range(200)
    )
    assert [run.get(timeout=60) for run in runs] == [[n, n] for n in range(200)]
    assert len(notes.lines("ran")) == 800
    assert len(notes.lines("received")) < 80
    assert Counter(line["id"] for line in notes.lines("ran")).most_common(1)[0][1] == 1


def test_without_slices_each_step_has_its_message(app: Any, notes: Notes) -> None:
    run = app.engine.submit(all_on("plain", chain(app.tick.s(1), app.tick.s(), group(app.tick.s(), app.tick.s()))))
    assert run.get(timeout=30) == [1, 1]
    assert notes.received(run) == {step.id for step in run.steps() if step.task}


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_other_pools(app: Any, module_cluster: Cluster, folder: Path, notes: Notes, pool: str) -> None:
    other = module_cluster.worker(APP, pool=pool, concurrency=2, queues=[pool], env={"NOTES": str(folder)})

    def canvas(n: int) -> Any:
        return all_on(pool, chain(app.tick.s(n), group(app.tick.s() for _ in range(3)), app.gather.s()))

    few = 4  # gevent's consumer takes two messages in two seconds
    runs = app.engine.submit_many(canvas(n) for n in range(few))
    assert [run.get(timeout=60) for run in runs] == [[n] * 3 for n in range(few)]
    assert len(notes.lines("ran")) == 5 * few
    if pool == "solo":
        assert len(notes.received(*runs)) < 5 * few
    else:  # nobody would see to a step whose thread breaks off
        assert len(notes.received(*runs)) == 5 * few
    assert other.stop() == 0


# ------------------------------------------------------------------------------------------------- requests


def neutral(seen: dict[str, Any], run: Run) -> dict[str, Any]:
    """Say the same of a request whichever run, process and queue it was."""
    text = json.dumps(seen, sort_keys=True)
    for step in run.steps():
        text = text.replace(step.id, f"<step {step.no}>")
    text = text.replace(run.id, "<run>")
    found: dict[str, Any] = json.loads(text)
    for name in ("group", "delivery_tag", "origin"):  # each has its own
        found[name] = found.get(name) is not None
    found["hostname"] = "worker" in found["hostname"]
    found["properties"] = {k: v for k, v in (found.get("properties") or {}).items() if k != "delivery_tag"}
    found["delivery_info"] = {**found["delivery_info"], "consumer_tag": None}
    return found


def test_the_request_is_as_if_the_step_had_its_own_message(app: Any, notes: Notes) -> None:
    def canvas() -> Any:
        return chain(
            app.see.s(1), app.look.si(2, k=3), group(app.see.si(), app.look.si(4)), app.look.si(), app.see.si()
        )

    plain, sliced = app.engine.submit(all_on("plain", canvas())), app.engine.submit(canvas())
    assert ended([plain, sliced]) == ["succeeded", "succeeded"]
    shared = [step for step in sliced.steps() if step.task and step.id not in notes.received(sliced)]
    assert len(shared) >= 4
    expected = {step.no: neutral(json.loads(step.result), plain) for step in plain.steps() if step.task}
    for step in shared:
        found = neutral(json.loads(step.result), sliced)
        wanted = json.loads(json.dumps(expected[step.no]).replace('"plain"', '"celery"'))
        wanted.pop("trace", None)  # what the step's own message had, and no other's may be there in its place
        wanted["headers"].pop("trace", None)
        assert found == wanted, step.no


def test_nothing_of_the_wake_ups_message_is_left_in_another_steps_request(app: Any, notes: Notes) -> None:
    """Neither what instrumentation adds to a message, nor its queue, nor its task."""
    run = app.engine.submit(chain(app.see.s(1), app.look.s().set(queue="second"), app.see.si()))
    assert ended([run]) == ["succeeded"]
    steps = run.steps()
    for step in steps:
        seen = json.loads(step.result)
        assert seen["headers"].get("trace", f"of {step.id}") == f"of {step.id}"
        assert seen.get("trace", f"of {step.id}") == f"of {step.id}"
        assert (seen["task"], seen["delivery_info"]["routing_key"]) == (step.task, step.queue)
        others = [other.id for other in steps if other is not step]
        assert not any(other in json.dumps({**seen, "parent_id": None, "args": None}) for other in others)
    assert len(notes.received(run)) < 3


@pytest.mark.parametrize("what", ["priority", "headers", "expires", "time_limit", "task's time limit", "rate limit"])
def test_a_step_whose_message_says_something_has_it(app: Any, notes: Notes, what: str) -> None:
    made = {
        "priority": lambda: app.see.si().set(priority=7),
        "headers": lambda: app.see.si().set(headers={"tenant": "acme"}),
        "expires": lambda: app.see.si().set(expires=600),
        "time_limit": lambda: app.see.si().set(time_limit=40),
        "task's time limit": app.timed.si,
        "rate limit": app.limited.si,
    }[what]()
    run = app.engine.submit(chain(app.tick.s(1), made, app.look.si()))
    assert ended([run]) == ["succeeded"]
    tick, step, last = run.steps()
    assert step.id in notes.received(run)
    seen, after = json.loads(step.result), json.loads(last.result)
    match what:
        case "priority":
            assert (seen["delivery_info"]["priority"], after["delivery_info"]["priority"]) == (7, 0)
        case "headers":
            assert seen["headers"]["tenant"] == "acme"
            assert "tenant" not in after["headers"]
            assert "tenant" not in after
        case "time_limit":
            assert seen["timelimit"][0] == 40
        case "task's time limit":
            assert seen["timelimit"] == [30, 20]
    assert after["timelimit"] in ([None, None], None)
    assert tick.id in notes.received(run)


# ------------------------------------------------------------------------------------------------- signals, hooks


def calls(notes: Notes, run: Run) -> dict[int, list[Any]]:
    numbers = {step.id: step.no for step in run.steps()}
    found: dict[int, list[Any]] = defaultdict(list)
    for line in notes.lines("calls"):
        if line["id"] in numbers:
            found[numbers[line["id"]]].append({k: v for k, v in line.items() if k not in ("pid", "at", "id")})
    return found


def test_signals_and_hooks_of_each_step_in_order(app: Any, notes: Notes) -> None:
    def canvas() -> Any:
        return chain(app.tick.s(1), app.again.s(), group(app.tick.s(2), app.tick.s(3)), app.gather.s(), app.fail.s())

    def last_is_over(run: Run) -> bool:
        return any(c["what"] == "postrun" for c in calls(notes, run)[run.steps()[-1].no])

    plain, sliced = app.engine.submit(all_on("plain", canvas())), app.engine.submit(canvas())
    assert ended([plain, sliced]) == ["failed", "failed"]
    for run in (plain, sliced):
        wait_until(partial(last_is_over, run))
    assert len(notes.received(sliced)) < 4
    assert calls(notes, sliced) == calls(notes, plain)
    running: dict[int, str] = {}
    for line in notes.lines("calls"):
        if line["what"] == "prerun":
            running[line["pid"]] = line["id"]
        assert line["id"] == running[line["pid"]], "nothing comes between the calls for one step"


def test_monitors_hear_of_each_step(app: Any, notes: Notes, module_cluster: Cluster) -> None:
    heard: list[dict[str, Any]] = []
    stop = threading.Event()
    ready = threading.Event()

    def listen() -> None:
        with app.app.connection_for_read() as connection:
            receiver = app.app.events.Receiver(connection, handlers={"*": heard.append})
            with receiver.consumer_context() as (own, _, _):
                ready.set()
                while not stop.is_set():
                    try:
                        own.drain_events(timeout=0.2)
                    except TimeoutError:
                        continue

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        assert ready.wait(10)
        runs = [
            app.engine.submit(chain(app.tick.s(1), app.tick.s(), group(app.tick.s(n) for n in range(3)))),
            app.engine.submit(chain(app.tick.s(1), app.again.s(), app.fail.s())),
        ]
        assert ended(runs) == ["succeeded", "failed"]
        ids = {step.id: step for run in runs for step in run.steps() if step.task}

        def kinds() -> dict[str, list[str]]:
            found: dict[str, list[str]] = {step_id: [] for step_id in ids}
            for event in heard[:]:
                if event.get("uuid") in found:
                    found[event["uuid"]].append(event["type"])
            return found

        last = {"tick": "task-succeeded", "again": "task-succeeded", "fail": "task-failed"}
        wait_until(lambda: all(last[ids[i].task.rpartition(".")[2]] in found for i, found in kinds().items()))
    finally:
        stop.set()
        thread.join()
    assert len(notes.received(*runs)) < len(ids), "each had its message; nothing was to be seen"
    for step_id, found in kinds().items():
        name = ids[step_id].task.rpartition(".")[2]
        sent = [kind for kind in found if kind != "task-sent"]
        first = [kind for kind in sent if kind != "task-retried"]
        # A message may come after its step was run: then it is received, and started, and that is all.
        assert first[:3] == ["task-received", "task-started", last[name]] or name == "again"
        assert Counter(sent)[last[name]] == 1
        assert ("task-retried" in sent) == (name == "again")
    state = app.app.events.State()
    for event in heard:
        state.event(event)
    for step_id, step in ids.items():
        shown = {"succeeded": "SUCCESS", "failed": "FAILURE"}[step.status]
        assert (state.tasks[step_id].name, state.tasks[step_id].state) == (step.task, shown)


# ------------------------------------------------------------------------------------------------- other outcomes

OTHERS = {
    "again": "succeeded", "grow": "succeeded", "fail": "failed", "ignore": "failed", "reject": "failed",
    "large": "failed", "unjsonable": "failed", "leave": "failed",
}  # fmt: skip


def test_whatever_becomes_of_one_step_the_others_of_its_batch_are_right(app: Any, notes: Notes) -> None:
    warm = app.engine.submit_many(app.tick.s(n) for n in range(200))
    assert set(ended(warm)) == {"succeeded"}
    canvases, wanted = [], []
    for name, status in OTHERS.items():
        canvases += [app.tick.s(1) | app.tick.s(), getattr(app, name).s(7), app.tick.s(2)]
        wanted += ["succeeded", status, "succeeded"]
    runs = app.engine.submit_many(canvases)
    assert ended(runs) == wanted
    for run, status in zip(runs, wanted, strict=True):
        steps = run.steps()
        if steps[0].task.endswith(("again", "grow")):
            assert run.get(timeout=5) == 7
        elif status == "succeeded":
            assert all(step.preemptions == step.retries == 0 for step in steps)
    errors = {run.steps()[0].task.rpartition(".")[2]: run.get(timeout=5, propagate=False) for run in runs}
    assert "20,000" in str(errors["large"])
    assert type(errors["unjsonable"]).__name__ == "EncodeError"
    assert type(errors["fail"]).__name__ == "ValueError"
    ran = Counter(line["id"] for line in notes.lines("ran"))
    assert all(ran[run.steps()[0].id] == 1 + run.steps()[0].task.endswith("again") for run in runs)


@pytest.mark.parametrize("name", ["large", "unjsonable", "fail"])
def test_a_result_that_cannot_be_recorded_fails_its_chord_and_nothing_else(app: Any, name: str) -> None:
    bad = app.engine.submit(chord([app.tick.s(1), getattr(app, name).s(), app.tick.s(2)], app.gather.s()))
    good = app.engine.submit(chord([app.tick.s(n) for n in range(5)], app.gather.s()))
    assert ended([bad, good]) == ["failed", "succeeded"]
    statuses = {step.no: step.status for step in bad.steps() if step.task}
    assert sorted(statuses.values()) == ["failed", "failed", "succeeded", "succeeded"]
