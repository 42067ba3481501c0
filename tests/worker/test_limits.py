"""Limits over the whole cluster on real workers: what passes, who waits, and what faults do to it."""

from __future__ import annotations

import os
import pickle
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, group

import byrd
from byrd.errors import LimitError, LimitKeyError
from byrd.limits import check_declaration, key_of
from byrd.worker.bootstep import _shares
from tests.cluster import Cluster, wait_until
from tests.invariants import check_database

WORKERS = int(os.environ.get("BYRD_LIMIT_WORKERS", "4"))
APP = "tests.apps.limited"


@pytest.fixture
def limited(cluster: Cluster) -> Any:
    app = cluster.app(APP)
    cluster.rows(app.WITNESS)
    return app


def starts(cluster: Cluster, what: str) -> list[float]:
    """When the calls began, in seconds by Postgres's clock, since the first."""
    sql = "SELECT extract(epoch FROM at - min(at) OVER ())::float8 FROM witness WHERE what = %s ORDER BY at"
    return [row[0] for row in cluster.rows(sql, what)]


def values(cluster: Cluster, what: str) -> list[str]:
    """What the calls were called with, in the order in which they began."""
    return [row[0] for row in cluster.rows("SELECT value FROM witness WHERE what = %s ORDER BY at", what)]


def most_at_once(cluster: Cluster, what: str) -> int:
    found = cluster.rows("SELECT max(at_once) FROM witness WHERE what = %s", what)
    return int(found[0][0] or 0)


def waiting(run: Any) -> bool:
    return any("for the limit" in reason for reason in run.why())


# -- what passes -----------------------------------------------------------------------------------


def test_20_a_second_over_several_workers_are_20_a_second(cluster: Cluster, limited: Any) -> None:
    for _ in range(WORKERS):
        cluster.worker(APP, concurrency=1)
    for left in reversed(range(3)):  # on a machine that is busy with other things, what may start starts late
        cluster.rows("DELETE FROM witness RETURNING 1")
        run = limited.engine.submit(group(limited.often.s(n) for n in range(140)))
        assert run.get(timeout=60) == list(range(140))
        began = starts(cluster, "often")
        # The first second is that in which the 140 messages ask, and are told to wait.
        whole = [sum(second <= at < second + 5 for at in began) for second in (0, 1)]
        most = max(sum(at <= other < at + 1 for other in began) for at in began)
        if all(95 <= count <= 105 for count in whole) and most <= 26:
            break
        assert left, (whole, most, began)
    check_database(cluster.database_url)


def test_one_at_a_time_of_each_key_by_an_argument_from_before(cluster: Cluster, limited: Any) -> None:
    cluster.worker(APP, concurrency=4)
    run = limited.engine.submit(group(chain(limited.echo.s(t), limited.serve.s(n)) for n in range(20) for t in "ab"))
    assert run.get(timeout=60) == ["a", "b"] * 20
    assert [most_at_once(cluster, f"serve {t}") for t in "ab"] == [1, 1]
    check_database(cluster.database_url)


def test_those_who_wait_for_a_place_are_served_in_order(cluster: Cluster, limited: Any) -> None:
    cluster.worker(APP)
    limited.engine.limits.set(f"{APP}.serve", concurrency=0)
    runs = []
    for n in range(10):
        runs.append(limited.engine.submit(limited.serve.s("a", n)))
        wait_until(lambda: waiting(runs[-1]))
    limited.engine.limits.reset(f"{APP}.serve")
    for run in runs:
        run.get(timeout=30)
    assert values(cluster, "serve a") == [str(n) for n in range(10)]


def test_a_tenant_with_1_000_steps_does_not_starve_one_with_10(cluster: Cluster, limited: Any) -> None:
    cluster.worker(APP, concurrency=4)
    big = limited.engine.submit(group(limited.serve.s("big", n) for n in range(1000)))
    wait_until(lambda: values(cluster, "serve big"))
    began = time.monotonic()
    small = limited.engine.submit(group(limited.serve.s("small", n) for n in range(10)))
    assert small.get(timeout=60) == ["small"] * 10
    took = time.monotonic() - began
    done = len(values(cluster, "serve big"))
    assert done < 900
    assert took < 15
    assert most_at_once(cluster, "serve big") == 1
    limited.engine.limits.set(f"{APP}.serve", concurrency=None)
    assert big.get(timeout=120) == ["big"] * 1000


# -- faults ----------------------------------------------------------------------------------------


def test_three_at_once_are_never_four_whatever_is_killed(cluster: Cluster, limited: Any) -> None:
    workers = [cluster.worker(APP, concurrency=3, env={"TEST_LEASE_SECONDS": "2"}) for _ in range(2)]
    run = limited.engine.submit(group(limited.few.s(n) for n in range(150)))
    for kills in range(6):
        seen = len(values(cluster, "few"))
        wait_until(lambda seen=seen: len(values(cluster, "few")) > seen + 8)  # type: ignore[misc]
        worker = workers[kills % 2]
        if kills % 3 == 2:
            worker.kill()
            worker.restart()
        else:
            rows = cluster.rows("SELECT pid FROM byrd.steps WHERE status = 'running' AND limit_slot IS NOT NULL")
            for (pid,) in rows:
                os.kill(pid, signal.SIGKILL)
    assert run.get(timeout=120) == list(range(150))
    assert most_at_once(cluster, "few") == 3
    check_database(cluster.database_url)


def test_the_place_of_a_dead_worker_is_free_after_its_lease(cluster: Cluster, limited: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "go")
    doomed = cluster.worker(APP, env={"TEST_LEASE_SECONDS": "2"})
    held = limited.engine.submit(limited.hold.s(None, path))
    wait_until(lambda: values(cluster, f"hold {path}"))
    second = limited.engine.submit(limited.hold.s(None, path))
    wait_until(lambda: waiting(second))
    doomed.kill()
    cluster.worker(APP, env={"TEST_LEASE_SECONDS": "2"})
    wait_until(lambda: len(values(cluster, f"hold {path}")) == 2, timeout=10)
    assert most_at_once(cluster, f"hold {path}") == 1
    (tmp_path / "go").touch()
    assert second.get(timeout=30) == 1  # it has waited without an attempt
    assert held.get(timeout=30) == 2


def test_a_flush_of_redis_changes_no_limit(cluster: Cluster, limited: Any) -> None:
    cluster.worker(APP)
    run = limited.engine.submit(group(limited.often.s(n) for n in range(120)))
    for seen in (10, 40):
        wait_until(lambda seen=seen: len(values(cluster, "often")) > seen)  # type: ignore[misc]
        with cluster.redis() as client:
            client.flushdb()
    assert sorted(run.get(timeout=60)) == list(range(120))
    began = starts(cluster, "often")
    # Whatever was lost comes later, and then no faster than the limit plus one window.
    assert max(sum(at <= other < at + 1 for other in began) for at in began) <= 42
    assert began[-1] >= 5.5
    check_database(cluster.database_url)


# -- changed at run time ---------------------------------------------------------------------------


def test_a_limit_is_changed_while_steps_wait(cluster: Cluster, limited: Any) -> None:
    cluster.worker(APP, concurrency=4)
    name = f"{APP}.often"
    row = limited.engine.limits.set(name, rate="1/m", by="ann")
    assert (row.name, row.rate, row.declared_rate, row.set_by) == (name, "1/m", "20/s", "ann")
    run = limited.engine.submit(group(limited.often.s(n) for n in range(40)))
    wait_until(lambda: limited.engine.limits.list(name)[0].waiting == 39)
    wait_until(lambda: values(cluster, "often"))  # whose turn it is may take its time to start
    assert len(values(cluster, "often")) == 1
    limited.engine.limits.set(name, rate=None)
    changed = time.monotonic()
    wait_until(lambda: len(values(cluster, "often")) > 2, timeout=5)
    assert time.monotonic() - changed < 1.5
    assert run.get(timeout=30) == list(range(40))
    assert limited.engine.limits.reset(name).rate == "20/s"


def test_a_host_that_wants_a_pause_gets_it_from_all_runs(cluster: Cluster, limited: Any) -> None:
    cluster.worker(APP)
    first = limited.engine.submit(limited.fetch.s("busy", 0))
    wait_until(lambda: [row for row in first.history() if row["event"] == "retried"])
    [reason] = first.why()
    assert "is tried again at" in reason
    assert "LimitedError: 429 Too Many Requests" in reason
    second = limited.engine.submit(limited.fetch.s("busy", 1))
    assert limited.engine.submit(limited.fetch.s("free", 1)).get(timeout=10) == ["free", 1, 0]
    wait_until(lambda: any("it is parked until" in reason for reason in second.why()))
    assert second.get(timeout=30) == ["busy", 1, 0]
    assert first.get(timeout=30) == ["busy", 0, 0]  # and it has cost no retry
    assert min(starts(cluster, "fetch busy")[1:]) >= 2
    assert limited.engine.submit(limited.tried.s()).get(timeout=30) == [3, 0]
    check_database(cluster.database_url)


def test_a_pause_holds_back_one_key_on_all_workers_and_no_process_of_theirs(
    cluster: Cluster, limited: Any, tmp_path: Path
) -> None:
    """Each process of two workers is free for another key, while four runs wait for the pause of one to be over."""
    for _ in range(2):
        cluster.worker(APP, concurrency=1)
    told = limited.engine.submit(limited.fetch.s("busy", 0, pause="12"))
    wait_until(lambda: [row for row in told.history() if row["event"] == "retried"])
    others = [limited.engine.submit(limited.fetch.s("busy", n)) for n in (1, 2, 3)]
    for run in others:
        wait_until(lambda run=run: any("it is parked until" in reason for reason in run.why()))  # type: ignore[misc]
    paths = [str(tmp_path / name) for name in ("one", "two")]
    held = [limited.engine.submit(limited.hold.s(None, path)) for path in paths]
    for path in paths:  # both at once
        wait_until(lambda path=path: values(cluster, f"hold {path}"))  # type: ignore[misc]
    running = cluster.rows("SELECT count(DISTINCT worker_id) FROM byrd.steps WHERE status = 'running'")
    for path in paths:
        Path(path).touch()
    assert [run.get(timeout=30) for run in held] == [1, 1]
    assert values(cluster, "fetch busy") == ["0"], "the pause was over too early for this test to say anything"
    assert running == [(2,)]
    assert [run.get(timeout=60) for run in (told, *others)] == [["busy", n, 0] for n in range(4)]
    assert min(starts(cluster, "fetch busy")[1:]) >= 12
    assert [run.steps()[0].attempt for run in (told, *others)] == [2, 1, 1, 1]
    check_database(cluster.database_url)


def test_an_item_that_wants_a_pause_gives_the_slot_back(cluster: Cluster, limited: Any) -> None:
    cluster.worker(APP, concurrency=1)
    # One of them within the batch, and one at the further try of an item that has failed.
    run = limited.engine.submit(limited.crawl.s("plain", 8, {"3": ["4"], "5": ["no", "1"]}))
    wait_until(lambda: [row for row in run.history() if row["event"] == "retried"])
    other = limited.engine.submit(limited.crawl.s("plain", 0, {}))
    assert limited.engine.submit(limited.free.s(1)).get(timeout=30) == 1
    assert values(cluster, "crawl plain") == ["0", "1", "2", "3"]
    wait_until(lambda: any("it is parked until" in reason for reason in other.why()))
    assert run.get(timeout=30) == [8, 0, 3, 0]
    assert values(cluster, "crawl plain") == ["0", "1", "2", "3", "3", "4", "5", "6", "7", "5", "5"]
    assert other.get(timeout=30)[:2] == [0, 0]
    check_database(cluster.database_url)


@pytest.mark.parametrize("options", [{"parallelism": 3}, {"timeout": 30}])
def test_so_does_one_of_a_batch_in_threads(cluster: Cluster, limited: Any, options: dict[str, Any]) -> None:
    cluster.worker(APP, concurrency=1)
    says = {"0": ["1"], "6": ["1"], "9": ["no", "1"]}
    run = limited.engine.submit(limited.crawl.s("threads", 80, says, batch_size=80, **options))
    completed, failed, _, retries = run.get(timeout=60)
    assert (completed, failed, retries) == (80, 0, 0)
    asked = values(cluster, "crawl threads")
    # Some that come soon after it are: a thread may be slower than the others.
    assert {asked.count(str(n)) for n in range(60, 80)} == {1}, "what comes after it is not asked for"
    check_database(cluster.database_url)


def test_a_pause_is_seconds_a_timedelta_or_what_the_header_says() -> None:
    def pause(said: Any) -> float:
        return byrd.LimitedError("429", retry_after=said).retry_after

    assert [pause(said) for said in (2, timedelta(minutes=1), "120", " 7 ", "1.5")] == [2, 60, 120, 7, 1.5]
    # Uncounted as it is, it never asks for a loop.
    assert [pause(said) for said in (0.5, 0, 0.0, timedelta(0), "0", "0.2")] == [1] * 6
    moment = datetime.now(UTC) + timedelta(seconds=100)
    for form in ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"):
        assert 80 < pause(moment.strftime(form)) <= 100, form
    assert pause("Wed, 21 Oct 2015 07:28:00 GMT") == 1
    assert pause("9" * 400) == pause("Fri, 31 Dec 9999 23:59:59 GMT") == 1e8
    # It did ask for a pause: the task does not fail over how.
    for said in (None, "", "soon", "-1", "120, 60", "٣", "Wed, 99 Foo 2015", "Wed, 21 Oct 2015 99:28:00 GMT"):
        assert pause(said) == 30, said
    for wrong in (-1, float("nan"), 1e9, timedelta(days=-1), True, b"3", [3]):
        with pytest.raises(ValueError, match="is no number of seconds"):
            pause(wrong)
    found = pickle.loads(pickle.dumps(byrd.LimitedError("429", retry_after="9")))
    assert (str(found), found.retry_after) == ("429", 9)
    assert str(byrd.LimitedError(retry_after="9")) == "to be tried again after 9 s"


# -- what why says ---------------------------------------------------------------------------------


def test_why_says_which_limit_of_which_key_until_when(cluster: Cluster, limited: Any, tmp_path: Path) -> None:
    cluster.worker(APP)
    path = str(tmp_path / "go")
    held = limited.engine.submit(limited.hold.s(None, path))
    wait_until(lambda: values(cluster, f"hold {path}"))
    other = limited.engine.submit(limited.touch.s(path))  # another task, the same limit
    wait_until(lambda: waiting(other))
    third = limited.engine.submit(limited.touch.s(path))
    wait_until(lambda: waiting(third))
    most = "(at most 1 at once, 1 in use) until the one that runs ends"
    said = f"Step 0 (tests.apps.limited.touch) waits for the limit 'files' of '{path}' {most}"
    assert other.why() == [f"{said}."]
    assert third.why() == [f"{said}; 1 step waits before it."]
    (tmp_path / "go").touch()
    assert [run.get(timeout=30) for run in (held, other, third)] == [1, path, path]

    limited.engine.limits.set(f"{APP}.often", rate="1/h", burst=2)
    run = limited.engine.submit(group(limited.often.s(n) for n in range(4)))
    wait_until(lambda: len(values(cluster, "often")) == 2)
    wait_until(lambda: all("for the limit" in reason for reason in run.why()) and len(run.why()) == 2)
    for reason in run.why():
        assert f"waits for the limit '{APP}.often' (1/h, burst 2) until " in reason
    assert sum("; 1 step waits before it." in reason for reason in run.why()) == 1
    assert any("(in 1 h" in reason or "(in 59 min" in reason for reason in run.why())
    run.cancel()


# -- declarations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "a limit needs a rate, a concurrency, or both"),
        ({"rate": "fast"}, "the rate 'fast' is not like 10/s"),
        ({"rate": "0/s"}, "the rate '0/s' is not like 10/s"),
        ({"rate": 10}, "the rate 10 is not like 10/s"),
        ({"rate": "1/s", "burst": 0}, "burst=0 is not a whole number from 1"),
        ({"concurrency": 0}, "concurrency=0 is not a whole number from 1"),
        ({"concurrency": True}, "concurrency=True is not a whole number"),
        ({"concurrency": 1, "burst": 2}, "a limit without a rate has no burst"),
        ({"concurrency": 1, "name": "a b"}, "the name of a limit is 1 to 200 letters"),
        ({"concurrency": 1, "key": "a.b"}, "is neither the name of an argument nor a function"),
    ],
)
def test_what_cannot_be_a_limit_is_refused_where_it_is_written(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LimitError, match=said):
        byrd.Limit(**options)


def declare(limit: Any, run: Any = lambda host, *, port=80: None, name: str = "a", others: Any = None) -> None:
    """Declare a limit for a task that is no more than this."""
    task = type("Task", (), {"name": name, "byrd_limit": limit, "run": staticmethod(run)})()
    check_declaration(task, others or {})


def test_what_a_task_cannot_declare_is_refused_when_it_is_registered() -> None:
    with pytest.raises(LimitError, match=r"the task 'a': byrd_limit='10/s' is no byrd\.Limit"):
        declare("10/s")
    with pytest.raises(LimitError, match="limited by 'tenant', but has no such argument; it has host, port"):
        declare(byrd.Limit(concurrency=1, key="tenant"))
    declare(byrd.Limit(concurrency=1, key="port"))
    declare(byrd.Limit(concurrency=1, key="tenant"), run=lambda **kwargs: None)
    shared = byrd.Limit(concurrency=1, name="shared")
    declare(shared, others={"b": byrd.Limit(concurrency=1, name="shared", key="other")})
    with pytest.raises(LimitError, match="the tasks 'a' and 'b' share the limit 'shared', but declare it differently"):
        declare(shared, others={"b": byrd.Limit(concurrency=2, name="shared")})


def test_an_app_refuses_what_its_task_cannot_declare(limited: Any) -> None:
    def call(host: str) -> None:
        """A task."""

    with pytest.raises(LimitError, match="has no such argument"):
        limited.app.task(byrd_limit=byrd.Limit("1/s", key="nobody"), name="bad", lazy=False, shared=False)(call)
    assert "bad" not in limited.app.tasks


def test_the_key_of_a_call() -> None:
    def run(host: str, port: int = 80, **rest: Any) -> None:
        """A task."""

    by_name = byrd.Limit("1/s", key="port")
    assert key_of(by_name, run, ["a"], {}) == "80"
    assert key_of(by_name, run, ["a", 8080], {}) == "8080"
    assert key_of(byrd.Limit("1/s", key="x"), run, ["a"], {"x": "y"}) == "y"
    assert key_of(byrd.Limit("1/s", key=lambda host, **_: f"{host}!"), run, ["a"], {"port": 1}) == "a!"
    assert key_of(byrd.Limit("1/s"), run, ["a"], {}) == ""
    assert key_of(byrd.Limit("1/s", key="port"), run, ["a", None], {}) is None  # not limited
    for bad in ([1], b"a", "a\0", "\ud800", "x" * 501, float("nan")):
        with pytest.raises(LimitKeyError):
            key_of(byrd.Limit("1/s", key="host"), run, [bad], {})
    with pytest.raises(LimitKeyError, match="has no key for this call: TypeError: missing"):
        key_of(byrd.Limit("1/s", key="host"), run, [], {})


def test_a_step_without_a_key_fails_and_one_with_none_is_free(cluster: Cluster, limited: Any) -> None:
    cluster.worker(APP)
    bad = r"has a key that is neither a text nor a number: \[1\]"
    with pytest.raises(LimitKeyError, match=bad):  # known when it is submitted
        limited.engine.submit(chain(limited.echo.s(1), limited.strange.si([1])))
    with pytest.raises(LimitKeyError, match=bad):
        limited.engine.submit(chain(limited.echo.s([1]), limited.strange.s())).get(timeout=30)
    assert limited.engine.submit(limited.strange.s(None)).get(timeout=30) is None
    assert limited.engine.submit(limited.strange.s(7)).get(timeout=30) == 7


def test_outside_a_run_a_limit_is_none_and_a_pause_a_retry_of_celerys(limited: Any) -> None:
    assert limited.echo.s(1).apply().get() == 1
    app = Celery("plain", set_as_current=False)

    def one() -> int:
        """A task."""
        return 1

    assert app.task(byrd_limit=byrd.Limit("1/h"), lazy=False, shared=False)(one)() == 1


def test_a_step_with_a_limit_is_run_by_its_own_message_only(limited: Any) -> None:
    plan = limited.engine.runtime.plan(group(limited.often.s(1), limited.echo.s(1), limited.serve.s("a")))
    assert [(step.solo, step.limit_name, step.limit_key) for step in plan.steps if step.task] == [
        (True, f"{APP}.often", ""),
        (False, None, None),
        (True, f"{APP}.serve", "a"),
    ]
    assert f"{APP}.echo" in _shares(limited.app)
    assert f"{APP}.often" not in _shares(limited.app)  # nor one that was submitted before its task had a limit
