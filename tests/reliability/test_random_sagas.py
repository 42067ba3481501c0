"""Random sagas whose steps and compensations fail, on workers that are killed and a Redis that loses all.

At the end each completed step is kept, in a run that succeeded, or compensated exactly once as recorded, the later of
two that followed one another first; none is lost, and each rollback that is stuck is listed.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import chain, group

import byrd
from byrd.store.invariants import check_database
from tests.cluster import Cluster, wait_until

APP = "tests.apps.sagas"
NUMBER = int(os.environ.get("BYRD_RANDOM_SAGAS", "60"))
SEED = int(os.environ.get("BYRD_RANDOM_SEED", "0"))
_DEEPEST = 3


@dataclass
class Leaf:
    """A step, and where it stands: a path of (place in a sequence or group, whether that is a sequence)."""

    name: str
    path: tuple[tuple[int, bool], ...]
    confirmed: bool
    breaks: bool
    undo_breaks: bool

    def comes_before(self, other: Leaf) -> bool:
        """Tell whether the other one starts only after this one is done."""
        for (here, sequence), (there, _) in zip(self.path, other.path, strict=False):
            if here != there:
                return sequence and here < there
        return False


@dataclass
class Maker:
    """Makes one random canvas."""

    app: Any
    rng: random.Random
    leaves: list[Leaf] = field(default_factory=list)

    def canvas(self) -> Any:
        """Return a canvas of a few steps, which is a saga, or has some in it."""
        return self.part((), 0)

    def part(self, path: tuple[tuple[int, bool], ...], depth: int) -> Any:
        kind = "chain" if depth == 0 else self.rng.choice(["step", "step", "step", "chain", "group", "saga", "saga"])
        if depth >= _DEEPEST or kind == "step":
            return self.step(path)
        if kind == "saga":
            return byrd.saga(*self.parts(path, depth))
        if kind == "chain":
            return chain(*self.parts(path, depth))
        return group([self.part((*path, (n, False)), depth + 1) for n in range(self.rng.randint(2, 3))])

    def parts(self, path: tuple[tuple[int, bool], ...], depth: int) -> list[Any]:
        return [self.part((*path, (n, True)), depth + 1) for n in range(self.rng.randint(1, 3))]

    def step(self, path: tuple[tuple[int, bool], ...]) -> Any:
        name = f"s{len(self.leaves)}"
        confirmed = self.rng.random() < 0.25
        breaks = not confirmed and self.rng.random() < 0.08
        undo_breaks = not confirmed and self.rng.random() < 0.05
        self.leaves.append(Leaf(name, path, confirmed, breaks, undo_breaks))
        if confirmed:
            return self.app.book.si(name)
        return self.app.do.si(
            name,
            failures=self.rng.choice([0, 0, 0, 1]),
            breaks=breaks,
            slow=self.rng.choice([0.0, 0.1, 0.3]),
            undo_failures=self.rng.choice([0, 0, 1]),
            undo_breaks=undo_breaks,
        )


@pytest.mark.timeout(120 + 15 * NUMBER)
def test_random_sagas(cluster: Cluster) -> None:
    app = cluster.app(APP)
    cluster.rows(app.TABLE)
    rng = random.Random(SEED)
    makers = [Maker(app, rng) for _ in range(NUMBER)]
    runs = [app.engine.submit(maker.canvas()) for maker in makers]
    env = {"SAGA_LEASE": "2"}
    workers = [cluster.worker(APP, env=env), cluster.worker(APP, env=env)]
    kills = 0
    next_kill = time.monotonic()
    while open_runs(cluster):
        if time.monotonic() > next_kill and kills < 4 + NUMBER // 15:
            victim = rng.randrange(2)
            workers[victim].kill()
            if rng.random() < 0.5:
                with cluster.redis() as client:
                    client.flushall()
            workers[victim] = cluster.worker(APP, env=env, wait=False)
            kills += 1
            next_kill = time.monotonic() + rng.uniform(0.5, 3.0)
        time.sleep(0.1)
    stuck = stuck_runs(cluster)
    assert {run.id for run in app.engine.list(status="rollback_stuck", limit=10 * NUMBER)} == stuck
    check_database(cluster.database_url)
    for run in runs:
        operate(cluster, rng, run)
    wait_until(lambda: not open_runs(cluster) and not stuck_runs(cluster), timeout=60)
    check_database(cluster.database_url)
    assert kills >= 2
    undone = sum(check(cluster, maker, run, stuck) for maker, run in zip(makers, runs, strict=True))
    assert undone > NUMBER / 2, "too few rollbacks to show anything"
    assert NUMBER < 60 or stuck, "no rollback was stuck"


def open_runs(cluster: Cluster) -> bool:
    """Tell whether a run goes on."""
    sql = "SELECT 1 FROM byrd.runs WHERE finished_at IS NULL AND status <> 'rollback_stuck' LIMIT 1"
    return bool(cluster.rows(sql))


def stuck_runs(cluster: Cluster) -> set[str]:
    """Return the runs that have a compensation which has failed for good: a rollback that is stuck is one of these."""
    sql = """SELECT DISTINCT s.run_id::text FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
              WHERE s.kind = 'compensation' AND s.status IN ('failed','cancelled')"""
    return {row[0] for row in cluster.rows(sql)}


def operate(cluster: Cluster, rng: random.Random, run: Any) -> None:
    """Do what an operator does, until the run is stuck no more."""
    while run.wait(timeout=120) == "rollback_stuck":
        step = next(s for s in run.steps() if s.kind == "compensation" and s.status in ("failed", "cancelled"))
        if rng.random() < 0.5:
            run.skip(step.no, reason="it is gone", by="test")
        else:
            run.done_by_hand(step.no, note="called them", by="test")


def check(cluster: Cluster, maker: Maker, run: Any, stuck: set[str]) -> int:
    """Check one run against the canvas that it was made of; return how many of its steps were undone."""
    expected = "failed" if any(leaf.breaks for leaf in maker.leaves) else "succeeded"
    assert run.status == expected, (run.why(), run.steps())
    steps = run.steps()
    names = {row[0]: row[1] for row in cluster.rows("SELECT no, args FROM byrd.steps WHERE run_id = %s", run.id)}
    by_name = {names[s.no].split('"')[1]: s for s in steps if s.kind == "task"}
    undos = {s.compensates: s for s in steps if s.kind == "compensation"}
    rows = cluster.rows("SELECT id, name, what, key FROM effects WHERE run = %s ORDER BY id", run.id)
    lost = {row[0] for row in cluster.rows(
        """SELECT s.no FROM byrd.attempts a JOIN byrd.steps s ON s.id = a.step_id
            WHERE s.run_id = %s AND a.outcome IN ('preempted', 'handed_back', 'cancelled')""", run.id)}  # fmt: skip
    for leaf in maker.leaves:
        step = by_name[leaf.name]
        did = [row for row in rows if row[1:3] == (leaf.name, "do")]
        undid = [row for row in rows if row[1:3] == (leaf.name, "undo")]
        assert not leaf.confirmed or len(did) <= 1, f"{leaf.name} was done {len(did)} times, though it can be asked for"
        undo = undos.get(step.no)
        if expected == "succeeded":
            assert step.status == "succeeded"
            assert did
            assert undo is None
            assert not undid
            continue
        if step.status != "succeeded" and step.no not in lost:
            assert undo is None
            assert not did
            continue
        # It has completed, or nobody knew: undone, once.
        assert undo is not None, f"{leaf.name} is lost: {step}"
        assert undo.status == "skipped" or (undo.status == "succeeded" and len({row[3] for row in undid}) <= 1)
        by_hand = leaf.undo_breaks and run.id in stuck
        if did and not by_hand:
            assert undid, f"{leaf.name} was done and not undone"
        assert not (leaf.undo_breaks and undid)
    check_order(maker, by_name, undos, rows)
    return len(undos)


def check_order(maker: Maker, by_name: Any, undos: Any, rows: Any) -> None:
    """Check that the later of two steps that followed one another was undone first."""
    when: dict[str, list[int]] = {}
    for number, name, what, _ in rows:
        if what == "undo":
            when.setdefault(name, []).append(number)
    for one in maker.leaves:
        for other in maker.leaves:
            first, second = undos.get(by_name[one.name].no), undos.get(by_name[other.name].no)
            if first is None or second is None or not one.comes_before(other):
                continue
            assert second.finished_at <= first.ready_at, f"{one.name} was undone before {other.name}"
            if one.name in when and other.name in when:
                assert max(when[other.name]) < min(when[one.name])
