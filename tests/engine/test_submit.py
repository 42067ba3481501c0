"""Submitting: all or nothing, once per key, in the caller's transaction; bad input is named and changes nothing."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import TimeoutError as CeleryTimeoutError
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session

import byrd
from byrd import errors
from byrd.store import normalise_url
from tests.cluster import Cluster, wait_until

APP = "tests.apps.basic"


@pytest.fixture
def app(cluster: Cluster) -> Any:
    return cluster.app(APP)


@pytest.fixture
def worker(cluster: Cluster) -> None:
    cluster.worker(APP)


def rows_written(cluster: Cluster) -> int:
    return int(cluster.rows("SELECT (SELECT count(*) FROM byrd.runs) + (SELECT count(*) FROM byrd.steps)")[0][0])


def messages(cluster: Cluster) -> int:
    with cluster.redis() as client:
        return int(client.llen("celery"))


def test_a_run_is_written_and_published(app: Any, cluster: Cluster) -> None:
    run = app.engine.submit(app.add.s(1, 2) | app.add.s(3))
    assert run.status == "running"
    assert [s.status for s in run.steps()] == ["ready", "pending"]
    assert messages(cluster) == 1


def test_arguments_are_not_in_the_message(app: Any, cluster: Cluster) -> None:
    app.engine.submit(app.echo.s("a secret"))
    with cluster.redis() as client:
        [message] = client.lrange("celery", 0, -1)
    assert b"a secret" not in message


def test_partial_arguments(app: Any, worker: None) -> None:
    assert app.engine.submit(chain(app.add.s(1), app.add.s(2)), 10).get(timeout=30) == 13
    assert app.engine.submit(app.add.s(1), y=4).get(timeout=30) == 5


def test_a_workflow_by_name(app: Any, worker: None) -> None:
    @app.engine.workflow("test.sum", timeout=60)
    def build(*numbers: int) -> Any:
        return group(app.echo.s(n) for n in numbers) | app.total.s()

    run = build.submit(1, 2, 3, key="first")
    assert run.workflow == "test.sum"
    assert run.get(timeout=30) == 6
    assert app.engine.submit("test.sum", 4).get(timeout=30) == 4
    assert app.engine.submit(build, 5).get(timeout=30) == 5
    assert [r.id for r in app.engine.list(workflow="test.sum")][-1] == run.id
    assert run.info.deadline is not None
    assert build.submit(9, 9, key="first").id == run.id
    assert app.app.tasks["byrd.submit"].run("test.sum", 1, key="first") == run.id


def test_a_key_makes_one_run_of_many_submits_at_once(app: Any, cluster: Cluster) -> None:
    ids: list[str] = []
    barrier = threading.Barrier(8)

    def submit() -> None:
        barrier.wait()
        ids.append(app.engine.submit(app.add.s(1, 1), key="only").id)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1
    assert cluster.rows("SELECT count(*) FROM byrd.runs") == [(1,)]


@pytest.fixture
def own_engine(cluster: Cluster) -> Iterator[Any]:
    engine = create_engine(normalise_url(cluster.database_url))
    yield engine
    engine.dispose()


def test_submit_joins_the_callers_transaction(app: Any, worker: None, cluster: Cluster, own_engine: Any) -> None:
    with own_engine.begin() as conn:
        conn.execute(text("CREATE TABLE orders (id int)"))
        run = app.engine.submit(app.add.s(1, 2), connection=conn)
        assert cluster.rows("SELECT 1 FROM byrd.runs") == []
        assert messages(cluster) == 0
    assert run.get(timeout=30) == 3


def test_a_rolled_back_transaction_leaves_nothing(app: Any, cluster: Cluster, own_engine: Any) -> None:
    with own_engine.connect() as conn:
        app.engine.submit(app.add.s(1, 2), connection=conn, key="k")
        conn.rollback()
    assert rows_written(cluster) == 0
    assert messages(cluster) == 0


def test_submit_joins_an_orm_session(app: Any, worker: None, own_engine: Any) -> None:
    with Session(own_engine) as session:
        run = app.engine.submit(app.add.s(1, 2), connection=session)
        with pytest.raises(errors.RunNotFoundError):
            app.engine.get(run.id)
        session.commit()
    assert app.engine.get(run.id).get(timeout=30) == 3


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("comings", [1, 3])
def test_a_run_that_had_the_key_and_went_away(
    app: Any, cluster: Cluster, own_engine: Any, joined: bool, comings: int
) -> None:
    """Another run has the key when ours is inserted, and is gone when ours looks who has it."""
    other: list[str] = []

    def come(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT byrd.write_run(") and len(other) < comings:
            other.append(str(uuid.uuid4()))
            cluster.rows("INSERT INTO byrd.runs (id, key, output) VALUES (%s, 'k', 0)", other[-1])

    def go(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT byrd.write_run("):
            cluster.rows("DELETE FROM byrd.runs WHERE id = ANY(%s::uuid[])", other)

    engine = own_engine if joined else app.engine.runtime.store.engine
    event.listen(engine, "before_cursor_execute", come)
    event.listen(engine, "after_cursor_execute", go)
    with own_engine.begin() as conn:
        if comings < 3:
            run = app.engine.submit(app.add.s(1, 2), key="k", connection=conn if joined else None)
            assert run.id not in other
        else:
            with pytest.raises(errors.SubmitError, match="came and went three times"):
                app.engine.submit(app.add.s(1, 2), key="k", connection=conn if joined else None)
    assert len(other) == comings
    assert rows_written(cluster) == (2 if comings < 3 else 0)


def test_a_command_whose_answer_is_lost_is_given_once(app: Any, cluster: Cluster) -> None:
    run = app.engine.submit(app.add.s(1, 2))
    engine = app.engine.runtime.store.engine
    lost: list[int] = []
    given = 0

    def lose_answer(conn: Any) -> None:
        """Commit, and cut the connection before SQLAlchemy hears of it."""
        if len(lost) == given:
            return
        raw = conn.connection.dbapi_connection
        raw.commit()
        with raw.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            lost.append(cursor.fetchone()[0])
        cluster.rows("SELECT pg_terminate_backend(%s, 5000)", lost[-1])

    event.listen(engine, "commit", lose_answer)
    for command, status in ((run.pause, "paused"), (run.resume, "running"), (run.cancel, "cancelled")):
        given += 1
        command()
        assert run.status == status
    run.retry()
    assert len(lost) == 3
    assert [e["event"] for e in run.history() if e["step_no"] is None] == [
        "submitted", "paused", "resumed", "cancel_requested", "cancelled", "retried",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda app: app.add.s(object(), 1), errors.ArgumentError, "JSON"),
        (lambda app: app.add.s("a\0b", 1), errors.ArgumentError, "NUL"),
        (lambda app: app.add.s(1), errors.ArgumentError, "argument"),
        (lambda app: app.add.s(1, 2, 3), errors.ArgumentError, "argument"),
        (lambda app: app.app.signature("no.such.task"), errors.UnknownTaskError, "no.such.task"),
        (lambda app: app.add, errors.CanvasError, "is a task"),
        (lambda app: 42, errors.CanvasError, "int"),
        (lambda app: chord([app.add.s(1, 1)], None), errors.CanvasError, "body"),
        (lambda app: "no.such.workflow", errors.UnknownWorkflowError, "no.such.workflow"),
        (lambda app: app.add.s(1, 2).set(countdown="soon"), errors.ArgumentError, "countdown"),
        (lambda app: app.add.s(1, 2).set(eta="whenever"), errors.ArgumentError, "eta"),
        (lambda app: app.add.s(1, 2).set(expires=object()), errors.ArgumentError, "expires"),
        (lambda app: app.add.s(1, 2).set(headers={"a": object()}), errors.ArgumentError, "JSON"),
        (lambda app: app.add.s(1, 2).set(headers={"a": "\0"}), errors.ArgumentError, "its options contain a NUL"),
        (lambda app: app.add.s(1, 2).set(headers={"a": "\ud800"}), errors.ArgumentError, "its options contain half"),
        (lambda app: app.add.s(1, 2).set(priority=10), errors.ArgumentError, "priority=10 is not a whole number"),
    ],
    ids=[
        "object",
        "nul",
        "too-few",
        "too-many",
        "unknown-task",
        "a-task",
        "a-number",
        "no-body",
        "unknown-workflow",
        "countdown",
        "eta",
        "expires",
        "headers",
        "nul-in-a-header",
        "surrogate-in-a-header",
        "priority",
    ],
)
def test_bad_input_is_named_and_changes_nothing(
    app: Any, cluster: Cluster, make: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        app.engine.submit(make(app))
    assert rows_written(cluster) == 0
    assert messages(cluster) == 0


def test_arguments_that_a_workflow_does_not_take(app: Any, cluster: Cluster) -> None:
    build = app.engine.workflow("test.one")(lambda x: app.echo.s(value=x))
    for args, kwargs in [((), {}), ((1, 2), {}), ((1,), {"y": 2})]:
        with pytest.raises(errors.ArgumentError, match=r"'test\.one' cannot be called like this"):
            build.submit(*args, **kwargs)
    assert rows_written(cluster) == 0


@pytest.mark.parametrize("key", ["", "a\0b", 7])
def test_bad_keys(app: Any, cluster: Cluster, key: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="key"):
        app.engine.submit(app.add.s(1, 1), key=key)
    assert rows_written(cluster) == 0


@pytest.mark.parametrize("timeout", [0, -1])
def test_bad_timeouts(app: Any, timeout: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="timeout"):
        app.engine.submit(app.add.s(1, 1), timeout=timeout)


def test_a_task_id_in_use(app: Any, cluster: Cluster) -> None:
    app.engine.submit(app.add.s(1, 1).set(task_id="mine"))
    before = rows_written(cluster)
    with pytest.raises(errors.DuplicateStepError, match="mine"):
        app.engine.submit(app.add.s(1, 1) | app.add.s(1).set(task_id="mine"))
    assert rows_written(cluster) == before


def test_get_times_out(app: Any) -> None:
    run = app.engine.submit(app.add.s(1, 1))
    why = rf"run {run.id} is running after 0\.05 s: .*Step 0 \("
    with pytest.raises(CeleryTimeoutError, match=why):
        run.get(timeout=0.05)
    with pytest.raises(CeleryTimeoutError, match=why):
        run.wait(timeout=0.05)


def test_get_can_return_the_error(app: Any, worker: None) -> None:
    assert repr(app.engine.submit(app.fail.s("boom")).get(timeout=30, propagate=False)) == "ValueError('boom')"


def test_runs_are_found_by_a_prefix(app: Any) -> None:
    run = app.engine.submit(app.add.s(1, 1))
    assert app.engine.get(run.id[:8]) == run
    for missing in ("00000000", "zzz", str(datetime.now(UTC))):
        with pytest.raises(errors.RunNotFoundError):
            app.engine.get(missing)
    with pytest.raises(errors.ArgumentError, match="done"):
        app.engine.list(status="done")


def test_illegal_commands_say_why(app: Any) -> None:
    run = app.engine.submit(app.add.s(1, 1))
    with pytest.raises(errors.IllegalTransitionError, match="paused"):
        run.resume()
    run.cancel()
    assert run.status == "cancelled"
    for command in (run.cancel, run.pause, run.resume):
        with pytest.raises(errors.IllegalTransitionError, match="cancelled"):
            command()


def test_pause_holds_everything(app: Any, cluster: Cluster) -> None:
    run = app.engine.submit(app.add.s(1, 1) | app.add.s(1))
    run.pause()
    cluster.worker(APP)
    wait_until(lambda: messages(cluster) == 0)
    assert run.status == "paused"
    assert [s.status for s in run.steps()] == ["ready", "pending"]
    run.resume()
    assert run.get(timeout=30) == 3


def test_retry_of_a_failed_run(app: Any, worker: None, tmp_path: Any) -> None:
    marker = tmp_path / "notes"
    canvas = chain(
        app.note.s(str(marker), "once"), app.wait_for_file.si(str(tmp_path / "go")).set(time_limit=1), app.echo.s()
    )
    run = app.engine.submit(canvas)
    assert run.wait(timeout=60) == "failed"
    (tmp_path / "go").touch()
    run.retry()
    assert run.get(timeout=30) is None
    assert run.wait(timeout=10) == "succeeded"
    assert marker.read_text() == "once\n"  # what had succeeded was kept


def test_a_run_that_misses_its_deadline(app: Any, worker: None) -> None:
    run = app.engine.submit(app.add.s(1, 1).set(countdown=600), timeout=0.5)
    assert run.wait(timeout=40) == "failed"
    with pytest.raises(errors.RunTimeoutError, match="deadline"):
        run.get(timeout=5)


def test_eta_and_countdown(app: Any, worker: None) -> None:
    when = datetime.now(UTC) + timedelta(seconds=1)
    run = app.engine.submit(app.add.s(1, 1).set(eta=when))
    assert run.get(timeout=30) == 2
    started = run.steps()[0].started_at
    assert when <= started


def _add(x: int, y: int) -> int:
    return x + y


def test_not_migrated(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = create_engine(normalise_url(database_url))
    with engine.begin() as conn:
        conn.execute(text("DROP SCHEMA byrd CASCADE"))
    engine.dispose()
    monkeypatch.delenv("BYRD_BROKER_URL", raising=False)
    app = Celery("unmigrated", broker="redis://127.0.0.1:1", set_as_current=False)
    service = byrd.Byrd(app, database_url)
    add = app.task(_add, name="add", shared=False)
    with pytest.raises(errors.NotMigratedError, match="byrd migrate"):
        service.submit(add.s(1, 1))
    service.close()
    with pytest.raises(errors.ShuttingDownError):
        service.submit(add.s(1, 1))


def test_postgres_is_away() -> None:
    app = Celery("alone", broker="redis://127.0.0.1:1", set_as_current=False)
    service = byrd.Byrd(app, "postgresql://nobody:secret@127.0.0.1:1/none")
    service.runtime.store.patience = 0.2
    add = app.task(_add, name="add", shared=False)
    with pytest.raises(errors.StoreUnavailableError, match=r"127\.0\.0\.1:1") as caught:
        service.submit(add.s(1, 1))
    assert "secret" not in str(caught.value)


def test_a_broker_that_is_away_loses_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    app = cluster.app(APP)
    monkeypatch.setattr(app.app.conf, "broker_url", "redis://127.0.0.1:1")
    run = app.engine.submit(app.add.s(1, 2))
    assert run.steps()[0].status == "ready"
    cluster.worker(APP)
    assert run.get(timeout=30) == 3


def test_a_naive_eta_is_utc_as_in_celery(app: Any, cluster: Cluster) -> None:
    run = app.engine.submit(app.add.s(1, 1).set(eta="2040-01-02T03:04:05"))
    assert run.steps()[0].run_at == datetime(2040, 1, 2, 3, 4, 5, tzinfo=UTC)
