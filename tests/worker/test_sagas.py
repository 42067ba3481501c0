"""Sagas on real workers: nested ones, pivots, what is asked for after a crash, and what is told when one is stuck."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from celery import chain, group, signature

import byrd
from byrd.errors import (
    ArgumentError,
    CompensationError,
    ConfigurationError,
    IllegalTransitionError,
    SagaOutsideRunError,
)
from byrd.worker.notifier import hooks_of
from tests.cluster import Cluster, wait_until

APP = "tests.apps.sagas"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def shared(module_cluster: Cluster, files: Path) -> Any:
    app = module_cluster.app(APP)
    module_cluster.rows(app.TABLE)
    module_cluster.worker(APP, env={"SAGA_FILES": str(files)}, queues=["celery", "returns"])
    return app


def effects(cluster: Cluster, run: Any) -> list[tuple[str, str]]:
    """Return what was done and undone, in order."""
    return [
        (what, name) for what, name in cluster.rows("SELECT what, name FROM effects WHERE run = %s ORDER BY id", run.id)
    ]


def details(cluster: Cluster, run: Any, name: str) -> list[str]:
    """Return what the compensations of a name have noted."""
    sql = "SELECT detail FROM effects WHERE run = %s AND name = %s AND what = 'undo' ORDER BY id"
    return [row[0] for row in cluster.rows(sql, run.id, name)]


def test_a_saga_in_a_chain_undoes_itself_and_then_fails(shared: Any, module_cluster: Cluster) -> None:
    inner = byrd.saga(shared.do.si("b"), shared.do.si("c"), shared.fail.si())
    run = shared.engine.submit(chain(shared.do.si("a"), inner, shared.do.si("d")))
    with pytest.raises(ValueError, match="no"):
        run.get(timeout=30)
    assert run.wait(timeout=30) == "failed"
    assert effects(module_cluster, run)[3:] == [("undo", "c"), ("undo", "b"), ("undo", "a")]
    assert details(module_cluster, run, "c") == ["did c because of ValueError: no"]


def test_a_saga_that_succeeded_is_undone_with_what_is_around_it(shared: Any, module_cluster: Cluster) -> None:
    run = shared.engine.submit(byrd.saga(shared.do.si("a"), byrd.saga(shared.do.si("b")), shared.fail.si()))
    assert run.wait(timeout=30) == "failed"
    assert effects(module_cluster, run)[2:] == [("undo", "b"), ("undo", "a")]


def test_members_of_a_group_are_undone_side_by_side(shared: Any, module_cluster: Cluster) -> None:
    members = group(shared.do.si(f"m{n}") for n in range(4))
    run = shared.engine.submit(chain(shared.do.si("a"), members, shared.fail.s()))
    assert run.wait(timeout=30) == "failed"
    assert effects(module_cluster, run)[-1] == ("undo", "a")
    assert [s.rank for s in run.steps() if s.kind == "compensation"] == [1, 1, 1, 1, 2]


def test_what_runs_in_a_saga_that_fails_is_told_to_stop(shared: Any, module_cluster: Cluster, files: Path) -> None:
    members = group(chain(shared.until.si("loops"), shared.fail.si()), shared.loop_saga.si("x"))
    run = shared.engine.submit(byrd.saga(members))
    wait_until(lambda: ("do", "x") in effects(module_cluster, run))
    (files / "loops").touch()
    assert run.wait(timeout=30) == "failed"
    # It had done something before it was stopped, and nobody knows what: so it is undone.
    assert details(module_cluster, run, "x") == ["None, known: False"]
    assert next(s for s in run.steps() if (s.task or "").endswith(".loop_saga")).status == "cancelled"


def test_a_step_that_ran_out_of_time_is_undone(shared: Any, module_cluster: Cluster) -> None:
    run = shared.engine.submit(chain(shared.do.si("a"), shared.hurry.si("late")))
    assert run.wait(timeout=30) == "failed"
    assert effects(module_cluster, run)[2:] == [("undo", "late"), ("undo", "a")]
    assert details(module_cluster, run, "late") == ["None, known: False"]


def test_after_the_pivot_a_step_is_tried_again(shared: Any, module_cluster: Cluster, files: Path) -> None:
    (files / "forward.down").touch()
    run = shared.engine.submit(chain(shared.do.si("a"), shared.pay.si(), shared.down.si("forward")))
    wait_until(lambda: run.steps()[2].attempt >= 2)
    (files / "forward.down").unlink()
    assert run.wait(timeout=30) == "succeeded"
    assert effects(module_cluster, run) == [("do", "a"), ("do", "pay")]
    assert "pivot_passed" in [h["event"] for h in run.history()]
    with pytest.raises(IllegalTransitionError, match="forward only"):
        run.rollback()


def test_a_pivot_in_a_nested_saga_holds_for_what_is_around_it(
    shared: Any, module_cluster: Cluster, files: Path
) -> None:
    (files / "inner.down").touch()
    inner = byrd.saga(shared.do.si("b"), shared.pay.si(), shared.down.si("inner"))
    run = shared.engine.submit(byrd.saga(shared.do.si("a"), inner, shared.do.si("c")))
    wait_until(lambda: [s for s in run.steps() if s.task == f"{APP}.down" and s.attempt >= 2])
    with pytest.raises(IllegalTransitionError, match="forward only"):
        run.cancel(compensate=True)
    (files / "inner.down").unlink()
    assert run.wait(timeout=30) == "succeeded"
    assert effects(module_cluster, run) == [("do", "a"), ("do", "b"), ("do", "pay"), ("do", "c")]


@pytest.mark.parametrize("nested", [False, True], ids=["run", "saga"])
def test_a_pivot_that_has_not_started_when_a_step_fails_never_does(
    shared: Any, module_cluster: Cluster, files: Path, nested: bool
) -> None:
    go = f"go {nested}"
    pays = chain(shared.do.si("a"), shared.until.si(go), shared.pay.si())
    run = shared.engine.submit(group(byrd.saga(pays) if nested else pays, shared.fail.si()))
    wait_until(lambda: [s for s in run.steps() if s.task == f"{APP}.fail" and s.status == "failed"])
    (files / go).touch()
    with pytest.raises(ValueError, match="no"):
        run.get(timeout=30)
    assert run.wait(timeout=30) == "failed"
    assert effects(module_cluster, run) == [("do", "a"), ("undo", "a")]
    [pay] = [s for s in run.steps() if s.task == f"{APP}.pay"]
    assert (pay.status, pay.attempt) == ("cancelled", 0)


def test_a_retriable_step_is_tried_again(shared: Any, files: Path) -> None:
    (files / "box.down").touch()
    run = shared.engine.submit(chain(shared.do.si("a"), shared.mail.si("box")))
    wait_until(lambda: run.steps()[1].attempt >= 2)
    (files / "box.down").unlink()
    assert run.get(timeout=30) == "sent"


def test_an_each_of_retriable_items_causes_no_rollback(shared: Any, module_cluster: Cluster, files: Path) -> None:
    """It fails because an item does, and is tried again with what has not succeeded."""
    (files / "shut.down").touch()
    run = shared.engine.submit(chain(shared.do.si("a"), byrd.each(shared.mail.s(), over=["open", "shut"])))
    sql = """SELECT count(*) FROM byrd.attempts a JOIN byrd.steps s ON s.id = a.step_id
              WHERE s.run_id = %s AND s.task = 'byrd.each' AND a.outcome = 'failed'"""
    wait_until(lambda: module_cluster.rows(sql, run.id) >= [(2,)])
    assert run.status == "running"
    wait_until(lambda: "is tried again at" in " ".join(run.why()), what=lambda: str(run.why()))
    assert "after EachToleranceError: 1 of 2 items failed" in " ".join(run.why())
    (files / "shut.down").unlink()
    assert run.get(timeout=30) == ["sent", "sent"]
    assert effects(module_cluster, run) == [("do", "a")]
    first, second = (step.attempt for step in run.steps() if step.kind == "item")
    assert first == 1
    assert second >= 3


# -- after a crash ---------------------------------------------------------------------------------


def test_a_step_whose_effect_is_confirmed_is_not_done_again(shared: Any, module_cluster: Cluster, files: Path) -> None:
    (files / "room.die").touch()
    run = shared.engine.submit(shared.book.si("room"))
    assert run.get(timeout=60) == "found room"
    assert effects(module_cluster, run) == [("do", "room")]
    assert run.steps()[0].attempt == 2


def test_one_whose_effect_is_not_there_is_done(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    cluster.rows(app.TABLE)
    cluster.worker(APP, env={"SAGA_FILES": str(tmp_path)})
    run = app.engine.submit(app.book.si("room"))
    wait_until(lambda: run.status == "succeeded")
    # As if the worker had died before the effect: another attempt, and no row.
    cluster.rows("TRUNCATE effects")
    cluster.rows("""UPDATE byrd.runs SET status = 'failed', error = '{"exc_type": "ValueError", "exc_message": []}'""")
    cluster.rows("""UPDATE byrd.steps SET status = 'failed', result = NULL, error = '{"exc_type": "ValueError"}'""")
    run.retry()
    assert run.get(timeout=30) == "booked room"
    assert effects(cluster, run) == [("do", "room")]


def test_a_step_that_may_have_taken_effect_is_asked_for_before_it_is_undone(
    shared: Any, module_cluster: Cluster, files: Path
) -> None:
    def book_and_fail() -> Any:
        (files / "seat.raises").touch()
        (files / "seat.die").touch()
        run = shared.engine.submit(byrd.saga(group(shared.book.si("seat"), shared.fail.si())))
        assert run.wait(timeout=60) == "failed"
        return run if effects(module_cluster, run) else None  # the saga had failed before the booking began

    run = wait_until(book_and_fail, timeout=100)
    # Lost with its worker: whether the saga's failure found it running or ready, what it did is undone, once.
    assert effects(module_cluster, run) == [("do", "seat"), ("undo", "seat")]
    assert details(module_cluster, run, "seat") == ["found seat, known: True"]


def test_a_step_that_a_pause_has_stopped_is_undone(shared: Any, module_cluster: Cluster) -> None:
    run = shared.engine.submit(shared.loop_saga.si("held"))
    wait_until(lambda: effects(module_cluster, run))
    run.pause()
    wait_until(lambda: run.steps()[0].status == "ready")
    run.rollback(reason="nobody wants it any more")
    assert run.wait(timeout=30) == "cancelled"
    # It had done something before its first checkpoint.
    assert effects(module_cluster, run) == [("do", "held"), ("undo", "held")]
    assert details(module_cluster, run, "held") == ["None, known: False"]


@pytest.mark.parametrize("done", [True, False], ids=["done", "not done"])
def test_one_that_a_pause_has_stopped_is_asked_for_before_it_is_undone(
    shared: Any, module_cluster: Cluster, files: Path, done: bool
) -> None:
    """What confirm says was never done is not undone: its compensation is done without being called."""
    name = "flat" if done else "house"
    if not done:
        (files / f"{name}.none").touch()
    run = shared.engine.submit(shared.rent.si(name))
    wait_until(lambda: ("begun", name) in effects(module_cluster, run))
    run.pause()
    wait_until(lambda: run.steps()[0].status == "ready")
    run.rollback()
    assert run.wait(timeout=30) == "cancelled"
    begun = [("do", name), ("begun", name)] if done else [("begun", name)]
    assert effects(module_cluster, run) == [*begun, ("asked", name), *([("undo", name)] if done else [])]
    assert details(module_cluster, run, name) == (["found flat, known: True"] if done else [])
    [undo] = [s for s in run.steps() if s.kind == "compensation"]
    assert (undo.status, undo.result) == ("succeeded", "null")


@pytest.mark.parametrize(
    ("says", "value", "calls"),
    [("false", "lent f false", 2), ("null", None, 1), ("true", True, 1), ("raises", True, 1)],
    ids=["False", "None", "True", "raises"],
)
def test_what_a_confirm_says_before_another_attempt(
    shared: Any, module_cluster: Cluster, files: Path, says: str, value: Any, calls: int
) -> None:
    """False is no; what raises is asked again in the next attempt; anything else is the step's value."""
    name = f"f {says}"
    (files / f"{name}.says").write_text(says)
    (files / f"{name}.die").touch()
    run = shared.engine.submit(shared.lend.si(name))
    assert run.get(timeout=60) == value
    assert effects(module_cluster, run) == [("do", name)] * calls
    assert run.steps()[0].attempt == (3 if says == "raises" else 2)


@pytest.mark.parametrize(
    ("says", "undone"),
    [
        ("false", []), ("null", ["None, known: True"]), ("true", ["True, known: True"]),
        ("raises", ["True, known: True"]),
    ],
    ids=["False", "None", "True", "raises"],
)  # fmt: skip
def test_what_a_confirm_says_before_an_undo(
    shared: Any, module_cluster: Cluster, files: Path, says: str, undone: list[str]
) -> None:
    name = f"b {says}"
    (files / f"{name}.says").write_text(says)
    (files / f"{name}.loops").touch()
    run = shared.engine.submit(shared.lend.si(name))
    wait_until(lambda: effects(module_cluster, run))
    run.pause()
    wait_until(lambda: run.steps()[0].status == "ready")
    run.rollback()
    assert run.wait(timeout=30) == "cancelled"
    assert details(module_cluster, run, name) == undone
    [undo] = [s for s in run.steps() if s.kind == "compensation"]
    assert (undo.status, undo.attempt) == ("succeeded", 2 if says == "raises" else 1)


def test_a_rollback_outlives_a_compensation_that_kills_its_worker(
    shared: Any, module_cluster: Cluster, files: Path
) -> None:
    (files / "undo b.die").touch()
    run = shared.engine.submit(chain(shared.do.si("a"), byrd.saga(shared.do.si("b"), shared.fail.si())))
    assert run.wait(timeout=60) == "failed"
    keys = module_cluster.rows("SELECT key FROM effects WHERE run = %s AND what = 'undo' AND name = 'b'", run.id)
    # It ran twice, for its effect came before its end was recorded: with the same key.
    assert len(keys) == 2
    assert len(set(keys)) == 1
    assert effects(module_cluster, run)[-1] == ("undo", "a")


# -- what a compensation is ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["failure", "cancel", "rollback"])
def test_a_compensation_knows_what_it_undoes_and_why(shared: Any, how: str) -> None:
    last = shared.fail.si() if how == "failure" else shared.do.si("later").set(countdown=600)
    run = shared.engine.submit(chain(shared.tell.si("a"), last))
    wait_until(lambda: run.steps()[0].status == "succeeded")
    if how == "cancel":
        run.cancel(compensate=True, by="ann")
    elif how == "rollback":
        run.pause()
        run.rollback(reason="the wrong customer", by="ann")
    assert run.wait(timeout=30) == ("failed" if how == "failure" else "cancelled")
    first, _, undo = run.steps()
    reasons: dict[str, dict[str, Any]] = {
        "failure": {"reason": "ValueError: no", "failed_step": 1, "failed_task": f"{APP}.fail", "by": None},
        "cancel": {"reason": "somebody asked for it", "failed_step": None, "failed_task": None, "by": "ann"},
        "rollback": {"reason": "the wrong customer", "failed_step": None, "failed_task": None, "by": "ann"},
    }
    assert json.loads(undo.result) == {
        "key": undo.id, "run_id": run.id, "step": 0, "step_id": first.id, "task": f"{APP}.tell", "known": True,
        **reasons[how],
    }  # fmt: skip


def test_a_compensation_has_a_queue_and_a_time_limit_of_its_own(
    shared: Any, module_cluster: Cluster, files: Path
) -> None:
    (files / "parcel.hangs").touch()
    run = shared.engine.submit(chain(shared.ship.si("parcel"), shared.fail.si()))
    assert run.wait(timeout=60) == "rollback_stuck"
    undo = run.steps()[2]
    assert (undo.task, undo.queue) == (f"{APP}.ship.compensation", "returns")
    assert json.loads(undo.error)["exc_type"] == "TimeLimitExceeded"
    (files / "parcel.hangs").unlink()
    run.retry()
    assert run.wait(timeout=60) == "failed"
    assert json.loads(run.steps()[2].result) == "returns"
    assert details(module_cluster, run, "parcel") == ["shipped parcel"]


def test_a_task_that_there_is_already_undoes(shared: Any, module_cluster: Cluster, files: Path) -> None:
    (files / "car.down").touch()
    run = shared.engine.submit(chain(shared.sell.si("car"), shared.fail.si()))
    assert run.wait(timeout=60) == "rollback_stuck"
    undo = run.steps()[2]
    # Its queue and its retries are its own: one, where a compensation by itself has ten.
    assert (undo.task, undo.queue, undo.attempt) == (f"{APP}.pay_back", "returns", 2)
    (files / "car.down").unlink()
    run.retry()
    assert run.wait(timeout=30) == "failed"
    assert details(module_cluster, run, "car") == ["sold car"]
    # And it still is what it was to others.
    assert shared.engine.submit(shared.pay_back.si("nothing", "bike")).get(timeout=30) == "paid back bike"


def test_a_compensation_waits_for_a_signal(shared: Any, module_cluster: Cluster) -> None:
    run = shared.engine.submit(chain(shared.insure.si("car"), shared.fail.si()))
    wait_until(lambda: [w for w in shared.engine.waiting(of="the insurance") if w.run_id == run.id])
    assert run.status == "compensating"
    run.signal("agreed", "yes", by="ann")
    assert run.wait(timeout=30) == "failed"
    assert details(module_cluster, run, "car") == ["yes"]


# -- what an operator does -------------------------------------------------------------------------


def stuck(shared: Any, files: Path, name: str) -> Any:
    (files / f"{name}.stuck").touch()
    run = shared.engine.submit(chain(shared.do.si("first"), byrd.saga(shared.do.si(name), shared.fail.si())))
    assert run.wait(timeout=60) == "rollback_stuck"
    return run


def test_a_stuck_saga_is_retried(shared: Any, module_cluster: Cluster, files: Path) -> None:
    run = stuck(shared, files, "again")
    assert run in shared.engine.list(status="rollback_stuck")
    (files / "again.stuck").unlink()
    run.retry(by="ann")
    assert run.wait(timeout=30) == "failed"
    assert effects(module_cluster, run)[2:] == [("undo", "again"), ("undo", "first")]


@pytest.mark.parametrize("how", ["skip", "done_by_hand"])
def test_a_stuck_compensation_is_skipped_or_done_by_hand(
    shared: Any, module_cluster: Cluster, files: Path, how: str
) -> None:
    run = stuck(shared, files, how)
    no = next(s.no for s in run.steps() if s.kind == "compensation")
    [why] = run.why()
    assert f"`byrd skip {run.id[:8]} {no}" in why
    words = {"reason": "gone"} if how == "skip" else {"note": "called them"}
    with pytest.raises(ArgumentError, match="must be a text"):
        getattr(run, how)(no, **dict.fromkeys(words, " "))
    getattr(run, how)(no, **words, by="ann")
    assert run.wait(timeout=30) == "failed"
    assert effects(module_cluster, run)[2:] == [("undo", "first")]
    event = {"skip": "compensation_skipped", "done_by_hand": "done_by_hand"}[how]
    [found] = [h for h in run.history() if h["event"] == event]
    assert found["detail"] == {**words, "by": "ann"}


def test_a_compensation_that_hangs_is_broken_off_and_skipped(shared: Any, module_cluster: Cluster, files: Path) -> None:
    (files / "slow.hangs").touch()
    run = shared.engine.submit(chain(shared.do.si("first"), shared.do.si("slow"), shared.fail.si()))
    [undo] = wait_until(lambda: [s for s in run.steps() if s.kind == "compensation" and s.status == "running"])
    with pytest.raises(IllegalTransitionError, match=rf"is running.*revoke\('{undo.id}', terminate=True\)"):
        run.skip(undo.no, reason="it hangs")
    shared.app.control.revoke(undo.id, terminate=True)
    assert run.wait(timeout=30) == "rollback_stuck"
    run.skip(undo.no, reason="it hangs", by="ann")
    assert run.wait(timeout=30) == "failed"
    assert effects(module_cluster, run)[2:] == [("undo", "first")]


def test_a_run_is_rolled_back_on_purpose(shared: Any, module_cluster: Cluster) -> None:
    run = shared.engine.submit(chain(shared.do.si("a"), shared.do.si("b")))
    assert run.wait(timeout=30) == "succeeded"
    run.rollback(reason="the wrong customer", by="ann")
    assert run.wait(timeout=30) == "cancelled"
    assert effects(module_cluster, run)[2:] == [("undo", "b"), ("undo", "a")]
    assert details(module_cluster, run, "b") == ["did b because of the wrong customer"]


# -- who is told -----------------------------------------------------------------------------------


class Webhook:
    """A server on this machine that notes what it is sent; it refuses the first call."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, Any], str | None]] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.got.append((json.loads(body), self.headers["Idempotency-Key"]))
                self.send_response(500 if len(hook.got) == 1 else 204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/stuck"


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    found = Webhook()
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_a_stuck_rollback_is_told_to_a_task_and_a_webhook(cluster: Cluster, tmp_path: Path, webhook: Webhook) -> None:
    app = cluster.app(APP)
    cluster.rows(app.TABLE)
    hooks = json.dumps([webhook.url, f"{APP}.told"])
    cluster.worker(APP, env={"SAGA_FILES": str(tmp_path), "SAGA_HOOKS": hooks})
    run = stuck(app, tmp_path, "loud")
    wait_until(lambda: webhook.got)
    # That it could not be told keeps nobody else from it.
    wait_until(lambda: cluster.rows("SELECT 1 FROM effects WHERE what = 'told'"))
    # The server was in trouble: the notice is delivered again, by a worker that has only just been started.
    cluster.workers[0].kill()
    cluster.rows("UPDATE byrd.notices SET due_at = now()")
    cluster.worker(APP, env={"SAGA_FILES": str(tmp_path), "SAGA_HOOKS": hooks})
    wait_until(lambda: len(webhook.got) == 2)
    first, second = webhook.got
    assert first == second
    payload, key = first
    assert (payload["event"], payload["run"], payload["undoes"]) == ("rollback_stuck", run.id, 2)
    assert payload["error"]["exc_message"] == ["loud cannot be undone now"]
    assert key == f"byrd-notice-{payload['notice']}"
    wait_until(lambda: cluster.rows("SELECT 1 FROM byrd.notices WHERE delivered_at IS NOT NULL"))
    assert cluster.rows("SELECT run FROM effects WHERE what = 'told'") == [(run.id,)]


def test_who_has_been_told_is_not_told_again_when_others_cannot_be(
    cluster: Cluster, tmp_path: Path, webhook: Webhook
) -> None:
    app = cluster.app(APP)
    cluster.rows(app.TABLE)
    webhook.got.append(({}, None))  # the call that it refuses
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        hooks = json.dumps([dead, webhook.url, f"{APP}.told"])
        cluster.worker(APP, env={"SAGA_FILES": str(tmp_path), "SAGA_HOOKS": hooks})
        stuck(app, tmp_path, "loud")
        tries = "SELECT tries, delivered_at IS NOT NULL, error FROM byrd.notices"
        for number in (1, 2, 3):
            [(_, delivered, error)] = wait_until(
                lambda number=number: [row for row in cluster.rows(tries) if row[0] == number and row[2]]  # type: ignore[misc]
            )
            assert not delivered
            assert error.startswith(dead)
            assert webhook.url not in error
            cluster.rows("UPDATE byrd.notices SET due_at = now(), error = NULL RETURNING 1")
    assert len(webhook.got) == 2
    assert len(cluster.rows("SELECT 1 FROM effects WHERE what = 'told'")) == 1


@pytest.mark.parametrize("hook", ["file:///etc/passwd", "http://", 7, [""]])
def test_what_can_be_no_hook_is_refused(shared: Any, hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shared.app.conf, "byrd_rollback_stuck_hook", hook)
    with pytest.raises(ConfigurationError, match="byrd_rollback_stuck_hook"):
        hooks_of(shared.app)


# -- what is refused -------------------------------------------------------------------------------


def test_a_saga_task_has_to_say_how_it_is_undone(shared: Any, module_cluster: Cluster) -> None:
    before = module_cluster.rows("SELECT count(*) FROM byrd.runs")
    with pytest.raises(CompensationError, match="compensation=None"):
        shared.engine.submit(chain(shared.do.si("a"), shared.forgetful.si()))
    assert module_cluster.rows("SELECT count(*) FROM byrd.runs") == before


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda s: byrd.saga(s.do.map(["a", "b"])), f"{APP}.do .*celery.map.*group of its calls, or byrd.each"),
        (lambda s: chain(s.until.si("x"), s.do.starmap([("a",)])), f"{APP}.do .*celery.starmap"),
        (lambda s: s.do.chunks([("a",), ("b",)], 1), f"{APP}.do "),
        (lambda s: group(s.fail.si(), s.do.chunks([("a",), ("b",)], 1).group()), f"{APP}.do "),
        (lambda s: byrd.saga(s.do.map(["a"])).on_error(s.fail.s()), f"{APP}.do "),
        (lambda s: s.fail.si().on_error(s.do.map(["a"])), f"{APP}.do "),
        (lambda s: json.loads(json.dumps(s.do.map(["a"]))), f"{APP}.do "),
        (lambda s: signature("celery.map", kwargs={"task": f"{APP}.do", "it": ["a"]}, app=s.app), f"{APP}.do "),
        (lambda s: s.pay.map([1]), f"{APP}.pay .*use a group of its calls, where"),
        (lambda s: s.mail.map(["a"]), f"{APP}.mail "),
        (lambda s: s.forgetful.starmap([()]), f"{APP}.forgetful .*compensation=None"),
    ],
    ids=["map", "starmap", "chunks", "group", "saga", "errback", "json", "by name", "pivot", "retriable", "forgetful"],
)  # fmt: skip
def test_a_saga_task_that_a_map_would_call_is_refused(
    shared: Any, module_cluster: Cluster, build: Any, says: str
) -> None:
    """One step calls it for all items: none of its effects would ever be undone, without a word."""
    before = module_cluster.rows("SELECT count(*) FROM byrd.runs")
    with pytest.raises(CompensationError, match=says):
        shared.engine.submit(build(shared))
    assert module_cluster.rows("SELECT count(*) FROM byrd.runs") == before


def test_a_map_of_a_task_with_nothing_to_undo_is_not_refused(shared: Any) -> None:
    @shared.app.task(base=byrd.SagaTask, compensation=None, shared=False, name="sagas.nothing")
    def nothing(name: str) -> str:
        return name

    for canvas in (nothing.map(["a"]), shared.until.chunks([("a",)], 1), byrd.saga(shared.told.map([{}]))):
        assert shared.engine.runtime.plan(canvas).steps


def test_a_task_is_not_both_pivot_and_retriable(shared: Any) -> None:
    with pytest.raises(ConfigurationError, match="pivot and retriable"):
        type("Both", (byrd.SagaTask,), {"pivot": True, "retriable": True})


def test_a_task_has_one_confirm(shared: Any) -> None:
    with pytest.raises(ConfigurationError, match="confirm already"):
        shared.book.confirm(lambda key, name: None)


def test_a_saga_is_no_task(shared: Any) -> None:
    with pytest.raises(SagaOutsideRunError, match="submit"):
        byrd.saga(shared.do.si("a")).apply_async(app=shared.app)
