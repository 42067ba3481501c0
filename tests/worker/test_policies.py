"""Retry policies on real workers: what is tried again, when, how often, and by whose word."""

from __future__ import annotations

import email.utils
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import TimeLimitExceeded
from celery import chain, group

import byrd
from byrd.errors import RetryPolicyError, TimeoutPolicyError
from byrd.policies import check_declaration
from tests.cluster import Cluster, wait_until
from tests.invariants import check_database

APP = "tests.apps.policies"
SOON = byrd.Retry(max_attempts=3, first=0.05, factor=1)


@pytest.fixture
def notes(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tasks leave what they see."""
    monkeypatch.setenv("NOTES", str(tmp_path))
    return tmp_path


@pytest.fixture
def app(cluster: Cluster, notes: Path) -> Any:
    return cluster.app(APP)


def noted(notes: Path, name: str) -> list[dict[str, Any]]:
    path = notes / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- what is tried again ---------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_task_with_a_policy_is_tried_again(cluster: Cluster, app: Any, pool: str) -> None:
    cluster.worker(APP, pool=pool)
    run = app.engine.submit(app.policed.s(3))
    assert run.get(timeout=30) == [4, 3]
    retried = [row for row in run.history() if row["event"] == "retried"]
    assert len(retried) == 3
    assert all("ValueError" in str(row) for row in retried)
    check_database(cluster.database_url)


def test_the_last_error_is_the_steps_once_its_attempts_are_used_up(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    run = app.engine.submit(app.policed.s(99))
    with pytest.raises(ValueError, match="no"):
        run.get(timeout=30)
    assert run.steps()[0].attempt == 4
    assert "in attempt 4" in run.why()[0]
    run.retry()  # by an operator: it begins anew
    assert run.wait(timeout=30) == "failed"
    assert run.steps()[0].attempt == 8


@pytest.mark.parametrize("error", ["key", "fatal"])
def test_what_is_never_tried_again_fails_at_once(cluster: Cluster, app: Any, error: str) -> None:
    cluster.worker(APP)
    run = app.engine.submit(app.policed.s(99, error))
    assert run.wait(timeout=30) == "failed"
    assert run.steps()[0].attempt == 1


@pytest.mark.parametrize(("error", "least"), [("later", 0.7), ("busy", 0.7), ("soon", 0.0), ("nonsense", 0.05)])
def test_an_error_may_say_when(cluster: Cluster, app: Any, notes: Path, error: str, least: float) -> None:
    cluster.worker(APP)
    assert app.engine.submit(app.policed.s(1, error)).get(timeout=30) == [2, 1]
    first, second = [row["at"] for row in noted(notes, "tried")]
    assert second - first >= least


def test_the_budget_ends_it(cluster: Cluster, app: Any, notes: Path) -> None:
    cluster.worker(APP)
    policy = byrd.Retry(max_attempts=None, budget=1.5, first=0.3, factor=1, jitter=False)
    run = app.engine.submit(app.plain.s(99).set(byrd_retry=policy))
    assert run.wait(timeout=30) == "failed"
    began = [row["at"] for row in noted(notes, "tried")]
    assert 2 <= len(began) <= 6
    assert began[-1] - began[0] <= 1.9
    # A pause that the budget does not allow is not begun.
    run = app.engine.submit(app.plain.s(99, "later").set(byrd_retry=byrd.Retry(budget=0.5)))
    assert run.wait(timeout=30) == "failed"
    assert run.steps()[0].attempt == 1


def test_a_result_that_json_cannot_hold_is_not_tried_again(cluster: Cluster, app: Any, notes: Path) -> None:
    cluster.worker(APP)
    assert app.engine.submit(app.unjsonable.s()).wait(timeout=30) == "failed"
    assert len(noted(notes, "unjsonable")) == 1


# -- whose word counts -----------------------------------------------------------------------------


def test_of_the_task_of_the_signature_and_of_submit(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    one = byrd.Retry(max_attempts=1)
    assert app.engine.submit(app.plain.s(2), retry=SOON).get(timeout=30) == [3, 2]
    assert app.engine.submit(app.plain.s(2).set(byrd_retry=SOON), retry=one).get(timeout=30) == [3, 2]
    assert app.engine.submit(app.policed.s(2), retry=one).get(timeout=30) == [3, 2]  # the task's own comes first
    assert app.engine.submit(app.policed.s(1).set(byrd_retry=one)).wait(timeout=30) == "failed"
    assert app.engine.submit(app.policed.s(1).set(byrd_retry=None)).wait(timeout=30) == "failed"
    assert app.engine.submit(app.plain.s(1)).wait(timeout=30) == "failed"
    # What takes a step's place has its default.
    assert app.engine.submit(app.replacing.s(), retry=SOON).get(timeout=30) == [2, 1]
    runs = app.engine.submit_many([app.plain.s(1)] * 2, retry=SOON)
    assert [run.get(timeout=30) for run in runs] == [[2, 1]] * 2

    @app.engine.workflow("test.retried", retry=SOON)
    def retried() -> Any:
        return app.plain.s(1)

    assert retried.submit().get(timeout=30) == [2, 1]
    assert retried.submit(retry=one).wait(timeout=30) == "failed"
    check_database(cluster.database_url)


def test_what_celery_is_told_to_retry_it_retries_in_its_own_way(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    assert app.engine.submit(app.both.s(1)).get(timeout=30) == [2, 1]
    run = app.engine.submit(app.both.s(2))  # max_retries=1: the policy would allow three
    assert run.wait(timeout=30) == "failed"
    assert run.steps()[0].attempt == 2
    assert app.engine.submit(app.both.s(3, "busy")).get(timeout=30) == [4, 3]  # not one of autoretry_for
    assert app.engine.submit(app.by_hand.s(1)).get(timeout=30) == [2, 1]
    run = app.engine.submit(app.by_hand.s(2))
    assert run.wait(timeout=30) == "failed"
    assert run.steps()[0].attempt == 2


def test_a_policy_is_frozen_when_a_run_is_submitted(cluster: Cluster, app: Any) -> None:
    run = app.engine.submit(app.policed.s(3))
    app.policed.byrd_retry = byrd.Retry(max_attempts=1)
    assert app.engine.runtime.plan(app.policed.s(3)).steps[0].options["byrd_retry"]["max_attempts"] == 1
    cluster.worker(APP)
    assert run.get(timeout=30) == [4, 3]


def test_a_signature_with_a_policy_is_json_and_an_ordinary_call_leaves_it_alone(cluster: Cluster, app: Any) -> None:
    cluster.worker(APP)
    sig = app.plain.s(1).set(byrd_retry=SOON)
    assert app.engine.submit(json.loads(app.app.backend.encode(dict(sig)))).get(timeout=30) == [2, 1]
    assert app.echo.s(7).set(byrd_retry=SOON).apply().get() == 7


def test_a_compensation_has_the_policy_that_it_declares(cluster: Cluster, app: Any, notes: Path) -> None:
    cluster.worker(APP)
    run = app.engine.submit(chain(app.book.s("12"), app.refuse.s()))
    assert run.wait(timeout=30) == "failed"
    assert [row["number"] for row in noted(notes, "unbook")] == [1, 2, 3]
    stuck = app.engine.submit(chain(app.book.s("stuck"), app.refuse.s()))
    wait_until(lambda: stuck.status == "rollback_stuck")
    assert len(noted(notes, "unbook")) == 6
    check_database(cluster.database_url)


# -- the fast path ---------------------------------------------------------------------------------


def test_a_step_with_a_policy_needs_no_message_of_its_own(app: Any) -> None:
    plan = app.engine.runtime.plan(group(app.policed.s(0), app.plain.s(0), app.limited.s("a"), app.counting.s("a")))
    assert [step.solo for step in plan.steps if step.task] == [False, False, True, True]
    waits = app.echo.s().set(byrd_timeouts=byrd.Timeouts(schedule_to_start=60))
    assert [step.solo for step in app.engine.runtime.plan(waits).steps] == [False]


def test_a_policy_costs_a_step_that_succeeds_no_statement(cluster: Cluster, app: Any) -> None:
    """Both are run and recorded by slices, so that a chain needs as many of them with a policy as without."""
    worker = cluster.worker(APP, concurrency=1)
    for canvas in (app.plain.s(0), app.policed.s(0)):
        run = app.engine.submit(chain(canvas, *[app.echo.s().set(byrd_retry=SOON) for _ in range(20)]))
        run.get(timeout=30)
    rows = cluster.rows("SELECT count(*) FILTER (WHERE solo), count(*) FROM byrd.steps")
    assert rows == [(0, 42)]
    received = worker.log_text().count(" received")
    assert received < 12


# -- declarations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_attempts": 0}, "max_attempts=0 is not a whole number from 1"),
        ({"max_attempts": True}, "max_attempts=True is not a whole number"),
        ({"max_attempts": 2.5}, "max_attempts=2.5 is not a whole number"),
        ({"budget": 0}, "budget=0 is not a number of seconds above 0"),
        ({"budget": "1h"}, "budget='1h' is not a number of seconds"),
        ({"first": -1}, "first=-1 is not a number of seconds"),
        ({"first": float("nan")}, "first=nan is not a number of seconds"),
        ({"cap": float("inf")}, "cap=inf is not a number of seconds"),
        ({"factor": 0.5}, "factor=0.5 is not a number from 1 to 1,000"),
        ({"jitter": 1}, "jitter=1 is neither True nor False"),
        ({"never": (int,)}, "never=<class 'int'> is neither an exception's class nor the name of one"),
        ({"never": ("a b",)}, "never='a b' is neither"),
        ({"never": 7}, "never=7 are no exceptions"),
    ],
)
def test_what_cannot_be_a_policy_is_refused_where_it_is_written(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RetryPolicyError, match=said):
        byrd.Retry(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "time-outs need one of start_to_close, schedule_to_start, heartbeat"),
        ({"start_to_close": 0}, "start_to_close=0 is not a number of seconds above 0"),
        ({"schedule_to_start": "5m"}, "schedule_to_start='5m' is not a number of seconds"),
        ({"heartbeat": True}, "heartbeat=True is not a number of seconds"),
        ({"heartbeat": float("nan")}, "heartbeat=nan is not a number of seconds"),
    ],
)
def test_what_cannot_be_time_outs_is_refused_where_it_is_written(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TimeoutPolicyError, match=said):
        byrd.Timeouts(**options)


def test_what_a_task_cannot_declare_is_refused_when_it_is_registered(app: Any) -> None:
    def call() -> None:
        """A task."""

    with pytest.raises(RetryPolicyError, match=r"the task 'bad': byrd_retry=5 is no byrd\.Retry\(\.\.\.\)"):
        app.app.task(byrd_retry=5, name="bad", lazy=False, shared=False)(call)
    with pytest.raises(TimeoutPolicyError, match=r"the task 'bad': byrd_timeouts=60 is no byrd\.Timeouts\(\.\.\.\)"):
        app.app.task(byrd_timeouts=60, name="bad", lazy=False, shared=False)(call)
    assert "bad" not in app.app.tasks
    check_declaration(app.policed)


def test_what_a_signature_or_a_submit_cannot_say_is_refused_and_nothing_is_written(cluster: Cluster, app: Any) -> None:
    with pytest.raises(RetryPolicyError, match="byrd_retry='often' is no"):
        app.engine.submit(app.plain.s(1).set(byrd_retry="often"))
    with pytest.raises(RetryPolicyError, match="byrd_retry=3 is no"):
        app.engine.submit(app.plain.s(1), retry=3)
    with pytest.raises(TimeoutPolicyError, match="byrd_timeouts=3 is no"):
        app.engine.submit(app.plain.s(1).set(byrd_timeouts=3))
    assert cluster.rows("SELECT count(*) FROM byrd.runs") == [(0,)]


def test_pauses_grow_up_to_the_cap() -> None:
    policy = byrd.Retry(max_attempts=9, first=1, factor=3, cap=20, jitter=False)
    names = ("builtins.ValueError",)
    assert [policy.pause(names, tried, elapsed=0) for tried in range(1, 10)] == [1, 3, 9, 20, 20, 20, 20, 20, None]
    half = byrd.Retry(first=8, factor=1)
    assert [half.pause(names, 1, elapsed=0, chance=chance) for chance in (0.0, 0.5, 1.0)] == [4, 6, 8]
    assert byrd.Retry(max_attempts=None, factor=1000).pause(names, 900_000, elapsed=1e9) is not None
    assert byrd.Retry(cap=1).pause(names, 1, elapsed=0, own=50) == 50  # the exception's own word
    known = byrd.Retry(never=(OSError, "billiard.exceptions.TimeLimitExceeded", "ValueError"))
    assert known.never == ("builtins.OSError", "billiard.exceptions.TimeLimitExceeded", "builtins.ValueError")
    for kind in (ConnectionError, TimeLimitExceeded, UnicodeError):
        assert known.pause(byrd.policies.names_of(kind), 1, elapsed=0) is None
    assert byrd.Retry.of(json.loads(json.dumps(known.__json__()))) == known
    assert byrd.Retry.of({**known.__json__(), "of_a_later_version": 1}) == known


def test_an_error_that_carries_its_pause_is_itself_again_after_json(app: Any) -> None:
    backend = app.app.backend
    for exc in (byrd.RetryLater(2.5), byrd.RetryLater(3, "too much")):
        found, _ = backend.decoded_error(backend.encoded_error(exc))
        assert (type(found), found.retry_after, str(found)) == (byrd.RetryLater, exc.retry_after, str(exc))
    with pytest.raises(ValueError, match="retry_after=-1 is no number of seconds"):
        byrd.RetryLater(-1)


def test_the_header_may_say_the_pause_and_else_the_policy_does(app: Any) -> None:
    own_pause, backend = byrd.policies.own_pause, app.app.backend
    assert own_pause(byrd.RetryLater("120")) == 120
    assert own_pause(byrd.RetryLater(timedelta(minutes=1))) == 60
    later = byrd.RetryLater(email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True))
    assert later.retry_after == pytest.approx(90, abs=10)
    found, _ = backend.decoded_error(backend.encoded_error(later))
    assert (found.retry_after, str(found)) == (later.retry_after, str(later))  # not a pause from now on
    for said in (None, "soon"):
        later = byrd.RetryLater(said)
        assert (own_pause(later), str(later)) == (None, "to be tried again")
        found, _ = backend.decoded_error(backend.encoded_error(later))
        assert (found.retry_after, str(found)) == (None, "to be tried again")
    theirs = ValueError()
    others: list[tuple[Any, float | None]] = [("120", 120), ("soon", None), (-1, None), (True, None), (b"1", None)]
    for wanted, pause in others:
        theirs.retry_after = wanted  # type: ignore[attr-defined]
        assert own_pause(theirs) == pause
