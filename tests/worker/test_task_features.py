"""What Celery's users expect of a task holds in a step, on each of Celery's pools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import Ignore, Reject
from celery.result import AsyncResult

from tests.cluster import Cluster, wait_until

APP = "tests.apps.features"
#: Each test module imports the app anew, and a shared task belongs to every app that is alive.
pytestmark = pytest.mark.filterwarnings("ignore:Task name 'features.shared' is already registered")
POOLS = ["prefork", "threads", "gevent", "solo"]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module", params=POOLS)
def pool(request: pytest.FixtureRequest, module_cluster: Cluster, notes: Path) -> Iterator[str]:
    name: str = request.param
    worker = module_cluster.worker(APP, pool=name, env={"NOTES": str(notes)}, concurrency=2)
    yield name
    worker.stop()


@pytest.fixture
def app(module_cluster: Cluster) -> Any:
    return module_cluster.app(APP)


def lines(notes: Path, name: str, **wanted: Any) -> list[dict[str, Any]]:
    path = notes / name
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [fact for fact in found if all(fact.get(k) == v for k, v in wanted.items())]


def test_tasks_however_they_are_registered(pool: str, app: Any) -> None:
    canvas = chain(app.before_byrd.s(1), app.after_byrd.s(), app.app.tasks["features.shared"].s())
    assert app.engine.submit(canvas).get(timeout=30) == 112


def test_a_base_class_of_ones_own_with_its_hooks(pool: str, app: Any, notes: Path) -> None:
    run = app.engine.submit(app.counted.s(5, failures=1))
    assert run.get(timeout=30) == 15
    [step] = run.steps()
    wait_until(lambda: len(lines(notes, "hooks", id=step.id)) >= 5)
    hooks = lines(notes, "hooks", id=step.id)
    assert [h["hook"] for h in hooks] == ["before_start", "on_retry", "before_start", "on_success", "after_return"]
    assert hooks[0]["args"] == [5]
    assert step.retries == 1


def test_failure_hooks_and_signals(pool: str, app: Any, notes: Path) -> None:
    run = app.engine.submit(app.counted.s(5, failures=9))
    with pytest.raises(ValueError, match="again"):
        run.get(timeout=30)
    [step] = run.steps()
    wait_until(lambda: any(h["hook"] == "after_return" for h in lines(notes, "hooks", id=step.id)))
    hooks = lines(notes, "hooks", id=step.id)
    assert [h["hook"] for h in hooks][-2:] == ["on_failure", "after_return"]
    assert [s["state"] for s in lines(notes, "signals", id=step.id, signal="postrun")] == ["RETRY", "FAILURE"]
    assert lines(notes, "signals", signal="failure", task=app.counted.name)
    assert lines(notes, "signals", signal="retry", task=app.counted.name)


def test_the_request(pool: str, app: Any, notes: Path) -> None:
    first = app.request.s(1, k=2).set(headers={"trace": "abc"})
    first.stamp(tenant="acme")
    run = app.engine.submit(chain(first, app.request.s(3)))
    second = run.get(timeout=30)
    one, two = run.steps()
    seen = AsyncResult(one.id, app=app.app).get(timeout=5)
    assert seen["id"] == one.id
    assert seen["root_id"] == run.id
    assert seen["parent_id"] is None
    assert seen["args"] == [1]
    assert seen["kwargs"] == {"k": 2}
    assert seen["headers"]["trace"] == "abc"
    assert "byrd" not in seen["headers"]
    assert seen["stamps"]["tenant"] in ("acme", ["acme"])
    assert seen["called_directly"] is False
    assert seen["is_eager"] is False
    assert seen["queue"] == "celery"
    assert second["parent_id"] == one.id
    assert second["id"] == two.id
    assert second["root_id"] == run.id
    assert second["args"] == [seen, 3]
    prerun = lines(notes, "signals", signal="prerun", id=one.id)
    assert [p["args"] for p in prerun] == [[1]]


def test_the_request_in_a_group(pool: str, app: Any) -> None:
    members = app.engine.submit(group(app.request.s(i) for i in range(3))).get(timeout=30)
    assert [m["group_index"] for m in members] == [0, 1, 2]
    assert len({m["group"] for m in members}) == 1


def test_autoretry(pool: str, app: Any) -> None:
    run = app.engine.submit(app.autoretried.s(3))
    assert run.get(timeout=30) == 3
    [step] = run.steps()
    assert (step.retries, step.attempt) == (3, 4)
    assert [h["event"] for h in run.history()].count("retried") == 3


def test_autoretry_gives_up(pool: str, app: Any) -> None:
    with pytest.raises(KeyError):
        app.engine.submit(app.autoretried.s(99)).get(timeout=30)


def test_retry_with_other_arguments(pool: str, app: Any) -> None:
    assert app.engine.submit(chain(app.before_byrd.s(1), app.retried_with.s())).get(timeout=30) == [3, 7, 1]


def test_max_retries(pool: str, app: Any) -> None:
    run = app.engine.submit(app.exhausted.s())
    with pytest.raises(LookupError, match="never there"):
        run.get(timeout=30)
    assert run.steps()[0].attempt == 2


def test_throws(pool: str, app: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        app.engine.submit(app.expected.s()).get(timeout=30)


def test_ignore_result_is_passed_on_but_not_returned(pool: str, app: Any) -> None:
    assert app.engine.submit(chain(app.ignoring.s(4), app.before_byrd.s())).get(timeout=30) == 9
    assert app.engine.submit(app.ignoring.s(4)).get(timeout=30) is None


def test_ignore(pool: str, app: Any) -> None:
    run = app.engine.submit(chain(app.ignored.si(), app.before_byrd.s()))
    with pytest.raises(Ignore):
        run.get(timeout=30)
    assert [s.status for s in run.steps()] == ["cancelled", "skipped"]


def test_reject_without_requeue_fails(pool: str, app: Any, tmp_path: Path) -> None:
    with pytest.raises(Reject):
        app.engine.submit(app.rejected.s(False, str(tmp_path / "marker"))).get(timeout=30)


def test_reject_with_requeue_runs_again(pool: str, app: Any, tmp_path: Path) -> None:
    assert app.engine.submit(app.rejected.s(True, str(tmp_path / "marker"))).get(timeout=30) == "second time"


def test_pydantic(pool: str, app: Any) -> None:
    assert app.engine.submit(app.order.s({"sku": "a", "amount": 2})).get(timeout=30) == {"sku": "A", "amount": 3}


def test_a_result_that_json_cannot_hold(pool: str, app: Any) -> None:
    with pytest.raises(Exception, match="JSON"):
        app.engine.submit(app.unjsonable.s()).get(timeout=30)


def test_update_state(pool: str, app: Any, tmp_path: Path) -> None:
    run = app.engine.submit(app.progressing.s(str(tmp_path / "go")))
    result = AsyncResult(run.steps()[0].id, app=app.app)
    wait_until(lambda: result.state == "PROGRESS")
    assert result.info == {"done": 3}
    (tmp_path / "go").touch()
    assert result.get(timeout=30) == "done"
    assert result.state == "SUCCESS"


def test_other_tasks_are_celerys_own(pool: str, app: Any, module_cluster: Cluster) -> None:
    result = app.before_byrd.delay(1)
    assert result.get(timeout=30) == 2
    assert module_cluster.rows("SELECT status FROM celery_taskmeta WHERE task_id = %s", result.id) == [("SUCCESS",)]
    assert module_cluster.rows("SELECT 1 FROM byrd.steps WHERE id = %s", result.id) == []


def test_delays_wait_in_postgres(pool: str, app: Any, module_cluster: Cluster) -> None:
    run = app.engine.submit(app.before_byrd.s(1).set(countdown=1.5))
    assert run.steps()[0].status == "ready"
    with module_cluster.redis() as client:
        assert client.llen("celery") == 0
    assert run.get(timeout=30) == 2
    [step] = run.steps()
    assert (step.started_at - run.info.created_at).total_seconds() >= 1.5


def test_expires(pool: str, app: Any) -> None:
    run = app.engine.submit(app.before_byrd.s(1).set(countdown=1, expires=0.2))
    assert run.wait(timeout=30) == "failed"
    assert run.steps()[0].status == "cancelled"


def test_chord_with_failing_header(pool: str, app: Any) -> None:
    run = app.engine.submit(chord([app.expected.s(), app.before_byrd.s(1)], app.gather.s()))
    assert run.wait(timeout=30) == "failed"
    first, second, join, body = run.steps()
    assert [s.status for s in (first, second, join, body)] == ["failed", "succeeded", "failed", "failed"]
    assert "ChordError" in str(body.error)
    assert body.finished_at >= second.finished_at
    assert any("fail" in sentence for sentence in run.why())


def test_a_retry_that_was_asked_for_survives_ignore(pool: str, app: Any) -> None:
    assert app.engine.submit(app.retried_then_ignored.s()).get(timeout=30) == "retried"


def test_replace(pool: str, app: Any) -> None:
    assert app.engine.submit(chain(app.replacing.s(1), app.after_byrd.s())).get(timeout=30) == 12
    assert app.replacing.apply((1,)).get() == 2  # eager, as before


def test_a_task_that_leaves_the_process_ends(pool: str, app: Any) -> None:
    run = app.engine.submit(app.leaving.s())
    assert run.wait(timeout=60) == "failed"
    assert app.engine.submit(app.before_byrd.s(1)).get(timeout=30) == 2


def test_a_message_of_another_task_does_not_run_the_step(pool: str, app: Any, notes: Path) -> None:
    run = app.engine.submit(app.before_byrd.s(1).set(countdown=1.5))
    [step] = run.steps()
    header = {"v": 1, "run": run.id, "step": step.id, "no": 0, "attempt": 0}
    app.other.apply_async(headers={"byrd": header}, countdown=1.6)
    assert run.get(timeout=30) == 2
    assert lines(notes, "other") == []
