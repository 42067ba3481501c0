"""Slices that are broken off, held up or stopped: what was recorded stays, what was not is run again, nobody waits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain, group

from byrd.engine import Run
from tests.cluster import Cluster, Worker, wait_until
from tests.invariants import check_database
from tests.notes import lines

APP = "tests.apps.slices"


@pytest.fixture
def app(cluster: Cluster) -> Iterator[Any]:
    yield cluster.app(APP)
    check_database(cluster.database_url)


def wait_ran(notes: Path, task_id: str) -> dict[str, Any]:
    """Wait until a task has run; return its line."""
    found: dict[str, Any] = wait_until(
        lambda: next((line for line in lines(notes, "ran") if line["id"] == task_id), None), timeout=30
    )
    return found


def start(cluster: Cluster, notes: Path, **options: Any) -> Worker:
    return cluster.worker(APP, env={"NOTES": str(notes)}, **options)


def warm_up(app: Any) -> None:
    """Let the processes learn that steps are short, so that they claim many at once."""
    for run in app.engine.submit_many(app.tick.s(n) for n in range(300)):
        assert run.wait(timeout=60) == "succeeded"


def check_history(cluster: Cluster, notes: Path, runs: list[Run], *, outcomes: set[str]) -> Counter[str]:
    """Each execution is an attempt, and each attempt but the last is on record with what ended it."""
    ran = Counter(line["id"] for line in lines(notes, "ran"))
    steps = [step for run in runs for step in run.steps() if step.task]
    ended = cluster.rows("SELECT step_id, attempt, outcome FROM byrd.attempts")
    for step in steps:
        mine = [(attempt, outcome) for step_id, attempt, outcome in ended if step_id == step.id]
        assert [attempt for attempt, _ in sorted(mine)] == list(range(1, step.attempt)), step
        assert {outcome for _, outcome in mine} <= outcomes | {"handed_back"}
        lost = sum(outcome == "preempted" for _, outcome in mine)
        assert step.preemptions == lost
        assert 1 <= ran[step.id] <= 1 + lost, "what was recorded is run no more"
    return Counter(outcome for _, _, outcome in ended)


def test_a_pool_process_killed_in_the_middle_of_a_batch(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=1)
    warm_up(app)
    canvas = chain(app.tick.s(0), group([*(app.tick.s(n) for n in range(20)), app.die.si(str(notes / "died")),
                                         *(app.tick.s(n) for n in range(20))]), app.gather.s())  # fmt: skip
    run = app.engine.submit(canvas)
    assert run.get(timeout=60) == [*range(20), "survived", *range(20)]
    outcomes = check_history(cluster, notes, [run], outcomes={"preempted"})
    assert outcomes["preempted"] >= 1  # with those that it had claimed along: how many depends on how quick it was
    [died] = [step for step in run.steps() if step.task and step.task.endswith("die")]
    before = [step for step in run.steps() if step.preemptions == 0 and step.task]
    assert died.attempt >= 2
    assert before, "what it had recorded stays recorded"


def test_a_worker_killed_in_the_middle_of_a_batch(app: Any, cluster: Cluster, notes: Path) -> None:
    doomed = start(cluster, notes, concurrency=1)
    warm_up(app)
    members = [*(app.tick.s(n) for n in range(20)), app.die.si(str(notes / "died"), parent=True)]
    run = app.engine.submit(
        chain(app.tick.s(0), group([*members, *(app.tick.s(n) for n in range(20))]), app.gather.s())
    )
    wait_until(lambda: not doomed.running)
    doomed.kill()
    start(cluster, notes, concurrency=1)
    assert run.get(timeout=60) == [*range(20), "survived", *range(20)]
    outcomes = check_history(cluster, notes, [run], outcomes={"preempted"})
    assert outcomes["preempted"] >= 1


def test_a_long_step_holds_up_neither_results_nor_other_steps(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=2)
    warm_up(app)
    canvas = group([*(app.tick.s(n) for n in range(10)), app.nap.si(4.0, "long"), *(app.tick.s(n) for n in range(30))])
    run = app.engine.submit(chain(app.tick.s(0), canvas))

    def statuses() -> Counter[str]:
        return Counter(step.status for step in run.steps() if step.task)

    wait_until(lambda: any(line["task"].endswith("nap") for line in lines(notes, "ran")))
    [napping] = [line for line in lines(notes, "ran") if line["task"].endswith("nap")]
    wait_until(lambda: statuses() == {"succeeded": 41, "running": 1}, timeout=3, what=lambda: str(run.steps()))
    assert time.time() - napping["at"] < 3.5, "while it runs"
    ran = {line["id"]: line for line in lines(notes, "ran")}
    for step in run.steps():
        if step.task and step.status == "succeeded":
            assert step.finished_at.timestamp() - ran[step.id]["at"] < 1.0, "recorded soon after it ran"
    assert run.wait(timeout=30) == "succeeded"
    assert Counter(line["id"] for line in lines(notes, "ran")).most_common(1)[0][1] == 1
    check_history(cluster, notes, [run], outcomes=set())


def test_what_was_claimed_behind_a_long_step_is_given_to_others(app: Any, cluster: Cluster, notes: Path) -> None:
    """One process has claimed many when it comes to the long one; the other, which is idle, runs them."""
    start(cluster, notes, concurrency=1)
    warm_up(app)
    runs = app.engine.submit_many([app.tick.s(0), app.nap.s(3.0, "long"), *(app.tick.s(n) for n in range(15))])
    wait_until(lambda: any(line["task"].endswith("nap") for line in lines(notes, "ran")))
    start(cluster, notes, concurrency=1)
    assert [run.wait(timeout=30) for run in runs] == ["succeeded"] * 17
    check_history(cluster, notes, runs, outcomes=set())
    assert cluster.rows("SELECT count(*) FROM byrd.attempts WHERE outcome = 'preempted'") == [(0,)]


def test_plain_tasks_are_not_starved_by_long_chains(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=1)
    runs = app.engine.submit_many(chain(app.nap.si(0.005) for _ in range(200)) for _ in range(30))
    wait_until(lambda: len(lines(notes, "ran")) > 50)
    waits = []
    for n in range(4):
        sent = time.time()
        task_id = app.tick.delay("plain", n).id
        waits.append(wait_ran(notes, task_id)["at"] - sent)
    assert any(run.status == "running" for run in runs), "there was no load"
    # Sixteen wake-ups of a fifth of a second may be before it.
    assert max(waits) < 8.0, waits
    for run in runs:
        if run.status == "running":
            run.cancel()
    assert all(run.wait(timeout=30) in ("cancelled", "succeeded") for run in runs)


def test_max_tasks_per_child(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=1, options=["--max-tasks-per-child", "3"])
    runs = app.engine.submit_many(app.tick.s(n) | app.tick.s() for n in range(6))
    assert [run.wait(timeout=60) for run in runs] == ["succeeded"] * 6
    assert max(Counter(line["pid"] for line in lines(notes, "ran")).values()) <= 3


def test_a_terminating_revoke_of_a_step_without_a_message(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=1)
    warm_up(app)
    run = app.engine.submit(chain(app.tick.s(60), app.nap.s(), app.tick.s()))
    nap = run.steps()[1]
    [running] = wait_until(lambda: [line for line in lines(notes, "ran") if line["id"] == nap.id])
    assert nap.id not in {line["id"] for line in lines(notes, "received")}
    other = app.engine.submit(app.tick.s("other"))
    app.app.control.revoke(nap.id, terminate=True)
    assert run.wait(timeout=30) == "failed"
    assert [step.status for step in run.steps()] == ["succeeded", "cancelled", "skipped"]
    assert other.get(timeout=30) == "other"
    later = app.engine.submit(app.tick.s("later"))
    assert later.get(timeout=30) == "later"
    assert running["pid"] not in {line["pid"] for line in lines(notes, "ran")[-1:]}


def test_a_warm_shutdown_in_the_middle_of_long_chains(app: Any, cluster: Cluster, notes: Path) -> None:
    first = start(cluster, notes, concurrency=2)
    runs = app.engine.submit_many(
        chain(app.nap.s(0.005, n), *(app.nap.si(0.005, n) for _ in range(99))) for n in range(10)
    )
    wait_until(lambda: len(lines(notes, "ran")) > 150)
    assert first.stop() == 0
    done = len(lines(notes, "ran"))
    assert done < 1000
    assert cluster.rows("SELECT count(*) FROM byrd.steps WHERE status = 'running'") == [(0,)]
    start(cluster, notes, concurrency=2)
    assert [run.get(timeout=60) for run in runs] == list(range(10))
    ran = Counter(line["id"] for line in lines(notes, "ran"))
    assert (len(ran), set(ran.values())) == (1000, {1}), "nothing is repeated"
    assert cluster.rows("SELECT count(*) FROM byrd.attempts WHERE outcome = 'preempted'") == [(0,)]


def test_a_revoked_step_that_waits_is_not_run_in_a_slice(app: Any, cluster: Cluster, notes: Path) -> None:
    start(cluster, notes, concurrency=1)
    warm_up(app)
    run = app.engine.submit(chain(app.nap.s(1.0, 1), app.tick.s(), app.tick.s()))
    second = run.steps()[1]
    app.app.control.revoke(second.id)
    assert run.wait(timeout=30) == "failed"
    assert [step.status for step in run.steps()] == ["succeeded", "cancelled", "skipped"]
    assert second.id not in {line["id"] for line in lines(notes, "ran")}
