"""Runs that wait, on real workers: what a sleep and a signal come to, and what they cost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import chain, chord, group

import byrd
from byrd.errors import (
    ArgumentError,
    CanvasError,
    CheckpointError,
    IllegalTransitionError,
    SignalTimeoutError,
    WaitOutsideRunError,
)
from tests.cluster import ROOT, Cluster, wait_until

APP = "tests.apps.waiting"
#: For how long a thousand runs sleep, in seconds: long enough to be submitted before.
SLEEP = float(os.environ.get("BYRD_SLEEP_SECONDS", "30"))


@pytest.fixture(scope="module")
def shared(module_cluster: Cluster) -> Any:
    module_cluster.worker(APP)
    return module_cluster.app(APP)


@pytest.fixture(scope="module")
def shared_cluster(module_cluster: Cluster) -> Cluster:
    return module_cluster


def awaited(run: Any, signal: str) -> None:
    """Wait until a step of the run waits for the signal."""
    wait_until(lambda: any(s.status == "waiting" and s.signal == signal for s in run.steps()), what=signal)


def test_a_sleep_hands_on_its_value(shared: Any) -> None:
    began = time.monotonic()
    run = shared.engine.submit(chain(shared.echo.s(5), byrd.sleep(1), shared.echo.s()))
    assert run.get(timeout=30) == 5
    assert time.monotonic() - began >= 1
    assert run.wait(timeout=5) == "succeeded"


def test_composed_with_the_pipe_and_as_a_dictionary(shared: Any) -> None:
    canvas = shared.echo.s(5) | byrd.sleep(timedelta(seconds=0.1)) | shared.echo.s()
    assert shared.engine.submit(canvas).get(timeout=30) == 5
    assert shared.engine.submit(dict(canvas)).get(timeout=30) == 5
    assert shared.engine.submit(chain(byrd.sleep(0), shared.echo.s()), 7).get(timeout=30) == 7


def test_waits_in_groups_and_chords(shared: Any) -> None:
    later = datetime.now(UTC) + timedelta(seconds=0.5)
    header = [chain(shared.echo.s(1), byrd.sleep(until=later)), byrd.wait_for("n"), byrd.sleep(0)]
    run = shared.engine.submit(chain(chord(header, byrd.sleep(0.1)), shared.echo.s()))
    run.signal("n", 2)
    assert run.get(timeout=30) == [1, 2, None]


def test_both_values_by_a_group(shared: Any) -> None:
    run = shared.engine.submit(group(shared.echo.s(1), byrd.wait_for("n")) | shared.echo.s())
    run.signal("n", {"two": [2]})
    assert run.get(timeout=30) == [1, {"two": [2]}]


def test_a_signal_ends_its_wait_at_once(shared: Any) -> None:
    run = shared.approval.submit(1)
    awaited(run, "approval")
    assert [w.run_id for w in shared.engine.waiting(signal="approval", workflow="waiting.approval")] == [run.id]
    run.signal("approval", {"ok": True}, by="ann")
    [step] = [s for s in run.steps() if s.kind == "wait"]
    assert step.status == "succeeded"
    assert run.get(timeout=10) == {"ok": True}
    assert shared.engine.waiting(workflow="waiting.approval") == []
    events = [row["event"] for row in run.history()]
    assert events.index("signalled") < events.index("signal_delivered")
    assert next(row for row in run.history() if row["event"] == "signalled")["detail"]["by"] == "ann"


def test_two_approvals_of_different_people(shared: Any) -> None:
    run = shared.engine.submit("waiting.purchase", 900)
    wait_until(lambda: len(shared.engine.waiting(workflow="waiting.purchase")) == 2)

    def listed(**wanted: Any) -> list[tuple[str, str, str | None]]:
        return [(w.run_id, w.signal, w.of) for w in shared.engine.waiting(workflow="waiting.purchase", **wanted)]

    finance, legal = (run.id, "approval:finance", "finance"), (run.id, "approval:legal", "Ann of legal")
    assert listed(signal="approval:*") == [finance, legal]
    assert listed(of="finance") == [finance]
    assert listed(of=shared.Role.LEGAL) == [legal]
    assert listed(of="nobody") == listed(signal="approval") == listed(of="finance", signal="approval:legal") == []
    assert any("waits for the signal 'approval:legal' of Ann of legal since" in said for said in run.why())
    run.signal("approval:legal", "yes")
    assert listed(signal="approval:*") == [finance]
    run.signal("approval:finance", "no")
    assert run.get(timeout=30) == ["no", "yes"]
    assert listed() == []


def test_whom_a_workflow_in_a_workflow_waits_for(shared: Any) -> None:
    run = shared.engine.submit(chain(shared.purchase.s(1), shared.echo.s()))
    [found] = wait_until(lambda: shared.engine.waiting(of="finance", workflow="waiting.purchase"))
    assert found.run_id != run.id
    inner = shared.engine.get(found.run_id)
    inner.signal("approval:legal", 2)
    inner.signal("approval:finance", 1)
    assert run.get(timeout=30) == [1, 2]


def test_what_no_list_can_be_asked_for(shared: Any) -> None:
    for wanted in ({"of": ""}, {"of": 7}, {"of": "a\0b"}, {"signal": ""}, {"signal": "*:a"}, {"signal": "a b*"}):
        with pytest.raises(CanvasError):
            shared.engine.waiting(**wanted)


def test_signals_that_come_early_are_kept_in_order(shared: Any) -> None:
    canvas = chain(byrd.sleep(0.3), byrd.wait_for("n"), byrd.wait_for("n"), shared.echo.s())
    run = shared.engine.submit(group(canvas, byrd.wait_for("m", timeout=60)))
    for number in (1, 2):
        run.signal("n", number)
    run.signal("m", None)
    assert run.get(timeout=30) == [2, None]


def test_a_timeout_has_its_error_or_its_default(shared: Any) -> None:
    failing = byrd.wait_for("never", timeout=0.3).on_error(shared.told.s())
    run = shared.engine.submit(chain(failing, shared.echo.s()))
    with pytest.raises(SignalTimeoutError, match=r"the signal 'never' did not come within 0\.3 s"):
        run.get(timeout=30)
    assert run.wait(timeout=10) == "failed"
    [errback] = [s for s in run.steps() if s.kind == "errback"]
    assert errback.result == "\"SignalTimeoutError: the signal 'never' did not come within 0.3 s\""
    run = shared.engine.submit(chain(byrd.wait_for("never", timeout=0.3, default=[1]), shared.echo.s()))
    assert run.get(timeout=30) == [1]


def test_a_task_replaced_by_a_canvas_that_waits(shared: Any) -> None:
    run = shared.engine.submit(chain(shared.ask.s("name"), shared.echo.s()))
    awaited(run, "name")
    run.signal("name", "Bea")
    assert run.get(timeout=30) == ["Bea", "name"]


def test_a_saga_is_rolled_back_when_nobody_approves(shared: Any) -> None:
    run = shared.engine.submit(chain(shared.reserve.s("room"), byrd.wait_for("ok", timeout=0.3), shared.echo.s()))
    assert run.wait(timeout=30) == "failed"
    [undo] = [s for s in run.steps() if s.kind == "compensation"]
    assert undo.result == '"released ROOM"'


def test_pause_resume_cancel_retry(shared: Any) -> None:
    run = shared.engine.submit(chain(byrd.sleep(0.3), shared.echo.s()), 1)
    run.pause()
    time.sleep(1)  # its time is over, and nothing may come of it
    assert [s.status for s in run.steps()] == ["waiting", "pending"]
    run.resume()
    assert run.get(timeout=10) == 1
    run = shared.engine.submit(chain(byrd.wait_for("ok"), shared.echo.s()))
    run.cancel()
    assert run.status == "cancelled"
    run.retry()
    run.signal("ok", 2)
    assert run.get(timeout=10) == 2


def test_a_deadline_ends_a_wait(shared: Any) -> None:
    run = shared.engine.submit(byrd.wait_for("ok"), timeout=0.5)
    assert run.wait(timeout=10) == "failed"


def test_bad_signals_are_refused_by_name(shared: Any) -> None:
    run = shared.engine.submit(byrd.wait_for("ok"))
    before = run.history()
    for payload in (object(), {1: {2, object()}}, "a\0b"):
        with pytest.raises(ArgumentError, match="payload of signal 'ok'"):
            run.signal("ok", payload)
    for name in ("", "a b", "ä", "x" * 201, None, 'a"'):
        with pytest.raises(CanvasError, match="the name of a signal"):
            run.signal(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shared.app.conf, "byrd_max_value_bytes", 100)
        with pytest.raises(ArgumentError, match="more than byrd_max_value_bytes=100"):
            run.signal("ok", "x" * 100)
    assert run.history() == before
    run.signal("ok", "x" * 2000)
    assert run.get(timeout=5) == "x" * 2000
    [sent] = [row for row in run.history() if row["event"] == "signalled"]
    assert sent["detail"]["payload"] is None  # the history is for people: this one is in the step
    with pytest.raises(IllegalTransitionError, match="a signal needs a run that has not ended"):
        run.signal("ok")


WRONG = enumerate(
    [
        byrd.sleep,
        lambda: byrd.sleep(1, until=datetime.now(UTC)),
        lambda: byrd.sleep(-1),
        lambda: byrd.sleep(float("nan")),
        lambda: byrd.sleep(1e10),
        lambda: byrd.sleep(True),
        lambda: byrd.sleep("1"),  # type: ignore[arg-type]
        lambda: byrd.sleep(until="tomorrow"),  # type: ignore[arg-type]
        lambda: byrd.wait_for("a b"),
        lambda: byrd.wait_for("a", timeout=-1),
        lambda: byrd.wait_for("a", default=1),
        lambda: byrd.wait_for("a", of=""),
        lambda: byrd.wait_for("a", of="  "),
        lambda: byrd.wait_for("a", of="x" * 201),
        lambda: byrd.wait_for("a", of="a\0b"),
        lambda: byrd.wait_for("a", of="a\nb"),
        lambda: byrd.wait_for("a", of="a\x1b[31mb"),
        lambda: byrd.wait_for("a", of="a\ud800"),
        lambda: byrd.wait_for("a", of=7),  # type: ignore[arg-type]
        lambda: byrd.wait_for("a", of=["ann"]),  # type: ignore[arg-type]
    ]
)


@pytest.mark.parametrize("wrong", [pytest.param(call, id=str(number)) for number, call in WRONG])
def test_what_is_no_wait(wrong: Any) -> None:
    with pytest.raises(CanvasError):
        wrong()


@pytest.mark.parametrize(
    "canvas",
    [
        {"task": "byrd.sleep", "kwargs": {"seconds": "soon"}},
        {"task": "byrd.sleep", "kwargs": {"until": "soon"}},
        {"task": "byrd.sleep", "kwargs": {"second": 1}},
        {"task": "byrd.wait_for", "kwargs": {}},
        {"task": "byrd.wait_for", "kwargs": {"signal": "a", "default": 1}},
        {"task": "byrd.wait_for", "kwargs": {"signal": "a", "of": ""}},
        {"task": "byrd.wait_for", "kwargs": {"signal": "a", "of": 7}},
        {"task": "byrd.wait_for", "kwargs": {"signal": "a", "whom": "ann"}},
        {"task": "byrd.sleep", "kwargs": {"seconds": 1, "of": "ann"}},
    ],
)
def test_a_wait_written_by_hand_is_looked_at(shared: Any, canvas: Any) -> None:
    with pytest.raises(CanvasError):
        shared.engine.submit({"args": [], "options": {}, "immutable": False, "subtask_type": None, **canvas})


def test_what_a_wait_cannot_take(shared: Any) -> None:
    with pytest.raises(ArgumentError, match="hands on one value"):
        shared.engine.submit(byrd.sleep(1), 1, 2)
    with pytest.raises(ArgumentError, match="takes no keyword argument 'x'"):
        shared.engine.submit(byrd.sleep(1), x=2)
    with pytest.raises(ArgumentError, match="cannot be held by JSON"):
        shared.engine.submit(byrd.wait_for("a", timeout=1, default=object()))


def test_outside_a_run_a_wait_says_where_it_belongs(shared: Any) -> None:
    calls: list[Any] = [lambda: byrd.sleep(1).delay(), lambda: byrd.sleep(1).apply().get(), byrd.wait_for("a")]
    for call in calls:
        with pytest.raises(WaitOutsideRunError, match=r"submit the canvas with engine\.submit"):
            call()
    with pytest.raises(WaitOutsideRunError):
        chain(byrd.sleep(1), shared.echo.s()).apply_async()
    with pytest.raises(WaitOutsideRunError):
        chain(shared.echo.s(1), byrd.sleep(1), shared.echo.s()).apply().get()


def test_in_a_plain_chain_on_a_worker_it_is_the_wait_that_fails(shared: Any) -> None:
    shared.app.set_current()
    result = chain(shared.echo.s(1), byrd.sleep(1)).apply_async()
    with pytest.raises(WaitOutsideRunError):
        result.get(timeout=10)
    assert result.parent.get(timeout=10) == 1


def test_celery_sees_a_wait_as_pending(shared: Any) -> None:
    run = shared.engine.submit(byrd.wait_for("ok"))
    result = shared.app.AsyncResult(run.steps()[0].id)
    assert result.state == "PENDING"
    run.signal("ok", 3)
    assert result.get(timeout=10) == 3


# -- tasks that give their slot back -----------------------------------------------------------------


def given_back(run: Any, signal: str | None) -> Any:
    """Wait until the run's only step has given its slot back, for a time or a signal; return it."""

    def look() -> Any:
        [step] = run.steps()
        later = step.status == "ready" and step.run_at > datetime.now(UTC)
        return step if later and step.signal == signal else None

    return wait_until(look, what=lambda: f"{signal}: {run.steps()}")


def test_a_task_that_waits_holds_no_slot(shared: Any, shared_cluster: Cluster) -> None:
    run = shared.engine.submit(shared.negotiate.s(1.0))
    step = given_back(run, None)
    assert (step.worker_id, step.sends) == (None, 0)
    step = given_back(run, "offer")
    assert step.run_at.year == 9999
    assert [(w.run_id, w.of, w.until) for w in shared.engine.waiting(signal="off*")] == [(run.id, "the buyer", None)]
    [said] = run.why()
    assert "waits for the signal 'offer' of the buyer since" in said
    assert f"`byrd signal {run.id[:8]} offer [JSON]` sends it" in said
    shared_cluster.rows("SELECT byrd.signal(%s, 'offer', '1')", run.id)
    wait_until(lambda: "signal_delivered" in [row["event"] for row in run.history()])
    given_back(run, "offer")
    run.signal("offer", 2)
    result = run.get(timeout=30)
    assert (result["offers"], result["other"]) == ([1, 2], "none")
    assert result["attempt"] == 5
    assert {row["event"] for row in run.history()} >= {"handed_back", "signalled", "signal_delivered"}
    with shared_cluster.redis() as redis:
        assert redis.llen("celery") == 0


def test_a_task_has_the_signals_that_came_before(shared: Any) -> None:
    run = shared.engine.submit(shared.negotiate.s(0))
    for offer in (1, 2):
        run.signal("offer", offer)
    run.signal("other", "yes")
    result = run.get(timeout=30)
    assert (result["offers"], result["other"]) == ([1, 2], "yes")


def test_a_task_whose_signal_does_not_come_fails_and_may_wait_anew(shared: Any) -> None:
    run = shared.engine.submit(shared.negotiate.s(0, timeout=0.5))
    with pytest.raises(SignalTimeoutError, match=r"the signal 'offer' of the buyer did not come within 0\.5 s"):
        run.get(timeout=30)
    assert run.wait(timeout=5) == "failed"
    run.retry()
    for offer in (1, 2):
        run.signal("offer", offer)
    assert run.get(timeout=30)["offers"] == [1, 2]


def test_a_task_that_waits_can_be_paused_and_cancelled(shared: Any) -> None:
    run = shared.engine.submit(shared.negotiate.s(0))
    given_back(run, "offer")
    run.pause()
    run.signal("offer", 1)
    time.sleep(0.7)
    assert run.steps()[0].status == "ready"
    run.resume()
    wait_until(lambda: "signal_delivered" in [row["event"] for row in run.history()])
    given_back(run, "offer")
    run.cancel()
    assert run.status == "cancelled"


def test_a_task_sleeps_until_a_time(shared: Any) -> None:
    until = datetime.now(UTC) + timedelta(seconds=1.5)
    run = shared.engine.submit(shared.sleep_until.s(until.isoformat()))
    given_back(run, None)
    assert datetime.fromisoformat(run.get(timeout=30)) >= until


def test_a_task_cannot_wait_in_a_transaction_or_outside_a_run(shared: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot wait in a transaction"):
        shared.engine.submit(shared.wait_in_a_transaction.s()).get(timeout=30)
    with pytest.raises(CheckpointError, match="as a step of a run"):
        shared.sleep_until.apply(args=("2020-01-01",)).get()


def test_the_relay_alone_ends_waits(cluster: Cluster) -> None:
    """Without any worker, and with a Redis that was flushed: no message is involved."""
    shop = cluster.app(APP)
    run = shop.engine.submit(chain(byrd.sleep(0.5), byrd.wait_for("sql", timeout=30), byrd.sleep(0)))
    with cluster.redis() as redis:
        redis.flushdb()
    relay = subprocess.Popen(
        [sys.executable, "-c", "from byrd.cli import main; main()", "-A", APP, "relay"], cwd=ROOT, env=cluster.env
    )
    try:
        awaited(run, "sql")
        cluster.rows("SELECT byrd.signal(%s, 'sql', '[1]')", run.id)
        assert run.wait(timeout=10) == "succeeded"
    finally:
        relay.terminate()
        relay.wait(10)
    assert run.get() == [1]
    assert [s.attempt for s in run.steps()] == [0, 0, 0]


@pytest.mark.timeout(240)
def test_a_thousand_sleeping_runs_cost_nothing_and_wake_in_time(cluster: Cluster) -> None:
    """All are due at the same moment, and their sleeps end within 2 s of it.

    When what follows them starts is printed only: that is for how long the workers' processes have to do, and depends
    on what else the machine does.  It was 0.9 s on two idle cores.
    """
    shop = cluster.app(APP)
    for _ in range(2):
        cluster.worker(APP)
    due = datetime.now(UTC) + timedelta(seconds=SLEEP)
    shop.engine.submit_many(chain(byrd.sleep(until=due), shop.echo.si(number)) for number in range(1000))
    with cluster.redis() as redis:
        assert redis.llen("celery") == 0
    assert cluster.rows("SELECT count(*) FROM byrd.steps WHERE status IN ('ready', 'running')") == [(0,)]
    # The workers are free for others meanwhile.
    assert shop.engine.submit(shop.echo.s(-1)).get(timeout=5) == -1
    assert cluster.rows("SELECT count(*) FROM byrd.steps WHERE status = 'waiting'") == [(1000,)]
    done = "SELECT count(*) FROM byrd.runs WHERE status = 'succeeded'"
    wait_until(lambda: cluster.rows(done) == [(1001,)], timeout=SLEEP + 60, what="the last run's end")
    [(earliest, latest, last)] = cluster.rows(
        """SELECT min(w.finished_at - w.run_at), max(w.finished_at - w.run_at), max(s.started_at - w.run_at)
             FROM byrd.steps w JOIN byrd.steps s ON s.run_id = w.run_id AND s.after = w.no WHERE w.kind = 'wait'"""
    )
    found = f"1,000 runs woke {earliest} to {latest} after their time; the last went on {last} after it"
    print(found)  # noqa: T201 - shown by pytest -rP
    assert timedelta(0) <= earliest, found
    assert latest < timedelta(seconds=2), found
