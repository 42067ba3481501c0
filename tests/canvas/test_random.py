"""A thousand random canvases on real workers: Byrd's, plain Celery's, and Celery's eager mode.

Celery's eager mode and its workers are not of one mind about everything (docs/canvas.md lists where they differ, with a
test of each): Byrd is with one of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from redis import Redis

from tests.canvas.kitchen import Menu, sample
from tests.canvas.outcomes import Outcome, eager, outcome_of, settled
from tests.canvas.recipes import Recipe, build, keyed, parts
from tests.cluster import Cluster, wait_until

COUNT = 1000
SEED = 20261123
#: Without what Celery's eager mode and its workers do not agree about: tests of their own pin that down.
MENU = Menu(unfolded=False, lone=False, stacked=False)

pytestmark = pytest.mark.timeout(600)

Notes = Counter[str]


@dataclass(frozen=True)
class Heard:
    """What came of a canvas in one of the three ways, and the notes that its callbacks and errbacks took."""

    outcome: Outcome
    callbacks: Notes
    errbacks: Notes


@dataclass(frozen=True)
class Compared:
    """One canvas, three ways."""

    recipe: Recipe
    byrd: Heard
    worker: Heard
    eager: Heard

    def __str__(self) -> str:
        ways = (f"  {name}: {getattr(self, name)}" for name in ("byrd", "worker", "eager"))
        return "\n".join([json.dumps(self.recipe), *ways])


@pytest.fixture(scope="module")
def compared(module_cluster: Cluster) -> list[Compared]:
    """All canvases, run."""
    ours, plain, local = (module_cluster.app(f"tests.apps.canvas_{name}") for name in ("byrd", "plain", "eager"))
    workers = [
        module_cluster.worker(ours.__name__, loglevel="ERROR", wait=False),
        module_cluster.worker(plain.__name__, queues=["plain"], wait=False),
    ]
    recipes = [keyed(recipe, str(index)) for index, recipe in enumerate(sample(MENU, COUNT, seed=SEED))]

    runs = [ours.engine.submit(build(recipe, ours.app)) for recipe in recipes]
    results = [_submitted(build(recipe, plain.app)) for recipe in recipes]
    eagerly = [eager(partial(build, recipe, local.app)) for recipe in recipes]
    workers[1].wait_for_log(" ready", timeout=60)
    for run in runs:
        run.wait(timeout=300)
    with module_cluster.redis() as redis:
        _wait_until_idle(redis)
        return [
            Compared(
                recipe,
                byrd=_heard(outcome_of(partial(runs[index].get, timeout=10)), recipe, _noted(redis, ours, index)),
                worker=_heard(settled(results[index]), recipe, _noted(redis, plain, index)),
                eager=_heard(eagerly[index], recipe, local.log[str(index)]),
            )
            for index, recipe in enumerate(recipes)
        ]


def test_results_are_those_of_celery(compared: list[Compared]) -> None:
    _none(compared, lambda one: not _same_outcome(one))


def test_callbacks_are_called_as_celery_calls_them(compared: list[Compared]) -> None:
    _none(compared, lambda one: not _same_callbacks(one))


def test_errbacks_that_celery_calls_are_called(compared: list[Compared]) -> None:
    """All that either of them calls: workers of Celery forget some when failures meet, its eager mode all of chords."""
    _none(compared, lambda one: not set(one.byrd.errbacks) >= set(one.worker.errbacks) | set(one.eager.errbacks))


def test_errbacks_are_not_called_without_a_failure(compared: list[Compared]) -> None:
    _none(compared, lambda one: bool(one.byrd.errbacks) and all(part["kind"] != "fail" for part in parts(one.recipe)))


def test_the_canvases_are_worth_comparing(compared: list[Compared]) -> None:
    kinds = Counter(one.byrd.outcome.kind for one in compared)
    assert kinds["value"] > COUNT / 2
    assert kinds["ValueError"] > COUNT / 20
    assert sum(bool(one.byrd.callbacks) for one in compared) > COUNT / 20
    assert sum(bool(one.byrd.errbacks) for one in compared) > COUNT / 100
    exact = sum(one.byrd.outcome == one.worker.outcome == one.eager.outcome for one in compared)
    assert exact > COUNT * 0.7


def _submitted(canvas: Any) -> Any:
    """Return the result, or the error that Celery has instead of one (it sends some canvases not at all)."""
    try:
        return canvas.apply_async()
    except AttributeError as exc:
        return exc


def _same_outcome(one: Compared) -> bool:
    byrd, theirs = one.byrd.outcome, (one.worker.outcome, one.eager.outcome)
    if byrd in theirs:
        return True
    # Of several failures, which one is told depends on the order in which eager mode gets to them.
    return byrd.error is not None and theirs[0] != theirs[1] and byrd.kind in {outcome.kind for outcome in theirs}


def _same_callbacks(one: Compared) -> bool:
    byrd, theirs = one.byrd.callbacks, [one.worker.callbacks, one.eager.callbacks]
    if any(part["kind"] == "swap" for part in parts(one.recipe)):  # eager mode calls those of a replaced task twice
        theirs.append(Counter(dict.fromkeys(one.eager.callbacks, 1)))
    return byrd in theirs


def _heard(outcome: Outcome, recipe: Recipe, noted: list[list[Any]]) -> Heard:
    errbacks = {part["label"] for part in parts(recipe) if part["kind"] in ("log_error", "log_failure")}
    return Heard(
        outcome,
        callbacks=Counter(json.dumps(note, default=repr) for note in noted if note[0] not in errbacks),
        errbacks=Counter(json.dumps(note[0]) for note in noted if note[0] in errbacks),
    )


def _noted(redis: Redis, module: ModuleType, index: int) -> list[list[Any]]:
    entries: Any = redis.lrange(f"log:{module.app.main}:{index}", 0, -1)
    return [json.loads(entry) for entry in entries]


def _wait_until_idle(redis: Redis) -> None:
    """Wait until plain Celery has nothing to do: acknowledging late, it keeps a message until its task is done."""
    idle = 0

    def still() -> bool:
        nonlocal idle
        idle = idle + 1 if not redis.llen("plain") and not redis.hlen("unacked") else 0
        return idle >= 5

    wait_until(still, timeout=300, what="end of the plain worker's tasks")


def _none(compared: list[Compared], is_bad: Callable[[Compared], bool]) -> None:
    """Assert that no canvas is bad; show the smallest that are."""
    bad = sorted((one for one in compared if is_bad(one)), key=lambda one: len(json.dumps(one.recipe)))
    assert not bad, f"{len(bad)} of {len(compared)} differ:\n" + "\n".join(map(str, bad[:5]))
