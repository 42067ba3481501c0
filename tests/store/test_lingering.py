"""A slice that lingers: where wake-ups come close to each other, it looks again a few milliseconds later."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from celery import chain, group

from byrd.store.work import Own
from byrd.task import slices
from byrd.task.attempt import Attempt
from byrd.task.idle import Idle
from byrd.task.standby import Standby
from tests.cluster import wait_until
from tests.store.world import World, sig


class Rig:
    """A process's slices on a real database; ``rests``: what happens while a slice lingers, each time."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.ran = world, list[str]()
        self.rests: list[Callable[[], object]] = []
        self.published: list[Any] = []
        self.takes_offers = True
        self.first: Callable[[], object] = lambda: None
        self.then: Callable[[], object] = lambda: None
        publisher = SimpleNamespace(publish=self.published.extend, takes_offers=lambda: self.takes_offers)
        self.runtime: Any = SimpleNamespace(
            slice_seconds=60.0,
            stopping=False,
            patient_store=world.store,
            worker_id=world.worker_id,
            publisher=publisher,
            standby=Standby(),
            idle=Idle(),
            is_forked=False,
            orphaned=False,
            wait_for_offer=self.wait_for_offer,
        )
        self.runtime.idle.note_free(free=True)
        #: Of a process that is forked: what happens while it waits for an offer, each time, and which step it is given.
        self.waits: list[Callable[[], object]] = []
        self.waited: list[tuple[set[str], float]] = []
        slices._pace().ended_at = 0.0
        monkeypatch.setattr(slices, "time", SimpleNamespace(monotonic=time.monotonic, sleep=self.sleep))

    def sleep(self, seconds: float) -> None:
        if threading.current_thread() is threading.main_thread() and self.rests:
            self.rests.pop(0)()
        else:
            time.sleep(seconds)

    def wait_for_offer(self, queues: set[str], seconds: float) -> Any:
        """Of a process that is forked; after what is to happen, another process is busy."""
        self.waited.append((set(queues), seconds))
        given: Any = self.waits.pop(0)() if self.waits else None
        if not self.waits:
            self.runtime.idle.note_free(free=False)
        self.runtime.idle.end()
        if not isinstance(given, tuple):
            return given
        step = self.world.step(*given)
        return {"step": step.id, "attempt": step.attempt, "task": given[1]}

    def run(self, attempt: Attempt) -> None:
        self.ran.append(attempt.claim.task)
        self.first()
        attempt.complete('"done"')
        self.then()

    def slice(self, run: str, name: str, *, close: bool = True) -> None:
        """Have a slice begin with the message of a step; ``close``: right after the slice before it."""
        step = self.world.step(run, name)
        slices._pace().ended_at = time.monotonic() if close else 0.0
        slices.Slice(self.runtime, self.run).work(Own(step.id, step.attempt, name))

    def submit(self, *names: str, **options: Any) -> str:
        return self.world.submit(chain(*(sig(name, **options) for name in names)), shared=True)


@pytest.fixture
def rig(world: World, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(world, monkeypatch)


def test_what_becomes_ready_soon_after_is_run_without_a_message(rig: Rig) -> None:
    run = rig.submit("b")
    rig.rests = [lambda: None, lambda: rig.submit("c"), lambda: None, lambda: None, lambda: rig.submit("d")]
    rig.slice(run, "b")
    rig.world.check()
    assert rig.ran == ["b", "c", "d"]


def test_a_wake_up_that_comes_alone_is_not_lingered_over(rig: Rig) -> None:
    run = rig.submit("a")
    rig.rests = [lambda: rig.submit("b")]
    rig.slice(run, "a", close=False)
    assert rig.ran == ["a"]


def test_nor_is_one_that_finds_nothing(rig: Rig) -> None:
    run = rig.submit("a")
    rig.slice(run, "a")
    rig.rests = [lambda: rig.submit("b")]
    rig.slice(run, "a")
    assert rig.ran == ["a"]


def test_nor_while_the_worker_stops(rig: Rig) -> None:
    run = rig.submit("b")
    rig.rests = [lambda: rig.submit("c")]
    rig.then = lambda: setattr(rig.runtime, "stopping", True)
    rig.slice(run, "b")
    assert rig.ran == ["b"]


def test_nor_when_a_message_of_its_own_is_on_its_way(rig: Rig) -> None:
    run = rig.world.submit(chain(sig("b"), sig("own", priority=3)), shared=True)
    rig.rests = [lambda: rig.submit("c")]
    rig.slice(run, "b")
    assert rig.ran == ["b"]
    assert [wakeup.task for wakeup in rig.published] == ["own"]


@pytest.mark.parametrize(
    ("seconds", "each", "copes"), [(60.0, 1e-6, True), (60.0, 10.0, False), (0.0, 1e-6, False)],
    ids=["short steps", "long steps", "the slice is over"],
)  # fmt: skip
def test_whether_others_may_stand_by_while_its_step_is_run(
    rig: Rig, seconds: float, each: float, *, copes: bool
) -> None:
    run, said = rig.submit("a"), list[bool]()
    rig.runtime.slice_seconds = seconds
    rig.first = lambda: said.append(rig.runtime.standby.copes())
    pace = slices._pace()
    pace.steps_at_once, pace._each = 8, each
    rig.slice(run, "a", close=False)
    assert (rig.ran, said) == (["a"], [copes])
    assert not rig.runtime.standby.copes()


# ------------------------------------------------------------------------------------------------- offers


def test_what_is_offered_while_it_waits_is_run(rig: Rig) -> None:
    rig.runtime.is_forked = True
    run = rig.submit("a")
    rig.waits = [lambda: (rig.submit("b"), "b"), lambda: (rig.submit("c", "d"), "c")]
    rig.slice(run, "a", close=False)
    rig.world.check()
    assert rig.ran == ["a", "b", "c", "d"]
    assert [queues for queues, _ in rig.waited] == [{"work"}] * 2


def test_more_than_it_takes_is_told_to_others(rig: Rig) -> None:
    rig.runtime.is_forked = True
    run = rig.submit("a")

    def two() -> tuple[str, str]:
        others = [rig.submit(name) for name in "bcd"]
        slices._pace().slow_down()
        return others[0], "b"

    rig.waits = [two]
    rig.published.clear()
    rig.slice(run, "a", close=False)
    assert [wakeup.task for wakeup in rig.published][:1] == ["c"]


def test_what_is_offered_and_may_not_be_run_here_is_sent_again_soon(rig: Rig) -> None:
    rig.runtime.is_forked = True
    run = rig.submit("a")

    def strange() -> tuple[str, str]:
        other = rig.submit("b")
        rig.world.sql("UPDATE byrd.workers SET shares = '{a}' RETURNING 1")
        return other, "b"

    rig.waits = [strange]
    rig.slice(run, "a", close=False)
    assert rig.ran == ["a"]
    [(sends, soon)] = rig.world.sql(
        "SELECT sends, wake_at - clock_timestamp() < interval '1.5 seconds' FROM byrd.steps WHERE task = 'b'"
    )
    assert (sends, soon) == (0, True)


@pytest.mark.parametrize(
    "found",
    [["x", 1, "b"], {"step": "x", "attempt": 99999999999, "task": "b"}, {"step": "x", "attempt": 0, "task": "\0"},
     {"step": "x", "attempt": 0}, {"step": "there is none", "attempt": 0, "task": "b"}],
)  # fmt: skip
def test_what_anybody_may_have_written_does_no_harm(rig: Rig, found: Any) -> None:
    rig.runtime.is_forked = True
    run = rig.submit("a")
    rig.waits = [lambda: found, lambda: (rig.submit("c"), "c")]
    rig.slice(run, "a", close=False)
    assert rig.ran == ["a", "c"]


def test_what_others_have_taken_ends_nothing(rig: Rig) -> None:
    rig.runtime.is_forked = True
    run = rig.submit("a")

    def taken() -> tuple[str, str]:
        other = rig.submit("b")
        rig.world.claim(other, "b")
        return other, "b"

    rig.waits = [taken, lambda: (rig.submit("c"), "c")]
    rig.slice(run, "a", close=False)
    assert rig.ran == ["a", "c"]


def test_offers_do_not_prolong_a_slice_for_ever(rig: Rig) -> None:
    rig.runtime.is_forked, rig.runtime.slice_seconds = True, 1.0
    run = rig.submit("a")

    def later() -> tuple[str, str]:
        time.sleep(0.4)
        return rig.submit("b"), "b"

    rig.waits = [later] * 100
    began = time.monotonic()
    rig.slice(run, "a", close=False)
    assert 1.0 < time.monotonic() - began < 30, "five times its length"
    assert 3 < len(rig.ran) < 20


WHY = [
    "nothing was run", "a message of its own is on its way", "another process waits", "no other process is free",
    "the worker stops", "the broker takes none", "it is no pool process", "its worker is gone", "it has run enough",
    "the step of its message is to be claimed in the ordinary way",
]  # fmt: skip


@pytest.mark.parametrize("why", WHY)
def test_no_offer_is_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    rig.runtime.is_forked = why != "it is no pool process"
    rig.runtime.stopping = why == "the worker stops"
    rig.runtime.orphaned = why == "its worker is gone"
    if why == "it has run enough":
        monkeypatch.setattr(slices, "_MOST_STEPS", 1)
    rig.takes_offers = why != "the broker takes none"
    if why == "another process waits":
        rig.runtime.idle.begin(60)
    elif why == "no other process is free":
        rig.runtime.idle.note_free(free=False)
    if why == "nothing was run":
        run = rig.submit("a")
        rig.world.settle(rig.world.claim(run, "a"))
        rig.slice(run, "a")
    elif why == "a message of its own is on its way":
        rig.slice(rig.world.submit(chain(sig("b"), sig("own", priority=3)), shared=True), "b")
    elif why == "the step of its message is to be claimed in the ordinary way":
        rig.submit("a")
        own = rig.submit("own")
        rig.world.sql("UPDATE byrd.steps SET solo = true WHERE task = 'own' RETURNING 1")
        rig.slice(own, "own", close=False)
        assert rig.ran == ["a"]
    else:
        rig.slice(rig.submit("a"), "a", close=False)
        assert rig.ran == ["a"]
    assert rig.waited == []


def test_a_process_sees_now_and_then_that_its_worker_stops(rig: Rig) -> None:
    rig.runtime.is_forked = True
    run = rig.submit("a")
    rig.waits = [lambda: None, lambda: setattr(rig.runtime, "stopping", True), lambda: None]
    rig.slice(run, "a", close=False)
    assert [seconds <= 1 for _, seconds in rig.waited] == [True] * 2


# ------------------------------------------------------------------------------------------------- the watch


def test_what_ends_two_groups_of_a_run_before_a_long_step_ends_the_run(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not the slice that records it then, but the thread that sees that a long step holds up nothing."""
    world = rig.world
    run = world.submit(group(chain(sig("a"), group(sig("b"), sig("c"))), sig("d")), shared=True)
    for name in "ab":
        world.settle(world.claim(run, name))
    rig.submit("long")
    world.sql("UPDATE byrd.steps SET wake_at = now() + interval '1 hour' WHERE task = 'long' RETURNING 1")

    def until_recorded() -> None:
        if rig.ran[-1] == "long":
            wait_until(lambda: world.run(run).status == "succeeded", timeout=10)

    rig.first = until_recorded
    monkeypatch.setattr("byrd.store.work.is_unusual", lambda exc: pytest.fail(f"one by one: {exc}"))
    slices._pace().steps_at_once = 8
    rig.slice(run, "c", close=False)
    assert rig.ran == ["c", "d", "long"]
    world.check()
