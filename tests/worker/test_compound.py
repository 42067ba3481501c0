"""``self.compound()``: all of its operations are done, or all are undone, whatever dies meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from byrd.errors import CheckpointError, CompoundError, RetryLater
from tests.cluster import Cluster, wait_until

APP = "tests.apps.compound"


@pytest.fixture
def app(cluster: Cluster) -> Any:
    return cluster.app(APP)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_all_is_done(cluster: Cluster, app: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    path = tmp_path / "notes"
    assert app.engine.submit(app.three.s(str(path))).get(timeout=30) == ["A", "B", "C"]
    assert lines(path) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("fails", "wanted"), [("a", []), ("c", ["a", "b"]), ("end", ["a", "b", "c"])], ids=["first", "last", "after all"]
)
def test_or_all_is_undone(cluster: Cluster, app: Any, tmp_path: Path, fails: str, wanted: list[str]) -> None:
    cluster.worker(APP)
    path = tmp_path / "notes"
    with pytest.raises(ValueError, match=r"a is not|c is not|after all"):
        app.engine.submit(app.three.s(str(path), fails=fails)).get(timeout=30)
    assert lines(path) == [*wanted, *(f"undo {what.upper()}" for what in reversed(wanted))]


@pytest.mark.parametrize("dies", ["a", "b", "undo b", "undo a"])
def test_a_worker_dies_in_the_middle(cluster: Cluster, app: Any, tmp_path: Path, dies: str) -> None:
    """What it died in, between effect and record, is done once more; nothing else is."""
    first = cluster.worker(APP, concurrency=1)
    path = tmp_path / "notes"
    run = app.engine.submit(app.three.s(str(path), fails="c" if "undo" in dies else "", dies=dies))
    wait_until(lambda: first.exit_status is not None, what="end of the worker")
    cluster.worker(APP, concurrency=1)
    if "undo" in dies:
        with pytest.raises(ValueError, match="c is not to be had"):
            run.get(timeout=60)
        wanted = ["a", "b", "undo B", "undo A"]
    else:
        assert run.get(timeout=60) == ["A", "B", "C"]
        wanted = ["a", "b", "c"]
    again = f"undo {dies[-1].upper()}" if "undo" in dies else dies
    wanted.insert(wanted.index(again), again)
    assert lines(path) == wanted


def test_an_undo_that_fails_is_tried_again(cluster: Cluster, app: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    path = tmp_path / "notes"
    run = app.engine.submit(app.three.s(str(path), fails="c", stuck=2))
    with pytest.raises(ValueError, match="c is not to be had"):
        run.get(timeout=60)
    assert lines(path) == ["a", "b", "undo B", "undo A"]
    assert "in act" in str(run.info.error), "it should say where it was raised, in the first attempt"
    assert [event["event"] for event in run.history() if event["event"] == "retried"] == ["retried"] * 2


def test_one_that_cannot_be_undone_is_named(cluster: Cluster, app: Any, tmp_path: Path) -> None:
    cluster.worker(APP, env={"TEST_COMPOUND_PATIENCE": "2"})
    path = tmp_path / "notes"
    with pytest.raises(CompoundError, match=r"'b' could not be undone in 2 tries.*still done are 'a', 'b'"):
        app.engine.submit(app.three.s(str(path), fails="c", stuck=99)).get(timeout=60)
    assert lines(path) == ["a", "b"]


def test_a_cancel_at_a_checkpoint_leaves_what_is_done(cluster: Cluster, app: Any, tmp_path: Path) -> None:
    """The block is left by what is no Exception; it goes on there when the run is tried again."""
    cluster.worker(APP)
    path = tmp_path / "notes"
    run = app.engine.submit(app.halting.s(str(path)))
    wait_until(lambda: lines(path))
    run.cancel()
    assert run.wait(timeout=30) == "cancelled"
    assert lines(path) == ["a"]
    Path(f"{path}.go").touch()
    run.retry()
    assert run.get(timeout=30) == ["A", "B"]
    assert lines(path) == ["a", "b"]


def test_two_of_one_name(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    with pytest.raises(CheckpointError, match="two operations called 'a'"):
        app.engine.submit(app.twice.s()).get(timeout=30)


# -- what is tried again ---------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["by_policy", "by_celery", "retriable"])
def test_a_block_that_was_undone_begins_anew(cluster: Cluster, app: Any, tmp_path: Path, task: str) -> None:
    cluster.worker(APP)
    path = tmp_path / "notes"
    run = app.engine.submit(getattr(app, task).s(str(path), failures=2))
    assert run.get(timeout=60) == ["A", "B"]
    assert lines(path) == ["a1", "undo A", "a2", "undo A", "a3", "b3"]
    assert run.steps()[0].attempt == 3


def test_and_so_it_does_by_a_retry_of_the_run(cluster: Cluster, app: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    path = tmp_path / "notes"
    run = app.engine.submit(app.by_hand.s(str(path), failures=2))
    for _ in range(2):
        with pytest.raises(ValueError, match="b is not to be had"):
            run.get(timeout=30)
        run.retry()
    assert run.get(timeout=30) == ["A", "B"]
    assert lines(path) == ["a1", "undo A", "a2", "undo A", "a3", "b3"]


@pytest.mark.parametrize(("dies", "saves"), [("undone", False), ("undone", True), ("b", False)])
def test_a_worker_dies_before_the_failure_is_recorded_or_in_the_new_round(
    cluster: Cluster, app: Any, tmp_path: Path, dies: str, saves: bool
) -> None:
    first = cluster.worker(APP, concurrency=1)
    path = tmp_path / "notes"
    run = app.engine.submit(app.by_policy.s(str(path), failures=1, dies=dies, saves=saves))
    wait_until(lambda: first.exit_status is not None, what="end of the worker")
    cluster.worker(APP, concurrency=1)
    assert run.get(timeout=60) == ["A", "B"]
    ended = [event["event"] for event in run.history() if event["event"] in ("preempted", "retried")]
    if dies == "undone":  # the error is raised again, and only then is it on record
        assert ended == ["preempted", "retried"]
        assert lines(path) == ["a1", "undo A", "a2", "b2"]
    else:
        assert ended == ["retried", "preempted"]
        assert lines(path) == ["a1", "undo A", "a2", "b2", "b2"]


def test_a_task_that_went_another_way_stays_there(cluster: Cluster, app: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    path = tmp_path / "notes"
    run = app.engine.submit(app.another_way.s(str(path)))
    assert run.get(timeout=30) == "another"
    assert run.steps()[0].attempt == 2
    assert lines(path) == ["one", "another"]


# -- what only postpones the attempt ---------------------------------------------------------------


@pytest.mark.parametrize(("task", "retries"), [("limited", 0), ("later", 2)])
def test_what_only_postpones_the_attempt_undoes_nothing(
    cluster: Cluster, app: Any, tmp_path: Path, task: str, retries: int
) -> None:
    cluster.worker(APP)
    path = tmp_path / "notes"
    run = app.engine.submit(getattr(app, task).s(str(path), "b", times=2))
    assert run.get(timeout=30) == ["A", "B"]
    assert lines(path) == ["a", "b"]
    [step] = run.steps()
    assert (step.attempt, step.retries) == (3, retries)


def test_the_last_attempt_to_be_told_later_undoes_the_block(cluster: Cluster, app: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    path = tmp_path / "notes"
    run = app.engine.submit(app.later.s(str(path), "b", times=99))
    with pytest.raises(RetryLater):
        run.get(timeout=30)
    assert run.steps()[0].attempt == 3
    assert lines(path) == ["a", "undo A"]


def test_a_pause_in_an_undo_is_no_failure_of_it(cluster: Cluster, app: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    path = tmp_path / "notes"
    run = app.engine.submit(app.limited.s(str(path), "undo", times=1))
    with pytest.raises(ValueError, match="b is not to be had"):
        run.get(timeout=30)
    assert lines(path) == ["a", "undo A"]
    [step] = run.steps()
    assert (step.attempt, step.retries) == (2, 0)
