"""One canvas, three ways: on Byrd, on a worker of plain Celery, and in Celery's eager mode."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

import byrd
from tests.canvas.outcomes import Outcome, eager, outcome_of
from tests.cluster import Cluster, wait_until

#: Makes a canvas of the tasks that it is given; they are ``canvas.*`` of tests/apps/canvas.py.
Make = Callable[[SimpleNamespace], Any]
_LIKE_BYRD: Any = object()


@dataclass(frozen=True)
class ThreeWays:
    """Runs canvases in the three ways, and compares."""

    byrd: Any
    plain: Any
    local: Any
    cluster: Cluster

    @property
    def engine(self) -> byrd.Byrd:
        engine: byrd.Byrd = self.byrd.engine
        return engine

    def give(self, make: Make, value: Any, *, worker: Any = _LIKE_BYRD, eagerly: Any = _LIKE_BYRD) -> byrd.Run:
        """Assert the value of a canvas; and what Celery gives in its stead, where that is something else."""
        return self._agree(make, Outcome(value=value), worker, eagerly)

    def fail(self, make: Make, error: str, *, worker: Any = _LIKE_BYRD, eagerly: Any = _LIKE_BYRD) -> byrd.Run:
        """Assert the error of a canvas: its type, and its argument where that is a number."""
        return self._agree(make, Outcome(error=error), worker, eagerly)

    def _agree(self, make: Make, expected: Outcome, worker: Any, eagerly: Any) -> byrd.Run:
        result = make(self.plain.tasks).apply_async()
        run = self.engine.submit(make(self.byrd.tasks))
        assert outcome_of(lambda: run.get(timeout=60)) == expected
        theirs = outcome_of(lambda: result.get(timeout=20))
        for _ in range(2):
            if theirs.kind != "TimeoutError":
                break
            # Plain Celery loses a message or a result now and then, on a busy machine: that is what Byrd is for.
            again = make(self.plain.tasks).apply_async()
            theirs = outcome_of(partial(again.get, timeout=40))
        # Of several failures in a group, a worker's get() raises the one that comes first in time.
        assert (theirs.value, theirs.kind) == (_expected(worker, expected).value, _expected(worker, expected).kind)
        assert eager(lambda: make(self.local.tasks)) == _expected(eagerly, expected)
        return run

    def notes(self, run: byrd.Run, key: str, *, worker: int | None = None) -> list[Any]:
        """Return what callbacks and errbacks noted under ``key`` in a run of Byrd, once it has ended.

        Asserts that plain Celery's worker notes the same; or ``worker`` times something.
        """
        run.wait(timeout=60)
        ours = self._notes(self.byrd.app, key)
        expected = len(ours) if worker is None else worker
        theirs = wait_until(
            lambda: [self._notes(self.plain.app, key)] if len(self._notes(self.plain.app, key)) >= expected else None,
            what=f"{expected} notes of plain Celery under {key}; ours are {ours}",
        )[0]
        assert len(theirs) == expected if worker is not None else theirs == ours
        return ours

    def _notes(self, app: Celery, key: str) -> list[Any]:
        with self.cluster.redis() as redis:
            entries: Any = redis.lrange(f"log:{app.main}:{key}", 0, -1)
        return sorted((json.loads(entry) for entry in entries), key=json.dumps)


def _expected(given: Any, like_byrd: Outcome) -> Outcome:
    if given is _LIKE_BYRD:
        return like_byrd
    return Outcome(error=given) if isinstance(given, str) else Outcome(value=given)


@pytest.fixture(scope="module")
def three_ways(module_cluster: Cluster) -> Iterator[ThreeWays]:
    """A worker of Byrd's, one of plain Celery's, and an eager app, with the same tasks."""
    ours, plain, local = (module_cluster.app(f"tests.apps.canvas_{name}") for name in ("byrd", "plain", "eager"))
    workers = [
        module_cluster.worker(ours.__name__, queues=["celery", "other"], wait=False),
        module_cluster.worker(plain.__name__, queues=["plain"], wait=False),
    ]
    for worker in workers:
        worker.wait_for_log(r" ready\.", timeout=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("celery.app.trace"), "disabled", True)  # some tasks fail, and should
        yield ThreeWays(byrd=ours, plain=plain, local=local, cluster=module_cluster)
