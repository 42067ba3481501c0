"""What an operator does about a rollback, killed at every boundary of the command: it is given once, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from celery import chain

from byrd.errors import IllegalTransitionError
from byrd.testing import CrashPoints
from tests.cluster import Cluster, wait_until
from tests.crash_points.scenarios import EVERY, START, effects, slow

#: Only who gives the command dies here.  What dies between two statements of a transaction leaves as much as what dies
#: before its commit: nothing; so only with BYRD_CRASH_EVERY=1 it dies there, too.
BUT_THE_COMMAND = f"{START}|^(?!submitter)" if EVERY == 1 else f"{START}|^(?!submitter: .*(commit|publish))"
#: The compensation that is stuck, and the one that waits for it.
STUCK, NEXT = 3, 4


class Command(NamedTuple):
    """A command: how it is given, and what it leaves behind."""

    give: Callable[[Any], None]
    #: The event and what it says, beside who gave the command.
    event: str
    says: dict[str, str]
    #: What becomes of the compensation that was stuck, and how often it was called.
    status: str
    calls: int


COMMANDS = {
    "skip": Command(
        lambda run: run.skip(STUCK, reason="it was eaten", by="ann"),
        "compensation_skipped",
        {"reason": "it was eaten"},
        "skipped",
        1,
    ),
    "done_by_hand": Command(
        lambda run: run.done_by_hand(STUCK, note="I have called them", by="ann"),
        "done_by_hand",
        {"note": "I have called them"},
        "succeeded",
        1,
    ),
    "retry": Command(lambda run: run.retry(by="ann"), "rollback_retried", {}, "succeeded", 2),
}


class Operator:
    """Gives a command about a run that has come to rest; a worker of its own brings it there."""

    def __init__(self, cluster: Cluster, app: Any) -> None:
        self._cluster, self._app = cluster, app
        self._number = 0

    def reset(self) -> None:
        """Begin with a new key, and no effects."""
        self._number += 1
        self._cluster.rows("TRUNCATE effects")

    def act(self, canvas: Any, *, rest: str, event: str, command: Callable[[Any], None]) -> Any:
        """Submit; when the run is at rest, as its event says, give the command.

        Who does not know whether he gave it gives it again.
        """
        run = self._app.engine.submit(canvas, key=f"key-{self._number}")
        # Not by the engine: nobody could tell one of these questions from another.
        wait_until(lambda: self._events(run, rest), what=f"{rest} of {run.id}")
        [(status,)] = self._cluster.rows("SELECT status FROM byrd.runs WHERE id = %s", run.id)
        given = self._events(run, event)
        assert given in (0, 1)
        if given:
            with pytest.raises(IllegalTransitionError):
                command(run)
        else:
            assert status == rest, "there is no sign of the command, but the run has gone on"
            command(run)
        return run

    def _events(self, run: Any, event: str) -> int:
        sql = "SELECT count(*) FROM byrd.events WHERE run_id = %s AND event = %s"
        [(found,)] = self._cluster.rows(sql, run.id, event)
        return int(found)


@pytest.fixture
def operator(cluster: Cluster, app: Any) -> Operator:
    cluster.worker("tests.apps.crash", pool="solo", concurrency=1)
    return Operator(cluster, app)


def given_once(run: Any, command: Command, begun: datetime) -> None:
    """Check that it is on record who gave the command, when, and in which words, once."""
    [found] = [event for event in run.history() if event["event"] == command.event]
    assert found["detail"] == {**command.says, "by": "ann"}
    assert begun < found["at"] < datetime.now(UTC)


@slow
@pytest.mark.byrd_crash_points(skip=BUT_THE_COMMAND)
@pytest.mark.parametrize("name", COMMANDS)
def test_who_settles_a_rollback_that_is_stuck_dies(
    app: Any, operator: Operator, byrd_crash_points: CrashPoints, name: str
) -> None:
    command, begun = COMMANDS[name], datetime.now(UTC)

    def settle() -> Any:
        canvas = chain(app.reserve.si("hotel"), app.order_meal.si("meal"), app.fail.si())
        return operator.act(canvas, rest="rollback_stuck", event=command.event, command=command.give)

    def check(run: Any) -> None:
        assert run.status == "failed"
        assert [step.status for step in run.steps()[STUCK:]] == [command.status, "succeeded"]
        assert effects(app) == [("HOTEL hotel", 1), *(("MEAL", n + 1) for n in range(command.calls))]
        given_once(run, command, begun)
        [(stuck,)] = [(e["step_no"],) for e in run.history() if e["event"] == "rollback_stuck"]
        assert stuck == STUCK

    report = byrd_crash_points(app.engine, settle, reset=operator.reset, check=check)
    assert any("submitter: after the publish of tests.apps.crash." in boundary for boundary in report.boundaries)
    assert report.tried >= 10
    assert not report.unreached


@slow
@pytest.mark.byrd_crash_points(skip=BUT_THE_COMMAND)
def test_who_rolls_a_run_back_dies(app: Any, operator: Operator, byrd_crash_points: CrashPoints) -> None:
    begun = datetime.now(UTC)
    command = Command(
        lambda run: run.rollback(reason="nobody comes", by="ann"),
        "rollback_requested",
        {"reason": "nobody comes"},
        "succeeded",
        1,
    )

    def roll_back() -> Any:
        canvas = chain(app.reserve.si("hotel"), app.reserve.si("car"))
        return operator.act(canvas, rest="succeeded", event=command.event, command=command.give)

    def check(run: Any) -> None:
        assert run.status == "cancelled"
        assert run.get(timeout=0) == "CAR"
        assert effects(app) == [("CAR car", 1), ("HOTEL hotel", 1)]
        given_once(run, command, begun)
        assert [event["event"] for event in run.history()].count("rollback_started") == 1

    report = byrd_crash_points(app.engine, roll_back, reset=operator.reset, check=check)
    assert any("submitter: after the publish of tests.apps.crash." in boundary for boundary in report.boundaries)
    assert report.tried >= 10
    assert not report.unreached
