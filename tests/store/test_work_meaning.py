"""``byrd.work`` against the transitions one by one: whatever is batched with whatever, the same rows come of a plan."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import pytest
from celery import chain, chord, group
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError

from byrd.store import Claim, Store, Wakeup, growth, steps
from byrd.store.rows import WAKEUP, query, wakeups_of
from byrd.store.work import Done, is_unusual
from byrd.task.slices import _apart
from tests.store.test_model import TREES, Builder
from tests.store.world import ERROR, World, plan_of, sig

EXAMPLES = int(os.environ.get("BYRD_MODEL_EXAMPLES", "15"))


def _linked(name: str, *links: Any, errbacks: Iterable[Any] = ()) -> Any:
    made = sig(name)
    for link in links:
        made.link(link)
    for errback in errbacks:
        made.link_error(errback)
    return made


#: A task whose name begins with "bad" fails; with "grow", it is replaced by a canvas.
CANVASES: dict[str, Callable[[], Any]] = {
    "one": lambda: sig("a"),
    "chain": lambda: chain(sig("a"), sig("b", 1), sig("c", 2)),
    "immutable": lambda: chain(sig("a"), sig("b").set(immutable=True), sig("c")),
    "group": lambda: group(sig("a"), sig("b"), sig("c")),
    "group of one": lambda: chain(sig("a"), group(sig("b")), sig("c")),
    "chord": lambda: chord([sig("a"), sig("b"), sig("c")], sig("body")),
    "chain of chords": lambda: chain(sig("a"), group(sig("b"), sig("c")), sig("d"), group(sig("e"), sig("f"))),
    "group after group": lambda: chain(group(sig("a"), sig("b")), group(sig("c"), sig("d"), sig("e"))),
    "nested": lambda: chord([chain(sig("a"), group(sig("b"), sig("c")), sig("d")), sig("e")], sig("body")),
    "nested groups": lambda: group(group(sig("a"), sig("b")), group(sig("c"), group(sig("d"), sig("e")))),
    "group in a body": lambda: chord([sig("a"), sig("b")], group(sig("c"), sig("d"))),
    "chord in a body": lambda: chord([sig("a"), sig("b")], chain(sig("c"), group(sig("d"), sig("e")), sig("f"))),
    "empty group": lambda: chain(sig("a"), chord([], sig("b")), sig("c")),
    "empty member": lambda: chain(sig("a"), group(sig("b"), chord([], sig("c"))), sig("d")),
    "callbacks": lambda: chain(_linked("a", sig("x"), sig("y")), sig("b")),
    "callbacks of members": lambda: chord([_linked("a", sig("x")), sig("b")], sig("c")),
    "callback group": lambda: _linked("a", group(sig("x"), sig("y"))),
    "uncalled errbacks": lambda: chain(
        _linked("a", errbacks=[chain(sig("e"), sig("f"))]), _linked("b", errbacks=[group(sig("g"), sig("h"))])
    ),
    "errback": lambda: chain(sig("a"), _linked("bad", errbacks=[chain(sig("e"), sig("f"))]), sig("b")),
    "failed member": lambda: chain(
        group(sig("a"), sig("bad"), chain(sig("b"), sig("c"))), _linked("d", errbacks=[sig("e")])
    ),
    "failed inner member": lambda: chord([chain(sig("a"), group(sig("bad"), sig("b")), sig("c")), sig("d")], sig("e")),
    "failed callback": lambda: chain(_linked("a", sig("bad"), sig("x")), sig("b")),
    "failed saga": lambda: chain(sig("saga_a"), group(sig("saga_b"), sig("c")), sig("saga_d"), sig("bad")),
    "replaced by a chain": lambda: chain(sig("a"), sig("grow_chain"), sig("b")),
    "replaced by a group": lambda: chain(sig("a"), sig("grow_group"), sig("b")),
    "replaced member": lambda: chord([sig("a"), sig("grow_group"), sig("b")], sig("body")),
    "replaced body": lambda: chord([sig("a"), sig("b")], sig("grow_chain")),
    "replaced again": lambda: chain(group(sig("a"), sig("grow_more")), sig("b")),
    "delayed": lambda: chain(sig("a"), sig("b").set(countdown=60), group(sig("c").set(countdown=9), sig("d"))),
    "solo": lambda: chain(sig("a"), sig("b", priority=3), group(sig("c", priority=3), sig("d")), sig("e")),
    "expiring": lambda: chain(sig("a"), sig("b", expires=600), sig("c")),
}  # fmt: skip
GROWN: dict[str, Callable[[], Any]] = {
    "grow_chain": lambda: chain(sig("g1"), sig("g2")),
    "grow_group": lambda: group(sig("g1"), chain(sig("g2"), sig("g3"))),
    "grow_more": lambda: chain(sig("g1"), sig("grow_chain")),
}


@dataclass
class Driver:
    """Takes runs to their ends; each task does what its name says."""

    world: World
    #: What each attempt was given: by run, step and attempt.
    given: dict[tuple[str, int, int], tuple[Any, ...]] = field(default_factory=dict)
    refusals: int = 0

    def one_by_one(self) -> None:
        """Claim, run and record each step by itself: the reference."""
        while claim := self.claim_ordinarily():
            self.end(claim)

    def in_batches(self, random: Random) -> None:
        """Record and claim as it comes, in batches of any make."""
        running: list[Claim] = []
        while True:
            random.shuffle(running)
            batch = running[: random.randint(0, len(running))]
            running = running[len(batch) :]
            ends = [c for c in batch if not c.task.startswith(("bad", "grow"))]
            for claim in batch:
                if claim not in ends:
                    self.end(claim)
            *early, last = _apart([Done(claim, json.dumps(claim.task)) for claim in ends])
            for part in early:
                self.work(part)
            before = len(running)
            running += self.work(last, most=random.randint(0, 6), others=random.random() < 0.6)
            if not batch and len(running) == before and random.random() < 0.5:
                ordinary = self.claim_ordinarily()
                if ordinary is not None:
                    running.append(ordinary)
                elif not running:
                    return

    def work(self, done: list[Done], *, most: int = 0, others: bool = False) -> list[Claim]:
        world = self.world
        before = world.rows()
        was_ready = {row.id for row in world.sql("SELECT id FROM byrd.steps WHERE status = 'ready'")}
        try:
            found = world.work(done, most=most, others=others)
        except DBAPIError as exc:
            if not is_unusual(exc):
                raise
            assert world.rows() == before, "what was refused has changed something"
            self.refusals += 1
            for claim, result in done:
                world.do(steps.complete, claim.id, claim.attempt, result)
            found = world.work([], most=most, others=others)
        else:
            assert self.due() - was_ready == {wakeup.id for wakeup in found.wakeups if wakeup.due}
        world.check()
        assert not found.refused
        assert len(found.claims) <= most
        for wakeup in found.wakeups:
            assert wakeup == self.wakeup(wakeup.id)
        for claim in found.claims:
            self.note(claim)
        return found.claims

    def due(self) -> set[str]:
        rows = self.world.sql("SELECT id FROM byrd.steps WHERE status = 'ready' AND run_at <= clock_timestamp()")
        return {row.id for row in rows}

    def wakeup(self, step_id: str) -> Wakeup:
        [found] = wakeups_of(self.world.sql(f"SELECT {WAKEUP} FROM byrd.steps s WHERE id = %(id)s", id=step_id))
        return found

    def claim_ordinarily(self) -> Claim | None:
        """Claim the first ready step by its own message; let its time come first."""
        ready = self.world.sql(
            "SELECT s.id, s.attempt FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id WHERE s.status = 'ready' "
            "ORDER BY r.created_at, no LIMIT 1"
        )
        if not ready:
            return None
        self.world.sql(
            "UPDATE byrd.steps SET run_at = now(), wake_at = now() WHERE id = %(id)s RETURNING 1", id=ready[0].id
        )
        claim = self.world.try_claim(ready[0].id, ready[0].attempt)
        assert claim is not None
        self.note(claim)
        return claim

    def end(self, claim: Claim) -> None:
        world = self.world
        if claim.task.startswith("bad"):
            world.do(steps.fail, claim.id, claim.attempt, ERROR)
        elif claim.task in GROWN:
            world.do(growth.replace, claim.id, claim.attempt, plan_of(GROWN[claim.task](), shared=True))
            world.share_all()
        else:
            world.do(steps.complete, claim.id, claim.attempt, json.dumps(claim.task))
        world.check()

    def note(self, claim: Claim) -> None:
        """Remember what an attempt was given, in words that do not differ between two runs of one plan."""
        numbers = {step.id: step.no for step in self.world.steps(claim.run_id)}
        key = (claim.run_id, claim.no, claim.attempt)
        assert key not in self.given, "an attempt was claimed twice"
        self.given[key] = (
            claim.kind, claim.task, claim.retries, claim.preemptions, claim.args, claim.kwargs, claim.options,
            claim.group_id is not None, claim.join_no, claim.join_pos,
            numbers[claim.parent_id] if claim.parent_id else None, claim.on_failure, claim.input_no, claim.input,
        )  # fmt: skip

    def outcome(self, run_id: str) -> dict[str, Any]:
        """Return what came of a run, in words that do not differ between two runs of one plan."""
        world = self.world
        run, rows = world.run(run_id), world.steps(run_id)

        def named(text: str | None) -> str | None:
            for step in rows:
                text = text and text.replace(step.id, f"<{step.no}>")
            return text

        attempts = world.sql(
            """SELECT s.no, a.attempt, a.outcome, a.error FROM byrd.attempts a JOIN byrd.steps s ON s.id = a.step_id
                WHERE s.run_id = %(run)s ORDER BY 1, 2""",
            run=run_id,
        )
        events = world.sql(
            "SELECT event, step_no, detail FROM byrd.events WHERE run_id = %(run)s ORDER BY id", run=run_id
        )
        ends = {step.no: step.finished_at for step in rows}
        return {
            "run": (run.status, run.outcome, named(run.error), run.finished_at is not None),
            "steps": [
                (
                    s.no, s.kind, s.task, s.queue, s.status, s.after, s.on_failure, s.join_no, s.join_pos, s.waiting,
                    s.replaced, s.attempt, s.retries, s.preemptions, s.result, named(s.error), s.cause, s.worker_id,
                    s.pid, s.compensates, [getattr(s, at) is None for at in ("ready_at", "started_at", "finished_at")],
                )
                for s in rows
            ],
            "in order": [s.no for s in rows if s.after is not None and s.finished_at is not None
                         and (before := ends[s.after]) is not None and s.finished_at <= before],
            "attempts": [(a.no, a.attempt, a.outcome, named(a.error)) for a in attempts],
            "events": [tuple(event) for event in events],
            "given": sorted((key[1:], value) for key, value in self.given.items() if key[0] == run_id),
        }  # fmt: skip


def fresh(store: Store) -> World:
    for table in ("runs", "workers"):
        store.run(query, f"DELETE FROM byrd.{table}")
    return World(store)


def compare(store: Store, makers: list[Callable[[], Any]], random: Random) -> Driver:
    """Take the runs of some canvases to their ends in both ways; the same must come of it."""
    reference = Driver(fresh(store))
    ids = [reference.world.submit(make(), shared=True) for make in makers]
    reference.one_by_one()
    expected = [reference.outcome(run_id) for run_id in ids]
    driver = Driver(fresh(store))
    ids = [driver.world.submit(make(), shared=True) for make in makers]
    driver.in_batches(random)
    for run_id, wanted in zip(ids, expected, strict=True):
        found = driver.outcome(run_id)
        for what in wanted:
            assert found[what] == wanted[what], what
        assert not wanted["in order"]
    return driver


@pytest.mark.parametrize("name", CANVASES)
@pytest.mark.parametrize("seed", range(2))
def test_a_plan_ends_in_the_same_rows_in_batches_as_one_by_one(store: Store, name: str, seed: int) -> None:
    driver = compare(store, [CANVASES[name]], Random(seed))
    # What is refused is right, but slow: nothing that people do all the time.
    assert driver.refusals == 0 or name.startswith(("failed", "empty", "errback"))


@pytest.mark.parametrize("seed", range(6))
def test_many_plans_in_the_same_batches(store: Store, seed: int) -> None:
    random = Random(seed)
    names = random.sample(sorted(CANVASES), 5)
    compare(store, [CANVASES[name] for name in names], random)


def test_what_is_unusual_is_refused(store: Store) -> None:
    assert all(compare(store, [CANVASES[name]], Random(1)).refusals for name in ("empty group", "failed member"))


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 100, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(trees=st.lists(TREES, min_size=1, max_size=2), seed=st.integers(0, 999))
def test_random_plans_in_random_batches(store: Store, trees: list[Any], seed: int) -> None:
    def build(tree: Any) -> Any:
        return Builder().build(tree)[0]

    compare(store, [partial(build, tree) for tree in trees], Random(seed))
