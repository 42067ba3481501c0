"""Random sagas whose steps and compensations fail, on workers that are killed and a Redis that loses all.

In them are chains, groups, chords, sagas in sagas, items, workflows within, waits, operations within a task, pivots and
retriable steps; meanwhile runs are paused, cancelled and given signals, and once they have ended retried or rolled
back.  At the end each completed step is kept, or compensated exactly once as recorded, the later of two that followed
one another first, as :mod:`tests.reliability.saga_oracle` works it out; and each rollback that was stuck was listed.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from byrd.engine.doctor import examine
from byrd.errors import IllegalTransitionError
from byrd.store.invariants import check_database
from tests.cluster import Cluster
from tests.reliability.saga_maker import Maker, Part, all_leaves_of
from tests.reliability.saga_oracle import Case, check_order
from tests.reliability.saga_records import Records

APP = "tests.apps.random_sagas"
WITHIN = "random.inner"
DEFAULT_NUMBER = 40
NUMBER = int(os.environ.get("BYRD_RANDOM_SAGAS", str(DEFAULT_NUMBER)))
SEED = int(os.environ.get("BYRD_RANDOM_SEED", "0"))
#: So often a signal that is still awaited is sent again: what waited for the first may have been cancelled meanwhile.
_AGAIN_SECONDS = 1.0
#: What happens for certain among the default number of runs, whatever the timing.
_CERTAIN = {
    "undone", "undone by a saga", "kept", "pivot passed", "pivot not passed", "operations undone", "signal", "default",
    "each", "tried again", "workflow within undone", "item undone", "run succeeded", "run failed", "run cancelled",
    "retried", "retry refused", "rolled back", "rollback refused", "seen to by hand", "stuck",
    "found, and undone", "not found, and so not undone",
}  # fmt: skip

log = logging.getLogger(__name__)


@dataclass
class Course:
    """One run, and what is told to it while it goes on: ``command``, once so many of its steps have succeeded."""

    part: Part
    run: Any
    command: str | None
    after: int
    mended: bool = False


@dataclass
class Driver:
    """Drives all runs to their ends, and makes trouble meanwhile."""

    cluster: Cluster
    engine: Any
    rng: random.Random
    kills: int = 0
    kills_left: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    courses: list[Course] = field(default_factory=list)
    #: When a signal was sent to a run last; and until when a run stays paused.
    sent: dict[tuple[str, str], float] = field(default_factory=dict)
    paused: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._workers = [self._worker(wait=True), self._worker(wait=True)]
        self._next_kill = time.monotonic()

    def submit(self, app: Any, number: int) -> None:
        """Submit random canvases, the same for the same seed."""
        for index in range(number):
            rng = random.Random(f"{SEED}:{index}")
            part = Maker(rng, f"{index}.").canvas()
            command = rng.choice([None] * 6 + ["cancel", "compensate", "terminate", "pause", "roll back"])
            run = self.engine.submit(app.canvas(part))
            self.courses.append(Course(part, run, command, after=rng.randint(0, 4)))
            for leaf in all_leaves_of(part):
                if leaf.part.get("mode") == "early":
                    self._signal(run.id, f"early:{leaf.name}")

    def settle(self, *, kills: int = 0, trouble: bool = False, operator: bool = False) -> None:
        """Wait until nothing goes on any more, but rollbacks that are stuck; with an ``operator``, these neither.

        ``kills``: so many workers are killed meanwhile.  ``trouble``: runs are paused, and get their commands.
        """
        self.kills_left = kills
        deadline = time.monotonic() + 120 + 5 * NUMBER
        while self._goes_on(operator=operator):
            assert time.monotonic() < deadline, self._why()
            self._kill()
            self._send_signals()
            if trouble:
                self._give_commands()
                self._trouble_somebody()
            self._resume()
            if operator:
                self._unstick()
            time.sleep(0.1)

    def _goes_on(self, *, operator: bool) -> bool:
        if operator:
            return bool(self.cluster.rows("SELECT 1 FROM byrd.runs WHERE finished_at IS NULL LIMIT 1"))
        # A run that waits for one within it, which is stuck, goes on no more than that one.
        sql = """SELECT 1 FROM byrd.runs r JOIN byrd.steps s ON s.run_id = r.id
                  WHERE r.finished_at IS NULL AND r.status <> 'rollback_stuck'
                    AND (s.status IN ('running','waiting') OR s.status = 'ready' AND s.run_at < 'infinity')
                 UNION ALL
                 SELECT 1 FROM byrd.runs WHERE parent_step IS NOT NULL AND NOT parent_told
                    AND (finished_at IS NOT NULL OR status = 'rollback_stuck') LIMIT 1"""
        return bool(self.cluster.rows(sql))

    def _why(self) -> str:
        rows = self.cluster.rows("SELECT id::text FROM byrd.runs WHERE finished_at IS NULL")
        return "\n".join(f"{row[0]}: {self.engine.get(row[0]).why()}" for row in rows)

    # -- what strikes them -----------------------------------------------------------------------

    def _worker(self, *, wait: bool) -> Any:
        env = {"SAGA_LEASE": "2", "SAGA_LONGEST_PAUSE": "0.05"}
        return self.cluster.worker(APP, env=env, wait=wait)

    def _kill(self) -> None:
        if self.kills_left == 0 or time.monotonic() < self._next_kill:
            return
        victim = self.rng.randrange(len(self._workers))
        self._workers[victim].kill()
        if self.rng.random() < 0.5:
            with self.cluster.redis() as client:
                client.flushall()
        self._workers[victim] = self._worker(wait=False)
        self.kills, self.kills_left = self.kills + 1, self.kills_left - 1
        self._next_kill = time.monotonic() + self.rng.uniform(0.5, 3.0)
        check_database(self.cluster.database_url)

    def _trouble_somebody(self) -> None:
        """Pause a run that goes on, whichever; or cancel one within another, by itself."""
        chance = self.rng.random()
        if chance > 0.2:
            return
        which = f"AND workflow = '{WITHIN}'" if chance < 0.02 else ""
        found = self.cluster.rows(f"SELECT id::text FROM byrd.runs WHERE status = 'running' {which} ORDER BY id")
        runs = [run_id for (run_id,) in found if run_id not in self.paused]  # each once, or the last would never end
        if not runs:
            return
        run = self.engine.get(self.rng.choice(runs))
        if chance < 0.02:
            self._told("cancelled within", run.cancel, compensate=self.rng.random() < 0.5)
        elif self._told("paused", run.pause):
            self.paused[run.id] = time.monotonic() + self.rng.uniform(0.0, 1.0)

    def _resume(self) -> None:
        """Resume what has been paused for long enough; one that was stuck meanwhile is paused again after that."""
        for (run_id,) in self.cluster.rows("SELECT id::text FROM byrd.runs WHERE status = 'paused'"):
            if time.monotonic() >= self.paused.get(run_id, 0.0):
                self._told("resumed", self.engine.get(run_id).resume)

    def _give_commands(self) -> None:
        sql = """SELECT run_id::text, count(*) FROM byrd.steps WHERE status = 'succeeded' AND kind <> 'compensation'
                  GROUP BY run_id"""
        done = dict(self.cluster.rows(sql))
        for course in self.courses:
            if course.command is not None and done.get(course.run.id, 0) >= course.after:
                command, course.command = course.command, None
                self._tell(course.run, command)

    def _tell(self, run: Any, command: str) -> None:
        if command == "cancel":
            self._told("cancelled", run.cancel)
        elif command == "compensate":
            self._told("cancelled with compensation", run.cancel, compensate=True)
        elif command == "terminate":
            compensate, grace = self.rng.random() < 0.5, self.rng.choice([0.0, 0.3])
            self._told("ended", run.cancel, compensate=compensate, terminate=True, grace=grace)
        elif self._told("paused", run.pause):
            self.paused[run.id] = time.monotonic() + self.rng.uniform(0.5, 2.0)
            if command == "roll back":
                self._told("rolled back while paused", run.rollback, reason="no more wanted")

    def _told(self, what: str, command: Callable[..., None], *args: Any, **kwargs: Any) -> bool:
        """Give a command; tell whether it was accepted: a run goes on while one thinks of it."""
        try:
            command(*args, **kwargs)
        except IllegalTransitionError:
            return False
        self.seen[what] += 1
        return True

    # -- what they need --------------------------------------------------------------------------

    def _signal(self, run_id: str, name: str) -> None:
        self.sent[run_id, name] = time.monotonic()
        with suppress(IllegalTransitionError):  # it has ended
            self.engine.get(run_id).signal(name, {"for": name.partition(":")[2]}, by="test")

    def _send_signals(self) -> None:
        mended = {course.run.id for course in self.courses if course.mended}
        chances = {"early": 1.0, "late": 1.0, "race": 0.3, "agreed": 0.3, "default": 0.0}
        for wait in self.engine.waiting(limit=1000):
            mode = wait.signal.partition(":")[0]
            chance = chances.get(mode, float(wait.run_id in mended))
            before = self.sent.get((wait.run_id, wait.signal), float("-inf"))
            if self.rng.random() < chance and time.monotonic() - before > _AGAIN_SECONDS:
                self._signal(wait.run_id, wait.signal)

    def _unstick(self) -> None:
        """Do what an operator does about rollbacks that are stuck."""
        for run in self.engine.list(status="rollback_stuck", limit=10 * NUMBER):
            failed = [s for s in run.steps() if s.kind == "compensation" and s.status in ("failed", "cancelled")]
            within = [step for step in failed if step.task == "byrd.workflow.compensation"]
            if not failed or (within == failed and self.rng.random() < 0.7):
                continue  # it goes on when the run within does
            step, how = self.rng.choice(failed), self.rng.choice(["skip", "by hand", "retry"])
            if how == "skip":
                self._told(how, run.skip, step.no, reason="it is gone", by="test")
            elif how == "by hand":
                self._told(how, run.done_by_hand, step.no, note="done", by="test")
            else:
                self._mend_undos(run)
                self._told("rollback retried", run.retry)

    def _mend_undos(self, run: Any) -> None:
        self.cluster.rows(
            """INSERT INTO mended SELECT 'undo ' || (s.args::json -> 0 ->> 'name') FROM byrd.steps c
                 JOIN byrd.steps s ON s.run_id = c.run_id AND s.no = c.compensates
                WHERE c.run_id = %s AND c.status IN ('failed','cancelled') ON CONFLICT DO NOTHING""",
            run.id,
        )

    # -- once they have ended --------------------------------------------------------------------

    def stuck(self) -> set[str]:
        """Return the runs that have a compensation which failed for good."""
        sql = "SELECT run_id::text FROM byrd.steps WHERE kind = 'compensation' AND status IN ('failed','cancelled')"
        return {row[0] for row in self.cluster.rows(sql)}

    def have_second_thoughts(self) -> None:
        """Retry or roll back some of the runs that have ended: each command is accepted, or refused, as it must be."""
        records = Records(self.cluster)
        for course in self.courses:
            case = Case(records, course.part, course.run.id)
            chance = self.rng.random()
            if case.run.status != "succeeded" and chance < 0.6:
                self._mend(course.part)
                accepted = self._told("retried", course.run.retry)
                assert accepted == case.can_be_retried, f"a retry was {accepted=}: {case}"
                course.mended |= accepted
                self.seen["retry refused"] += not accepted
            elif chance > 0.6:
                self._roll_back(case)
            elif chance < 0.2:
                for within in case.runs_within():
                    self._roll_back(within)

    def _roll_back(self, case: Case) -> None:
        accepted = self._told("rolled back", self.engine.get(case.run.id).rollback, reason="after all", by="test")
        assert accepted == case.can_be_rolled_back, f"a rollback was {accepted=}: {case}"
        self.seen["rollback refused"] += not accepted

    def _mend(self, part: Part) -> None:
        for leaf in all_leaves_of(part):
            if leaf.part.get("breaks"):
                self.cluster.rows("INSERT INTO mended VALUES (%s) ON CONFLICT DO NOTHING", leaf.name)

    def check(self) -> Counter[str]:
        """Check each run against its canvas; return what has become of them."""
        check_database(self.cluster.database_url)
        records, seen = Records(self.cluster), Counter[str]()
        for course in self.courses:
            case = Case(records, course.part, course.run.id, mended=course.mended)
            case.check()
            check_order(case.undone)
            seen += case.seen
        return seen


@pytest.mark.timeout(240 + 15 * NUMBER)
def test_random_sagas(cluster: Cluster) -> None:
    app = cluster.app(APP)
    cluster.rows(app.TABLES)
    driver = Driver(cluster, app.engine, random.Random(SEED))
    driver.submit(app, NUMBER)
    driver.settle(kills=4 + NUMBER // 15, trouble=True)
    stuck = driver.stuck()
    assert {run.id for run in app.engine.list(status="rollback_stuck", limit=10 * NUMBER)} == stuck
    counted = next((check.what for check in examine(app.engine) if check.name == "rollbacks"), "0 rollbacks stuck")
    assert counted.startswith(f"{len(stuck)} rollback")
    driver.seen["stuck"] += len(stuck)
    check_database(cluster.database_url)
    driver.settle(operator=True)
    driver.check()
    for _ in range(2):
        driver.have_second_thoughts()
        driver.settle(kills=1 + NUMBER // 60, operator=True)
    driver.seen += driver.check()
    log.info("%d runs, %d kills, %s", NUMBER, driver.kills, dict(driver.seen))
    assert driver.kills >= 2
    assert driver.seen["undone"] > NUMBER / 2, "too few rollbacks to show anything"
    never = sorted(_CERTAIN - driver.seen.keys())
    assert NUMBER < DEFAULT_NUMBER or not never, f"too few runs to show anything: {never}"
