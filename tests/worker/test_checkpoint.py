"""CheckpointTask: progress that survives its worker, exactly once where it matters."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from byrd.errors import CheckpointError
from byrd.store import progress
from tests.cluster import Cluster, Worker, wait_until

APP = "tests.apps.progress"


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def shared(module_cluster: Cluster, notes: Path) -> Any:
    module_cluster.rows("CREATE TABLE squares (name text, n int, square int)")
    module_cluster.worker(APP, env={"NOTES": str(notes)})
    return module_cluster.app(APP)


def noted(notes: Path, name: str) -> list[Any]:
    path = notes / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def squares(cluster: Cluster, name: str) -> list[int]:
    return [n for (n,) in cluster.rows("SELECT n FROM squares WHERE name = %s ORDER BY n", name)]


def test_iterate(shared: Any, module_cluster: Cluster, notes: Path) -> None:
    run = shared.engine.submit(shared.count_up.s("plain", 95))
    assert run.get(timeout=30) == {"cursor": 94, "completed": 95, "failed": 0, "done": True}
    assert noted(notes, "plain") == list(range(95))
    assert squares(module_cluster, "plain") == list(range(95))


def test_nothing_to_do(shared: Any) -> None:
    done = shared.engine.submit(shared.count_up.s("none", 0)).get(timeout=30)
    assert done == {"cursor": None, "completed": 0, "failed": 0, "done": True}


def test_failed_items_block_and_skip_nobody(shared: Any, notes: Path) -> None:
    done = shared.engine.submit(shared.picky.s("picky", 12, [0, 5, 11])).get(timeout=30)
    assert (done["completed"], done["failed"]) == (9, 3)
    assert sorted(item for item, _ in done["quarantined"]) == [0, 5, 11]
    assert all(error == f"ValueError: item {item} is bad" for item, error in done["quarantined"])
    assert Counter(noted(notes, "picky")) == {n: 3 if n in (0, 5, 11) else 1 for n in range(12)}


def test_failed_items_are_tried_again(shared: Any, notes: Path) -> None:
    done = shared.engine.submit(shared.picky.s("healing", 8, [2, 7], heal_after=2)).get(timeout=30)
    assert done == {"completed": 8, "failed": 0, "quarantined": []}


def test_parallelism_and_interval(shared: Any) -> None:
    run = shared.engine.submit(shared.parallel.s(12, 3))
    found = run.get(timeout=30)
    assert found["most"] == 3
    assert found["shortest"] >= 0.25
    assert found["ids"] == [run.steps()[0].id]  # self.request is there in each thread


def test_a_batch_that_hangs(shared: Any) -> None:
    found = shared.engine.submit(shared.hanging.s()).get(timeout=30)
    assert (found["completed"], found["failed"]) == (5, 1)
    assert "time-out of 0.3 s" in found["error"]


def test_memoised_steps(shared: Any, notes: Path) -> None:
    run = shared.engine.submit(shared.memo.s("memo", 2))
    assert run.get(timeout=30) == [{"value": "one"}, {"value": "two"}]
    assert noted(notes, "memo") == ["one", "two"]


def test_a_transaction_of_ones_own(shared: Any, module_cluster: Cluster) -> None:
    run = shared.engine.submit(shared.by_hand.s("hand", 10, 6))
    assert run.get(timeout=30) == {"started_at": 6, "completed": 10}
    assert squares(module_cluster, "hand") == list(range(10))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"parallelism": 0}, {"timeout": 0}, {"item_retries": -1}])
def test_bad_settings_are_named(shared: Any, options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(options))):
        shared.engine.submit(shared.count_up.s("bad", 5, **options)).get(timeout=30)


def test_outside_of_a_run_it_says_so(shared: Any) -> None:
    with pytest.raises(CheckpointError, match="submit it with"):
        shared.count_up("x", 1)


def test_steps_and_checkpoints_in_an_open_transaction(shared: Any, module_cluster: Cluster, notes: Path) -> None:
    assert shared.engine.submit(shared.nested.s("nested")).get(timeout=30) == {"value": "inside"}
    assert squares(module_cluster, "nested") == [1]
    assert noted(notes, "nested") == ["inside", "saving"]


def test_a_time_limit_strikes_in_an_open_transaction(shared: Any, module_cluster: Cluster, notes: Path) -> None:
    run = shared.engine.submit(shared.holding.s("holding", 60).set(time_limit=1))
    with pytest.raises(TimeLimitExceeded):
        run.get(timeout=30)
    assert noted(notes, "holding") == ["open"]
    assert squares(module_cluster, "holding") == []
    assert shared.engine.submit(shared.plain.s(1)).get(timeout=30) == 2  # the worker goes on


def test_an_error_that_utf8_cannot_hold(shared: Any) -> None:
    assert shared.engine.submit(shared.surrogates.s()).get(timeout=30) == 1


# -- with workers that stop or die -----------------------------------------------------------------


@pytest.fixture
def fresh(cluster: Cluster, tmp_path: Path) -> Any:
    cluster.rows("CREATE TABLE squares (name text, n int, square int)")
    return cluster.app(APP)


def start(cluster: Cluster, notes: Path) -> Worker:
    return cluster.worker(APP, env={"NOTES": str(notes)}, concurrency=1)


def test_sigkill_repeats_one_batch_at_most_and_records_each_once(cluster: Cluster, fresh: Any, tmp_path: Path) -> None:
    first = start(cluster, tmp_path)
    run = fresh.engine.submit(fresh.count_up.s("killed", 200, 0.01))
    wait_until(lambda: len(noted(tmp_path, "killed")) > 45)
    first.kill()
    start(cluster, tmp_path)
    assert run.get(timeout=60)["completed"] == 200
    assert squares(cluster, "killed") == list(range(200))
    repeated = [n for n, times in Counter(noted(tmp_path, "killed")).items() if times > 1]
    assert len(repeated) <= 10
    [step] = run.steps()
    assert (step.attempt, step.preemptions) == (2, 1)


def test_sigterm_hands_back_at_the_next_checkpoint(cluster: Cluster, fresh: Any, tmp_path: Path) -> None:
    first = start(cluster, tmp_path)
    run = fresh.engine.submit(fresh.count_up.s("term", 300, 0.01))
    wait_until(lambda: len(noted(tmp_path, "term")) > 25)
    first.stop()
    seen = len(noted(tmp_path, "term"))
    assert seen < 200
    [step] = run.steps()
    assert (step.status, step.preemptions) == ("ready", 0)
    assert [h["event"] for h in run.history() if h["attempt"] == 1] == ["handed_back"]
    start(cluster, tmp_path)
    assert run.get(timeout=60)["completed"] == 300
    assert Counter(noted(tmp_path, "term")) == dict.fromkeys(range(300), 1)  # nothing repeated


def test_pause_and_resume(cluster: Cluster, fresh: Any, tmp_path: Path) -> None:
    start(cluster, tmp_path)
    run = fresh.engine.submit(fresh.count_up.s("paused", 300, 0.01))
    wait_until(lambda: len(noted(tmp_path, "paused")) > 25)
    run.pause()
    wait_until(lambda: run.steps()[0].status == "ready")
    stopped_at = len(noted(tmp_path, "paused"))
    counts = fresh.engine.runtime.store.run(progress.load, run.steps()[0].id, "items")
    assert counts.completed == stopped_at
    run.resume()
    assert run.get(timeout=60)["completed"] == 300
    assert Counter(noted(tmp_path, "paused")) == dict.fromkeys(range(300), 1)


def test_cancel_stops_at_the_next_checkpoint(cluster: Cluster, fresh: Any, tmp_path: Path) -> None:
    start(cluster, tmp_path)
    run = fresh.engine.submit(fresh.count_up.s("cancelled", 1000, 0.01) | fresh.plain.si(1))
    wait_until(lambda: len(noted(tmp_path, "cancelled")) > 15)
    run.cancel()
    assert run.wait(timeout=20) == "cancelled"
    assert [s.status for s in run.steps()] == ["cancelled", "cancelled"]
    assert len(noted(tmp_path, "cancelled")) < 500
    with pytest.raises(TaskRevokedError):
        run.get(timeout=1)


def test_retry_of_a_cancelled_run_resumes_from_its_checkpoint(cluster: Cluster, fresh: Any, tmp_path: Path) -> None:
    start(cluster, tmp_path)
    run = fresh.engine.submit(fresh.count_up.s("again", 100, 0.01) | fresh.plain.si(1))
    wait_until(lambda: len(noted(tmp_path, "again")) > 25)
    run.cancel()
    assert run.wait(timeout=20) == "cancelled"
    run.retry()
    assert run.get(timeout=30) == 2
    assert Counter(noted(tmp_path, "again")) == dict.fromkeys(range(100), 1)
