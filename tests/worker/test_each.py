"""An each on real workers: its values, its limit, what it tolerates, and that nothing is lost whoever dies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import chain, group
from rich.console import Console

import byrd
from byrd.cli.draw import drawing
from byrd.engine.each import PAGE
from byrd.errors import ArgumentError, CanvasError, EachError, EachToleranceError, UnknownTaskError
from byrd.store import insight
from tests.cluster import Cluster, Worker, wait_until
from tests.invariants import check_database

APP = "tests.apps.each"


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def shared(module_cluster: Cluster) -> Any:
    module_cluster.worker(APP)
    return module_cluster.app(APP)


@pytest.fixture
def own(cluster: Cluster, tmp_path: Path) -> Any:
    """A cluster of the test's own, whose tasks write notes."""
    return _Own(cluster, tmp_path)


class _Own:
    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.app = cluster.app(APP)

    def worker(self, **options: Any) -> Worker:
        return self.cluster.worker(APP, env={"NOTES": str(self.folder)}, **options)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def tell(self, name: str) -> None:
        (self.folder / name).touch()

    def counts(self, run: Any) -> dict[str, int]:
        """How many items are in which state."""
        sql = "SELECT status, count(*) FROM byrd.steps WHERE run_id = %s AND kind = 'item' GROUP BY 1"
        return dict(self.cluster.rows(sql, run.id))

    def done(self) -> None:
        check_database(self.cluster.database_url)


def test_the_values_come_in_the_order_of_the_items(shared: Any) -> None:
    submit, each = shared.engine.submit, byrd.each
    run = submit(chain(shared.count.s(20), each(shared.plus.s(10, z=100), limit=3), shared.same.s()))
    assert run.get(timeout=30) == [n + 110 for n in range(20)]
    assert submit(each(shared.square.s(), over=range(5))).get(timeout=30) == [0, 1, 4, 9, 16]
    assert submit(each(shared.square.s(), over=[])).get(timeout=30) == []
    assert submit(each(shared.square.s()), [2, 3]).get(timeout=30) == [4, 9]
    assert submit(chain(group(shared.square.s(n) for n in (1, 2)), each(shared.square.s()))).get(timeout=30) == [1, 16]
    assert submit(each(shared.same.si("x"), over=[1, 2])).get(timeout=30) == ["x", "x"]
    value = [None, {"a": [1]}, "é"]
    assert submit(each(shared.same.s(), over=value)).get(timeout=30) == value


def test_an_each_among_others(shared: Any) -> None:
    submit, each = shared.engine.submit, byrd.each
    inner = each(shared.square.s(), over=[1, 2, 3])
    run = submit(chain(group(inner, shared.square.s(5)), shared.same.s()))
    assert run.get(timeout=30) == [[1, 4, 9], 25]
    run = submit(chain(shared.count.s(4), each(shared.square.s()), each(shared.plus.s(1)), byrd.sleep(0)))
    assert run.get(timeout=30) == [1, 2, 5, 10]
    linked = each(shared.square.s(), over=[3])
    linked.link(shared.same.s())
    assert submit(linked).get(timeout=30) == [9]


def test_kinds_of_tasks(shared: Any) -> None:
    submit, each = shared.engine.submit, byrd.each
    assert submit(each(shared.flaky.s(), over=range(3))).get(timeout=30) == [0, 1, 2]
    assert submit(each(shared.limited.s(), over=range(6), limit=4)).get(timeout=30) == list(range(6))
    assert submit(each(shared.remembering.s(), over=range(3))).get(timeout=30) == [1, 2, 3]
    assert submit(each(shared.inner.s(), over=[1, 2, 3], limit=2)).get(timeout=60) == [2, 5, 10]


def test_an_enumerator(shared: Any) -> None:
    submit, each = shared.engine.submit, byrd.each
    run = submit(each(shared.square.s(), over=shared.pages.s(0, 25, 10), limit=2))
    assert run.get(timeout=30) == [n * n for n in range(25)]
    run = submit(chain(shared.same.s(5), each(shared.square.s(), over=shared.pages.s(8, 2))))
    assert run.get(timeout=30) == [25, 36, 49]
    run = submit(each(shared.square.s(), over=shared.pages.s(0, 0, 2)))
    assert run.get(timeout=30) == []
    with pytest.raises(EachError, match=r"returns \(items, next_cursor\)"):
        submit(each(shared.square.s(), over=shared.bad_pages.s())).get(timeout=30)


def test_without_results(shared: Any) -> None:
    run = shared.engine.submit(byrd.each(shared.careful.s([3]), over=range(5), tolerate=0.2, results=False))
    assert run.get(timeout=30) == {"items": 5, "failed": 1}


def test_what_is_tolerated(shared: Any) -> None:
    submit, each = shared.engine.submit, byrd.each
    run = submit(chain(each(shared.careful.s([3]), over=range(5), tolerate=1), shared.same.s()))
    assert run.get(timeout=30) == [0, 1, 2, None, 4]
    assert run.wait(timeout=10) == "succeeded"
    run = submit(each(shared.careful.s([7]), over=range(20), tolerate=0.05))
    assert run.get(timeout=30)[7] is None
    run = submit(each(shared.careful.s([7]), over=range(19), tolerate=0.05))
    with pytest.raises(EachToleranceError, match=r"1 of 19 items failed, and 0 may; the first is step \d+: ValueError"):
        run.get(timeout=30)
    # A share of what an enumerator has is judged at its end.
    run = submit(each(shared.careful.s([7]), over=shared.pages.s(0, 20, 3), tolerate=0.05, limit=1))
    assert run.get(timeout=30)[7] is None
    run = submit(each(shared.careful.s([7]), over=shared.pages.s(0, 10, 3), tolerate=0.05, limit=1))
    with pytest.raises(EachToleranceError, match="1 of 10 items failed"):
        run.get(timeout=30)
    # Far too many are judged before.
    run = submit(each(shared.fail.s(), over=shared.pages.s(0, 100_000, 50), tolerate=0.05, limit=4))
    with pytest.raises(EachToleranceError, match="items so far failed, and 5 may"):
        run.get(timeout=60)
    assert len(run.steps()) < 150


def test_what_is_no_list(shared: Any) -> None:
    with pytest.raises(EachError, match="goes over the list that the step before it returns"):
        shared.engine.submit(chain(shared.square.s(2), byrd.each(shared.square.s()))).get(timeout=30)
    with pytest.raises(EachError, match="part of a run"):
        byrd.each(shared.square.s(), over=[1]).clone().type.run(task=shared.square.s(), items=[1])


def test_an_item_cannot_be_replaced(shared: Any) -> None:
    run = shared.engine.submit(byrd.each(shared.replaces_itself.s(), over=[1]))
    with pytest.raises(EachToleranceError, match="is an item of an each, which can neither be replaced"):
        run.get(timeout=30)


def test_what_is_refused_at_submit(shared: Any) -> None:
    submit, each = shared.engine.submit, byrd.each
    square = shared.square
    linked = square.s()
    linked.link(square.s())

    unknown = shared.app.signature("no.such")
    wrong: Any = 1
    cases: tuple[tuple[Callable[[], Any], type[Exception], str], ...] = (
        (lambda: each(square, over=[1]), CanvasError, "is a task, not a signature"),
        (lambda: each(5, over=[1]), CanvasError, "is the signature of a task"),
        (lambda: each(square.s(), over=5), CanvasError, "neither a list of items nor"),
        (lambda: each(square.s(), over="abc"), CanvasError, "neither a list of items nor"),
        (lambda: each(square.s(), over=[1], limit=0), CanvasError, "limit=0"),
        (lambda: each(square.s(), over=[1], limit=True), CanvasError, "limit=True"),
        (lambda: each(square.s(), over=[1], tolerate=1.0), CanvasError, "tolerate=1.0"),
        (lambda: each(square.s(), over=[1], tolerate=-1), CanvasError, "tolerate=-1"),
        (lambda: each(square.s(), over=[1], results=wrong), CanvasError, "results=1"),
        (lambda: each(square.s()), CanvasError, "goes over one list"),
        (lambda: each(chain(square.s(), square.s()), over=[1]), CanvasError, "a call of one task"),
        (lambda: each(linked, over=[1]), CanvasError, "a call of one task"),
        (lambda: each(byrd.sleep(1), over=[1]), CanvasError, "a call of one task"),
        (lambda: each(each(square.s()), over=[[1]]), CanvasError, "an item is no each of its own"),
        (lambda: each(square.s(), over=chain(square.s(), square.s())), CanvasError, "an enumerator is one task"),
        (lambda: each(shared.pay.s(), over=[1]), CanvasError, "is a pivot"),
        (lambda: each(unknown, over=[1]), UnknownTaskError, "no.such"),
        (lambda: each(square.s(), over=unknown), UnknownTaskError, "no.such"),
        (lambda: each(square.s(5), over=[1]), ArgumentError, "square"),
        (lambda: each(square.s(), over=square.s()), ArgumentError, "square"),
        (lambda: each(square.s(), over=[object()]), ArgumentError, "cannot be held by JSON"),
        (lambda: square.s(1).on_error(each(square.s())), CanvasError, "an errback cannot be an each"),
    )
    before = len(shared.engine.list(limit=1000))
    for make, error, text in cases:
        with pytest.raises(error, match=text):
            submit(make())
    assert len(shared.engine.list(limit=1000)) == before


def test_values_that_are_too_large_together(own: Any) -> None:
    own.cluster.worker(APP, env={"MOST_BYTES": "2000"})
    run = own.app.engine.submit(byrd.each(own.app.same.si("x" * 300), over=range(10)))
    with pytest.raises(EachError, match=r"the values of 10 items are .* give the each results=False"):
        run.get(timeout=30)
    run = own.app.engine.submit(byrd.each(own.app.same.si("x" * 300), over=range(10), results=False))
    assert run.get(timeout=30) == {"items": 10, "failed": 0}


def test_no_more_than_the_limit_at_once_and_no_more_rows_than_a_page(own: Any) -> None:
    for _ in range(2):
        own.worker(concurrency=2)
    run = own.app.engine.submit(byrd.each(own.app.nap.s(0.05), over=own.app.pages.s(0, 40, 5), limit=3))
    waiting = []

    def looked() -> bool:
        waiting.append(own.counts(run).get("pending", 0))
        return bool(run.status == "succeeded")

    wait_until(looked, timeout=60)
    assert run.get(timeout=0) == list(range(40))
    now = most = 0
    for line in own.lines("log"):
        now += 1 if line[0] == "+" else -1
        most = max(most, now)
    assert 2 <= most <= 3
    assert max(waiting) <= 3 + 5
    own.done()


def test_the_number_of_items_costs_a_worker_no_memory(own: Any) -> None:
    """2,000 items of 16 kB, 32 MB in all: neither they nor their values are in a process at once, nor do they wait."""
    most, page, limit = 2000, 50, 8
    worker = own.worker(concurrency=2)
    pids = [worker.pid, *worker.pids()]
    assert len(pids) == 3
    pages = own.app.large_pages.s(most, page)
    run = own.app.engine.submit(byrd.each(own.app.same.s(), over=pages, limit=limit))
    early: dict[int, int] = {}
    growth = dict.fromkeys(pids, 0)

    def looked() -> bool:
        counts = own.counts(run)
        assert sum(n for status, n in counts.items() if status != "succeeded") <= page + 2 * limit, counts
        if counts.get("succeeded", 0) >= 400:
            for pid in pids:
                now = psutil.Process(pid).memory_info().rss
                growth[pid] = max(growth[pid], now - early.setdefault(pid, now))
        return bool(run.status.final)

    wait_until(looked, timeout=120)
    found = run.get(timeout=0)
    assert found == [str(n).rjust(16384) for n in range(most)]
    assert worker.pids() == pids[1:]
    # 0.04 MB in the main process, 1.8 to 3.5 MB in the others; 12 to 15 MB if each kept the pages that it brought in.
    assert max(growth.values()) < 8 * 2**20, growth
    own.done()


def test_it_holds_no_slot_and_needs_no_message_while_its_items_run(own: Any) -> None:
    own.worker(concurrency=2)
    run = own.app.engine.submit(byrd.each(own.app.hold.s(), over=range(3), limit=2))
    wait_until(lambda: len(own.lines("begun")) == 2)
    each = wait_until(lambda: next((s for s in run.steps() if s.task == "byrd.each" and s.status == "ready"), None))
    before = each.attempt
    said = " ".join(run.why())
    assert "waits for its items: 0 of 3 items done, 2 under way" in said
    assert own.counts(run) == {"running": 2, "pending": 1}
    own.tell("go")
    assert run.get(timeout=30) == [0, 1, 2]
    assert next(s for s in run.steps() if s.task == "byrd.each").attempt == before + 1
    own.done()


def test_after_too_many_failures_nothing_starts_and_what_runs_is_awaited(own: Any) -> None:
    own.worker(concurrency=2)
    canvas = byrd.each(own.app.hold.s(), over=range(1, 10), limit=2)
    run = own.app.engine.submit(canvas)
    wait_until(lambda: len(own.lines("begun")) == 2)
    first, second = (s for s in run.steps() if s.kind == "item" and s.status == "running")
    own.app.app.control.revoke(first.id, terminate=True, signal="SIGTERM")
    wait_until(lambda: own.counts(run).get("skipped") == 7)
    assert run.status == "running"
    own.tell("go")
    with pytest.raises(EachToleranceError, match="1 of 9 items failed"):
        run.get(timeout=30)
    assert run.wait(timeout=30) == "failed"
    assert own.counts(run) == {"cancelled": 1, "skipped": 7, "succeeded": 1}
    assert len(own.lines("begun")) == 2
    assert second.id in {s.id for s in run.steps() if s.status == "succeeded"}
    own.done()


def test_after_too_many_failures_an_item_that_sleeps_is_not_awaited(own: Any) -> None:
    own.worker(concurrency=2)
    run = own.app.engine.submit(byrd.each(own.app.doze.s(), over=[0, 1, 2], limit=2))
    asleep = "SELECT 1 FROM byrd.steps WHERE run_id = %s AND kind = 'item' AND status = 'ready' AND attempt = 1"
    wait_until(lambda: own.cluster.rows(asleep, run.id))
    own.tell("asleep")
    with pytest.raises(EachToleranceError, match="1 of 3 items failed"):
        run.get(timeout=30)
    assert own.counts(run) == {"failed": 1, "cancelled": 1, "skipped": 1}
    own.done()


def test_a_retry_keeps_what_succeeded(own: Any) -> None:
    own.worker()
    bad = [3, PAGE + 2]
    run = own.app.engine.submit(
        chain(byrd.each(own.app.careful.s(bad), over=range(PAGE + 5), tolerate=1), own.app.same.s())
    )
    with pytest.raises(EachToleranceError, match="2 of 505"):
        run.get(timeout=60)
    run.wait(timeout=30)
    own.done()
    tried = Counter(own.lines("tried"))
    assert set(tried.values()) == {1}
    own.tell("well")
    run.retry()
    assert run.get(timeout=60) == list(range(PAGE + 5))
    again = Counter(own.lines("tried"))
    assert {int(x) for x, n in again.items() if n > 1} == set(bad)
    own.done()


def test_what_was_tolerated_is_not_tried_again(own: Any) -> None:
    own.worker()
    run = own.app.engine.submit(
        chain(byrd.each(own.app.careful.s([1]), over=range(3), tolerate=1), own.app.careful.s([[0, None, 2]]))
    )
    with pytest.raises(ValueError, match="no "):
        run.get(timeout=30)
    run.wait(timeout=30)
    own.tell("well")
    run.retry()
    assert run.get(timeout=30) == [0, None, 2]
    assert Counter(own.lines("tried"))["1"] == 1
    own.done()


def test_an_enumerator_that_fails_is_asked_again(own: Any) -> None:
    own.worker()
    run = own.app.engine.submit(byrd.each(own.app.square.s(), over=own.app.broken_pages.s()))
    with pytest.raises(ConnectionError, match="no page today"):
        run.get(timeout=30)
    assert run.wait(timeout=30) == "failed"
    assert len(own.lines("asked")) == 3
    own.done()
    own.tell("well")
    run.retry()
    assert run.get(timeout=30) == [1, 4, 9]
    own.done()


def test_pause_and_cancel(own: Any) -> None:
    own.worker(concurrency=2)
    run = own.app.engine.submit(byrd.each(own.app.hold.s(), over=range(6), limit=2))
    wait_until(lambda: len(own.lines("begun")) == 2)
    run.pause()
    own.tell("go")
    wait_until(lambda: own.counts(run).get("succeeded") == 2)
    assert len(own.lines("begun")) == 2
    own.done()
    run.resume()
    assert run.get(timeout=30) == list(range(6))
    (own.folder / "go").unlink()
    run = own.app.engine.submit(byrd.each(own.app.hold.s(), over=range(6, 20), limit=2))
    wait_until(lambda: len(own.lines("begun")) == 8)
    run.cancel()
    own.tell("go")
    assert run.wait(timeout=30) == "cancelled"
    assert own.counts(run) == {"cancelled": 12, "succeeded": 2}
    own.done()
    run.retry()
    assert run.get(timeout=30) == list(range(6, 20))
    assert max(Counter(own.lines("ended")).values()) == 1
    own.done()


def test_items_are_undone_with_their_saga(own: Any) -> None:
    own.worker(concurrency=2)
    booking = chain(byrd.each(own.app.book.s(), over=range(5), limit=2), own.app.fail.s())
    run = own.app.engine.submit(booking)
    assert run.wait(timeout=60) == "failed"
    assert sorted(own.lines("unbooked")) == ["0", "1", "2", "3", "4"]
    own.done()
    inner = byrd.saga(byrd.each(own.app.book.s(), over=range(5, 8)), byrd.each(own.app.careful.s([1]), over=range(9)))
    run = own.app.engine.submit(inner)
    assert run.wait(timeout=60) == "failed"
    assert sorted(own.lines("unbooked"))[5:] == ["5", "6", "7"]
    own.done()


def test_show_counts_the_items_of_a_large_each(own: Any) -> None:
    own.worker()
    run = own.app.engine.submit(byrd.each(own.app.careful.s([5]), over=range(60), tolerate=1))
    run.get(timeout=30)
    run.wait(timeout=10)
    found = own.app.engine.runtime.store.run(insight.snapshot, run.id, every=False)
    assert len(found.steps) < 30
    text = _printed(drawing(found))
    assert "59 succeeded" in text
    assert "1 failed" in text
    assert "ValueError: no 5" in text
    assert text.count("✘ 6 tests.apps.each.careful") == 1
    assert "✔ 7 " not in text
    assert "61 of 61 done" in text


def _printed(drawn: Any) -> str:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(drawn)
    return captured.get()


def test_workers_die_and_the_broker_forgets(own: Any) -> None:
    """No item is lost, none is recorded twice, and never are more than the limit under way."""
    first, second = own.worker(concurrency=2), own.worker(concurrency=2)
    canvas = byrd.each(own.app.nap.s(0.1), over=own.app.pages.s(0, 60, 20), limit=4)
    run = own.app.engine.submit(canvas)
    wait_until(lambda: own.counts(run).get("succeeded", 0) >= 8)
    first.kill()
    wait_until(lambda: own.counts(run).get("succeeded", 0) >= 16)
    with own.cluster.redis() as redis:
        redis.flushall()
    wait_until(lambda: own.counts(run).get("succeeded", 0) >= 24, timeout=60)
    second.kill()
    own.done()
    own.worker(concurrency=2)
    assert run.get(timeout=90) == list(range(60))
    assert own.counts(run) == {"succeeded": 60}
    own.done()
