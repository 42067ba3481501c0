"""Several operations inside one task, killed at every boundary: all of them are done, or all are undone."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest

from tests.crash_points.scenarios import EVERY, START, Try, effects, slow

#: The task itself, for the rest is the same for each step.  What dies within a transaction leaves as much as what dies
#: before its commit: nothing; and beside one that only reads it leaves no more.  With BYRD_CRASH_EVERY=1 it dies there,
#: too, and a second time.
BUT_THE_TASK = f"{START}|^submitter"
PAIRS = 8 if EVERY == 1 else 0
if EVERY > 1:
    BUT_THE_TASK += r"|^(?!worker: .*(the commit of (INSERT|UPDATE|WITH)|byrd\.work))"


def all_in_order(app: Any, run: Any, *wanted: str) -> None:
    """Check what was done: each operation in its turn, and none again but those that died before their record."""
    traces = [name for name, _ in sorted(effects(app), key=lambda effect: effect[1])]
    assert [name for name, _ in groupby(traces)] == list(wanted)
    assert len(traces) - len(wanted) <= run.steps()[0].preemptions


@slow
@pytest.mark.byrd_crash_points(skip=BUT_THE_TASK)
def test_all_operations_are_done(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.get(timeout=0) == ["A", "B"]
        all_in_order(app, run, "take a", "take b")

    report = attempt(lambda: app.all_or_nothing.s("a", "b"), check=check, least=9)
    assert sum("effects" in name for name in report.boundaries) >= 8, report.boundaries


@slow
@pytest.mark.byrd_crash_points(skip=BUT_THE_TASK, pairs=PAIRS)
def test_or_all_are_undone(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.status == "failed"
        with pytest.raises(ValueError, match="it is not to be had"):
            run.get(timeout=0)
        assert "in take" in run.info.error, "whoever undoes it, it should say where it was raised"
        all_in_order(app, run, "take a", "take b", "give back B for b", "give back A for a")

    # The traceback of an attempt that goes on with the undoing is another one.
    canvas = lambda: app.all_or_nothing.s("a", "b", "refused")  # noqa: E731
    report = attempt(canvas, check=check, same=lambda run: str(run.status), least=18)
    assert sum("effects" in name for name in report.boundaries) >= 16, report.boundaries


@slow
@pytest.mark.byrd_crash_points(skip=BUT_THE_TASK, pairs=PAIRS)
def test_all_are_undone_and_then_done_anew(app: Any, attempt: Try) -> None:
    def check(run: Any) -> None:
        assert run.get(timeout=0) == ["A", "B"]
        assert run.steps()[0].retries == 1
        all_in_order(app, run, "take a", "give back A for a", "take a", "take b")

    report = attempt(lambda: app.all_at_the_second_time.s("a", "b"), check=check, least=15)
    assert sum("effects" in name for name in report.boundaries) >= 16, report.boundaries
